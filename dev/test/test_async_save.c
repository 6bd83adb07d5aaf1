/* P7: a save apart from training equals the synchronous one byte for byte, while training goes on and a rank's disk is slow; without memory for
 * the copy it is a synchronous one. The parent makes no I/O call that counts for fault injection, so that each rank begins its own count. */
#include "half.h"
#include "llmc/base/io.h"
#include "llmc/cpu/cpu.h"
#include "llmc/dist/zero.h"
#include "llmc/run/checkpoint.h"
#include "llmc/train.h"
#include "ranks_kit.h"
#include <sys/resource.h>

enum { AFTER = 4, STEPS_MOST = 5000 };

typedef struct {
    int ranks;
    bool sharded, apart;
    const char *backend;      /* cpu, half */
    size_t layers, channels, before; /* before: steps before the save */
    int poor_rank;            /* -1: none; has no memory for copies */
    const char *run_dir, *tokenizer_dir;
} Case;
typedef struct {
    float loss[AFTER];        /* of the steps after the save */
    int meanwhile;            /* steps while it was under way */
    bool early, there;        /* the checkpoint was seen before all was written; after finish */
    char report[400];
} Outcome;
typedef struct { const Case *c; Outcome *out; } Job;

typedef struct { int rank; size_t step; int32_t tokens[16], targets[16]; } Feed;
static bool next_micro(void *context, size_t i, const int32_t **tokens, const int32_t **targets) {
    Feed *f = context;
    for (size_t t = 0; t < 16; t++) f->tokens[t] = f->targets[t] = (int32_t)(rng_u32(5, RNG_DATA, (uint32_t)f->step, 64 * (size_t)f->rank + t + i) % 130);
    *tokens = f->tokens, *targets = f->targets;
    return true;
}

static float step(Trainer *trainer, Comm *comm, size_t number) {
    Feed feed = {.rank = comm->rank, .step = number};
    StepParams p = {.lr = 3e-3f, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .weight_decay = 0.1f, .grad_clip = 1, .loss_limit = INFINITY, .norm_limit = INFINITY,
                    .seed = 11, .step = (int64_t)number};
    return train_step(trainer, &p, 1, next_micro, &feed).loss;
}

/* This process gets no more memory than it has, but for small things; or what it likes. */
static void become_poor(bool poor) {
    long pages = 0;
    struct rlimit limit;
    getrlimit(RLIMIT_AS, &limit);
    FILE *f = fopen("/proc/self/statm", "r");
    CHECK(f && fscanf(f, "%ld", &pages) == 1, "statm");
    fclose(f);
    limit.rlim_cur = poor ? (rlim_t)(pages * sysconf(_SC_PAGESIZE)) + (7 << 20) : limit.rlim_max;
    setrlimit(RLIMIT_AS, &limit);
}

static void save_and_train(const Case *c, GPT2 *model, Trainer *trainer, Comm *comm, Outcome *out) {
    TrainState state = {.step = (int64_t)c->before, .updates = (int64_t)c->before, .samples = 77, .last_val_step = -1, .best_val_loss = NAN, .last_val_loss = NAN, .seconds = 1.25};
    const FixedFact facts[] = {{"data", "training data", "aabbcc", NULL}};
    RunIdentity id = {.run_id = "0123456789abcdef0123456789abcdef", .facts = facts, .n_facts = 1, .tokenizer_dir = c->tokenizer_dir, .comm = comm};
    Error e = {0};
    size_t number = c->before;
    char *final = xasprintf("%s/step_%08zu", c->run_dir, number);
    FILE *report = tmpfile();
    if (c->apart) {
        if (comm->rank == c->poor_rank) become_poor(true);
        Saving *s = checkpoint_begin(c->run_dir, model, &state, &id, &(SaveHow){.apart = true, .report = comm->rank ? NULL : report}, &e);
        CHECK(s, "%s", e.text);
        become_poor(false);
        state.samples = 0;
        for (bool first = true; first || !checkpoint_ready(s); first = false) {
            float loss = step(trainer, comm, number++);
            if (number - c->before <= AFTER) out->loss[number - c->before - 1] = loss;
            if (first && comm->rank == 0) out->early = path_exists(final);
            CHECK(number < STEPS_MOST, "not ready");
        }
        out->meanwhile = (int)(number - c->before);
        CHECK(checkpoint_finish(s, &e), "%s", e.text);
    } else CHECK(checkpoint_save(c->run_dir, model, &state, &id, &e), "%s", e.text);
    if (comm->rank == 0) out->there = path_exists(final);
    while (number - c->before < AFTER) {
        float loss = step(trainer, comm, number++);
        out->loss[number - c->before - 1] = loss;
    }
    rewind(report);
    if (comm->rank == 0) out->report[fread(out->report, 1, sizeof out->report - 1, report)] = 0;
    fclose(report);
    free(final);
}

static int rank_main(Comm *comm, void *context) {
    const Job *job = context;
    const Case *c = job->c;
    Error e = {0};
    fault_rank(comm->rank);
    Backend *base = cpu_backend_create(&e);
    if (!strcmp(c->backend, "half")) base = half_create(base);
    Backend *be = comm->size > 1 ? zero_backend_create(base, comm, WIRE_FLOAT32) : base;
    GPT2Config config = {.V = 130, .L = c->layers, .H = 3, .C = c->channels, .T = 16};
    GPT2 model;
    Acts acts;
    Trainer trainer;
    CHECK(gpt2_config_check(&config, &e) && gpt2_create_ranks(&model, be, &config, true, (Ranks){(size_t)comm->rank, (size_t)comm->size, c->sharded && comm->size > 1}, &e), "%s", e.text);
    if (comm->size > 1) CHECK(zero_attach(be, &model, &e), "%s", e.text);
    CHECK(gpt2_acts_create(&acts, &model, 1, 16, KEEP_ALL, true, &e) && trainer_create(&trainer, &model, &acts, &e), "%s", e.text);
    gpt2_init(&model, 3);
    for (size_t s = 0; s < c->before; s++) step(&trainer, comm, s);
    be->sync(be);
    save_and_train(c, &model, &trainer, comm, job->out);
    trainer_destroy(&trainer);
    gpt2_acts_destroy(&acts, &model);
    gpt2_destroy(&model);
    if (be != base) be->destroy(be);
    base->destroy(base);
    return 0;
}

/* fault: NULL, or of the ranks. */
static Outcome run_case(Case c, const char *fault) {
    Outcome *shared = shared_memory(sizeof *shared), out;
    int codes[RANKS_MOST];
    Job job = {&c, shared};
    fflush(stderr);
    int kept = dup(2);
    if (fault) setenv("LLMC_FAULT", fault, 1);
    if (fault && !freopen("/dev/null", "w", stderr)) exit(1); /* "fault injection is on" */
    EXPECT(ranks_run(c.ranks, rank_main, &job, codes), "%d ranks on %s: exit codes %d %d ...", c.ranks, c.backend, codes[0], codes[1]);
    fflush(stderr);
    dup2(kept, 2);
    close(kept);
    unsetenv("LLMC_FAULT");
    out = *shared;
    munmap(shared, sizeof *shared);
    return out;
}

static char root[] = "/tmp/llmc_async_XXXXXX";

static bool same_files(const char *a, const char *b) {
    char *command = xasprintf("test $(ls -A '%s' | wc -l) -gt 0 && diff -r '%s' '%s'", a, a, b);
    bool same = system(command) == 0;
    free(command);
    return same;
}

/* One save in each way, by processes of their own: the same files, the same training afterwards. */
static void compare(Case c, const char *fault, Outcome *apart) {
    char *dirs[2], *clear = xasprintf("rm -rf '%s'/sync '%s'/apart", root, root);
    EXPECT(system(clear) == 0);
    for (int k = 0; k < 2; k++) dirs[k] = xasprintf("%s/%s", root, k ? "apart" : "sync");
    c.run_dir = dirs[0];
    Outcome sync = run_case(c, NULL);
    c.run_dir = dirs[1], c.apart = true;
    *apart = run_case(c, fault);
    EXPECT(sync.there && apart->there && !apart->early, "%d ranks on %s, %s: there %d %d, early %d", c.ranks, c.backend, fault, sync.there, apart->there, apart->early);
    EXPECT(same_files(dirs[0], dirs[1]), "%d ranks on %s, sharded %d, %s", c.ranks, c.backend, c.sharded, fault);
    EXPECT(!memcmp(sync.loss, apart->loss, sizeof sync.loss), "%d ranks on %s: training differs: %.9g, %.9g", c.ranks, c.backend, (double)sync.loss[1], (double)apart->loss[1]);
    free(dirs[0]), free(dirs[1]), free(clear);
}

/* The first write of one rank's file comes late; training does not wait for it. */
TEST(P7_the_same_bytes_while_training_goes_on) {
    char *tokenizer = xasprintf("%s/tokenizer", root), *make = xasprintf("mkdir '%s' && echo '{}' >'%s/vocab.json' && echo '#version' >'%s/merges.txt'", tokenizer, tokenizer, tokenizer);
    EXPECT(system(make) == 0);
    for (int b = 0; b < 2; b++)
        for (int ranks = 1; ranks <= 4; ranks++)
            for (int sharded = 0; sharded < 1 + (ranks == 3); sharded++) {
                Case c = {.ranks = ranks, .sharded = ranks != 3 || sharded, .backend = b ? "half" : "cpu", .layers = 2, .channels = 48, .before = 2, .poor_rank = -1, .tokenizer_dir = tokenizer};
                Outcome apart;
                char fault[64];
                snprintf(fault, sizeof fault, "slow=400@io=%d,rank=%d", ranks == 1 ? 5 : 1, ranks == 3 && !sharded ? 0 : ranks - 1);
#ifndef LLMC_FAULT_INJECTION
                fault[0] = 0;
#endif
                compare(c, fault, &apart);
                /* Several ranks ask each other between steps: 3 steps where each question is answered yes. */
                EXPECT(apart.meanwhile >= (ranks > 1 ? 3 : 1) + (fault[0] != 0), "%d ranks on %s: %d steps meanwhile", ranks, c.backend, apart.meanwhile);
                EXPECT(!apart.report[0], "%s", apart.report);
            }
    free(tokenizer), free(make);
}

TEST(without_memory_for_the_copy_training_waits) {
#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
    SKIP("a sanitizer needs its own address space");
#endif
    for (int poor = 0; poor < 2; poor++) {
        Case c = {.ranks = 2, .sharded = true, .backend = "half", .layers = 6, .channels = 192, .before = 1, .poor_rank = poor};
        Outcome apart;
        compare(c, NULL, &apart);
        EXPECT(strstr(apart.report, "step 1: the host has no memory for a copy") && strstr(apart.report, "MiB"), "rank %d: %s", poor, apart.report);
    }
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    CHECK(mkdtemp(root), "%s", root);
    RUN(P7_the_same_bytes_while_training_goes_on);
    RUN(without_memory_for_the_copy_training_waits);
    char *clear = xasprintf("rm -rf '%s'", root);
    EXPECT(system(clear) == 0);
    free(clear);
    return test_done();
}
