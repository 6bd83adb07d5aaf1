/* Between the communicator's sockets and MPI: a socket pair for each peer, whose other ends one thread empties into messages and fills from messages. */
#include "mpi_wire.h"
#include "mesh.h"
#include "tcp.h"
#include <stdlib.h>

#ifdef LLMC_MPI
#include "../base/timer.h"
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <mpi.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MESSAGE = 1 << 20 /* bytes at most; one of none says that no more come */, TAG = 1, IDLE = 50 /* microseconds */ };

typedef struct {
    int socket;                        /* -1: this rank itself */
    char *out, *in;                    /* (MESSAGE) */
    MPI_Request sending, receiving;    /* MPI_REQUEST_NULL: none */
    size_t have, written;              /* of in */
    bool sent_all, received_all;
} Link;

typedef struct {
    Comm *comm;
    void (*destroy)(Comm *);           /* of the communicator over sockets */
    void (*phase)(Comm *, const char *, int64_t, double);
    Link *links;                       /* (size) */
    int rank, size;                    /* as the launcher says */
    pthread_t thread;
    pthread_mutex_t lock;              /* of this paragraph */
    pthread_cond_t changed;
    bool started, closing;
    Error problem;                     /* of the start */
    double patience;                   /* seconds, once it is closing */
} MpiWire;
static MpiWire *wire;                    /* MPI begins and ends once in a process */

/* ---- the thread: all calls of MPI ------------------------------------------------------------------------------------- */

/* MPI does not reach the peer any more: for the communicator it is gone. */
static bool lost(Link *l) {
    shutdown(l->socket, SHUT_RDWR);
    l->sent_all = l->received_all = true;
    l->sending = l->receiving = MPI_REQUEST_NULL;
    return true;
}

/* Both: whether anything moved. */
static bool send_some(Link *l, int peer) {
    int done = 1;
    if (l->sending != MPI_REQUEST_NULL && MPI_Test(&l->sending, &done, MPI_STATUS_IGNORE) != MPI_SUCCESS) return lost(l);
    if (!done || l->sent_all) return false;
    ssize_t n = read(l->socket, l->out, MESSAGE);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return false;
    l->sent_all = n <= 0;
    if (MPI_Isend(l->out, n > 0 ? (int)n : 0, MPI_BYTE, peer, TAG, MPI_COMM_WORLD, &l->sending) != MPI_SUCCESS) return lost(l);
    return true;
}

static bool receive_some(Link *l, int peer) {
    if (l->received_all) return false;
    if (l->written < l->have) {
        ssize_t n = send(l->socket, l->in + l->written, l->have - l->written, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno != EAGAIN && errno != EINTR) n = (ssize_t)(l->have - l->written); /* the communicator has closed: nobody wants it */
        l->written += n > 0 ? (size_t)n : 0;
        return n > 0;
    }
    if (l->receiving == MPI_REQUEST_NULL) return MPI_Irecv(l->in, MESSAGE, MPI_BYTE, peer, TAG, MPI_COMM_WORLD, &l->receiving) == MPI_SUCCESS || lost(l);
    int done, bytes = 0;
    MPI_Status status;
    if (MPI_Test(&l->receiving, &done, &status) != MPI_SUCCESS) return lost(l);
    if (!done) return false;
    MPI_Get_count(&status, MPI_BYTE, &bytes);
    l->have = (size_t)bytes, l->written = 0;
    l->received_all = bytes == 0;
    if (l->received_all) shutdown(l->socket, SHUT_WR);
    return true;
}

static bool all_ended(void) {
    for (int r = 0; r < wire->size; r++)
        if (r != wire->rank && (!wire->links[r].sent_all || !wire->links[r].received_all || wire->links[r].sending != MPI_REQUEST_NULL)) return false;
    return true;
}

static bool start(Error *e) {
    int given, rank = -1, size = 0;
    if (MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &given) != MPI_SUCCESS) return fail(e, EXIT_USAGE, "--transport mpi: MPI_Init failed; leave the option out, or look at what MPI says");
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    return (rank == wire->rank && size == wire->size) ||
           fail(e, EXIT_USAGE, "--transport mpi: the launcher says rank %d of %d, MPI rank %d of %d; start the ranks with the mpirun of the MPI that this program is built with, or leave the option out",
                wire->rank, wire->size, rank, size);
}

/* Seconds that the others may still take; INFINITY before the end. */
static double patience_left(double *until) {
    pthread_mutex_lock(&wire->lock);
    if (wire->closing && isinf(*until)) *until = seconds_now() + wire->patience;
    pthread_mutex_unlock(&wire->lock);
    return *until - seconds_now();
}

static void *carry(void *arg) {
    (void)arg;
    Error e = {0};
    bool ok = start(&e);
    pthread_mutex_lock(&wire->lock);
    wire->problem = e;
    wire->started = true;
    pthread_cond_broadcast(&wire->changed);
    pthread_mutex_unlock(&wire->lock);
    double until = INFINITY;
    while (ok && !all_ended()) {
        bool moved = false;
        for (int r = 0; r < wire->size; r++) {
            if (r == wire->rank) continue;
            moved |= send_some(&wire->links[r], r);
            moved |= receive_some(&wire->links[r], r);
        }
        if (moved) continue;
        if (patience_left(&until) < 0) return NULL; /* without MPI_Finalize, which would wait for the others */
        usleep(IDLE);
    }
    if (!e.code || !ok) MPI_Finalize();
    return NULL;
}

/* ---- the communicator ------------------------------------------------------------------------------------------------- */

static void mpi_phase(Comm *c, const char *text, int64_t step, double limit) {
    pthread_mutex_lock(&wire->lock);
    wire->patience = limit;
    pthread_mutex_unlock(&wire->lock);
    wire->phase(c, text, step, limit);
}

static void wire_end(void) {
    pthread_mutex_lock(&wire->lock);
    wire->closing = true;
    pthread_mutex_unlock(&wire->lock);
    pthread_join(wire->thread, NULL);
    for (int r = 0; r < wire->size; r++) {
        if (wire->links[r].socket >= 0) close(wire->links[r].socket);
        free(wire->links[r].out), free(wire->links[r].in);
    }
    free(wire->links);
    free(wire);
    wire = NULL;
}

static void mpi_destroy(Comm *c) {
    wire->destroy(c);
    wire_end();
}

/* A socket pair for each peer; sockets (size): the communicator's ends. */
static bool open_links(int *sockets, Error *e) {
    for (int r = 0; r < wire->size; r++) {
        Link *l = &wire->links[r];
        int pair[2] = {-1, -1};
        *l = (Link){.socket = -1, .sending = MPI_REQUEST_NULL, .receiving = MPI_REQUEST_NULL};
        sockets[r] = -1;
        if (r == wire->rank) continue;
        if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
            return fail(e, EXIT_USAGE, "--transport mpi: no sockets for %d ranks: %s; see ulimit -n", wire->size, strerror(errno));
        l->socket = pair[0], sockets[r] = pair[1];
        fcntl(pair[0], F_SETFL, O_NONBLOCK);
        l->out = xmalloc(MESSAGE), l->in = xmalloc(MESSAGE);
    }
    return true;
}

static bool wire_start(const Launch *l, double limit, int *sockets, Error *e) {
    sigset_t all, before;
    wire = xcalloc(1, sizeof *wire);
    *wire = (MpiWire){.rank = l->rank, .size = l->size, .patience = limit, .links = xcalloc((size_t)l->size, sizeof *wire->links)};
    pthread_mutex_init(&wire->lock, NULL);
    pthread_cond_init(&wire->changed, NULL);
    if (!open_links(sockets, e)) return false;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&wire->thread, NULL, carry, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    CHECK(!error, "no thread for MPI: %s", strerror(error));
    pthread_mutex_lock(&wire->lock);
    while (!wire->started) pthread_cond_wait(&wire->changed, &wire->lock);
    *e = wire->problem;
    pthread_mutex_unlock(&wire->lock);
    return !e->code;
}

Comm *mpi_connect(const Launch *l, const char *proof, double limit, Error *e) {
    Error problem = {0};
    if (l->by != BY_MPI && l->by != BY_SLURM) return fail(e, EXIT_USAGE, "--transport mpi: found %s, expected ranks that mpirun or srun has started; leave the option out", l->by_name), NULL;
    CHECK(!wire, "MPI begins once in a process");
    int *sockets = xcalloc((size_t)l->size, sizeof *sockets);
    bool ok = wire_start(l, limit, sockets, &problem);
    Comm *c = ok ? tcp_comm_create(l->rank, l->size, l->local_rank, l->local_size, sockets, limit) : NULL;
    free(sockets);
    if (!ok) {
        if (e) *e = problem;
        return NULL;
    }
    wire->destroy = c->destroy, wire->phase = c->phase;
    c->name = "mpi", c->destroy = mpi_destroy, c->phase = mpi_phase;
    char *first = comm_broadcast_text(c, proof, 0);
    ok = same_proof(first, proof, l->rank, &problem);
    free(first);
    if (comm_agree(c, ok, &problem)) return c;
    if (e) *e = problem;
    c->destroy(c);
    return NULL;
}
#else
Comm *mpi_connect(const Launch *l, const char *proof, double limit, Error *e) {
    (void)l, (void)proof, (void)limit;
    fail(e, EXIT_USAGE, "--transport mpi: this program is built without MPI (mpicc was not there); leave the option out: ranks that mpirun has started find each other without it");
    return NULL;
}
#endif
