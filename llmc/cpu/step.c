/* The numbers of a step: sums in double and in a fixed order, the decision to apply or skip, AdamW, the cast. */
#include "cpu.h"
#include <math.h>
#include <string.h>

void cpu_loss_sum(Backend *b, const LossSum *a) {
    CHECK(a->n, "loss_sum: n = 0");
    if (cpu_planning(b)) return;
    CHECK(a->step.p && a->losses.p, "loss_sum: operand absent");
    double sum = 0;
    for (size_t i = 0; i < a->n; i++) sum += (double)a->losses.p[i];
    a->step.p->loss_sum += sum;
}

enum { BLOCK = 16384, LANES = 16 }; /* elements per job; running sums per job */

static double block_squares(const float *x, size_t n) {
    double lanes[LANES] = {0}, sum = 0;
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] += (double)x[i + (size_t)l] * (double)x[i + (size_t)l];
    for (; i < n; i++) sum += (double)x[i] * (double)x[i];
    for (int l = 0; l < LANES; l++) sum += lanes[l];
    return sum;
}

/* Sums of blocks, then the sum of those, ascending. */
void cpu_sum_squares(Backend *b, const SumSquares *a) {
    CHECK(a->n, "sum_squares: n = 0");
    size_t blocks = div_up(a->n, BLOCK);
    double *sums = cpu_scratch(b, blocks * sizeof *sums, "sum_squares");
    if (!sums) return;
    CHECK(a->step.p && a->grads.p, "sum_squares: operand absent");
#pragma omp parallel for schedule(static) if (blocks > 4)
    for (size_t i = 0; i < blocks; i++) sums[i] = block_squares(a->grads.p + i * BLOCK, size_min(BLOCK, a->n - i * BLOCK));
    double sum = 0;
    for (size_t i = 0; i < blocks; i++) sum += sums[i];
    a->step.p->sum_squares += sum;
}

void cpu_step_decide(Backend *b, const StepDecide *a) {
    if (cpu_planning(b)) return;
    StepState *s = a->step.p;
    CHECK(s, "step_decide: operand absent");
    s->loss = (float)(s->loss_sum / s->loss_rows);
    s->grad_norm = (float)sqrt(s->sum_squares);
    s->grad_scale = 1;
    if (!isfinite(s->loss) || !isfinite(s->grad_norm)) s->skip = SKIP_NONFINITE;
    else if (s->loss > s->loss_limit) s->skip = SKIP_LOSS;
    else if (s->grad_norm > s->norm_limit) s->skip = SKIP_NORM;
    else s->skip = SKIP_NONE;
    if (s->skip == SKIP_NONE) s->updates++;
    if (s->skip != SKIP_NONFINITE && s->grad_clip > 0 && s->grad_norm > s->grad_clip) s->grad_scale = s->grad_clip / s->grad_norm;
}

/* What an update needs beside the tensors. */
typedef struct {
    float beta1, beta2, lr, eps, decay, scale, m_scale, v_scale;
} Update;

static void adamw_run(float *params, float *restrict master, float *restrict m, float *restrict v, const float *restrict grads,
                      size_t n, const Update *u) {
    for (size_t i = 0; i < n; i++) {
        float g = grads[i] * u->scale;
        m[i] = u->beta1 * m[i] + (1 - u->beta1) * g;
        v[i] = u->beta2 * v[i] + (1 - u->beta2) * g * g;
        master[i] -= u->lr * (m[i] * u->m_scale / (sqrtf(v[i] * u->v_scale) + u->eps) + u->decay * master[i]);
    }
    if (params != master) memcpy(params, master, n * sizeof *params);
}

static void adamw_segment(const AdamW *a, const AdamWSegment *segment, Update u) {
    u.decay = segment->decay ? a->step.p->weight_decay : 0;
#pragma omp parallel for schedule(static) if (segment->n > 4 * BLOCK)
    for (size_t i = 0; i < segment->n; i += BLOCK) {
        size_t at = segment->first + i;
        adamw_run((float *)a->params.p + at, a->master.p + at, a->m.p + at, a->v.p + at, a->grads.p + at,
                  size_min(BLOCK, segment->n - i), &u);
    }
}

void cpu_adamw(Backend *b, const AdamW *a) {
    CHECK(a->n, "adamw: n = 0");
    if (cpu_planning(b)) return;
    CHECK(a->params.p && a->master.p && a->m.p && a->v.p && a->grads.p && a->step.p && (a->segments || !a->n_segments),
          "adamw: operand absent");
    const StepState *s = a->step.p;
    if (s->skip) return;
    CHECK(s->updates > 0, "adamw before step_decide: updates = %lld", (long long)s->updates);
    Update u = {.beta1 = s->beta1, .beta2 = s->beta2, .lr = s->lr, .eps = s->eps, .scale = s->grad_scale};
    u.m_scale = (float)(1 / (1 - pow((double)s->beta1, (double)s->updates)));
    u.v_scale = (float)(1 / (1 - pow((double)s->beta2, (double)s->updates)));
    for (size_t i = 0, end = 0; i < a->n_segments; i++) {
        const AdamWSegment *segment = &a->segments[i];
        CHECK(segment->first >= end && segment->n <= a->n && segment->first <= a->n - segment->n,
              "adamw: segment %zu [%zu, +%zu) after %zu of %zu", i, segment->first, segment->n, end, a->n);
        end = segment->first + segment->n;
        adamw_segment(a, segment, u);
    }
}

/* Here, as in adamw, the compute type holds every float: whichever way it is rounded, the value stays. */
void cpu_cast_params(Backend *b, const CastParams *a) {
    CHECK(a->n, "cast_params: n = 0");
    if (cpu_planning(b)) return;
    CHECK(a->out.p && a->in.p, "cast_params: operand absent");
    if (a->out.p != (void *)a->in.p) memcpy(a->out.p, a->in.p, a->n * sizeof(float));
}
