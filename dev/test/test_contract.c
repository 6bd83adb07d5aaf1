/* The contract of ops.h, enforced on every op of every backend here from one case list (op_cases.h): what `=` and `+=` promise, inputs and
 * neighbouring memory left alone, optional operands, permitted aliasing, the same bits twice, fused equals composed.
 * What an op computes is the business of other tests. The last tests run the checks on backends that break one promise each. */
#include "backends.h"
#include "op_cases.h"

static Backend *backend;

static bool is_output(const Bound *bound) { return bound->o.p && bound->o.mode != MODE_IN && bound->o.kind != KIND_SAVED; }

/* Same bits in operand x of call a and operand y of another. */
static void expect_same(const Call *a, const Bound *x, const Bound *y, const char *when) {
    size_t each = x->bytes / x->o.n;
    for (size_t i = 0; i < x->o.n; i++) {
        if (!is_covered(a, x, i) || !memcmp(x->after + i * each, y->after + i * each, each)) continue;
        complain("%s, %s: %s[%zu] differs", a->title, when, x->o.name, i);
        return;
    }
}

/* Same bits in all outputs that both calls have. */
static void expect_same_outputs(const Call *a, const Call *b, const char *when) {
    for (int i = 0; i < a->n; i++)
        if (is_output(&a->bound[i]) && b->bound[i].o.p) expect_same(a, &a->bound[i], &b->bound[i], when);
}

static void expect_no_nan(const Call *c) {
    for (int k = 0; k < c->n; k++) {
        const Bound *bound = &c->bound[k];
        for (size_t i = 0; is_output(bound) && bound->o.kind != KIND_STEP && i < bound->o.n; i++) {
            bool nan = isnan(value_at(c, bound, bound->after, i));
            if (is_covered(c, bound, i) ? !nan : nan == !!isnan(value_at(c, bound, bound->before, i))) continue;
            complain("%s: %s[%zu] is %s", c->title, bound->o.name, i, nan ? "NaN" : "written outside the segments");
            break;
        }
    }
}

/* ---- the checks: each takes one case and complains ----------------------------------------------------------------- */

/* `=`: whatever the output held before, NaN included, the result is the same bits. */
static void check_overwrites(Backend *b, const OpCase *k) {
    Call zero, nan;
    call_create(&zero, b, k);
    call_create(&nan, b, k);
    call_fill(&zero, FILL_ZERO, FILL_VALUES);
    call_fill(&nan, FILL_NAN, FILL_VALUES);
    call_run(&zero);
    call_run(&nan);
    expect_no_nan(&nan);
    expect_same_outputs(&zero, &nan, "prefilled with NaN instead of 0");
    call_destroy(&zero);
    call_destroy(&nan);
}

/* The rows of dw that pad the vocabulary gain nothing. */
static void check_padding(Backend *b, const OpCase *k) {
    if (k->op != OP_head_loss || *k->absent) return;
    Call c;
    call_create(&c, b, k);
    call_fill(&c, FILL_NAN, FILL_VALUES);
    call_run(&c);
    const Bound *dw = call_find(&c, "dw");
    for (size_t i = k->sizes[2] * k->sizes[1]; i < dw->o.n; i++) {
        float was = value_at(&c, dw, dw->before, i), is = value_at(&c, dw, dw->after, i);
        if (is == was) continue;
        complain("%s: dw[%zu], of the padding, was %.9g and is %.9g", c.title, i, (double)was, (double)is);
        break;
    }
    call_destroy(&c);
}

/* Rounding of a sum over `rows` terms and the old content, relative to the largest value in sight. */
static double rounding(const Call *c, double largest) {
    OpSize sizes[OP_MAX_SIZES];
    int n = op_sizes(c->op, &c->args, sizes);
    double rows = 4;
    for (int i = 0; i < n; i++)
        if (strchr("NBT", sizes[i].name[0])) rows += (double)sizes[i].value;
    return rows * 0x1p-24 * largest;
}

static void check_added(const Call *c, const Bound *bound, const float *first, double times) {
    double largest = 1;
    for (size_t i = 0; i < bound->o.n; i++) largest = fmax(largest, fabs((double)first[i]));
    for (size_t i = 0; i < bound->o.n; i++) {
        double want = (double)value_at(c, bound, bound->before, i) + times * (double)first[i], found = value_at(c, bound, bound->after, i);
        if (fabs(found - want) <= rounding(c, 2 * largest)) continue;
        complain("%s: %s[%zu] is %.9g where += gives %.9g", c->title, bound->o.name, i, found, want);
        return;
    }
}

/* `+=` on gradients: from zero, once more, and from other values. */
static void check_accumulates(Backend *b, const OpCase *k) {
    Call zero, values;
    call_create(&zero, b, k);
    call_create(&values, b, k);
    call_fill(&zero, FILL_ZERO, FILL_ZERO);
    call_fill(&values, FILL_ZERO, FILL_VALUES);
    call_run(&zero);
    call_run(&values);
    float *first[OP_MAX_OPERANDS] = {0};
    for (int i = 0; i < zero.n; i++)
        if (is_output(&zero.bound[i]) && zero.bound[i].o.kind == KIND_GRAD) {
            first[i] = memcpy(xmalloc(zero.bound[i].bytes), zero.bound[i].after, zero.bound[i].bytes);
            check_added(&values, &values.bound[i], first[i], 1);
        }
    call_run(&zero);
    for (int i = 0; i < zero.n; i++) {
        if (first[i]) check_added(&zero, &zero.bound[i], first[i], 2);
        free(first[i]);
    }
    call_destroy(&zero);
    call_destroy(&values);
}

/* `+=` on the step's sums: each call adds the same, and no other field changes. */
static void check_step_sums(Backend *b, const OpCase *k) {
    if (k->op != OP_loss_sum && k->op != OP_sum_squares) return;
    Call c;
    call_create(&c, b, k);
    call_fill(&c, FILL_ZERO, FILL_ZERO);
    Bound *step = call_find(&c, "step");
    StepState s[3];
    memcpy(&s[0], step->before, sizeof *s);
    for (int i = 1; i < 3; i++) {
        call_run(&c);
        memcpy(&s[i], step->after, sizeof *s);
    }
    double *sum[3];
    for (int i = 0; i < 3; i++) sum[i] = k->op == OP_loss_sum ? &s[i].loss_sum : &s[i].sum_squares;
    double once = *sum[1] - *sum[0], twice = *sum[2] - *sum[0];
    if (once == 0 || fabs(twice - 2 * once) > 1e-14 * (fabs(once) + *sum[0])) complain("%s adds %.17g, then %.17g", c.title, once, twice - once);
    *sum[1] = *sum[2] = *sum[0];
    if (memcmp(&s[1], &s[0], sizeof *s) || memcmp(&s[2], &s[0], sizeof *s)) complain("%s changes another field of the step", c.title);
    call_destroy(&c);
}

/* The same call twice gives the same bits. */
static void check_repeats(Backend *b, const OpCase *k) {
    Call once, again;
    call_create(&once, b, k);
    call_create(&again, b, k);
    call_fill(&once, FILL_ZERO, FILL_VALUES);
    call_run(&once);
    call_fill(&again, FILL_ZERO, FILL_VALUES);
    call_run(&again);
    expect_same_outputs(&once, &again, "run again");
    call_destroy(&once);
    call_destroy(&again);
}

/* Permitted aliasing gives the bits of separate buffers. */
static const struct { OpId op; const char *buffer, *also; } aliases[] = {
    {OP_add_norm_forward, "x", "residual"},
    {OP_add_norm_backward, "dthrough", "dresidual"},
    {OP_adamw, "master", "params"},
    {OP_cast_params, "in", "out"},
};

static void check_aliasing(Backend *b, const OpCase *k) {
    for (size_t i = 0; i < sizeof aliases / sizeof *aliases; i++) {
        if (aliases[i].op != k->op) continue;
        Call apart, shared;
        call_create(&apart, b, k);
        call_create(&shared, b, k);
        Bound *buffer = call_find(&shared, aliases[i].buffer), *also = call_find(&shared, aliases[i].also);
        bool possible = buffer->block && also->block && buffer->bytes == also->bytes; /* not where one is float32 and the other bf16 */
        if (possible) {
            call_alias(&shared, aliases[i].buffer, aliases[i].also);
            call_fill(&apart, FILL_ZERO, FILL_VALUES);
            call_fill(&shared, FILL_ZERO, FILL_VALUES);
            call_run(&apart);
            call_run(&shared);
            expect_same_outputs(&apart, &shared, "with two operands in one buffer");
        }
        call_destroy(&apart);
        call_destroy(&shared);
    }
}

/* Leaving out an optional operand changes no other output; leaving out an input counts as zero. */
static const struct { OpId op; const char *absent, *zeroed; } optionals[] = {
    {OP_add_norm_forward, " y ", "y"},
    {OP_add_norm_forward, " y residual ", "y"},
    {OP_attention_forward, " saved ", NULL},
    {OP_head_loss, " dx dw ", NULL},
    {OP_linear_backward, " dinp ", NULL},
    {OP_add_norm_backward, " dthrough ", "dthrough"},
};

static void check_optional(Backend *b, const OpCase *k) {
    for (size_t i = 0; i < sizeof optionals / sizeof *optionals; i++) {
        if (optionals[i].op != k->op || *k->absent) continue;
        OpCase less = *k;
        less.absent = optionals[i].absent;
        Call all, without;
        call_create(&all, b, k);
        call_create(&without, b, &less);
        call_fill(&all, FILL_ZERO, FILL_VALUES);
        call_fill(&without, FILL_ZERO, FILL_VALUES);
        if (optionals[i].zeroed) {
            Bound *zeroed = call_find(&all, optionals[i].zeroed);
            memset(zeroed->before, 0, zeroed->bytes);
            upload_bound(&all, zeroed);
        }
        call_run(&all);
        call_run(&without);
        expect_same_outputs(&without, &all, "against the call with all operands");
        call_destroy(&all);
        call_destroy(&without);
    }
}

/* ---- fused equals composed ---------------------------------------------------------------------------------------- */

static OpCase case_of(OpId op, const size_t *sizes, const char *absent) {
    OpCase k = {.op = op, .absent = absent};
    memcpy(k.sizes, sizes, sizeof k.sizes);
    return k;
}

/* Gives an input of one call the content of an operand of another. */
static void copy_content(Call *to, const char *name, const Bound *content) {
    Bound *bound = call_find(to, name);
    CHECK(bound->bytes == content->bytes, "%s: %zu bytes, %zu bytes", name, bound->bytes, content->bytes);
    memcpy(bound->before, content->after, bound->bytes);
    upload_bound(to, bound);
}

/* Unit of rounding of the compute type, relative (bf16: half a unit in the last place; fp32: a whole one). */
static double epsilon(const Backend *b) { return b->elem_bytes == 2 ? 0x1p-8 : 0x1p-23; }

/* What a sum of C products of values below 1 may differ by in float32 when another kernel adds it up in another order: a random walk of C
 * roundings, of partial sums that are themselves a random walk. */
static double order_error(size_t C) { return 4 * sqrt((double)C) * 0x1p-24 * sqrt((double)C); }

/* Where a fused epilogue takes GELU of the unrounded sum, under a plan of its own: pre_gelu to a rounding, out to that of its argument
 * (the slope of GELU is below 1.13) and its own, twice. */
static void expect_near_gelu(const Call *fused, const Call *plain, const Call *gelu) {
    const Bound *pre = call_find((Call *)fused, "pre_gelu"), *out = call_find((Call *)fused, "out");
    const Bound *plain_out = call_find((Call *)plain, "out"), *gelu_out = call_find((Call *)gelu, "out");
    double eps = epsilon(fused->b), order = order_error(fused->args.linear_forward.C);
    for (size_t i = 0; i < out->o.n; i++) {
        double x = value_at(plain, plain_out, plain_out->after, i), y = value_at(gelu, gelu_out, gelu_out->after, i);
        double dx = fabs(value_at(fused, pre, pre->after, i) - x), dy = fabs(value_at(fused, out, out->after, i) - y);
        if (dx <= 2 * eps * fabs(x) + 2 * order && dy <= 1.13 * eps * fabs(x) + 2 * eps * fabs(y) + 2 * order) continue;
        complain("%s: element %zu: pre_gelu %.9g differs by %.3g, out %.9g by %.3g", fused->title, i, x, dx, y, dy);
        return;
    }
}

/* linear with GELU = linear, then gelu: bit for bit where the backend says so (gelu_rounds_first). */
static void check_linear_gelu(Backend *b, const OpCase *k) {
    if (k->op != OP_linear_forward || *k->absent) return;
    OpCase plain_case = case_of(k->op, k->sizes, " pre_gelu "), gelu_case = {.op = OP_gelu_forward, .sizes = {k->sizes[0] * k->sizes[2]}, .absent = ""};
    Call fused, plain, gelu;
    call_create(&fused, b, k);
    call_create(&plain, b, &plain_case);
    call_create(&gelu, b, &gelu_case);
    call_fill(&fused, FILL_NAN, FILL_ZERO);
    call_fill(&plain, FILL_NAN, FILL_ZERO);
    call_fill(&gelu, FILL_NAN, FILL_ZERO);
    call_run(&fused);
    call_run(&plain);
    copy_content(&gelu, "pre_gelu", call_find(&plain, "out"));
    call_run(&gelu);
    if (b->gelu_rounds_first) {
        expect_same(&fused, call_find(&fused, "pre_gelu"), call_find(&plain, "out"), "against linear without GELU");
        expect_same(&fused, call_find(&fused, "out"), call_find(&gelu, "out"), "against linear, then gelu");
    } else expect_near_gelu(&fused, &plain, &gelu);
    call_destroy(&fused);
    call_destroy(&plain);
    call_destroy(&gelu);
}

/* add_norm(x, y) = add_norm(x + y), bit for bit, with x + y rounded to the compute type. */
static void check_add_then_norm(Backend *b, const OpCase *k) {
    if (k->op != OP_add_norm_forward || *k->absent) return;
    OpCase single_case = case_of(k->op, k->sizes, " y ");
    Call fused, single;
    call_create(&fused, b, k);
    call_create(&single, b, &single_case);
    call_fill(&fused, FILL_NAN, FILL_ZERO);
    call_fill(&single, FILL_NAN, FILL_ZERO);
    call_run(&fused);
    const Bound *x = call_find(&fused, "x"), *y = call_find(&fused, "y"), *residual = call_find(&fused, "residual");
    for (size_t i = 0; i < x->o.n; i++) {
        float sum = value_at(&fused, x, x->before, i) + value_at(&fused, y, y->before, i), found = value_at(&fused, residual, residual->after, i);
        if (!(fabsf(found - sum) <= (b->elem_bytes == 2 ? 0x1p-8f * fabsf(sum) : 0))) complain("%s: residual[%zu] %g, x + y %g", fused.title, i, found, sum);
    }
    copy_content(&single, "x", residual);
    call_run(&single);
    expect_same_outputs(&single, &fused, "against add_norm of the sum");
    call_destroy(&fused);
    call_destroy(&single);
}

/* linear_backward with pre_gelu: dinp = (dinp without) * gelu'(pre_gelu); dw and db the same bits. Allowed for dinp: a rounding of each of
 * the two results, two for the slope; in bf16, where a library may have a plan of its own for the fused product, another order of summation. */
static void check_linear_backward_gelu(Backend *b, const OpCase *k) {
    if (k->op != OP_linear_backward || *k->absent) return;
    OpCase plain_case = case_of(k->op, k->sizes, " pre_gelu ");
    Call fused, plain;
    call_create(&fused, b, k);
    call_create(&plain, b, &plain_case);
    call_fill(&fused, FILL_NAN, FILL_VALUES);
    call_fill(&plain, FILL_NAN, FILL_VALUES);
    call_run(&fused);
    copy_content(&plain, "inp", call_find(&fused, "inp"));
    call_run(&plain);
    expect_same(&fused, call_find(&fused, "dw"), call_find(&plain, "dw"), "against no pre_gelu");
    expect_same(&fused, call_find(&fused, "db"), call_find(&plain, "db"), "against no pre_gelu");
    const Bound *pre = call_find(&fused, "pre_gelu"), *dinp = call_find(&fused, "dinp"), *before = call_find(&plain, "dinp");
    for (size_t i = 0; i < dinp->o.n; i++) {
        double x = value_at(&fused, pre, pre->before, i), t = tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x));
        double slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * sqrt(2 / M_PI) * (1 + 3 * 0.044715 * x * x);
        double factor = value_at(&plain, before, before->after, i), found = value_at(&fused, dinp, dinp->after, i);
        double order = b->elem_bytes == 2 ? 2 * order_error(k->sizes[2]) : 0;
        if (fabs(found - slope * factor) <= 4 * epsilon(b) * fabs(factor) + order) continue;
        complain("%s: dinp[%zu] %.9g, composed %.9g", fused.title, i, found, slope * factor);
        break;
    }
    call_destroy(&fused);
    call_destroy(&plain);
}

/* One row of the head: its loss, and dlogits in place of the logits. */
static double head_row(double *logits, size_t V, int32_t target, double scale) {
    double largest = -INFINITY, sum = 0;
    for (size_t v = 0; v < V; v++) largest = fmax(largest, logits[v]);
    for (size_t v = 0; v < V; v++) sum += exp(logits[v] - largest);
    double loss = target < 0 ? 0 : largest + log(sum) - logits[target];
    for (size_t v = 0; v < V; v++)
        logits[v] = target < 0 ? 0 : (exp(logits[v] - largest) / sum - (v == (size_t)target)) * scale;
    return loss;
}

static void expect_near(const Call *c, const Bound *bound, const double *want, double tolerance) {
    for (size_t i = 0; i < bound->o.n; i++) {
        double found = value_at(c, bound, bound->after, i);
        if (fabs(found - want[i]) <= tolerance) continue;
        complain("%s: %s[%zu] %.9g, composed %.9g, tolerance %.2g", c->title, bound->o.name, i, found, want[i], tolerance);
        return;
    }
}

/* Bits of the first elements of another call's operand. */
static void copy_prefix(Call *to, const char *name, const Bound *content) {
    Bound *bound = call_find(to, name);
    CHECK(bound->bytes <= content->bytes, "%s: %zu bytes, %zu bytes", name, bound->bytes, content->bytes);
    memcpy(bound->before, content->after, bound->bytes);
    upload_bound(to, bound);
}

/* head_loss = head_logits, softmax and two products, these in double. Logits are sums of C products of values below 1; a bf16 backend keeps
 * them, and then dlogits, in bf16, which rounds each once. Each gradient is a sum whose terms' absolute values add up to at most 2 scale
 * (dx), to the number of rows times scale (dw). */
static void check_head(Backend *b, const OpCase *k) {
    if (k->op != OP_head_loss || *k->absent) return;
    OpCase logits_case = {.op = OP_head_logits, .sizes = {k->sizes[0], k->sizes[1], k->sizes[2]}, .absent = ""};
    Call head, logits;
    call_create(&head, b, k);
    call_create(&logits, b, &logits_case);
    call_fill(&head, FILL_NAN, FILL_ZERO);
    call_fill(&logits, FILL_NAN, FILL_ZERO);
    call_run(&head);
    copy_content(&logits, "x", call_find(&head, "x"));
    copy_prefix(&logits, "w", call_find(&head, "w"));
    call_run(&logits);
    const size_t N = k->sizes[0], C = k->sizes[1], V = k->sizes[2], Vp = k->sizes[3];
    const Bound *x = call_find(&head, "x"), *w = call_find(&head, "w"), *row_logits = call_find(&logits, "logits");
    const int32_t *targets = (const int32_t *)(const void *)call_find(&head, "targets")->before;
    const double scale = head.args.head_loss.scale;
    double *losses = xcalloc(N, sizeof(double)), *dx = xcalloc(N * C, sizeof(double)), *dw = xcalloc(Vp * C, sizeof(double));
    double largest = 0, *dlogits = xcalloc(V, sizeof(double));
    for (size_t n = 0; n < N; n++) {
        for (size_t v = 0; v < V; v++) {
            dlogits[v] = value_at(&logits, row_logits, row_logits->after, n * V + v);
            largest = fmax(largest, fabs(dlogits[v]));
        }
        losses[n] = head_row(dlogits, V, targets[n], scale);
        for (size_t v = 0; v < V; v++)
            for (size_t c = 0; c < C; c++) {
                dx[n * C + c] += dlogits[v] * value_at(&head, w, w->before, v * C + c);
                dw[v * C + c] += dlogits[v] * value_at(&head, x, x->before, n * C + c);
            }
    }
    double eps = epsilon(b), logit_error = 0x1p-23 * sqrt((double)C) * 4 + (b->elem_bytes == 2 ? eps * largest : 0); /* a random walk of C roundings */
    expect_near(&head, call_find(&head, "losses"), losses, 2 * logit_error + 8 * 0x1p-23); /* float32 in any case */
    expect_near(&head, call_find(&head, "dx"), dx, scale * (2 * logit_error + 8 * eps));
    expect_near(&head, call_find(&head, "dw"), dw, scale * (double)N * (2 * logit_error + 8 * eps));
    free(losses), free(dx), free(dw), free(dlogits);
    call_destroy(&head);
    call_destroy(&logits);
}

/* attention_decode on a cache = attention_forward of the whole sequence, for the rows that are new. The cache's rows beyond the new ones
 * are NaN and stay so; earlier ones keep their bits; new ones are k and v of qkv, bit for bit. Both sum in float32: the scores have D
 * products, and what they are off by goes into the weights; a bf16 backend may round the weights, and rounds both outputs (values below 1). */
static void check_decode(Backend *b, const OpCase *k) {
    if (k->op != OP_attention_decode) return;
    const size_t B = k->sizes[0], T = k->sizes[1], H = k->sizes[2], D = k->sizes[3], n = k->sizes[4], position = k->sizes[5], C = H * D, all = position + n;
    const OpCase whole_case = {.op = OP_attention_forward, .sizes = {B, all, H, D}, .absent = " saved "};
    const size_t elem = b->elem_bytes;
    Call decode, whole;
    call_create(&decode, b, k);
    call_create(&whole, b, &whole_case);
    call_fill(&decode, FILL_NAN, FILL_NAN);
    call_fill(&whole, FILL_NAN, FILL_ZERO);
    call_run(&whole);
    Bound *cache = call_find(&decode, "cache"), *qkv = call_find(&decode, "qkv"), *out = call_find(&decode, "out");
    const Bound *sequence = call_find(&whole, "qkv"), *want = call_find(&whole, "out");
    char *final = memcpy(xmalloc(cache->bytes), cache->before, cache->bytes);
    for (size_t i = 0; i < B * all; i++) {
        size_t t = i % all, row = (i / all * T + t) * 2 * C * elem;
        memcpy(final + row, sequence->before + (i * 3 * C + C) * elem, 2 * C * elem);
        if (t < position) memcpy(cache->before + row, final + row, 2 * C * elem);
        else memcpy(qkv->before + (i / all * n + t - position) * 3 * C * elem, sequence->before + i * 3 * C * elem, 3 * C * elem);
    }
    upload_bound(&decode, cache);
    upload_bound(&decode, qkv);
    call_run(&decode);
    if (memcmp(final, cache->after, cache->bytes)) complain("%s: the cache is not what it was with the new rows in it", decode.title);
    double tolerance = 0x1p-23 * (4 + 4 * sqrt((double)D)) + (elem == 2 ? 3 * 0x1p-8 : 0);
    for (size_t i = 0; i < B * n * C; i++) {
        size_t at = (i / (n * C) * all + position) * C + i % (n * C);
        double found = value_at(&decode, out, out->after, i), expected = value_at(&whole, want, want->after, at);
        if (fabs(found - expected) <= tolerance) continue;
        complain("%s: out[%zu] %.9g, attention_forward %.9g, tolerance %.2g", decode.title, i, found, expected, tolerance);
        break;
    }
    free(final);
    call_destroy(&decode);
    call_destroy(&whole);
}

/* ---- rounding of parameters ---------------------------------------------------------------------------------------- */

static uint16_t bf16_nearest(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

/* cast_params of the new master weights gives adamw's params, in either rounding; to nearest that is the nearest; stochastically it is one
 * of the two neighbours, and each is taken about as often as it should: the errors add up to nearly nothing. */
static void check_rounding(Backend *b, const OpCase *k) {
    if (k->op != OP_adamw) return;
    const OpCase cast_case = {.op = OP_cast_params, .sizes = {k->sizes[0]}, .absent = ""};
    for (int rounding = ROUND_NEAREST; rounding <= ROUND_STOCHASTIC; rounding++) {
        Call adamw, cast;
        call_create(&adamw, b, k);
        call_create(&cast, b, &cast_case);
        call_fill(&adamw, FILL_NAN, FILL_VALUES);
        call_fill(&cast, FILL_NAN, FILL_ZERO);
        Bound *step = call_find(&adamw, "step"), *params = call_find(&adamw, "params"), *master = call_find(&adamw, "master");
        StepState *s = (StepState *)(void *)step->before;
        s->rounding = rounding;
        upload_bound(&adamw, step);
        call_run(&adamw);
        copy_content(&cast, "in", master);
        cast.args.cast_params.rounding = rounding;
        cast.args.cast_params.seed = s->seed;
        cast.args.cast_params.updates = s->updates;
        call_run(&cast);
        expect_same(&adamw, params, call_find(&cast, "out"), rounding ? "against cast_params, stochastic" : "against cast_params");
        double sum = 0, largest = 0, n = 0;
        for (size_t i = 0; i < master->o.n && b->elem_bytes == 2; i++) {
            if (!is_covered(&adamw, params, i)) continue;
            float exact = value_at(&adamw, master, master->after, i), found = value_at(&adamw, params, params->after, i);
            double ulp = exact == 0 ? 0 : ldexp(1, ilogb((double)exact) - 7);
            bool fine = rounding ? fabs((double)found - (double)exact) < ulp || found == exact : found == bf16_to_float(bf16_nearest(exact));
            if (!fine) complain("%s: params[%zu] %.9g, master %.9g", adamw.title, i, (double)found, (double)exact);
            if (ulp > 0) sum += ((double)found - (double)exact) / ulp, n++, largest = fmax(largest, fabs((double)found - (double)exact) / ulp);
        }
        /* errors in units of the last place lie in (-1, 1) with variance at most 1/4: six standard deviations of their mean */
        if (n > 1000 && fabs(sum / n) > 6 * 0.5 / sqrt(n)) complain("%s: rounded by %g units on average", adamw.title, sum / n);
        if (n > 1000 && rounding && largest < 0.6) complain("%s: stochastic rounding goes to the nearest", adamw.title);
        call_destroy(&adamw);
        call_destroy(&cast);
    }
}

/* ---- memory: room, posts -------------------------------------------------------------------------------------------- */

TEST(posts_arrive_in_their_slots) {
    Error e = {0};
    char *memory = backend->alloc(backend, MEM_OTHER, "posts", 2 * POST_BYTES, &e), host[2 * POST_BYTES], back[POST_BYTES];
    EXPECT(memory, "%s", e.text);
    for (int i = 0; i < 2 * POST_BYTES; i++) host[i] = (char)rng_u32(1, 0, 0, (uint64_t)i);
    backend->upload(backend, memory, host, sizeof host);
    backend->post(backend, 0, memory, POST_BYTES);
    backend->post(backend, 1, memory + POST_BYTES, 24);
    backend->fill_zero(backend, memory, sizeof host); /* issued later: what was posted is what was there */
    backend->collect(backend, 1, back, 24);
    EXPECT(!memcmp(back, host + POST_BYTES, 24), "slot 1");
    backend->collect(backend, 0, back, POST_BYTES);
    EXPECT(!memcmp(back, host, POST_BYTES), "slot 0");
    backend->upload(backend, memory, host + POST_BYTES, POST_BYTES);
    backend->post(backend, 0, memory, POST_BYTES);
    backend->collect(backend, 0, back, POST_BYTES);
    EXPECT(!memcmp(back, host + POST_BYTES, POST_BYTES), "slot 0, used again");
    backend->release(backend, memory);
}

TEST(copies_beside_the_ops) {
    Error e = {0};
    enum { N = 3000 };
    char *memory = backend->alloc(backend, MEM_OTHER, "copies", 2 * N, &e), host[2 * N], back[2 * N];
    Staging *s = backend->staging_create(backend, "copies", N, &e);
    EXPECT(memory && s && s->bytes == N, "%s", e.text);
    for (int i = 0; i < 2 * N; i++) host[i] = (char)rng_u32(1, 0, 0, (uint64_t)i);
    for (int round = 0; round < 2; round++) {
        backend->upload(backend, memory, host, sizeof host);
        backend->fetch(backend, s, 5, memory + 1, N - 5);
        backend->fill_zero(backend, memory + N, N); /* issued later, elsewhere */
        backend->fetch_wait(backend, s);
        EXPECT(!memcmp(s->host + 5, host + 1, N - 5), "round %d: what was there came", round);
        for (int i = 0; i < N; i++) s->host[i] = (char)(host[i] + 1 + round);
        backend->bring(backend, memory, s, 7, N - 7);
        backend->fetch(backend, s, 0, memory, N - 7); /* behind what was brought */
        backend->fetch_wait(backend, s);
        for (int i = 7; i < N && !test_errors; i++) EXPECT(s->host[i - 7] == (char)(host[i] + 1 + round), "round %d: %d back again", round, i);
        backend->download(backend, back, memory, sizeof back);
        EXPECT(back[0] == (char)(host[7] + 1 + round) && back[N - 8] == (char)(host[N - 1] + 1 + round) && back[N - 7] == host[N - 7], "round %d: the ends", round);
        for (int i = N; i < 2 * N && !test_errors; i++) EXPECT(!back[i], "round %d: filled with zeros", round);
    }
    backend->fetch(backend, s, 0, memory, N);
    backend->staging_destroy(backend, s);
    backend->staging_destroy(backend, NULL);
    backend->release(backend, memory);
}

static uint16_t rounded_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
static float widened(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Gradients that travel in bf16: what is sent and what is summed, to the bit; rows of any length at any place, and nothing beside them. */
TEST(gradients_rounded_and_summed_beside_the_ops) {
    if (!backend->side_begin) return;
    enum { PARTS = 5, OWN = 2, STRIDE = 4200, ROOM = PARTS * STRIDE };
    const size_t lengths[] = {4096, 8, 1, 4095, 2056}, firsts[] = {0, 8, 3};
    float *data = xcalloc(ROOM, sizeof *data), *back = xcalloc(ROOM, sizeof *back);
    uint16_t *halves = xcalloc(ROOM, sizeof *halves);
    Error e = {0};
    float *on_device = backend->alloc(backend, MEM_OTHER, "gradients", ROOM * sizeof *data, &e);
    uint16_t *room = backend->alloc(backend, MEM_OTHER, "halves", ROOM * sizeof *halves, &e);
    CHECK(on_device && room, "%s", e.text);
    for (size_t i = 0; i < ROOM; i++) data[i] = ldexpf((float)rng_u32(3, 0, 0, i) - 2147483648.0f, (int)(i % 40) - 50);
    data[7] = -0.0f, data[STRIDE + 5] = INFINITY, data[9] = 1.00390625f, data[10] = 1.01171875f; /* ties */
    for (size_t k = 0; k < sizeof lengths / sizeof *lengths; k++)
        for (size_t f = 0; f < 3; f++) {
            size_t n = lengths[k], first = firsts[f];
            backend->upload(backend, on_device, data, ROOM * sizeof *data);
            memset(halves, 0x55, ROOM * sizeof *halves);
            backend->upload(backend, room, halves, ROOM * sizeof *halves);
            backend->side_begin(backend);
            backend->side_round(backend, room, on_device + first, PARTS, STRIDE, n, OWN);
            backend->side_end(backend, 0);
            backend->side_wait(backend, 0);
            backend->download(backend, halves, room, ROOM * sizeof *halves);
            for (size_t i = 0; i < ROOM && !test_errors; i++) {
                size_t row = i / n;
                uint16_t expected = row < PARTS && row != OWN ? rounded_bits(data[row * STRIDE + first + i % n]) : 0x5555;
                EXPECT(halves[i] == expected, "rows of %zu from %zu: %zu is %04x, expected %04x", n, first, i, halves[i], expected);
            }
            backend->side_begin(backend);
            backend->side_sum(backend, on_device + first, room, PARTS, OWN, n);
            backend->side_end(backend, 1);
            backend->side_wait(backend, 1);
            backend->download(backend, back, on_device, ROOM * sizeof *back);
            for (size_t i = 0; i < ROOM && !test_errors; i++) {
                float sum = -0.0f;
                for (size_t r = 0; r < PARTS && i >= first && i < first + n; r++) sum += widened(r == OWN ? rounded_bits(data[i]) : halves[r * n + i - first]);
                if (i < first || i >= first + n) sum = data[i];
                EXPECT(!memcmp(&sum, &back[i], sizeof sum), "rows of %zu from %zu: sum %zu is %.9g, expected %.9g", n, first, i, (double)back[i], (double)sum);
            }
        }
    EXPECT(backend->side_waited(backend) >= 0, "waited %g seconds", backend->side_waited(backend));
    backend->release(backend, room), backend->release(backend, on_device);
    free(data), free(back), free(halves);
}

TEST(room_is_what_alloc_could_give) {
    Error e = {0};
    size_t bytes = (size_t)64 << 20, before = backend->room(backend);
    void *p = backend->alloc(backend, MEM_OTHER, "some of the room", bytes, &e);
    EXPECT(p && before >= bytes && backend->room(backend) <= before - bytes, "room %zu, then %zu", before, backend->room(backend));
    backend->release(backend, p);
    EXPECT(!backend->alloc(backend, MEM_OTHER, "more than the room", backend->room(backend) + ((size_t)1 << 36), &e) && e.code == EXIT_DATA, "%s", e.text);
    EXPECT(strstr(e.text, "more than the room"), "the message does not name what did not fit: %s", e.text);
}

/* A stretch that is recorded, replayed, and forgotten gives what its ops give, whether the backend records or declines. */
TEST(replay_gives_what_the_ops_give) {
    enum { N = 1000 };
    Error e = {0};
    float one[N], found[N];
    float *step = backend->alloc(backend, MEM_OTHER, "losses", sizeof one, &e);
    StepState *state = backend->alloc(backend, MEM_OTHER, "state", sizeof *state, &e), s = {0};
    for (int i = 0; i < N; i++) one[i] = 1;
    LossSum sum = {.step = {state}, .losses = {step}, .n = N};
    backend->plan_begin(backend);
    backend->loss_sum(backend, &sum);
    EXPECT(backend->plan_end(backend, &e), "%s", e.text);
    int issued = 0;
    for (int i = 0; i < 6; i++) {
        if (i == 4) backend->release(backend, backend->alloc(backend, MEM_OTHER, "released", 1000, &e)); /* forgets */
        backend->upload(backend, step, one, sizeof one);
        if (backend->replay(backend, 7)) continue;
        issued++;
        backend->loss_sum(backend, &sum);
        backend->fill_zero(backend, step, sizeof one);
        backend->record_end(backend, 7);
    }
    backend->download(backend, &s, state, sizeof s);
    backend->download(backend, found, step, sizeof found);
    EXPECT(s.loss_sum == 6.0 * N && found[N - 1] == 0 && (issued == 6 || issued >= 2), "%g after six times, %d issued", s.loss_sum, issued);
    backend->release(backend, step);
    backend->release(backend, state);
}

/* ---- the tests ------------------------------------------------------------------------------------------------------ */

static void for_all_cases(void (*check)(Backend *, const OpCase *)) {
    complaints = 0;
    for (int i = 0; i < N_OP_CASES; i++) check(backend, &op_cases[i]);
    EXPECT(complaints == 0, "%d complaints", complaints);
}

TEST(outputs_are_overwritten) { for_all_cases(check_overwrites); }
TEST(gradients_accumulate) { for_all_cases(check_accumulates); }
TEST(step_sums_accumulate) { for_all_cases(check_step_sums); }
TEST(same_call_same_bits) { for_all_cases(check_repeats); }
TEST(permitted_aliasing) { for_all_cases(check_aliasing); }
TEST(optional_operands) { for_all_cases(check_optional); }
TEST(linear_gelu_is_linear_then_gelu) { for_all_cases(check_linear_gelu); }
TEST(add_norm_is_add_then_norm) { for_all_cases(check_add_then_norm); }
TEST(linear_backward_gelu_is_composed) { for_all_cases(check_linear_backward_gelu); }
TEST(head_is_logits_softmax_products) { for_all_cases(check_head); }
TEST(padding_of_the_vocabulary_gains_nothing) { for_all_cases(check_padding); }
TEST(decode_is_attention_of_the_whole) { for_all_cases(check_decode); }
TEST(cast_rounds_as_adamw) { for_all_cases(check_rounding); }

/* ---- tests of the tests: a backend that breaks one promise in one operand of one op must be noticed ------------------ */

static const struct {
    Damage damage;
    const char *name;
    void (*check)(Backend *, const OpCase *);
} promises[] = {
    {DAMAGE_UNWRITTEN, "unwritten element", check_overwrites},
    {DAMAGE_NAN, "NaN", check_overwrites},
    {DAMAGE_NOT_ADDED, "= for +=", check_accumulates},
    {DAMAGE_BEYOND, "write beyond the end", check_repeats},
    {DAMAGE_BEFORE, "write before the begin", check_repeats},
    {DAMAGE_ELEMENT, "changed input", check_repeats},
    {DAMAGE_JITTER, "different bits each time", check_repeats},
    {DAMAGE_ELEMENT, "changed padding", check_padding},
    {DAMAGE_ELEMENT, "changed row of a cache", check_decode},
};

/* Whether the promise says anything about the operand. */
static bool concerns(size_t promise, const OpCase *k, const Operand *o) {
    if (promises[promise].check == check_padding) return k->op == OP_head_loss && !*k->absent && !strcmp(o->name, "dw") && k->sizes[3] > k->sizes[2];
    if (promises[promise].check == check_decode) /* behind the new rows are NaNs, which +1 does not change */
        return k->op == OP_attention_decode && (o->mode == MODE_OUT || (o->mode == MODE_ADD && k->sizes[4] + k->sizes[5] == k->sizes[1]));
    switch (promises[promise].damage) {
    case DAMAGE_UNWRITTEN: return o->mode == MODE_OUT && o->kind != KIND_SAVED;
    case DAMAGE_NAN: return o->mode != MODE_IN && o->kind != KIND_SAVED && o->kind != KIND_STEP;
    case DAMAGE_NOT_ADDED: return o->mode == MODE_ADD && o->kind == KIND_GRAD;
    case DAMAGE_ELEMENT: return o->mode == MODE_IN;
    case DAMAGE_JITTER: return o->mode != MODE_IN && o->kind != KIND_SAVED;
    case DAMAGE_BEYOND: case DAMAGE_BEFORE: return true;
    }
    return false;
}

TEST(broken_promises_are_noticed) {
    int tried = 0;
    if (!strcmp(backend->name, "emu")) SKIP("it tests the tests, which the CPU backend has done");
    complain_quietly = true;
    for (size_t p = 0; p < sizeof promises / sizeof *promises; p++)
        for (int i = 0; i < N_OP_CASES; i++) {
            const OpCase *k = &op_cases[i];
            Operand operands[OP_MAX_OPERANDS];
            int n = case_operands(backend, k, operands);
            if (!is_small(operands, n)) continue;
            for (int o = 0; o < n; o++) {
                if (!concerns(p, k, &operands[o]) || is_absent(k, &operands[o])) continue;
                Backend *broken = broken_create(backend, promises[p].damage, k->op, o);
                complaints = 0;
                promises[p].check(broken, k);
                tried++;
                EXPECT(complaints > 0, "%s in %s.%s (case %d) is not noticed", promises[p].name, op_names[k->op], operands[o].name, i);
                broken->destroy(broken);
            }
        }
    complain_quietly = false;
    EXPECT(tried > 300, "only %d", tried);
}

/* ---- every backend here -------------------------------------------------------------------------------------------- */
#define RUN_ON(name) (snprintf(title, sizeof title, "%s, %s", which, #name), test_run(title, test_##name))

static void run_all(const char *which, Backend *b) {
    char title[128];
    backend = b;
    RUN_ON(outputs_are_overwritten);
    RUN_ON(gradients_accumulate);
    RUN_ON(step_sums_accumulate);
    RUN_ON(same_call_same_bits);
    RUN_ON(permitted_aliasing);
    RUN_ON(optional_operands);
    RUN_ON(linear_gelu_is_linear_then_gelu);
    RUN_ON(add_norm_is_add_then_norm);
    RUN_ON(linear_backward_gelu_is_composed);
    RUN_ON(head_is_logits_softmax_products);
    RUN_ON(padding_of_the_vocabulary_gains_nothing);
    RUN_ON(decode_is_attention_of_the_whole);
    RUN_ON(cast_rounds_as_adamw);
    RUN_ON(posts_arrive_in_their_slots);
    RUN_ON(copies_beside_the_ops);
    RUN_ON(gradients_rounded_and_summed_beside_the_ops);
    RUN_ON(room_is_what_alloc_could_give);
    RUN_ON(replay_gives_what_the_ops_give);
    RUN_ON(broken_promises_are_noticed);
    b->destroy(b);
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    backends_run_all(run_all);
    return test_done();
}
