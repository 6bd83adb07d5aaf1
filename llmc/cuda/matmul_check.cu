/* Does a product give what it says? An independent sum at some elements, for the choice of an algorithm (matmul.cu) and for tests; and the
 * random operands for it. */
#include "backend.cuh"

namespace LLMC_NS {

enum { THREADS = 256, WARPS = THREADS / WARP };
static_assert(PRODUCT_SAMPLES % WARPS == 0, "whole blocks of samples");

/* A mix of 32 bits in which each input bit changes half of the output (Wellons 2018, lowbias32). */
__device__ __forceinline__ uint32_t mix(uint32_t x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

/* x[i] = uniform in [-size, size].  x (n) =.  A thread: one element, as often as the grid comes round. Bytes: n elements, the floor. */
__global__ void __launch_bounds__(THREADS) random_kernel(elem *x, size_t n, float size, uint32_t seed) {
    begin_kernel();
    for (size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (size_t)gridDim.x * THREADS)
        x[i] = to_elem(size * ((float)mix(mix((uint32_t)i ^ seed) + (uint32_t)(i >> 32)) * 0x1p-31f - 1.0f));
}

void random_elements(CudaBackend *cuda, elem *x, size_t n, float size, uint32_t seed) {
    size_t blocks = min(ceil_div(n, (size_t)THREADS), (size_t)cuda->sm_count * 8);
    if (n) LAUNCH(random_kernel, dim3((unsigned)blocks), dim3(THREADS), 0, cuda->stream, x, n, size, seed);
}

/* The tanh form, as its definition has it, and its derivative. */
__device__ __forceinline__ float tanh_of_gelu(float x) { return tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)); }
__device__ __forceinline__ float gelu_of(float x) { return 0.5f * x * (1.0f + tanh_of_gelu(x)); }
__device__ __forceinline__ float slope_of(float x) {
    float t = tanh_of_gelu(x);
    return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.7978845608028654f * (1.0f + 0.134145f * x * x);
}

/* |found - exact| against the bound, so that NaN is above 1. */
__device__ __forceinline__ float in_bounds(float found, float exact, float bound) {
    float error = fabsf(found - exact) / (bound + 1e-30f);
    return error <= 1e30f ? error : 1e30f;
}

/* samples[s] = (error, value) of the product at one element: the first, the last, the others scattered.  samples (PRODUCT_SAMPLES) =; all else in.
 * A warp: one sample; its lanes take every 32nd k. Bytes: a column or row of each matrix a sample, in sectors of 32 bytes at worst; it runs
 * when an algorithm is chosen, never in a step. Order of summation: by lanes, then a tree; float.
 * Bounds: 2^-18 of the sum of absolute values for other orders of summation (16 times a random walk at K = 65,536; with longer K as its root, since tensor cores that
 * truncate each step's sum are off by 1.5 times 2^-18 at K = 2^20), 2^-7 of the result where
 * it is rounded to bf16, and for the library's GELU 2^-8 of its argument or factor (its tanh has 2^-11). */
__global__ void __launch_bounds__(THREADS) check_kernel(ProductSample *samples, Product p, Operands o) {
    begin_kernel();
    const unsigned s = blockIdx.x * WARPS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const size_t m = s == 0 ? 0 : s == 1 ? p.M - 1 : mix(2 * s) % p.M, n = s == 0 ? 0 : s == 1 ? p.N - 1 : mix(2 * s + 1) % p.N;
    float sum = 0, size = 0, row = 0, row_size = 0;
    for (size_t k = lane; k < p.K; k += WARP) {
        const float x = to_float(p.a_transposed ? o.a[k * p.a_row + m] : o.a[m * p.a_row + k]);
        const float y = to_float(p.b_transposed ? o.b[n * p.b_row + k] : o.b[k * p.b_row + n]);
        sum += x * y, size += fabsf(x * y), row += x, row_size += fabsf(x);
    }
    sum = warp_sum(sum), size = warp_sum(size), row = warp_sum(row), row_size = warp_sum(row_size);
    if (lane != 0) return; /* no barrier follows */
    const size_t at = m * p.c_row + n;
    const float rounding = sizeof(elem) == 2 && !p.c_float ? 0x1p-7f : 0x1p-20f, sums = fmaxf(0x1p-18f, 0x1p-26f * sqrtf((float)p.K)), order = sums * size;
    const float found = p.c_float ? ((const float *)o.c)[at] : to_float(((const elem *)o.c)[at]);
    float exact = sum, approximation = 0, error = 0;
    if (p.epilogue == EPI_BIAS || p.epilogue == EPI_BIAS_GELU) exact += to_float(o.bias[n]);
    if (p.epilogue == EPI_BIAS_GELU) {
        error = in_bounds(to_float(o.aux[at]), exact, rounding * fabsf(exact) + order);
        approximation = 0x1p-8f * fabsf(exact);
        exact = gelu_of(exact);
    }
    if (p.epilogue == EPI_DGELU) approximation = 0x1p-8f * fabsf(sum), exact *= slope_of(to_float(o.aux[at]));
    if (p.epilogue == EPI_BIAS_GRAD) error = in_bounds(o.bias_grad[m], row, sums * row_size);
    samples[s] = ProductSample{fmaxf(error, in_bounds(found, exact, rounding * fabsf(exact) + approximation + 2 * order)), found};
}

void matmul_check(CudaBackend *cuda, const Product *p, const Operands *o, ProductSample *samples) {
    LAUNCH(check_kernel, dim3(PRODUCT_SAMPLES / WARPS), dim3(THREADS), 0, cuda->stream, samples, *p, *o);
}

} /* namespace */
