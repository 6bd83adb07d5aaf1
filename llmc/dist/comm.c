/* The communicator of one process alone, and the conveniences over any communicator. */
#include "comm.h"
#include <stdlib.h>
#include <string.h>

void comm_sum(Comm *c, double *data, size_t n) { c->wait(c, c->all_reduce(c, data, n)); }

void comm_barrier(Comm *c) {
    double nothing = 0;
    comm_sum(c, &nothing, 1);
}

bool comm_agree(Comm *c, bool ok, Error *e) {
    double *bad = xcalloc((size_t)c->size, sizeof *bad); /* (size) 1 where that rank is not ok */
    bad[c->rank] = !ok;
    comm_sum(c, bad, (size_t)c->size);
    int lowest = 0;
    while (lowest < c->size && !(bad[lowest] > 0)) lowest++;
    free(bad);
    if (lowest == c->size) return true;
    Error theirs = {.code = EXIT_USAGE, .text = "failed without a reason"};
    if (lowest == c->rank && e) {
        memset(&theirs, 0, sizeof theirs);
        theirs.code = e->code;
        memcpy(theirs.text, e->text, strnlen(e->text, sizeof theirs.text - 1));
    }
    c->wait(c, c->broadcast(c, &theirs, sizeof theirs, lowest));
    if (!e) return false;
    *e = theirs;
    return lowest == c->rank ? false : fail_in(e, "rank %d", lowest);
}

/* A text of length L travels as L + 1 and its bytes; NULL as 0. */
char **comm_gather_texts(Comm *c, const char *text) {
    size_t size = (size_t)c->size, rank = (size_t)c->rank, longest = 0;
    double *lengths = xcalloc(size, sizeof *lengths);
    lengths[rank] = text ? (double)strlen(text) + 1 : 0;
    comm_sum(c, lengths, size);
    for (size_t r = 0; r < size; r++) longest = (size_t)lengths[r] > longest ? (size_t)lengths[r] : longest;
    char *all = xcalloc(size, longest), **texts = NULL;
    if (text) memcpy(all + rank * longest, text, strlen(text));
    c->wait(c, c->all_gather(c, all, size * longest));
    if (!rank) {
        texts = xcalloc(size, sizeof *texts);
        for (size_t r = 0; r < size; r++) texts[r] = lengths[r] > 0 ? xstrdup(all + r * longest) : NULL;
    }
    free(all);
    free(lengths);
    return texts;
}

char *comm_broadcast_text(Comm *c, const char *text, int root) {
    uint64_t bytes = c->rank == root && text ? strlen(text) + 1 : 0;
    c->wait(c, c->broadcast(c, &bytes, sizeof bytes, root));
    if (!bytes) return NULL;
    char *copy = c->rank == root ? xstrdup(text) : xcalloc((size_t)bytes, 1);
    c->wait(c, c->broadcast(c, copy, (size_t)bytes, root));
    return copy;
}

/* ---- alone: every operation is done before it begins ---------------------------------------------------------------- */

static CommTicket alone_reduce_scatter(Comm *c, float *data, size_t n, Wire wire) { (void)c; (void)data; (void)n; (void)wire; return 0; }
static CommTicket alone_all_gather(Comm *c, void *data, size_t bytes) { (void)c; (void)data; (void)bytes; return 0; }
static CommTicket alone_all_reduce(Comm *c, double *data, size_t n) { (void)c; (void)data; (void)n; return 0; }
static CommTicket alone_broadcast(Comm *c, void *data, size_t bytes, int root) { (void)c; (void)data; (void)bytes; (void)root; return 0; }
static CommTicket alone_call(Comm *c, void (*fn)(void *arg), void *arg) { (void)c; fn(arg); return 0; }
static void alone_wait(Comm *c, CommTicket ticket) { (void)c; (void)ticket; }
static void alone_phase(Comm *c, const char *text, int64_t step, double limit) { (void)c; (void)text; (void)step; (void)limit; }
static void alone_destroy(Comm *c) { free(c); }

Comm *comm_alone(void) {
    Comm *c = xcalloc(1, sizeof *c);
    *c = (Comm){.name = "alone", .rank = 0, .size = 1, .local_rank = 0, .local_size = 1, .reduce_scatter = alone_reduce_scatter,
                .all_gather = alone_all_gather, .all_reduce = alone_all_reduce, .broadcast = alone_broadcast, .call = alone_call, .wait = alone_wait,
                .phase = alone_phase, .destroy = alone_destroy};
    return c;
}
