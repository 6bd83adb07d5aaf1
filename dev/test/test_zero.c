/* Many ranks train one small model: the same bits with and without sharding, the same losses to rounding for any number of ranks, micro-batch and
 * accumulation (P10), the same decisions (P15, P16), the memory that --dry-run plans, checkpoints that any number of ranks takes up (P11). */
#include "half.h"
#include "llmc/cpu/cpu.h"
#include "llmc/base/io.h"
#include "llmc/dist/nccl.h"
#include "llmc/dist/zero.h"
#include "llmc/run/checkpoint.h"
#include "llmc/train.h"
#include "ranks_kit.h"

enum { G = 24, STEPS_MOST = 200, ELEMENTS = 80000 };
static const GPT2Config shape = {.V = 130, .L = 2, .H = 3, .C = 48, .T = 16};

typedef struct {
    int ranks;
    bool sharded, between_devices; /* the latter: by the twin of NCCL */
    Wire wire;
    const char *backend;          /* cpu, half, emu bf16, emu fp32 */
    int rounding;
    size_t micro, steps, from;    /* micro: samples; from: first step, of a resumed run */
    int nan_rank;                 /* -1: none; else its gradients hold a NaN in step nan_step */
    size_t nan_step;
    int stop_rank;                /* -1: none; asks for an end in step 1, and the others for a checkpoint in steps 1 and 2 */
    const char *load, *save;      /* a checkpoint directory to begin with; a run directory to save into at the end */
} Case;

/* What came of it, without padding, tensor after tensor. */
typedef struct {
    float loss[STEPS_MOST], norm[STEPS_MOST];
    int skip[STEPS_MOST], stop[STEPS_MOST], save[STEPS_MOST];
    int64_t updates[RANKS_MOST];
    float moments[2][ELEMENTS];
    unsigned char params[RANKS_MOST][ELEMENTS * 4];
    size_t optimizer_bytes[RANKS_MOST], master_bytes[RANKS_MOST], planned[MEM_CLASS_COUNT];
    bool skips_differ;
} Outcome;
typedef struct { const Case *c; Outcome *out; } Job;

static Backend *base_backend(const char *name) {
    Error e = {0};
    Backend *b = NULL;
    if (!strcmp(name, "cpu")) b = cpu_backend_create(&e);
    else if (!strcmp(name, "half")) b = half_create(cpu_backend_create(&e));
#ifdef LLMC_EMU
    else b = emu_backend_create(&(CudaOptions){.dtype = name + 4, .attention = "ours", .fuse_gelu = true}, &e);
#endif
    CHECK(b, "%s: %s", name, e.text);
    return b;
}

typedef struct {
    const Case *c;
    GPT2 *model;
    Comm *comm;
    size_t step;
    int32_t tokens[G * 16], targets[G * 16];
} Feed;

/* Token t of sample k of the run is a function of both. The samples of a step are cut by rank, then into micro-batches. */
static int32_t token_at(uint64_t sample, size_t t) { return (int32_t)(rng_u32(5, RNG_DATA, (uint32_t)sample, t / 3) % 130); }
static bool next_micro(void *context, size_t i, const int32_t **tokens, const int32_t **targets) {
    Feed *f = context;
    size_t first = f->step * G + (size_t)f->comm->rank * (G / (size_t)f->comm->size) + i * f->c->micro;
    for (size_t b = 0; b < f->c->micro; b++)
        for (size_t t = 0; t < shape.T; t++) f->tokens[b * shape.T + t] = token_at(first + b, t), f->targets[b * shape.T + t] = token_at(first + b, t + 1);
    float bad = NAN;
    if (f->comm->rank == f->c->nan_rank && f->step == f->c->nan_step) f->model->backend->upload(f->model->backend, f->model->grads.p + 7, &bad, sizeof bad);
    *tokens = f->tokens, *targets = f->targets;
    return true;
}

static void read_out(GPT2 *m, int rank, Outcome *out) {
    Backend *be = m->backend;
    size_t at = 0;
    for (size_t i = 0; i < m->layout.n_tensors; i++) {
        const ParamTensor *t = &m->layout.tensors[i];
        size_t begin, end, held, n = t->file_rows * t->cols;
        CHECK(at + n <= ELEMENTS, "%zu elements", at + n);
        be->download(be, out->params[rank] + at * be->elem_bytes, (char *)m->params.p + t->offset * be->elem_bytes, n * be->elem_bytes);
        gpt2_held(m, t, &begin, &end, &held);
        for (int k = 0; k < 2 && begin < end && (rank == 0 || m->ranks.sharded); k++)
            be->download(be, &out->moments[k][at + begin], (k ? m->v.p : m->m.p) + held, (end - begin) * sizeof(float));
        at += n;
    }
}

static RunIdentity identity(Comm *comm) { return (RunIdentity){.run_id = "0123456789abcdef0123456789abcdef", .comm = comm}; }

static int rank_main(Comm *comm, void *context) {
    const Job *job = context;
    const Case *c = job->c;
    Outcome *out = job->out;
    Error e = {0};
    Backend *base = base_backend(c->backend), *be = comm->size > 1 ? zero_backend_create(base, comm, c->wire) : base;
    GPT2Config config = shape;
    GPT2 model;
    Acts acts;
    Trainer trainer;
    TrainState state = {.last_val_step = -1, .best_val_loss = NAN, .last_val_loss = NAN};
    Ranks ranks = {(size_t)comm->rank, (size_t)comm->size, c->sharded && comm->size > 1};
    CHECK(gpt2_config_check(&config, &e) && gpt2_create_ranks(&model, be, &config, true, ranks, &e), "%s", e.text);
    Comm *devices = NULL;
    DeviceQueue queue = {0};
    if (c->between_devices) { /* with little room: gradients in bf16 go in many pieces */
        CHECK(zero_queue_create(&queue, base, c->wire, 6000, &e) && (devices = nccl_comm_create(comm, &queue, 60, &e)), "%s", e.text);
        zero_between_devices(be, devices);
    }
    if (comm->size > 1) CHECK(zero_attach(be, &model, &e), "%s", e.text);
    CHECK(gpt2_acts_create(&acts, &model, c->micro, shape.T, KEEP_ALL, true, &e) && trainer_create(&trainer, &model, &acts, &e), "%s", e.text);
    RunIdentity id = identity(comm);
    gpt2_init(&model, 3);
    if (c->load) {
        CHECK(checkpoint_load(c->load, &model, &state, &id, NULL, &e), "%s", e.text);
        gpt2_params_rounded(&model, c->rounding, 11, state.updates);
        trainer_set_updates(&trainer, state.updates);
    }
    for (size_t s = c->from; s < c->from + c->steps; s++) {
        Feed feed = {.c = c, .model = &model, .comm = comm, .step = s};
        StepParams p = {.lr = 3e-3f, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .weight_decay = 0.1f, .grad_clip = 1, .loss_limit = INFINITY, .norm_limit = INFINITY,
                        .seed = 11, .step = (int64_t)s, .rounding = c->rounding, .stop = comm->rank == c->stop_rank && s == 1,
                        .save = c->stop_rank >= 0 && comm->rank != c->stop_rank && s >= 1};
        StepResult r = train_step(&trainer, &p, G / ranks.n / c->micro, next_micro, &feed);
        double same[2] = {(double)r.loss, r.skip + 10 * r.stop + 1000 * r.save};
        if (comm->size > 1) comm_sum(comm, same, 2);
        if (same[1] != comm->size * (r.skip + 10 * r.stop + 1000 * r.save) || (isfinite(r.loss) && same[0] != comm->size * (double)r.loss)) out->skips_differ = true;
        if (comm->rank == 0) out->loss[s] = r.loss, out->norm[s] = r.grad_norm, out->skip[s] = r.skip, out->stop[s] = r.stop, out->save[s] = r.save;
        state.updates = out->updates[comm->rank] = r.updates;
    }
    read_out(&model, comm->rank, out);
    out->optimizer_bytes[comm->rank] = base->memory[MEM_OPTIMIZER], out->master_bytes[comm->rank] = base->memory[MEM_MASTER];
    state.step = (int64_t)(c->from + c->steps);
    if (c->save) CHECK(checkpoint_save(c->save, &model, &state, &id, &e), "%s", e.text);
    trainer_destroy(&trainer);
    gpt2_acts_destroy(&acts, &model);
    gpt2_destroy(&model);
    if (be != base) be->destroy(be);
    if (devices) devices->destroy(devices);
    zero_queue_destroy(&queue);
    base->destroy(base);
    return 0;
}

static Outcome *train(Case c) {
    Outcome *out = shared_memory(sizeof *out);
    int codes[RANKS_MOST];
    if (!c.micro) c.micro = 1;
    Job job = {&c, out};
    EXPECT(ranks_run(c.ranks, rank_main, &job, codes), "%d ranks on %s: exit codes %d %d ...", c.ranks, c.backend, codes[0], codes[1]);
    EXPECT(!out->skips_differ, "%d ranks on %s: results differ between them", c.ranks, c.backend);
    for (int r = 1; r < c.ranks; r++)
        EXPECT(!memcmp(out->params[r], out->params[0], sizeof out->params[0]) && out->updates[r] == out->updates[0], "%d ranks on %s: weights of rank %d are others", c.ranks, c.backend, r);
    return out;
}
static void forget(Outcome *a) { munmap(a, sizeof *a); }

static void expect_same(const Outcome *a, const Outcome *b, const char *what, int ranks) {
    EXPECT(!memcmp(a->loss, b->loss, sizeof a->loss) && !memcmp(a->norm, b->norm, sizeof a->norm), "%s, %d ranks: losses or norms differ, first %.9g and %.9g", what, ranks,
           (double)a->loss[0], (double)b->loss[0]);
    EXPECT(!memcmp(a->params[0], b->params[0], sizeof a->params[0]), "%s, %d ranks: weights differ", what, ranks);
    EXPECT(!memcmp(a->moments, b->moments, sizeof a->moments), "%s, %d ranks: moments differ", what, ranks);
}

/* ---- the tests ---------------------------------------------------------------------------------------------------- */

static const char *const backends[] = {
    "cpu", "half",
#ifdef LLMC_EMU
    "emu bf16", "emu fp32",
#endif
};
enum { N_BACKENDS = sizeof backends / sizeof *backends };

TEST(zero_0_and_1_have_the_same_bits) {
    const int counts[] = {2, 3, 4, 8};
    for (int b = 0; b < N_BACKENDS; b++)
        for (int k = 0; k < (b < 2 ? 4 : b == 2 ? 2 : 1); k++)
            for (int wire = 0; wire < 2; wire++) {
                Case c = {.ranks = counts[k], .wire = wire ? WIRE_BF16 : WIRE_FLOAT32, .backend = backends[b], .steps = 4, .nan_rank = -1, .stop_rank = -1,
                          .rounding = k % 2 ? ROUND_STOCHASTIC : ROUND_NEAREST};
                if (b > 1 && wire) continue;
                Outcome *whole = train(c);
                c.sharded = true;
                Outcome *parts = train(c);
                expect_same(whole, parts, backends[b], counts[k]);
                EXPECT(whole->loss[3] < whole->loss[0], "%.6f, then %.6f", (double)whole->loss[0], (double)whole->loss[3]);
                forget(whole), forget(parts);
            }
}

/* Memory that is not the host's: what travels is copied to the host and back beside the ops, or goes from device to device. Two micro-batches a step, so that a gradient that is taken
 * before its last addition shows. */
TEST(ranks_of_devices_compute_what_one_does) {
    for (int b = 2; b < N_BACKENDS; b++) {
        Case c = {.ranks = 1, .backend = backends[b], .steps = 3, .micro = 12, .nan_rank = -1, .stop_rank = -1};
        Outcome *one = train(c);
        for (int ranks = 2; ranks <= 4; ranks += 2) {
            c.ranks = ranks, c.micro = (size_t)(12 / ranks), c.sharded = false;
            Outcome *whole = train(c);
            c.sharded = true;
            Outcome *parts = train(c);
            expect_same(whole, parts, backends[b], ranks);
            c.between_devices = true; /* in the order of ranks too, so with the same bits */
            for (int k = 0; k < (ranks == 2 ? 2 : 1); k++) {
                c.sharded = !k;
                Outcome *direct = train(c);
                expect_same(direct, parts, "between devices", ranks);
                forget(direct);
            }
            c.wire = WIRE_BF16, c.sharded = true;
            Outcome *direct = train(c);
            c.between_devices = false;
            Outcome *staged = train(c);
            expect_same(direct, staged, "between devices, in bf16", ranks);
            EXPECT(staged->norm[0] != parts->norm[0], "bf16 changes nothing: norm %.8f", (double)staged->norm[0]);
            forget(direct), forget(staged);
            c.wire = WIRE_FLOAT32;
            for (int s = 0; s < 3; s++)
                EXPECT(fabsf(parts->loss[s] - one->loss[s]) < (b == 2 ? 3e-3f : 2e-6f) && fabsf(parts->norm[s] - one->norm[s]) < (b == 2 ? 3e-3f : 2e-5f),
                       "%s, %d ranks, step %d: loss %.8f, one rank's %.8f; norm %.8f, %.8f", backends[b], ranks, s, (double)parts->loss[s], (double)one->loss[s],
                       (double)parts->norm[s], (double)one->norm[s]);
            forget(whole), forget(parts);
        }
        forget(one);
    }
}

/* P10. The sum over ranks has another order than the accumulation of one rank, and so other roundings. */
TEST(P10_any_number_of_ranks_the_same_losses) {
    Case one = {.ranks = 1, .backend = "cpu", .steps = STEPS_MOST, .nan_rank = -1, .stop_rank = -1};
    Outcome *expected = train(one);
    const struct { int ranks; size_t micro; bool sharded; } cases[] = {{2, 3, true}, {3, 8, true}, {4, 2, false}, {8, 3, true}};
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        Case c = one;
        c.ranks = cases[k].ranks, c.micro = cases[k].micro, c.sharded = cases[k].sharded;
        Outcome *found = train(c);
        double worst = 0;
        for (size_t s = 0; s < STEPS_MOST; s++) worst = fmax(worst, fabs((double)(found->loss[s] - expected->loss[s])));
        printf("%d ranks, micro-batch %zu: losses of %d steps within %.2g of one rank's\n", c.ranks, c.micro, STEPS_MOST, worst);
        EXPECT(worst < 2e-4 && fabsf(found->loss[0] - expected->loss[0]) < 2e-6f, "%d ranks: %.3g", c.ranks, worst);
        forget(found);
    }
    EXPECT(expected->loss[STEPS_MOST - 1] < 0.5f * expected->loss[0], "it learns: %.4f to %.4f", (double)expected->loss[0], (double)expected->loss[STEPS_MOST - 1]);
    forget(expected);
}

/* Random bits of the rounding go by a weight's place, whoever rounds it: equal masters give equal weights. */
TEST(stochastic_rounding_does_not_depend_on_the_ranks) {
    Case c = {.ranks = 2, .backend = "half", .steps = 0, .nan_rank = -1, .stop_rank = -1, .rounding = ROUND_STOCHASTIC};
    char dir[] = "/tmp/llmc_zero_XXXXXX";
    Error e = {0};
    CHECK(mkdtemp(dir), "%s", dir);
    char *path = xasprintf("%s/step_%08d", dir, 3);
    c.steps = 3, c.sharded = true, c.save = dir;
    Outcome *saved = train(c);
    c.save = NULL, c.load = path, c.from = 3, c.steps = 0;
    for (int ranks = 1; ranks <= 4; ranks++) {
        c.ranks = ranks;
        Outcome *found = train(c);
        EXPECT(!memcmp(found->params[0], saved->params[0], sizeof saved->params[0]), "%d ranks round otherwise", ranks);
        forget(found);
    }
    forget(saved);
    EXPECT(path_remove_tree(dir, &e), "%s", e.text);
    free(path);
}

TEST(P15_a_bad_gradient_on_one_rank_changes_nothing_on_all) {
    for (int b = 0; b < 2; b++) {
        Case c = {.ranks = 3, .sharded = true, .backend = backends[b], .steps = 2, .nan_rank = 1, .nan_step = 1, .stop_rank = -1};
        Outcome *with = train(c);
        c.steps = 1, c.nan_rank = -1;
        Outcome *before = train(c);
        EXPECT(with->skip[1] == SKIP_NONFINITE && with->updates[0] == 1, "skip %d, %lld updates", with->skip[1], (long long)with->updates[0]);
        EXPECT(!memcmp(with->params, before->params, sizeof with->params) && !memcmp(with->moments, before->moments, sizeof with->moments), "something changed");
        forget(with), forget(before);
    }
}

TEST(wishes_reach_all_ranks) {
    Case c = {.ranks = 4, .sharded = true, .backend = "cpu", .steps = 3, .nan_rank = -1, .stop_rank = 2};
    Outcome *out = train(c);
    EXPECT(!out->stop[0] && out->stop[1] == 1 && !out->stop[2], "%d %d %d", out->stop[0], out->stop[1], out->stop[2]);
    EXPECT(!out->save[0] && out->save[1] == 3 && out->save[2] == 3, "%d %d %d", out->save[0], out->save[1], out->save[2]);
    EXPECT(!out->skips_differ, "the ranks disagree");
    forget(out);
}

TEST(memory_of_a_rank_is_what_was_planned) {
    for (int ranks = 1; ranks <= 8; ranks++) {
        if (G % ranks) continue;
        Case c = {.ranks = ranks, .sharded = true, .backend = "half", .steps = 1, .nan_rank = -1, .stop_rank = -1};
        Outcome *out = train(c);
        Error e = {0};
        GPT2Config config = shape;
        GPT2 model;
        Backend *null = null_backend_create("bf16");
        CHECK(gpt2_config_check(&config, &e) && gpt2_create_ranks(&model, null, &config, true, (Ranks){0, (size_t)ranks, ranks > 1}, &e), "%s", e.text);
        for (int r = 0; r < ranks; r++)
            EXPECT(out->optimizer_bytes[r] == null->memory[MEM_OPTIMIZER] && out->master_bytes[r] == null->memory[MEM_MASTER], "rank %d of %d: %zu, planned %zu", r, ranks,
                   out->optimizer_bytes[r], null->memory[MEM_OPTIMIZER]);
        EXPECT(null->memory[MEM_OPTIMIZER] * (size_t)ranks < 2 * sizeof(float) * (ELEMENTS + 512 * 4 * (size_t)ranks), "%zu bytes a rank", null->memory[MEM_OPTIMIZER]);
        gpt2_destroy(&model);
        null->destroy(null);
        forget(out);
    }
}

/* P11 and P8: what W ranks saved, any W' takes up: moments and weights to the bit; with the same W the run goes on to the bit. */
TEST(P11_a_checkpoint_of_any_ranks_loads_on_any) {
    const int counts[] = {1, 2, 3, 4, 8};
    for (int b = 0; b < 2; b++)
        for (int k = 0; k < 5; k++) {
            char dir[] = "/tmp/llmc_zero_XXXXXX";
            Error e = {0};
            CHECK(mkdtemp(dir), "%s", dir);
            char *path = xasprintf("%s/step_%08d", dir, 2);
            Case c = {.ranks = counts[k], .sharded = true, .backend = backends[b], .steps = 2, .nan_rank = -1, .stop_rank = -1, .save = dir};
            Outcome *saved = train(c);
            EXPECT(checkpoint_verify(path, &e), "%s", e.text);
            c.save = NULL, c.load = path, c.from = 2;
            for (int j = 0; j < 5; j++) {
                c.ranks = counts[j], c.steps = 0;
                Outcome *found = train(c);
                EXPECT(!memcmp(found->params[0], saved->params[0], sizeof saved->params[0]) && !memcmp(found->moments, saved->moments, sizeof saved->moments),
                       "%s: saved by %d, loaded by %d", backends[b], counts[k], counts[j]);
                forget(found);
            }
            c.ranks = counts[k], c.steps = 2;
            Outcome *resumed = train(c);
            c.load = NULL, c.from = 0, c.steps = 4;
            Outcome *whole = train(c);
            for (int s = 2; s < 4; s++) EXPECT(resumed->loss[s] == whole->loss[s] && resumed->norm[s] == whole->norm[s], "%s, %d ranks, step %d", backends[b], counts[k], s);
            EXPECT(!memcmp(resumed->params, whole->params, sizeof whole->params) && !memcmp(resumed->moments, whole->moments, sizeof whole->moments), "%s, %d ranks: resumed", backends[b], counts[k]);
            forget(saved), forget(resumed), forget(whole);
            EXPECT(path_remove_tree(dir, &e), "%s", e.text);
            free(path);
        }
}

typedef struct { const char *path, *file; int *bad; char (*text)[300]; } Damage;

/* bad: each rank's, whether it refuses the checkpoint. */
static int load_damaged(Comm *comm, void *context) {
    const Damage *d = context;
    Error e = {0};
    Backend *base = base_backend("cpu"), *be = zero_backend_create(base, comm, WIRE_FLOAT32);
    GPT2Config config = shape;
    GPT2 model;
    TrainState state;
    RunIdentity id = identity(comm);
    CHECK(gpt2_create_ranks(&model, be, &config, true, (Ranks){(size_t)comm->rank, (size_t)comm->size, true}, &e) && zero_attach(be, &model, &e), "%s", e.text);
    d->bad[comm->rank] = !checkpoint_load(d->path, &model, &state, &id, NULL, &e);
    snprintf(d->text[comm->rank], sizeof d->text[0], "%.290s", e.text);
    gpt2_destroy(&model);
    be->destroy(be), base->destroy(base);
    return 0;
}

/* The ranks share the work: each file's checksum is looked at by one of them, and one that is damaged is found. */
TEST(each_file_is_checked_by_one_rank) {
    char dir[] = "/tmp/llmc_zero_XXXXXX", said[RANKS_MOST][300];
    Error e = {0};
    CHECK(mkdtemp(dir), "%s", dir);
    char *path = xasprintf("%s/step_%08d", dir, 1);
    forget(train((Case){.ranks = 3, .sharded = true, .backend = "cpu", .steps = 1, .nan_rank = -1, .stop_rank = -1, .save = dir}));
    const char *const files[] = {"optimizer-0000-of-0003.safetensors", "optimizer-0001-of-0003.safetensors", "optimizer-0002-of-0003.safetensors", "model.safetensors"};
    Damage d = {.path = path, .bad = shared_memory(RANKS_MOST * sizeof(int)), .text = shared_memory(sizeof said)};
    int codes[RANKS_MOST], finders = 0;
    for (int k = -1; k < 4; k++) {
        char *file = path_join(path, files[k < 0 ? 0 : k]);
        FILE *f = fopen(file, "r+b");
        CHECK(f, "%s", file);
        fseek(f, -3, SEEK_END);
        int byte = fgetc(f);
        if (k >= 0) fseek(f, -3, SEEK_END), fputc(byte ^ 16, f);
        fflush(f);
        EXPECT(ranks_run(3, load_damaged, &d, codes), "%s", file);
        int bad = d.bad[0] + d.bad[1] + d.bad[2], by = d.bad[2] ? 2 : d.bad[1];
        EXPECT(bad == (k >= 0), "%s: %d ranks refuse it", file, bad);
        EXPECT(!bad || (strstr(d.text[by], files[k]) && strstr(d.text[by], "damaged")), "%s: %s", file, d.text[by]);
        finders |= bad << by;
        if (k >= 0) fseek(f, -3, SEEK_END), fputc(byte, f);
        fclose(f);
        free(file);
    }
    EXPECT((finders & (finders - 1)) != 0, "one rank checks all: %d", finders);
    EXPECT(path_remove_tree(dir, &e), "%s", e.text);
    free(path);
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    RUN(zero_0_and_1_have_the_same_bits);
    RUN(ranks_of_devices_compute_what_one_does);
    RUN(P10_any_number_of_ranks_the_same_losses);
    RUN(stochastic_rounding_does_not_depend_on_the_ranks);
    RUN(P15_a_bad_gradient_on_one_rank_changes_nothing_on_all);
    RUN(wishes_reach_all_ranks);
    RUN(memory_of_a_rank_is_what_was_planned);
    RUN(each_file_is_checked_by_one_rank);
    RUN(P11_a_checkpoint_of_any_ranks_loads_on_any);
    return test_done();
}
