/* What every kernel file includes: the compute type, 16-byte vectors, warp and block sums, and the one way to launch.
 * Compiled four times: by nvcc and, against dev/emu, by a C++ compiler; each for bf16 and fp32 (LLMC_BF16 = 1 or 0). So that the
 * emulator sees everything: no static __shared__ (DYNAMIC_SHARED is the block's one buffer), launches through LAUNCH, inline PTX in ptx.cuh
 * and hopper.cuh only, collectives by whole warps, no thread leaves before its block's last barrier, no block waits for another. */
#ifndef LLMC_CUDA_KERNEL_CUH
#define LLMC_CUDA_KERNEL_CUH
#ifdef LLMC_EMU
#include "dev/emu/emu.h"
#else
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#endif
#include "../base/error.h"
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef LLMC_BF16
#error "LLMC_BF16 must be 1 (bf16) or 0 (fp32)"
#endif
#if defined(LLMC_EMU) && LLMC_BF16
#define LLMC_NS emu_bf16
#elif defined(LLMC_EMU)
#define LLMC_NS emu_fp32
#elif LLMC_BF16
#define LLMC_NS cuda_bf16
#else
#define LLMC_NS cuda_fp32
#endif

namespace LLMC_NS {

/* Before a loop over an array that must live in registers: every index a constant. NO_UNROLL: one that must not spread over more of them. */
#ifdef LLMC_EMU
#define UNROLL
#define NO_UNROLL
#else
#define UNROLL _Pragma("unroll")
#define NO_UNROLL _Pragma("unroll 1")
#endif

/* ---- the compute type ---------------------------------------------------------------------------------------------- */
#if LLMC_BF16
typedef __nv_bfloat16 elem;
__host__ __device__ __forceinline__ float to_float(elem x) { return __bfloat162float(x); }
__host__ __device__ __forceinline__ elem to_elem(float x) { return __float2bfloat16_rn(x); }
#else
typedef float elem;
__host__ __device__ __forceinline__ elem to_elem(float x) { return x; }
#endif
__host__ __device__ __forceinline__ float to_float(float x) { return x; }

/* Sixteen bytes of T: one load or store instruction. p must be aligned to 16 bytes. */
template <class T> struct alignas(16) Vec {
    enum { N = 16 / sizeof(T) };
    T v[N];
};
template <class T> __device__ __forceinline__ Vec<T> load_vec(const T *p) {
    uint4 raw = *(const uint4 *)(const void *)p;
    Vec<T> v;
    memcpy(&v, &raw, sizeof v);
    return v;
}
template <class T> __device__ __forceinline__ void store_vec(T *p, const Vec<T> &v) {
    uint4 raw;
    memcpy(&raw, &v, sizeof raw);
    *(uint4 *)(void *)p = raw;
}

/* W neighbours of a row as they lie in memory: 16-byte accesses where W fills them, a scalar for W = 1, which is what ragged rows take. Kept
 * packed until used: a compiler that sees single bf16 elements gives each a register of its own. */
template <class T, int W> struct Piece {
    static_assert(W * sizeof(T) % 16 == 0, "whole vectors, or W = 1");
    uint4 raw[W * sizeof(T) / 16];
};
template <class T> struct Piece<T, 1> {
    T raw[1];
};
template <int W, class T> __device__ __forceinline__ Piece<T, W> load_piece(const T *p) {
    Piece<T, W> piece;
    if constexpr (W == 1) piece.raw[0] = *p;
    else
        for (int i = 0; i < (int)(W * sizeof(T) / 16); i++) piece.raw[i] = ((const uint4 *)(const void *)p)[i];
    return piece;
}
template <class T, int W> __device__ __forceinline__ void store_piece(T *p, const Piece<T, W> &piece) {
    if constexpr (W == 1) *p = piece.raw[0];
    else
        for (int i = 0; i < (int)(W * sizeof(T) / 16); i++) ((uint4 *)(void *)p)[i] = piece.raw[i];
}
template <class T, int W> __device__ __forceinline__ void unpack(float (&x)[W], const Piece<T, W> &piece) {
    if constexpr (W * sizeof(T) % 16 == 0 && sizeof(T) == 2) { /* bf16 is the upper half of a float: one instruction each */
        uint32_t words[W / 2];
        memcpy(words, piece.raw, sizeof words);
        for (int i = 0; i < W; i++) x[i] = __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
    } else {
        T v[W];
        memcpy(v, piece.raw, sizeof v);
        for (int i = 0; i < W; i++) x[i] = to_float(v[i]);
    }
}
template <class T, int W> __device__ __forceinline__ Piece<T, W> pack(const float (&x)[W]) {
    Piece<T, W> piece;
    T v[W];
    for (int i = 0; i < W; i++)
        if constexpr (sizeof(T) == sizeof(float)) v[i] = x[i];
        else v[i] = to_elem(x[i]);
    memcpy(piece.raw, v, sizeof v);
    return piece;
}

/* ---- sums, in a fixed order ---------------------------------------------------------------------------------------- */
enum { WARP = 32 };
#define FULL_MASK 0xffffffffu

template <class T> __device__ __forceinline__ T warp_sum(T x) {
    for (int lane = WARP / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(FULL_MASK, x, lane);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
    for (int lane = WARP / 2; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, lane));
    return x;
}
/* Sum over a block of whole warps; every thread gets it. slots: shared, one a warp (at most 32). Holds two barriers: the slots may be used
 * again at once after it returns. */
template <class T> __device__ __forceinline__ T block_sum(T x, T *slots) {
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    x = warp_sum(x);
    if (lane == 0) slots[warp] = x;
    __syncthreads();
    T total = 0;
    for (int i = 0; i < warps; i++) total += slots[i];
    __syncthreads();
    return total;
}

/* ---- the kernels before and behind ----------------------------------------------------------------------------------- */

/* First of all in a kernel, or after what touches neither global memory nor another block (a Hopper kernel's barriers): from here on the stream's kernels before it
 * have ended and what they wrote is there; and the kernel behind may be launched, whose blocks come as this one's make room, and wait here (--early-launch;
 * without it both are true already). So no pointer of a kernel is __restrict__: what is read through one may be read before this (test_rooms.sh looks). */
__device__ __forceinline__ void begin_kernel() {
#ifdef LLMC_EMU
    emu::kernel_begun();
#elif __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
    cudaTriggerProgrammaticLaunchCompletion();
#endif
}

/* ---- shared memory and launches ------------------------------------------------------------------------------------ */

/* The block's dynamic shared memory, aligned to 1024 bytes on both sides, as `T *name`. */
#ifdef LLMC_EMU
#define DYNAMIC_SHARED(T, name) T *name = (T *)(void *)emu::dynamic_shared()
#else
#define DYNAMIC_SHARED(T, name)                                                                                        \
    extern __shared__ __align__(1024) unsigned char llmc_dynamic_shared[];                                             \
    T *name = (T *)(void *)llmc_dynamic_shared
#endif

/* Fails the process with EXIT_DEVICE, naming what was being done: a CUDA error that is neither the user's nor an out-of-memory at start. */
void cuda_check(cudaError_t status, const char *doing);
/* Called by LAUNCH before and after: raises the kernel's limit of dynamic shared memory once; reports errors with the kernel's name and
 * sizes; with LLMC_SYNC=1 in the environment waits and names each launch on stderr. early_launch: kernels may be launched before those in front have
 * ended (sm_90 and later; programmatic dependent launch). */
void launch_prepare(const void *kernel, const char *name, size_t shared_bytes);
extern bool early_launch;
void launch_done(const char *name, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, cudaError_t status);

/* cluster: 0, or for a kernel with the instructions of hopper.cuh how many neighbouring blocks along x are one (1 to 8; grid.x a multiple). */
template <class... P, class... A>
void launch_named(const char *name, void (*kernel)(P...), unsigned cluster, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, A... args) {
    CHECK(cluster <= 8 && (!cluster || grid.x % cluster == 0), "%s: clusters of %u in a grid of %u along x", name, cluster, grid.x);
#ifdef LLMC_EMU
    emu::launch(name, kernel, grid, block, shared_bytes, cluster, early_launch, stream, static_cast<P>(args)...);
#else
    launch_prepare((const void *)kernel, name, shared_bytes);
    cudaLaunchAttribute attributes[2] = {};
    unsigned n = 0;
    if (early_launch) attributes[n].id = cudaLaunchAttributeProgrammaticStreamSerialization, attributes[n++].val.programmaticStreamSerializationAllowed = 1;
    if (cluster) {
        attributes[n].id = cudaLaunchAttributeClusterDimension;
        attributes[n].val.clusterDim.x = cluster, attributes[n].val.clusterDim.y = attributes[n].val.clusterDim.z = 1;
        n++;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes, config.stream = stream;
    config.attrs = attributes, config.numAttrs = n;
    launch_done(name, grid, block, shared_bytes, stream, cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...));
#endif
}
/* LAUNCH(kernel, grid, block, shared_bytes, stream, args...); a template with commas in parentheses: LAUNCH((k<64, 2>), ...).
 * LAUNCH_HOPPER(kernel, cluster, grid, ...), for kernels with the instructions of hopper.cuh. */
#define LAUNCH(kernel, ...) launch_named(#kernel, kernel, 0, __VA_ARGS__)
#define LAUNCH_HOPPER(kernel, ...) launch_named(#kernel, kernel, __VA_ARGS__)

/* ---- small arithmetic ---------------------------------------------------------------------------------------------- */
template <class T> __host__ __device__ __forceinline__ T ceil_div(T a, T b) { return (a + b - 1) / b; }
template <class T> __host__ __device__ __forceinline__ T round_up(T a, T b) { return ceil_div(a, b) * b; }

} /* namespace */
#endif
