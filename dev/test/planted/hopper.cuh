/* A product as kernels for Hopper make it: TMA fills stages, two warpgroups multiply, TMA stores; and blocks of a cluster that read each other's shared
 * memory. nvcc takes this file too (dev/test/test_hopper_build.sh). `bug` picks a planted bug, NONE the right kernel. */
namespace hopper {
enum Bug { NONE, EARLY_RELEASE, PARITY, NO_FULL_WAIT, NO_WAIT, NO_FENCE, FEWER_BYTES, MORE_BYTES, STRIDE, NO_PROXY_FENCE, NO_READ_WAIT, REGISTERS, ONE_WARPGROUP_LESS,
           NO_MAP_SYNC, LEAVES, NO_SECOND_SYNC, WRITTEN_OVER, LOADED_OVER, OTHER_THREAD, LATE_WAIT, FRAGMENT, LEFT_OUT, NO_BEGIN, COPIES_BEFORE,
           STORES_BEFORE, READS_BEFORE };
enum { BM = 128, BN = 64, BK = 64, STAGES = 2, GEMM_THREADS = 384, A_BYTES = BM * BK * 2, B_BYTES = BN * BK * 2, STAGE_BYTES = A_BYTES + B_BYTES };
enum { OUT_BYTES = BM * BN * 2, GEMM_SHARED = STAGES * STAGE_BYTES + OUT_BYTES + 64 };

/* D (M, N) = A (M, K) B (N, K)^T, bf16, sums in float, k ascending. Block: 128 x 64 of D; warpgroup 0 copies, 1 and 2 have 64 rows each. C blocks of a cluster,
 * neighbours in M, share B: each copies 64 / C of its rows to all. full[s]: the stage has arrived; empty[s]: both warpgroups of all C blocks have read it. */
template <Bug BUG, int C>
__global__ void __launch_bounds__(GEMM_THREADS, 1)
    gemm_kernel(const __grid_constant__ TensorMap d, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, int steps) {
    DYNAMIC_SHARED(unsigned char, shared);
    unsigned char *out = shared + STAGES * STAGE_BYTES;
    uint64_t *full = (uint64_t *)(void *)(out + OUT_BYTES), *empty = full + STAGES;
    const int group = threadIdx.x / 128, row = (int)blockIdx.x * BM, column = (int)blockIdx.y * BN;
    const bool waits = BUG != NO_BEGIN && (BUG != COPIES_BEFORE || group) && (BUG != STORES_BEFORE || !group);
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) mbarrier_init(&full[s], 1), mbarrier_init(&empty[s], 2 * C);
        fence_mbarrier_init();
    }
    if (C > 1) cluster_arrive(), cluster_wait();
    else __syncthreads();
    if (waits) begin_kernel();
    if (group == 0) {
        registers_fewer<40>();
        if (threadIdx.x == 0)
            for (int i = 0; i < steps; i++) {
                const int s = i % STAGES;
                unsigned char *stage = shared + s * STAGE_BYTES;
                mbarrier_wait(&empty[s], BUG == PARITY ? i / STAGES & 1 : (i / STAGES & 1) ^ 1);
                mbarrier_arrive_expect(&full[s], BUG == FEWER_BYTES ? STAGE_BYTES - 16 : BUG == MORE_BYTES ? STAGE_BYTES + 16 : STAGE_BYTES);
                tma_load(stage, a, &full[s], i * BK, row);
                if (BUG == LEFT_OUT && i == 0) mbarrier_arrive(&empty[s]); /* for the warpgroup that leaves it out */
                if (C == 1) tma_load(stage + A_BYTES, b, &full[s], i * BK, column);
                else {
                    const unsigned r = cluster_rank(), rows = BN / C;
                    tma_load_multicast(stage + A_BYTES + r * rows * 128, b, &full[s], (1 << C) - 1, i * BK, column + (int)(r * rows));
                }
            }
    } else if (BUG == ONE_WARPGROUP_LESS && group == 2) {
        registers_more<232>();
    } else {
        registers_more<BUG == REGISTERS ? 240 : 232>();
        const int mine = group - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
        float sum[BN / 2];
        const int first = BUG == LEFT_OUT && mine; /* of step 0 its rows are zeros */
        for (int i = first; i < steps; i++) {
            const int s = i % STAGES;
            const uint32_t stage = shared_address(shared + s * STAGE_BYTES);
            uint64_t da = tile_descriptor<SWIZZLE_128, K_MAJOR>(stage, BM) + (tile_advance<SWIZZLE_128, K_MAJOR>(BM, 0, 64 * mine) >> 4);
            uint64_t db = tile_descriptor<SWIZZLE_128, K_MAJOR>(stage + A_BYTES, BN);
            if (BUG == STRIDE) db += (uint64_t)64 << 32; /* eight rows on: 2048 bytes instead of 1024 */
            if (BUG != NO_FULL_WAIT) mbarrier_wait(&full[s], i / STAGES & 1);
            if (BUG != NO_FENCE) wgmma_fence(sum);
            UNROLL for (int k = 0; k < BK; k += 16) {
                const unsigned on = tile_advance<SWIZZLE_128, K_MAJOR>(BM, k) >> 4;
                wgmma_ss<K_MAJOR, K_MAJOR>(sum, da + on, db + on, i > first || k > 0);
            }
            wgmma_commit();
            if (BUG != EARLY_RELEASE && BUG != NO_WAIT) wgmma_wait<0>(sum);
            if (threadIdx.x % 128 < C) mbarrier_arrive_remote(&empty[s], threadIdx.x % 128);
            if (BUG == EARLY_RELEASE) wgmma_wait<0>(sum);
        }
        unsigned char *mine_out = out + mine * OUT_BYTES / 2; /* 64 rows of 64: a panel */
        for (int j = 0; j < BN / 8; j++)
            for (int half = 0; half < 2; half++) {
                const unsigned r = warp * 16 + 8 * half + lane / 4;
                *(uint32_t *)(void *)(mine_out + tile_place(SWIZZLE_128, 64, r, 8 * j + lane % 4 * 2)) = pack_bf16(sum[4 * j + 2 * half], sum[4 * j + 2 * half + 1]);
            }
        if (BUG != NO_PROXY_FENCE) fence_proxy_async();
        if (BUG == NO_WAIT) wgmma_wait<0>(sum);
        named_sync(1 + mine, 128);
        if (threadIdx.x % 128 == 0) {
            tma_store(d, mine_out, column, row + 64 * mine);
            bulk_commit();
            if (BUG != NO_READ_WAIT) bulk_wait_read<0>();
        }
    }
    if (C > 1) cluster_arrive(), cluster_wait(); /* the other blocks' last arrivals and copies */
}

/* y = x by way of a stage, and d = 2 x by way of a buffer of its own, tiles of 32 rows of 64: warp 0 brings them, warp 1 sends them on. Two groups of copies a
 * tile, of which one is still open while the other's buffer is used again.  Bugs: the buffer is written, or the stage given back, while a copy may read it; another
 * thread waits than the one that issued; the stage is given back before the wait. */
enum { RELAY_ROWS = 32, RELAY_BYTES = RELAY_ROWS * 128, RELAY_SHARED = 2 * RELAY_BYTES + 16 };
template <Bug BUG> __global__ void relay_kernel(const __grid_constant__ TensorMap y, elem *d, const __grid_constant__ TensorMap x, int tiles) {
    DYNAMIC_SHARED(unsigned char, stage);
    const elem *from = (const elem *)(const void *)stage;
    elem *out = (elem *)(void *)(stage + RELAY_BYTES);
    uint64_t *full = (uint64_t *)(void *)(stage + 2 * RELAY_BYTES), *empty = full + 1;
    const int lane = threadIdx.x % 32;
    if (threadIdx.x == 0) mbarrier_init(full, 1), mbarrier_init(empty, 1), fence_mbarrier_init();
    __syncthreads();
    for (int i = 0; i < tiles; i++) {
        if (threadIdx.x < 32) {
            if (lane) continue;
            mbarrier_wait(empty, (i & 1) ^ 1);
            mbarrier_arrive_expect(full, RELAY_BYTES);
            tma_load(stage, x, full, 0, i * RELAY_ROWS);
            continue;
        }
        mbarrier_wait(full, i & 1);
        if (lane == 0) tma_store(y, stage, 0, i * RELAY_ROWS), bulk_commit();
        if (lane == 0 && BUG != WRITTEN_OVER) bulk_wait_read<1>();
        __syncwarp();
        for (int k = lane; k < RELAY_BYTES / 2; k += 32) out[k] = to_elem(2 * to_float(from[k]));
        fence_proxy_async();
        __syncwarp();
        if (lane == 0) bulk_store(d + i * RELAY_BYTES / 2, out, RELAY_BYTES), bulk_commit();
        if (lane == 0 && BUG == LATE_WAIT) mbarrier_arrive(empty);
        if (lane == (BUG == OTHER_THREAD)) bulk_wait_read<BUG == LOADED_OVER ? 2 : 1>();
        __syncwarp();
        if (lane == 0 && BUG != LATE_WAIT) mbarrier_arrive(empty);
    }
    if (threadIdx.x == 32) bulk_wait_read<0>();
}

/* out[i] = sum over the blocks of its cluster of x, in the order of ranks.  Bugs: no barrier of the cluster before the others' memory is read, or after the
 * second time it was written, or before a block ends; x is read before the kernel in front has ended. */
template <Bug BUG> __global__ void cluster_sum_kernel(float *out, const float *x, int blocks) {
    DYNAMIC_SHARED(float, mine);
    const float before = BUG == READS_BEFORE ? x[blockIdx.x * blockDim.x + threadIdx.x] : 0;
    begin_kernel();
    for (int again = 0; again < 2; again++) {
        mine[threadIdx.x] = (BUG == READS_BEFORE ? before : x[blockIdx.x * blockDim.x + threadIdx.x]) * (float)(1 + again);
        if (again ? BUG != NO_SECOND_SYNC : BUG != NO_MAP_SYNC) cluster_arrive(), cluster_wait();
        float sum = 0;
        for (int r = 0; r < blocks; r++) sum += cluster_load(mine + threadIdx.x, (unsigned)r);
        if (BUG != LEAVES || !again) cluster_arrive(), cluster_wait();
        out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
    }
}

enum { FRAGMENTS_K = 80 };
/* out (64, 8) = a (64, K) times ones, from fragments in registers, two in turn: one is loaded while the other is multiplied.  Bug: both may be multiplied still. */
template <Bug BUG> __global__ void fragments_kernel(float *out, const elem *a) {
    enum { K = FRAGMENTS_K };
    DYNAMIC_SHARED(elem, ones);
    const int lane = threadIdx.x % 32, row = (int)threadIdx.x / 32 * 16 + lane / 4, column = lane % 4 * 2;
    ones[threadIdx.x] = to_elem(1);
    fence_proxy_async();
    __syncthreads();
    const uint64_t b = tile_descriptor<SWIZZLE_NONE, K_MAJOR>(shared_address(ones), 8);
    uint32_t f[2][4];
    float sum[4];
    UNROLL for (int k = 0; k < K; k += 16) {
        UNROLL for (int i = 0; i < 4; i++) memcpy(&f[k / 16 % 2][i], a + (row + i % 2 * 8) * K + k + column + i / 2 * 8, 4);
        wgmma_fence(sum);
        wgmma_rs<K_MAJOR>(sum, f[k / 16 % 2], b, k > 0);
        wgmma_commit();
        wgmma_wait<BUG == FRAGMENT ? 2 : 1>();
    }
    wgmma_wait<0>(sum);
    for (int i = 0; i < 4; i++) out[(row + i / 2 * 8) * 8 + column + i % 2] = sum[i];
}

#ifdef LLMC_EMU
static TensorMap map_of(const elem *p, size_t rows, size_t columns, unsigned box_rows, unsigned box_columns, TileSwizzle swizzle) {
    const size_t dim[2] = {columns, rows}, stride = columns * sizeof(elem);
    const unsigned box[2] = {box_columns, box_rows};
    return tensor_map(p, 2, dim, &stride, box, swizzle);
}

/* M and N leave part tiles, K part steps. Whole numbers: exact. */
template <Bug BUG, int C> static void gemm(Outcome *o) {
    enum { M = 2 * BM - 40, N = 72, K = 232 };
    Device<elem> a(M * K), b(N * K), d(M * N);
    for (int i = 0; i < M * K; i++) a[i] = to_elem(i / K % BM >= 64 && i % K < BK ? 0.0f : (float)((i * 7 + i / K * 3) % 9 - 4));
    for (int i = 0; i < N * K; i++) b[i] = to_elem((float)((i * 5 + i / K) % 5 - 2));
    const TensorMap to = map_of(d.p, M, N, 64, BN, SWIZZLE_128), from_a = map_of(a.p, M, K, BM, BK, SWIZZLE_128), from_b = map_of(b.p, N, K, BN / C, BK, SWIZZLE_128);
    faults.n = 0;
    early_launch = true;
    launch_named(test_name, gemm_kernel<BUG, C>, C, dim3(2, 2), dim3(GEMM_THREADS), GEMM_SHARED, stream, to, from_a, from_b, (K + BK - 1) / BK);
    cudaStreamSynchronize(stream);
    early_launch = false;
    o->faults = faults.n;
    if (faults.n) snprintf(o->why, sizeof o->why, "a fault: %s", faults.text);
    for (int m = 0; m < M && !faults.n; m++)
        for (int n = 0; n < N; n++) {
            float sum = 0;
            for (int k = 0; k < K; k++) sum += to_float(a[m * K + k]) * to_float(b[n * K + k]);
            compare(o, to_float(d[m * N + n]), (double)to_float(to_elem(sum)), 0);
        }
}
template <Bug BUG> static void gemm1(Outcome *o) { gemm<BUG, 1>(o); }
template <Bug BUG> static void gemm2(Outcome *o) { gemm<BUG, 2>(o); }
template <Bug BUG> static void relay(Outcome *o) {
    enum { TILES = 5, N = TILES * RELAY_BYTES / 2 };
    Device<elem> x(N), y(N), d(N);
    for (int i = 0; i < N; i++) x[i] = to_elem((float)(i % 251 - 125));
    const TensorMap from = map_of(x.p, TILES * RELAY_ROWS, 64, RELAY_ROWS, 64, SWIZZLE_NONE), to = map_of(y.p, TILES * RELAY_ROWS, 64, RELAY_ROWS, 64, SWIZZLE_NONE);
    faults.n = 0;
    launch_named(test_name, relay_kernel<BUG>, 1, dim3(1), dim3(64), RELAY_SHARED, stream, to, d.p, from, (int)TILES);
    cudaStreamSynchronize(stream);
    o->faults = faults.n;
    if (faults.n) snprintf(o->why, sizeof o->why, "a fault: %s", faults.text);
    for (int i = 0; i < N && !faults.n; i++) compare(o, to_float(y[i]), (double)to_float(x[i]), 0), compare(o, to_float(d[i]), 2 * (double)to_float(x[i]), 0);
}
template <Bug BUG> static void fragments(Outcome *o) {
    enum { K = FRAGMENTS_K };
    Device<elem> a(64 * K);
    Device<float> out(64 * 8);
    for (int i = 0; i < 64 * K; i++) a[i] = to_elem((float)(i * 7 % 13 - 6));
    faults.n = 0;
    launch_named(test_name, fragments_kernel<BUG>, 1, dim3(1), dim3(128), 256, stream, out.p, (const elem *)a.p);
    cudaStreamSynchronize(stream);
    o->faults = faults.n;
    if (faults.n) snprintf(o->why, sizeof o->why, "a fault: %s", faults.text);
    for (int m = 0; m < 64 && !faults.n; m++) {
        float sum = 0;
        for (int k = 0; k < K; k++) sum += to_float(a[m * K + k]);
        for (int n = 0; n < 8; n++) compare(o, out[m * 8 + n], (double)sum, 0);
    }
}
template <Bug BUG> static void cluster_sum(Outcome *o) {
    enum { BLOCKS = 8, CLUSTER = 4, THREADS = 64 };
    Device<float> x(BLOCKS * THREADS), out(BLOCKS * THREADS);
    fill(x.p, BLOCKS * THREADS, 9);
    faults.n = 0;
    early_launch = true;
    launch_named(test_name, cluster_sum_kernel<BUG>, CLUSTER, dim3(BLOCKS), dim3(THREADS), THREADS * sizeof(float), stream, out.p, (const float *)x.p, (int)CLUSTER);
    cudaStreamSynchronize(stream);
    early_launch = false;
    o->faults = faults.n;
    if (faults.n) snprintf(o->why, sizeof o->why, "a fault: %s", faults.text);
    for (int i = 0; i < BLOCKS * THREADS && !faults.n; i++) {
        float sum = 0;
        for (int r = 0; r < CLUSTER; r++) sum += 2 * x[(i / THREADS / CLUSTER * CLUSTER + r) * THREADS + i % THREADS];
        compare(o, out[i], (double)sum, 0);
    }
}
#endif
} /* namespace hopper */
