/* Ranks as child processes, joined by socket pairs, for tests of what many ranks compute together. The test program itself must not use OpenMP
 * before it forks: a forked child cannot. */
#ifndef LLMC_TEST_RANKS_KIT_H
#define LLMC_TEST_RANKS_KIT_H
#include "llmc/dist/tcp.h"
#include "test.h"
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif
enum { RANKS_MOST = 8 };

/* Zeroed memory that parent and ranks share. */
static inline void *shared_memory(size_t bytes) {
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) { perror("mmap"); exit(1); }
    return p;
}

/* Runs main on `size` ranks and waits; codes: how each ended (exit code, or 128 + signal). True when all are 0. */
static inline bool ranks_run(int size, int (*main_of_rank)(Comm *comm, void *context), void *context, int codes[RANKS_MOST]) {
    int ends[RANKS_MOST][RANKS_MOST];
    pid_t pids[RANKS_MOST];
    bool ok = true;
    for (int i = 0; i < size; i++) {
        ends[i][i] = -1;
        for (int j = 0; j < i; j++) {
            int pair[2];
            if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair)) { perror("socketpair"); exit(1); }
            ends[i][j] = pair[0], ends[j][i] = pair[1];
        }
    }
    fflush(stdout), fflush(stderr);
    for (int r = 0; r < size; r++) {
        if ((pids[r] = fork())) continue;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
#ifdef _OPENMP
        omp_set_num_threads(1);
#endif
        for (int i = 0; i < size; i++)
            for (int j = 0; j < size; j++)
                if (i != r && i != j) close(ends[i][j]);
        Comm *comm = size == 1 ? comm_alone() : tcp_comm_create(r, size, r, size, ends[r], 60);
        int code = main_of_rank(comm, context);
        comm->destroy(comm);
        fflush(stdout), fflush(stderr);
        _exit(code);
    }
    for (int i = 0; i < size; i++)
        for (int j = 0; j < size; j++)
            if (i != j) close(ends[i][j]);
    for (int r = 0; r < size; r++) {
        int status;
        waitpid(pids[r], &status, 0);
        int code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
        if (codes) codes[r] = code;
        ok = ok && code == 0;
    }
    return ok;
}
#endif
