/* See device.h. */
#include "device.h"
#include "../../llmc/base/rng.h"
#include "../../llmc/base/timer.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

Backend *bench_open(const char *device, const CudaOptions *options, Error *e) {
    CudaOptions o = *options;
    if (!strcmp(device, "cpu")) {
        if (o.dtype && strcmp(o.dtype, "fp32")) return fail(e, EXIT_USAGE, "--dtype %s: the CPU backend computes in fp32", o.dtype), NULL;
        return cpu_backend_create(e);
    }
    if (!o.dtype) o.dtype = "bf16";
#ifdef LLMC_CUDA
    if (!strcmp(device, "cuda")) return cuda_backend_create(&o, e);
#endif
#ifdef LLMC_EMU
    if (!strcmp(device, "emu")) return emu_backend_create(&o, e);
#endif
    return fail(e, EXIT_USAGE, "--device %s: expected cpu%s%s; cuda and emu are in builds with CUDA=1 and EMU=1", device,
#ifdef LLMC_CUDA
                ", cuda",
#else
                "",
#endif
#ifdef LLMC_EMU
                ", emu"
#else
                ""
#endif
                ), NULL;
}

static bool on_gpu(const Backend *b) { return !strcmp(b->name, "cuda"); }
static double times[MARKS];

void bench_mark(Backend *b, int i) {
    CHECK(i >= 0 && i < MARKS, "mark %d", i);
#ifdef LLMC_CUDA
    if (on_gpu(b)) { cuda_mark(b, i); return; }
#endif
    b->sync(b);
    times[i] = seconds_now();
}

double bench_between(Backend *b, int i, int j) {
#ifdef LLMC_CUDA
    if (on_gpu(b)) return cuda_between(i, j);
#endif
    (void)b, (void)on_gpu;
    return times[j] - times[i];
}

void bench_copy(Backend *b, void *to, const void *from, size_t bytes) {
#ifdef LLMC_CUDA
    if (on_gpu(b)) { cuda_copy(b, to, from, bytes); return; }
#endif
    b->sync(b);
    const size_t block = 1 << 20;
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < bytes; i += block) memcpy((char *)to + i, (const char *)from + i, bytes - i < block ? bytes - i : block);
}

/* ---- random content ---------------------------------------------------------------------------------------------------------------- */

/* Tensors are one block of random numbers over and over; its length divides no row. */
enum { BLOCK = (4 << 20) - 36 };
static float uniform(size_t i) { return (float)rng_u32(1, RNG_DATA, 0, i) * 0x1p-31f - 1; } /* [-1, 1) */

static float content(OperandKind kind, size_t i) {
    float u = uniform(i);
    switch (kind) {
    case KIND_PAR: case KIND_MASTER: return 0.05f * u;
    case KIND_GRAD: return 1e-3f * u;
    case KIND_MOMENT: return 1e-3f * fabsf(u);
    case KIND_STAT: return 1 + 0.5f * u;
    default: return u;
    }
}

static const char *block_of(const Backend *b, OperandKind kind, size_t V) {
    static struct { char *block; size_t elem_bytes, V; } made[KIND_STEP]; /* as they were last */
    bool bf16 = b->elem_bytes == 2 && (kind == KIND_ACT || kind == KIND_PAR);
    if (made[kind].block && made[kind].elem_bytes == b->elem_bytes && (kind != KIND_TOKENS || made[kind].V == V)) return made[kind].block;
    if (!made[kind].block) made[kind].block = xmalloc(BLOCK);
    char *block = made[kind].block;
    made[kind].elem_bytes = b->elem_bytes, made[kind].V = V;
    for (size_t i = 0; i < BLOCK / (bf16 ? 2 : 4); i++) {
        float x = content(kind, i);
        uint32_t bits;
        memcpy(&bits, &x, 4);
        uint16_t half = (uint16_t)((bits + 0x8000) >> 16);
        if (kind == KIND_TOKENS) {
            int32_t id = (int32_t)pow((double)V, 0.5 * ((double)x + 1)) - 1; /* about one over the rank, as in text */
            memcpy(block + 4 * i, &id, 4);
        } else if (bf16) memcpy(block + 2 * i, &half, 2);
        else memcpy(block + 4 * i, &x, 4);
    }
    return block;
}

void bench_fill(Backend *b, OperandKind kind, void *p, size_t bytes, size_t V) {
    if (kind == KIND_STEP) {
        StepState s = {.lr = 1e-4f, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .weight_decay = 0.1f, .loss_limit = INFINITY, .norm_limit = INFINITY,
                       .loss_rows = 1024, .grad_scale = 1, .updates = 1, .rounding = b->elem_bytes == 2 ? ROUND_STOCHASTIC : ROUND_NEAREST};
        b->upload(b, p, &s, sizeof s);
        return;
    }
    b->upload(b, p, block_of(b, kind, V), bytes < BLOCK ? bytes : BLOCK);
    for (size_t done = BLOCK; done < bytes; done *= 2) bench_copy(b, (char *)p + done, p, bytes - done < done ? bytes - done : done);
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

Timing bench_timing(double *t, int n) {
    qsort(t, (size_t)n, sizeof *t, by_value);
    return (Timing){.median = t[n / 2], .low = t[n / 10], .high = t[n - 1 - n / 10], .least = t[0], .most = t[n - 1], .runs = n};
}
