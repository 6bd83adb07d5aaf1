/* What ran on a GPU, kernel by kernel: where the time of a step goes, when nothing ran, which kernels stand around a gap, which overlap.
 * Made from single records of kernels, fills and copies, whoever takes them (kernel_cupti.h); needs neither CUDA nor a GPU. */
#ifndef LLMC_BENCH_KERNEL_TRACE_H
#define LLMC_BENCH_KERNEL_TRACE_H
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

enum { TRACE_GAP = 2000 };     /* ns; a longer gap is counted by the kernels around it */

typedef enum { TRACE_KERNEL, TRACE_FILL, TRACE_COPY /* within the device */, TRACE_HOST_COPY } TraceKind;

typedef struct {
    TraceKind kind;
    int name;                  /* index into Trace.names; trace_add sets it */
    uint32_t stream;
    uint64_t start, end;       /* ns */
    uint32_t grid[3], block[3], registers, shared; /* kernels; shared: bytes a block, static and dynamic */
    uint64_t bytes;            /* fills and copies */
} TraceEvent;

typedef struct {
    TraceEvent *events;
    size_t n, room;
    char **names;
    int n_names;
    size_t dropped;            /* records that whoever takes them has lost */
    size_t untimed;            /* records without a start and an end after it; not among the events */
} Trace;

void trace_add(Trace *t, const char *name, TraceEvent e); /* in any order; name is copied */
void trace_clear(Trace *t);    /* as if nothing had been added; frees all */

/* A kernel's name for people, from the demangled one: without result, arguments and namespaces; template arguments stay, those inside them go. */
void trace_short_name(char *out, size_t size, const char *demangled);

/* Launches of one kernel with one shape. */
typedef struct {
    TraceEvent first;
    size_t calls;
    uint64_t total, least, most, bytes;
    uint64_t own;              /* what they add to the time in which something ran; a copy to or from the host: what it takes of gaps */
} TraceRow;

/* Gaps over TRACE_GAP from the end of one activity to the start of another. */
typedef struct { int after, before; size_t n; uint64_t total, most, copying; } TracePair;

/* A gap: time in which neither a kernel nor a fill nor a copy within the device runs, on any stream. Copies to and from the host do not fill it;
 * copying is what they take of it. span = busy + idle = the sum of the rows' own + idle - copying. */
typedef struct {
    char **names;              /* short, no two alike; as Trace.names */
    int n_names;
    TraceRow *rows;            /* most own time first */
    size_t n_rows;
    TracePair *pairs;          /* most time first */
    size_t n_pairs;
    size_t activities;         /* without copies to and from the host */
    uint64_t span;             /* from the first start to the last end */
    uint64_t busy, idle, copying;
    size_t gaps, wide_gaps;    /* all, and over TRACE_GAP */
    uint64_t wide, widest;
    size_t early, beside;      /* activities that begin before the one in front, of their stream, of another, has ended */
    uint64_t early_time, beside_time;
} TraceReport;

TraceReport trace_report(Trace *t); /* sorts the events */
void trace_report_free(TraceReport *r);

/* What is known beside the trace. Seconds are of a step. */
typedef struct { size_t steps; double traced, untraced; } TraceSteps;
void trace_print(FILE *out, const Trace *t, const TraceReport *r, TraceSteps s);
void trace_json(FILE *out, const Trace *t, const TraceReport *r, TraceSteps s); /* members of an object: "trace", "kernels", "gaps" */
#endif
