/* The ops as the plainest loops, in type REAL, names ending in SUFFIX. Included once for each: double is the exact result, float the plain
 * reference that bounds the error allowed; ROUND (left out: nothing) is how a low-precision implementation would store an intermediate tensor.
 * Inputs and outputs are arrays of tensors in the order of each function's comment. No include guard on purpose. */
#include "ref_shape.h"
#ifndef ROUND
#define ROUND(x) (x)
#endif
#define FN2(name, suffix) name##suffix
#define FN1(name, suffix) FN2(name, suffix)
#define FN(name) FN1(name, SUFFIX)

static REAL FN(gelu_value)(REAL x) {
    return (REAL)0.5 * x * (1 + TANH((REAL)0.7978845608028654 * (x + (REAL)0.044715 * x * x * x)));
}
static REAL FN(gelu_slope)(REAL x) {
    REAL t = TANH((REAL)0.7978845608028654 * (x + (REAL)0.044715 * x * x * x));
    return (REAL)0.5 * (1 + t) + (REAL)0.5 * x * (1 - t * t) * (REAL)0.7978845608028654 * (1 + 3 * (REAL)0.044715 * x * x);
}

/* out; x, w, b. With s->gelu_in the layer's input is gelu(x); with s->gelu_out the second output is gelu(first). */
static void FN(linear)(REAL **out, REAL **in, const Shape *s) {
    for (size_t n = 0; n < s->N; n++)
        for (size_t o = 0; o < s->OC; o++) {
            REAL sum = 0;
            for (size_t c = 0; c < s->C; c++) {
                REAL x = in[0][n * s->C + c];
                sum += (s->gelu_in ? FN(gelu_value)(x) : x) * in[1][o * s->C + c];
            }
            sum = ROUND(sum + in[2][o]);
            out[0][n * s->OC + o] = sum;
            if (s->gelu_out) out[1][n * s->OC + o] = FN(gelu_value)(sum);
        }
}
static void FN(linear_backward)(REAL **din, REAL **dout, REAL **in, const Shape *s) {
    for (size_t n = 0; n < s->N; n++)
        for (size_t o = 0; o < s->OC; o++) {
            REAL d = dout[0][n * s->OC + o];
            din[2][o] += d;
            for (size_t c = 0; c < s->C; c++) {
                REAL x = in[0][n * s->C + c];
                din[0][n * s->C + c] += d * in[1][o * s->C + c];
                din[1][o * s->C + c] += d * (s->gelu_in ? FN(gelu_value)(x) : x);
            }
        }
    for (size_t i = 0; s->gelu_in && i < s->N * s->C; i++) din[0][i] *= FN(gelu_slope)(in[0][i]);
}

/* out, residual; x, y, gamma, beta */
static void FN(norm_row)(REAL *mean, REAL *rstd, const REAL *r, size_t C) {
    REAL sum = 0, squares = 0;
    for (size_t c = 0; c < C; c++) sum += r[c];
    *mean = sum / (REAL)C;
    for (size_t c = 0; c < C; c++) squares += (r[c] - *mean) * (r[c] - *mean);
    *rstd = 1 / SQRT(squares / (REAL)C + (REAL)1e-5);
}
static void FN(add_norm)(REAL **out, REAL **in, const Shape *s) {
    for (size_t n = 0; n < s->N; n++) {
        REAL *r = out[1] + n * s->C, mean, rstd;
        for (size_t c = 0; c < s->C; c++) r[c] = ROUND(in[0][n * s->C + c] + in[1][n * s->C + c]);
        FN(norm_row)(&mean, &rstd, r, s->C);
        for (size_t c = 0; c < s->C; c++) out[0][n * s->C + c] = (r[c] - mean) * rstd * in[2][c] + in[3][c];
    }
}
static void FN(add_norm_backward)(REAL **din, REAL **dout, REAL **in, const Shape *s) {
    static REAL r[REF_LARGEST_C];
    for (size_t n = 0; n < s->N; n++) {
        REAL mean, rstd, sum = 0, sum_h = 0, *d = dout[0] + n * s->C;
        for (size_t c = 0; c < s->C; c++) r[c] = ROUND(in[0][n * s->C + c] + in[1][n * s->C + c]);
        FN(norm_row)(&mean, &rstd, r, s->C);
        for (size_t c = 0; c < s->C; c++) {
            REAL h = (r[c] - mean) * rstd;
            sum += d[c] * in[2][c];
            sum_h += d[c] * in[2][c] * h;
            din[2][c] += d[c] * h;
            din[3][c] += d[c];
        }
        for (size_t c = 0; c < s->C; c++) {
            REAL h = (r[c] - mean) * rstd;
            din[0][n * s->C + c] = din[1][n * s->C + c] =
                dout[1][n * s->C + c] + rstd * (d[c] * in[2][c] - sum / (REAL)s->C - h * sum_h / (REAL)s->C);
        }
    }
}

/* p: the scores of one query, T of them; returns the largest */
static REAL FN(scores)(REAL *p, const REAL *qkv, const Shape *s, size_t t, size_t h) {
    size_t C = s->H * s->D;
    REAL max = -INFINITY;
    for (size_t k = 0; k <= t; k++) {
        p[k] = 0;
        for (size_t d = 0; d < s->D; d++) p[k] += qkv[t * 3 * C + h * s->D + d] * qkv[k * 3 * C + C + h * s->D + d];
        p[k] = ROUND(p[k] / SQRT((REAL)s->D));
        if (p[k] > max) max = p[k];
    }
    return max;
}
/* p: the softmax weights of one query; returns the logarithm of their denominator, which is what a forward saves */
static REAL FN(weights)(REAL *p, const REAL *qkv, const Shape *s, size_t t, size_t h) {
    REAL max = FN(scores)(p, qkv, s, t, h), sum = 0;
    for (size_t k = 0; k <= t; k++) sum += p[k] = EXP(p[k] - max);
    for (size_t k = 0; k <= t; k++) p[k] = ROUND(p[k] / sum);
    return max + LOG(sum);
}
/* out; qkv */
static void FN(attention)(REAL **out, REAL **in, const Shape *s) {
    size_t C = s->H * s->D;
    REAL p[REF_LARGEST_T];
    for (size_t b = 0; b < s->B; b++)
        for (size_t t = 0; t < s->T; t++)
            for (size_t h = 0; h < s->H; h++) {
                REAL *qkv = in[0] + b * s->T * 3 * C, *o = out[0] + (b * s->T + t) * C + h * s->D;
                FN(weights)(p, qkv, s, t, h);
                for (size_t d = 0; d < s->D; d++) {
                    o[d] = 0;
                    for (size_t k = 0; k <= t; k++) o[d] += p[k] * qkv[k * 3 * C + 2 * C + h * s->D + d];
                }
            }
}
/* one query: adds to the gradients of its q and of all k and v before it. The mean of dp under p is the product of g with the output (Dao et
 * al. 2022) as it is stored, summed in the other direction: where all weight lies on one key, dp and its mean differ by roundings alone. */
static void FN(query_backward)(REAL *dqkv, const REAL *g, const REAL *qkv, const Shape *s, size_t t, size_t h) {
    size_t C = s->H * s->D, at = h * s->D;
    REAL p[REF_LARGEST_T], dp[REF_LARGEST_T], mean = 0, scale = 1 / SQRT((REAL)s->D);
    REAL saved = FN(weights)(p, qkv, s, t, h);
    for (size_t d = s->D; d-- > 0;) {
        REAL o = 0;
        for (size_t k = 0; k <= t; k++) o += p[k] * qkv[k * 3 * C + 2 * C + at + d];
        mean += g[d] * ROUND(o);
    }
    FN(scores)(p, qkv, s, t, h);
    for (size_t k = 0; k <= t; k++) p[k] = ROUND(EXP(p[k] - saved)); /* again, from the one number that was saved */
    for (size_t k = 0; k <= t; k++) {
        dp[k] = 0;
        for (size_t d = 0; d < s->D; d++) {
            dp[k] += g[d] * qkv[k * 3 * C + 2 * C + at + d];
            dqkv[k * 3 * C + 2 * C + at + d] += p[k] * g[d];
        }
        dp[k] = ROUND(dp[k]);
    }
    for (size_t k = 0; k <= t; k++) {
        REAL ds = ROUND(p[k] * (dp[k] - mean)) * scale;
        for (size_t d = 0; d < s->D; d++) {
            dqkv[t * 3 * C + at + d] += ds * qkv[k * 3 * C + C + at + d];
            dqkv[k * 3 * C + C + at + d] += ds * qkv[t * 3 * C + at + d];
        }
    }
}
static void FN(attention_backward)(REAL **din, REAL **dout, REAL **in, const Shape *s) {
    size_t C = s->H * s->D;
    for (size_t b = 0; b < s->B; b++)
        for (size_t t = 0; t < s->T; t++)
            for (size_t h = 0; h < s->H; h++)
                FN(query_backward)(din[0] + b * s->T * 3 * C, dout[0] + (b * s->T + t) * C + h * s->D,
                                   in[0] + b * s->T * 3 * C, s, t, h);
}

/* losses; x, w. Returns the row's logsumexp, logits in l. */
static REAL FN(logits)(REAL *l, REAL **in, const Shape *s, size_t n) {
    REAL max = -INFINITY, sum = 0;
    for (size_t v = 0; v < s->V; v++) {
        l[v] = 0;
        for (size_t c = 0; c < s->C; c++) l[v] += in[0][n * s->C + c] * in[1][v * s->C + c];
        l[v] = ROUND(l[v]);
        if (l[v] > max) max = l[v];
    }
    for (size_t v = 0; v < s->V; v++) sum += EXP(l[v] - max);
    return max + LOG(sum);
}
static void FN(head)(REAL **out, REAL **in, const Shape *s) {
    static REAL l[REF_LARGEST_V];
    for (size_t n = 0; n < s->N; n++) {
        REAL lse = FN(logits)(l, in, s, n);
        out[0][n] = s->ids[n] < 0 ? 0 : lse - l[s->ids[n]];
    }
}
static void FN(head_backward)(REAL **din, REAL **dout, REAL **in, const Shape *s) {
    static REAL l[REF_LARGEST_V];
    for (size_t n = 0; n < s->N; n++) {
        if (s->ids[n] < 0) continue;
        REAL lse = FN(logits)(l, in, s, n);
        for (size_t v = 0; v < s->V; v++) {
            REAL d = ROUND(dout[0][n] * (EXP(l[v] - lse) - ((size_t)s->ids[n] == v)));
            for (size_t c = 0; c < s->C; c++) {
                din[0][n * s->C + c] += d * in[1][v * s->C + c];
                din[1][v * s->C + c] += d * in[0][n * s->C + c];
            }
        }
    }
}

/* out; wte, wpe */
static void FN(embed)(REAL **out, REAL **in, const Shape *s) {
    for (size_t n = 0; n < s->B * s->T; n++)
        for (size_t c = 0; c < s->C; c++)
            out[0][n * s->C + c] = in[0][(size_t)s->ids[n] * s->C + c] + in[1][n % s->T * s->C + c];
}
static void FN(embed_backward)(REAL **din, REAL **dout, REAL **in, const Shape *s) {
    (void)in;
    for (size_t n = 0; n < s->B * s->T; n++)
        for (size_t c = 0; c < s->C; c++) {
            din[0][(size_t)s->ids[n] * s->C + c] += dout[0][n * s->C + c];
            din[1][n % s->T * s->C + c] += dout[0][n * s->C + c];
        }
}
#undef FN
#undef FN1
#undef FN2
