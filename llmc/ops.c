/* Ops as data: what ops.h says beside each operand, once more as tables, so that tests, wrappers and byte counts follow from
 * one description. Computes nothing. An operand: field of the argument struct, kind, mode, elements, optional; last the sizes. */
#include "ops.h"
#include <string.h>

const char *const mem_class_names[MEM_CLASS_COUNT] = {"weights", "master", "gradients", "optimizer", "activations", "scratch", "other"};

#define NAME(name, Args) #name,
const char *const op_names[OP_COUNT] = {LLMC_OPS(NAME)};
#undef NAME
#define BYTES(name, Args) sizeof(Args),
const size_t op_args_bytes[OP_COUNT] = {LLMC_OPS(BYTES)};
#undef BYTES

/* OPERANDS(op, argument struct, rows) defines the function that fills in the operands of one op, SIZES likewise its sizes. */
#define ROW(field, KIND, MODE, elements, is_optional)                                                                  \
    {#field, KIND_##KIND, MODE_##MODE, a->field.p, elements, offsetof(Args, field), is_optional}
#define OPERANDS(op, Struct, ...)                                                                                      \
    static int operands_##op(Backend *backend, const void *args, Operand operands[OP_MAX_OPERANDS]) {                  \
        typedef Struct Args;                                                                                           \
        const Args *a = args;                                                                                          \
        const Operand rows[] = {__VA_ARGS__};                                                                          \
        _Static_assert(sizeof rows / sizeof *rows <= OP_MAX_OPERANDS, "more operands than OP_MAX_OPERANDS");           \
        (void)backend;                                                                                                 \
        memcpy(operands, rows, sizeof rows);                                                                           \
        return (int)(sizeof rows / sizeof *rows);                                                                      \
    }

#define SIZE(field) {#field, a->field, offsetof(Args, field)}
#define SIZES(op, Struct, ...)                                                                                         \
    static int sizes_##op(const void *args, OpSize sizes[OP_MAX_SIZES]) {                                              \
        typedef Struct Args;                                                                                           \
        const Args *a = args;                                                                                          \
        const OpSize rows[] = {__VA_ARGS__};                                                                           \
        _Static_assert(sizeof rows / sizeof *rows <= OP_MAX_SIZES, "more sizes than OP_MAX_SIZES");                    \
        memcpy(sizes, rows, sizeof rows);                                                                              \
        return (int)(sizeof rows / sizeof *rows);                                                                      \
    }

OPERANDS(embed_forward, EmbedForward,
    ROW(out, ACT, OUT, a->B * a->T * a->C, false),
    ROW(tokens, TOKENS, IN, a->B * a->T, false),
    ROW(wte, PAR, IN, a->V * a->C, false),
    ROW(wpe, PAR, IN, a->T * a->C, false))
SIZES(embed_forward, EmbedForward, SIZE(B), SIZE(T), SIZE(C), SIZE(V))

/* Without y the sum is x, which the caller has already: residual may then be absent. It may also be x's own buffer. */
OPERANDS(add_norm_forward, AddNormForward,
    ROW(out, ACT, OUT, a->N * a->C, false),
    ROW(residual, ACT, OUT, a->N * a->C, a->y.p == NULL),
    ROW(mean, STAT, OUT, a->N, false),
    ROW(rstd, STAT, OUT, a->N, false),
    ROW(x, ACT, IN, a->N * a->C, false),
    ROW(y, ACT, IN, a->N * a->C, true),
    ROW(gamma, PAR, IN, a->C, false),
    ROW(beta, PAR, IN, a->C, false))
SIZES(add_norm_forward, AddNormForward, SIZE(N), SIZE(C))

OPERANDS(linear_forward, LinearForward,
    ROW(out, ACT, OUT, a->N * a->OC, false),
    ROW(pre_gelu, ACT, OUT, a->N * a->OC, true),
    ROW(inp, ACT, IN, a->N * a->C, false),
    ROW(w, PAR, IN, a->OC * a->C, false),
    ROW(b, PAR, IN, a->OC, false))
SIZES(linear_forward, LinearForward, SIZE(N), SIZE(C), SIZE(OC))

OPERANDS(gelu_forward, GeluForward,
    ROW(out, ACT, OUT, a->n, false),
    ROW(pre_gelu, ACT, IN, a->n, false))
SIZES(gelu_forward, GeluForward, SIZE(n))

OPERANDS(attention_forward, AttentionForward,
    ROW(out, ACT, OUT, a->B * a->T * a->H * a->D, false),
    ROW(saved, SAVED, OUT, backend->attention_saved_bytes(backend, a->B, a->T, a->H, a->D), true),
    ROW(qkv, ACT, IN, 3 * a->B * a->T * a->H * a->D, false))
SIZES(attention_forward, AttentionForward, SIZE(B), SIZE(T), SIZE(H), SIZE(D))

OPERANDS(attention_decode, AttentionDecode,
    ROW(out, ACT, OUT, a->B * a->n * a->H * a->D, false),
    ROW(cache, ACT, ADD, 2 * a->B * a->T * a->H * a->D, false),
    ROW(qkv, ACT, IN, 3 * a->B * a->n * a->H * a->D, false))
SIZES(attention_decode, AttentionDecode, SIZE(B), SIZE(T), SIZE(H), SIZE(D), SIZE(n), SIZE(position))

/* dx and dw come together or not at all. */
OPERANDS(head_loss, HeadLoss,
    ROW(losses, STAT, OUT, a->N, false),
    ROW(dx, ACT, OUT, a->N * a->C, true),
    ROW(dw, GRAD, ADD, a->Vp * a->C, a->dx.p == NULL),
    ROW(x, ACT, IN, a->N * a->C, false),
    ROW(w, PAR, IN, a->Vp * a->C, false),
    ROW(targets, TOKENS, IN, a->N, false))
SIZES(head_loss, HeadLoss, SIZE(N), SIZE(C), SIZE(V), SIZE(Vp))

OPERANDS(head_logits, HeadLogits,
    ROW(logits, STAT, OUT, a->N * a->V, false),
    ROW(x, ACT, IN, a->N * a->C, false),
    ROW(w, PAR, IN, a->V * a->C, false))
SIZES(head_logits, HeadLogits, SIZE(N), SIZE(C), SIZE(V))

OPERANDS(linear_backward, LinearBackward,
    ROW(dinp, ACT, OUT, a->N * a->C, true),
    ROW(dw, GRAD, ADD, a->OC * a->C, false),
    ROW(db, GRAD, ADD, a->OC, false),
    ROW(dout, ACT, IN, a->N * a->OC, false),
    ROW(inp, ACT, IN, a->N * a->C, false),
    ROW(w, PAR, IN, a->OC * a->C, false),
    ROW(pre_gelu, ACT, IN, a->N * a->C, true))
SIZES(linear_backward, LinearBackward, SIZE(N), SIZE(C), SIZE(OC))

OPERANDS(attention_backward, AttentionBackward,
    ROW(dqkv, ACT, OUT, 3 * a->B * a->T * a->H * a->D, false),
    ROW(dout, ACT, IN, a->B * a->T * a->H * a->D, false),
    ROW(out, ACT, IN, a->B * a->T * a->H * a->D, false),
    ROW(saved, SAVED, IN, backend->attention_saved_bytes(backend, a->B, a->T, a->H, a->D), false),
    ROW(qkv, ACT, IN, 3 * a->B * a->T * a->H * a->D, false))
SIZES(attention_backward, AttentionBackward, SIZE(B), SIZE(T), SIZE(H), SIZE(D))

/* dresidual may be dthrough's own buffer. */
OPERANDS(add_norm_backward, AddNormBackward,
    ROW(dresidual, ACT, OUT, a->N * a->C, false),
    ROW(dgamma, GRAD, ADD, a->C, false),
    ROW(dbeta, GRAD, ADD, a->C, false),
    ROW(dout, ACT, IN, a->N * a->C, false),
    ROW(dthrough, ACT, IN, a->N * a->C, true),
    ROW(residual, ACT, IN, a->N * a->C, false),
    ROW(mean, STAT, IN, a->N, false),
    ROW(rstd, STAT, IN, a->N, false),
    ROW(gamma, PAR, IN, a->C, false))
SIZES(add_norm_backward, AddNormBackward, SIZE(N), SIZE(C))

OPERANDS(embed_backward, EmbedBackward,
    ROW(dwte, GRAD, ADD, a->V * a->C, false),
    ROW(dwpe, GRAD, ADD, a->T * a->C, false),
    ROW(dout, ACT, IN, a->B * a->T * a->C, false),
    ROW(tokens, TOKENS, IN, a->B * a->T, false))
SIZES(embed_backward, EmbedBackward, SIZE(B), SIZE(T), SIZE(C), SIZE(V))

OPERANDS(loss_sum, LossSum,
    ROW(step, STEP, ADD, 1, false),
    ROW(losses, STAT, IN, a->n, false))
SIZES(loss_sum, LossSum, SIZE(n))

OPERANDS(sum_squares, SumSquares,
    ROW(step, STEP, ADD, 1, false),
    ROW(grads, GRAD, IN, a->n, false))
SIZES(sum_squares, SumSquares, SIZE(n))

OPERANDS(step_decide, StepDecide,
    ROW(step, STEP, ADD, 1, false))
static int sizes_step_decide(const void *args, OpSize sizes[OP_MAX_SIZES]) { (void)args, (void)sizes; return 0; }

/* params is overwritten over the segments only, and not at all when the step is skipped. It may be master's own buffer. */
OPERANDS(adamw, AdamW,
    ROW(params, PAR, OUT, a->n, false),
    ROW(master, MASTER, ADD, a->n, false),
    ROW(m, MOMENT, ADD, a->n, false),
    ROW(v, MOMENT, ADD, a->n, false),
    ROW(grads, GRAD, IN, a->n, false),
    ROW(step, STEP, IN, 1, false))
SIZES(adamw, AdamW, SIZE(n))

/* out may be in's own buffer. */
OPERANDS(cast_params, CastParams,
    ROW(out, PAR, OUT, a->n, false),
    ROW(in, MASTER, IN, a->n, false))
SIZES(cast_params, CastParams, SIZE(n))

#undef ROW
#undef OPERANDS
#undef SIZE
#undef SIZES

int op_operands(Backend *backend, OpId op, const void *args, Operand operands[OP_MAX_OPERANDS]) {
    switch (op) {
#define CASE(name, Args) case OP_##name: return operands_##name(backend, args, operands);
        LLMC_OPS(CASE)
#undef CASE
    case OP_COUNT: break;
    }
    CHECK(false, "op number %d, there are %d", (int)op, (int)OP_COUNT);
}

int op_sizes(OpId op, const void *args, OpSize sizes[OP_MAX_SIZES]) {
    switch (op) {
#define CASE(name, Args) case OP_##name: return sizes_##name(args, sizes);
        LLMC_OPS(CASE)
#undef CASE
    case OP_COUNT: break;
    }
    CHECK(false, "op number %d, there are %d", (int)op, (int)OP_COUNT);
}

static size_t element_bytes(const Backend *backend, OperandKind kind) {
    switch (kind) {
    case KIND_ACT: case KIND_PAR: return backend->elem_bytes;
    case KIND_GRAD: case KIND_STAT: case KIND_MASTER: case KIND_MOMENT: return sizeof(float);
    case KIND_TOKENS: return sizeof(int32_t);
    case KIND_SAVED: return 1;
    case KIND_STEP: return sizeof(StepState);
    }
    CHECK(false, "operand kind %d", (int)kind);
}

size_t operand_bytes(const Backend *backend, const Operand *operand) {
    return operand->n * element_bytes(backend, operand->kind);
}

/* Rows of the token embedding beyond the number of tokens cannot all be touched: bytes of the rest, counted once. */
static double untouched_bytes(const Backend *backend, OpId op, const void *args) {
    if (op == OP_embed_forward) {
        const EmbedForward *a = args;
        size_t N = a->B * a->T;
        return a->V > N ? (double)(a->V - N) * (double)a->C * (double)backend->elem_bytes : 0;
    }
    if (op == OP_embed_backward) {
        const EmbedBackward *a = args;
        size_t N = a->B * a->T;
        return a->V > N ? 2 * (double)(a->V - N) * (double)a->C * sizeof(float) : 0;
    }
    return 0;
}

double op_bytes(Backend *backend, OpId op, const void *args) {
    Operand operands[OP_MAX_OPERANDS];
    int n = op_operands(backend, op, args, operands);
    double bytes = 0;
    for (int i = 0; i < n; i++)
        if (operands[i].p) bytes += (operands[i].mode == MODE_ADD ? 2.0 : 1.0) * (double)operand_bytes(backend, &operands[i]);
    return bytes - untouched_bytes(backend, op, args);
}

static double product(size_t m, size_t n, size_t k) { return 2 * (double)m * (double)n * (double)k; }

/* Attention forward: two products of half a T x T matrix; backward: four (the scores that it computes again do not count). */
double op_flops(OpId op, const void *args) {
    const LinearForward *lf = args;
    const LinearBackward *lb = args;
    const AttentionForward *af = args;
    const AttentionBackward *ab = args;
    const AttentionDecode *ad = args;
    const HeadLoss *loss = args;
    const HeadLogits *logits = args;
    switch (op) {
    case OP_linear_forward: return product(lf->N, lf->OC, lf->C);
    case OP_linear_backward: return (lb->dinp.p ? 2 : 1) * product(lb->N, lb->OC, lb->C);
    case OP_attention_forward: return (double)(af->B * af->H) * product(af->T, af->T, af->D);
    case OP_attention_decode: return 4 * (double)(ad->B * ad->H * ad->D) * (double)ad->n * ((double)ad->position + ((double)ad->n + 1) / 2);
    case OP_attention_backward: return 2 * (double)(ab->B * ab->H) * product(ab->T, ab->T, ab->D);
    case OP_head_loss: return (loss->dx.p ? 3 : 1) * product(loss->N, loss->V, loss->C);
    case OP_head_logits: return product(logits->N, logits->V, logits->C);
    default: return 0;
    }
}

void op_run(Backend *backend, OpId op, const void *args) {
    switch (op) {
#define CASE(name, Args) case OP_##name: backend->name(backend, args); return;
        LLMC_OPS(CASE)
#undef CASE
    case OP_COUNT: break;
    }
    CHECK(false, "op number %d, there are %d", (int)op, (int)OP_COUNT);
}
