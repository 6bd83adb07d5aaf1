/* The three kinds of error.
 * The user's (flags, files, data): returned as an Error value and printed once, by main.
 * Ours (an invariant that broke): CHECK prints the place and the numbers, and aborts.
 * The machine's (allocation, device): each backend handles it in one place. */
#ifndef LLMC_BASE_ERROR_H
#define LLMC_BASE_ERROR_H
#include <stdbool.h>
#include <stddef.h>
#ifdef __cplusplus
extern "C" {
#endif

/* Exit codes of every program here. */
enum {
    EXIT_OK = 0,
    EXIT_USAGE = 2,         /* bad flag or combination of flags */
    EXIT_DATA = 3,          /* bad or missing input file, dataset, tokenizer, weights */
    EXIT_NO_CHECKPOINT = 4, /* checkpoints exist, none is valid */
    EXIT_NONFINITE = 5,     /* too many non-finite steps in a row */
    EXIT_HANG = 6,
    EXIT_PEER = 7,
    EXIT_STORAGE = 8,       /* could not write: disk full, I/O error */
    EXIT_DEVICE = 9,        /* the GPU or the machine failed during the run */
    EXIT_REQUEUE = 75       /* stopped on request; state saved; run the same command again */
};

/* code 0 means "no error". text is one complete message: what was found, what was expected, where,
 * and what to do about it. It ends without a newline. */
typedef struct {
    int code;
    char text[2000];
} Error;

/* Fills *e (code = one of the exit codes above) and returns false, so that a function can
 * `return fail(e, EXIT_DATA, "%s: found %d tokens, expected at least %d; ...", ...)`.
 * e may be NULL (the message is dropped). Messages longer than the buffer are cut, never overrun. */
bool fail(Error *e, int code, const char *format, ...) __attribute__((format(printf, 3, 4)));

#ifdef __clang_analyzer__ /* which cannot see from another file that the result is always false */
#define fail(...) (fail(__VA_ARGS__), false)
#endif

/* Puts "prefix: " before an error's text (which file, which tensor); returns false. */
bool fail_in(Error *e, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Prints "error: text" to stderr and returns the exit code. */
int error_print(const Error *e);

/* Invariants of ours. Never for bad input. */
void check_failed(const char *file, int line, const char *condition, const char *format, ...)
    __attribute__((format(printf, 4, 5), noreturn));
#define CHECK(condition, ...)                                                                                          \
    do {                                                                                                               \
        if (!(condition)) check_failed(__FILE__, __LINE__, #condition, __VA_ARGS__);                                   \
    } while (0)

/* malloc/calloc/realloc that abort with the size on failure: for small host structures only.
 * Tensors are allocated by the backend, which reports a memory table. */
void *xmalloc(size_t bytes);
void *xcalloc(size_t n, size_t bytes);
void *xrealloc(void *p, size_t bytes);
char *xstrdup(const char *s);
/* printf into a fresh string; the caller frees it. */
char *xasprintf(const char *format, ...) __attribute__((format(printf, 1, 2)));

#ifdef __cplusplus
}
#endif
#endif
