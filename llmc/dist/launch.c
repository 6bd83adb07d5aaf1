/* Who is this process: ranks from a launcher's environment, and a launcher of our own for one machine, by fork.
 * Not here: how ranks find each other (mesh.c). */
#include "launch.h"
#include "../base/timer.h"
#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum { SIZE_MOST = 4096 /* ranks: every two have a socket */ };

/* ---- the environment ---------------------------------------------------------------------------------------------- */

/* The variables of a launcher. In the order in which they win. */
typedef struct { LaunchedBy by; const char *name, *rank, *size, *local_rank, *local_size; } Variables;
static const Variables torchrun = {BY_TORCHRUN, "torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"},
    open_mpi = {BY_MPI, "Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"},
    slurm_job = {BY_SLURM, "Slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", NULL},
    slurm_step = {BY_SLURM, "Slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", NULL};
typedef struct { const Variables *names; int rank, size, local_rank, local_size; } Place;

/* NULL where it is not set, or empty. */
static const char *variable(const char *name) {
    const char *text = getenv(name);
    return text && *text ? text : NULL;
}

static bool number(const char *name, const char *launcher, int low, int high, int *out, Error *e) {
    const char *text = variable(name);
    if (!text) return fail(e, EXIT_USAGE, "%s's environment is not complete: %s is missing; start the ranks with %s, or unset all of its variables", launcher, name, launcher);
    size_t digits = strspn(text, "0123456789");
    long value = digits && digits < 10 && !text[digits] ? strtol(text, NULL, 10) : -1;
    if (value < low || value > high)
        return fail(e, EXIT_USAGE, "%s (%s's environment): found \"%.80s\", expected a number from %d to %d", name, launcher, text, low, high);
    *out = (int)value;
    return true;
}

/* How many tasks of the step are on this machine: element SLURM_NODEID of a list such as "4(x2),3". 0 where it is not told. */
static int slurm_tasks_here(void) {
    const char *list = variable("SLURM_STEP_TASKS_PER_NODE"), *node_text = variable("SLURM_NODEID");
    if (!list || !node_text) return 0;
    long node = strtol(node_text, NULL, 10);
    for (const char *at = list; isdigit((unsigned char)*at);) {
        char *end;
        long tasks = strtol(at, &end, 10), times = 1;
        if (!strncmp(end, "(x", 2)) {
            times = strtol(end + 2, &end, 10);
            end += *end == ')';
        }
        if (node < times) return tasks > 0 && tasks <= SIZE_MOST ? (int)tasks : 0;
        node -= times;
        at = end + (*end == ',');
    }
    return 0;
}

/* A batch script's own shell has Slurm's variables too, but is in no step; the steps that Slurm makes itself (the shell of salloc) have very
 * large numbers. */
static bool in_slurm_step(void) {
    const char *step = variable("SLURM_STEP_ID");
    if (!step) step = variable("SLURM_STEPID");
    return step && strtoull(step, NULL, 10) < 0xfffffff0u;
}

/* The place that a launcher gives to this process. *found: it has given one. */
static bool place_by(const Variables *v, Place *p, bool *found, Error *e) {
    *found = v->by == BY_SLURM ? in_slurm_step() && (variable(v->rank) || variable(v->size)) : variable(v->rank) || variable(v->size);
    if (!*found) return true;
    *p = (Place){.names = v};
    if (!number(v->size, v->name, 1, SIZE_MOST, &p->size, e)) return false;
    if (v->by == BY_SLURM && p->size == 1) return *found = false, true;
    if (!number(v->rank, v->name, 0, p->size - 1, &p->rank, e)) return false;
    if (v->local_size && !number(v->local_size, v->name, 1, p->size, &p->local_size, e)) return false;
    if (!v->local_size && !(p->local_size = slurm_tasks_here())) p->local_size = p->size;
    return number(v->local_rank, v->name, 0, p->local_size - 1, &p->local_rank, e);
}

/* An outer launcher that starts one process on each machine, which start the ranks there (srun torchrun), is no contradiction. */
static bool agree(const Place *a, const Place *outer, Error *e) {
    if (a->size == outer->size && a->rank == outer->rank) return true;
    if (outer->local_size == 1 && outer->size < a->size) return true;
    return fail(e, EXIT_USAGE, "two launchers contradict each other: %s=%d %s=%d (%s), %s=%d %s=%d (%s); unset the variables of the one that did not start this run",
        a->names->rank, a->rank, a->names->size, a->size, a->names->name, outer->names->rank, outer->rank, outer->names->size, outer->size, outer->names->name);
}

/* What is the job's alone, for the name of the meeting file. */
static void job_name(LaunchedBy by, char *out, size_t room) {
    const char *a = NULL, *b = NULL, *c = NULL;
    if (by == BY_TORCHRUN) a = variable("TORCHELASTIC_RUN_ID"), b = variable("MASTER_PORT"), c = variable("TORCHELASTIC_RESTART_COUNT");
    if (by == BY_MPI && !(a = variable("PMIX_NAMESPACE"))) a = variable("OMPI_MCA_ess_base_jobid");
    if (by == BY_SLURM || (by == BY_MPI && !a)) {
        if (!(a = variable("SLURM_JOB_ID"))) a = variable("SLURM_JOBID");
        if (!(b = variable("SLURM_STEP_ID"))) b = variable("SLURM_STEPID");
        c = variable("SLURM_RESTART_COUNT"); /* a requeued job keeps its number */
    }
    snprintf(out, room, "%s-%.100s%s%.40s%s%.40s", by == BY_TORCHRUN ? "torchrun" : by == BY_MPI ? "mpi" : "slurm", a ? a : "job", b ? "." : "", b ? b : "", c ? "." : "", c ? c : "");
    for (char *s = out; *s; s++)
        if (!isalnum((unsigned char)*s) && !strchr(".-_", *s)) *s = '_';
}

static bool meet_by_file(Launch *l, const char *launcher, const char *meeting_dir, Error *e) {
    if (!meeting_dir || !*meeting_dir)
        return fail(e, EXIT_USAGE, "%s's environment does not say where rank 0 listens, and without a run directory there is no place to write it to; "
                                   "give one (--out), or set MASTER_ADDR and MASTER_PORT", launcher);
    char job[200];
    job_name(l->by, job, sizeof job);
    int n = snprintf(l->file, sizeof l->file, "%s/meeting-%s", meeting_dir, job);
    return n < (int)sizeof l->file || fail(e, EXIT_USAGE, "%.100s...: the path of the run directory is longer than %zu bytes; use a shorter one, or set MASTER_ADDR and MASTER_PORT",
                                           meeting_dir, sizeof l->file - strlen(job) - 10);
}

/* torchrun's agent may keep MASTER_PORT for a store of its own: then it is of no use to us. */
static bool meeting_place(Launch *l, const char *launcher, const char *meeting_dir, Error *e) {
    const char *host = variable("MASTER_ADDR"), *kept = variable("TORCHELASTIC_USE_AGENT_STORE");
    if (l->size == 1) return true;
    if (l->by != BY_TORCHRUN && !host && !variable("MASTER_PORT")) return meet_by_file(l, launcher, meeting_dir, e);
    if (!host) return fail(e, EXIT_USAGE, "%s's environment is not complete: MASTER_ADDR is missing; set it to the host name or address of rank 0's machine", launcher);
    if (strlen(host) >= sizeof l->host) return fail(e, EXIT_USAGE, "MASTER_ADDR is %zu bytes long, expected a host name or address; it begins with \"%.40s\"", strlen(host), host);
    int port;
    if (!number("MASTER_PORT", launcher, 1, 65535, &port, e)) return false;
    if (l->by == BY_TORCHRUN && kept && !strcmp(kept, "True")) return meet_by_file(l, launcher, meeting_dir, e);
    snprintf(l->host, sizeof l->host, "%s", host);
    l->port = port;
    return true;
}

bool launch_from_environment(Launch *launch, const char *meeting_dir, Error *e) {
    const Variables *const all[3] = {&torchrun, &open_mpi, variable(slurm_step.size) ? &slurm_step : &slurm_job};
    static const char *const by_names[] = {[BY_TORCHRUN] = "torchrun's environment", [BY_MPI] = "Open MPI's environment", [BY_SLURM] = "Slurm's environment"};
    *launch = (Launch){.by = BY_NOBODY, .by_name = "no launcher", .size = 1, .local_size = 1, .listener = -1};
    Place first = {0};
    for (int i = 0; i < 3; i++) {
        Place p;
        bool found;
        if (!place_by(all[i], &p, &found, e)) return false;
        if (found && first.names && !agree(&first, &p, e)) return false;
        if (found && !first.names) first = p;
    }
    if (!first.names) return true;
    *launch = (Launch){.by = first.names->by, .by_name = by_names[first.names->by], .rank = first.rank, .size = first.size, .local_rank = first.local_rank,
                       .local_size = first.local_size, .listener = -1};
    return meeting_place(launch, first.names->name, meeting_dir, e);
}

/* ---- our own launcher: how a rank ended --------------------------------------------------------------------------- */

static const char *signal_name(int number, char room[32]) {
    static const struct { int number; const char *name; } known[] = {{SIGHUP, "SIGHUP"}, {SIGINT, "SIGINT"}, {SIGQUIT, "SIGQUIT"}, {SIGILL, "SIGILL"},
        {SIGTRAP, "SIGTRAP"}, {SIGABRT, "SIGABRT"}, {SIGBUS, "SIGBUS"}, {SIGFPE, "SIGFPE"}, {SIGKILL, "SIGKILL"}, {SIGUSR1, "SIGUSR1"}, {SIGSEGV, "SIGSEGV"},
        {SIGUSR2, "SIGUSR2"}, {SIGPIPE, "SIGPIPE"}, {SIGALRM, "SIGALRM"}, {SIGTERM, "SIGTERM"}, {SIGXCPU, "SIGXCPU"}, {SIGXFSZ, "SIGXFSZ"}, {SIGSYS, "SIGSYS"}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i].number == number) return known[i].name;
    snprintf(room, 32, "signal %d", number);
    return room;
}

static const char *meaning(int code) {
    switch (code) {
    case EXIT_USAGE: return " (bad flag or start)";
    case EXIT_DATA: return " (bad or missing data)";
    case EXIT_NO_CHECKPOINT: return " (no valid checkpoint)";
    case EXIT_NONFINITE: return " (too many non-finite steps)";
    case EXIT_HANG: return " (ranks missing or stuck)";
    case EXIT_PEER: return " (it lost another rank)";
    case EXIT_STORAGE: return " (could not write)";
    case EXIT_DEVICE: return " (the device failed)";
    case EXIT_REQUEUE: return " (saved; run the same command again), but not all did";
    default: return "";
    }
}

static void describe(int rank, int size, int status, char *out, size_t room) {
    char other[32];
    if (WIFEXITED(status)) snprintf(out, room, "rank %d of %d ended with exit code %d%s", rank, size, WEXITSTATUS(status), meaning(WEXITSTATUS(status)));
    else snprintf(out, room, "rank %d of %d was killed by %s%s", rank, size, signal_name(WTERMSIG(status), other), WTERMSIG(status) == SIGKILL ? " (out of memory?)" : "");
}

/* ---- our own launcher: the parent --------------------------------------------------------------------------------- */

/* How good an end is as the cause of it all: the first of the highest weight is. */
enum { WEIGHT_NONE, WEIGHT_REQUEUE, WEIGHT_PEER, WEIGHT_FAILED };
typedef struct {
    pid_t *pids;                       /* (size) 0: it has ended */
    int size, alive;
    int cause, weight, status;         /* rank, how good a cause, how it ended */
    int requeued;                      /* ranks that ended with EXIT_REQUEUE */
    double grace;
    double term_at, kill_at, leave_at; /* when the rest is told to end, is killed, and is given up; INFINITY: not yet */
    bool termed, killed;
} Crew;

static void tell(const Crew *c, int number) {
    for (int r = 0; r < c->size; r++)
        if (c->pids[r]) kill(c->pids[r], number);
}

static int weigh(const Crew *c, int status) {
    if (WIFSIGNALED(status)) return (c->termed && WTERMSIG(status) == SIGTERM) || (c->killed && WTERMSIG(status) == SIGKILL) ? WEIGHT_NONE : WEIGHT_FAILED;
    int code = WEXITSTATUS(status);
    return code == EXIT_OK ? WEIGHT_NONE : code == EXIT_REQUEUE ? WEIGHT_REQUEUE : code == EXIT_PEER ? WEIGHT_PEER : WEIGHT_FAILED;
}

/* A rank that lost its peers leaves the one that they were lost by a second to end as well, and to be the cause. */
static void ended(Crew *c, int rank, int status) {
    int weight = weigh(c, status);
    c->pids[rank] = 0;
    c->alive--;
    c->requeued += weight == WEIGHT_REQUEUE;
    if (weight > c->weight) c->cause = rank, c->weight = weight, c->status = status;
    double at = seconds_now() + (weight == WEIGHT_PEER ? 1 : 0);
    if (weight >= WEIGHT_PEER && !c->termed) c->term_at = fmin(c->term_at, at);
}

/* The child that a signal names comes first: where several have ended, it was the first. */
static void reap(Crew *c, pid_t named) {
    for (int pass = named > 0 ? 0 : 1; pass < 2; pass++)
        for (int r = 0; r < c->size; r++) {
            int status;
            if (!c->pids[r] || (pass == 0 && c->pids[r] != named)) continue;
            if (waitpid(c->pids[r], &status, WNOHANG) == c->pids[r]) ended(c, r, status);
        }
}

static void end_the_rest(Crew *c) {
    double now = seconds_now();
    if (now >= c->term_at) {
        c->termed = true;
        c->term_at = INFINITY, c->kill_at = now + c->grace;
        tell(c, SIGTERM);
    }
    if (now >= c->kill_at) {
        c->killed = true;
        c->kill_at = INFINITY, c->leave_at = now + 30;
        tell(c, SIGKILL);
    }
}

/* SIGCHLD or one that is passed on, in *info; false at the next deadline. */
static bool wait_for_signal(const Crew *c, const sigset_t *set, siginfo_t *info) {
    double at = fmin(fmin(c->term_at, c->kill_at), c->leave_at);
    if (isinf(at)) return sigwaitinfo(set, info) > 0;
    double left = fmin(fmax(at - seconds_now(), 0), 1e6);
    struct timespec t = {(time_t)left, (long)((left - floor(left)) * 1e9)};
    return sigtimedwait(set, info, &t) > 0;
}

static void watch(Crew *c, const sigset_t *set) {
    while (c->alive) {
        siginfo_t info = {0};
        bool came = wait_for_signal(c, set, &info);
        if (came && info.si_signo == SIGTSTP) { /* Ctrl-Z: the ranks are in groups of their own */
            tell(c, SIGSTOP);
            raise(SIGSTOP);
        } else if (came && info.si_signo != SIGCHLD) tell(c, info.si_signo);
        reap(c, came && info.si_signo == SIGCHLD ? info.si_pid : 0);
        end_the_rest(c);
        if (seconds_now() >= c->leave_at) return;
    }
}

/* Prints the first cause; returns the exit code. */
static int verdict(const Crew *c) {
    if (c->weight == WEIGHT_NONE) return EXIT_OK;
    if (c->requeued == c->size) return EXIT_REQUEUE;
    Error e = {0};
    char how[200], left[100] = "";
    describe(c->cause, c->size, c->status, how, sizeof how);
    for (int r = c->size - 1; r >= 0; r--)
        if (c->pids[r]) snprintf(left, sizeof left, "; rank %d (process %d) does not die even by SIGKILL", r, (int)c->pids[r]);
    fail(&e, WIFEXITED(c->status) ? WEXITSTATUS(c->status) : 128 + WTERMSIG(c->status), "%s%s%s", how, c->termed ? "; the others were stopped" : "", left);
    return error_print(&e);
}

/* ---- our own launcher: start -------------------------------------------------------------------------------------- */

/* On a free port of this machine's own address, before any rank exists: nobody else can take it between. */
static int listen_here(int size, int *port, Error *e) {
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t bytes = sizeof at;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&at, bytes) || listen(fd, size + 64) || getsockname(fd, (struct sockaddr *)&at, &bytes)) {
        fail(e, EXIT_USAGE, "could not listen on 127.0.0.1 for the ranks: %s; see ulimit -n, and whether this machine allows sockets", strerror(errno));
        if (fd >= 0) close(fd);
        return -1;
    }
    *port = ntohs(at.sin_port);
    return fd;
}

/* In the child. It has a process group of its own: a terminal's Ctrl-C reaches it once, by its parent. */
static void become_rank(pid_t parent, const sigset_t *mask, const struct sigaction *child_action) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) raise(SIGKILL); /* it was gone before that */
    setpgid(0, 0);
    sigaction(SIGCHLD, child_action, NULL);
    sigprocmask(SIG_SETMASK, mask, NULL);
}

/* Forks all ranks. Returns the rank in a child, -1 in the parent, -2 in a parent whose fork was refused (none is left then). */
static int fork_all(Crew *c, const sigset_t *mask, const struct sigaction *child_action, Error *e) {
    pid_t parent = getpid();
    fflush(NULL);
    for (int r = 0; r < c->size; r++) {
        pid_t pid = fork();
        if (pid == 0) return become_rank(parent, mask, child_action), r;
        if (pid < 0) {
            fail(e, EXIT_USAGE, "could not start rank %d of %d: fork: %s; start fewer ranks, or see ulimit -u and the free memory", r, c->size, strerror(errno));
            tell(c, SIGKILL);
            for (int k = 0; k < r; k++) waitpid(c->pids[k], NULL, 0);
            return -2;
        }
        c->pids[r] = pid;
        c->alive++;
    }
    return -1;
}

bool launch_here(Launch *launch, int size, double grace, Error *e) {
    if (size < 1 || size > SIZE_MOST) return fail(e, EXIT_USAGE, "found %d ranks to start, expected 1 to %d", size, SIZE_MOST);
    int port, listener = listen_here(size, &port, e);
    if (listener < 0) return false;
    const int passed_on[] = {SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGTSTP, SIGCONT};
    sigset_t set, mask;
    struct sigaction plain = {.sa_handler = SIG_DFL}, child_action; /* ignored, it would take the ends of children from us */
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    for (size_t i = 0; i < sizeof passed_on / sizeof *passed_on; i++) sigaddset(&set, passed_on[i]);
    sigprocmask(SIG_BLOCK, &set, &mask);
    sigaction(SIGCHLD, &plain, &child_action);

    Crew c = {.pids = xcalloc((size_t)size, sizeof(pid_t)), .size = size, .grace = grace, .term_at = INFINITY, .kill_at = INFINITY, .leave_at = INFINITY};
    int rank = fork_all(&c, &mask, &child_action, e);
    if (rank != 0) close(listener);
    if (rank == -1) {
        watch(&c, &set);
        int code = verdict(&c);
        free(c.pids);
        exit(code);
    }
    free(c.pids);
    if (rank < 0) {
        sigaction(SIGCHLD, &child_action, NULL);
        sigprocmask(SIG_SETMASK, &mask, NULL);
        return false;
    }
    *launch = (Launch){.by = BY_OURSELVES, .by_name = "our own launcher", .rank = rank, .size = size, .local_rank = rank, .local_size = size,
                       .host = "127.0.0.1", .port = port, .listener = rank == 0 ? listener : -1};
    return true;
}
