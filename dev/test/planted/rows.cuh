/* Reductions over rows, as in the norms and the head. A launch: one block a row. `bug` picks a planted bug, NONE the right kernel. */
namespace rows {
enum Bug { NONE, NO_BARRIER, NO_SECOND_BARRIER, DIVERGENT, TAIL, POISON, STATISTIC, LEAVES, HALF_MASK, RAGGED_LOOP, READ_BEYOND };
enum { C = 500, R = 6, THREADS = 128, WARPS = THREADS / WARP };

/* block_sum of kernel.cuh, with one barrier left out. */
template <Bug BUG> __device__ float sum_of_block(float x, float *slots) {
    x = warp_sum(x);
    if (threadIdx.x % WARP == 0) slots[threadIdx.x / WARP] = x;
    if (BUG != NO_BARRIER) __syncthreads();
    float total = 0;
    for (int i = 0; i < WARPS; i++) total += slots[i];
    if (BUG != NO_SECOND_BARRIER) __syncthreads(); /* else a warp ahead writes its part of the next sum while another still reads this one's */
    return total;
}

/* out = (x - mean) rstd, mean and rstd per row.  Bugs: barriers of the sum; a bound that leaves out the row's last elements; more warps' slots
 * read than were written; the variance about 0. */
template <Bug BUG> __global__ void norm_kernel(float *out, float *mean, float *rstd, const float *x) {
    DYNAMIC_SHARED(float, slots);
    const float *row = x + blockIdx.x * C;
    const int end = BUG == TAIL ? C / THREADS * THREADS : C;
    float sum = 0, squares = 0;
    for (int i = threadIdx.x; i < end; i += THREADS) sum += row[i];
    float m = sum_of_block<BUG>(sum, slots) / C;
    for (int i = threadIdx.x; i < end; i += THREADS) squares += BUG == STATISTIC ? row[i] * row[i] : (row[i] - m) * (row[i] - m);
    float total = sum_of_block<BUG>(squares, slots);
    if (BUG == POISON) total += 0 * slots[WARPS]; /* a slot of a warp that is not there */
    float r = rsqrtf(total / C + 1e-5f);
    for (int i = threadIdx.x; i < end; i += THREADS) out[blockIdx.x * C + i] = (row[i] - m) * r;
    if (threadIdx.x == 0) mean[blockIdx.x] = m, rstd[blockIdx.x] = r;
}

/* out[row] = the row's maximum, by warps that share the row.  Bugs: a barrier inside a branch that some warps do not take; threads that have
 * nothing left to do leave; a shuffle that names half a warp; a collective in a loop that some lanes leave earlier than others. */
template <Bug BUG> __global__ void max_kernel(float *out, const float *x) {
    DYNAMIC_SHARED(float, slots);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, from = warp * C / WARPS, n = (warp + 1) * C / WARPS - from - (warp == 1 ? 90 : 0);
    const float *row = x + blockIdx.x * C + from;
    float largest = -INFINITY;
    for (int i = lane; i < n; i += WARP) {
        largest = fmaxf(largest, row[i]);
        if (BUG == RAGGED_LOOP) __syncwarp();
    }
    if (BUG == LEAVES && n < 100) return;
    if (BUG == HALF_MASK && lane < 16) largest = fmaxf(largest, __shfl_xor_sync(0xffffu, largest, 8));
    largest = warp_max(largest);
    if (lane == 0) slots[warp] = largest;
    if (BUG == DIVERGENT) {
        if (warp == 0) __syncthreads();
        else { largest = 0; __syncthreads(); }
    } else __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 0; i < WARPS; i++) largest = fmaxf(largest, slots[i]);
        out[blockIdx.x] = largest;
    }
}

/* out = 2 x as vectors, with the last one not whole.  Bug: the last vector is loaded and stored whole, and what lies beyond the row put back:
 * no result is wrong. */
template <Bug BUG> __global__ void scale_kernel(float *out, const float *x, int n) {
    const int i = (int)threadIdx.x * Vec<float>::N, left = n - i;
    if (left <= 0) return;
    if (BUG == READ_BEYOND || left >= Vec<float>::N) {
        Vec<float> v = load_vec(x + i);
        for (int k = 0; k < Vec<float>::N; k++)
            if (k < left) out[i + k] = 2 * v.v[k];
    } else for (int k = 0; k < left; k++) out[i + k] = 2 * x[i + k];
}

template <Bug BUG> static void norm(Outcome *o) {
    Device<float> x(R * C), out(R * C), mean(R), rstd(R);
    fill(x.p, R * C, 1);
    for (int i = 0; i < R * C; i++) x[i] = x[i] + 2; /* a mean that matters */
    launch(o, R, THREADS, (WARPS + 1) * sizeof(float), norm_kernel<BUG>, out.p, mean.p, rstd.p, (const float *)x.p);
    for (int r = 0; r < R; r++) {
        double m = 0, squares = 0;
        for (int i = 0; i < C; i++) m += (double)x[r * C + i] / C;
        for (int i = 0; i < C; i++) squares += ((double)x[r * C + i] - m) * ((double)x[r * C + i] - m);
        double rs = 1 / sqrt(squares / C + 1e-5);
        compare(o, mean[r], m, 1e-6), compare(o, rstd[r], rs, 1e-5);
        for (int i = 0; i < C; i++) compare(o, out[r * C + i], ((double)x[r * C + i] - m) * rs, 1e-5);
    }
}
template <Bug BUG> static void maximum(Outcome *o) {
    Device<float> x(R * C), out(R);
    fill(x.p, R * C, 2);
    launch(o, R, THREADS, WARPS * sizeof(float), max_kernel<BUG>, out.p, (const float *)x.p);
    for (int r = 0; r < R; r++) {
        float largest = -INFINITY;
        for (int i = 0; i < C; i++)
            if (i / (C / WARPS) != 1 || i < 160) largest = fmaxf(largest, x[r * C + i]);
        compare(o, out[r], (double)largest, 0);
    }
}
template <Bug BUG> static void scale(Outcome *o) {
    Device<float> x(61), out(61);
    fill(x.p, 61, 3);
    launch(o, 1, 32, 0, scale_kernel<BUG>, out.p, (const float *)x.p, 61);
    for (int i = 0; i < 61; i++) compare(o, out[i], 2 * (double)x[i], 0);
}
} /* namespace rows */
