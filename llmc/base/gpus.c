/* The table of GPUs, and looking names up in it. */
#include "gpus.h"
#include <stddef.h>
#include <string.h>

/* Memory in MiB as nvidia-smi shows it. The link's rate in GB/s one way, as sold: NVLink 4 450, 3 300, 5 900; PCIe 5 x16 63, 4 x16 31.5 (also for the
 * PCIe and NVL boards: their bridges join two to four GPUs, not all of a node). A reduce-scatter was measured at 370 of NVLink 4's 450; the others are
 * taken in that proportion, which for PCIe, where packets may go through the host's memory, is an upper bound. */
#define GPU(name, reported, tflops, mib, link) {name, reported, (tflops) * 1e12, (mib) * 1048576.0, (link) * 1e9 * 370 / 450}
static const GpuKind kinds[] = {
    GPU("H100", "H100 80GB HBM3", 989.5, 81559, 450),
    GPU("H100-PCIe", "H100 PCIe", 756.5, 81559, 63),
    GPU("H100-NVL", "H100 NVL", 835.5, 95830, 63),
    GPU("H200", "H200", 989.5, 143771, 450),
    GPU("H200-NVL", "H200 NVL", 835.5, 143771, 63),
    GPU("B200", "B200", 2250, 183359, 900),
    GPU("A100", "A100-SXM4-80GB", 312, 81920, 300),
    GPU("A100-40GB", "A100-SXM4-40GB", 312, 40960, 300),
    GPU(NULL, "A100 80GB PCIe", 312, 81920, 31.5),
    GPU(NULL, "A100-PCIE-40GB", 312, 40960, 31.5),
    GPU("L40S", "L40S", 362, 46068, 31.5),
    GPU("RTX-4090", "GeForce RTX 4090", 165.2, 24564, 31.5),
};
enum { N_KINDS = sizeof kinds / sizeof *kinds };

const GpuKind *gpu_by_name(const char *name) {
    for (int i = 0; i < N_KINDS; i++)
        if (kinds[i].name && !strcmp(kinds[i].name, name)) return &kinds[i];
    return NULL;
}

const GpuKind *gpu_by_reported(const char *reported) {
    if (!strncmp(reported, "NVIDIA ", 7)) reported += 7;
    for (int i = 0; i < N_KINDS; i++)
        if (!strcmp(kinds[i].reported, reported)) return &kinds[i];
    return NULL;
}
