/* How the ranks of a run talk to each other. A Comm is a value, like a Backend: rank, size and collective operations on host memory.
 * Every rank calls the same operations in the same order. Each is queued, runs behind those before it on a thread of the communicator, and
 * returns a ticket at once; its memory is the communicator's until wait(ticket) returns. Sums are in the order of ranks, 0 first, in
 * the type of the data: the same bits on every rank, every time.
 * An operation does not fail to its caller: when a peer is gone (EXIT_PEER), stuck for longer than the limit, or in another operation (EXIT_HANG),
 * the communicator says on standard error which rank, which operation and in which phase, and ends the process: what a run must keep is in its
 * checkpoints. Transports: alone (size 1, nothing to do), tcp (a mesh of sockets between all
 * ranks), mpi (the same, joined by MPI), and between devices, on their memory, nccl (nccl.h says how it differs). */
#ifndef LLMC_DIST_COMM_H
#define LLMC_DIST_COMM_H
#include "../base/error.h"
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

typedef struct Comm Comm;
typedef uint64_t CommTicket;           /* 0: nothing to wait for */
typedef enum { WIRE_FLOAT32, WIRE_BF16 /* every rank's contribution, its own too, rounded to nearest even; summed in float32; not where size is 1 */ } Wire;
struct Comm {
    const char *name;                  /* "alone", "tcp" */
    int rank, size;                    /* of this process; of all */
    int local_rank, local_size;        /* among those of this machine */
    double waited;                     /* seconds that callers have spent in wait so far */
    /* data (n) holds size parts of n / size elements (size divides n): afterwards part `rank` is the sum of all ranks' part `rank`; the other
     * parts are as they were. */
    CommTicket (*reduce_scatter)(Comm *, float *data, size_t n, Wire wire);
    /* data (bytes) holds size parts, of which this rank has part `rank`: afterwards all of them. size divides bytes. */
    CommTicket (*all_gather)(Comm *, void *data, size_t bytes);
    CommTicket (*all_reduce)(Comm *, double *data, size_t n);   /* sums; for a few numbers: each rank sends all to all */
    CommTicket (*broadcast)(Comm *, void *data, size_t bytes, int root);
    /* No message: fn(arg), on the thread that does the operations, behind those before it, so that an operation's data may still be on their way
     * to its memory when it is queued. All ranks call it alike, as if it were one. */
    CommTicket (*call)(Comm *, void (*fn)(void *arg), void *arg);
    /* For a communicator above this one (nccl) that waits in vain: as all_gather, by which each rank learns where all are. Who is in another operation
     * here, or silent for limit seconds, is named behind text (the caller's until then), and ends the process. asked: a peer asks, and nothing
     * is under way here: answer by ask. NULL, both, where a rank is alone, and in nccl. */
    CommTicket (*ask)(Comm *, void *data, size_t bytes, const char *text, double limit);
    bool (*asked)(Comm *);
    void (*wait)(Comm *, CommTicket);  /* all operations up to this one are done */
    /* What the rank is doing, for the message of a peer that waits for it, and how long an operation may take from here on, in seconds. The
     * text must outlive the communicator or the next call. */
    void (*phase)(Comm *, const char *text, int64_t step, double limit);
    void (*destroy)(Comm *);           /* waits for what is queued; no barrier */
};

/* ---- conveniences over the above; all ranks call them, and they are complete on return ------------------------------- */
void comm_sum(Comm *c, double *data, size_t n);
void comm_barrier(Comm *c);
/* True when every rank says ok. Else false on all, with *e the error of the lowest rank that is not ("rank 3: ..." in front of it where that is
 * another rank). */
bool comm_agree(Comm *c, bool ok, Error *e);
/* The texts of all ranks, on rank 0 alone (elsewhere NULL): size strings, each to be freed, as is the array. */
char **comm_gather_texts(Comm *c, const char *text);
/* Rank `root`'s text on every rank, to be freed. NULL stays NULL. */
char *comm_broadcast_text(Comm *c, const char *text, int root);

Comm *comm_alone(void);                /* size 1; destroy frees it */

#ifdef __cplusplus
}
#endif
#endif
