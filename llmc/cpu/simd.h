/* Vectors of as many floats as the machine's registers hold (GCC and clang vector extensions), and the functions on them
 * that the ops share: fused multiply-add, exp, GELU, small transposes. A value's bits do not depend on its lane. */
#ifndef LLMC_CPU_SIMD_H
#define LLMC_CPU_SIMD_H
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { VW = 16 };
#elif defined(__AVX__)
enum { VW = 8 };
#else
enum { VW = 4 };
#endif
typedef float vf __attribute__((vector_size(VW * 4)));
typedef int32_t vi __attribute__((vector_size(VW * 4)));
typedef uint32_t vu __attribute__((vector_size(VW * 4)));
typedef double vd __attribute__((vector_size(VW * 8)));
typedef float v4f __attribute__((vector_size(16)));
#define SIMD_FN static inline __attribute__((always_inline))

SIMD_FN vf vf_load(const float *p) { vf v; memcpy(&v, p, sizeof v); return v; }
SIMD_FN void vf_store(float *p, vf v) { memcpy(p, &v, sizeof v); }
SIMD_FN vf vf_set(float x) { return x - (vf){0}; }
SIMD_FN vf vf_load_part(const float *p, size_t n) { vf v = {0}; memcpy(&v, p, n * sizeof *p); return v; }
SIMD_FN void vf_store_part(float *p, vf v, size_t n) { memcpy(p, &v, n * sizeof *p); }
SIMD_FN vf vf_select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
SIMD_FN vf vf_max(vf a, vf b) { return vf_select(a > b, a, b); }

/* a b + c, rounded once where the machine can */
SIMD_FN vf vf_fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

/* exp(x): x = n ln 2 + r with |r| <= ln 2 / 2, exp(r) by its series to r^7 / 7! (truncation 5e-9). Largest relative error
 * 1e-7 with fused multiply-add, 2e-7 without (test_cpu_ops.c measures it). Below -87 the result is 0, above 88 infinity; NaN stays NaN. */
SIMD_FN vf vf_exp(vf x) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, found in the low bits */
    vi low = x < -87.0f, high = x > 88.0f;
    vf y = vf_select(low, vf_set(-87.0f), vf_select(high, vf_set(88.0f), x));
    vf biased = vf_fma(y, vf_set(1.44269504088896f), vf_set(shift));
    vf n = biased - shift;
    vf r = vf_fma(n, vf_set(-0.693145751953125f), y); /* ln 2 in two parts: n times the first is exact */
    r = vf_fma(n, vf_set(-1.42860682030941723e-6f), r);
    vf p = vf_set(1.0f / 5040);
    p = vf_fma(p, r, vf_set(1.0f / 720));
    p = vf_fma(p, r, vf_set(1.0f / 120));
    p = vf_fma(p, r, vf_set(1.0f / 24));
    p = vf_fma(p, r, vf_set(1.0f / 6));
    p = vf_fma(p, r, vf_set(0.5f));
    p = vf_fma(p, r, vf_set(1.0f));
    p = vf_fma(p, r, vf_set(1.0f));
    vu power = ((vu)biased + 127u) << 23;
    p = p * (vf)power;
    return vf_select(low, vf_set(0.0f), vf_select(high, vf_set(INFINITY), p));
}

/* GELU in its tanh form. 1 + tanh(u) = 2 / (1 + exp(-2u)), which does not cancel for negative u. e is exp(-2u), bounded so
 * that what follows stays finite. */
SIMD_FN vf vf_gelu_e(vf x) {
    const float s = -1.5957691216057308f; /* -2 sqrt(2/pi) */
    vf u = s * (x + 0.044715f * x * x * x);
    return vf_exp(vf_select(u > 87.0f, vf_set(87.0f), u));
}
SIMD_FN vf vf_gelu(vf x) { return x / (1.0f + vf_gelu_e(x)); }
/* with p = 1/(1+e): p + x p (1-p) 2 sqrt(2/pi) (1 + 3 * 0.044715 x^2) */
SIMD_FN vf vf_gelu_derivative(vf x) {
    vf e = vf_gelu_e(x), p = 1.0f / (1.0f + e);
    return p + x * (p * (e * p)) * (1.5957691216057308f * (1.0f + 0.134145f * x * x));
}

/* to[c * to_row + r] = from[r * from_row + c] for rows x cols values */
static inline void transpose(float *to, size_t to_row, const float *from, size_t from_row, size_t rows, size_t cols) {
    size_t r = 0;
    for (; r + 4 <= rows; r += 4) {
        const float *f = from + r * from_row;
        size_t c = 0;
        for (; c + 4 <= cols; c += 4) {
            v4f a, b, d, e;
            for (size_t i = 4; i < 8; i++) __builtin_prefetch(f + i * from_row + c); /* the rows after these */
            memcpy(&a, f + c, 16); memcpy(&b, f + from_row + c, 16);
            memcpy(&d, f + 2 * from_row + c, 16); memcpy(&e, f + 3 * from_row + c, 16);
            v4f ab0 = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab1 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
            v4f de0 = __builtin_shufflevector(d, e, 0, 4, 1, 5), de1 = __builtin_shufflevector(d, e, 2, 6, 3, 7);
            v4f t[4] = {__builtin_shufflevector(ab0, de0, 0, 1, 4, 5), __builtin_shufflevector(ab0, de0, 2, 3, 6, 7),
                        __builtin_shufflevector(ab1, de1, 0, 1, 4, 5), __builtin_shufflevector(ab1, de1, 2, 3, 6, 7)};
            for (size_t i = 0; i < 4; i++) memcpy(to + (c + i) * to_row + r, &t[i], 16);
        }
        for (; c < cols; c++)
            for (size_t i = 0; i < 4; i++) to[c * to_row + r + i] = f[i * from_row + c];
    }
    for (; r < rows; r++)
        for (size_t c = 0; c < cols; c++) to[c * to_row + r] = from[r * from_row + c];
}

/* One register tile of a product: t[r][.] = sum over k of a[r * a_row + k * a_col] * b[k * b_row + .], k ascending. */
enum { MR = 6, NR = 2 * VW };
SIMD_FN void tile_product(vf t[MR][2], size_t K, const float *a, size_t a_row, size_t a_col, const float *b, size_t b_row) {
    for (int r = 0; r < MR; r++) t[r][0] = t[r][1] = (vf){0};
    for (size_t k = 0; k < K; k++, a += a_col, b += b_row) {
        vf b0 = vf_load(b), b1 = vf_load(b + VW);
#pragma GCC unroll 6
        for (int r = 0; r < MR; r++) {
            vf x = vf_set(a[(size_t)r * a_row]);
            t[r][0] = vf_fma(x, b0, t[r][0]);
            t[r][1] = vf_fma(x, b1, t[r][1]);
        }
    }
}
#endif
