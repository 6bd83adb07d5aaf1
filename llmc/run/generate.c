/* Sampling, generation over a cache of keys and values, and evaluation in file order. Text and tokenizers are the caller's. */
#include "generate.h"
#include "../base/io.h"
#include "../base/rng.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- sampling ----------------------------------------------------------------------------------------------------- */

typedef struct {
    float logit;
    int32_t id;
} Candidate;

/* Likeliest first; equal ones by the lower id. */
static int compare_candidates(const void *a, const void *b) {
    const Candidate *x = a, *y = b;
    if (x->logit != y->logit) return x->logit < y->logit ? 1 : -1;
    return (x->id > y->id) - (x->id < y->id);
}

/* How many of the first n sorted candidates reach the share top_p of their total; at least one. */
static size_t nucleus(const double *weights, size_t n, double top_p) {
    double total = 0, sum = 0;
    for (size_t i = 0; i < n; i++) total += weights[i];
    for (size_t i = 0; i < n; i++)
        if ((sum += weights[i]) >= top_p * total) return i + 1;
    return n;
}

/* Index drawn in proportion to the weights; never one of weight 0. */
static size_t draw(const double *weights, size_t n, double uniform) {
    double total = 0, sum = 0;
    size_t last = 0;
    for (size_t i = 0; i < n; i++) total += weights[i];
    for (size_t i = 0; i < n; i++) {
        if (!(weights[i] > 0)) continue;
        last = i;
        if ((sum += weights[i]) > uniform * total) return i;
    }
    return last; /* uniform * total was rounded up to total */
}

int32_t sample_token(float *logits, size_t V, const Sampling *sampling, uint64_t index) {
    size_t best = 0;
    for (size_t i = 0; i < V; i++) {
        if (isnan(logits[i])) logits[i] = -INFINITY;
        if (logits[i] > logits[best]) best = i;
    }
    /* An infinite maximum leaves no proportions to draw from: the lowest id that has it. */
    if (!(sampling->temperature > 0) || sampling->top_k == 1 || isinf(logits[best])) return (int32_t)best;

    bool all_ids = sampling->top_k <= 0 || (uint64_t)sampling->top_k >= V;
    size_t n = all_ids ? V : (size_t)sampling->top_k;
    Candidate *candidates = xmalloc(V * sizeof *candidates);
    double *weights = xmalloc(V * sizeof *weights), max = logits[best];
    for (size_t i = 0; i < V; i++) candidates[i] = (Candidate){logits[i], (int32_t)i};
    if (!all_ids || sampling->top_p < 1) qsort(candidates, V, sizeof *candidates, compare_candidates);
    for (size_t i = 0; i < n; i++) weights[i] = exp(((double)candidates[i].logit - max) / sampling->temperature);
    if (sampling->top_p < 1) n = nucleus(weights, n, sampling->top_p);
    int32_t id = candidates[draw(weights, n, rng_uniform(sampling->seed, RNG_SAMPLE, 0, index))].id;
    free(weights);
    free(candidates);
    return id;
}

/* ---- generation --------------------------------------------------------------------------------------------------- */

/* What gives the logits of the next token: a decoder while the context fits the model; beyond that forwards over the last T tokens, as each
 * token then stands at another position than before and nothing that is cached holds. */
typedef struct {
    Decoder decoder;
    Acts acts;
    Stat scratch;
} Generator;

static void generator_close(Generator *g, GPT2 *model) {
    if (g->decoder.caches) gpt2_decoder_destroy(&g->decoder, model);
    if (g->acts.blocks) gpt2_acts_destroy(&g->acts, model);
    if (g->scratch.p) model->backend->release(model->backend, g->scratch.p);
}

/* For contexts of n tokens and more, up to `longest`. */
static bool generator_open(Generator *g, GPT2 *model, size_t n, size_t longest, Error *e) {
    Backend *be = model->backend;
    size_t T = model->config.T;
    *g = (Generator){0};
    bool ok = n > T || gpt2_decoder_create(&g->decoder, model, longest < T ? longest : T, n, e);
    if (ok && longest > T)
        ok = (g->scratch.p = be->alloc(be, MEM_OTHER, "logits of one row", model->config.V * sizeof(float), e)) &&
             gpt2_acts_create(&g->acts, model, 1, T, KEEP_NONE, false, e);
    if (!ok) generator_close(g, model);
    return ok;
}

static void next_logits(Generator *g, GPT2 *model, const int32_t *tokens, size_t n, float *logits) {
    size_t T = model->config.T, cached = g->decoder.length;
    if (n <= T) {
        gpt2_decode(model, &g->decoder, tokens + cached, n - cached, logits);
        return;
    }
    gpt2_forward(model, &g->acts, tokens + n - T, NULL);
    gpt2_logits(model, &g->acts, T - 1, g->scratch, logits);
}

size_t generate(GPT2 *model, int32_t *tokens, size_t n, size_t max_new, int32_t stop, const Sampling *sampling,
                void (*emit)(void *context, int32_t id), void *context, Error *e) {
    CHECK(n >= 1, "generation begins with at least one token");
    if (max_new == 0) return n;
    size_t V = model->config.V;
    Generator g;
    if (!generator_open(&g, model, n, n + max_new - 1, e)) return 0;
    float *logits = xmalloc(V * sizeof *logits);
    for (uint64_t i = 0; i < max_new; i++) {
        next_logits(&g, model, tokens, n, logits);
        tokens[n] = sample_token(logits, V, sampling, i);
        if (emit) emit(context, tokens[n]);
        if (tokens[n++] == stop) break;
    }
    free(logits);
    generator_close(&g, model);
    return n;
}

/* ---- evaluation --------------------------------------------------------------------------------------------------- */

/* Windows [first, first + n) into a batch of B rows; the rows beyond n are padding that no loss comes from. */
static bool read_batch(const Dataset *d, uint64_t first, size_t n, size_t B, size_t V, int32_t *inputs, int32_t *targets, Error *e) {
    for (size_t b = 0; b < n; b++)
        if (!dataset_window(d, first + b, V, inputs + b * d->T, targets + b * d->T, e)) return false;
    for (size_t i = n * d->T; i < B * d->T; i++) {
        inputs[i] = 0;
        targets[i] = -1;
    }
    return true;
}

/* Loss of the batch that begins with window w, added to *sum. */
static bool add_batch(GPT2 *model, Acts *acts, const Dataset *d, uint64_t w, size_t n, int32_t *inputs, float *losses, double *sum, Error *e) {
    size_t B = acts->B, T = acts->T;
    int32_t *targets = inputs + B * T;
    if (!read_batch(d, w, n, B, model->config.V, inputs, targets, e)) return false;
    gpt2_forward(model, acts, inputs, targets);
    model->backend->download(model->backend, losses, acts->losses.p, n * T * sizeof *losses);
    for (size_t i = 0; i < n * T; i++) *sum += (double)losses[i];
    return true;
}

bool evaluate(GPT2 *model, Acts *acts, const Dataset *dataset, uint64_t n_batches, Comm *comm, bool (*stopped)(void), Evaluation *out, Error *e) {
    size_t B = acts->B, T = acts->T;
    CHECK(dataset->T == T && dataset->n_windows, "windows of %zu tokens, activations for %zu", dataset->T, T);
    uint64_t windows = dataset->n_windows, ranks = comm ? (uint64_t)comm->size : 1, rank = comm ? (uint64_t)comm->rank : 0;
    if (n_batches && n_batches <= windows / B) windows = n_batches * B;
    int32_t *inputs = xmalloc(2 * B * T * sizeof *inputs);
    float *losses = xmalloc(B * T * sizeof *losses);
    double sum = 0;
    bool ok = true, cut = false;
    for (uint64_t first = 0; first < windows; first += ranks * B) {
        fault_point("batch", (int64_t)(first / (ranks * B)));
        double ends[2] = {stopped && stopped(), !ok};  /* this rank is asked to stop, or has failed: all end here */
        if (comm) comm_sum(comm, ends, 2);
        cut = ends[0] > 0;
        if (cut || ends[1] > 0) break;
        uint64_t w = first + rank * B;
        if (w < windows) ok = add_batch(model, acts, dataset, w, windows - w < B ? (size_t)(windows - w) : B, inputs, losses, &sum, e);
    }
    if (comm) ok = comm_agree(comm, ok, e);
    if (comm && ok) comm_sum(comm, &sum, 1);
    if (cut) *out = (Evaluation){.loss = NAN};
    else if (ok) *out = (Evaluation){.loss = sum / ((double)windows * (double)T), .tokens = windows * T};
    free(losses);
    free(inputs);
    return ok;
}
