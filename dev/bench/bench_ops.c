/* Time of each op of the CPU backend at the shapes of real steps: GPT-2 124M with B 4, T 64, and the quick start's model.
 * The percentage is of what this machine reached in the same run: copy bandwidth for bytes, a large product for FLOPs. */
#include "llmc/base/timer.h"
#include "llmc/cpu/cpu.h"
#include <stdlib.h>
#include <string.h>

enum { PARAMS = 124475904 };
static const AdamWSegment all_params[] = {{0, PARAMS, 1}};

/* A row: the op, its sizes (operands are allocated from them), how often one optimizer step of that model calls it, and an
 * optional operand to leave out. */
typedef struct {
    const char *model;
    const char *what;
    OpId op;
    const void *args;
    int calls;
    const char *without;
} Row;
#define ARGS(Type, ...) &(const Type){__VA_ARGS__}
#define LINEAR(model, what, n, c, oc, calls, gelu_after, gelu_before)                                                  \
    {model, what, OP_linear_forward, ARGS(LinearForward, .N = n, .C = c, .OC = oc), calls, gelu_after ? "" : "pre_gelu"}, \
    {model, what, OP_linear_backward, ARGS(LinearBackward, .N = n, .C = c, .OC = oc), calls, gelu_before ? "" : "pre_gelu"}
#define MODEL(model, B_, T_, C_, H_, V_, L_)                                                                           \
    {model, "", OP_embed_forward, ARGS(EmbedForward, .B = B_, .T = T_, .C = C_, .V = V_), 1, ""},                      \
    {model, "", OP_add_norm_forward, ARGS(AddNormForward, .N = B_ * T_, .C = C_), 2 * L_ + 1, ""},                     \
    LINEAR(model, "qkv", B_ * T_, C_, 3 * C_, L_, 0, 0), LINEAR(model, "attproj", B_ * T_, C_, C_, L_, 0, 0),          \
    LINEAR(model, "fc", B_ * T_, C_, 4 * C_, L_, 1, 0), LINEAR(model, "fcproj", B_ * T_, 4 * C_, C_, L_, 0, 1),        \
    {model, "", OP_attention_forward, ARGS(AttentionForward, .B = B_, .T = T_, .H = H_, .D = C_ / H_), L_, ""},        \
    {model, "", OP_attention_backward, ARGS(AttentionBackward, .B = B_, .T = T_, .H = H_, .D = C_ / H_), L_, ""},      \
    {model, "", OP_head_loss, ARGS(HeadLoss, .N = B_ * T_, .C = C_, .V = V_, .Vp = (V_ + 127) / 128 * 128, .scale = 1.0f / (B_ * T_)), 1, ""},       \
    {model, "", OP_add_norm_backward, ARGS(AddNormBackward, .N = B_ * T_, .C = C_), 2 * L_ + 1, ""},                   \
    {model, "", OP_embed_backward, ARGS(EmbedBackward, .B = B_, .T = T_, .C = C_, .V = V_), 1, ""}

static const Row rows[] = {
    MODEL("124M", 4, 64, 768, 12, 50257, 12),
    {"124M", "", OP_sum_squares, ARGS(SumSquares, .n = PARAMS), 1, ""},
    {"124M", "", OP_adamw, ARGS(AdamW, .n = PARAMS, .segments = all_params, .n_segments = 1), 1, ""},
    {"124M", "generate", OP_head_logits, ARGS(HeadLogits, .N = 1, .C = 768, .V = 50257), 0, ""},
    {"124M", "recompute", OP_gelu_forward, ARGS(GeluForward, .n = 4 * 64 * 3072), 0, ""},
    MODEL("small", 16, 128, 192, 6, 2048, 4),
};
enum { ROWS = sizeof rows / sizeof *rows, MOST = 400 };

/* --cpu-time: of this thread, so that other programs on a busy machine do not count; with one thread only. */
static bool cpu_time;
static double now(void) {
    struct timespec t;
    if (!cpu_time) return seconds_now();
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

typedef struct { double median, least, most; int runs; } Timing;

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Runs until half a second has gone, at least three times; one run before that warms caches and pages. */
static Timing time_runs(void (*run)(void *), void *context) {
    double t[MOST], begin = 0;
    int n = 0;
    run(context);
    for (begin = now(); n < MOST && (n < 3 || now() - begin < 0.5); n++) {
        double at = now();
        run(context);
        t[n] = now() - at;
    }
    qsort(t, (size_t)n, sizeof *t, by_value);
    return (Timing){t[n / 2], t[0], t[n - 1], n};
}

static void *make(Backend *b, size_t bytes, bool numbers) {
    Error e = {0};
    float *p = b->alloc(b, MEM_OTHER, "bench", bytes, &e);
    if (!p) exit(error_print(&e));
    for (size_t i = 0; numbers && i < bytes / sizeof *p; i++) p[i] = 0.01f * (float)(i % 13 + 1);
    return p;
}

/* ---- ceilings ---- */
static char *copy_to, *copy_from;
enum { COPY = 256 << 20 };
static void copy_all(void *unused) {
    (void)unused;
    const size_t block = 1 << 20;
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < COPY; i += block) memcpy(copy_to + i, copy_from + i, block);
}
typedef struct { Gemm g; void *scratch; } Product;
static void product(void *context) {
    Product *p = context;
    cpu_gemm(&p->g, p->scratch);
}

static double copy_ceiling(Backend *b) {
    copy_to = make(b, COPY, false), copy_from = make(b, COPY, true);
    Timing t = time_runs(copy_all, NULL);
    b->release(b, copy_to), b->release(b, copy_from);
    return 2.0 * COPY / t.least;
}
static double product_ceiling(Backend *b) {
    enum { S = 2048 };
    float *x = make(b, S * S * 4, true), *y = make(b, S * S * 4, true), *z = make(b, S * S * 4, false);
    Product p = {{.c = z, .c_row = S, .a = x, .a_row = S, .a_col = 1, .b = y, .b_row = S, .b_col = 1, .M = S, .N = S, .K = S},
                 make(b, cpu_gemm_scratch_bytes(), false)};
    Timing t = time_runs(product, &p);
    b->release(b, x), b->release(b, y), b->release(b, z), b->release(b, p.scratch);
    return 2.0 * S * S * S / t.least;
}

/* ---- ops ---- */
typedef struct { Backend *b; OpId op; void *args; } Call;
static void run_call(void *context) {
    Call *c = context;
    op_run(c->b, c->op, c->args);
}

static void make_operands(Backend *b, const Row *row, void *args, void *made[OP_MAX_OPERANDS], int *n_made) {
    Operand o[OP_MAX_OPERANDS];
    int n = op_operands(b, row->op, args, o);
    *n_made = 0;
    for (int i = 0; i < n; i++) {
        if (!strcmp(o[i].name, row->without)) continue;
        bool numbers = o[i].kind != KIND_TOKENS && o[i].kind != KIND_STEP;
        void *p = make(b, operand_bytes(b, &o[i]), numbers);
        if (o[i].kind == KIND_STEP)
            *(StepState *)p = (StepState){.lr = 1e-4f, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .grad_scale = 1, .updates = 1};
        memcpy((char *)args + o[i].field, &p, sizeof p);
        made[(*n_made)++] = p;
    }
}

static double bench_row(Backend *b, const Row *row, double bandwidth, double flops_rate, bool json, bool first) {
    void *args = xmalloc(op_args_bytes[row->op]), *made[OP_MAX_OPERANDS];
    int n_made;
    Error e = {0};
    memcpy(args, row->args, op_args_bytes[row->op]);
    make_operands(b, row, args, made, &n_made);
    b->plan_begin(b);
    op_run(b, row->op, args);
    if (!b->plan_end(b, &e)) exit(error_print(&e));
    Call call = {b, row->op, args};
    Timing t = time_runs(run_call, &call);
    double bytes = op_bytes(b, row->op, args), flops = op_flops(row->op, args);
    double floor = bytes / bandwidth > flops / flops_rate ? bytes / bandwidth : flops / flops_rate;
    if (json)
        printf("%s\n  {\"model\": \"%s\", \"op\": \"%s\", \"what\": \"%s\", \"calls\": %d, \"median_s\": %.6g, \"min_s\": %.6g, "
               "\"max_s\": %.6g, \"runs\": %d, \"bytes\": %.6g, \"flops\": %.6g, \"percent_of_ceiling\": %.3g}", first ? "" : ",",
               row->model, op_names[row->op], row->what, row->calls, t.median, t.least, t.most, t.runs, bytes, flops, 100 * floor / t.least);
    else
        printf("%-6s %-19s %-9s %9.3f %9.3f %9.3f %7.1f %8.1f %5.0f%% %5d\n", row->model, op_names[row->op], row->what, 1e3 * t.median,
               1e3 * t.least, 1e3 * t.most, 1e-9 * bytes / t.least, 1e-9 * flops / t.least, 100 * floor / t.least, row->calls);
    fflush(stdout);
    for (int i = 0; i < n_made; i++) b->release(b, made[i]);
    free(args);
    return row->calls * t.median;
}

static int usage(const char *program) {
    fprintf(stderr, "usage: %s [--op NAME] [--model 124M|small] [--product own|openblas] [--cpu-time] [--json]\n", program);
    return EXIT_USAGE;
}

int main(int argc, char **argv) {
    const char *op = NULL, *model = NULL;
    bool json = false, blas = cpu_gemm_uses_blas();
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--json")) json = true;
        else if (!strcmp(argv[i], "--cpu-time")) cpu_time = true;
        else if (i + 1 < argc && !strcmp(argv[i], "--op")) op = argv[++i];
        else if (i + 1 < argc && !strcmp(argv[i], "--model")) model = argv[++i];
        else if (i + 1 < argc && !strcmp(argv[i], "--product")) blas = !strcmp(argv[++i], "openblas");
        else return usage(argv[0]);
    }
    if (cpu_time && cpu_threads() != 1) {
        fprintf(stderr, "error: --cpu-time with %d threads; set OMP_NUM_THREADS=1\n", cpu_threads());
        return EXIT_USAGE;
    }
    Backend *b = cpu_backend_create(NULL);
    if (!cpu_gemm_use_blas(blas)) {
        fprintf(stderr, "error: OpenBLAS is not in this build\n");
        return EXIT_USAGE;
    }
    double bandwidth = copy_ceiling(b), rate = product_ceiling(b), step[2] = {0};
    int shown = 0;
    if (json) printf("{\"threads\": %d, \"product\": \"%s\", \"copy_bytes_per_s\": %.4g, \"product_flops_per_s\": %.4g, \"rows\": [",
                     cpu_threads(), blas ? "openblas" : "own", bandwidth, rate);
    else printf("%d threads, product %s; ceilings: copy %.1f GB/s, product 2048^3 %.1f GFLOP/s\n%-6s %-19s %-9s %9s %9s %9s %7s %8s %6s %5s\n",
                cpu_threads(), blas ? "openblas" : "own", 1e-9 * bandwidth, 1e-9 * rate, "model", "op", "", "median ms", "min", "max",
                "GB/s", "GFLOP/s", "of max", "calls");
    for (int i = 0; i < ROWS; i++)
        if ((!op || !strcmp(op, op_names[rows[i].op])) && (!model || !strcmp(model, rows[i].model)))
            step[!strcmp(rows[i].model, "small")] += bench_row(b, &rows[i], bandwidth, rate, json, shown++ == 0);
    if (json) printf("\n]}\n");
    else if (!op)
        for (int k = 0; k < 2; k++)
            if (step[k] > 0)
                printf("%s: the ops of one step take %.1f ms, %.0f tok/s\n", k ? "small" : "124M", 1e3 * step[k], (k ? 16 * 128 : 256) / step[k]);
    b->destroy(b);
    if (!shown) {
        fprintf(stderr, "error: no row has --op %s --model %s\n", op ? op : "(any)", model ? model : "(any)");
        return EXIT_USAGE;
    }
    return 0;
}
