/* The communicator over NCCL. The caller's thread queues; a second thread watches for NCCL's asynchronous errors and for operations that do not end. */
#include "nccl.h"
#include "../base/timer.h"
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { TICK = 50 /* milliseconds between two looks */ };

/* Where a rank is, for those who wait for it. */
typedef struct {
    uint64_t given, done;
    int64_t step;
    char phase[48], name[24];   /* of the newest operation */
} Place;

typedef struct {
    Comm comm;
    Comm *host;
    NcclApi api;
    void *nccl;
    DeviceQueue queue;
    pthread_mutex_t calls;      /* NCCL's on the communicator, that for its errors included, which ends what others began: one at a time */
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
    /* The watch's own: where all were when they were last asked, and what this rank had done by then. */
    Place *places;              /* (size) */
    char text[400];             /* what this rank waits for */
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
#ifdef LLMC_NCCL_LIBRARY /* where the build found it, which may be none of the loader's places */
    if (!library && !(given && *given)) library = dlopen(path = LLMC_NCCL_LIBRARY, RTLD_NOW | RTLD_LOCAL);
#endif
    if (!library) return fail(e, EXIT_USAGE, "NCCL: %s; install it (Debian: libnccl2), name it in LLMC_NCCL, or give --transport host", dlerror());
    const struct { const char *name; size_t at; } functions[] = {
        {"ncclGetVersion", offsetof(NcclApi, get_version)}, {"ncclGetUniqueId", offsetof(NcclApi, get_unique_id)}, {"ncclCommInitRankConfig", offsetof(NcclApi, comm_init)},
        {"ncclCommGetAsyncError", offsetof(NcclApi, async_error)}, {"ncclReduceScatter", offsetof(NcclApi, reduce_scatter)}, {"ncclAllGather", offsetof(NcclApi, all_gather)},
        {"ncclAllReduce", offsetof(NcclApi, all_reduce)}, {"ncclGroupStart", offsetof(NcclApi, group_start)}, {"ncclGroupEnd", offsetof(NcclApi, group_end)},
        {"ncclSend", offsetof(NcclApi, send)}, {"ncclRecv", offsetof(NcclApi, receive)}, {"ncclCommFinalize", offsetof(NcclApi, finalize)}, {"ncclCommDestroy", offsetof(NcclApi, destroy)},
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

/* ---- when nothing moves ------------------------------------------------------------------------------------------------ */

static void my_place(Nccl *n, Place *p) {
    memset(p, 0, sizeof *p);
    pthread_mutex_lock(&n->lock);
    p->given = n->given, p->done = n->done, p->step = n->step;
    memcpy(p->phase, n->phase, sizeof p->phase);
    if (n->given) snprintf(p->name, sizeof p->name, "%s", n->names[n->given % 64].name);
    pthread_mutex_unlock(&n->lock);
}

/* Every rank's watch answers, whatever its rank waits for; one that does not answer, or is busy over the host's memory, is named by that communicator,
 * which ends the process. */
static void ask(Nccl *n, double limit, double patience) {
    char where[300];
    place(n, where, sizeof where);
    snprintf(n->text, sizeof n->text, "no progress for %.3g seconds in %s", limit, where);
    my_place(n, &n->places[n->comm.rank]);
    n->host->wait(n->host, n->host->ask(n->host, n->places, (size_t)n->comm.size * sizeof *n->places, n->text, patience));
}

/* The oldest operation that somebody is in; 0: none. */
static uint64_t waited_for(const Nccl *n, int *by) {
    uint64_t oldest = 0;
    for (int r = 0; r < n->comm.size; r++) {
        const Place *p = &n->places[r];
        if (p->done < p->given && (!oldest || p->done + 1 < oldest)) oldest = p->done + 1, *by = r;
    }
    return oldest;
}

__attribute__((format(printf, 3, 4))) static void append(char *text, size_t bytes, const char *format, ...) { /* cut at its end */
    size_t used = strlen(text);
    va_list args;
    va_start(args, format);
    vsnprintf(text + used, bytes - used, format, args);
    va_end(args);
}

static void append_last(char *text, size_t bytes, const Place *p) {
    if (p->given) append(text, bytes, " last was %s (operation %llu), during %s", p->name, (unsigned long long)p->given, p->phase);
    else append(text, bytes, " first is still to come, during %s", p->phase);
    if (p->step >= 0) append(text, bytes, ", step %lld", (long long)p->step);
}

/* All have answered, and nothing has changed here since: who has not come to the operation that others are in. */
__attribute__((noreturn)) static void stuck(Nccl *n, double limit) {
    const Place *mine = &n->places[n->comm.rank];
    int by = 0, missing = 0;
    uint64_t operation = waited_for(n, &by);
    char text[2000] = "", where[300];
    if (mine->given < operation) {
        append(text, sizeof text, "rank %d waits for me over NCCL in operation %llu; my", by, (unsigned long long)operation);
        append_last(text, sizeof text, mine);
        end(n, EXIT_HANG, text, limit < 10 ? limit / 2 : 5);
    }
    place(n, where, sizeof where);
    append(text, sizeof text, "no progress for %.3g seconds in %s", limit, where);
    for (int r = 0; r < n->comm.size; r++) {
        if (n->places[r].given >= operation || ++missing > 8) continue;
        append(text, sizeof text, "; rank %d has not come to it: its", r);
        append_last(text, sizeof text, &n->places[r]);
    }
    if (missing > 8) append(text, sizeof text, "; and %d more", missing - 8);
    if (!missing) append(text, sizeof text, "; all ranks have come to it, and NCCL or the network does not bring it to an end (NCCL_DEBUG=INFO in the environment says more)");
    end(n, EXIT_HANG, text, limit < 10 ? limit / 2 : 5);
}

/* With n->lock: until something changes, or a tick is over. */
static void tick(Nccl *n) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += TICK * 1000000L;
    until.tv_sec += until.tv_nsec / 1000000000L, until.tv_nsec %= 1000000000L;
    pthread_cond_timedwait(&n->changed, &n->lock, &until);
}

static int after_call(Nccl *n, int result) { return pthread_mutex_unlock(&n->calls), result; }
#define NCCL_CALL(n, call) (pthread_mutex_lock(&(n)->calls), after_call(n, (n)->api.call))

static int errors_of(Nccl *n) {
    int error = NCCL_OK, asked = n->api.async_error(n->nccl, &error);
    return asked != NCCL_OK ? asked : error;
}

/* Asks when three quarters of the limit are over, so that all is said by its end. From the answers on, neither a rank that waits nor one that is waited for may
 * stand still for the rest of the limit. */
static void *watch(void *arg) {
    Nccl *n = arg;
    CommTicket seen = 0;
    uint64_t phases = 0;
    double idle = 0, since_asked = -1, looked = seconds_now(); /* since_asked: -1, nobody has asked since something moved */
    pthread_mutex_lock(&n->lock);
    while (!n->closing) {
        tick(n);
        double now = seconds_now(), passed = now - looked, limit = n->limit, patience = limit < 20 ? limit / 4 : 5;
        const Place *mine = &n->places[n->comm.rank]; /* when asked */
        bool ended = n->done != seen || n->phases != phases, moved = n->done == n->given || ended;
        if (passed > 2e-3 * TICK) passed = 2e-3 * TICK; /* time in which this process was stopped is nobody's fault */
        if (ended || (mine->done == mine->given && n->given != mine->given)) since_asked = -1;
        if (since_asked >= 0) since_asked += passed;
        seen = n->done, phases = n->phases, looked = now;
        idle = moved ? 0 : idle + passed;
        pthread_mutex_unlock(&n->lock);
        int error = NCCL_OK;
        if (!pthread_mutex_trylock(&n->calls)) error = after_call(n, errors_of(n)); /* else the caller looks itself */
        if (error != NCCL_OK && error != NCCL_IN_PROGRESS) broken(n, error);
        if (since_asked > patience) stuck(n, limit);
        if (n->comm.size == 1 && idle > limit) my_place(n, n->places), stuck(n, limit);
        if (n->comm.size > 1 && ((since_asked < 0 && idle > limit - patience) || n->host->asked(n->host))) {
            int by;
            ask(n, limit, patience);
            uint64_t operation = waited_for(n, &by);
            since_asked = mine->done < mine->given || mine->given < operation ? 0 : -1;
            looked = seconds_now();
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
static void take(Nccl *n, int result) {
    while (result == NCCL_IN_PROGRESS) {
        pthread_mutex_lock(&n->calls);
        result = after_call(n, errors_of(n));
        if (result == NCCL_IN_PROGRESS) usleep(20);
    }
    if (result != NCCL_OK) broken(n, result);
}

static CommTicket queued(Nccl *n, CommTicket ticket, int result) {
    take(n, result);
    n->queue.call(n->queue.context, has_ended, n);
    return ticket;
}

/* Each rank sends each other one its part, rounded, and sums what comes, a room full at a time: as many bytes as a ring sends, in one hop, and every
 * contribution is rounded once, where a ring that carries bf16 rounds its sums at each hop. */
static CommTicket reduce_scatter_bf16(Nccl *n, float *data, size_t part) {
    size_t size = (size_t)n->comm.size, rank = (size_t)n->comm.rank, most = n->queue.room_elements / 2 / size / 8 * 8;
    CommTicket t = begins(n, "reduce_scatter in bf16", part * size * sizeof *data);
    CHECK(n->queue.room && most, "%zu elements of room for %zu ranks", n->queue.room_elements, size);
    uint16_t *out = n->queue.room, *in = out + size * most;
    for (size_t at = 0; at < part; at += most) {
        size_t m = part - at < most ? part - at : most;
        n->queue.round(n->queue.context, out, data + at, size, part, m, rank);
        pthread_mutex_lock(&n->calls);
        int result = n->api.group_start();
        for (size_t r = 0; r < size && result == NCCL_OK; r++) {
            if (r == rank) continue;
            int sent = n->api.send(out + r * m, m, NCCL_BF16, (int)r, n->nccl, n->queue.stream), received = n->api.receive(in + r * m, m, NCCL_BF16, (int)r, n->nccl, n->queue.stream);
            if (sent != NCCL_OK && sent != NCCL_IN_PROGRESS) result = sent;
            else if (received != NCCL_OK && received != NCCL_IN_PROGRESS) result = received;
        }
        take(n, after_call(n, result == NCCL_OK ? n->api.group_end() : result));
        n->queue.sum(n->queue.context, data + rank * part + at, in, size, rank, m);
    }
    return queued(n, t, NCCL_OK);
}

static CommTicket nccl_reduce_scatter(Comm *c, float *data, size_t count, Wire wire) {
    Nccl *n = (Nccl *)c;
    size_t part = count / (size_t)c->size;
    CHECK(count % (size_t)c->size == 0, "%zu elements in %d parts", count, c->size);
    if (wire == WIRE_BF16) return reduce_scatter_bf16(n, data, part);
    CommTicket t = begins(n, "reduce_scatter", count * sizeof *data);
    return queued(n, t, NCCL_CALL(n, reduce_scatter(data, data + part * (size_t)c->rank, part, NCCL_FLOAT32, NCCL_SUM, n->nccl, n->queue.stream)));
}

static CommTicket nccl_all_gather(Comm *c, void *data, size_t bytes) {
    Nccl *n = (Nccl *)c;
    size_t part = bytes / (size_t)c->size;
    CHECK(bytes % (size_t)c->size == 0, "%zu bytes in %d parts", bytes, c->size);
    CommTicket t = begins(n, "all_gather", bytes);
    return queued(n, t, NCCL_CALL(n, all_gather((char *)data + part * (size_t)c->rank, data, part, NCCL_UINT8, n->nccl, n->queue.stream)));
}

static CommTicket nccl_all_reduce(Comm *c, double *data, size_t count) {
    Nccl *n = (Nccl *)c;
    CommTicket t = begins(n, "all_reduce", count * sizeof *data);
    return queued(n, t, NCCL_CALL(n, all_reduce(data, data, count, NCCL_FLOAT64, NCCL_SUM, n->nccl, n->queue.stream)));
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
    for (double until = seconds_now() + 5; n->done < n->given && seconds_now() < until;) tick(n);
    const bool ended = n->done == n->given;
    n->closing = true;
    pthread_cond_broadcast(&n->changed);
    pthread_mutex_unlock(&n->lock);
    pthread_join(n->thread, NULL);
    if (!ended) { /* after an error: the device may still come to has_ended, so n stays */
        n->api.abort(n->nccl);
        return;
    }
    if (settled(n, n->api.finalize(n->nccl), 5, &error)) n->api.destroy(n->nccl);
    else n->api.abort(n->nccl);
    pthread_mutex_destroy(&n->lock);
    pthread_mutex_destroy(&n->calls);
    pthread_cond_destroy(&n->changed);
    free(n->places);
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
    n->host = host;
    if (!comm_agree(host, load(&n->api, queue->emulated, e), e) || !meet(n, host, limit, e)) return free(n), NULL;
    n->comm = (Comm){.name = "nccl", .rank = host->rank, .size = host->size, .local_rank = host->local_rank, .local_size = host->local_size,
                     .reduce_scatter = nccl_reduce_scatter, .all_gather = nccl_all_gather, .all_reduce = nccl_all_reduce, .call = nccl_call, .wait = nccl_wait,
                     .phase = nccl_phase, .destroy = nccl_destroy};
    n->places = xcalloc((size_t)host->size, sizeof *n->places);
    pthread_mutex_init(&n->lock, NULL);
    pthread_mutex_init(&n->calls, NULL);
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
