/* Errors as values, invariants that abort, allocation that cannot be forgotten. */
#include "error.h"
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

bool (fail)(Error *e, int code, const char *format, ...) {
    if (!e) return false;
    e->code = code;
    va_list args;
    va_start(args, format);
    vsnprintf(e->text, sizeof e->text, format, args);
    va_end(args);
    return false;
}

bool fail_in(Error *e, const char *format, ...) {
    if (!e) return false;
    char old[sizeof e->text];
    memcpy(old, e->text, sizeof old);
    va_list args;
    va_start(args, format);
    int n = vsnprintf(e->text, sizeof e->text, format, args);
    va_end(args);
    size_t at = n < 0 ? 0 : (size_t)n, room = sizeof e->text - 1;
    if (at + 2 >= room) return false;
    size_t length = strnlen(old, room - at - 2);
    memcpy(e->text + at, ": ", 2);
    memcpy(e->text + at + 2, old, length);
    e->text[at + 2 + length] = 0;
    return false;
}

int error_print(const Error *e) {
    fflush(stdout);
    fprintf(stderr, "error: %s\n", e->text);
    return e->code;
}

void check_failed(const char *file, int line, const char *condition, const char *format, ...) {
    fflush(stdout);
    fprintf(stderr, "internal error at %s:%d: %s is false: ", file, line, condition);
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    abort();
}

void *xmalloc(size_t bytes) {
    void *p = malloc(bytes ? bytes : 1);
    CHECK(p, "out of host memory: %zu bytes", bytes);
    return p;
}

void *xcalloc(size_t n, size_t bytes) {
    void *p = calloc(n ? n : 1, bytes ? bytes : 1);
    CHECK(p, "out of host memory: %zu x %zu bytes", n, bytes);
    return p;
}

void *xrealloc(void *p, size_t bytes) {
    p = realloc(p, bytes ? bytes : 1);
    CHECK(p, "out of host memory: %zu bytes", bytes);
    return p;
}

char *xstrdup(const char *s) {
    size_t n = strlen(s) + 1;
    return memcpy(xmalloc(n), s, n);
}

char *xasprintf(const char *format, ...) {
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    int n = vsnprintf(NULL, 0, format, args);
    va_end(args);
    CHECK(n >= 0, "bad format %s", format);
    char *s = xmalloc((size_t)n + 1);
    vsnprintf(s, (size_t)n + 1, format, again);
    va_end(again);
    return s;
}
