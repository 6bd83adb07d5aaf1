/* What the tensor-core attention kernels share: the order of blocks, tiles in shared memory, products of tiles in mma fragments. A block is four
 * warps; a warp owns M * 16 rows of the left operand and of the result, so that warps meet only where tiles are filled. */
#ifndef LLMC_CUDA_ATTENTION_TILE_CUH
#define LLMC_CUDA_ATTENTION_TILE_CUH
#include "attention.cuh"
#include "ptx.cuh"
#include "swizzle.h"

namespace LLMC_NS {

enum { TILE_WARPS = 4, TILE_THREADS = TILE_WARPS * WARP };
static const float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

/* ---- which block does what ------------------------------------------------------------------------------------------ */

/* Heads (of all sequences) are taken in groups whose tensors fit the L2 together; within a group, all heads' first block of rows, then all
 * heads' second, and so on. The caller lets the longest blocks be the first, so the grid ends with the shortest ones of its last group.
 * All that a kernel multiplies by is a member, so that it is a constant operand and takes no register. */
struct TileGrid {
    unsigned heads, blocks, group;
    int T, H, out_row, qkv_row; /* elements from row to row: C and 3C */
    float scale, scale_log2;    /* 1 / sqrt(D), and log2(e) times it */
};
struct TilePlace { unsigned head, block; };

#ifdef LLMC_EMU
static const size_t L2_SHARE = 256 << 10; /* so that small tests have several groups */
#else
static const size_t L2_SHARE = 16 << 20;
#endif
static inline TileGrid tile_grid(const AttentionShape &s, size_t rows) {
    const size_t head_bytes = 2 * s.T * s.D * sizeof(elem), heads = s.B * s.H, blocks = ceil_div(s.T, rows), C = s.H * s.D;
    CHECK(heads * blocks <= 0x7fffffff && s.B * s.T <= 0x7fffffff && 3 * C <= 0x7fffffff,
          "attention: B %zu, T %zu, H %zu, D %zu: more than the kernels count", s.B, s.T, s.H, s.D);
    const size_t group = L2_SHARE / head_bytes;
    const float scale = 1.0f / sqrtf((float)s.D);
    TileGrid x = {};
    x.heads = (unsigned)heads, x.blocks = (unsigned)blocks, x.group = (unsigned)(group < 1 ? 1 : group < heads ? group : heads);
    x.T = (int)s.T, x.H = (int)s.H, x.out_row = (int)C, x.qkv_row = (int)(3 * C);
    x.scale = scale, x.scale_log2 = scale * LOG2_E;
    return x;
}
static inline dim3 tile_grid_dim(const TileGrid &x) { return dim3(x.heads * x.blocks); }

/* Called again with not_kept(blockIdx.x) for the results: what only they need takes no registers in the loop. */
__device__ __forceinline__ TilePlace tile_place(const TileGrid &x, unsigned block) {
    unsigned first = block / (x.group * x.blocks) * x.group, in_group = block - first * x.blocks;
    unsigned n = min(x.group, x.heads - first);
    return TilePlace{first + in_group % n, in_group / n};
}

/* Element offset of row 0 of head `head` (b H + h) in a tensor (B, T, H D) whose rows are `stride` apart. */
template <int D> __device__ __forceinline__ size_t tile_head(const TileGrid &x, unsigned head, int stride) {
    return (size_t)(head / x.H * x.T) * stride + head % x.H * (size_t)D;
}

/* ---- tiles -------------------------------------------------------------------------------------------------------------- */

/* Begins the copy of rows first .. first + ROWS - 1 of a head (rows of D elements, `stride` apart) into a swizzled tile; zeros from row T on.
 * A thread: one chunk of every PASS-th row; eight neighbours read 128 consecutive bytes. */
template <int ROWS, int D> __device__ __forceinline__ void tile_load(unsigned char *tile, const elem *head, int stride, int first, int T) {
    constexpr int CHUNKS = D / 8, PASS = TILE_THREADS / CHUNKS;
    static_assert(PASS % 8 == 0 && ROWS % PASS == 0, "a thread's swizzle is the same in every row it copies");
    const int chunk = threadIdx.x % CHUNKS, row = threadIdx.x / CHUNKS;
    const elem *from = head + (ptrdiff_t)(first + row) * stride + chunk * 8;
    unsigned char *to = tile + swizzled(row, chunk, 2 * D);
    UNROLL for (int i = 0; i < ROWS; i += PASS, from += (ptrdiff_t)PASS * stride) cp_async_16(to + i * 2 * D, from, first + row + i < T);
}

/* The warps' rows of a result, M * 16 each: head[first + i] = row i of all accumulators, for rows below T. Each warp brings its rows into row-major
 * order through its own rows of `tile`, whose content no other warp reads. */
template <int D, int M>
__device__ __forceinline__ void tile_store(elem *head, int stride, int first, int T, unsigned char *tile, const float (&acc)[M][D / 8][4]) {
    constexpr int CHUNKS = D / 8, PASS = WARP / CHUNKS;
    const int thread = (int)not_kept(threadIdx.x), warp_row = thread / WARP * 16 * M, lane = thread % WARP, g = lane / 4, t = lane % 4;
    unsigned char *rows = tile + warp_row * 2 * D;
    first += warp_row;
    __syncwarp();
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int n = 0; n < D / 8; n++) {
            *(uint32_t *)(void *)(rows + swizzled(16 * m + g, n, 2 * D) + 4 * t) = pack_bf16(acc[m][n][0], acc[m][n][1]);
            *(uint32_t *)(void *)(rows + swizzled(16 * m + g + 8, n, 2 * D) + 4 * t) = pack_bf16(acc[m][n][2], acc[m][n][3]);
        }
    __syncwarp();
    UNROLL for (int i = 0; i < 16 * M; i += PASS) {
        const int row = i + lane / CHUNKS, chunk = lane % CHUNKS;
        uint4 v = *(const uint4 *)(const void *)(rows + swizzled(row, chunk, 2 * D));
        if (first + row < T) *(uint4 *)(void *)(head + (ptrdiff_t)(first + row) * stride + chunk * 8) = v;
    }
}

/* ---- products ------------------------------------------------------------------------------------------------------------ */

/* The warp's M * 16 rows of a tile as left operand: kept in registers (M D / 4 of them), or read again at each use where registers are short. */
template <int D, int M, bool KEPT> struct TileLeft {
    const unsigned char *rows; /* of the warp */
    unsigned lane_offset;
    uint32_t kept[KEPT ? M : 1][KEPT ? D / 16 : 1][4];
    __device__ __forceinline__ void read(uint32_t (&a)[4], int m, int k) const { ldmatrix_x4(a, rows + swizzle_at(lane_offset, k) + m * 16 * 2 * D); }
    __device__ __forceinline__ void init(const unsigned char *warp_rows) {
        rows = warp_rows;
        lane_offset = swizzle_rows_first(threadIdx.x % WARP, 2 * D);
        if constexpr (KEPT) {
            UNROLL for (int m = 0; m < M; m++)
                UNROLL for (int k = 0; k < D / 16; k++) read(kept[m][k], m, k);
        }
    }
    __device__ __forceinline__ void get(uint32_t (&a)[4], int m, int k) const {
        if constexpr (KEPT) {
            UNROLL for (int i = 0; i < 4; i++) a[i] = kept[m][k][i];
        } else read(a, m, k);
    }
};

/* acc (M * 16, 8 N) = left (M * 16, D) tile^T, tile (8 N, D) swizzled in shared memory; k ascending. Each fragment of the tile feeds M mma. */
template <int D, int M, int N, bool KEPT>
__device__ __forceinline__ void tile_scores(float (&acc)[M][N][4], const TileLeft<D, M, KEPT> &left, const unsigned char *tile) {
    const unsigned lane_offset = not_kept(swizzle_chunks_first(threadIdx.x % WARP, 2 * D));
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int n = 0; n < N; n++)
            UNROLL for (int i = 0; i < 4; i++) acc[m][n][i] = 0;
    UNROLL for (int k = 0; k < D / 16; k++) {
        uint32_t a[M][4];
        UNROLL for (int m = 0; m < M; m++) left.get(a[m], m, k);
        UNROLL for (int n = 0; n < N; n += 2) {
            uint32_t b[4];
            ldmatrix_x4(b, tile + swizzle_at(lane_offset, k) + n * 8 * 2 * D);
            const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
            UNROLL for (int m = 0; m < M; m++) {
                mma_m16n8k16(acc[m][n], a[m], b0, acc[m][n]);
                mma_m16n8k16(acc[m][n + 1], a[m], b1, acc[m][n + 1]);
            }
        }
    }
}

/* The accumulators of tile_scores, rounded to bf16, are a left operand as they stand: columns 2t, 2t+1 of two neighbouring C fragments are the
 * columns of one A fragment. Register i of A fragment k holds two neighbouring accumulators of C fragment 2 k + i / 2: tile_pair. */
template <int N> __device__ __forceinline__ float2 tile_pair(const float (&c)[N][4], int k, int i) {
    return make_float2(c[2 * k + i / 2][i % 2 * 2], c[2 * k + i / 2][i % 2 * 2 + 1]);
}
template <int M, int N> __device__ __forceinline__ void tile_pack(uint32_t (&a)[M][N / 2][4], const float (&weights)[M][N][4]) {
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int k = 0; k < N / 2; k++)
            UNROLL for (int i = 0; i < 4; i++) {
                const float2 pair = tile_pair(weights[m], k, i);
                a[m][k][i] = pack_bf16(pair.x, pair.y);
            }
}

/* acc (M * 16, D) += weights (M * 16, 16 K) tile, tile (16 K, D) swizzled in shared memory; k ascending. */
template <int D, int M, int K>
__device__ __forceinline__ void tile_accumulate(float (&acc)[M][D / 8][4], const uint32_t (&weights)[M][K][4], const unsigned char *tile) {
    const unsigned lane_offset = not_kept(swizzle_rows_first(threadIdx.x % WARP, 2 * D));
    UNROLL for (int k = 0; k < K; k++) {
        UNROLL for (int n = 0; n < D / 8; n += 2) {
            uint32_t b[4];
            ldmatrix_x4_trans(b, tile + swizzle_at(lane_offset, n / 2) + k * 16 * 2 * D);
            const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
            UNROLL for (int m = 0; m < M; m++) {
                mma_m16n8k16(acc[m][n], weights[m][k], b0, acc[m][n]);
                mma_m16n8k16(acc[m][n + 1], weights[m][k], b1, acc[m][n + 1]);
            }
        }
    }
}

template <int M, int N> __device__ __forceinline__ void tile_zero(float (&acc)[M][N][4]) {
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int n = 0; n < N; n++)
            UNROLL for (int i = 0; i < 4; i++) acc[m][n][i] = 0;
}
template <int M, int N> __device__ __forceinline__ void tile_scale(float (&acc)[M][N][4], float factor) {
    UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int n = 0; n < N; n++)
            UNROLL for (int i = 0; i < 4; i++) acc[m][n][i] *= factor;
}

/* Rows keep an old maximum until a new one passes it by this much (in powers of two): their weights are then at most 2^8 instead of 1, which
 * floats and bf16 hold with the same relative error, and hardly any step of the loop has to scale the sums. */
[[maybe_unused]] static const float RESCALE = 8;

/* ---- weights and gradients of scores, of a backward ------------------------------------------------------------------------------ */

/* Two neighbouring weights p = exp2(scale s - lse), rounded to bf16 and packed; lse in powers of two. */
__device__ __forceinline__ uint32_t weights_of(float2 s, float scale, float2 lse) {
    return pack_bf16(exp2_fast(fmaf(s.x, scale, -lse.x)), exp2_fast(fmaf(s.y, scale, -lse.y)));
}
/* Two neighbouring gradients of scores, ds = p (dp - delta), of weights packed before. */
__device__ __forceinline__ uint32_t gradients_of(uint32_t p, float2 dp, float2 delta) {
    return pack_bf16(__uint_as_float(p << 16) * (dp.x - delta.x), __uint_as_float(p & 0xffff0000u) * (dp.y - delta.y));
}

} /* namespace */
#endif
