/* Text from a model, and loss on a dataset. Both use activations of their own, never those of training. */
#ifndef LLMC_RUN_GENERATE_H
#define LLMC_RUN_GENERATE_H
#include "../data/loader.h"
#include "../dist/comm.h"
#include "../gpt2.h"
#ifdef __cplusplus
extern "C" {
#endif
typedef struct {
    double temperature;       /* 0: greedy */
    int64_t top_k;            /* 0: all */
    double top_p;             /* 1: all */
    uint64_t seed;
} Sampling;
/* One id from V logits (changed in place). index counts the draws, so that a draw depends on (seed, index) alone.
 * Filters in this order: temperature, top_k, top_p (Holtzman et al. 2020) of what top_k left; ties go to the lower id,
 * one token always stays. NaN counts as -infinity; when the largest logit is infinite (all are -infinity, or one is
 * +infinity) the result is the lowest id that has it. */
int32_t sample_token(float *logits, size_t V, const Sampling *sampling, uint64_t index);
/* Extends tokens[0..n), n >= 1, to at most n + max_new; stops after id `stop`, which is kept (-1: never stops). The context is the
 * last config.T tokens. emit (may be NULL) is called per token as it comes. tokens must have room. Returns the new length,
 * or 0 with *e set when memory lacks. */
size_t generate(GPT2 *model, int32_t *tokens, size_t n, size_t max_new, int32_t stop, const Sampling *sampling,
                void (*emit)(void *context, int32_t id), void *context, Error *e);

typedef struct {
    double loss;              /* mean nats per token */
    uint64_t tokens;
} Evaluation;
/* Mean loss over windows [0, n_batches*B) in file order (n_batches 0: all windows, the last batch may be partial). Summed in double in window order.
 * Ranks (comm; NULL: one) take the batches in turn, and all have the result: the sum of each, then over the ranks.
 * stopped (may be NULL) is asked before each batch, on all ranks: where one says true it ends on all, with out->tokens 0. */
bool evaluate(GPT2 *model, Acts *acts, const Dataset *dataset, uint64_t n_batches, Comm *comm, bool (*stopped)(void), Evaluation *out, Error *e);
#ifdef __cplusplus
}
#endif
#endif
