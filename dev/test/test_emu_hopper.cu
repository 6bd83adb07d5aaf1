/* The emulator's twins of Hopper's instructions (llmc/cuda/hopper.cuh) against plain computations: products in every major-ness and swizzle, descriptors
 * as the manual's examples write them, copies through tensor maps against the published pattern, barriers, clusters; and what is a fault. A whole pipeline
 * and its planted bugs: test_planted. Compiled by nvcc the same instructions on a GPU: whether the twins are right. Plain C takes this file too. */
#include "dev/test/emu_kit.h"
#if defined LLMC_EMU || defined __CUDACC__
#include "llmc/base/rng.h"
#include "llmc/cuda/hopper.cuh"
#include <time.h>

namespace LLMC_NS {

static void fill_whole(Device<elem> &x, size_t n, uint32_t seed) {
    for (size_t i = 0; i < n; i++) x[i] = to_elem((float)(rng_u32(seed, 0, 0, (uint64_t)i) % 17) - 8);
}
/* A row-major matrix, in boxes that are panels of `rows` rows. */
static TensorMap matrix_map(const elem *p, size_t rows, size_t columns, TileSwizzle swizzle) {
    const size_t dim[2] = {columns, rows}, stride = columns * sizeof(elem);
    const unsigned box[2] = {swizzle_span(swizzle) / 2, (unsigned)rows};
    return tensor_map(p, 2, dim, &stride, box, swizzle);
}

static uint16_t &bits(elem &x) { return *(uint16_t *)(void *)&x; }

/* ---- wgmma ------------------------------------------------------------------------------------------------------------------------------ */

static const int K = 64, A_TILE = 64 * K * 2, B_TILE = 256 * K * 2;
__device__ static void load_tile(unsigned char *tile, const TensorMap &map, uint64_t *barrier, unsigned rows, unsigned columns, unsigned span) {
    for (unsigned c = 0; c * 2 < columns * 2; c += span / 2) tma_load(tile + c / (span / 2) * rows * span, map, barrier, (int)c, 0);
}
/* c (64, 2 R) = 1 + A B over k = 0 .. 63, then A B anew (accumulate off) plus itself once more if twice. A (64, K) or, M-major, (K, 64); B (N, K) or, N-major, (K, N). */
template <TileSwizzle S, Major A, Major B, int R, bool REGISTERS>
__global__ void product_kernel(float *out, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, const elem *plain_a, bool anew) {
    DYNAMIC_SHARED(unsigned char, shared);
    unsigned char *tile_b = shared + A_TILE;
    uint64_t *barrier = (uint64_t *)(void *)(tile_b + B_TILE);
    const unsigned span = swizzle_span(S), N = 2 * R, rows_a = 64, rows_b = B == K_MAJOR ? N : 64;
    const unsigned columns_a = 64, columns_b = B == K_MAJOR ? 64 : N; /* K is 64 too */
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = 16 * warp + lane / 4, column = lane % 4 * 2;
    if (threadIdx.x == 0) mbarrier_init(barrier, 1), fence_mbarrier_init();
    __syncthreads();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(barrier, 2 * (rows_a * columns_a + rows_b * ceil_div(columns_b * 2, span) * span / 2));
        load_tile(shared, a, barrier, rows_a, columns_a, span), load_tile(tile_b, b, barrier, rows_b, columns_b, span);
    }
    mbarrier_wait(barrier, 0);
    const uint64_t da = tile_descriptor<S, A>(shared_address(shared), rows_a), db = tile_descriptor<S, B>(shared_address(tile_b), rows_b);
    float d[R];
    uint32_t f[K / 16][4];
    UNROLL for (int i = 0; i < R; i++) d[i] = 1;
    if constexpr (REGISTERS) {
        UNROLL for (int k = 0; k < K; k += 16)
            UNROLL for (int i = 0; i < 4; i++) memcpy(&f[k / 16][i], plain_a + (row + i % 2 * 8) * K + k + column + i / 2 * 8, 4);
    }
    wgmma_fence(d);
    UNROLL for (unsigned k = 0; k < K; k += 16) {
        const uint64_t b_now = db + (tile_advance<S, B>(rows_b, k) >> 4);
        if constexpr (REGISTERS) wgmma_rs<B>(d, f[k / 16], b_now, !anew || k);
        else wgmma_ss<A, B>(d, da + (tile_advance<S, A>(rows_a, k) >> 4), b_now, !anew || k);
    }
    wgmma_commit();
    wgmma_wait<0>(d);
    UNROLL for (int i = 0; i < R; i++) out[(row + i / 2 % 2 * 8) * (int)N + i / 4 * 8 + column + i % 2] = d[i];
}
template <TileSwizzle S, Major A, Major B, int R, bool REGISTERS> static void check_product() {
    const int N = 2 * R;
    Device<elem> a(64 * K), b((size_t)N * K);
    Device<float> out((size_t)64 * N);
    fill_whole(a, 64 * K, 1), fill_whole(b, (size_t)N * K, 2);
    const TensorMap from_a = A == K_MAJOR ? matrix_map(a.p, 64, K, S) : matrix_map(a.p, K, 64, S), from_b = B == K_MAJOR ? matrix_map(b.p, (size_t)N, K, S) : matrix_map(b.p, K, (size_t)N, S);
    for (int anew = 0; anew < 2; anew++) {
        run_hopper(1, 1, 128, A_TILE + B_TILE + 8, product_kernel<S, A, B, R, REGISTERS>, out.p, from_a, from_b, (const elem *)a.p, anew == 1);
        EXPECT(!faults.n, "swizzle %d, majors %d %d, N %d: %s", S, A, B, N, faults.text);
        int wrong = 0;
        for (int m = 0; m < 64; m++)
            for (int n = 0; n < N; n++) {
                float want = anew ? 0 : 1;
                for (int k = 0; k < K; k++) want += to_float(A == K_MAJOR ? a[(size_t)(m * K + k)] : a[(size_t)(k * 64 + m)]) * to_float(B == K_MAJOR ? b[(size_t)(n * K + k)] : b[(size_t)(k * N + n)]);
                wrong += out[(size_t)(m * N + n)] != want;
            }
        EXPECT(!wrong, "swizzle %d, majors %d %d, N %d, registers %d: %d of %d wrong", S, A, B, N, REGISTERS, wrong, 64 * N);
    }
}
template <TileSwizzle S, int R> static void check_majors() {
    check_product<S, K_MAJOR, K_MAJOR, R, false>(), check_product<S, K_MAJOR, MN_MAJOR, R, false>(), check_product<S, MN_MAJOR, K_MAJOR, R, false>();
    check_product<S, MN_MAJOR, MN_MAJOR, R, false>(), check_product<S, K_MAJOR, K_MAJOR, R, true>(), check_product<S, K_MAJOR, MN_MAJOR, R, true>();
}
TEST(wgmma_is_the_product) {
    check_majors<SWIZZLE_128, 4>(), check_majors<SWIZZLE_128, 12>(), check_majors<SWIZZLE_128, 32>(), check_majors<SWIZZLE_128, 48>(), check_majors<SWIZZLE_128, 128>();
    check_majors<SWIZZLE_64, 8>(), check_majors<SWIZZLE_64, 64>(), check_majors<SWIZZLE_32, 16>(), check_majors<SWIZZLE_32, 80>();
    check_majors<SWIZZLE_NONE, 4>(), check_majors<SWIZZLE_NONE, 96>();
}

/* The manual's examples of N-major bf16 tiles (section Canonical Layouts): the exact layout as a formula, LBO and SBO as its tables have them. Threads write. */
struct Example { int swizzle_bits; uint64_t layout; unsigned lbo, sbo, panel, chunk, mn_stride, k_stride, k8_stride; };
template <int N> __global__ void example_kernel(float *out, const elem *a, const elem *b, Example e) {
    DYNAMIC_SHARED(unsigned char, shared);
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, column = lane % 4 * 2;
    for (int i = threadIdx.x; i < N * 16; i += 128) {
        const unsigned n = i % N, k = i / N; /* ((8, c, m), (8, 2)) : ((1, 8, mn_stride), (k_stride, k8_stride)), elements; then the swizzle of the bytes */
        unsigned x = 2 * (n % 8 + n / 8 % e.chunk * 8 + n / 8 / e.chunk * e.mn_stride + k % 8 * e.k_stride + k / 8 * e.k8_stride);
        x ^= (x >> 3) & (((1u << e.swizzle_bits) - 1) << 4);
        *(elem *)(void *)(shared + x) = b[k * N + n];
    }
    fence_proxy_async();
    __syncthreads();
    uint32_t f[4];
    float d[N / 2];
    UNROLL for (int i = 0; i < 4; i++) memcpy(&f[i], a + (row + i % 2 * 8) * 16 + column + i / 2 * 8, 4);
    const uint64_t desc = shared_address(shared) >> 4 | (uint64_t)e.lbo << 16 | (uint64_t)e.sbo << 32 | e.layout << 62;
    wgmma_fence(d);
    wgmma_rs<MN_MAJOR>(d, f, desc, false);
    wgmma_commit();
    wgmma_wait<0>(d);
    UNROLL for (int i = 0; i < N / 2; i++) out[(row + i / 2 % 2 * 8) * N + i / 4 * 8 + column + i % 2] = d[i];
}
template <int N> static void check_example(const Example &e) {
    Device<elem> a(64 * 16), b(64 * 16);
    Device<float> out(64 * 64);
    fill_whole(a, 64 * 16, 3), fill_whole(b, 64 * 16, 4);
    run_hopper(1, 1, 128, 4096, example_kernel<N>, out.p, (const elem *)a.p, (const elem *)b.p, e);
    EXPECT(!faults.n, "%s", faults.text);
    for (int m = 0; m < 64; m++)
        for (int n = 0; n < N; n++) {
            float want = 0;
            for (int k = 0; k < 16; k++) want += to_float(a[(size_t)(m * 16 + k)]) * to_float(b[(size_t)(k * N + n)]);
            EXPECT(out[(size_t)(m * N + n)] == want, "N %d: (%d, %d) %g, want %g", N, m, n, (double)out[(size_t)(m * N + n)], (double)want);
        }
}
TEST(descriptors_as_in_the_manual) {
    check_example<16>({0, 0, 16, 8, 0, 1, 64, 8, 128});
    check_example<32>({1, 3, 16, 32, 0, 2, 128, 16, 256});
    check_example<64>({2, 2, 32, 64, 0, 4, 256, 32, 512});
}

/* Two groups under way: sums hold poison until their own wait; the older one's is over first. */
__global__ void groups_kernel(int *seen) {
    DYNAMIC_SHARED(unsigned char, shared);
    for (unsigned i = threadIdx.x; i < 4096; i += 128) ((elem *)(void *)shared)[i] = to_elem(1);
    fence_proxy_async();
    __syncthreads();
    const uint64_t d = tile_descriptor<SWIZZLE_128, K_MAJOR>(shared_address(shared), 64);
    float x[4], y[4];
    wgmma_fence(x, y);
    wgmma_ss<K_MAJOR, K_MAJOR>(x, d, d, false), wgmma_commit();
    wgmma_ss<K_MAJOR, K_MAJOR>(y, d, d, false), wgmma_ss<K_MAJOR, K_MAJOR>(y, d, d, true), wgmma_commit();
#ifdef LLMC_EMU /* where hardware promises nothing there is poison */
    int s = isnan(x[3]) + 2 * isnan(y[3]);
#else
    int s = 3;
#endif
    wgmma_wait<1>(x);
    s += 4 * (x[3] == 16);
#ifdef LLMC_EMU
    s += 8 * isnan(y[0]);
#else
    s += 8;
#endif
    wgmma_wait<0>(y);
    seen[threadIdx.x] = s + 16 * (y[1] == 32);
}
TEST(groups_of_wgmma_end_in_order) {
    Device<int> seen(128);
    for (const char *s : {"ascending", "reversed", "in-turn,early"}) {
        use_schedule(s);
        run_hopper(1, 1, 128, 8192, groups_kernel, seen.p);
        for (size_t i = 0; i < 128; i++) EXPECT(!faults.n && seen[i] == 31, "%s: thread %zu: %d %s", s, i, seen[i], faults.text);
    }
    use_schedule("");
}

/* ---- tiles and copies --------------------------------------------------------------------------------------------------------------------- */

/* The published pattern: rows of `span` bytes; their chunks exchanged by the number of the 128-byte line. */
static unsigned published(unsigned span, unsigned row, unsigned column) {
    const unsigned chunk = column / 8, line = row * span / 128, turn = span == 128 ? line % 8 : span == 64 ? line % 4 : span == 32 ? line % 2 : 0;
    return row * span + (chunk ^ turn) * 16 + column % 8 * 2;
}
TEST(places_in_a_tile) {
    for (TileSwizzle s : {SWIZZLE_NONE, SWIZZLE_32, SWIZZLE_64, SWIZZLE_128})
        for (unsigned rows : {8u, 24u, 64u})
            for (unsigned row = 0; row < rows; row++)
                for (unsigned column = 0; column < 128; column++) {
                    const unsigned span = swizzle_span(s), width = span / 2, at = tile_place(s, rows, row, column);
                    EXPECT(at == column / width * rows * span + published(span, row, column % width), "swizzle %d: (%u, %u) at %u", s, row, column, at);
                }
    EXPECT((tile_descriptor<SWIZZLE_128, K_MAJOR>(0x12340, 64)) == (0x1234u | 1ull << 16 | 64ull << 32 | 1ull << 62), "K-major");
    EXPECT((tile_descriptor<SWIZZLE_128, MN_MAJOR>(0x400, 64)) == (0x40u | 512ull << 16 | 64ull << 32 | 1ull << 62), "MN-major");
}

/* One box of rank R in and, elsewhere, out again; the shared memory as it is, to `raw`. */
template <int R> __global__ void box_kernel(elem *raw, const __grid_constant__ TensorMap from, const __grid_constant__ TensorMap to, int n, int c0, int c1, int c2, int c3) {
    DYNAMIC_SHARED(elem, shared);
    uint64_t *barrier = (uint64_t *)(void *)(shared + n);
    if (threadIdx.x) return;
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(barrier, 2 * n);
    if constexpr (R == 2) tma_load(shared, from, barrier, c0, c1);
    if constexpr (R == 3) tma_load(shared, from, barrier, c0, c1, c2);
    if constexpr (R == 4) tma_load(shared, from, barrier, c0, c1, c2, c3);
    mbarrier_wait(barrier, 0);
    for (int i = 0; i < n; i++) raw[i] = shared[i];
    if constexpr (R == 2) tma_store(to, shared, c0, c1);
    if constexpr (R == 3) tma_store(to, shared, c0, c1, c2);
    if constexpr (R == 4) tma_store(to, shared, c0, c1, c2, c3);
    bulk_commit();
    bulk_wait<0>();
}
template <int R> static void check_box(TileSwizzle s, const int (&at)[4]) {
    const size_t dim[4] = {44, 11, R > 2 ? 3u : 1u, R > 3 ? 3u : 1u}, total = 48 * dim[1] * dim[2] * dim[3]; /* rows of 48, of which 44 count */
    const size_t stride[3] = {96, 96 * dim[1], 96 * dim[1] * dim[2]};
    const unsigned span = swizzle_span(s), box[4] = {span / 2, 8, R > 2 ? 2u : 1u, R > 3 ? 2u : 1u}, n = box[0] * box[1] * box[2] * box[3];
    Device<elem> x(total), y(total), raw(n);
    for (size_t i = 0; i < total; i++) bits(x[i]) = (uint16_t)(i + 1), bits(y[i]) = 0xdead;
    run_hopper(1, 1, 32, 2 * n + 8, box_kernel<R>, raw.p, tensor_map(x.p, R, dim, stride, box, s), tensor_map(y.p, R, dim, stride, box, s), (int)n, at[0], at[1], at[2], at[3]);
    EXPECT(!faults.n, "%s", faults.text);
    size_t stored = 0;
    for (unsigned i = 0; i < n; i++) {
        const unsigned column = i % box[0], row = i / box[0], in[4] = {column, row % box[1], row / box[1] % box[2], row / box[1] / box[2]};
        size_t place = 0;
        bool within = true;
        for (int d = 0; d < 4; d++) {
            const long c = at[d] + (long)in[d];
            within = within && c >= 0 && c < (long)dim[d];
            place += (size_t)c * (d ? stride[d - 1] / 2 : 1);
        }
        const uint16_t want = within ? bits(x[place]) : 0, found = bits(raw[published(span, row, column) / 2]);
        EXPECT(found == want, "rank %d, swizzle %d: element %u is %u, want %u", R, s, i, found, want);
        if (within) { EXPECT(bits(y[place]) == want, "stored"); bits(y[place]) = 0xdead; stored++; }
    }
    for (size_t i = 0; i < total; i++) EXPECT(bits(y[i]) == 0xdead, "rank %d: element %zu was written", R, i);
    EXPECT(stored || at[1] > 10, "nothing within");
}
TEST(boxes_of_tensors) {
    for (int early = 0; early < 2; early++) {
        use_schedule(early ? "early" : "");
        for (TileSwizzle s : {SWIZZLE_NONE, SWIZZLE_32, SWIZZLE_64, SWIZZLE_128})
            for (int c0 : {0, 8, 40, -3})
                for (int c1 : {0, 6, -5, 11})
                    check_box<2>(s, {c0, c1, 0, 0}), check_box<3>(s, {c0, c1, 2, 0}), check_box<4>(s, {c0, c1, -1, 1});
    }
    use_schedule("");
}

__global__ void linear_kernel(float *out, const float *in, int *seen) {
    DYNAMIC_SHARED(float, shared);
    uint64_t *barrier = (uint64_t *)(void *)(shared + 64);
    if (threadIdx.x == 0) {
        mbarrier_init(barrier, 2);
        mbarrier_arrive_expect(barrier, 256);
        bulk_load(shared, in, 128, barrier), bulk_load(shared + 32, in + 32, 128, barrier);
        seen[0] = isnan(shared[0]);        /* as seen[2] and [3] on the emulator alone */
        mbarrier_arrive(barrier);
        mbarrier_wait(barrier, 0);
        seen[1] = shared[0] == in[0] && shared[63] == in[63];
        mbarrier_wait(barrier, 1 ^ 1); /* still */
        shared[5] = 55;
        fence_proxy_async();
        bulk_store(out, shared, 256);
        bulk_commit();
        seen[2] = isnan(out[5]);
        bulk_wait_read<0>();
        seen[3] = isnan(out[5]);
        bulk_wait<0>();
        seen[4] = out[5] == 55;
    }
}
TEST(plain_bytes_late_and_early) {
    Device<float> in(64), out(64);
    Device<int> seen(5);
    for (int i = 0; i < 64; i++) in[(size_t)i] = (float)i;
    for (int early = 0; early < 2; early++) {
        use_schedule(early ? "early" : "");
        for (size_t i = 0; i < 64; i++) out[i] = NAN;
        run_hopper(1, 1, 32, 512 + 8, linear_kernel, out.p, (const float *)in.p, seen.p);
#ifndef LLMC_EMU
        seen[0] = seen[2] = seen[3] = !early;
#endif
        EXPECT(!faults.n && seen[0] == !early && seen[1] && seen[2] == !early && seen[3] == !early && seen[4] && out[63] == 63, "early %d: %d %d %d %d %d %s", early, seen[0], seen[1], seen[2],
               seen[3], seen[4], faults.text);
    }
    use_schedule("");
}

/* ---- threads ------------------------------------------------------------------------------------------------------------------------------- */

/* A ring of two slots between a warp that fills and one that empties, a barrier each way; named barriers do the same a second time. */
__global__ void ring_kernel(int *out, int steps, bool named) {
    DYNAMIC_SHARED(int, slots);
    uint64_t *full = (uint64_t *)(void *)(slots + 64), *empty = full + 2;
    if (threadIdx.x < 2) mbarrier_init(&full[threadIdx.x], 32), mbarrier_init(&empty[threadIdx.x], 32);
    __syncthreads();
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < steps; i++) {
        const unsigned s = i % 2, phase = i / 2 % 2;
        if (threadIdx.x < 32) {
            if (named) { if (i >= 2) named_sync(3 + s, 64); }
            else mbarrier_wait(&empty[s], phase ^ 1);
            slots[s * 32 + lane] = i * 100 + lane;
            if (named) named_arrive(1 + s, 64);
            else mbarrier_arrive(&full[s]);
        } else {
            if (named) named_sync(1 + s, 64);
            else mbarrier_wait(&full[s], phase);
            out[i * 32 + lane] = slots[s * 32 + 31 - lane];
            if (named) { if (i + 2 < steps) named_arrive(3 + s, 64); }
            else mbarrier_arrive(&empty[s]);
        }
    }
}
TEST(rings_of_barriers) {
    Device<int> out(32 * 9);
    for (const char *s : {"ascending", "reversed", "ahead:1", "behind:0", "in-turn"})
        for (int named = 0; named < 2; named++) {
            use_schedule(s);
            run_hopper(1, 1, 64, 64 * 4 + 32, ring_kernel, out.p, 9, named == 1);
            for (int i = 0; i < 9 * 32; i++) EXPECT(!faults.n && out[(size_t)i] == i / 32 * 100 + 31 - i % 32, "%s, named %d: out[%d] %d %s", s, named, i, out[(size_t)i], faults.text);
        }
    use_schedule("");
}

/* Each block sends its number to the next one's slot, by a store that completes on the barrier there; and to all by multicast. */
__global__ void send_kernel(float *out, const __grid_constant__ TensorMap map, int blocks) {
    DYNAMIC_SHARED(float, shared);
    uint64_t *barrier = (uint64_t *)(void *)(shared + 1024 + 4);
    const unsigned rank = cluster_rank();
    if (threadIdx.x == 0) mbarrier_init(barrier, 1), fence_mbarrier_init();
    cluster_arrive(), cluster_wait();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(barrier, 4 + 128 * (unsigned)blocks);
        cluster_store_async(shared + 1024, (rank + 1) % (unsigned)blocks, (float)(10 + blockIdx.x), barrier);
        tma_load_multicast(shared + rank * 32, map, barrier, (uint16_t)((1 << blocks) - 1), 0, (int)blockIdx.x);
    }
    mbarrier_wait_cluster(barrier, 0);
    out[blockIdx.x * 32 + threadIdx.x] = shared[1024] + 100 * to_float(((elem *)(void *)shared)[threadIdx.x % (unsigned)blocks * 64 + 3]);
    cluster_arrive(), cluster_wait();
}
TEST(a_cluster_sends) {
    Device<elem> x(8 * 64);
    Device<float> out(8 * 32);
    const size_t dim[2] = {64, 8}, stride = 128;
    const unsigned box[2] = {64, 1};
    for (int i = 0; i < 512; i++) x[(size_t)i] = to_elem((float)(i / 64));
    for (int cluster : {1, 2, 4, 8})
        for (const char *s : {"ascending", "reversed", "ahead:1", "in-turn,early", "apart"}) {
            use_schedule(s);
            run_hopper((unsigned)cluster, 8, 32, 8192, send_kernel, out.p, tensor_map(x.p, 2, dim, &stride, box, SWIZZLE_NONE), cluster);
            for (int i = 0; i < 256; i++) {
                const int block = i / 32, first = block / cluster * cluster, sender = first + (block - first + cluster - 1) % cluster;
                const float want = (float)(10 + sender + 100 * (first + i % 32 % cluster));
                EXPECT(!faults.n && out[(size_t)i] == want, "cluster %d, %s: out[%d] %g, want %g %s", cluster, s, i, (double)out[(size_t)i], (double)want, faults.text);
            }
        }
    use_schedule("");
}

#ifdef LLMC_EMU /* what only the emulator notices */

/* Two blocks, launched early. Thread 0 of each copies x to y; `which` says what is done, and when. */
__global__ void early_kernel(float *y, const float *x, int which) {
    DYNAMIC_SHARED(float, shared);
    const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    shared[threadIdx.x] = which == 1 && threadIdx.x == 7 ? x[i] : 0; /* read too soon: NaN, whatever the schedule */
    if (which == 2 && threadIdx.x == 7) y[i] = 1;
    if (which == 3 && blockIdx.x == 1) return;
    if (which == 4) return;
    if (which != 5 || threadIdx.x == 0) begin_kernel();
    __syncthreads();                           /* 5: one waits for all, who may then read and write */
    if (which == 6) begin_kernel();            /* again */
    y[i] = x[i] + shared[threadIdx.x];
}
TEST(launched_before_the_kernel_in_front_has_ended) {
    const char *const expected[] = {"", "", "is written before begin_kernel()", "block 1,0,0 of a kernel that is launched early ends without",
                                    "launched early ends without begin_kernel()", "", "a second time"};
    Device<float> x(128), y(128);
    for (const char *s : {"ascending", "reversed", "ahead:1", "behind:0", "in-turn,early", "apart"})
        for (int which = 0; which < 7; which++) {
            use_schedule(s);
            for (size_t i = 0; i < 128; i++) x[i] = (float)i, y[i] = -1;
            faults.n = 0, faults.text[0] = 0;
            early_launch = true;
            launch_named(test_name, early_kernel, 1, dim3(2), dim3(64), 256, stream, y.p, (const float *)x.p, which);
            cudaStreamSynchronize(stream);
            early_launch = false;
            EXPECT(faults.n == (*expected[which] != 0) && strstr(faults.text, expected[which]), "%s, %d: %d faults: %s", s, which, faults.n, faults.text);
            if (faults.n) continue;
            int wrong = 0, nan = 0;
            for (size_t i = 0; i < 128; i++) wrong += !(y[i] == (float)i * (which == 1 && i % 64 == 7 ? 2 : 1)), nan += isnan(y[i]) || x[i] != (float)i;
            EXPECT(wrong == (which == 1) && nan == (which == 1), "%s, %d: %d wrong, %d NaN", s, which, wrong, nan); /* of the block that ran first */
        }
    use_schedule("");
}

/* ---- faults ---------------------------------------------------------------------------------------------------------------------------------- */

__global__ void bad_kernel(const __grid_constant__ TensorMap map, elem *global, int which) {
    DYNAMIC_SHARED(unsigned char, shared);
    uint64_t *barrier = (uint64_t *)(void *)(shared + 16384), *other = barrier + 1;
    const bool first = threadIdx.x == 0;
    const uint64_t k = tile_descriptor<SWIZZLE_128, K_MAJOR>(shared_address(shared), 64);
    float d[4] = {0, 0, 0, 0};
    uint32_t f[4] = {0, 0, 0, 0};
    if (first) mbarrier_init(barrier, 1);
    __syncthreads();
    if (first && which == 0) mbarrier_wait(other, 0);
    if (first && which == 1) mbarrier_init(barrier, 2);
    if (first && which == 2) *barrier = 0, mbarrier_arrive(barrier);
    if (first && which == 3) mbarrier_arrive_expect(barrier, 8), mbarrier_arrive(barrier);
    if (which == 4) mbarrier_wait(barrier, 0);
    if (first && which == 5) tma_load(shared + 128, map, barrier, 0, 0);
    if (first && which == 6) tma_load(shared, map, barrier, 0, 0, 0);
    if (first && which == 7) bulk_load(shared, global, 24, barrier);
    if (first && which == 8) bulk_load(shared, global + 4, 16, barrier);
    if (first && which == 9) tma_load(shared, map, barrier, 0, 0);
    if (first && which == 10) bulk_store(global, shared, 16), bulk_commit();
    if (which == 11) wgmma_fence(d), wgmma_ss<K_MAJOR, K_MAJOR>(d, threadIdx.x < 64 ? k : k + 64, k, false), wgmma_commit(), wgmma_wait<0>(d);
    if (which == 12) wgmma_fence(d), wgmma_ss<K_MAJOR, K_MAJOR>(d, k + 8, k, false);
    if (which == 13) wgmma_fence(d), wgmma_ss<K_MAJOR, K_MAJOR>(d, k + 7, k, false);
    if (which == 14) wgmma_fence(d), wgmma_ss<K_MAJOR, K_MAJOR>(d, k, k, false), wgmma_wait<0>(d);
    if (which == 15) wgmma_fence(d), wgmma_ss<K_MAJOR, K_MAJOR>(d, k, k, false), wgmma_commit();
    if (which == 16) wgmma_fence(d), wgmma_ss<K_MAJOR, K_MAJOR>(d, k, k, false), wgmma_commit(), d[2] = 0, wgmma_wait<0>(d);
    if (which == 17 && threadIdx.x < 96) wgmma_fence(d), wgmma_ss<K_MAJOR, K_MAJOR>(d, k, k, false), wgmma_commit(), wgmma_wait<0>(d);
    if (which == 18) shared[threadIdx.x * 16] = 1, wgmma_fence(d), wgmma_ss<K_MAJOR, K_MAJOR>(d, k, k, false), wgmma_commit(), wgmma_wait<0>(d);
    if (which == 19) registers_more<232>(), registers_fewer<20>();
    if (which == 20 && threadIdx.x < 64) registers_fewer<40>();
    if (which == 21 && threadIdx.x < 40) named_sync(1, 96);
    if (which == 22) named_sync(1, threadIdx.x < 32 ? 64 : 96);
    if (which == 23) named_sync(0, 128);
    if (which == 24) cluster_wait();
    if (which == 25) cluster_arrive();
    if (which == 26) cluster_store((float *)(void *)shared, 1, 0);
    if (which == 27 && first) named_arrive(2, 32);
    if (which == 28 && first) mbarrier_arrive_expect(barrier, 1 << 20);
    if (which == 29) wgmma_fence(d), wgmma_ss<K_MAJOR, K_MAJOR>(d, k | 1ull << 49, k, false);
    if (which == 30) wgmma_fence(d), wgmma_rs<K_MAJOR>(d, f, k, false), wgmma_commit(), f[3] = 1, wgmma_wait<0>(d);
}
TEST(what_hardware_would_refuse) {
    const char *const expected[] = {"no mbarrier was initialised at byte 16392", "mbarrier_init: twice", "was written over", "more arrivals than the 1",
                                    "warp 0: mbarrier at byte 16384, parity 0, lacks 1 of 1 arrivals", "shared address is not aligned to 1024", "3 coordinates for a tensor of rank 2",
                                    "bulk_load: 24 bytes", "global side: address", "1 copies to shared memory are under way at the end", "bulk_wait_read<0>",
                                    "the threads of a warpgroup are at different ones", "not at the pattern of a swizzle", "leave the span of 128", "wgmma_wait before wgmma_commit",
                                    "1 wgmma not waited for", "register 2 of the sums was written before", "wgmma_wait, until all its warpgroup has issued", "no fence_proxy_async followed",
                                    "setmaxnreg: 20 registers", "not all threads of a warpgroup came", "named barrier 1, 40 of 96 came", "others came to it with", "barrier 0; 1 to 15",
                                    "cluster_wait without", "between cluster_arrive and", "block 1 of a cluster of 1", "named barrier 2: 1 of 32 threads came", "at most 2^20 - 1", "base offset 1",
                                    "register 3 of A was written"};
    Device<elem> x(64 * 64);
    const TensorMap map = matrix_map(x.p, 64, 64, SWIZZLE_128);
    for (int i = 0; i < (int)(sizeof expected / sizeof *expected); i++) {
        run_hopper(1, 1, 128, 16384 + 64, bad_kernel, map, x.p, i);
        EXPECT(faults.n == 1 && strstr(faults.text, expected[i]), "%d: %d faults: %s", i, faults.n, faults.text);
    }
    run(16384 + 64, 1, 128, bad_kernel, map, x.p, 99);
    EXPECT(faults.n == 1 && strstr(faults.text, "LAUNCH_HOPPER"), "%s", faults.text);
    run_hopper(1, 1, 128, 227 * 1024, bad_kernel, map, x.p, 99);
    EXPECT(faults.n == 0, "%s", faults.text);
    run_hopper(1, 1, 128, 228 * 1024, bad_kernel, map, x.p, 99);
    EXPECT(faults.n == 1 && strstr(faults.text, "233472 bytes"), "%s", faults.text);
}

/* Barriers are set up before begin_kernel(), memory is touched after it: 0: so it is, 1: a load by a thread that has not, 2: a store, 3: a plain one, 4: never. */
__global__ void begins_kernel(float *out, const __grid_constant__ TensorMap map, int where) {
    DYNAMIC_SHARED(unsigned char, shared);
    uint64_t *barrier = (uint64_t *)(void *)(shared + 8192);
    if (threadIdx.x == 0) mbarrier_init(barrier, 1), fence_mbarrier_init();
    fence_proxy_async();
    __syncthreads();
    cluster_arrive(), cluster_wait();
    if (where == 0 || (where < 4 && threadIdx.x)) begin_kernel();
    if (threadIdx.x == 0) {
        if (where == 2) tma_store(map, shared, 0, 0);
        if (where == 3) bulk_store(out, shared, 64);
        if (where < 2) mbarrier_arrive_expect(barrier, 8192), tma_load(shared, map, barrier, 0, 0), mbarrier_wait(barrier, 0);
    }
}
TEST(memory_after_begin_kernel) {
    const char *const expected[] = {NULL, "tma_load before", "tma_store before", "bulk_store before", "the end before"};
    Device<elem> x(64 * 64);
    emu::must_begin = true;
    for (int where = 0; where < 5; where++) {
        run_hopper(1, 1, 32, 8192 + 64, begins_kernel, (float *)(void *)x.p, matrix_map(x.p, 64, 64, SWIZZLE_128), where);
        EXPECT(expected[where] ? faults.n && strstr(faults.text, expected[where]) : !faults.n, "%d: %s", where, faults.text);
    }
    emu::must_begin = false;
}

/* ---- speed: reported, not tested -------------------------------------------------------------------------------------------------------------- */

__global__ void many_products_kernel(float *out, int n) {
    DYNAMIC_SHARED(unsigned char, shared);
    for (unsigned i = threadIdx.x; i < 16384; i += 128) ((elem *)(void *)shared)[i] = to_elem(1);
    fence_proxy_async();
    __syncthreads();
    const uint64_t a = tile_descriptor<SWIZZLE_128, K_MAJOR>(shared_address(shared), 64), b = tile_descriptor<SWIZZLE_128, K_MAJOR>(shared_address(shared), 128);
    float d[64];
    for (int i = 0; i < n; i++) {
        wgmma_fence(d);
        for (unsigned k = 0; k < 64; k += 16) wgmma_ss<K_MAJOR, K_MAJOR>(d, a + k / 8, b + k / 8, i + k > 0);
        wgmma_commit();
        wgmma_wait<0>(d);
    }
    out[threadIdx.x] = d[63];
}
TEST(speed) {
    Device<float> out(128);
    struct timespec begin, end;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &begin);
    run_hopper(1, 1, 128, 32768, many_products_kernel, out.p, 250);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &end);
    printf("speed: a wgmma of 64 x 128 x 16 takes %.1f us of CPU\n", ((double)(end.tv_sec - begin.tv_sec) * 1e6 + (double)(end.tv_nsec - begin.tv_nsec) * 1e-3) / 1000);
    EXPECT(!faults.n && out[127] == 250 * 64, "%s", faults.text);
}

#endif

static void run_all() {
    RUN(wgmma_is_the_product);
    RUN(descriptors_as_in_the_manual);
    RUN(groups_of_wgmma_end_in_order);
    RUN(places_in_a_tile);
    RUN(boxes_of_tensors);
    RUN(plain_bytes_late_and_early);
    RUN(rings_of_barriers);
    RUN(a_cluster_sends);
#ifdef LLMC_EMU
    RUN(launched_before_the_kernel_in_front_has_ended);
    RUN(what_hardware_would_refuse);
    RUN(memory_after_begin_kernel);
    RUN(speed);
#endif
}

} /* namespace */
#endif
