/* Data parallel training as a wrapper of a backend: it hangs on the marks and on the ops of the update, and the model and the step know nothing
 * of it. Gradients are summed over the ranks unit by unit while the backward goes on: each rank gets the sum of its own part (and, where the model is not
 * sharded, then all parts). Loss, norm and wish to stop are summed before the decision, so it is the same on all ranks. Weights that the ranks have updated in
 * parts are collected unit by unit, and waited for by the next forward where it needs them.
 * Source of the partition: Rajbhandari et al. 2020, "ZeRO", stage 1. */
#ifndef LLMC_DIST_ZERO_H
#define LLMC_DIST_ZERO_H
#include "../gpt2.h"
#include "comm.h"
#ifdef __cplusplus
extern "C" {
#endif

/* wire: how gradients travel. Neither inner nor comm is destroyed with it. */
Backend *zero_backend_create(Backend *inner, Comm *comm, Wire wire);
/* The model whose marks it follows: one that was created on it (or on a wrapper of it), with ranks as the communicator has them. Before the first step. */
void zero_attach(Backend *zero, const GPT2 *model);

#ifdef __cplusplus
}
#endif
#endif
