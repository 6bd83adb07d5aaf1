/* The rendezvous. Every rank comes to rank 0 and says who it is (Hello, proof); rank 0 checks, and answers all with the addresses of all, or with the
 * one problem that all print; each connects to the lower ranks, tells rank 0 that it is done, and leaves when rank 0 says that all are.
 * What goes wrong early is answered a little later, so that ranks that are about to come hear of it too. */
#include "mesh.h"
#include "../base/timer.h"
#include "door.h"
#include "find.h"
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

typedef enum { ANSWER_TABLE = 1, ANSWER_PROBLEM, ANSWER_DONE, ANSWER_GO } AnswerKind;
typedef struct { uint64_t magic; int32_t kind, code; uint64_t bytes; } Answer;
typedef struct { char address[ADDRESS_ROOM]; int32_t port; } Row;   /* where a rank listens, as rank 0 sees it */

typedef struct {
    const Launch *l;
    const char *proof;
    double limit, end, margin;         /* the end of all; how much earlier one stops waiting, so that the others hear of it in time */
    int *sockets;                      /* (size) */
    Door door;
} Mesh;

static void close_socket(int *fd) {
    if (*fd >= 0) close(*fd);
    *fd = -1;
}

static bool answer(int fd, AnswerKind kind, int code, const void *data, size_t bytes, double deadline) {
    Answer a = {DOOR_MAGIC, kind, code, bytes};
    return send_all(fd, &a, sizeof a, deadline) && send_all(fd, data, bytes, deadline);
}

/* The next answer's kind, 0 with errno where there is none. A problem's text goes into *e; other data, of exactly `bytes`, to data. */
static int listen_for(int fd, void *data, size_t bytes, double deadline, Error *e) {
    Answer a;
    Error found = {0};
    if (!recv_all(fd, &a, sizeof a, deadline)) return 0;
    bool problem = a.kind == ANSWER_PROBLEM;
    if (a.magic != DOOR_MAGIC || a.bytes != (problem ? sizeof found.text : a.kind == ANSWER_TABLE ? bytes : 0)) return errno = EPROTO, 0;
    if (!recv_all(fd, problem ? found.text : data, a.bytes, deadline)) return 0;
    if (!problem) return a.kind;
    found.text[sizeof found.text - 1] = 0;
    return fail(e, a.code, "%s", found.text), a.kind;
}

/* "1, 2, 5 and 12 more": the ranks without a socket. Returns how many. */
static int name_missing(const int *sockets, int from, int size, char *out, size_t room) {
    int n = 0, more = 0;
    size_t at = 0;
    *out = 0;
    for (int r = from; r < size; r++) {
        if (sockets[r] >= 0) continue;
        if (n++ < 16) at += (size_t)snprintf(out + at, room - at, "%s%d", n > 1 ? ", " : "", r);
        else more++;
    }
    if (more) snprintf(out + at, room - at, " and %d more", more);
    return n;
}

/* ---- the proof ---------------------------------------------------------------------------------------------------- */

/* A line "name = value" of a proof. */
typedef struct { const char *name, *value; int name_length, value_length; } Line;

static bool next_line(const char **at, Line *line) {
    while (**at == '\n') ++*at;
    if (!**at) return false;
    const char *end = *at + strcspn(*at, "\n"), *equals = memchr(*at, '=', (size_t)(end - *at)), *name_end = equals ? equals : end;
    *line = (Line){.name = *at, .value = equals ? equals + 1 : end};
    while (name_end > line->name && name_end[-1] == ' ') name_end--;
    while (line->value < end && *line->value == ' ') line->value++;
    line->name_length = (int)(name_end - line->name);
    line->value_length = (int)(end - line->value);
    *at = end;
    return true;
}

static bool find_line(const char *proof, const Line *like, Line *found) {
    while (next_line(&proof, found))
        if (found->name_length == like->name_length && !memcmp(found->name, like->name, (size_t)like->name_length)) return true;
    return false;
}

static bool fail_proof(Error *e, int rank, const Line *named, const Line *theirs, const Line *ours) {
    static const Line none = {.value = "(nothing)", .value_length = 9};
    if (!theirs) theirs = &none;
    if (!ours) ours = &none;
    int most = 500; /* of the beginning of each, so that both are seen */
    return fail(e, EXIT_USAGE, "the ranks do not do the same: %.*s is %.*s on rank %d, and %.*s on rank 0; start the same program with the same options everywhere",
                named->name_length < 200 ? named->name_length : 200, named->name, theirs->value_length < most ? theirs->value_length : most, theirs->value, rank,
                ours->value_length < most ? ours->value_length : most, ours->value);
}

bool same_proof(const char *ours, const char *theirs, int rank, Error *e) {
    Line a, b;
    for (const char *at = ours; next_line(&at, &a);) {
        bool there = find_line(theirs, &a, &b);
        if (!there || a.value_length != b.value_length || memcmp(a.value, b.value, (size_t)a.value_length)) return fail_proof(e, rank, &a, there ? &b : NULL, &a);
    }
    for (const char *at = theirs; next_line(&at, &b);)
        if (!find_line(ours, &b, &a)) return fail_proof(e, rank, &b, &b, NULL);
    return true;
}

/* ---- rank 0 ------------------------------------------------------------------------------------------------------- */

typedef struct {
    Mesh *m;
    double until;                      /* then all are answered */
    int *came;                         /* sockets of all who said hello, in order; -1: left */
    size_t n, room;
    bool *heard;                       /* (size) the rank has said hello, right or wrong */
    int to_come;                       /* that have not */
    Row *table;                        /* (size) */
    Error problem;                     /* the first; code 0: none */
} Host;

static void host_problem(Host *h, const Error *e) {
    if (h->problem.code) return;
    h->problem = *e;
    h->until = fmin(h->until, seconds_now() + 1);
}

static bool host_check(const Host *h, const Guest *g, Error *e) {
    const Hello *o = &g->hello;
    const Launch *l = h->m->l;
    if (o->version != DOOR_VERSION)
        return fail(e, EXIT_USAGE, "rank %d is of another build: its rendezvous has version %d, rank 0's %d; start the same program everywhere", o->rank, o->version, DOOR_VERSION);
    if (o->size != l->size)
        return fail(e, EXIT_USAGE, "rank %d was started as one of %d, rank 0 as one of %d (%s); start all ranks with the same number of ranks", o->rank, o->size, l->size, l->by_name);
    if (o->rank < 1 || o->rank >= l->size) return fail(e, EXIT_USAGE, "a rank %d came to a run of %d ranks, where 1 to %d were expected", o->rank, l->size, l->size - 1);
    if (h->m->sockets[o->rank] >= 0) {
        char first[ADDRESS_ROOM], second[ADDRESS_ROOM];
        address_of(h->m->sockets[o->rank], true, first), address_of(g->fd, true, second);
        return fail(e, EXIT_USAGE, "rank %d came twice: from %s and from %s; give each process a rank of its own, and each run a port of its own (%s)", o->rank, first, second, l->by_name);
    }
    return same_proof(h->m->proof, g->proof, o->rank, e);
}

static void host_take(Host *h, Guest *g) {
    Error e = {0};
    int rank = g->hello.rank;
    bool ok = host_check(h, g, &e);
    if (rank > 0 && rank < h->m->l->size && !h->heard[rank]) h->heard[rank] = true, h->to_come--;
    if (ok) {
        h->m->sockets[rank] = g->fd;
        h->table[rank].port = g->hello.port;
        address_of(g->fd, true, h->table[rank].address);
    } else host_problem(h, &e);
    if (g->hello.version == DOOR_VERSION) h->until = fmin(h->until, seconds_now() + 1e-3 * g->hello.left_ms - h->m->margin);
    free(g->proof);
    if (h->n == h->room) h->came = xrealloc(h->came, (h->room = 2 * h->room + 16) * sizeof *h->came);
    h->came[h->n++] = g->fd;
}

static void host_left(Host *h, int *fd) {
    for (int r = 1; r < h->m->l->size; r++) {
        if (h->m->sockets[r] != *fd) continue;
        Error e;
        fail(&e, EXIT_PEER, "rank %d ended while the ranks were meeting; what it printed says why", r);
        host_problem(h, &e);
        h->m->sockets[r] = -1;
    }
    close_socket(fd);
}

static void host_missing(Host *h) {
    const Launch *l = h->m->l;
    char ranks[200], strangers[80] = "";
    if (h->problem.code || !name_missing(h->m->sockets, 1, l->size, ranks, sizeof ranks)) return;
    if (h->m->door.strangers) snprintf(strangers, sizeof strangers, " (%d connections that were no ranks were ignored)", h->m->door.strangers);
    if (!*l->host && meeting_file_is_of_another(l->file, h->m->door.banner.nonce))
        fail(&h->problem, EXIT_USAGE, "rank 0 came twice: another one has written %s since; ranks that did not come here: %s; start the run once", l->file, ranks);
    else fail(&h->problem, EXIT_HANG, "of %d ranks (%s), these did not come to rank 0 within %g s: %s%s; see whether they were started, and whether they reach rank 0's machine",
              l->size, l->by_name, h->m->limit, ranks, strangers);
}

/* Until all are there, or h->until. */
static void host_collect(Host *h) {
    while (h->to_come) {
        Guest g;
        size_t which;
        DoorEvent event = door_wait(&h->m->door, h->came, h->n, h->until, &g, &which);
        if (event == DOOR_CAME) host_take(h, &g);
        else if (event == DOOR_WATCHED && which < h->n) host_left(h, &h->came[which]);
        else break;
    }
    host_missing(h);
}

/* Waits for the word of each rank that it is connected. */
static void host_confirm(Host *h) {
    int size = h->m->l->size;
    struct pollfd *p = xcalloc((size_t)size, sizeof *p);
    for (int r = 0; r < size; r++) p[r] = (struct pollfd){r ? h->m->sockets[r] : -1, POLLIN, 0};
    for (int left = size - 1; left && !h->problem.code;) {
        double wait = h->until - seconds_now();
        int n = poll(p, (nfds_t)size, (int)fmax(ceil(1e3 * fmin(wait, 1e6)), 0));
        for (int r = 1; r < size && n > 0; r++) {
            Error e = {0};
            if (p[r].fd < 0 || !p[r].revents) continue;
            if (!listen_for(p[r].fd, NULL, 0, h->until, &e)) fail(&e, EXIT_PEER, "rank %d ended while the ranks were connecting; what it printed says why", r);
            if (e.code) host_problem(h, &e);
            p[r].fd = -1;
            left--;
        }
        if (n <= 0 && wait <= 0) fail(&h->problem, EXIT_HANG, "%d of %d ranks did not connect to the others within %g s", left, size, h->m->limit);
    }
    free(p);
}

static void host_answer(Host *h, AnswerKind kind, const void *data, size_t bytes) {
    for (size_t i = 0; i < h->n; i++)
        if (h->came[i] >= 0) answer(h->came[i], kind, 0, data, bytes, h->m->end);
}

/* Closes when the other side has: a socket that is closed with something unread takes what was sent with it. */
static void host_part(int *fd, double until) {
    char unread;
    while (*fd >= 0 && recv_all(*fd, &unread, 1, until)) {}
    close_socket(fd);
}

static bool host_run(Host *h, Error *e) {
    host_collect(h);
    if (!h->problem.code) {
        host_answer(h, ANSWER_TABLE, h->table, (size_t)h->m->l->size * sizeof *h->table);
        host_confirm(h);
    }
    if (!h->problem.code) return host_answer(h, ANSWER_GO, NULL, 0), true;
    for (size_t i = 0; i < h->n; i++)
        if (h->came[i] >= 0) answer(h->came[i], ANSWER_PROBLEM, h->problem.code, h->problem.text, sizeof h->problem.text, h->m->end), shutdown(h->came[i], SHUT_WR);
    double until = fmin(h->m->end, seconds_now() + 0.5);
    for (size_t i = 0; i < h->n; i++) host_part(&h->came[i], until);
    for (int r = 0; r < h->m->l->size; r++) h->m->sockets[r] = -1;
    *e = h->problem;
    return false;
}

/* Where rank 0 listens. A port that was used a moment ago may be free a moment later. */
static int host_listen(const Mesh *m, int *port, Error *e) {
    const Launch *l = m->l;
    if (l->listener >= 0) return l->listener;
    const char *address = !*l->host ? NULL : !strcmp(l->host, "localhost") ? "127.0.0.1" : is_loopback(l->host) ? l->host : NULL;
    double until = seconds_now() + fmin(2, m->limit / 4);
    for (;;) {
        *port = l->port;
        int fd = listen_on(address, port);
        if (fd >= 0) return fd;
        if (errno != EADDRINUSE || seconds_now() >= until) break;
        poll(NULL, 0, 20);
    }
    if (errno == EADDRINUSE) fail(e, EXIT_USAGE, "rank 0 cannot listen on port %d (%s): it is in use, by another run, another rank 0 or another program; set MASTER_PORT to a free one", l->port, l->by_name);
    else fail(e, EXIT_USAGE, "rank 0 cannot listen on port %d (%s): %s; choose another one, or see ulimit -n", l->port, l->by_name, strerror(errno));
    return -1;
}

static bool rank0(Mesh *m, Error *e) {
    int port = 0, listener = host_listen(m, &port, e);
    if (listener < 0) return false;
    uint64_t nonce = 0;
    while (!nonce)
        if (getrandom(&nonce, sizeof nonce, 0) != sizeof nonce) nonce = (uint64_t)getpid() << 32 ^ (uint64_t)(1e9 * seconds_now());
    door_open(&m->door, listener, 0, nonce, m->l->size);
    bool by_file = !*m->l->host && m->l->listener < 0, ok = !by_file || meeting_file_write(m->l->file, port, nonce, e);
    if (ok) {
        size_t size = (size_t)m->l->size;
        Host h = {.m = m, .until = m->end - m->margin, .to_come = m->l->size - 1, .heard = xcalloc(size, sizeof *h.heard), .table = xcalloc(size, sizeof *h.table)};
        ok = host_run(&h, e);
        free(h.came);
        free(h.heard);
        free(h.table);
    }
    if (by_file) meeting_file_remove(m->l->file, nonce);
    door_close(&m->door);
    return ok;
}

/* ---- the others --------------------------------------------------------------------------------------------------- */

/* Why rank 0 has no answer for this one. */
static bool fail_silent(const Mesh *m, Error *e) {
    if (errno == ETIMEDOUT) return fail(e, EXIT_HANG, "rank 0 did not answer rank %d within %g s: it still waits for others, or is stuck", m->l->rank, m->limit);
    return fail(e, EXIT_PEER, "rank 0 ended while the ranks were meeting (rank %d: %s); what it printed says why", m->l->rank, strerror(errno));
}

static bool say_hello(Mesh *m, const Banner *b, int port, Error *e) {
    double left = fmax(m->end - seconds_now(), 0);
    Hello o = {DOOR_MAGIC, DOOR_VERSION, m->l->rank, b->nonce, m->l->size, port, (int32_t)strlen(m->proof), (uint32_t)fmin(1e3 * left, 4e9)};
    bool sent = send_all(m->sockets[0], &o, sizeof o, m->end) && send_all(m->sockets[0], m->proof, strlen(m->proof), m->end);
    if (b->version != DOOR_VERSION)
        return fail(e, EXIT_USAGE, "rank %d is of another build than rank 0: its rendezvous has version %d, rank 0's %d; start the same program everywhere", m->l->rank, DOOR_VERSION, b->version);
    return sent || fail_silent(m, e);
}

/* A rank that rank 0 sees on its own machine's inner address is for others where they see rank 0. */
static bool enter_lower(Mesh *m, const Row *table, int j, double soft, Error *e) {
    char host[ADDRESS_ROOM];
    address_of(m->sockets[0], true, host);
    const char *address = is_loopback(table[j].address) ? host : table[j].address, *why = "its address is not understood";
    Endpoint to;
    Banner b;
    int fd = endpoint_numeric(address, table[j].port, &to) ? door_enter(&to, j, m->door.banner.nonce, soft, &b, &why) : -1;
    Hello o = {DOOR_MAGIC, DOOR_VERSION, m->l->rank, m->door.banner.nonce, m->l->size, 0, 0, 0};
    m->sockets[j] = fd;
    if (fd >= 0 && send_all(fd, &o, sizeof o, soft)) return true;
    return fail(e, EXIT_USAGE, "rank %d cannot connect to rank %d at %s port %d: %s; the machines must reach each other on all ports above 1024", m->l->rank, j, address, table[j].port,
                fd < 0 ? why : strerror(errno));
}

/* true: all are there, or rank 0 has something to say. */
static bool let_higher_in(Mesh *m, double soft, Error *e) {
    char ranks[200];
    int size = m->l->size, *sockets = m->sockets;
    while (name_missing(sockets, m->l->rank + 1, size, ranks, sizeof ranks)) {
        Guest g;
        size_t which;
        DoorEvent event = door_wait(&m->door, &sockets[0], 1, soft, &g, &which);
        if (event == DOOR_WATCHED) return true;
        if (event == DOOR_LATE) return fail(e, EXIT_HANG, "these ranks did not connect to rank %d within %g s: %s", m->l->rank, m->limit, ranks);
        free(g.proof);
        int r = g.hello.version == DOOR_VERSION ? g.hello.rank : -1;
        if (r > m->l->rank && r < size && sockets[r] < 0) sockets[r] = g.fd;
        else close(g.fd);
    }
    return true;
}

/* With the table of all. Problems go to rank 0 and come back as the one that all print. */
static bool connect_all(Mesh *m, const Row *table, Error *e) {
    double soft = m->end - 2 * m->margin;
    bool ok = true;
    for (int j = 1; j < m->l->rank && ok; j++) ok = enter_lower(m, table, j, soft, e);
    ok = ok && let_higher_in(m, soft, e);
    char ranks[200];
    if (!ok) answer(m->sockets[0], ANSWER_PROBLEM, e->code, e->text, sizeof e->text, m->end);
    else if (!name_missing(m->sockets, m->l->rank + 1, m->l->size, ranks, sizeof ranks)) answer(m->sockets[0], ANSWER_DONE, 0, NULL, 0, m->end);
    int kind = listen_for(m->sockets[0], NULL, 0, m->end, e);
    return ok && kind != ANSWER_PROBLEM ? kind == ANSWER_GO || fail_silent(m, e) : false;
}

static bool other_rank(Mesh *m, Error *e) {
    Banner b;
    const Launch *l = m->l;
    m->sockets[0] = find_rank0(l, m->end - m->margin, m->limit, &b, e);
    if (m->sockets[0] < 0) return false;
    /* Where others reach this machine as rank 0 does: not on all addresses unless rank 0 is here and others may not be. */
    char self[ADDRESS_ROOM];
    address_of(m->sockets[0], false, self);
    int port = 0, listener = listen_on(is_loopback(self) && l->by != BY_OURSELVES ? NULL : self, &port);
    if (listener < 0) return fail(e, EXIT_USAGE, "rank %d cannot listen on %s: %s; see ulimit -n", l->rank, self, strerror(errno));
    door_open(&m->door, listener, l->rank, b.nonce, l->size);
    Row *table = xcalloc((size_t)l->size, sizeof *table);
    bool ok = say_hello(m, &b, port, e);
    if (ok) {
        int kind = listen_for(m->sockets[0], table, (size_t)l->size * sizeof *table, m->end, e);
        ok = kind == ANSWER_TABLE ? connect_all(m, table, e) : kind == ANSWER_PROBLEM ? false : fail_silent(m, e);
    }
    free(table);
    door_close(&m->door);
    return ok;
}

bool mesh_connect(const Launch *l, const char *proof, double limit, int *sockets, Error *e) {
    Mesh m = {.l = l, .proof = proof ? proof : "", .limit = limit, .end = seconds_now() + limit, .margin = fmin(0.5, limit / 10), .sockets = sockets};
    Error unheard;
    if (!e) e = &unheard;
    *e = (Error){0};
    CHECK(strlen(m.proof) <= PROOF_MOST, "a proof of %zu bytes", strlen(m.proof));
    for (int r = 0; r < l->size; r++) sockets[r] = -1;
    bool ok = l->rank == 0 ? rank0(&m, e) : other_rank(&m, e);
    for (int r = 0; r < l->size; r++) {
        if (!ok) close_socket(&sockets[r]);
        else if (sockets[r] >= 0) fcntl(sockets[r], F_SETFL, fcntl(sockets[r], F_GETFL) & ~O_NONBLOCK);
    }
    return ok;
}
