/* Causal attention in plain CUDA with float32 inside: any head size up to 256, both compute types. It is the path of fp32 and of the head sizes
 * that the tensor-core kernels do not take, and their oracle: the same arguments, the same saved statistic. The mathematics and the tiling are
 * Dao et al. 2022 (FlashAttention) with the online softmax of Milakov and Gimelshein 2018; nothing of size T x T. */
#include "attention.cuh"

namespace LLMC_NS {

/* A block owns ROWS rows of one head (queries, or keys in the kernel of dk and dv) and walks over the rows of the other kind, KEYS at a time.
 * Eight threads share two rows: thread 8 g + l has rows 2 g and 2 g + 1 of a product with KEYS columns, of those the columns l + 8 j; and of a
 * product with W columns the columns 4 l .. 4 l + 3 of every 32. So a row's maximum and sum stay in one warp, and weights written to shared
 * memory are read by the warp that wrote them. Tiles have rows of W + 4 floats, so that eight neighbouring rows, read at once, fall on all 32 banks. */
enum { ROWS = 32, THREADS = 128 };
template <int W> struct Tile {                /* W: head size rounded up to 32, 64, 128 or 256 */
    enum { BLOCKS = W > 128 ? 2 : 3 }; /* that an SM's registers hold at least */
    enum { KEYS = W > 128 ? 16 : 32, COLUMNS = KEYS / 8, ROW = W + 4, WEIGHT_ROW = KEYS + 4 };
    static size_t shared_bytes(int streamed, int owned) { /* tiles of each kind, and the weights */
        return (size_t)(streamed * KEYS * ROW + owned * ROWS * ROW + ROWS * WEIGHT_ROW) * sizeof(float);
    }
};

__device__ __forceinline__ int group() { return (int)threadIdx.x / 8; }
__device__ __forceinline__ int in_group() { return (int)threadIdx.x % 8; }
__device__ __forceinline__ float4 load4(const float *p) { return *(const float4 *)(const void *)p; }

/* Over the eight threads that share a row. */
__device__ __forceinline__ float row_max(float x) {
    for (int lane = 4; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, lane));
    return x;
}
__device__ __forceinline__ float row_sum(float x) {
    for (int lane = 4; lane > 0; lane /= 2) x += __shfl_xor_sync(FULL_MASK, x, lane);
    return x;
}

/* One head of one sequence, found in the operands by the block's number: blocks of all heads take their first tile, then all their second. */
struct Head {
    int T, D, row;            /* row: the first owned */
    size_t C, stat, qkv, out; /* offsets of the head's first row in lse (B, H, T), qkv (B, T, 3C) and out (B, T, C) */
};
__device__ __forceinline__ Head head_of_block(AttentionShape s, bool last_first) {
    Head h;
    const unsigned heads = (unsigned)(s.B * s.H), bh = blockIdx.x % heads, b = bh / (unsigned)s.H, tile = blockIdx.x / heads;
    h.T = (int)s.T, h.D = (int)s.D, h.C = s.H * s.D;
    h.row = (int)(last_first ? gridDim.x / heads - 1 - tile : tile) * ROWS; /* the longest walks first */
    h.stat = bh * s.T;
    h.out = b * s.T * h.C + bh % (unsigned)s.H * s.D;
    h.qkv = b * s.T * 3 * h.C + bh % (unsigned)s.H * s.D;
    return h;
}

/* to (rows, W + 4) = scale from (valid, D), zero beyond valid and D up to the next multiple of 32; rows of from are from_row elements apart. By
 * all threads, 16 bytes at a time where D is a whole number of vectors (then every row begins on one). */
template <int W> __device__ void load_tile(float *to, const elem *from, size_t from_row, int rows, int valid, int D, float scale) {
    const int width = round_up(D, 32);
    enum { N = Vec<elem>::N };
    if (D % N) {
#pragma unroll 1
        for (int i = (int)threadIdx.x; i < rows * width; i += THREADS) {
            const int r = i / width, d = i % width;
            to[r * Tile<W>::ROW + d] = r < valid && d < D ? to_float(from[r * from_row + d]) * scale : 0.0f;
        }
        return;
    }
#pragma unroll 1
    for (int i = (int)threadIdx.x; i < rows * (width / N); i += THREADS) {
        const int r = i / (width / N), d = i % (width / N) * N;
        float x[N] = {};
        if (r < valid && d < D) {
            const Vec<elem> v = load_vec(from + r * from_row + d);
            for (int k = 0; k < N; k++) x[k] = to_float(v.v[k]) * scale;
        }
        for (int k = 0; k < N; k += 4) *(float4 *)(void *)(to + r * Tile<W>::ROW + d + k) = make_float4(x[k], x[k + 1], x[k + 2], x[k + 3]);
    }
}

/* s[i][j] = (row 2 g + i of a) . (row l + 8 j of b), summed over d in order. */
template <int W> __device__ __forceinline__ void multiply(float (&s)[2][Tile<W>::COLUMNS], const float *a, const float *b, int D) {
    enum { COLUMNS = Tile<W>::COLUMNS, ROW = Tile<W>::ROW };
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < COLUMNS; j++) s[i][j] = 0;
    a += 2 * group() * ROW, b += in_group() * ROW;
#pragma unroll 1
    for (int d = 0; d < D; d += 4) {
        const float4 x0 = load4(a + d), x1 = load4(a + ROW + d);
        for (int j = 0; j < COLUMNS; j++) {
            const float4 y = load4(b + 8 * j * ROW + d);
            s[0][j] += x0.x * y.x, s[0][j] += x0.y * y.y, s[0][j] += x0.z * y.z, s[0][j] += x0.w * y.w;
            s[1][j] += x1.x * y.x, s[1][j] += x1.y * y.y, s[1][j] += x1.z * y.z, s[1][j] += x1.w * y.w;
        }
    }
}

/* The group's weights into shared memory, for its own warp to read; what it read before may be overwritten. */
template <int W> __device__ __forceinline__ void put_weights(float *weights, const float (&s)[2][Tile<W>::COLUMNS]) {
    __syncwarp();
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < Tile<W>::COLUMNS; j++) weights[(2 * group() + i) * Tile<W>::WEIGHT_ROW + in_group() + 8 * j] = s[i][j];
    __syncwarp();
}

/* sum[i][c] += sum over k of weights (2 g + i, k) b (k, 4 l + c % 4 + 32 (c / 4)), k in order. */
template <int W> __device__ __forceinline__ void multiply_add(float (&sum)[2][W / 8], const float *weights, const float *b, int D) {
    const float *w = weights + 2 * group() * Tile<W>::WEIGHT_ROW;
    b += 4 * in_group();
#pragma unroll
    for (int c = 0; c < W / 8; c += 4) {
        if (8 * c >= D) continue; /* the same for all threads */
#pragma unroll 1
        for (int k = 0; k < Tile<W>::KEYS; k += 4) {
            const float4 w0 = load4(w + k), w1 = load4(w + Tile<W>::WEIGHT_ROW + k);
            const float x0[4] = {w0.x, w0.y, w0.z, w0.w}, x1[4] = {w1.x, w1.y, w1.z, w1.w};
            for (int n = 0; n < 4; n++) {
                const float4 y = load4(b + (k + n) * Tile<W>::ROW + 8 * c);
                sum[0][c] += x0[n] * y.x, sum[0][c + 1] += x0[n] * y.y, sum[0][c + 2] += x0[n] * y.z, sum[0][c + 3] += x0[n] * y.w;
                sum[1][c] += x1[n] * y.x, sum[1][c + 1] += x1[n] * y.y, sum[1][c + 2] += x1[n] * y.z, sum[1][c + 3] += x1[n] * y.w;
            }
        }
    }
}

template <class T> struct alignas(4 * sizeof(T)) Four { T v[4]; };

/* to (valid, D) = scale[i] sum, rounded once; rows of to are to_row elements apart. */
template <int W>
__device__ __forceinline__ void store_rows(elem *to, size_t to_row, const float (&sum)[2][W / 8], const float (&scale)[2], int valid, int D) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int r = 2 * group() + i;
        if (r >= valid) continue;
#pragma unroll
        for (int c = 0; c < W / 8; c += 4) {
            const int d = 4 * in_group() + 8 * c;
            Four<elem> x;
            for (int k = 0; k < 4; k++) x.v[k] = to_elem(sum[i][c + k] * scale[i]);
            if (D % 4 == 0 && d < D) *(Four<elem> *)(void *)(to + r * to_row + d) = x;
            for (int k = 0; D % 4 && k < 4; k++)
                if (d + k < D) to[r * to_row + d + k] = x.v[k];
        }
    }
}

/* out[t] = sum over s <= t of p(t, s) v[s], p(t, s) = exp(q[t].k[s] / sqrt(D) - lse[t]), lse[t] = log(sum over s <= t of exp(q[t].k[s] / sqrt(D))).
 * out (B, T, C) =, lse (B, H, T) = or absent, qkv (B, T, 3C) in. A block: 32 queries of a head; keys in tiles up to the diagonal.
 * Bytes: q and out once, k and v once a query tile (from L2 but for the first): T / 64 times the floor of 4 N C elements for them.
 * Order: keys ascending; a row's sum of weights in 8 partial sums over key % 8. Error: that of float32 sums over D and over t + 1 terms. */
template <int W> __global__ void __launch_bounds__(THREADS, Tile<W>::BLOCKS)
attention_plain_forward_kernel(elem *out, float *lse, const elem *qkv, AttentionShape s, float scale) {
    begin_kernel();
    enum { KEYS = Tile<W>::KEYS, COLUMNS = Tile<W>::COLUMNS };
    DYNAMIC_SHARED(float, q);
    float *kv = q + ROWS * Tile<W>::ROW, *weights = kv + KEYS * Tile<W>::ROW;
    const Head h = head_of_block(s, true);
    const int D = h.D, valid = h.T - h.row, mine = h.row + 2 * group();
    const elem *k = qkv + h.qkv + h.C, *v = k + h.C;
    const size_t row = 3 * h.C;
    float sum[2][W / 8] = {}, max[2] = {-INFINITY, -INFINITY}, total[2] = {};
    load_tile<W>(q, qkv + h.qkv + h.row * row, row, ROWS, valid, D, scale);
    for (int k0 = 0; k0 < h.T && k0 < h.row + ROWS; k0 += KEYS) {
        float p[2][COLUMNS];
        __syncthreads(); /* the tile of values before is done with */
        load_tile<W>(kv, k + k0 * row, row, KEYS, h.T - k0, D, 1);
        __syncthreads();
        multiply<W>(p, q, kv, D);
        for (int i = 0; i < 2; i++) {
            float most = max[i];
            for (int j = 0; j < COLUMNS; j++) {
                if (k0 + in_group() + 8 * j > mine + i) p[i][j] = -INFINITY;
                most = fmaxf(most, p[i][j]);
            }
            most = row_max(most);
            const float shrink = expf(max[i] - most);
            total[i] *= shrink;
            for (int c = 0; c < W / 8; c++) sum[i][c] *= shrink;
            for (int j = 0; j < COLUMNS; j++) total[i] += p[i][j] = expf(p[i][j] - most);
            max[i] = most;
        }
        put_weights<W>(weights, p);
        __syncthreads(); /* the tile of keys is done with */
        load_tile<W>(kv, v + k0 * row, row, KEYS, h.T - k0, D, 1);
        __syncthreads();
        multiply_add<W>(sum, weights, kv, D);
    }
    float inverse[2];
    for (int i = 0; i < 2; i++) {
        total[i] = row_sum(total[i]);
        inverse[i] = 1.0f / total[i];
        if (lse && in_group() == 0 && mine + i < h.T) lse[h.stat + mine + i] = max[i] + logf(total[i]);
    }
    store_rows<W>(out + h.out + h.row * h.C, h.C, sum, inverse, valid, D);
}

/* With p as above, dp(t, s) = dout[t].v[s] and ds(t, s) = p(t, s) (dp(t, s) - delta[t]): delta[t] = dout[t].out[t], dq[t] = sum over s <= t of
 * ds(t, s) k[s] / sqrt(D).  dqkv (B, T, 3C) = in its first third, delta (B, H, T) =; dout, out (B, T, C), lse (B, H, T), qkv in. Block and bytes
 * as forward, keys read twice. Order: keys ascending; delta in 8 partial sums over d % 8. Error: that of float32 sums over D and t + 1 terms. */
template <int W> __global__ void __launch_bounds__(THREADS, Tile<W>::BLOCKS)
attention_plain_dq_kernel(elem *dqkv, float *delta, const elem *dout, const elem *out, const float *lse, const elem *qkv, AttentionShape s,
                          float scale) {
    begin_kernel();
    enum { KEYS = Tile<W>::KEYS, COLUMNS = Tile<W>::COLUMNS };
    DYNAMIC_SHARED(float, q);
    float *dy = q + ROWS * Tile<W>::ROW, *kv = dy + ROWS * Tile<W>::ROW, *weights = kv + KEYS * Tile<W>::ROW;
    const Head h = head_of_block(s, true);
    const int D = h.D, valid = h.T - h.row, mine = h.row + 2 * group();
    const elem *k = qkv + h.qkv + h.C, *v = k + h.C;
    const size_t row = 3 * h.C;
    float sum[2][W / 8] = {}, log_sum[2] = {}, del[2] = {};
    load_tile<W>(q, qkv + h.qkv + h.row * row, row, ROWS, valid, D, scale);
    load_tile<W>(dy, dout + h.out + h.row * h.C, h.C, ROWS, valid, D, 1);
    __syncthreads();
    for (int i = 0; i < 2; i++) {
        if (mine + i < h.T) {
            const elem *y = out + h.out + (mine + i) * h.C;
            for (int d = in_group(); d < D; d += 8) del[i] += dy[(2 * group() + i) * Tile<W>::ROW + d] * to_float(y[d]);
            log_sum[i] = lse[h.stat + mine + i];
        }
        del[i] = row_sum(del[i]);
        if (in_group() == 0 && mine + i < h.T) delta[h.stat + mine + i] = del[i];
    }
    for (int k0 = 0; k0 < h.T && k0 < h.row + ROWS; k0 += KEYS) {
        float p[2][COLUMNS], ds[2][COLUMNS];
        __syncthreads(); /* the tile of keys before is done with */
        load_tile<W>(kv, v + k0 * row, row, KEYS, h.T - k0, D, 1);
        __syncthreads();
        multiply<W>(ds, dy, kv, D);
        __syncthreads(); /* the tile of values is done with */
        load_tile<W>(kv, k + k0 * row, row, KEYS, h.T - k0, D, 1);
        __syncthreads();
        multiply<W>(p, q, kv, D);
        for (int i = 0; i < 2; i++)
            for (int j = 0; j < COLUMNS; j++)
                ds[i][j] = k0 + in_group() + 8 * j > mine + i ? 0.0f : expf(p[i][j] - log_sum[i]) * (ds[i][j] - del[i]);
        put_weights<W>(weights, ds);
        multiply_add<W>(sum, weights, kv, D);
    }
    const float scales[2] = {scale, scale};
    store_rows<W>(dqkv + h.qkv + h.row * row, row, sum, scales, valid, D);
}

/* dv[s] = sum over t >= s of p(t, s) dout[t], dk[s] = sum over t >= s of ds(t, s) q[t] / sqrt(D).  dqkv (B, T, 3C) = in its second and last third;
 * dout (B, T, C), lse, delta (B, H, T), qkv in. A block: 32 keys of a head; queries in tiles from the diagonal on, each read twice: one buffer of
 * shared memory instead of two, which leaves room for the block beside it. Order: queries ascending. Error: float32 sums over D and T - s terms. */
template <int W> __global__ void __launch_bounds__(THREADS, Tile<W>::BLOCKS)
attention_plain_dkv_kernel(elem *dqkv, const elem *dout, const float *lse, const float *delta, const elem *qkv, AttentionShape s, float scale) {
    begin_kernel();
    enum { KEYS = Tile<W>::KEYS, COLUMNS = Tile<W>::COLUMNS };
    DYNAMIC_SHARED(float, k);
    float *v = k + ROWS * Tile<W>::ROW, *tile = v + ROWS * Tile<W>::ROW, *weights = tile + KEYS * Tile<W>::ROW;
    const Head h = head_of_block(s, false);
    const int D = h.D, valid = h.T - h.row, mine = h.row + 2 * group();
    const size_t row = 3 * h.C;
    const elem *q = qkv + h.qkv, *dy = dout + h.out;
    float dk[2][W / 8] = {}, dv[2][W / 8] = {};
    load_tile<W>(k, q + h.C + h.row * row, row, ROWS, valid, D, scale);
    load_tile<W>(v, q + 2 * h.C + h.row * row, row, ROWS, valid, D, 1);
    for (int q0 = h.row; q0 < h.T; q0 += KEYS) {
        float p[2][COLUMNS], ds[2][COLUMNS];
        __syncthreads(); /* the tile of queries before is done with */
        load_tile<W>(tile, q + q0 * row, row, KEYS, h.T - q0, D, 1);
        __syncthreads();
        multiply<W>(p, k, tile, D);
        for (int j = 0; j < COLUMNS; j++) {
            const int t = q0 + in_group() + 8 * j;
            const float log_sum = t < h.T ? lse[h.stat + t] : 0.0f;
            for (int i = 0; i < 2; i++) p[i][j] = t < h.T && t >= mine + i ? expf(p[i][j] - log_sum) : 0.0f;
        }
        put_weights<W>(weights, p);
        __syncthreads(); /* the tile of queries is done with */
        load_tile<W>(tile, dy + q0 * h.C, h.C, KEYS, h.T - q0, D, 1);
        __syncthreads();
        multiply<W>(ds, v, tile, D);
        multiply_add<W>(dv, weights, tile, D);
        for (int j = 0; j < COLUMNS; j++) {
            const int t = q0 + in_group() + 8 * j;
            const float del = t < h.T ? delta[h.stat + t] : 0.0f;
            for (int i = 0; i < 2; i++) ds[i][j] = p[i][j] * (ds[i][j] - del);
        }
        put_weights<W>(weights, ds);
        __syncthreads(); /* the tile of gradients is done with */
        load_tile<W>(tile, q + q0 * row, row, KEYS, h.T - q0, D, 1);
        __syncthreads();
        multiply_add<W>(dk, weights, tile, D);
    }
    const float one[2] = {1, 1}, scales[2] = {scale, scale};
    store_rows<W>(dqkv + h.qkv + h.C + h.row * row, row, dk, scales, valid, D);
    store_rows<W>(dqkv + h.qkv + 2 * h.C + h.row * row, row, dv, one, valid, D);
}

/* ---- launchers --------------------------------------------------------------------------------------------------------------------- */

static dim3 grid_of(AttentionShape s) {
    const size_t blocks = ceil_div(s.T, (size_t)ROWS) * s.B * s.H;
    CHECK(s.D >= 1 && s.D <= 256 && s.T < (size_t)1 << 30 && blocks && blocks < (size_t)1 << 31, "attention: B %zu, T %zu, H %zu, D %zu", s.B, s.T,
          s.H, s.D);
    return dim3((unsigned)blocks);
}
static float scale_of(AttentionShape s) { return (float)(1 / sqrt((double)s.D)); }

template <int W> static void forward(CudaBackend *cuda, elem *out, float *lse, const elem *qkv, AttentionShape s) {
    LAUNCH(attention_plain_forward_kernel<W>, grid_of(s), dim3(THREADS), Tile<W>::shared_bytes(1, 1), cuda->stream, out, lse, qkv, s, scale_of(s));
}
void attention_plain_forward(CudaBackend *cuda, elem *out, float *lse, const elem *qkv, AttentionShape s) {
    if (s.D <= 32) forward<32>(cuda, out, lse, qkv, s);
    else if (s.D <= 64) forward<64>(cuda, out, lse, qkv, s);
    else if (s.D <= 128) forward<128>(cuda, out, lse, qkv, s);
    else forward<256>(cuda, out, lse, qkv, s);
}

template <int W> static void backward(CudaBackend *cuda, elem *dqkv, const elem *dout, const elem *out, const float *lse, const elem *qkv, float *delta,
                                      AttentionShape s) {
    const size_t shared = Tile<W>::shared_bytes(1, 2);
    LAUNCH(attention_plain_dq_kernel<W>, grid_of(s), dim3(THREADS), shared, cuda->stream, dqkv, delta, dout, out, lse, qkv, s, scale_of(s));
    LAUNCH(attention_plain_dkv_kernel<W>, grid_of(s), dim3(THREADS), shared, cuda->stream, dqkv, dout, lse, delta, qkv, s, scale_of(s));
}
void attention_plain_backward(CudaBackend *cuda, elem *dqkv, const elem *dout, const elem *out, const float *lse, const elem *qkv, float *delta,
                              AttentionShape s) {
    if (s.D <= 32) backward<32>(cuda, dqkv, dout, out, lse, qkv, delta, s);
    else if (s.D <= 64) backward<64>(cuda, dqkv, dout, out, lse, qkv, delta, s);
    else if (s.D <= 128) backward<128>(cuda, dqkv, dout, out, lse, qkv, delta, s);
    else backward<256>(cuda, dqkv, dout, out, lse, qkv, delta, s);
}

} /* namespace */
