/* The whole model against its references, on every backend in the build: logits, loss, every gradient and ten AdamW steps against
 * goldens recorded from PyTorch in float64 (dev/reference/record_gpt2.py says what is in the file), a model saved by Hugging Face's
 * transformers, what may not change a bit, and what a non-finite step must leave alone. Single ops are tested in dev/test.
 * test_gpt2 --export DIR FILE writes a model as a Hugging Face directory and its logits, for dev/test/test_hf.sh.
 * Run from the repository root. Plain C that a C++ compiler also takes. */
#include "dev/test/backends.h"
#include "llmc/run/checkpoint.h"
#include "llmc/run/safetensors.h"
#include "llmc/train.h"
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif

static const char golden_path[] = "dev/test/golden/gpt2_tiny.safetensors";
static const char hf_dir[] = "dev/test/golden/hf_tiny", hf_golden_path[] = "dev/test/golden/gpt2_hf.safetensors";

static Backend *be; /* the backend under test */
static bool low_precision(void) { return be->elem_bytes == 2; }
static bool is_cpu(void) { return strcmp(be->name, "cpu") == 0; }
static bool is_gpu(void) { return strncmp(be->name, "cuda", 4) == 0; } /* emulated ones are slow: their runs are short */

static void need(bool ok, const Error *e) {
    if (ok) return;
    printf("FAILED %s: %s\n", test_name, e->text);
    exit(1);
}

/* ---- goldens ------------------------------------------------------------------------------------------------------ */

typedef struct {
    size_t n, n_bounds;
    float *exact, *bound;     /* bound: one per n / n_bounds consecutive elements; NULL when the tensor is an input */
} Golden;

static float *golden_values(const StFile *f, const char *name, size_t *n) {
    Error e = {0, ""};
    const StTensor *t = st_find(f, name);
    if (!t) return NULL;
    *n = (size_t)(t->end - t->begin) / sizeof(float);
    float *values = (float *)xmalloc(*n * sizeof(float));
    need(st_read_f32(f, t, values, &e), &e);
    return values;
}

static Golden golden_get(const StFile *f, const char *name) {
    char bound_name[100];
    Golden g = {0, 0, NULL, NULL};
    snprintf(bound_name, sizeof bound_name, "%s/%s", low_precision() ? "bound_bf16" : "bound", name);
    g.exact = golden_values(f, name, &g.n);
    g.bound = golden_values(f, bound_name, &g.n_bounds);
    CHECK(g.exact, "%s: no tensor %s", f->path, name);
    return g;
}

static void golden_free(Golden *g) {
    free(g->exact);
    free(g->bound);
}

/* DESIGN.md decision 13: |ours - exact| <= 2 |plain PyTorch of our compute type - exact| + rounding. Rounding: half a unit of the output,
 * which is float32 in any case, and half of the recorded value. */
static double allowed(const Golden *g, size_t i) {
    return 2 * (double)g->bound[i * g->n_bounds / g->n] + ldexp(fabs((double)g->exact[i]), -23);
}

typedef struct {
    size_t beyond;            /* elements beyond the allowed error; NaN is one */
    double error, limit;      /* of the element that comes closest to its limit or exceeds it most */
} Difference;

static Difference compare(const float *ours, const Golden *g) {
    Difference d = {0, 0, 0};
    double worst = -1;
    for (size_t i = 0; i < g->n; i++) {
        double error = fabs((double)ours[i] - (double)g->exact[i]), limit = allowed(g, i);
        double ratio = error <= limit ? (limit > 0 ? error / limit : 0) : isnan(error) ? (double)INFINITY : error / limit;
        if (!(error <= limit)) d.beyond++;
        if (ratio > worst) worst = ratio, d.error = error, d.limit = limit;
    }
    return d;
}

/* The test of the test: a copy with one element moved by 5 % of the tensor's largest value (bf16: or twice the limit, where that is more), or
 * NaN, is reported, once. */
static void expect_corruption_found(const char *name, const float *ours, const Golden *g) {
    float *copy = (float *)xmalloc(g->n * sizeof(float)), largest = 0;
    for (size_t i = 0; i < g->n; i++) largest = fmaxf(largest, fabsf(g->exact[i]));
    const size_t places[] = {0, g->n / 2, g->n - 1};
    for (int k = 0; k < 6; k++) {
        size_t i = places[k % 3];
        memcpy(copy, ours, g->n * sizeof(float));
        float move = low_precision() ? fmaxf(0.05f * largest, 2.01f * (float)allowed(g, i)) : 0.05f * largest;
        copy[i] = k < 3 ? copy[i] + (copy[i] < g->exact[i] ? -move : move) : NAN;
        EXPECT(compare(copy, g).beyond == 1, "%s: element %zu of %zu became %g, was %g, and passes", name, i, g->n, (double)copy[i], (double)ours[i]);
    }
    free(copy);
}

static void expect_golden(const StFile *f, const char *name, const float *ours, size_t n) {
    Golden g = golden_get(f, name);
    EXPECT(g.n == n && g.bound, "%s: golden has %zu elements, ours %zu", name, g.n, n);
    if (g.n == n && g.bound) {
        Difference d = compare(ours, &g);
        printf("  %-36s error %9.3e  limit %9.3e\n", name, d.error, d.limit);
        EXPECT(d.beyond == 0, "%s: %zu of %zu elements beyond their limit; worst error %g, limit %g", name, d.beyond, n, d.error, d.limit);
        if (d.beyond == 0) expect_corruption_found(name, ours, &g);
    }
    golden_free(&g);
}

/* ---- the tiny model of the goldens -------------------------------------------------------------------------------- */

enum { B = 4, T = 19, N = B * T, STEPS = 10 };

static uint32_t mix32(uint32_t x) {
    x ^= x >> 16;
    x *= 0x85EBCA6Bu;
    x ^= x >> 13;
    x *= 0xC2B2AE35u;
    return x ^ (x >> 16);
}

/* The formula in record_gpt2.py. */
static void formula_weights(GPT2 *model) {
    for (size_t k = 0; k < model->layout.n_tensors; k++) {
        const ParamTensor *t = &model->layout.tensors[k];
        size_t n = t->file_rows * t->cols;
        double centre = t->init == '1' ? 1.0 : 0.0, spread = t->id == PARAM_wpe || (!t->decay && t->init == '0') ? 0.125 : 0.25;
        float *values = (float *)xmalloc(n * sizeof(float));
        for (size_t i = 0; i < n; i++)
            values[i] = (float)(centre + spread * ((double)(mix32((uint32_t)(i + 0x9E3779B9u * (uint32_t)(k + 1))) >> 8) / 8388608.0 - 1.0));
        gpt2_tensor_set(model, t, PARAM_MASTER, values);
        free(values);
    }
    gpt2_params_changed(model);
}

typedef struct {
    StFile file;
    GPT2 model;
    Acts acts;                /* for training: Bm x T, policy keep */
    Trainer trainer;
    int32_t tokens[N], targets[N];
    int32_t train[STEPS][B][T + 1], train_in[STEPS][N], train_out[STEPS][N];
    float lr[STEPS];
    StepParams step;
} Tiny;

static void load_ids(const StFile *f, const char *name, int32_t *ids, size_t n) {
    size_t count = 0;
    float *values = golden_values(f, name, &count);
    CHECK(values && count == n, "%s: %zu values, expected %zu", name, count, n);
    for (size_t i = 0; i < n; i++) ids[i] = (int32_t)values[i];
    free(values);
}

static void tiny_data(Tiny *t) {
    load_ids(&t->file, "tokens", t->tokens, N);
    load_ids(&t->file, "targets", t->targets, N);
    load_ids(&t->file, "train_tokens", &t->train[0][0][0], (size_t)STEPS * B * (T + 1));
    for (size_t s = 0; s < STEPS; s++)
        for (size_t b = 0; b < B; b++)
            for (size_t i = 0; i < T; i++) {
                t->train_in[s][b * T + i] = t->train[s][b][i];
                t->train_out[s][b * T + i] = t->train[s][b][i + 1];
            }
    Golden lr = golden_get(&t->file, "train_lr"), adamw = golden_get(&t->file, "adamw");
    memcpy(t->lr, lr.exact, sizeof t->lr);
    memset(&t->step, 0, sizeof t->step);
    t->step.beta1 = adamw.exact[0], t->step.beta2 = adamw.exact[1], t->step.eps = adamw.exact[2];
    t->step.weight_decay = adamw.exact[3], t->step.grad_clip = adamw.exact[4];
    t->step.loss_limit = t->step.norm_limit = INFINITY;
    golden_free(&lr);
    golden_free(&adamw);
}

static Tiny *tiny_create(size_t micro, Keep keep) {
    Error e = {0, ""};
    Tiny *t = (Tiny *)xcalloc(1, sizeof *t);
    need(st_open(&t->file, golden_path, &e), &e);
    Golden c = golden_get(&t->file, "config");
    GPT2Config config = {(size_t)c.exact[0], 0, (size_t)c.exact[1], (size_t)c.exact[2], (size_t)c.exact[3], (size_t)c.exact[4]};
    golden_free(&c);
    need(gpt2_config_check(&config, &e), &e);
    need(gpt2_create(&t->model, be, &config, true, &e), &e);
    formula_weights(&t->model);
    need(gpt2_acts_create(&t->acts, &t->model, micro, T, keep, true, &e), &e);
    need(trainer_create(&t->trainer, &t->model, &t->acts, &e), &e);
    tiny_data(t);
    return t;
}

static void tiny_free(Tiny *t) {
    trainer_destroy(&t->trainer);
    gpt2_acts_destroy(&t->acts, &t->model);
    gpt2_destroy(&t->model);
    st_close(&t->file);
    free(t);
}

/* The flat arrays are compared whole, gaps included: they hold zeros for ever. */
static float *flat_copy(const Tiny *t, int which) {
    const float *from[] = {t->model.master.p, t->model.grads.p, t->model.m.p, t->model.v.p};
    size_t bytes = t->model.layout.n_elements * sizeof(float);
    float *copy = (float *)xmalloc(bytes);
    be->download(be, copy, from[which], bytes);
    return copy;
}

typedef struct {
    const Tiny *t;
    size_t s;
} StepData;
static bool next_micro(void *context, size_t i, const int32_t **tokens, const int32_t **targets) {
    const StepData *d = (const StepData *)context;
    size_t first = i * d->t->acts.B * T;
    *tokens = d->t->train_in[d->s] + first;
    *targets = d->t->train_out[d->s] + first;
    return true;
}

/* Optimizer step s on the golden's data of step `data`. */
static StepResult tiny_step_on(Tiny *t, size_t s, size_t data) {
    StepData d = {t, data % STEPS};
    StepParams p = t->step;
    p.lr = t->lr[s % STEPS];
    p.step = (int64_t)s;
    return train_step(&t->trainer, &p, B / t->acts.B, next_micro, &d);
}
static StepResult tiny_step(Tiny *t, size_t s) { return tiny_step_on(t, s, s); }

/* What a run leaves: loss and norm of each step, gradients of the last one, weights and moments. */
typedef struct {
    StepResult results[200];
    float *state[4];
    size_t bytes, n_steps;
} Trace;

static Trace trace_of(Tiny *t, size_t n_steps, void (*between)(Tiny *)) {
    Trace r;
    memset(&r, 0, sizeof r);
    r.n_steps = n_steps;
    for (size_t s = 0; s < n_steps; s++) {
        r.results[s] = tiny_step(t, s);
        if (between) between(t);
    }
    r.bytes = t->model.layout.n_elements * sizeof(float);
    for (int which = 0; which < 4; which++) r.state[which] = flat_copy(t, which);
    return r;
}

/* A run of its own, from the initial weights. */
static Trace trace_run(size_t micro, Keep keep, size_t n_steps, void (*between)(Tiny *)) {
    Tiny *t = tiny_create(micro, keep);
    Trace r = trace_of(t, n_steps, between);
    tiny_free(t);
    return r;
}

static void trace_free(Trace *r) {
    for (int which = 0; which < 4; which++) free(r->state[which]);
}

static bool same_bits(const void *a, const void *b, size_t bytes) { return memcmp(a, b, bytes) == 0; }

static size_t n_differing(const float *a, const float *b, size_t n) {
    size_t count = 0;
    for (size_t i = 0; i < n; i++) count += memcmp(&a[i], &b[i], sizeof(float)) != 0;
    return count;
}

static void expect_same_trace(const char *what, const Trace *a, const Trace *b) {
    static const char *const names[] = {"weights", "gradients", "first moments", "second moments"};
    for (size_t s = 0; s < a->n_steps; s++)
        EXPECT(same_bits(&a->results[s].loss, &b->results[s].loss, 4) && same_bits(&a->results[s].grad_norm, &b->results[s].grad_norm, 4),
               "%s: step %zu: loss %.9g and %.9g, norm %.9g and %.9g", what, s, (double)a->results[s].loss, (double)b->results[s].loss,
               (double)a->results[s].grad_norm, (double)b->results[s].grad_norm);
    for (int which = 0; which < 4; which++)
        EXPECT(same_bits(a->state[which], b->state[which], a->bytes), "%s: %zu of %zu %s differ", what,
               n_differing(a->state[which], b->state[which], a->bytes / 4), a->bytes / 4, names[which]);
}

/* ---- against PyTorch ---------------------------------------------------------------------------------------------- */

/* Logits of every row by a forward without targets, loss by one with. */
static void expect_logits_and_loss(GPT2 *model, const StFile *f, size_t batch, size_t length, const int32_t *tokens, const int32_t *targets) {
    Error e = {0, ""};
    Acts acts;
    size_t rows = batch * length, V = model->config.V, counted = 0;
    need(gpt2_acts_create(&acts, model, batch, length, KEEP_NONE, false, &e), &e);
    Stat scratch = {(float *)be->alloc(be, MEM_OTHER, "logits", V * sizeof(float), &e)};
    float *logits = (float *)xmalloc(rows * V * sizeof(float)), *losses = (float *)xmalloc(rows * sizeof(float));
    gpt2_forward(model, &acts, tokens, NULL);
    for (size_t row = 0; row < rows; row++) gpt2_logits(model, &acts, row, scratch, logits + row * V);
    expect_golden(f, "logits", logits, rows * V);
    gpt2_forward(model, &acts, tokens, targets);
    be->download(be, losses, acts.losses.p, rows * sizeof(float));
    double sum = 0;
    for (size_t i = 0; i < rows; i++) {
        sum += (double)losses[i];
        counted += targets[i] >= 0;
        EXPECT(targets[i] >= 0 || losses[i] == 0, "row %zu is ignored and has loss %g", i, (double)losses[i]);
    }
    float loss = (float)(sum / (double)counted);
    expect_golden(f, "loss", &loss, 1);
    free(losses);
    free(logits);
    be->release(be, scratch.p);
    gpt2_acts_destroy(&acts, model);
}

TEST(logits_and_loss) {
    Tiny *t = tiny_create(B, KEEP_ALL);
    expect_logits_and_loss(&t->model, &t->file, B, T, t->tokens, t->targets);
    tiny_free(t);
}

static void expect_tensor(Tiny *t, size_t i, int which, const char *prefix) {
    const ParamTensor *p = &t->model.layout.tensors[i];
    char name[64];
    size_t n = p->file_rows * p->cols;
    float *values = (float *)xmalloc(n * sizeof(float));
    snprintf(name, sizeof name, "%s/%s", prefix, p->name);
    gpt2_tensor_get(&t->model, p, which, values);
    expect_golden(&t->file, name, values, n);
    free(values);
}

/* Each row's logits once more, by a decoder: a prompt of `prompt` tokens, then token by token. Rows inside the prompt come from shorter ones. */
TEST(decoded_logits) {
    Tiny *t = tiny_create(B, KEEP_ALL);
    Error e = {0, ""};
    size_t V = t->model.config.V;
    float *logits = (float *)xmalloc(N * V * sizeof(float));
    for (size_t b = 0; b < B; b++) {
        const size_t prompts[B] = {1, 5, T - 1, T};
        for (size_t prompt = 1; prompt <= prompts[b]; prompt++) {
            Decoder d;
            need(gpt2_decoder_create(&d, &t->model, T, prompt, &e), &e);
            for (size_t n = prompt; n <= T; n++) gpt2_decode(&t->model, &d, t->tokens + b * T + d.length, n - d.length, logits + (b * T + n - 1) * V);
            gpt2_decoder_destroy(&d, &t->model);
        }
    }
    expect_golden(&t->file, "logits", logits, N * V);
    free(logits);
    tiny_free(t);
}

TEST(gradients) {
    Tiny *t = tiny_create(B, KEEP_ALL);
    size_t counted = 0;
    for (size_t i = 0; i < N; i++) counted += t->targets[i] >= 0;
    gpt2_forward_backward(&t->model, &t->acts, t->tokens, t->targets, (float)(1.0 / (double)counted));
    for (size_t i = 0; i < t->model.layout.n_tensors; i++) expect_tensor(t, i, PARAM_GRAD, "grad");
    tiny_free(t);
}

/* The golden's ten steps, in micro-batches of `micro` sequences. */
static void expect_ten_steps(size_t micro) {
    Tiny *t = tiny_create(micro, KEEP_ALL);
    float losses[STEPS], norms[STEPS];
    for (size_t s = 0; s < STEPS; s++) {
        StepResult r = tiny_step(t, s);
        losses[s] = r.loss;
        norms[s] = r.grad_norm;
        EXPECT(r.skip == SKIP_NONE && r.updates == (int64_t)s + 1, "step %zu: skip %d, updates %lld", s, r.skip, (long long)r.updates);
    }
    expect_golden(&t->file, "train_loss", losses, STEPS);
    expect_golden(&t->file, "train_norm", norms, STEPS);
    for (size_t i = 0; i < t->model.layout.n_tensors; i++) expect_tensor(t, i, PARAM_MASTER, "trained");
    tiny_free(t);
}

TEST(ten_adamw_steps) { expect_ten_steps(B); }
TEST(ten_adamw_steps_accumulated_by_2) { expect_ten_steps(B / 2); }
TEST(ten_adamw_steps_accumulated_by_4) { expect_ten_steps(B / 4); }

/* A golden tensor that nobody looks at proves nothing: each one in the file is an input or compared above. */
TEST(golden_is_used_whole) {
    Tiny *t = tiny_create(B, KEEP_ALL);
    size_t compared = 4;      /* logits, loss, train_loss, train_norm */
    compared += 2 * t->model.layout.n_tensors;
    size_t bounds = 0;        /* of both compute types */
    for (size_t i = 0; i < t->file.n; i++) bounds += strncmp(t->file.tensors[i].name, "bound", 5) == 0;
    EXPECT(bounds == 2 * compared && t->file.n == 3 * compared + 6, "%zu tensors, %zu bounds, %zu compared", t->file.n, bounds, compared);
    tiny_free(t);
}

/* ---- against Hugging Face transformers ----------------------------------------------------------------------------- */

TEST(hf_import) {
    Error e = {0, ""};
    StFile f;
    GPT2Config config;
    GPT2 model;
    need(st_open(&f, hf_golden_path, &e), &e);
    need(import_config(hf_dir, &config, &e), &e);
    need(gpt2_create(&model, be, &config, false, &e), &e);
    need(import_weights(hf_dir, &model, &e), &e);
    const StTensor *shape = st_find(&f, "tokens");
    size_t batch = (size_t)shape->shape[0], length = (size_t)shape->shape[1], n = batch * length;
    int32_t *tokens = (int32_t *)xmalloc(2 * n * sizeof(int32_t)), *targets = tokens + n;
    load_ids(&f, "tokens", tokens, n);
    for (size_t i = 0; i < n; i++) targets[i] = (i + 1) % length ? tokens[i + 1] : -1;
    expect_logits_and_loss(&model, &f, batch, length, tokens, targets);
    free(tokens);
    gpt2_destroy(&model);
    st_close(&f);
}

/* ---- what may not change a bit ------------------------------------------------------------------------------------- */

TEST(recompute_policies_same_bits) {
    Trace keep_all = trace_run(B, KEEP_ALL, 5, NULL);
    const Keep others[] = {KEEP_NO_GELU, KEEP_RESIDUAL};
    for (int i = be->gelu_rounds_first ? 0 : 1; i < 2; i++) { /* a fused GELU is of the unrounded sum, which is not kept */
        Trace r = trace_run(B, others[i], 5, NULL);
        expect_same_trace(i ? "block" : "gelu", &keep_all, &r);
        trace_free(&r);
    }
    trace_free(&keep_all);
}

/* P20 */
TEST(two_runs_of_200_steps_same_bits) {
    size_t steps = is_cpu() || is_gpu() ? 200 : 12;
    Trace a = trace_run(B, KEEP_ALL, steps, NULL), b = trace_run(B, KEEP_ALL, steps, NULL);
    expect_same_trace("second run", &a, &b);
    EXPECT(steps < 200 || a.results[199].loss < 0.5f * a.results[0].loss, "the model does not learn 40 sequences by heart: loss %g, then %g",
           (double)a.results[0].loss, (double)a.results[199].loss);
    trace_free(&a);
    trace_free(&b);
}

/* ---- stretches that are recorded and replayed ---- */

static bool (*own_replay)(Backend *, uint64_t key);
static void (*own_record_end)(Backend *, uint64_t key);
static size_t n_replayed;
static bool counted_replay(Backend *b, uint64_t key) {
    bool done = own_replay(b, key);
    n_replayed += done;
    return done;
}
static bool never_replay(Backend *b, uint64_t key) { (void)b, (void)key; return false; }
static void never_record(Backend *b, uint64_t key) { (void)b, (void)key; }

static void set_replay(bool (*replay)(Backend *, uint64_t), void (*record_end)(Backend *, uint64_t)) {
    own_replay = be->replay, own_record_end = be->record_end;
    be->replay = replay, be->record_end = record_end;
}
static void restore_replay(void) { be->replay = own_replay, be->record_end = own_record_end; }

TEST(replayed_and_issued_same_bits) {
    n_replayed = 0;
    set_replay(counted_replay, be->record_end);
    Trace replayed = trace_run(B / 2, KEEP_ALL, 8, NULL);
    restore_replay();
    set_replay(never_replay, never_record);
    Trace issued = trace_run(B / 2, KEEP_ALL, 8, NULL);
    restore_replay();
    printf("  %zu stretches of 24 were replayed\n", n_replayed);
    expect_same_trace("every op issued", &replayed, &issued);
    trace_free(&replayed);
    trace_free(&issued);
}

/* ---- saved, loaded, continued ---- */

/* Steps 4 to 6 of a run that goes on from a checkpoint of step 3, against the run that was not interrupted, with either rounding of the
 * parameters: their bits too. */
static void expect_resumed(int rounding) {
    Error e = {0, ""};
    char dir[300];
    RunIdentity id;
    TrainState state, found;
    snprintf(dir, sizeof dir, "%s/llmc_gpt2_XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
    CHECK(mkdtemp(dir), "%s", dir);
    memset(&id, 0, sizeof id);
    memset(&state, 0, sizeof state);
    memset(id.run_id, 'a', 32);
    Tiny *whole = tiny_create(B, KEEP_ALL), *resumed = tiny_create(B, KEEP_ALL);
    whole->step.rounding = resumed->step.rounding = rounding;
    whole->step.seed = resumed->step.seed = 77;
    for (size_t s = 0; s < 3; s++) state.updates = tiny_step(whole, s).updates;
    state.step = 3;
    need(checkpoint_save(dir, &whole->model, &state, &id, &e), &e);
    char *path = xasprintf("%s/step_00000003", dir);
    need(checkpoint_load(path, &resumed->model, &found, &id, NULL, &e), &e);
    gpt2_params_rounded(&resumed->model, rounding, 77, found.updates);
    trainer_set_updates(&resumed->trainer, found.updates);
    size_t bytes = whole->model.layout.n_elements * be->elem_bytes;
    char *params[2] = {(char *)xmalloc(bytes), (char *)xmalloc(bytes)};
    be->download(be, params[0], whole->model.params.p, bytes);
    be->download(be, params[1], resumed->model.params.p, bytes);
    EXPECT(same_bits(params[0], params[1], bytes), "rounding %d: parameters differ after loading", rounding);
    for (size_t s = 3; s < 6; s++) {
        StepResult a = tiny_step(whole, s), b = tiny_step(resumed, s);
        EXPECT(same_bits(&a.loss, &b.loss, 4) && same_bits(&a.grad_norm, &b.grad_norm, 4), "rounding %d, step %zu: loss %.9g, %.9g", rounding, s,
               (double)a.loss, (double)b.loss);
    }
    for (int which = 0; which < 4; which++) {
        float *a = flat_copy(whole, which), *b = flat_copy(resumed, which);
        EXPECT(same_bits(a, b, whole->model.layout.n_elements * sizeof(float)), "rounding %d: array %d differs", rounding, which);
        free(a), free(b);
    }
    need(path_remove_tree(dir, &e), &e);
    free(params[0]), free(params[1]), free(path);
    tiny_free(whole);
    tiny_free(resumed);
}
TEST(resumed_run_same_bits) {
    expect_resumed(ROUND_NEAREST);
    expect_resumed(ROUND_STOCHASTIC);
}

TEST(results_collected_late_same_bits) {
    Trace at_once = trace_run(B, KEEP_ALL, 9, NULL);
    Tiny *t = tiny_create(B, KEEP_ALL);
    for (size_t s = 0; s <= 9; s++) {
        StepData d = {t, s % STEPS};
        StepParams p = t->step;
        p.lr = t->lr[s % STEPS], p.step = (int64_t)s;
        if (s < 9) EXPECT(train_issue(&t->trainer, &p, 1, next_micro, &d), "step %zu is given up", s);
        if (s == 0) continue;
        StepResult r = train_result(&t->trainer), *want = &at_once.results[s - 1];
        EXPECT(same_bits(&r.loss, &want->loss, 4) && same_bits(&r.grad_norm, &want->grad_norm, 4) && r.updates == (int64_t)s, "step %zu: loss %.9g, %.9g",
               s - 1, (double)r.loss, (double)want->loss);
    }
    float *weights = flat_copy(t, PARAM_MASTER);
    EXPECT(same_bits(weights, at_once.state[PARAM_MASTER], at_once.bytes), "weights differ");
    free(weights);
    tiny_free(t);
    trace_free(&at_once);
}

static void validate(Tiny *t) {
    Error e = {0, ""};
    Acts acts;
    need(gpt2_acts_create(&acts, &t->model, 2, T - 3, KEEP_NONE, false, &e), &e);
    gpt2_forward(&t->model, &acts, t->tokens, t->tokens + 1);
    gpt2_acts_destroy(&acts, &t->model);
}

TEST(validation_does_not_touch_training) {
    Trace off = trace_run(B, KEEP_ALL, 8, NULL), on = trace_run(B, KEEP_ALL, 8, validate);
    expect_same_trace("with validation", &off, &on);
    trace_free(&off);
    trace_free(&on);
}

/* What an op computes row by row has the same bits in any batch, so the loss before the first update has. Gradients have not: each
 * micro-batch adds its own sum over rows (in runs of 256, biases and norms in double) to the float32 accumulator, which rounds there. They
 * are held to the goldens above. OpenBLAS does not promise the bits of a row either. */
TEST(rows_do_not_depend_on_the_micro_batch) {
    if (!is_cpu() || cpu_gemm_uses_blas()) SKIP("%s chooses its order of summation by the shape", is_cpu() ? "OpenBLAS" : be->name);
    float losses[3][N];
    for (size_t k = 0; k < 3; k++) {
        size_t micro = (size_t)B >> k;
        Tiny *t = tiny_create(micro, KEEP_ALL);
        for (size_t i = 0; i < B / micro; i++) {
            gpt2_forward_backward(&t->model, &t->acts, t->tokens + i * micro * T, t->targets + i * micro * T, 1.0f);
            be->download(be, losses[k] + i * micro * T, t->acts.losses.p, micro * T * sizeof(float));
        }
        tiny_free(t);
        EXPECT(same_bits(losses[k], losses[0], sizeof losses[0]), "micro-batches of %zu: %zu of %d losses differ", micro, n_differing(losses[k], losses[0], N), N);
    }
}

#ifdef _OPENMP
TEST(one_thread_or_three_same_bits) {
    if (!is_cpu()) SKIP("the host's threads do not compute");
    if (cpu_gemm_uses_blas()) SKIP("OpenBLAS divides its sums by the number of threads");
    int before = omp_get_max_threads();
    omp_set_num_threads(1);
    Trace one = trace_run(B, KEEP_ALL, 5, NULL);
    for (int n = 2; n <= 3; n++) {
        omp_set_num_threads(n);
        Trace r = trace_run(B, KEEP_ALL, 5, NULL);
        expect_same_trace(n == 2 ? "2 threads" : "3 threads", &one, &r);
        trace_free(&r);
    }
    omp_set_num_threads(before);
    trace_free(&one);
}
#endif

/* ---- marks ---------------------------------------------------------------------------------------------------------- */

/* The marks are put to the use that sharding makes of them: parameters arrive at PARAMS_NEEDED, gradients leave at GRADS_FINAL. */
static struct {
    Tiny *t;
    char *params;             /* what to deliver */
    float *grads;             /* what was taken away */
    size_t n_marks, units[64];
    Mark kinds[64];
} marks;

static size_t unit_elements(const ParamLayout *l, size_t unit) { return l->unit_begin[unit + 1] - l->unit_begin[unit]; }

static void deliver_and_collect(Backend *b, Mark mark, size_t unit) {
    GPT2 *model = &marks.t->model;
    size_t begin = model->layout.unit_begin[unit], n = unit_elements(&model->layout, unit);
    if (marks.n_marks < 64) marks.kinds[marks.n_marks] = mark, marks.units[marks.n_marks] = unit;
    marks.n_marks++;
    size_t elem = b->elem_bytes;
    if (mark == MARK_PARAMS_NEEDED) b->upload(b, (char *)model->params.p + begin * elem, marks.params + begin * elem, n * elem);
    else b->download(b, marks.grads + begin, model->grads.p + begin, n * sizeof(float));
}

/* With other marks than the backend's own, which no recording knows: every op is then issued. */
static void (*own_mark)(Backend *, Mark, size_t);
static void set_mark(void (*mark)(Backend *, Mark, size_t)) {
    own_mark = be->mark;
    be->mark = mark;
    set_replay(never_replay, never_record);
}
static void restore_mark(void) {
    be->mark = own_mark;
    restore_replay();
}

TEST(marks_once_each_in_order_and_true) {
    Tiny *t = tiny_create(B, KEEP_ALL);
    size_t n = t->model.layout.n_elements, units = t->model.layout.n_units;
    gpt2_forward_backward(&t->model, &t->acts, t->tokens, t->targets, 1.0f);
    float *wanted = flat_copy(t, PARAM_GRAD);
    char *poison = (char *)xmalloc(n * be->elem_bytes);
    memset(poison, 0xFF, n * be->elem_bytes); /* NaN in either type */
    memset(&marks, 0, sizeof marks);
    marks.t = t, marks.params = (char *)xmalloc(n * be->elem_bytes), marks.grads = flat_copy(t, PARAM_GRAD);
    be->download(be, marks.params, t->model.params.p, n * be->elem_bytes);
    be->upload(be, t->model.params.p, poison, n * be->elem_bytes);
    be->fill_zero(be, t->model.grads.p, n * sizeof(float));
    set_mark(deliver_and_collect);
    gpt2_forward_backward(&t->model, &t->acts, t->tokens, t->targets, 1.0f);
    restore_mark();
    EXPECT(same_bits(marks.grads, wanted, n * sizeof(float)), "gradients taken at GRADS_FINAL: %zu of %zu differ from the whole pass", n_differing(marks.grads, wanted, n), n);
    EXPECT(marks.n_marks == 2 * units, "%zu marks for %zu units", marks.n_marks, units);
    for (size_t i = 0; i < units && marks.n_marks == 2 * units; i++) {
        EXPECT(marks.kinds[i] == MARK_PARAMS_NEEDED && marks.units[i] == i, "mark %zu is of kind %d, unit %zu", i, (int)marks.kinds[i], marks.units[i]);
        EXPECT(marks.kinds[units + i] == MARK_GRADS_FINAL && marks.units[units + i] == units - 1 - i, "mark %zu is of kind %d, unit %zu",
               units + i, (int)marks.kinds[units + i], marks.units[units + i]);
    }
    free(wanted);
    free(poison);
    free(marks.params);
    free(marks.grads);
    tiny_free(t);
}

/* ---- P15: a non-finite step changes nothing -------------------------------------------------------------------------- */

static struct {
    Tiny *t;
    float value;
    size_t element;           /* of the gradients; SIZE_MAX: of the losses */
} injection;

static void inject(Backend *b, Mark mark, size_t unit) {
    if (mark != MARK_GRADS_FINAL || unit != 0) return;
    float *to = injection.element == SIZE_MAX ? injection.t->acts.losses.p + N - 1 : injection.t->model.grads.p + injection.element;
    b->upload(b, to, &injection.value, sizeof(float));
}

static StepResult injected_step(Tiny *t, size_t s, size_t element, float value) {
    injection.t = t, injection.value = value, injection.element = element;
    set_mark(inject);
    StepResult r = tiny_step(t, s);
    restore_mark();
    return r;
}

static void expect_unharmed(Tiny *t, float *const before[4], const char *what) {
    size_t n = t->model.layout.n_elements;
    for (int which = 0; which < 4; which++) {
        if (which == PARAM_GRAD) continue;
        float *now = flat_copy(t, which);
        EXPECT(same_bits(now, before[which], n * sizeof(float)), "%s: array %d changed in %zu places", what, which, n_differing(now, before[which], n));
        free(now);
    }
}

TEST(nonfinite_step_changes_nothing) {
    Tiny *t = tiny_create(B, KEEP_ALL);
    const float values[] = {NAN, INFINITY, -INFINITY};
    tiny_step(t, 0);
    float *before[4];
    for (int which = 0; which < 4; which++) before[which] = flat_copy(t, which);
    for (size_t unit = 0; unit <= t->model.layout.n_units; unit++)
        for (int k = 0; k < 3; k++) {
            size_t element = unit < t->model.layout.n_units ? t->model.layout.unit_begin[unit] + 1 : SIZE_MAX;
            StepResult r = injected_step(t, 1, element, values[k]);
            EXPECT(r.skip == SKIP_NONFINITE && r.updates == 1, "%g in unit %zu: skip %d, updates %lld", (double)values[k], unit, r.skip, (long long)r.updates);
            expect_unharmed(t, before, "after an injected step");
        }
    /* The run goes on as if nothing had been. */
    Trace clean = trace_run(B, KEEP_ALL, 2, NULL);
    StepResult r = tiny_step(t, 1);
    EXPECT(same_bits(&r.loss, &clean.results[1].loss, 4) && r.updates == 2, "loss %.9g, expected %.9g", (double)r.loss, (double)clean.results[1].loss);
    expect_unharmed(t, clean.state, "after the step that follows, against a clean run");
    for (int which = 0; which < 4; which++) free(before[which]);
    trace_free(&clean);
    tiny_free(t);
}

TEST(limits_skip_a_step) {
    Tiny *t = tiny_create(B, KEEP_ALL);
    float *before[4];
    StepResult r = tiny_step(t, 0);
    for (int which = 0; which < 4; which++) before[which] = flat_copy(t, which);
    t->step.loss_limit = 0.5f * r.loss;
    r = tiny_step(t, 1);
    EXPECT(r.skip == SKIP_LOSS && r.updates == 1, "skip %d, updates %lld", r.skip, (long long)r.updates);
    t->step.loss_limit = INFINITY;
    t->step.norm_limit = 0.5f * r.grad_norm;
    r = tiny_step(t, 1);
    EXPECT(r.skip == SKIP_NORM && r.updates == 1, "skip %d, updates %lld", r.skip, (long long)r.updates);
    expect_unharmed(t, before, "after steps over a limit");
    t->step.norm_limit = 2 * r.grad_norm;
    r = tiny_step(t, 1);
    EXPECT(r.skip == SKIP_NONE && r.updates == 2, "skip %d, updates %lld", r.skip, (long long)r.updates);
    for (int which = 0; which < 4; which++) free(before[which]);
    tiny_free(t);
}

/* ---- the program ---------------------------------------------------------------------------------------------------- */

static void run_all(const char *name, Backend *backend) {
    const struct { const char *name; void (*run)(void); } tests[] = {
        {"logits_and_loss", test_logits_and_loss}, {"decoded_logits", test_decoded_logits}, {"gradients", test_gradients}, {"ten_adamw_steps", test_ten_adamw_steps},
        {"ten_adamw_steps_accumulated_by_2", test_ten_adamw_steps_accumulated_by_2},
        {"ten_adamw_steps_accumulated_by_4", test_ten_adamw_steps_accumulated_by_4},
        {"golden_is_used_whole", test_golden_is_used_whole}, {"hf_import", test_hf_import},
        {"recompute_policies_same_bits", test_recompute_policies_same_bits},
        {"two_runs_of_200_steps_same_bits", test_two_runs_of_200_steps_same_bits},
        {"replayed_and_issued_same_bits", test_replayed_and_issued_same_bits}, {"resumed_run_same_bits", test_resumed_run_same_bits},
        {"results_collected_late_same_bits", test_results_collected_late_same_bits},
        {"validation_does_not_touch_training", test_validation_does_not_touch_training},
        {"marks_once_each_in_order_and_true", test_marks_once_each_in_order_and_true},
        {"nonfinite_step_changes_nothing", test_nonfinite_step_changes_nothing}, {"limits_skip_a_step", test_limits_skip_a_step},
        {"rows_do_not_depend_on_the_micro_batch", test_rows_do_not_depend_on_the_micro_batch},
#ifdef _OPENMP
        {"one_thread_or_three_same_bits", test_one_thread_or_three_same_bits},
#endif
    };
    be = backend;
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        char full[100];
        snprintf(full, sizeof full, "%s/%s", name, tests[i].name);
        test_run(full, tests[i].run);
    }
    be->destroy(be);
}

/* A model of other proportions than the fixtures, as a Hugging Face directory; FILE gets, as raw little-endian, int32 batch, length, V,
 * the tokens, and float32 logits. */
static int export_for_hf(const char *dir, const char *file) {
    Error e = {0, ""};
    enum { BATCH = 3, LENGTH = 16, VOCAB = 123 };
    GPT2Config config = {VOCAB, 0, 3, 5, 40, LENGTH};
    GPT2 model;
    Acts acts;
    be = cpu_backend_create(&e);
    need(be != NULL, &e);
    need(gpt2_config_check(&config, &e), &e);
    need(gpt2_create(&model, be, &config, false, &e), &e);
    formula_weights(&model);
    need(export_model(dir, &model, NULL, &e), &e);
    need(gpt2_acts_create(&acts, &model, BATCH, LENGTH, KEEP_NONE, false, &e), &e);
    int32_t head[3] = {BATCH, LENGTH, VOCAB}, tokens[BATCH * LENGTH];
    for (size_t i = 0; i < BATCH * LENGTH; i++) tokens[i] = (int32_t)(mix32((uint32_t)i) % VOCAB);
    gpt2_forward(&model, &acts, tokens, NULL);
    Stat scratch = {(float *)be->alloc(be, MEM_OTHER, "logits", VOCAB * sizeof(float), &e)};
    FILE *out = fopen(file, "wb");
    CHECK(out, "cannot write %s", file);
    fwrite(head, sizeof head, 1, out);
    fwrite(tokens, sizeof tokens, 1, out);
    for (size_t row = 0; row < BATCH * LENGTH; row++) {
        float logits[VOCAB];
        gpt2_logits(&model, &acts, row, scratch, logits);
        fwrite(logits, sizeof logits, 1, out);
    }
    fclose(out);
    be->release(be, scratch.p);
    gpt2_acts_destroy(&acts, &model);
    gpt2_destroy(&model);
    be->destroy(be);
    return 0;
}

int main(int argc, char **argv) {
    if (argc == 4 && strcmp(argv[1], "--export") == 0) return export_for_hf(argv[2], argv[3]);
    test_start(argc, argv);
    backends_run_all(run_all);
    return test_done();
}
