/* How a run over NCCL ends when it cannot go on, with NCCL's twin on the emulator; what it says where the library is missing. On a GPU: the library itself,
 * with one rank. */
#include "backends.h"
#include "llmc/dist/zero.h"
#include "ranks_kit.h"
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef enum { MISSING, SKIPS, SLEEPS, STOPPED, DIES, GOES_ON } What;
typedef struct { What what; int bad; const char *said; } Job; /* said: by the others, or where bad only sleeps, by all */

#ifdef LLMC_EMU
static int rank_main(Comm *host, void *context) {
    const Job *job = context;
    Error e = {0};
    bool real = job->what == MISSING;
    if (job->what == MISSING) setenv("LLMC_NCCL", "/nowhere/libnccl.so.2", 1);
    Backend *be = emu_backend_create(&(CudaOptions){.dtype = "fp32", .attention = "ours"}, &e);
    CHECK(be, "%s", e.text);
    DeviceQueue queue;
    CHECK(zero_queue_create(&queue, be, WIRE_FLOAT32, 0, &e), "%s", e.text);
    queue.emulated = !real;
    Comm *c = nccl_comm_create(host, &queue, 30, &e);
    FILE *said = fopen(job->said, "a");
    if (real) {
        if (said && host->rank == !job->bad) fprintf(said, "%s\n", c ? "made" : e.text), fflush(said);
        _exit(c ? 0 : e.code);
    }
    CHECK(c, "%s", e.text);
    float *data = be->alloc(be, MEM_OTHER, "data", 1000 * sizeof *data, &e);
    c->phase(c, "training", 40, 2);
    if (said && (host->rank != job->bad || job->what == SLEEPS)) dup2(fileno(said), STDERR_FILENO);
    if (host->rank == job->bad && job->what == SLEEPS) sleep(30);
    if (host->rank == job->bad && job->what == STOPPED) {
        pid_t me = getpid();
        if (fork()) raise(SIGSTOP);
        else sleep(6), kill(me, SIGKILL), _exit(0);
    }
    if (host->rank == job->bad && job->what == DIES) _exit(1);
    if (host->rank == job->bad && job->what == SKIPS) {
        comm_barrier(host);           /* the other one has ended */
        return 0;
    }
    c->reduce_scatter(c, data, 1000, WIRE_FLOAT32);
    be->sync(be);
    c->destroy(c);
    be->destroy(be);
    return 0;
}

static void run(What what, int bad, int code, const char *text) {
    char path[] = "/tmp/llmc_nccl_XXXXXX";
    int fd = mkstemp(path), codes[RANKS_MOST];
    CHECK(fd >= 0, "%s", path);
    close(fd);
    Job job = {what, bad, path};
    ranks_run(2, rank_main, &job, codes);
    char said[3000] = "";
    FILE *file = fopen(path, "r");
    if (file) said[fread(said, 1, sizeof said - 1, file)] = 0, fclose(file);
    EXPECT(codes[!bad] == code && strstr(said, text), "exit code %d, expected %d; it said \"%s\", expected \"%s\"", codes[!bad], code, said, text);
    unlink(path);
}

TEST(P21_a_skipped_operation_ends_with_code_6) {
    run(SKIPS, 1, EXIT_HANG, "error: rank 0: no progress for 2 seconds in reduce_scatter (operation 1) of 4000 bytes over NCCL during training, step 40; rank 1 is elsewhere, in all_reduce");
}
TEST(P21_a_rank_that_has_not_come_is_named_and_says_so) {
    run(SLEEPS, 1, EXIT_HANG, "error: rank 0: no progress for 2 seconds in reduce_scatter (operation 1) of 4000 bytes over NCCL during training, step 40; "
                              "rank 1 has not come to it: its first is still to come, during training, step 40");
    run(SLEEPS, 0, EXIT_HANG, "error: rank 0: rank 1 waits for me over NCCL in operation 1; my first is still to come, during training, step 40");
}
TEST(P21_a_silent_rank_is_named) {
    run(STOPPED, 1, EXIT_HANG, "error: rank 0: no progress for 2 seconds in reduce_scatter (operation 1) of 4000 bytes over NCCL during training, step 40; "
                               "asked who is missing, this is silent: rank 1, last heard of in all_reduce");
}
TEST(P22_a_dead_peer_ends_with_code_7) {
    run(DIES, 0, EXIT_PEER, "error: rank 1: a peer is gone; I waited for it in reduce_scatter (operation 1) of 4000 bytes over NCCL during training, step 40");
}
/* Said to be missing by both; with another path than the usual one, in words that name it. */
TEST(no_library) { run(MISSING, 1, EXIT_USAGE, "/nowhere/libnccl.so.2"); }
TEST(all_go_on) { run(GOES_ON, 2, 0, ""); }
#endif

static Backend *be;

/* Every operation with one rank: data stay what they are, or become what bf16 makes of them, and the communicator comes and goes. On a GPU by the library. */
TEST(one_rank_keeps_its_data) {
    enum { N = 10000 };
    Error e = {0};
    DeviceQueue queue;
    Comm *host = comm_alone();
    CHECK(zero_queue_create(&queue, be, WIRE_BF16, 4096, &e), "%s", e.text);
    Comm *c = nccl_comm_create(host, &queue, 30, &e);
    if (!c && e.code == EXIT_USAGE) SKIP("%.200s", e.text);
    CHECK(c, "%s", e.text);
    float *data = be->alloc(be, MEM_OTHER, "data", N * sizeof *data, &e), *ones = xcalloc(N, sizeof *ones), *back = xcalloc(N, sizeof *back);
    double *sums = be->alloc(be, MEM_OTHER, "sums", 2 * sizeof *sums, &e), two[2] = {1.0 / 3, -7};
    for (int i = 0; i < N; i++) ones[i] = 1 + (float)i / 256;
    be->upload(be, data, ones, N * sizeof *data), be->upload(be, sums, two, sizeof two);
    c->phase(c, "training", 40, 30);
    be->side_begin(be);
    c->reduce_scatter(c, data, N, WIRE_FLOAT32);
    c->all_gather(c, data, N * sizeof *data);
    CommTicket t = c->all_reduce(c, sums, 2);
    be->side_end(be, 0), be->side_wait(be, 0);
    c->wait(c, t);
    be->download(be, back, data, N * sizeof *data);
    EXPECT(!memcmp(back, ones, N * sizeof *data), "float32 changed");
    be->download(be, two, sums, sizeof two);
    EXPECT(two[0] == 1.0 / 3 && two[1] == -7, "sums %g %g", two[0], two[1]);
    be->side_begin(be);
    c->reduce_scatter(c, data, N, WIRE_BF16);
    be->side_end(be, 0), be->side_wait(be, 0);
    be->download(be, back, data, N * sizeof *data);
    for (int i = 0; i < N && !test_errors; i++) EXPECT(fabsf(back[i] - ones[i]) <= ones[i] / 256, "bf16: %d is %.9g of %.9g", i, (double)back[i], (double)ones[i]);
    EXPECT(back[1] == 1 && back[3] == 1.015625f, "ties to even: %.9g, %.9g", (double)back[1], (double)back[3]);
    c->destroy(c);
    be->release(be, data), be->release(be, sums);
    zero_queue_destroy(&queue);
    host->destroy(host);
    free(ones), free(back);
}

static void on(const char *name, Backend *backend) {
    char title[64];
    be = backend;
    snprintf(title, sizeof title, "%s, one_rank_keeps_its_data", name);
    test_run(title, test_one_rank_keeps_its_data);
    be->destroy(be);
}

int main(int argc, char **argv) {
    test_start(argc, argv);
#ifdef LLMC_EMU
    RUN(P21_a_skipped_operation_ends_with_code_6);
    RUN(P21_a_rank_that_has_not_come_is_named_and_says_so);
    RUN(P21_a_silent_rank_is_named);
    RUN(P22_a_dead_peer_ends_with_code_7);
    RUN(no_library);
    RUN(all_go_on);
#endif
#ifdef DEVICE_NAME
    backends_run_device(DEVICE_NAME, device_backend_create, on);
#else
    (void)on;
#endif
    return test_done();
}
