/* Who started this process, as which rank of how many, and how the ranks find each other. */
#ifndef LLMC_DIST_LAUNCH_H
#define LLMC_DIST_LAUNCH_H
#include "comm.h"
#ifdef __cplusplus
extern "C" {
#endif

typedef enum { BY_NOBODY /* one process */, BY_TORCHRUN, BY_MPI, BY_SLURM, BY_OURSELVES } LaunchedBy;
typedef struct {
    LaunchedBy by;
    const char *by_name;               /* "torchrun's environment", ... for messages */
    int rank, size, local_rank, local_size;
    char host[256];                    /* where rank 0 listens; empty: it is read from file */
    int port;                          /* 0: rank 0 takes a free one and writes host and port to file */
    char file[512];                    /* on a file system that all ranks share; empty: host and port are known */
    int listener;                      /* descriptor on which rank 0 listens already (BY_OURSELVES), else -1 */
} Launch;

/* From the environment; the first that matches wins (FORMATS.md): torchrun (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT),
 * Open MPI (OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK, _LOCAL_SIZE), Slurm (SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID; only in a step of more than one
 * task, for a batch script's own shell is no rank). MASTER_ADDR and MASTER_PORT are taken with all of them. Without, Open MPI and Slurm ranks meet by a
 * file in `meeting_dir` (the run directory) whose name holds the job's id, so that a stale one is another's; so do torchrun's where its agent keeps
 * MASTER_PORT for itself (TORCHELASTIC_USE_AGENT_STORE=True). A step of Slurm's is known by SLURM_STEP_ID. A launcher that starts one process on each
 * machine, which starts the ranks there (srun torchrun), contradicts nothing.
 * EXIT_USAGE: a variable is missing, not a number, out of range, or two launchers contradict each other (their names and values in the text). */
bool launch_from_environment(Launch *launch, const char *meeting_dir, Error *e);

/* Starts `size` ranks on this machine by fork. Returns in each child with *launch filled in (BY_OURSELVES) and true. The parent stays inside, watches
 * its children, and leaves by exit(): SIGTERM, SIGINT, SIGHUP and SIGUSR1 are passed on to all ranks (a second time too); the first rank that fails
 * makes it send SIGTERM to the others, and SIGKILL `grace` seconds later (10); children die with their parent (PR_SET_PDEATHSIG). The last line it
 * prints is the first cause: which rank ended how (exit code or signal by name), a rank that only lost its peers (EXIT_PEER) being none while
 * another has one. Its exit code is that of the cause (128 + signal for a signal), 0 when all are 0, EXIT_REQUEUE when all are EXIT_REQUEUE.
 * Each rank is a process group of its own: a terminal's Ctrl-C reaches it through the parent, once.
 * To be called before any thread, backend or file exists. EXIT_USAGE in the parent: fork or socket refused. */
bool launch_here(Launch *launch, int size, double grace, Error *e);

/* Brings all ranks of a launch together: a socket between every two of them. Each tells rank 0 its rank, size, and `proof`: lines "name = value" that must
 * be the same on all (build, configuration, ...). Within `limit` seconds it is done, or every rank that is there ends with one message: a missing rank, one
 * that came twice, another size, the first line of the proof that differs (rank, its value, rank 0's value), a port in use, an address that does not
 * answer, a stranger on the port (ignored). EXIT_USAGE; EXIT_HANG when ranks (rank 0, too) are missing at the limit;
 * EXIT_PEER when one ended meanwhile; EXIT_STORAGE when the meeting file cannot be written. size 1: comm_alone. */
Comm *comm_connect(const Launch *launch, const char *proof, double limit, Error *e);

#ifdef __cplusplus
}
#endif
#endif
