/* The numbers of a step: sums in double and in a fixed order, the decision to apply or skip, AdamW, the cast. Nothing here is read by the host. */
#include "../base/rng.h"
#include "backend.cuh"
#include "ptx.cuh"

namespace LLMC_NS {

/* ---- sums ----------------------------------------------------------------------------------------------------------------- */

enum { SUM_THREADS = 512, SUM_CHUNK = 32768, SUM_AHEAD = 8 }; /* elements a block; vectors that a thread has on the way */

/* Elements i..i+3 of n, zeros beyond the end. */
__device__ __forceinline__ float4 load_4(const float *x, size_t i, size_t n, bool aligned) {
    if (aligned && i + 4 <= n) {
        uint4 raw = load_streaming(x + i);
        return make_float4(__uint_as_float(raw.x), __uint_as_float(raw.y), __uint_as_float(raw.z), __uint_as_float(raw.w));
    }
    return make_float4(i < n ? x[i] : 0, i + 1 < n ? x[i + 1] : 0, i + 2 < n ? x[i + 2] : 0, i + 3 < n ? x[i + 3] : 0);
}

/* partial[block] = sum of x[i], or of x[i]^2 with SQUARES, over the block's SUM_CHUNK elements.  partial (blocks) =, x (n) in.
 * A thread: every SUM_THREADS-th vector of four, ascending; then lanes and warps: the order depends on n alone, not on whether x is aligned to
 * 16 bytes. Bytes: 4 n, the floor. Error: each square is exact in double, sums are off by 2^-53 relative per addition. */
template <bool SQUARES> __global__ void __launch_bounds__(SUM_THREADS) sum_chunk_kernel(double *partial, const float *x, size_t n, bool aligned) {
    begin_kernel();
    DYNAMIC_SHARED(double, slots);
    const size_t first = (size_t)blockIdx.x * SUM_CHUNK + 4 * threadIdx.x;
    double sum = 0;
    for (int at = 0; at < SUM_CHUNK; at += SUM_AHEAD * SUM_THREADS * 4) {
        float4 v[SUM_AHEAD];
#pragma unroll
        for (int k = 0; k < SUM_AHEAD; k++) v[k] = load_4(x, first + at + k * SUM_THREADS * 4, n, aligned);
#pragma unroll
        for (int k = 0; k < SUM_AHEAD; k++) {
            const double a = v[k].x, b = v[k].y, c = v[k].z, d = v[k].w;
            sum += SQUARES ? (a * a + b * b) + (c * c + d * d) : (a + b) + (c + d);
        }
    }
    sum = block_sum(sum, slots);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

/* *to += sum of partial.  One block; a thread: every SUM_THREADS-th, ascending; then lanes and warps. Bytes: 8 n, of n a 32768th of the elements. */
__global__ void __launch_bounds__(SUM_THREADS) sum_partials_kernel(double *to, const double *partial, size_t n) {
    begin_kernel();
    DYNAMIC_SHARED(double, slots);
    double sum = 0;
    for (size_t i = threadIdx.x; i < n; i += SUM_THREADS) sum += partial[i];
    sum = block_sum(sum, slots);
    if (threadIdx.x == 0) *to += sum;
}

template <bool SQUARES> static void sum_run(CudaBackend *cuda, double *to, const float *x, size_t n, double *partial) {
    const size_t blocks = ceil_div(n, (size_t)SUM_CHUNK), shared = SUM_THREADS / WARP * sizeof(double);
    LAUNCH(sum_chunk_kernel<SQUARES>, dim3((unsigned)blocks), dim3(SUM_THREADS), shared, cuda->stream, partial, x, n, (uintptr_t)x % 16 == 0);
    LAUNCH(sum_partials_kernel, dim3(1), dim3(SUM_THREADS), shared, cuda->stream, to, partial, blocks);
}

void cuda_loss_sum(Backend *b, const LossSum *a) {
    CudaBackend *cuda = cuda_of(b);
    CHECK(a->n, "loss_sum: n = 0");
    op_begin(cuda, OP_loss_sum);
    double *partial = scratch<double>(cuda, ceil_div(a->n, (size_t)SUM_CHUNK), "sums");
    if (cuda->planning) return;
    CHECK(a->step.p && a->losses.p, "loss_sum: operand absent");
    sum_run<false>(cuda, &a->step.p->loss_sum, a->losses.p, a->n, partial);
}

void cuda_sum_squares(Backend *b, const SumSquares *a) {
    CudaBackend *cuda = cuda_of(b);
    CHECK(a->n, "sum_squares: n = 0");
    op_begin(cuda, OP_sum_squares);
    double *partial = scratch<double>(cuda, ceil_div(a->n, (size_t)SUM_CHUNK), "sums");
    if (cuda->planning) return;
    CHECK(a->step.p && a->grads.p, "sum_squares: operand absent");
    sum_run<true>(cuda, &a->step.p->sum_squares, a->grads.p, a->n, partial);
}

/* ---- the decision --------------------------------------------------------------------------------------------------------- */

/* As ops.h says at StepDecide; one thread. */
__global__ void step_decide_kernel(StepState *s) {
    begin_kernel();
    if (threadIdx.x != 0) return;
    const float loss = (float)(s->loss_sum / s->loss_rows), norm = (float)sqrt(s->sum_squares);
    int skip = SKIP_NONE;
    if (!isfinite(loss) || !isfinite(norm)) skip = SKIP_NONFINITE;
    else if (loss > s->loss_limit) skip = SKIP_LOSS;
    else if (norm > s->norm_limit) skip = SKIP_NORM;
    s->loss = loss;
    s->grad_norm = norm;
    s->grad_scale = skip != SKIP_NONFINITE && s->grad_clip > 0 && norm > s->grad_clip ? s->grad_clip / norm : 1;
    s->skip = skip;
    if (skip == SKIP_NONE) s->updates++;
}

int code_version() {
#ifdef LLMC_EMU
    return 90;
#else
    cudaFuncAttributes found = {};
    cuda_check(cudaFuncGetAttributes(&found, step_decide_kernel), "asking for what step_decide_kernel was compiled");
    return found.ptxVersion;
#endif
}

void cuda_step_decide(Backend *b, const StepDecide *a) {
    CudaBackend *cuda = cuda_of(b);
    op_begin(cuda, OP_step_decide);
    if (cuda->planning) return;
    CHECK(a->step.p, "step_decide: operand absent");
    LAUNCH(step_decide_kernel, dim3(1), dim3(WARP), 0, cuda->stream, a->step.p);
}

/* ---- rounding of parameters ------------------------------------------------------------------------------------------------ */

/* x to bf16, up in magnitude with the probability of the part cut off: the low 16 bits of `random` are added to those of x. What bf16 can
 * represent stays, infinity and NaN too; beyond its largest number lies infinity. */
__device__ __forceinline__ elem to_elem_stochastic(float x, uint32_t random) {
#if LLMC_BF16
    const uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7f800000u) == 0x7f800000u) return to_elem(x);
    return to_elem(__uint_as_float((bits + (random & 0xffffu)) & 0xffff0000u));
#else
    (void)random;
    return x;
#endif
}

/* Elements i..i+3 of the flat space, i a multiple of 4: element i + k takes word k of the random numbers of (seed, updates, i / 4). */
__device__ __forceinline__ void round_4(elem (&out)[4], const float (&x)[4], bool stochastic, uint64_t seed, uint32_t updates, size_t i) {
    Rng4 random = {};
    if (sizeof(elem) == 2 && stochastic) random = rng4(seed, RNG_ROUND, updates, i / 4);
#pragma unroll
    for (int k = 0; k < 4; k++) out[k] = stochastic ? to_elem_stochastic(x[k], random.v[k]) : to_elem(x[k]);
}

/* Elements i..i+3 of a flat array: whole in one access of 16 bytes (of 8 for bf16), else those from begin to end (not included), one by one. */
__device__ __forceinline__ void load_floats(float (&x)[4], const float *p, size_t i, size_t begin, size_t end, bool whole) {
    if (whole) {
        uint4 raw = load_streaming(p + i);
        memcpy(x, &raw, sizeof x);
        return;
    }
#pragma unroll
    for (int k = 0; k < 4; k++) x[k] = i + k >= begin && i + k < end ? p[i + k] : 0;
}
__device__ __forceinline__ void store_floats(float *p, const float (&x)[4], size_t i, size_t begin, size_t end, bool whole) {
    if (whole) {
        uint4 raw;
        memcpy(&raw, x, sizeof raw);
        store_streaming(p + i, raw);
        return;
    }
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (i + k >= begin && i + k < end) p[i + k] = x[k];
}
__device__ __forceinline__ void store_elems(elem *p, const elem (&x)[4], size_t i, size_t begin, size_t end, bool whole) {
    if (whole) {
        uint2 raw[sizeof(elem) / 2];
        memcpy(raw, x, sizeof raw);
#pragma unroll
        for (int k = 0; k < (int)sizeof(elem) / 2; k++) ((uint2 *)(void *)(p + i))[k] = raw[k];
        return;
    }
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (i + k >= begin && i + k < end) p[i + k] = x[k];
}

static bool aligned_16(const void *p) { return (uintptr_t)p % 16 == 0; }

/* out[i] = in[i], rounded.  out (n) =, in (n) in.  A thread: one vector of four. Bytes: (4 + size of elem) n, the floor. */
enum { CAST_THREADS = 256 };
__global__ void __launch_bounds__(CAST_THREADS)
cast_params_kernel(elem *out, const float *in, size_t n, size_t index, bool stochastic, uint64_t seed, uint32_t updates, bool aligned) {
    begin_kernel();
    const size_t i = 4 * ((size_t)blockIdx.x * CAST_THREADS + threadIdx.x);
    if (i >= n) return;
    const bool whole = aligned && i + 4 <= n;
    float x[4];
    elem y[4];
    load_floats(x, in, i, 0, n, whole);
    round_4(y, x, stochastic, seed, updates, index + i);
    store_elems(out, y, i, 0, n, whole);
}

void cuda_cast_params(Backend *b, const CastParams *a) {
    CudaBackend *cuda = cuda_of(b);
    CHECK(a->n && a->index % 4 == 0, "cast_params: n = %zu, index = %zu", a->n, a->index);
    op_begin(cuda, OP_cast_params);
    if (cuda->planning) return;
    CHECK(a->out.p && a->in.p, "cast_params: operand absent");
    if (a->out.p == (void *)a->in.p) {
        CHECK(sizeof(elem) == sizeof(float), "cast_params: bf16 over its own input");
        return;
    }
    const bool stochastic = a->rounding == ROUND_STOCHASTIC && a->updates > 0;
    const dim3 grid((unsigned)ceil_div(a->n, (size_t)4 * CAST_THREADS));
    LAUNCH(cast_params_kernel, grid, dim3(CAST_THREADS), 0, cuda->stream, (elem *)a->out.p, a->in.p, a->n, a->index, stochastic, a->seed, (uint32_t)a->updates,
           aligned_16(a->out.p) && aligned_16(a->in.p));
}

/* ---- AdamW ------------------------------------------------------------------------------------------------------------------ */

/* What an update needs beside the tensors, from the step: made once by one thread, because pow in double is long beside the work of a block. */
struct Update {
    float beta1, beta2, lr, eps, weight_decay, scale, m_scale, v_scale;
    uint64_t seed;
    uint32_t updates;
    int32_t skip, stochastic;
};

__global__ void adamw_prepare_kernel(Update *to, const StepState *s) {
    begin_kernel();
    if (threadIdx.x != 0) return;
    Update u;
    u.beta1 = s->beta1, u.beta2 = s->beta2, u.lr = s->lr, u.eps = s->eps, u.weight_decay = s->weight_decay, u.scale = s->grad_scale;
    u.m_scale = (float)(1 / (1 - pow((double)s->beta1, (double)s->updates)));
    u.v_scale = (float)(1 / (1 - pow((double)s->beta2, (double)s->updates)));
    u.seed = s->seed, u.updates = (uint32_t)s->updates, u.skip = s->skip, u.stochastic = s->rounding == ROUND_STOCHASTIC;
    *to = u;
}

/* Segments as an argument of a launch (4 KB is the most that every toolkit takes), so that no copy of the caller's list has to live on the device.
 * Tiles are aligned to ADAMW_TILE elements of the flat space; those that a segment touches are blocks of the launch. */
enum { ADAMW_THREADS = 256, ADAMW_TILE = 8192, ADAMW_SEGMENTS = 192 };
struct Segments {
    uint64_t first[ADAMW_SEGMENTS], end[ADAMW_SEGMENTS]; /* first: twice the first element, plus decay */
    uint32_t blocks_before[ADAMW_SEGMENTS];
    uint32_t count, blocks;
};
static_assert(sizeof(Segments) + 8 * sizeof(void *) <= 4096, "arguments of a launch");

/* AdamW as ops.h says, over the segments.  params (n) =, master, m, v (n) +=, grads (n) in; params may be master.
 * A block: what one segment has of one tile. A thread: every ADAMW_THREADS-th vector of four, whole vectors by 16 bytes; a vector that a segment's
 * border cuts element by element, so that two blocks may share it. No thread touches what another touches, so there is no order to keep.
 * Bytes an element: 16 read (master, m, v, grads), 12 written and the parameter's 2 (4; none where params is master): the floor.
 * Vectors and single elements go through the same arithmetic: where a segment begins changes no bit. Error: some roundings of float. */
__global__ void __launch_bounds__(ADAMW_THREADS, sizeof(elem) == 2 ? 5 : 4)
adamw_kernel(elem *params, float *master, float *m, float *v, const float *grads, const Update *update, Segments segments, size_t index, bool aligned) {
    begin_kernel();
    const Update u = *update;
    if (u.skip) return;
    uint32_t s = 0, beyond = segments.count; /* the last segment with blocks_before <= this block */
    while (beyond - s > 1) {
        const uint32_t middle = (s + beyond) / 2;
        if (segments.blocks_before[middle] <= blockIdx.x) s = middle;
        else beyond = middle;
    }
    const size_t first = segments.first[s] / 2, tile = first / ADAMW_TILE + (blockIdx.x - segments.blocks_before[s]);
    const size_t begin = max(first, tile * ADAMW_TILE), end = min((size_t)segments.end[s], (tile + 1) * ADAMW_TILE);
    const float decay = segments.first[s] % 2 ? u.weight_decay : 0;

    for (size_t i = begin / 4 * 4 + 4 * threadIdx.x; i < end; i += 4 * ADAMW_THREADS) {
        const bool whole = aligned && i >= begin && i + 4 <= end;
        float w4[4], m4[4], v4[4], g4[4];
        elem rounded[4];
        load_floats(g4, grads, i, begin, end, whole);
        load_floats(m4, m, i, begin, end, whole);
        load_floats(v4, v, i, begin, end, whole);
        load_floats(w4, master, i, begin, end, whole);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float g = g4[k] * u.scale;
            m4[k] = u.beta1 * m4[k] + (1 - u.beta1) * g;
            v4[k] = u.beta2 * v4[k] + (1 - u.beta2) * g * g;
            w4[k] -= u.lr * (m4[k] * u.m_scale / (sqrtf(v4[k] * u.v_scale) + u.eps) + decay * w4[k]);
        }
        store_floats(m, m4, i, begin, end, whole);
        store_floats(v, v4, i, begin, end, whole);
        store_floats(master, w4, i, begin, end, whole);
        if ((void *)params == (void *)master) continue;
        round_4(rounded, w4, u.stochastic, u.seed, u.updates, index + i);
        store_elems(params, rounded, i, begin, end, whole);
    }
}

static void adamw_launch(CudaBackend *cuda, const AdamW *a, const Update *update, const Segments *segments) {
    const bool aligned = aligned_16(a->params.p) && aligned_16(a->master.p) && aligned_16(a->m.p) && aligned_16(a->v.p) && aligned_16(a->grads.p);
    if (!segments->count) return;
    LAUNCH(adamw_kernel, dim3(segments->blocks), dim3(ADAMW_THREADS), 0, cuda->stream, (elem *)a->params.p, a->master.p, a->m.p, a->v.p, a->grads.p,
           update, *segments, a->index, aligned);
}

void cuda_adamw(Backend *b, const AdamW *a) {
    CudaBackend *cuda = cuda_of(b);
    CHECK(a->n && a->index % 4 == 0, "adamw: n = %zu, index = %zu", a->n, a->index);
    op_begin(cuda, OP_adamw);
    Update *update = scratch<Update>(cuda, 1, "numbers of the update");
    if (cuda->planning) return;
    CHECK(a->params.p && a->master.p && a->m.p && a->v.p && a->grads.p && a->step.p && (a->segments || !a->n_segments), "adamw: operand absent");
    LAUNCH(adamw_prepare_kernel, dim3(1), dim3(WARP), 0, cuda->stream, update, a->step.p);
    Segments batch = {};
    for (size_t i = 0, end = 0; i < a->n_segments; i++) {
        const AdamWSegment *segment = &a->segments[i];
        CHECK(segment->first >= end && segment->n <= a->n && segment->first <= a->n - segment->n, "adamw: segment %zu [%zu, +%zu) after %zu of %zu", i,
              segment->first, segment->n, end, a->n);
        end = segment->first + segment->n;
        if (!segment->n) continue;
        if (batch.count == ADAMW_SEGMENTS) adamw_launch(cuda, a, update, &batch), batch = Segments{};
        batch.first[batch.count] = 2 * (uint64_t)segment->first + (segment->decay != 0);
        batch.end[batch.count] = end;
        batch.blocks_before[batch.count++] = batch.blocks;
        batch.blocks += (uint32_t)((end - 1) / ADAMW_TILE - segment->first / ADAMW_TILE + 1);
    }
    adamw_launch(cuda, a, update, &batch);
}

} /* namespace */
