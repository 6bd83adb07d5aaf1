/* Communication runs beside the backward: read off the trace of rank 0 of two. Order is checked, not time; of what could end before the
 * backward's end only a part must have, for the machine may be busy with other things. */
#include "llmc/base/rng.h"
#include "llmc/cpu/cpu.h"
#include "llmc/dist/zero.h"
#include "llmc/train.h"
#include "ranks_kit.h"
#include <jansson.h>
#include <math.h>
#include <unistd.h>

enum { UNITS = 6, STEPS = 5, T = 64, B = 4 };
static const GPT2Config shape = {.V = 500, .L = UNITS - 2, .H = 2, .C = 128, .T = T};
typedef struct { const char *path; bool emulated, sharded; } Job;

static bool next_micro(void *context, size_t i, const int32_t **tokens, const int32_t **targets) {
    static int32_t text[B * T + 1];
    (void)i;
    for (size_t k = 0; k < B * T + 1; k++) text[k] = (int32_t)(rng_u32(3, RNG_DATA, (uint32_t) * (int *)context, k) % shape.V);
    *tokens = text, *targets = text + 1;
    return true;
}

static void span(void *trace, const char *row, const char *name, size_t unit, double begin, double end) { trace_backend_span(trace, row, name, unit, begin, end); }

static int rank_main(Comm *comm, void *context) {
    const Job *job = context;
    Error e = {0};
    Backend *base = NULL, *zero, *be;
#ifdef LLMC_EMU
    if (job->emulated) base = emu_backend_create(&(CudaOptions){.dtype = "fp32", .attention = "ours"}, &e);
#endif
    if (!base) base = cpu_backend_create(&e);
    be = zero = zero_backend_create(base, comm, WIRE_FLOAT32);
    GPT2Config config = shape;
    GPT2 model;
    Acts acts;
    Trainer trainer;
    if (!comm->rank) CHECK(be = trace_backend_create(zero, job->path, &e), "%s", e.text);
    CHECK(gpt2_config_check(&config, &e) && gpt2_create_ranks(&model, be, &config, true, (Ranks){(size_t)comm->rank, 2, job->sharded}, &e) && zero_attach(zero, &model, &e), "%s", e.text);
    if (!comm->rank) zero_spans(zero, span, be);
    CHECK(gpt2_acts_create(&acts, &model, job->emulated ? 1 : B, T, KEEP_ALL, true, &e) && trainer_create(&trainer, &model, &acts, &e), "%s", e.text);
    gpt2_init(&model, 3);
    for (int s = 0; s < STEPS; s++) {
        StepParams p = {.lr = 1e-3f, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .loss_limit = INFINITY, .norm_limit = INFINITY, .step = s};
        int seed = 2 * s + comm->rank;
        train_step(&trainer, &p, 1, next_micro, &seed);
    }
    comm_barrier(comm);
    zero_spans(zero, NULL, NULL);
    model.backend = zero;
    if (be != zero) be->destroy(be);
    trainer_destroy(&trainer);
    gpt2_acts_destroy(&acts, &model);
    gpt2_destroy(&model);
    zero->destroy(zero);
    base->destroy(base);
    return 0;
}

/* ---- what the trace says: microseconds, by step and unit ------------------------------------------------------------------ */
typedef struct { double begin, end; } Time;
typedef struct { double needed[UNITS], final[UNITS], backward_ends; Time gradients[UNITS], weights[UNITS], gradients_wait[UNITS], weights_wait[UNITS]; } Seen;
static Seen steps[STEPS + 1];

/* Each unit comes once a step. */
static int step_of(int *n, size_t unit) { return n[unit]++; }

static bool is(const json_t *event, const char *key, const char *value) { return json_is_string(json_object_get(event, key)) && !strcmp(json_string_value(json_object_get(event, key)), value); }

static void read_trace(const char *path) {
    static int final[UNITS], needed[UNITS], gradients[UNITS], weights[UNITS], gradients_wait[UNITS], weights_wait[UNITS];
    int backwards = 0;
    memset(final, 0, sizeof final), memset(needed, 0, sizeof needed), memset(gradients, 0, sizeof gradients), memset(gradients_wait, 0, sizeof gradients_wait), memset(weights_wait, 0, sizeof weights_wait);
    memset(weights, 0, sizeof weights), memset(steps, 0, sizeof steps);
    json_error_t error;
    json_t *trace = json_load_file(path, 0, &error), *event;
    CHECK(trace, "%s:%d: %s", path, error.line, error.text);
    size_t i;
    json_array_foreach(trace, i, event) {
        size_t unit = (size_t)json_integer_value(json_object_get(json_object_get(event, "args"), "unit"));
        double at = json_number_value(json_object_get(event, "ts")), end = at + json_number_value(json_object_get(event, "dur"));
        if (is(event, "name", "embed_backward") && backwards < STEPS) steps[backwards++].backward_ends = end;
        if (unit >= UNITS) continue;
        int *counts = NULL;
        size_t offset = 0;
        if (is(event, "name", "grads_final")) counts = final, offset = offsetof(Seen, final) + unit * sizeof(double);
        else if (is(event, "name", "params_needed")) counts = needed, offset = offsetof(Seen, needed) + unit * sizeof(double);
        else if (is(event, "cat", "ranks") && is(event, "name", "gradients")) counts = gradients, offset = offsetof(Seen, gradients) + unit * sizeof(Time);
        else if (is(event, "cat", "ranks")) counts = weights, offset = offsetof(Seen, weights) + unit * sizeof(Time);
        else if (is(event, "cat", "waiting for ranks") && is(event, "name", "gradients")) counts = gradients_wait, offset = offsetof(Seen, gradients_wait) + unit * sizeof(Time);
        else if (is(event, "cat", "waiting for ranks")) counts = weights_wait, offset = offsetof(Seen, weights_wait) + unit * sizeof(Time);
        if (!counts) continue;
        int s = step_of(counts, unit);
        CHECK(s <= STEPS, "%d times unit %zu", s, unit);
        memcpy((char *)&steps[s] + offset, &at, sizeof at);
        if (counts != final && counts != needed) memcpy((char *)&steps[s] + offset + sizeof at, &end, sizeof end);
    }
    json_decref(trace);
    for (size_t u = 0; u < UNITS; u++)
        EXPECT(gradients[u] == STEPS && gradients_wait[u] == STEPS && final[u] == STEPS, "unit %zu: %d flights, %d waits, %d marks", u, gradients[u], gradients_wait[u], final[u]);
}

static void check(const char *backend, bool sharded) {
    const double tick = 0.002;            /* the file's times are rounded */
    int beside = 0;
    for (int s = 0; s < STEPS; s++) {
        const Seen *now = &steps[s], *next = &steps[s + 1];
        for (int u = 0; u < UNITS; u++) {
            const Time *g = &now->gradients[u], *wait = &now->gradients_wait[u];
            EXPECT(g->begin + tick >= now->final[u] && g->end >= g->begin, "%s, step %d, unit %d: under way from %.3f to %.3f, final at %.3f", backend, s, u, g->begin, g->end, now->final[u]);
            EXPECT(u == UNITS - 1 || g->begin + tick >= now->gradients[u + 1].end, "%s, step %d, unit %d: begins before the one before it ends", backend, s, u);
            EXPECT(wait->end + tick >= g->end, "%s, step %d, unit %d: waited until %.3f, there at %.3f", backend, s, u, wait->end, g->end);
            EXPECT(u == 0 || wait->begin + tick >= g->end, "%s, step %d: the step waits for unit %d beside the last", backend, s, u);
            beside += u >= 2 && g->end < now->backward_ends;
            if (!sharded || s + 1 == STEPS) continue;
            EXPECT(now->weights[u].begin > now->gradients[0].end && next->weights_wait[u].begin + tick >= next->needed[u] - tick && next->weights_wait[u].end + tick >= now->weights[u].end,
                   "%s, step %d, unit %d: weights are waited for where they are needed", backend, s, u);
        }
    }
    printf("%s: of the %d gradients that could travel before the backward's end, %d did\n", backend, STEPS * (UNITS - 2), beside);
    EXPECT(beside >= UNITS - 2, "%s: gradients do not travel beside the backward", backend);
}

TEST(gradients_travel_beside_the_backward) {
    char path[] = "/tmp/llmc_overlap_XXXXXX";
    int fd = mkstemp(path);
    CHECK(fd >= 0, "%s", path);
    close(fd);
    for (int k = 0; k < 2; k++) {
        Job job = {path, false, k == 0};
        EXPECT(ranks_run(2, rank_main, &job, NULL), "two ranks");
        read_trace(path);
        check("cpu", job.sharded);
    }
#ifdef LLMC_EMU
    Job job = {path, true, true};
    EXPECT(ranks_run(2, rank_main, &job, NULL), "two ranks");
    read_trace(path);
    check("emu", true);
#endif
    unlink(path);
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    RUN(gradients_travel_beside_the_backward);
    return test_done();
}
