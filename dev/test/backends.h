/* Every backend in the build, for tests that run on all of them. Those that this machine cannot have are skipped with their reason.
 * Plain C that a C++ compiler also takes. */
#ifndef LLMC_TEST_BACKENDS_H
#define LLMC_TEST_BACKENDS_H
#include "llmc/cpu/cpu.h"
#ifndef __cplusplus
#include "half.h"
#endif
#include "test.h"

/* run destroys the backend. */
static inline void backends_run_device(const char *name, Backend *(*create)(const CudaOptions *, Error *), void (*run)(const char *, Backend *)) {
    const char *const dtypes[] = {"bf16", "fp32"};
    for (int i = 0; i < 2; i++) {
        char title[64];
        Error e = {0, ""};
        CudaOptions options = {dtypes[i], "ours", NULL, true, true, 0, false, false, OWN_OFF};
        Backend *b = create(&options, &e);
        snprintf(title, sizeof title, "%s %s", name, dtypes[i]);
        if (b) { run(title, b); continue; }
        test_skipped++;
        printf("skipped %s: %s\n", title, e.text);
    }
}

/* The device of this build: the GPU's in a build for one, else the emulated one, else none (DEVICE_NAME is not defined). */
#ifdef LLMC_CUDA
#define DEVICE_NAME "cuda"
#define device_backend_create cuda_backend_create
#elif defined LLMC_EMU
#define DEVICE_NAME "emu"
#define device_backend_create emu_backend_create
#endif
/* main of a test program that is about that device alone */
static inline int device_main(int argc, char **argv, void (*run)(const char *name, Backend *)) {
    test_start(argc, argv);
#ifdef DEVICE_NAME
    backends_run_device(DEVICE_NAME, device_backend_create, run);
#else
    (void)run;
    test_skipped++;
    printf("skipped device: neither a CUDA toolkit nor a C++ compiler in this build\n");
#endif
    return test_done();
}

static inline void backends_run_all(void (*run)(const char *name, Backend *)) {
    Error e = {0, ""};
    for (int blas = 0; blas < 2; blas++)
        if (cpu_gemm_use_blas(blas)) run(blas ? "cpu, OpenBLAS" : "cpu", cpu_backend_create(&e)); /* else not in this build */
#ifndef __cplusplus
    cpu_gemm_use_blas(false);
    run("half", half_create(cpu_backend_create(&e)));
#endif
#ifdef LLMC_EMU
    backends_run_device("emu", emu_backend_create, run);
#endif
#ifdef LLMC_CUDA
    backends_run_device("cuda", cuda_backend_create, run);
#endif
    (void)backends_run_device;
}
#endif
