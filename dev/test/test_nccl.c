/* How a run over NCCL ends when it cannot go on, with NCCL's twin on the emulator; what it says where the library is missing. */
#include "llmc/dist/nccl.h"
#include "llmc/ops.h"
#include "ranks_kit.h"
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef enum { MISSING, SKIPS, DIES, GOES_ON } What;
typedef struct { What what; int bad; const char *said; } Job;

#ifdef LLMC_EMU
static void side_call(void *backend, void (*fn)(void *), void *arg) { ((Backend *)backend)->side_call(backend, fn, arg); }

static int rank_main(Comm *host, void *context) {
    const Job *job = context;
    Error e = {0};
    bool real = job->what == MISSING;
    if (job->what == MISSING) setenv("LLMC_NCCL", "/nowhere/libnccl.so.2", 1);
    Backend *be = emu_backend_create(&(CudaOptions){.dtype = "fp32", .attention = "ours"}, &e);
    CHECK(be, "%s", e.text);
    DeviceQueue queue = {be->side_begin(be), side_call, be, !real};
    Comm *c = nccl_comm_create(host, &queue, 30, &e);
    FILE *said = fopen(job->said, host->rank == !job->bad ? "a" : "r");
    if (real) {
        if (said && host->rank == !job->bad) fprintf(said, "%s\n", c ? "made" : e.text), fflush(said);
        _exit(c ? 0 : e.code);
    }
    CHECK(c, "%s", e.text);
    float *data = be->alloc(be, MEM_OTHER, "data", 1000 * sizeof *data, &e);
    c->phase(c, "training", 40, 1);
    if (host->rank == job->bad && job->what == DIES) _exit(1);
    if (host->rank == job->bad && job->what == SKIPS) {
        comm_barrier(host);           /* the other one has ended */
        return 0;
    }
    if (host->rank != job->bad && said) dup2(fileno(said), STDERR_FILENO);
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
    run(SKIPS, 1, EXIT_HANG, "error: rank 0: no progress for 1 seconds in reduce_scatter (operation 1) of 4000 bytes over NCCL during training, step 40");
}
TEST(P22_a_dead_peer_ends_with_code_7) {
    run(DIES, 0, EXIT_PEER, "error: rank 1: a peer is gone; I waited for it in reduce_scatter (operation 1) of 4000 bytes over NCCL during training, step 40");
}
/* Said to be missing by both; with another path than the usual one, in words that name it. */
TEST(no_library) { run(MISSING, 1, EXIT_USAGE, "/nowhere/libnccl.so.2"); }
TEST(all_go_on) { run(GOES_ON, 2, 0, ""); }
#endif

int main(int argc, char **argv) {
    test_start(argc, argv);
#ifdef LLMC_EMU
    RUN(P21_a_skipped_operation_ends_with_code_6);
    RUN(P22_a_dead_peer_ends_with_code_7);
    RUN(no_library);
    RUN(all_go_on);
#endif
    return test_done();
}
