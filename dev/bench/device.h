/* What both benchmarks need of a device: opening a backend by name, marks in its stream of work with the times between them, and memory filled
 * with random numbers. On a GPU the marks are events, taken where the work is done; elsewhere the host's clock after waiting. */
#ifndef LLMC_BENCH_DEVICE_H
#define LLMC_BENCH_DEVICE_H
#include "../../llmc/ops.h"
#ifdef __cplusplus
extern "C" {
#endif

enum { MARKS = 1 << 16 };

/* device: cpu, cuda, emu. options as cuda_backend_create takes them (dtype NULL: bf16; the CPU knows fp32 alone). NULL with *e set. */
Backend *bench_open(const char *device, const CudaOptions *options, Error *e);
void bench_mark(Backend *b, int i);                      /* i < MARKS: notes the time when all work issued so far is done */
double bench_between(Backend *b, int i, int j);          /* seconds from mark i to mark j; waits for j */
void bench_copy(Backend *b, void *to, const void *from, size_t bytes); /* within the device, in order with the ops */
void bench_fill(Backend *b, OperandKind kind, void *p, size_t bytes, size_t V); /* tokens in [0, V), frequent ones more often; a usable Step */

/* CUDA builds, device_clock.cu: the same for a CUDA backend. */
void cuda_mark(Backend *b, int i);
double cuda_between(int i, int j);
void cuda_copy(Backend *b, void *to, const void *from, size_t bytes);
/* "580.1 | 13.0" of driver and runtime, for records */
void cuda_versions(char text[100]);

typedef struct { double median, low, high, least, most; int runs; } Timing; /* low, high: the 10th and 90th percentile */
Timing bench_timing(double *seconds, int n);             /* sorts them */

#ifdef __cplusplus
}
#endif
#endif
