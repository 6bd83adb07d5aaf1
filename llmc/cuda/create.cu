/* The one place that knows both compute types: a CUDA (or emulated) backend by the name of its dtype. Compiled once. */
#include "../ops.h"
#include <string.h>

#ifdef LLMC_EMU
#define CREATE emu_backend_create
#define NS(dtype) emu_##dtype
#else
#define CREATE cuda_backend_create
#define NS(dtype) cuda_##dtype
#endif
namespace NS(bf16) { Backend *backend_create(const CudaOptions *, Error *); }
namespace NS(fp32) { Backend *backend_create(const CudaOptions *, Error *); }

extern "C" Backend *CREATE(const CudaOptions *options, Error *e) {
    if (!strcmp(options->dtype, "bf16")) return NS(bf16)::backend_create(options, e);
    if (!strcmp(options->dtype, "fp32")) return NS(fp32)::backend_create(options, e);
    fail(e, EXIT_USAGE, "--dtype %s: expected bf16 or fp32", options->dtype);
    return NULL;
}
