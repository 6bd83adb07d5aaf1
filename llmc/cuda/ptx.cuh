/* Every PTX instruction that the kernels use, behind a named function (Hopper's own: hopper.cuh); nothing else holds inline assembly. The emulator has a
 * twin of each in dev/emu/emu_ptx.h, which follows the fragment layouts of the PTX ISA manual (sections mma.m16n8k16, ldmatrix, cp.async).
 *
 * Fragments of mma m16n8k16, lane = 4 g + t (g 0..7, t 0..3):
 *   A (16 x 16, row): a[0] = (g, 2t..2t+1)  a[1] = (g+8, 2t..)  a[2] = (g, 2t+8..)  a[3] = (g+8, 2t+8..)
 *   B (16 x 8, col):  b[0] = (k 2t..2t+1, n g)  b[1] = (k 2t+8.., n g)
 *   C, D (16 x 8):    c[0..1] = (g, 2t..2t+1)   c[2..3] = (g+8, 2t..) */
#ifndef LLMC_CUDA_PTX_CUH
#define LLMC_CUDA_PTX_CUH
#include "kernel.cuh"
#ifdef LLMC_EMU
#include "dev/emu/emu_ptx.h"
#else
namespace LLMC_NS {

/* d = a b + c; bf16 products, float32 sums. d and c may be the same registers. */
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

__device__ __forceinline__ uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

/* Four 8x8 matrices of 16-bit elements from shared memory: lane i gives the address of row i % 8 of matrix i / 8 (16 bytes, aligned to 16).
 * r[j] of lane 4 g + t: elements (g, 2t..2t+1) of matrix j; of its transpose with _trans: elements (2t, g) and (2t+1, g). */
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

/* Asynchronous copy of 16 bytes, both sides aligned to 16, past the L1; not valid: writes zeros and does not read. What was committed as a
 * group is readable by this thread after cp_async_wait<N> has left at most the N newest groups open, by the block after a barrier more. */
__device__ __forceinline__ void cp_async_16(void *shared, const void *global, bool valid = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

/* 2^x, relative error below 2^-22; -infinity gives 0. */
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* 1 / x, relative error below 2^-22; infinity gives 0. */
__device__ __forceinline__ float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* x itself, computed anew at each use: what follows from it is not kept in registers across a loop. No instruction. */
__device__ __forceinline__ uint32_t not_kept(uint32_t x) {
    asm volatile("" : "+r"(x));
    return x;
}

/* Two floats rounded to bf16 (nearest even): low in the lower half. */
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

/* Hides from the compiler that x is what it was: what was derived from x before is derived again and not kept in registers. No instruction. */
__device__ __forceinline__ void forget(uint32_t &x) { asm volatile("" : "+r"(x)); }

/* Loads and stores of 16 bytes that will not be used again soon: they leave the L2 first. */
__device__ __forceinline__ uint4 load_streaming(const void *p) { return __ldcs((const uint4 *)p); }
__device__ __forceinline__ void store_streaming(void *p, uint4 v) { __stcs((uint4 *)p, v); }

} /* namespace */
#endif
#endif
