/* Column sums and transposed tiles, as in the gradients of bias, gamma and the embedding. */
namespace columns {
enum Bug { NONE, NOT_ADDED, ADDED_TWICE, STRIDE, WARP_RACE, BLOCK_RACE, WRITE_BEYOND, SHARED_BEYOND, NO_BARRIER };
enum { N = 70, C = 52, TILE = 32, THREADS = 256, ROWS = THREADS / TILE };

/* db[c] += sum over rows of d[r, c].  A block: 32 columns; a warp: every eighth row; the warps' sums over shared memory, in order.
 * Bugs: = for +=; one row group added twice; all warps add to one shared slot instead of their own; columns past C written. */
template <Bug BUG> __global__ void column_sum_kernel(float *db, const float *d) {
    DYNAMIC_SHARED(float, shared); /* ROWS x TILE */
    const int column = blockIdx.x * TILE + threadIdx.x % TILE, warp = threadIdx.x / TILE, lane = threadIdx.x % TILE;
    float sum = 0;
    if (column < C)
        for (int r = warp; r < N; r += ROWS) sum += d[r * C + column];
    if (BUG == WARP_RACE) { /* read, wait for a shuffle, write: what hardware does in one instruction after another */
        if (warp == 0) shared[lane] = 0;
        __syncthreads();
        float old = shared[lane];
        __syncwarp();
        shared[lane] = old + sum;
    } else shared[(BUG == SHARED_BEYOND ? warp + 1 : warp) * TILE + lane] = sum;
    __syncthreads();
    if (warp == 0 && (column < C || BUG == WRITE_BEYOND)) {
        float total = 0;
        for (int w = 0; w < (BUG == WARP_RACE ? 1 : ROWS); w++) total += shared[(BUG == SHARED_BEYOND ? w + 1 : w) * TILE + lane];
        if (BUG == ADDED_TWICE) total += shared[lane];
        db[column] = BUG == NOT_ADDED ? total : db[column] + total;
    }
}

/* dw[token[r], c] += d[r, c], a block for some rows: right only when no token lies in two blocks' rows. Bug: some do, and both blocks read and
 * write its row. */
template <Bug BUG> __global__ void scatter_kernel(float *dw, const float *d, const int *token) {
    for (int r = blockIdx.x * 10; r < (int)blockIdx.x * 10 + 10; r++)
        for (int c = threadIdx.x; c < C; c += blockDim.x) dw[(BUG == BLOCK_RACE ? token[r] : r) * C + c] += d[r * C + c];
}

/* out (C, N) = in (N, C) transposed, tiles of 32 x 32 through shared memory, rows of 33.  Bugs: the last tile of a row laid out by its own
 * width; no barrier between writing and reading. */
template <Bug BUG> __global__ void transpose_kernel(float *out, const float *in) {
    DYNAMIC_SHARED(float, tile);
    const int c0 = blockIdx.x * TILE, r0 = blockIdx.y * TILE, x = threadIdx.x % TILE, y = threadIdx.x / TILE;
    const int width = BUG == STRIDE && c0 + TILE > C ? C - c0 : TILE + 1;
    for (int k = y; k < TILE; k += ROWS)
        if (r0 + k < N && c0 + x < C) tile[k * width + x] = in[(r0 + k) * C + c0 + x];
    if (BUG != NO_BARRIER) __syncthreads();
    for (int k = y; k < TILE; k += ROWS)
        if (c0 + k < C && r0 + x < N) out[(c0 + k) * N + r0 + x] = tile[x * (TILE + 1) + k];
}

template <Bug BUG> static void sums(Outcome *o) {
    Device<float> d(N * C), db(C);
    fill(d.p, N * C, 4), fill(db.p, C, 5);
    double want[C];
    for (int c = 0; c < C; c++) {
        want[c] = (double)db[c];
        for (int r = 0; r < N; r++) want[c] += (double)d[r * C + c];
    }
    launch(o, ceil_div((unsigned)C, (unsigned)TILE), THREADS, ROWS * TILE * sizeof(float), column_sum_kernel<BUG>, db.p, (const float *)d.p);
    for (int c = 0; c < C; c++) compare(o, db[c], want[c], 1e-5);
}
template <Bug BUG> static void scatter(Outcome *o) {
    Device<float> d(N * C), dw(N * C);
    Device<int> token(N);
    fill(d.p, N * C, 6), fill(dw.p, N * C, 7);
    double *want = (double *)xcalloc(N * C, sizeof *want);
    for (int i = 0; i < N * C; i++) want[i] = (double)dw[i];
    for (int r = 0; r < N; r++) {
        token[r] = r * 7 % 11;
        for (int c = 0; c < C; c++) want[(BUG == BLOCK_RACE ? token[r] : r) * C + c] += (double)d[r * C + c];
    }
    launch(o, N / 10, 64, 0, scatter_kernel<BUG>, dw.p, (const float *)d.p, (const int *)token.p);
    for (int i = 0; i < N * C; i++) compare(o, dw[i], want[i], 1e-5);
    free(want);
}
template <Bug BUG> static void transpose(Outcome *o) {
    Device<float> in(N * C), out(N * C);
    fill(in.p, N * C, 8);
    launch(o, dim3(ceil_div((unsigned)C, (unsigned)TILE), ceil_div((unsigned)N, (unsigned)TILE)), THREADS, TILE * (TILE + 1) * sizeof(float),
           transpose_kernel<BUG>, out.p, (const float *)in.p);
    for (int i = 0; i < N * C; i++) compare(o, out[i], (double)in[i % N * C + i / N], 0);
}
} /* namespace columns */
