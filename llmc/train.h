/* One optimizer step: accumulate, reduce, decide, update. Knows nothing of files, devices or ranks. */
#ifndef LLMC_TRAIN_H
#define LLMC_TRAIN_H
#include "gpt2.h"
#ifdef __cplusplus
extern "C" {
#endif

/* What the host tells a step. */
typedef struct {
    float lr, beta1, beta2, eps, weight_decay, grad_clip;
    float loss_limit, norm_limit;  /* INFINITY: never skip for it */
    uint64_t seed;
    int64_t step;
    int rounding;                  /* a ROUND_ value */
    bool stop, save;               /* this rank asks for an end; for a checkpoint */
} StepParams;

/* What came of it. */
typedef struct {
    float loss, grad_norm;
    int skip;                      /* SKIP_ value */
    int64_t updates;               /* applied so far */
    int stop, save;                /* ranks that asked for an end, for a checkpoint: the same on all */
    bool given_up;                 /* a micro-batch was not to be had: no weight, moment or count has changed; the rest is 0 */
} StepResult;

typedef struct {
    GPT2 *model;
    Acts *acts;
    Step state;                    /* backend memory */
    int64_t issued, collected;     /* steps since trainer_create */
} Trainer;

bool trainer_create(Trainer *trainer, GPT2 *model, Acts *acts, Error *e);
void trainer_destroy(Trainer *trainer);
void trainer_set_updates(Trainer *trainer, int64_t updates);  /* when resuming */

/* Gives micro-batch i of the step: (B, T) tokens and targets, valid until the next call. False: there is none; the step is given up. */
typedef bool (*MicroBatchFn)(void *context, size_t i, const int32_t **tokens, const int32_t **targets);

/* Issues a step of n_micro micro-batches (of this rank; all ranks have as many) of acts->B x acts->T and does not wait for it. All gradients, m, v, master and params follow the
 * contract of ops.h; a skipped step leaves weights and moments bit for bit as they were. False: given up, nothing to collect.
 * At most POST_SLOTS steps may be issued and not collected. */
bool train_issue(Trainer *trainer, const StepParams *params, size_t n_micro, MicroBatchFn next, void *context);
/* What came of the oldest step that is not collected; waits for it. */
StepResult train_result(Trainer *trainer);
/* Both at once, with no other step in between. */
StepResult train_step(Trainer *trainer, const StepParams *params, size_t n_micro, MicroBatchFn next, void *context);

#ifdef __cplusplus
}
#endif
#endif
