/* The CPU backend's ops against plain loops in double (ref_ops.h): forward and backward, the backward of those loops against
 * central finite differences, bits against the number of threads; the step's decisions, AdamW, memory.
 * Error bound: at most twice that of the same loops in float, plus rounding (DESIGN.md, decision 13). */
#include "llmc/cpu/cpu.h"
#include "llmc/cpu/simd.h"
#include "llmc/base/rng.h"
#include "test.h"
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#define REAL double
#define SUFFIX _d
#define TANH tanh
#define EXP exp
#define LOG log
#define SQRT sqrt
#include "ref_ops.h"
#undef REAL
#undef SUFFIX
#undef TANH
#undef EXP
#undef LOG
#undef SQRT
#define REAL float
#define SUFFIX _f
#define TANH tanhf
#define EXP expf
#define LOG logf
#define SQRT sqrtf
#include "ref_ops.h"

static Backend *backend;
enum { MAX_IN = 4, MAX_OUT = 2 };

/* One op under test: its reference in both types, and ours. ours fills out and din (zeroed, NULL where an op has no such
 * gradient) from in and dout; it runs once planning, once for real. */
typedef struct {
    const char *name;
    int n_in, n_out;
    bool backward;
    float dout;                   /* not 0: all of dout has this value */
    void (*forward_d)(double **, double **, const Shape *);
    void (*backward_d)(double **, double **, double **, const Shape *);
    void (*forward_f)(float **, float **, const Shape *);
    void (*backward_f)(float **, float **, float **, const Shape *);
    void (*sizes)(size_t *in, size_t *out, const Shape *);
    void (*ours)(float **out, float **din, float **dout, float **in, const Shape *);
} Op;

static float *fresh(size_t n) {
    float *p = backend->alloc(backend, MEM_OTHER, "test", n * sizeof *p, NULL);
    CHECK(p, "out of memory");
    for (size_t i = 0; i < n; i++) p[i] = NAN;
    return p;
}
static void drop(void *p) { backend->release(backend, p); }

static void linear_sizes(size_t *in, size_t *out, const Shape *s) {
    in[0] = s->N * s->C, in[1] = s->OC * s->C, in[2] = s->OC;
    out[0] = s->N * s->OC, out[1] = s->gelu_out ? s->N * s->OC : 0;
}
static void linear_ours(float **out, float **din, float **dout, float **in, const Shape *s) {
    float *inp = s->gelu_in ? fresh(s->N * s->C) : in[0];
    if (s->gelu_in) backend->gelu_forward(backend, &(GeluForward){{inp}, {in[0]}, s->N * s->C});
    backend->linear_forward(backend, &(LinearForward){.out = {s->gelu_out ? out[1] : out[0]}, .pre_gelu = {s->gelu_out ? out[0] : NULL},
                            .inp = {inp}, .w = {in[1]}, .b = {in[2]}, .N = s->N, .C = s->C, .OC = s->OC});
    if (!s->gelu_out)
        backend->linear_backward(backend, &(LinearBackward){.dinp = {din[0]}, .dw = {din[1]}, .db = {din[2]}, .dout = {dout[0]},
                                 .inp = {inp}, .w = {in[1]}, .pre_gelu = {s->gelu_in ? in[0] : NULL}, .N = s->N, .C = s->C, .OC = s->OC});
    if (s->gelu_in) drop(inp);
}

static void norm_sizes(size_t *in, size_t *out, const Shape *s) {
    in[0] = in[1] = out[0] = out[1] = s->N * s->C;
    in[2] = in[3] = s->C;
}
static void norm_ours(float **out, float **din, float **dout, float **in, const Shape *s) {
    float *mean = fresh(s->N), *rstd = fresh(s->N);
    backend->add_norm_forward(backend, &(AddNormForward){.out = {out[0]}, .residual = {out[1]}, .mean = {mean}, .rstd = {rstd},
                              .x = {in[0]}, .y = {in[1]}, .gamma = {in[2]}, .beta = {in[3]}, .N = s->N, .C = s->C});
    backend->add_norm_backward(backend, &(AddNormBackward){.dresidual = {din[0]}, .dgamma = {din[2]}, .dbeta = {din[3]},
                               .dout = {dout[0]}, .dthrough = {dout[1]}, .residual = {out[1]}, .mean = {mean}, .rstd = {rstd},
                               .gamma = {in[2]}, .N = s->N, .C = s->C});
    memcpy(din[1], din[0], s->N * s->C * sizeof(float)); /* x and y have the same gradient */
    drop(mean); drop(rstd);
}

static void attention_sizes(size_t *in, size_t *out, const Shape *s) {
    out[0] = s->B * s->T * s->H * s->D;
    in[0] = 3 * out[0];
}
static void attention_ours(float **out, float **din, float **dout, float **in, const Shape *s) {
    float *saved = fresh(backend->attention_saved_bytes(backend, s->B, s->T, s->H, s->D) / sizeof(float));
    backend->attention_forward(backend, &(AttentionForward){{out[0]}, {saved}, {in[0]}, s->B, s->T, s->H, s->D});
    backend->attention_backward(backend, &(AttentionBackward){{din[0]}, {dout[0]}, {out[0]}, {saved}, {in[0]}, s->B, s->T, s->H, s->D});
    drop(saved);
}

/* The sequence a third at once, then row by row. */
static void decode_ours(float **out, float **din, float **dout, float **in, const Shape *s) {
    size_t C = s->H * s->D, T = s->T;
    float *cache = fresh(s->B * T * 2 * C), *qkv = fresh(s->B * T * 3 * C), *rows = fresh(s->B * T * C);
    (void)din, (void)dout;
    for (size_t t = 0, n = T / 3 ? T / 3 : 1; t < T; t += n, n = 1) {
        for (size_t b = 0; b < s->B; b++) memcpy(qkv + b * n * 3 * C, in[0] + (b * T + t) * 3 * C, n * 3 * C * sizeof(float));
        backend->attention_decode(backend, &(AttentionDecode){{rows}, {cache}, {qkv}, s->B, T, s->H, s->D, n, t});
        for (size_t b = 0; b < s->B; b++) memcpy(out[0] + (b * T + t) * C, rows + b * n * C, n * C * sizeof(float));
    }
    drop(cache); drop(qkv); drop(rows);
}

static void head_sizes(size_t *in, size_t *out, const Shape *s) {
    in[0] = s->N * s->C, in[1] = s->V * s->C, out[0] = s->N;
}
static void head_ours(float **out, float **din, float **dout, float **in, const Shape *s) {
    backend->head_loss(backend, &(HeadLoss){{out[0]}, {din[0]}, {din[1]}, {in[0]}, {in[1]}, {s->ids}, s->N, s->C, s->V, s->V,
                                            dout[0][0], s->chunk});
}

static void embed_sizes(size_t *in, size_t *out, const Shape *s) {
    in[0] = s->V * s->C, in[1] = s->T * s->C, out[0] = s->B * s->T * s->C;
}
static void embed_ours(float **out, float **din, float **dout, float **in, const Shape *s) {
    backend->embed_forward(backend, &(EmbedForward){{out[0]}, {s->ids}, {in[0]}, {in[1]}, s->B, s->T, s->C, s->V});
    backend->embed_backward(backend, &(EmbedBackward){{din[0]}, {din[1]}, {dout[0]}, {s->ids}, s->B, s->T, s->C, s->V});
}

#define REFERENCE(fn) .forward_d = fn##_d, .backward_d = fn##_backward_d, .forward_f = fn##_f, .backward_f = fn##_backward_f
static const Op op_linear = {"linear", 3, 1, true, 0, REFERENCE(linear), .sizes = linear_sizes, .ours = linear_ours};
static const Op op_linear_gelu = {"linear, gelu after", 3, 2, false, 0, REFERENCE(linear), .sizes = linear_sizes, .ours = linear_ours};
static const Op op_norm = {"add_norm", 4, 2, true, 0, REFERENCE(add_norm), .sizes = norm_sizes, .ours = norm_ours};
static const Op op_attention = {"attention", 1, 1, true, 0, REFERENCE(attention), .sizes = attention_sizes, .ours = attention_ours};
static const Op op_decode = {"attention_decode", 1, 1, false, 0, REFERENCE(attention), .sizes = attention_sizes, .ours = decode_ours};
static const Op op_head = {"head_loss", 2, 1, true, 0.0625f, REFERENCE(head), .sizes = head_sizes, .ours = head_ours};
static const Op op_embed = {"embed", 2, 1, true, 0, REFERENCE(embed), .sizes = embed_sizes, .ours = embed_ours};

static const struct { const Op *op; Shape s; } cases[] = {
    {&op_linear, {.N = 1, .C = 1, .OC = 1}}, {&op_linear, {.N = 13, .C = 31, .OC = 50}},
    {&op_linear, {.N = 67, .C = 257, .OC = 97}}, {&op_linear, {.N = 3, .C = 1600, .OC = 130}},
    {&op_linear, {.N = 1, .C = 7, .OC = 5, .gelu_in = true}}, {&op_linear, {.N = 61, .C = 134, .OC = 70, .gelu_in = true}},
    {&op_linear_gelu, {.N = 37, .C = 53, .OC = 103, .gelu_out = true}},
    {&op_norm, {.N = 1, .C = 2}}, {&op_norm, {.N = 5, .C = 13}}, {&op_norm, {.N = 67, .C = 134}}, {&op_norm, {.N = 7, .C = 1600}},
    {&op_attention, {.B = 1, .T = 1, .H = 1, .D = 1}}, {&op_attention, {.B = 2, .T = 7, .H = 3, .D = 5}},
    {&op_attention, {.B = 2, .T = 64, .H = 2, .D = 64}}, {&op_attention, {.B = 1, .T = 131, .H = 3, .D = 20}},
    {&op_attention, {.B = 1, .T = 50, .H = 1, .D = 128}},
    {&op_decode, {.B = 1, .T = 1, .H = 1, .D = 1}}, {&op_decode, {.B = 2, .T = 7, .H = 3, .D = 5}}, {&op_decode, {.B = 1, .T = 131, .H = 2, .D = 64}},
    {&op_head, {.N = 1, .C = 1, .V = 2}}, {&op_head, {.N = 13, .C = 31, .V = 50}}, {&op_head, {.N = 13, .C = 31, .V = 50, .chunk = 5}},
    {&op_head, {.N = 67, .C = 70, .V = 514, .chunk = 64}}, {&op_head, {.N = 3, .C = 1600, .V = 97}},
    {&op_embed, {.B = 1, .T = 1, .C = 1, .V = 1}}, {&op_embed, {.B = 3, .T = 7, .C = 13, .V = 5}}, {&op_embed, {.B = 2, .T = 5, .C = 1600, .V = 50}},
};
enum { N_CASES = sizeof cases / sizeof *cases };

/* Everything of one draw of one case. */
typedef struct {
    size_t in_n[MAX_IN], out_n[MAX_OUT];
    float *in[MAX_IN], *dout[MAX_OUT], *out[MAX_OUT], *din[MAX_IN], *out_f[MAX_OUT], *din_f[MAX_IN];
    double *in_d[MAX_IN], *dout_d[MAX_OUT], *out_d[MAX_OUT], *din_d[MAX_IN];
} Draw;

static void draw_make(Draw *w, const Op *op, const Shape *s, uint32_t seed) {
    memset(w, 0, sizeof *w);
    op->sizes(w->in_n, w->out_n, s);
    for (int i = 0; i < op->n_in; i++) {
        size_t n = w->in_n[i];
        w->in[i] = fresh(n), w->din[i] = fresh(n), w->din_f[i] = fresh(n);
        w->in_d[i] = xcalloc(n, sizeof(double)), w->din_d[i] = xcalloc(n, sizeof(double));
        for (size_t j = 0; j < n; j++) w->in_d[i][j] = w->in[i][j] = rng_normal(seed, (uint32_t)i, 0, j);
    }
    for (int i = 0; i < op->n_out; i++) {
        size_t n = w->out_n[i];
        w->out[i] = fresh(n), w->dout[i] = fresh(n), w->out_f[i] = fresh(n);
        w->out_d[i] = xcalloc(n, sizeof(double)), w->dout_d[i] = xcalloc(n, sizeof(double));
        for (size_t j = 0; j < n; j++) w->dout_d[i][j] = w->dout[i][j] = op->dout != 0 ? op->dout : rng_normal(seed, 9 + (uint32_t)i, 0, j);
    }
}

static void draw_free(Draw *w) {
    for (int i = 0; i < MAX_IN; i++) drop(w->in[i]), drop(w->din[i]), drop(w->din_f[i]), free(w->in_d[i]), free(w->din_d[i]);
    for (int i = 0; i < MAX_OUT; i++) drop(w->out[i]), drop(w->dout[i]), drop(w->out_f[i]), free(w->out_d[i]), free(w->dout_d[i]);
}

static void zero_gradients(Draw *w, const Op *op) {
    for (int i = 0; i < op->n_in; i++) memset(w->din[i], 0, w->in_n[i] * sizeof(float));
}

static void run_ours(Draw *w, const Op *op, const Shape *s) {
    Error e = {0};
    backend->plan_begin(backend);
    op->ours(w->out, w->din, w->dout, w->in, s);
    CHECK(backend->plan_end(backend, &e), "%s", e.text);
    zero_gradients(w, op);
    op->ours(w->out, w->din, w->dout, w->in, s);
}

static double objective(const Draw *w, const Op *op) {
    double sum = 0;
    for (int i = 0; i < op->n_out; i++)
        for (size_t j = 0; j < w->out_n[i]; j++) sum += w->out_d[i][j] * w->dout_d[i][j];
    return sum;
}

/* The reference's own backward against central differences of its forward, at some elements of each input. */
static void check_reference(Draw *w, const Op *op, const Shape *s) {
    for (int i = 0; i < op->n_in; i++)
        for (size_t k = 0, n = w->in_n[i]; k < 5 && k < n; k++) {
            const double h = 1e-5;
            size_t j = (k * 7919 + k * k) % n;
            double x = w->in_d[i][j];
            w->in_d[i][j] = x + h;
            op->forward_d(w->out_d, w->in_d, s);
            double above = objective(w, op);
            w->in_d[i][j] = x - h;
            op->forward_d(w->out_d, w->in_d, s);
            double slope = (above - objective(w, op)) / (2 * h);
            w->in_d[i][j] = x;
            EXPECT(fabs(slope - w->din_d[i][j]) <= 1e-6 * (1 + fabs(above)) , "%s: gradient of input %d[%zu]: reference %g, differences %g",
                   op->name, i, j, w->din_d[i][j], slope);
        }
}

typedef struct { double ours, plain, size; } Errors;
static void compare(Errors *e, const float *ours, const float *plain, const double *exact, size_t n) {
    for (size_t j = 0; j < n; j++) {
        double error = fabs((double)ours[j] - exact[j]);
        e->ours = error <= e->ours ? e->ours : error; /* a NaN stays */
        e->plain = fmax(e->plain, fabs((double)plain[j] - exact[j]));
        e->size = fmax(e->size, fabs(exact[j]));
    }
}
static bool within(const Errors *e) { return e->ours <= 2 * e->plain + 0x1p-23 * e->size; }

/* Small cases are drawn several times, so that the plain loop's largest error is no accident. */
static void check_case(const Op *op, const Shape *s) {
    Errors out[MAX_OUT] = {{0}}, din[MAX_IN] = {{0}};
    for (uint32_t seed = 0, done = 0; done < 64; seed++) {
        Draw w;
        draw_make(&w, op, s, seed);
        run_ours(&w, op, s);
        for (int i = 0; i < op->n_in; i++) memset(w.din_f[i], 0, w.in_n[i] * sizeof(float));
        op->forward_f(w.out_f, w.in, s);
        op->backward_f(w.din_f, w.dout, w.in, s);
        op->backward_d(w.din_d, w.dout_d, w.in_d, s);
        if (op->backward && seed == 0) check_reference(&w, op, s);
        op->forward_d(w.out_d, w.in_d, s);
        for (int i = 0; i < op->n_out; i++) compare(&out[i], w.out[i], w.out_f[i], w.out_d[i], w.out_n[i]);
        for (int i = 0; op->backward && i < op->n_in; i++) compare(&din[i], w.din[i], w.din_f[i], w.din_d[i], w.in_n[i]);
        done += (uint32_t)w.out_n[0];
        draw_free(&w);
    }
    for (int i = 0; i < op->n_out; i++)
        EXPECT(within(&out[i]), "%s: output %d: error %g, plain %g", op->name, i, out[i].ours, out[i].plain);
    for (int i = 0; i < op->n_in; i++)
        EXPECT(within(&din[i]), "%s: gradient %d: error %g, plain %g", op->name, i, din[i].ours, din[i].plain);
}

static Shape with_ids(const Op *op, Shape s) {
    size_t n = s.N ? s.N : s.B * s.T;
    s.ids = xmalloc(n * sizeof *s.ids);
    for (size_t i = 0; i < n; i++) s.ids[i] = s.V ? (int32_t)(rng_u32(3, 0, 0, i) % s.V) : 0;
    if (op == &op_head && n > 1) s.ids[1] = -1;
    return s;
}

static void check_all(void) {
    for (int i = 0; i < N_CASES; i++) {
        Shape s = with_ids(cases[i].op, cases[i].s);
        check_case(cases[i].op, &s);
        free(s.ids);
    }
}
TEST(ops_against_double) { cpu_gemm_use_blas(false); check_all(); }
TEST(ops_against_double_openblas) {
    if (!cpu_gemm_use_blas(true)) SKIP("OpenBLAS is not in this build");
    check_all();
    cpu_gemm_use_blas(false);
}

static void set_threads(int n) {
#ifdef _OPENMP
    omp_set_num_threads(n);
#else
    (void)n;
#endif
}

TEST(bits_do_not_depend_on_threads) {
    int before = cpu_threads();
    cpu_gemm_use_blas(false);
    for (int i = 0; i < N_CASES; i++) {
        const Op *op = cases[i].op;
        Shape s = with_ids(op, cases[i].s);
        Draw w[3];
        for (int t = 0; t < 3; t++) {
            set_threads(t + 1);
            draw_make(&w[t], op, &s, 5);
            run_ours(&w[t], op, &s);
        }
        for (int t = 1; t < 3; t++) {
            for (int k = 0; k < op->n_out; k++)
                EXPECT(!memcmp(w[0].out[k], w[t].out[k], w[0].out_n[k] * sizeof(float)), "%s case %d: output %d", op->name, i, k);
            for (int k = 0; k < op->n_in; k++)
                EXPECT(!memcmp(w[0].din[k], w[t].din[k], w[0].in_n[k] * sizeof(float)), "%s case %d: gradient %d", op->name, i, k);
        }
        for (int t = 0; t < 3; t++) draw_free(&w[t]);
        free(s.ids);
    }
    set_threads(before);
}

TEST(chunks_of_the_head_keep_losses_and_dx) {
    Shape s = with_ids(&op_head, (Shape){.N = 67, .C = 70, .V = 514});
    Draw w[2];
    for (int t = 0; t < 2; t++) {
        s.chunk = t ? 10 : 0;
        draw_make(&w[t], &op_head, &s, 1);
        run_ours(&w[t], &op_head, &s);
    }
    EXPECT(!memcmp(w[0].out[0], w[1].out[0], w[0].out_n[0] * sizeof(float)), "losses");
    EXPECT(!memcmp(w[0].din[0], w[1].din[0], w[0].in_n[0] * sizeof(float)), "dx");
    for (int t = 0; t < 2; t++) draw_free(&w[t]);
    free(s.ids);
}

TEST(gelu_epilogue_equals_gelu_forward) {
    for (size_t n = 1; n < 300; n += 37) {
        Shape s = {.N = 3, .C = 5, .OC = n, .gelu_out = true};
        Draw w;
        draw_make(&w, &op_linear_gelu, &s, 2);
        run_ours(&w, &op_linear_gelu, &s);
        float *again = fresh(3 * n);
        backend->gelu_forward(backend, &(GeluForward){{again}, {w.out[0]}, 3 * n});
        EXPECT(!memcmp(again, w.out[1], 3 * n * sizeof(float)), "OC %zu", n);
        drop(again);
        draw_free(&w);
    }
}

TEST(exp_and_gelu_against_libm) {
    double worst = 0, worst_gelu = 0;
    for (double x = -86.9; x < 88; x += 0.0007) {
        float in = (float)x, out[VW];
        vf_store(out, vf_exp(vf_set(in)));
        double error = fabs((double)out[VW - 1] / exp((double)in) - 1);
        worst = error <= worst ? worst : error;
    }
    for (double x = -6; x < 6; x += 0.0001) {
        float in = (float)x, out;
        cpu_gelu(&out, &in, 1);
        double error = fabs((double)out - gelu_value_d((double)in)) / fmax(fabs((double)in), 1e-30);
        worst_gelu = error <= worst_gelu ? worst_gelu : error;
    }
    printf("largest relative error of exp %.3g, of gelu(x) relative to x %.3g\n", worst, worst_gelu);
    EXPECT(worst < 2e-7, "%g", worst);
    EXPECT(worst_gelu < 3e-7, "%g", worst_gelu);
    float special[4] = {NAN, INFINITY, 40, -1000}, out[4];
    cpu_gelu(out, special, 4);
    EXPECT(isnan(out[0]) && isinf(out[1]) && out[2] == 40 && fabsf(out[3]) < 1e-30f, "%g %g %g %g", out[0], out[1], out[2], out[3]);
}

TEST(nan_is_not_swallowed) {
    const Op *ops[] = {&op_linear, &op_norm, &op_attention, &op_head};
    const Shape shapes[] = {{.N = 5, .C = 40, .OC = 9}, {.N = 5, .C = 40}, {.B = 1, .T = 20, .H = 1, .D = 8}, {.N = 5, .C = 8, .V = 50}};
    for (int i = 0; i < 4; i++) {
        Shape s = with_ids(ops[i], shapes[i]);
        Draw w;
        draw_make(&w, ops[i], &s, 1);
        w.in[0][w.in_n[0] - 1] = NAN; /* the last element: in the last row, and in attention a v */
        run_ours(&w, ops[i], &s);
        EXPECT(isnan(w.out[0][w.out_n[0] - 1]), "%s forward", ops[i]->name);
        bool any = false;
        for (int k = 0; k < ops[i]->n_in; k++)
            for (size_t j = 0; j < w.in_n[k]; j++) any |= isnan(w.din[k][j]) != 0;
        EXPECT(any, "%s backward", ops[i]->name);
        draw_free(&w);
        free(s.ids);
    }
}

TEST(sums_of_a_step) {
    for (size_t n = 1; n < 200000; n = n * 7 + 4) {
        float *x = fresh(n);
        StepState s = {.loss_sum = 1, .sum_squares = 2};
        double sum = 1;
        long double squares = 2;
        for (size_t i = 0; i < n; i++) {
            x[i] = rng_normal(1, 0, 0, i);
            sum += (double)x[i];
            squares += (long double)x[i] * (long double)x[i];
        }
        backend->plan_begin(backend);
        backend->sum_squares(backend, &(SumSquares){{&s}, {x}, n});
        EXPECT(backend->plan_end(backend, NULL));
        backend->sum_squares(backend, &(SumSquares){{&s}, {x}, n});
        backend->loss_sum(backend, &(LossSum){{&s}, {x}, n});
        EXPECT(fabsl((long double)s.sum_squares - squares) <= 1e-14L * squares && s.loss_sum == sum, "n %zu: %.17g %.17Lg", n,
               s.sum_squares, squares);
        drop(x);
    }
}

TEST(decisions) {
    const double inf = INFINITY;
    const struct { double loss_sum, squares; float clip, loss_limit, norm_limit; int skip; float scale; } rows[] = {
        {8, 4, 0, INFINITY, INFINITY, SKIP_NONE, 1}, {8, 4, 1, INFINITY, INFINITY, SKIP_NONE, 0.5f},
        {8, 4, 2, INFINITY, INFINITY, SKIP_NONE, 1}, {8, 4, 0, 1.9f, INFINITY, SKIP_LOSS, 1},
        {8, 4, 0, 1.9f, 1.9f, SKIP_LOSS, 1}, {8, 4, 0, 2, 1.9f, SKIP_NORM, 1}, {8, 4, 1, 2, 1.9f, SKIP_NORM, 0.5f},
        {NAN, 4, 1, 2, 1.9f, SKIP_NONFINITE, 1}, {8, NAN, 1, 1, 1, SKIP_NONFINITE, 1}, {inf, 4, 0, 1, 1, SKIP_NONFINITE, 1},
        {-inf, 4, 0, 1, 1, SKIP_NONFINITE, 1}, {8, inf, 0, 1, 1, SKIP_NONFINITE, 1}, {1e300, 4, 0, INFINITY, INFINITY, SKIP_NONFINITE, 1}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        StepState s = {.grad_clip = rows[i].clip, .loss_limit = rows[i].loss_limit, .norm_limit = rows[i].norm_limit, .loss_rows = 4,
                       .loss_sum = rows[i].loss_sum, .sum_squares = rows[i].squares, .updates = 6, .skip = 77};
        backend->step_decide(backend, &(StepDecide){{&s}});
        EXPECT(s.skip == rows[i].skip && s.grad_scale == rows[i].scale && s.updates == (s.skip ? 6 : 7), "row %zu: skip %d, scale %g, updates %d",
               i, s.skip, s.grad_scale, (int)s.updates);
    }
}

/* Ten updates in double beside ours; elements outside the segments, and a skipped step, change nothing. */
TEST(adamw_against_double) {
    enum { N = 70000 };
    const AdamWSegment segments[] = {{5, 13, 1}, {64, 1, 0}, {100, 69000, 1}};
    float *w = fresh(N), *m = fresh(N), *v = fresh(N), *g = fresh(N), *params = fresh(N), *before = fresh(N);
    double *wd = xcalloc(N, 8), *md = xcalloc(N, 8), *vd_ = xcalloc(N, 8);
    for (size_t i = 0; i < N; i++) wd[i] = w[i] = before[i] = rng_normal(1, 0, 0, i), m[i] = v[i] = 0, params[i] = -7;
    StepState s = {.lr = 1e-2f, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .weight_decay = 0.1f, .grad_scale = 0.25f};
    for (int t = 1; t <= 10; t++) {
        for (size_t i = 0; i < N; i++) g[i] = rng_normal(2, (uint32_t)t, 0, i);
        s.updates = t;
        s.skip = 0;
        AdamW a = {{t % 2 ? params : w}, {w}, {m}, {v}, {g}, {&s}, segments, 3, N, 0};
        backend->adamw(backend, &a);
        s.skip = SKIP_NORM, s.updates = 0;
        backend->adamw(backend, &a);
        for (size_t k = 0; k < 3; k++)
            for (size_t i = segments[k].first; i < segments[k].first + segments[k].n; i++) {
                double b1 = (double)s.beta1, b2 = (double)s.beta2, d = (double)g[i] * 0.25;
                md[i] = b1 * md[i] + (1 - b1) * d;
                vd_[i] = b2 * vd_[i] + (1 - b2) * d * d;
                wd[i] -= (double)s.lr * (md[i] / (1 - pow(b1, t)) / (sqrt(vd_[i] / (1 - pow(b2, t))) + (double)s.eps) +
                                         (segments[k].decay ? (double)s.weight_decay * wd[i] : 0));
            }
        for (size_t i = 0; t % 2 && i < N; i++) EXPECT(params[i] == (md[i] != 0 ? w[i] : -7), "params[%zu]", i);
    }
    double worst = 0;
    for (size_t i = 0; i < N; i++) {
        double error = fabs((double)w[i] - wd[i]) / (1 + fabs(wd[i]));
        worst = error <= worst ? worst : error;
        if (md[i] == 0) EXPECT(w[i] == before[i] && m[i] == 0 && v[i] == 0, "element %zu is in no segment", i);
    }
    EXPECT(worst < 1e-6, "%g after ten updates of 1e-2", worst);
    drop(w); drop(m); drop(v); drop(g); drop(params); drop(before);
    free(wd); free(md); free(vd_);
}

TEST(memory) {
    Error e = {0};
    size_t before = backend->memory[MEM_OPTIMIZER];
    for (size_t bytes = 1; bytes < (size_t)1 << 24; bytes = bytes * 5 + 3) {
        unsigned char *p = backend->alloc(backend, MEM_OPTIMIZER, "moments", bytes, &e);
        EXPECT(p && (uintptr_t)p % 256 == 0 && backend->memory[MEM_OPTIMIZER] == before + bytes, "%zu bytes", bytes);
        for (size_t i = 0; p && i < bytes; i++) if (p[i]) { EXPECT(!p[i], "byte %zu of %zu", i, bytes); break; }
        drop(p);
    }
    EXPECT(backend->memory[MEM_OPTIMIZER] == before && backend->memory_peak[MEM_OPTIMIZER] > before);
    EXPECT(!backend->alloc(backend, MEM_WEIGHTS, "weights", SIZE_MAX / 2, &e) && e.code == EXIT_DATA);
    EXPECT(strstr(e.text, "weights") && strstr(e.text, "activations"), "%s", e.text);
}

/* Runs fn in a child, whose abort is what we want to see. */
static bool aborts(void (*fn)(void)) {
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        if (!freopen("/dev/null", "w", stderr)) _exit(1);
        fn();
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    return WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
}
static void bad_token(void) {
    float x[4] = {0};
    int32_t id = 2;
    backend->embed_forward(backend, &(EmbedForward){{x}, {&id}, {x}, {x}, 1, 1, 2, 2});
}
static void zero_size(void) {
    float x[4] = {0};
    backend->gelu_forward(backend, &(GeluForward){{x}, {x}, 0});
}
static void no_operand(void) {
    float x[4] = {0};
    backend->gelu_forward(backend, &(GeluForward){{x}, {NULL}, 4});
}
static void no_plan(void) {
    Backend *b = cpu_backend_create(NULL);
    float x[4] = {0};
    b->linear_forward(b, &(LinearForward){.out = {x}, .inp = {x + 1}, .w = {x + 2}, .b = {x + 3}, .N = 1, .C = 1, .OC = 1});
}
TEST(broken_invariants_abort) {
    EXPECT(aborts(bad_token) && aborts(zero_size) && aborts(no_operand) && aborts(no_plan));
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    backend = cpu_backend_create(NULL);
    RUN(broken_invariants_abort);
    RUN(ops_against_double);
    RUN(ops_against_double_openblas);
    RUN(bits_do_not_depend_on_threads);
    RUN(chunks_of_the_head_keep_losses_and_dx);
    RUN(gelu_epilogue_equals_gelu_forward);
    RUN(exp_and_gelu_against_libm);
    RUN(nan_is_not_swallowed);
    RUN(sums_of_a_step);
    RUN(decisions);
    RUN(adamw_against_double);
    RUN(memory);
    backend->destroy(backend);
    return test_done();
}
