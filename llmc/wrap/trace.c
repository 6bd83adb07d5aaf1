/* Writes a timeline of ops in the Trace Event Format (array form) that chrome://tracing and Perfetto open: one complete event per op, with
 * bytes, FLOPs and rates; marks as instant events. Waits for every op to finish, so that times are true; overlap is lost.
 * Not for long runs: after MAX_EVENTS it goes on adding up for the summary but writes no more events. */
#include "../base/timer.h"
#include "wrapper.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_EVENTS = 200000, BUFFER_BYTES = 1 << 20 };

typedef struct {
    uint64_t calls;
    double seconds, bytes, flops;
} Total;

typedef struct {
    Wrapper w;
    FILE *file;
    char *path;
    double started;
    uint64_t events, dropped;
    Total totals[OP_COUNT];
} Trace;

static bool begin_event(Trace *trace) {
    if (trace->events >= MAX_EVENTS) { trace->dropped++; return false; }
    trace->events++;
    fputs(",\n", trace->file);
    return true;
}

static void write_op(Trace *trace, OpId op, const void *args, double begin, double seconds, double bytes, double flops) {
    if (!begin_event(trace)) return;
    const double rate = seconds > 1e-9 ? 1e-9 / seconds : 1; /* per nanosecond; the clock knows nothing shorter */
    fprintf(trace->file, "{\"name\":\"%s\",\"cat\":\"op\",\"ph\":\"X\",\"pid\":1,\"tid\":1,\"ts\":%.3f,\"dur\":%.3f,\"args\":{", op_names[op],
            1e6 * (begin - trace->started), 1e6 * seconds);
    OpSize sizes[OP_MAX_SIZES];
    int n = op_sizes(op, args, sizes);
    for (int i = 0; i < n; i++) fprintf(trace->file, "\"%s\":%zu,", sizes[i].name, sizes[i].value);
    fprintf(trace->file, "\"bytes\":%.0f,\"GB/s\":%.3f,\"FLOPs\":%.0f,\"GFLOP/s\":%.3f}}", bytes, bytes * rate, flops, flops * rate);
}

static void trace_run(Backend *b, OpId op, const void *args) {
    Trace *trace = (Trace *)b;
    if (trace->w.planning) { op_run(b->inner, op, args); return; }
    b->inner->sync(b->inner);
    double begin = seconds_now();
    op_run(b->inner, op, args);
    b->inner->sync(b->inner);
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
    wrapper_mark(b, mark, unit);
    if (trace->w.planning || !begin_event(trace)) return;
    fprintf(trace->file, "{\"name\":\"%s\",\"cat\":\"mark\",\"ph\":\"i\",\"s\":\"t\",\"pid\":1,\"tid\":1,\"ts\":%.3f,\"args\":{\"unit\":%zu}}",
            names[mark], 1e6 * (seconds_now() - trace->started), unit);
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
