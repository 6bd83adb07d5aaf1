/* Ranks from launchers' environments, with each of their errors; our own launcher: ends, signals, orphans, exit codes and last lines (P22). */
#include "llmc/base/timer.h"
#include "llmc/dist/door.h"
#include "llmc/dist/mesh.h"
#include "test.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <semaphore.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- the environment ---------------------------------------------------------------------------------------------- */

static const char *const names[] = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "PMIX_NAMESPACE",
    "OMPI_MCA_ess_base_jobid", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_NODEID", "SLURM_JOB_ID", "SLURM_JOBID", "SLURM_RESTART_COUNT"};
#define TORCH "RANK=1 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 "
#define MASTER "MASTER_ADDR=node7 MASTER_PORT=29500 "
#define OMPI "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=0 OMPI_COMM_WORLD_LOCAL_SIZE=1 "
#define SLURM "SLURM_STEP_ID=0 SLURM_JOB_ID=77 SLURM_PROCID=5 SLURM_NTASKS=8 SLURM_LOCALID=1 "

/* "A=b C=" sets A and an empty C; later ones win. */
static void set_environment(const char *text) {
    char copy[1000], *rest = copy;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) unsetenv(names[i]);
    snprintf(copy, sizeof copy, "%s", text);
    for (char *one; (one = strsep(&rest, " "));) {
        char *equals = strchr(one, '=');
        if (!equals) continue;
        *equals = 0;
        setenv(one, equals + 1, 1);
    }
}

TEST(places) {
    static const struct { const char *environment; LaunchedBy by; int rank, size, local_rank, local_size; const char *host; int port; const char *file; } cases[] = {
        {"", BY_NOBODY, 0, 1, 0, 1, "", 0, ""},
        {MASTER, BY_NOBODY, 0, 1, 0, 1, "", 0, ""},
        {"LOCAL_RANK=3", BY_NOBODY, 0, 1, 0, 1, "", 0, ""},
        {TORCH MASTER, BY_TORCHRUN, 1, 4, 1, 2, "node7", 29500, ""},
        {"RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1", BY_TORCHRUN, 0, 1, 0, 1, "", 0, ""},
        {TORCH MASTER "TORCHELASTIC_USE_AGENT_STORE=False", BY_TORCHRUN, 1, 4, 1, 2, "node7", 29500, ""},
        {TORCH MASTER "TORCHELASTIC_USE_AGENT_STORE=True TORCHELASTIC_RUN_ID=a/b TORCHELASTIC_RESTART_COUNT=2", BY_TORCHRUN, 1, 4, 1, 2, "", 0, "out/meeting-torchrun-a_b.29500.2"},
        {OMPI "PMIX_NAMESPACE=prterun-x@1", BY_MPI, 3, 4, 0, 1, "", 0, "out/meeting-mpi-prterun-x_1"},
        {OMPI "OMPI_MCA_ess_base_jobid=123", BY_MPI, 3, 4, 0, 1, "", 0, "out/meeting-mpi-123"},
        {OMPI MASTER, BY_MPI, 3, 4, 0, 1, "node7", 29500, ""},
        {SLURM "SLURM_STEP_TASKS_PER_NODE=2(x3),1,1 SLURM_NODEID=2", BY_SLURM, 5, 8, 1, 2, "", 0, "out/meeting-slurm-77.0"},
        {SLURM "SLURM_STEP_TASKS_PER_NODE=3,5 SLURM_NODEID=1 SLURM_RESTART_COUNT=4", BY_SLURM, 5, 8, 1, 5, "", 0, "out/meeting-slurm-77.0.4"},
        {SLURM, BY_SLURM, 5, 8, 1, 8, "", 0, "out/meeting-slurm-77.0"},
        {SLURM MASTER "SLURM_STEP_NUM_TASKS=6", BY_SLURM, 5, 6, 1, 6, "node7", 29500, ""},
        /* no ranks: a batch script's shell, a step of one task, the shell of salloc */
        {"SLURM_JOB_ID=77 SLURM_PROCID=0 SLURM_NTASKS=8 SLURM_LOCALID=0", BY_NOBODY, 0, 1, 0, 1, "", 0, ""},
        {SLURM "SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1", BY_NOBODY, 0, 1, 0, 1, "", 0, ""},
        {SLURM "SLURM_STEP_ID=4294967290", BY_NOBODY, 0, 1, 0, 1, "", 0, ""},
        /* two launchers that agree, and one that starts the other */
        {TORCH MASTER "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2", BY_TORCHRUN, 1, 4, 1, 2, "node7", 29500, ""},
        {"RANK=9 WORLD_SIZE=16 LOCAL_RANK=1 LOCAL_WORLD_SIZE=8 SLURM_STEP_ID=0 SLURM_PROCID=1 SLURM_NTASKS=2 SLURM_LOCALID=0 SLURM_STEP_TASKS_PER_NODE=1(x2) SLURM_NODEID=1 " MASTER,
         BY_TORCHRUN, 9, 16, 1, 8, "node7", 29500, ""}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Error e = {0};
        Launch l;
        set_environment(cases[i].environment);
        EXPECT(launch_from_environment(&l, "out", &e), "case %zu: %s", i, e.text);
        EXPECT(l.by == cases[i].by && l.rank == cases[i].rank && l.size == cases[i].size && l.local_rank == cases[i].local_rank && l.local_size == cases[i].local_size,
               "case %zu: by %d, %d of %d, %d of %d here", i, l.by, l.rank, l.size, l.local_rank, l.local_size);
        EXPECT(!strcmp(l.host, cases[i].host) && l.port == cases[i].port && !strcmp(l.file, cases[i].file) && l.listener == -1 && l.by_name && *l.by_name,
               "case %zu: %s:%d, %s, %d", i, l.host, l.port, l.file, l.listener);
    }
    set_environment("");
}

TEST(places_that_are_errors) {
    static const struct { const char *environment, *says, *also; } cases[] = {
        {"RANK=0", "WORLD_SIZE is missing", "torchrun"}, {"WORLD_SIZE=4", "RANK is missing", "torchrun"}, {"RANK=0 WORLD_SIZE=4 LOCAL_WORLD_SIZE=1 " MASTER, "LOCAL_RANK is missing", ""},
        {"RANK=0 WORLD_SIZE=4 LOCAL_RANK=0 " MASTER, "LOCAL_WORLD_SIZE is missing", ""}, {TORCH "MASTER_PORT=1", "MASTER_ADDR is missing", ""}, {TORCH "MASTER_ADDR=a", "MASTER_PORT is missing", ""},
        {TORCH "MASTER_ADDR= MASTER_PORT=1", "MASTER_ADDR is missing", ""}, {OMPI "MASTER_PORT=1", "MASTER_ADDR is missing", "Open MPI"}, {SLURM "MASTER_ADDR=a", "MASTER_PORT is missing", "Slurm"},
        {TORCH MASTER "RANK=x", "RANK (torchrun's environment): found \"x\", expected a number from 0 to 3", ""}, {TORCH MASTER "RANK=4", "found \"4\"", "0 to 3"},
        {TORCH MASTER "RANK=-1", "found \"-1\"", ""}, {TORCH MASTER "RANK=1x", "found \"1x\"", ""}, {TORCH MASTER "RANK=99999999999", "found \"99999999999\"", ""},
        {TORCH MASTER "WORLD_SIZE=0", "WORLD_SIZE", "1 to 4096"}, {TORCH MASTER "WORLD_SIZE=5000", "WORLD_SIZE", "1 to 4096"}, {TORCH MASTER "LOCAL_RANK=2", "LOCAL_RANK", "0 to 1"},
        {TORCH MASTER "LOCAL_WORLD_SIZE=5", "LOCAL_WORLD_SIZE", "1 to 4"}, {TORCH MASTER "MASTER_PORT=0", "MASTER_PORT", "1 to 65535"}, {TORCH MASTER "MASTER_PORT=65536", "MASTER_PORT", "\"65536\""},
        {"OMPI_COMM_WORLD_RANK=0", "OMPI_COMM_WORLD_SIZE is missing", "Open MPI"}, {OMPI "OMPI_COMM_WORLD_RANK=4", "OMPI_COMM_WORLD_RANK", "0 to 3"},
        {"OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=2", "OMPI_COMM_WORLD_LOCAL_SIZE is missing", ""}, {SLURM "SLURM_PROCID=8", "SLURM_PROCID", "0 to 7"},
        {"SLURM_STEP_ID=0 SLURM_PROCID=1", "SLURM_NTASKS is missing", "Slurm"}, {"SLURM_STEP_ID=0 SLURM_NTASKS=2", "SLURM_PROCID is missing", "Slurm"}, {SLURM "SLURM_LOCALID=", "SLURM_LOCALID is missing", ""},
        {TORCH MASTER OMPI, "RANK=1 WORLD_SIZE=4 (torchrun)", "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 (Open MPI)"}, {TORCH MASTER SLURM, "SLURM_PROCID=5 SLURM_NTASKS=8 (Slurm)", "RANK=1"},
        {OMPI SLURM, "OMPI_COMM_WORLD_RANK=3", "SLURM_PROCID=5"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Error e = {0};
        Launch l;
        set_environment(cases[i].environment);
        EXPECT(!launch_from_environment(&l, "out", &e) && e.code == EXIT_USAGE && strstr(e.text, cases[i].says) && strstr(e.text, cases[i].also), "case %zu: %d %s", i, e.code, e.text);
    }
    Error e = {0};
    Launch l;
    char deep[600];
    memset(deep, 'd', sizeof deep);
    deep[sizeof deep - 1] = 0;
    set_environment(SLURM);
    EXPECT(!launch_from_environment(&l, NULL, &e) && e.code == EXIT_USAGE && strstr(e.text, "--out"), "%s", e.text);
    EXPECT(!launch_from_environment(&l, deep, &e) && e.code == EXIT_USAGE && strstr(e.text, "shorter"), "%s", e.text);
    set_environment(TORCH MASTER);
    setenv("MASTER_ADDR", deep, 1);
    EXPECT(!launch_from_environment(&l, "out", &e) && e.code == EXIT_USAGE && strstr(e.text, "599 bytes"), "%s", e.text);
    set_environment("");
}

/* ---- our own launcher --------------------------------------------------------------------------------------------- */

/* What the ranks of a test share with it. */
typedef struct {
    sem_t ready, got;
    pid_t pids[8];
    volatile int last_signal[8];
    int descriptors;                   /* before the launch */
} Shared;
static Shared *shared;
static int outcome_pipe;
typedef struct { int code; char text[2000]; double seconds; } Outcome;

static bool wait_sem(sem_t *s, int times) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    t.tv_sec += 10;
    for (int i = 0; i < times;) {
        if (sem_timedwait(s, &t) == 0) i++;
        else if (errno != EINTR) return false;
    }
    return true;
}

static int count_descriptors(void) {
    int n = 0;
    DIR *dir = opendir("/proc/self/fd");
    while (dir && readdir(dir)) n++;
    if (dir) closedir(dir);
    return n;
}

/* A process that launches `size` ranks, each of which runs `rank`, must leave by itself, and writes to a pipe. It does not live longer than 20 s. */
static pid_t start(int size, double grace, void (*rank)(const Launch *)) {
    int ends[2];
    memset(shared, 0, sizeof *shared);
    sem_init(&shared->ready, 1, 0);
    sem_init(&shared->got, 1, 0);
    fflush(stdout);
    if (pipe(ends)) return -1;
    pid_t pid = fork();
    if (pid == 0) {
        struct rlimit no_core = {0, 0};
        setrlimit(RLIMIT_CORE, &no_core);
        alarm(20);
        dup2(ends[1], STDERR_FILENO);
        close(ends[0]), close(ends[1]);
        shared->descriptors = count_descriptors();
        Error e = {0};
        Launch l;
        if (!launch_here(&l, size, grace, &e)) _exit(error_print(&e));
        alarm(10); /* where nothing else ends it */
        shared->pids[l.rank] = getpid();
        rank(&l);
        _exit(99);
    }
    close(ends[1]);
    outcome_pipe = ends[0];
    return pid;
}

/* Waits for its end; nobody of it is left then, for orphans would be ours (PR_SET_CHILD_SUBREAPER). */
static Outcome finish(pid_t pid, double started) {
    Outcome o = {0};
    int status = 0;
    size_t n = 0;
    for (ssize_t got; n < sizeof o.text - 1 && (got = read(outcome_pipe, o.text + n, sizeof o.text - 1 - n)) > 0;) n += (size_t)got;
    close(outcome_pipe);
    waitpid(pid, &status, 0);
    o.seconds = seconds_now() - started;
    o.code = WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
    EXPECT(waitpid(-1, NULL, WNOHANG) == -1 && errno == ECHILD, "an orphan is left");
    return o;
}

static void last_line(const Outcome *o, char *line, size_t room) {
    size_t n = strlen(o->text), from;
    while (n && o->text[n - 1] == '\n') n--;
    for (from = n; from && o->text[from - 1] != '\n';) from--;
    snprintf(line, room, "%.*s", (int)(n - from), o->text + from);
}

static void expect_launch(int size, double grace, void (*rank)(const Launch *), int code, const char *line, double least, double most) {
    char last[500];
    double started = seconds_now();
    Outcome o = finish(start(size, grace, rank), started);
    last_line(&o, last, sizeof last);
    EXPECT(o.code == code, "exit code %d, expected %d: %s", o.code, code, o.text);
    EXPECT(!strcmp(last, line), "last line \"%s\", expected \"%s\"", last, line);
    EXPECT(o.seconds >= least && o.seconds < most, "%.2f s, expected %g to %g", o.seconds, least, most);
}

static void forever(void) {
    for (;;) pause();
}
static void all_there(const Launch *l) { /* so that what follows happens to ranks that run */
    sem_t *gate = &shared->ready;
    sem_post(&shared->got);
    if (l->rank == 0) {
        wait_sem(&shared->got, l->size);
        for (int r = 0; r < l->size; r++) sem_post(gate);
    }
    wait_sem(gate, 1);
}
static void ends_well(const Launch *l) { (void)l; _exit(0); }
static void requeues(const Launch *l) { (void)l; _exit(75); }
static void some_requeue(const Launch *l) { _exit(l->rank == 1 ? 75 : 0); }
static void all_lose_peers(const Launch *l) { (void)l; _exit(7); }
static void fails(const Launch *l, int rank, int code) {
    all_there(l);
    if (l->rank == rank) _exit(code);
    forever();
}
static void rank1_exits_3(const Launch *l) { fails(l, 1, 3); }
static void rank2_loses_peers(const Launch *l) { fails(l, 2, 7); }
static void dies_by(const Launch *l, int number) {
    all_there(l);
    if (l->rank == 1) {
        signal(number, SIG_DFL); /* of a sanitizer */
        raise(number);
    }
    forever();
}
static void killed(const Launch *l) { dies_by(l, SIGKILL); }
static void segfaults(const Launch *l) { dies_by(l, SIGSEGV); }
static void aborts(const Launch *l) { dies_by(l, SIGABRT); }
static void terminated(const Launch *l) { dies_by(l, SIGTERM); }
static void peer_first(const Launch *l) {
    all_there(l);
    if (l->rank == 0) _exit(7);
    if (l->rank == 2) forever();
    while (kill(shared->pids[0], 0) == 0) usleep(1000); /* until rank 0's end has been noted */
    _exit(5);
}
static void others_save(const Launch *l) { /* those that are stopped say 75, or lose their peers */
    sigset_t set;
    int number;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigprocmask(SIG_BLOCK, &set, NULL);
    all_there(l);
    if (l->rank == 1) _exit(4);
    sigwait(&set, &number);
    _exit(l->rank == 0 ? 75 : 6);
}
static void does_not_go(const Launch *l) {
    signal(SIGTERM, SIG_IGN);
    all_there(l);
    if (l->rank == 1) _exit(3);
    forever();
}

TEST(ends) {
    expect_launch(1, 10, ends_well, 0, "", 0, 5);
    expect_launch(4, 10, ends_well, 0, "", 0, 5);
    expect_launch(3, 10, requeues, 75, "", 0, 5);
    expect_launch(3, 10, some_requeue, 75, "error: rank 1 of 3 ended with exit code 75 (saved; run the same command again), but not all did", 0, 5);
    expect_launch(3, 10, rank1_exits_3, 3, "error: rank 1 of 3 ended with exit code 3 (bad or missing data); the others were stopped", 0, 5);
    expect_launch(3, 10, killed, 137, "error: rank 1 of 3 was killed by SIGKILL (out of memory?); the others were stopped", 0, 5);
    expect_launch(3, 10, segfaults, 139, "error: rank 1 of 3 was killed by SIGSEGV; the others were stopped", 0, 5);
    expect_launch(2, 10, aborts, 134, "error: rank 1 of 2 was killed by SIGABRT; the others were stopped", 0, 5);
    expect_launch(2, 10, terminated, 143, "error: rank 1 of 2 was killed by SIGTERM; the others were stopped", 0, 5);
    expect_launch(3, 10, others_save, 4, "error: rank 1 of 3 ended with exit code 4 (no valid checkpoint); the others were stopped", 0, 5);
}

TEST(the_cause_is_not_who_lost_a_peer) {
    expect_launch(3, 10, peer_first, 5, "error: rank 1 of 3 ended with exit code 5 (too many non-finite steps); the others were stopped", 0, 0.9);
    expect_launch(3, 10, rank2_loses_peers, 7, "error: rank 2 of 3 ended with exit code 7 (it lost another rank); the others were stopped", 0.9, 5);
    char last[500];
    double started = seconds_now();
    Outcome o = finish(start(3, 10, all_lose_peers), started);
    last_line(&o, last, sizeof last);
    EXPECT(o.code == 7 && strstr(last, "exit code 7 (it lost another rank)"), "%d %s", o.code, last);
}

TEST(who_ignores_sigterm_is_killed) {
    expect_launch(3, 0.2, does_not_go, 3, "error: rank 1 of 3 ended with exit code 3 (bad or missing data); the others were stopped", 0.2, 5);
}

static void waits_for_signals(const Launch *l) {
    sigset_t set, before;
    const int numbers[] = {SIGUSR1, SIGHUP, SIGINT, SIGTERM};
    sigemptyset(&set);
    for (int i = 0; i < 4; i++) sigaddset(&set, numbers[i]);
    sigprocmask(SIG_BLOCK, &set, &before);
    struct sigaction child;
    sigaction(SIGCHLD, NULL, &child);
    if (sigismember(&before, SIGTERM) || sigismember(&before, SIGCHLD) || sigismember(&before, SIGUSR1) || child.sa_handler != SIG_DFL) _exit(98);
    sem_post(&shared->ready);
    for (int number;;) {
        if (sigwait(&set, &number)) _exit(97);
        shared->last_signal[l->rank] = number;
        sem_post(&shared->got);
        if (number == SIGTERM) _exit(75);
    }
}

TEST(signals_reach_every_rank) {
    double started = seconds_now();
    pid_t pid = start(3, 10, waits_for_signals);
    EXPECT(wait_sem(&shared->ready, 3), "the ranks did not start");
    const int sent[] = {SIGUSR1, SIGUSR1, SIGHUP, SIGINT, SIGINT, SIGTERM};
    for (size_t i = 0; i < sizeof sent / sizeof *sent; i++) {
        kill(pid, sent[i]);
        EXPECT(wait_sem(&shared->got, 3), "signal %d did not reach all", sent[i]);
        for (int r = 0; r < 3; r++) EXPECT(shared->last_signal[r] == sent[i], "rank %d had %d, expected %d", r, shared->last_signal[r], sent[i]);
    }
    Outcome o = finish(pid, started);
    EXPECT(o.code == 75 && !*o.text, "%d %s", o.code, o.text);
}

static void says_ready(const Launch *l) {
    (void)l;
    sem_post(&shared->ready);
    forever();
}

/* The last word is a signal that the parent cannot catch. */
TEST(no_rank_outlives_its_parent) {
    pid_t pid = start(4, 10, says_ready);
    EXPECT(wait_sem(&shared->ready, 4), "the ranks did not start");
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    for (int r = 0; r < 4; r++) {
        int status = 0;
        EXPECT(waitpid(shared->pids[r], &status, 0) == shared->pids[r] && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, "rank %d: %d", r, status);
    }
    close(outcome_pipe);
}

/* Ctrl-C in a terminal goes to the group, in which the ranks are not: they get it once. */
TEST(a_group_of_its_own) {
    double started = seconds_now();
    pid_t pid = start(2, 10, waits_for_signals);
    setpgid(pid, pid);
    EXPECT(wait_sem(&shared->ready, 2), "the ranks did not start");
    kill(-pid, SIGINT);
    EXPECT(wait_sem(&shared->got, 2), "it did not reach all");
    kill(pid, SIGTERM);
    EXPECT(wait_sem(&shared->got, 2) && shared->last_signal[0] == SIGTERM && shared->last_signal[1] == SIGTERM, "SIGINT came twice");
    Outcome o = finish(pid, started);
    EXPECT(o.code == 75, "%d %s", o.code, o.text);
}

static void looks_at_launch(const Launch *l) {
    bool ok = l->by == BY_OURSELVES && l->by_name && l->size == 3 && l->local_rank == l->rank && l->local_size == 3 && !strcmp(l->host, "127.0.0.1") && l->port > 0 && !*l->file;
    ok = ok && (l->listener >= 0) == (l->rank == 0) && count_descriptors() == shared->descriptors + (l->rank == 0) && getpgrp() == getpid();
    ok = ok && (l->rank || fcntl(l->listener, F_GETFD) == FD_CLOEXEC);
    _exit(ok ? 0 : 20 + l->rank);
}
TEST(what_a_rank_is_given) { expect_launch(3, 10, looks_at_launch, 0, "", 0, 5); }

TEST(refused) {
    double started = seconds_now();
    Outcome o = finish(start(0, 10, ends_well), started);
    EXPECT(o.code == EXIT_USAGE && strstr(o.text, "found 0 ranks"), "%d %s", o.code, o.text);
    struct rlimit old, few;
    getrlimit(RLIMIT_NOFILE, &old);
    few = old;
    few.rlim_cur = 3; /* the launcher's standard streams; nothing is opened in this process meanwhile but the pipe, before */
    pid_t pid = fork();
    if (pid == 0) {
        Error e = {0};
        Launch l;
        setrlimit(RLIMIT_NOFILE, &few);
        bool ok = launch_here(&l, 2, 1, &e);
        sigset_t mask;
        sigprocmask(SIG_SETMASK, NULL, &mask);
        _exit(!ok && e.code == EXIT_USAGE && strstr(e.text, "could not listen") && !sigismember(&mask, SIGTERM) ? 0 : 1);
    }
    int status;
    waitpid(pid, &status, 0);
    EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 0, "no sockets: %d", status);
    pid = fork();
    if (pid == 0) { /* root may fork however many it has */
        Error e = {0};
        Launch l;
        struct rlimit none = {1, 1};
        if (getuid() == 0 && (setgid(65534) || setuid(65534))) _exit(77);
        setrlimit(RLIMIT_NPROC, &none);
        pid_t probe = fork();
        if (probe == 0) _exit(0);
        if (probe > 0) _exit(77); /* no such limit here */
        bool ok = launch_here(&l, 2, 1, &e);
        sigset_t mask;
        sigprocmask(SIG_SETMASK, NULL, &mask);
        _exit(!ok && e.code == EXIT_USAGE && strstr(e.text, "fork") && !sigismember(&mask, SIGTERM) && waitpid(-1, NULL, 0) == -1 ? 0 : 1);
    }
    waitpid(pid, &status, 0);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 77) SKIP("processes are not limited here");
    EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 0, "no fork: %d", status);
}

static void meets(const Launch *l) {
    int sockets[8];
    Error e = {0};
    if (!mesh_connect(l, "a = b", 10, sockets, &e)) _exit(error_print(&e));
    char word = (char)l->rank;
    for (int r = 0; r < l->size; r++)
        if (r != l->rank && send(sockets[r], &word, 1, MSG_NOSIGNAL) != 1) _exit(90);
    for (int r = 0; r < l->size; r++)
        if (r != l->rank && (!recv_all(sockets[r], &word, 1, seconds_now() + 5) || word != r)) _exit(91);
    _exit(count_descriptors() == shared->descriptors + l->size - 1 ? 0 : 92);
}
TEST(launched_ranks_meet) { expect_launch(5, 10, meets, 0, "", 0, 5); }

int main(int argc, char **argv) {
    test_start(argc, argv);
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED) return perror("mmap"), 1;
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    RUN(places);
    RUN(places_that_are_errors);
    RUN(ends);
    RUN(the_cause_is_not_who_lost_a_peer);
    RUN(who_ignores_sigterm_is_killed);
    RUN(signals_reach_every_rank);
    RUN(no_rank_outlives_its_parent);
    RUN(a_group_of_its_own);
    RUN(what_a_rank_is_given);
    RUN(refused);
    RUN(launched_ranks_meet);
    return test_done();
}
