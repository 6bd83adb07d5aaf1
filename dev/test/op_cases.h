/* One case list of op calls for all tests of ops, and what they need: operands in guarded buffers with defined content (Call), and a backend
 * that is wrong in one chosen way (Broken), to see that a test notices. */
#ifndef LLMC_TEST_OP_CASES_H
#define LLMC_TEST_OP_CASES_H
#include "llmc/base/rng.h"
#include "llmc/wrap/wrapper.h"
#include "test.h"
#include <stdarg.h>

/* ---- complaints: problems found, printed unless they are expected ------------------------------------------------- */
static int complaints;
static bool complain_quietly;
__attribute__((format(printf, 1, 2))) static inline void complain(const char *format, ...) {
    if (complaints++ >= 10 || complain_quietly) return;
    va_list args;
    va_start(args, format);
    printf("FAILED %s: ", test_name);
    vprintf(format, args);
    printf("\n");
    va_end(args);
}

/* ---- cases -------------------------------------------------------------------------------------------------------- */
typedef union {
#define MEMBER(name, Args) Args name;
    LLMC_OPS(MEMBER)
#undef MEMBER
} AnyArgs;

typedef struct {
    OpId op;
    size_t sizes[OP_MAX_SIZES];  /* in op_sizes' order: the order of the argument struct */
    const char *absent;          /* optional operands left out, each with a space before and after */
    size_t chunk;                /* of head_loss */
} OpCase;

/* 1, primes, a C that is no multiple of a block, V % 8 = 2, a T that is no multiple of a tile, 1600. */
static const OpCase op_cases[] = {
    {OP_embed_forward, {1, 1, 1, 1}, "", 0}, /* B T C V */
    {OP_embed_forward, {2, 7, 13, 11}, "", 0},
    {OP_embed_forward, {3, 5, 1600, 50}, "", 0},
    {OP_embed_forward, {2, 33, 48, 258}, "", 0},
    {OP_add_norm_forward, {1, 1}, "", 0}, /* N C */
    {OP_add_norm_forward, {7, 13}, "", 0},
    {OP_add_norm_forward, {7, 13}, " y ", 0},
    {OP_add_norm_forward, {7, 13}, " y residual ", 0},
    {OP_add_norm_forward, {5, 1600}, "", 0},
    {OP_add_norm_forward, {33, 48}, " y ", 0},
    {OP_linear_forward, {1, 1, 1}, "", 0}, /* N C OC */
    {OP_linear_forward, {7, 13, 5}, "", 0},
    {OP_linear_forward, {7, 13, 5}, " pre_gelu ", 0},
    {OP_linear_forward, {33, 48, 144}, "", 0},
    {OP_linear_forward, {33, 48, 144}, " pre_gelu ", 0},
    {OP_linear_forward, {3, 1600, 67}, "", 0},
    {OP_linear_forward, {67, 31, 1600}, " pre_gelu ", 0},
    {OP_gelu_forward, {1}, "", 0},
    {OP_gelu_forward, {13}, "", 0},
    {OP_gelu_forward, {1600}, "", 0},
    {OP_gelu_forward, {4099}, "", 0},
    {OP_attention_forward, {1, 1, 1, 1}, "", 0}, /* B T H D */
    {OP_attention_forward, {2, 7, 3, 5}, "", 0},
    {OP_attention_forward, {2, 7, 3, 5}, " saved ", 0},
    {OP_attention_forward, {2, 33, 2, 8}, "", 0},
    {OP_attention_forward, {1, 5, 25, 64}, "", 0},
    {OP_attention_forward, {1, 131, 1, 64}, "", 0},
    {OP_attention_forward, {1, 131, 1, 64}, " saved ", 0},
    {OP_attention_decode, {1, 1, 1, 1, 1, 0}, "", 0}, /* B T H D n position */
    {OP_attention_decode, {2, 7, 3, 5, 1, 0}, "", 0},
    {OP_attention_decode, {2, 7, 3, 5, 4, 3}, "", 0},
    {OP_attention_decode, {2, 33, 2, 8, 1, 17}, "", 0},
    {OP_attention_decode, {1, 33, 25, 64, 5, 2}, "", 0},
    {OP_attention_decode, {1, 131, 1, 64, 131, 0}, "", 0},
    {OP_attention_decode, {1, 131, 1, 64, 1, 130}, "", 0},
    {OP_head_loss, {1, 1, 1, 1}, "", 0}, /* N C V Vp */
    {OP_head_loss, {7, 13, 10, 10}, "", 0},
    {OP_head_loss, {7, 13, 10, 16}, "", 0},
    {OP_head_loss, {7, 13, 10, 16}, " dx dw ", 0},
    {OP_head_loss, {33, 48, 258, 258}, "", 0},
    {OP_head_loss, {33, 48, 258, 384}, "", 1},
    {OP_head_loss, {33, 48, 258, 384}, "", 5},
    {OP_head_loss, {33, 48, 258, 384}, " dx dw ", 7},
    {OP_head_loss, {3, 1600, 67, 128}, "", 0},
    {OP_head_loss, {67, 16, 1610, 1664}, "", 0},
    {OP_head_logits, {1, 1, 1}, "", 0}, /* N C V */
    {OP_head_logits, {7, 13, 10}, "", 0},
    {OP_head_logits, {1, 48, 1610}, "", 0},
    {OP_head_logits, {3, 1600, 67}, "", 0},
    {OP_linear_backward, {1, 1, 1}, "", 0}, /* N C OC */
    {OP_linear_backward, {7, 13, 5}, "", 0},
    {OP_linear_backward, {7, 13, 5}, " pre_gelu ", 0},
    {OP_linear_backward, {7, 13, 5}, " dinp pre_gelu ", 0},
    {OP_linear_backward, {33, 48, 144}, "", 0},
    {OP_linear_backward, {33, 48, 144}, " pre_gelu ", 0},
    {OP_linear_backward, {3, 1600, 67}, "", 0},
    {OP_linear_backward, {67, 31, 1600}, " pre_gelu ", 0},
    {OP_attention_backward, {1, 1, 1, 1}, "", 0}, /* B T H D */
    {OP_attention_backward, {2, 7, 3, 5}, "", 0},
    {OP_attention_backward, {2, 33, 2, 8}, "", 0},
    {OP_attention_backward, {1, 5, 25, 64}, "", 0},
    {OP_attention_backward, {1, 131, 1, 64}, "", 0},
    {OP_add_norm_backward, {1, 1}, "", 0}, /* N C */
    {OP_add_norm_backward, {7, 13}, "", 0},
    {OP_add_norm_backward, {7, 13}, " dthrough ", 0},
    {OP_add_norm_backward, {5, 1600}, "", 0},
    {OP_add_norm_backward, {33, 48}, "", 0},
    {OP_embed_backward, {1, 1, 1, 1}, "", 0}, /* B T C V */
    {OP_embed_backward, {2, 7, 13, 11}, "", 0},
    {OP_embed_backward, {3, 5, 1600, 50}, "", 0},
    {OP_embed_backward, {2, 33, 48, 258}, "", 0},
    {OP_loss_sum, {1}, "", 0},
    {OP_loss_sum, {13}, "", 0},
    {OP_loss_sum, {1600}, "", 0},
    {OP_sum_squares, {1}, "", 0},
    {OP_sum_squares, {13}, "", 0},
    {OP_sum_squares, {100003}, "", 0},
    {OP_step_decide, {0}, "", 0},
    {OP_adamw, {1}, "", 0},
    {OP_adamw, {13}, "", 0},
    {OP_adamw, {1600}, "", 0},
    {OP_adamw, {100003}, "", 0},
    {OP_cast_params, {1}, "", 0},
    {OP_cast_params, {13}, "", 0},
    {OP_cast_params, {1600}, "", 0},
};
enum { N_OP_CASES = sizeof op_cases / sizeof *op_cases, GUARD = 256 };

/* ---- a call: its operands in guarded buffers ---------------------------------------------------------------------- */
typedef enum { FILL_ZERO, FILL_NAN, FILL_VALUES } Fill;

typedef struct {
    Operand o;
    size_t bytes;
    char *block;              /* backend memory: guard, operand, guard; NULL when the buffer is another operand's */
    char *before, *after;     /* host copies of the operand */
} Bound;

typedef struct {
    Backend *b;
    OpId op;
    AnyArgs args;
    char title[128];
    int n;
    Bound bound[OP_MAX_OPERANDS];
    AdamWSegment segments[3];
} Call;

static inline Bound *call_find(Call *c, const char *name) {
    for (int i = 0; i < c->n; i++)
        if (!strcmp(c->bound[i].o.name, name)) return &c->bound[i];
    CHECK(false, "%s has no operand %s", op_names[c->op], name);
}

static inline void call_set(Call *c, Bound *bound, void *p) {
    bound->o.p = p;
    memcpy((char *)&c->args + bound->o.field, &p, sizeof p);
}

static inline float bf16_to_float(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline bool is_compute_type(const Operand *o) { return o->kind == KIND_ACT || o->kind == KIND_PAR; }

/* Element i of an operand's host copy. */
static inline float value_at(const Call *c, const Bound *bound, const char *host, size_t i) {
    if (is_compute_type(&bound->o) && c->b->elem_bytes == 2) return bf16_to_float(((const uint16_t *)(const void *)host)[i]);
    return ((const float *)(const void *)host)[i];
}

static inline void put_value(const Call *c, const Bound *bound, char *host, size_t i, float value) {
    if (is_compute_type(&bound->o) && c->b->elem_bytes == 2) { /* truncated: an exact bf16 is all that is wanted */
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        ((uint16_t *)(void *)host)[i] = (uint16_t)(bits >> 16);
    } else ((float *)(void *)host)[i] = value;
}

/* Uniform in [-1, 1), a function of seed, op, operand and index. */
static uint32_t input_seed = 42;
static inline float input_value(const Call *c, const Bound *bound, size_t i) {
    return (float)(2 * rng_uniform(input_seed, (uint32_t)c->op * 16 + (uint32_t)(bound - c->bound), 0, i) - 1);
}

static inline size_t call_size(const Call *c, const char *name) {
    OpSize sizes[OP_MAX_SIZES];
    int n = op_sizes(c->op, &c->args, sizes);
    for (int i = 0; i < n; i++)
        if (!strcmp(sizes[i].name, name)) return sizes[i].value;
    return 0;
}

static const StepState step_example = {
    .lr = 0.01f, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .weight_decay = 0.1f, .grad_clip = 1, .loss_limit = INFINITY,
    .norm_limit = INFINITY, .loss_rows = 24, .seed = 3, .step = 5, .loss_sum = 36.5, .sum_squares = 16, .loss = 1.5f, .grad_norm = 4,
    .grad_scale = 0.25f, .skip = SKIP_NONE, .updates = 4};

/* Content of an operand that the op reads (and of `+=` operands under FILL_VALUES). */
static inline void fill_values(Call *c, Bound *bound) {
    const Operand *o = &bound->o;
    size_t V = call_size(c, "V"), padding = c->op == OP_head_loss && !strcmp(o->name, "w") ? V * call_size(c, "C") : SIZE_MAX;
    const bool variance = !strcmp(o->name, "v");
    const int lowest = strcmp(o->name, "targets") ? 0 : -1; /* a target may be -1 */
    for (size_t i = 0; i < o->n && o->kind != KIND_SAVED; i++) {
        float u = input_value(c, bound, i);
        if (o->kind == KIND_STEP) memcpy(bound->before, &step_example, sizeof step_example);
        else if (o->kind == KIND_TOKENS) {
            int64_t id = (int64_t)((u + 1) / 2 * (double)(V - (size_t)(int64_t)lowest)) + lowest;
            ((int32_t *)(void *)bound->before)[i] = (int32_t)(id >= (int64_t)V ? (int64_t)V - 1 : id);
        } else put_value(c, bound, bound->before, i, i >= padding ? 0 : variance ? 0.01f * (u + 1) : u);
    }
}

/* add_norm_backward's mean and rstd are those of its residual. */
static inline void fill_statistics(Call *c) {
    Bound *residual = call_find(c, "residual");
    size_t N = call_size(c, "N"), C = call_size(c, "C");
    for (size_t row = 0; row < N; row++) {
        double mean = 0, variance = 0;
        for (size_t i = 0; i < C; i++) mean += value_at(c, residual, residual->before, row * C + i) / (double)C;
        for (size_t i = 0; i < C; i++) variance += pow(value_at(c, residual, residual->before, row * C + i) - mean, 2) / (double)C;
        put_value(c, call_find(c, "mean"), call_find(c, "mean")->before, row, (float)mean);
        put_value(c, call_find(c, "rstd"), call_find(c, "rstd")->before, row, (float)(1 / sqrt(variance + 1e-5)));
    }
}

static const unsigned char guard_pattern[4] = {0xEE, 0xFF, 0xA0, 0x7F}; /* NaN as fp32 and as bf16: reading it shows; signalling: += 0 changes it */

static inline void fill_pattern(char *p, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) p[i] = (char)guard_pattern[i % 4];
}

static inline void upload_bound(Call *c, Bound *bound) {
    char guard[GUARD];
    fill_pattern(guard, GUARD);
    c->b->upload(c->b, bound->block, guard, GUARD);
    c->b->upload(c->b, bound->block + GUARD, bound->before, bound->bytes);
    c->b->upload(c->b, bound->block + GUARD + bound->bytes, guard, GUARD);
}

/* Runs an op with its scratch planned. */
static inline void run_planned(Backend *b, OpId op, const void *args) {
    Error e = {0};
    b->plan_begin(b);
    op_run(b, op, args);
    CHECK(b->plan_end(b, &e), "%s", e.text);
    op_run(b, op, args);
}

/* What only another op can make: attention's output and saved state, GELU's output. */
static inline void run_prerequisites(Call *c) {
    if (c->op == OP_attention_backward) {
        const AttentionBackward *a = &c->args.attention_backward;
        run_planned(c->b, OP_attention_forward, &(AttentionForward){.out = a->out, .saved = a->saved, .qkv = a->qkv, .B = a->B, .T = a->T, .H = a->H, .D = a->D});
    }
    if (c->op == OP_linear_backward && c->args.linear_backward.pre_gelu.p) {
        const LinearBackward *a = &c->args.linear_backward;
        run_planned(c->b, OP_gelu_forward, &(GeluForward){.out = a->inp, .pre_gelu = a->pre_gelu, .n = a->N * a->C});
    }
}

/* Defined content for all operands: values for what is read, `out` for what is overwritten, `add` for what is accumulated into. */
static inline void call_fill(Call *c, Fill out, Fill add) {
    for (int i = 0; i < c->n; i++) {
        Bound *bound = &c->bound[i];
        if (!bound->block) continue;
        Fill fill = bound->o.mode == MODE_IN || bound->o.kind == KIND_STEP || bound->o.kind == KIND_MASTER || bound->o.kind == KIND_MOMENT
                        ? FILL_VALUES : bound->o.mode == MODE_OUT ? out : add;
        if (bound->o.kind == KIND_SAVED) fill = FILL_NAN;
        memset(bound->before, 0, bound->bytes);
        if (fill == FILL_NAN) fill_pattern(bound->before, bound->bytes);
        if (fill == FILL_VALUES) fill_values(c, bound);
    }
    if (c->op == OP_add_norm_backward) fill_statistics(c);
    for (int i = 0; i < c->n; i++) if (c->bound[i].block) upload_bound(c, &c->bound[i]);
    run_prerequisites(c);
    for (int i = 0; i < c->n; i++)
        if (c->bound[i].o.p) c->b->download(c->b, c->bound[i].before, c->bound[i].o.p, c->bound[i].bytes);
}

static inline bool is_absent(const OpCase *k, const Operand *o) {
    char word[64];
    snprintf(word, sizeof word, " %s ", o->name);
    return strstr(k->absent, word);
}

static inline void set_sizes(AnyArgs *args, const OpCase *k) {
    OpSize sizes[OP_MAX_SIZES];
    int n = op_sizes(k->op, args, sizes);
    for (int i = 0; i < n; i++) memcpy((char *)args + sizes[i].field, &k->sizes[i], sizeof(size_t));
}

/* The operands of a case, without buffers. */
static inline int case_operands(Backend *b, const OpCase *k, Operand operands[OP_MAX_OPERANDS]) {
    AnyArgs args;
    memset(&args, 0, sizeof args);
    set_sizes(&args, k);
    return op_operands(b, k->op, &args, operands);
}

/* Small enough to be run hundreds of times. */
static inline bool is_small(const Operand *operands, int n) {
    size_t elements = 0;
    for (int i = 0; i < n; i++) elements += operands[i].n;
    return elements < 20000;
}

static inline void call_create(Call *c, Backend *b, const OpCase *k) {
    memset(c, 0, sizeof *c);
    c->b = b;
    c->op = k->op;
    set_sizes(&c->args, k);
    OpSize sizes[OP_MAX_SIZES];
    int n_sizes = op_sizes(k->op, &c->args, sizes), at = snprintf(c->title, sizeof c->title, "%s %s(", b->name, op_names[k->op]);
    for (int i = 0; i < n_sizes; i++)
        at += snprintf(c->title + at, sizeof c->title - (size_t)at, "%s %zu%s", sizes[i].name, k->sizes[i], i + 1 < n_sizes ? ", " : "");
    snprintf(c->title + at, sizeof c->title - (size_t)at, ")%s%s", *k->absent ? " without" : "", k->absent);
    if (k->op == OP_head_loss) { c->args.head_loss.scale = 1.0f / (float)c->args.head_loss.N; c->args.head_loss.chunk = k->chunk; }
    if (k->op == OP_adamw) { /* three segments with gaps, where there is room */
        size_t n = c->args.adamw.n;
        c->segments[0] = (AdamWSegment){0, n < 8 ? n : n / 3, 1};
        c->segments[1] = (AdamWSegment){n / 3 + 2, n / 4, 0};
        c->segments[2] = (AdamWSegment){n - n / 5, n / 5, 1};
        c->args.adamw.segments = c->segments;
        c->args.adamw.n_segments = n < 8 ? 1 : 3;
    }
    Operand operands[OP_MAX_OPERANDS];
    c->n = op_operands(b, c->op, &c->args, operands);
    for (int i = 0; i < c->n; i++) {
        Bound *bound = &c->bound[i];
        bound->o = operands[i];
        if (is_absent(k, &operands[i])) continue;
        Error e = {0};
        bound->bytes = operand_bytes(b, &bound->o);
        bound->block = b->alloc(b, MEM_OTHER, operands[i].name, bound->bytes + 2 * GUARD, &e);
        CHECK(bound->block, "%s", e.text);
        bound->before = xcalloc(bound->bytes, 1);
        bound->after = xcalloc(bound->bytes, 1);
        call_set(c, bound, bound->block + GUARD);
    }
}

static inline void call_destroy(Call *c) {
    for (int i = 0; i < c->n; i++) {
        if (c->bound[i].block) c->b->release(c->b, c->bound[i].block);
        free(c->bound[i].before);
        free(c->bound[i].after);
    }
}

/* Lets two operands share the first one's buffer. */
static inline void call_alias(Call *c, const char *buffer_of, const char *also) {
    Bound *bound = call_find(c, also);
    c->b->release(c->b, bound->block);
    bound->block = NULL;
    call_set(c, bound, call_find(c, buffer_of)->o.p);
}

static inline void check_guards(Call *c, const Bound *bound) {
    char guards[2][GUARD], want[GUARD];
    fill_pattern(want, GUARD);
    c->b->download(c->b, guards[0], bound->block, GUARD);
    c->b->download(c->b, guards[1], bound->block + GUARD + bound->bytes, GUARD);
    if (memcmp(guards[0], want, GUARD)) complain("%s writes before %s", c->title, bound->o.name);
    if (memcmp(guards[1], want, GUARD)) complain("%s writes beyond %s", c->title, bound->o.name);
}

/* Whether another operand lives in this one's buffer, which may then change though this one is an input. */
static inline bool is_shared(const Call *c, const Bound *bound) {
    for (int i = 0; i < c->n; i++)
        if (&c->bound[i] != bound && c->bound[i].o.p == bound->o.p) return true;
    return false;
}

/* Whether element i of an output is the op's business: adamw leaves what is outside its segments. */
static inline bool is_covered(const Call *c, const Bound *bound, size_t i) {
    if (c->op != OP_adamw || bound->o.kind != KIND_PAR) return true;
    const AdamW *a = &c->args.adamw;
    for (size_t s = 0; s < a->n_segments; s++)
        if (i >= a->segments[s].first && i - a->segments[s].first < a->segments[s].n) return true;
    return false;
}

/* Runs the call on filled operands; whatever it is called for, guards and inputs must be intact afterwards. */
static inline void call_run(Call *c) {
    run_planned(c->b, c->op, &c->args);
    c->b->sync(c->b);
    for (int i = 0; i < c->n; i++) {
        Bound *bound = &c->bound[i];
        if (!bound->o.p) continue;
        c->b->download(c->b, bound->after, bound->o.p, bound->bytes);
        if (!bound->block) continue;
        check_guards(c, bound);
        if (bound->o.mode == MODE_IN && !is_shared(c, bound) && memcmp(bound->before, bound->after, bound->bytes)) complain("%s changes its input %s", c->title, bound->o.name);
    }
}

/* ---- a backend that is wrong in one way --------------------------------------------------------------------------- */
typedef enum {
    DAMAGE_ELEMENT,           /* the last element is off by 1 */
    DAMAGE_NAN,               /* the last element is NaN */
    DAMAGE_UNWRITTEN,         /* the last element keeps its old content */
    DAMAGE_NOT_ADDED,         /* the old content counts as zero */
    DAMAGE_BEYOND,            /* a byte behind the end changes */
    DAMAGE_BEFORE,
    DAMAGE_JITTER             /* the last element differs from call to call */
} Damage;

typedef struct {
    Wrapper w;
    Damage damage;
    OpId op;
    int operand;
    int calls;
} Broken;

static inline void damage_element(Broken *broken, const Operand *o, char *last, size_t bytes) {
    float step = bytes == 2 ? 0.25f : 1e-3f; /* what no bf16 near 1 loses in rounding */
    float off = broken->damage == DAMAGE_NAN ? NAN : broken->damage == DAMAGE_JITTER ? step * (float)++broken->calls : 1, value;
    if (o->kind == KIND_STEP) {
        StepState *s = (StepState *)(void *)last;
        s->loss_sum += off;
        return;
    }
    if (o->kind == KIND_SAVED || o->kind == KIND_TOKENS) { last[0] ^= 1; return; }
    if (bytes == 4) { memcpy(&value, last, 4); value += off; memcpy(last, &value, 4); return; }
    uint16_t half;
    memcpy(&half, last, 2);
    value = bf16_to_float(half) + off;
    memcpy(last, (char *)&value + 2, 2);
}

static inline void broken_run(Backend *b, OpId op, const void *args) {
    Broken *broken = (Broken *)b;
    Backend *inner = b->inner;
    Operand operands[OP_MAX_OPERANDS];
    op_operands(inner, op, args, operands);
    const Operand *o = &operands[broken->operand];
    if (broken->w.planning || op != broken->op || !o->p) { op_run(inner, op, args); return; }
    size_t bytes = operand_bytes(inner, o), each = bytes / o->n;
    char *at = (char *)o->p + bytes - each, last[sizeof(StepState)];
    inner->download(inner, last, at, each);
    if (broken->damage == DAMAGE_NOT_ADDED) inner->fill_zero(inner, o->p, bytes);
    op_run(inner, op, args);
    if (broken->damage == DAMAGE_NOT_ADDED) return;
    if (broken->damage == DAMAGE_BEYOND || broken->damage == DAMAGE_BEFORE) {
        char byte = 0;
        inner->upload(inner, broken->damage == DAMAGE_BEYOND ? (char *)o->p + bytes : (char *)o->p - 1, &byte, 1);
        return;
    }
    if (broken->damage != DAMAGE_UNWRITTEN) {
        inner->download(inner, last, at, each);
        damage_element(broken, o, last, each);
    }
    inner->upload(inner, at, last, each);
}

static inline Backend *broken_create(Backend *inner, Damage damage, OpId op, int operand) {
    Broken *broken = xcalloc(1, sizeof *broken);
    wrapper_init(&broken->w, "broken", inner, broken_run);
    broken->damage = damage;
    broken->op = op;
    broken->operand = operand;
    return &broken->w.backend;
}
#endif
