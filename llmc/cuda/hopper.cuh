/* Hopper's own instructions (sm_90a), each behind a named function: mbarrier, TMA, wgmma, setmaxnreg, named barriers, clusters. Code for other
 * architectures traps. Twins for the emulator: dev/emu/emu_hopper.h; what it checks: emu_hopper.cpp. Launched by LAUNCH_HOPPER. Section numbers
 * are of the PTX ISA manual 9.0.
 *
 * mbarrier (9.7.13.15): counts arrivals and bytes; a phase ends when both are as expected, and the next begins. mbarrier_wait(b, parity) returns once
 *   the phase of that parity is over: full barriers are waited for with 0, 1, 0 ..., and a fresh empty one passes at once with parity 1. One thread
 *   initialises, then fence_mbarrier_init() and __syncthreads() (cluster_arrive/_wait in a cluster). At most one phase may be ahead of a waiter.
 * TMA (9.7.9.25, 5.5): box dimensions and coordinates innermost first. Loads complete on an mbarrier that expects the whole box's bytes, parts
 *   outside the tensor (zeros) included. Shared addresses: 128 bytes; with a swizzle, at the pattern: 8 rows of its span.
 *   Stores: shared memory written by threads -> each writer's fence_proxy_async() -> a barrier -> one thread: tma_store, bulk_commit; the same thread
 *   bulk_wait_read<0>() before the buffer is written again or the block ends.
 * Swizzle (5.5.6; CUTLASS's Swizzle<3, 4, 3> and its sisters): tiles are panels, side by side, of `rows` rows (a multiple of 8) of `span` bytes (32, 64,
 *   128: that many bytes of a box's inner dimension; 16 without swizzle), each at its pattern. The chunk of 16 bytes at byte x of a panel lies at
 *   x ^ (x >> 7 & (span / 16 - 1)) << 4. tile_place says where element (row, column) of a tile of panels is.
 * wgmma (9.7.15): D (64, N) += A (64, 16) B (16, N) by the four warps of a warpgroup, w = 0..3, lane 4 g + t.
 *   D: d[4 j + i]: row 16 w + g + 8 (i / 2), column 8 j + 2 t + i % 2.   A in registers: a[i]: row 16 w + g + 8 (i % 2), k 2 t + 8 (i / 2) and the one after.
 *   wgmma_fence -> wgmma_... -> wgmma_commit -> wgmma_wait<N>: at most N groups are open still. wgmma_fence is due before the first wgmma on sums and
 *   whenever threads have touched registers of sums or of A; the next wgmma on the same sums needs none. Until the wait, no access to the sums
 *   or to registers of A (their array is declared where it outlives the wait: the emulator looks at it there), and none to shared memory that would
 *   change an operand. Shared memory that threads wrote: fence_proxy_async by each writer, then a barrier, before the wgmma. After a thread's wait the
 *   operands are free: all four warps' part is done.
 * Descriptor (9.7.15.5.1.2.2): bits 0-13 start / 16, 16-29 LBO / 16, 32-45 SBO / 16, 49-51 base offset (0: tiles begin at their pattern), 62-63 swizzle.
 *   K-major (rows are M or N, k runs along them): SBO from 8 rows to the next 8; LBO unused, without swizzle from 8 of k to the next 8.
 *   MN-major (rows are k): LBO from panel to panel, SBO from 8 k to the next 8; without swizzle the other way round. */
#ifndef LLMC_CUDA_HOPPER_CUH
#define LLMC_CUDA_HOPPER_CUH
#include "ptx.cuh"

namespace LLMC_NS {

/* ---- tiles and descriptors ------------------------------------------------------------------------------------------------------------- */

enum TileSwizzle { SWIZZLE_NONE = 0, SWIZZLE_128 = 1, SWIZZLE_64 = 2, SWIZZLE_32 = 3 }; /* as in a descriptor */
enum Major { K_MAJOR = 0, MN_MAJOR = 1 };
__host__ __device__ constexpr unsigned swizzle_span(TileSwizzle s) { return s == SWIZZLE_NONE ? 16 : 256u >> s; }
/* Byte of a tile's element (row, column), two bytes each: panels of `rows` rows side by side. */
__host__ __device__ constexpr unsigned tile_place(TileSwizzle s, unsigned rows, unsigned row, unsigned column) {
    const unsigned span = swizzle_span(s), x = column * 2 / span * rows * span + row * span + column * 2 % span;
    return x ^ (x >> 7 & (span / 16 - 1)) << 4;
}

/* An operand of a product: a tile of panels of `rows` rows from `tile` on (its pattern). What rows and columns are: the major-ness. */
template <TileSwizzle S, Major M> __host__ __device__ __forceinline__ uint64_t tile_descriptor(uint32_t shared_address_of_tile, unsigned rows) {
    const unsigned span = swizzle_span(S), panel = rows * span, eight = 8 * span;
    const bool leading_is_panel = (M == MN_MAJOR) == (S != SWIZZLE_NONE);
    const uint64_t leading = M == K_MAJOR && S != SWIZZLE_NONE ? 16 : leading_is_panel || M == K_MAJOR ? panel : eight;
    const uint64_t stride = M == MN_MAJOR && S == SWIZZLE_NONE ? panel : eight;
    return (uint64_t)(shared_address_of_tile >> 4 & 0x3fff) | leading >> 4 << 16 | stride >> 4 << 32 | (uint64_t)S << 62;
}
/* Bytes from a tile's start to that of its part from k on (a multiple of 16), and from its row or column mn on (K-major: a multiple of 8 rows; MN-major: of
 * a panel's columns). descriptor + (bytes >> 4) is the part's. */
template <TileSwizzle S, Major M> __host__ __device__ constexpr unsigned tile_advance(unsigned rows, unsigned k, unsigned mn = 0) {
    const unsigned span = swizzle_span(S), row = M == K_MAJOR ? mn : k, column = M == K_MAJOR ? k : mn;
    return column * 2 / span * rows * span + column * 2 % span + row * span;
}

/* ---- tensor maps ------------------------------------------------------------------------------------------------------------------------- */

/* A kernel's parameter: const __grid_constant__ TensorMap map. */
struct alignas(64) TensorMap { uint64_t opaque[16]; };
/* Of a bf16 tensor in device memory, rank 2 to 4, dimensions innermost first; stride_bytes[i]: from one element of dimension i + 1 to the next, multiples of 16;
 * box: elements of each dimension, at most 256, the inner one exactly the swizzle's span (none: a multiple of 8). Beyond the tensor: zeros.
 * What does not hold ends the process with what was asked for. */
TensorMap tensor_map(const void *base, int rank, const size_t *dim, const size_t *stride_bytes, const unsigned *box, TileSwizzle swizzle);

} /* namespace */
#ifdef LLMC_EMU
#include "dev/emu/emu_hopper.h"
#else
namespace LLMC_NS {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define HOPPER(...) asm volatile(__VA_ARGS__)
#else
#define HOPPER(...) __trap()
#endif

/* ---- mbarrier ------------------------------------------------------------------------------------------------------------------------------- */

__device__ __forceinline__ void mbarrier_init(uint64_t *barrier, unsigned count) {
    HOPPER("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
/* After the inits: the other blocks of the cluster and the asynchronous proxy see them, once a barrier of threads has followed. */
__device__ __forceinline__ void fence_mbarrier_init() { HOPPER("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void mbarrier_arrive(uint64_t *barrier) {
    HOPPER("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
/* Arrives, and the phase expects `bytes` more of copies. */
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t *barrier, unsigned bytes) {
    HOPPER("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
/* An address in shared memory, of the same place in the cluster's block `rank`. */
__device__ __forceinline__ uint32_t cluster_address(const void *p, unsigned rank) {
    uint32_t there = 0;
    HOPPER("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(p)), "r"(rank));
    return there;
}
/* At the barrier in the same place of the cluster's block `rank`, which may be this one. */
__device__ __forceinline__ void mbarrier_arrive_remote(uint64_t *barrier, unsigned rank) {
    HOPPER("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(cluster_address(barrier, rank)) : "memory");
}
/* The same for a thread that has only read what it gives back: orders none of its writes for other blocks, so it needs no fence of the whole GPU, which the
 * one above is. */
__device__ __forceinline__ void mbarrier_return_remote(uint64_t *barrier, unsigned rank) {
    HOPPER("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(cluster_address(barrier, rank)) : "memory");
}
__device__ __forceinline__ void mbarrier_wait(uint64_t *barrier, unsigned parity) {
    uint32_t done = 1, address = shared_address(barrier);
    do HOPPER("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
              : "=r"(done) : "r"(address), "r"(parity) : "memory");
    while (!done);
}
/* The same, and what threads of other blocks wrote before they arrived is seen. */
__device__ __forceinline__ void mbarrier_wait_cluster(uint64_t *barrier, unsigned parity) {
    uint32_t done = 1, address = shared_address(barrier);
    do HOPPER("{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
              : "=r"(done) : "r"(address), "r"(parity) : "memory");
    while (!done);
}

/* ---- copies: one thread issues -------------------------------------------------------------------------------------------------------------- */

__device__ __forceinline__ void tma_prefetch(const TensorMap &map) { HOPPER("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

/* The box at coordinates c0, c1 .. (innermost first; may lie outside) to shared memory, completing on `barrier`. */
#define TMA_LOAD "cp.async.bulk.tensor."
#define TMA_TO "d.shared::cluster.global.mbarrier::complete_tx::bytes"
__device__ __forceinline__ void tma_load(void *shared, const TensorMap &map, uint64_t *barrier, int c0, int c1) {
    HOPPER(TMA_LOAD "2" TMA_TO " [%0], [%1, {%3, %4}], [%2];"
           ::"r"(shared_address(shared)), "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1) : "memory");
}
__device__ __forceinline__ void tma_load(void *shared, const TensorMap &map, uint64_t *barrier, int c0, int c1, int c2) {
    HOPPER(TMA_LOAD "3" TMA_TO " [%0], [%1, {%3, %4, %5}], [%2];"
           ::"r"(shared_address(shared)), "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2) : "memory");
}
__device__ __forceinline__ void tma_load(void *shared, const TensorMap &map, uint64_t *barrier, int c0, int c1, int c2, int c3) {
    HOPPER(TMA_LOAD "4" TMA_TO " [%0], [%1, {%3, %4, %5, %6}], [%2];"
           ::"r"(shared_address(shared)), "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}
/* To the same place of each block of the cluster whose bit is set in mask; completes on the barrier in the same place of each. */
__device__ __forceinline__ void tma_load_multicast(void *shared, const TensorMap &map, uint64_t *barrier, uint16_t mask, int c0, int c1) {
    HOPPER(TMA_LOAD "2" TMA_TO ".multicast::cluster [%0], [%1, {%4, %5}], [%2], %3;"
           ::"r"(shared_address(shared)), "l"(&map), "r"(shared_address(barrier)), "h"(mask), "r"(c0), "r"(c1) : "memory");
}
__device__ __forceinline__ void tma_load_multicast(void *shared, const TensorMap &map, uint64_t *barrier, uint16_t mask, int c0, int c1, int c2) {
    HOPPER(TMA_LOAD "3" TMA_TO ".multicast::cluster [%0], [%1, {%4, %5, %6}], [%2], %3;"
           ::"r"(shared_address(shared)), "l"(&map), "r"(shared_address(barrier)), "h"(mask), "r"(c0), "r"(c1), "r"(c2) : "memory");
}
__device__ __forceinline__ void tma_load_multicast(void *shared, const TensorMap &map, uint64_t *barrier, uint16_t mask, int c0, int c1, int c2, int c3) {
    HOPPER(TMA_LOAD "4" TMA_TO ".multicast::cluster [%0], [%1, {%4, %5, %6, %7}], [%2], %3;"
           ::"r"(shared_address(shared)), "l"(&map), "r"(shared_address(barrier)), "h"(mask), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}
#undef TMA_LOAD
#undef TMA_TO
/* The box from shared memory; what lies outside the tensor is not written. */
__device__ __forceinline__ void tma_store(const TensorMap &map, const void *shared, int c0, int c1) {
    HOPPER("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map), "r"(shared_address(shared)), "r"(c0), "r"(c1) : "memory");
}
__device__ __forceinline__ void tma_store(const TensorMap &map, const void *shared, int c0, int c1, int c2) {
    HOPPER("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];"
           ::"l"(&map), "r"(shared_address(shared)), "r"(c0), "r"(c1), "r"(c2) : "memory");
}
__device__ __forceinline__ void tma_store(const TensorMap &map, const void *shared, int c0, int c1, int c2, int c3) {
    HOPPER("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
           ::"l"(&map), "r"(shared_address(shared)), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}
/* Plain bytes: a multiple of 16, both sides aligned to 16. */
__device__ __forceinline__ void bulk_load(void *shared, const void *global, unsigned bytes, uint64_t *barrier) {
    HOPPER("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
           ::"r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void bulk_store(void *global, const void *shared, unsigned bytes) {
    HOPPER("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
           ::"l"(__cvta_generic_to_global(global)), "r"(shared_address(shared)), "r"(bytes) : "memory");
}
/* This thread's stores: a group; then all but the N newest groups have read shared memory, or are done altogether. */
__device__ __forceinline__ void bulk_commit() { HOPPER("cp.async.bulk.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void bulk_wait_read() { HOPPER("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory"); }
template <int N> __device__ __forceinline__ void bulk_wait() { HOPPER("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory"); }
/* What this thread wrote to shared memory is seen by TMA and wgmma, once a barrier of threads has followed. */
__device__ __forceinline__ void fence_proxy_async() { HOPPER("fence.proxy.async.shared::cta;" ::: "memory"); }

/* ---- wgmma ------------------------------------------------------------------------------------------------------------------------------------- */

/* Keeps the compiler from moving accesses to registers of sums across fence and wait. No instruction. */
template <int R> __device__ __forceinline__ void wgmma_hold(float (&d)[R]) {
    UNROLL for (int i = 0; i < R; i++) asm volatile("" : "+f"(d[i])::"memory");
}
/* Sums that are used before or after are named: wgmma_fence(d), wgmma_wait<0>(d). */
template <class... D> __device__ __forceinline__ void wgmma_fence(D &...d) {
    (wgmma_hold(d), ...);
    HOPPER("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() { HOPPER("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N, class... D> __device__ __forceinline__ void wgmma_wait(D &...d) {
    HOPPER("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
    (wgmma_hold(d), ...);
}

/* wgmma_ss<A, B>(d, a, b, accumulate): d (64, N) = A B, or += if accumulate; a, b descriptors, A and B their major-ness; N = 2 R for float d[R].
 * wgmma_rs<B>(d, a, b, accumulate): A from registers. One pair of functions an N: LLMC_WGMMA(N, registers, their list, their operands, the seven
 * numbers of the operands after them). */
#define LLMC_D(t) ",%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9"
#define LLMC_L4 "%0,%1,%2,%3"
#define LLMC_L8 LLMC_L4 ",%4,%5,%6,%7"
#define LLMC_L12 LLMC_L8 ",%8,%9,%10,%11"
#define LLMC_L16 LLMC_L12 ",%12,%13,%14,%15"
#define LLMC_L32 LLMC_L16 ",%16,%17,%18,%19" LLMC_D(2) ",%30,%31"
#define LLMC_L48 LLMC_L16 ",%16,%17,%18,%19" LLMC_D(2) LLMC_D(3) ",%40,%41,%42,%43,%44,%45,%46,%47"
#define LLMC_L64 LLMC_L48 ",%48,%49" LLMC_D(5) ",%60,%61,%62,%63"
#define LLMC_L80 LLMC_L48 ",%48,%49" LLMC_D(5) LLMC_D(6) LLMC_D(7)
#define LLMC_L96 LLMC_L80 LLMC_D(8) ",%90,%91,%92,%93,%94,%95"
#define LLMC_L128 LLMC_L80 LLMC_D(8) LLMC_D(9) LLMC_D(10) LLMC_D(11) ",%120,%121,%122,%123,%124,%125,%126,%127"
#define LLMC_COMMA ,
#define LLMC_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LLMC_F8(i) LLMC_F4(i), LLMC_F4(i + 4)
#define LLMC_F16(i) LLMC_F8(i), LLMC_F8(i + 8)
#define LLMC_F32(i) LLMC_F16(i), LLMC_F16(i + 16)
#define LLMC_F64(i) LLMC_F32(i), LLMC_F32(i + 32)
#define LLMC_WGMMA(N, R, LIST, OPERANDS, i0, i1, i2, i3, i4, i5, i6)                                                                                     \
    template <Major A, Major B> __device__ __forceinline__ void wgmma_ss(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) {                       \
        HOPPER("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" LIST "}, %" #i0 ", %" #i1     \
               ", p, 1, 1, %" #i3 ", %" #i4 ";\n}" : OPERANDS : "l"(a), "l"(b), "r"((int)accumulate), "n"((int)A), "n"((int)B));                         \
    }                                                                                                                                                    \
    template <Major B> __device__ __forceinline__ void wgmma_rs(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool accumulate) {                    \
        HOPPER("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" LIST "}, {%" #i0 ", %" #i1    \
               ", %" #i2 ", %" #i3 "}, %" #i4 ", p, 1, 1, %" #i6 ";\n}"                                                                                  \
               : OPERANDS : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate), "n"((int)B));                                      \
    }
LLMC_WGMMA(8, 4, LLMC_L4, LLMC_F4(0), 4, 5, 6, 7, 8, 9, 10)
LLMC_WGMMA(16, 8, LLMC_L8, LLMC_F8(0), 8, 9, 10, 11, 12, 13, 14)
LLMC_WGMMA(24, 12, LLMC_L12, LLMC_F8(0) LLMC_COMMA LLMC_F4(8), 12, 13, 14, 15, 16, 17, 18)
LLMC_WGMMA(32, 16, LLMC_L16, LLMC_F16(0), 16, 17, 18, 19, 20, 21, 22)
LLMC_WGMMA(64, 32, LLMC_L32, LLMC_F32(0), 32, 33, 34, 35, 36, 37, 38)
LLMC_WGMMA(96, 48, LLMC_L48, LLMC_F32(0) LLMC_COMMA LLMC_F16(32), 48, 49, 50, 51, 52, 53, 54)
LLMC_WGMMA(128, 64, LLMC_L64, LLMC_F64(0), 64, 65, 66, 67, 68, 69, 70)
LLMC_WGMMA(160, 80, LLMC_L80, LLMC_F64(0) LLMC_COMMA LLMC_F16(64), 80, 81, 82, 83, 84, 85, 86)
LLMC_WGMMA(192, 96, LLMC_L96, LLMC_F64(0) LLMC_COMMA LLMC_F32(64), 96, 97, 98, 99, 100, 101, 102)
LLMC_WGMMA(256, 128, LLMC_L128, LLMC_F64(0) LLMC_COMMA LLMC_F64(64), 128, 129, 130, 131, 132, 133, 134)

/* ---- warps -------------------------------------------------------------------------------------------------------------------------------------- */

/* setmaxnreg (9.7.19.5), by all warps of a warpgroup: N a multiple of 8, 24 to 256. The kernel needs __launch_bounds__(threads, 1), and all warpgroups
 * together have 65536 / threads, rounded down to 8, times threads: 384 threads 168 each, so 240 + 240 + 24 or 232 + 232 + 40. */
template <int N> __device__ __forceinline__ void registers_more() { HOPPER("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> __device__ __forceinline__ void registers_fewer() { HOPPER("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
/* Barrier `id`, 1 to 15, of `threads` threads, those of whole warps: some wait there, others only say that they came. */
__device__ __forceinline__ void named_sync(unsigned id, unsigned threads) { HOPPER("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ __forceinline__ void named_arrive(unsigned id, unsigned threads) { HOPPER("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

/* ---- clusters ------------------------------------------------------------------------------------------------------------------------------------- */

__device__ __forceinline__ unsigned cluster_rank() {
    uint32_t rank = 0;
    HOPPER("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
/* A barrier of all threads of the cluster, in two halves; release and acquire. One before any block touches another's shared memory or barriers, one
 * before a block ends whose memory others may touch. */
__device__ __forceinline__ void cluster_arrive() { HOPPER("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { HOPPER("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
/* The same place of block `rank`. */
__device__ __forceinline__ float cluster_load(const float *p, unsigned rank) {
    float x = 0;
    HOPPER("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(cluster_address(p, rank)) : "memory");
    return x;
}
__device__ __forceinline__ void cluster_store(float *p, unsigned rank, float x) {
    HOPPER("st.shared::cluster.f32 [%0], %1;" ::"r"(cluster_address(p, rank)), "f"(x) : "memory");
}
/* Completes 4 bytes on the barrier in the same place of that block. */
__device__ __forceinline__ void cluster_store_async(float *p, unsigned rank, float x, uint64_t *barrier) {
    HOPPER("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];"
           ::"r"(cluster_address(p, rank)), "f"(x), "r"(cluster_address(barrier, rank)) : "memory");
}

#undef HOPPER
} /* namespace */
#endif
#endif
