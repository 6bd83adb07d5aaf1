/* Token and position embedding, and its backward: rows of one token are brought together by a stable counting sort of integers on the device and
 * added in ascending order, so that no float atomics are needed and the host knows nothing of the tokens. */
#include "backend.cuh"

namespace LLMC_NS {

enum { VECTOR = Vec<elem>::N, MOST_THREADS = 256, CHUNK = 1024 /* rows ranked by one block */, SLICE = 64 /* sorted rows summed by one block */ };

/* Threads for rows of `pieces` pieces: whole warps, at most MOST_THREADS; blocks along the row for the rest. */
static unsigned row_threads(size_t pieces) { return (unsigned)min(round_up(pieces, (size_t)WARP), (size_t)MOST_THREADS); }

/* ---- forward ------------------------------------------------------------------------------------------------------------------ */

/* out[n] = wte[token[n]] + wpe[n % T].  out (N, C) =, tokens (N) in, wte (V, C), wpe (T, C) in.  A block: a row, or a part of it; a thread: W
 * columns. A token outside the vocabulary, which the loader has refused: NaN.
 * Bytes: N C elements written and of each table's rows read, the floor (wpe comes from the L2). One rounding. */
template <int W> __global__ void __launch_bounds__(MOST_THREADS)
embed_forward_kernel(elem *out, const int32_t *tokens, const elem *wte, const elem *wpe, int T, int C, int V) {
    begin_kernel();
    const size_t row = blockIdx.x;
    const int c = (blockIdx.y * blockDim.x + threadIdx.x) * W, token = tokens[row];
    if (c >= C) return;
    float a[W], b[W];
    unpack(a, load_piece<W>(wpe + (size_t)(blockIdx.x % T) * C + c)); /* a remainder of 64 bits would be most of the kernel */
    if (token >= 0 && token < V) unpack(b, load_piece<W>(wte + (size_t)token * C + c));
    else
        for (int i = 0; i < W; i++) b[i] = NAN;
    for (int i = 0; i < W; i++) a[i] += b[i];
    store_piece(out + row * C + c, pack<elem>(a));
}

template <int W> static void forward(CudaBackend *cuda, const EmbedForward *a) {
    const size_t pieces = a->C / W, threads = row_threads(pieces);
    LAUNCH(embed_forward_kernel<W>, dim3((unsigned)(a->B * a->T), (unsigned)ceil_div(pieces, threads)), dim3((unsigned)threads), 0, cuda->stream, (elem *)a->out.p,
           a->tokens.p, (const elem *)a->wte.p, (const elem *)a->wpe.p, (int)a->T, (int)a->C, (int)a->V);
}

static void check_shape(const char *op, size_t B, size_t T, size_t C, size_t V) {
    CHECK(B && T && C && V && B * T <= INT32_MAX && C <= INT32_MAX / 2 && V <= INT32_MAX / 2, "%s: B %zu, T %zu, C %zu, V %zu", op, B, T, C, V);
}

void cuda_embed_forward(Backend *b, const EmbedForward *a) {
    CudaBackend *cuda = cuda_of(b);
    check_shape("embed_forward", a->B, a->T, a->C, a->V);
    op_begin(cuda, OP_embed_forward);
    if (cuda->planning) return;
    CHECK(a->out.p && a->tokens.p && a->wte.p && a->wpe.p, "embed_forward: operand absent");
    if (a->C % VECTOR) forward<1>(cuda, a);
    else forward<VECTOR>(cuda, a);
}

/* ---- the sort: order[place] = row, rows of one token side by side and ascending --------------------------------------------------- */

/* rank[n] = how many rows of n's chunk before n have n's token; counts[chunk, token] = how many rows of the chunk have it, set by the last of
 * them (the others are zeros from before). counts (chunks, V) +=, rank (N) =, tokens (N) in.
 * A block: a chunk; a thread: a row, compared with all of the chunk, four at a time from shared memory (one address a warp: no conflicts). */
__global__ void __launch_bounds__(CHUNK) embed_rank_kernel(int32_t *counts, int32_t *rank, const int32_t *tokens, int N, int V) {
    begin_kernel();
    DYNAMIC_SHARED(int4, chunk);
    const int mine = threadIdx.x, row = blockIdx.x * CHUNK + mine, token = row < N ? tokens[row] : -1;
    ((int32_t *)chunk)[mine] = token;
    __syncthreads();
    if (token < 0 || token >= V) return; /* after the only barrier */
    int before = 0, all = 0;
    for (int i = 0; i < CHUNK / 4; i++) {
        const int4 four = chunk[i];
        const int same[4] = {four.x == token, four.y == token, four.z == token, four.w == token};
        for (int k = 0; k < 4; k++) all += same[k], before += same[k] && 4 * i + k < mine;
    }
    rank[row] = before;
    if (before + 1 == all) counts[(size_t)blockIdx.x * V + token] = all;
}

/* counts[chunk, token] becomes the number of the token's rows in chunks before; total[token] = of all. A thread: a token, chunks ascending.
 * counts (chunks, V) +=, total (V) =. */
__global__ void __launch_bounds__(MOST_THREADS) embed_chunks_kernel(int32_t *counts, int32_t *total, int chunks, int V) {
    begin_kernel();
    const int token = blockIdx.x * MOST_THREADS + threadIdx.x;
    if (token >= V) return;
    int sum = 0;
    for (int i = 0; i < chunks; i++) {
        int32_t *at = counts + (size_t)i * V + token;
        const int n = *at;
        *at = sum;
        sum += n;
    }
    total[token] = sum;
}

/* total[token] becomes the number of rows of all tokens before it; total[V] = of all. total (V + 1) +=.  One block; a thread: a stretch of tokens. */
__global__ void __launch_bounds__(CHUNK) embed_offsets_kernel(int32_t *total, int V) {
    begin_kernel();
    DYNAMIC_SHARED(int32_t, warps);
    const int each = ceil_div(V, (int)CHUNK), first = min((int)threadIdx.x * each, V), end = min(first + each, V), warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int mine = 0;
    for (int i = first; i < end; i++) mine += total[i];
    int up_to = mine; /* of the warp's threads up to this one */
    for (int by = 1; by < WARP; by *= 2) {
        const int other = __shfl_up_sync(FULL_MASK, up_to, by);
        if (lane >= by) up_to += other;
    }
    if (lane == WARP - 1) warps[warp] = up_to;
    __syncthreads();
    int before = up_to - mine;
    for (int i = 0; i < warp; i++) before += warps[i];
    for (int i = first; i < end; i++) {
        const int n = total[i];
        total[i] = before;
        before += n;
    }
    if (end == V && first < end) total[V] = before;
}

/* order[place of n] = n.  order (N) =, rank, tokens (N), counts (chunks, V), offsets (V) in.  A thread: a row. */
__global__ void __launch_bounds__(CHUNK) embed_place_kernel(int32_t *order, const int32_t *rank, const int32_t *counts, const int32_t *offsets, const int32_t *tokens, int N, int V) {
    begin_kernel();
    const int row = blockIdx.x * CHUNK + threadIdx.x, token = row < N ? tokens[row] : -1;
    if (token >= 0 && token < V) order[offsets[token] + counts[(size_t)blockIdx.x * V + token] + rank[row]] = row;
}

/* ---- sums over the sorted rows -------------------------------------------------------------------------------------------------------- */

template <int W> __device__ __forceinline__ void add_floats(float *to, const float (&x)[W]) {
    float before[W];
    unpack(before, load_piece<W>(to));
    for (int i = 0; i < W; i++) before[i] += x[i];
    store_piece(to, pack<float>(before));
}

/* dwte[token] += sum of dout over the token's rows, of the runs that lie in one slice of SLICE sorted rows. What a slice has of a run that began
 * before it goes to edges[slice, 0], of one that goes on after it (and began here) to edges[slice, 1]; embed_edges_kernel adds those.
 * dwte (V, C) +=, edges (slices, 2, C) =, dout (N, C) in, order (N), tokens (N), offsets (V + 1) in.
 * A block: a slice, or a part of its columns; a thread: W columns; four rows in flight.
 * Bytes: dout once, each touched row of dwte read and written once: the floor; edges: at most 2 C floats for 64 rows read (6 % in bf16 if all are used).
 * Order: rows ascending within a run's part; the parts ascending. Error: roundings of float, one a row. */
template <int W> __global__ void __launch_bounds__(MOST_THREADS)
embed_sum_kernel(float *dwte, float *edges, const elem *dout, const int32_t *order, const int32_t *tokens, const int32_t *offsets, int C, int V) {
    begin_kernel();
    enum { FLIGHT = 4 };
    const int c = (blockIdx.y * blockDim.x + threadIdx.x) * W, rows = offsets[V], begin = blockIdx.x * SLICE, end = min(begin + (int)SLICE, rows);
    if (c >= C || begin >= rows) return;
    float sum[W] = {};
    int token = tokens[order[begin]];
    for (int place = begin; place < end; place += FLIGHT) {
        Piece<elem, W> x[FLIGHT];
        int its[FLIGHT];
        for (int k = 0; k < FLIGHT; k++) {
            const int row = order[min(place + k, end - 1)];
            its[k] = tokens[row];
            x[k] = load_piece<W>(dout + (size_t)row * C + c);
        }
        for (int k = 0; k < FLIGHT; k++) {
            if (place + k >= end) continue;
            if (its[k] != token) { /* the run ends here: in this slice it began, or before it */
                if (offsets[token] < begin) store_piece(edges + (size_t)blockIdx.x * 2 * C + c, pack<float>(sum));
                else add_floats(dwte + (size_t)token * C + c, sum);
                for (int i = 0; i < W; i++) sum[i] = 0;
                token = its[k];
            }
            float v[W];
            unpack(v, x[k]);
            for (int i = 0; i < W; i++) sum[i] += v[i];
        }
    }
    const bool began_before = offsets[token] < begin, goes_on = offsets[token + 1] > end;
    if (began_before) store_piece(edges + (size_t)blockIdx.x * 2 * C + c, pack<float>(sum));
    else if (goes_on) store_piece(edges + ((size_t)blockIdx.x * 2 + 1) * C + c, pack<float>(sum));
    else add_floats(dwte + (size_t)token * C + c, sum);
}

/* dwte[token] += the parts of the run that begins in a slice and goes on after it: the slice's own, then those of the slices that follow, ascending.
 * dwte (V, C) +=, edges (slices, 2, C) in.  A block: a slice, or a part of its columns; a thread: W columns. Bytes: the edges once. */
template <int W> __global__ void __launch_bounds__(MOST_THREADS)
embed_edges_kernel(float *dwte, const float *edges, const int32_t *order, const int32_t *tokens, const int32_t *offsets, int C, int V) {
    begin_kernel();
    const int c = (blockIdx.y * blockDim.x + threadIdx.x) * W, rows = offsets[V], begin = blockIdx.x * SLICE, end = begin + SLICE;
    if (c >= C || end >= rows) return;
    const int token = tokens[order[end - 1]], last = offsets[token + 1]; /* the run's end */
    if (offsets[token] < begin || last <= end) return;
    float sum[W];
    unpack(sum, load_piece<W>(edges + ((size_t)blockIdx.x * 2 + 1) * C + c));
    for (int slice = blockIdx.x + 1; slice * (int)SLICE < last; slice++) {
        float part[W];
        unpack(part, load_piece<W>(edges + (size_t)slice * 2 * C + c));
        for (int i = 0; i < W; i++) sum[i] += part[i];
    }
    add_floats(dwte + (size_t)token * C + c, sum);
}

/* dwpe[t] += sum over b of dout[b, t], b ascending.  dwpe (T, C) +=, dout (B, T, C) in.  A block: a position, or a part of its columns; a thread: W
 * columns. Bytes: dout once more (partly from the L2), dwpe read and written. */
template <int W> __global__ void __launch_bounds__(MOST_THREADS) embed_positions_kernel(float *dwpe, const elem *dout, int B, int T, int C) {
    begin_kernel();
    const int c = (blockIdx.y * blockDim.x + threadIdx.x) * W;
    if (c >= C) return;
    float sum[W] = {};
#pragma unroll 4
    for (int b = 0; b < B; b++) {
        float v[W];
        unpack(v, load_piece<W>(dout + ((size_t)b * T + blockIdx.x) * C + c));
        for (int i = 0; i < W; i++) sum[i] += v[i];
    }
    add_floats(dwpe + (size_t)blockIdx.x * C + c, sum);
}

struct Sort { int32_t *counts, *rank, *order, *offsets; float *edges; };

template <int W> static void backward(CudaBackend *cuda, const EmbedBackward *a, const Sort &s) {
    const size_t N = a->B * a->T, pieces = a->C / W, threads = row_threads(pieces);
    const unsigned chunks = (unsigned)ceil_div(N, (size_t)CHUNK), parts = (unsigned)ceil_div(pieces, threads), slices = (unsigned)ceil_div(N, (size_t)SLICE);
    const elem *dout = (const elem *)a->dout.p;
    const int V = (int)a->V, C = (int)a->C;
    cuda_check(cudaMemsetAsync(s.counts, 0, chunks * a->V * sizeof(int32_t), cuda->stream), "clearing counts");
    LAUNCH(embed_rank_kernel, dim3(chunks), dim3(CHUNK), CHUNK * sizeof(int32_t), cuda->stream, s.counts, s.rank, a->tokens.p, (int)N, V);
    LAUNCH(embed_chunks_kernel, dim3((unsigned)ceil_div(a->V, (size_t)MOST_THREADS)), dim3(MOST_THREADS), 0, cuda->stream, s.counts, s.offsets, (int)chunks, V);
    LAUNCH(embed_offsets_kernel, dim3(1), dim3(CHUNK), CHUNK / WARP * sizeof(int32_t), cuda->stream, s.offsets, V);
    LAUNCH(embed_place_kernel, dim3(chunks), dim3(CHUNK), 0, cuda->stream, s.order, s.rank, s.counts, s.offsets, a->tokens.p, (int)N, V);
    LAUNCH(embed_sum_kernel<W>, dim3(slices, parts), dim3((unsigned)threads), 0, cuda->stream, a->dwte.p, s.edges, dout, s.order, a->tokens.p, s.offsets, C, V);
    LAUNCH(embed_edges_kernel<W>, dim3(slices, parts), dim3((unsigned)threads), 0, cuda->stream, a->dwte.p, s.edges, s.order, a->tokens.p, s.offsets, C, V);
    LAUNCH(embed_positions_kernel<W>, dim3((unsigned)a->T, parts), dim3((unsigned)threads), 0, cuda->stream, a->dwpe.p, dout, (int)a->B, (int)a->T, C);
}

void cuda_embed_backward(Backend *b, const EmbedBackward *a) {
    CudaBackend *cuda = cuda_of(b);
    const size_t N = a->B * a->T;
    check_shape("embed_backward", a->B, a->T, a->C, a->V);
    op_begin(cuda, OP_embed_backward);
    Sort s;
    s.counts = scratch<int32_t>(cuda, ceil_div(N, (size_t)CHUNK) * a->V, "tokens of each chunk");
    s.rank = scratch<int32_t>(cuda, N, "ranks"), s.order = scratch<int32_t>(cuda, N, "order of rows");
    s.offsets = scratch<int32_t>(cuda, a->V + 1, "rows of each token");
    s.edges = scratch<float>(cuda, ceil_div(N, (size_t)SLICE) * 2 * a->C, "sums cut by slices");
    if (cuda->planning) return;
    CHECK(a->dwte.p && a->dwpe.p && a->dout.p && a->tokens.p, "embed_backward: operand absent");
    if (a->C % VECTOR) backward<1>(cuda, a, s);
    else backward<VECTOR>(cuda, a, s);
}

} /* namespace */
