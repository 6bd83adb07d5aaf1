/* A matrix product of any shape, stride and alignment, in float: for what cuBLASLt has no algorithm (odd channels in bf16). Right, not fast:
 * no tensor cores, scalar loads. */
#include "backend.cuh"

namespace LLMC_NS {

enum { THREADS = 256, TILE = 64, DEPTH = 16, EACH = 4, PITCH = TILE + 4 };

/* Strides of op(a) (M, K) and op(b) (K, N): element (m, k) of a at m * a_m + k * a_k. */
struct PlainShape { size_t M, N, K, a_m, a_k, b_k, b_n, c_row; };

/* to[k][i] = x[(i0 + i) stride_i + (k0 + k) stride_k], zero beyond n and K; the threads of a warp run along whichever index is dense. */
__device__ __forceinline__ void load_tile(float (*to)[PITCH], const elem *x, size_t i0, size_t n, size_t stride_i, size_t k0, size_t K, size_t stride_k) {
    for (int e = (int)threadIdx.x; e < TILE * DEPTH; e += THREADS) {
        const int i = stride_k == 1 ? e / DEPTH : e % TILE, k = stride_k == 1 ? e % DEPTH : e / TILE;
        to[k][i] = i0 + i < n && k0 + k < K ? to_float(x[(i0 + i) * stride_i + (k0 + k) * stride_k]) : 0.0f;
    }
}

/* c[m,n] = or += sum_k a[m,k] b[k,n] [+ bias[n]].  c (M, N) = or +=; a (M, K), b (K, N), bias (N) in, bias may be absent.
 * A block: a tile of 64 x 64 of c, one after another along n; a thread: 4 x 4 of it; panels of 16 of k through shared memory (8.5 KiB).
 * Bytes: a N/64 times, b M/64 times, c once (+= twice); the floor is each once. Order of summation: k ascending, in float, by fused
 * multiply-adds. Error: that of K such steps, and one rounding of c. */
template <class Out, bool ADD>
__global__ void __launch_bounds__(THREADS) matmul_plain_kernel(Out *c, const elem *a, const elem *b, const elem *bias, PlainShape p) {
    begin_kernel();
    DYNAMIC_SHARED(float, shared);
    float (*a_tile)[PITCH] = (float (*)[PITCH])shared, (*b_tile)[PITCH] = a_tile + DEPTH;
    const size_t across = ceil_div(p.N, (size_t)TILE), m0 = blockIdx.x / across * TILE, n0 = blockIdx.x % across * TILE;
    const int tm = threadIdx.x / (TILE / EACH) * EACH, tn = threadIdx.x % (TILE / EACH) * EACH;
    float sum[EACH][EACH] = {};
    for (size_t k0 = 0; k0 < p.K; k0 += DEPTH) {
        load_tile(a_tile, a, m0, p.M, p.a_m, k0, p.K, p.a_k);
        load_tile(b_tile, b, n0, p.N, p.b_n, k0, p.K, p.b_k);
        __syncthreads();
        for (int k = 0; k < DEPTH; k++) {
            const Vec<float> x = load_vec(&a_tile[k][tm]), y = load_vec(&b_tile[k][tn]);
            for (int i = 0; i < EACH; i++)
                for (int j = 0; j < EACH; j++) sum[i][j] = fmaf(x.v[i], y.v[j], sum[i][j]);
        }
        __syncthreads();
    }
    for (int i = 0; i < EACH; i++)
        for (int j = 0; j < EACH; j++) {
            const size_t m = m0 + tm + i, n = n0 + tn + j;
            if (m >= p.M || n >= p.N) continue;
            Out *to = c + m * p.c_row + n;
            const float x = sum[i][j] + (bias ? to_float(bias[n]) : 0.0f) + (ADD ? to_float(*to) : 0.0f);
            if constexpr (sizeof(Out) == sizeof(float)) *to = x;
            else *to = to_elem(x);
        }
}

void matmul_plain(CudaBackend *cuda, const Product *p, const Operands *o) {
    CHECK(p->epilogue == EPI_NONE || p->epilogue == EPI_BIAS, "no plain product with epilogue %d", (int)p->epilogue);
    CHECK(!p->add || p->c_float, "a product that adds to what is not float");
    const PlainShape s = {p->M, p->N, p->K, p->a_transposed ? 1 : p->a_row, p->a_transposed ? p->a_row : 1,
                          p->b_transposed ? 1 : p->b_row, p->b_transposed ? p->b_row : 1, p->c_row};
    const elem *bias = p->epilogue == EPI_BIAS ? o->bias : NULL;
    const dim3 grid((unsigned)(ceil_div(p->M, (size_t)TILE) * ceil_div(p->N, (size_t)TILE)));
    const size_t shared = 2 * DEPTH * PITCH * sizeof(float);
    if (p->add) LAUNCH((matmul_plain_kernel<float, true>), grid, dim3(THREADS), shared, cuda->stream, (float *)o->c, o->a, o->b, bias, s);
    else if (p->c_float) LAUNCH((matmul_plain_kernel<float, false>), grid, dim3(THREADS), shared, cuda->stream, (float *)o->c, o->a, o->b, bias, s);
    else LAUNCH((matmul_plain_kernel<elem, false>), grid, dim3(THREADS), shared, cuda->stream, (elem *)o->c, o->a, o->b, bias, s);
}

} /* namespace */
