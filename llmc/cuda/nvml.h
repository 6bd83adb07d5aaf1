/* The state of an NVIDIA GPU (power, heat, clocks, throttling, memory errors) through the driver's NVML, loaded at run time: nothing of it is
 * needed to build or to start. Plain C, without the CUDA runtime, so that a test can run it against a library of its own. */
#ifndef LLMC_CUDA_NVML_H
#define LLMC_CUDA_NVML_H
#include "../ops.h"
#ifdef __cplusplus
extern "C" {
#endif

/* Reads the GPU at a PCI bus address ("00000000:19:00.0"), which names the same device whatever CUDA_VISIBLE_DEVICES says. What this GPU or driver
 * does not report stays NAN, 0, "" or -1. False: no library (LLMC_NVML in the environment, else libnvidia-ml.so.1), or no such GPU. */
bool nvml_read(const char *pci_bus_id, DeviceHealth *health);

#ifdef __cplusplus
}
#endif
#endif
