/* The communicator over a mesh of sockets. One thread takes operations from a queue, in order; each is one exchange with all peers at once, by
 * poll and calls that never block, so that no two ranks can wait for each other's socket buffers. In every operation every two ranks tell each
 * other a header (which operation, how much, what the rank is doing), then the payload, if there is one in that direction.
 * It does not encrypt, compress, or know any topology: bytes sent by a rank are (size - 1) / size of the data, which is the least there is. */
#include "tcp.h"
#include "../base/timer.h"
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

enum {
    CHUNK = 256 << 10,          /* bytes on the wire: what is summed, rounded or sent in one go */
    RING = 2 * CHUNK,           /* what may have come of a peer's piece and is not summed yet */
    BLOCK = 2048,               /* floats of a sum that stays in the first cache while it goes through the ranks */
    TICK = 100                  /* milliseconds after which an idle exchange looks at its limit */
};

typedef enum { REDUCE_SCATTER, REDUCE_SCATTER_BF16, ALL_GATHER, ALL_REDUCE, BROADCAST, ASK, CALL, KINDS } Kind;
static const char *const kind_names[KINDS] = {"reduce_scatter", "reduce_scatter in bf16", "all_gather", "all_reduce", "broadcast", "a question who is missing", "call"};

typedef struct {
    uint64_t number, bytes;     /* 1 is the communicator's first operation; of the whole data, not of a part */
    int32_t kind, root;
    int64_t step;               /* -1: none */
    char phase[48];
} Header;
_Static_assert(sizeof(Header) == 80, "no padding goes over the wire");

typedef struct {
    int socket;                 /* -1: this rank itself */
    Header in, heard;           /* of this operation, as far as it has come; the last whole one */
    const char *from;           /* payload to send, and where to put what comes (NULL: the ring) */
    char *to;
    size_t send_bytes, receive_bytes; /* of payload */
    size_t sent, received;      /* so far, header included */
    void *ring;                 /* (RING bytes) byte b of the piece at b % RING */
    uint16_t *rounded;          /* (CHUNK bytes) the chunk in bf16 that is being sent */
    size_t rounded_bytes;       /* payload that has been rounded, this chunk included */
} Peer;

typedef struct Operation Operation;
struct Operation {
    Operation *next;
    Kind kind;
    void *data;
    size_t bytes;
    int root;
    CommTicket ticket;
    void (*fn)(void *);         /* CALL: with data */
    const char *text;           /* ASK: of the caller, in whose vain this is; limit: in place of the phase's */
    double limit;
};

typedef struct {
    Comm comm;
    Peer *peers;                /* (size) */
    struct pollfd *polled;      /* (size) */
    pthread_t thread;
    pthread_mutex_t lock;       /* of this paragraph */
    pthread_cond_t queued, finished;
    Operation *first, *last;
    CommTicket given, done;     /* the newest ticket; all up to this one are done */
    bool closing;
    char phase[sizeof((Header *)0)->phase];
    int64_t step;
    double limit;
    uint64_t phases;            /* calls of phase so far */
    /* The thread's own: the operation that runs. */
    const Operation *now;
    Header header;
    size_t summed;              /* bytes of the wire's type of this rank's part */
    double idle, looked;        /* seconds without a byte; when that was last counted */
    uint64_t phases_seen;
} Tcp;

static size_t least(size_t a, size_t b) { return a < b ? a : b; }

/* ---- the end, when it cannot go on ------------------------------------------------------------------------------------ */

/* Appends to text (bytes), cut at its end. */
__attribute__((format(printf, 3, 4))) static void append(char *text, size_t bytes, const char *format, ...) {
    size_t used = strlen(text);
    va_list args;
    va_start(args, format);
    vsnprintf(text + used, bytes - used, format, args);
    va_end(args);
}

/* "all_gather (operation 12) of 4096 bytes during training, step 40" */
static void append_place(char *text, size_t bytes, const Header *h, bool with_bytes) {
    const char *name = h->kind >= 0 && h->kind < KINDS ? kind_names[h->kind] : "something unknown";
    append(text, bytes, "%s (operation %llu)", name, (unsigned long long)h->number);
    if (with_bytes) append(text, bytes, " of %llu bytes", (unsigned long long)h->bytes);
    if (with_bytes && h->kind == BROADCAST) append(text, bytes, " from rank %d", (int)h->root);
    append(text, bytes, " during %.*s", (int)sizeof h->phase, h->phase);
    if (h->step >= 0) append(text, bytes, ", step %lld", (long long)h->step);
}

/* What this rank is doing now, which may be past the phase in which the operation began. */
static Header place_now(Tcp *t) {
    Header h = t->header;
    pthread_mutex_lock(&t->lock);
    memcpy(h.phase, t->phase, sizeof h.phase);
    h.step = t->step;
    pthread_mutex_unlock(&t->lock);
    return h;
}

/* One line, whole even when all ranks write theirs. The other ranks, which are about to notice the same, get `patience` seconds to do so before
 * they would notice that this one is gone instead. */
__attribute__((noreturn)) static void end(const Tcp *t, int code, const char *text, double patience) {
    char line[3000] = "";
    append(line, sizeof line - 1, "error: rank %d: %s", t->comm.rank, text);
    size_t n = strlen(line);
    line[n++] = '\n';
    for (size_t at = 0; at < n;) {
        ssize_t k = write(STDERR_FILENO, line + at, n - at);
        if (k <= 0 && errno != EINTR) break;
        at += k > 0 ? (size_t)k : 0;
    }
    if (!ftrylockfile(stdout)) { /* whoever holds it may be stuck in a full pipe */
        fflush(stdout);
        funlockfile(stdout);
    }
    usleep((useconds_t)(patience * 1e6));
    _exit(code);
}

/* Names every rank whose end of the connection is closed, for others that noticed first may have ended already. */
__attribute__((noreturn)) static void peer_gone(Tcp *t, const Peer *p, int error) {
    char text[2000] = "", ranks[1000] = "";
    int size = t->comm.size, gone = 0;
    for (int r = 0; r < size; r++) t->polled[r] = (struct pollfd){.fd = t->peers[r].socket, .events = POLLRDHUP};
    poll(t->polled, (nfds_t)size, 0);
    for (int r = 0; r < size; r++)
        if (t->polled[r].revents || &t->peers[r] == p) append(ranks, sizeof ranks, "%s%d", gone++ ? ", " : "", r);
    append(text, sizeof text, gone > 1 ? "ranks %s are gone; I waited for them in " : "rank %s is gone; I waited for it in ", ranks);
    Header here = place_now(t);
    append_place(text, sizeof text, &here, false);
    if (error && error != EPIPE && error != ECONNRESET) append(text, sizeof text, ": %s", strerror(error));
    end(t, EXIT_PEER, text, 0.2);
}

static bool wants_to_receive(const Tcp *t, const Peer *p) {
    if (p->socket < 0 || p->received == sizeof(Header) + p->receive_bytes) return false;
    return p->to || p->received < sizeof(Header) + t->summed + RING;
}
static bool wants_to_send(const Peer *p) { return p->socket >= 0 && p->sent < sizeof(Header) + p->send_bytes; }

/* Those from whom something is missing; if there are none, those who do not take what they get. */
__attribute__((noreturn)) static void hang(Tcp *t, double limit) {
    char text[2500] = "";
    int size = t->comm.size, missing = 0, named = 0;
    for (int r = 0; r < size; r++) missing += wants_to_receive(t, &t->peers[r]);
    bool ask = t->now->kind == ASK;
    if (ask) append(text, sizeof text, "%s", t->now->text);
    else {
        append(text, sizeof text, "no progress for %.3g seconds in ", limit);
        Header here = place_now(t);
        append_place(text, sizeof text, &here, false);
    }
    for (int r = 0; r < size; r++) {
        const Peer *p = &t->peers[r];
        if (!(missing ? wants_to_receive(t, p) : wants_to_send(p)) || ++named > 8) continue;
        append(text, sizeof text, "%s rank %d, ", named > 1 ? ";" : ask ? "; asked who is missing, this is silent:" : missing ? "; I wait for" : "; not taking what I send:", r);
        if (!p->heard.number) append(text, sizeof text, "not heard of so far");
        else append(text, sizeof text, "last heard of in "), append_place(text, sizeof text, &p->heard, false);
    }
    if (named > 8) append(text, sizeof text, "; and %d more", named - 8);
    end(t, EXIT_HANG, text, limit < 10 ? limit / 2 : 5);
}

static void check_header(Tcp *t, Peer *p) {
    const Header *mine = &t->header, *theirs = &p->in;
    p->heard = *theirs;
    if (theirs->number == mine->number && theirs->kind == mine->kind && theirs->bytes == mine->bytes && theirs->root == mine->root) return;
    for (int r = 0; r < t->comm.size; r++) /* so that they find out too */
        if (r != t->comm.rank && t->peers[r].sent < sizeof *mine)
            send(t->peers[r].socket, (const char *)mine + t->peers[r].sent, sizeof *mine - t->peers[r].sent, MSG_NOSIGNAL | MSG_DONTWAIT);
    char text[1000] = "";
    int rank = (int)(p - t->peers);
    if (mine->kind == ASK) append(text, sizeof text, "%s; rank %d is elsewhere, in ", t->now->text, rank);
    else append(text, sizeof text, "I am in ");
    append_place(text, sizeof text, mine->kind == ASK ? theirs : mine, true);
    if (theirs->kind == ASK) append(text, sizeof text, ", but rank %d waits for me between devices", rank);
    else if (mine->kind != ASK) append(text, sizeof text, ", but rank %d is in ", rank), append_place(text, sizeof text, theirs, true);
    append(text, sizeof text, ": all ranks must call the same operations in the same order");
    end(t, EXIT_HANG, text, 0.2);
}

/* After each look at the sockets. Time in which this process did not run (stopped, with the whole job, by a scheduler) is nobody's fault: at most two
 * ticks count at a time. */
static void watch(Tcp *t, bool moved) {
    pthread_mutex_lock(&t->lock);
    double limit = t->now->kind == ASK ? t->now->limit : t->limit;
    bool new_phase = t->now->kind != ASK && t->phases != t->phases_seen;
    t->phases_seen = t->phases;
    pthread_mutex_unlock(&t->lock);
    double now = seconds_now(), passed = now - t->looked;
    t->looked = now;
    t->idle = moved || new_phase ? 0 : t->idle + (passed < 2e-3 * TICK ? passed : 2e-3 * TICK);
    if (t->idle > limit) hang(t, limit);
}

/* ---- rounding and sums -------------------------------------------------------------------------------------------------- */

static float bf16_widen(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* To nearest, ties to even; too large becomes infinity; NaN stays NaN, made quiet, for cut off it could become infinity. */
static uint16_t bf16_round(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16, nan = bits >> 16 | 0x40;
    return (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? nan : rounded);
}

static void add_float(float *restrict sum, const float *restrict x, size_t n) { for (size_t i = 0; i < n; i++) sum[i] += x[i]; }
static void add_bf16(float *restrict sum, const uint16_t *restrict x, size_t n) { for (size_t i = 0; i < n; i++) sum[i] += bf16_widen(x[i]); }
static void add_rounded(float *restrict sum, const float *restrict x, size_t n) {
    for (size_t i = 0; i < n; i++) sum[i] += bf16_widen(bf16_round(x[i]));
}

/* Elements first to first + n of this rank's part = the sum over ranks 0, 1, ... Starting from -0 keeps all bits of what rank 0 adds. */
static void sum_chunk(const Tcp *t, size_t first, size_t n) {
    bool bf16 = t->now->kind == REDUCE_SCATTER_BF16;
    size_t element = bf16 ? 2 : 4, size = (size_t)t->comm.size, rank = (size_t)t->comm.rank, at = first * element % RING;
    float *own = (float *)t->now->data + t->now->bytes / 4 / size * rank + first, sum[BLOCK];
    for (size_t i = 0; i < n; i += BLOCK) {
        size_t m = least(BLOCK, n - i);
        for (size_t k = 0; k < m; k++) sum[k] = -0.0f;
        for (size_t r = 0; r < size; r++) {
            const void *ring = r == rank ? NULL : (const char *)t->peers[r].ring + at + i * element;
            if (r == rank && bf16) add_rounded(sum, own + i, m);
            else if (r == rank) add_float(sum, own + i, m);
            else if (bf16) add_bf16(sum, ring, m);
            else add_float(sum, ring, m);
        }
        memcpy(own + i, sum, m * sizeof *sum);
    }
}

/* The chunks that have come from all. */
static void sum_ready(Tcp *t) {
    size_t element = t->now->kind == REDUCE_SCATTER_BF16 ? 2 : 4, total = t->now->bytes / 4 / (size_t)t->comm.size * element, have = total;
    for (int r = 0; r < t->comm.size; r++)
        if (r != t->comm.rank) have = least(have, t->peers[r].received < sizeof(Header) ? 0 : t->peers[r].received - sizeof(Header));
    for (size_t n; t->summed < total && have >= t->summed + (n = least(CHUNK, total - t->summed)); t->summed += n)
        sum_chunk(t, t->summed / element, n / element);
}

static void sum_doubles(const Tcp *t, const double *theirs) { /* (size, n), of which row rank is not there */
    double *data = t->now->data;
    size_t n = t->now->bytes / sizeof *data;
    for (size_t i = 0; i < n; i++) {
        double sum = -0.0;
        for (int r = 0; r < t->comm.size; r++) sum += r == t->comm.rank ? data[i] : theirs[(size_t)r * n + i];
        data[i] = sum;
    }
}

/* ---- one exchange ------------------------------------------------------------------------------------------------------- */

/* Both: what the socket takes or has, at most a chunk. Whether there was anything. */
static bool send_some(Tcp *t, Peer *p) {
    struct iovec pieces[2];
    struct msghdr message = {.msg_iov = pieces};
    size_t at = 0, end_of_ready = p->send_bytes;
    if (p->sent < sizeof(Header)) pieces[message.msg_iovlen++] = (struct iovec){(char *)&t->header + p->sent, sizeof(Header) - p->sent};
    else at = p->sent - sizeof(Header);
    const char *from = p->from + at;
    if (t->now->kind == REDUCE_SCATTER_BF16) {
        if (at == p->rounded_bytes) {
            const float *x = (const float *)(const void *)p->from + at / 2;
            size_t n = least(CHUNK, p->send_bytes - at) / 2;
            for (size_t i = 0; i < n; i++) p->rounded[i] = bf16_round(x[i]);
            p->rounded_bytes += 2 * n;
        }
        from = (const char *)p->rounded + at % CHUNK;
        end_of_ready = p->rounded_bytes;
    }
    if (end_of_ready > at) pieces[message.msg_iovlen++] = (struct iovec){(char *)(uintptr_t)from, least(CHUNK, end_of_ready - at)};
    ssize_t n = sendmsg(p->socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) peer_gone(t, p, errno);
    p->sent += n > 0 ? (size_t)n : 0;
    return n > 0;
}

static bool receive_some(Tcp *t, Peer *p) {
    struct iovec pieces[2];
    struct msghdr message = {.msg_iov = pieces};
    bool in_header = p->received < sizeof(Header);
    if (in_header) pieces[message.msg_iovlen++] = (struct iovec){(char *)&p->in + p->received, sizeof(Header) - p->received};
    size_t at = in_header ? 0 : p->received - sizeof(Header), bytes = least(CHUNK, p->receive_bytes - at);
    if (!p->to) bytes = least(bytes, least(RING - at % RING, t->summed + RING - at));
    if (bytes) pieces[message.msg_iovlen++] = (struct iovec){p->to ? p->to + at : (char *)p->ring + at % RING, bytes};
    ssize_t n = recvmsg(p->socket, &message, MSG_DONTWAIT);
    if (n == 0) peer_gone(t, p, 0);
    if (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) peer_gone(t, p, errno);
    p->received += n > 0 ? (size_t)n : 0;
    if (in_header && p->received >= sizeof(Header)) check_header(t, p);
    return n > 0;
}

static void exchange(Tcp *t) {
    int size = t->comm.size;
    bool sums = t->now->kind == REDUCE_SCATTER || t->now->kind == REDUCE_SCATTER_BF16;
    t->idle = 0;
    t->looked = seconds_now();
    for (;;) {
        int open = 0;
        for (int r = 0; r < size; r++) {
            Peer *p = &t->peers[r];
            short events = (short)((wants_to_receive(t, p) ? POLLIN : 0) | (wants_to_send(p) ? POLLOUT : 0));
            t->polled[r] = (struct pollfd){.fd = events ? p->socket : -1, .events = events};
            open += events != 0;
        }
        if (!open) return;
        int ready = poll(t->polled, (nfds_t)size, TICK);
        CHECK(ready >= 0 || errno == EINTR, "poll of %d sockets: %s", size, strerror(errno));
        bool moved = false;
        for (int r = 0; r < size && ready > 0; r++) { /* first what has come: it may say why a peer is about to go */
            short got = t->polled[r].revents, wanted = t->polled[r].events;
            if ((wanted & POLLIN) && (got & ~POLLOUT)) moved |= receive_some(t, &t->peers[r]);
            if ((wanted & POLLOUT) && (got & ~POLLIN)) moved |= send_some(t, &t->peers[r]);
        }
        if (sums) sum_ready(t);
        watch(t, moved);
    }
}

/* What goes to and comes from rank r in this operation. A part is bytes / size. */
static void set_payload(const Tcp *t, int r, double *theirs) {
    const Operation *o = t->now;
    Peer *p = &t->peers[r];
    size_t part = o->bytes / (size_t)t->comm.size;
    char *data = o->data;
    p->sent = p->received = p->send_bytes = p->receive_bytes = p->rounded_bytes = 0;
    p->from = p->to = NULL;
    switch (o->kind) {
    case REDUCE_SCATTER:
    case REDUCE_SCATTER_BF16:
        p->from = data + (size_t)r * part;
        p->send_bytes = p->receive_bytes = o->kind == REDUCE_SCATTER ? part : part / 2;
        if (!p->ring) p->ring = xmalloc(RING);
        if (!p->rounded && o->kind == REDUCE_SCATTER_BF16) p->rounded = xmalloc(CHUNK);
        break;
    case ALL_GATHER:
    case ASK:
        p->from = data + (size_t)t->comm.rank * part;
        p->to = data + (size_t)r * part;
        p->send_bytes = p->receive_bytes = part;
        break;
    case ALL_REDUCE:
        p->from = data;
        p->to = (char *)theirs + (size_t)r * o->bytes;
        p->send_bytes = p->receive_bytes = o->bytes;
        break;
    case BROADCAST:
        p->from = p->to = data;
        if (o->root == t->comm.rank) p->send_bytes = o->bytes;
        if (o->root == r) p->receive_bytes = o->bytes;
        break;
    case CALL: case KINDS: break;
    }
}

static void run(Tcp *t, const Operation *o) {
    if (o->kind == CALL) return o->fn(o->data);
    if (t->comm.size == 1) return;
    double *theirs = o->kind == ALL_REDUCE ? xmalloc((size_t)t->comm.size * o->bytes) : NULL;
    t->now = o;
    t->summed = 0;
    t->header = (Header){.number = o->ticket, .bytes = o->bytes, .kind = (int32_t)o->kind, .root = o->root};
    t->header = place_now(t);
    for (int r = 0; r < t->comm.size; r++)
        if (r != t->comm.rank) set_payload(t, r, theirs);
    exchange(t);
    if (theirs) sum_doubles(t, theirs);
    free(theirs);
}

/* ---- the queue ---------------------------------------------------------------------------------------------------------- */

static void *communicate(void *arg) {
    Tcp *t = arg;
    pthread_mutex_lock(&t->lock);
    for (;;) {
        while (!t->first && !t->closing) pthread_cond_wait(&t->queued, &t->lock);
        Operation *o = t->first;
        if (!o) break;
        t->first = o->next;
        pthread_mutex_unlock(&t->lock);
        run(t, o);
        pthread_mutex_lock(&t->lock);
        t->done = o->ticket;
        pthread_cond_broadcast(&t->finished);
        free(o);
    }
    pthread_mutex_unlock(&t->lock);
    return NULL;
}

static CommTicket enqueue_operation(Comm *c, Operation operation) {
    Tcp *t = (Tcp *)c;
    Operation *o = xmalloc(sizeof *o);
    pthread_mutex_lock(&t->lock);
    CommTicket ticket = ++t->given;
    *o = operation;
    o->ticket = ticket;
    if (t->first) t->last->next = o;
    else t->first = o;
    t->last = o;
    pthread_cond_signal(&t->queued);
    pthread_mutex_unlock(&t->lock);
    return ticket;
}

static CommTicket enqueue(Comm *c, Kind kind, void *data, size_t bytes, int root) {
    return enqueue_operation(c, (Operation){.kind = kind, .data = bytes ? data : c /* any address: nothing is there */, .bytes = bytes, .root = root});
}

static CommTicket tcp_call(Comm *c, void (*fn)(void *), void *arg) { return enqueue_operation(c, (Operation){.kind = CALL, .data = arg, .fn = fn}); }

static CommTicket tcp_reduce_scatter(Comm *c, float *data, size_t n, Wire wire) {
    CHECK(n % (size_t)c->size == 0, "%zu elements in %d parts", n, c->size);
    return enqueue(c, wire == WIRE_BF16 ? REDUCE_SCATTER_BF16 : REDUCE_SCATTER, data, n * sizeof *data, 0);
}

static CommTicket tcp_all_gather(Comm *c, void *data, size_t bytes) {
    CHECK(bytes % (size_t)c->size == 0, "%zu bytes in %d parts", bytes, c->size);
    return enqueue(c, ALL_GATHER, data, bytes, 0);
}

static CommTicket tcp_ask(Comm *c, void *data, size_t bytes, const char *text, double limit) {
    CHECK(bytes % (size_t)c->size == 0, "%zu bytes in %d parts", bytes, c->size);
    return enqueue_operation(c, (Operation){.kind = ASK, .data = data, .bytes = bytes, .text = text, .limit = limit});
}

/* The header of an operation that this rank has not begun lies whole in a socket. */
static bool tcp_asked(Comm *c) {
    Tcp *t = (Tcp *)c;
    bool asked = false;
    pthread_mutex_lock(&t->lock); /* so that the thread begins nothing meanwhile */
    for (int r = 0; r < c->size && t->done == t->given && !asked; r++) {
        Header h;
        asked = r != c->rank && recv(t->peers[r].socket, &h, sizeof h, MSG_PEEK | MSG_DONTWAIT) == (ssize_t)sizeof h && h.kind == ASK;
    }
    pthread_mutex_unlock(&t->lock);
    return asked;
}

static CommTicket tcp_all_reduce(Comm *c, double *data, size_t n) { return enqueue(c, ALL_REDUCE, data, n * sizeof *data, 0); }

static CommTicket tcp_broadcast(Comm *c, void *data, size_t bytes, int root) {
    CHECK(root >= 0 && root < c->size, "rank %d of %d", root, c->size);
    return enqueue(c, BROADCAST, data, bytes, root);
}

static void tcp_wait(Comm *c, CommTicket ticket) {
    Tcp *t = (Tcp *)c;
    pthread_mutex_lock(&t->lock);
    CHECK(ticket <= t->given, "ticket %llu of %llu", (unsigned long long)ticket, (unsigned long long)t->given);
    double begin = t->done < ticket ? seconds_now() : 0;
    while (t->done < ticket) pthread_cond_wait(&t->finished, &t->lock);
    c->waited += begin > 0 ? seconds_now() - begin : 0;
    pthread_mutex_unlock(&t->lock);
}

static void tcp_phase(Comm *c, const char *text, int64_t step, double limit) {
    Tcp *t = (Tcp *)c;
    pthread_mutex_lock(&t->lock);
    memset(t->phase, 0, sizeof t->phase);
    memcpy(t->phase, text, strnlen(text, sizeof t->phase - 1));
    t->step = step;
    t->limit = limit;
    t->phases++;
    pthread_mutex_unlock(&t->lock);
}

static void tcp_destroy(Comm *c) {
    Tcp *t = (Tcp *)c;
    pthread_mutex_lock(&t->lock);
    t->closing = true;
    pthread_cond_signal(&t->queued);
    pthread_mutex_unlock(&t->lock);
    pthread_join(t->thread, NULL);
    for (int r = 0; r < c->size; r++) {
        if (t->peers[r].socket >= 0) close(t->peers[r].socket);
        free(t->peers[r].ring);
        free(t->peers[r].rounded);
    }
    pthread_cond_destroy(&t->queued);
    pthread_cond_destroy(&t->finished);
    pthread_mutex_destroy(&t->lock);
    free(t->peers);
    free(t->polled);
    free(t);
}

/* TCP sizes its buffers itself, up to the megabytes of tcp_rmem and tcp_wmem; a size set here would hold it below net.core.rmem_max, which is less.
 * Unix sockets do not. */
static void prepare_socket(int fd) {
    int on = 1, bytes = 4 << 20, domain = 0;
    socklen_t length = sizeof domain;
    getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &length);
    if (domain == AF_UNIX) setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
    else setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    fcntl(fd, F_SETFD, FD_CLOEXEC);
}

/* The process's signals are for its other threads. */
static void start_thread(Tcp *t) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&t->thread, NULL, communicate, t);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    CHECK(!error, "no thread for the communicator: %s", strerror(error));
}

Comm *tcp_comm_create(int rank, int size, int local_rank, int local_size, const int *sockets, double limit) {
    CHECK(size > 0 && rank >= 0 && rank < size, "rank %d of %d", rank, size);
    Tcp *t = xcalloc(1, sizeof *t);
    t->comm = (Comm){.name = "tcp", .rank = rank, .size = size, .local_rank = local_rank, .local_size = local_size, .reduce_scatter = tcp_reduce_scatter,
                     .all_gather = tcp_all_gather, .all_reduce = tcp_all_reduce, .broadcast = tcp_broadcast, .call = tcp_call, .ask = tcp_ask, .asked = tcp_asked,
                     .wait = tcp_wait, .phase = tcp_phase, .destroy = tcp_destroy};
    t->peers = xcalloc((size_t)size, sizeof *t->peers);
    t->polled = xcalloc((size_t)size, sizeof *t->polled);
    for (int r = 0; r < size; r++) {
        t->peers[r].socket = r == rank ? -1 : sockets[r];
        if (r != rank) prepare_socket(sockets[r]);
    }
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->queued, NULL);
    pthread_cond_init(&t->finished, NULL);
    tcp_phase(&t->comm, "start-up", -1, limit);
    start_thread(t);
    return &t->comm;
}
