/* P1, P4 and P7: a save that is killed, or fails, at any of its I/O calls, also where training goes on meanwhile. Such saves run in a child process (this program started again
 * with --save), because faults are counted over a process. */
#include "checkpoint_fixture.h"
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>

/* ---- children ---- */

static bool apart; /* the children's saves: training, here other values all the time, goes on meanwhile */

static bool save_apart(const char *run, GPT2 *model, uint64_t seed, int64_t step, int keep, Error *e) {
    TrainState s = state_at(seed, step);
    RunIdentity id = identity();
    Saving *saving = checkpoint_begin(run, model, &s, &id, &(SaveHow){.apart = true, .keep = keep}, e);
    if (!saving) return false;
    memset(&s, 0, sizeof s);
    do model_fill(model, ++seed);
    while (!checkpoint_ready(saving));
    return checkpoint_finish(saving, e);
}

/* --save|--apart RUN SEED STEP KEEP FILE_LIMIT: what the children do. */
static int child_main(char **argv) {
    Error e = {0};
    GPT2 model = tiny();
    model_fill(&model, strtoull(argv[3], NULL, 10));
    struct rlimit limit = {strtoull(argv[6], NULL, 10), RLIM_INFINITY};
    if (limit.rlim_cur) {
        signal(SIGXFSZ, SIG_IGN);
        setrlimit(RLIMIT_FSIZE, &limit);
    }
    int keep = atoi(argv[5]);
    uint64_t seed = strtoull(argv[3], NULL, 10);
    bool at_once = !strcmp(argv[1], "--save"), ok = at_once ? save(argv[2], &model, seed, atoll(argv[4]), &e) : save_apart(argv[2], &model, seed, atoll(argv[4]), keep, &e);
    if (ok && keep && at_once) ok = checkpoint_retain(argv[2], keep, 0, &e);
    gpt2_destroy(&model);
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
        execl("/proc/self/exe", "test_checkpoint", apart ? "--apart" : "--save", run, text[0], text[1], text[2], text[3], (char *)NULL);
        _exit(99);
    }
    int status = 0;
    waitpid(child, &status, 0);
    /* LLVM's OpenMP runtime leaves this file behind when its process is killed. */
    char left[96];
    snprintf(left, sizeof left, "/dev/shm/__KMP_REGISTERED_LIB_%d_%d", (int)child, (int)getuid());
    unlink(left);
    free(out);
    return status;
}

static char *child_said(void) {
    char *path = path_join(root, "child"), *text = file_read(path, NULL, NULL);
    free(path);
    return text ? text : xstrdup("");
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

/* ---- P7 ---- */

TEST(P7_kill_at_every_io_call_while_training_goes_on) {
    apart = true;
    int n = kill_everywhere("killapart", false, have_10, 20, 20, 1, (int64_t[]){10, 20}, (uint64_t[]){10, 20});
    printf("# save apart and retain: %d io calls\n", n);
    kill_everywhere("killaparthalf", true, have_10, 20, 20, 0, (int64_t[]){10, 20}, (uint64_t[]){10, 20});
    kill_everywhere("killapartreplace", false, have_10, 77, 10, 0, (int64_t[]){10, 10}, (uint64_t[]){10, 77});
    apart = false;
}

TEST(P7_disk_full_while_training_goes_on) {
    apart = true;
    errno_everywhere("enospcapart", "ENOSPC");
    apart = false;
}

int main(int argc, char **argv) {
    Error e = {0};
    if (!(cpu = cpu_backend_create(&e))) return error_print(&e);
    if (argc == 7 && (!strcmp(argv[1], "--save") || !strcmp(argv[1], "--apart"))) return child_main(argv);
    test_start(argc, argv);
    fixture_start();
    RUN(P1_round_trip);
    RUN(P1_kill_at_every_io_call);
    RUN(P1_kill_in_the_middle_of_every_write);
    RUN(P1_kill_at_every_io_call_of_save_and_retention);
    RUN(P1_kill_while_replacing_the_only_one);
    RUN(P1_saving_the_same_state_again_keeps_it);
    RUN(P4_disk_full_at_every_io_call);
    RUN(P4_io_error_at_every_io_call);
    RUN(P4_short_writes_are_continued);
    RUN(P4_file_size_limit);
    RUN(P4_small_tmpfs);
    RUN(P7_kill_at_every_io_call_while_training_goes_on);
    RUN(P7_disk_full_while_training_goes_on);
    return fixture_end();
}
