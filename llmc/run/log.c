/* Records for metrics.jsonl, progress of long work, and numbers as people read them. Not here: what is recorded. */
#include "log.h"
#include "../base/io.h"
#include "../base/timer.h"
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* ---- records ---------------------------------------------------------------------------------------------------- */

static void record_append(Record *r, const char *text, size_t n) {
    if (r->n + n > r->capacity) {
        r->capacity = 2 * (r->n + n) + 256;
        r->text = xrealloc(r->text, r->capacity);
    }
    memcpy(r->text + r->n, text, n);
    r->n += n;
}

static void record_text(Record *r, const char *text) { record_append(r, text, strlen(text)); }

/* Length of the valid UTF-8 sequence at s, 0 if there is none (RFC 3629: no overlong forms, surrogates, or values past 10FFFF).
 * A string's NUL ends a sequence early like any other byte that is no continuation. */
static int utf8_length(const unsigned char *s) {
    if (s[0] < 0x80) return 1;
    int n = s[0] >= 0xC2 && s[0] <= 0xDF ? 2 : (s[0] & 0xF0) == 0xE0 ? 3 : s[0] >= 0xF0 && s[0] <= 0xF4 ? 4 : 0;
    for (int i = 1; i < n; i++)
        if ((s[i] & 0xC0) != 0x80) return 0;
    if ((s[0] == 0xE0 && s[1] < 0xA0) || (s[0] == 0xED && s[1] > 0x9F)) return 0;
    if ((s[0] == 0xF0 && s[1] < 0x90) || (s[0] == 0xF4 && s[1] > 0x8F)) return 0;
    return n;
}

static void record_quoted(Record *r, const char *value) {
    record_text(r, "\"");
    for (const unsigned char *s = (const unsigned char *)value; *s;) {
        int n = utf8_length(s);
        char escaped[8];
        if (n == 0) record_text(r, "\xEF\xBF\xBD");
        else if (*s == '"' || *s == '\\') snprintf(escaped, sizeof escaped, "\\%c", *s), record_text(r, escaped);
        else if (*s < 0x20) snprintf(escaped, sizeof escaped, "\\u%04x", *s), record_text(r, escaped);
        else record_append(r, (const char *)s, (size_t)n);
        s += n ? n : 1;
    }
    record_text(r, "\"");
}

static void record_name(Record *r, const char *name) {
    record_text(r, ",");
    record_quoted(r, name);
    record_text(r, ":");
}

void record_begin(Record *r, const char *kind) {
    *r = (Record){0};
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    char time[64];
    snprintf(time, sizeof time, ",\"time\":%lld.%03ld", (long long)now.tv_sec, now.tv_nsec / 1000000);
    record_text(r, "{\"kind\":");
    record_quoted(r, kind);
    record_text(r, time);
}

void record_int(Record *r, const char *name, int64_t value) {
    char text[32];
    snprintf(text, sizeof text, "%lld", (long long)value);
    record_name(r, name);
    record_text(r, text);
}

void record_double(Record *r, const char *name, double value) {
    char text[40];
    snprintf(text, sizeof text, "%.9g", value);
    record_name(r, name);
    record_text(r, isfinite(value) ? text : "null");
}

void record_string(Record *r, const char *name, const char *value) {
    record_name(r, name);
    if (value) record_quoted(r, value);
    else record_text(r, "null");
}

/* ---- metrics file ----------------------------------------------------------------------------------------------- */

/* Ends the half line that a crash or a full disk left, so that the next record has a line of its own. */
static bool close_half_line(int fd, Error *e) {
    struct stat st;
    char last = '\n';
    if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_size > 0 && pread(fd, &last, 1, st.st_size - 1) != 1)
        return fail(e, EXIT_STORAGE, "could not read the end of the file: %s; check the disk", strerror(errno));
    return last == '\n' || line_append(fd, "\n", 1, e);
}

bool metrics_open(MetricsLog *log, const char *path, Error *e) {
    log->torn = false;
    log->fd = open(path, O_RDWR | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
    if (log->fd < 0)
        return fail(e, EXIT_STORAGE, "%s: could not open for appending: %s; check that its directory exists and may be written to", path,
                    strerror(errno));
    if (close_half_line(log->fd, e)) return true;
    fail_in(e, "%s", path);
    metrics_close(log);
    return false;
}

bool metrics_write(MetricsLog *log, Record *r, Error *e) {
    record_text(r, "}\n");
    bool ok = log->fd < 0 || ((!log->torn || close_half_line(log->fd, e)) && line_append(log->fd, r->text, r->n, e));
    log->torn = !ok;
    free(r->text);
    *r = (Record){0};
    return ok || fail_in(e, "metrics file");
}

void metrics_close(MetricsLog *log) {
    if (log->fd >= 0) close(log->fd);
    log->fd = -1;
}

/* ---- progress --------------------------------------------------------------------------------------------------- */

void progress_begin(Progress *p, const char *what, const char *unit, double total, bool quiet) {
    double now = seconds_now();
    *p = (Progress){.what = what, .unit = unit, .total = total, .started = now, .last = now, .terminal = isatty(STDERR_FILENO), .quiet = quiet};
}

/* "tokenizing: 31.2% of 3.2M tokens, 1.0M tokens/s, 2s left"; without a known total "tokenizing: 1.0M tokens, ...". */
static void progress_text(const Progress *p, double done, double now, char *out, size_t n) {
    char count[32], rate_text[32], left[48] = "", duration[32];
    double seconds = now - p->started, rate = seconds > 0 ? done / seconds : 0;
    format_count(rate_text, rate);
    format_count(count, p->total > 0 ? p->total : done);
    if (p->total > 0 && rate > 0) {
        format_duration(duration, fmax(0, p->total - done) / rate);
        snprintf(left, sizeof left, ", %s left", duration);
    }
    if (p->total > 0)
        snprintf(out, n, "%s: %.1f%% of %s %s, %s %s/s%s", p->what, 100 * done / p->total, count, p->unit, rate_text, p->unit, left);
    else snprintf(out, n, "%s: %s %s, %s %s/s", p->what, count, p->unit, rate_text, p->unit);
}

void progress_update(Progress *p, double done) {
    double now = seconds_now();
    if (p->quiet || now - p->last < (p->terminal ? 0.1 : 10)) return;
    p->last = now;
    char text[256];
    progress_text(p, done, now, text, sizeof text);
    fprintf(stderr, p->terminal ? "\r%s\033[K" : "%s\n", text);
    fflush(stderr);
}

void progress_end(Progress *p, double done) {
    if (p->quiet) return;
    char count[32], rate[32], duration[32];
    double seconds = seconds_now() - p->started;
    format_count(count, done);
    format_count(rate, seconds > 0 ? done / seconds : 0);
    format_duration(duration, seconds);
    fprintf(stderr, "%s%s: %s %s in %s (%s %s/s)%s\n", p->terminal ? "\r" : "", p->what, count, p->unit, duration, rate, p->unit,
            p->terminal ? "\033[K" : "");
    fflush(stderr);
}

/* ---- numbers for people ----------------------------------------------------------------------------------------- */

void format_duration(char out[32], double seconds) {
    if (!(seconds >= 0 && seconds < 1e15)) {
        snprintf(out, 32, "?");
        return;
    }
    /* Two units, the smaller one cut, not rounded: 59.999 minutes are "59m 59s". */
    long long s = (long long)seconds;
    if (s < 60) snprintf(out, 32, "%llds", s);
    else if (s < 3600) snprintf(out, 32, "%lldm %llds", s / 60, s % 60);
    else if (s < 86400) snprintf(out, 32, "%lldh %lldm", s / 3600, s / 60 % 60);
    else snprintf(out, 32, "%lldd %lldh", s / 86400, s / 3600 % 24);
}

/* value in the largest unit that leaves at least 1 of it after rounding to the digits shown. */
static int scale_down(double *value, double step, double half_digit, int units) {
    int unit = 0;
    while (unit < units - 1 && fabs(*value) >= step - half_digit) {
        *value /= step;
        unit++;
    }
    return unit;
}

void format_bytes(char out[32], double bytes) {
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
    int unit = scale_down(&bytes, 1024, 0.005, 6);
    snprintf(out, 32, fabs(bytes) < 1e12 ? "%.*f %s" : "%.*g %s", unit ? 2 : 0, bytes, units[unit]);
}

void format_count(char out[32], double n) {
    static const char *const units[] = {"", "K", "M", "B", "T"};
    int unit = scale_down(&n, 1000, 0.05, 5);
    snprintf(out, 32, fabs(n) < 1e12 ? "%.*f%s" : "%.*g%s", unit || n != floor(n) ? 1 : 0, n, units[unit]);
}
