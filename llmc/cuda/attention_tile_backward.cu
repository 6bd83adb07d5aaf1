/* Causal attention on tensor cores, backward, bf16, heads of 64 and 128: mma.sync and cp.async, so every GPU from sm_80 on.
 * Two kernels that recompute the weights: one owns rows of dq, one owns rows of dk and dv, so each gradient is summed in registers in one fixed
 * order and stored once. Seven products against the five of one fused kernel, whose blocks of keys would all add to dq: by atomics (not
 * deterministic), in turn (blocks that wait for blocks), or by float buffers in memory, about 0.57 ns a row and head at 4 TB/s against 0.44 ns
 * for the two products more. */
#include "attention_tile.cuh"
#if LLMC_BF16

namespace LLMC_NS {

enum { SUB = 32 };            /* columns of scores that a warp has in registers at a time */

/* ---- dq -------------------------------------------------------------------------------------------------------------------- */

/* Shared memory: the block's queries and rows of dout, then STAGES times (keys, values), then lse and delta of the block's rows. */
template <int D> struct QueryTile {
    enum { M = 2, ROWS = TILE_WARPS * 16 * M, KEYS = D == 64 ? 64 : 32, ROW_BYTES = ROWS * 2 * D, KEY_BYTES = KEYS * 2 * D, STAGES = 2 };
    enum { STATS_AT = 2 * ROW_BYTES + STAGES * 2 * KEY_BYTES, SHARED = STATS_AT + 2 * ROWS * 4 };
};

/* delta[row] = sum over d of dout out for the warp's rows, to shared and global memory. Lanes of one row: one chunk each, then a tree. */
template <int D, int ROWS> struct DeltaRows {
    enum { CHUNKS = D / 8, PASS = WARP / CHUNKS };
    Vec<elem> out[ROWS / PASS];
    __device__ __forceinline__ void load(const elem *out_head, int stride, int first, int T) {
        const int lane = threadIdx.x % WARP, row = first + lane / CHUNKS;
        UNROLL for (int i = 0; i < ROWS; i += PASS) {
            Vec<elem> v = {};
            if (row + i < T) v = load_vec(out_head + (ptrdiff_t)(row + i) * stride + lane % CHUNKS * 8);
            out[i / PASS] = v;
        }
    }
    __device__ __forceinline__ void sum(float *to_shared, float *to_global, const unsigned char *dout_rows, int first, int T) {
        const int lane = threadIdx.x % WARP, chunk = lane % CHUNKS;
        UNROLL for (int i = 0; i < ROWS; i += PASS) {
            const int row = i + lane / CHUNKS;
            Vec<elem> dout = load_vec((const elem *)(const void *)(dout_rows + swizzled(row, chunk, 2 * D)));
            float x = 0;
            UNROLL for (int k = 0; k < 8; k++) x = fmaf(to_float(dout.v[k]), to_float(out[i / PASS].v[k]), x);
            UNROLL for (int step = CHUNKS / 2; step > 0; step /= 2) x += __shfl_xor_sync(FULL_MASK, x, step);
            if (chunk == 0) {
                to_shared[row] = x;
                if (first + row < T) to_global[first + row] = x;
            }
        }
        __syncwarp();
    }
};

/* dq[t] = scale sum over s <= t of ds[t,s] k[s], with p[t,s] = exp(scale q[t].k[s] - lse[t]), ds[t,s] = p[t,s] (dout[t].v[s] - delta[t]);
 * delta[t] = dout[t].out[t].  Per head, D = 64 or 128.
 * dqkv (B, T, 3C): the q part =; delta (B, H, T) =; dout, out (B, T, C), lse (B, H, T), qkv (B, T, 3C) in.
 * Block: 128 queries of one head, last ones first; warp: 32 of them. First delta of its own rows, from a register copy of out and the tile of
 *   dout. Then over blocks of 64 keys (32 at D = 128) up to the diagonal, 32 at a time: S = Q K^T, dP = dO V^T, dS in registers is the left
 *   operand of dQ += dS K. Next keys and values arrive by cp.async meanwhile; one barrier a step. Fragments of Q and dO stay in registers at
 *   D = 64.
 * Rows from T on: q, dout, out and lse count as zeros; keys from T on are seen by such rows only; not stored.
 * Bytes: q, dout, out, lse, dq, delta once; k and v once from memory and T/256 times from the L2. FLOPs: 6 D (T^2/2 + about 16 T) a head.
 * Registers (sm_80, 90a, 100, 120): 234-240 at D = 64, 253-255 at 128, no spills; shared 65 KB, 97 KB: 2 blocks an SM, by
 *   registers; by shared memory 1 at D = 128 on sm_80, and 1 on sm_86, 89 and 120.
 * Sums: keys ascending by 16, in float; order depends on T alone.
 * Error: p and ds rounded to bf16 (2^-9 each; a packed p halves its registers while dP is computed), one rounding of dq, the rounding of out that
 *   delta inherits, plus float sums.
 * Source: Dao 2023, FlashAttention-2, algorithm 2. */
template <int D>
__global__ void __launch_bounds__(TILE_THREADS, 2)
    attention_tile_dq_kernel(elem *dqkv, float *delta, const elem *dout, const elem *out, const float *lse, const elem *qkv, TileGrid x) {
    begin_kernel();
    typedef QueryTile<D> Tile;
    enum { M = Tile::M, N = SUB / 8 };
    DYNAMIC_SHARED(unsigned char, shared);
    unsigned char *stages = shared + 2 * Tile::ROW_BYTES;
    const TilePlace place = tile_place(x, blockIdx.x);
    const size_t q_at = tile_head<D>(x, place.head, x.qkv_row), out_at = tile_head<D>(x, place.head, x.out_row);
    const elem *k_head = qkv + q_at + x.out_row, *v_head = k_head + x.out_row;
    const int first = (int)(x.blocks - 1 - place.block) * Tile::ROWS, steps = ceil_div(min(first + Tile::ROWS, x.T), (int)Tile::KEYS);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int warp_first = first + warp * 16 * M, warp_last = warp_first < x.T ? min(warp_first + 16 * M, x.T) - 1 : -1;
    unsigned char *warp_rows = shared + warp * 16 * M * 2 * D;

    tile_load<Tile::ROWS, D>(shared, qkv + q_at, x.qkv_row, first, x.T);
    tile_load<Tile::ROWS, D>(shared + Tile::ROW_BYTES, dout + out_at, x.out_row, first, x.T);
    tile_load<Tile::KEYS, D>(stages, k_head, x.qkv_row, 0, x.T);
    tile_load<Tile::KEYS, D>(stages + Tile::KEY_BYTES, v_head, x.qkv_row, 0, x.T);
    cp_async_commit();
    float *warp_lse = (float *)(void *)(shared + Tile::STATS_AT) + warp * 16 * M, *warp_delta = warp_lse + Tile::ROWS;
    {
        static_assert(16 * M == WARP, "a lane brings one lse");
        DeltaRows<D, 16 * M> rows;
        rows.load(out + out_at, x.out_row, warp_first, x.T);
        warp_lse[lane] = warp_first + lane < x.T ? lse[(size_t)place.head * x.T + warp_first + lane] * LOG2_E : 0;
        cp_async_wait<0>();
        __syncthreads();
        rows.sum(warp_delta, delta + (size_t)place.head * x.T, warp_rows + Tile::ROW_BYTES, warp_first, x.T);
    }

    TileLeft<D, M, D == 64> q, d_out;
    float acc[M][D / 8][4];
    q.init(warp_rows);
    d_out.init(warp_rows + Tile::ROW_BYTES);
    tile_zero(acc);
    NO_UNROLL for (int j = 0; j < steps; j++) {
        const int key = j * Tile::KEYS;
        const unsigned char *stage = stages + j % Tile::STAGES * 2 * Tile::KEY_BYTES;
        if (j + 1 < steps) {
            unsigned char *next = stages + (j + 1) % Tile::STAGES * 2 * Tile::KEY_BYTES; /* its last readers have passed the barrier below */
            tile_load<Tile::KEYS, D>(next, k_head, x.qkv_row, key + Tile::KEYS, x.T);
            tile_load<Tile::KEYS, D>(next + Tile::KEY_BYTES, v_head, x.qkv_row, key + Tile::KEYS, x.T);
        }
        cp_async_commit();
        NO_UNROLL for (int sub = 0; sub < Tile::KEYS && key + sub <= warp_last; sub += SUB) {
            const unsigned char *k = stage + sub * 2 * D, *v = k + Tile::KEY_BYTES;
            float s[M][N][4];
            uint32_t w[M][N / 2][4]; /* p, then ds */
            tile_scores(s, q, k);
            if (key + sub + SUB - 1 > warp_first) {
                UNROLL for (int m = 0; m < M; m++)
                    UNROLL for (int i = 0; i < 4; i++) {
                        const int seen = warp_first + 16 * m + i / 2 * 8 + g - key - sub - 2 * t - i % 2; /* column 8 n is seen up to this one */
                        UNROLL for (int n = 0; n < N; n++) s[m][n][i] = 8 * n > seen ? -INFINITY : s[m][n][i];
                    }
            }
            UNROLL for (int m = 0; m < M; m++)
                UNROLL for (int i = 0; i < 4; i++) {
                    const float row_lse = warp_lse[16 * m + i % 2 * 8 + g];
                    UNROLL for (int n = 0; n < N / 2; n++)
                        w[m][n][i] = weights_of(tile_pair(s[m], n, i), x.scale_log2, make_float2(row_lse, row_lse));
                }
            tile_scores(s, d_out, v);
            UNROLL for (int m = 0; m < M; m++)
                UNROLL for (int i = 0; i < 4; i++) {
                    const float row_delta = warp_delta[16 * m + i % 2 * 8 + g];
                    UNROLL for (int n = 0; n < N / 2; n++)
                        w[m][n][i] = gradients_of(w[m][n][i], tile_pair(s[m], n, i), make_float2(row_delta, row_delta));
                }
            tile_accumulate<D>(acc, w, k);
        }
        cp_async_wait<0>();
        __syncthreads();
    }
    tile_scale(acc, x.scale);
    const TilePlace end = tile_place(x, not_kept(blockIdx.x));
    tile_store<D>(dqkv + tile_head<D>(x, end.head, x.qkv_row), x.qkv_row, (int)(x.blocks - 1 - end.block) * Tile::ROWS, x.T, shared, acc);
}

/* ---- dk and dv -------------------------------------------------------------------------------------------------------------- */

/* Shared memory: the block's keys and values, then STAGES times (queries, rows of dout), then STAGES times (lse, delta) of the queries. */
template <int D> struct KeyTile {
    enum { M = D == 64 ? 2 : 1, ROWS = TILE_WARPS * 16 * M, QUERIES = 64, ROW_BYTES = ROWS * 2 * D, QUERY_BYTES = QUERIES * 2 * D, STAGES = 2 };
    enum { STATS_AT = 2 * ROW_BYTES + STAGES * 2 * QUERY_BYTES, SHARED = STATS_AT + STAGES * 2 * QUERIES * 4 };
    static_assert(2 * QUERIES == TILE_THREADS, "a thread brings one statistic of a block of queries");
};

/* dv[s] = sum over t >= s of p[t,s] dout[t];  dk[s] = scale sum over t >= s of ds[t,s] q[t];  p and ds as in attention_tile_dq_kernel, whose
 * delta this one reads.
 * dqkv (B, T, 3C): the k and v parts =; dout (B, T, C), lse, delta (B, H, T), qkv (B, T, 3C) in.
 * Block: 128 keys of one head (64 at D = 128), first ones first (most queries see them); warp: 32 (16) of them. Over blocks of 64 queries from
 *   the diagonal on, 32 at a time: S^T = K Q^T and dP^T = V dO^T have keys as rows, so that P^T and dS^T in registers are the left operands of
 *   dV += P^T dO and dK += dS^T Q, without a way through shared memory. lse and delta belong to columns: from shared memory, brought
 *   a step ahead through one register a thread. Fragments of K and V are read again at each use: registers hold dK and dV.
 * Rows from T on: q, dout, lse and delta count as zeros, so that p = 1 meets dout = 0 and ds is 0; keys are not stored.
 * Bytes: k, v, dk, dv once; q, dout, lse, delta once from memory and T/256 (T/128) times from the L2. FLOPs: 8 D (T^2/2 + about 16 T) a head.
 * Registers (sm_80, 90a, 100, 120): 253-255 at D = 64, 231-241 at 128, no spills; shared 65 KB, 97 KB: 2 blocks an SM, by
 *   registers; by shared memory 1 at D = 128 on sm_80, and 1 on sm_86, 89 and 120.
 * Sums: queries ascending by 16, in float; order depends on T alone.
 * Error: p and ds rounded to bf16 (2^-9 each), one rounding of the result, the rounding of out that delta inherits, plus float sums.
 * Source: Dao 2023, FlashAttention-2, algorithm 2. */
template <int D>
__global__ void __launch_bounds__(TILE_THREADS, 2)
    attention_tile_dkv_kernel(elem *dqkv, const elem *dout, const float *lse, const float *delta, const elem *qkv, TileGrid x) {
    begin_kernel();
    typedef KeyTile<D> Tile;
    enum { M = Tile::M, N = SUB / 8 };
    DYNAMIC_SHARED(unsigned char, shared);
    unsigned char *stages = shared + 2 * Tile::ROW_BYTES;
    float *stats = (float *)(void *)(shared + Tile::STATS_AT);
    const TilePlace place = tile_place(x, blockIdx.x);
    const size_t q_at = tile_head<D>(x, place.head, x.qkv_row);
    const elem *q_head = qkv + q_at, *dout_head = dout + tile_head<D>(x, place.head, x.out_row);
    const int first = (int)place.block * Tile::ROWS, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int warp_first = first + warp * 16 * M;
    unsigned char *warp_rows = shared + warp * 16 * M * 2 * D;
    /* This thread's statistic of a block of queries: half of them bring lse (in powers of two), half delta. */
    const auto load_stat = [&](int query) {
        const int thread = (int)not_kept(threadIdx.x), row = query + thread % Tile::QUERIES;
        const float *from = (thread < Tile::QUERIES ? lse : delta) + (size_t)place.head * x.T + row;
        return row < x.T ? *from : 0.0f;
    };
    const auto store_stat = [&](int stage, float stat) {
        const int thread = (int)not_kept(threadIdx.x);
        stats[stage * 2 * Tile::QUERIES + thread] = thread < Tile::QUERIES ? stat * LOG2_E : stat;
    };

    tile_load<Tile::ROWS, D>(shared, q_head + x.out_row, x.qkv_row, first, x.T);
    tile_load<Tile::ROWS, D>(shared + Tile::ROW_BYTES, q_head + 2 * x.out_row, x.qkv_row, first, x.T);
    tile_load<Tile::QUERIES, D>(stages, q_head, x.qkv_row, first, x.T);
    tile_load<Tile::QUERIES, D>(stages + Tile::QUERY_BYTES, dout_head, x.out_row, first, x.T);
    cp_async_commit();
    store_stat(0, load_stat(first));
    cp_async_wait<0>();
    __syncthreads();

    TileLeft<D, M, false> k, v;
    float dk[M][D / 8][4], dv[M][D / 8][4];
    k.init(warp_rows);
    v.init(warp_rows + Tile::ROW_BYTES);
    tile_zero(dk);
    tile_zero(dv);
    NO_UNROLL for (int query = first, stage = 0; query < x.T; query += Tile::QUERIES, stage ^= 1) {
        const unsigned char *now = stages + stage * 2 * Tile::QUERY_BYTES;
        const float *now_stats = stats + stage * 2 * Tile::QUERIES;
        const int next_query = query + Tile::QUERIES;
        float next_stat = 0;
        if (next_query < x.T) {
            unsigned char *next = stages + (stage ^ 1) * 2 * Tile::QUERY_BYTES; /* its last readers have passed the barrier below */
            tile_load<Tile::QUERIES, D>(next, q_head, x.qkv_row, next_query, x.T);
            tile_load<Tile::QUERIES, D>(next + Tile::QUERY_BYTES, dout_head, x.out_row, next_query, x.T);
            next_stat = load_stat(next_query);
        }
        cp_async_commit();
        NO_UNROLL for (int sub = 0; sub < Tile::QUERIES; sub += SUB) {
            if (query + sub + SUB <= warp_first || warp_first >= x.T || query + sub >= x.T) continue; /* no pair of a key and a query that sees it */
            const unsigned char *q = now + sub * 2 * D, *d_out = q + Tile::QUERY_BYTES;
            float s[M][N][4];
            uint32_t w[M][N / 2][4]; /* p, then ds */
            tile_scores(s, k, q);
            if (query + sub < warp_first + 16 * M - 1) {
                UNROLL for (int m = 0; m < M; m++)
                    UNROLL for (int i = 0; i < 4; i++) {
                        const int unseen = warp_first + 16 * m + i / 2 * 8 + g - query - sub - 2 * t - i % 2; /* columns 8 n below this one */
                        UNROLL for (int n = 0; n < N; n++) s[m][n][i] = 8 * n < unseen ? -INFINITY : s[m][n][i];
                    }
            }
            UNROLL for (int n = 0; n < N; n++) {
                const float2 c = *(const float2 *)(const void *)(now_stats + sub + 8 * n + 2 * t); /* lse of the two columns */
                UNROLL for (int m = 0; m < M; m++)
                    UNROLL for (int half = 0; half < 2; half++)
                        w[m][n / 2][n % 2 * 2 + half] = weights_of(make_float2(s[m][n][2 * half], s[m][n][2 * half + 1]), x.scale_log2, c);
            }
            tile_accumulate<D>(dv, w, d_out);
            tile_scores(s, v, d_out);
            UNROLL for (int n = 0; n < N; n++) {
                const float2 c = *(const float2 *)(const void *)(now_stats + Tile::QUERIES + sub + 8 * n + 2 * t); /* delta of the two columns */
                UNROLL for (int m = 0; m < M; m++)
                    UNROLL for (int half = 0; half < 2; half++) {
                        uint32_t &p = w[m][n / 2][n % 2 * 2 + half];
                        p = gradients_of(p, make_float2(s[m][n][2 * half], s[m][n][2 * half + 1]), c);
                    }
            }
            tile_accumulate<D>(dk, w, q);
        }
        store_stat(stage ^ 1, next_stat);
        cp_async_wait<0>();
        __syncthreads();
    }
    tile_scale(dk, x.scale);
    const TilePlace end = tile_place(x, not_kept(blockIdx.x));
    elem *dk_head = dqkv + tile_head<D>(x, end.head, x.qkv_row) + x.out_row, *dv_head = dk_head + x.out_row;
    tile_store<D>(dk_head, x.qkv_row, (int)end.block * Tile::ROWS, x.T, shared, dk);
    tile_store<D>(dv_head, x.qkv_row, (int)end.block * Tile::ROWS, x.T, shared + Tile::ROW_BYTES, dv);
}

/* ---- launches ------------------------------------------------------------------------------------------------------------------ */

template <int D>
static void run(CudaBackend *cuda, elem *dqkv, const elem *dout, const elem *out, const float *lse, const elem *qkv, float *delta,
                const AttentionShape &s) {
    const TileGrid queries = tile_grid(s, QueryTile<D>::ROWS), keys = tile_grid(s, KeyTile<D>::ROWS);
    LAUNCH(attention_tile_dq_kernel<D>, tile_grid_dim(queries), dim3(TILE_THREADS), QueryTile<D>::SHARED, cuda->stream, dqkv, delta, dout, out,
           lse, qkv, queries);
    LAUNCH(attention_tile_dkv_kernel<D>, tile_grid_dim(keys), dim3(TILE_THREADS), KeyTile<D>::SHARED, cuda->stream, dqkv, dout, lse, delta, qkv,
           keys);
}

void attention_tile_backward(CudaBackend *cuda, elem *dqkv, const elem *dout, const elem *out, const float *lse, const elem *qkv, float *delta,
                             AttentionShape s) {
    CHECK(s.D == 64 || s.D == 128, "attention_tile_backward: D %zu", s.D);
    if (s.D == 64) run<64>(cuda, dqkv, dout, out, lse, qkv, delta, s);
    else run<128>(cuda, dqkv, dout, out, lse, qkv, delta, s);
}

} /* namespace */
#endif
