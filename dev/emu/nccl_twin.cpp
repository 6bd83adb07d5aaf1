/* What of NCCL llmc/dist/nccl.c uses, between processes that each have an emulated GPU: operations are work in the emulator's streams, data go through shared memory in
 * pieces, sums are in the order of ranks (so they have the bits of the transport over the host). Communicators do not block: they are in progress until
 * all ranks are there. A peer that has died is an asynchronous error, as NCCL has it. */
#include "inside.h"
#include "llmc/dist/nccl.h"
#include <atomic>
#include <chrono>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <thread>
#include <time.h>
#include <unistd.h>

namespace emu {

enum { MOST = 64, PATIENCE = 200 /* pauses: 10 milliseconds and more */ };
static constexpr size_t PIECE = 1 << 16;

struct Shared {
    std::atomic<int> here, gone;  /* ranks that have mapped it, and that are done with it */
    std::atomic<int> pids[MOST];
    std::atomic<unsigned> arrived, round;
    alignas(64) char pieces[MOST][PIECE];
};

struct Twin {
    Shared *shared;
    int rank, size;
    std::atomic<int> error;
    std::atomic<bool> aborted, finalized, closing;
    std::atomic<cudaStream_t> used; /* the stream that it was given last */
    std::atomic<bool> queued;       /* something, since `progress` looked last */
    std::thread progress;
    std::atomic<int> inside;        /* calls under way */
};
/* Two threads in calls on one communicator: NCCL promises nothing then, and one that does not block frees what the other reads (2.28, group.cc). */
struct Inside {
    Twin *t;
    explicit Inside(Twin *twin) : t(twin) {
        if (t->inside++) fprintf(stderr, "the emulator's NCCL: two threads call it at once on one communicator\n"), abort();
    }
    ~Inside() { t->inside--; }
};

static void pause() {
    struct timespec nap = {0, 50000};
    nanosleep(&nap, nullptr);
}

static bool everyone_lives(Twin *t) {
    for (int r = 0; r < t->size; r++)
        if (r != t->rank && kill(t->shared->pids[r], 0) && errno == ESRCH) return false;
    return true;
}

/* A device goes on by itself, whatever its host waits for; where ranks wait for each other on their hosts and in their streams, that matters. But first
 * its host gets the time to come and wait itself, so that the wait is part of what it times. */
static void go_on(Twin *t) {
    for (int idle = 0; !t->closing; pause()) {
        idle = t->queued.exchange(false) ? 0 : idle + 1;
        if (idle < PATIENCE) continue;
        if (cudaStream_t stream = t->used.exchange(nullptr)) cudaStreamSynchronize(stream);
    }
}

static int queue(Twin *t, void *stream, std::function<void()> work) {
    const Inside inside(t);
    enqueue((cudaStream_t)stream, [=]() {
        auto begin = std::chrono::steady_clock::now();
        work();
        device_time_passes(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    });
    t->used = (cudaStream_t)stream, t->queued = true;
    return NCCL_OK;
}

/* False: it will never be. */
static bool barrier(Twin *t) {
    Shared *s = t->shared;
    unsigned round = s->round;
    if (s->arrived.fetch_add(1) + 1 == (unsigned)t->size) {
        s->arrived = 0;
        s->round++;
        return true;
    }
    for (int i = 0; s->round == round; i++) {
        if (t->aborted || t->error != NCCL_OK) return false;
        if (i % 200 == 199 && !everyone_lives(t)) return t->error = NCCL_REMOTE, false;
        pause();
    }
    return true;
}

template <class T> static void sum_pieces(Twin *t, T *to, size_t offset, size_t n) { /* from byte `offset` of each rank's piece */
    for (size_t i = 0; i < n; i++) {
        T sum = (T)-0.0;
        for (int r = 0; r < t->size; r++) sum += ((const T *)(t->shared->pieces[r] + offset))[i];
        to[i] = sum;
    }
}

template <class T> static void reduce(Twin *t, const char *from, char *to, size_t begin, size_t end, size_t bytes) { /* to: bytes [begin, end) of the sum of all */
    for (size_t at = 0; at < bytes; at += PIECE) {
        size_t n = min(bytes - at, PIECE);
        memcpy(t->shared->pieces[t->rank], from + at, n);
        if (!barrier(t)) return;
        size_t first = begin > at ? begin : at, last = end < at + n ? end : at + n;
        if (first < last) sum_pieces(t, (T *)(to + (first - begin)), first - at, (last - first) / sizeof(T));
        if (!barrier(t)) return;
    }
}

static void gather(Twin *t, const char *from, char *to, size_t part) {
    for (size_t at = 0; at < part; at += PIECE) {
        size_t n = min(part - at, PIECE);
        memcpy(t->shared->pieces[t->rank], from + at, n);
        if (!barrier(t)) return;
        for (int r = 0; r < t->size; r++) memcpy(to + (size_t)r * part + at, t->shared->pieces[r], n);
        if (!barrier(t)) return;
    }
}

static int reduce_scatter(const void *from, void *to, size_t n, int type, int sum, void *comm, void *stream) {
    Twin *t = (Twin *)comm;
    size_t part = n * 4, all = part * (size_t)t->size;
    if (type != NCCL_FLOAT32 || sum != NCCL_SUM || !is_device(from, all) || !is_device(to, part)) return 4;
    queue(t, stream, [=]() { reduce<float>(t, (const char *)from, (char *)to, part * (size_t)t->rank, part * (size_t)(t->rank + 1), all); });
    return NCCL_IN_PROGRESS; /* queued, and async_error says so at once */
}

static int all_reduce(const void *from, void *to, size_t n, int type, int sum, void *comm, void *stream) {
    Twin *t = (Twin *)comm;
    if (type != NCCL_FLOAT64 || sum != NCCL_SUM || !is_device(from, n * 8) || !is_device(to, n * 8)) return 4;
    return queue(t, stream, [=]() { reduce<double>(t, (const char *)from, (char *)to, 0, n * 8, n * 8); });
}

static int all_gather(const void *from, void *to, size_t n, int type, void *comm, void *stream) {
    Twin *t = (Twin *)comm;
    if (type != NCCL_UINT8 || !is_device(from, n) || !is_device(to, n * (size_t)t->size)) return 4;
    return queue(t, stream, [=]() { gather(t, (const char *)from, (char *)to, n); });
}

/* Sends and receives of a group. Only what the engine has: each rank exchanges as much with each other one, with the same calls on all. */
struct Exchange { Twin *t; cudaStream_t stream; size_t bytes; const char *from[MOST]; char *to[MOST]; };
static thread_local Exchange group;

static void exchange(const Exchange &x) {
    Twin *t = x.t;
    size_t slot = PIECE / (size_t)t->size;
    for (size_t at = 0; at < x.bytes; at += slot) {
        size_t n = min(x.bytes - at, slot);
        for (int r = 0; r < t->size; r++)
            if (r != t->rank) memcpy(t->shared->pieces[t->rank] + (size_t)r * slot, x.from[r] + at, n);
        if (!barrier(t)) return;
        for (int r = 0; r < t->size; r++)
            if (r != t->rank) memcpy(x.to[r] + at, t->shared->pieces[r] + (size_t)t->rank * slot, n);
        if (!barrier(t)) return;
    }
}

static int group_start() { return group = Exchange{}, NCCL_OK; }

static bool joins(const void *p, size_t n, int type, int peer, Twin *t, void *stream) {
    bool first = !group.t;
    if (first) group.t = t, group.stream = (cudaStream_t)stream, group.bytes = n * 2;
    return type == NCCL_BF16 && peer >= 0 && peer < t->size && peer != t->rank && group.t == t && group.stream == stream && group.bytes == n * 2 && is_device(p, n * 2);
}
static int send(const void *from, size_t n, int type, int to, void *comm, void *stream) {
    if (!joins(from, n, type, to, (Twin *)comm, stream) || group.from[to]) return 4;
    return group.from[to] = (const char *)from, NCCL_OK;
}
static int receive(void *to, size_t n, int type, int from, void *comm, void *stream) {
    if (!joins(to, n, type, from, (Twin *)comm, stream) || group.to[from]) return 4;
    return group.to[from] = (char *)to, NCCL_OK;
}

static int group_end() {
    Twin *t = group.t;
    if (!t) return NCCL_OK;
    for (int r = 0; r < t->size; r++)
        if (r != t->rank && (!group.from[r] || !group.to[r])) return 4;
    Exchange x = group;
    queue(t, x.stream, [=]() { exchange(x); });
    return NCCL_IN_PROGRESS; /* as reduce_scatter */
}

static int get_version(int *version) { return *version = NCCL_VERSION_LEAST, NCCL_OK; }

static int get_unique_id(NcclId *id) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    snprintf(id->bytes, sizeof id->bytes, "/llmc_nccl_twin.%d.%lld.%ld", (int)getpid(), (long long)now.tv_sec, now.tv_nsec);
    int fd = shm_open(id->bytes, O_RDWR | O_CREAT | O_EXCL, 0600);
    if (fd < 0 || ftruncate(fd, sizeof(Shared))) return 2;
    close(fd);
    return NCCL_OK;
}

static int comm_init(void **comm, int size, NcclId id, int rank, NcclConfig *config) {
    if (config->magic != NCCL_CONFIG_MAGIC || config->blocking || size > MOST) return 4;
    int fd = shm_open(id.bytes, O_RDWR, 0);
    if (fd < 0) return 2;
    void *p = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (p == MAP_FAILED) return 2;
    Twin *t = new Twin{};
    t->shared = (Shared *)p, t->rank = rank, t->size = size;
    t->shared->pids[rank] = getpid();
    if (t->shared->here.fetch_add(1) + 1 == size) shm_unlink(id.bytes);
    t->progress = std::thread(go_on, t);
    *comm = t;
    return NCCL_IN_PROGRESS;
}

static int async_error(void *comm, int *error) {
    Twin *t = (Twin *)comm;
    const Inside inside(t);
    *error = t->error != NCCL_OK ? (int)t->error : t->shared->here < t->size || (t->finalized && t->shared->gone < t->size) ? NCCL_IN_PROGRESS : NCCL_OK;
    return NCCL_OK;
}

static int finalize(void *comm) {
    Twin *t = (Twin *)comm;
    cudaDeviceSynchronize();
    t->finalized = true;
    t->shared->gone++;
    return NCCL_IN_PROGRESS;
}

static int destroy(void *comm) {
    Twin *t = (Twin *)comm;
    t->closing = true;
    t->progress.join();
    munmap(t->shared, sizeof *t->shared);
    delete t;
    return NCCL_OK;
}

static int abort_comm(void *comm) { return ((Twin *)comm)->aborted = true, NCCL_OK; }
static const char *error_text(int error) { return error == NCCL_REMOTE ? "remote process exited or there was a network error" : error == 4 ? "invalid argument" : "unhandled system error"; }
static const char *last_error(void *) { return "of the emulator's twin"; }

} /* namespace emu */

extern "C" {
extern const NcclApi nccl_twin;
const NcclApi nccl_twin = {emu::get_version, emu::get_unique_id, emu::comm_init, emu::async_error, emu::reduce_scatter, emu::all_gather, emu::all_reduce,
                           emu::group_start, emu::group_end, emu::send, emu::receive, emu::finalize, emu::destroy, emu::abort_comm, emu::error_text, emu::last_error};
}
