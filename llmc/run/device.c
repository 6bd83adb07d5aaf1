/* Opens the backend that a run computes with. */
#include "device.h"
#include <string.h>

typedef Backend *(*Create)(const CudaOptions *, Error *);
#ifdef LLMC_CUDA
static const Create create_cuda = cuda_backend_create;
#else
static const Create create_cuda = NULL;
#endif
#ifdef LLMC_EMU
static const Create create_emu = emu_backend_create;
#else
static const Create create_emu = NULL;
#endif

static bool is(const char *a, const char *b) { return strcmp(a, b) == 0; }

static Backend *create(Create how, const Config *o, const char *plan_file, int local_rank, int local_size, Error *e) {
    /* A fused GELU is of the unrounded sum; --recompute gelu takes it of what was kept, and would give other bits. */
    bool fuse = is(o->fused_gelu, "auto") ? !is(o->recompute, "gelu") : is(o->fused_gelu, "on");
    CudaOptions options = {.dtype = is(o->dtype, "auto") ? "bf16" : o->dtype, .attention = o->attention, .plan_file = plan_file, .fuse_gelu = fuse,
                           .graphs = is(o->graphs, "on"), .ordinal = (int)o->gpu + local_rank, .wrap = local_size > 1, .early_launch = is(o->early_launch, "on"),
                           .own_products = is(o->own_products, "on") ? OWN_ON : is(o->own_products, "only") ? OWN_ONLY : OWN_OFF};
    return how(&options, e);
}

/* why: what kept --device auto from a GPU, or empty. */
static Backend *open_cpu(const Config *o, const Error *why, char line[DEVICE_LINE], Error *e) {
    const char *no_gpu = why->code ? ". No GPU was taken: " : "";
    if (is(o->dtype, "bf16")) return fail(e, EXIT_USAGE, "--dtype bf16: the CPU backend computes in fp32; use --dtype fp32%s%s", no_gpu, why->text), NULL;
    if (!is(o->own_products, "off")) return fail(e, EXIT_USAGE, "--own-products %s: they are for GPUs (H100, H200); use off%s%s", o->own_products, no_gpu, why->text), NULL;
    if (!is(o->attention, "ours")) return fail(e, EXIT_USAGE, "--attention %s: the CPU backend has its own; use --attention ours%s%s", o->attention, no_gpu, why->text), NULL;
    Backend *b = cpu_backend_create(e);
    if (b) snprintf(line, DEVICE_LINE, "%s, %s%s%.700s%s", b->name, b->dtype, why->code ? " (no GPU: " : "", why->text, why->code ? ")" : "");
    return b;
}

Backend *device_open(const Config *o, const char *plan_file, int local_rank, int local_size, char line[DEVICE_LINE], Error *e) {
    bool automatic = is(o->device, "auto");
    Create how = is(o->device, "emu") ? create_emu : create_cuda;
    Error why = {0};
    if (is(o->device, "cpu") || (automatic && !how)) return open_cpu(o, &why, line, e);
    if (!how) {
        if (is(o->device, "emu")) fail(e, EXIT_USAGE, "--device emu: the emulator is in test builds alone; use --device cpu");
        else fail(e, EXIT_USAGE, "--device cuda: this program is built without CUDA; use ./train_gpt2cu (make train_gpt2cu needs nvcc) or --device cpu");
        return NULL;
    }
    Backend *b = create(how, o, plan_file, local_rank, local_size, automatic ? &why : e);
    if (b) snprintf(line, DEVICE_LINE, "%s (%s), %s", b->name, b->device ? b->device : "unnamed device", b->dtype);
    else if (automatic && why.code == EXIT_USAGE) return open_cpu(o, &why, line, e);
    else if (automatic && e) *e = why;
    return b;
}

const char *device_planned(const Config *o, char line[DEVICE_LINE]) {
    const char *device = !is(o->device, "auto") ? o->device : create_cuda || o->gpus ? "cuda" : "cpu";
    const char *dtype = !is(o->dtype, "auto") ? o->dtype : is(device, "cpu") ? "fp32" : "bf16";
    snprintf(line, DEVICE_LINE, "%s, %s", device, dtype);
    return dtype;
}
