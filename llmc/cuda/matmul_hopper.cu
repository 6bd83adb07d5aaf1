/* Matrix products of our own for Hopper (sm_90a), bf16 with sums in float: candidates of the timed search beside cuBLASLt's (matmul_measure.cu), where
 * --own-products on asks for them. No hardware has run them when this is written: what is said of speed is arithmetic.
 *
 * A block has a warpgroup that copies (one thread issues TMA) and two that multiply (wgmma, from shared memory), over a ring of stages of 64 of k. Blocks
 * come in clusters of two that own neighbouring tiles along m and the same along n: each loads its own part of A and half of the common part of B, which
 * it sends to both. As many clusters as the GPU holds stay, and take tiles in turn. The ideas are CUTLASS's (warp-specialised ping-pong and cooperative
 * kernels, persistent tiles, multicast).
 *
 * Expected on 66 clusters of an H100 or H200: tensor cores do 4,096 FLOPs a cycle and SM, 757 TFLOP/s at 1.4 GHz, to which power holds large products.
 * 65,536 x 3,072 x 768 in 128 x 192: 4,096 pairs of tiles in 63 rounds (98 % full) of 9,216 cycles and some 150 for handing the ring on: 96 % of that;
 * x 768 x 768 16 rounds, 95 %; x 4,800 x 1,600 in 128 x 160 (M 16,384) 1,920 in 30, 96 %. Weight gradients: 768 x 768 in 5 parts 60 of 66 clusters. */
#include "backend.cuh"
#include "gelu.cuh"
#include "hopper.cuh"
#ifdef LLMC_EMU
#include "dev/emu/cublaslt_twin.h"
#endif
#include <type_traits>

namespace LLMC_NS {

#if LLMC_BF16
enum { M_TILE = 128, DEPTH = 64, PAIR = 2, THREADS = 384, GROUP = 128, SHARED_ROOM = 227 * 1024, TURN = 1 /* and 2: named barriers */ };
static const unsigned BAND = 8;
enum Form { FORM_ELEM, FORM_GELU, FORM_DGELU, FORM_FLOAT }; /* ELEM: bias if there is one; FLOAT: = or +=, and row sums of op(a) if they are asked for */

/* A tile of 128 x N of c a block, 256 x N a cluster.
 * IN_TURN: each multiplying warpgroup has tiles of its own, so that one's epilogue runs under the other's products: N floats of sums a thread, N <= 192.
 *   At K = 768, N = 192 a tile's products take 9,216 cycles of the tensor cores and its epilogue some 1,500 to 3,800 (dGELU) of one warpgroup's issue:
 *   hidden, where a shared tile would stand still for it. They take turns at named barriers: who waited for a stage more than a round of the ring ahead
 *   would pass at once, its barrier's parity being that of the round before.
 * Else both share a tile, 64 rows each: N / 2 floats a thread, N = 256. The epilogue is not hidden, only the next tile's first copies are.
 * From the L2 to an SM, a stage: 16 KiB + 64 N bytes in 4 N cycles of its tensor cores: at N = 256 32 bytes a cycle, at 192 37, at 160 42; were B not sent to
 * both 48, 53, 58. An SM's port takes 64. Stages: 4 at 256, 5 at 192, 6 at 160.
 * MN-major B lies in whole panels, of 64 columns or, at 160, of 32 (a swizzle of 64 bytes): nobody is known to use a part of a panel. */
template <int N_, bool IN_TURN_, Major B> struct Tile {
    static constexpr int N = N_, PARTS = IN_TURN_ ? 2 : 1, R = N / 2, B_ROWS = B == K_MAJOR ? N : DEPTH;
    static constexpr bool IN_TURN = IN_TURN_;
    static constexpr TileSwizzle B_SWIZZLE = B == MN_MAJOR && N % 64 ? SWIZZLE_64 : SWIZZLE_128;
    static constexpr int B_PANEL = (int)swizzle_span(B_SWIZZLE) / 2;
    static constexpr unsigned A_BYTES = M_TILE * DEPTH * 2, B_BYTES = N * DEPTH * 2, STAGE = A_BYTES + B_BYTES;
    static constexpr unsigned STAGES = (SHARED_ROOM - 1024) / STAGE, ONES = STAGES * STAGE, BARRIERS = ONES + 256, SHARED = BARRIERS + 2 * STAGES * sizeof(uint64_t);
    static_assert(N % 32 == 0 && (B == K_MAJOR || N % B_PANEL == 0) && R * PARTS <= 192 && STAGES >= 3 && SHARED <= SHARED_ROOM, "sums in registers, stages in shared memory");
};

/* What a launch computes: pairs x across tiles of 256 x N, `splits` parts of the `depth` stages of k each. */
struct Work {
    unsigned M, N, pairs, across, splits, depth;
    size_t c_row, c_split, grad_split; /* from part to part of k, in elements of c and of bias_grad */
    void *c;
    const elem *bias;         /* or NULL */
    elem *aux;
    float *bias_grad;         /* or NULL */
    bool add;
};

/* A cluster's i-th piece of work: bands of BAND pairs of tiles along m, in each along n there and back, so that what runs at once is about square and
 * finds A and B in the L2; parts of k outermost. */
struct Item { unsigned pair, n, split, begin, end; }; /* begin .. end: stages of k */
__device__ __forceinline__ Item item_of(const Work &w, unsigned i) {
    const unsigned tiles = w.pairs * w.across, split = i / tiles, t = i % tiles, band = t / (BAND * w.across), first = band * BAND;
    const unsigned rows = w.pairs - first < BAND ? w.pairs - first : BAND, at = t - first * w.across, n = at / rows;
    return Item{first + at % rows, band % 2 ? w.across - 1 - n : n, split, w.depth * split / w.splits, w.depth * (split + 1) / w.splits};
}
__device__ __forceinline__ unsigned steps_of(const Work &w, unsigned i) {
    const unsigned split = i / (w.pairs * w.across);
    return w.depth * (split + 1) / w.splits - w.depth * split / w.splits;
}
__device__ __forceinline__ unsigned items_of(const Work &w) { return w.pairs * w.across * w.splits; }

/* The warp's warpgroup, so that the compiler sees that a warp agrees. */
__device__ __forceinline__ unsigned warpgroup() { return __shfl_sync(FULL_MASK, threadIdx.x / GROUP, 0); }

template <class T> struct Ring {
    unsigned char *shared;
    __device__ __forceinline__ unsigned char *a(unsigned step) const { return shared + step % T::STAGES * T::STAGE; }
    __device__ __forceinline__ unsigned char *b(unsigned step) const { return a(step) + T::A_BYTES; }
    __device__ __forceinline__ uint64_t *full(unsigned step) const { return (uint64_t *)(void *)(shared + T::BARRIERS) + step % T::STAGES; }
    __device__ __forceinline__ uint64_t *empty(unsigned step) const { return full(step) + T::STAGES; }
    __device__ __forceinline__ unsigned parity(unsigned step) const { return step / T::STAGES & 1; }
};

/* One thread of a block: all copies. A stage is free when the multiplying warps of both blocks are done with it, since its B is written from both. */
template <class T, Major A, Major B> __device__ __forceinline__ void copy_all(const TensorMap &map_a, const TensorMap &map_b, const Work &w, Ring<T> ring) {
    const unsigned rank = cluster_rank(), clusters = gridDim.x / PAIR;
    unsigned step = 0;
    for (unsigned i = blockIdx.x / PAIR; i < items_of(w); i += clusters) {
        const Item it = item_of(w, i);
        const int m = (int)((it.pair * PAIR + rank) * M_TILE), n = (int)(it.n * T::N);
        NO_UNROLL for (unsigned s = it.begin; s < it.end; s++, step++) {
            const int k = (int)(s * DEPTH);
            unsigned char *a = ring.a(step), *b = ring.b(step);
            uint64_t *full = ring.full(step);
            mbarrier_wait(ring.empty(step), ring.parity(step) ^ 1); /* what others wrote there is not read: no acquire of the cluster, which would empty the L1 */
            mbarrier_arrive_expect(full, T::STAGE);
            if (A == K_MAJOR) tma_load(a, map_a, full, k, m);
            else tma_load(a, map_a, full, m, k), tma_load(a + T::A_BYTES / 2, map_a, full, m + 64, k);
            if (B == K_MAJOR) tma_load_multicast(b + rank * (T::B_BYTES / 2), map_b, full, 3, k, n + (int)rank * (T::N / 2)); /* half of its rows */
            else {
                UNROLL for (int p = 0; p < T::N; p += T::B_PANEL) /* half of the k */
                    tma_load_multicast(b + p * DEPTH * 2 + rank * (DEPTH / 2) * (T::B_PANEL * 2), map_b, full, 3, n + p, k + (int)rank * (DEPTH / 2));
            }
        }
    }
}

/* Tells both blocks' copying threads that this warp is done with a stage. */
template <class T> __device__ __forceinline__ void release(Ring<T> ring, unsigned step) {
    if (threadIdx.x % WARP < PAIR) mbarrier_return_remote(ring.empty(step), threadIdx.x % WARP);
}

/* d (PARTS x 64, N) = op(a) op(b) over `steps` stages; GRAD: g (PARTS x 64, 8) = op(a) times ones, each column the row sums. One group of products is
 * always under way while the next is issued. next: the turn's barrier that is told when all is issued, or 0. */
template <class T, Major A, Major B, bool GRAD>
__device__ __forceinline__ void multiply(float (&d)[T::PARTS][T::R], float (&g)[T::PARTS][4], Ring<T> ring, unsigned step, unsigned steps, unsigned row, unsigned next) {
    const unsigned rows_a = A == K_MAJOR ? M_TILE : DEPTH;
    const uint64_t ones = tile_descriptor<SWIZZLE_NONE, K_MAJOR>(shared_address(ring.shared + T::ONES), 8);
    NO_UNROLL for (unsigned s = 0; s < steps; s++) {
        const unsigned now = step + s;
        mbarrier_wait(ring.full(now), ring.parity(now));
        const uint64_t a = tile_descriptor<SWIZZLE_128, A>(shared_address(ring.a(now)) + tile_advance<SWIZZLE_128, A>(rows_a, 0, row), rows_a);
        const uint64_t b = tile_descriptor<T::B_SWIZZLE, B>(shared_address(ring.b(now)), T::B_ROWS);
        if constexpr (T::PARTS == 2) wgmma_fence(d[0], d[1], g[0], g[1]);
        else wgmma_fence(d[0], g[0]);
        UNROLL for (unsigned k = 0; k < DEPTH; k += 16)
            UNROLL for (int p = 0; p < T::PARTS; p++) {
                const uint64_t part = a + (tile_advance<SWIZZLE_128, A>(rows_a, k, 64 * p) >> 4);
                wgmma_ss<A, B>(d[p], part, b + (tile_advance<T::B_SWIZZLE, B>(T::B_ROWS, k) >> 4), s || k);
                if constexpr (GRAD) wgmma_ss<A, K_MAJOR>(g[p], part, ones, s || k);
            }
        wgmma_commit();
        if (s) wgmma_wait<1>(), release(ring, now - 1);
    }
    if (T::IN_TURN && next) named_arrive(next, 2 * GROUP);
    if constexpr (T::PARTS == 2) wgmma_wait<0>(d[0], d[1], g[0], g[1]);
    else wgmma_wait<0>(d[0], g[0]);
    release(ring, step + steps - 1);
}

/* x[0..7] of lane 4 g + t: row g (+ 8 if lower) of the sums, columns 8 (j + t) onward: the quad's lanes give each other the 8 columns that each has two of. */
template <int R> __device__ __forceinline__ void gather(float (&x)[8], const float (&d)[R], int j, int lower) {
    const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
    UNROLL for (int i = 0; i < 8; i++) x[i] = d[4 * (j + i / 2) + 2 * lower + i % 2];
    UNROLL for (int i = 0; i < 8; i += 4)
        UNROLL for (int e = i; e < i + 2; e++) { /* pairs i / 2 and i / 2 + 1, with the neighbour */
            const float got = __shfl_xor_sync(FULL_MASK, odd ? x[e] : x[e + 2], 1);
            x[e] = odd ? got : x[e], x[e + 2] = odd ? x[e + 2] : got;
        }
    UNROLL for (int e = 0; e < 4; e++) { /* pairs 0, 1 and 2, 3, with the one after it */
        const float got = __shfl_xor_sync(FULL_MASK, high ? x[e] : x[e + 4], 2);
        x[e] = high ? got : x[e], x[e + 4] = high ? x[e + 4] : got;
    }
}

/* c, and aux or from aux, of the 64 or 128 rows from `row` on and N columns from `column` on: a quad writes 32 neighbours of a row at once, 64 bytes or 128. */
template <class T, Form F> __device__ __forceinline__ void finish(const float (&d)[T::PARTS][T::R], const Work &w, unsigned row, unsigned column, unsigned split) {
    const unsigned thread = not_kept(threadIdx.x), lane = thread % WARP, first = row + thread / WARP % 4 * 16 + lane / 4;
    typedef typename std::conditional<F == FORM_FLOAT, float, elem>::type Out;
    Out *c = (Out *)w.c + (F == FORM_FLOAT ? split * w.c_split : 0);
    UNROLL for (int j = 0; j < T::N / 8; j += 4) {
        const unsigned n = column + 8 * (unsigned)(j + lane % 4);
        const bool within = n < w.N;      /* N is a multiple of 8 */
        const size_t start = (size_t)first * w.c_row + n;
        Piece<elem, 8> bias = {}, saved[T::PARTS * 2];
        if ((F == FORM_GELU || (F == FORM_ELEM && w.bias)) && within) bias = load_piece<8>(w.bias + n);
        if constexpr (F == FORM_DGELU) {
            __syncwarp();                  /* or ptxas loads further columns' ahead and spills */
            UNROLL for (int i = 0; i < T::PARTS * 2; i++) { /* all of them on the way at once */
                const unsigned below = 8 * (i % 2) + 64 * (i / 2);
                if (first + below < w.M && within) saved[i] = load_piece<8>(w.aux + start + below * w.c_row);
            }
        }
        UNROLL for (int i = 0; i < T::PARTS * 2; i++) {
            const unsigned below = 8 * (i % 2) + 64 * (i / 2);
            const size_t at = start + below * w.c_row;
            float x[8], y[8];
            gather(x, d[i / 2], j, i % 2);
            if (first + below >= w.M || !within) continue;
            if constexpr (F == FORM_ELEM || F == FORM_GELU) {
                unpack(y, bias);
                UNROLL for (int e = 0; e < 8; e++) x[e] += y[e];
            }
            if constexpr (F == FORM_GELU) {
                store_piece(w.aux + at, pack<elem, 8>(x));
                UNROLL for (int e = 0; e < 8; e++) x[e] = gelu_value(x[e]);
            }
            if constexpr (F == FORM_DGELU) {
                unpack(y, saved[i]);
                UNROLL for (int e = 0; e < 8; e++) x[e] *= gelu_slope(y[e]);
            }
            if constexpr (F == FORM_FLOAT)
                if (w.add) {
                    unpack(y, load_piece<8>(c + at));
                    UNROLL for (int e = 0; e < 8; e++) x[e] += y[e];
                }
            store_piece(c + at, pack<Out, 8>(x));
        }
    }
}

/* c (M, N) = or += op(a) (M, K) op(b) (K, N), with the epilogue F (struct Product).
 * A cluster: 256 x N of c at a time. Bytes: A N / T::N times and B M / 256 times from the L2, c (and aux) once; FLOPs 2 M N K, and those of the ragged
 * tiles. Order of sums: k ascending in float, in the tensor core's steps of 16; the parts of a split after one another (split_sum_kernel). Error: that of
 * K such steps, and one rounding of c; row sums likewise. 240 registers a multiplying thread, 24 a copying one. */
template <int N, bool IN_TURN, Major A, Major B, Form F>
__global__ void __launch_bounds__(THREADS, 1)
matmul_hopper_kernel(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, const __grid_constant__ Work w) {
#if defined(LLMC_EMU) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    typedef Tile<N, IN_TURN, B> T;
    DYNAMIC_SHARED(unsigned char, shared);
    const Ring<T> ring = {shared};
    if (threadIdx.x == 0) {
        tma_prefetch(map_a), tma_prefetch(map_b);
        for (unsigned s = 0; s < T::STAGES; s++) mbarrier_init(ring.full(s), 1), mbarrier_init(ring.empty(s), PAIR * (IN_TURN ? 4 : 8));
        fence_mbarrier_init();
    }
    if (threadIdx.x < 256 / sizeof(elem)) ((elem *)(void *)(shared + T::ONES))[threadIdx.x] = to_elem(1);
    fence_proxy_async();
    __syncthreads();
    cluster_arrive(), cluster_wait();
    begin_kernel();
    if (warpgroup() == 0) {
        registers_fewer<24>();
        if (threadIdx.x == 0) copy_all<T, A, B>(map_a, map_b, w, ring);
        __syncwarp();
    } else {
        registers_more<240>();
        const unsigned clusters = gridDim.x / PAIR, stride = IN_TURN ? 2 * clusters : clusters;
        unsigned i = blockIdx.x / PAIR, step = 0;
        if (IN_TURN && warpgroup() == 2) step = steps_of(w, i), i += clusters;
        for (; i < items_of(w); i += stride) {
            const Item it = item_of(w, i);
            const unsigned steps = it.end - it.begin, mine = warpgroup() - 1, row = IN_TURN ? 0 : 64 * mine, m = (it.pair * PAIR + cluster_rank()) * M_TILE + row;
            float d[T::PARTS][T::R], g[T::PARTS][4];
            if (IN_TURN && step) named_sync(TURN + mine, 2 * GROUP);
            if (F == FORM_FLOAT && w.bias_grad && it.n == 0) {
                multiply<T, A, B, F == FORM_FLOAT>(d, g, ring, step, steps, row, i + clusters < items_of(w) ? TURN + (mine ^ 1) : 0);
                const unsigned lane = threadIdx.x % WARP, first = m + threadIdx.x / WARP % 4 * 16 + lane / 4;
                UNROLL for (int k = 0; k < T::PARTS * 2; k++)
                    if (lane % 4 == 0 && first + k / 2 * 64 + k % 2 * 8 < w.M) w.bias_grad[it.split * w.grad_split + first + k / 2 * 64 + k % 2 * 8] = g[k / 2][k % 2 * 2];
            } else multiply<T, A, B, false>(d, g, ring, step, steps, row, i + clusters < items_of(w) ? TURN + (mine ^ 1) : 0);
            finish<T, F>(d, w, m, it.n * N, it.split);
            step += steps;
            if (IN_TURN && i + clusters < items_of(w)) step += steps_of(w, i + clusters);
        }
    }
    cluster_arrive(), cluster_wait(); /* the other block may still send here, and arrive at barriers here */
#else
    (void)map_a, (void)map_b, (void)w;
    __trap();
#endif
}

/* c (M, N) = or += the sum over i < n of partial[i] (M, N in rows of `row`), i ascending.  A thread: 4 neighbours of a row. Bytes: (n + 1 or 2) M N floats,
 * the floor. */
template <bool ADD> __global__ void __launch_bounds__(256) split_sum_kernel(float *c, const float *partial, size_t M, size_t N, size_t row, size_t c_row, unsigned n) {
    begin_kernel();
    const size_t i = (size_t)blockIdx.x * 256 + threadIdx.x, m = i / (row / 4), at = i % (row / 4) * 4;
    if (m >= M || at >= N) return; /* no barrier follows */
    float sum[4] = {};
    for (unsigned s = 0; s < n; s++) {
        const Vec<float> x = load_vec(partial + (s * M + m) * row + at);
        UNROLL for (int e = 0; e < 4; e++) sum[e] += x.v[e];
    }
    UNROLL for (int e = 0; e < 4; e++)
        if (at + e < N) c[m * c_row + at + e] = ADD ? c[m * c_row + at + e] + sum[e] : sum[e];
}

/* ---- which kernel, how many parts of k ---------------------------------------------------------------------------------------------------------- */

typedef void (*Kernel)(TensorMap, TensorMap, Work);
struct Variant { Kernel kernel; size_t shared; };
template <int N, bool IN_TURN, Major A, Major B, Form F> static Variant variant() { return {matmul_hopper_kernel<N, IN_TURN, A, B, F>, Tile<N, IN_TURN, B>::SHARED}; }

/* 128 x 192 takes all that there is here; the others what the engine has: 160 divides 1600, 4800 and 6400, 256 needs the fewest bytes. */
template <int N, bool IN_TURN, bool ALL> static Variant variant_of(Form f, bool a_mn, bool b_mn) {
    if (!a_mn && !b_mn) {
        if (f == FORM_ELEM) return variant<N, IN_TURN, K_MAJOR, K_MAJOR, FORM_ELEM>();
        if (f == FORM_GELU) return variant<N, IN_TURN, K_MAJOR, K_MAJOR, FORM_GELU>();
        if constexpr (ALL)
            if (f == FORM_FLOAT) return variant<N, IN_TURN, K_MAJOR, K_MAJOR, FORM_FLOAT>();
    }
    if (!a_mn && b_mn) {
        if (f == FORM_ELEM) return variant<N, IN_TURN, K_MAJOR, MN_MAJOR, FORM_ELEM>();
        if (f == FORM_DGELU) return variant<N, IN_TURN, K_MAJOR, MN_MAJOR, FORM_DGELU>();
        if constexpr (ALL)
            if (f == FORM_FLOAT) return variant<N, IN_TURN, K_MAJOR, MN_MAJOR, FORM_FLOAT>();
    }
    if (a_mn && b_mn && f == FORM_FLOAT) return variant<N, IN_TURN, MN_MAJOR, MN_MAJOR, FORM_FLOAT>();
    if constexpr (ALL) {
        if (a_mn && b_mn && f == FORM_ELEM) return variant<N, IN_TURN, MN_MAJOR, MN_MAJOR, FORM_ELEM>();
        if (a_mn && !b_mn && f == FORM_ELEM) return variant<N, IN_TURN, MN_MAJOR, K_MAJOR, FORM_ELEM>();
        if (a_mn && !b_mn && f == FORM_FLOAT) return variant<N, IN_TURN, MN_MAJOR, K_MAJOR, FORM_FLOAT>();
    }
    return {NULL, 0};
}
static const unsigned tile_n[OWN_TILES + 1] = {0, 192, 160, 256};
static Variant variant_for(const Product *p, int tile) {
    const bool plain = p->epilogue == EPI_NONE || p->epilogue == (p->c_float ? EPI_BIAS_GRAD : EPI_BIAS);
    const Form f = p->epilogue == EPI_BIAS_GELU ? FORM_GELU : p->epilogue == EPI_DGELU ? FORM_DGELU : p->c_float ? FORM_FLOAT : FORM_ELEM;
    if (!plain && (p->c_float || (f != FORM_GELU && f != FORM_DGELU))) return {NULL, 0};
    if (tile == 1) return variant_of<192, true, true>(f, p->a_transposed, !p->b_transposed);
    if (tile == 2) return variant_of<160, true, false>(f, p->a_transposed, !p->b_transposed);
    if (tile == 3) return variant_of<256, false, false>(f, p->a_transposed, !p->b_transposed);
    return {NULL, 0};
}

size_t own_workspace(const Product *p, OwnChoice o) {
    return o.splits > 1 ? (size_t)o.splits * (p->M * p->N + (p->epilogue == EPI_BIAS_GRAD ? round_up(p->M, (size_t)8) : 0)) * sizeof(float) : 0;
}

bool own_takes(const CudaBackend *cuda, const Product *p, OwnChoice o) {
    const size_t most = (size_t)1 << 30;
    return cuda->options.own_products != OWN_OFF && cuda->capability == 90 && variant_for(p, o.tile).kernel && p->a_row % 8 == 0 && p->b_row % 8 == 0 && p->c_row % 8 == 0 &&
           p->N % 8 == 0 && p->M <= most && p->N <= most && p->K <= most && o.splits >= 1 && o.splits <= MOST_SPLITS && (size_t)o.splits <= ceil_div(p->K, (size_t)DEPTH) &&
           (o.splits == 1 || p->c_float) && ceil_div(p->M, (size_t)(2 * M_TILE)) * ceil_div(p->N, (size_t)tile_n[o.tile]) * o.splits <= most;
}

/* Clusters that run at once: a pair of multiprocessors each, or what the driver says of this GPU (a part of one may hold fewer). */
static unsigned clusters_of(const CudaBackend *cuda) {
    const int pairs = cuda->sm_count > 1 ? cuda->sm_count / PAIR : 1;
#ifdef LLMC_EMU
    return (unsigned)pairs;
#else
    static int asked = -1, held;      /* of which GPU; the answer */
    if (asked != cuda->options.ordinal) {
        const Variant v = variant<192, true, K_MAJOR, K_MAJOR, FORM_ELEM>();
        launch_prepare((const void *)v.kernel, "matmul_hopper_kernel", v.shared);
        cudaLaunchAttribute cluster = {};
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = PAIR, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3((unsigned)(PAIR * pairs)), config.blockDim = dim3(THREADS), config.dynamicSmemBytes = v.shared, config.attrs = &cluster, config.numAttrs = 1;
        cuda_check(cudaOccupancyMaxActiveClusters(&held, (const void *)v.kernel, &config), "asking how many clusters fit");
        asked = cuda->options.ordinal;
    }
    return (unsigned)(held < 1 ? 1 : held < pairs ? held : pairs);
#endif
}

/* Rounds of all clusters times the longest part, in cycles of the tensor cores (a stage: 4 N of them) with 4 stages for filling the ring; and for more than one
 * part the partial sums' bytes, written and read at 2,500 a cycle (4.3 TB/s). The least of that; the fewer where equal. A function of shape and GPU. */
static int splits_for(const CudaBackend *cuda, const Product *p, int tile) {
    const size_t depth = ceil_div(p->K, (size_t)DEPTH), clusters = clusters_of(cuda);
    const size_t tiles = ceil_div(p->M, (size_t)(2 * M_TILE)) * ceil_div(p->N, (size_t)tile_n[tile]);
    double least = INFINITY;
    int best = 1;
    for (int s = 1; s <= (p->c_float ? MOST_SPLITS : 1) && (size_t)s <= depth; s++) {
        const size_t bytes = own_workspace(p, OwnChoice{tile, s});
        const double cycles = (double)ceil_div(tiles * s, clusters) * (double)(ceil_div(depth, (size_t)s) + 4) * 4 * tile_n[tile] + (double)bytes * 2 / 2500;
        if (bytes <= OWN_WORKSPACE && cycles < least) least = cycles, best = s;
    }
    return best;
}

int own_choices(const CudaBackend *cuda, const Product *p, OwnChoice choices[OWN_TILES]) {
    int n = 0;
    for (int tile = 1; tile <= OWN_TILES; tile++)
        if (own_takes(cuda, p, {tile, 1})) choices[n++] = {tile, splits_for(cuda, p, tile)};
    return n;
}

/* ---- launches -------------------------------------------------------------------------------------------------------------------------------------- */

/* Of a matrix that is stored (rows, columns) in rows of `row`: boxes of 64 columns, or 32, and `box_rows` rows. */
static TensorMap map_of(const elem *x, size_t rows, size_t columns, size_t row, unsigned box_rows, unsigned box_columns = 64) {
    const size_t dim[2] = {columns, rows}, stride = row * sizeof(elem);
    const unsigned box[2] = {box_columns, box_rows};
    return tensor_map(x, 2, dim, &stride, box, box_columns == 64 ? SWIZZLE_128 : SWIZZLE_64);
}

static void sum_splits(CudaBackend *cuda, float *c, const float *partial, size_t M, size_t N, size_t row, size_t c_row, int splits, bool add) {
    const dim3 grid((unsigned)ceil_div(M * (row / 4), (size_t)256)), block(256);
    if (add) LAUNCH(split_sum_kernel<true>, grid, block, 0, cuda->stream, c, partial, M, N, row, c_row, (unsigned)splits);
    else LAUNCH(split_sum_kernel<false>, grid, block, 0, cuda->stream, c, partial, M, N, row, c_row, (unsigned)splits);
}

void own_issue(CudaBackend *cuda, const Product *p, OwnChoice choice, const Operands *o, void *workspace) {
#ifdef LLMC_EMU
    emu::own_product_begin((double)p->M * (double)p->N * (double)p->K);
#endif
    const Variant v = variant_for(p, choice.tile);
    const unsigned N = tile_n[choice.tile];
    const bool split = choice.splits > 1, grad = p->epilogue == EPI_BIAS_GRAD;
    const size_t M = p->M, row = p->N;
    float *partial = (float *)workspace, *partial_grad = split ? partial + choice.splits * M * row : NULL;
    Work w = {};
    w.M = (unsigned)M, w.N = (unsigned)p->N, w.pairs = (unsigned)ceil_div(M, (size_t)(2 * M_TILE)), w.across = (unsigned)ceil_div(p->N, (size_t)N);
    w.splits = (unsigned)choice.splits, w.depth = (unsigned)ceil_div(p->K, (size_t)DEPTH);
    w.c = split ? partial : o->c, w.c_row = split ? row : p->c_row, w.c_split = M * row, w.grad_split = round_up(M, (size_t)8), w.add = p->add && !split;
    w.bias = p->epilogue == EPI_BIAS || p->epilogue == EPI_BIAS_GELU ? o->bias : NULL, w.aux = o->aux;
    w.bias_grad = !grad ? NULL : split ? partial_grad : o->bias_grad;
    const TensorMap a = p->a_transposed ? map_of(o->a, p->K, M, p->a_row, DEPTH) : map_of(o->a, M, p->K, p->a_row, M_TILE);
    const TensorMap b = p->b_transposed ? map_of(o->b, p->N, p->K, p->b_row, N / 2) : map_of(o->b, p->K, p->N, p->b_row, DEPTH / 2, N % 64 ? 32 : 64);
    const unsigned items = w.pairs * w.across * w.splits, clusters = clusters_of(cuda);
    launch_named("matmul_hopper_kernel", v.kernel, PAIR, dim3(PAIR * (items < clusters ? items : clusters)), dim3(THREADS), v.shared, cuda->stream, a, b, w);
    if (split) sum_splits(cuda, (float *)o->c, partial, M, p->N, row, p->c_row, choice.splits, p->add);
    if (split && grad) sum_splits(cuda, o->bias_grad, partial_grad, 1, M, round_up(M, (size_t)8), M, choice.splits, false);
#ifdef LLMC_EMU
    emu::own_product_end(cuda->stream, o->c, p->c_float);
#endif
}

#else /* fp32: none */
size_t own_workspace(const Product *, OwnChoice) { return 0; }
bool own_takes(const CudaBackend *, const Product *, OwnChoice) { return false; }
int own_choices(const CudaBackend *, const Product *, OwnChoice[OWN_TILES]) { return 0; }
void own_issue(CudaBackend *, const Product *, OwnChoice, const Operands *, void *) { CHECK(false, "a product of our own in fp32"); }
#endif

const char *own_tile(int tile) {
    static const char *const names[OWN_TILES + 1] = {"none", "128x192", "128x160", "128x256"};
    return names[tile];
}

} /* namespace */
