/* How a process becomes a rank of a run. */
#include "ranks.h"
#include "../base/io.h"
#include "../base/version.h"
#include "../dist/mpi_wire.h"
#include "together.h"
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* What all ranks must have alike. */
static char *proof_of(const Config *o) {
    char *config = options_to_config(&config_table, o), *proof = xasprintf("build = %s\n%s", llmc_build_id(), config);
    free(config);
    return proof;
}

static void redirect(int fd, const char *path, int flags) {
    int to = open(path, flags | O_CLOEXEC, 0666);
    if (to < 0) return;
    dup2(to, fd);
    close(to);
}

static bool own_log(const Config *o, const Comm *c, Error *e) {
    if (!o->rank_logs) {
        fflush(stdout);
        if (c->rank) redirect(STDOUT_FILENO, "/dev/null", O_WRONLY);
        return true;
    }
    if (!dir_create(o->rank_logs, e)) return fail_in(e, "--rank-logs %s", o->rank_logs);
    if (!c->rank) return true;
    char *path = xasprintf("%s/rank-%04d.log", o->rank_logs, c->rank);
    int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    bool ok = fd >= 0 || fail(e, EXIT_STORAGE, "%s: cannot create: %s; give a writable --rank-logs", path, strerror(errno));
    fflush(stdout);
    for (int i = STDOUT_FILENO; ok && i <= STDERR_FILENO; i++) dup2(fd, i);
    if (fd >= 0) close(fd);
    free(path);
    return ok;
}

void ranks_silent(const Comm *comm, bool silent) {
    static int kept = -1;
    if (!comm->rank || silent == (kept >= 0)) return;
    fflush(stderr);
    if (silent) {
        kept = fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 3);
        if (kept >= 0) redirect(STDERR_FILENO, "/dev/null", O_WRONLY);
    } else {
        dup2(kept, STDERR_FILENO);
        close(kept);
        kept = -1;
    }
}

static bool settle_launch(Launch *l, const Config *o, Error *e) {
    if (o->out && !o->dry_run && !o->eval_only && !o->generate && !dir_create(o->out, e)) return fail_in(e, "--out %s", o->out);
    if (!launch_from_environment(l, o->out ? o->out : ".", e)) return false;
    /* Several ranks: a signal to one during the start is no reason to lose the others. One alone leaves, as nothing has been trained. */
    if ((l->by == BY_NOBODY && o->processes > 1) || l->size > 1) together_listen();
    if (l->by == BY_NOBODY && o->processes > 1) return launch_here(l, (int)o->processes, 8, e); /* so that all have ended in ten seconds */
    if (l->by != BY_NOBODY && o->processes > 1 && o->processes != l->size)
        return fail(e, EXIT_USAGE, "--processes %lld contradicts %s, which started %d; leave the option out", (long long)o->processes, l->by_name, l->size);
    if (l->size > 1 && (o->eval_only || o->generate))
        return fail(e, EXIT_USAGE, "--%s runs in one process; %s started %d", o->eval_only ? "eval-only" : "generate", l->by_name, l->size);
    return true;
}

Comm *ranks_meet(const Config *o, Error *e) {
    Launch launch = {.size = 1, .listener = -1};
    if (o->dry_run) return comm_alone();
    if (!settle_launch(&launch, o, e)) return NULL;
    char *proof = proof_of(o);
    bool by_mpi = strcmp(o->transport, "mpi") == 0 && launch.size > 1;
    Comm *comm = by_mpi ? mpi_connect(&launch, proof, o->timeout, e) : comm_connect(&launch, proof, o->timeout, e);
    free(proof);
    if (!comm) return NULL;
    fault_rank(comm->rank);
    fault_point("start", 0);
    if (comm_agree(comm, own_log(o, comm, e), e)) return comm;
    comm->destroy(comm);
    return NULL;
}
