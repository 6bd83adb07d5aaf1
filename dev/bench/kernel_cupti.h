/* Records for kernel_trace.h from CUPTI's activity API, loaded at run time. */
#ifndef LLMC_BENCH_KERNEL_CUPTI_H
#define LLMC_BENCH_KERNEL_CUPTI_H
#include "../../llmc/base/error.h"
#include "kernel_trace.h"

/* False where the build found no cupti.h; EXIT_USAGE. */
bool cupti_built(Error *e);

/* Kernels, fills and copies of all streams go into t, those of graphs one by one, until cupti_end. One trace at a time. EXIT_DEVICE: CUPTI is not
 * there or refuses; the program goes on without it. LLMC_CUPTI in the environment names another library. */
bool cupti_begin(Trace *t, Error *e);
bool cupti_discard(Error *e);      /* empties t; the device has been waited for */
bool cupti_end(Error *e);          /* t is complete, its names demangled; the device has been waited for */
#endif
