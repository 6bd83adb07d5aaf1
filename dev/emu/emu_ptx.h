/* The twins of llmc/cuda/ptx.cuh: what each instruction does, lane by lane, after the PTX ISA manual. Included there. */
#ifndef LLMC_EMU_PTX_H
#define LLMC_EMU_PTX_H
#include "emu.h"

namespace emu {
struct MmaLane { uint32_t a[4], b[2]; float c[4]; };
static_assert(sizeof(MmaLane) <= sizeof(LaneValue), "a lane brings at most 64 bytes");

static inline float half_of(uint32_t pair, int high) { return __bfloat162float({(uint16_t)(high ? pair >> 16 : pair)}); }

/* All lanes' registers to matrices, the product, and back. Products are exact in float; sums in float, k ascending. */
static inline void mma_all_lanes(LaneValue *values) {
    float A[16][16], B[16][8], sum[16][8];
    for (int lane = 0; lane < 32; lane++) {
        int g = lane / 4, t = lane % 4;
        MmaLane m;
        memcpy(&m, values[lane], sizeof m);
        for (int half = 0; half < 2; half++) {
            A[g][2 * t + half] = half_of(m.a[0], half), A[g + 8][2 * t + half] = half_of(m.a[1], half);
            A[g][2 * t + 8 + half] = half_of(m.a[2], half), A[g + 8][2 * t + 8 + half] = half_of(m.a[3], half);
            B[2 * t + half][g] = half_of(m.b[0], half), B[2 * t + 8 + half][g] = half_of(m.b[1], half);
            sum[g][2 * t + half] = m.c[half], sum[g + 8][2 * t + half] = m.c[2 + half];
        }
    }
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++)
            for (int col = 0; col < 8; col++) sum[row][col] += A[row][k] * B[k][col];
    for (int lane = 0; lane < 32; lane++) {
        int g = lane / 4, t = lane % 4;
        float d[4] = {sum[g][2 * t], sum[g][2 * t + 1], sum[g + 8][2 * t], sum[g + 8][2 * t + 1]};
        memcpy(values[lane], d, sizeof d);
    }
}
} /* namespace emu */

namespace LLMC_NS {

static inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
    emu::MmaLane m;
    memcpy(m.a, a, sizeof m.a), memcpy(m.b, b, sizeof m.b), memcpy(m.c, c, sizeof m.c);
    memcpy(d, emu::meet("mma.m16n8k16", &m, sizeof m, emu::mma_all_lanes)[emu::current->lane], sizeof d);
}

/* Element (row, col) of matrix j, by the address that lane 8 j + row brought. */
static inline uint16_t matrix_element(const emu::LaneValue *all, int j, int row, int col) {
    const char *address;
    uint16_t x;
    memcpy(&address, all[8 * j + row], sizeof address);
    memcpy(&x, address + 2 * col, sizeof x);
    return x;
}
static inline void ldmatrix_any(uint32_t (&r)[4], const void *row, bool trans) {
    emu::check_shared("ldmatrix", row, 16);
    const emu::LaneValue *all = emu::meet(trans ? "ldmatrix.trans" : "ldmatrix", &row, sizeof row);
    int g = emu::current->lane / 4, t = emu::current->lane % 4;
    for (int j = 0; j < 4; j++) {
        uint32_t low = trans ? matrix_element(all, j, 2 * t, g) : matrix_element(all, j, g, 2 * t);
        uint32_t high = trans ? matrix_element(all, j, 2 * t + 1, g) : matrix_element(all, j, g, 2 * t + 1);
        r[j] = low | high << 16;
    }
    emu::meet("ldmatrix, end", nullptr, 0); /* all have read: the instruction is over for the warp */
}
static inline void ldmatrix_x4(uint32_t (&r)[4], const void *row) { ldmatrix_any(r, row, false); }
static inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void *row) { ldmatrix_any(r, row, true); }

/* Nothing arrives before it is waited for (unless schedule.early). */
static inline void cp_async_16(void *shared, const void *global, bool valid = true) {
    emu::check_shared("cp.async", shared, 16);
    emu::check_aligned("cp.async: global side", global, 16);
    emu::cp_async(shared, global, valid ? 16 : 0);
}
static inline void cp_async_commit() { emu::cp_async_commit_group(); }
template <int N> static inline void cp_async_wait() { emu::cp_async_wait_group(N); }

static inline float exp2_fast(float x) { /* results below the normal numbers are flushed to zero */
    float y = exp2f(x);
    return y < 0x1p-126f ? 0 : y;
}
static inline float reciprocal_fast(float x) {
    float y = 1 / x;
    return fabsf(y) < 0x1p-126f ? 0 : y;
}
static inline uint32_t pack_bf16(float low, float high) {
    return (uint32_t)__float2bfloat16_rn(low).bits | (uint32_t)__float2bfloat16_rn(high).bits << 16;
}
static inline uint32_t not_kept(uint32_t x) { return x; }
static inline void forget(uint32_t &) {}
static inline uint4 load_streaming(const void *p) { return emu::check_aligned("load_streaming", p, 16), *(const uint4 *)p; }
static inline void store_streaming(void *p, uint4 v) { emu::check_aligned("store_streaming", p, 16), *(uint4 *)p = v; }

} /* namespace */
#endif
