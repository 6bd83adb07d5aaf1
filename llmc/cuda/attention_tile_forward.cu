/* Causal attention on tensor cores, forward, bf16, heads of 64 and 128: mma.sync and cp.async, so every GPU from sm_80 on. */
#include "attention_tile.cuh"
#if LLMC_BF16

namespace LLMC_NS {

/* Shared memory: the block's queries, then STAGES times (keys, values). */
template <int D> struct ForwardTile {
    enum { M = 2, ROWS = TILE_WARPS * 16 * M, KEYS = D == 64 ? 64 : 48, Q_BYTES = ROWS * 2 * D, KEY_BYTES = KEYS * 2 * D, STAGES = 2 };
    enum { SHARED = Q_BYTES + STAGES * 2 * KEY_BYTES };
};

/* The online softmax of a warp's M * 16 rows; a thread has rows 16 m + 8 half + g, and of each a quarter of the columns. */
template <int M> struct OnlineSoftmax {
    float max[M][2];          /* reference of the weights: log2(e) scale q.k of (nearly) the largest score so far */
    float sum[M][2];          /* of this thread's columns */

    __device__ __forceinline__ void init() {
        UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int half = 0; half < 2; half++) max[m][half] = -INFINITY, sum[m][half] = 0;
    }
    /* s becomes the weights exp2(scale s - max); out and sum follow a new maximum. A row looks at its own scores alone: the vote only spares
     * the multiplications by 1. A NaN in s stays, and spoils its row, as it should. */
    template <int N, int COLUMNS> __device__ __forceinline__ void step(float (&s)[M][N][4], float (&out)[M][COLUMNS][4], float scale) {
        float shrink[M][2];
        int any = 0;
        UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int half = 0; half < 2; half++) {
                float top = -INFINITY;
                UNROLL for (int n = 0; n < N; n++) top = fmaxf(top, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                top = fmaxf(top, __shfl_xor_sync(FULL_MASK, top, 1));
                top = fmaxf(top, __shfl_xor_sync(FULL_MASK, top, 2)) * scale;
                bool passed = top > max[m][half] + RESCALE;
                shrink[m][half] = passed ? exp2_fast(max[m][half] - top) : 1.0f;
                if (passed) max[m][half] = top, any = 1;
            }
        if (__any_sync(FULL_MASK, any)) {
            UNROLL for (int m = 0; m < M; m++)
                UNROLL for (int half = 0; half < 2; half++) {
                    sum[m][half] *= shrink[m][half];
                    UNROLL for (int n = 0; n < COLUMNS; n++) out[m][n][2 * half] *= shrink[m][half], out[m][n][2 * half + 1] *= shrink[m][half];
                }
        }
        UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int n = 0; n < N; n++)
                UNROLL for (int i = 0; i < 4; i++) {
                    s[m][n][i] = exp2_fast(fmaf(s[m][n][i], scale, -max[m][i / 2]));
                    sum[m][i / 2] += s[m][n][i];
                }
    }
};

/* out[t] = sum over s <= t of softmax_s(scale q[t].k[s]) v[s], lse[t] = log of the softmax's denominator; per head, D = 64 or 128.
 * out (B, T, C) =, lse (B, H, T) = or NULL, qkv (B, T, 3C) in.
 * Block: 128 queries of one head, last ones first (they see most keys); warp: 32 of them, two m-tiles, so that each fragment of K and V feeds two
 *   mma (with one, shared memory could not keep up). Loop over blocks of 64 keys (48 at D = 128) up to the diagonal: S = Q K^T in registers,
 *   online softmax, rounded weights times V. The next keys and values arrive by cp.async meanwhile; one barrier a step. A warp skips blocks
 *   that none of its rows sees. Fragments of Q stay in registers at D = 64, are read again at D = 128.
 * Rows from T on: zeros are loaded, and only rows from T on see them; not stored.
 * Bytes: q, out and lse once, k and v once from memory (the floor: 8 C a row and 4 H) and T/256 times from the L2. Shared memory, D = 64: 16 KB a
 *   warp and step for 0.5 MFLOP, that is 512 cycles an SM beside the same at full tensor rate. FLOPs: 4 D (T^2/2 + about 32 T) a head.
 * Registers (sm_80, 90a, 100, 120): 222-232 at D = 64, 252-255 at 128, no spills; shared 48 KB, 80 KB: 2 blocks an SM, by
 *   registers; by shared memory 1 at D = 128 on sm_86, 89 and 120.
 * Sums: keys ascending by 16, in float; order depends on T alone. Row sums: each of 4 lanes ascending, then a tree.
 * Error: weights rounded to bf16 against an unrounded denominator, one rounding of out: |error| <= 2^-9 (max |v| + |out|), plus float sums.
 * Source: Dao 2023, FlashAttention-2, algorithm 1; Milakov and Gimelshein 2018. */
template <int D>
__global__ void __launch_bounds__(TILE_THREADS, 2)
    attention_tile_forward_kernel(elem *out, float *lse, const elem *qkv, TileGrid x) {
    begin_kernel();
    typedef ForwardTile<D> Tile;
    enum { M = Tile::M, N = Tile::KEYS / 8 };
    DYNAMIC_SHARED(unsigned char, shared);
    unsigned char *stages = shared + Tile::Q_BYTES;
    const TilePlace place = tile_place(x, blockIdx.x);
    const elem *q_head = qkv + tile_head<D>(x, place.head, x.qkv_row), *k_head = q_head + x.out_row, *v_head = k_head + x.out_row;
    const int first = (int)(x.blocks - 1 - place.block) * Tile::ROWS, steps = ceil_div(min(first + Tile::ROWS, x.T), (int)Tile::KEYS);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int warp_first = first + warp * 16 * M, warp_last = warp_first < x.T ? min(warp_first + 16 * M, x.T) - 1 : -1;
    unsigned char *warp_rows = shared + warp * 16 * M * 2 * D;

    tile_load<Tile::ROWS, D>(shared, q_head, x.qkv_row, first, x.T);
    tile_load<Tile::KEYS, D>(stages, k_head, x.qkv_row, 0, x.T);
    tile_load<Tile::KEYS, D>(stages + Tile::KEY_BYTES, v_head, x.qkv_row, 0, x.T);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();

    TileLeft<D, M, D == 64> q;
    OnlineSoftmax<M> softmax;
    float acc[M][D / 8][4];
    q.init(warp_rows);
    softmax.init();
    tile_zero(acc);
    NO_UNROLL for (int j = 0; j < steps; j++) {
        const int key = j * Tile::KEYS;
        const unsigned char *k = stages + j % Tile::STAGES * 2 * Tile::KEY_BYTES, *v = k + Tile::KEY_BYTES;
        if (j + 1 < steps) {
            unsigned char *next = stages + (j + 1) % Tile::STAGES * 2 * Tile::KEY_BYTES; /* its last readers have passed the barrier below */
            tile_load<Tile::KEYS, D>(next, k_head, x.qkv_row, key + Tile::KEYS, x.T);
            tile_load<Tile::KEYS, D>(next + Tile::KEY_BYTES, v_head, x.qkv_row, key + Tile::KEYS, x.T);
        }
        cp_async_commit();
        if (key <= warp_last) {
            float s[M][N][4];
            tile_scores(s, q, k);
            if (key + Tile::KEYS - 1 > warp_first) {
                UNROLL for (int m = 0; m < M; m++)
                    UNROLL for (int i = 0; i < 4; i++) {
                        const int seen = warp_first + 16 * m + i / 2 * 8 + g - key - 2 * t - i % 2; /* column 8 n is seen up to this one */
                        UNROLL for (int n = 0; n < N; n++) s[m][n][i] = 8 * n > seen ? -INFINITY : s[m][n][i];
                    }
            }
            softmax.step(s, acc, x.scale_log2);
            uint32_t weights[M][N / 2][4];
            tile_pack(weights, s);
            tile_accumulate<D>(acc, weights, v);
        }
        cp_async_wait<0>();
        __syncthreads();
    }

    const TilePlace end = tile_place(x, not_kept(blockIdx.x));
    const int end_first = (int)(x.blocks - 1 - end.block) * Tile::ROWS;
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int half = 0; half < 2; half++) {
            const int row = end_first + warp * 16 * M + 16 * m + 8 * half + g;
            float sum = softmax.sum[m][half];
            sum += __shfl_xor_sync(FULL_MASK, sum, 1);
            sum += __shfl_xor_sync(FULL_MASK, sum, 2);
            const float inverse = reciprocal_fast(sum);
            UNROLL for (int n = 0; n < D / 8; n++) acc[m][n][2 * half] *= inverse, acc[m][n][2 * half + 1] *= inverse;
            if (lse && t == 0 && row < x.T) lse[(size_t)end.head * x.T + row] = softmax.max[m][half] * LN_2 + logf(sum); /* the sum is 1 or more */
        }
    tile_store<D>(out + tile_head<D>(x, end.head, x.out_row), x.out_row, end_first, x.T, shared, acc);
}

template <int D> static void run(CudaBackend *cuda, elem *out, float *lse, const elem *qkv, const AttentionShape &s) {
    const TileGrid x = tile_grid(s, ForwardTile<D>::ROWS);
    LAUNCH(attention_tile_forward_kernel<D>, tile_grid_dim(x), dim3(TILE_THREADS), ForwardTile<D>::SHARED, cuda->stream, out, lse, qkv, x);
}

void attention_tile_forward(CudaBackend *cuda, elem *out, float *lse, const elem *qkv, AttentionShape s) {
    CHECK(s.D == 64 || s.D == 128, "attention_tile_forward: D %zu", s.D);
    if (s.D == 64) run<64>(cuda, out, lse, qkv, s);
    else run<128>(cuda, out, lse, qkv, s);
}

} /* namespace */
#endif
