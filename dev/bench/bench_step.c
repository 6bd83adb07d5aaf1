/* Whole training steps of a model, on any backend: tokens/s, MFU, and where the time goes, op by op; the lines add up to the step.
 *   bench_step [--device cpu|cuda|emu] [--dtype bf16|fp32] [--model gpt2] [--layers L --channels C --heads H --vocab-size V] [--batch 4] [--seq-len 64]
 *              [--micro-batches 1] [--steps 5] [--attention ours|hopper|cudnn] [--own-products off|on|only] [--fused-gelu 0|1] [--graphs 0|1] [--early-launch 0|1]
 *              [--recompute none|gelu|block] [--plan-file FILE] [--json FILE] [--kernels] [--wait]
 * --micro-batches: of --batch sequences each, whose gradients a step adds up before it updates.
 * --kernels: after that a few steps more under CUPTI: the time of each GPU kernel, the gaps between kernels and who stands around them.
 * --wait: one step per line read from stdin, each answered by "ms WALL CPU", for dev/bench/compare_step.sh. Random weights and tokens. */
#include "../../llmc/base/rng.h"
#include "../../llmc/base/timer.h"
#include "../../llmc/train.h"
#include "../../llmc/wrap/wrapper.h"
#include "device.h"
#include "kernel_cupti.h"
#include <getopt.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* A wrapper that, while `on`, puts a mark after each op (on a GPU an event, so that nothing waits), and otherwise is not in the way. The time
 * of an op is from the mark before it, which another op or stamp() has put. */
typedef struct {
    Wrapper w;
    bool on;
    uint64_t salt;            /* in the keys of recordings: another one makes the backend record anew */
    int marks;
    OpId op[MARKS];           /* what ended at the mark; OP_COUNT: not an op */
    double seconds[OP_COUNT + 1], flops[OP_COUNT + 1], bytes[OP_COUNT + 1]; /* last: between ops */
    uint64_t calls[OP_COUNT + 1];
} Clock;

static void stamp(Clock *c, OpId op) {
    if (!c->on || c->w.planning) return;
    CHECK(c->marks < MARKS, "more than %d ops and fills in a step: take fewer layers or micro-batches", (int)MARKS);
    bench_mark(c->w.backend.inner, c->marks);
    c->op[c->marks++] = op;
}

static void clock_run(Backend *b, OpId op, const void *args) {
    Clock *c = (Clock *)b;
    stamp(c, OP_COUNT);       /* what came before was no op */
    op_run(b->inner, op, args);
    stamp(c, op);
    if (!c->on) return;
    c->calls[op]++;
    c->flops[op] += op_flops(op, args);
    c->bytes[op] += op_bytes(b->inner, op, args);
}
static bool clock_replay(Backend *b, uint64_t key) { return ((Clock *)b)->on ? false : b->inner->replay(b->inner, key ^ ((Clock *)b)->salt); }
static void clock_record_end(Backend *b, uint64_t key) { if (!((Clock *)b)->on) b->inner->record_end(b->inner, key ^ ((Clock *)b)->salt); }

static void add_up(Clock *c) {
    for (int i = c->marks - 1; i > 0; i--) c->seconds[c->op[i]] += bench_between(c->w.backend.inner, i - 1, i);
    c->marks = 0;
}

typedef struct {
    GPT2Config config;
    size_t B, T, micro, steps;
    Keep keep;
    bool wait, kernels;
    const char *device, *json, *model;
    CudaOptions cuda;
} Options;

static Keep keep_by_name(const char *name, Error *e) {
    if (!strcmp(name, "none")) return KEEP_ALL;
    if (!strcmp(name, "gelu")) return KEEP_NO_GELU;
    if (!strcmp(name, "block")) return KEEP_RESIDUAL;
    fail(e, EXIT_USAGE, "--recompute %s: expected none, gelu or block", name);
    return KEEP_ALL;
}

static OwnProducts own_by_name(const char *name, Error *e) {
    if (!strcmp(name, "off")) return OWN_OFF;
    if (!strcmp(name, "on")) return OWN_ON;
    if (!strcmp(name, "only")) return OWN_ONLY;
    fail(e, EXIT_USAGE, "--own-products %s: expected off, on or only", name);
    return OWN_OFF;
}

static Options parse(int argc, char **argv) {
    Options o = {.B = 4, .T = 64, .micro = 1, .steps = 5, .device = "cpu", .model = "gpt2", .cuda = {.attention = "ours", .fuse_gelu = true, .graphs = true}};
    Error e = {0};
    if (!gpt2_config_by_name(&o.config, "gpt2", &e)) exit(error_print(&e));
    const struct option table[] = {{"model", 1, NULL, 'm'}, {"layers", 1, NULL, 'l'}, {"channels", 1, NULL, 'c'}, {"heads", 1, NULL, 'h'},
                                   {"vocab-size", 1, NULL, 'v'}, {"batch", 1, NULL, 'b'}, {"seq-len", 1, NULL, 't'}, {"micro-batches", 1, NULL, 'i'},
                                   {"own-products", 1, NULL, 'o'}, {"steps", 1, NULL, 's'}, {"wait", 0, NULL, 'w'}, {"kernels", 0, NULL, 'n'},
                                   {"device", 1, NULL, 'd'}, {"dtype", 1, NULL, 'y'}, {"attention", 1, NULL, 'a'}, {"fused-gelu", 1, NULL, 'g'}, {"graphs", 1, NULL, 'r'}, {"early-launch", 1, NULL, 'e'},
                                   {"recompute", 1, NULL, 'k'}, {"plan-file", 1, NULL, 'f'}, {"json", 1, NULL, 'j'}, {NULL, 0, NULL, 0}};
    for (int k; (k = getopt_long(argc, argv, "", table, NULL)) != -1;) {
        size_t n = optarg ? strtoul(optarg, NULL, 10) : 0;
        switch (k) {
        case 'd': o.device = optarg; break;
        case 'y': o.cuda.dtype = optarg; break;
        case 'a': o.cuda.attention = optarg; break;
        case 'g': o.cuda.fuse_gelu = n; break;
        case 'r': o.cuda.graphs = n; break;
        case 'e': o.cuda.early_launch = n; break;
        case 'o': o.cuda.own_products = own_by_name(optarg, &e); break;
        case 'i': o.micro = n; break;
        case 'k': o.keep = keep_by_name(optarg, &e); break;
        case 'f': o.cuda.plan_file = optarg; break;
        case 'j': o.json = optarg; break;
        case 'm': o.model = optarg; if (!gpt2_config_by_name(&o.config, optarg, &e)) exit(error_print(&e)); break;
        case 'l': o.config.L = n; break;
        case 'c': o.config.C = n; break;
        case 'h': o.config.H = n; break;
        case 'v': o.config.V = n; break;
        case 'b': o.B = n; break;
        case 't': o.T = n; break;
        case 's': o.steps = n; break;
        case 'w': o.wait = true; break;
        case 'n': o.kernels = true; break;
        default: exit(EXIT_USAGE);
        }
    }
    if (o.T > o.config.T) o.config.T = o.T;
    if (o.B < 1 || o.T < 1 || o.micro < 1 || o.steps < 1) fail(&e, EXIT_USAGE, "--batch, --seq-len, --micro-batches and --steps are at least 1");
    if (o.kernels && o.wait) fail(&e, EXIT_USAGE, "--kernels and --wait do not go together");
    if (o.kernels && !strcmp(o.device, "cpu")) fail(&e, EXIT_USAGE, "--kernels: there are no GPU kernels with --device cpu");
    else if (o.kernels && !e.code) cupti_built(&e);
    if (e.code || !gpt2_config_check(&o.config, &e)) exit(error_print(&e));
    return o;
}

static int32_t *random_tokens(size_t n, size_t V) {
    int32_t *ids = xmalloc(n * sizeof *ids);
    for (size_t i = 0; i < n; i++) ids[i] = (int32_t)(rng_u32(1, RNG_DATA, 0, i) % V);
    return ids;
}

static bool next_micro(void *context, size_t i, const int32_t **tokens, const int32_t **targets) {
    (void)i;
    *tokens = context;
    *targets = *tokens + 1;
    return true;
}

static double cpu_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static StepParams params = {.lr = 1e-4f, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .weight_decay = 0.1f, .grad_clip = 1, .loss_limit = INFINITY,
                            .norm_limit = INFINITY};

static void collect(Trainer *trainer) {
    StepResult r = train_result(trainer);
    if (r.skip) printf("the step was skipped: loss %g, norm %g\n", (double)r.loss, (double)r.grad_norm);
}

/* Steps as a run issues them: the result of one is read after the next has been issued. Seconds of each, from the end of one to that of the next. */
static void timed_steps(Trainer *trainer, const Options *o, int32_t *ids, double *seconds, size_t n) {
    Backend *b = trainer->model->backend->inner;
    bench_mark(b, 0);
    for (size_t i = 0; i < n; i++) {
        train_issue(trainer, &params, o->micro, next_micro, ids);
        bench_mark(b, (int)i + 1);
        if (i) collect(trainer);
    }
    collect(trainer);
    for (size_t i = n; i > 0; i--) seconds[i - 1] = bench_between(b, (int)i - 1, (int)i);
}

/* The same with a mark around every op. */
static void clocked_steps(Trainer *trainer, Clock *c, const Options *o, int32_t *ids) {
    for (size_t i = 0; i < o->steps; i++) {
        c->on = true;
        stamp(c, OP_COUNT);
        train_issue(trainer, &params, o->micro, next_micro, ids);
        stamp(c, OP_COUNT);
        c->on = false;
        collect(trainer);
        add_up(c);
    }
}

/* The breakdown is of steps with marks; scale makes its lines add up to the step without them. */
static void print_report(const Clock *c, const Options *o, const Backend *b, const Timing *t) {
    double clocked = 0, rows = (double)(o->B * o->T * o->micro), flops = gpt2_flops_per_token(&o->config, o->T) * rows, n = (double)o->steps;
    char mfu[16] = "n/a";
    for (int op = 0; op <= OP_COUNT; op++) clocked += c->seconds[op] / n;
    double scale = t->median / clocked;
    if (b->peak_flops > 0) snprintf(mfu, sizeof mfu, "%.1f %%", 100 * flops / t->median / b->peak_flops);
    printf("step: median %.2f ms, fastest %.2f, slowest %.2f of %d; %.0f tokens/s, %.1f GFLOP/s (6N + 6LCT a token), MFU %s\n", 1e3 * t->median, 1e3 * t->least,
           1e3 * t->most, t->runs, rows / t->median, flops / t->median * 1e-9, mfu);
    printf("by op: steps with a mark after each op take %.2f ms; scaled by %.3f to the step above\n", 1e3 * clocked, scale);
    printf("%-20s %6s %10s %6s %9s %7s\n", "op", "calls", "ms/step", "%", "GFLOP/s", "GB/s");
    for (int op = 0; op <= OP_COUNT; op++) {
        if (!c->calls[op] && op < OP_COUNT) continue;
        double each = scale * c->seconds[op] / n;
        printf("%-20s %6.0f %10.3f %6.1f %9.1f %7.1f%s\n", op < OP_COUNT ? op_names[op] : "between ops", (double)c->calls[op] / n, 1e3 * each, 100 * each / t->median,
               each > 0 ? c->flops[op] / n / each * 1e-9 : 0, each > 0 ? c->bytes[op] / n / each * 1e-9 : 0, op < OP_COUNT ? "" : "   (zeroing gradients, copies, the loop)");
    }
    printf("%-20s %6s %10.3f %6.1f\n", "sum", "", 1e3 * t->median, 100.0);
}

/* Steps under CUPTI, for --kernels. */
typedef struct {
    Trace trace;
    TraceReport report;
    TraceSteps steps;
} Traced;

/* traced: NULL before, or without, steps under CUPTI. */
static bool write_json(const Clock *c, const Options *o, const Backend *b, const Timing *t, const Traced *traced, Error *e) {
    FILE *f = fopen(o->json, "w");
    if (!f) return fail(e, EXIT_STORAGE, "%s: cannot be written", o->json);
    double clocked = 0, rows = (double)(o->B * o->T * o->micro), flops = gpt2_flops_per_token(&o->config, o->T) * rows, n = (double)o->steps;
    for (int op = 0; op <= OP_COUNT; op++) clocked += c->seconds[op] / n;
    fprintf(f, "{\"device\": \"%s\", \"backend\": \"%s\", \"dtype\": \"%s\", \"attention\": \"%s\", \"model\": \"%s\", \"L\": %zu, \"C\": %zu, \"H\": %zu, \"V\": %zu, "
            "\"B\": %zu, \"T\": %zu, \"micro_batches\": %zu, \"own_products\": %d, \"early_launch\": %d, \"steps\": %d, \"median_s\": %.6g, \"p10_s\": %.6g, \"p90_s\": %.6g, \"min_s\": %.6g, \"max_s\": %.6g, \"tokens_per_s\": %.6g, "
            "\"flops_per_s\": %.6g, \"mfu\": ", b->device ? b->device : "", b->name, b->dtype, o->cuda.attention, o->model, o->config.L, o->config.C, o->config.H, o->config.V,
            o->B, o->T, o->micro, (int)o->cuda.own_products, o->cuda.early_launch, t->runs, t->median, t->low, t->high, t->least, t->most, rows / t->median, flops / t->median);
    if (b->peak_flops > 0) fprintf(f, "%.4g", flops / t->median / b->peak_flops);
    else fprintf(f, "null");
    fprintf(f, ", \"clocked_step_s\": %.6g, \"ops\": [", clocked);
    for (int op = 0, first = 1; op <= OP_COUNT; op++) {
        if (!c->calls[op] && op < OP_COUNT) continue;
        fprintf(f, "%s\n  {\"op\": \"%s\", \"calls\": %.0f, \"seconds\": %.6g, \"share\": %.4g, \"flops\": %.6g, \"bytes\": %.6g}", first ? "" : ",",
                op < OP_COUNT ? op_names[op] : "between ops", (double)c->calls[op] / n, c->seconds[op] / n * t->median / clocked, c->seconds[op] / n / clocked,
                c->flops[op] / n, c->bytes[op] / n);
        first = 0;
    }
    fprintf(f, "\n]");
    if (traced) {
        fprintf(f, ",\n");
        trace_json(f, &traced->trace, &traced->report, traced->steps);
    }
    fprintf(f, "}\n");
    return !fclose(f) || fail(e, EXIT_STORAGE, "%s: could not be written in full", o->json);
}

/* One step a line of stdin. */
static void steps_on_request(Trainer *trainer, const Options *o, int32_t *ids) {
    char line[16];
    printf("ready\n");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        double cpu_start = cpu_seconds(), wall = seconds_now();
        train_step(trainer, &params, o->micro, next_micro, ids);
        printf("ms %.3f %.3f\n", 1e3 * (seconds_now() - wall), 1e3 * (cpu_seconds() - cpu_start));
        fflush(stdout);
    }
}

/* Steps as they are timed, with their graphs recorded anew: one from before CUPTI was on need not show what is in it. */
static bool traced_steps(Traced *traced, Trainer *trainer, Clock *c, int32_t *ids, const Options *o, Error *e) {
    enum { WARM_UP = 3, TRACED = 5 };
    double seconds[TRACED];
    Backend *b = c->w.backend.inner;
    TraceSteps *s = &traced->steps;
    s->steps = o->steps < TRACED ? o->steps : TRACED;
    if (!cupti_begin(&traced->trace, e)) return false;
    c->salt = 0x9e3779b97f4a7c15;
    timed_steps(trainer, o, ids, seconds, WARM_UP);
    b->sync(b);
    bool ok = cupti_discard(e);
    timed_steps(trainer, o, ids, seconds, s->steps);
    b->sync(b);
    ok = cupti_end(ok ? e : NULL) && ok;
    c->salt = 0;
    for (size_t i = 0; i < s->steps; i++) s->traced += seconds[i] / (double)s->steps;
    traced->report = trace_report(&traced->trace);
    return ok;
}

/* The figures of the steps are printed and written before CUPTI is asked for anything: whatever becomes of it, they stand. */
static bool bench_kernels(Trainer *trainer, Clock *c, int32_t *ids, const Options *o, const Timing *t, Error *e) {
    Traced traced = {.steps.untraced = t->median};
    bool ok = traced_steps(&traced, trainer, c, ids, o, e);
    if (ok) trace_print(stdout, &traced.trace, &traced.report, traced.steps);
    else fail_in(e, "by kernel: not traced");
    ok = ok && (!o->json || write_json(c, o, c->w.backend.inner, t, &traced, e));
    trace_report_free(&traced.report);
    trace_clear(&traced.trace);
    return ok;
}

static bool bench(Trainer *trainer, Clock *c, int32_t *ids, const Options *o, Error *e) {
    Backend *b = c->w.backend.inner;
    double *seconds = xmalloc(o->steps * sizeof *seconds);
    timed_steps(trainer, o, ids, seconds, o->steps < 3 ? o->steps : 3); /* warms up, and lets stretches be recorded */
    timed_steps(trainer, o, ids, seconds, o->steps);
    clocked_steps(trainer, c, o, ids);
    Timing t = bench_timing(seconds, (int)o->steps);
    free(seconds);
    print_report(c, o, b, &t);
    fflush(stdout);
    if (o->json && !write_json(c, o, b, &t, NULL, e)) return false;
    return !o->kernels || bench_kernels(trainer, c, ids, o, &t, e);
}

int main(int argc, char **argv) {
    Options o = parse(argc, argv);
    Error e = {0};
    Backend *inner = bench_open(o.device, &o.cuda, &e);
    if (!inner) return error_print(&e);
    Clock *c = xcalloc(1, sizeof *c);
    wrapper_init(&c->w, "clock", inner, clock_run);
    c->w.backend.replay = clock_replay, c->w.backend.record_end = clock_record_end;
    params.rounding = inner->elem_bytes == 2 ? ROUND_STOCHASTIC : ROUND_NEAREST; /* as a run of that type has it */
    GPT2 model;
    Acts acts;
    Trainer trainer;
    if (!gpt2_create(&model, &c->w.backend, &o.config, true, &e)) return error_print(&e);
    gpt2_init(&model, 1);
    if (!gpt2_acts_create(&acts, &model, o.B, o.T, o.keep, true, &e) || !trainer_create(&trainer, &model, &acts, &e)) return error_print(&e);
    int32_t *ids = random_tokens(o.B * o.T + 1, o.config.V);
    printf("bench_step: %s, L %zu C %zu H %zu V %zu, B %zu T %zu x %zu, %s %s%s%s\n", o.model, o.config.L, o.config.C, o.config.H, o.config.V, o.B, o.T, o.micro, inner->name, inner->dtype,
           inner->device ? ", " : "", inner->device ? inner->device : "");
    if (o.wait) {
        train_step(&trainer, &params, o.micro, next_micro, ids);
        steps_on_request(&trainer, &o, ids);
    } else if (!bench(&trainer, c, ids, &o, &e)) error_print(&e);
    free(ids);
    trainer_destroy(&trainer);
    gpt2_acts_destroy(&acts, &model);
    gpt2_destroy(&model);
    c->w.backend.destroy(&c->w.backend);
    inner->destroy(inner);
    return e.code;
}
