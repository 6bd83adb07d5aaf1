/* Text from a model, and loss on a dataset. Both use activations of their own, never those of training. */
#ifndef LLMC_RUN_GENERATE_H
#define LLMC_RUN_GENERATE_H
#include "../data/loader.h"
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
/* One id from V logits (changed in place). index counts the draws, so that a draw depends on (seed, index) alone. */
int32_t sample_token(float *logits, size_t V, const Sampling *sampling, uint64_t index);
/* Extends tokens[0..n) to at most n + max_new; stops at id `stop` (-1: never). The context is the last config.T tokens. emit (may be
 * NULL) is called per token as it comes. tokens must have room. Returns the new length, or 0 with *e set when memory lacks. */
size_t generate(GPT2 *model, int32_t *tokens, size_t n, size_t max_new, int32_t stop, const Sampling *sampling,
                void (*emit)(void *context, int32_t id), void *context, Error *e);

typedef struct {
    double loss;              /* mean nats per token */
    uint64_t tokens;
} Evaluation;
/* Mean loss over windows [0, n_batches*B) in file order (n_batches 0: all windows, the last batch may be partial). Summed in double in window order. */
bool evaluate(GPT2 *model, Acts *acts, const Dataset *dataset, uint64_t n_batches, Evaluation *out, Error *e);
#ifdef __cplusplus
}
#endif
#endif
