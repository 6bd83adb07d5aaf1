/* Checkpoints: promises P1 to P6, P12, P13, P14 of a run, on a tiny model. Saves that must die run in a child process (this program
 * started again with --save), because faults are counted over a process. */
#include "../../llmc/base/rng.h"
#include "../../llmc/run/checkpoint_private.h"
#include "test.h"
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static char root[256];
static Backend *cpu;
static const char RUN_ID[] = "0123456789abcdef0123456789abcdef";
static const FixedFact facts[] = {
    {"data", "data fingerprint", "aabbcc"}, {"tokenizer", "tokenizer fingerprint", "none"}, {"shape", "layers", "2"},
    {"batch", "total-batch", "512"},        {"schedule", "lr", "0.00059999999999999995"},   {"schedule", "warmup", "700"},
    {"optimizer", "beta1", "0.90000000000000002"},
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

static bool exists(const char *run, int64_t step) {
    char *dir = step_dir(run, step);
    bool found = path_exists(dir);
    free(dir);
    return found;
}

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

/* ---- children ---- */

/* --save RUN SEED STEP KEEP FILE_LIMIT: what the children do. */
static int child_main(char **argv) {
    Error e = {0};
    GPT2 model = tiny();
    model_fill(&model, strtoull(argv[3], NULL, 10));
    struct rlimit limit = {strtoull(argv[6], NULL, 10), RLIM_INFINITY};
    if (limit.rlim_cur) {
        signal(SIGXFSZ, SIG_IGN);
        setrlimit(RLIMIT_FSIZE, &limit);
    }
    bool ok = save(argv[2], &model, strtoull(argv[3], NULL, 10), atoll(argv[4]), &e);
    int keep = atoi(argv[5]);
    if (ok && keep) ok = checkpoint_retain(argv[2], keep, 0, &e);
    return ok ? 0 : error_print(&e);
}

/* Exit status as of waitpid. fault NULL: none. What it prints goes to ROOT/child. */
static int child_save(const char *run, uint64_t seed, int64_t step, int keep, uint64_t file_limit, const char *fault) {
    char text[4][32];
    snprintf(text[0], 32, "%llu", (unsigned long long)seed);
    snprintf(text[1], 32, "%lld", (long long)step);
    snprintf(text[2], 32, "%d", keep);
    snprintf(text[3], 32, "%llu", (unsigned long long)file_limit);
    char *out = path_join(root, "child");
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        int fd = open(out, O_WRONLY | O_CREAT | O_TRUNC, 0666);
        dup2(fd, 1);
        dup2(fd, 2);
        if (fault) setenv("LLMC_FAULT", fault, 1);
        else unsetenv("LLMC_FAULT");
        execl("/proc/self/exe", "test_checkpoint", "--save", run, text[0], text[1], text[2], text[3], (char *)NULL);
        _exit(99);
    }
    int status = 0;
    waitpid(child, &status, 0);
    free(out);
    return status;
}

static char *child_said(void) {
    char *path = path_join(root, "child"), *text = file_read(path, NULL, NULL);
    free(path);
    return text ? text : xstrdup("");
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
    EXPECT(checkpoint_newest(run, path, NULL, &e), "%s: %s", when, e.text);
    TrainState s;
    json_t *json;
    char run_id[33];
    EXPECT(state_read(path, &json, &s, run_id, &e), "%s: %s", when, e.text);
    json_decref(json);
    int which = s.step == steps[1] && s.samples == UINT64_MAX - seeds[1];
    EXPECT(which || (s.step == steps[0] && s.samples == UINT64_MAX - seeds[0]), "%s: newest is step %lld", when, (long long)s.step);
    expect_loads(path, seeds[which], steps[which]);
}

/* ---- P1 ---- */

TEST(P1_round_trip) {
    char *run = run_with("roundtrip", (int64_t[]){10}, 1), *dir = step_dir(run, 10);
    expect_loads(dir, 10, 10);
    free(dir);
    free(run);
}

/* Kills a save at every I/O call in turn (half: after half of that call's bytes); `before` makes the run directory as it is before each. */
static int kill_everywhere(const char *name, bool half, void (*before)(const char *run), uint64_t seed, int64_t step, int keep, const int64_t steps[2],
                           const uint64_t seeds[2]) {
    char *run = path_join(root, name), fault[64];
    int k = 1, status = 1;
    for (; status != 0 && k < 500; k++) {
        path_remove_tree(run, NULL);
        before(run);
        if (half) snprintf(fault, sizeof fault, "short@io=%d;kill@io=%d", k, k + 1);
        else snprintf(fault, sizeof fault, "kill@io=%d", k);
        status = child_save(run, seed, step, keep, 0, fault);
        EXPECT(status == 0 || (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL), "%s: status %x", fault, (unsigned)status);
        if (status) expect_newest(run, steps, seeds, fault);
        /* The same command again, without fault, ends with the new one and nothing left over. */
        EXPECT(child_save(run, seed, step, keep ? keep : 5, 0, NULL) == 0, "%s, then again: %s", fault, child_said());
        expect_newest(run, (int64_t[]){step, step}, (uint64_t[]){seed, seed}, fault);
        EXPECT(!hidden_left(run), "%s", fault);
    }
    EXPECT(status == 0 && k > 14, "ended after %d", k);
    free(run);
    return k - 2;
}

static void have_10(const char *run) { free(run_with(strrchr(run, '/') + 1, (int64_t[]){10}, 1)); }

TEST(P1_kill_at_every_io_call) {
    int n = kill_everywhere("kill", false, have_10, 20, 20, 0, (int64_t[]){10, 20}, (uint64_t[]){10, 20});
    printf("# save: %d io calls\n", n);
}

TEST(P1_kill_in_the_middle_of_every_write) {
    kill_everywhere("killhalf", true, have_10, 20, 20, 0, (int64_t[]){10, 20}, (uint64_t[]){10, 20});
}

TEST(P1_kill_at_every_io_call_of_save_and_retention) {
    int n = kill_everywhere("killretain", false, have_10, 20, 20, 1, (int64_t[]){10, 20}, (uint64_t[]){10, 20});
    printf("# save and retain: %d io calls\n", n);
}

/* The only checkpoint is replaced by another of the same step: one of the two is always there. */
TEST(P1_kill_while_replacing_the_only_one) {
    int n = kill_everywhere("killreplace", false, have_10, 77, 10, 0, (int64_t[]){10, 10}, (uint64_t[]){10, 77});
    printf("# replace: %d io calls\n", n);
}

TEST(P1_saving_the_same_state_again_keeps_it) {
    char *run = run_with("again", (int64_t[]){10}, 1), *dir = step_dir(run, 10), *file = path_join(dir, "model.safetensors");
    struct stat before, after;
    Error e = {0};
    GPT2 model = tiny();
    model_fill(&model, 10);
    stat(file, &before);
    EXPECT(save(run, &model, 10, 10, &e), "%s", e.text);
    stat(file, &after);
    EXPECT(before.st_ino == after.st_ino, "it was written again");
    EXPECT(truncate(file, 100) == 0 && save(run, &model, 10, 10, &e), "%s", e.text);
    expect_loads(dir, 10, 10);
    EXPECT(!hidden_left(run));
    gpt2_destroy(&model);
    free(file), free(dir), free(run);
}

/* ---- P2 ---- */

static void flip_bit(const char *path, uint64_t byte, int bit) {
    int fd = open(path, O_RDWR);
    unsigned char c = 0;
    EXPECT(pread(fd, &c, 1, (off_t)byte) == 1, "%s: byte %llu", path, (unsigned long long)byte);
    c ^= (unsigned char)(1 << bit);
    EXPECT(pwrite(fd, &c, 1, (off_t)byte) == 1);
    close(fd);
}

static const char *const part_names[] = {"model.safetensors", "optimizer-0000-of-0001.safetensors", "config.json", "training_state.json",
                                         "manifest.json"};
enum { N_PARTS = sizeof part_names / sizeof *part_names };

TEST(P2_a_thousand_bit_flips) {
    char *run = run_with("flips", (int64_t[]){10}, 1), *dir = step_dir(run, 10);
    Manifest m;
    Error e = {0};
    int named = 0;
    EXPECT(checkpoint_verify(dir, &e) && manifest_read(dir, &m, &e), "%s", e.text);
    for (uint64_t i = 0; i < 1000; i++) {
        const char *name = part_names[i % N_PARTS];
        char *path = path_join(dir, name);
        struct stat st;
        EXPECT(stat(path, &st) == 0);
        uint64_t byte = rng4(2, 0, 0, i).v[0] % (uint64_t)st.st_size;
        flip_bit(path, byte, (int)(i / 7 % 8));
        e = (Error){0};
        EXPECT(!checkpoint_verify(dir, &e) && e.code == EXIT_DATA && strstr(e.text, name), "%s byte %llu: %s", name, (unsigned long long)byte, e.text);
        for (size_t t = 0; i % N_PARTS < 2 && t < m.parts[0].n_tensors * (i % N_PARTS + 1); t++) {
            const PartTensor *p = &m.parts[i % N_PARTS ? 2 : 0].tensors[t];
            if (byte < p->begin || byte >= p->begin + p->bytes) continue;
            char *word = xasprintf("tensor %s ", p->name);
            EXPECT(strstr(e.text, word) && strstr(e.text, p->hash) && strstr(e.text, "found checksum"), "%s: %s", word, e.text);
            free(word);
            named++;
        }
        flip_bit(path, byte, (int)(i / 7 % 8));
        free(path);
    }
    EXPECT(named > 250, "%d flips hit a tensor", named);
    EXPECT(checkpoint_verify(dir, &e), "%s", e.text);
    manifest_free(&m);
    free(dir), free(run);
}

/* Rewrites a file with the first `bytes` of its content; zeros follow where that is longer. */
static void expect_rejected_at(const char *dir, const char *name, uint64_t bytes) {
    char *path = path_join(dir, name);
    size_t n;
    Error e = {0};
    char *content = file_read(path, &n, &e);
    if (bytes != n) {
        EXPECT(truncate(path, (off_t)bytes) == 0);
        EXPECT(!checkpoint_verify(dir, &e) && strstr(e.text, name), "%s cut to %llu of %zu: %s", name, (unsigned long long)bytes, n, e.text);
        FILE *f = fopen(path, "wb");
        EXPECT(f && fwrite(content, 1, n, f) == n && fclose(f) == 0);
    }
    free(content);
    free(path);
}

TEST(P2_every_truncation_boundary) {
    char *run = run_with("cut", (int64_t[]){10}, 1), *dir = step_dir(run, 10);
    Manifest m;
    Error e = {0};
    EXPECT(manifest_read(dir, &m, &e), "%s", e.text);
    for (size_t i = 0; i < N_PARTS; i++) {
        char *path = path_join(dir, part_names[i]);
        struct stat st;
        EXPECT(stat(path, &st) == 0);
        free(path);
        uint64_t size = (uint64_t)st.st_size;
        for (uint64_t cut = 0; cut < 10; cut++) expect_rejected_at(dir, part_names[i], cut);
        for (uint64_t k = 0; k < 20; k++) expect_rejected_at(dir, part_names[i], rng4(3, 0, (uint32_t)i, k).v[0] % size);
        expect_rejected_at(dir, part_names[i], size - 1);
        expect_rejected_at(dir, part_names[i], size + 1);
    }
    for (size_t i = 0; i < m.n; i++)
        for (size_t t = 0; t < m.parts[i].n_tensors; t++)
            for (uint64_t d = 0; d < 3; d++) expect_rejected_at(dir, m.parts[i].name, m.parts[i].tensors[t].begin + d - 1);
    EXPECT(checkpoint_verify(dir, &e), "%s", e.text);
    manifest_free(&m);
    free(dir), free(run);
}

TEST(P2_every_file_deleted_or_one_too_many) {
    char *run = run_with("delete", (int64_t[]){10}, 1), *dir = step_dir(run, 10), *aside = path_join(root, "aside");
    Error e = {0};
    for (size_t i = 0; i < N_PARTS; i++) {
        char *path = path_join(dir, part_names[i]);
        EXPECT(rename(path, aside) == 0);
        EXPECT(!checkpoint_verify(dir, &e) && strstr(e.text, part_names[i]), "%s: %s", part_names[i], e.text);
        EXPECT(mkdir(path, 0777) == 0 && !checkpoint_verify(dir, &e) && strstr(e.text, part_names[i]), "%s: %s", part_names[i], e.text);
        EXPECT(rmdir(path) == 0 && rename(aside, path) == 0);
        free(path);
    }
    char *surplus = path_join(dir, "optimizer-0001-of-0002.safetensors"), *hidden = path_join(dir, ".nfs0001");
    EXPECT(file_replace(surplus, "x", 1, &e), "%s", e.text);
    EXPECT(!checkpoint_verify(dir, &e) && strstr(e.text, "optimizer-0001-of-0002"), "%s", e.text);
    EXPECT(unlink(surplus) == 0 && file_replace(hidden, "x", 1, &e) && checkpoint_verify(dir, &e), "%s", e.text);
    free(surplus), free(hidden), free(aside), free(dir), free(run);
}

/* Two checkpoints of one run: their files must not be mixed. */
TEST(P2_files_of_another_checkpoint) {
    char *run = run_with("mixed", (int64_t[]){10, 20}, 2);
    for (size_t i = 0; i < N_PARTS; i++) {
        char *from = xasprintf("%s/step_00000010/%s", run, part_names[i]), *to = xasprintf("%s/step_00000020/%s", run, part_names[i]);
        char *dir = step_dir(run, 20), *keep = path_join(root, "keep");
        Error e = {0};
        EXPECT(rename(to, keep) == 0 && link(from, to) == 0);
        EXPECT(!checkpoint_verify(dir, &e), "%s of another step was accepted", part_names[i]);
        EXPECT(unlink(to) == 0 && rename(keep, to) == 0 && checkpoint_verify(dir, &e), "%s", e.text);
        free(from), free(to), free(dir), free(keep);
    }
    free(run);
}

/* ---- P3 ---- */

TEST(P3_newest_valid_and_why_not_the_newer) {
    enum { K = 4 };
    int64_t steps[K] = {10, 20, 30, 40};
    for (int bad = 0; bad <= K; bad++) {
        char *run = run_with("fallback", steps, K), path[4096], said[8192] = "";
        for (int i = 0; i < bad; i++) {
            char *file = xasprintf("%s/step_%08lld/%s", run, (long long)steps[K - 1 - i], part_names[i % N_PARTS]);
            flip_bit(file, 50 + (uint64_t)i, i);
            free(file);
        }
        Error e = {0};
        FILE *report = fmemopen(said, sizeof said, "w");
        bool found = checkpoint_newest(run, path, report, &e);
        fclose(report);
        EXPECT(found == (bad < K), "%d bad: %s", bad, e.text);
        if (found) expect_loads(path, (uint64_t)steps[K - 1 - bad], steps[K - 1 - bad]);
        else EXPECT(e.code == EXIT_NO_CHECKPOINT, "code %d", e.code);
        for (int i = 0; i < K; i++) {
            char *line = xasprintf("step_%08lld rejected: %s/step_%08lld/%s", (long long)steps[K - 1 - i], run, (long long)steps[K - 1 - i],
                                   part_names[i % N_PARTS]);
            EXPECT((strstr(said, line) != NULL) == (i < bad), "%d bad, line %d of: %s", bad, i, said);
            free(line);
        }
        free(run);
    }
    char path[4096];
    Error e = {.code = 77};
    EXPECT(!checkpoint_newest("/nowhere/at/all", path, NULL, &e) && e.code == 0, "code %d", e.code);
}

/* ---- P4 ---- */

static void errno_everywhere(const char *name, const char *number) {
    char *run = path_join(root, name), fault[64];
    int status = 1, k = 1;
    for (; status != 0 && k < 500; k++) {
        path_remove_tree(run, NULL);
        have_10(run);
        snprintf(fault, sizeof fault, "errno=%s@io=%d", number, k);
        status = child_save(run, 20, 20, 0, 0, fault);
        char *said = child_said();
        EXPECT(status == 0 || (WIFEXITED(status) && WEXITSTATUS(status) == EXIT_STORAGE), "%s: status %x: %s", fault, (unsigned)status, said);
        EXPECT(status == 0 || strstr(said, "earlier ones are untouched"), "%s: %s", fault, said);
        EXPECT(!hidden_left(run), "%s left a temporary directory: %s", fault, said);
        char *old = step_dir(run, 10);
        expect_loads(old, 10, 10);
        expect_newest(run, (int64_t[]){10, 20}, (uint64_t[]){10, 20}, fault);
        free(old);
        free(said);
    }
    EXPECT(status == 0 && k > 14, "ended after %d", k);
    free(run);
}

TEST(P4_disk_full_at_every_io_call) { errno_everywhere("enospc", "ENOSPC"); }
TEST(P4_io_error_at_every_io_call) { errno_everywhere("eio", "EIO"); }

TEST(P4_short_writes_are_continued) {
    char *run = path_join(root, "short");
    have_10(run);
    int status = child_save(run, 20, 20, 0, 0, "short@io=3;short@io=4;short@io=5;short@io=6;short@io=8;short@io=10;short@io=12");
    char *said = child_said();
    EXPECT(status == 0, "%s", said);
    expect_newest(run, (int64_t[]){20, 20}, (uint64_t[]){20, 20}, "short writes");
    free(said);
    free(run);
}

TEST(P4_file_size_limit) {
    char *run = path_join(root, "fsize");
    have_10(run);
    for (uint64_t limit = 1; limit < 100000; limit = limit * 3 + 500) {
        int status = child_save(run, 20, 20, 0, limit, NULL);
        char *said = child_said();
        if (status == 0) EXPECT(limit > 50000, "limit %llu", (unsigned long long)limit);
        else EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == EXIT_STORAGE && !hidden_left(run), "limit %llu: %s", (unsigned long long)limit, said);
        expect_newest(run, (int64_t[]){10, status ? 10 : 20}, (uint64_t[]){10, status ? 10 : 20}, said);
        free(said);
    }
    free(run);
}

TEST(P4_small_tmpfs) {
    char *mounted = path_join(root, "tmpfs"), *run = path_join(mounted, "run");
    mkdir(mounted, 0777);
    bool have = mount("tmpfs", mounted, "tmpfs", 0, "size=288k") == 0;
    if (have) {
        GPT2 model = tiny();
        Error e = {0};
        model_fill(&model, 10);
        EXPECT(save(run, &model, 10, 10, &e), "%s", e.text);
        model_fill(&model, 20);
        EXPECT(save(run, &model, 20, 20, &e), "%s", e.text);
        EXPECT(!save(run, &model, 30, 30, &e) && e.code == EXIT_STORAGE && strstr(e.text, "No space"), "%s", e.text);
        EXPECT(!hidden_left(run));
        expect_newest(run, (int64_t[]){20, 20}, (uint64_t[]){20, 20}, "tmpfs");
        EXPECT(checkpoint_retain(run, 1, 0, &e) && save(run, &model, 20, 30, &e), "%s", e.text);
        gpt2_destroy(&model);
        umount(mounted);
    }
    free(run);
    free(mounted);
    if (!have) SKIP("no right to mount a tmpfs");
}

/* ---- P5 ---- */

TEST(P5_hundred_thousand_histories) {
    enum { MAX = 24 };
    for (uint64_t h = 0; h < 100000; h++) {
        int64_t steps[MAX];
        bool valid[MAX], removed[MAX];
        size_t n = 0;
        int keep_last = 1 + (int)(rng_u32(5, 0, 0, h) % 4);
        int64_t keep_every = rng_u32(5, 0, 1, h) % 5 * 10, step = 0;
        for (uint32_t event = 0; event < 12; event++) {
            Rng4 r = rng4(5, 1, event, h);
            if (r.v[0] % 3 == 0 && n) { valid[r.v[1] % n] = false; continue; }
            steps[n] = step += 1 + r.v[1] % 10;
            valid[n++] = r.v[2] % 4 != 0;
            retain_decide(removed, steps, valid, n, keep_last, keep_every);
            size_t left = 0, newest = n;
            for (size_t i = 0; i < n; i++) {
                size_t newer = 0;
                for (size_t j = i + 1; j < n; j++) newer += valid[j];
                bool want = newer >= (size_t)keep_last && (keep_every == 0 || steps[i] % keep_every != 0);
                EXPECT(removed[i] == want, "history %llu, step %lld", (unsigned long long)h, (long long)steps[i]);
                if (valid[i]) newest = i;
            }
            EXPECT(newest == n || !removed[newest], "history %llu: the newest valid one goes", (unsigned long long)h);
            for (size_t i = 0; i < n; i++)
                if (!removed[i]) steps[left] = steps[i], valid[left++] = valid[i];
            n = left;
        }
    }
}

TEST(P5_on_disk) {
    int64_t steps[] = {10, 20, 30, 40, 50};
    char *run = run_with("retain", steps, 5);
    Error e = {0};
    EXPECT(checkpoint_retain(run, 2, 20, &e), "%s", e.text);
    EXPECT(!exists(run, 10) && exists(run, 20) && !exists(run, 30) && exists(run, 40) && exists(run, 50));
    /* The newest rots without changing size: it does not count, and the one valid of the rest stays. */
    char *rotten = xasprintf("%s/step_00000050/model.safetensors", run), *cut = xasprintf("%s/step_00000040/model.safetensors", run);
    flip_bit(rotten, 20000, 3);
    EXPECT(truncate(cut, 100) == 0);
    EXPECT(checkpoint_retain(run, 1, 0, &e), "%s", e.text);
    EXPECT(exists(run, 20) && exists(run, 40) && exists(run, 50));
    /* None valid: nothing is removed. */
    char *last = xasprintf("%s/step_00000020/config.json", run), *left = path_join(run, ".tmp-step_00000060");
    EXPECT(unlink(last) == 0 && dir_create(left, &e) && checkpoint_retain(run, 1, 0, &e), "%s", e.text);
    EXPECT(exists(run, 20) && exists(run, 40) && exists(run, 50) && !hidden_left(run));
    EXPECT(checkpoint_retain("/nowhere/at/all", 1, 0, &e), "%s", e.text);
    free(rotten), free(cut), free(last), free(left), free(run);
}

/* ---- P6 ---- */

TEST(P6_run_ids_differ) {
    enum { N = 500 };
    static char ids[N][33];
    for (int i = 0; i < N; i++) {
        EXPECT(run_id_create(ids[i]) && strlen(ids[i]) == 32 && strspn(ids[i], "0123456789abcdef") == 32);
        for (int k = 0; k < i; k++) EXPECT(strcmp(ids[i], ids[k]) != 0);
    }
}

TEST(P6_run_id_in_every_file_and_no_other_run_beside_it) {
    char *run = run_with("used", (int64_t[]){10}, 1);
    for (size_t i = 0; i < N_PARTS; i++) {
        char *path = xasprintf("%s/step_00000010/%s", run, part_names[i]);
        size_t n;
        char *content = file_read(path, &n, NULL);
        EXPECT(content && memmem(content, n, RUN_ID, 32), "%s", part_names[i]);
        free(content);
        free(path);
    }
    GPT2 model = tiny();
    RunIdentity other = identity();
    Error e = {0};
    for (int64_t step = 10; step < 30; step += 10) {
        TrainState s = state_at(1, step);
        other.run_id[0] = 'f';
        EXPECT(!checkpoint_save(run, &model, &s, &other, &e) && e.code == EXIT_USAGE && strstr(e.text, "belongs to run"), "%s", e.text);
    }
    expect_newest(run, (int64_t[]){10, 10}, (uint64_t[]){10, 10}, "another run");
    gpt2_destroy(&model);
    free(run);
}

/* ---- P12 ---- */

static bool load_with(const char *dir, const FixedFact *now, size_t n, const char *allow, Error *e) {
    GPT2 model = tiny();
    TrainState s;
    RunIdentity id = {.facts = now, .n_facts = n};
    model_fill(&model, 999);
    memset(&s, 0, sizeof s);
    *e = (Error){0};
    bool ok = checkpoint_load(dir, &model, &s, &id, allow, e);
    EXPECT(ok || (model_differences(&model, 999) == 0 && s.step == 0 && id.run_id[0] == 0), "a refused load touched something");
    gpt2_destroy(&model);
    return ok;
}

TEST(P12_each_changed_fact_is_refused_unless_allowed) {
    char *run = run_with("facts", (int64_t[]){10}, 1), *dir = step_dir(run, 10);
    Error e;
    for (size_t i = 0; i < N_FACTS; i++) {
        FixedFact now[N_FACTS + 1];
        memcpy(now, facts, sizeof facts);
        now[i].value = "changed";
        EXPECT(!load_with(dir, now, N_FACTS, NULL, &e) && e.code == EXIT_USAGE, "%s", facts[i].name);
        EXPECT(strstr(e.text, facts[i].name) && strstr(e.text, facts[i].class_name) && strstr(e.text, facts[i].value) && strstr(e.text, "\"changed\"") &&
               strstr(e.text, "--allow-change"), "%s", e.text);
        EXPECT(load_with(dir, now, N_FACTS, facts[i].class_name, &e), "%s", e.text);
        char *list = xasprintf("x,%s,y", facts[i].class_name), *near = xasprintf("%ss,%.2s", facts[i].class_name, facts[i].class_name);
        EXPECT(load_with(dir, now, N_FACTS, list, &e), "%s", e.text);
        EXPECT(!load_with(dir, now, N_FACTS, near, &e));
        free(list), free(near);
        /* no longer stated; stated for the first time */
        memcpy(now, facts, sizeof facts);
        memmove(now + i, now + i + 1, (N_FACTS - i - 1) * sizeof *now);
        EXPECT(!load_with(dir, now, N_FACTS - 1, NULL, &e) && strstr(e.text, facts[i].name) && strstr(e.text, "now nothing"), "%s", e.text);
        memcpy(now, facts, sizeof facts);
        now[N_FACTS] = (FixedFact){"data", "brand new", NULL};
        EXPECT(!load_with(dir, now, N_FACTS + 1, NULL, &e) && strstr(e.text, "recorded nothing"), "%s", e.text);
    }
    EXPECT(load_with(dir, facts, N_FACTS, NULL, &e), "%s", e.text);
    char *value = checkpoint_fact(dir, "total-batch");
    EXPECT(value && !strcmp(value, "512") && !checkpoint_fact(dir, "nothing of that name"));
    free(value), free(dir), free(run);
}

TEST(P12_values_that_are_not_utf8) {
    char *run = path_join(root, "utf8"), *dir = step_dir(run, 10);
    FixedFact now[] = {{"data", "path", "caf\xe9.bin"}, {"data", "none", NULL}};
    RunIdentity id = {.facts = now, .n_facts = 2};
    memcpy(id.run_id, RUN_ID, 33);
    GPT2 model = tiny();
    TrainState s = state_at(10, 10);
    Error e = {0};
    EXPECT(checkpoint_save(run, &model, &s, &id, &e) && load_with(dir, now, 2, NULL, &e), "%s", e.text);
    now[0].value = "caf\xe8.bin";
    EXPECT(!load_with(dir, now, 2, NULL, &e));
    gpt2_destroy(&model);
    free(dir), free(run);
}

TEST(P12_another_shape_cannot_be_allowed) {
    char *run = run_with("shape", (int64_t[]){10}, 1), *dir = step_dir(run, 10);
    static const size_t shapes[][5] = {{3, 16, 2, 50, 8}, {2, 32, 2, 50, 8}, {2, 16, 4, 50, 8}, {2, 16, 2, 51, 8}, {2, 16, 2, 50, 9}};
    for (size_t i = 0; i < 5; i++) {
        GPT2 model = model_create(shapes[i][0], shapes[i][1], shapes[i][2], shapes[i][3], shapes[i][4]);
        TrainState s;
        RunIdentity id = identity();
        Error e = {0};
        EXPECT(!checkpoint_load(dir, &model, &s, &id, "shape", &e) && e.code == EXIT_USAGE && strstr(e.text, "layers 2"), "%zu: %s", i, e.text);
        gpt2_destroy(&model);
    }
    free(dir), free(run);
}

/* ---- P13 ---- */

/* Every byte of the state differs from the poison before, and equals what was saved after. */
TEST(P13_every_field_comes_back) {
    char *run = path_join(root, "poison"), *dir = step_dir(run, 123456789);
    GPT2 model = tiny();
    RunIdentity id = identity();
    Error e = {0};
    for (int round = 0; round < 3; round++) {
        TrainState s = state_at(40, 123456789), got;
        if (round == 1) s.best_val_loss = -INFINITY, s.last_val_loss = -0.0, s.monitor.loss.values[5] = -0.0f, s.monitor.norm.values[6] = INFINITY;
        if (round == 2) memset(&s.monitor, 0, sizeof s.monitor), s.samples = 0, s.updates = INT64_MIN, s.best_val_loss = 5e-324;
        s.last_val_loss = round ? s.last_val_loss : 1e308;
        path_remove_tree(run, NULL);
        model_fill(&model, 40);
        EXPECT(checkpoint_save(run, &model, &s, &id, &e), "%s", e.text);
        model_fill(&model, 41);
        EXPECT(model_differences(&model, 40) > 20000);
        memset(&got, 0x7b, sizeof got);
        EXPECT(checkpoint_load(dir, &model, &got, &id, NULL, &e), "%s", e.text);
        EXPECT(model_differences(&model, 40) == 0);
        if (round == 2) s.last_val_loss = got.last_val_loss = 0;  /* NaN: compared elsewhere */
        EXPECT(memcmp(&s, &got, sizeof s) == 0, "round %d", round);
    }
    gpt2_destroy(&model);
    free(dir), free(run);
}

/* Optimizer state in pieces, as several processes write it, loads like the one file (P11's loader half). */
TEST(P11_optimizer_state_in_pieces) {
    enum { W = 3 };
    char *run = run_with("pieces", (int64_t[]){10}, 1), *dir = step_dir(run, 10);
    GPT2 model = tiny();
    Manifest m;
    Error e = {0};
    EXPECT(manifest_read(dir, &m, &e), "%s", e.text);
    model_fill(&model, 10);
    size_t n = model.layout.n_tensors;
    Manifest split = {.n = 0};
    for (int rank = 0; rank < W; rank++) {
        StTensor *tensors = xcalloc(2 * n, sizeof *tensors);
        json_t *metadata = json_object();
        size_t count = 0;
        const float **from = xcalloc(2 * n, sizeof *from);
        for (size_t i = 0; i < 2 * n; i++) {
            const ParamTensor *t = &model.layout.tensors[i % n];
            size_t all = t->file_rows * t->cols, cut = i % n == 0 ? 7 : all / W;
            size_t begin = rank * cut, end = rank == W - 1 ? all : begin + cut;
            if (i % n == 3 && rank != 1) continue;                   /* a tensor that one rank holds alone */
            if (i % n == 3) begin = 0, end = all;
            char *key = xasprintf("range.%s", t->name);
            json_object_set_new(metadata, key, json_sprintf("%zu %zu", begin, end));
            free(key);
            tensors[count] = (StTensor){.name = xasprintf("%c.%s", i < n ? 'm' : 'v', t->name), .dtype_name = "F32", .n_dims = 1, .shape = {end - begin},
                                        .begin = count ? tensors[count - 1].end : 0};
            tensors[count].end = tensors[count].begin + (end - begin) * 4;
            from[count++] = (i < n ? model.m.p : model.v.p) + t->offset + begin;
        }
        char *name = xasprintf("optimizer-%04d-of-%04d.safetensors", rank, W), *path = path_join(dir, name), *text = json_dumps(metadata, 0);
        FileWriter *w = file_create(path, &e);
        EXPECT(w && st_write_header(w, tensors, count, text, &e), "%s", e.text);
        for (size_t i = 0; i < count; i++) file_write(w, from[i], tensors[i].end - tensors[i].begin, &e), free(tensors[i].name);
        EXPECT(file_commit(w, NULL, NULL, &e), "%s", e.text);
        manifest_add(&split, name);
        free(name), free(path), free(text), free(from), free(tensors);
        json_decref(metadata);
    }
    OptimizerSet set;
    GPT2 other = tiny();
    model_fill(&other, 10);
    for (size_t i = 0; i < n; i++) {  /* other moments, same weights */
        const ParamTensor *t = &other.layout.tensors[i];
        memset(other.m.p + t->offset, 1, t->file_rows * t->cols * 4);
        memset(other.v.p + t->offset, 1, t->file_rows * t->cols * 4);
    }
    EXPECT(optimizer_open(&set, dir, &split, &other, &e) && optimizer_read(&set, &other, &e), "%s", e.text);
    EXPECT(model_differences(&other, 10) == 0);
    optimizer_close(&set);
    for (size_t missing = 0; missing < W; missing++) {
        Manifest less = {.n = 0};
        for (size_t i = 0; i < W; i++)
            if (i != missing) manifest_add(&less, split.parts[i].name);
        EXPECT(!optimizer_open(&set, dir, &less, &other, &e) && strstr(e.text, "shard is missing"), "%s", e.text);
        manifest_free(&less);
    }
    manifest_add(&split, split.parts[1].name);
    EXPECT(!optimizer_open(&set, dir, &split, &other, &e) && strstr(e.text, "overlap"), "%s", e.text);
    manifest_free(&split);
    manifest_free(&m);
    gpt2_destroy(&other);
    gpt2_destroy(&model);
    free(dir), free(run);
}

TEST(a_checkpoint_of_a_newer_version_says_so) {
    char *run = run_with("newer", (int64_t[]){10}, 1), *dir = step_dir(run, 10), *path = path_join(dir, "manifest.json"), hash[33];
    size_t n;
    Error e = {0};
    char *text = file_read(path, &n, &e), *version = strstr(text, "\"version\": 1");
    EXPECT(version != NULL);
    if (version) version[11] = '2';
    hash_hex(text, n - 36, hash);
    memcpy(text + n - 36, hash, 32);
    EXPECT(file_replace(path, text, n, &e) && !checkpoint_verify(dir, &e) && strstr(e.text, "version 2") && strstr(e.text, "newer build"), "%s", e.text);
    free(text), free(path), free(dir), free(run);
}

/* ---- P14 ---- */
static const char GOLDEN[] = "dev/test/golden/checkpoint_v1";
static GPT2 golden_model(void) { return model_create(1, 4, 2, 5, 2); }

/* --golden: makes the fixture; run once per released format version, under a new name. */
static int golden_make(void) {
    GPT2 model = golden_model();
    Error e = {0};
    model_fill(&model, 14);
    return save(GOLDEN, &model, 14, 14, &e) ? 0 : error_print(&e);
}

TEST(P14_version_1_loads) {
    char path[4096];
    GPT2 model = golden_model();
    RunIdentity id = identity();
    TrainState s, want = state_at(14, 14);
    Error e = {0};
    EXPECT(checkpoint_newest(GOLDEN, path, stderr, &e), "%s", e.text);
    EXPECT(checkpoint_load(path, &model, &s, &id, NULL, &e), "%s", e.text);
    EXPECT(model_differences(&model, 14) == 0 && !memcmp(&s, &want, offsetof(TrainState, last_val_loss)) && isnan(s.last_val_loss));
    gpt2_destroy(&model);
}

int main(int argc, char **argv) {
    Error e = {0};
    if (!(cpu = cpu_backend_create(&e))) return error_print(&e);
    if (argc == 7 && !strcmp(argv[1], "--save")) return child_main(argv);
    if (argc == 2 && !strcmp(argv[1], "--golden")) return golden_make();
    test_start(argc, argv);
    snprintf(root, sizeof root, "%s/llmc_ckpt_XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
    if (!mkdtemp(root)) return 1;
    RUN(P1_round_trip);
    RUN(P1_kill_at_every_io_call);
    RUN(P1_kill_in_the_middle_of_every_write);
    RUN(P1_kill_at_every_io_call_of_save_and_retention);
    RUN(P1_kill_while_replacing_the_only_one);
    RUN(P1_saving_the_same_state_again_keeps_it);
    RUN(P2_a_thousand_bit_flips);
    RUN(P2_every_truncation_boundary);
    RUN(P2_every_file_deleted_or_one_too_many);
    RUN(P2_files_of_another_checkpoint);
    RUN(P3_newest_valid_and_why_not_the_newer);
    RUN(P4_disk_full_at_every_io_call);
    RUN(P4_io_error_at_every_io_call);
    RUN(P4_short_writes_are_continued);
    RUN(P4_file_size_limit);
    RUN(P4_small_tmpfs);
    RUN(P5_hundred_thousand_histories);
    RUN(P5_on_disk);
    RUN(P6_run_ids_differ);
    RUN(P6_run_id_in_every_file_and_no_other_run_beside_it);
    RUN(P11_optimizer_state_in_pieces);
    RUN(P12_each_changed_fact_is_refused_unless_allowed);
    RUN(P12_values_that_are_not_utf8);
    RUN(P12_another_shape_cannot_be_allowed);
    RUN(P13_every_field_comes_back);
    RUN(P14_version_1_loads);
    RUN(a_checkpoint_of_a_newer_version_says_so);
    path_remove_tree(root, NULL);
    return test_done();
}
