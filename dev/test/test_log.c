/* Records parse as JSON whatever goes into them; P27: killed at random instants, every line but the last is whole, and what is
 * written after reopening parses; progress on a terminal and in a file; numbers for people. */
#include "llmc/run/log.h"
#include "llmc/base/io.h"
#include "llmc/base/rng.h"
#include "test.h"
#include <fcntl.h>
#include <jansson.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static char work[4096], *path;
static uint64_t draws;
static uint32_t any(uint32_t below) { return rng_u32(3, 1, 0, draws++) % below; }

/* Writes the record to a fresh file and parses its one line. */
static json_t *written(Record *r) {
    Error e = {0};
    MetricsLog log;
    unlink(path);
    EXPECT(metrics_open(&log, path, &e) && metrics_write(&log, r, &e), "%s", e.text);
    metrics_close(&log);
    size_t n = 0;
    char *text = file_read(path, &n, &e);
    EXPECT(text && n && strchr(text, '\n') == text + n - 1, "not one line: %s", text ? text : e.text);
    json_error_t error;
    json_t *json = text ? json_loads(text, JSON_REJECT_DUPLICATES, &error) : NULL;
    EXPECT(json, "%s in %s", error.text, text);
    free(text);
    return json;
}

TEST(every_kind_of_value) {
    Record r;
    record_begin(&r, "step");
    record_int(&r, "low", INT64_MIN);
    record_int(&r, "high", INT64_MAX);
    record_double(&r, "third", 1.0 / 3);
    record_double(&r, "tiny", 1.25e-300);
    record_double(&r, "nan", NAN);
    record_double(&r, "inf", -INFINITY);
    record_string(&r, "text", "a \"b\" \\ / \n\t\x01\x1f\x7f \xc3\xa4 \xf0\x9f\x98\x80");
    record_string(&r, "none", NULL);
    record_string(&r, "na\"me", "");
    json_t *json = written(&r);
    if (!json) return;
    EXPECT(!r.text && !r.n, "the record is freed");
    EXPECT(!strcmp(json_string_value(json_object_get(json, "kind")), "step"));
    EXPECT(fabs(json_real_value(json_object_get(json, "time")) - (double)time(NULL)) < 10, "time");
    EXPECT(json_integer_value(json_object_get(json, "low")) == INT64_MIN && json_integer_value(json_object_get(json, "high")) == INT64_MAX);
    EXPECT(json_real_value(json_object_get(json, "third")) == 0.333333333 && json_real_value(json_object_get(json, "tiny")) == 1.25e-300);
    EXPECT(json_is_null(json_object_get(json, "nan")) && json_is_null(json_object_get(json, "inf")) && json_is_null(json_object_get(json, "none")));
    EXPECT(!strcmp(json_string_value(json_object_get(json, "text")), "a \"b\" \\ / \n\t\x01\x1f\x7f \xc3\xa4 \xf0\x9f\x98\x80"), "text");
    EXPECT(json_is_string(json_object_get(json, "na\"me")));
    json_decref(json);
}

/* Bytes that are no UTF-8 become U+FFFD each; what is valid beside them stays. */
TEST(invalid_utf8) {
    static const char *const cases[][2] = {
        {"a\x80z", "a\xEF\xBF\xBDz"}, {"\xc3", "\xEF\xBF\xBD"}, {"\xc3\xa4\xc3", "\xc3\xa4\xEF\xBF\xBD"}, {"\xc0\xaf", "\xEF\xBF\xBD\xEF\xBF\xBD"},
        {"\xe0\x80\xaf", "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD"}, {"\xed\xa0\x80", "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD"},
        {"\xf4\x90\x80\x80", "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD"}, {"\xff\"", "\xEF\xBF\xBD\""}, {"\xf0\x9f\x98", "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD"},
        {"\xed\x9f\xbf\xee\x80\x80\xf4\x8f\xbf\xbf", "\xed\x9f\xbf\xee\x80\x80\xf4\x8f\xbf\xbf"}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        Record r;
        record_begin(&r, "x");
        record_string(&r, "s", cases[i][0]);
        json_t *json = written(&r);
        const char *found = json_string_value(json_object_get(json, "s"));
        EXPECT(found && !strcmp(found, cases[i][1]), "case %zu: %s", i, found ? found : "?");
        json_decref(json);
    }
}

TEST(random_strings_and_doubles) {
    for (int round = 0; round < 400; round++) {
        Record r;
        char s[40];
        size_t n = any(39);
        for (size_t i = 0; i < n; i++) s[i] = (char)(any(255) + 1);
        s[n] = 0;
        uint64_t bits = (uint64_t)any(UINT32_MAX) << 32 | any(UINT32_MAX);
        double value;
        memcpy(&value, &bits, sizeof value);
        record_begin(&r, s);
        record_string(&r, "s", s);
        record_double(&r, "d", value);
        json_t *json = written(&r), *d = json_object_get(json, "d");
        EXPECT(isfinite(value) ? fabs(json_number_value(d) / value - 1) < 1e-8 : json_is_null(d), "%.17g", value);
        json_decref(json);
    }
}

TEST(open_errors) {
    Error e = {0};
    MetricsLog log;
    char *missing = path_join(work, "no/dir/metrics.jsonl");
    EXPECT(!metrics_open(&log, missing, &e) && e.code == EXIT_STORAGE && strstr(e.text, missing), "%s", e.text);
    EXPECT(!metrics_open(&log, work, &e) && e.code == EXIT_STORAGE && strstr(e.text, work), "%s", e.text);
    free(missing);
}

/* ---- P27 -------------------------------------------------------------------------------------------------------- */

/* Lines that parse; *bad counts the others. *whole: the file ends with a newline. */
static int count_lines(int *bad, bool *whole) {
    size_t n = 0;
    char *text = file_read(path, &n, NULL);
    int good = 0;
    *bad = 0;
    *whole = !n || (text && text[n - 1] == '\n');
    for (char *line = text, *end; line && line < text + n; line = end + 1) {
        end = strchr(line, '\n');
        if (!end) end = text + n;
        json_t *json = json_loadb(line, (size_t)(end - line), 0, NULL);
        good += json != NULL;
        *bad += !json && end > line;
        json_decref(json);
    }
    free(text);
    return good;
}

static bool write_one(MetricsLog *log, int i, size_t size, Error *e) {
    char *s = xmalloc(size + 1);
    memset(s, 'a' + i % 26, size);
    s[size] = 0;
    Record r;
    record_begin(&r, "step");
    record_int(&r, "step", i);
    record_string(&r, "text", s);
    free(s);
    return metrics_write(log, &r, e);
}

/* Records from 1 byte to 1 MiB, so that some kills land inside a write. */
static void writer_child(void) {
    Error e;
    MetricsLog log;
    if (!metrics_open(&log, path, &e)) _exit(1);
    for (int i = 0;; i++)
        if (!write_one(&log, i, i % 3 ? (size_t)(i % 50) : 1u << 20, &e)) _exit(1);
}

TEST(killed_at_random_instants) {
    Error e = {0};
    int cut_lines = 0, records = 0;
    for (int kill_number = 0; kill_number < 50; kill_number++) {
        unlink(path);
        pid_t child = fork();
        if (child == 0) writer_child();
        /* From the first bytes in the file on, however busy the machine is. */
        struct stat st = {0};
        for (int wait = 0; wait < 5000 && (stat(path, &st) || !st.st_size); wait++) usleep(1000);
        usleep(any(20000));
        kill(child, SIGKILL);
        int status, bad;
        bool whole;
        waitpid(child, &status, 0);
        EXPECT(WIFSIGNALED(status), "the child died of itself: %d", status);
        int good = count_lines(&bad, &whole);
        EXPECT(bad == !whole, "kill %d: %d bad lines, file %s", kill_number, bad, whole ? "whole" : "cut");
        MetricsLog log;
        EXPECT(metrics_open(&log, path, &e) && write_one(&log, 1, 10, &e) && write_one(&log, 2, 10, &e), "%s", e.text);
        metrics_close(&log);
        int bad_after, good_after = count_lines(&bad_after, &whole);
        EXPECT(whole && good_after == good + 2 && bad_after == bad, "kill %d: %d good, then %d; %d bad, then %d", kill_number, good, good_after, bad, bad_after);
        cut_lines += bad;
        records += good;
    }
    EXPECT(records > 0, "no record was written before any kill");
    printf("50 kills: %d whole records, %d cut ones\n", records, cut_lines);
}

/* A half line made by hand, so that closing it off is tested in every run. */
TEST(half_line_is_closed_off) {
    Error e = {0};
    static const char half[] = "{\"kind\":\"a\"}\n{\"kind\":\"st";
    EXPECT(file_replace(path, half, strlen(half), &e), "%s", e.text);
    MetricsLog log;
    int bad;
    bool whole;
    EXPECT(metrics_open(&log, path, &e) && write_one(&log, 1, 5, &e), "%s", e.text);
    metrics_close(&log);
    EXPECT(count_lines(&bad, &whole) == 2 && bad == 1 && whole, "%d bad", bad);
}

/* A write that fails half-way (a real limit) is an error, and the next record still has a line of its own. */
TEST(full_disk_in_the_middle) {
    unlink(path);
    pid_t child = fork();
    if (child == 0) {
        signal(SIGXFSZ, SIG_IGN);
        MetricsLog log;
        Error e = {0};
        struct rlimit limit = {1000, RLIM_INFINITY};
        bool ok = metrics_open(&log, path, &e) && write_one(&log, 1, 100, &e);
        setrlimit(RLIMIT_FSIZE, &limit);
        ok = ok && !write_one(&log, 2, 2000, &e) && e.code == EXIT_STORAGE && strstr(e.text, "metrics");
        limit.rlim_cur = RLIM_INFINITY;
        setrlimit(RLIMIT_FSIZE, &limit);
        _exit(ok && write_one(&log, 3, 100, &e) ? 0 : 1);
    }
    int status, bad;
    bool whole;
    waitpid(child, &status, 0);
    EXPECT(WIFEXITED(status) && !WEXITSTATUS(status), "status %d", status);
    EXPECT(count_lines(&bad, &whole) == 2 && bad == 1 && whole, "%d bad", bad);
}

/* ---- progress and numbers --------------------------------------------------------------------------------------- */

/* What progress prints on stderr when that is fd; caller frees. */
static void progress_to(int fd, bool quiet) {
    int old = dup(STDERR_FILENO);
    dup2(fd, STDERR_FILENO);
    Progress p;
    progress_begin(&p, "counting", "tokens", 1000, quiet);
    for (int i = 0; i < 1000; i++) progress_update(&p, i);
    p.last -= 11; /* as if eleven seconds had passed */
    progress_update(&p, 500);
    progress_end(&p, 1000);
    dup2(old, STDERR_FILENO);
    close(old);
}

TEST(progress_in_a_file) {
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0666);
    progress_to(fd, false);
    char *text = file_read(path, NULL, NULL);
    int lines = 0;
    for (char *s = text; *s; s++) lines += *s == '\n';
    EXPECT(lines == 2 && !strchr(text, '\r') && !strchr(text, '\033'), "%s", text);
    EXPECT(!strncmp(text, "counting: 50.0% of 1.0K tokens, ", 32) && strstr(text, "tokens/s, 0s left\n") && strstr(text, "\ncounting: 1.0K tokens in 0s ("), "%s", text);
    free(text);
    EXPECT(ftruncate(fd, 0) == 0 && lseek(fd, 0, SEEK_SET) == 0);
    progress_to(fd, true);
    EXPECT(lseek(fd, 0, SEEK_END) == 0, "quiet prints nothing");
    close(fd);
}

TEST(progress_on_a_terminal) {
    int master = posix_openpt(O_RDWR | O_NOCTTY);
    if (master < 0 || grantpt(master) || unlockpt(master)) SKIP("no pseudo-terminal here");
    int terminal = open(ptsname(master), O_RDWR | O_NOCTTY);
    if (terminal < 0) SKIP("no pseudo-terminal here");
    progress_to(terminal, false);
    close(terminal); /* the kernel passes the output on when it likes: read to its end, EIO */
    char text[1000];
    size_t used = 0;
    for (ssize_t n; used < sizeof text - 1 && (n = read(master, text + used, sizeof text - 1 - used)) > 0;) used += (size_t)n;
    text[used] = 0;
    EXPECT(!strncmp(text, "\rcounting: 50.0%", 16) && strstr(text, "\033[K\rcounting: 1.0K tokens in") && strchr(text, '\n') == strrchr(text, '\n'), "%s", text);
    close(master);
}

TEST(numbers_for_people) {
    static const struct { void (*format)(char *, double); double value; const char *text; } cases[] = {
        {format_duration, 93784, "1d 2h"}, {format_duration, 3725, "1h 2m"}, {format_duration, 59.4, "59s"}, {format_duration, 60, "1m 0s"},
        {format_duration, 0, "0s"}, {format_duration, 3599.99, "59m 59s"}, {format_duration, NAN, "?"}, {format_duration, INFINITY, "?"}, {format_duration, -1, "?"},
        {format_bytes, 1.5 * (1 << 30), "1.50 GiB"}, {format_bytes, 0, "0 B"}, {format_bytes, 1023, "1023 B"}, {format_bytes, 1024, "1.00 KiB"},
        {format_bytes, 1048575, "1.00 MiB"}, {format_bytes, 1e300, "8.9e+284 PiB"}, {format_count, 124.4e6, "124.4M"}, {format_count, 999, "999"}, {format_count, 999.97e3, "1.0M"},
        {format_count, 12.5, "12.5"}, {format_count, 1000, "1.0K"}, {format_count, 1.5e9, "1.5B"}, {format_count, 2e13, "20.0T"}, {format_count, -5000, "-5.0K"}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char text[32];
        cases[i].format(text, cases[i].value);
        EXPECT(!strcmp(text, cases[i].text), "%g: \"%s\", expected \"%s\"", cases[i].value, text, cases[i].text);
    }
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    snprintf(work, sizeof work, "%s/llmc_log.XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
    if (!mkdtemp(work)) return perror(work), 1;
    path = path_join(work, "metrics.jsonl");
    RUN(every_kind_of_value);
    RUN(invalid_utf8);
    RUN(random_strings_and_doubles);
    RUN(open_errors);
    RUN(killed_at_random_instants);
    RUN(half_line_is_closed_off);
    RUN(full_disk_in_the_middle);
    RUN(progress_in_a_file);
    RUN(progress_on_a_terminal);
    RUN(numbers_for_people);
    path_remove_tree(work, NULL);
    free(path);
    return test_done();
}
