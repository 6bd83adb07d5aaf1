/* The attention ops of training: which implementation runs. cuDNN or the kernels for Hopper where they were asked for and take the shape; the tensor-core
 * kernels of every GPU where they fit; the plain kernels for the rest. The choice depends on shape and options alone, so forward and backward agree, and with them the order of every sum. */
#include "attention.cuh"

namespace LLMC_NS {

static AttentionShape shape_of(const char *op, size_t B, size_t T, size_t H, size_t D) {
    CHECK(B && T && H && D, "%s: B %zu, T %zu, H %zu, D %zu", op, B, T, H, D);
    return AttentionShape{B, T, H, D};
}

bool hopper_attention_create(CudaBackend *cuda, Error *e) {
#if LLMC_BF16
    if (cuda->capability != 90)
        return fail(e, EXIT_USAGE, "--attention hopper: %s has compute capability %d.%d; its kernels are for 9.0 (H100, H200) alone; use --attention ours",
                    cuda->device_name, cuda->capability / 10, cuda->capability % 10);
    if (code_version() != 90) return fail(e, EXIT_USAGE, "--attention hopper: this build has no code for sm_90a (make cuda ARCH='80 90a'); use --attention ours");
    return true;
#else
    (void)cuda;
    return fail(e, EXIT_USAGE, "--attention hopper: its kernels are for bf16 alone; use --attention ours in fp32");
#endif
}

size_t cuda_attention_saved_bytes(Backend *, size_t B, size_t T, size_t H, size_t D) {
    (void)D;
    return B * H * T * sizeof(float);
}

void cuda_attention_forward(Backend *b, const AttentionForward *a) {
    CudaBackend *cuda = cuda_of(b);
    AttentionShape s = shape_of("attention_forward", a->B, a->T, a->H, a->D);
    op_begin(cuda, OP_attention_forward);
    if (cuda->cudnn && cudnn_attention_forward(cuda, a)) return;
    if (cuda->planning) return;
    CHECK(a->out.p && a->qkv.p, "attention_forward: operand absent");
    elem *out = (elem *)a->out.p;
    const elem *qkv = (const elem *)a->qkv.p;
#if LLMC_BF16
    if (cuda->hopper_attention && (s.D == 64 || s.D == 128)) return attention_hopper_forward(cuda, out, (float *)a->saved.p, qkv, s);
    if (s.D == 64 || s.D == 128) return attention_tile_forward(cuda, out, (float *)a->saved.p, qkv, s);
#endif
    attention_plain_forward(cuda, out, (float *)a->saved.p, qkv, s);
}

void cuda_attention_backward(Backend *b, const AttentionBackward *a) {
    CudaBackend *cuda = cuda_of(b);
    AttentionShape s = shape_of("attention_backward", a->B, a->T, a->H, a->D);
    op_begin(cuda, OP_attention_backward);
    if (cuda->cudnn && cudnn_attention_backward(cuda, a)) return;
    float *delta = scratch<float>(cuda, s.B * s.H * s.T, "attention delta");
    if (cuda->planning) return;
    CHECK(a->dqkv.p && a->dout.p && a->out.p && a->saved.p && a->qkv.p, "attention_backward: operand absent");
    elem *dqkv = (elem *)a->dqkv.p;
    const elem *dout = (const elem *)a->dout.p, *out = (const elem *)a->out.p, *qkv = (const elem *)a->qkv.p;
    const float *lse = (const float *)a->saved.p;
#if LLMC_BF16
    if (cuda->hopper_attention && (s.D == 64 || s.D == 128)) return attention_hopper_backward(cuda, dqkv, dout, out, lse, qkv, delta, s);
    if (s.D == 64 || s.D == 128) return attention_tile_backward(cuda, dqkv, dout, out, lse, qkv, delta, s);
#endif
    attention_plain_backward(cuda, dqkv, dout, out, lse, qkv, delta, s);
}

} /* namespace */
