/* Attention for generation: a few new tokens against a cache of keys and values, which they join in the same launch. One block a token and head:
 * a decode step is bound by reading the cache once, not by products. */
#include "backend.cuh"

namespace LLMC_NS {

enum { THREADS = 256, WARPS = THREADS / WARP, LARGEST_D = 256, PER_LANE = LARGEST_D / WARP };

/* q . k, d ascending, in four partial sums where the row is whole vectors (it then begins on one), else in one. q: shared, float. */
__device__ __forceinline__ float dot(const float *q, const elem *k, int D) {
    enum { N = Vec<elem>::N };
    float sum[4] = {};
    if (D % N) {
        for (int d = 0; d < D; d++) sum[0] += q[d] * to_float(k[d]);
    } else {
#pragma unroll 2
        for (int d = 0; d < D; d += N) {
            const Vec<elem> x = load_vec(k + d);
            for (int i = 0; i < N; i++) sum[i % 4] += q[d + i] * to_float(x.v[i]);
        }
    }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

/* cache[b, position + i] = (k, v) of qkv[b, i]; out[b, i] = the attention of q[b, i] over rows 0 .. position + i.
 * out (B, n, C) =, cache (B, T, 2C) += rows position .. position + n - 1, qkv (B, n, 3C) in. Block (b, i, h), h fastest: rows below position come
 * from the cache, the others from qkv, so that no block reads what another writes; it writes its own D elements of both to the cache. A warp takes
 * every eighth group of 32 keys: a lane scores one key, then the warp adds values, lane l columns l, l + 32, ...; the warps' sums meet at the end.
 * Bytes: the cache once a new token (2 C (position + i) elements, the floor when n is 1), the qkv rows, out.
 * Order: keys ascending within a warp, warps ascending. Error: that of float32 sums over D and over the keys. */
__global__ void __launch_bounds__(THREADS, 2)
attention_decode_kernel(elem *out, elem *cache, const elem *qkv, size_t T, int H, int D, size_t n, size_t position, float scale) {
    begin_kernel();
    DYNAMIC_SHARED(float, q);                       /* (D) the query, scaled */
    float *part = q + LARGEST_D;                    /* (WARPS, D) each warp's weighted values */
    float *weights = part + WARPS * LARGEST_D;      /* (WARPS, 32) */
    float *maxima = weights + WARPS * WARP, *totals = maxima + WARPS;
    const int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP, tid = (int)threadIdx.x;
    const size_t C = (size_t)H * D, h = blockIdx.x % H, token = blockIdx.x / H, b = token / n, i = token % n, keys = position + i + 1;
    const elem *fresh = qkv + b * n * 3 * C + h * D; /* q of the sequence's first new token, k and v C and 2C behind */
    elem *old = cache + b * T * 2 * C + h * D;       /* k of its first row, v C behind */
    for (int d = tid; d < D; d += THREADS) {
        const elem *mine = fresh + i * 3 * C + d;
        q[d] = to_float(mine[0]) * scale;
        old[(position + i) * 2 * C + d] = mine[C];
        old[(position + i) * 2 * C + C + d] = mine[2 * C];
    }
    __syncthreads();
    float max = -INFINITY, total = 0, sum[PER_LANE] = {};
    for (size_t k0 = (size_t)warp * WARP; k0 < keys; k0 += THREADS) {
        const size_t key = k0 + lane;
        float s = -INFINITY;
        if (key < keys) s = dot(q, key < position ? old + key * 2 * C : fresh + (key - position) * 3 * C + C, D);
        const float most = fmaxf(max, warp_max(s)), shrink = expf(max - most), p = expf(s - most);
        total = total * shrink + p;
        max = most;
        __syncwarp(); /* the weights before have been read */
        weights[warp * WARP + lane] = p;
        __syncwarp();
#pragma unroll
        for (int c = 0; c < PER_LANE; c++) sum[c] *= shrink;
        const int count = keys - k0 < WARP ? (int)(keys - k0) : WARP;
#pragma unroll 2
        for (int j = 0; j < count; j++) {
            const elem *v = k0 + j < position ? old + (k0 + j) * 2 * C + C : fresh + (k0 + j - position) * 3 * C + 2 * C;
            const float w = weights[warp * WARP + j];
#pragma unroll
            for (int c = 0; c < PER_LANE; c++)
                if (lane + c * WARP < D) sum[c] += w * to_float(v[lane + c * WARP]);
        }
    }
    total = warp_sum(total);
#pragma unroll
    for (int c = 0; c < PER_LANE; c++)
        if (lane + c * WARP < D) part[warp * LARGEST_D + lane + c * WARP] = sum[c];
    if (lane == 0) maxima[warp] = max, totals[warp] = total;
    __syncthreads();
    if (tid >= D) return;
    float most = maxima[0], numerator = 0, denominator = 0; /* warp 0 always has a key */
    for (int w = 1; w < WARPS; w++) most = fmaxf(most, maxima[w]);
    for (int w = 0; w < WARPS; w++) {
        const float shrink = expf(maxima[w] - most); /* 0 for a warp without keys */
        numerator += shrink * part[w * LARGEST_D + tid];
        denominator += shrink * totals[w];
    }
    out[(b * n + i) * C + h * D + tid] = to_elem(numerator / denominator);
}

void cuda_attention_decode(Backend *b, const AttentionDecode *a) {
    CudaBackend *cuda = cuda_of(b);
    CHECK(a->B && a->H && a->D && a->D <= LARGEST_D && a->n && a->n <= a->T && a->position <= a->T - a->n && a->B * a->n * a->H < (size_t)1 << 31,
          "attention_decode: B %zu, T %zu, H %zu, D %zu, n %zu, position %zu", a->B, a->T, a->H, a->D, a->n, a->position);
    op_begin(cuda, OP_attention_decode);
    if (cuda->planning) return;
    CHECK(a->out.p && a->cache.p && a->qkv.p, "attention_decode: operand absent");
    const size_t shared = (LARGEST_D + WARPS * LARGEST_D + WARPS * WARP + 2 * WARPS) * sizeof(float);
    LAUNCH(attention_decode_kernel, dim3((unsigned)(a->B * a->n * a->H)), dim3(THREADS), shared, cuda->stream, (elem *)a->out.p, (elem *)a->cache.p,
           (const elem *)a->qkv.p, a->T, (int)a->H, (int)a->D, a->n, a->position, (float)(1 / sqrt((double)a->D)));
}

} /* namespace */
