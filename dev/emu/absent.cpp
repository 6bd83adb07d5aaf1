/* What the emulator does not have, compiled once per compute type: cuDNN and NVML. (cuBLASLt it has: cublaslt_twin.h.) */
#include "llmc/cuda/backend.cuh"

namespace LLMC_NS {

void *cudnn_create(CudaBackend *, Error *e) {
    fail(e, EXIT_USAGE, "--attention cudnn: not on the emulator; use --attention ours");
    return NULL;
}
void cudnn_destroy(void *) {}
bool cudnn_attention_forward(CudaBackend *, const AttentionForward *) { return false; }
bool cudnn_attention_backward(CudaBackend *, const AttentionBackward *) { return false; }
bool health_read(CudaBackend *, DeviceHealth *) { return false; }

} /* namespace */
