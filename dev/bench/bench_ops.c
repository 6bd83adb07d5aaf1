/* Time of each op at the shapes of real steps, on any backend: median of many and spread, bytes and FLOPs, percent of what this device reached in
 * the same run (a large copy, a large product); attention also by the library, and with --hopper by the kernels for
 * Hopper, where there are such.
 *   bench_ops [--device cpu|cuda|emu] [--dtype bf16|fp32] [--shape NAME]... [--batch B] [--op NAME] [--product own|openblas] [--plan-file FILE]
 *             [--hopper] [--own-products] [--print-plans] [--seconds S] [--json FILE] [--list]
 * bench_ops --device cuda --shape 124M --own-products --print-plans: our products beside the library's, a line a shape, each one's best time.
 * On a GPU the times are between events around each call, all calls issued at once, over operand sets that rotate past the L2. */
#include "../../llmc/base/timer.h"
#include "../../llmc/cpu/cpu.h"
#include "../../llmc/gpt2.h"
#include "device.h"
#include <getopt.h>
#include <stdlib.h>
#include <string.h>

/* ---- shapes and rows ---------------------------------------------------------------------------------------------------------------- */

typedef struct { const char *name, *device; size_t B, T, C, H, V, L; } Shape;
static const Shape shapes[] = {
    {"124M", "cuda", 64, 1024, 768, 12, 50257, 12},  {"1558M", "cuda", 16, 1024, 1600, 25, 50257, 48}, {"124M-short", "cpu", 4, 64, 768, 12, 50257, 12},
    {"small", "cpu", 16, 128, 192, 6, 2048, 4},      {"tiny", "emu", 2, 24, 64, 2, 130, 2},
};
enum { SHAPES = sizeof shapes / sizeof *shapes, MAX_ROWS = 40, MAX_SETS = 16, MOST = 400 };

typedef union {
#define MEMBER(name, Args) Args name;
    LLMC_OPS(MEMBER)
#undef MEMBER
} AnyArgs;

/* A row: the op with its sizes (operands are allocated from them), what it is in the model, how often one optimizer step calls it, and an
 * optional operand to leave out. */
typedef struct {
    OpId op;
    const char *what;
    size_t calls;
    const char *without;
    AnyArgs args;
} Row;

static int add_linear(Row *rows, int n, const char *what, size_t N, size_t C, size_t OC, size_t calls, bool gelu_after, bool gelu_before) {
    rows[n++] = (Row){OP_linear_forward, what, calls, gelu_after ? "" : "pre_gelu", {.linear_forward = {.N = N, .C = C, .OC = OC}}};
    rows[n++] = (Row){OP_linear_backward, what, calls, gelu_before ? "" : "pre_gelu", {.linear_backward = {.N = N, .C = C, .OC = OC}}};
    return n;
}

static int make_rows(Row rows[MAX_ROWS], const Shape *s, const ParamLayout *layout) {
    size_t B = s->B, T = s->T, N = B * T, C = s->C, H = s->H, D = C / H, V = s->V, L = s->L, Vp = (V + 127) / 128 * 128;
    int n = 0;
    rows[n++] = (Row){OP_embed_forward, "", 1, "", {.embed_forward = {.B = B, .T = T, .C = C, .V = V}}};
    rows[n++] = (Row){OP_add_norm_forward, "", 2 * L + 1, "", {.add_norm_forward = {.N = N, .C = C}}};
    n = add_linear(rows, n, "qkv", N, C, 3 * C, L, false, false);
    n = add_linear(rows, n, "attproj", N, C, C, L, false, false);
    n = add_linear(rows, n, "fc", N, C, 4 * C, L, true, false);
    n = add_linear(rows, n, "fcproj", N, 4 * C, C, L, false, true);
    rows[n++] = (Row){OP_attention_forward, "", L, "", {.attention_forward = {.B = B, .T = T, .H = H, .D = D}}};
    rows[n++] = (Row){OP_attention_backward, "", L, "", {.attention_backward = {.B = B, .T = T, .H = H, .D = D}}};
    rows[n++] = (Row){OP_head_loss, "", 1, "", {.head_loss = {.N = N, .C = C, .V = V, .Vp = Vp, .scale = 1.0f / (float)N}}};
    rows[n++] = (Row){OP_add_norm_backward, "", 2 * L + 1, "", {.add_norm_backward = {.N = N, .C = C}}};
    rows[n++] = (Row){OP_embed_backward, "", 1, "", {.embed_backward = {.B = B, .T = T, .C = C, .V = V}}};
    rows[n++] = (Row){OP_loss_sum, "", 1, "", {.loss_sum = {.n = N}}};
    rows[n++] = (Row){OP_sum_squares, "", 1, "", {.sum_squares = {.n = layout->n_elements}}};
    rows[n++] = (Row){OP_adamw, "", 1, "", {.adamw = {.n = layout->n_elements, .segments = layout->segments, .n_segments = layout->n_segments}}};
    rows[n++] = (Row){OP_gelu_forward, "recompute", 0, "", {.gelu_forward = {.n = 4 * N * C}}};
    rows[n++] = (Row){OP_cast_params, "start", 0, "", {.cast_params = {.n = layout->n_elements}}};
    rows[n++] = (Row){OP_attention_decode, "generate", 0, "", {.attention_decode = {.B = 1, .T = T, .H = H, .D = D, .n = 1, .position = T - 1}}};
    rows[n++] = (Row){OP_head_logits, "generate", 0, "", {.head_logits = {.N = 1, .C = C, .V = V}}};
    return n;
}

static bool has_op(const Backend *b, OpId op) {
    switch (op) {
#define CASE(name, Args) case OP_##name: return b->name != NULL;
        LLMC_OPS(CASE)
#undef CASE
    case OP_COUNT: break;
    }
    return false;
}

/* ---- timing -------------------------------------------------------------------------------------------------------------------------- */

static double seconds_a_row = 0.5;
static bool cpu_time; /* --cpu-time: of this thread, so that other programs on a busy machine do not count; with one thread only */
static double now(void) {
    struct timespec t;
    if (!cpu_time) return seconds_now();
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

typedef struct {
    Backend *b;
    OpId op;
    void *args[MAX_SETS];     /* the same call over several sets of operands */
    int sets;
    void *copy_to, *copy_from; /* instead of an op, when not NULL: a copy of bytes */
    size_t bytes;
} Job;

static void run_once(const Job *j, int i) {
    if (j->copy_to) bench_copy(j->b, j->copy_to, j->copy_from, j->bytes);
    else op_run(j->b, j->op, j->args[i % j->sets]);
}

/* For about seconds_a_row, at least three times, after one time that warms caches, clocks and pages. */
static Timing time_job(const Job *j) {
    double t[MOST], begin;
    int n = 0;
    run_once(j, 0);
    j->b->sync(j->b);
    if (strcmp(j->b->name, "cuda")) {
        for (begin = now(); n < MOST && (n < 3 || now() - begin < seconds_a_row); n++) {
            double at = now();
            run_once(j, n);
            j->b->sync(j->b);
            t[n] = now() - at;
        }
        return bench_timing(t, n);
    }
    bench_mark(j->b, 0);
    for (int i = 0; i < 3; i++) run_once(j, i);
    bench_mark(j->b, 1);
    double runs = seconds_a_row * 3 / bench_between(j->b, 0, 1);
    n = runs > MOST ? MOST : runs < 10 ? 10 : (int)runs;
    bench_mark(j->b, 0);
    for (int i = 0; i < n; i++) {
        run_once(j, i);
        bench_mark(j->b, i + 1);
    }
    for (int i = n - 1; i >= 0; i--) t[i] = bench_between(j->b, i, i + 1);
    return bench_timing(t, n);
}

static void *make(Backend *b, OperandKind kind, size_t bytes, size_t V) {
    Error e = {0};
    void *p = b->alloc(b, MEM_OTHER, "bench", bytes, &e);
    if (!p) exit(error_print(&e));
    bench_fill(b, kind, p, bytes, V);
    return p;
}

/* ---- one call with its operands ------------------------------------------------------------------------------------------------------- */

typedef struct { void *made[MAX_SETS * OP_MAX_OPERANDS]; int n; } Made;

static void *make_args(Backend *b, const Row *row, size_t V, Made *m) {
    AnyArgs *args = xmalloc(sizeof *args);
    Operand o[OP_MAX_OPERANDS];
    *args = row->args;
    int n = op_operands(b, row->op, args, o);
    for (int i = 0; i < n; i++) {
        if (!strcmp(o[i].name, row->without)) continue;
        void *p = make(b, o[i].kind, operand_bytes(b, &o[i]), V);
        memcpy((char *)args + o[i].field, &p, sizeof p);
        m->made[m->n++] = p;
    }
    return args;
}

/* A backward of attention gets what its forward saves; otherwise the softmax of its scores would be of other scores. */
static void run_forward_first(Backend *b, const Row *row, const AnyArgs *args) {
    if (row->op != OP_attention_backward) return;
    const AttentionBackward *a = &args->attention_backward;
    b->attention_forward(b, &(AttentionForward){.out = a->out, .saved = a->saved, .qkv = a->qkv, .B = a->B, .T = a->T, .H = a->H, .D = a->D});
}

/* Sets of operands, together 512 MB or more, so that none is found in the L2 from the call before. On a CPU one. */
static int sets_of(const Backend *b, double bytes) {
    double wanted = 512e6 / (bytes + 1);
    return !strcmp(b->name, "cpu") ? 1 : !strcmp(b->name, "emu") ? 2 : wanted > MAX_SETS ? MAX_SETS : (int)wanted + 1;
}

static Timing time_row(Backend *b, const Row *row, size_t V, double *bytes, double *flops) {
    Made m = {.n = 0};
    Error e = {0};
    Job j = {.b = b, .op = row->op, .sets = 1, .args = {make_args(b, row, V, &m)}};
    *bytes = op_bytes(b, row->op, j.args[0]), *flops = op_flops(row->op, j.args[0]);
    for (int sets = sets_of(b, *bytes); j.sets < sets; j.sets++) j.args[j.sets] = make_args(b, row, V, &m);
    b->plan_begin(b);
    run_forward_first(b, row, j.args[0]);
    op_run(b, row->op, j.args[0]);
    if (!b->plan_end(b, &e)) exit(error_print(&e));
    for (int i = 0; i < j.sets; i++) run_forward_first(b, row, j.args[i]);
    Timing t = time_job(&j);
    for (int i = 0; i < m.n; i++) b->release(b, m.made[i]);
    for (int i = 0; i < j.sets; i++) free(j.args[i]);
    return t;
}

/* ---- ceilings: what this device reaches in this run ------------------------------------------------------------------------------------ */

static double copy_ceiling(Backend *b) {
    size_t bytes = (size_t)(!strcmp(b->name, "cuda") ? 1024 : !strcmp(b->name, "cpu") ? 256 : 4) << 20;
    Job j = {.b = b, .copy_to = make(b, KIND_STAT, bytes, 0), .copy_from = make(b, KIND_STAT, bytes, 0), .bytes = bytes};
    Timing t = time_job(&j);
    b->release(b, j.copy_to), b->release(b, j.copy_from);
    return 2.0 * (double)bytes / t.median;
}

static size_t product_size(const Backend *b) { return !strcmp(b->name, "cuda") ? 8192 : !strcmp(b->name, "cpu") ? 2048 : 64; }
static double product_ceiling(Backend *b) {
    size_t S = product_size(b);
    Row row = {OP_linear_forward, "", 0, "pre_gelu", {.linear_forward = {.N = S, .C = S, .OC = S}}};
    double bytes, flops;
    if (!has_op(b, OP_linear_forward)) return 0;
    Timing t = time_row(b, &row, 0, &bytes, &flops);
    return flops / t.median;
}

/* ---- the report ------------------------------------------------------------------------------------------------------------------------ */

typedef struct {
    Backend *b, *hopper, *library; /* the same with --attention hopper, with the library's attention; or NULL */
    double bandwidth, rate;
    FILE *json;
    int shown;
    double step;              /* seconds that the ops of one step of the present shape take */
} Report;

static void bench_row(Report *r, const Shape *s, const Row *row) {
    double bytes, flops, hopper = 0, library = 0;
    if (!has_op(r->b, row->op)) { printf("%-10s %-19s is not in this build\n", s->name, op_names[row->op]); return; }
    Timing t = time_row(r->b, row, s->V, &bytes, &flops);
    const bool attention = row->op == OP_attention_forward || row->op == OP_attention_backward;
    if (r->hopper && attention) hopper = time_row(r->hopper, row, s->V, &bytes, &flops).median;
    if (r->library && attention) library = time_row(r->library, row, s->V, &bytes, &flops).median;
    double by_bytes = bytes / r->bandwidth, by_flops = r->rate > 0 ? flops / r->rate : 0, floor = by_bytes > by_flops ? by_bytes : by_flops;
    char by_hopper[16] = "", by_library[16] = "";
    if (hopper > 0) snprintf(by_hopper, sizeof by_hopper, "%.2fx", t.median / hopper);
    if (library > 0) snprintf(by_library, sizeof by_library, "%.2fx", t.median / library);
    printf("%-10s %-19s %-9s %9.4f %9.4f %9.4f %9.4f %8.1f %9.1f %5.0f%% %7s %7s %5zu\n", s->name, op_names[row->op], row->what, 1e3 * t.median, 1e3 * t.low,
           1e3 * t.high, 1e3 * floor, 1e-9 * bytes / t.median, 1e-9 * flops / t.median, 100 * floor / t.median, by_hopper, by_library, row->calls);
    fflush(stdout);
    if (r->json)
        fprintf(r->json, "%s\n  {\"shape\": \"%s\", \"B\": %zu, \"T\": %zu, \"op\": \"%s\", \"what\": \"%s\", \"calls\": %zu, \"median_s\": %.6g, \"p10_s\": %.6g, "
                "\"p90_s\": %.6g, \"min_s\": %.6g, \"max_s\": %.6g, \"runs\": %d, \"bytes\": %.6g, \"flops\": %.6g, \"floor_s\": %.6g, "
                "\"percent_of_ceiling\": %.4g, \"hopper_s\": %.6g, \"library_s\": %.6g}", r->shown ? "," : "", s->name, s->B, s->T, op_names[row->op], row->what, row->calls, t.median,
                t.low, t.high, t.least, t.most, t.runs, bytes, flops, floor, 100 * floor / t.median, hopper, library);
    r->shown++;
    r->step += (double)row->calls * t.median;
}

static void bench_shape(Report *r, const Shape *s, const char *op) {
    GPT2Config config = {.V = s->V, .L = s->L, .H = s->H, .C = s->C, .T = s->T};
    ParamLayout layout;
    Row rows[MAX_ROWS];
    Error e = {0};
    if (!gpt2_config_check(&config, &e)) exit(error_print(&e));
    gpt2_layout(&layout, &config, 64);
    r->step = 0;
    int n = make_rows(rows, s, &layout);
    for (int i = 0; i < n; i++)
        if (!op || !strcmp(op, op_names[rows[i].op])) bench_row(r, s, &rows[i]);
    if (!op) printf("%s: the ops of one step take %.2f ms, %.0f tokens/s\n", s->name, 1e3 * r->step, (double)(s->B * s->T) / r->step);
    gpt2_layout_free(&layout);
}

typedef struct {
    const char *device, *op, *json, *shape[SHAPES];
    int n_shapes;
    size_t batch;
    bool blas, plans, hopper;
    CudaOptions cuda;
} Options;

static Options parse(int argc, char **argv) {
    Options o = {.device = "cpu", .blas = cpu_gemm_uses_blas(), .cuda = {.attention = "ours", .fuse_gelu = true, .graphs = true}};
    const struct option table[] = {{"device", 1, NULL, 'd'}, {"dtype", 1, NULL, 't'}, {"shape", 1, NULL, 's'}, {"batch", 1, NULL, 'b'}, {"op", 1, NULL, 'o'},
                                   {"product", 1, NULL, 'p'}, {"plan-file", 1, NULL, 'f'}, {"seconds", 1, NULL, 'n'}, {"json", 1, NULL, 'j'},
                                   {"own-products", 0, NULL, 'w'}, {"hopper", 0, NULL, 'h'}, {"print-plans", 0, NULL, 'P'}, {"cpu-time", 0, NULL, 'c'}, {"list", 0, NULL, 'l'}, {NULL, 0, NULL, 0}};
    for (int k; (k = getopt_long(argc, argv, "", table, NULL)) != -1;) {
        switch (k) {
        case 'd': o.device = optarg; break;
        case 't': o.cuda.dtype = optarg; break;
        case 's': if (o.n_shapes < SHAPES) o.shape[o.n_shapes++] = optarg; break;
        case 'b': o.batch = strtoul(optarg, NULL, 10); break;
        case 'o': o.op = optarg; break;
        case 'p': o.blas = !strcmp(optarg, "openblas"); break;
        case 'f': o.cuda.plan_file = optarg; break;
        case 'n': seconds_a_row = strtod(optarg, NULL); break;
        case 'j': o.json = optarg; break;
        case 'w': o.cuda.own_products = OWN_ON; break;
        case 'P': o.plans = true; break;
        case 'c': cpu_time = true; break;
        case 'h': o.hopper = true; break;
        case 'l':
            for (int i = 0; i < SHAPES; i++) printf("%s: B %zu T %zu C %zu H %zu V %zu L %zu (default of --device %s)\n", shapes[i].name, shapes[i].B, shapes[i].T, shapes[i].C, shapes[i].H, shapes[i].V, shapes[i].L, shapes[i].device);
            exit(0);
        default: exit(EXIT_USAGE);
        }
    }
    return o;
}

static bool chosen(const Options *o, const Shape *s) {
    for (int i = 0; i < o->n_shapes; i++)
        if (!strcmp(o->shape[i], s->name)) return true;
    return o->n_shapes == 0 && !strcmp(s->device, o->device);
}

int main(int argc, char **argv) {
    Options o = parse(argc, argv);
    Error e = {0};
    if (cpu_time && (cpu_threads() != 1 || strcmp(o.device, "cpu"))) fail(&e, EXIT_USAGE, "--cpu-time is for --device cpu with OMP_NUM_THREADS=1");
    else if (!cpu_gemm_use_blas(o.blas)) fail(&e, EXIT_USAGE, "--product openblas: OpenBLAS is not in this build");
    if (e.code) return error_print(&e);
    Report r = {.b = bench_open(o.device, &o.cuda, &e)};
    if (!r.b) return error_print(&e);
    if (o.json && !(r.json = fopen(o.json, "w"))) return fail(&e, EXIT_STORAGE, "%s: cannot be written", o.json), error_print(&e);
    if (strcmp(r.b->name, "cpu") && r.b->elem_bytes == 2) {
        CudaOptions other = o.cuda;
        other.attention = "hopper";
        if (o.hopper && !(r.hopper = bench_open(o.device, &other, &e))) printf("without the attention for Hopper: %s\n", e.text);
        other.attention = "cudnn";
        if (!strcmp(r.b->name, "cuda") && !(r.library = bench_open(o.device, &other, &e))) printf("without the library's attention: %s\n", e.text);
    }
    r.bandwidth = copy_ceiling(r.b), r.rate = product_ceiling(r.b);
    printf("%s %s (%s), %d CPU threads%s; ceilings: copy %.1f GB/s, product of %zu^3 %.1f GFLOP/s\n", r.b->name, r.b->dtype, r.b->device ? r.b->device : "no name",
           cpu_threads(), strcmp(o.device, "cpu") ? "" : o.blas ? ", OpenBLAS" : ", own products", 1e-9 * r.bandwidth, product_size(r.b), 1e-9 * r.rate);
    printf("%-10s %-19s %-9s %9s %9s %9s %9s %8s %9s %6s %7s %7s %5s\n", "shape", "op", "", "median ms", "p10", "p90", "floor ms", "GB/s", "GFLOP/s", "of max", "hopper", "library",
           "calls");
    if (r.json)
        fprintf(r.json, "{\"device\": \"%s\", \"backend\": \"%s\", \"dtype\": \"%s\", \"cpu_threads\": %d, \"copy_bytes_per_s\": %.6g, \"product_size\": %zu, "
                "\"product_flops_per_s\": %.6g, \"rows\": [", r.b->device ? r.b->device : "", r.b->name, r.b->dtype, cpu_threads(), r.bandwidth, product_size(r.b), r.rate);
    for (int i = 0; i < SHAPES; i++) {
        Shape s = shapes[i];
        if (!chosen(&o, &s)) continue;
        if (o.batch) s.B = o.batch;
        bench_shape(&r, &s, o.op);
    }
    if (r.json) {
        fprintf(r.json, "\n]}\n");
        if (fclose(r.json)) return fail(&e, EXIT_STORAGE, "%s: could not be written in full", o.json), error_print(&e);
    }
    if (o.plans && r.b->print_plans) r.b->print_plans(r.b, stdout);
    if (r.hopper) r.hopper->destroy(r.hopper);
    if (r.library) r.library->destroy(r.library);
    r.b->destroy(r.b);
    if (!r.shown) return fail(&e, EXIT_USAGE, "nothing was timed: no such --op or --shape; --list shows the shapes"), error_print(&e);
    return 0;
}
