/* The marks of device.h as CUDA events in the stream that the backend gives its ops to. Holds no kernel. */
#include "device.h"
#include "../../llmc/cuda/backend.cuh"
#include <stdio.h>

using namespace LLMC_NS;

static cudaEvent_t events[MARKS];

/* Both compute types have the same CudaBackend; this file is compiled for one. */
static cudaStream_t stream_of(Backend *b) { return cuda_of(b)->stream; }

void cuda_mark(Backend *b, int i) {
    if (!events[i]) cuda_check(cudaEventCreate(&events[i]), "creating an event");
    cuda_check(cudaEventRecord(events[i], stream_of(b)), "recording an event");
}

double cuda_between(int i, int j) {
    float ms = 0;
    cuda_check(cudaEventSynchronize(events[j]), "waiting for an event");
    cuda_check(cudaEventElapsedTime(&ms, events[i], events[j]), "reading events");
    return 1e-3 * ms;
}

void cuda_copy(Backend *b, void *to, const void *from, size_t bytes) {
    cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_of(b)), "copying");
}

void cuda_versions(char text[100]) {
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    snprintf(text, 100, "driver for CUDA %d.%d, runtime %d.%d", driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
}
