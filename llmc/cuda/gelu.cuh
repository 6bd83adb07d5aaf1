/* GELU in its tanh form (Hendrycks and Gimpel 2016) and its derivative, of one float. */
#ifndef LLMC_CUDA_GELU_CUH
#define LLMC_CUDA_GELU_CUH
#include "ptx.cuh"

namespace LLMC_NS {

/* p = (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3), which does not cancel for negative u; gelu is x p. In bf16, whose results are
 * rounded to 8 bits, by the device's approximate power and reciprocal: relative error of p below 2^-17, and 0 from u = -44 on. */
__device__ __forceinline__ float gelu_p(float x) {
    const float x2 = x * x;
#if LLMC_BF16 /* 2 sqrt(2/pi) log2(e), and that times 0.044715 */
    return reciprocal_fast(1.0f + exp2_fast(x * fmaf(x2, -0.1029432396f, -2.302208198f)));
#else
    return 1.0f / (1.0f + expf(x * fmaf(x2, -0.0713548163f, -1.5957691216f)));
#endif
}
__device__ __forceinline__ float gelu_value(float x) { return x * gelu_p(x); }
/* p + x p (1 - p) 2 sqrt(2/pi) (1 + 3 * 0.044715 x^2) */
__device__ __forceinline__ float gelu_slope(float x) {
    const float p = gelu_p(x), spread = LLMC_BF16 ? fmaf(-p, p, p) : p * gelu_p(-x); /* of p near 1, 1 - p has lost what float32 would show */
    return fmaf(x * spread, fmaf(x * x, 0.2140644488f, 1.5957691216f), p);
}

} /* namespace */
#endif
