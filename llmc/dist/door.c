/* Sockets with deadlines; the listening side of a rank, one poll for all who come. */
#include "door.h"
#include "../base/timer.h"
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- addresses ---------------------------------------------------------------------------------------------------- */

bool endpoint_numeric(const char *address, int port, Endpoint *out) {
    struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port)};
    *out = (Endpoint){0};
    if (inet_pton(AF_INET, address, &v4.sin_addr) == 1) memcpy(&out->at, &v4, out->bytes = sizeof v4);
    else if (inet_pton(AF_INET6, address, &v6.sin6_addr) == 1) memcpy(&out->at, &v6, out->bytes = sizeof v6);
    return out->bytes > 0;
}

void address_of(int fd, bool peer, char out[ADDRESS_ROOM]) {
    Endpoint p = {.bytes = sizeof p.at};
    snprintf(out, ADDRESS_ROOM, "?");
    if ((peer ? getpeername : getsockname)(fd, (struct sockaddr *)&p.at, &p.bytes)) return;
    const void *address = p.at.ss_family == AF_INET6 ? (void *)&((struct sockaddr_in6 *)&p.at)->sin6_addr : (void *)&((struct sockaddr_in *)&p.at)->sin_addr;
    char text[INET6_ADDRSTRLEN];
    if (!inet_ntop(p.at.ss_family, address, text, sizeof text)) return;
    snprintf(out, ADDRESS_ROOM, "%s", !strncmp(text, "::ffff:", 7) && strchr(text, '.') ? text + 7 : text);
}

bool is_loopback(const char *address) { return !strncmp(address, "127.", 4) || !strcmp(address, "::1"); }

/* ---- sockets ------------------------------------------------------------------------------------------------------ */

static int ms_until(double deadline) { return (int)fmin(fmax(ceil(1e3 * (deadline - seconds_now())), 0), 1e6); }

static int close_keeping_errno(int fd) {
    int number = errno;
    if (fd >= 0) close(fd);
    errno = number;
    return -1;
}

/* Waits until the socket can do what events say. false with errno. */
static bool wait_for(int fd, short events, double deadline) {
    for (;;) {
        struct pollfd p = {fd, events, 0};
        int n = poll(&p, 1, ms_until(deadline));
        if (n > 0) return true;
        if (n < 0 && errno != EINTR) return false;
        if (n == 0 && seconds_now() >= deadline) return errno = ETIMEDOUT, false;
    }
}

bool send_all(int fd, const void *data, size_t bytes, double deadline) {
    for (const char *at = data; bytes;) {
        ssize_t n = send(fd, at, bytes, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n > 0) at += n, bytes -= (size_t)n;
        else if (n < 0 && errno != EINTR && (errno != EAGAIN || !wait_for(fd, POLLOUT, deadline))) return false;
    }
    return true;
}

bool recv_all(int fd, void *data, size_t bytes, double deadline) {
    for (char *at = data; bytes;) {
        ssize_t n = recv(fd, at, bytes, MSG_DONTWAIT);
        if (n == 0) return errno = ECONNRESET, false;
        if (n > 0) at += n, bytes -= (size_t)n;
        else if (errno != EINTR && (errno != EAGAIN || !wait_for(fd, POLLIN, deadline))) return false;
    }
    return true;
}

static int listen_at(const Endpoint *p, int *port) {
    int on = 1, off = 0, family = p->at.ss_family, fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    Endpoint is = {.bytes = sizeof is.at};
    if (fd < 0) return -1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (family == AF_INET6) setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
    if (bind(fd, (const struct sockaddr *)&p->at, p->bytes) || listen(fd, SOMAXCONN) || getsockname(fd, (struct sockaddr *)&is.at, &is.bytes)) return close_keeping_errno(fd);
    *port = ntohs(family == AF_INET6 ? ((struct sockaddr_in6 *)&is.at)->sin6_port : ((struct sockaddr_in *)&is.at)->sin_port);
    return fd;
}

int listen_on(const char *address, int *port) {
    Endpoint p;
    if (!endpoint_numeric(address ? address : "::", *port, &p)) return errno = EINVAL, -1;
    int fd = listen_at(&p, port);
    if (fd >= 0 || address || errno == EADDRINUSE || errno == EACCES) return fd;
    endpoint_numeric("0.0.0.0", *port, &p); /* a machine without IPv6 */
    return listen_at(&p, port);
}

/* A port of this machine on which nobody listens can answer itself. */
static bool is_itself(int fd) {
    struct sockaddr_storage a = {0}, b = {0};
    socklen_t a_bytes = sizeof a, b_bytes = sizeof b;
    return getsockname(fd, (struct sockaddr *)&a, &a_bytes) == 0 && getpeername(fd, (struct sockaddr *)&b, &b_bytes) == 0 && a_bytes == b_bytes && !memcmp(&a, &b, a_bytes);
}

static int connect_to(const Endpoint *p, double deadline) {
    int fd = socket(p->at.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), on = 1, error = 0;
    socklen_t bytes = sizeof error;
    if (fd < 0) return -1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (connect(fd, (const struct sockaddr *)&p->at, p->bytes) && errno != EINPROGRESS && errno != EINTR) return close_keeping_errno(fd);
    if (!wait_for(fd, POLLOUT, deadline)) return close_keeping_errno(fd);
    if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &bytes) || error || is_itself(fd)) {
        errno = error ? error : ECONNREFUSED;
        return close_keeping_errno(fd);
    }
    return fd;
}

int door_enter(const Endpoint *to, int rank, uint64_t nonce, double deadline, Banner *b, const char **why) {
    int fd = connect_to(to, deadline);
    if (fd < 0) return *why = strerror(errno), -1;
    bool heard = recv_all(fd, b, sizeof *b, deadline), ours = heard && b->magic == DOOR_MAGIC;
    if (ours && (b->version != DOOR_VERSION || (b->rank == rank && (!nonce || b->nonce == nonce)))) return fd;
    *why = !heard && errno == ETIMEDOUT ? "something listens there but does not answer" : !heard ? "it closed the connection"
         : !ours ? "what answers there is no rank of ours" : b->rank == rank ? "the rank of another run answers there" : "another rank answers there";
    close(fd);
    return -1;
}

/* ---- the door ----------------------------------------------------------------------------------------------------- */

void door_open(Door *d, int listener, int rank, uint64_t nonce, int size) {
    *d = (Door){.listener = listener, .banner = {DOOR_MAGIC, DOOR_VERSION, rank, nonce}, .most = (size_t)size + 64};
    fcntl(listener, F_SETFL, fcntl(listener, F_GETFL) | O_NONBLOCK);
    d->guests = xcalloc(d->most, sizeof *d->guests);
}

static Guest guest_take(Door *d, size_t i) {
    Guest g = d->guests[i];
    d->n--;
    for (size_t k = i; k < d->n; k++) d->guests[k] = d->guests[k + 1];
    return g;
}

static void guest_drop(Door *d, size_t i, bool stranger) {
    Guest g = guest_take(d, i);
    close(g.fd);
    free(g.proof);
    d->strangers += stranger;
}

static void door_accept(Door *d) {
    int on = 1, fd = accept4(d->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) {
        if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
            if (d->n) guest_drop(d, 0, true);
            else poll(NULL, 0, 10);
        }
        return;
    }
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (send(fd, &d->banner, sizeof d->banner, MSG_NOSIGNAL) != sizeof d->banner) {
        close(fd);
        return;
    }
    if (d->n == d->most) guest_drop(d, 0, true);
    d->guests[d->n++] = (Guest){.fd = fd};
}

typedef enum { GUEST_WAIT, GUEST_READY, GUEST_GONE, GUEST_STRANGE } GuestState;

/* Reads what is there. */
static GuestState guest_read(const Door *d, Guest *g) {
    for (;;) {
        size_t of_hello = g->have < sizeof g->hello, want = of_hello ? sizeof g->hello : sizeof g->hello + (size_t)g->hello.proof_bytes;
        if (!of_hello && g->have == want) return GUEST_READY;
        char *to = of_hello ? (char *)&g->hello + g->have : g->proof + (g->have - sizeof g->hello);
        ssize_t n = recv(g->fd, to, want - g->have, MSG_DONTWAIT);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EAGAIN) return GUEST_WAIT;
        if (n <= 0) return g->have ? GUEST_STRANGE : GUEST_GONE;
        g->have += (size_t)n;
        const uint64_t magic = DOOR_MAGIC;
        if (memcmp(&g->hello, &magic, g->have < sizeof magic ? g->have : sizeof magic)) return GUEST_STRANGE;
        if (g->have >= 16 && g->hello.version != DOOR_VERSION) return GUEST_READY;
        if (g->proof || g->have < sizeof g->hello) continue;
        if (g->hello.nonce != d->banner.nonce || g->hello.proof_bytes < 0 || g->hello.proof_bytes > PROOF_MOST) return GUEST_STRANGE;
        g->proof = xcalloc(1, (size_t)g->hello.proof_bytes + 1);
    }
}

/* The first guest that is complete, of those that poll says something about. */
static bool guest_ready(Door *d, const struct pollfd *polled, Guest *came) {
    for (size_t i = d->n; i-- > 0;) {
        if (!polled[i].revents) continue;
        GuestState state = guest_read(d, &d->guests[i]);
        if (state == GUEST_READY) return *came = guest_take(d, i), true;
        if (state != GUEST_WAIT) guest_drop(d, i, state == GUEST_STRANGE);
    }
    return false;
}

DoorEvent door_wait(Door *d, const int *watched, size_t n_watched, double deadline, Guest *came, size_t *which) {
    struct pollfd *p = xcalloc(1 + d->most + n_watched, sizeof *p);
    DoorEvent event = DOOR_LATE;
    for (bool on = true; on;) {
        size_t n = 0;
        for (size_t i = 0; i < d->n; i++) p[n++] = (struct pollfd){d->guests[i].fd, POLLIN, 0};
        struct pollfd *door = p + n, *others = door + 1;
        *door = (struct pollfd){d->listener, POLLIN, 0};
        for (size_t i = 0; i < n_watched; i++) others[i] = (struct pollfd){watched[i], POLLIN, 0};
        bool late = seconds_now() >= deadline;
        if (poll(p, n + 1 + n_watched, ms_until(deadline)) <= 0) {
            on = !late;
            continue;
        }
        for (size_t i = 0; i < n_watched && event == DOOR_LATE; i++)
            if (others[i].revents) event = DOOR_WATCHED, *which = i;
        if (event == DOOR_LATE && guest_ready(d, p, came)) event = DOOR_CAME;
        if (event == DOOR_LATE && door->revents) door_accept(d);
        on = event == DOOR_LATE && !late;
    }
    free(p);
    return event;
}

void door_close(Door *d) {
    for (size_t i = 0; i < d->n; i++) {
        close(d->guests[i].fd);
        free(d->guests[i].proof);
    }
    free(d->guests);
    if (d->listener >= 0) close(d->listener);
    *d = (Door){.listener = -1};
}
