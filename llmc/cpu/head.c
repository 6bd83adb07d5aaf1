/* The language-model head: logits, cross-entropy and their backward, a chunk of rows at a time, so that no (N, V) buffer
 * exists. Sums over the vocabulary are in double. */
#include "cpu.h"
#include "simd.h"

enum { CHUNK_BYTES = 32 << 20 };

/* Equal chunks that fit the budget: few, because each one reads w twice and dw once. */
static size_t chunk_rows(const HeadLoss *a) {
    if (a->chunk) return size_min(a->chunk, a->N);
    size_t most = CHUNK_BYTES / sizeof(float) / a->V;
    if (most == 0) most = 1;
    return div_up(a->N, div_up(a->N, most));
}

static float row_max(const float *x, size_t n) {
    vf m = vf_set(-INFINITY);
    size_t i = 0;
    for (; i + VW <= n; i += VW) m = vf_max(vf_load(x + i), m);
    float most = -INFINITY;
    for (int l = 0; l < VW; l++)
        if (m[l] > most) most = m[l];
    for (; i < n; i++)
        if (x[i] > most) most = x[i];
    return most;
}

/* x = exp(x - max); returns the sum. */
static double row_exp(float *x, size_t n, float max) {
    vd sum = {0};
    size_t i = 0;
    for (; i + VW <= n; i += VW) {
        vf y = vf_exp(vf_load(x + i) - max);
        vf_store(x + i, y);
        sum += __builtin_convertvector(y, vd);
    }
    double s = 0;
    for (int l = 0; l < VW; l++) s += sum[l];
    vf last = vf_exp(vf_load_part(x + i, n - i) - max);
    vf_store_part(x + i, last, n - i);
    for (; i < n; i++) s += (double)x[i];
    return s;
}

/* From logits to the row's loss; with backward, logits becomes dlogits. */
static float row_loss(float *logits, size_t V, int32_t target, float scale, bool backward) {
    if (target < 0) {
        if (backward) memset(logits, 0, V * sizeof *logits);
        return 0;
    }
    double at_target = (double)logits[target];
    float max = row_max(logits, V);
    double sum = row_exp(logits, V, max);
    if (backward) {
        float factor = (float)((double)scale / sum);
        for (size_t v = 0; v < V; v++) logits[v] *= factor;
        logits[target] -= scale;
    }
    return (float)((double)max + log(sum) - at_target);
}

static void head_chunk(const HeadLoss *a, size_t n0, size_t rows, float *logits, size_t stride, void *scratch) {
    const float *x = (const float *)a->x.p + n0 * a->C;
    const int32_t *targets = a->targets.p + n0;
    cpu_gemm(&(Gemm){.c = logits, .c_row = stride, .a = x, .a_row = a->C, .a_col = 1, .b = a->w.p, .b_row = 1,
                     .b_col = a->C, .M = rows, .N = a->V, .K = a->C}, scratch);
#pragma omp parallel for schedule(dynamic) if (rows * a->V > 8192)
    for (size_t r = 0; r < rows; r++)
        a->losses.p[n0 + r] = row_loss(logits + r * stride, a->V, targets[r], a->scale, a->dx.p != NULL);
    if (!a->dx.p) return;
    cpu_gemm(&(Gemm){.c = (float *)a->dx.p + n0 * a->C, .c_row = a->C, .a = logits, .a_row = stride, .a_col = 1, .b = a->w.p,
                     .b_row = a->C, .b_col = 1, .M = rows, .N = a->C, .K = a->V}, scratch);
    cpu_gemm(&(Gemm){.c = a->dw.p, .c_row = a->C, .a = logits, .a_row = 1, .a_col = stride, .b = x, .b_row = a->C,
                     .b_col = 1, .M = a->V, .N = a->C, .K = rows, .add = true}, scratch);
}

/* Rows of w and dw from V on are left out: they count for nothing and gain nothing. */
void cpu_head_loss(Backend *b, const HeadLoss *a) {
    CHECK(a->N && a->C && a->V && a->Vp >= a->V, "head_loss: N %zu, C %zu, V %zu, Vp %zu", a->N, a->C, a->V, a->Vp);
    size_t rows = chunk_rows(a), stride = round_up(a->V, 64);
    char *scratch = cpu_scratch(b, cpu_gemm_scratch_bytes() + rows * stride * sizeof(float), "head_loss");
    if (!scratch) return;
    CHECK(a->losses.p && a->x.p && a->w.p && a->targets.p, "head_loss: operand absent");
    CHECK(!a->dx.p == !a->dw.p, "head_loss: dx and dw come together");
    for (size_t n = 0; n < a->N; n++)
        CHECK(a->targets.p[n] >= -1 && a->targets.p[n] < (int64_t)a->V, "head_loss: target %d at row %zu, vocabulary %zu",
              a->targets.p[n], n, a->V);
    float *logits = (float *)(void *)(scratch + cpu_gemm_scratch_bytes());
    for (size_t n = 0; n < a->N; n += rows) head_chunk(a, n, size_min(rows, a->N - n), logits, stride, scratch);
}

void cpu_head_logits(Backend *b, const HeadLogits *a) {
    CHECK(a->N && a->C && a->V, "head_logits: N %zu, C %zu, V %zu", a->N, a->C, a->V);
    void *scratch = cpu_scratch(b, cpu_gemm_scratch_bytes(), "head_logits");
    if (!scratch) return;
    CHECK(a->logits.p && a->x.p && a->w.p, "head_logits: operand absent");
    cpu_gemm(&(Gemm){.c = a->logits.p, .c_row = a->V, .a = a->x.p, .a_row = a->C, .a_col = 1, .b = a->w.p, .b_row = 1,
                     .b_col = a->C, .M = a->N, .N = a->V, .K = a->C}, scratch);
}
