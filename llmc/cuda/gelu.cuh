/* GELU in its tanh form (Hendrycks and Gimpel 2016) and its derivative, of one float. FAST: by the device's approximate exponential and division, for
 * results that are rounded to 16 bits: relative error below 2^-17. */
#ifndef LLMC_CUDA_GELU_CUH
#define LLMC_CUDA_GELU_CUH
#include "kernel.cuh"

namespace LLMC_NS {

/* 1 + tanh(u) = 2 / (1 + exp(-2u)), which does not cancel for negative u; e is exp(-2u), bounded so that e * e stays finite. */
template <bool FAST> __device__ __forceinline__ float gelu_e(float x) {
    float u = fminf(-1.5957691216057308f * (x + 0.044715f * x * x * x), 40.0f); /* -2 sqrt(2/pi) */
    return FAST ? __expf(u) : expf(u);
}
template <bool FAST = false> __device__ __forceinline__ float gelu_value(float x) {
    const float below = 1.0f + gelu_e<FAST>(x);
    return FAST ? __fdividef(x, below) : x / below;
}
/* with p = 1/(1+e): p + x p (1-p) 2 sqrt(2/pi) (1 + 3 * 0.044715 x^2) */
template <bool FAST = false> __device__ __forceinline__ float gelu_slope(float x) {
    float e = gelu_e<FAST>(x), p = FAST ? __fdividef(1.0f, 1.0f + e) : 1.0f / (1.0f + e);
    return p + x * (p * (e * p)) * (1.5957691216057308f * (1.0f + 0.134145f * x * x));
}

} /* namespace */
#endif
