/* The rendezvous: sockets between the right ranks, however they meet; P23: every problem is one message that all ranks have, in time, whoever else
 * knocks at the port. Ranks are threads here. */
#include "llmc/base/io.h"
#include "llmc/base/timer.h"
#include "llmc/dist/door.h"
#include "llmc/dist/find.h"
#include "llmc/dist/mesh.h"
#include "test.h"
#include <netdb.h>
#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

static char work[512];

/* A rank on a thread. */
typedef struct {
    Launch l;
    const char *proof;
    double limit, after;               /* starts so much later */
    int sockets[16];
    bool ok;
    Error e;
    double seconds;
    pthread_t thread;
} Member;

static void *member_run(void *argument) {
    Member *m = argument;
    if (m->after > 0) usleep((useconds_t)(1e6 * m->after));
    double started = seconds_now();
    m->ok = mesh_connect(&m->l, m->proof, m->limit, m->sockets, &m->e);
    m->seconds = seconds_now() - started;
    return NULL;
}
static void members_start(Member *m, int n) {
    for (int i = 0; i < n; i++) pthread_create(&m[i].thread, NULL, member_run, &m[i]);
}
static void members_join(Member *m, int n) {
    for (int i = 0; i < n; i++) pthread_join(m[i].thread, NULL);
}

/* n ranks of `size`, numbered from 0, who meet as *like does. */
static void members(Member *m, int n, int size, const Launch *like, double limit) {
    for (int i = 0; i < n; i++) {
        m[i] = (Member){.l = *like, .proof = "build = a1\nmodel = gpt2 124M\n", .limit = limit};
        m[i].l.rank = m[i].l.local_rank = i;
        m[i].l.size = m[i].l.local_size = size;
        if (i) m[i].l.listener = -1;
    }
}

static int free_port(const char *address) {
    int port = 0, fd = listen_on(address, &port);
    if (fd >= 0) close(fd);
    return fd < 0 ? 0 : port;
}
static Launch by_address(const char *host) {
    Launch l = {.by = BY_TORCHRUN, .by_name = "torchrun's environment", .port = free_port(NULL), .listener = -1};
    snprintf(l.host, sizeof l.host, "%s", host);
    return l;
}
static Launch by_listener(void) {
    Launch l = {.by = BY_OURSELVES, .by_name = "our own launcher", .host = "127.0.0.1"};
    l.listener = listen_on("127.0.0.1", &l.port);
    return l;
}
static Launch by_file(const char *name) {
    Launch l = {.by = BY_SLURM, .by_name = "Slurm's environment", .listener = -1};
    snprintf(l.file, sizeof l.file, "%.300s/%s", work, name);
    return l;
}

/* Every rank sends its number and the receiver's to every other one. */
static void expect_mesh(Member *m, int size) {
    for (int i = 0; i < size; i++) EXPECT(m[i].ok, "rank %d: %s", i, m[i].e.text);
    for (int i = 0; i < size; i++)
        for (int j = 0; j < size; j++) {
            char word[2] = {(char)i, (char)j};
            if (m[i].ok && j != i) EXPECT(m[i].sockets[j] >= 0 && send(m[i].sockets[j], word, 2, MSG_NOSIGNAL) == 2, "rank %d to %d", i, j);
        }
    for (int i = 0; i < size; i++)
        for (int j = 0; j < size; j++) {
            char word[2] = {-1, -1};
            if (!m[i].ok) continue;
            if (j == i) EXPECT(m[i].sockets[j] == -1, "a socket of rank %d to itself", i);
            else EXPECT(recv_all(m[i].sockets[j], word, 2, seconds_now() + 5) && word[0] == j && word[1] == i, "rank %d from %d: %d to %d", i, j, word[0], word[1]);
            if (j != i) EXPECT(fcntl(m[i].sockets[j], F_GETFL) >= 0 && !(fcntl(m[i].sockets[j], F_GETFL) & O_NONBLOCK) && fcntl(m[i].sockets[j], F_GETFD) == FD_CLOEXEC, "flags");
        }
    for (int i = 0; i < size; i++)
        for (int j = 0; m[i].ok && j < size; j++)
            if (j != i) close(m[i].sockets[j]);
}
static void expect_meeting(int size, const Launch *like, double limit) {
    Member m[16];
    members(m, size, size, like, limit);
    members_start(m, size);
    members_join(m, size);
    expect_mesh(m, size);
}

/* All of them end with this one message, and in time. */
static void expect_problem(Member *m, int n, int code, const char *says, const char *also) {
    members_start(m, n);
    members_join(m, n);
    for (int i = 0; i < n; i++) {
        EXPECT(!m[i].ok && m[i].e.code == code && strstr(m[i].e.text, says) && strstr(m[i].e.text, also), "rank %d: %d %s", m[i].l.rank, m[i].e.code, m[i].e.text);
        EXPECT(!strcmp(m[i].e.text, m[0].e.text), "another message on rank %d: %s", m[i].l.rank, m[i].e.text);
        EXPECT(m[i].seconds < m[i].limit + 1, "rank %d: %.2f s of %g", m[i].l.rank, m[i].seconds, m[i].limit);
        for (int r = 0; r < m[i].l.size; r++) EXPECT(m[i].sockets[r] == -1, "socket %d is left", r);
    }
}

static bool known(const char *host) {
    struct addrinfo *found = NULL;
    bool is = getaddrinfo(host, NULL, NULL, &found) == 0;
    if (is) freeaddrinfo(found);
    return is;
}

TEST(meeting_at_an_address) {
    const int sizes[] = {2, 3, 8};
    static const char *const hosts[] = {"127.0.0.1", "localhost", "127.0.0.1", "::1"};
    for (int i = 0; i < 4; i++) {
        if (i == 3 && !free_port("::1")) SKIP("no IPv6 here");
        if (!known(hosts[i])) continue; /* no /etc/hosts, as in a bare chroot */
        Launch l = by_address(hosts[i]);
        expect_meeting(sizes[i % 3], &l, 10);
    }
}

TEST(meeting_at_a_listener) {
    const int sizes[] = {2, 3, 8};
    for (int i = 0; i < 3; i++) {
        Launch l = by_listener();
        expect_meeting(sizes[i], &l, 10);
        EXPECT(fcntl(l.listener, F_GETFD) == -1, "the listener is closed");
    }
}

TEST(meeting_by_file) {
    const int sizes[] = {2, 3, 8};
    for (int i = 0; i < 3; i++) {
        Launch l = by_file("new/run/meeting-a");
        expect_meeting(sizes[i], &l, 10);
        EXPECT(!path_exists(l.file), "the file is left");
    }
}

/* A file of yesterday: nobody at its address, somebody silent, or the rank 0 of another run. */
TEST(meeting_by_stale_file) {
    for (int i = 0; i < 3; i++) {
        Launch l = by_file("meeting-b");
        Member m[2];
        Error e = {0};
        int port = 0, other = listen_on(NULL, &port);
        Door door;
        door_open(&door, other, 0, 5, 2);
        if (i == 0) door_close(&door);
        EXPECT(meeting_file_write(l.file, port, 6, &e), "%s", e.text);
        members(m, 2, 2, &l, 0.4);
        if (i < 2) expect_problem(m + 1, 1, EXIT_HANG, l.file, i ? "does not answer" : "refused");
        else { /* the other run's rank 0 has its door open meanwhile */
            Guest g;
            size_t which;
            members_start(m + 1, 1);
            door_wait(&door, NULL, 0, seconds_now() + 0.5, &g, &which);
            members_join(m + 1, 1);
            EXPECT(!m[1].ok && strstr(m[1].e.text, "the rank of another run answers there") && strstr(m[1].e.text, l.file), "%s", m[1].e.text);
        }
        m[1].limit = m[0].limit = 10, m[0].after = 0.05; /* rank 1 finds the old one, then rank 0's */
        members_start(m, 2);
        members_join(m, 2);
        expect_mesh(m, 2);
        EXPECT(!path_exists(l.file), "the file is left");
        if (i) door_close(&door);
    }
    Launch l = by_file("meeting-c");
    Member m[2];
    members(m, 2, 2, &l, 0.3);
    expect_problem(m + 1, 1, EXIT_HANG, l.file, "has not started");
    EXPECT(file_replace(l.file, "rubbish\n", 8, NULL));
    expect_problem(m + 1, 1, EXIT_HANG, l.file, "no meeting file");
}

TEST(another_proof) {
    Launch l = by_listener();
    Member m[3];
    members(m, 3, 3, &l, 5);
    m[2].proof = "build = b2\nmodel = gpt2 124M\n";
    expect_problem(m, 3, EXIT_USAGE, "build is b2 on rank 2", "a1 on rank 0");
    l = by_listener();
    members(m, 2, 2, &l, 5);
    m[1].proof = "build = a1\nmodel = gpt2 124M\nseed = 3";
    expect_problem(m, 2, EXIT_USAGE, "seed is 3 on rank 1", "(nothing) on rank 0");
    l = by_listener();
    members(m, 2, 2, &l, 5);
    m[1].proof = "build = a1";
    expect_problem(m, 2, EXIT_USAGE, "model is (nothing) on rank 1", "gpt2 124M on rank 0");
    l = by_listener();
    members(m, 2, 2, &l, 5);
    char *large = xcalloc(1, 500001); /* more than a socket takes at once */
    memset(large, 'x', 500000);
    memcpy(large, "a = ", 4);
    m[0].proof = m[1].proof = large;
    members_start(m, 2);
    members_join(m, 2);
    expect_mesh(m, 2);
    free(large);
}

TEST(another_size) {
    Launch l = by_address("127.0.0.1");
    Member m[3];
    members(m, 3, 3, &l, 5);
    m[2].l.size = 4;
    expect_problem(m, 3, EXIT_USAGE, "rank 2 was started as one of 4", "rank 0 as one of 3");
}

TEST(a_rank_comes_twice) {
    Launch l = by_address("127.0.0.1");
    Member m[3];
    members(m, 3, 3, &l, 5);
    m[2].l.rank = 1;
    expect_problem(m, 3, EXIT_USAGE, "rank 1 came twice", "127.0.0.1");
    EXPECT(m[0].seconds < 2, "%.2f s", m[0].seconds);
}

TEST(missing_ranks) {
    Launch l = by_address("127.0.0.1");
    Member m[4];
    members(m, 2, 4, &l, 1);
    m[0].after = 0.3; /* rank 1 has less time left than rank 0, and yet hears it */
    expect_problem(m, 2, EXIT_HANG, "of 4 ranks", "within 1 s: 2, 3");
    members(m, 2, 2, &l, 0.3);
    expect_problem(m + 1, 1, EXIT_HANG, "rank 1 could not reach rank 0 at 127.0.0.1 port", "refused");
    l = by_address("no-such-host.invalid");
    members(m, 2, 2, &l, 0.3);
    expect_problem(m + 1, 1, EXIT_USAGE, "\"no-such-host.invalid\"", "MASTER_ADDR");
    l = by_file("meeting-twice");
    members(m, 2, 3, &l, 0.8);
    m[1].l.rank = 0, m[1].after = 0.1;
    members_start(m, 2);
    members_join(m, 2);
    EXPECT(!m[0].ok && m[0].e.code == EXIT_USAGE && strstr(m[0].e.text, "rank 0 came twice"), "%s", m[0].e.text);
    EXPECT(!m[1].ok && m[1].e.code == EXIT_HANG && strstr(m[1].e.text, ": 1, 2"), "%s", m[1].e.text);
}

TEST(a_busy_port) {
    Launch l = by_address("127.0.0.1");
    char port[20];
    Member m[2];
    int busy = listen_on(NULL, &l.port);
    snprintf(port, sizeof port, "port %d", l.port);
    members(m, 2, 2, &l, 0.5);
    expect_problem(m, 1, EXIT_USAGE, port, "in use");
    expect_problem(m + 1, 1, EXIT_HANG, port, "does not answer");
    close(busy);
}

static int stranger(const Launch *l, const void *says, size_t bytes) {
    Endpoint to;
    endpoint_numeric("127.0.0.1", l->port, &to);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    EXPECT(connect(fd, (struct sockaddr *)&to.at, to.bytes) == 0 && (!bytes || send(fd, says, bytes, MSG_NOSIGNAL) == (ssize_t)bytes), "a stranger could not come in");
    return fd;
}

TEST(strangers_delay_nobody) {
    Launch l = by_listener();
    Hello half = {.magic = DOOR_MAGIC, .version = DOOR_VERSION, .rank = 1, .size = 3}, wrong_run = {.magic = DOOR_MAGIC, .version = DOOR_VERSION, .rank = 1, .nonce = 1, .size = 3};
    static const char request[] = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
    int fds[120], n = 0;
    fds[n++] = stranger(&l, request, strlen(request));
    fds[n++] = stranger(&l, "llm", 3);
    fds[n++] = stranger(&l, &half, 20);
    fds[n++] = stranger(&l, &wrong_run, sizeof wrong_run);
    close(stranger(&l, NULL, 0));
    close(stranger(&l, &half, 30));
    while (n < 120) fds[n++] = stranger(&l, NULL, 0); /* more than are waited for at a time */
    Member m[3];
    members(m, 3, 3, &l, 10);
    members_start(m, 3);
    members_join(m, 3);
    for (int i = 0; i < 3; i++) EXPECT(m[i].seconds < 2, "rank %d took %.2f s", i, m[i].seconds);
    expect_mesh(m, 3);
    for (int i = 0; i < n; i++) close(fds[i]);
}

/* A rank that is played by the test: it says hello, with this version and port, and hears the banner. */
static int play_rank(const Launch *l, int rank, int size, int version, int port) {
    Endpoint to;
    Banner b = {0};
    const char *why = "", *proof = "build = a1\nmodel = gpt2 124M\n";
    endpoint_numeric("127.0.0.1", l->port, &to);
    int fd = door_enter(&to, 0, 0, seconds_now() + 5, &b, &why);
    Hello o = {DOOR_MAGIC, version, rank, b.nonce, size, port, (int32_t)strlen(proof), 60000};
    EXPECT(fd >= 0 && send_all(fd, &o, sizeof o, seconds_now() + 5) && send_all(fd, proof, strlen(proof), seconds_now() + 5), "%s", why);
    return fd;
}

TEST(ranks_that_go_wrong) {
    Member m[3];
    Launch l = by_listener();
    members(m, 3, 3, &l, 5);
    members_start(m, 2);
    close(play_rank(&l, 2, 3, DOOR_VERSION, 1)); /* it ends while all wait */
    members_join(m, 2);
    for (int i = 0; i < 2; i++) EXPECT(!m[i].ok && strstr(m[i].e.text, i ? m[0].e.text : "rank 2 ended"), "%s", m[i].e.text);
    EXPECT(m[0].e.code == EXIT_PEER || m[0].e.code == EXIT_USAGE, "%d", m[0].e.code);

    l = by_listener();
    members(m, 3, 3, &l, 5);
    members_start(m, 2);
    int fd = play_rank(&l, 2, 3, DOOR_VERSION + 1, 1);
    members_join(m, 2);
    for (int i = 0; i < 2; i++) EXPECT(!m[i].ok && m[i].e.code == EXIT_USAGE && strstr(m[i].e.text, "rank 2 is of another build"), "%s", m[i].e.text);
    close(fd);

    l = by_listener();
    members(m, 3, 3, &l, 2);
    members_start(m, 1);
    m[2].after = 0;
    pthread_create(&m[2].thread, NULL, member_run, &m[2]);
    fd = play_rank(&l, 1, 3, DOOR_VERSION, free_port("127.0.0.1")); /* nobody listens where rank 2 is sent */
    members_join(m, 1);
    pthread_join(m[2].thread, NULL);
    for (int i = 0; i < 3; i += 2) EXPECT(!m[i].ok && m[i].e.code == EXIT_USAGE && strstr(m[i].e.text, "rank 2 cannot connect to rank 1 at 127.0.0.1"), "%s", m[i].e.text);
    close(fd);

    l = by_address("127.0.0.1"); /* a rank 0 that ends, after the banner */
    int listener = listen_on("127.0.0.1", &l.port);
    Door door;
    Guest g = {.fd = -1};
    size_t which;
    door_open(&door, listener, 0, 9, 2);
    members(m, 2, 2, &l, 5);
    members_start(m + 1, 1);
    EXPECT(door_wait(&door, NULL, 0, seconds_now() + 5, &g, &which) == DOOR_CAME && g.hello.rank == 1 && g.hello.size == 2 && !strcmp(g.proof, m[1].proof), "rank 1 did not come");
    if (g.fd >= 0) close(g.fd);
    free(g.proof);
    members_join(m + 1, 1);
    EXPECT(!m[1].ok && m[1].e.code == EXIT_PEER && strstr(m[1].e.text, "rank 0 ended"), "%d %s", m[1].e.code, m[1].e.text);
    door_close(&door);
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    snprintf(work, sizeof work, "%.400s/llmc_rendezvous.XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
    if (!mkdtemp(work)) return perror(work), 1;
    RUN(meeting_at_an_address);
    RUN(meeting_at_a_listener);
    RUN(meeting_by_file);
    RUN(meeting_by_stale_file);
    RUN(another_proof);
    RUN(another_size);
    RUN(a_rank_comes_twice);
    RUN(missing_ranks);
    RUN(a_busy_port);
    RUN(strangers_delay_nobody);
    RUN(ranks_that_go_wrong);
    path_remove_tree(work, NULL);
    return test_done();
}
