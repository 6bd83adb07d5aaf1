/* Whole training steps of a model: tokens/s, GFLOP/s and where the time goes, op by op; the lines add up to the step.
 *   bench_step [--model gpt2] [--layers L --channels C --heads H --vocab-size V] [--batch 4] [--seq-len 64] [--steps 5] [--wait]
 * --wait: one step per line read from stdin, each answered by "ms WALL CPU", for dev/bench/compare_step.sh. Random weights and tokens:
 * the time does not depend on them. */
#include "../../llmc/base/rng.h"
#include "../../llmc/base/timer.h"
#include "../../llmc/train.h"
#include "../../llmc/wrap/wrapper.h"
#include <getopt.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* A wrapper that sums time, calls, FLOPs and bytes per op. */
typedef struct {
    Wrapper w;
    double seconds[OP_COUNT], flops[OP_COUNT], bytes[OP_COUNT];
    uint64_t calls[OP_COUNT];
} Clock;

static void clock_run(Backend *b, OpId op, const void *args) {
    Clock *c = (Clock *)b;
    double start = seconds_now();
    op_run(b->inner, op, args);
    b->inner->sync(b->inner);
    c->seconds[op] += seconds_now() - start;
    c->calls[op]++;
    c->flops[op] += op_flops(op, args);
    c->bytes[op] += op_bytes(b->inner, op, args);
}

typedef struct {
    GPT2Config config;
    size_t B, T, steps;
    bool wait;
} Options;

static Options parse(int argc, char **argv) {
    Options o = {.B = 4, .T = 64, .steps = 5};
    Error e = {0};
    if (!gpt2_config_by_name(&o.config, "gpt2", &e)) exit(error_print(&e));
    const struct option table[] = {{"model", 1, NULL, 'm'}, {"layers", 1, NULL, 'l'}, {"channels", 1, NULL, 'c'}, {"heads", 1, NULL, 'h'},
                                   {"vocab-size", 1, NULL, 'v'}, {"batch", 1, NULL, 'b'}, {"seq-len", 1, NULL, 't'},
                                   {"steps", 1, NULL, 's'}, {"wait", 0, NULL, 'w'}, {NULL, 0, NULL, 0}};
    for (int k; (k = getopt_long(argc, argv, "", table, NULL)) != -1;) {
        size_t n = optarg ? strtoul(optarg, NULL, 10) : 0;
        switch (k) {
        case 'm': if (!gpt2_config_by_name(&o.config, optarg, &e)) exit(error_print(&e)); break;
        case 'l': o.config.L = n; break;
        case 'c': o.config.C = n; break;
        case 'h': o.config.H = n; break;
        case 'v': o.config.V = n; break;
        case 'b': o.B = n; break;
        case 't': o.T = n; break;
        case 's': o.steps = n; break;
        case 'w': o.wait = true; break;
        default: exit(EXIT_USAGE);
        }
    }
    if (o.T > o.config.T) o.config.T = o.T;
    if (o.B < 1 || o.T < 1 || o.steps < 1) fail(&e, EXIT_USAGE, "--batch, --seq-len and --steps are at least 1");
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

static double timed_step(Trainer *trainer, int32_t *ids) {
    StepParams p = {.lr = 1e-4f, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .weight_decay = 0.1f, .grad_clip = 1, .loss_limit = INFINITY, .norm_limit = INFINITY};
    double start = seconds_now();
    StepResult r = train_step(trainer, &p, 1, next_micro, ids);
    if (r.skip) printf("the step was skipped: loss %g, norm %g\n", (double)r.loss, (double)r.grad_norm);
    return seconds_now() - start;
}

static int ascending(const void *a, const void *b) { return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b); }

static void report(const Clock *c, const Options *o, double *seconds) {
    double total = 0, known = 0, n = (double)o->steps, rows = (double)(o->B * o->T);
    for (size_t i = 0; i < o->steps; i++) total += seconds[i];
    qsort(seconds, o->steps, sizeof *seconds, ascending);
    double median = seconds[o->steps / 2], flops = gpt2_flops_per_token(&o->config, o->T) * rows;
    printf("step: median %.1f ms, fastest %.1f, slowest %.1f of %zu; %.0f tokens/s, %.1f GFLOP/s (6N + 6LCT a token)\n", 1e3 * median, 1e3 * seconds[0],
           1e3 * seconds[o->steps - 1], o->steps, rows / median, flops / median * 1e-9);
    printf("%-20s %6s %10s %6s %9s %7s\n", "op", "calls", "ms/step", "%", "GFLOP/s", "GB/s");
    for (int op = 0; op < OP_COUNT; op++) {
        if (!c->calls[op]) continue;
        known += c->seconds[op];
        printf("%-20s %6.0f %10.2f %6.1f %9.1f %7.1f\n", op_names[op], (double)c->calls[op] / n, 1e3 * c->seconds[op] / n, 100 * c->seconds[op] / total,
               c->flops[op] / c->seconds[op] * 1e-9, c->bytes[op] / c->seconds[op] * 1e-9);
    }
    printf("%-20s %6s %10.2f %6.1f   (zeroing gradients, copies, the loop)\n", "between ops", "", 1e3 * (total - known) / n, 100 * (total - known) / total);
    printf("%-20s %6s %10.2f %6.1f\n", "sum", "", 1e3 * total / n, 100.0);
}

int main(int argc, char **argv) {
    Options o = parse(argc, argv);
    Error e = {0};
    Backend *cpu = cpu_backend_create(&e);
    if (!cpu) return error_print(&e);
    Clock *c = xcalloc(1, sizeof *c);
    wrapper_init(&c->w, "clock", cpu, clock_run);
    GPT2 model;
    Acts acts;
    Trainer trainer;
    if (!gpt2_create(&model, &c->w.backend, &o.config, true, &e)) return error_print(&e);
    gpt2_init(&model, 1);
    if (!gpt2_acts_create(&acts, &model, o.B, o.T, KEEP_ALL, true, &e) || !trainer_create(&trainer, &model, &acts, &e)) return error_print(&e);
    int32_t *ids = random_tokens(o.B * o.T + 1, o.config.V);
    printf("bench_step: L %zu C %zu H %zu V %zu, B %zu T %zu, %s\n", o.config.L, o.config.C, o.config.H, o.config.V, o.B, o.T, cpu->name);
    timed_step(&trainer, ids);
    if (o.wait) {
        char line[16];
        printf("ready\n");
        fflush(stdout);
        while (fgets(line, sizeof line, stdin)) {
            double cpu_start = cpu_seconds(), wall = timed_step(&trainer, ids);
            printf("ms %.3f %.3f\n", 1e3 * wall, 1e3 * (cpu_seconds() - cpu_start));
            fflush(stdout);
        }
    } else {
        double *seconds = xmalloc(o.steps * sizeof *seconds);
        memset(c->seconds, 0, sizeof c->seconds), memset(c->flops, 0, sizeof c->flops);
        memset(c->bytes, 0, sizeof c->bytes), memset(c->calls, 0, sizeof c->calls);
        for (size_t i = 0; i < o.steps; i++) seconds[i] = timed_step(&trainer, ids);
        report(c, &o, seconds);
        free(seconds);
    }
    free(ids);
    trainer_destroy(&trainer);
    gpt2_acts_destroy(&acts, &model);
    gpt2_destroy(&model);
    c->w.backend.destroy(&c->w.backend);
    cpu->destroy(cpu);
    return 0;
}
