/* The communicator over NCCL. The caller's thread queues; a second thread watches for NCCL's asynchronous errors and for operations that do not end. */
#include "nccl.h"
#include "../base/timer.h"
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { TICK = 50 /* milliseconds between two looks */ };

typedef struct {
    Comm comm;
    NcclApi api;
    void *nccl;
    DeviceQueue queue;
    pthread_t thread;
    pthread_mutex_t lock;       /* of this paragraph */
    pthread_cond_t changed;
    CommTicket given, done;     /* operations queued; ended on the device, in order */
    struct { const char *name; size_t bytes; } names[64]; /* of operation t at t % 64 */
    char phase[48];
    int64_t step;
    double limit;
    uint64_t phases;
    bool closing;
} Nccl;

/* ---- the library ------------------------------------------------------------------------------------------------------ */

static bool load(NcclApi *api, bool emulated, Error *e) {
#ifdef LLMC_EMU
    if (emulated) return *api = nccl_twin, true;
#else
    (void)emulated;
#endif
    const char *given = getenv("LLMC_NCCL"), *path = given && *given ? given : "libnccl.so.2";
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) return fail(e, EXIT_USAGE, "NCCL: %s; install it (Debian: libnccl2), name it in LLMC_NCCL, or give --transport host", dlerror());
    const struct { const char *name; size_t at; } functions[] = {
        {"ncclGetVersion", offsetof(NcclApi, get_version)}, {"ncclGetUniqueId", offsetof(NcclApi, get_unique_id)}, {"ncclCommInitRankConfig", offsetof(NcclApi, comm_init)},
        {"ncclCommGetAsyncError", offsetof(NcclApi, async_error)}, {"ncclReduceScatter", offsetof(NcclApi, reduce_scatter)}, {"ncclAllGather", offsetof(NcclApi, all_gather)},
        {"ncclAllReduce", offsetof(NcclApi, all_reduce)}, {"ncclCommFinalize", offsetof(NcclApi, finalize)}, {"ncclCommDestroy", offsetof(NcclApi, destroy)},
        {"ncclCommAbort", offsetof(NcclApi, abort)}, {"ncclGetErrorString", offsetof(NcclApi, error_text)}, {"ncclGetLastError", offsetof(NcclApi, last_error)}};
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
        void *symbol = dlsym(library, functions[i].name);
        memcpy((char *)api + functions[i].at, &symbol, sizeof symbol); /* ISO C has no conversion from an object pointer to one to a function */
        if (!symbol) return dlclose(library), fail(e, EXIT_USAGE, "NCCL: %s has no %s; expected NCCL 2.14 or later, or give --transport host", path, functions[i].name);
    }
    int version = 0;
    if (api->get_version(&version) == NCCL_OK && version >= NCCL_VERSION_LEAST) return true;
    dlclose(library);
    return fail(e, EXIT_USAGE, "NCCL: %s is version %d; expected %d (2.14) or later, or give --transport host", path, version, NCCL_VERSION_LEAST);
}

/* ---- the end, when it cannot go on ------------------------------------------------------------------------------------ */

static void *abort_comm(void *arg) {
    Nccl *n = arg;
    n->api.abort(n->nccl);
    return NULL;
}

/* The oldest operation that has not ended, and where this rank is: "reduce_scatter (operation 12) of 4096 bytes over NCCL during training, step 40". */
static void place(Nccl *n, char *text, size_t bytes) {
    pthread_mutex_lock(&n->lock);
    CommTicket t = n->done < n->given ? n->done + 1 : n->given;
    int used = snprintf(text, bytes, "%s (operation %llu) of %zu bytes over NCCL during %s", n->names[t % 64].name ? n->names[t % 64].name : "no operation", (unsigned long long)t,
                        n->names[t % 64].bytes, n->phase);
    if (n->step >= 0 && used > 0 && (size_t)used < bytes) snprintf(text + used, bytes - (size_t)used, ", step %lld", (long long)n->step);
    pthread_mutex_unlock(&n->lock);
}

/* One line, whole. Others, about to say the same, get `patience` seconds; what NCCL holds is given up meanwhile, which may itself never end. */
__attribute__((noreturn)) static void end(Nccl *n, int code, const char *text, double patience) {
    char line[2000];
    int length = snprintf(line, sizeof line, "error: rank %d: %s\n", n->comm.rank, text);
    for (int at = 0; at < length;) {
        ssize_t k = write(STDERR_FILENO, line + at, (size_t)(length - at));
        if (k <= 0) break;
        at += (int)k;
    }
    if (!ftrylockfile(stdout)) {
        fflush(stdout);
        funlockfile(stdout);
    }
    pthread_t thread;
    if (!pthread_create(&thread, NULL, abort_comm, n)) pthread_detach(thread);
    usleep((useconds_t)(patience * 1e6));
    _exit(code);
}

__attribute__((noreturn)) static void broken(Nccl *n, int error) {
    char where[300], text[1500];
    place(n, where, sizeof where);
    if (error == NCCL_REMOTE) snprintf(text, sizeof text, "a peer is gone; I waited for it in %s: %.700s", where, n->api.last_error(n->nccl));
    else snprintf(text, sizeof text, "NCCL: %s in %s: %.700s; NCCL_DEBUG=WARN in the environment says more", n->api.error_text(error), where, n->api.last_error(n->nccl));
    end(n, error == NCCL_REMOTE ? EXIT_PEER : EXIT_DEVICE, text, 0.5);
}

static void *watch(void *arg) {
    Nccl *n = arg;
    CommTicket seen = 0;
    uint64_t phases = 0;
    double idle = 0, looked = seconds_now();
    pthread_mutex_lock(&n->lock);
    while (!n->closing) {
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_nsec += TICK * 1000000L;
        until.tv_sec += until.tv_nsec / 1000000000L, until.tv_nsec %= 1000000000L;
        pthread_cond_timedwait(&n->changed, &n->lock, &until);
        double now = seconds_now(), passed = now - looked, limit = n->limit;
        bool moved = n->done == n->given || n->done != seen || n->phases != phases;
        seen = n->done, phases = n->phases, looked = now;
        idle = moved ? 0 : idle + (passed < 2e-3 * TICK ? passed : 2e-3 * TICK); /* time in which this process was stopped is nobody's fault */
        pthread_mutex_unlock(&n->lock);
        int error = NCCL_OK;
        n->api.async_error(n->nccl, &error);
        if (error != NCCL_OK && error != NCCL_IN_PROGRESS) broken(n, error);
        if (idle > limit) {
            char where[300], text[500];
            place(n, where, sizeof where);
            snprintf(text, sizeof text, "no progress for %.3g seconds in %s; a rank that says nothing of the kind is the one that is missing", limit, where);
            end(n, EXIT_HANG, text, limit < 10 ? limit / 2 : 5);
        }
        pthread_mutex_lock(&n->lock);
    }
    pthread_mutex_unlock(&n->lock);
    return NULL;
}

/* ---- operations --------------------------------------------------------------------------------------------------------- */

/* On the host, when the queue gets past an operation. */
static void has_ended(void *arg) {
    Nccl *n = arg;
    pthread_mutex_lock(&n->lock);
    n->done++;
    pthread_cond_broadcast(&n->changed);
    pthread_mutex_unlock(&n->lock);
}

static CommTicket begins(Nccl *n, const char *name, size_t bytes) {
    pthread_mutex_lock(&n->lock);
    CommTicket ticket = ++n->given;
    n->names[ticket % 64].name = name, n->names[ticket % 64].bytes = bytes;
    pthread_mutex_unlock(&n->lock);
    return ticket;
}

/* A communicator that does not block may take its time to queue. The watch ends the process if it takes too long. */
static CommTicket queued(Nccl *n, CommTicket ticket, int result) {
    while (result == NCCL_IN_PROGRESS) {
        int asked = n->api.async_error(n->nccl, &result);
        if (asked != NCCL_OK) result = asked;
        if (result == NCCL_IN_PROGRESS) usleep(20);
    }
    if (result != NCCL_OK) broken(n, result);
    n->queue.call(n->queue.context, has_ended, n);
    return ticket;
}

static CommTicket nccl_reduce_scatter(Comm *c, float *data, size_t count, Wire wire) {
    Nccl *n = (Nccl *)c;
    size_t part = count / (size_t)c->size;
    CHECK(wire == WIRE_FLOAT32 && count % (size_t)c->size == 0, "%zu elements in %d parts, wire %d", count, c->size, (int)wire);
    CommTicket t = begins(n, "reduce_scatter", count * sizeof *data);
    return queued(n, t, n->api.reduce_scatter(data, data + part * (size_t)c->rank, part, NCCL_FLOAT32, NCCL_SUM, n->nccl, n->queue.stream));
}

static CommTicket nccl_all_gather(Comm *c, void *data, size_t bytes) {
    Nccl *n = (Nccl *)c;
    size_t part = bytes / (size_t)c->size;
    CHECK(bytes % (size_t)c->size == 0, "%zu bytes in %d parts", bytes, c->size);
    CommTicket t = begins(n, "all_gather", bytes);
    return queued(n, t, n->api.all_gather((char *)data + part * (size_t)c->rank, data, part, NCCL_UINT8, n->nccl, n->queue.stream));
}

static CommTicket nccl_all_reduce(Comm *c, double *data, size_t count) {
    Nccl *n = (Nccl *)c;
    CommTicket t = begins(n, "all_reduce", count * sizeof *data);
    return queued(n, t, n->api.all_reduce(data, data, count, NCCL_FLOAT64, NCCL_SUM, n->nccl, n->queue.stream));
}

static CommTicket nccl_call(Comm *c, void (*fn)(void *), void *arg) {
    Nccl *n = (Nccl *)c;
    CommTicket t = begins(n, "call", 0);
    n->queue.call(n->queue.context, fn, arg);
    return queued(n, t, NCCL_OK);
}

static void nccl_wait(Comm *c, CommTicket ticket) {
    Nccl *n = (Nccl *)c;
    pthread_mutex_lock(&n->lock);
    while (n->done < ticket) pthread_cond_wait(&n->changed, &n->lock);
    pthread_mutex_unlock(&n->lock);
}

static void nccl_phase(Comm *c, const char *text, int64_t step, double limit) {
    Nccl *n = (Nccl *)c;
    pthread_mutex_lock(&n->lock);
    snprintf(n->phase, sizeof n->phase, "%s", text);
    n->step = step;
    n->limit = limit;
    n->phases++;
    pthread_mutex_unlock(&n->lock);
}

/* ---- life ------------------------------------------------------------------------------------------------------------- */

/* Until NCCL is done with what it began, for `limit` seconds; false: with *error. */
static bool settled(Nccl *n, int error, double limit, int *result) {
    double until = seconds_now() + limit;
    while (error == NCCL_OK || error == NCCL_IN_PROGRESS) {
        int asked = n->api.async_error(n->nccl, &error);
        if (asked != NCCL_OK) error = asked;
        if (error == NCCL_OK) return true;
        if (error == NCCL_IN_PROGRESS && seconds_now() > until) break;
        if (error == NCCL_IN_PROGRESS) usleep(1000);
    }
    return *result = error, false;
}

static void nccl_destroy(Comm *c) {
    Nccl *n = (Nccl *)c;
    int error;
    pthread_mutex_lock(&n->lock);
    n->closing = true;
    pthread_cond_broadcast(&n->changed);
    pthread_mutex_unlock(&n->lock);
    pthread_join(n->thread, NULL);
    if (settled(n, n->api.finalize(n->nccl), 5, &error)) n->api.destroy(n->nccl);
    else n->api.abort(n->nccl);
    pthread_mutex_destroy(&n->lock);
    pthread_cond_destroy(&n->changed);
    free(n);
}

static bool meet(Nccl *n, Comm *host, double limit, Error *e) {
    NcclId id = {{0}};
    int error = host->rank ? NCCL_OK : n->api.get_unique_id(&id);
    bool ok = error == NCCL_OK || fail(e, EXIT_DEVICE, "NCCL: %s when asked for an id: %.700s", n->api.error_text(error), n->api.last_error(NULL));
    if (!comm_agree(host, ok, e)) return false;
    host->wait(host, host->broadcast(host, &id, sizeof id, 0));
    NcclConfig config = {.size = sizeof config, .magic = NCCL_CONFIG_MAGIC, .version = NCCL_VERSION_LEAST, .blocking = 0};
    error = n->api.comm_init(&n->nccl, host->size, id, host->rank, &config);
    if (n->nccl && settled(n, error, limit, &error)) ok = true;
    else if (error == NCCL_IN_PROGRESS) ok = fail(e, EXIT_HANG, "NCCL: the %d ranks did not come together within %.3g seconds; NCCL_DEBUG=INFO says how far it came, --transport host goes without", host->size, limit);
    else ok = fail(e, EXIT_DEVICE, "NCCL: %s when %d ranks were to come together: %.700s; NCCL_DEBUG=WARN in the environment says more, --transport host goes without",
                   n->api.error_text(error), host->size, n->api.last_error(NULL));
    if (comm_agree(host, ok, e)) return true;
    if (n->nccl) n->api.abort(n->nccl);
    return false;
}

Comm *nccl_comm_create(Comm *host, const DeviceQueue *queue, double limit, Error *e) {
    Nccl *n = xcalloc(1, sizeof *n);
    n->queue = *queue;
    if (!comm_agree(host, load(&n->api, queue->emulated, e), e) || !meet(n, host, limit, e)) return free(n), NULL;
    n->comm = (Comm){.name = "nccl", .rank = host->rank, .size = host->size, .local_rank = host->local_rank, .local_size = host->local_size,
                     .reduce_scatter = nccl_reduce_scatter, .all_gather = nccl_all_gather, .all_reduce = nccl_all_reduce, .call = nccl_call, .wait = nccl_wait,
                     .phase = nccl_phase, .destroy = nccl_destroy};
    pthread_mutex_init(&n->lock, NULL);
    pthread_cond_init(&n->changed, NULL);
    nccl_phase(&n->comm, "start", -1, limit);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&n->thread, NULL, watch, n);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    CHECK(!error, "no thread to watch NCCL: %s", strerror(error));
    return &n->comm;
}
