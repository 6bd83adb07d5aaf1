/* What the tests of the emulator share: memory of the device that the host may look into (here they are one), launches that are run at once,
 * faults that are noted instead of ending the process, and main. Where there is no C++ compiler plain C takes them, and they skip their tests.
 * Compiled by nvcc the same on a GPU, one for Hopper: memory has two sides, copied around each launch, faults are CUDA's errors, and there is one schedule. */
#ifndef LLMC_TEST_EMU_KIT_H
#define LLMC_TEST_EMU_KIT_H
#include "dev/test/test.h"
#if defined LLMC_EMU || defined __CUDACC__
#include "llmc/cuda/ptx.cuh"

namespace LLMC_NS {

static void run_all(); /* the tests of the file */
static struct { int n; char text[1000]; } faults; /* of the last run */
static cudaStream_t stream;

#ifdef LLMC_EMU
static inline void note_fault(const char *message) {
    if (faults.n++ == 0) snprintf(faults.text, sizeof faults.text, "%s", message);
}
static inline void use_schedule(const char *s) { EXPECT(schedule_parse(s, &emu::schedule), "no schedule %s", s); }

/* n elements of device memory: NaN, or all bits set. */
template <class T> struct Device {
    T *p;
    explicit Device(size_t n) { CHECK(cudaMalloc((void **)&p, n * sizeof(T)) == cudaSuccess, "%zu elements", n); }
    Device(const Device &) = delete;
    Device &operator=(const Device &) = delete;
    ~Device() { cudaFree(p); }
    T &operator[](size_t i) { return p[i]; }
};
static inline void memory_to(bool) {}
#else
static inline void use_schedule(const char *) {}

struct Sides { void *device, *host; size_t bytes; };
static Sides sides[16];
static int n_sides;
static inline void memory_to(bool device) {
    for (int i = 0; i < n_sides; i++)
        cuda_check(cudaMemcpy(device ? sides[i].device : sides[i].host, device ? sides[i].host : sides[i].device, sides[i].bytes, cudaMemcpyDefault), "copying a test's memory");
}
/* n elements of device memory, all bits set: p there, [] here. They end in the order in which they began, the last one first. */
template <class T> struct Device {
    T *p, *host;
    explicit Device(size_t n) {
        CHECK(cudaMalloc((void **)&p, n * sizeof(T)) == cudaSuccess && (host = (T *)malloc(n * sizeof(T))) && n_sides < 16, "%zu elements", n);
        memset((void *)host, 0xff, n * sizeof(T));
        sides[n_sides++] = {p, host, n * sizeof(T)};
    }
    Device(const Device &) = delete;
    Device &operator=(const Device &) = delete;
    ~Device() { cudaFree(p), free((void *)host), n_sides--; }
    T &operator[](size_t i) { return host[i]; }
};
#endif

/* One launch, run to its end; in clusters, for kernels with Hopper's instructions. */
template <class... P, class... A> void run_hopper(unsigned cluster, unsigned blocks, unsigned threads, size_t shared_bytes, void (*kernel)(P...), A... args) {
    faults.n = 0, faults.text[0] = 0;
    memory_to(true);
    launch_named(test_name, kernel, cluster, dim3(blocks), dim3(threads), shared_bytes, stream, args...);
    const cudaError_t status = cudaStreamSynchronize(stream);
    if (status != cudaSuccess) faults.n++, snprintf(faults.text, sizeof faults.text, "%s", cudaGetErrorString(status));
    else memory_to(false);
}
template <class... P, class... A> void run(size_t shared_bytes, unsigned blocks, unsigned threads, void (*kernel)(P...), A... args) {
    run_hopper(0, blocks, threads, shared_bytes, kernel, args...);
}

} /* namespace */

int main(int argc, char **argv) {
    test_start(argc, argv);
#ifdef LLMC_EMU
    emu::schedule = emu::Schedule{emu::ASCENDING, 0, false, false, false}; /* the tests set their own */
    emu::on_fault = LLMC_NS::note_fault;
#else
    cudaDeviceProp gpu;
    if (cudaGetDeviceProperties(&gpu, 0) != cudaSuccess || gpu.major != 9 || gpu.minor != 0) {
        test_skipped++, printf("skipped cuda: no GPU of compute capability 9.0 here\n");
        return test_done();
    }
#endif
    cudaStreamCreateWithFlags(&LLMC_NS::stream, cudaStreamNonBlocking);
    LLMC_NS::run_all();
    cudaStreamDestroy(LLMC_NS::stream);
    return test_done();
}
#else
TEST(on_the_emulator) { SKIP("no C++ compiler in this build"); }
int main(int argc, char **argv) {
    test_start(argc, argv);
    RUN(on_the_emulator);
    return test_done();
}
#endif
#endif
