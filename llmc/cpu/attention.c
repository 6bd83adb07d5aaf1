/* Causal attention over tiles with online softmax: no T x T buffer. The forward keeps one float per row, the logarithm of the
 * sum of exponentials; the backward recomputes the weights from it (Dao et al. 2022, "FlashAttention"). */
#include "cpu.h"
#include "simd.h"

/* Queries and keys per tile: a multiple of the register tile's sides, so that tiles multiply without remainders. */
enum { TILE = 3 * NR };
_Static_assert(TILE % MR == 0, "a tile is a whole number of register tiles");

/* One head of one sequence, found in the operands. Rows of q, k, v and their gradients are 3C apart, of out C. */
typedef struct {
    const float *q, *k, *v;
    size_t qkv_row, out_row, T, D, Dp; /* Dp: D padded to the register tile, in scratch only */
    float scale;
} Head;

static Head head_at(const void *qkv, size_t T, size_t H, size_t D, size_t b, size_t h) {
    size_t C = H * D;
    const float *q = (const float *)qkv + b * T * 3 * C + h * D;
    return (Head){.q = q, .k = q + C, .v = q + 2 * C, .qkv_row = 3 * C, .out_row = C, .T = T, .D = D,
                  .Dp = round_up(D, NR), .scale = (float)(1 / sqrt((double)D))};
}

/* c (M, N) = or += a b over padded tiles: writes round_up(M, MR) x round_up(N, NR). */
static void tile_gemm(float *c, size_t c_row, const float *a, size_t a_row, size_t a_col, const float *b, size_t b_row,
                      size_t M, size_t N, size_t K, bool add) {
    for (size_t m = 0; m < M; m += MR)
        for (size_t n = 0; n < N; n += NR) {
            vf t[MR][2];
            tile_product(t, K, a + m * a_row, a_row, a_col, b + n, b_row);
            float *to = c + m * c_row + n;
            for (size_t r = 0; r < MR; r++, to += c_row) {
                vf_store(to, add ? vf_load(to) + t[r][0] : t[r][0]);
                vf_store(to + VW, add ? vf_load(to + VW) + t[r][1] : t[r][1]);
            }
        }
}

/* to (TILE, Dp) = scale * from, zero beyond rows and D */
static void load_tile(float *to, size_t Dp, const float *from, size_t from_row, size_t rows, size_t D, float scale) {
    for (size_t r = 0; r < TILE; r++, to += Dp) {
        size_t n = r < rows ? D : 0;
        for (size_t d = 0; d < n; d++) to[d] = from[r * from_row + d] * scale;
        memset(to + n, 0, (Dp - n) * sizeof *to);
    }
}

/* to (D, TILE) = transposed from, zero beyond rows */
static void load_transposed(float *to, const float *from, size_t from_row, size_t rows, size_t D) {
    if (rows < TILE) memset(to, 0, D * TILE * sizeof *to);
    transpose(to, TILE, from, from_row, rows, D);
}

/* One row of scores against n keys: s becomes exp(s - max), zero beyond n; the row's running max, sum and output follow. */
static void online_softmax(float *s, size_t n, float *max, double *sum, float *out, size_t Dp) {
    for (size_t j = n; j < TILE; j++) s[j] = -INFINITY;
    vf most = vf_set(*max);
    for (size_t j = 0; j < TILE; j += VW) most = vf_max(vf_load(s + j), most);
    float m = *max;
    for (int l = 0; l < VW; l++)
        if (most[l] > m) m = most[l];
    vd total = {0};
    for (size_t j = 0; j < TILE; j += VW) {
        vf p = vf_exp(vf_load(s + j) - m);
        vf_store(s + j, p);
        total += __builtin_convertvector(p, vd);
    }
    float shrink = expf(*max - m);
    double added = 0;
    for (int l = 0; l < VW; l++) added += total[l];
    *sum = *sum * (double)shrink + added;
    *max = m;
    if (shrink != 1)
        for (size_t d = 0; d < Dp; d++) out[d] *= shrink;
}

typedef struct {
    float *q, *kt, *v, *s, *out, *max;
    double *sum;
} ForwardScratch;

static size_t forward_floats(size_t Dp) { return round_up(TILE * (4 * Dp + TILE + 1 + 2), 64); }

static ForwardScratch forward_scratch(float *p, size_t Dp) {
    ForwardScratch s = {.q = p, .kt = p + TILE * Dp, .v = p + 2 * TILE * Dp, .out = p + 3 * TILE * Dp};
    s.s = s.out + TILE * Dp;
    s.sum = (double *)(void *)(s.s + TILE * TILE);
    s.max = (float *)(s.sum + TILE);
    return s;
}

/* Queries [q0, q0 + TILE) of one head against all keys up to their own. */
static void forward_tile(const Head *h, size_t q0, float *out, float *saved, const ForwardScratch *x) {
    size_t rows = size_min(TILE, h->T - q0);
    load_tile(x->q, h->Dp, h->q + q0 * h->qkv_row, h->qkv_row, rows, h->D, h->scale);
    memset(x->out, 0, TILE * h->Dp * sizeof *x->out);
    for (size_t r = 0; r < TILE; r++) x->max[r] = -INFINITY, x->sum[r] = 0;
    for (size_t k0 = 0; k0 <= q0; k0 += TILE) {
        size_t keys = size_min(TILE, h->T - k0);
        load_transposed(x->kt, h->k + k0 * h->qkv_row, h->qkv_row, keys, h->D);
        load_tile(x->v, h->Dp, h->v + k0 * h->qkv_row, h->qkv_row, keys, h->D, 1);
        tile_gemm(x->s, TILE, x->q, h->Dp, 1, x->kt, TILE, rows, keys, h->D, false);
        for (size_t r = 0; r < rows; r++)
            online_softmax(x->s + r * TILE, size_min(keys, q0 + r - k0 + 1), &x->max[r], &x->sum[r], x->out + r * h->Dp, h->Dp);
        tile_gemm(x->out, h->Dp, x->s, TILE, 1, x->v, h->Dp, rows, h->D, keys, true);
    }
    for (size_t r = 0; r < rows; r++) {
        float inverse = (float)(1 / x->sum[r]);
        for (size_t d = 0; d < h->D; d++) out[(q0 + r) * h->out_row + d] = x->out[r * h->Dp + d] * inverse;
        if (saved) saved[q0 + r] = (float)((double)x->max[r] + log(x->sum[r]));
    }
}

size_t cpu_attention_saved_bytes(Backend *b, size_t B, size_t T, size_t H, size_t D) {
    (void)b; (void)D;
    return B * H * T * sizeof(float);
}

void cpu_attention_forward(Backend *b, const AttentionForward *a) {
    CHECK(a->B && a->T && a->H && a->D, "attention_forward: B %zu, T %zu, H %zu, D %zu", a->B, a->T, a->H, a->D);
    size_t Dp = round_up(a->D, NR), per_thread = forward_floats(Dp);
    float *scratch = cpu_scratch(b, (size_t)cpu_threads() * per_thread * sizeof(float), "attention_forward");
    if (!scratch) return;
    CHECK(a->out.p && a->qkv.p, "attention_forward: operand absent");
    size_t tiles = div_up(a->T, TILE), jobs = a->B * a->H * tiles;
#pragma omp parallel for schedule(dynamic) if (jobs > 1)
    for (size_t job = 0; job < jobs; job++) {
        size_t tile = tiles - 1 - job % tiles, bh = job / tiles; /* the longest of a head first */
        Head h = head_at(a->qkv.p, a->T, a->H, a->D, bh / a->H, bh % a->H);
        ForwardScratch x = forward_scratch(scratch + (size_t)cpu_thread() * per_thread, Dp);
        float *out = (float *)a->out.p + (bh / a->H * a->T * a->H + bh % a->H) * a->D;
        forward_tile(&h, tile * TILE, out, a->saved.p ? (float *)a->saved.p + bh * a->T : NULL, &x);
    }
}

/* The row of one new token in one head: weights over the cached keys, then the sum of values. p: room for as many weights as keys.
 * Keys and values of one position are 2C apart. */
static void decode_row(float *out, const float *q, const float *k, const float *v, size_t row, size_t keys, size_t D, float *p) {
    float max = -INFINITY, scale = (float)(1 / sqrt((double)D));
    for (size_t j = 0; j < keys; j++) {
        vf dot = {0};
        float sum = 0;
        size_t d = 0;
        for (; d + VW <= D; d += VW) dot = vf_fma(vf_load(q + d), vf_load(k + j * row + d), dot);
        for (; d < D; d++) sum += q[d] * k[j * row + d];
        for (int l = 0; l < VW; l++) sum += dot[l];
        p[j] = sum * scale;
        if (!(p[j] <= max)) max = p[j]; /* a NaN stays and spoils the row, as it should */
    }
    double sum = 0;
    for (size_t j = 0; j < keys; j++) sum += (double)(p[j] = expf(p[j] - max));
    memset(out, 0, D * sizeof *out);
    for (size_t j = 0; j < keys; j++)
        for (size_t d = 0; d < D; d++) out[d] += p[j] * v[j * row + d];
    float inverse = (float)(1 / sum);
    for (size_t d = 0; d < D; d++) out[d] *= inverse;
}

void cpu_attention_decode(Backend *b, const AttentionDecode *a) {
    CHECK(a->B && a->H && a->D && a->n && a->n <= a->T && a->position <= a->T - a->n,
          "attention_decode: B %zu, T %zu, H %zu, D %zu, n %zu, position %zu", a->B, a->T, a->H, a->D, a->n, a->position);
    float *scratch = cpu_scratch(b, (size_t)cpu_threads() * a->T * sizeof(float), "attention_decode"); /* whatever the position */
    if (!scratch) return;
    CHECK(a->out.p && a->cache.p && a->qkv.p, "attention_decode: operand absent");
    size_t C = a->H * a->D, n = a->n, jobs = a->B * n * a->H;
    float *cache = a->cache.p, *out = a->out.p;
    const float *qkv = a->qkv.p;
    for (size_t i = 0; i < a->B * n; i++)
        memcpy(cache + (i / n * a->T + a->position + i % n) * 2 * C, qkv + i * 3 * C + C, 2 * C * sizeof(float));
#pragma omp parallel for schedule(dynamic) if (jobs > 1 && jobs * (a->position + n) * a->D > 8192)
    for (size_t job = 0; job < jobs; job++) {
        size_t i = job / a->H, h = job % a->H;
        const float *k = cache + i / n * a->T * 2 * C + h * a->D;
        decode_row(out + i * C + h * a->D, qkv + i * 3 * C + h * a->D, k, k + C, 2 * C, a->position + i % n + 1, a->D,
                   scratch + (size_t)cpu_thread() * a->T);
    }
}

typedef struct {
    float *q, *dout, *k, *kt, *vt, *dk, *dv, *p, *ds, *dq, *delta; /* dq, delta: all T rows, padded to tiles */
} BackwardScratch;

static size_t backward_floats(size_t T, size_t Dp) {
    return round_up(TILE * (7 * Dp + 2 * TILE) + round_up(T, TILE) * (Dp + 1), 64);
}

static BackwardScratch backward_scratch(float *p, size_t T, size_t Dp) {
    size_t tile = TILE * Dp;
    BackwardScratch s = {.q = p, .dout = p + tile, .k = p + 2 * tile, .kt = p + 3 * tile, .vt = p + 4 * tile,
                         .dk = p + 5 * tile, .dv = p + 6 * tile, .p = p + 7 * tile};
    s.ds = s.p + TILE * TILE;
    s.dq = s.ds + TILE * TILE;
    s.delta = s.dq + round_up(T, TILE) * Dp;
    return s;
}

/* Scores and their gradients of one pair of tiles: p = softmax weights, ds = p (dp - delta); zero where the mask is. */
static void weights_backward(float *p, float *ds, size_t n, float log_sum, float delta) {
    for (size_t j = n; j < TILE; j++) p[j] = -INFINITY, ds[j] = 0;
    for (size_t j = 0; j < TILE; j += VW) {
        vf w = vf_exp(vf_load(p + j) - log_sum);
        vf_store(p + j, w);
        vf_store(ds + j, w * (vf_load(ds + j) - delta));
    }
}

/* What queries [q0, q0 + TILE) add to dk, dv of the key tile at k0, and to their own dq. */
static void backward_pair(const Head *h, const float *dout, const float *saved, size_t q0, size_t k0, size_t keys,
                          const BackwardScratch *x) {
    size_t rows = size_min(TILE, h->T - q0), Dp = h->Dp;
    load_tile(x->q, Dp, h->q + q0 * h->qkv_row, h->qkv_row, rows, h->D, h->scale);
    load_tile(x->dout, Dp, dout + q0 * h->out_row, h->out_row, rows, h->D, 1);
    tile_gemm(x->p, TILE, x->q, Dp, 1, x->kt, TILE, rows, keys, h->D, false);
    tile_gemm(x->ds, TILE, x->dout, Dp, 1, x->vt, TILE, rows, keys, h->D, false);
    for (size_t r = 0; r < rows; r++)
        weights_backward(x->p + r * TILE, x->ds + r * TILE, size_min(keys, q0 + r - k0 + 1), saved[q0 + r], x->delta[q0 + r]);
    tile_gemm(x->dv, Dp, x->p, 1, TILE, x->dout, Dp, keys, h->D, rows, true);
    tile_gemm(x->dk, Dp, x->ds, 1, TILE, x->q, Dp, keys, h->D, rows, true);
    tile_gemm(x->dq + q0 * Dp, Dp, x->ds, TILE, 1, x->k, Dp, rows, h->D, keys, true);
}

/* to = scale * from (rows, D) */
static void store_tile(float *to, size_t to_row, const float *from, size_t Dp, size_t rows, size_t D, float scale) {
    for (size_t r = 0; r < rows; r++)
        for (size_t d = 0; d < D; d++) to[r * to_row + d] = from[r * Dp + d] * scale;
}

static void backward_head(const Head *h, float *dqkv, const float *dout, const float *out, const float *saved,
                          const BackwardScratch *x) {
    size_t C = h->out_row;
    for (size_t t = 0; t < h->T; t++) {
        double sum = 0;
        for (size_t d = 0; d < h->D; d++) sum += (double)dout[t * C + d] * (double)out[t * C + d];
        x->delta[t] = (float)sum;
    }
    memset(x->dq, 0, round_up(h->T, TILE) * h->Dp * sizeof *x->dq);
    for (size_t k0 = 0; k0 < h->T; k0 += TILE) {
        size_t keys = size_min(TILE, h->T - k0);
        load_tile(x->k, h->Dp, h->k + k0 * h->qkv_row, h->qkv_row, keys, h->D, 1);
        load_transposed(x->kt, h->k + k0 * h->qkv_row, h->qkv_row, keys, h->D);
        load_transposed(x->vt, h->v + k0 * h->qkv_row, h->qkv_row, keys, h->D);
        memset(x->dk, 0, TILE * h->Dp * sizeof *x->dk);
        memset(x->dv, 0, TILE * h->Dp * sizeof *x->dv);
        for (size_t q0 = k0; q0 < h->T; q0 += TILE) backward_pair(h, dout, saved, q0, k0, keys, x);
        store_tile(dqkv + k0 * h->qkv_row + C, h->qkv_row, x->dk, h->Dp, keys, h->D, 1);
        store_tile(dqkv + k0 * h->qkv_row + 2 * C, h->qkv_row, x->dv, h->Dp, keys, h->D, 1);
    }
    store_tile(dqkv, h->qkv_row, x->dq, h->Dp, h->T, h->D, h->scale);
}

void cpu_attention_backward(Backend *b, const AttentionBackward *a) {
    CHECK(a->B && a->T && a->H && a->D, "attention_backward: B %zu, T %zu, H %zu, D %zu", a->B, a->T, a->H, a->D);
    size_t Dp = round_up(a->D, NR), per_thread = backward_floats(a->T, Dp), C = a->H * a->D;
    float *scratch = cpu_scratch(b, (size_t)cpu_threads() * per_thread * sizeof(float), "attention_backward");
    if (!scratch) return;
    CHECK(a->dqkv.p && a->dout.p && a->out.p && a->saved.p && a->qkv.p, "attention_backward: operand absent");
#pragma omp parallel for schedule(dynamic) if (a->B * a->H > 1)
    for (size_t bh = 0; bh < a->B * a->H; bh++) {
        size_t i = bh / a->H, j = bh % a->H, at = i * a->T * C + j * a->D;
        Head h = head_at(a->qkv.p, a->T, a->H, a->D, i, j);
        BackwardScratch x = backward_scratch(scratch + (size_t)cpu_thread() * per_thread, a->T, Dp);
        backward_head(&h, (float *)a->dqkv.p + 3 * i * a->T * C + j * a->D, (const float *)a->dout.p + at,
                      (const float *)a->out.p + at, (const float *)a->saved.p + bh * a->T, &x);
    }
}
