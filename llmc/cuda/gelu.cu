/* GELU and its derivative (gelu.cuh) as passes of their own: for recomputation, and where a product's
 * epilogue does not fuse it. */
#include "backend.cuh"
#include "gelu.cuh"

namespace LLMC_NS {

enum { THREADS = 256 };

/* out[i] = gelu(pre[i]).  out (n) =, pre (n) in.  A thread: one vector of 16 bytes; the first threads also the tail of n % N elements.
 * Bytes: 2 n elements, the floor. Error: one rounding of the output beside gelu_p's. */
template <bool BACKWARD> __global__ void __launch_bounds__(THREADS) gelu_kernel(elem *out, const elem *pre, size_t n) {
    begin_kernel();
    const size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x, vectors = n / Vec<elem>::N, tail = vectors * Vec<elem>::N + i;
    if (i < vectors) {
        Vec<elem> x = load_vec(pre + i * Vec<elem>::N), y;
        if (BACKWARD) y = load_vec(out + i * Vec<elem>::N);
        for (int k = 0; k < Vec<elem>::N; k++)
            y.v[k] = BACKWARD ? to_elem(to_float(y.v[k]) * gelu_slope(to_float(x.v[k]))) : to_elem(gelu_value(to_float(x.v[k])));
        store_vec(out + i * Vec<elem>::N, y);
    }
    if (tail < n) out[tail] = BACKWARD ? to_elem(to_float(out[tail]) * gelu_slope(to_float(pre[tail]))) : to_elem(gelu_value(to_float(pre[tail])));
}

template <bool BACKWARD> static void run(CudaBackend *cuda, elem *out, const elem *pre, size_t n) {
    size_t blocks = ceil_div(n / Vec<elem>::N + n % Vec<elem>::N, (size_t)THREADS); /* the tail may need threads beyond the vectors */
    LAUNCH(gelu_kernel<BACKWARD>, dim3((unsigned)blocks), dim3(THREADS), 0, cuda->stream, out, pre, n);
}
void gelu_run(CudaBackend *cuda, elem *out, const elem *pre, size_t n) { run<false>(cuda, out, pre, n); }
void gelu_backward_run(CudaBackend *cuda, elem *dpre, const elem *pre, size_t n) { run<true>(cuda, dpre, pre, n); }

void cuda_gelu_forward(Backend *b, const GeluForward *a) {
    CudaBackend *cuda = cuda_of(b);
    CHECK(a->n, "gelu_forward: n = 0");
    op_begin(cuda, OP_gelu_forward);
    if (cuda->planning) return;
    CHECK(a->out.p && a->pre_gelu.p, "gelu_forward: operand absent");
    gelu_run(cuda, (elem *)a->out.p, (const elem *)a->pre_gelu.p, a->n);
}

} /* namespace */
