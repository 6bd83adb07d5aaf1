/* An op on the operands of a Call (op_cases.h), by the plain loops of ref_ops.h in type REAL: x[i] is operand i, zeros where it is absent; outputs
 * hold zeros, or what is accumulated into. What has the compute type in memory is rounded by ROUND at the end. Included once a type, as ref_ops.h. */
#include "ref_ops.h"
#define FN2(name, suffix) name##suffix
#define FN1(name, suffix) FN2(name, suffix)
#define FN(name) FN1(name, SUFFIX)
#define X(name) x[operand_index(c, #name)]
#define LIST(...) ((REAL *[]){__VA_ARGS__})

static void FN(add_norm_reference)(REAL **x, const Call *c, const Shape *s) {
    FN(add_norm)(LIST(X(out), X(residual)), LIST(X(x), X(y), X(gamma), X(beta)), s);
    for (size_t n = 0; n < s->N; n++) FN(norm_row)(&X(mean)[n], &X(rstd)[n], X(residual) + n * s->C, s->C);
}

static void FN(add_norm_backward_reference)(REAL **x, const Call *c, const Shape *s) {
    REAL *no_y = xcalloc(s->N * s->C, sizeof *no_y);
    FN(add_norm_backward)(LIST(X(dresidual), X(dresidual), X(dgamma), X(dbeta)), LIST(X(dout), X(dthrough)), LIST(X(residual), no_y, X(gamma)), s);
    free(no_y);
}

/* The attention of the whole sequence: earlier rows from the cache, with queries of zero. */
static void FN(decode_reference)(REAL **x, const Call *c, Shape s) {
    const size_t n = call_size(c, "n"), position = call_size(c, "position"), T = s.T, C = s.H * s.D;
    s.T = position + n;
    REAL *qkv = xcalloc(s.B * s.T * 3 * C, sizeof *qkv), *out = xcalloc(s.B * s.T * C, sizeof *out);
    for (size_t i = 0; i < s.B * s.T; i++) {
        size_t b = i / s.T, t = i % s.T;
        REAL *cache = X(cache) + (b * T + t) * 2 * C, *row = X(qkv) + (b * n + t - position) * 3 * C; /* row: where t is new */
        if (t >= position) memcpy(cache, row + C, 2 * C * sizeof *cache), memcpy(qkv + i * 3 * C, row, C * sizeof *qkv);
        memcpy(qkv + i * 3 * C + C, cache, 2 * C * sizeof *qkv);
    }
    FN(attention)(&out, &qkv, &s);
    for (size_t b = 0; b < s.B; b++) memcpy(X(out) + b * n * C, out + (b * s.T + position) * C, n * C * sizeof *out);
    free(qkv), free(out);
}

static void FN(head_reference)(REAL **x, const Call *c, const Shape *s) {
    FN(head)(LIST(X(losses)), LIST(X(x), X(w)), s);
    if (!c->args.head_loss.dx.p) return;
    REAL *scale = xmalloc(s->N * sizeof *scale);
    for (size_t n = 0; n < s->N; n++) scale[n] = c->args.head_loss.scale;
    FN(head_backward)(LIST(X(dx), X(dw)), LIST(scale), LIST(X(x), X(w)), s);
    free(scale);
}

static void FN(linear_backward_reference)(REAL **x, const Call *c, const Shape *s) {
    FN(linear_backward)(LIST(X(dinp), X(dw), X(db)), LIST(X(dout)), LIST(X(inp), X(w)), s);
    for (size_t i = 0; c->args.linear_backward.pre_gelu.p && i < s->N * s->C; i++) X(dinp)[i] = ROUND(X(dinp)[i]) * FN(gelu_slope)(X(pre_gelu)[i]);
}

static void FN(adamw_reference)(REAL **x, const Call *c) {
    StepState s;
    memcpy(&s, call_find((Call *)c, "step")->before, sizeof s);
    const REAL b1 = s.beta1, b2 = s.beta2;
    REAL *w = X(master), *m = X(m), *v = X(v), *grads = X(grads), *params = X(params);
    for (size_t k = 0; k < c->args.adamw.n_segments; k++) {
        const AdamWSegment *segment = &c->args.adamw.segments[k];
        for (size_t i = segment->first; i < segment->first + segment->n; i++) {
            REAL g = grads[i] * s.grad_scale;
            m[i] = b1 * m[i] + (1 - b1) * g;
            v[i] = b2 * v[i] + (1 - b2) * g * g;
            REAL m1 = m[i] / (REAL)(1 - pow((double)s.beta1, (double)s.updates)), v1 = v[i] / (REAL)(1 - pow((double)s.beta2, (double)s.updates));
            params[i] = w[i] -= s.lr * (m1 / (SQRT(v1) + s.eps) + (segment->decay ? s.weight_decay * w[i] : 0));
        }
    }
}

static void FN(reference)(REAL **x, const Call *c) {
    Shape s = shape_of(c);
    switch (c->op) {
    case OP_embed_forward: FN(embed)(LIST(X(out)), LIST(X(wte), X(wpe)), &s); break;
    case OP_add_norm_forward: FN(add_norm_reference)(x, c, &s); break;
    case OP_linear_forward:
        s.gelu_out = c->args.linear_forward.pre_gelu.p != NULL;
        FN(linear)(s.gelu_out ? LIST(X(pre_gelu), X(out)) : LIST(X(out), NULL), LIST(X(inp), X(w), X(b)), &s);
        break;
    case OP_gelu_forward:
        for (size_t i = 0; i < c->args.gelu_forward.n; i++) X(out)[i] = FN(gelu_value)(X(pre_gelu)[i]);
        break;
    case OP_attention_forward: FN(attention)(LIST(X(out)), LIST(X(qkv)), &s); break;
    case OP_attention_decode: FN(decode_reference)(x, c, s); break;
    case OP_head_loss: FN(head_reference)(x, c, &s); break;
    case OP_head_logits:
        for (size_t n = 0; n < s.N; n++) FN(logits)(X(logits) + n * s.V, LIST(X(x), X(w)), &s, n);
        break;
    case OP_linear_backward: FN(linear_backward_reference)(x, c, &s); break;
    case OP_attention_backward: FN(attention_backward)(LIST(X(dqkv)), LIST(X(dout)), LIST(X(qkv)), &s); break;
    case OP_add_norm_backward: FN(add_norm_backward_reference)(x, c, &s); break;
    case OP_embed_backward: FN(embed_backward)(LIST(X(dwte), X(dwpe)), LIST(X(dout)), NULL, &s); break;
    case OP_adamw: FN(adamw_reference)(x, c); break;
    case OP_cast_params: memcpy(X(out), X(in), c->args.cast_params.n * sizeof(REAL)); break;
    default: CHECK(false, "%s has no reference", op_names[c->op]);
    }
    for (int i = 0; i < c->n; i++)
        for (size_t k = 0; c->bound[i].o.mode != MODE_IN && is_compute_type(&c->bound[i].o) && k < c->bound[i].o.n; k++) x[i][k] = ROUND(x[i][k]);
}

/* The operands as they were before the call. */
static void FN(operands_load)(REAL **x, const Call *c) {
    for (int i = 0; i < c->n; i++) {
        const Bound *bound = &c->bound[i];
        x[i] = has_values(bound) ? xcalloc(bound->o.n, sizeof(REAL)) : NULL;
        for (size_t k = 0; x[i] && bound->o.p && bound->o.mode != MODE_OUT && k < bound->o.n; k++) x[i][k] = value_at(c, bound, bound->before, k);
    }
}
#undef REAL
#undef SUFFIX
#undef ROUND
#undef TANH
#undef EXP
#undef LOG
#undef SQRT
#undef FN
#undef FN1
#undef FN2
#undef X
#undef LIST
