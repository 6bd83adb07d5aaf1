/* What the tests of the emulator share: memory of the device that the host may look into (here they are one), launches that are run at once,
 * faults that are noted instead of ending the process, and main. Where there is no C++ compiler plain C takes them, and they skip their tests. */
#ifndef LLMC_TEST_EMU_KIT_H
#define LLMC_TEST_EMU_KIT_H
#include "dev/test/test.h"
#ifdef LLMC_EMU
#include "llmc/cuda/ptx.cuh"

namespace LLMC_NS {

static void run_all(); /* the tests of the file */
static struct { int n; char text[1000]; } faults; /* of the last run */
static cudaStream_t stream;

static inline void note_fault(const char *message) {
    if (faults.n++ == 0) snprintf(faults.text, sizeof faults.text, "%s", message);
}

/* n elements of device memory: NaN, or all bits set. */
template <class T> struct Device {
    T *p;
    explicit Device(size_t n) { CHECK(cudaMalloc((void **)&p, n * sizeof(T)) == cudaSuccess, "%zu elements", n); }
    Device(const Device &) = delete;
    Device &operator=(const Device &) = delete;
    ~Device() { cudaFree(p); }
    T &operator[](size_t i) { return p[i]; }
};

/* One launch, run to its end. */
template <class... P, class... A> void run(size_t shared_bytes, unsigned blocks, unsigned threads, void (*kernel)(P...), A... args) {
    faults.n = 0, faults.text[0] = 0;
    launch_named(test_name, kernel, 0, dim3(blocks), dim3(threads), shared_bytes, stream, args...);
    cudaStreamSynchronize(stream);
}

} /* namespace */

int main(int argc, char **argv) {
    test_start(argc, argv);
    emu::schedule = emu::Schedule{emu::ASCENDING, 0, false, false, false}; /* the tests set their own */
    emu::on_fault = LLMC_NS::note_fault;
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
