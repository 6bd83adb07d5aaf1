/* A small causal attention by tensor cores: one head, T rows of D = 16, a block 64 queries, a warp 16 of them, keys and values in tiles of 16
 * through shared memory by cp.async, online softmax. As in the backend's own, small enough to be read at once. */
namespace attention {
enum Bug { NONE, SWAPPED_FRAGMENT, DIAGONAL, NO_WAIT, NO_REUSE_BARRIER, NO_RESCALE, LAST_TILE };
enum { D = 16, WARPS = 4, THREADS = WARPS * WARP, QUERIES = 16 * WARPS, KEYS = 16 };

/* out (T, 16) = softmax(q k^T / 4, causal) v; q, k, v (T, 16).  Shared: q (64 x 16), then two stages of k and v (16 x 16 each).
 * A thread: rows g and g + 8 of its warp's 16 (lane = 4 g + t). Bugs: two registers of the probabilities' fragment exchanged; keys after the
 * query counted within the diagonal tile; the tile read before it has arrived; the next tile loaded into a stage that other warps still read;
 * the output not rescaled when the maximum grows; keys of the last tile beyond T not masked. */
template <Bug BUG> __global__ void attention_kernel(elem *out, const elem *q, const elem *k, const elem *v, int T) {
    DYNAMIC_SHARED(elem, shared);
    elem *sq = shared, *stages = shared + QUERIES * D;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4, first = blockIdx.x * QUERIES;
    const int tiles = (min(first + QUERIES, T) + KEYS - 1) / KEYS, row = first + warp * 16 + g;
    auto load = [&](int tile) { /* 64 pieces of 16 bytes: the first two warps */
        elem *stage = stages + tile % 2 * 2 * KEYS * D;
        const int piece = threadIdx.x, key = tile * KEYS + piece / 2 % KEYS;
        if (piece < 4 * KEYS) cp_async_16(stage + piece * 8, (piece < 2 * KEYS ? k : v) + (size_t)min(key, T - 1) * D + piece % 2 * 8, key < T);
        cp_async_commit();
    };
    const int mine = threadIdx.x; /* q: 128 pieces */
    cp_async_16(sq + mine * 8, q + (size_t)min(first + mine / 2, T - 1) * D + mine % 2 * 8, first + mine / 2 < T);
    load(0);
    uint32_t fq[4], fk[4], fv[4];
    float o[2][4] = {}, largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    for (int tile = 0; tile < tiles; tile++) {
        const elem *sk = stages + tile % 2 * 2 * KEYS * D, *sv = sk + KEYS * D;
        if (BUG == NO_REUSE_BARRIER) {
            tile + 1 < tiles ? load(tile + 1) : cp_async_commit();
            cp_async_wait<1>();
            __syncthreads();
        } else {
            if (BUG != NO_WAIT) cp_async_wait<0>();
            __syncthreads();  /* all copies of this tile are in, and no warp reads the other stage any more */
            if (tile + 1 < tiles) load(tile + 1);
        }
        if (tile == 0) ldmatrix_x4(fq, sq + (warp * 16 + lane % 16) * D + lane / 16 * 8);
        ldmatrix_x4(fk, sk + (lane % 8 + lane / 16 * 8) * D + lane / 8 % 2 * 8);
        float s[2][4] = {};
        for (int n = 0; n < 2; n++) {
            const uint32_t b[2] = {fk[2 * n], fk[2 * n + 1]};
            mma_m16n8k16(s[n], fq, b, s[n]);
        }
        for (int i = 0; i < 8; i++) {
            const int key = tile * KEYS + i / 4 * 8 + 2 * t + i % 2, query = row + i % 4 / 2 * 8;
            const bool masked = BUG == DIAGONAL ? key / KEYS > query / KEYS || key >= T : BUG == LAST_TILE ? key > query && key < T : key > query;
            s[i / 4][i % 4] = masked ? -INFINITY : s[i / 4][i % 4] * (0.25f * 1.4426950408889634f);
        }
        for (int half = 0; half < 2; half++) { /* rows g and g + 8, spread over the four lanes of a quad */
            float most = largest[half], part = 0;
            for (int i = 0; i < 4; i++) most = fmaxf(most, s[i / 2][2 * half + i % 2]);
            most = fmaxf(most, __shfl_xor_sync(FULL_MASK, most, 1));
            most = fmaxf(most, __shfl_xor_sync(FULL_MASK, most, 2));
            const float rescale = exp2_fast(largest[half] - most); /* finite: key 0 is everybody's */
            for (int i = 0; i < 4; i++) part += s[i / 2][2 * half + i % 2] = exp2_fast(s[i / 2][2 * half + i % 2] - most);
            part += __shfl_xor_sync(FULL_MASK, part, 1);
            part += __shfl_xor_sync(FULL_MASK, part, 2);
            sum[half] = sum[half] * rescale + part;
            largest[half] = most;
            for (int i = 0; i < 4 && BUG != NO_RESCALE; i++) o[i / 2][2 * half + i % 2] *= rescale;
        }
        uint32_t p[4] = {pack_bf16(s[0][0], s[0][1]), pack_bf16(s[0][2], s[0][3]), pack_bf16(s[1][0], s[1][1]), pack_bf16(s[1][2], s[1][3])};
        if (BUG == SWAPPED_FRAGMENT) { uint32_t x = p[1]; p[1] = p[2]; p[2] = x; }
        ldmatrix_x4_trans(fv, sv + lane % 16 * D + lane / 16 * 8);
        for (int n = 0; n < 2; n++) {
            const uint32_t b[2] = {fv[2 * n], fv[2 * n + 1]};
            mma_m16n8k16(o[n], p, b, o[n]);
        }
    }
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < 4 && row + 8 * half < T; i++)
            out[(size_t)(row + 8 * half) * D + i / 2 * 8 + 2 * t + i % 2] = to_elem(o[i / 2][2 * half + i % 2] / sum[half]);
}

template <Bug BUG> static void run_attention(Outcome *o) {
    enum { T = 114 };      /* two keys in the last tile, two blocks */
    Device<elem> q(T * D), k(T * D), v(T * D), out(T * D);
    Device<float> x(3 * T * D);
    fill(x.p, 3 * T * D, 9);
    for (int i = 0; i < T * D; i++) q[i] = to_elem(2 * x[i]), k[i] = to_elem(x[T * D + i]), v[i] = to_elem(x[2 * T * D + i]);
    launch(o, ceil_div((unsigned)T, (unsigned)QUERIES), THREADS, (QUERIES + 4 * KEYS) * D * sizeof(elem), attention_kernel<BUG>, out.p,
           (const elem *)q.p, (const elem *)k.p, (const elem *)v.p, (int)T);
    for (int i = 0; i < T; i++) {
        double p[T], sum = 0, row[D] = {}, size[D] = {};
        for (int j = 0; j <= i; j++) {
            p[j] = 0;
            for (int d = 0; d < D; d++) p[j] += (double)to_float(q[i * D + d]) * (double)to_float(k[j * D + d]) / 4;
            sum += p[j] = exp(p[j]);
        }
        for (int j = 0; j <= i; j++)
            for (int d = 0; d < D; d++) {
                double x = (double)to_float(v[j * D + d]);
                row[d] += p[j] / sum * x, size[d] += p[j] / sum * fabs(x);
            }
        for (int d = 0; d < D; d++) /* probabilities and result are rounded to bf16 */
            compare(o, to_float(out[i * D + d]), row[d], 0x1p-8 * size[d] + 0x1p-8 * fabs(row[d]) + 1e-5);
    }
}
} /* namespace attention */
