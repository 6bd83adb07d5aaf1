/* Sums over rows without float atomics: column sums of a gradient (for biases), and the second half of every such sum, which adds the partial
 * sums of the blocks in a fixed order. */
#include "backend.cuh"

namespace LLMC_NS {

/* ---- partial sums over blocks of rows --------------------------------------------------------------------------------------- */

enum { THREADS = 256, WARPS = THREADS / WARP, BATCH = 4, WAVE = 132 * 4 /* blocks that fill the largest GPU once */ };

/* partial[i, c] = sum of dout[r, c] over the rows [i rows, (i + 1) rows).
 * partial (blockIdx.y, OC) =, dout (N, OC) in.  A lane: W neighbouring columns; the block's warps take its rows in turn, four loads of a warp in
 * flight; the warps' sums meet in shared memory.
 * Bytes: N OC elements read, the floor, and OC floats written for every `rows` rows (at 65,536 x 3,072: 0.4 %).
 * Order: a warp's rows ascending, then warps ascending. Error: rows / 8 + 8 roundings of float. */
template <int W> __global__ void __launch_bounds__(THREADS, 4)
bias_partial_kernel(float *partial, const elem *dout, size_t N, size_t OC, size_t rows) {
    begin_kernel();
    DYNAMIC_SHARED(float, sums); /* (WARPS, W, WARP): a lane's columns a warp's width apart, free of bank conflicts */
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const size_t column = ((size_t)blockIdx.x * WARP + lane) * W, first = blockIdx.y * rows, end = first + rows < N ? first + rows : N;
    float sum[W] = {};
    if (column < OC)
        for (size_t row = first + warp; row < end; row += BATCH * WARPS) {
            Piece<elem, W> x[BATCH];
            for (int i = 0; i < BATCH; i++)
                if (row + i * WARPS < end) x[i] = load_piece<W>(dout + (row + i * WARPS) * OC + column);
            for (int i = 0; i < BATCH; i++)
                if (row + i * WARPS < end) {
                    float v[W];
                    unpack(v, x[i]);
                    for (int e = 0; e < W; e++) sum[e] += v[e];
                }
        }
    for (int e = 0; e < W; e++) sums[(warp * W + e) * WARP + lane] = sum[e];
    __syncthreads();
    for (int k = threadIdx.x; k < W * WARP; k += THREADS) {
        const size_t c = (size_t)blockIdx.x * WARP * W + k;
        float total = 0;
        for (int w = 0; w < WARPS; w++) total += sums[(w * W + k % W) * WARP + k / W];
        if (c < OC) partial[blockIdx.y * OC + c] = total;
    }
}

static size_t width_of(size_t OC) { return OC % Vec<elem>::N ? 1 : Vec<elem>::N; }
static size_t strips_of(size_t OC) { return ceil_div(OC, WARP * width_of(OC)); }
/* Rows of a block: one wave of blocks where there is work for it, and at least four rows a warp. A function of the shape alone; the grid's
 * second dimension ends at 65,535. */
static size_t rows_of(size_t N, size_t OC) {
    size_t rows = round_up(ceil_div(N * strips_of(OC), (size_t)WAVE), (size_t)WARPS), least = round_up(ceil_div(N, (size_t)65535), (size_t)WARPS);
    if (rows < 4 * WARPS) rows = 4 * WARPS;
    return rows < least ? least : rows;
}

size_t bias_backward_scratch(size_t N, size_t OC) { return ceil_div(N, rows_of(N, OC)) * OC; }

void bias_backward_run(CudaBackend *cuda, float *db, const elem *dout, size_t N, size_t OC, float *partial) {
    const size_t rows = rows_of(N, OC), blocks = ceil_div(N, rows), shared = WARPS * WARP * width_of(OC) * sizeof(float);
    const dim3 grid((unsigned)strips_of(OC), (unsigned)blocks);
    if (width_of(OC) == 1) LAUNCH(bias_partial_kernel<1>, grid, dim3(THREADS), shared, cuda->stream, partial, dout, N, OC, rows);
    else LAUNCH(bias_partial_kernel<Vec<elem>::N>, grid, dim3(THREADS), shared, cuda->stream, partial, dout, N, OC, rows);
    add_partials_run(cuda, db, OC, NULL, partial, blocks, OC);
}

/* ---- partial sums to gradients ------------------------------------------------------------------------------------------------ */

enum { SLICES = 32 };

/* first[c] += sum over i of partial[i, c] for c < n_first; second[c - n_first] += for the others.
 * first (n_first) +=, second (columns - n_first) +=, partial (n, columns) in.  A block: 32 columns; warp s reads rows s, s + 32, ... (128 bytes
 * at a time), then warp j adds the 32 sums of column j.
 * Bytes: n x columns floats read once, the floor. Order: a warp's rows ascending, then a tree over the warps. Error: n / 32 + 6 roundings. */
__global__ void __launch_bounds__(SLICES * WARP)
add_partials_kernel(float *first, size_t n_first, float *second, const float *partial, size_t n, size_t columns) {
    begin_kernel();
    DYNAMIC_SHARED(float, sums); /* (SLICES, WARP + 1): the padding keeps a column's reads in different banks */
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const size_t c = (size_t)blockIdx.x * WARP + lane, mine = (size_t)blockIdx.x * WARP + warp;
    float sum = 0;
    if (c < columns)
        for (size_t i = warp; i < n; i += BATCH * SLICES) {
            float x[BATCH];
            for (int k = 0; k < BATCH; k++) x[k] = i + k * SLICES < n ? partial[(i + k * SLICES) * columns + c] : 0;
            for (int k = 0; k < BATCH; k++) sum += x[k];
        }
    sums[warp * (WARP + 1) + lane] = sum;
    __syncthreads();
    sum = warp_sum(sums[lane * (WARP + 1) + warp]);
    if (lane == 0 && mine < columns) *(mine < n_first ? first + mine : second + (mine - n_first)) += sum;
}

void add_partials_run(CudaBackend *cuda, float *first, size_t n_first, float *second, const float *partial, size_t n, size_t columns) {
    LAUNCH(add_partials_kernel, dim3((unsigned)ceil_div(columns, (size_t)WARP)), dim3(SLICES * WARP), SLICES * (WARP + 1) * sizeof(float), cuda->stream, first,
           n_first, second, partial, n, columns);
}

} /* namespace */
