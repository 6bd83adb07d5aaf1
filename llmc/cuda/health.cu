/* The health of the backend's own GPU: its place on the PCI bus, then NVML (nvml.c). The emulator has no GPU to ask. */
#ifndef LLMC_EMU
#include "backend.cuh"
#include "nvml.h"

namespace LLMC_NS {

bool health_read(CudaBackend *cuda, DeviceHealth *health) {
    char pci[32];
    return cudaDeviceGetPCIBusId(pci, sizeof pci, cuda->options.ordinal) == cudaSuccess && nvml_read(pci, health);
}

} /* namespace */
#endif
