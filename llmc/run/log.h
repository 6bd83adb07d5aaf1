/* What a run says: a line per step on the console, a record per step in metrics.jsonl. A record is one JSON object in one line,
 * appended whole by one write, so that it survives kill -9; doubles have 9 significant digits (time: milliseconds); NaN and infinity are null. */
#ifndef LLMC_RUN_LOG_H
#define LLMC_RUN_LOG_H
#include "../base/error.h"
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif
/* Builds one record. */
typedef struct { char *text; size_t n, capacity; } Record;
void record_begin(Record *r, const char *kind);               /* {"kind":"...","time":seconds since 1970 */
void record_int(Record *r, const char *name, int64_t value);
void record_double(Record *r, const char *name, double value);
void record_string(Record *r, const char *name, const char *value);  /* escaped */
/* Metrics file of a run; a half line left by a crash is closed off with a newline on opening. */
typedef struct {
    int fd;     /* -1: nobody's log, records are dropped */
    bool torn;  /* the last write failed and may have left half a line: the next one closes it off */
} MetricsLog;
bool metrics_open(MetricsLog *log, const char *path, Error *e);
bool metrics_write(MetricsLog *log, Record *r, Error *e);     /* closes the object, writes it, frees r */
void metrics_close(MetricsLog *log);

/* Progress for long work, on stderr: on a terminal one line rewritten in place, in a file plain lines at most every 10 s. */
typedef struct {
    const char *what, *unit;
    double total, started, last;
    bool terminal, quiet;
} Progress;
void progress_begin(Progress *p, const char *what, const char *unit, double total, bool quiet);
void progress_update(Progress *p, double done);   /* done, rate, time left */
void progress_end(Progress *p, double done);
/* 93784 -> "1d 2h", 3725 -> "1h 2m", 59.4 -> "59s" */
void format_duration(char out[32], double seconds);
void format_bytes(char out[32], double bytes);    /* "1.50 GiB" */
void format_count(char out[32], double n);        /* "124.4M" */
#ifdef __cplusplus
}
#endif
#endif
