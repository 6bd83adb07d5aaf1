/* Causal attention on Hopper's tensor cores, backward, bf16, heads of 64 and 128: TMA and wgmma (sm_90a alone).
 * Two kernels that recompute the weights, as attention_tile_backward.cu: seven products where one kernel has five, but P and dS go from sums to left
 * operands within registers, and no gradient leaves a block before it is whole. One kernel would bring dS to shared memory and add each block's dQ to float
 * sums outside it: at D = 64, a tile of 128 x 128 pairs has 2,560 cycles of five products, and beside their operands (about 1,900 cycles of shared memory's
 * 128 bytes) 32 KB of dS written and read twice (768) and 32 KB of dQ sent on, read, added and written at every step (another 768 here, or 96 KB of the L2's
 * about 40 bytes a cycle and SM: 2,400); in a fixed order blocks would wait for blocks. Seven products: 3,584 cycles, of shared memory 1,800. */
#include "attention_hopper.cuh"
#if LLMC_BF16

namespace LLMC_NS {

enum { STEP = 64 };           /* rows of the other kind at a time, columns of scores: 32 registers */

/* What both kernels have in shared memory: stages of the block's own rows (PARTS tensors, tiles of a warpgroup's 64 rows), a ring each of two tensors' rows of
 * the other kind, per stage of the first ring or per own row two statistics, barriers. */
template <int D, int PARTS, int OWN, int RING, int STATS> struct BackwardHopper {
    enum { OWN_STAGES = OWN, STAGES = RING, GROUP_BYTES = GROUP_ROWS * 2 * D, PART_BYTES = HOPPER_GROUPS * GROUP_BYTES, OWN_BYTES = PARTS * PART_BYTES };
    enum { STEP_BYTES = STEP * 2 * D, FIRST_AT = OWN_STAGES * OWN_BYTES, SECOND_AT = FIRST_AT + STAGES * STEP_BYTES, STATS_AT = SECOND_AT + STAGES * STEP_BYTES };
    enum { BARRIERS_AT = STATS_AT + STATS * 4, SHARED = BARRIERS_AT + 8 * 2 * (OWN_STAGES + 2 * STAGES) };
    static_assert(SHARED <= 227 * 1024, "what a block can have");
    uint64_t *own_full, *own_empty, *first_full, *first_empty, *second_full, *second_empty;
    /* brings: arrivals that fill a stage of the first ring. Ends with a barrier of the block, and begins the kernel. */
    __device__ __forceinline__ explicit BackwardHopper(unsigned char *shared, unsigned brings) {
        own_full = (uint64_t *)(void *)(shared + BARRIERS_AT), own_empty = own_full + OWN_STAGES;
        first_full = own_empty + OWN_STAGES, first_empty = first_full + STAGES, second_full = first_empty + STAGES, second_empty = second_full + STAGES;
        if (threadIdx.x == 0) {
            for (int i = 0; i < OWN_STAGES; i++) mbarrier_init(&own_full[i], 1), mbarrier_init(&own_empty[i], HOPPER_GROUPS); /* whose first threads store from there */
            for (int i = 0; i < STAGES; i++) {
                mbarrier_init(&first_full[i], brings), mbarrier_init(&first_empty[i], HOPPER_READERS);
                mbarrier_init(&second_full[i], 1), mbarrier_init(&second_empty[i], HOPPER_READERS);
            }
            fence_mbarrier_init();
        }
        __syncthreads();
        begin_kernel();
    }
    /* A stage of both rings that this warp has no use for. */
    __device__ __forceinline__ void pass_over(Ring<STAGES> &ring) const {
        mbarrier_wait(&first_full[ring.stage], ring.phase), mbarrier_wait(&second_full[ring.stage], ring.phase);
        if (threadIdx.x % WARP == 0) mbarrier_arrive(&first_empty[ring.stage]), mbarrier_arrive(&second_empty[ring.stage]);
        ring.next();
    }
};
/* A tensor's 128 rows into tiles of 64. */
template <int D> __device__ __forceinline__ void own_load(unsigned char *tiles, const TensorMap &map, uint64_t *full, int column, int row, int b) {
    NO_UNROLL for (int i = 0; i < HOPPER_GROUPS; i++) head_load<D, GROUP_ROWS>(tiles + i * GROUP_ROWS * 2 * D, map, full, column, row + i * GROUP_ROWS, b);
}
/* A warpgroup's sums to memory through a tile of 64 rows that it alone still uses; the first thread then waits until they have left it. */
template <int D> __device__ __forceinline__ void own_store(const TensorMap &map, unsigned char *tile, const float (&acc)[D / 2], int column, int row, int b, unsigned group) {
    head_stage<D>(tile, acc);
    named_sync(GROUP_BARRIER + group, GROUP_THREADS);
    if (threadIdx.x % GROUP_THREADS == 0) head_store<D>(map, tile, column, row, b), bulk_commit();
}

/* ---- dq -------------------------------------------------------------------------------------------------------------------- */

/* Own: queries, dout, out. Rings: keys, values. Stats: delta of the block's rows. */
template <int D> using QueryHopper = BackwardHopper<D, 3, D == 64 ? 2 : 1, D == 64 ? 4 : 3, HOPPER_ROWS>;

/* delta of a warp's 16 rows, to shared and global memory: a lane a chunk of 8, products ascending, then a tree over the row's lanes. */
template <int D> __device__ __forceinline__ void hopper_delta(float *to_shared, float *to_global, const unsigned char *dout, const unsigned char *out, int first, int T) {
    enum { CHUNKS = D / 8, PASS = WARP / CHUNKS };
    const int lane = threadIdx.x % WARP, chunk = lane % CHUNKS, warp_row = (int)threadIdx.x % GROUP_THREADS / WARP * 16;
    UNROLL for (int i = 0; i < 16; i += PASS) {
        const int row = warp_row + i + lane / CHUNKS;
        const unsigned at = tile_place(SWIZZLE_128, GROUP_ROWS, (unsigned)row, (unsigned)chunk * 8);
        float a[8], b[8], x = 0;
        unpack<elem>(a, load_piece<8>((const elem *)(const void *)(dout + at)));
        unpack<elem>(b, load_piece<8>((const elem *)(const void *)(out + at)));
        UNROLL for (int k = 0; k < 8; k++) x = fmaf(a[k], b[k], x);
        UNROLL for (int step = CHUNKS / 2; step > 0; step /= 2) x += __shfl_xor_sync(FULL_MASK, x, step);
        if (chunk == 0) {
            to_shared[row] = x;
            if (first + row < T) to_global[first + row] = x;
        }
    }
    __syncwarp();
}

/* dq[t] = scale sum over s <= t of ds[t,s] k[s], with p[t,s] = exp(scale q[t].k[s] - lse[t]), ds[t,s] = p[t,s] (dout[t].v[s] - delta[t]);
 * delta[t] = dout[t].out[t].  Per head, D = 64 or 128.
 * dqkv (B, T, 3C): the q part =; delta (B, H, T) =; dout, out (B, T, C), lse (B, H, T), qkv (B, T, 3C) in; all but lse and delta as tensor maps.
 * Block: persistent, one an SM, tiles of 128 queries of one head, last ones first (attention_hopper_forward_kernel says why).
 * Warpgroup 0: warp 0 brings the tile's own rows and keys, warp 1 values. Warpgroups 1 and 2: 64 queries each; first delta. Then over blocks of 64 keys from
 *   the diagonal down: S = Q K^T, dP = dO V^T, dQ += dS K with dS in registers. In the order of issue: dP j, S j+1, dQ j, dP j+1 and so on; so P j is computed
 *   under dQ j-1 and dP j, dS j under S j+1. Only dQ is under way where the loop closes: what a wait there would leave for the next round, ptxas gives up on and
 *   serialises. Q (and at D = 64 dO) in registers. The first block of keys is none of group 0's.
 * Rows from T on: q, dout, out and lse count as zeros; keys from T on are seen by such rows only; not stored.
 * Bytes: q, dout, out, lse, dq, delta once; k and v once from memory and T/256 times from the L2. Shared memory, a warpgroup and step: at D = 64 24 KB for 384 cycles
 *   of tensor cores; at 128 64 KB for 768, of each 128 bytes. FLOPs: 6 D (T^2/2 + 64 T) a head. exp2: 256 cycles a step;
 *   instructions: two warps a scheduler, 2 x 267 for 768 cycles of tensor cores at D = 64, 2 x 296 for 1536 at 128. Bound: the products.
 * Registers: 168 at launch, 240 a consumer, no spills; shared 161 KB, 193 KB.
 * Sums: keys in blocks of 64 descending, within one ascending by 16, in float; order depends on T alone.
 * Error: p and ds rounded to bf16 (2^-9 each), one rounding of dq, the rounding of out that delta inherits, plus float sums.
 * Source: Shah et al. 2024, FlashAttention-3; Dao 2023, FlashAttention-2, algorithm 2. */
template <int D>
__global__ void __launch_bounds__(HOPPER_THREADS, 1)
    attention_hopper_dq_kernel(const __grid_constant__ TensorMap dqkv, float *delta, const __grid_constant__ TensorMap dout, const __grid_constant__ TensorMap out,
                               const float *lse, const __grid_constant__ TensorMap qkv, TileGrid x) {
    typedef QueryHopper<D> Tile;
    DYNAMIC_SHARED(unsigned char, shared);
    const Tile tile(shared, 1);
    TilePlace place;
    Ring<Tile::STAGES> ring;
    if (threadIdx.x < GROUP_THREADS) {
        registers_fewer<PRODUCER_REGISTERS>();
        const bool keys = threadIdx.x == 0;
        if (threadIdx.x % WARP || threadIdx.x >= 2 * WARP) return;
        for (unsigned round = 0; hopper_tile(place, x, round); round++) {
            const int first = (int)(x.blocks - 1 - place.block) * HOPPER_ROWS, b = (int)place.head / x.H, column = (int)place.head % x.H * D;
            if (keys) {
                const Ring<Tile::OWN_STAGES> own = Ring<Tile::OWN_STAGES>::of_use(round);
                unsigned char *to = shared + own.stage * Tile::OWN_BYTES;
                mbarrier_wait(&tile.own_empty[own.stage], own.phase ^ 1);
                mbarrier_arrive_expect(&tile.own_full[own.stage], Tile::OWN_BYTES);
                own_load<D>(to, qkv, &tile.own_full[own.stage], column, first, b);
                own_load<D>(to + Tile::PART_BYTES, dout, &tile.own_full[own.stage], column, first, b);
                own_load<D>(to + 2 * Tile::PART_BYTES, out, &tile.own_full[own.stage], column, first, b);
            }
            unsigned char *to = shared + (keys ? Tile::FIRST_AT : Tile::SECOND_AT);
            uint64_t *full = keys ? tile.first_full : tile.second_full, *empty = keys ? tile.first_empty : tile.second_empty;
            NO_UNROLL for (int key = first + HOPPER_ROWS - STEP; key >= 0; key -= STEP, ring.next()) {
                mbarrier_wait(&empty[ring.stage], ring.phase ^ 1);
                mbarrier_arrive_expect(&full[ring.stage], Tile::STEP_BYTES);
                head_load<D, STEP>(to + ring.stage * Tile::STEP_BYTES, qkv, &full[ring.stage], column + (keys ? 1 : 2) * x.out_row, key, b);
            }
        }
        return;
    }

    registers_more<CONSUMER_REGISTERS>();
    const auto consume = [&](auto which) {
        constexpr unsigned group = decltype(which)::value;
        const bool one = threadIdx.x % GROUP_THREADS == 0, speaks = threadIdx.x % WARP == 0; /* for the warpgroup, for the warp */
        const int lane = threadIdx.x % WARP, row = (int)threadIdx.x % GROUP_THREADS / WARP * 16 + lane / 4; /* and 8 below */
        const uint32_t first_at = shared_address(shared + Tile::FIRST_AT);
        const uint64_t k_scores = tile_descriptor<SWIZZLE_128, K_MAJOR>(first_at, STEP), k_sum = tile_descriptor<SWIZZLE_128, MN_MAJOR>(first_at, STEP);
        const uint64_t v_scores = tile_descriptor<SWIZZLE_128, K_MAJOR>(shared_address(shared + Tile::SECOND_AT), STEP);
        float *own_delta = (float *)(void *)(shared + Tile::STATS_AT) + group * GROUP_ROWS;
        for (unsigned round = 0; hopper_tile(place, x, round); round++) {
            const Ring<Tile::OWN_STAGES> own = Ring<Tile::OWN_STAGES>::of_use(round);
            const int first = (int)(x.blocks - 1 - place.block) * HOPPER_ROWS + (int)group * GROUP_ROWS;
            unsigned char *q_rows = shared + own.stage * Tile::OWN_BYTES + group * Tile::GROUP_BYTES, *dout_rows = q_rows + Tile::PART_BYTES;
            float acc[D / 2], s[STEP / 2], dp[STEP / 2], row_lse[2], row_delta[2];
            uint32_t p[STEP / 16][4], ds[STEP / 16][4];
            GroupLeft<D, true> q;
            GroupLeft<D, D == 64> d_out;
            UNROLL for (int half = 0; half < 2; half++) {
                const int t = first + row + 8 * half;
                row_lse[half] = t < x.T ? lse[(size_t)place.head * x.T + t] * LOG2_E : 0;
            }
            if constexpr (group == 0) tile.pass_over(ring); /* it does not see the first block of keys */
            mbarrier_wait(&tile.own_full[own.stage], own.phase);
            q.init(q_rows);
            d_out.init(dout_rows);
            mbarrier_wait(&tile.first_full[ring.stage], ring.phase);
            wgmma_fence(s);
            group_scores(s, q, k_scores + (ring.stage * Tile::STEP_BYTES >> 4));
            wgmma_commit();
            hopper_delta<D>(own_delta, delta + (size_t)place.head * x.T, dout_rows, dout_rows + Tile::PART_BYTES, first, x.T);
            UNROLL for (int half = 0; half < 2; half++) row_delta[half] = own_delta[row + 8 * half];
            group_zero(acc);
            wgmma_wait<0>(s);
            UNROLL for (int i = 0; i < 4; i++) {
                const int seen = row + i / 2 * 8 - lane % 4 * 2 - i % 2; /* column 8 n is seen up to this one */
                UNROLL for (int n = 0; n < STEP / 8; n++) s[4 * n + i] = 8 * n > seen ? -INFINITY : s[4 * n + i];
            }

            const int last = first / STEP;
            Ring<Tile::STAGES> before = ring; /* its keys are still summed */
            const auto step = [&](int j, auto is_last) {
                constexpr bool LAST = decltype(is_last)::value;
                const Ring<Tile::STAGES> now = ring;
                mbarrier_wait(&tile.second_full[now.stage], now.phase);
                wgmma_fence(dp);
                group_scores(dp, d_out, v_scores + (now.stage * Tile::STEP_BYTES >> 4));
                wgmma_commit();
                UNROLL for (int k = 0; k < STEP / 16; k++)
                    UNROLL for (int i = 0; i < 4; i++) p[k][i] = weights_of(group_pair(s, k, i), x.scale_log2, make_float2(row_lse[i % 2], row_lse[i % 2]));
                group_pin(p);
                if constexpr (!LAST) {
                    ring.next();
                    mbarrier_wait(&tile.first_full[ring.stage], ring.phase);
                    wgmma_fence(s);
                    group_scores(s, q, k_scores + (ring.stage * Tile::STEP_BYTES >> 4));
                    wgmma_commit();
                    wgmma_wait<1>(dp);
                } else wgmma_wait<0>(dp);
                if (speaks && j) mbarrier_arrive(&tile.first_empty[before.stage]);
                if (speaks) mbarrier_arrive(&tile.second_empty[now.stage]);
                UNROLL for (int k = 0; k < STEP / 16; k++)
                    UNROLL for (int i = 0; i < 4; i++) ds[k][i] = gradients_of(p[k][i], group_pair(dp, k, i), make_float2(row_delta[i % 2], row_delta[i % 2]));
                group_pin(ds);
                wgmma_fence(acc);
                group_accumulate<D, STEP>(acc, ds, k_sum + (now.stage * Tile::STEP_BYTES >> 4), true);
                wgmma_commit();
                if constexpr (!LAST) wgmma_wait<1>(s);
                before = now;
            };
            NO_UNROLL for (int j = 0; j < last; j++) step(j, Constant<0>());
            step(last, Constant<1>());
            ring.next();
            wgmma_wait<0>(acc);
            if (speaks) mbarrier_arrive(&tile.first_empty[before.stage]);
            group_scale(acc, x.scale);
            own_store<D>(dqkv, q_rows, acc, (int)place.head % x.H * D, first, (int)place.head / x.H, group);
            if (one) bulk_wait_read<0>(), mbarrier_arrive(&tile.own_empty[own.stage]);
        }
    };
    if (hopper_group() == 0) consume(Constant<0>());
    else consume(Constant<1>());
}

/* ---- dk and dv -------------------------------------------------------------------------------------------------------------- */

/* Own: keys, values. Rings: queries with lse and delta, dout. */
template <int D> using KeyHopper = BackwardHopper<D, 2, 2, D == 64 ? 4 : 3, (D == 64 ? 4 : 3) * 2 * STEP>;

/* dv[s] = sum over t >= s of p[t,s] dout[t];  dk[s] = scale sum over t >= s of ds[t,s] q[t];  p and ds as in attention_hopper_dq_kernel, whose
 * delta this one reads.
 * dqkv (B, T, 3C): the k and v parts =; dout (B, T, C), qkv (B, T, 3C) in, all as tensor maps; lse, delta (B, H, T) in.
 * Block: persistent, one an SM, tiles of 128 keys of one head, first ones first (most queries see them).
 * Warpgroup 0: warp 0 brings the tile's own rows and queries, warp 1 dout, by one thread each; warps 2 and 3 their lse (in powers of two) and delta, two queries a lane.
 *   Warpgroups 1 and 2: 64 keys each, over blocks of 64 queries from the diagonal on: S^T = K Q^T and dP^T = V dO^T have keys as rows, so that P^T and dS^T in
 *   registers are the left operands of dV += P^T dO and dK += dS^T Q. In the order of issue at D = 64: dP j, dV j and S j+1, dK j, dP j+1 and so on; so P j is
 *   computed under dK j-1 and dP j, dS j under dV j and S j+1; K and V are in registers. At D = 128, where registers are short, S j after dK j-1: P j under dP j, dS j
 *   under dV j. The first block of queries is none of group 1's.
 * Rows from T on: q, dout, lse and delta count as zeros, so that p = 1 meets dout = 0 and ds is 0; keys are not stored.
 * Bytes: k, v, dk, dv once; q, dout, lse, delta once from memory and T/256 times from the L2. Shared memory, a warpgroup and step: 32 KB for 512 cycles of tensor cores
 *   at D = 64; at 128 96 KB for 1024, of each 128 bytes. FLOPs: 8 D (T^2/2 + 64 T) a head. exp2: 256 cycles a step;
 *   instructions: two warps a scheduler, 2 x 302 for 1024 cycles of tensor cores at D = 64, 2 x 387 for 2048 at 128. Bound: the products.
 * Registers: 168 at launch, 240 a consumer, no spills; shared 130 KB, 226 KB.
 * Sums: queries ascending by 16, in float; order depends on T alone.
 * Error: p and ds rounded to bf16 (2^-9 each), one rounding of the result, the rounding of out that delta inherits, plus float sums.
 * Source: as above. */
template <int D>
__global__ void __launch_bounds__(HOPPER_THREADS, 1)
    attention_hopper_dkv_kernel(const __grid_constant__ TensorMap dqkv, const __grid_constant__ TensorMap dout, const float *lse, const float *delta,
                                const __grid_constant__ TensorMap qkv, TileGrid x) {
    typedef KeyHopper<D> Tile;
    constexpr bool AHEAD = D == 64; /* S of the next step under this one's: 16 registers more */
    DYNAMIC_SHARED(unsigned char, shared);
    float *stats = (float *)(void *)(shared + Tile::STATS_AT);
    const Tile tile(shared, 1 + 2 * WARP);
    TilePlace place;
    Ring<Tile::STAGES> ring;
    const int end = (int)x.blocks * HOPPER_ROWS; /* whole tiles: a step of zeros where T ends in the first half of one */
    if (threadIdx.x < GROUP_THREADS) {
        registers_fewer<PRODUCER_REGISTERS>();
        const unsigned warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
        if (warp < 2 && lane) return;
        /* Each tile's first row, columns and sequence to what brings them; apart for each kind, since 24 registers are few. */
        const auto for_tiles = [&](auto bring) {
            for (unsigned round = 0; hopper_tile(place, x, round); round++)
                bring(round, (int)place.block * HOPPER_ROWS, (int)place.head % x.H * D, (int)place.head / x.H);
        };
        const auto bring_stats = [&](const float *from, int at, float factor, int first) {
            NO_UNROLL for (int t = first + (int)lane; t < end; t += STEP, ring.next()) {
                const float x0 = t < x.T ? from[t] : 0, x1 = t + WARP < x.T ? from[t + WARP] : 0;
                float *to = stats + ring.stage * 2 * STEP + at + lane;
                mbarrier_wait(&tile.first_empty[ring.stage], ring.phase ^ 1);
                to[0] = x0 * factor, to[WARP] = x1 * factor;
                mbarrier_arrive(&tile.first_full[ring.stage]);
            }
        };
        if (warp == 0) for_tiles([&](unsigned round, int first, int column, int b) {
            const Ring<Tile::OWN_STAGES> own = Ring<Tile::OWN_STAGES>::of_use(round);
            unsigned char *to = shared + own.stage * Tile::OWN_BYTES;
            mbarrier_wait(&tile.own_empty[own.stage], own.phase ^ 1);
            mbarrier_arrive_expect(&tile.own_full[own.stage], Tile::OWN_BYTES);
            own_load<D>(to, qkv, &tile.own_full[own.stage], column + x.out_row, first, b);
            own_load<D>(to + Tile::PART_BYTES, qkv, &tile.own_full[own.stage], column + 2 * x.out_row, first, b);
            NO_UNROLL for (int query = first; query < end; query += STEP, ring.next()) {
                mbarrier_wait(&tile.first_empty[ring.stage], ring.phase ^ 1);
                mbarrier_arrive_expect(&tile.first_full[ring.stage], Tile::STEP_BYTES);
                head_load<D, STEP>(shared + Tile::FIRST_AT + ring.stage * Tile::STEP_BYTES, qkv, &tile.first_full[ring.stage], column, query, b);
            }
        });
        else if (warp == 1) for_tiles([&](unsigned, int first, int column, int b) {
            NO_UNROLL for (int query = first; query < end; query += STEP, ring.next()) {
                mbarrier_wait(&tile.second_empty[ring.stage], ring.phase ^ 1);
                mbarrier_arrive_expect(&tile.second_full[ring.stage], Tile::STEP_BYTES);
                head_load<D, STEP>(shared + Tile::SECOND_AT + ring.stage * Tile::STEP_BYTES, dout, &tile.second_full[ring.stage], column, query, b);
            }
        });
        else if (warp == 2) for_tiles([&](unsigned, int first, int, int) { bring_stats(lse + (size_t)place.head * x.T, 0, LOG2_E, first); });
        else for_tiles([&](unsigned, int first, int, int) { bring_stats(delta + (size_t)place.head * x.T, STEP, 1, first); });
        return;
    }

    registers_more<CONSUMER_REGISTERS>();
    const auto consume = [&](auto which) {
        constexpr unsigned group = decltype(which)::value;
        const bool one = threadIdx.x % GROUP_THREADS == 0, speaks = threadIdx.x % WARP == 0; /* for the warpgroup, for the warp */
        const int lane = threadIdx.x % WARP, row = (int)threadIdx.x % GROUP_THREADS / WARP * 16 + lane / 4; /* and 8 below */
        const uint32_t first_at = shared_address(shared + Tile::FIRST_AT), second_at = shared_address(shared + Tile::SECOND_AT);
        const uint64_t q_scores = tile_descriptor<SWIZZLE_128, K_MAJOR>(first_at, STEP), q_sum = tile_descriptor<SWIZZLE_128, MN_MAJOR>(first_at, STEP);
        const uint64_t dout_scores = tile_descriptor<SWIZZLE_128, K_MAJOR>(second_at, STEP), dout_sum = tile_descriptor<SWIZZLE_128, MN_MAJOR>(second_at, STEP);
        for (unsigned round = 0; hopper_tile(place, x, round); round++) {
            const Ring<Tile::OWN_STAGES> own = Ring<Tile::OWN_STAGES>::of_use(round);
            const int first = (int)place.block * HOPPER_ROWS, steps = (int)((x.blocks - place.block) * HOPPER_GROUPS - group);
            unsigned char *k_rows = shared + own.stage * Tile::OWN_BYTES + group * Tile::GROUP_BYTES, *v_rows = k_rows + Tile::PART_BYTES;
            float dk[D / 2], dv[D / 2], s[STEP / 2], dp[STEP / 2];
            uint32_t p[STEP / 16][4], ds[STEP / 16][4];
            GroupLeft<D, D == 64> k, v;
            if constexpr (group == 1) tile.pass_over(ring); /* the first block of queries does not see it */
            mbarrier_wait(&tile.own_full[own.stage], own.phase);
            k.init(k_rows);
            v.init(v_rows);
            const auto issue_scores = [&]() {
                mbarrier_wait(&tile.first_full[ring.stage], ring.phase);
                wgmma_fence(s);
                group_scores(s, k, q_scores + (ring.stage * Tile::STEP_BYTES >> 4));
            };
            if constexpr (AHEAD) issue_scores(), wgmma_commit();
            group_zero(dk), group_zero(dv);
            const auto mask = [&]() { /* of the first step */
                UNROLL for (int i = 0; i < 4; i++) {
                    const int unseen = row + i / 2 * 8 - lane % 4 * 2 - i % 2; /* columns 8 n below this one */
                    UNROLL for (int n = 0; n < STEP / 8; n++) s[4 * n + i] = 8 * n < unseen ? -INFINITY : s[4 * n + i];
                }
            };
            if constexpr (AHEAD) {
                wgmma_wait<0>(s);
                mask();
            }
            Ring<Tile::STAGES> before = ring; /* its queries are still summed */
            const auto step = [&](int j, auto is_last) {
                constexpr bool LAST = decltype(is_last)::value;
                const Ring<Tile::STAGES> now = ring;
                if constexpr (!AHEAD) issue_scores(), wgmma_commit();
                mbarrier_wait(&tile.second_full[now.stage], now.phase);
                wgmma_fence(dp);
                group_scores(dp, v, dout_scores + (now.stage * Tile::STEP_BYTES >> 4));
                wgmma_commit();
                if constexpr (!AHEAD) wgmma_wait<1>(s);
                const float *now_lse = stats + now.stage * 2 * STEP + lane % 4 * 2, *now_delta = now_lse + STEP;
                if (!AHEAD && j == 0) mask();
                UNROLL for (int n = 0; n < STEP / 8; n++) {
                    const float2 c = *(const float2 *)(const void *)(now_lse + 8 * n); /* of the two columns */
                    UNROLL for (int half = 0; half < 2; half++)
                        p[n / 2][n % 2 * 2 + half] = weights_of(make_float2(s[4 * n + 2 * half], s[4 * n + 2 * half + 1]), x.scale_log2, c);
                }
                group_pin(p);
                wgmma_fence(dv);
                group_accumulate<D, STEP>(dv, p, dout_sum + (now.stage * Tile::STEP_BYTES >> 4), true);
                wgmma_commit();
                if constexpr (!LAST) ring.next();
                if constexpr (AHEAD && !LAST) issue_scores(), wgmma_commit(), wgmma_wait<2>(dp);
                else wgmma_wait<1>(dp);
                if (speaks && j) mbarrier_arrive(&tile.first_empty[before.stage]);
                UNROLL for (int n = 0; n < STEP / 8; n++) {
                    const float2 c = *(const float2 *)(const void *)(now_delta + 8 * n); /* of the two columns */
                    UNROLL for (int half = 0; half < 2; half++) {
                        const int i = n % 2 * 2 + half;
                        ds[n / 2][i] = gradients_of(p[n / 2][i], make_float2(dp[4 * n + 2 * half], dp[4 * n + 2 * half + 1]), c);
                    }
                }
                group_pin(ds);
                wgmma_fence(dk);
                group_accumulate<D, STEP>(dk, ds, q_sum + (now.stage * Tile::STEP_BYTES >> 4), true);
                wgmma_commit();
                if constexpr (AHEAD && !LAST) wgmma_wait<1>(s, dv);
                else wgmma_wait<1>(dv);
                if (speaks) mbarrier_arrive(&tile.second_empty[now.stage]);
                before = now;
            };
            NO_UNROLL for (int j = 0; j + 1 < steps; j++) step(j, Constant<0>());
            step(steps - 1, Constant<1>());
            ring.next();
            wgmma_wait<0>(dk);
            if constexpr (!AHEAD) named_sync(GROUP_BARRIER + group, GROUP_THREADS); /* no warp reads K and V any more */
            if (speaks) mbarrier_arrive(&tile.first_empty[before.stage]);
            group_scale(dk, x.scale);
            const int column = (int)place.head % x.H * D + x.out_row, at = first + (int)group * GROUP_ROWS, b = (int)place.head / x.H;
            own_store<D>(dqkv, k_rows, dk, column, at, b, group);
            own_store<D>(dqkv, v_rows, dv, column + x.out_row, at, b, group);
            if (one) bulk_wait_read<0>(), mbarrier_arrive(&tile.own_empty[own.stage]);
        }
    };
    if (hopper_group() == 0) consume(Constant<0>());
    else consume(Constant<1>());
}

/* ---- launches ------------------------------------------------------------------------------------------------------------------ */

template <int D>
static void run(CudaBackend *cuda, elem *dqkv, const elem *dout, const elem *out, const float *lse, const elem *qkv, float *delta, const AttentionShape &s) {
    const TileGrid x = tile_grid(s, HOPPER_ROWS);
    const size_t C = s.H * s.D;
    const TensorMap dqkv_map = head_map(dqkv, s, 3 * C), dout_map = head_map(dout, s, C), qkv_map = head_map(qkv, s, 3 * C);
    LAUNCH_HOPPER(attention_hopper_dq_kernel<D>, 1, hopper_grid(cuda, x), dim3(HOPPER_THREADS), QueryHopper<D>::SHARED, cuda->stream, dqkv_map, delta,
                  dout_map, head_map(out, s, C), lse, qkv_map, x);
    LAUNCH_HOPPER(attention_hopper_dkv_kernel<D>, 1, hopper_grid(cuda, x), dim3(HOPPER_THREADS), KeyHopper<D>::SHARED, cuda->stream, dqkv_map, dout_map,
                  lse, delta, qkv_map, x);
}

void attention_hopper_backward(CudaBackend *cuda, elem *dqkv, const elem *dout, const elem *out, const float *lse, const elem *qkv, float *delta,
                               AttentionShape s) {
    CHECK(s.D == 64 || s.D == 128, "attention_hopper_backward: D %zu", s.D);
    if (s.D == 64) run<64>(cuda, dqkv, dout, out, lse, qkv, delta, s);
    else run<128>(cuda, dqkv, dout, out, lse, qkv, delta, s);
}

} /* namespace */
#endif
