/* What the checkpoint tests share: a tiny model and a training state in which every value is another one, runs made of them, and the
 * comparisons. Included once per test program; fixture_start goes first, fixture_end last. */
#ifndef LLMC_TEST_CHECKPOINT_FIXTURE_H
#define LLMC_TEST_CHECKPOINT_FIXTURE_H
#include "../../llmc/base/rng.h"
#include "../../llmc/run/checkpoint_private.h"
#include "test.h"
#include <unistd.h>

static char root[256];
static Backend *cpu;
static const char RUN_ID[] = "0123456789abcdef0123456789abcdef";
static const FixedFact facts[] = {
    {"data", "data fingerprint", "aabbcc", NULL}, {"tokenizer", "tokenizer fingerprint", "none", NULL}, {"shape", "layers", "2", NULL},
    {"batch", "total-batch", "512", NULL},        {"schedule", "lr", "0.00059999999999999995", NULL},   {"schedule", "warmup", "700", NULL},
    {"optimizer", "beta1", "0.90000000000000002", NULL},
};
enum { N_FACTS = sizeof facts / sizeof *facts };

static RunIdentity identity(void) {
    RunIdentity id = {.facts = facts, .n_facts = N_FACTS};
    memcpy(id.run_id, RUN_ID, sizeof id.run_id);
    return id;
}

/* ---- a model and a state in which every value is another one ---- */

static GPT2 model_create(size_t L, size_t C, size_t H, size_t V, size_t T) {
    GPT2 model;
    Error e = {0};
    GPT2Config c = {.V = V, .L = L, .H = H, .C = C, .T = T};
    if (!gpt2_config_check(&c, &e) || !gpt2_create(&model, cpu, &c, true, &e)) exit(error_print(&e));
    return model;
}

static GPT2 tiny(void) { return model_create(2, 16, 2, 50, 8); }

static float value_at(uint64_t seed, int which, size_t tensor, size_t i) {
    return (float)(rng_uniform(seed, (uint32_t)which, (uint32_t)tensor, i) - (which == PARAM_V ? 0 : 0.5));
}

static void model_fill(GPT2 *model, uint64_t seed) {
    static const int which[] = {PARAM_MASTER, PARAM_M, PARAM_V};
    for (int w = 0; w < 3; w++)
        for (size_t i = 0; i < model->layout.n_tensors; i++) {
            const ParamTensor *t = &model->layout.tensors[i];
            size_t n = t->file_rows * t->cols;
            float *values = xmalloc(n * sizeof *values);
            for (size_t k = 0; k < n; k++) values[k] = value_at(seed, which[w], i, k);
            gpt2_tensor_set(model, t, which[w], values);
            free(values);
        }
    gpt2_params_changed(model);
}

/* Values of which the model has another bit pattern than model_fill(seed) gave. */
static size_t model_differences(const GPT2 *model, uint64_t seed) {
    static const int which[] = {PARAM_MASTER, PARAM_M, PARAM_V};
    size_t differences = 0;
    for (int w = 0; w < 3; w++)
        for (size_t i = 0; i < model->layout.n_tensors; i++) {
            const ParamTensor *t = &model->layout.tensors[i];
            size_t n = t->file_rows * t->cols;
            float *values = xmalloc(n * sizeof *values);
            gpt2_tensor_get(model, t, which[w], values);
            for (size_t k = 0; k < n; k++) {
                float want = value_at(seed, which[w], i, k);
                differences += memcmp(&values[k], &want, sizeof want) != 0;
            }
            free(values);
        }
    return differences;
}

static TrainState state_at(uint64_t seed, int64_t step) {
    TrainState s = {.step = step, .updates = step - 1, .samples = UINT64_MAX - seed, .seed = 0xfedcba9876543210u + seed, .best_val_loss = 1.0 / 3,
                    .last_val_loss = NAN, .seconds = 1234.5678901234567};
    MonitorWindow *windows[2] = {&s.monitor.loss, &s.monitor.norm};
    for (int w = 0; w < 2; w++) {
        for (int i = 0; i < MONITOR_WINDOW; i++) windows[w]->values[i] = value_at(seed, 10 + w, 0, (size_t)i);
        windows[w]->n = 101 + (uint32_t)w;
        windows[w]->next = 17 + (uint32_t)w;
    }
    s.monitor.nonfinite_in_row = 3, s.monitor.nonfinite_total = 5, s.monitor.spikes_total = INT64_MAX;
    s.monitor.spikes_in_row = 7, s.last_val_step = step - 2;
    return s;
}

static bool save(const char *run, const GPT2 *model, uint64_t seed, int64_t step, Error *e) {
    TrainState s = state_at(seed, step);
    RunIdentity id = identity();
    return checkpoint_save(run, model, &s, &id, e);
}

/* A run directory of its own with checkpoints filled from seed = step. */
static char *run_with(const char *name, const int64_t *steps, int n) {
    char *run = path_join(root, name);
    Error e = {0};
    GPT2 model = tiny();
    path_remove_tree(run, NULL);
    for (int i = 0; i < n; i++) {
        model_fill(&model, (uint64_t)steps[i]);
        EXPECT(save(run, &model, (uint64_t)steps[i], steps[i], &e), "%s", e.text);
    }
    gpt2_destroy(&model);
    return run;
}

static char *step_dir(const char *run, int64_t step) { return xasprintf("%s/step_%08lld", run, (long long)step); }

/* Loads a checkpoint and compares every value with what seed gives. */
static void expect_loads(const char *dir, uint64_t seed, int64_t step) {
    GPT2 model = tiny();
    TrainState s, want = state_at(seed, step);
    RunIdentity id = identity();
    Error e = {0};
    model_fill(&model, 999);
    memset(&s, 0x55, sizeof s);
    memset(id.run_id, 'x', 32);
    EXPECT(checkpoint_load(dir, &model, &s, &id, NULL, &e), "%s", e.text);
    EXPECT(model_differences(&model, seed) == 0, "%zu values of %s differ", model_differences(&model, seed), dir);
    EXPECT(isnan(s.last_val_loss) && !memcmp(&s, &want, offsetof(TrainState, last_val_loss)) && s.seconds == want.seconds);
    EXPECT(!strcmp(id.run_id, RUN_ID));
    gpt2_destroy(&model);
}

static bool hidden_left(const char *run) {
    char *command = xasprintf("ls -A '%s' | grep -q '^\\.'", run);
    bool found = system(command) == 0;
    free(command);
    return found;
}

/* The newest valid checkpoint is one of the allowed and holds the right values. */
static void expect_newest(const char *run, const int64_t steps[2], const uint64_t seeds[2], const char *when) {
    char path[4096];
    Error e = {0};
    TrainState s;
    json_t *json;
    char run_id[33];
    bool found = checkpoint_newest(run, path, NULL, &e) && state_read(path, &json, &s, run_id, &e);
    EXPECT(found, "%s: %s", when, e.text);
    if (!found) return;
    json_decref(json);
    int which = s.step == steps[1] && s.samples == UINT64_MAX - seeds[1];
    EXPECT(which || (s.step == steps[0] && s.samples == UINT64_MAX - seeds[0]), "%s: newest is step %lld", when, (long long)s.step);
    expect_loads(path, seeds[which], steps[which]);
}

static void fixture_start(void) {
    snprintf(root, sizeof root, "%s/llmc_ckpt_XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
    if (!mkdtemp(root)) {
        perror(root);
        exit(1);
    }
}

static int fixture_end(void) {
    path_remove_tree(root, NULL);
    return test_done();
}
#endif
