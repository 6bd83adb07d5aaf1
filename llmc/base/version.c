/* What this build is. The Makefile defines LLMC_BUILD_ID for this file alone. */
#include "version.h"
#ifndef LLMC_BUILD_ID
#define LLMC_BUILD_ID "unversioned"
#endif

const char *llmc_build_id(void) { return LLMC_BUILD_ID; }

void version_print(FILE *out) {
    fprintf(out, "llmc %s, %s", LLMC_BUILD_ID, __VERSION__);
#ifdef _OPENMP
    fprintf(out, ", OpenMP");
#endif
#ifdef LLMC_OPENBLAS
    fprintf(out, ", OpenBLAS");
#endif
#ifdef LLMC_CUDA
    fprintf(out, ", CUDA");
#endif
#ifdef LLMC_EMU
    fprintf(out, ", CUDA emulator (test build)");
#endif
#ifdef LLMC_FAULT_INJECTION
    fprintf(out, ", fault injection (test build)");
#endif
    fprintf(out, "\n");
}
