/* What the attention kernels for Hopper share: the order of tiles, tensor maps of heads, rings between producer and consumers, products of a warpgroup's rows.
 * A block is three warpgroups, one block an SM, for the whole launch: one brings tiles by TMA, two own 64 rows each of every tile of 128 rows. */
#ifndef LLMC_CUDA_ATTENTION_HOPPER_CUH
#define LLMC_CUDA_ATTENTION_HOPPER_CUH
#include "attention_tile.cuh"
#include "hopper.cuh"

namespace LLMC_NS {

enum { GROUP_THREADS = 128, GROUP_ROWS = 64, HOPPER_GROUPS = 2, HOPPER_ROWS = HOPPER_GROUPS * GROUP_ROWS, HOPPER_READERS = HOPPER_GROUPS * GROUP_THREADS / WARP, HOPPER_THREADS = (1 + HOPPER_GROUPS) * GROUP_THREADS };
enum { PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240 };
enum { PINGPONG_BARRIER = 1, GROUP_BARRIER = 3 }; /* and the one after */

/* ---- which block does what ------------------------------------------------------------------------------------------------------- */

/* A persistent block's tile of round 0, 1, 2 ...: tiles as tile_place counts them, longest first, dealt there and back (0 .. n-1, n-1 .. 0), so that who had
 * the longest of one round has the shortest of the next. The order is fixed; no tile's result depends on it. */
__device__ __forceinline__ bool hopper_tile(TilePlace &place, const TileGrid &x, unsigned round) {
    const unsigned i = round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    if (i >= x.heads * x.blocks) return false;
    place = tile_place(x, i);
    return true;
}
static inline dim3 hopper_grid(const CudaBackend *cuda, const TileGrid &x) {
    const unsigned tiles = x.heads * x.blocks, sms = (unsigned)cuda->sm_count;
    return dim3(tiles < sms ? tiles : sms);
}

/* Stage and phase of a ring's next use, both sides the same way round. Each of the HOPPER_READERS warps gives a stage back itself, by one lane, once it has waited
 * for its own part of the products. And each waits for every stage to be full, also for one that it does not need: copies may end in any order, and whose next
 * wait for that stage came while the one left out is still under way would take the end of the round before for that of the next. */
template <int STAGES> struct Ring {
    unsigned stage = 0, phase = 0;
    static __device__ __forceinline__ Ring of_use(unsigned n) { return Ring{n % STAGES, n / STAGES % 2}; }
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
};

/* A consumer's warpgroup, 0 or 1, from a lane's word to all: so the compiler knows that it and what follows from it, stages and descriptors, is a warp's. */
__device__ __forceinline__ unsigned hopper_group() { return __shfl_sync(FULL_MASK, threadIdx.x / GROUP_THREADS, 0) - 1; }

/* ---- tiles in shared memory -------------------------------------------------------------------------------------------------------- */

/* (B, T, columns) as TMA sees it, in boxes of 64 rows of 64 columns: reads zeros and writes nothing from row T on, of each sequence. */
static inline TensorMap head_map(const elem *p, const AttentionShape &s, size_t columns) {
    const size_t dim[3] = {columns, s.T, s.B}, stride[2] = {columns * sizeof(elem), s.T * columns * sizeof(elem)};
    const unsigned box[3] = {64, GROUP_ROWS, 1};
    return tensor_map(p, 3, dim, stride, box, SWIZZLE_128);
}
/* Rows row .. row + ROWS - 1 of D columns to a tile of panels of ROWS rows. Completes ROWS * 2 D bytes on `full`. */
template <int D, int ROWS> __device__ __forceinline__ void head_load(unsigned char *tile, const TensorMap &map, uint64_t *full, int column, int row, int b) {
    UNROLL for (int panel = 0; panel < D / 64; panel++)
        UNROLL for (int i = 0; i < ROWS; i += GROUP_ROWS) tma_load(tile + (panel * ROWS + i) * 128, map, full, column + 64 * panel, row + i, b);
}
/* The tile of a warpgroup's 64 rows back to memory, once all its threads have written it (head_stage) and met. One thread, which then commits. */
template <int D> __device__ __forceinline__ void head_store(const TensorMap &map, const unsigned char *tile, int column, int row, int b) {
    UNROLL for (int panel = 0; panel < D / 64; panel++) tma_store(map, tile + panel * GROUP_ROWS * 128, column + 64 * panel, row, b);
}
/* A warpgroup's sums (64, D), rounded, to its tile of 64 rows: eight lanes of a column on eight different chunks, so no bank twice. */
template <int D> __device__ __forceinline__ void head_stage(unsigned char *tile, const float (&acc)[D / 2]) {
    const int thread = (int)not_kept(threadIdx.x) % GROUP_THREADS, lane = thread % WARP, g = lane / 4, t = lane % 4;
    const unsigned at = (unsigned)(thread / WARP * 16 + g) * 128 + (unsigned)(g * 16 + 4 * t);
    UNROLL for (int n = 0; n < D / 8; n++)
        UNROLL for (int half = 0; half < 2; half++) {
            unsigned char *to = tile + n / 8 * GROUP_ROWS * 128 + half * 8 * 128 + (at ^ (unsigned)(n % 8 * 16));
            *(uint32_t *)(void *)to = pack_bf16(acc[4 * n + 2 * half], acc[4 * n + 2 * half + 1]);
        }
    fence_proxy_async();
}

/* A number that a lambda is compiled for: a wgmma behind a condition would serialise those that are under way there, and descriptors of a constant warpgroup lie
 * in uniform registers. */
template <int N> struct Constant { enum { value = N }; };

/* ---- products of a warpgroup ------------------------------------------------------------------------------------------------------- */

/* Its 64 rows of D as left operand: read where they lie, or KEPT in D / 4 registers, which spares shared memory a third to a half of the traffic. */
template <int D, bool KEPT> struct GroupLeft {
    uint32_t kept[KEPT ? D / 16 : 1][4];
    uint64_t at;
    __device__ __forceinline__ void init(const unsigned char *tile) {
        if constexpr (KEPT) {
            const unsigned lane = threadIdx.x % WARP, row = threadIdx.x % GROUP_THREADS / WARP * 16 + lane % 16;
            UNROLL for (int k = 0; k < D / 16; k++) ldmatrix_x4(kept[k], tile + tile_place(SWIZZLE_128, GROUP_ROWS, row, 16 * (unsigned)k + lane / 16 * 8));
        } else at = tile_descriptor<SWIZZLE_128, K_MAJOR>(shared_address(tile), GROUP_ROWS);
    }
};
/* s (64, N) = left (64, D) tile^T, tile (N, D): N = 2 R rows, the first of ROWS; k ascending. */
template <int D, bool KEPT, int R, int ROWS = 2 * R> __device__ __forceinline__ void group_scores(float (&s)[R], const GroupLeft<D, KEPT> &left, uint64_t tile) {
    UNROLL for (int k = 0; k < D / 16; k++) {
        const uint64_t b = tile + (tile_advance<SWIZZLE_128, K_MAJOR>(ROWS, 16 * k) >> 4);
        if constexpr (KEPT) wgmma_rs<K_MAJOR>(s, left.kept[k], b, k > 0);
        else wgmma_ss<K_MAJOR, K_MAJOR>(s, left.at + (tile_advance<SWIZZLE_128, K_MAJOR>(GROUP_ROWS, 16 * k) >> 4), b, k > 0);
    }
}
/* acc (64, D) (+)= weights (64, N) tile, tile (N, D), the first of all its rows; k ascending. */
template <int D, int N, int K> __device__ __forceinline__ void group_accumulate(float (&acc)[D / 2], const uint32_t (&weights)[K][4], uint64_t tile, bool accumulate) {
    UNROLL for (int k = 0; k < N / 16; k++) wgmma_rs<MN_MAJOR>(acc, weights[k], tile + (tile_advance<SWIZZLE_128, MN_MAJOR>(N, 16 * k) >> 4), accumulate || k > 0);
}
/* Register i of fragment k of a left operand holds two neighbouring sums, columns 16 k + 8 (i / 2) + 2 t and one more, of row g + 8 (i % 2). */
template <int R> __device__ __forceinline__ float2 group_pair(const float (&s)[R], int k, int i) {
    return make_float2(s[8 * k + i / 2 * 4 + i % 2 * 2], s[8 * k + i / 2 * 4 + i % 2 * 2 + 1]);
}
template <int R, int K> __device__ __forceinline__ void group_pack(uint32_t (&w)[K][4], const float (&s)[R]) {
    UNROLL for (int k = 0; k < R / 8; k++)
        UNROLL for (int i = 0; i < 4; i++) {
            const float2 pair = group_pair(s, k, i);
            w[k][i] = pack_bf16(pair.x, pair.y);
        }
}
/* Fragments are computed here, not where they are used. No instruction. */
template <int K> __device__ __forceinline__ void group_pin(uint32_t (&w)[K][4]) {
    UNROLL for (int k = 0; k < K; k++)
        UNROLL for (int i = 0; i < 4; i++) forget(w[k][i]);
}
template <int R> __device__ __forceinline__ void group_zero(float (&acc)[R]) {
    UNROLL for (int i = 0; i < R; i++) acc[i] = 0;
}
template <int R> __device__ __forceinline__ void group_scale(float (&acc)[R], float factor) {
    UNROLL for (int i = 0; i < R; i++) acc[i] *= factor;
}

} /* namespace */
#endif
