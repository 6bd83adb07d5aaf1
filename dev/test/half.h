/* The CPU backend in bf16, for tests: activations and parameters have two bytes in memory, each op computes in float32 on widened copies and
 * rounds what it writes, to nearest even. So everything that a two-byte compute type asks of model, trainer and tests runs without a GPU.
 * Slow, and nothing but a test's backend. C only. */
#ifndef LLMC_TEST_HALF_H
#define LLMC_TEST_HALF_H
#include "llmc/base/rng.h"
#include "llmc/wrap/wrapper.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

static inline float half_widen(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* low: what is added to the 16 bits that are cut off. */
static inline uint16_t half_cut(float value, uint32_t low) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((isfinite(value) ? bits + low : bits) >> 16);
}

static inline uint16_t half_nearest(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return half_cut(value, 0x7FFF + (bits >> 16 & 1));
}

static inline void half_round(uint16_t *to, const float *from, size_t first, size_t n, size_t index, int rounding, uint64_t seed, int64_t updates) {
    for (size_t i = first; i < first + n; i++)
        to[i] = rounding == ROUND_STOCHASTIC && updates > 0 ? half_cut(from[i], rng_u32(seed, RNG_ROUND, (uint32_t)updates, index + i) & 0xFFFF) : half_nearest(from[i]);
}

static inline void half_adamw(Backend *inner, const AdamW *a) {
    AdamW wide = *a;
    wide.params.p = a->master.p;
    inner->adamw(inner, &wide);
    const StepState *s = a->step.p;
    for (size_t i = 0; i < a->n_segments && !s->skip; i++)
        half_round((uint16_t *)a->params.p, a->master.p, a->segments[i].first, a->segments[i].n, a->index, s->rounding, s->seed, s->updates);
}

static void half_run(Backend *b, OpId op, const void *args) {
    Backend *inner = b->inner;
    if (((Wrapper *)b)->planning) { op_run(inner, op, args); return; }
    if (op == OP_add_norm_forward && ((const AddNormForward *)args)->y.p) { /* the norm is of the sum as it is stored */
        AddNormForward norm = *(const AddNormForward *)args;
        const uint16_t *x = (const uint16_t *)norm.x.p, *y = (const uint16_t *)norm.y.p;
        for (size_t i = 0; i < norm.N * norm.C; i++) ((uint16_t *)norm.residual.p)[i] = half_nearest(half_widen(x[i]) + half_widen(y[i]));
        norm.x = norm.residual, norm.y.p = norm.residual.p = NULL;
        half_run(b, op, &norm);
        return;
    }
    if (op == OP_adamw) { half_adamw(inner, (const AdamW *)args); return; }
    if (op == OP_cast_params) {
        const CastParams *a = (const CastParams *)args;
        half_round((uint16_t *)a->out.p, a->in.p, 0, a->n, a->index, a->rounding, a->seed, a->updates);
        return;
    }
    union {
#define MEMBER(name, Args) Args name;
        LLMC_OPS(MEMBER)
#undef MEMBER
    } wide_args;
    Operand operands[OP_MAX_OPERANDS];
    float *wide[OP_MAX_OPERANDS] = {0};
    int n = op_operands(b, op, args, operands);
    memcpy(&wide_args, args, op_args_bytes[op]);
    for (int i = 0; i < n; i++) {
        const Operand *o = &operands[i];
        if (!o->p || (o->kind != KIND_ACT && o->kind != KIND_PAR)) continue;
        wide[i] = (float *)xmalloc(o->n * sizeof(float));
        for (size_t k = 0; k < o->n; k++) wide[i][k] = o->mode == MODE_OUT ? NAN : half_widen(((const uint16_t *)o->p)[k]);
        memcpy((char *)&wide_args + o->field, &wide[i], sizeof(void *));
    }
    op_run(inner, op, &wide_args);
    for (int i = 0; i < n; i++) {
        if (wide[i] && operands[i].mode != MODE_IN) half_round((uint16_t *)operands[i].p, wide[i], 0, operands[i].n, 0, ROUND_NEAREST, 0, 0);
        free(wide[i]);
    }
}

static void half_destroy(Backend *b) {
    Backend *inner = b->inner;
    wrapper_destroy(b);
    inner->destroy(inner);
}

/* Owns inner, which computes in float32 in the host's memory. Its GELU is of the unrounded sum, as a library's fused epilogue has it. */
static inline Backend *half_create(Backend *inner) {
    Wrapper *w = (Wrapper *)xcalloc(1, sizeof *w);
    wrapper_init(w, "half", inner, half_run);
    w->backend.dtype = "bf16";
    w->backend.elem_bytes = 2;
    w->backend.gelu_rounds_first = false;
    w->backend.destroy = half_destroy;
    return &w->backend;
}
#endif
