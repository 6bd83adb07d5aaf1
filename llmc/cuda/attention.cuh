/* Between the files of attention: its shape, the meaning of what the forward saves, and the entry of each implementation. attention.cu chooses;
 * attention_tile_*.cu: tensor cores, bf16, heads of 64 and 128; attention_hopper_*.cu: Hopper's, the same; attention_plain.cu: every shape and type. */
#ifndef LLMC_CUDA_ATTENTION_CUH
#define LLMC_CUDA_ATTENTION_CUH
#include "backend.cuh"

namespace LLMC_NS {

struct AttentionShape { size_t B, T, H, D; };

/* Operands, for all implementations. C = H D, scale = 1 / sqrt(D), causal.
 *   out (B, T, C) =                dqkv (B, T, 3C) =, both dense
 *   qkv (B, T, 3C) in: of each position q of all heads, k of all heads, v of all heads
 *   lse (B, H, T): the natural logarithm of a row's sum of exp(scale q.k), max included; what cuDNN calls its statistics. The forward
 *     writes it (NULL: nobody will ask), the backward reads it. Any forward's lse serves any backward.
 *   delta (B, H, T): scratch of the backward, delta = sum over d of dout out */
void attention_tile_forward(CudaBackend *, elem *out, float *lse, const elem *qkv, AttentionShape);
void attention_tile_backward(CudaBackend *, elem *dqkv, const elem *dout, const elem *out, const float *lse, const elem *qkv, float *delta,
                             AttentionShape);

/* Where CudaBackend::hopper_attention says so. */
void attention_hopper_forward(CudaBackend *, elem *out, float *lse, const elem *qkv, AttentionShape);
void attention_hopper_backward(CudaBackend *, elem *dqkv, const elem *dout, const elem *out, const float *lse, const elem *qkv, float *delta,
                               AttentionShape);

void attention_plain_forward(CudaBackend *, elem *out, float *lse, const elem *qkv, AttentionShape);
void attention_plain_backward(CudaBackend *, elem *dqkv, const elem *dout, const elem *out, const float *lse, const elem *qkv,
                                                    float *delta, AttentionShape);

} /* namespace */
#endif
