/* add_norm: residual addition, layer normalisation and its saved statistics in one trip; and its backward.
 * Sums over a row or a column are taken in double, in an order that depends on the shape alone. */
#include "cpu.h"
#include "simd.h"

static double lanes_sum(const double *lanes) {
    double s = 0;
    for (int i = 0; i < VW; i++) s += lanes[i];
    return s;
}

static void row_statistics(const float *x, size_t C, float *mean, float *rstd) {
    vd sum = {0}, squares = {0};
    double lanes[VW];
    size_t i = 0;
    for (; i + VW <= C; i += VW) sum += __builtin_convertvector(vf_load(x + i), vd);
    memcpy(lanes, &sum, sizeof lanes);
    double m = lanes_sum(lanes);
    for (; i < C; i++) m += (double)x[i];
    m /= (double)C;
    for (i = 0; i + VW <= C; i += VW) {
        vd d = __builtin_convertvector(vf_load(x + i), vd) - m;
        squares += d * d;
    }
    memcpy(lanes, &squares, sizeof lanes);
    double v = lanes_sum(lanes);
    for (; i < C; i++) v += ((double)x[i] - m) * ((double)x[i] - m);
    *mean = (float)m;
    *rstd = (float)(1.0 / sqrt(v / (double)C + 1e-5));
}

static void add_norm_row(const AddNormForward *a, size_t n) {
    const float *x = (const float *)a->x.p + n * a->C, *gamma = a->gamma.p, *beta = a->beta.p;
    float *out = (float *)a->out.p + n * a->C;
    float *residual = a->residual.p ? (float *)a->residual.p + n * a->C : NULL;
    if (a->y.p) {
        const float *y = (const float *)a->y.p + n * a->C;
        for (size_t c = 0; c < a->C; c++) residual[c] = x[c] + y[c];
        x = residual;
    } else if (residual && residual != x) {
        memcpy(residual, x, a->C * sizeof *x);
    }
    float mean, rstd;
    row_statistics(x, a->C, &mean, &rstd);
    for (size_t c = 0; c < a->C; c++) out[c] = (x[c] - mean) * rstd * gamma[c] + beta[c];
    a->mean.p[n] = mean;
    a->rstd.p[n] = rstd;
}

void cpu_add_norm_forward(Backend *b, const AddNormForward *a) {
    CHECK(a->N && a->C, "add_norm_forward: N %zu, C %zu", a->N, a->C);
    if (cpu_planning(b)) return;
    CHECK(a->out.p && a->mean.p && a->rstd.p && a->x.p && a->gamma.p && a->beta.p, "add_norm_forward: operand absent");
    CHECK(a->residual.p || !a->y.p, "add_norm_forward: y without residual");
#pragma omp parallel for schedule(static) if (a->N * a->C > 16384)
    for (size_t n = 0; n < a->N; n++) add_norm_row(a, n);
}

/* With h = (residual - mean) rstd and g = dout gamma: dx = rstd (g - mean(g) - h mean(g h)). */
static void add_norm_row_backward(const AddNormBackward *a, size_t n) {
    const float *dout = (const float *)a->dout.p + n * a->C, *x = (const float *)a->residual.p + n * a->C;
    const float *through = a->dthrough.p ? (const float *)a->dthrough.p + n * a->C : NULL, *gamma = a->gamma.p;
    float *dx = (float *)a->dresidual.p + n * a->C, mean = a->mean.p[n], rstd = a->rstd.p[n];
    vd sum = {0}, sum_h = {0};
    double lanes[VW], lanes_h[VW];
    size_t c = 0;
    for (; c + VW <= a->C; c += VW) {
        vf g = vf_load(dout + c) * vf_load(gamma + c), h = (vf_load(x + c) - mean) * rstd;
        sum += __builtin_convertvector(g, vd);
        sum_h += __builtin_convertvector(g, vd) * __builtin_convertvector(h, vd);
    }
    memcpy(lanes, &sum, sizeof lanes);
    memcpy(lanes_h, &sum_h, sizeof lanes_h);
    double s = lanes_sum(lanes), sh = lanes_sum(lanes_h);
    for (; c < a->C; c++) {
        float g = dout[c] * gamma[c], h = (x[c] - mean) * rstd;
        s += (double)g;
        sh += (double)g * (double)h;
    }
    float g_mean = (float)(s / (double)a->C), gh_mean = (float)(sh / (double)a->C);
    for (c = 0; c < a->C; c++) {
        float h = (x[c] - mean) * rstd, d = rstd * (dout[c] * gamma[c] - g_mean - h * gh_mean);
        dx[c] = through ? through[c] + d : d;
    }
}

enum { STRIP = 64 };      /* columns per job */

/* Columns [c0, c0 + n) of dgamma and dbeta, rows ascending. */
static void norm_params_backward(const AddNormBackward *a, size_t c0, size_t n) {
    double dgamma[STRIP] = {0}, dbeta[STRIP] = {0};
    for (size_t r = 0; r < a->N; r++) {
        const float *dout = (const float *)a->dout.p + r * a->C + c0, *x = (const float *)a->residual.p + r * a->C + c0;
        float mean = a->mean.p[r], rstd = a->rstd.p[r];
        for (size_t c = 0; c < n; c++) {
            dgamma[c] += (double)dout[c] * (double)((x[c] - mean) * rstd);
            dbeta[c] += (double)dout[c];
        }
    }
    for (size_t c = 0; c < n; c++) {
        a->dgamma.p[c0 + c] += (float)dgamma[c];
        a->dbeta.p[c0 + c] += (float)dbeta[c];
    }
}

void cpu_add_norm_backward(Backend *b, const AddNormBackward *a) {
    CHECK(a->N && a->C, "add_norm_backward: N %zu, C %zu", a->N, a->C);
    if (cpu_planning(b)) return;
    CHECK(a->dresidual.p && a->dgamma.p && a->dbeta.p && a->dout.p && a->residual.p && a->mean.p && a->rstd.p && a->gamma.p,
          "add_norm_backward: operand absent");
#pragma omp parallel for schedule(static) if (a->N * a->C > 16384)
    for (size_t c = 0; c < a->C; c += STRIP) norm_params_backward(a, c, size_min(STRIP, a->C - c));
#pragma omp parallel for schedule(static) if (a->N * a->C > 16384)
    for (size_t n = 0; n < a->N; n++) add_norm_row_backward(a, n);
}
