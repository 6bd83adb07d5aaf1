/* Every op of the CUDA backend, on a GPU or emulated, in both compute types, against plain loops in double on the same (rounded) inputs, over the case list
 * of op_cases.h and the shapes below that only a GPU kernel finds hard. test_device_ops NAME runs the tests whose name holds NAME ("bf16 attention").
 * Bound: twice the error of the same loops in float, in bf16 with every intermediate tensor rounded, plus rounding (DESIGN.md, decision 13).
 * Emulated, LLMC_TEST_SCHEDULES="reversed ahead:1 ...": each case runs once more under each of these schedules, and must give the same bits. */
#include "backends.h"
#include "op_cases.h"
#include "ref_shape.h"

#ifdef DEVICE_NAME
/* Shapes at the kernels' own borders: tiles of 64 and 128, head sizes with and without tensor cores, rows of several vectors. */
#define ATTENTION_CASE(op, T) {op, {1, T, 2, 64}, "", 0}, {op, {2, T, 2, 128}, "", 0}
#define ATTENTION_CASES(op)                                                                                            \
    ATTENTION_CASE(op, 1), ATTENTION_CASE(op, 63), ATTENTION_CASE(op, 64), ATTENTION_CASE(op, 65), ATTENTION_CASE(op, 127),                    \
    ATTENTION_CASE(op, 128), ATTENTION_CASE(op, 129), ATTENTION_CASE(op, 200), ATTENTION_CASE(op, 300)
static const OpCase more_cases[] = {
    ATTENTION_CASES(OP_attention_forward),
    {OP_attention_forward, {3, 200, 2, 64}, " saved ", 0}, /* B T H D */
    {OP_attention_forward, {1, 70, 2, 32}, "", 0},
    {OP_attention_forward, {1, 19, 1, 256}, "", 0},
    ATTENTION_CASES(OP_attention_backward),
    {OP_attention_forward, {1, 37, 2, 80}, "", 0},
    {OP_attention_forward, {2, 50, 1, 100}, "", 0},
    {OP_attention_forward, {1, 33, 1, 131}, "", 0},
    {OP_attention_backward, {1, 64, 1, 64}, "", 0},
    {OP_attention_backward, {2, 200, 2, 64}, "", 0},
    {OP_attention_backward, {1, 129, 1, 128}, "", 0},
    {OP_attention_backward, {3, 200, 2, 64}, "", 0},
    {OP_attention_backward, {1, 70, 2, 32}, "", 0},
    {OP_attention_backward, {1, 19, 1, 256}, "", 0},
    {OP_attention_backward, {1, 37, 2, 80}, "", 0},
    {OP_attention_backward, {2, 50, 1, 100}, "", 0},
    {OP_attention_backward, {1, 33, 1, 131}, "", 0},
    {OP_attention_decode, {2, 9, 2, 80, 3, 6}, "", 0}, /* B T H D n position */
    {OP_attention_decode, {1, 300, 1, 256, 2, 290}, "", 0},
    {OP_attention_decode, {1, 40, 1, 131, 7, 33}, "", 0},
    {OP_add_norm_forward, {5, 64}, "", 0},
    {OP_add_norm_forward, {9, 768}, "", 0},
    {OP_add_norm_forward, {3, 8192}, "", 0},
    {OP_add_norm_forward, {2, 16384}, "", 0},
    {OP_add_norm_forward, {17, 8}, "", 0},
    {OP_add_norm_forward, {3, 40}, " y ", 0},
    {OP_add_norm_forward, {2, 1024}, "", 0},  /* each number of vectors a lane */
    {OP_add_norm_forward, {2, 1280}, "", 0},
    {OP_add_norm_forward, {2, 1600}, " y ", 0},
    {OP_add_norm_forward, {2, 2048}, "", 0},
    {OP_add_norm_forward, {2, 4096}, "", 0},
    {OP_add_norm_forward, {1, 12288}, " y residual ", 0},
    {OP_add_norm_forward, {2, 12289}, "", 0},
    {OP_add_norm_backward, {5, 64}, "", 0},
    {OP_add_norm_backward, {300, 768}, "", 0},
    {OP_add_norm_backward, {3, 8192}, "", 0},
    {OP_add_norm_backward, {2, 16384}, "", 0},
    {OP_add_norm_backward, {1000, 8}, "", 0},
    {OP_add_norm_backward, {1, 40}, " dthrough ", 0},
    {OP_add_norm_backward, {1000, 37}, "", 0},
    {OP_add_norm_backward, {70, 512}, "", 0},
    {OP_add_norm_backward, {9, 1024}, "", 0},
    {OP_add_norm_backward, {20, 1600}, " dthrough ", 0},
    {OP_add_norm_backward, {9, 4096}, "", 0},
    {OP_add_norm_backward, {9, 12288}, "", 0},
    {OP_add_norm_backward, {5, 12289}, " dthrough ", 0},
    {OP_linear_backward, {130, 64, 192}, "", 0}, /* N C OC */
    {OP_linear_backward, {600, 8, 1600}, "", 0},
    {OP_head_loss, {5, 8, 50257, 50304}, "", 2}, /* N C V Vp */
    {OP_head_loss, {4, 8, 2048, 2048}, "", 0},
    {OP_head_loss, {3, 8, 2049, 2112}, "", 0}, /* more than a vector a thread; in fp32 every border is at half the V */
    {OP_head_loss, {3, 8, 4097, 4100}, "", 0},
    {OP_head_loss, {3, 8, 8192, 8192}, "", 0},
    {OP_head_loss, {3, 8, 8193, 8193}, "", 0},
    {OP_head_loss, {2, 8, 32767, 32768}, "", 0},
    {OP_head_loss, {2, 8, 51200, 51200}, "", 0},
    {OP_head_loss, {2, 8, 51201, 51328}, "", 0}, /* the row that no longer fits two to a multiprocessor */
    {OP_head_loss, {2, 8, 51201, 51328}, " dx dw ", 0},
    {OP_head_loss, {2, 8, 65537, 65600}, "", 0},
    {OP_head_loss, {2, 8, 102402, 102528}, "", 0}, /* the row that is read twice, in part */
    {OP_head_loss, {2, 8, 128256, 128256}, "", 0},
    {OP_head_loss, {2, 8, 128256, 128256}, " dx dw ", 0},
    {OP_head_loss, {300, 8, 258, 258}, "", 0},
    {OP_head_logits, {1, 64, 50257}, "", 0},
    {OP_embed_backward, {4, 100, 64, 7}, "", 0}, /* B T C V: many rows of one token */
    {OP_embed_backward, {2, 700, 8, 5}, "", 0},
    {OP_embed_backward, {1, 1100, 16, 3000}, "", 0},
    {OP_embed_backward, {1, 1100, 24, 1}, "", 0},
    {OP_embed_backward, {2, 9, 768, 50257}, "", 0},
    {OP_sum_squares, {100003}, "", 0},
    {OP_sum_squares, {32768}, "", 0},
    {OP_sum_squares, {32769}, "", 0},
    {OP_sum_squares, {3}, "", 0},
    {OP_loss_sum, {70001}, "", 0},
    {OP_loss_sum, {65536}, "", 0},
    {OP_adamw, {20011}, "", 0}, /* tiles of 8192, vectors of 4 */
    {OP_adamw, {2}, "", 0},
    {OP_adamw, {3}, "", 0},
    {OP_adamw, {4}, "", 0},
    {OP_adamw, {5}, "", 0},
    {OP_adamw, {6}, "", 0},
    {OP_adamw, {7}, "", 0},
    {OP_adamw, {8}, "", 0},
    {OP_adamw, {9}, "", 0},
    {OP_adamw, {24573}, "", 0}, /* a segment that ends one short of a tile */
    {OP_adamw, {24579}, "", 0},
    {OP_cast_params, {5}, "", 0},
    {OP_cast_params, {4099}, "", 0},
};
enum { N_MORE = sizeof more_cases / sizeof *more_cases };

static Backend *gpu, *cpu;
static OpId op_under_test;

/* The content of all operands of `from`, as floats, into `to`. */
static void same_content(Call *to, const Call *from) {
    for (int i = 0; i < to->n; i++) {
        Bound *t = &to->bound[i];
        const Bound *f = &from->bound[i];
        if (!t->block || t->o.kind == KIND_SAVED) continue;
        if (t->bytes == f->bytes) memmove(t->before, f->before, t->bytes);
        else for (size_t k = 0; k < t->o.n; k++) put_value(to, t, t->before, k, value_at(from, f, f->before, k));
        upload_bound(to, t);
    }
    run_prerequisites(to);
    for (int i = 0; i < to->n; i++)
        if (to->bound[i].o.p) to->b->download(to->b, to->bound[i].before, to->bound[i].o.p, to->bound[i].bytes);
}

/* ---- references ------------------------------------------------------------------------------------------------------- */

static int operand_index(const Call *c, const char *name) { return (int)(call_find((Call *)c, name) - c->bound); }
static bool has_values(const Bound *bound) { return bound->o.kind != KIND_SAVED && bound->o.kind != KIND_STEP && bound->o.kind != KIND_TOKENS; }
static float bf16_nearest(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return isnan(x) ? x : bf16_to_float((uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16));
}

static Shape shape_of(const Call *c) {
    Shape s = {.B = call_size(c, "B"), .T = call_size(c, "T"), .C = call_size(c, "C"), .H = call_size(c, "H"), .D = call_size(c, "D"),
               .V = call_size(c, "V"), .N = call_size(c, "N"), .OC = call_size(c, "OC")};
    for (int i = 0; i < c->n; i++)
        if (c->bound[i].o.kind == KIND_TOKENS) s.ids = (int32_t *)(void *)c->bound[i].before;
    return s;
}

#define REAL double
#define SUFFIX _d
#define TANH tanh
#define EXP exp
#define LOG log
#define SQRT sqrt
#include "op_reference.h"
#define REAL float
#define SUFFIX _f
#define TANH tanhf
#define EXP expf
#define LOG logf
#define SQRT sqrtf
#include "op_reference.h"
#define REAL float
#define SUFFIX _b
#define TANH tanhf
#define EXP expf
#define LOG logf
#define SQRT sqrtf
#define ROUND(x) bf16_nearest(x)
#include "op_reference.h"

/* ---- bounds --------------------------------------------------------------------------------------------------------------- */

/* Elements of one kind, whose largest error of the plain loops bounds them all: a tensor, but dq, dk and dv apart. */
enum { GROUPS = 3 };
static size_t group_size(const Call *c, const Bound *bound) { return strcmp(bound->o.name, "dqkv") ? SIZE_MAX : call_size(c, "H") * call_size(c, "D"); }
typedef struct { double error, size; } Plain;
typedef Plain Plains[OP_MAX_OPERANDS][GROUPS];

/* What the rounding of a sum is relative to: its largest term's size where terms cancel, not what is left of them. For attention_backward dp less
 * its mean, which is nothing at all where all weight lies on one key: the sums of dq, dk and dv with every term's absolute value. */
static void attention_terms(Plain *plain, const Call *c) {
    double *x[OP_MAX_OPERANDS];
    operands_load_d(x, c);
    const Shape s = shape_of(c);
    const size_t C = s.H * s.D, T = s.T;
    const double *all_qkv = x[operand_index(c, "qkv")], *dout = x[operand_index(c, "dout")], scale = 1 / sqrt((double)s.D);
    double *terms = xcalloc(T * 3 * C, sizeof *terms), p[REF_LARGEST_T], dp[REF_LARGEST_T];
    for (size_t b = 0; b < s.B; b++) {
        const double *qkv = all_qkv + b * T * 3 * C;
        memset(terms, 0, T * 3 * C * sizeof *terms);
        for (size_t t = 0; t < T; t++)
            for (size_t h = 0; h < s.H; h++) {
                const size_t at = h * s.D;
                const double *g = dout + (b * T + t) * C + at, *q = qkv + t * 3 * C + at;
                double mean = 0, *dq = terms + t * 3 * C + at;
                weights_d(p, (double *)qkv, &s, t, h);
                for (size_t k = 0; k <= t; k++) {
                    dp[k] = 0;
                    for (size_t d = 0; d < s.D; d++) dp[k] += fabs(g[d] * qkv[k * 3 * C + 2 * C + at + d]);
                    mean += p[k] * dp[k];
                }
                for (size_t k = 0; k <= t; k++) {
                    const double ds = p[k] * (dp[k] + mean) * scale, *key = qkv + k * 3 * C + C + at;
                    double *dk = terms + k * 3 * C + C + at, *dv = dk + C;
                    for (size_t d = 0; d < s.D; d++) dq[d] += ds * fabs(key[d]), dk[d] += ds * fabs(q[d]), dv[d] += p[k] * fabs(g[d]);
                }
            }
        for (size_t i = 0; i < T * 3 * C; i++) plain[i / C % 3].size = fmax(plain[i / C % 3].size, terms[i]);
    }
    free(terms);
    for (int i = 0; i < c->n; i++) free(x[i]);
}

/* Both references on the operands as they are before the call; exact is the caller's to free. head_logits has no tensor inside: its logits are
 * the result, in float32 whatever the compute type. */
static void measure_plain(Plains plain, double **exact, const Call *c) {
    float *x[OP_MAX_OPERANDS];
    operands_load_d(exact, c);
    reference_d(exact, c);
    if (c->b->elem_bytes == 2 && c->op != OP_head_logits) operands_load_b(x, c), reference_b(x, c);
    else operands_load_f(x, c), reference_f(x, c);
    for (int i = 0; i < c->n; i++) {
        const size_t group = group_size(c, &c->bound[i]);
        for (size_t k = 0; c->bound[i].o.mode != MODE_IN && has_values(&c->bound[i]) && c->bound[i].o.p && k < c->bound[i].o.n; k++) {
            Plain *p = &plain[i][k / group % GROUPS];
            if (!is_covered(c, &c->bound[i], k)) continue;
            p->error = fmax(p->error, fabs((double)x[i][k] - exact[i][k]));
            p->size = fmax(p->size, fabs(exact[i][k]));
        }
    }
    for (int i = 0; i < c->n; i++) free(x[i]);
    if (c->op == OP_attention_backward) attention_terms(plain[operand_index(c, "dqkv")], c);
}

/* Other inputs of the same kind. */
static void draw_inputs(Call *c, uint32_t draw) {
    input_seed = 42 + draw;
    for (int i = 0; i < c->n; i++)
        if (c->bound[i].block && c->bound[i].o.mode != MODE_OUT && c->bound[i].o.kind != KIND_STEP && c->bound[i].o.kind != KIND_SAVED)
            fill_values(c, &c->bound[i]);
    if (c->op == OP_linear_backward && c->args.linear_backward.pre_gelu.p) {
        Bound *inp = call_find(c, "inp"), *pre = call_find(c, "pre_gelu");
        for (size_t k = 0; k < inp->o.n; k++) {
            float y = gelu_value_f(value_at(c, pre, pre->before, k));
            put_value(c, inp, inp->before, k, c->b->elem_bytes == 2 ? bf16_nearest(y) : y);
        }
    }
    input_seed = 42;
}

/* A tensor of few elements may have no error by accident: then further draws of its inputs, as many as come to 64 elements, as far as time allows. */
static uint32_t draws_for(const Call *c) {
    size_t fewest = 64;
    for (int i = 0; i < c->n; i++)
        if (c->bound[i].o.mode != MODE_IN && has_values(&c->bound[i]) && c->bound[i].o.p && c->bound[i].o.n < fewest) fewest = c->bound[i].o.n;
    double affordable = 1 + 2e7 / (1 + op_flops(c->op, &c->args));
    return (uint32_t)fmin(ceil(64 / (double)fewest), affordable);
}

static struct { double ratio; char where[200]; } worst; /* largest error of an op's cases, as a part of its bound */

/* The largest score of a query and a key it sees. */
static double largest_score(const Call *c) {
    double *x[OP_MAX_OPERANDS], p[REF_LARGEST_T], largest = 0;
    operands_load_d(x, c);
    const Shape s = shape_of(c);
    for (size_t i = 0; i < s.B * s.T * s.H; i++) {
        const size_t h = i % s.H, t = i / s.H % s.T, b = i / s.H / s.T;
        scores_d(p, x[operand_index(c, "qkv")] + b * s.T * 3 * s.H * s.D, &s, t, h);
        for (size_t k = 0; k <= t; k++) largest = fmax(largest, fabs(p[k]));
    }
    for (int i = 0; i < c->n; i++) free(x[i]);
    return largest;
}

/* Of a float result, relative to the largest (attention_backward: to its terms). Attention takes its scores to base 2 for an exponential of base 2:
 * the factor and the product are rounded, backward the saved logarithm and the difference as well, each an error of a weight of up to 2^-24 of the
 * score. The loops have no error at all where all weight lies on one key. */
static double rounding_of(const Call *c) {
    const int more = c->op == OP_attention_forward ? 2 : c->op == OP_attention_backward ? 4 : 0;
    return 0x1p-23 + (more ? more * 0x1p-24 * largest_score(c) : 0);
}

static void expect_operand(const Call *ours, const Bound *a, const double *exact, const Plain *plain, double rounding) {
    const bool half = is_compute_type(&a->o) && ours->b->elem_bytes == 2;
    const size_t group = group_size(ours, a);
    for (size_t k = 0; k < a->o.n; k++) {
        if (!is_covered(ours, a, k)) continue;
        const Plain *p = &plain[k / group % GROUPS];
        double x = value_at(ours, a, a->after, k), y = exact[k], error = fabs(x - y);
        double bound = 2 * p->error + (half ? 0x1p-8 * fabs(y) : rounding * p->size);
        if (error > worst.ratio * bound) {
            worst.ratio = error / bound;
            snprintf(worst.where, sizeof worst.where, "%s.%s: %.2g of %.2g", ours->title, a->o.name, error, bound);
        }
        if (error <= bound || (isnan(x) && isnan(y))) continue;
        complain("%s: %s[%zu of %zu] is %.7g, exactly %.9g; error %.2g, bound %.2g, plain %.2g", ours->title, a->o.name, k, a->o.n, x, y, error, bound,
                 p->error);
        break;
    }
}

/* The call has run; its operands before and after are in the bounds. */
static void expect_close(Call *ours) {
    double *exact[OP_MAX_OPERANDS], *other[OP_MAX_OPERANDS];
    Plains plain = {0};
    const double rounding = rounding_of(ours);
    measure_plain(plain, exact, ours);
    for (uint32_t draw = 1, n = draws_for(ours); draw < n; draw++) {
        draw_inputs(ours, draw);
        measure_plain(plain, other, ours);
        for (int i = 0; i < ours->n; i++) free(other[i]);
    }
    for (int i = 0; i < ours->n; i++)
        if (ours->bound[i].o.p && ours->bound[i].o.mode != MODE_IN && has_values(&ours->bound[i]))
            expect_operand(ours, &ours->bound[i], exact[i], plain[i], rounding);
    for (int i = 0; i < ours->n; i++) free(exact[i]);
}

/* The step's numbers, against the CPU backend: sums in double, the rest one rounding to float. */
static void expect_step(const Call *ours, const Call *exact) {
    StepState s, t;
    memcpy(&s, call_find((Call *)ours, "step")->after, sizeof s), memcpy(&t, call_find((Call *)exact, "step")->after, sizeof t);
    if (fabs(s.loss_sum - t.loss_sum) <= 1e-13 * fabs(t.loss_sum) && fabs(s.sum_squares - t.sum_squares) <= 1e-13 * t.sum_squares &&
        fabsf(s.loss - t.loss) <= 0x1p-23f * fabsf(t.loss) && fabsf(s.grad_norm - t.grad_norm) <= 0x1p-23f * t.grad_norm &&
        fabsf(s.grad_scale - t.grad_scale) <= 0x1p-23f * t.grad_scale && s.skip == t.skip && s.updates == t.updates) return;
    complain("%s: step: loss %g norm %g scale %g skip %d updates %lld sums %.17g %.17g; cpu: %g %g %g %d %lld %.17g %.17g", ours->title, (double)s.loss,
             (double)s.grad_norm, (double)s.grad_scale, s.skip, (long long)s.updates, s.loss_sum, s.sum_squares, (double)t.loss, (double)t.grad_norm,
             (double)t.grad_scale, t.skip, (long long)t.updates, t.loss_sum, t.sum_squares);
}

#ifdef LLMC_EMU
bool emu_use_schedule(const char *text); /* of dev/emu */

static void expect_same_bits(const Call *c, char *const *first, const char *schedule) {
    for (int i = 0; i < c->n; i++) {
        const Bound *bound = &c->bound[i];
        size_t k = 0;
        while (bound->o.p && k < bound->bytes && bound->after[k] == first[i][k]) k++;
        if (bound->o.p && k < bound->bytes) complain("%s: under %s byte %zu of %zu of %s is another", c->title, schedule, k, bound->bytes, bound->o.name);
    }
}
/* The call under each of the schedules, from the same content. */
static void run_schedules(Call *c) {
    char list[200], *first[OP_MAX_OPERANDS];
    const char *wanted = getenv("LLMC_TEST_SCHEDULES");
    snprintf(list, sizeof list, "%s", wanted ? wanted : "");
    for (int i = 0; i < c->n; i++) first[i] = c->bound[i].after;
    for (char *rest, *s = strtok_r(list, " ", &rest); s; s = strtok_r(NULL, " ", &rest)) {
        CHECK(emu_use_schedule(s), "LLMC_TEST_SCHEDULES: no schedule \"%s\"", s);
        for (int i = 0; i < c->n; i++) {
            c->bound[i].after = xcalloc(c->bound[i].bytes, 1);
            if (c->bound[i].block) upload_bound(c, &c->bound[i]);
        }
        call_run(c);
        expect_same_bits(c, first, s);
        for (int i = 0; i < c->n; i++) free(c->bound[i].after), c->bound[i].after = first[i];
        CHECK(emu_use_schedule(""), "the default");
    }
}
#else
static void run_schedules(Call *c) { (void)c; }
#endif

static void run_step_case(const OpCase *k, Call *ours) {
    Call exact;
    call_create(&exact, cpu, k);
    call_fill(&exact, FILL_NAN, FILL_VALUES);
    same_content(&exact, ours);
    call_run(ours);
    run_schedules(ours);
    call_run(&exact);
    expect_step(ours, &exact);
    call_destroy(&exact);
}

static void run_case(const OpCase *k) {
    Call ours;
    call_create(&ours, gpu, k);
    call_fill(&ours, FILL_NAN, FILL_VALUES);
    if (k->op == OP_loss_sum || k->op == OP_sum_squares || k->op == OP_step_decide) run_step_case(k, &ours);
    else call_run(&ours), run_schedules(&ours), expect_close(&ours);
    call_destroy(&ours);
}

/* Attention with queries and keys that grow with their position, so that a row's maximum is passed again and again on the way through the keys
 * and weights span the whole range; and the saved statistic, a logarithm of a row's sum, which the CPU backend defines as the CUDA backend does. */
static void run_growing(OpId op, size_t D) {
    const OpCase k = {op, {1, 300, 2, D}, "", 0};
    Call ours, exact;
    call_create(&ours, gpu, &k);
    call_create(&exact, cpu, &k);
    call_fill(&ours, FILL_NAN, FILL_VALUES);
    call_fill(&exact, FILL_NAN, FILL_VALUES);
    Bound *qkv = call_find(&ours, "qkv");
    for (size_t i = 0, C = 2 * D; i < qkv->o.n; i++)
        if (i % (3 * C) < 2 * C) put_value(&ours, qkv, qkv->before, i, value_at(&ours, qkv, qkv->before, i) * (1 + 0.02f * (float)(i / (3 * C))));
    same_content(&ours, &ours);
    same_content(&exact, &ours);
    call_run(&ours);
    run_schedules(&ours);
    call_run(&exact);
    expect_close(&ours);
    const Bound *a = call_find(&ours, "saved"), *b = call_find(&exact, "saved");
    for (size_t i = 0; i < b->bytes / sizeof(float); i++) {
        float x = ((const float *)(const void *)a->after)[i], y = ((const float *)(const void *)b->after)[i];
        if (!(fabsf(x - y) <= 1e-5f * (1 + fabsf(y)))) complain("%s: saved[%zu] is %.8g, on the cpu %.8g", ours.title, i, (double)x, (double)y);
    }
    call_destroy(&ours);
    call_destroy(&exact);
}

static void test_growing(void) {
    complaints = 0;
    worst.ratio = 0, worst.where[0] = 0;
    for (size_t D = 64; D <= 128; D *= 2) run_growing(OP_attention_forward, D), run_growing(OP_attention_backward, D);
    printf("%s: worst error %.2f of its bound: %s\n", test_name, worst.ratio, worst.where);
    EXPECT(complaints == 0, "%d complaints", complaints);
}

/* GELU and its slope from nearly nothing to where it is its argument or nothing. */
static void test_large_gelu(void) {
    static const OpCase cases[] = {{OP_gelu_forward, {64}, "", 0}, {OP_linear_backward, {8, 8, 8}, "", 0}};
    complaints = 0;
    worst.ratio = 0, worst.where[0] = 0;
    for (int i = 0; i < 2; i++) {
        Call ours;
        call_create(&ours, gpu, &cases[i]);
        call_fill(&ours, FILL_NAN, FILL_VALUES);
        Bound *pre = call_find(&ours, "pre_gelu"), *inp = i ? call_find(&ours, "inp") : NULL;
        for (size_t k = 0; k < pre->o.n; k++) {
            const float x = ldexpf(k % 2 ? -1 : 1, (int)(k / 2) - 6), y = gelu_value_f(x);
            put_value(&ours, pre, pre->before, k, x);
            if (inp) put_value(&ours, inp, inp->before, k, gpu->elem_bytes == 2 ? bf16_nearest(y) : y);
        }
        same_content(&ours, &ours);
        call_run(&ours);
        expect_close(&ours);
        call_destroy(&ours);
    }
    printf("%s: worst error %.2f of its bound: %s\n", test_name, worst.ratio, worst.where);
    EXPECT(complaints == 0, "%d complaints", complaints);
}

static void test_op(void) {
    int cases = 0;
    complaints = 0;
    worst.ratio = 0, worst.where[0] = 0;
    for (int i = 0; i < N_OP_CASES + N_MORE; i++) {
        const OpCase *k = i < N_OP_CASES ? &op_cases[i] : &more_cases[i - N_OP_CASES];
        if (k->op == op_under_test) run_case(k), cases++;
    }
    if (*worst.where) printf("%s: worst error %.2f of its bound: %s\n", test_name, worst.ratio, worst.where);
    EXPECT(complaints == 0 && cases > 0, "%d complaints in %d cases", complaints, cases);
}

static void run_op(const char *name, OpId op) {
    char title[128];
    op_under_test = op;
    snprintf(title, sizeof title, "%s %s", name, op_names[op]);
    test_run(title, test_op);
}
static void run_growing_scores(const char *name) {
    char title[128];
    snprintf(title, sizeof title, "%s attention of growing scores", name);
    test_run(title, test_growing);
}

static void run_large_gelu(const char *name) {
    char title[128];
    snprintf(title, sizeof title, "%s gelu of large arguments", name);
    test_run(title, test_large_gelu);
}

static bool products_alone;
static bool has_products(int op) { return op == OP_linear_forward || op == OP_linear_backward || op == OP_head_loss; }
/* Attention once more, by the kernels for Hopper or by cuDNN, where the GPU or the build has them: what their figures stand beside must compute the same. */
static void run_attention(const char *which) {
    CudaOptions options = {.dtype = "bf16", .attention = which, .fuse_gelu = true, .graphs = true};
    options.early_launch = !strcmp(DEVICE_NAME, "emu"); /* there a kernel that begins too late is noticed, and on a GPU one thing is tried after the other */
    char title[64];
    Error e = {0};
    snprintf(title, sizeof title, DEVICE_NAME " bf16 %s", which);
    gpu = device_backend_create(&options, &e);
    if (!gpu) { test_skipped++, printf("skipped attention by %s: %s\n", which, e.text); return; }
    run_op(title, OP_attention_forward), run_op(title, OP_attention_backward), run_growing_scores(title);
    gpu->destroy(gpu);
}

static void run_on(const char *name, Backend *device) {
    Error e = {0};
    gpu = device, cpu = cpu_backend_create(&e);
    CHECK(cpu, "%s", e.text);
    for (int op = 0; op < OP_COUNT; op++)
        if (!products_alone || has_products(op)) run_op(name, (OpId)op);
    run_large_gelu(name);
    if (!products_alone) run_growing_scores(name);
    gpu->destroy(gpu);
    cpu->destroy(cpu);
}

/* The emulated kernels in bf16 are launched early: one that touches memory before it has begun finds NaN, or has written what it may not. Other schedules: without. */
static Backend *create(const CudaOptions *o, Error *e) {
    CudaOptions options = *o;
    options.early_launch = !strcmp(DEVICE_NAME, "emu") && !strcmp(o->dtype, "bf16") && !getenv("LLMC_TEST_SCHEDULES");
    return device_backend_create(&options, e);
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    backends_run_device(DEVICE_NAME, create, run_on);
    const char *wanted = getenv("LLMC_TEST_HOPPER"); /* 0: without what is for Hopper alone, and without other libraries' attention */
    if (wanted && !strcmp(wanted, "0")) return test_done();
    Error e = {0};
    cpu = cpu_backend_create(&e);
    CHECK(cpu, "%s", e.text);
    if (!strcmp(DEVICE_NAME, "cuda")) run_attention("cudnn");
    run_attention("hopper"); /* late, since kernels that wait on barriers may wait for ever */
    cpu->destroy(cpu);
    if (strcmp(DEVICE_NAME, "cuda")) return test_done(); /* emulated they pass too, in three minutes; every commit runs test_matmul_hopper */
    Backend *own = device_backend_create(&(CudaOptions){.dtype = "bf16", .attention = "ours", .fuse_gelu = true, .graphs = true, .own_products = OWN_ONLY}, &e);
    products_alone = true; /* our own products for Hopper, wherever they can */
    if (own) run_on(DEVICE_NAME " bf16 own products:", own);
    else test_skipped++, printf("skipped own products: %s\n", e.text);
    return test_done();
}
#else
int main(int argc, char **argv) { return device_main(argc, argv, NULL); }
#endif
