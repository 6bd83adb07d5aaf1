/* The whole test framework. A test file is a program: its main runs TEST(name) { ... } functions with RUN(name) and returns test_done().
 * Output: "ok NAME" or "FAILED NAME: file:line: why", then "N passed, N failed[, N skipped]". A test goes on after a failed EXPECT. */
#ifndef LLMC_TEST_H
#define LLMC_TEST_H
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static int test_passed, test_failed, test_skipped;
static int test_errors;            /* of the test that is running */
static const char *test_name = "", *test_filter;
static char test_skip_reason[256];
#define EXPECT(condition, ...)                                                                                         \
    do {                                                                                                               \
        if (!(condition) && test_errors++ < 10) {                                                                      \
            printf("FAILED %s: %s:%d: %s;", test_name, __FILE__, __LINE__, #condition);                                \
            printf(" " __VA_ARGS__);                                                                                   \
            printf("\n");                                                                                              \
        }                                                                                                              \
    } while (0)
#define SKIP(...)                                                                                                      \
    do {                                                                                                               \
        snprintf(test_skip_reason, sizeof test_skip_reason, __VA_ARGS__);                                              \
        return;                                                                                                        \
    } while (0)
#define TEST(name) static void test_##name(void)
#define RUN(name) test_run(#name, test_##name)
static inline void test_run(const char *name, void (*fn)(void)) {
    if (test_filter && !strstr(name, test_filter)) return;
    test_name = name;
    test_errors = 0;
    test_skip_reason[0] = 0;
    fn();
    if (test_errors) test_failed++;
    else if (test_skip_reason[0]) { test_skipped++; printf("skipped %s: %s\n", name, test_skip_reason); }
    else { test_passed++; printf("ok %s\n", name); }
    fflush(stdout);
}
/* argv[1], when given, is a part of the names of the tests to run. */
static inline void test_start(int argc, char **argv) { if (argc > 1) test_filter = argv[1]; }
/* The environment's `variable` names the file that was built beside this program: a library's stand-in. */
static inline void use_beside(const char *variable, const char *file) {
    char path[4096];
    ssize_t n = readlink("/proc/self/exe", path, sizeof path - 64);
    path[n < 0 ? 0 : n] = 0;
    snprintf(strrchr(path, '/') ? strrchr(path, '/') + 1 : path, 64, "%s", file);
    setenv(variable, path, 1);
}
static inline int test_done(void) {
    printf("%d passed, %d failed, %d skipped\n", test_passed, test_failed, test_skipped);
    return test_failed ? 1 : 0;
}
#endif
