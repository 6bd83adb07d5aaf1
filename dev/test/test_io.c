/* Durable writing: contents and checksums, every injected crash and error of file_replace, real full disks and size limits,
 * directories. A child process (this program run as `test_io child ...`) takes the faults. */
#include "llmc/base/io.h"
#include "llmc/base/timer.h"
#include "test.h"
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <xxhash.h>

static char work[4096];

static char *in_work(const char *name) { return path_join(work, name); }

static uint32_t seed = 12345;
static uint32_t any(uint32_t below) {
    seed = seed * 1664525u + 1013904223u;
    return (seed >> 8) % below;
}

static bool holds(const char *path, const void *data, size_t bytes) {
    size_t n;
    char *text = file_read(path, &n, NULL);
    bool same = text && n == bytes && !memcmp(text, data, bytes) && text[n] == 0;
    free(text);
    return same;
}

TEST(chunks_arrive_and_are_hashed) {
    size_t capacity = 5u << 20;
    char *data = xmalloc(capacity), *path = in_work("chunks");
    for (size_t i = 0; i < capacity; i++) data[i] = (char)any(256);
    static const uint32_t largest[] = {1, 7, 4096, 1u << 20, (1u << 20) + 1, 3u << 20};
    for (int round = 0; round < 18; round++) {
        Error e = {0};
        FileWriter *f = file_create(path, &e);
        size_t n = 0, total = round < 6 ? any(3000) : any(5u << 20);
        while (f && n < total) {
            size_t chunk = any(largest[round % 6]) + 1;
            if (chunk > total - n) chunk = total - n;
            EXPECT(file_write(f, data + n, chunk, &e), "%s", e.text);
            n += chunk;
            if (round % 6 == 0 && n > 2000) total = n;
        }
        uint64_t size = 0, size2 = 0;
        char hash[33], hash2[33], expected[33] = "";
        EXPECT(f && file_commit(f, &size, hash, &e), "%s", e.text);
        XXH128_canonical_t c;
        XXH128_canonicalFromHash(&c, XXH3_128bits(data, n));
        for (int i = 0; i < 16; i++) sprintf(expected + 2 * i, "%02x", c.digest[i]);
        EXPECT(size == n && !strcmp(hash, expected), "size %zu of %zu, hash %s of %s", (size_t)size, n, hash, expected);
        EXPECT(file_hash(path, &size2, hash2, &e) && size2 == n && !strcmp(hash2, hash), "%s", e.text);
        EXPECT(holds(path, data, n), "round %d", round);
    }
    free(data);
    free(path);
}

/* The published value for empty input (xxHash's own test vectors). */
TEST(hash_of_nothing) {
    Error e = {0};
    char *path = in_work("empty"), hash[33] = "";
    uint64_t size = 1;
    FileWriter *f = file_create(path, &e);
    EXPECT(f && file_commit(f, &size, hash, &e), "%s", e.text);
    EXPECT(size == 0 && !strcmp(hash, "99aa06d3014798d86001c324468d497f"), "%s", hash);
    free(path);
}

TEST(abandon_removes) {
    char *path = in_work("gone");
    FileWriter *f = file_create(path, NULL);
    EXPECT(f && path_exists(path));
    EXPECT(file_write(f, "abc", 3, NULL));
    file_abandon(f);
    EXPECT(!path_exists(path));
    free(path);
}

static void expect_error(const Error *e, int code, const char *path, const char *word) {
    EXPECT(e->code == code && strstr(e->text, path) && strstr(e->text, word), "code %d, \"%s\" lacks %s or %s", e->code, e->text, path, word);
}

TEST(messages_name_path_and_cause) {
    Error e = {0};
    char *path = in_work("no/such/file");
    EXPECT(!file_create(path, &e));
    expect_error(&e, EXIT_STORAGE, path, "No such file");
    EXPECT(!file_read(path, NULL, &e));
    expect_error(&e, EXIT_DATA, path, "spelling");
    EXPECT(!file_hash(path, NULL, NULL, &e));
    expect_error(&e, EXIT_DATA, path, "No such file");
    EXPECT(!file_read(work, NULL, &e));
    expect_error(&e, EXIT_DATA, work, "directory");
    EXPECT(!file_replace(path, "x", 1, &e));
    expect_error(&e, EXIT_STORAGE, path, "No such file");
    EXPECT(!dir_sync(path, &e));
    expect_error(&e, EXIT_STORAGE, path, "No such file");
    EXPECT(!path_rename(path, "elsewhere", &e));
    expect_error(&e, EXIT_STORAGE, path, "elsewhere");
    free(path);
}

/* A real full device: nothing injected. */
TEST(full_device) {
    if (access("/dev/full", W_OK)) SKIP("no /dev/full here");
    Error e = {0};
    char byte[100] = {0};
    FileWriter *f = file_create("/dev/full", &e);
    EXPECT(f && file_write(f, byte, sizeof byte, &e), "small writes wait in the buffer: %s", e.text);
    EXPECT(!file_commit(f, NULL, NULL, &e));
    expect_error(&e, EXIT_STORAGE, "/dev/full", "--keep");
    f = file_create("/dev/full", &e);
    char *large = xcalloc(3, 1 << 20);
    EXPECT(!file_write(f, large, 3u << 20, &e));
    e.code = 0;
    EXPECT(!file_write(f, byte, 1, &e) && e.code == EXIT_STORAGE, "a writer that failed once stays failed");
    EXPECT(!file_commit(f, NULL, NULL, &e));
    free(large);
}

TEST(abandoning_a_device_leaves_it_there) {
    char *path = in_work("device");
    Error e = {0};
    struct stat st;
    EXPECT(symlink("/dev/null", path) == 0);
    FileWriter *f = file_create(path, &e);
    EXPECT(f && file_write(f, "x", 1, &e), "%s", e.text);
    file_abandon(f);
    EXPECT(lstat(path, &st) == 0, "the name of a device was removed");
    free(path);
}

/* write(2) really is short here: the limit cuts a write in two and refuses the next one. */
TEST(size_limit) {
    char *path = in_work("limited");
    Error e = {0};
    EXPECT(file_replace(path, "old", 3, &e));
    pid_t child = fork();
    if (child == 0) {
        signal(SIGXFSZ, SIG_IGN);
        struct rlimit limit = {100000, 100000};
        setrlimit(RLIMIT_FSIZE, &limit);
        char *data = xcalloc(1, 300000);
        bool ok = file_replace(path, data, 300000, &e);
        _exit(!ok && e.code == EXIT_STORAGE && strstr(e.text, "ulimit -f") ? 0 : 1);
    }
    int status;
    waitpid(child, &status, 0);
    EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 0, "status %d", status);
    char *temporary = xasprintf("%s.tmp", path);
    EXPECT(holds(path, "old", 3) && !path_exists(temporary));
    free(temporary);
    free(path);
}

TEST(reads_a_pipe) {
    char *path = in_work("fifo"), *data = xmalloc(100000);
    memset(data, 'p', 100000);
    EXPECT(mkfifo(path, 0600) == 0);
    pid_t child = fork();
    if (child == 0) {
        int fd = open(path, O_WRONLY);
        for (int i = 0; i < 10; i++)
            if (write(fd, data + i * 10000, 10000) != 10000) _exit(1);
        _exit(0);
    }
    EXPECT(holds(path, data, 100000));
    waitpid(child, NULL, 0);
    free(data);
    free(path);
}

TEST(directories) {
    Error e = {0};
    char *deep = in_work("a/b/c//d/"), *top = in_work("a"), *file = in_work("a/b/f"), *outside = in_work("outside"), *link = in_work("a/b/link");
    EXPECT(dir_create(deep, &e) && path_is_dir(deep), "%s", e.text);
    EXPECT(dir_create(deep, &e), "again: %s", e.text);
    EXPECT(file_replace(file, "x", 1, &e) && path_exists(file) && !path_is_dir(file), "%s", e.text);
    EXPECT(!dir_create(file, &e));
    expect_error(&e, EXIT_STORAGE, file, "exists");
    char *under = path_join(file, "d");
    EXPECT(!dir_create(under, &e) && e.code == EXIT_STORAGE, "%s", e.text);
    EXPECT(!dir_create("", &e) && e.code == EXIT_STORAGE);
    EXPECT(dir_create(outside, &e));
    char *kept = path_join(outside, "kept");
    EXPECT(file_replace(kept, "k", 1, &e));
    EXPECT(symlink(outside, link) == 0);
    EXPECT(path_remove_tree(top, &e) && !path_exists(top), "%s", e.text);
    EXPECT(holds(kept, "k", 1), "what a link points to stays");
    EXPECT(path_remove_tree(top, &e), "missing is fine: %s", e.text);
    char *moved = in_work("moved");
    EXPECT(path_rename(outside, moved, &e) && path_is_dir(moved) && !path_exists(outside), "%s", e.text);
    EXPECT(dir_sync(moved, &e), "%s", e.text);
    free(deep), free(top), free(file), free(outside), free(link), free(under), free(kept), free(moved);
}

TEST(joins) {
    static const char *const cases[][3] = {{"a", "b", "a/b"}, {"a/", "b", "a/b"}, {"", "b", "b"}, {"/", "b", "/b"}, {"a", "b/c", "a/b/c"}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char *joined = path_join(cases[i][0], cases[i][1]);
        EXPECT(!strcmp(joined, cases[i][2]), "%s", joined);
        free(joined);
    }
}

TEST(lines) {
    Error e = {0};
    char *path = in_work("lines");
    int fd = open(path, O_WRONLY | O_CREAT | O_APPEND, 0666);
    EXPECT(line_append(fd, "one\n", 4, &e) && line_append(fd, "two\n", 4, &e), "%s", e.text);
    close(fd);
    EXPECT(holds(path, "one\ntwo\n", 8));
    EXPECT(!line_append(fd, "three\n", 6, &e) && e.code == EXIT_STORAGE, "a closed descriptor");
    free(path);
}

#ifdef LLMC_FAULT_INJECTION
/* ---- injected faults, each in a child process with its own LLMC_FAULT ------------------------------------------- */

/* Returns what waitpid says of `test_io child ACTION PATH`; its error text is in the file `said`. */
static int child(const char *fault, const char *action, const char *path) {
    pid_t pid = fork();
    if (pid == 0) {
        char *said = in_work("said");
        if (!freopen(said, "w", stderr)) _exit(99);
        setenv("LLMC_FAULT", fault, 1);
        execl("/proc/self/exe", "test_io", "child", action, path, (char *)NULL);
        _exit(99);
    }
    int status = 0;
    waitpid(pid, &status, 0);
    return status;
}

static bool said(const char *word) {
    char *path = in_work("said"), *text = file_read(path, NULL, NULL);
    bool found = text && strstr(text, word);
    free(text);
    free(path);
    return found;
}

static char large[3 << 20];

static void fill_large(void) {
    for (size_t i = 0; i < sizeof large; i++) large[i] = (char)(i * 2654435761u >> 13);
}

static int child_main(const char *action, const char *path) {
    Error e = {0};
    fill_large();
    bool ok = true;
    if (!strcmp(action, "replace")) ok = file_replace(path, large, sizeof large, &e);
    if (!strcmp(action, "tree")) ok = dir_create(path, &e) && path_remove_tree(path, &e);
    if (!strcmp(action, "point"))
        for (int64_t step = 0; step < 10; step++) {
            fault_point("step", step);
            if (fault_flip("step", step)) return 40 + (int)step;
            ok = ok && file_replace(path, &step, sizeof step, &e);
        }
    return ok ? 0 : error_print(&e);
}

static bool killed(int status) { return WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL; }
static bool exited(int status, int code) { return WIFEXITED(status) && WEXITSTATUS(status) == code; }

/* P1 in small: killed at each call in turn, the file is the old or the new one, whole. */
TEST(replace_killed_everywhere) {
    char *path = in_work("replaced");
    int k = 1, old_seen = 0, new_seen = 0;
    for (int status = SIGKILL; k < 20 && killed(status); k++) {
        EXPECT(file_replace(path, "old", 3, NULL));
        char fault[64];
        snprintf(fault, sizeof fault, "kill@io=%d", k);
        status = child(fault, "replace", path);
        bool is_old = holds(path, "old", 3), is_new = holds(path, large, sizeof large);
        old_seen += is_old;
        new_seen += is_new;
        EXPECT(is_old != is_new, "after %s: old %d, new %d", fault, is_old, is_new);
        EXPECT(killed(status) || exited(status, 0), "after %s: status %d", fault, status);
        EXPECT(said("fault injection is on"));
    }
    /* write, fsync, rename, fsync of the parent: old before each of the first three, new before the last and at the end. */
    EXPECT(k == 6 && old_seen == 3 && new_seen == 2, "%d rounds, %d old, %d new", k, old_seen, new_seen);
    free(path);
}

TEST(replace_failing_everywhere) {
    char *path = in_work("failing"), *temporary = in_work("failing.tmp");
    static const char *const names[][2] = {{"ENOSPC", "No space left"}, {"EIO", "dmesg"}, {"EDQUOT", "--keep"}, {"EROFS", "--out"}};
    for (int i = 0; i < 16; i++) {
        int k = i % 4 + 1;
        const char *const *name = names[i / 4];
        EXPECT(file_replace(path, "old", 3, NULL));
        char fault[64];
        snprintf(fault, sizeof fault, "errno=%s@io=%d", name[0], k);
        int status = child(fault, "replace", path);
        EXPECT(exited(status, EXIT_STORAGE), "%s: status %d", fault, status);
        EXPECT(said(name[1]) && said(k < 4 ? path : work), "%s", fault);
        EXPECT(k < 4 ? holds(path, "old", 3) : holds(path, large, sizeof large), "%s", fault);
        EXPECT(!path_exists(temporary), "%s", fault);
    }
    free(path);
    free(temporary);
}

TEST(short_and_interrupted_writes_go_on) {
    char *path = in_work("short");
    int status = child("short@io=1;short@io=2;errno=EINTR@io=3;short@io=4;errno=EINTR@io=6", "replace", path);
    EXPECT(exited(status, 0) && holds(path, large, sizeof large), "status %d", status);
    /* The fourth call is still a write: without the shortened ones it would be the parent's fsync, after the rename. */
    EXPECT(file_replace(path, "old", 3, NULL));
    EXPECT(killed(child("short@io=1;errno=EINTR@io=2;short@io=3;kill@io=4", "replace", path)) && holds(path, "old", 3));
    free(path);
}

TEST(directory_faults) {
    char *path = in_work("tree/b");
    EXPECT(exited(child("errno=ENOSPC@io=1", "tree", path), EXIT_STORAGE) && said("create the directory"));
    EXPECT(exited(child("errno=EIO@io=2", "tree", path), EXIT_STORAGE) && said("fsync"));
    EXPECT(killed(child("kill@io=3", "tree", path)) && path_exists(path), "made, flushed, not removed yet");
    EXPECT(exited(child("errno=EACCES@io=1", "tree", path), EXIT_STORAGE) && said("permissions") && said("remove"));
    EXPECT(exited(child("", "tree", path), 0) && !path_exists(path) && !said("fault"));
    free(path);
}

TEST(named_points) {
    char *path = in_work("point");
    EXPECT(killed(child("kill@step=4", "point", path)));
    int64_t last = 3;
    EXPECT(holds(path, &last, sizeof last));
    EXPECT(exited(child("kill@step=10", "point", path), 0), "never reached");
    EXPECT(exited(child("kill@stop=4", "point", path), 0), "another name");
    EXPECT(exited(child("flip@step=7", "point", path), 47) && exited(child("flip@step=7,rank=1", "point", path), 0), "asked by whom it concerns");
    double begin = seconds_now();
    EXPECT(exited(child("slow@step=4", "point", path), 0) && seconds_now() - begin > 6 * 0.02, "%g s", seconds_now() - begin);
    free(path);
}

TEST(unknown_faults_are_refused) {
    static const char *const bad[] = {"kill", "kill@io", "kill@io=0", "kill@io=x", "kill@io=1x", "errno=EWHAT@io=1", "errno=EIO@step=1", "short@step=1",
                                      "stop@io=1", "slow=0@step=1", "slower@step=1", "flip@io=1", "slow=x@io=1", "kill@io=1;", ";", "kill@step=-1"};
    char *path = in_work("unknown");
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        int status = child(bad[i], "replace", path);
        EXPECT(exited(status, EXIT_USAGE) && said("expected"), "%s: status %d", bad[i], status);
    }
    free(path);
}
#endif

int main(int argc, char **argv) {
#ifdef LLMC_FAULT_INJECTION
    if (argc == 4 && !strcmp(argv[1], "child")) return child_main(argv[2], argv[3]);
    fill_large();
#endif
    test_start(argc, argv);
    snprintf(work, sizeof work, "%s/llmc_io.XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
    if (!mkdtemp(work)) return perror(work), 1;
    RUN(chunks_arrive_and_are_hashed);
    RUN(hash_of_nothing);
    RUN(abandon_removes);
    RUN(messages_name_path_and_cause);
    RUN(full_device);
    RUN(abandoning_a_device_leaves_it_there);
    RUN(size_limit);
    RUN(reads_a_pipe);
    RUN(directories);
    RUN(joins);
    RUN(lines);
#ifdef LLMC_FAULT_INJECTION
    RUN(replace_killed_everywhere);
    RUN(replace_failing_everywhere);
    RUN(short_and_interrupted_writes_go_on);
    RUN(directory_faults);
    RUN(named_points);
    RUN(unknown_faults_are_refused);
#endif
    path_remove_tree(work, NULL);
    return test_done();
}
