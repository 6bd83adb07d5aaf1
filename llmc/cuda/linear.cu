/* Linear layers: the library's products with what it fuses into them where that is faster (matmul_fuse), with passes of our own where not.
 * Which of the two depends on the shape alone, so that an op's other operands never change its bits. */
#include "backend.cuh"

namespace LLMC_NS {

enum { THREADS = 256 };

/* db[c] += x[c].  db (n) +=, x (n) in.  A thread: one element. Bytes: 12 n, the floor. */
__global__ void __launch_bounds__(THREADS) add_kernel(float *db, const float *x, size_t n) {
    begin_kernel();
    const size_t i = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < n) db[i] += x[i];
}

/* Whether `fused` takes the place of `plain` and of a pass after it that moves `bytes`. While planning: plans both. */
static bool fuses(CudaBackend *cuda, const Product *plain, Product *fused, Epilogue epilogue, bool allowed, size_t bytes) {
    *fused = *plain;
    fused->epilogue = epilogue;
    if (cuda->planning) {
        matmul_plan(cuda, plain);
        if (allowed) matmul_plan(cuda, fused);
    }
    return allowed && matmul_supported(cuda, fused) && matmul_fuse(cuda, fused, plain, bytes);
}

/* In float32, the backend for debugging, GELU is always ours: the library's is an approximation made for 16 bits. */
static bool may_fuse_gelu(const CudaBackend *cuda) { return sizeof(elem) == 2 && cuda->options.fuse_gelu; }

void cuda_linear_forward(Backend *b, const LinearForward *a) {
    CudaBackend *cuda = cuda_of(b);
    CHECK(a->N && a->C && a->OC, "linear_forward: N %zu, C %zu, OC %zu", a->N, a->C, a->OC);
    op_begin(cuda, OP_linear_forward);
    Product plain = {}, fused; /* out (N, OC) = inp w^T + b */
    plain.M = a->N, plain.N = a->OC, plain.K = a->C, plain.b_transposed = true;
    plain.a_row = plain.b_row = a->C, plain.c_row = a->OC, plain.epilogue = EPI_BIAS;
    const bool gelu = a->pre_gelu.p != NULL;
    const bool fuse = fuses(cuda, &plain, &fused, EPI_BIAS_GELU, gelu && may_fuse_gelu(cuda), 2 * a->N * a->OC * sizeof(elem));
    if (cuda->planning) return;
    CHECK(a->out.p && a->inp.p && a->w.p && a->b.p, "linear_forward: operand absent");
    Operands o = {};
    o.c = gelu && !fuse ? a->pre_gelu.p : a->out.p, o.a = (const elem *)a->inp.p, o.b = (const elem *)a->w.p;
    o.bias = (const elem *)a->b.p, o.aux = (elem *)a->pre_gelu.p;
    matmul(cuda, fuse ? &fused : &plain, &o);
    if (gelu && !fuse) gelu_run(cuda, (elem *)a->out.p, (const elem *)a->pre_gelu.p, a->N * a->OC);
}

/* dinp (N, C) = dout w [* gelu'(pre_gelu)] */
static void input_gradient(CudaBackend *cuda, const LinearBackward *a) {
    Product plain = {}, fused;
    plain.M = a->N, plain.N = a->C, plain.K = a->OC;
    plain.a_row = a->OC, plain.b_row = plain.c_row = a->C;
    const bool gelu = a->pre_gelu.p != NULL;
    const bool fuse = fuses(cuda, &plain, &fused, EPI_DGELU, gelu && may_fuse_gelu(cuda), 3 * a->N * a->C * sizeof(elem));
    if (cuda->planning) return;
    Operands o = {};
    o.c = a->dinp.p, o.a = (const elem *)a->dout.p, o.b = (const elem *)a->w.p, o.aux = (elem *)a->pre_gelu.p;
    matmul(cuda, fuse ? &fused : &plain, &o);
    if (gelu && !fuse) gelu_backward_run(cuda, (elem *)a->dinp.p, (const elem *)a->pre_gelu.p, a->N * a->C);
}

/* dw (OC, C) += dout^T inp;  db (OC) += column sums of dout. scratch: OC floats, or what the pass over dout needs. */
static void parameter_gradients(CudaBackend *cuda, const LinearBackward *a, float *scratch) {
    Product plain = {}, fused;
    plain.M = a->OC, plain.N = a->C, plain.K = a->N, plain.a_transposed = true;
    plain.a_row = a->OC, plain.b_row = plain.c_row = a->C, plain.c_float = plain.add = true;
    const bool fuse = fuses(cuda, &plain, &fused, EPI_BIAS_GRAD, true, a->N * a->OC * sizeof(elem));
    if (cuda->planning) return;
    Operands o = {};
    o.c = a->dw.p, o.a = (const elem *)a->dout.p, o.b = (const elem *)a->inp.p, o.bias_grad = scratch;
    matmul(cuda, fuse ? &fused : &plain, &o);
    if (fuse) LAUNCH(add_kernel, dim3((unsigned)ceil_div(a->OC, (size_t)THREADS)), dim3(THREADS), 0, cuda->stream, a->db.p, scratch, a->OC);
    else bias_backward_run(cuda, a->db.p, (const elem *)a->dout.p, a->N, a->OC, scratch);
}

void cuda_linear_backward(Backend *b, const LinearBackward *a) {
    CudaBackend *cuda = cuda_of(b);
    CHECK(a->N && a->C && a->OC, "linear_backward: N %zu, C %zu, OC %zu", a->N, a->C, a->OC);
    op_begin(cuda, OP_linear_backward);
    float *partial = scratch<float>(cuda, max(a->OC, bias_backward_scratch(a->N, a->OC)), "bias gradient");
    if (!cuda->planning) CHECK(a->dw.p && a->db.p && a->dout.p && a->inp.p && a->w.p, "linear_backward: operand absent");
    if (a->dinp.p) input_gradient(cuda, a);
    parameter_gradients(cuda, a, partial);
}

} /* namespace */
