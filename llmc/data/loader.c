/* The order of samples and a thread that reads them ahead.
 * One reader fills a ring of micro-batches; one consumer takes them in order. Which sample comes when is arithmetic on
 * the position (permute), so there is nothing to save but that integer. Does not open files (shards.c). */
#include "loader.h"
#include "../base/rng.h"
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

enum { FEISTEL_ROUNDS = 8, DEFAULT_AHEAD = 4 };

/* ---- order -------------------------------------------------------------------------------------------------------- */

/* One pass of a balanced Feistel network on 2*half bits: a bijection whatever the round function is. */
static uint64_t feistel(uint64_t seed, uint64_t epoch, unsigned half, uint64_t x) {
    uint64_t mask = ((uint64_t)1 << half) - 1, left = x >> half, right = x & mask;
    for (uint32_t round = 0; round < FEISTEL_ROUNDS; round++) {
        uint64_t counter = (epoch >> 32) << 32 | right; /* right has at most 32 bits */
        uint64_t next = left ^ (rng_u32(seed, RNG_DATA + round, (uint32_t)epoch, counter) & mask);
        left = right;
        right = next;
    }
    return left << half | right;
}

uint64_t permute(uint64_t seed, uint64_t epoch, uint64_t n, uint64_t i) {
    CHECK(i < n, "index %" PRIu64 " of %" PRIu64, i, n);
    unsigned half = 1;
    while (half < 32 && ((n - 1) >> (2 * half))) half++;
    /* Cycle walking: follow i's cycle in the larger domain until it is back inside [0, n); under four steps on average. */
    do i = feistel(seed, epoch, half, i);
    while (i >= n);
    return i;
}

/* ---- reading ahead ------------------------------------------------------------------------------------------------ */

struct Loader {
    LoaderConfig config;
    size_t per_step;          /* micro-batches of this rank in a step */
    size_t n_slots;           /* ahead + the one that the caller holds */
    int32_t *inputs, *targets; /* (n_slots, B, T) */
    uint64_t handed;          /* micro-batches handed out; the consumer's own */
    pthread_t thread;
    pthread_mutex_t lock;     /* guards what follows */
    pthread_cond_t filled, freed;
    uint64_t n_filled, n_freed; /* micro-batches filled by the reader, given back by the consumer */
    bool stop, failed;
    Error error;              /* why the reader ended, when failed */
};

static int32_t *slot(const Loader *l, int32_t *ring, uint64_t k) {
    return ring + (size_t)(k % l->n_slots) * l->config.B * l->config.dataset->T;
}

/* Micro-batch k of this rank since the start position. */
static bool read_micro_batch(Loader *l, uint64_t k, Error *e) {
    const LoaderConfig *c = &l->config;
    const Dataset *d = c->dataset;
    uint64_t first = c->position + k / l->per_step * c->global_batch + c->rank * (c->global_batch / c->world) + k % l->per_step * c->B;
    for (size_t b = 0; b < c->B; b++) {
        uint64_t p = first + b, w = permute(c->seed, p / d->n_windows, d->n_windows, p % d->n_windows);
        if (!dataset_window(d, w, c->V, slot(l, l->inputs, k) + b * d->T, slot(l, l->targets, k) + b * d->T, e)) return false;
    }
    return true;
}

static void *reader(void *argument) {
    Loader *l = argument;
    Error error = {0};
    for (uint64_t k = 0;; k++) {
        pthread_mutex_lock(&l->lock);
        while (!l->stop && k - l->n_freed >= l->n_slots) pthread_cond_wait(&l->freed, &l->lock);
        bool stop = l->stop;
        pthread_mutex_unlock(&l->lock);
        if (stop) return NULL;
        bool ok = read_micro_batch(l, k, &error);
        pthread_mutex_lock(&l->lock);
        if (ok) l->n_filled++;
        else {
            l->failed = true;
            l->error = error;
        }
        pthread_cond_signal(&l->filled);
        pthread_mutex_unlock(&l->lock);
        if (!ok) return NULL;
    }
}

static bool config_check(const LoaderConfig *c, Error *e) {
    size_t T = c->dataset->T, G = c->global_batch;
    if (c->world < 1 || c->rank >= c->world)
        return fail(e, EXIT_USAGE, "found rank %zu of %zu processes, expected a rank below the number of processes, which is at least 1",
                    c->rank, c->world);
    if (c->B < 1) return fail(e, EXIT_USAGE, "found a micro-batch of 0 samples, expected at least 1; raise --batch");
    if (G < 1 || G % c->world || G / c->world % c->B)
        return fail(e, EXIT_USAGE,
                    "found a total batch of %zu samples (%zu tokens), expected a multiple of %zu processes x micro-batch %zu; "
                    "choose --total-batch as a multiple of %zu tokens, or another --batch", G, G * T, c->world, c->B, c->world * c->B * T);
    if (c->position % G)
        return fail(e, EXIT_USAGE,
                    "found the data position %" PRIu64 ", expected a multiple of the total batch of %zu samples; continue with "
                    "the --total-batch that the run was started with", c->position, G);
    if (c->V < 1) return fail(e, EXIT_USAGE, "found a vocabulary of 0 tokens, expected at least 1; raise --vocab-size");
    return true;
}

/* Signals are for the main thread, which knows what to do about them. */
static int start_reader(Loader *l) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int status = pthread_create(&l->thread, NULL, reader, l);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return status;
}

static void release(Loader *l) {
    pthread_cond_destroy(&l->freed);
    pthread_cond_destroy(&l->filled);
    pthread_mutex_destroy(&l->lock);
    free(l->inputs);
    free(l->targets);
    free(l);
}

Loader *loader_create(const LoaderConfig *config, Error *e) {
    CHECK(config->dataset && config->dataset->n_windows, "the dataset is not open");
    if (!config_check(config, e)) return NULL;
    Loader *l = xcalloc(1, sizeof *l);
    l->config = *config;
    l->per_step = config->global_batch / config->world / config->B;
    l->n_slots = (config->ahead ? config->ahead : DEFAULT_AHEAD) + 1;
    l->inputs = xcalloc(l->n_slots * config->B, config->dataset->T * sizeof(int32_t));
    l->targets = xcalloc(l->n_slots * config->B, config->dataset->T * sizeof(int32_t));
    pthread_mutex_init(&l->lock, NULL);
    pthread_cond_init(&l->filled, NULL);
    pthread_cond_init(&l->freed, NULL);
    int status = start_reader(l);
    if (!status) return l;
    fail(e, EXIT_DATA, "cannot start the thread that reads the data: %s", strerror(status));
    release(l);
    return NULL;
}

void loader_destroy(Loader *loader) {
    if (!loader) return;
    pthread_mutex_lock(&loader->lock);
    loader->stop = true;
    pthread_cond_signal(&loader->freed);
    pthread_mutex_unlock(&loader->lock);
    pthread_join(loader->thread, NULL);
    release(loader);
}

bool loader_next(Loader *loader, const int32_t **inputs, const int32_t **targets, Error *e) {
    pthread_mutex_lock(&loader->lock);
    loader->n_freed = loader->handed; /* gives back the one handed out before */
    pthread_cond_signal(&loader->freed);
    while (loader->n_filled == loader->handed && !loader->failed) pthread_cond_wait(&loader->filled, &loader->lock);
    bool ok = loader->n_filled > loader->handed;
    if (!ok && e) *e = loader->error;
    pthread_mutex_unlock(&loader->lock);
    if (!ok) return false;
    *inputs = slot(loader, loader->inputs, loader->handed);
    *targets = slot(loader, loader->targets, loader->handed);
    loader->handed++;
    return true;
}

uint64_t loader_position(const Loader *loader) {
    return loader->config.position + loader->handed / loader->per_step * loader->config.global_batch;
}
