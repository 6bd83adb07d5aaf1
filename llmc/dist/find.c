/* Names to addresses within a deadline, the meeting file, and the search for rank 0. */
#include "find.h"
#include "../base/io.h"
#include "../base/timer.h"
#include <dirent.h>
#include <errno.h>
#include <ifaddrs.h>
#include <inttypes.h>
#include <math.h>
#include <netdb.h>
#include <net/if.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { HOSTS_MOST = 20, ENDPOINTS_MOST = 8 };
typedef struct {
    int n, port;
    uint64_t nonce;                    /* 0: any */
    char hosts[HOSTS_MOST][256];
} Meeting;

/* ---- names -------------------------------------------------------------------------------------------------------- */

/* getaddrinfo knows no deadline: it runs on a thread of its own, and whoever is last frees this. */
typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t change;
    bool done, abandoned;
    char host[256], port[8];
    int error;
    struct addrinfo *list;
} Lookup;

static void lookup_free(Lookup *k) {
    if (k->list) freeaddrinfo(k->list);
    pthread_cond_destroy(&k->change);
    pthread_mutex_destroy(&k->lock);
    free(k);
}

static void *lookup_run(void *argument) {
    Lookup *k = argument;
    struct addrinfo hints = {.ai_family = AF_UNSPEC, .ai_socktype = SOCK_STREAM};
    int error = getaddrinfo(k->host, k->port, &hints, &k->list);
    pthread_mutex_lock(&k->lock);
    k->error = error;
    k->done = true;
    bool last = k->abandoned;
    pthread_cond_signal(&k->change);
    pthread_mutex_unlock(&k->lock);
    if (last) lookup_free(k);
    return NULL;
}

static Lookup *lookup_start(const char *host, int port) {
    Lookup *k = xcalloc(1, sizeof *k);
    pthread_condattr_t clock;
    pthread_attr_t detached;
    pthread_t thread;
    snprintf(k->host, sizeof k->host, "%s", host);
    snprintf(k->port, sizeof k->port, "%d", port);
    pthread_mutex_init(&k->lock, NULL);
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&k->change, &clock);
    pthread_condattr_destroy(&clock);
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    if (pthread_create(&thread, &detached, lookup_run, k)) lookup_run(k);
    pthread_attr_destroy(&detached);
    return k;
}

/* Up to ENDPOINTS_MOST addresses of a host. 0 with *why. */
static int resolve(const char *host, int port, double deadline, Endpoint *out, const char **why) {
    if (endpoint_numeric(host, port, out)) return 1;
    Lookup *k = lookup_start(host, port);
    struct timespec until = {(time_t)deadline, (long)(1e9 * (deadline - floor(deadline)))};
    int n = 0;
    pthread_mutex_lock(&k->lock);
    while (!k->done && !pthread_cond_timedwait(&k->change, &k->lock, &until)) {}
    bool done = k->done;
    k->abandoned = !done;
    *why = !done ? "the name has not been resolved in time" : k->error ? gai_strerror(k->error) : "";
    for (struct addrinfo *a = done && !k->error ? k->list : NULL; a && n < ENDPOINTS_MOST; a = a->ai_next) {
        if (a->ai_addrlen > sizeof out->at) continue;
        memcpy(&out[n].at, a->ai_addr, a->ai_addrlen);
        out[n++].bytes = a->ai_addrlen;
    }
    pthread_mutex_unlock(&k->lock);
    if (done) lookup_free(k);
    return n;
}

/* ---- the file ----------------------------------------------------------------------------------------------------- */

bool meeting_file_write(const char *path, int port, uint64_t nonce, Error *e) {
    char host[256] = "", text[HOSTS_MOST * 64 + 400], *folder = xstrdup(path), *slash = strrchr(folder, '/');
    gethostname(host, sizeof host - 1);
    int n = snprintf(text, sizeof text, "llmc meeting 1\nnonce %016" PRIx64 "\nport %d\nhost %s\n", nonce, port, host), addresses = 0;
    struct ifaddrs *list = NULL;
    if (getifaddrs(&list)) list = NULL;
    for (struct ifaddrs *i = list; i && addresses < HOSTS_MOST - 2; i = i->ifa_next) {
        int family = i->ifa_addr ? i->ifa_addr->sa_family : 0;
        char address[ADDRESS_ROOM];
        if ((family != AF_INET && family != AF_INET6) || !(i->ifa_flags & IFF_UP) || i->ifa_flags & IFF_LOOPBACK) continue;
        if (getnameinfo(i->ifa_addr, family == AF_INET ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6), address, sizeof address, NULL, 0, NI_NUMERICHOST)) continue;
        if (strchr(address, '%')) continue; /* of one link */
        n += snprintf(text + n, sizeof text - (size_t)n, "host %s\n", address);
        addresses++;
    }
    freeifaddrs(list);
    if (slash && slash > folder) *slash = 0;
    bool ok = (!slash || slash == folder || dir_create(folder, e)) && file_replace(path, text, (size_t)n, e);
    free(folder);
    return ok;
}

/* 0, or why not. Listing the directory makes network file systems look again. */
static const char *meeting_file_read(const char *path, Meeting *m) {
    char *folder = xstrdup(path), *slash = strrchr(folder, '/'), self[256] = "";
    if (slash) *slash = 0;
    DIR *dir = opendir(slash ? slash > folder ? folder : "/" : ".");
    if (dir) {
        (void)readdir(dir);
        closedir(dir);
    }
    free(folder);
    Error e;
    char *text = file_read(path, NULL, &e), *rest = text;
    if (!text) return "it cannot be read: rank 0 has not started, or the ranks do not share that directory";
    gethostname(self, sizeof self - 1);
    *m = (Meeting){0};
    for (char *line; (line = strsep(&rest, "\n"));) {
        if (!strncmp(line, "nonce ", 6)) m->nonce = strtoull(line + 6, NULL, 16);
        else if (!strncmp(line, "port ", 5)) m->port = (int)strtol(line + 5, NULL, 10);
        else if (!strncmp(line, "host ", 5) && m->n + 2 <= HOSTS_MOST) {
            if (!m->n && !strcmp(line + 5, self)) snprintf(m->hosts[m->n++], sizeof m->hosts[0], "127.0.0.1"); /* this machine needs no network */
            snprintf(m->hosts[m->n++], sizeof m->hosts[0], "%s", line + 5);
        }
    }
    bool ours = !strncmp(text, "llmc meeting 1", 15) && m->n && m->nonce && m->port > 0 && m->port < 65536;
    free(text);
    return ours ? NULL : "it is no meeting file of ours: remove it";
}

bool meeting_file_is_of_another(const char *path, uint64_t nonce) {
    Meeting m;
    return !meeting_file_read(path, &m) && m.nonce != nonce;
}

void meeting_file_remove(const char *path, uint64_t nonce) {
    Meeting m;
    if (!meeting_file_read(path, &m) && m.nonce == nonce) unlink(path);
}

/* ---- the search --------------------------------------------------------------------------------------------------- */

/* Why a round was in vain: of the first host, or of the file. */
typedef struct { const char *file, *text; char host[256]; bool resolved; } Why;

/* One round over all addresses, each for at most `patience` seconds; cut short where the file has changed. */
static int try_once(const Launch *l, Meeting *m, double deadline, double patience, Banner *b, Why *why) {
    *why = (Why){.file = *l->host ? NULL : meeting_file_read(l->file, m)};
    for (int h = 0; h < m->n && !why->file; h++) {
        Endpoint all[ENDPOINTS_MOST];
        const char *text = "it has no address";
        if (h && meeting_file_is_of_another(l->file, m->nonce)) break;
        int n = resolve(m->hosts[h], m->port, deadline, all, &text);
        why->resolved = why->resolved || n > 0;
        for (int i = 0; i < n; i++) {
            int fd = door_enter(&all[i], 0, m->nonce, fmin(deadline, seconds_now() + patience), b, &text);
            if (fd >= 0) return fd;
        }
        if (h == 0) why->text = text, memcpy(why->host, m->hosts[h], sizeof why->host);
    }
    return -1;
}

int find_rank0(const Launch *l, double deadline, double limit, Banner *b, Error *e) {
    Meeting m = {.n = 1, .port = l->port};
    Why why = {0};
    snprintf(m.hosts[0], sizeof m.hosts[0], "%s", l->host);
    double pause = 0.01, patience = 0.25, left = deadline - seconds_now();
    for (bool first = true; first || left > 0; first = false) {
        Why now;
        int fd = try_once(l, &m, deadline, patience, b, &now);
        if (fd >= 0) return fd;
        if (first || left > 0.05) why = now; /* a round without time is no reason */
        pause = fmin(1.5 * pause, 0.3), patience = fmin(1.5 * patience, 2);
        poll(NULL, 0, (int)(1e3 * fmax(fmin(pause, deadline - seconds_now()), 0)) + 1);
        left = deadline - seconds_now();
    }
    if (why.file) fail(e, EXIT_HANG, "rank %d could not find rank 0 within %g s by the file %s: %s", l->rank, limit, l->file, why.file);
    else if (!*l->host)
        fail(e, EXIT_HANG, "rank %d could not reach rank 0 within %g s: the file %s says %s port %d, where: %s; if no rank 0 runs it is stale: remove it; "
                           "else let the machines reach each other, or set MASTER_ADDR and MASTER_PORT", l->rank, limit, l->file, why.host, m.port, why.text);
    else if (!why.resolved)
        fail(e, EXIT_USAGE, "rank %d could not find rank 0's host \"%s\" (%s) within %g s: %s; set MASTER_ADDR to a name or address that every machine knows",
             l->rank, l->host, l->by_name, limit, why.text);
    else fail(e, EXIT_HANG, "rank %d could not reach rank 0 at %s port %d (%s) within %g s: %s; is rank 0 started, does it listen there, and may this machine reach that port?",
              l->rank, l->host, l->port, l->by_name, limit, why.text);
    return -1;
}
