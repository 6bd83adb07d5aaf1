/* add_norm: residual addition, layer normalisation (Ba et al. 2016) and its saved statistics in one trip through memory, and its backward. A row
 * stays in registers from its only read to its only write. Rows of whole 16-byte vectors are the fast path; ragged ones go by elements. */
#include "backend.cuh"
#include "ptx.cuh"

namespace LLMC_NS {

enum { THREADS = 256, VECTOR = Vec<elem>::N, LARGEST_C = 16384 };

/* The thread's pieces of a row: k of PIECES, which begins at column c. `first`, `stride` and UNROLLED are the kernel's. */
#ifdef LLMC_EMU
#define UNROLL_PIECES
#else
#define UNROLL_PIECES _Pragma("unroll UNROLLED")
#endif
#define EACH_PIECE(k, c)                                                                                               \
    UNROLL_PIECES                                                                                                      \
    for (int k = 0, c = first; k < PIECES; k++, c += stride)                                                           \
        if (c < C)

/* Keeps a row in registers as it came, not as what was computed from it. */
template <int W> __device__ __forceinline__ void stay_packed(Piece<elem, W> &piece) {
    if constexpr (W > 1) {
        uint4 &raw = piece.raw[0];
        raw.x = not_kept(raw.x), raw.y = not_kept(raw.y), raw.z = not_kept(raw.z), raw.w = not_kept(raw.w);
    }
}

/* Sums of a and b over the row's threads, the warp or the block; every thread gets them. slots: shared, 64 floats; free again on return. */
template <bool BLOCK> __device__ __forceinline__ void row_sums(float &a, float &b, float *slots) {
    a = warp_sum(a), b = warp_sum(b);
    if (!BLOCK) return;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    if (lane == 0) slots[warp] = a, slots[WARP + warp] = b;
    __syncthreads();
    a = 0, b = 0;
    for (int i = 0; i < warps; i++) a += slots[i], b += slots[WARP + i];
    __syncthreads();
}

/* ---- forward ------------------------------------------------------------------------------------------------------------------ */

/* residual = x + y, rounded;  out = (residual - mean) rstd gamma + beta, both statistics of the rounded sum; rstd = 1/sqrt(variance + 1e-5).
 * out, residual (N, C) =, residual optional; mean, rstd (N) =; x (N, C) in, y (N, C) in, optional; gamma, beta (C) in. residual may be x: a
 * thread has read its part of the row before it writes it.
 * BLOCK: a block per row, else a warp. A thread: pieces of W columns, PIECES of them at a stride of the row's threads, packed in registers.
 * Bytes: 4 N C elements (2 without y and residual) and 2 N floats, the floor; gamma and beta stay in L1.
 * Order: a thread's columns ascending, a tree over lanes, warps ascending. The variance is the mean of squared deviations, a second pass over
 * registers, so that a large mean does not cancel. Error: one rounding of residual and out beside log2(C) + W PIECES roundings of float. */
template <int W, int PIECES, bool BLOCK, int MAX_THREADS> __global__ void __launch_bounds__(MAX_THREADS)
add_norm_forward_kernel(elem *out, elem *residual, float *mean, float *rstd, const elem *x, const elem *y, const elem *gamma, const elem *beta, size_t N, int C, float per_column) {
    begin_kernel();
    enum { UNROLLED = PIECES };
    DYNAMIC_SHARED(float, slots);
    const size_t row = BLOCK ? blockIdx.x : (size_t)blockIdx.x * (MAX_THREADS / WARP) + threadIdx.x / WARP;
    if (!BLOCK && row >= N) return; /* a whole warp, and no barrier follows */
    const int first = (BLOCK ? threadIdx.x : threadIdx.x % WARP) * W, stride = (BLOCK ? (int)blockDim.x : (int)WARP) * W;
    Piece<elem, W> r[PIECES], other[PIECES];
    x += row * C, y += y ? row * C : 0, out += row * C;
    EACH_PIECE(k, c) r[k] = load_piece<W>(x + c);
    if (y) {
        EACH_PIECE(k, c) other[k] = load_piece<W>(y + c);
        EACH_PIECE(k, c) {
            float a[W], b[W];
            unpack(a, r[k]), unpack(b, other[k]);
            for (int i = 0; i < W; i++) a[i] += b[i];
            r[k] = pack<elem>(a);
        }
    }
    if (residual) EACH_PIECE(k, c) store_piece(residual + row * C + c, r[k]);

    float sum = 0, squares = 0, unused = 0;
    EACH_PIECE(k, c) {
        float v[W];
        unpack(v, r[k]);
        for (int i = 0; i < W; i++) sum += v[i];
        stay_packed(r[k]);
    }
    row_sums<BLOCK>(sum, unused, slots);
    const float m = sum * per_column;
    EACH_PIECE(k, c) {
        float v[W];
        unpack(v, r[k]);
        for (int i = 0; i < W; i++) squares += (v[i] - m) * (v[i] - m);
        stay_packed(r[k]);
    }
    row_sums<BLOCK>(squares, unused, slots);
    const float s = rsqrtf(squares * per_column + 1e-5f);
    if (first == 0) mean[row] = m, rstd[row] = s;

    EACH_PIECE(k, c) {
        float v[W], g[W], b[W];
        unpack(v, r[k]), unpack(g, load_piece<W>(gamma + c)), unpack(b, load_piece<W>(beta + c));
        for (int i = 0; i < W; i++) v[i] = (v[i] - m) * s * g[i] + b[i];
        store_piece(out + c, pack<elem>(v));
    }
}

template <int W, int PIECES, bool BLOCK, int MAX_THREADS> static void forward(CudaBackend *cuda, const AddNormForward *a) {
    const bool copy = a->y.p || a->residual.p != a->x.p; /* without y, a residual in x's place is there already */
    const size_t threads = BLOCK ? round_up(ceil_div(a->C, (size_t)W * PIECES), (size_t)WARP) : MAX_THREADS;
    const size_t blocks = BLOCK ? a->N : ceil_div(a->N, (size_t)MAX_THREADS / WARP);
    LAUNCH((add_norm_forward_kernel<W, PIECES, BLOCK, MAX_THREADS>), dim3((unsigned)blocks), dim3((unsigned)threads), BLOCK ? 2 * WARP * sizeof(float) : 0,
           cuda->stream, (elem *)a->out.p, copy ? (elem *)a->residual.p : NULL, a->mean.p, a->rstd.p, (const elem *)a->x.p, (const elem *)a->y.p,
           (const elem *)a->gamma.p, (const elem *)a->beta.p, a->N, (int)a->C, 1.0f / (float)a->C);
}

void cuda_add_norm_forward(Backend *b, const AddNormForward *a) {
    CudaBackend *cuda = cuda_of(b);
    CHECK(a->N && a->N <= INT32_MAX && a->C && a->C <= LARGEST_C, "add_norm_forward: N %zu, C %zu (at most %d)", a->N, a->C, (int)LARGEST_C);
    op_begin(cuda, OP_add_norm_forward);
    if (cuda->planning) return;
    CHECK(a->out.p && a->mean.p && a->rstd.p && a->x.p && a->gamma.p && a->beta.p, "add_norm_forward: operand absent");
    CHECK(a->residual.p || !a->y.p, "add_norm_forward: y without residual");
    if (a->C % VECTOR) return forward<1, 32, true, 512>(cuda, a);
    switch (ceil_div(a->C, (size_t)VECTOR * WARP)) {
    case 1: return forward<VECTOR, 1, false, THREADS>(cuda, a);
    case 2: return forward<VECTOR, 2, false, THREADS>(cuda, a);
    case 3: return forward<VECTOR, 3, false, THREADS>(cuda, a);
    case 4: return forward<VECTOR, 4, false, THREADS>(cuda, a);
    case 5: return forward<VECTOR, 5, false, THREADS>(cuda, a);
    case 6: return forward<VECTOR, 6, false, THREADS>(cuda, a);
    case 7: return forward<VECTOR, 7, false, THREADS>(cuda, a);
    case 8: return forward<VECTOR, 8, false, THREADS>(cuda, a);
    default: return forward<VECTOR, 4, true, 1024>(cuda, a);
    }
}

/* ---- backward ------------------------------------------------------------------------------------------------------------------- */

/* Who has a row, and where its columns' sums over rows are kept: a warp, in registers; a block, in registers; a block, in shared memory (in `outside`
 * where that is too small: GPUs with 99 KB a block). */
enum Home { OF_WARP, OF_BLOCK, OF_BLOCK_SHARED };

/* With h = (residual - mean) rstd and g = dout gamma: dresidual = dthrough + rstd (g - mean(g) - h mean(g h));
 * partial[block] = sums over the block's rows of (dout h, dout).
 * dresidual (N, C) =, partial (gridDim.x, 2, C) =, dout, residual (N, C) in, dthrough (N, C) in, optional, mean, rstd (N) in, gamma (C) in.
 * dresidual may be dthrough: a thread reads what it will write.
 * A block stays and takes rows at a stride of the grid (OF_WARP: each warp its own); a thread has the same columns of each: pieces of W, PIECES of
 * them at a stride of the row's threads. So its sums over rows need no other thread until the end, when OF_WARP adds its warps' sums in shared memory.
 * Bytes: 4 N C elements (3 without dthrough), the floor, 2 N floats, and 2 C floats for each block (at N 65,536, C 768 on 132 multiprocessors: 0.4 %).
 * Order of the sums over rows: ascending in a thread, warps ascending, then blocks as add_partials has it: a function of the shape and the number of
 * multiprocessors. Error: one rounding of dresidual; the sums N / (rows at a time) + 16 roundings of float. */
template <int W, int PIECES, Home HOME, int MAX_THREADS, int MIN_BLOCKS> __global__ void __launch_bounds__(MAX_THREADS, MIN_BLOCKS)
add_norm_backward_kernel(elem *dresidual, float *partial, const elem *dout, const elem *dthrough, const elem *residual, const float *mean, const float *rstd,
                         const elem *gamma, float *outside, size_t N, int C, float per_column) {
    begin_kernel();
    constexpr bool BLOCK = HOME != OF_WARP, SHARED = HOME == OF_BLOCK_SHARED;
    constexpr bool AGAIN = SHARED && (W == 1 || sizeof(elem) == 4); /* large rows that registers do not hold, ragged or in fp32, are read twice */
    enum { UNROLLED = AGAIN ? 4 : PIECES }; /* what is read twice need not be in registers, and what is need be at known places */
    DYNAMIC_SHARED(float, shared);
    float *slots = shared, *columns = shared + 2 * WARP; /* OF_WARP: (2, C); OF_BLOCK_SHARED: (PIECES, 2 W, threads), a thread's own */
    if (SHARED && outside) columns = outside + blockIdx.x * (size_t)(PIECES * 2 * W * MAX_THREADS);
    const int warp = threadIdx.x / WARP, first = (BLOCK ? threadIdx.x : threadIdx.x % WARP) * W, stride = (SHARED ? MAX_THREADS : BLOCK ? (int)blockDim.x : (int)WARP) * W;
    const unsigned rows_at_once = BLOCK ? 1 : MAX_THREADS / WARP;
    float sum_gamma[SHARED ? 1 : PIECES][W] = {}, sum_beta[SHARED ? 1 : PIECES][W] = {};
    if (SHARED)
        EACH_PIECE(k, c)
            for (int i = 0; i < 2 * W; i++) columns[(2 * W * k + i) * MAX_THREADS + threadIdx.x] = 0;

    for (unsigned next = blockIdx.x * rows_at_once + (BLOCK ? 0 : warp); next < (unsigned)N; next += gridDim.x * rows_at_once) {
        const size_t row = next;
        Piece<elem, W> dy[PIECES], x[PIECES], through[PIECES];
        const float m = mean[row], s = rstd[row];
        if (!AGAIN) {
            EACH_PIECE(k, c) dy[k] = load_piece<W>(dout + row * C + c);
            EACH_PIECE(k, c) x[k] = load_piece<W>(residual + row * C + c);
        }
        if (dthrough && !SHARED) EACH_PIECE(k, c) through[k] = load_piece<W>(dthrough + row * C + c);
        float g_sum = 0, gh_sum = 0;
        EACH_PIECE(k, c) {
            float d[W], h[W], w[W];
            unpack(d, AGAIN ? load_piece<W>(dout + row * C + c) : dy[k]), unpack(h, AGAIN ? load_piece<W>(residual + row * C + c) : x[k]);
            unpack(w, load_piece<W>(gamma + c));
            for (int i = 0; i < W; i++) {
                h[i] = (h[i] - m) * s;
                g_sum += d[i] * w[i];
                gh_sum += d[i] * w[i] * h[i];
                if constexpr (SHARED) {
                    float *sums = columns + (2 * W * k + i) * MAX_THREADS + threadIdx.x;
                    sums[0] += d[i] * h[i], sums[W * MAX_THREADS] += d[i];
                } else sum_gamma[k][i] += d[i] * h[i], sum_beta[k][i] += d[i];
            }
            if (!AGAIN) stay_packed(dy[k]), stay_packed(x[k]);
        }
        if (SHARED && !AGAIN && dthrough) EACH_PIECE(k, c) through[k] = load_piece<W>(dthrough + row * C + c); /* large rows: no registers earlier */
        row_sums<BLOCK>(g_sum, gh_sum, slots);
        const float g_mean = g_sum / C, gh_mean = gh_sum * per_column;
        EACH_PIECE(k, c) {
            float d[W], h[W], w[W], t[W] = {};
            unpack(d, AGAIN ? load_piece<W>(dout + row * C + c) : dy[k]), unpack(h, AGAIN ? load_piece<W>(residual + row * C + c) : x[k]);
            unpack(w, load_piece<W>(gamma + not_kept(c))); /* from L1 again, rather than kept */
            if (dthrough) unpack(t, AGAIN ? load_piece<W>(dthrough + row * C + c) : through[k]);
            for (int i = 0; i < W; i++) d[i] = t[i] + s * (d[i] * w[i] - g_mean - (h[i] - m) * s * gh_mean);
            store_piece(dresidual + row * C + c, pack<elem>(d));
        }
    }

    partial += blockIdx.x * 2 * (size_t)C;
    for (int turn = 0; turn < (BLOCK ? 1 : MAX_THREADS / WARP); turn++) { /* OF_WARP: warp 0 sets the sums, the others add to them, the last writes */
        if (BLOCK || turn == warp)
            EACH_PIECE(k, c)
                for (int which = 0; which < 2; which++) {
                    float sum[W], before[W] = {};
                    if (!BLOCK && turn > 0) unpack(before, load_piece<W>(columns + which * C + c));
                    for (int i = 0; i < W; i++)
                        sum[i] = before[i] + (SHARED ? columns[(2 * W * k + which * W + i) * MAX_THREADS + threadIdx.x] : which ? sum_beta[SHARED ? 0 : k][i] : sum_gamma[SHARED ? 0 : k][i]);
                    store_piece((BLOCK || turn == MAX_THREADS / WARP - 1 ? partial : columns) + which * C + c, pack<float>(sum));
                }
        if (!BLOCK) __syncthreads();
    }
}

/* MIN_BLOCKS is also what is launched for each multiprocessor, if the block is as large as it may be; smaller ones in proportion. While
 * planning: the scratch alone. */
template <int W, int PIECES, Home HOME, int MAX_THREADS, int MIN_BLOCKS> static void backward(CudaBackend *cuda, const AddNormBackward *a) {
    const size_t threads = HOME != OF_BLOCK ? MAX_THREADS : round_up(ceil_div(a->C, (size_t)W * PIECES), (size_t)WARP);
    const size_t most = cuda->sm_count * (MAX_THREADS * MIN_BLOCKS / threads);
    const size_t wanted = HOME == OF_WARP ? ceil_div(a->N, (size_t)MAX_THREADS / WARP) : a->N, blocks = wanted < most ? wanted : most;
    const size_t slots = 2 * WARP * sizeof(float), used = ceil_div(a->C, W * threads); /* of PIECES */
    const size_t columns = (HOME == OF_BLOCK ? 0 : HOME == OF_WARP ? 2 * a->C : used * 2 * W * threads) * sizeof(float);
    const bool fits = slots + columns <= cuda->shared_limit;
    CHECK(fits || HOME == OF_BLOCK_SHARED, "add_norm_backward: C %zu, %zu bytes of shared memory of %zu", a->C, slots + columns, cuda->shared_limit);
    float *partial = scratch<float>(cuda, blocks * 2 * a->C, "partial sums of dgamma and dbeta");
    float *outside = fits ? NULL : scratch<float>(cuda, blocks * PIECES * 2 * W * threads, "sums of columns that shared memory does not hold");
    if (cuda->planning) return;
    LAUNCH((add_norm_backward_kernel<W, PIECES, HOME, MAX_THREADS, MIN_BLOCKS>), dim3((unsigned)blocks), dim3((unsigned)threads), slots + (fits ? columns : 0),
           cuda->stream, (elem *)a->dresidual.p, partial, (const elem *)a->dout.p, (const elem *)a->dthrough.p, (const elem *)a->residual.p, a->mean.p, a->rstd.p,
           (const elem *)a->gamma.p, outside, a->N, (int)a->C, 1.0f / (float)a->C);
    add_partials_run(cuda, a->dgamma.p, a->C, a->dbeta.p, partial, blocks, 2 * a->C);
}

void cuda_add_norm_backward(Backend *b, const AddNormBackward *a) {
    CudaBackend *cuda = cuda_of(b);
    CHECK(a->N && a->N <= INT32_MAX && a->C && a->C <= LARGEST_C, "add_norm_backward: N %zu, C %zu (at most %d)", a->N, a->C, (int)LARGEST_C);
    op_begin(cuda, OP_add_norm_backward);
    CHECK(cuda->planning || (a->dresidual.p && a->dgamma.p && a->dbeta.p && a->dout.p && a->residual.p && a->mean.p && a->rstd.p && a->gamma.p),
          "add_norm_backward: operand absent");
    const size_t vectors = a->C / VECTOR;
    if (a->C % VECTOR) return a->C <= 2048 ? backward<1, 4, OF_BLOCK, 512, 2>(cuda, a) : backward<1, 32, OF_BLOCK_SHARED, 512, 1>(cuda, a);
    if (vectors <= 1 * WARP) return backward<VECTOR, 1, OF_WARP, THREADS, 4>(cuda, a);
    if (vectors <= 2 * WARP) return backward<VECTOR, 2, OF_WARP, THREADS, 3>(cuda, a);
    if (vectors <= 3 * WARP) return backward<VECTOR, 3, OF_WARP, THREADS, 2>(cuda, a);
    if (vectors <= 512) return backward<VECTOR, 1, OF_BLOCK, 512, 2>(cuda, a);
    if (vectors <= 1024) return backward<VECTOR, 2, OF_BLOCK, 512, 1>(cuda, a);
    return backward<VECTOR, LARGEST_C / VECTOR / 512, OF_BLOCK_SHARED, 512, 1>(cuda, a);
}

} /* namespace */
