/* The language-model head: logits, their cross-entropy and its gradient, a chunk of rows at a time, so that no (N, V) buffer exists. Between the
 * products, which are matmul's, one pass reads a row of logits into registers and writes its gradient in place. */
#include "backend.cuh"
#include "ptx.cuh"
#include <float.h>

namespace LLMC_NS {

enum { N_VEC = Vec<elem>::N };
#define LOG2E 1.4426950408889634f

/* Sixteen bytes of a row as they lie in four registers: as an array of bf16 they would take eight. */
struct Packed { uint32_t w[4]; };
#if LLMC_BF16
#define MINUS_INFINITY 0xff80ff80u

__device__ __forceinline__ void unpack(float (&y)[N_VEC], const Packed &x) {
#pragma unroll
    for (int q = 0; q < 4; q++) y[2 * q] = __uint_as_float(x.w[q] << 16), y[2 * q + 1] = __uint_as_float(x.w[q] & 0xffff0000u);
}
__device__ __forceinline__ Packed pack(const float (&y)[N_VEC]) {
    Packed x;
#pragma unroll
    for (int q = 0; q < 4; q++) x.w[q] = pack_bf16(y[2 * q], y[2 * q + 1]);
    return x;
}
#else
#define MINUS_INFINITY 0xff800000u

__device__ __forceinline__ void unpack(float (&y)[N_VEC], const Packed &x) { memcpy(y, &x, sizeof x); }
__device__ __forceinline__ Packed pack(const float (&y)[N_VEC]) {
    Packed x;
    memcpy(&x, y, sizeof x);
    return x;
}
#endif
__device__ __forceinline__ Packed load_packed(const elem *p) {
    uint4 raw = *(const uint4 *)(const void *)p;
    return Packed{{raw.x, raw.y, raw.z, raw.w}};
}
__device__ __forceinline__ void store_packed(elem *p, const Packed &x) { *(uint4 *)(void *)p = make_uint4(x.w[0], x.w[1], x.w[2], x.w[3]); }

/* Of numbers x seen so far, with y = x log2(e): the largest y, at least -FLT_MAX, and the sum of 2^(y - max). The maximum passes over a NaN, the sum
 * does not: it stays NaN to the end. Online softmax, Milakov and Gimelshein 2018, algorithm 3, in powers of two. */
struct Softmax { float max, sum; };

__device__ __forceinline__ void softmax_add(Softmax &s, const Packed &x) {
    float y[N_VEC], sum = 0;
    unpack(y, x);
    float most = y[0];
#pragma unroll
    for (int j = 1; j < N_VEC; j++) most = fmaxf(most, y[j]);
    const float max = fmaxf(s.max, most * LOG2E);
#pragma unroll
    for (int j = 0; j < N_VEC; j++) sum += exp2_fast(fmaf(y[j], LOG2E, -max));
    s.sum = fmaf(s.sum, exp2_fast(s.max - max), sum);
    s.max = max;
}

/* Of the numbers of a warp; every lane gets it. */
__device__ __forceinline__ Softmax softmax_warp(Softmax s) {
    const float max = warp_max(s.max);
    return Softmax{max, warp_sum(s.sum * exp2_fast(s.max - max))};
}

/* Of the numbers of a block; every thread gets it. slots: shared, one a warp. One barrier: the slots may not be used again. */
__device__ __forceinline__ Softmax softmax_block(Softmax s, Softmax *slots) {
    const int lane = threadIdx.x % WARP;
    s = softmax_warp(s);
    if (lane == 0) slots[threadIdx.x / WARP] = s;
    __syncthreads();
    return softmax_warp(lane < (int)blockDim.x / WARP ? slots[lane] : Softmax{-FLT_MAX, 0});
}

/* The elements from `from` on become -infinity. */
__device__ __forceinline__ void cut(Packed &x, int from) {
    enum { EACH = N_VEC / 4 };
#pragma unroll
    for (int q = 0; q < 4; q++) {
        if (EACH * q + EACH > from) x.w[q] = EACH == 2 && EACH * q < from ? (x.w[q] & 0xffffu) | (MINUS_INFINITY & 0xffff0000u) : MINUS_INFINITY;
    }
}

/* COUNT vectors of a row, THREADS apart from vector `first` on; for elements from V on -infinity, which adds nothing to a sum and whose gradient is 0.
 * All loads are issued before the first is waited for: the branch, which one thread of a row takes, keeps the compiler from spreading them. */
template <int THREADS, int COUNT> __device__ __forceinline__ void load_group(Packed (&x)[COUNT], const elem *row, int first, int V) {
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
        x[k] = Packed{{MINUS_INFINITY, MINUS_INFINITY, MINUS_INFINITY, MINUS_INFINITY}};
        if ((first + k * THREADS) * N_VEC < V) x[k] = load_packed(row + (size_t)(first + k * THREADS) * N_VEC);
    }
    if (V / N_VEC % THREADS == first % THREADS) /* the vector that V cuts is this thread's */
#pragma unroll
        for (int k = 0; k < COUNT; k++)
            if (first + k * THREADS == V / N_VEC) cut(x[k], V % N_VEC);
}

template <int COUNT> __device__ __forceinline__ void add_group(Softmax &s, const Packed (&x)[COUNT]) {
#pragma unroll
    for (int k = 0; k < COUNT; k++) softmax_add(s, x[k]);
}

template <int THREADS, int COUNT>
__device__ __forceinline__ void store_group(elem *row, const Packed (&x)[COUNT], int first, int vectors, float max, float factor) {
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
        float y[N_VEC];
        unpack(y, x[k]);
#pragma unroll
        for (int j = 0; j < N_VEC; j++) y[j] = exp2_fast(fmaf(y[j], LOG2E, -max)) * factor;
        if (first + k * THREADS < vectors) store_packed(row + (size_t)(first + k * THREADS) * N_VEC, pack(y));
    }
}

enum { MOST_VECTORS = 512 * 25 }; /* that registers hold: of a longer row the rest is read twice */

/* losses[n] = logsumexp_v(logits[n]) - logits[n][target[n]];  with BACKWARD: dlogits = (softmax - onehot) * scale over the logits.
 * losses (rows) =, logits (rows, stride) in, with BACKWARD = : columns from V to the row's end count for nothing and get 0. targets (rows) in.
 * A block: one row. A thread: every THREADS-th vector of 16 bytes; the first VECTORS of them stay in its registers, any others are read a second
 * time (beyond MOST_VECTORS: V over 102400 in bf16, 51200 in fp32). The thread that holds the target's column also makes its gradient and the loss.
 * A target of -1: loss 0, gradient 0. A target outside the vocabulary, which the loader has refused: loss NaN, gradient 0.
 * Bytes: each logit once, with BACKWARD written once: the floor. Two blocks of 256 on a multiprocessor (or one of 512), so that one computes
 * while the other waits for memory; 2 exponentials an element are the next limit, at about 2/3 of the memory's time on an H200.
 * Order: a thread's vectors ascending, lanes and warps by butterfly: of V alone. The losses have the same bits with and without BACKWARD.
 * Error: exponents are off by 2^-24 of (x - max) log2(e), powers by 2^-22 relative, the sum of a row by some 2^-24; the loss is put together in
 * double, with the logarithm to the base that LOG2E as a float stands for; the gradient is rounded once. */
template <int THREADS, int VECTORS, bool BACKWARD>
__global__ void __launch_bounds__(THREADS, 512 / THREADS)
head_loss_kernel(float *losses, elem *logits, const int32_t *targets, size_t stride, int V, float scale) {
    begin_kernel();
    enum { GROUP = 4 }; /* vectors at a time of what does not stay in registers */
    const bool REST = THREADS * VECTORS == MOST_VECTORS;
    DYNAMIC_SHARED(Softmax, slots);
    elem *row = logits + blockIdx.x * stride;
    const int thread = (int)threadIdx.x, target = targets[blockIdx.x], vectors = (int)(stride / N_VEC), rest = VECTORS * THREADS;
    Packed x[VECTORS];
    if (!REST) load_group<THREADS>(x, row, thread, V); /* on the way while the target is looked at */
    if (target < 0 || target >= V) {
        for (int i = thread; BACKWARD && i < vectors; i += THREADS) store_packed(row + (size_t)i * N_VEC, Packed{{0, 0, 0, 0}});
        if (thread == 0) losses[blockIdx.x] = target == -1 ? 0 : NAN;
        return;
    }
    const bool owner = target / N_VEC % THREADS == thread;
    const float at_target = owner ? to_float(row[target]) : 0;

    Softmax s = {-FLT_MAX, 0};
    for (int i = rest; REST && i < vectors; i += GROUP * THREADS) {
        Packed again[GROUP];
        load_group<THREADS>(again, row, i + thread, V);
        add_group(s, again);
    }
    if (REST) load_group<THREADS>(x, row, thread, V);
    add_group(s, x);
    s = softmax_block(s, slots);

    if (BACKWARD) {
        const float factor = scale / s.sum;
#pragma unroll
        for (int k = 0; k < VECTORS; k++)
#pragma unroll
            for (int q = 0; q < 4; q++) forget(x[k].w[q]); /* or the compiler keeps the row in float from above */
        store_group<THREADS>(row, x, thread, vectors, s.max, factor);
        for (int i = rest; REST && i < vectors; i += GROUP * THREADS) {
            Packed again[GROUP];
            load_group<THREADS>(again, row, i + thread, V);
            store_group<THREADS>(row, again, i + thread, vectors, s.max, factor);
        }
        if (owner) row[target] = to_elem(fmaf(exp2_fast(fmaf(at_target, LOG2E, -s.max)), factor, -scale)); /* after its own store of the vector */
    }
    if (owner) {
        const double loss = ((double)s.max + log2((double)s.sum)) / (double)LOG2E - (double)at_target;
        losses[blockIdx.x] = loss < 0 ? 0 : (float)loss; /* below 0 by rounding alone */
    }
}

/* ---- launchers --------------------------------------------------------------------------------------------------------- */

template <int THREADS, int VECTORS>
static void launch_rows(CudaBackend *cuda, const HeadLoss *a, float *losses, elem *logits, const int32_t *targets, size_t rows, size_t stride) {
    const dim3 grid((unsigned)rows), block(THREADS);
    const size_t shared = THREADS / WARP * sizeof(Softmax);
    const int V = (int)a->V;
    if (a->dx.p) LAUNCH((head_loss_kernel<THREADS, VECTORS, true>), grid, block, shared, cuda->stream, losses, logits, targets, stride, V, a->scale);
    else LAUNCH((head_loss_kernel<THREADS, VECTORS, false>), grid, block, shared, cuda->stream, losses, logits, targets, stride, V, a->scale);
}

/* The smallest number of registers that holds a row. */
static void softmax_rows(CudaBackend *cuda, const HeadLoss *a, float *losses, elem *logits, const int32_t *targets, size_t rows, size_t stride) {
    const size_t vectors = stride / N_VEC;
    if (vectors <= 256) return launch_rows<256, 1>(cuda, a, losses, logits, targets, rows, stride);
    if (vectors <= 256 * 4) return launch_rows<256, 4>(cuda, a, losses, logits, targets, rows, stride);
    if (vectors <= 256 * 16) return launch_rows<256, 16>(cuda, a, losses, logits, targets, rows, stride);
    if (vectors <= 256 * 25) return launch_rows<256, 25>(cuda, a, losses, logits, targets, rows, stride);
    if (vectors <= 512 * 16) return launch_rows<512, 16>(cuda, a, losses, logits, targets, rows, stride);
    return launch_rows<512, 25>(cuda, a, losses, logits, targets, rows, stride);
}

enum { LOGIT_BYTES = 1 << 30, TILE_ROWS = 128 };

/* Equal chunks, multiples of a product's tile, whose logits stay within the budget: few, because each one reads w twice and reads and writes dw. */
static size_t chunk_rows(const HeadLoss *a, size_t stride) {
    if (a->chunk) return min(a->chunk, a->N);
    size_t most = max(LOGIT_BYTES / (stride * sizeof(elem)), (size_t)1);
    if (most > TILE_ROWS) most -= most % TILE_ROWS;
    size_t rows = ceil_div(a->N, ceil_div(a->N, most));
    return min(rows > TILE_ROWS ? round_up(rows, (size_t)TILE_ROWS) : rows, a->N);
}

struct HeadProducts { Product logits, dx, dw; };

static HeadProducts products_of(const HeadLoss *a, size_t rows, size_t stride) {
    HeadProducts p = {};
    p.logits.M = rows, p.logits.N = a->Vp, p.logits.K = a->C; /* logits = x w^T */
    p.logits.b_transposed = true, p.logits.a_row = a->C, p.logits.b_row = a->C, p.logits.c_row = stride;
    p.dx.M = rows, p.dx.N = a->C, p.dx.K = a->Vp; /* dx = dlogits w */
    p.dx.a_row = stride, p.dx.b_row = a->C, p.dx.c_row = a->C;
    p.dw.M = a->Vp, p.dw.N = a->C, p.dw.K = rows; /* dw += dlogits^T x */
    p.dw.a_transposed = true, p.dw.a_row = stride, p.dw.b_row = a->C, p.dw.c_row = a->C, p.dw.c_float = true, p.dw.add = true;
    return p;
}

static void plan_chunk(CudaBackend *cuda, const HeadLoss *a, size_t rows, size_t stride) {
    const HeadProducts p = products_of(a, rows, stride);
    matmul_plan(cuda, &p.logits);
    if (a->dx.p) matmul_plan(cuda, &p.dx), matmul_plan(cuda, &p.dw);
}

static void run_chunk(CudaBackend *cuda, const HeadLoss *a, size_t n0, size_t rows, elem *logits, size_t stride) {
    const HeadProducts p = products_of(a, rows, stride);
    const elem *x = (const elem *)a->x.p + n0 * a->C, *w = (const elem *)a->w.p;
    Operands operands = {};
    operands.c = logits, operands.a = x, operands.b = w;
    matmul(cuda, &p.logits, &operands);
    softmax_rows(cuda, a, a->losses.p + n0, logits, a->targets.p + n0, rows, stride);
    if (!a->dx.p) return;
    operands.c = (elem *)a->dx.p + n0 * a->C, operands.a = logits, operands.b = w;
    matmul(cuda, &p.dx, &operands);
    operands.c = a->dw.p, operands.a = logits, operands.b = x;
    matmul(cuda, &p.dw, &operands);
}

void cuda_head_loss(Backend *b, const HeadLoss *a) {
    CudaBackend *cuda = cuda_of(b);
    CHECK(a->N && a->C && a->V && a->Vp >= a->V && a->Vp < (size_t)1 << 30, "head_loss: N %zu, C %zu, V %zu, Vp %zu", a->N, a->C, a->V, a->Vp);
    op_begin(cuda, OP_head_loss);
    const size_t stride = round_up(a->Vp, (size_t)64), rows = chunk_rows(a, stride);
    elem *logits = scratch<elem>(cuda, rows * stride, "logits");
    if (cuda->planning) {
        plan_chunk(cuda, a, rows, stride);
        if (a->N % rows) plan_chunk(cuda, a, a->N % rows, stride);
        return;
    }
    CHECK(a->losses.p && a->x.p && a->w.p && a->targets.p, "head_loss: operand absent");
    CHECK(!a->dx.p == !a->dw.p, "head_loss: dx and dw come together");
    for (size_t n0 = 0; n0 < a->N; n0 += rows) run_chunk(cuda, a, n0, min(rows, a->N - n0), logits, stride);
}

void cuda_head_logits(Backend *b, const HeadLogits *a) {
    CudaBackend *cuda = cuda_of(b);
    CHECK(a->N && a->C && a->V, "head_logits: N %zu, C %zu, V %zu", a->N, a->C, a->V);
    op_begin(cuda, OP_head_logits);
    Product p = {};
    p.M = a->N, p.N = a->V, p.K = a->C;
    p.b_transposed = true, p.a_row = a->C, p.b_row = a->C, p.c_row = a->V, p.c_float = true;
    if (cuda->planning) return matmul_plan(cuda, &p);
    CHECK(a->logits.p && a->x.p && a->w.p, "head_logits: operand absent");
    Operands operands = {};
    operands.c = a->logits.p, operands.a = (const elem *)a->x.p, operands.b = (const elem *)a->w.p;
    matmul(cuda, &p, &operands);
}

} /* namespace */
