/* GPUs by name, and what they are sold with. Whatever is not in the table is not known here, and no figure is made up for it. */
#ifndef LLMC_BASE_GPUS_H
#define LLMC_BASE_GPUS_H
#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    const char *name;         /* as --gpu-name has it; NULL: a variant that is not planned for */
    const char *reported;     /* the driver's name, without "NVIDIA " */
    double peak_flops;        /* dense bf16 products a second (FORMATS.md, MFU; H100 PCIe and the NVLs: NVIDIA's data sheets) */
    double memory;            /* bytes that a process may have, of an idle GPU */
    double bus;               /* bytes a second: bus bandwidth of a reduce-scatter among the GPUs of a node */
} GpuKind;

#define GPU_NAMES "H100|H100-PCIe|H100-NVL|H200|H200-NVL|B200|A100|A100-40GB|L40S|RTX-4090"
const GpuKind *gpu_by_name(const char *name);         /* one of GPU_NAMES; NULL: none */
/* The whole name decides: an "RTX 4090 D", an "RTX A1000" and a MIG slice are not what their names contain. NULL: not known. */
const GpuKind *gpu_by_reported(const char *reported);

#ifdef __cplusplus
}
#endif
#endif
