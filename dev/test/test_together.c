/* What a run owes to those who share it, from inside: wishes by time and files (P25), copies that must be alike (P18), the slow rank (P29), the health of
 * devices (P30). From outside: test_together.sh. */
#include "half.h"
#include "llmc/base/io.h"
#include "llmc/dist/zero.h"
#include "llmc/run/together.h"
#include "ranks_kit.h"

static char work[200];
static double clock_now;
static double fake_clock(void) { return clock_now; }
static char *in_work(const char *name) { return path_join(work, name); }
static void touch(const char *name) {
    char *path = in_work(name);
    Error e;
    CHECK(file_replace(path, "", 0, &e), "%s", e.text);
    free(path);
}
static bool is_there(const char *name) {
    char *path = in_work(name);
    bool there = path_exists(path);
    free(path);
    return there;
}

TEST(durations) {
    static const struct { const char *text; double seconds; } rows[] = {{"3h", 10800}, {"45m", 2700}, {"90s", 90}, {"90", 90}, {"1h30m", 5400}, {"1.5h", 5400}, {"0.5", 0.5},
        {"", -1}, {"h", -1}, {"0", -1}, {"3d", -1}, {"-3", -1}, {"3 h", -1}, {"3hh", -1}, {"inf", -1}, {"nan", -1}, {"1e99h", -1}, {"..", -1}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        double seconds = duration_parse(rows[i].text);
        EXPECT(seconds == rows[i].seconds, "\"%s\": %g", rows[i].text, seconds);
    }
}

/* A Together of one rank on the fake clock. */
static void begin(Together *t, Comm *comm, Backend *b, MetricsLog *metrics, const char *max_time, double started, double save_seconds) {
    together_begin(t, comm, b, metrics, work, max_time, started, save_seconds);
    t->now = fake_clock;
}

TEST(time_is_left_for_the_save) {
    Together t;
    Comm *comm = comm_alone();
    Backend b = {.health = NULL};
    MetricsLog metrics = {.fd = -1};
    Error e = {0};
    clock_now = 1000;
    begin(&t, comm, &b, &metrics, "100", 950, 5);
    EXPECT(!together_stop(), "50 s are left");
    EXPECT(together_step(&t, 1, 4, 4, &e), "%s", e.text);
    clock_now = 1050 - 5 - (POST_SLOTS + 1) * 4 - 0.5;
    EXPECT(!together_stop(), "half a second too early");
    clock_now += 1;
    EXPECT(together_stop() && !strcmp(together_why(&t), "--max-time 100"), "%s", together_why(&t));
    clock_now -= 10;
    EXPECT(together_stop(), "a wish stays");
    together_end(&t, EXIT_REQUEUE);
    clock_now = 1000;
    begin(&t, comm, &b, &metrics, "100", 950, 5);
    together_saved(&t, 30);           /* a save takes longer than it was thought to */
    clock_now = 1021;
    EXPECT(together_stop(), "the last save counts");
    together_end(&t, EXIT_OK);
    begin(&t, comm, &b, &metrics, NULL, 950, 5);
    clock_now = 1e9;
    EXPECT(!together_stop(), "no limit");
    together_end(&t, EXIT_OK);
    free(comm);
}

TEST(files_are_wishes) {
    Together t;
    Comm *comm = comm_alone();
    Backend b = {.health = NULL};
    MetricsLog metrics = {.fd = -1};
    clock_now = 10;
    begin(&t, comm, &b, &metrics, NULL, 0, 0);
    EXPECT(!together_stop() && !together_wants_save(&t), "nothing is there");
    touch("SAVE");
    clock_now = 10.9;
    EXPECT(!together_wants_save(&t), "looked more than once in a second");
    clock_now = 11.1;
    EXPECT(together_wants_save(&t) && together_wants_save(&t) && !together_stop(), "SAVE");
    EXPECT(is_there("SAVE"), "it stays until it is done");
    together_saved(&t, 1);
    EXPECT(!is_there("SAVE") && !together_wants_save(&t), "and goes then");
    touch("STOP");
    clock_now = 13;
    EXPECT(together_stop() && !strcmp(together_why(&t), "the file STOP"), "%s", together_why(&t));
    together_saved(&t, 1);
    EXPECT(is_there("STOP"), "until the end");
    touch("SAVE");
    together_end(&t, EXIT_PEER);
    EXPECT(is_there("STOP") && is_there("SAVE"), "a run that broke has fulfilled no wish");
    begin(&t, comm, &b, &metrics, NULL, 0, 0);
    EXPECT(together_stop(), "a STOP from before counts");
    together_end(&t, EXIT_REQUEUE);
    EXPECT(!is_there("STOP") && !is_there("SAVE"), "fulfilled");
    free(comm);
}

/* ---- many ranks: what rank 0 records ------------------------------------------------------------------------------ */

typedef struct {
    int steps, slow, from, until;     /* rank `slow` takes half as long again from step `from` on, before `until` */
    int second;                       /* another slow rank after that; -1: none */
    bool alternating;                 /* the two take turns, a window each */
    Backend *backend;
} Story;

static bool is_slow(const Story *s, int rank, int step) {
    if (s->alternating) return rank == (step / WINDOW_STEPS % 2 ? s->slow : s->second);
    return rank == s->slow ? step >= s->from && step < s->until : rank == s->second && step >= s->until;
}

static int tell(Comm *comm, void *context) {
    const Story *s = context;
    Together t;
    MetricsLog metrics = {.fd = -1};
    Error e = {0};
    char *path = in_work("metrics.jsonl");
    clock_now = 0;
    if (!comm->rank) CHECK(metrics_open(&metrics, path, &e), "%s", e.text);
    begin(&t, comm, s->backend, &metrics, NULL, 0, 0);
    for (int step = 0; step < s->steps; step++) {
        double own = 0.1 + (comm->rank % 2 ? 0.004 : 0) + (is_slow(s, comm->rank, step) ? 0.05 : 0);
        clock_now += 1;
        CHECK(together_step(&t, step + 1, 0.2, own, &e), "%s", e.text);
    }
    together_end(&t, EXIT_OK);
    if (!comm->rank) metrics_close(&metrics);
    free(path);
    return 0;
}

/* The lines of the metrics file, which is removed. The caller frees. */
static char *told(int ranks, Story *s) {
    Backend none = {.health = NULL};
    char *path = in_work("metrics.jsonl"), *text;
    Error e;
    if (!s->backend) s->backend = &none;
    EXPECT(ranks_run(ranks, tell, s, NULL), "a rank failed");
    text = file_read(path, NULL, &e);
    CHECK(text, "%s", e.text);
    unlink(path);
    free(path);
    return text;
}

static int count(const char *text, const char *what) {
    int n = 0;
    for (; (text = strstr(text, what)); text++) n++;
    return n;
}

TEST(the_slow_rank_is_named) {
    char *text = told(4, &(Story){.steps = 200, .slow = 2, .from = 60, .until = 1000, .second = -1});
    EXPECT(count(text, "\n") == 1 && strstr(text, "\"kind\":\"slow_rank\"") && strstr(text, "\"step\":120,\"rank\":2") && strstr(text, "rank 2 (host ") && strstr(text, "computes 44 % slower"), "%s", text);
    free(text);
    text = told(2, &(Story){.steps = 200, .slow = 1, .from = 0, .until = 100, .second = 0});
    EXPECT(count(text, "\n") == 2 && strstr(text, "\"step\":60,\"rank\":1") && strstr(text, "\"step\":160,\"rank\":0"), "of two, one after the other: %s", text);
    free(text);
}

TEST(none_is_named_without_reason) {
    static const Story stories[] = {{.steps = 120, .slow = -1, .second = -1}, {.steps = 200, .slow = 1, .from = 20, .until = 60, .second = -1},
                                    {.steps = 200, .slow = 0, .second = 1, .alternating = true}};
    for (size_t i = 0; i < sizeof stories / sizeof *stories; i++) {
        Story s = stories[i];
        char *text = told(3, &s);
        EXPECT(!*text, "story %zu: %s", i, text);
        free(text);
    }
}

/* ---- health ------------------------------------------------------------------------------------------------------- */

/* A device that becomes hot, cools down, meets its power cap, and counts an error. */
static bool scripted_health(Backend *b, DeviceHealth *h) {
    (void)b;
    *h = (DeviceHealth){.ecc_uncorrected = clock_now >= 100 ? 3 : 1};
    bool hot = (clock_now >= 20 && clock_now < 40) || clock_now >= 150, capped = clock_now >= 60 && clock_now < 80;
    h->throttle = 1 | (hot ? 0x40 : 0) | (capped ? 0x4 : 0);
    snprintf(h->throttle_text, sizeof h->throttle_text, "%s", hot ? "thermal" : capped ? "power cap" : "");
    return clock_now >= 5;            /* not to be had at once */
}

TEST(health_is_said_once) {
    Backend b = {.health = scripted_health};
    for (int ranks = 1; ranks <= 2; ranks++) {
        char *text = told(ranks, &(Story){.steps = 220, .slow = -1, .second = -1, .backend = &b});
        EXPECT(count(text, "\n") == 3 * ranks && count(text, "\"kind\":\"gpu_health\"") == 3 * ranks, "%s", text);
        EXPECT(count(text, "is throttled: thermal") == ranks && count(text, "is throttled: power cap") == ranks && count(text, "has 2 new uncorrected ECC errors") == ranks, "%s", text);
        EXPECT(ranks == 1 || count(text, "\"rank\":1") == 3, "%s", text);
        free(text);
    }
}

/* ---- replicas ----------------------------------------------------------------------------------------------------- */

enum { IN_PARAMS, IN_MASTER, IN_M, IN_V, NOWHERE };
typedef struct {
    bool sharded, half;
    int where;
    unsigned odd;                     /* bit r: on rank r a bit flips */
    size_t tensor;
    Error said[RANKS_MOST];
    bool fine[RANKS_MOST];
} Flip;

static int check(Comm *comm, void *context) {
    Flip *f = context;
    Error e = {0};
    GPT2Config config = {.V = 130, .L = 2, .H = 3, .C = 48, .T = 16};
    GPT2 model;
    Backend *cpu = cpu_backend_create(&e), *base = f->half ? half_create(cpu) : cpu, *b = zero_backend_create(base, comm, WIRE_FLOAT32);
    CHECK(gpt2_config_check(&config, &e) && gpt2_create_ranks(&model, b, &config, true, (Ranks){(size_t)comm->rank, (size_t)comm->size, f->sharded}, &e), "%s", e.text);
    CHECK(zero_attach(b, &model, &e), "%s", e.text);
    gpt2_init(&model, 3);
    size_t at = model.layout.tensors[f->tensor].offset + 5;
    char *p = f->where == IN_PARAMS ? (char *)model.params.p + at * b->elem_bytes : (char *)((f->where == IN_MASTER ? model.master.p : f->where == IN_M ? model.m.p : model.v.p) + at);
    if (f->odd >> comm->rank & 1) {
        char byte;
        b->download(b, &byte, p, 1);
        byte ^= 4;
        b->upload(b, p, &byte, 1);
    }
    f->fine[comm->rank] = replicas_check(&model, comm, 7, 5, &f->said[comm->rank]);
    gpt2_destroy(&model);
    b->destroy(b);
    base->destroy(base);
    return 0;
}

TEST(one_bit_is_found) {
    static const struct { int ranks; Flip f; const char *who, *what; } rows[] = {
        {3, {.where = NOWHERE}, NULL, NULL},
        {3, {.sharded = true, .half = true, .where = NOWHERE}, NULL, NULL},
        {4, {.where = IN_PARAMS, .odd = 1 << 2, .tensor = 0}, "unlike the majority: rank 2 of 4", "weights of tensor wte.weight"},
        {4, {.where = IN_PARAMS, .odd = 1 << 0, .tensor = 3, .sharded = true}, "unlike the majority: rank 0 of 4", "weights of tensor h.0.ln_1.bias"},
        {3, {.where = IN_PARAMS, .odd = 1 << 1, .tensor = 27, .sharded = true, .half = true}, "unlike the majority: rank 1 of 3", "weights of tensor ln_f.bias"},
        {2, {.where = IN_M, .odd = 1 << 1, .tensor = 5}, "unlike rank 0: rank 1 of 2", "first moment of tensor h.0.attn.c_attn.bias"},
        {4, {.where = IN_V, .odd = 1 << 1, .tensor = 1}, "unlike the majority: rank 1 of 4", "second moment of tensor wpe.weight"},
        {3, {.where = IN_MASTER, .odd = 1 << 2, .tensor = 4, .half = true}, "unlike the majority: rank 2 of 3", "master weights of tensor h.0.attn.c_attn.weight"},
        {4, {.where = IN_PARAMS, .odd = 1 << 1 | 1 << 3, .tensor = 2}, "unlike rank 0: ranks 1, 3 of 4", "weights of tensor h.0.ln_1.weight"}};
    Flip *f = shared_memory(sizeof *f);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        *f = rows[i].f;
        EXPECT(ranks_run(rows[i].ranks, check, f, NULL), "row %zu: a rank failed", i);
        for (int r = 0; r < rows[i].ranks; r++) {
            const Error *e = &f->said[r];
            EXPECT(f->fine[r] == !rows[i].who, "row %zu, rank %d: %s", i, r, e->text);
            EXPECT(!rows[i].who || (e->code == EXIT_DEVICE && strstr(e->text, "after step 7") && strstr(e->text, rows[i].who) && strstr(e->text, rows[i].what) && strstr(e->text, "of step 5")),
                   "row %zu, rank %d: %s", i, r, e->text);
        }
    }
    munmap(f, sizeof *f);
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    snprintf(work, sizeof work, "%s/llmc_together.XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
    if (!mkdtemp(work)) return perror(work), 1;
    RUN(durations);
    RUN(time_is_left_for_the_save);
    RUN(files_are_wishes);
    RUN(the_slow_rank_is_named);
    RUN(none_is_named_without_reason);
    RUN(health_is_said_once);
    RUN(one_bit_is_found);
    path_remove_tree(work, NULL);
    return test_done();
}
