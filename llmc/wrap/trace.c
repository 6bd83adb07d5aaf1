/* Writes a timeline of ops in the Trace Event Format (array form) that chrome://tracing and Perfetto open: one complete event per op, with
 * bytes, FLOPs and rates; marks as instant events; what travels between ranks as spans on rows of their own. Waits for every op to finish, so that times
 * are true; overlap of ops is lost, that of ops with communication is not.
 * Not for long runs: after MAX_EVENTS it goes on adding up for the summary but writes no more events. */
#include "../base/timer.h"
#include "wrapper.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_EVENTS = 200000, BUFFER_BYTES = 1 << 20, MAX_ROWS = 8 };

typedef struct {
    uint64_t calls;
    double seconds, bytes, flops;
} Total;

typedef struct {
    Wrapper w;
    FILE *file;
    char *path;
    double started;
    /* under the file's lock: */
    const char *rows[MAX_ROWS]; /* beside that of the ops */
    size_t n_rows;
    uint64_t events, dropped;
    Total totals[OP_COUNT];
} Trace;

/* True: an event may be written, and end_event follows. Events come from several threads. */
static bool begin_event(Trace *trace) {
    flockfile(trace->file);
    if (trace->events++ < MAX_EVENTS) return fputs(",\n", trace->file) >= 0;
    trace->dropped++, trace->events--;
    funlockfile(trace->file);
    return false;
}
static void end_event(Trace *trace) { funlockfile(trace->file); }

static void write_op(Trace *trace, OpId op, const void *args, double begin, double seconds, double bytes, double flops) {
    if (!begin_event(trace)) return;
    const double rate = seconds > 1e-9 ? 1e-9 / seconds : 1; /* per nanosecond; the clock knows nothing shorter */
    fprintf(trace->file, "{\"name\":\"%s\",\"cat\":\"op\",\"ph\":\"X\",\"pid\":1,\"tid\":1,\"ts\":%.3f,\"dur\":%.3f,\"args\":{", op_names[op],
            1e6 * (begin - trace->started), 1e6 * seconds);
    OpSize sizes[OP_MAX_SIZES];
    int n = op_sizes(op, args, sizes);
    for (int i = 0; i < n; i++) fprintf(trace->file, "\"%s\":%zu,", sizes[i].name, sizes[i].value);
    fprintf(trace->file, "\"bytes\":%.0f,\"GB/s\":%.3f,\"FLOPs\":%.0f,\"GFLOP/s\":%.3f}}", bytes, bytes * rate, flops, flops * rate);
    end_event(trace);
}

/* Of the device alone: what travels between ranks goes on. */
static void sync_device(Backend *b) {
    while (b->inner) b = b->inner;
    b->sync(b);
}

static void trace_run(Backend *b, OpId op, const void *args) {
    Trace *trace = (Trace *)b;
    if (trace->w.planning) { op_run(b->inner, op, args); return; }
    sync_device(b);
    double begin = seconds_now();
    op_run(b->inner, op, args);
    sync_device(b);
    double seconds = seconds_now() - begin, bytes = op_bytes(b->inner, op, args), flops = op_flops(op, args);
    Total *t = &trace->totals[op];
    t->calls++;
    t->seconds += seconds;
    t->bytes += bytes;
    t->flops += flops;
    write_op(trace, op, args, begin, seconds, bytes, flops);
}

static void trace_mark(Backend *b, Mark mark, size_t unit) {
    static const char *const names[] = {[MARK_PARAMS_NEEDED] = "params_needed", [MARK_GRADS_FINAL] = "grads_final"};
    Trace *trace = (Trace *)b;
    double at = seconds_now();
    wrapper_mark(b, mark, unit);
    if (trace->w.planning || !begin_event(trace)) return;
    fprintf(trace->file, "{\"name\":\"%s\",\"cat\":\"mark\",\"ph\":\"i\",\"s\":\"t\",\"pid\":1,\"tid\":1,\"ts\":%.3f,\"args\":{\"unit\":%zu}}",
            names[mark], 1e6 * (at - trace->started), unit);
    end_event(trace);
}

static size_t row_number(Trace *trace, const char *row) {
    size_t i = 0;
    while (i < trace->n_rows && strcmp(trace->rows[i], row) != 0) i++;
    CHECK(i < MAX_ROWS, "more than %d rows in a trace", MAX_ROWS);
    if (i == trace->n_rows) {
        trace->rows[trace->n_rows++] = row;
        fprintf(trace->file, "{\"name\":\"thread_name\",\"ph\":\"M\",\"pid\":1,\"tid\":%zu,\"args\":{\"name\":\"%s\"}},\n", i + 2, row);
    }
    return i + 2;
}

void trace_backend_span(Backend *b, const char *row, const char *name, size_t unit, double begin, double end) {
    Trace *trace = (Trace *)b;
    if (!begin_event(trace)) return;
    size_t number = row_number(trace, row);
    fprintf(trace->file, "{\"name\":\"%s\",\"cat\":\"%s\",\"ph\":\"X\",\"pid\":1,\"tid\":%zu,\"ts\":%.3f,\"dur\":%.3f,\"args\":{\"unit\":%zu}}", name, row, number,
            1e6 * (begin - trace->started), 1e6 * (end - begin), unit);
    end_event(trace);
}

typedef struct { OpId op; Total total; } Row;

static int slower_first(const void *x, const void *y) {
    double a = ((const Row *)x)->total.seconds, b = ((const Row *)y)->total.seconds;
    return (a < b) - (a > b);
}

void trace_backend_summary(Backend *b, FILE *out) {
    const Trace *trace = (Trace *)b;
    Row rows[OP_COUNT];
    double all = 0;
    for (int op = 0; op < OP_COUNT; op++) {
        rows[op] = (Row){(OpId)op, trace->totals[op]};
        all += trace->totals[op].seconds;
    }
    qsort(rows, OP_COUNT, sizeof *rows, slower_first);
    fprintf(out, "%-20s %9s %11s %6s %9s %9s\n", "op", "calls", "ms", "%", "GB/s", "GFLOP/s");
    for (int i = 0; i < OP_COUNT; i++) {
        const Total *t = &rows[i].total;
        if (!t->calls) continue;
        double seconds = t->seconds > 0 ? t->seconds : 1e-9;
        fprintf(out, "%-20s %9llu %11.3f %6.2f %9.2f %9.2f\n", op_names[rows[i].op], (unsigned long long)t->calls, 1e3 * t->seconds,
                100 * t->seconds / (all > 0 ? all : 1), 1e-9 * t->bytes / seconds, 1e-9 * t->flops / seconds);
    }
    fprintf(out, "%-20s %9s %11.3f\n", "all ops", "", 1e3 * all);
    if (trace->dropped)
        fprintf(out, "%s holds the first %llu events; %llu later ones are in this table only\n", trace->path,
                (unsigned long long)trace->events, (unsigned long long)trace->dropped);
}

static void trace_destroy(Backend *b) {
    Trace *trace = (Trace *)b;
    fputs("\n]\n", trace->file);
    bool bad = ferror(trace->file);
    if (fclose(trace->file) || bad) fprintf(stderr, "warning: %s: could not be written in full; the trace is not complete\n", trace->path);
    trace_backend_summary(b, stderr);
    free(trace->path);
    wrapper_destroy(b);
}

Backend *trace_backend_create(Backend *inner, const char *path, Error *e) {
    FILE *file = fopen(path, "w");
    if (!file) {
        fail(e, EXIT_STORAGE, "%s: cannot create the trace file: %s", path, strerror(errno));
        return NULL;
    }
    setvbuf(file, NULL, _IOFBF, BUFFER_BYTES);
    Trace *trace = xcalloc(1, sizeof *trace);
    wrapper_init(&trace->w, "trace", inner, trace_run);
    trace->w.backend.mark = trace_mark;
    trace->w.backend.destroy = trace_destroy;
    trace->file = file;
    trace->path = xstrdup(path);
    trace->started = seconds_now();
    fprintf(file, "[\n{\"name\":\"process_name\",\"ph\":\"M\",\"pid\":1,\"args\":{\"name\":\"llmc %s %s\"}}", inner->name, inner->dtype);
    return &trace->w.backend;
}
