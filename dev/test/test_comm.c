/* The communicator: every operation against values computed plainly, to the bit; many at once; the conveniences; and P21, P22: when a rank dies,
 * stops, or calls something else, each other one says so in one line and ends. Ranks are forked over socket pairs, and over TCP.
 * `test_comm rates` measures instead: 64 MB among 2 and 4 ranks against a memcpy of as much. */
#include "llmc/base/timer.h"
#include "llmc/dist/comm.h"
#include "llmc/dist/tcp.h"
#include "test.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAX_RANKS = 8, HEADER = 80 /* bytes before the payload, for ranks that are played by hand */ };
typedef void (*Body)(Comm *);               /* of a rank; it destroys the communicator */
typedef struct { int status; char said[4000]; } Ended;
static Ended ended[MAX_RANKS];
static pid_t pids[MAX_RANKS];
static const int *my_sockets;
static int gate[2], ready[2];               /* pipes, fresh for each run_ranks */
static bool over_tcp, small_buffers;      /* the latter: a few kilobytes, so that nothing is sent or received whole; TCP alone */

/* ---- ranks -------------------------------------------------------------------------------------------------------------- */

static void shrink(int fd) {
    int bytes = 10000;
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof bytes);
}

static void connect_pair(int fds[2]) {
    if (!over_tcp) { CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, fds), "socketpair"); return; }
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof a;
    CHECK(!bind(listener, (struct sockaddr *)&a, sizeof a), "bind");
    CHECK(!listen(listener, 1) && !getsockname(listener, (struct sockaddr *)&a, &length), "listen");
    fds[0] = socket(AF_INET, SOCK_STREAM, 0);
    if (small_buffers) shrink(listener), shrink(fds[0]);
    CHECK(!connect(fds[0], (struct sockaddr *)&a, sizeof a), "connect");
    fds[1] = accept(listener, NULL, NULL);
    CHECK(fds[1] >= 0, "accept");
    close(listener);
}

static void close_but(int (*mesh)[MAX_RANKS], int size, int rank) { /* what other ranks have, so that their end can be noticed */
    for (int r = 0; r < size; r++)
        for (int q = 0; q < size; q++)
            if (r != rank && q != r) close(mesh[r][q]);
}

/* Runs body as ranks 0 to size - 1, then `meanwhile`, and waits for all; `stopped` (or -1) is killed when the others have ended. What they say and
 * how they end is in ended. */
static void run_ranks(int size, Body body, void (*meanwhile)(int size), int stopped) {
    int mesh[MAX_RANKS][MAX_RANKS], said[MAX_RANKS];
    for (int r = 0; r < size; r++) {
        mesh[r][r] = -1;
        said[r] = memfd_create("said", 0);
        for (int q = 0; q < r; q++) {
            int fds[2];
            connect_pair(fds);
            mesh[r][q] = fds[0], mesh[q][r] = fds[1];
        }
    }
    CHECK(!pipe(gate) && !pipe(ready), "pipe");
    fflush(stdout);
    for (int r = 0; r < size; r++) {
        if ((pids[r] = fork())) continue;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        alarm(100);
        dup2(said[r], STDERR_FILENO);
        close_but(mesh, size, r);
        my_sockets = mesh[r];
        body(tcp_comm_create(r, size, r, size, mesh[r], 60));
        exit(test_errors ? 1 : 0);
    }
    close_but(mesh, size, -1);
    if (meanwhile) meanwhile(size);
    for (int r = 0; r < size; r++)
        if (r != stopped) waitpid(pids[r], &ended[r].status, 0);
    if (stopped >= 0) kill(pids[stopped], SIGKILL), waitpid(pids[stopped], &ended[stopped].status, 0);
    for (int r = 0; r < size; r++) {
        ssize_t n = pread(said[r], ended[r].said, sizeof ended[r].said - 1, 0);
        ended[r].said[n > 0 ? n : 0] = 0;
        close(said[r]);
    }
    for (int i = 0; i < 2; i++) close(gate[i]), close(ready[i]);
}

static void expect_ends(int rank, int code) {
    const Ended *e = &ended[rank];
    bool as_expected = WIFEXITED(e->status) && WEXITSTATUS(e->status) == code;
    EXPECT(as_expected, "rank %d: status %#x instead of exit code %d; it said: %s", rank, (unsigned)e->status, code, e->said);
}

static void run_well(int size, Body body) {
    run_ranks(size, body, NULL, -1);
    for (int r = 0; r < size; r++) {
        expect_ends(r, 0);
        EXPECT(!ended[r].said[0], "rank %d of %d: %s", r, size, ended[r].said);
    }
}

static const int sizes[] = {1, 2, 3, 4, 8};
#define FOR_SIZES(body) for (size_t size_index = 0; size_index < sizeof sizes / sizeof *sizes; size_index++) run_well(sizes[size_index], body)

/* Rank `rank` comes through here once another has called open_gate. */
static void pass_gate(void) { char c; CHECK(read(gate[0], &c, 1) == 1, "gate"); }
static void open_gate(void) { CHECK(write(gate[1], "", 1) == 1, "gate"); }

/* ---- values -------------------------------------------------------------------------------------------------------------- */

static uint32_t hash(uint32_t op, int rank, size_t i) {
    uint32_t x = (uint32_t)i * 0x9E3779B1u ^ (uint32_t)rank * 0x85EBCA77u ^ op * 0xC2B2AE3Du;
    x = (x ^ x >> 16) * 0x7FEB352Du;
    x = (x ^ x >> 15) * 0x846CA68Bu;
    return x ^ x >> 16;
}
static double value(uint32_t op, int rank, size_t i) { /* of magnitudes that make the order of a sum visible */
    uint32_t x = hash(op, rank, i);
    return ((double)x - 0x80000000u) / (double)(1u << (x & 31)) / 65536;
}

/* To 8 significant bits by the library's rounding: another way than by the bits. */
static float plain_bf16(float x) {
    int exponent;
    double m = frexp(x, &exponent);
    return (float)ldexp(rint(ldexp(m, 8)), exponent - 8);
}

static float plain_sum(const Comm *c, uint32_t op, size_t i, Wire wire, bool backwards) {
    float sum = 0;
    for (int k = 0; k < c->size; k++) {
        int r = backwards ? c->size - 1 - k : k;
        float x = (float)value(op, r, i);
        if (wire == WIRE_BF16 && c->size > 1) x = plain_bf16(x);
        sum = k ? sum + x : x;
    }
    return sum;
}

typedef struct { void *data, *before; size_t n, bytes; CommTicket ticket; int kind, root; Wire wire; uint32_t op; } Try;

/* Issues one operation on fresh data: kind 0 reduce_scatter, 1 all_gather, 2 all_reduce, 3 broadcast. n: elements, or bytes for 1 and 3; of a part
 * for 0 and 1. */
static Try begin(Comm *c, int kind, size_t n, Wire wire, uint32_t op, int root) {
    size_t size = (size_t)c->size, rank = (size_t)c->rank, part = n;
    Try t = {.kind = kind, .wire = wire, .op = op, .n = kind < 2 ? n * size : n, .root = root};
    t.bytes = t.n * (kind == 0 ? sizeof(float) : kind == 2 ? sizeof(double) : 1);
    t.data = xmalloc(t.bytes);
    t.before = xmalloc(t.bytes);
    for (size_t i = 0; i < t.n; i++) {
        if (kind == 0) ((float *)t.data)[i] = (float)value(op, c->rank, i);
        else if (kind == 2) ((double *)t.data)[i] = value(op, c->rank, i);
        else ((unsigned char *)t.data)[i] = kind == 3 || i / part == rank ? (unsigned char)hash(op, c->rank, i) : 0xEE;
    }
    if (t.bytes) memcpy(t.before, t.data, t.bytes);
    t.ticket = kind == 0 ? c->reduce_scatter(c, t.data, t.n, wire) : kind == 1 ? c->all_gather(c, t.data, t.n) :
               kind == 2 ? c->all_reduce(c, t.data, t.n) : c->broadcast(c, t.data, t.n, root);
    return t;
}

static void check_reduce_scatter(const Comm *c, const Try *t) {
    const float *data = t->data, *before = t->before;
    size_t part = t->n / (size_t)c->size, first = part * (size_t)c->rank, wrong = 0, at = 0, order_matters = 0;
    for (size_t i = 0; i < t->n; i++) {
        bool own = i >= first && i < first + part;
        float expected = own ? plain_sum(c, t->op, i, t->wire, false) : before[i];
        if (memcmp(&data[i], &expected, sizeof expected) && !wrong++) at = i;
        if (own && i < first + 1000) order_matters += plain_sum(c, t->op, i, t->wire, true) != expected;
    }
    EXPECT(!wrong, "rank %d of %d, %zu a part, wire %d: %zu wrong, the first at %zu", c->rank, c->size, part, t->wire, wrong, at);
    EXPECT(order_matters || c->size < 3 || part < 1000, "these values do not show in which order they are summed");
}

static void finish(Comm *c, Try *t) {
    const unsigned char *bytes = t->data;
    size_t wrong = 0, part = t->n / (size_t)c->size;
    if (t->kind == 0) check_reduce_scatter(c, t);
    for (size_t i = 0; i < t->n; i++) {
        if (t->kind == 1) wrong += bytes[i] != (unsigned char)hash(t->op, (int)(i / part), i);
        if (t->kind == 3) wrong += bytes[i] != (unsigned char)hash(t->op, t->root, i);
        double sum = value(t->op, 0, i);
        for (int r = 1; t->kind == 2 && r < c->size; r++) sum += value(t->op, r, i);
        if (t->kind == 2) wrong += memcmp((double *)t->data + i, &sum, sizeof sum) != 0;
    }
    EXPECT(!wrong, "rank %d of %d, kind %d, n %zu: %zu wrong", c->rank, c->size, t->kind, t->n, wrong);
    free(t->data);
    free(t->before);
}

static void try_one(Comm *c, int kind, size_t n, Wire wire, uint32_t op, int root) {
    Try t = begin(c, kind, n, wire, op, root);
    c->wait(c, t.ticket);
    finish(c, &t);
}

/* ---- operations ----------------------------------------------------------------------------------------------------------- */

/* Around the chunk (65536 floats, 131072 in bf16), the ring of two, and none of them. */
static void reduce_scatters(Comm *c) {
    static const size_t parts[] = {1, 0, 5, 2049, 65535, 65536, 65537, 131072, 262144, 262145 + 77, 700001};
    EXPECT(!strcmp(c->name, "tcp") && c->local_rank == c->rank && c->local_size == c->size);
    for (uint32_t i = 0; i < sizeof parts / sizeof *parts - (c->size > 4); i++) {
        try_one(c, 0, parts[i], WIRE_FLOAT32, i, 0);
        try_one(c, 0, parts[i], WIRE_BF16, 100 + i, 0);
    }
    c->destroy(c);
}

static void other_operations(Comm *c) {
    static const size_t parts[] = {0, 1, 3, 262144, 1000003}, numbers[] = {0, 1, 2, 1001, 50000}, bytes[] = {0, 1, 5, 3000001};
    for (uint32_t i = 0; i < 5; i++) try_one(c, 1, parts[i], WIRE_FLOAT32, i, 0);
    for (uint32_t i = 0; i < 5; i++) try_one(c, 2, numbers[i], WIRE_FLOAT32, 10 + i, 0);
    for (uint32_t i = 0; i < 4; i++)
        for (int root = 0; root < c->size; root += i == 3 ? 3 : 1) try_one(c, 3, bytes[i], WIRE_FLOAT32, 20 + i, root);
    c->wait(c, c->all_gather(c, NULL, 0));
    c->wait(c, c->broadcast(c, NULL, 0, 0));
    c->wait(c, c->reduce_scatter(c, NULL, 0, WIRE_BF16));
    comm_barrier(c);
    double sum[2] = {1, c->rank};
    comm_sum(c, sum, 2);
    EXPECT(sum[0] == c->size && sum[1] == c->size * (c->size - 1) * 0.5, "%g %g", sum[0], sum[1]);
    c->destroy(c);
}

TEST(reduce_scatter_in_rank_order) { FOR_SIZES(reduce_scatters); }
TEST(gather_reduce_broadcast) { FOR_SIZES(other_operations); }
TEST(over_tcp) {
    over_tcp = true;
    run_well(3, reduce_scatters);
    run_well(4, other_operations);
    small_buffers = true;
    run_well(2, reduce_scatters);
    run_well(3, other_operations);
    over_tcp = small_buffers = false;
}

/* Rank 1 only looks on once rank 0 has issued everything, far more than sockets hold: issuing waits for nobody. Each rank waits in its own order. */
static void many_at_once(Comm *c) {
    enum { MANY = 60 };
    Try t[MANY];
    int order[MANY];
    if (c->rank == 1) pass_gate();
    for (int i = 0; i < MANY; i++) {
        t[i] = begin(c, i % 4, hash(5, 0, (size_t)i) % (i % 8 ? 3000 : 400000), i & 4 ? WIRE_BF16 : WIRE_FLOAT32, (uint32_t)i, i % c->size);
        EXPECT(t[i].ticket > (i ? t[i - 1].ticket : 0), "ticket %d", i);
        order[i] = i;
    }
    if (c->rank == 0 && c->size > 1) open_gate();
    for (int i = MANY - 1; i > 0; i--) {
        int k = (int)(hash(6, c->rank, (size_t)i) % (uint32_t)(i + 1)), swap = order[i];
        order[i] = order[k], order[k] = swap;
    }
    for (int i = 0; i < MANY; i++) {
        c->wait(c, t[order[i]].ticket);
        finish(c, &t[order[i]]);
    }
    c->wait(c, 0);
    c->wait(c, t[3].ticket);
    c->destroy(c);
}
TEST(many_at_once_waited_in_any_order) { FOR_SIZES(many_at_once); }

static void leave_at_once(Comm *c) {
    Comm copy = *c; /* rank and size, for the checks */
    Try t[8];
    for (int i = 0; i < 8; i++) t[i] = begin(c, i % 4, 30000, WIRE_FLOAT32, (uint32_t)i, 0);
    c->destroy(c);
    for (int i = 0; i < 8; i++) finish(&copy, &t[i]);
}
TEST(destroy_waits_for_what_is_queued) { FOR_SIZES(leave_at_once); }

static float from_bits(uint32_t bits) { float x; memcpy(&x, &bits, sizeof x); return x; }

/* Each rank in turn has the values, the others have -0, which changes nothing: so what a rank rounds for others, and for itself, is seen. */
static void round_specials(Comm *c) {
    static const struct { uint32_t in, out; } cases[] = {
        {0x3F800000, 0x3F800000}, {0x3F808000, 0x3F800000} /* tie, down to even */, {0x3F818000, 0x3F820000} /* tie, up to even */,
        {0x3F808001, 0x3F810000}, {0x3F807FFF, 0x3F800000}, {0xBF818000, 0xBF820000}, {0x00000000, 0x00000000}, {0x80000000, 0x80000000},
        {0x7F800000, 0x7F800000}, {0xFF800000, 0xFF800000}, {0x7F7FFFFF, 0x7F800000} /* too large */, {0x7F7F7FFF, 0x7F7F0000},
        {0x00000001, 0x00000000}, {0x00008001, 0x00010000} /* denormal */, {0x3FFFFFFF, 0x40000000},
        {0x7F800001, 0} /* NaN, by a bit that is cut off */, {0xFFFFFFFF, 0}, {0x7FC00000, 0}, {0x7FFFFFFF, 0}};
    enum { CASES = sizeof cases / sizeof *cases };
    size_t size = (size_t)c->size, n = CASES * size;
    float *data = xmalloc(n * sizeof *data);
    for (int has = 0; has < c->size; has++) {
        for (size_t i = 0; i < n; i++) data[i] = has == c->rank ? from_bits(cases[i % CASES].in) : -0.0f;
        c->wait(c, c->reduce_scatter(c, data, n, WIRE_BF16));
        for (size_t i = 0; i < CASES; i++) {
            float x = data[CASES * (size_t)c->rank + i], expected = from_bits(cases[i].out);
            bool right = isnan(from_bits(cases[i].in)) ? isnan(x) : !memcmp(&x, &expected, sizeof x);
            EXPECT(right, "%08x of rank %d on rank %d: %g", cases[i].in, has, c->rank, x);
        }
    }
    free(data);
    c->destroy(c);
}
TEST(bf16_on_the_wire) { run_well(2, round_specials); run_well(3, round_specials); }

/* ---- conveniences ---------------------------------------------------------------------------------------------------------- */

/* bad: bit r is set where rank r is not ok. */
static void try_agree(Comm *c, unsigned bad, const char *text) {
    Error e = {.code = 99, .text = "untouched"};
    bool ok = !(bad >> c->rank & 1);
    int lowest = 0;
    while (!(bad >> lowest & 1) && lowest < c->size) lowest++;
    if (!ok) fail(&e, EXIT_DATA + c->rank, "%s%d", text, c->rank);
    bool all = comm_agree(c, ok, &e);
    if (lowest == c->size) { EXPECT(all && e.code == 99 && !strcmp(e.text, "untouched"), "%s", e.text); return; }
    Error expected = {0};
    fail(&expected, EXIT_DATA + lowest, "%s%d", text, lowest);
    if (lowest != c->rank) fail_in(&expected, "rank %d", lowest);
    EXPECT(!all && e.code == expected.code && !strcmp(e.text, expected.text), "rank %d, bad %x: code %d, %.60s", c->rank, bad, e.code, e.text);
}

static char *text_of(int rank, int how) { /* NULL, empty, or long; to be freed */
    int which = (rank + how) % 3;
    if (which == 0) return NULL;
    size_t n = which == 1 ? 0 : 100000 * (size_t)(rank + 1) + 1;
    char *s = xmalloc(n + 1);
    memset(s, 'a' + rank, n);
    s[n] = 0;
    return s;
}
static bool same_text(const char *a, const char *b) { return a && b ? !strcmp(a, b) : a == b; }

static void conveniences(Comm *c) {
    char *deep = xmalloc(2001);
    memset(deep, 'x', 2000);
    deep[2000] = 0;
    for (unsigned bad = 0; bad < 1u << c->size; bad += 1 + bad / 5) try_agree(c, bad, "no such file ");
    try_agree(c, 1u << (c->size - 1), deep);
    EXPECT(!comm_agree(c, false, NULL) && comm_agree(c, true, NULL));
    for (int how = 0; how < 3; how++) {
        char *mine = text_of(c->rank, how), **all = comm_gather_texts(c, mine);
        EXPECT(!all == (c->rank != 0));
        for (int r = 0; r < c->size; r++) {
            char *theirs = text_of(r, how), *copy = comm_broadcast_text(c, r == c->rank ? mine : "not this", r);
            EXPECT(same_text(copy, theirs), "broadcast from %d", r);
            EXPECT(!all || same_text(all[r], theirs), "gathered from %d", r);
            free(copy);
            free(theirs);
            if (all) free(all[r]);
        }
        free(all);
        free(mine);
    }
    free(deep);
    c->destroy(c);
}
TEST(agree_and_texts) { FOR_SIZES(conveniences); }

TEST(alone) {
    Comm *c = comm_alone();
    EXPECT(!strcmp(c->name, "alone") && c->rank == 0 && c->size == 1 && c->local_rank == 0 && c->local_size == 1);
    c->phase(c, "training", 1, 1);
    for (int kind = 0; kind < 4; kind++) try_one(c, kind, 1000, WIRE_BF16, 1, 0);
    conveniences(c);
}

/* ---- P22: a rank that is gone ----------------------------------------------------------------------------------------------- */

static int kind_now, victim;
static const char *const kinds[] = {"reduce_scatter", "all_gather", "all_reduce", "broadcast"};

static void expect_one_line(int rank, const char *a, const char *b) {
    const char *said = ended[rank].said, *end = strchr(said, '\n');
    char start[32];
    snprintf(start, sizeof start, "error: rank %d: ", rank);
    bool as_expected = end && !end[1] && !strncmp(said, start, strlen(start)) && strstr(said, a) && strstr(said, b);
    EXPECT(as_expected, "rank %d said \"%s\", expected one line with \"%s\" and \"%s\"", rank, said, a, b);
}

/* "rank 2 is gone" or "ranks 0, 2 are gone": whoever notices late finds more of them. */
static void expect_gone(int rank, int gone) {
    char one[8], *list = strstr(ended[rank].said, ": rank"), *end = list ? strstr(list, " gone; I waited for ") : NULL;
    snprintf(one, sizeof one, " %d", gone);
    char *found = list ? strstr(list + 6, one) : NULL;
    EXPECT(end && found && found < end, "rank %d does not say that %d is gone: %s", rank, gone, ended[rank].said);
}

static void one_dies_before(Comm *c) {
    c->phase(c, "training", 40, 60);
    comm_barrier(c);
    if (c->rank == victim && victim == 1) _exit(9);
    if (c->rank == victim) kill(getpid(), SIGKILL);
    c->phase(c, "training", 41, 60);
    try_one(c, kind_now, 1000000, WIRE_FLOAT32, 0, 0);
    _exit(0);
}
TEST(a_rank_that_is_gone) {
    for (kind_now = 0; kind_now < 4; kind_now++)
        for (victim = 0; victim < 3; victim++) {
            char place[100];
            over_tcp = kind_now & 1;
            run_ranks(3, one_dies_before, NULL, -1);
            snprintf(place, sizeof place, " in %s (operation 2) during training, step 41", kinds[kind_now]);
            for (int r = 0; r < 3; r++) {
                if (r == victim) continue;
                expect_ends(r, EXIT_PEER);
                expect_one_line(r, " gone; I waited for ", place);
                expect_gone(r, victim);
            }
        }
    over_tcp = false;
}

/* Somewhere within: 100 operations of some megabytes are under way. */
static void one_dies_within(Comm *c) {
    static float data[3 << 16];
    for (int i = 0; i < 1000; i++) {
        if (i == 900 && c->rank == 2) { c->wait(c, 20); kill(getpid(), SIGKILL); }
        if (i & 1) c->reduce_scatter(c, data, 3 << 16, WIRE_BF16);
        else c->all_gather(c, data, sizeof data);
    }
    c->destroy(c);
    _exit(0);
}
TEST(a_rank_killed_within_operations) {
    for (int tcp = 0; tcp < 2; tcp++) {
        over_tcp = tcp;
        run_ranks(3, one_dies_within, NULL, -1);
        for (int r = 0; r < 2; r++) {
            expect_ends(r, EXIT_PEER);
            expect_one_line(r, " gone; I waited for ", "(operation ");
            expect_gone(r, 2);
        }
    }
    over_tcp = false;
}

static void see_gone(int rank) {
    struct pollfd its = {.fd = my_sockets[rank], .events = POLLRDHUP};
    EXPECT(poll(&its, 1, -1) == 1);
}

/* Rank 1 destroys its communicator and ends; the others, who need it no more, look on when it is gone. */
static void one_finishes_early(Comm *c) {
    CommTicket last = begin(c, 3, 100000, WIRE_FLOAT32, 1, 1).ticket;
    if (c->rank == 1) { c->destroy(c); _exit(0); }
    see_gone(1);
    c->phase(c, "saving", 7, 1);
    c->wait(c, last);
    if (victim == 1) comm_barrier(c);
    c->destroy(c);
    _exit(test_errors ? 1 : 0);
}
static void all_others_die(Comm *c) {
    if (c->rank) _exit(0);
    for (int r = 1; r < c->size; r++) see_gone(r);
    c->phase(c, "training", 3, 60);
    comm_barrier(c);
    _exit(0);
}
TEST(a_rank_that_has_finished) {
    for (victim = 0; victim < 2; victim++) {
        run_ranks(3, one_finishes_early, NULL, -1);
        expect_ends(1, 0);
        for (int r = 0; r < 3; r += 2) {
            expect_ends(r, victim ? EXIT_PEER : 0);
            if (victim) expect_gone(r, 1), expect_one_line(r, "in all_reduce (operation 2)", "during saving, step 7");
            else EXPECT(!ended[r].said[0], "%s", ended[r].said);
        }
    }
}

TEST(several_ranks_that_are_gone) {
    run_ranks(4, all_others_die, NULL, -1);
    expect_ends(0, EXIT_PEER);
    expect_one_line(0, "ranks 1, 2, 3 are gone; I waited for them in all_reduce (operation 1) during training, step 3\n", "");
}

/* ---- P21: a rank that is stuck, or elsewhere ---------------------------------------------------------------------------------- */

static void one_stops(Comm *c) {
    c->phase(c, "training", 40, 60);
    comm_barrier(c);
    if (c->rank == 1) raise(SIGSTOP);
    c->phase(c, "evaluation", 41, 1);
    try_one(c, kind_now, 1000000, WIRE_FLOAT32, 0, 0);
    _exit(0);
}
TEST(a_rank_that_is_stopped) {
    for (kind_now = 0; kind_now < 2; kind_now++) {
        char place[200];
        over_tcp = kind_now == 1;
        run_ranks(3, one_stops, NULL, 1);
        snprintf(place, sizeof place, "no progress for 1 seconds in %s (operation 2) during evaluation, step 41; I wait for rank 1, "
                 "last heard of in all_reduce (operation 1) during training, step 40\n", kinds[kind_now]);
        for (int r = 0; r < 3; r += 2) {
            expect_ends(r, EXIT_HANG);
            expect_one_line(r, place, place);
        }
    }
    over_tcp = false;
}

/* Rank 1 is played by hand: it takes the header, says the same, and then neither reads nor writes. */
static void echo_header(void) {
    char header[HEADER];
    for (size_t at = 0; at < HEADER;) {
        ssize_t n = recv(my_sockets[0], header + at, HEADER - at, 0);
        if (n > 0) at += (size_t)n;
    }
    CHECK(send(my_sockets[0], header, HEADER, 0) == HEADER, "header");
}
static void one_takes_nothing(Comm *c) {
    if (c->rank == 1) { echo_header(); pass_gate(); _exit(0); }
    c->phase(c, "training", 1, 1);
    try_one(c, 3, 4000000, WIRE_FLOAT32, 0, 0);
    _exit(0);
}
TEST(a_rank_that_takes_nothing) {
    run_ranks(2, one_takes_nothing, NULL, 1);
    expect_ends(0, EXIT_HANG);
    expect_one_line(0, "in broadcast (operation 1)",
                    "; not taking what I send: rank 1, last heard of in broadcast (operation 1) during training, step 1\n");
}

/* Gone where there is only something to send: no SIGPIPE. */
static void one_says_hello_and_dies(Comm *c) {
    if (c->rank == 1) { echo_header(); _exit(0); }
    c->phase(c, "training", 1, 60);
    try_one(c, 3, 40000000, WIRE_FLOAT32, 0, 0);
    _exit(0);
}
TEST(a_rank_that_takes_no_more) {
    for (int tcp = 0; tcp < 2; tcp++) {
        over_tcp = tcp;
        run_ranks(2, one_says_hello_and_dies, NULL, -1);
        expect_ends(0, EXIT_PEER);
        expect_one_line(0, "rank 1 is gone; I waited for it in broadcast (operation 1) during training, step 1\n", "");
    }
    over_tcp = false;
}

/* Six pieces of a part, each later than the one before by less than the limit: slow is not stuck. */
static void one_is_slow(Comm *c) {
    unsigned char part[1000];
    for (size_t i = 0; i < sizeof part; i++) part[i] = (unsigned char)hash(9, 1, i + 1000);
    if (c->rank == 1) {
        echo_header();
        for (int i = 0; i < 6; i++) {
            usleep(300000);
            send(my_sockets[0], part + i * 167, i < 5 ? 167 : 165, 0);
        }
        pass_gate();
        _exit(0);
    }
    c->phase(c, "training", 1, 1.2);
    try_one(c, 1, 1000, WIRE_FLOAT32, 9, 0);
    open_gate();
    _exit(test_errors ? 1 : 0);
}
TEST(a_rank_that_is_slow) { run_well(2, one_is_slow); }

/* The limit that counts is that of the last phase, from there on: longer than what an operation began with, and shorter than it has waited already. */
static void phase_by_phase(Comm *c) {
    c->phase(c, "a", 1, 0.7);
    if (c->rank == 1) pass_gate();
    Try t = begin(c, 2, 10, WIRE_FLOAT32, 3, 0);
    c->phase(c, "b", 1, 60);
    if (c->rank == 0) {
        usleep(1300000);
        c->phase(c, "c", 1, 1);
        usleep(300000);
        open_gate();
    }
    c->wait(c, t.ticket);
    finish(c, &t);
    c->destroy(c);
}
TEST(limits_by_phase) { run_well(3, phase_by_phase); }

/* A scheduler stops the whole job for longer than the limit, while two of three wait. */
static void wait_for_one(Comm *c) {
    c->phase(c, "training", 1, 1);
    if (c->rank == 1) pass_gate();
    Try t = begin(c, 0, 100000, WIRE_FLOAT32, 3, 0);
    if (c->rank != 1) CHECK(write(ready[1], "", 1) == 1, "ready");
    c->wait(c, t.ticket);
    finish(c, &t);
    c->destroy(c);
}
static void suspend_all(int size) {
    char byte;
    for (int r = 0; r < size - 1; r++) CHECK(read(ready[0], &byte, 1) == 1, "ready");
    for (int r = 0; r < size; r++) kill(pids[r], SIGSTOP);
    for (int r = 0; r < size; r++) waitpid(pids[r], NULL, WUNTRACED);
    usleep(1500000);
    for (int r = 0; r < size; r++) kill(pids[r], SIGCONT);
    open_gate();
}
TEST(a_job_that_is_suspended) {
    run_ranks(3, wait_for_one, suspend_all, -1);
    for (int r = 0; r < 3; r++) expect_ends(r, 0);
}

static void one_is_elsewhere(Comm *c) {
    bool here = c->rank != 1;
    c->phase(c, here ? "training" : "saving", 40 + c->rank, 60);
    switch (kind_now) {
    case 0: try_one(c, here ? 2 : 1, here ? 1 : 5, WIRE_FLOAT32, 0, 0); break;
    case 1: try_one(c, 0, here ? 1000 : 2000000, WIRE_FLOAT32, 0, 0); break;
    case 2: try_one(c, 3, 10, WIRE_FLOAT32, 0, here ? 0 : 1); break;
    default: try_one(c, 0, 4, here ? WIRE_FLOAT32 : WIRE_BF16, 0, 0);
    }
    _exit(0);
}
TEST(a_rank_in_another_operation) {
    static const char *const places[][2] = { /* of ranks 0 and 2 (at step 42), of rank 1 */
        {"all_reduce (operation 1) of 8 bytes during training, step 40", 
         "all_gather (operation 1) of 15 bytes during saving, step 41"},
        {"reduce_scatter (operation 1) of 12000 bytes during training, step 40", 
         "reduce_scatter (operation 1) of 24000000 bytes during saving, step 41"},
        {"broadcast (operation 1) of 10 bytes from rank 0 during training, step 40", 
         "broadcast (operation 1) of 10 bytes from rank 1 during saving, step 41"},
        {"reduce_scatter (operation 1) of 48 bytes during training, step 40", 
         "reduce_scatter in bf16 (operation 1) of 48 bytes during saving, step 41"}};
    for (kind_now = 0; kind_now < 4; kind_now++) {
        over_tcp = kind_now & 1;
        run_ranks(3, one_is_elsewhere, NULL, -1);
        for (int r = 0; r < 3; r++) {
            char mine[200];
            const char *place = places[kind_now][r == 1];
            snprintf(mine, sizeof mine, "I am in %.*s", (int)strlen(place) - 1, place); /* without the step's last digit */
            expect_ends(r, EXIT_HANG);
            expect_one_line(r, mine, r == 1 ? ", but rank " : ", but rank 1 is in ");
            if (r != 1) expect_one_line(r, places[kind_now][1], ": all ranks must call the same operations in the same order\n");
        }
    }
    over_tcp = false;
}

/* ---- rates --------------------------------------------------------------------------------------------------------------------- */

static void measure(Comm *c) {
    enum { TIMES = 8 };
    size_t bytes = 64 << 20, n = bytes / sizeof(float);
    float *data = xcalloc(n, sizeof *data), *copy = xmalloc(bytes);
    static const char *const names[] = {"memcpy", "reduce_scatter", "reduce_scatter bf16", "all_gather", "barrier"};
    for (int what = 0; what < 5; what++) {
        double best = 1e9;
        for (int i = 0; i < TIMES; i++) {
            comm_barrier(c);
            double start = seconds_now();
            if (what == 0) memcpy(i & 1 ? data : copy, i & 1 ? copy : data, bytes);
            else if (what == 3) c->wait(c, c->all_gather(c, data, bytes));
            else if (what < 3) c->wait(c, c->reduce_scatter(c, data, n, what == 1 ? WIRE_FLOAT32 : WIRE_BF16));
            else comm_barrier(c);
            double took = seconds_now() - start;
            if (took < best) best = took;
        }
        if (c->rank == 0 && what == 4) printf("  %-20s %8.1f us\n", names[what], 1e6 * best);
        else if (c->rank == 0) printf("  %-20s %8.2f ms, %6.2f GB/s of data\n", names[what], 1e3 * best, (double)bytes / best / 1e9);
    }
    free(data);
    free(copy);
    c->destroy(c);
}

static void rates(void) {
    for (int size = 2; size <= 4; size += 2)
        for (int tcp = 0; tcp < 2; tcp++) {
            over_tcp = tcp;
            printf("%d ranks, %s, 64 MB, best of 8\n", size, tcp ? "TCP on loopback" : "Unix sockets");
            run_well(size, measure);
        }
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    if (argc > 1 && !strcmp(argv[1], "rates")) return rates(), 0;
    RUN(reduce_scatter_in_rank_order);
    RUN(gather_reduce_broadcast);
    RUN(over_tcp);
    RUN(many_at_once_waited_in_any_order);
    RUN(destroy_waits_for_what_is_queued);
    RUN(bf16_on_the_wire);
    RUN(agree_and_texts);
    RUN(alone);
    RUN(a_rank_that_is_gone);
    RUN(a_rank_killed_within_operations);
    RUN(a_rank_that_has_finished);
    RUN(several_ranks_that_are_gone);
    RUN(a_rank_that_is_stopped);
    RUN(a_rank_that_takes_nothing);
    RUN(a_rank_that_takes_no_more);
    RUN(a_rank_that_is_slow);
    RUN(limits_by_phase);
    RUN(a_job_that_is_suspended);
    RUN(a_rank_in_another_operation);
    return test_done();
}
