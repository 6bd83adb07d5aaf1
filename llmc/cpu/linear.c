/* Linear layers with their epilogues: bias, GELU in its tanh form, and the backward of both. */
#include "cpu.h"
#include "simd.h"

void cpu_gelu(float *out, const float *pre, size_t n) {
    size_t i = 0;
    for (; i + VW <= n; i += VW) vf_store(out + i, vf_gelu(vf_load(pre + i)));
    if (i < n) vf_store_part(out + i, vf_gelu(vf_load_part(pre + i, n - i)), n - i);
}

void cpu_gelu_backward(float *dpre, const float *pre, size_t n) {
    size_t i = 0;
    for (; i + VW <= n; i += VW) vf_store(dpre + i, vf_load(dpre + i) * vf_gelu_derivative(vf_load(pre + i)));
    if (i < n) vf_store_part(dpre + i, vf_load_part(dpre + i, n - i) * vf_gelu_derivative(vf_load_part(pre + i, n - i)), n - i);
}

enum { ELEMENTS = 4096 }; /* per job of an elementwise loop */

static void gelu_all(float *out, const float *pre, size_t n) {
#pragma omp parallel for schedule(static) if (n > 4 * ELEMENTS)
    for (size_t i = 0; i < n; i += ELEMENTS) cpu_gelu(out + i, pre + i, size_min(ELEMENTS, n - i));
}

void cpu_gelu_forward(Backend *b, const GeluForward *a) {
    CHECK(a->n, "gelu_forward: n = 0");
    if (cpu_planning(b)) return;
    CHECK(a->out.p && a->pre_gelu.p, "gelu_forward: operand absent");
    gelu_all(a->out.p, a->pre_gelu.p, a->n);
}

void cpu_linear_forward(Backend *b, const LinearForward *a) {
    CHECK(a->N && a->C && a->OC, "linear_forward: N %zu, C %zu, OC %zu", a->N, a->C, a->OC);
    void *scratch = cpu_scratch(b, cpu_gemm_scratch_bytes(), "linear_forward");
    if (!scratch) return;
    CHECK(a->out.p && a->inp.p && a->w.p && a->b.p, "linear_forward: operand absent");
    float *sum = a->pre_gelu.p ? a->pre_gelu.p : a->out.p;
    cpu_gemm(&(Gemm){.c = sum, .c_row = a->OC, .a = a->inp.p, .a_row = a->C, .a_col = 1, .b = a->w.p, .b_row = 1,
                     .b_col = a->C, .bias = a->b.p, .M = a->N, .N = a->OC, .K = a->C}, scratch);
    if (a->pre_gelu.p) gelu_all(a->out.p, sum, a->N * a->OC);
}

enum { STRIP = 64 };      /* columns per job of a column sum */

/* db += column sums of dout, rows ascending, in double */
static void bias_backward(float *db, const float *dout, size_t N, size_t OC) {
#pragma omp parallel for schedule(static) if (N * OC > 16384)
    for (size_t c0 = 0; c0 < OC; c0 += STRIP) {
        size_t n = size_min(STRIP, OC - c0);
        double sum[STRIP] = {0};
        for (size_t r = 0; r < N; r++) {
            const float *row = dout + r * OC + c0;
            for (size_t c = 0; c < n; c++) sum[c] += (double)row[c];
        }
        for (size_t c = 0; c < n; c++) db[c0 + c] += (float)sum[c];
    }
}

void cpu_linear_backward(Backend *b, const LinearBackward *a) {
    CHECK(a->N && a->C && a->OC, "linear_backward: N %zu, C %zu, OC %zu", a->N, a->C, a->OC);
    void *scratch = cpu_scratch(b, cpu_gemm_scratch_bytes(), "linear_backward");
    if (!scratch) return;
    CHECK(a->dw.p && a->db.p && a->dout.p && a->inp.p && a->w.p, "linear_backward: operand absent");
    if (a->dinp.p) {
        cpu_gemm(&(Gemm){.c = a->dinp.p, .c_row = a->C, .a = a->dout.p, .a_row = a->OC, .a_col = 1, .b = a->w.p,
                         .b_row = a->C, .b_col = 1, .M = a->N, .N = a->C, .K = a->OC}, scratch);
        size_t n = a->pre_gelu.p ? a->N * a->C : 0;
        float *dinp = a->dinp.p;
        const float *pre = a->pre_gelu.p;
#pragma omp parallel for schedule(static) if (n > 4 * ELEMENTS)
        for (size_t i = 0; i < n; i += ELEMENTS) cpu_gelu_backward(dinp + i, pre + i, size_min(ELEMENTS, n - i));
    }
    cpu_gemm(&(Gemm){.c = a->dw.p, .c_row = a->C, .a = a->dout.p, .a_row = 1, .a_col = a->OC, .b = a->inp.p,
                     .b_row = a->C, .b_col = 1, .M = a->OC, .N = a->C, .K = a->N, .add = true}, scratch);
    bias_backward(a->db.p, a->dout.p, a->N, a->OC);
}
