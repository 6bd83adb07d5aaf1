/* Causal attention on Hopper's tensor cores, forward, bf16, heads of 64 and 128: TMA, wgmma, one warpgroup that loads and two that multiply (sm_90a alone). */
#include "attention_hopper.cuh"
#if LLMC_BF16

namespace LLMC_NS {

/* Shared memory: stages of queries, of keys, of values; the two warpgroups' results on their way out; barriers. */
template <int D> struct ForwardHopper {
    enum { KEYS = 128, Q_STAGES = 2, STAGES = D == 64 ? 4 : 2, Q_BYTES = HOPPER_ROWS * 2 * D, KEY_BYTES = KEYS * 2 * D };
    enum { K_AT = Q_STAGES * Q_BYTES, V_AT = K_AT + STAGES * KEY_BYTES, OUT_AT = V_AT + STAGES * KEY_BYTES, BARRIERS_AT = OUT_AT + Q_BYTES };
    enum { SHARED = BARRIERS_AT + 8 * 2 * (Q_STAGES + 2 * STAGES) };
    static_assert(SHARED <= 227 * 1024 && (int)KEYS == (int)HOPPER_ROWS, "the diagonal block is the last one, for both warpgroups");
};

/* The online softmax of a thread's two rows, 8 half + g of its warp's; of each a quarter of the columns. */
struct GroupSoftmax {
    float max[2], sum[2];
    __device__ __forceinline__ void init() { UNROLL for (int half = 0; half < 2; half++) max[half] = -INFINITY, sum[half] = 0; }
    /* s becomes the weights exp2(scale s - max); true: a lane of this warp passed its old maximum, and sums of weights times values shrink. */
    template <int R> __device__ __forceinline__ bool step(float (&shrink)[2], float (&s)[R], float scale) {
        bool any = false;
        UNROLL for (int half = 0; half < 2; half++) {
            float top = -INFINITY;
            UNROLL for (int n = 0; n < R / 4; n++) top = fmaxf(top, fmaxf(s[4 * n + 2 * half], s[4 * n + 2 * half + 1]));
            top = fmaxf(top, __shfl_xor_sync(FULL_MASK, top, 1));
            top = fmaxf(top, __shfl_xor_sync(FULL_MASK, top, 2)) * scale;
            const bool passed = top > max[half] + RESCALE;
            shrink[half] = passed ? exp2_fast(max[half] - top) : 1.0f;
            sum[half] *= shrink[half];
            if (passed) max[half] = top, any = true;
        }
        UNROLL for (int n = 0; n < R / 4; n++)
            UNROLL for (int i = 0; i < 4; i++) {
                s[4 * n + i] = exp2_fast(fmaf(s[4 * n + i], scale, -max[i / 2]));
                sum[i / 2] += s[4 * n + i];
            }
        return __any_sync(FULL_MASK, any);
    }
};

/* out[t] = sum over s <= t of softmax_s(scale q[t].k[s]) v[s], lse[t] = log of the softmax's denominator; per head, D = 64 or 128.
 * out (B, T, C) =, lse (B, H, T) = or NULL, qkv (B, T, 3C) in, out and qkv as tensor maps.
 * Block: persistent, one an SM, tiles of 128 queries of one head by hopper_tile, last ones first. Persistent, because the producer then brings the next tile's
 *   queries and keys under the end of this one: at T 1024 a tile's products take 4,350 cycles on average at D = 64, an exposed start about 1,500.
 * Warpgroup 0: warp 0 brings queries and keys, warp 1 values, each by one thread, in rings of their own, so that neither waits for the other.
 *   Warpgroups 1 and 2: 64 queries each, over blocks of 128 keys from the diagonal down, so that only the first one is masked, of which warpgroup 1 takes the
 *   64 that it sees. S = Q K^T from shared memory; weights, rounded, stay in registers as left operand of O += P V. S of block j is issued in front of P V of
 *   block j + 1 (the one before), and its softmax runs under that product; named barriers let the warpgroups issue in turn, so that one's softmax runs under
 *   the other's products too.
 * Rows from T on: zeros are loaded, and only rows from T on see them; TMA does not store them.
 * Bytes: q, out and lse once, k and v once from memory (the floor: 8 C a row and 4 H) and T/256 times from the L2. Shared memory, a warpgroup and block of
 *   keys: 48 + 16 KB for 512 + 512 cycles of tensor cores' D = 64, 64 bytes a cycle of 128; the same at 128. FLOPs: 4 D (T^2/2 + 32 T) a head.
 * Bound: at D = 64 exp2 (16 a cycle and SM) takes as long as the products (4096 FLOP a cycle), so both pipes full is the ceiling; at 128 the products.
 *   Instructions: two warps a scheduler, 2 x 426 (34 of them only when a maximum passed) for 1024 cycles of tensor cores at D = 64, 2 x 472 for 2048 at 128.
 * Registers: 168 at launch, 240 a consumer, no spills; shared 176 KB, 224 KB.
 * Sums: blocks of keys descending, within one ascending by 16, in float; order depends on T alone. Row sums: each of 4 lanes in that order, then a tree.
 * Error: weights rounded to bf16 against an unrounded denominator, one rounding of out: |error| <= 2^-9 (max |v| + |out|), plus float sums.
 * Source: Shah et al. 2024, FlashAttention-3, algorithms 1 and 2; Dao 2023; Milakov and Gimelshein 2018. */
template <int D>
__global__ void __launch_bounds__(HOPPER_THREADS, 1)
    attention_hopper_forward_kernel(const __grid_constant__ TensorMap out, float *lse, const __grid_constant__ TensorMap qkv, TileGrid x) {
    typedef ForwardHopper<D> Tile;
    enum { KEYS = Tile::KEYS };
    DYNAMIC_SHARED(unsigned char, shared);
    uint64_t *q_full = (uint64_t *)(void *)(shared + Tile::BARRIERS_AT), *q_empty = q_full + Tile::Q_STAGES;
    uint64_t *k_full = q_empty + Tile::Q_STAGES, *k_empty = k_full + Tile::STAGES, *v_full = k_empty + Tile::STAGES, *v_empty = v_full + Tile::STAGES;
    if (threadIdx.x == 0) {
        for (int i = 0; i < Tile::Q_STAGES; i++) mbarrier_init(&q_full[i], 1), mbarrier_init(&q_empty[i], HOPPER_READERS);
        for (int i = 0; i < Tile::STAGES; i++) {
            mbarrier_init(&k_full[i], 1), mbarrier_init(&k_empty[i], HOPPER_READERS);
            mbarrier_init(&v_full[i], 1), mbarrier_init(&v_empty[i], HOPPER_READERS);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    begin_kernel();
    TilePlace place;
    Ring<Tile::STAGES> ring;
    if (threadIdx.x < GROUP_THREADS) {
        registers_fewer<PRODUCER_REGISTERS>();
        const bool keys = threadIdx.x == 0;
        if (threadIdx.x % WARP || threadIdx.x >= 2 * WARP) return;
        Ring<Tile::Q_STAGES> q_ring;
        for (unsigned round = 0; hopper_tile(place, x, round); round++) {
            const int block = (int)(x.blocks - 1 - place.block), b = (int)place.head / x.H, column = (int)place.head % x.H * D;
            if (keys) {
                mbarrier_wait(&q_empty[q_ring.stage], q_ring.phase ^ 1);
                mbarrier_arrive_expect(&q_full[q_ring.stage], Tile::Q_BYTES);
                for (int i = 0; i < HOPPER_GROUPS; i++)
                    head_load<D, GROUP_ROWS>(shared + q_ring.stage * Tile::Q_BYTES + i * GROUP_ROWS * 2 * D, qkv, &q_full[q_ring.stage], column,
                                             block * HOPPER_ROWS + i * GROUP_ROWS, b);
                q_ring.next();
            }
            unsigned char *to = shared + (keys ? Tile::K_AT : Tile::V_AT);
            uint64_t *full = keys ? k_full : v_full, *empty = keys ? k_empty : v_empty;
            NO_UNROLL for (int j = block; j >= 0; j--, ring.next()) {
                mbarrier_wait(&empty[ring.stage], ring.phase ^ 1);
                mbarrier_arrive_expect(&full[ring.stage], Tile::KEY_BYTES);
                head_load<D, KEYS>(to + ring.stage * Tile::KEY_BYTES, qkv, &full[ring.stage], column + (keys ? 1 : 2) * x.out_row, j * KEYS, b);
            }
        }
        return;
    }

    registers_more<CONSUMER_REGISTERS>();
    const unsigned group = hopper_group();
    const bool one = threadIdx.x % GROUP_THREADS == 0, speaks = threadIdx.x % WARP == 0; /* for the warpgroup, for the warp */
    unsigned char *rows_out = shared + Tile::OUT_AT + group * GROUP_ROWS * 2 * D;
    const uint64_t k_first = tile_descriptor<SWIZZLE_128, K_MAJOR>(shared_address(shared + Tile::K_AT), KEYS);
    const uint64_t v_first = tile_descriptor<SWIZZLE_128, MN_MAJOR>(shared_address(shared + Tile::V_AT), KEYS);
    Ring<Tile::Q_STAGES> q_ring;
    Ring<Tile::STAGES> v_ring;
    if (group == 1) named_arrive(PINGPONG_BARRIER, HOPPER_GROUPS * GROUP_THREADS);
    for (unsigned round = 0; hopper_tile(place, x, round); round++, q_ring.next()) {
        float acc[D / 2], shrink[2];
        uint32_t weights[KEYS / 16][4];
        GroupLeft<D, false> q;
        GroupSoftmax softmax;
        const int blocks = (int)(x.blocks - place.block);
        q.init(shared + q_ring.stage * Tile::Q_BYTES + group * GROUP_ROWS * 2 * D);
        softmax.init();
        mbarrier_wait(&q_full[q_ring.stage], q_ring.phase);
        /* The diagonal block; what these queries see of it: 64 keys or all. */
        const auto diagonal = [&](auto seen_keys) {
            constexpr int SEEN = decltype(seen_keys)::value;
            float s[SEEN / 2];
            mbarrier_wait(&k_full[ring.stage], ring.phase);
            wgmma_fence(s);
            group_scores<D, false, SEEN / 2, KEYS>(s, q, k_first + (ring.stage * Tile::KEY_BYTES >> 4));
            wgmma_commit();
            wgmma_wait<0>(s);
            if (speaks) mbarrier_arrive(&k_empty[ring.stage]);
            ring.next();
            const int lane = threadIdx.x % WARP, row = (int)threadIdx.x % GROUP_THREADS / WARP * 16 + lane / 4;
            UNROLL for (int i = 0; i < 4; i++) {
                const int seen = row + i / 2 * 8 - lane % 4 * 2 - i % 2; /* column 8 n of the last 64 is seen up to this one */
                UNROLL for (int n = 0; n < GROUP_ROWS / 8; n++) {
                    float &score = s[SEEN / 2 - GROUP_ROWS / 2 + 4 * n + i];
                    score = 8 * n > seen ? -INFINITY : score;
                }
            }
            softmax.step(shrink, s, x.scale_log2);
            group_pack(weights, s);
            group_pin(weights);
        };
        /* Scores of a block and the values of the one before it, of which SEEN keys count. */
        const auto step = [&](auto seen_keys, auto is_first) {
            constexpr int SEEN = decltype(seen_keys)::value;
            float s[KEYS / 2];
            mbarrier_wait(&k_full[ring.stage], ring.phase);
            named_sync(PINGPONG_BARRIER + group, HOPPER_GROUPS * GROUP_THREADS);
            wgmma_fence(s);
            group_scores(s, q, k_first + (ring.stage * Tile::KEY_BYTES >> 4));
            wgmma_commit();
            mbarrier_wait(&v_full[v_ring.stage], v_ring.phase);
            wgmma_fence(acc);
            group_accumulate<D, SEEN>(acc, weights, v_first + (v_ring.stage * Tile::KEY_BYTES >> 4), !decltype(is_first)::value);
            wgmma_commit();
            named_arrive(PINGPONG_BARRIER + (group ^ 1), HOPPER_GROUPS * GROUP_THREADS);
            wgmma_wait<1>(s);
            if (speaks) mbarrier_arrive(&k_empty[ring.stage]);
            const bool shrinks = softmax.step(shrink, s, x.scale_log2);
            wgmma_wait<0>(acc);
            if (speaks) mbarrier_arrive(&v_empty[v_ring.stage]);
            ring.next(), v_ring.next();
            if (shrinks) {
                UNROLL for (int n = 0; n < D / 2; n++) acc[n] *= shrink[n % 4 / 2];
            }
            group_pack(weights, s);
            group_pin(weights);
        };
        const auto last = [&](auto seen_keys, auto is_first) { /* values alone */
            mbarrier_wait(&v_full[v_ring.stage], v_ring.phase);
            wgmma_fence(acc);
            group_accumulate<D, decltype(seen_keys)::value>(acc, weights, v_first + (v_ring.stage * Tile::KEY_BYTES >> 4), !decltype(is_first)::value);
            wgmma_commit();
            if (one) bulk_wait_read<0>(); /* the last tile's results have left */
            named_sync(GROUP_BARRIER + group, GROUP_THREADS);
            wgmma_wait<0>(acc);
        };
        if (group == 0) diagonal(Constant<GROUP_ROWS>());
        else diagonal(Constant<KEYS>());
        if (blocks > 1) {
            if (group == 0) step(Constant<GROUP_ROWS>(), Constant<1>());
            else step(Constant<KEYS>(), Constant<1>());
            NO_UNROLL for (int j = 2; j < blocks; j++) step(Constant<KEYS>(), Constant<0>());
            if (speaks) mbarrier_arrive(&q_empty[q_ring.stage]);
            last(Constant<KEYS>(), Constant<0>());
        } else {
            if (speaks) mbarrier_arrive(&q_empty[q_ring.stage]);
            if (group == 0) last(Constant<GROUP_ROWS>(), Constant<1>());
            else last(Constant<KEYS>(), Constant<1>());
        }
        if (speaks) mbarrier_arrive(&v_empty[v_ring.stage]);
        v_ring.next();

        const int first = (int)(x.blocks - 1 - place.block) * HOPPER_ROWS + (int)group * GROUP_ROWS;
        UNROLL for (int half = 0; half < 2; half++) {
            const int row = first + (int)threadIdx.x % GROUP_THREADS / WARP * 16 + 8 * half + (int)threadIdx.x % WARP / 4;
            float sum = softmax.sum[half];
            sum += __shfl_xor_sync(FULL_MASK, sum, 1);
            sum += __shfl_xor_sync(FULL_MASK, sum, 2);
            const float inverse = reciprocal_fast(sum);
            UNROLL for (int n = 0; n < D / 8; n++) acc[4 * n + 2 * half] *= inverse, acc[4 * n + 2 * half + 1] *= inverse;
            if (lse && threadIdx.x % 4 == 0 && row < x.T) lse[(size_t)place.head * x.T + row] = softmax.max[half] * LN_2 + logf(sum); /* the sum is 1 or more */
        }
        head_stage<D>(rows_out, acc);
        named_sync(GROUP_BARRIER + group, GROUP_THREADS);
        if (one) head_store<D>(out, rows_out, (int)place.head % x.H * D, first, (int)place.head / x.H), bulk_commit();
    }
    if (group == 0) named_sync(PINGPONG_BARRIER, HOPPER_GROUPS * GROUP_THREADS); /* the other's last word */
    if (one) bulk_wait_read<0>();
}

template <int D> static void run(CudaBackend *cuda, elem *out, float *lse, const elem *qkv, const AttentionShape &s) {
    const TileGrid x = tile_grid(s, HOPPER_ROWS);
    LAUNCH_HOPPER(attention_hopper_forward_kernel<D>, 1, hopper_grid(cuda, x), dim3(HOPPER_THREADS), ForwardHopper<D>::SHARED, cuda->stream,
                  head_map(out, s, s.H * s.D), lse, head_map(qkv, s, 3 * s.H * s.D), x);
}

void attention_hopper_forward(CudaBackend *cuda, elem *out, float *lse, const elem *qkv, AttentionShape s) {
    CHECK(s.D == 64 || s.D == 128, "attention_hopper_forward: D %zu", s.D);
    if (s.D == 64) run<64>(cuda, out, lse, qkv, s);
    else run<128>(cuda, out, lse, qkv, s);
}

} /* namespace */
#endif
