/* Data parallel training as a wrapper of a backend: it hangs on the marks and on the ops of the update, and the model and the step know nothing
 * of it. Gradients are summed over the ranks unit by unit while the backward goes on: each rank gets the sum of its own part (and, where the model is not
 * sharded, then all parts). Loss, norm and wishes (to stop, to save) are summed before the decision, so it is the same on all ranks. Weights that the ranks have updated in
 * parts are collected unit by unit, and waited for by the next forward where it needs them.
 * Source of the partition: Rajbhandari et al. 2020, "ZeRO", stage 1. */
#ifndef LLMC_DIST_ZERO_H
#define LLMC_DIST_ZERO_H
#include "../gpt2.h"
#include "comm.h"
#include "nccl.h"
#ifdef __cplusplus
extern "C" {
#endif

/* wire: how gradients travel. Neither inner nor comm is destroyed with it. */
Backend *zero_backend_create(Backend *inner, Comm *comm, Wire wire);
/* Gradients, weights and the sums of the decision go between the devices by this communicator, whose operations are in inner's queue beside the ops, in
 * place of by the host's memory; the host then waits for nothing in a step. The same ranks; not destroyed with it. Before zero_attach. */
void zero_between_devices(Backend *zero, Comm *devices);
/* The queue beside the ops of a device that has one, for nccl_comm_create; with room_bytes of its memory where gradients travel in bf16. False: there is no room (EXIT_DATA). */
bool zero_queue_create(DeviceQueue *queue, Backend *device, Wire wire, size_t room_bytes, Error *e);
void zero_queue_destroy(DeviceQueue *queue); /* after the communicator; of zeros: nothing */
/* The model whose marks it follows: one that was created on it (or on a wrapper of it), with ranks as the communicator has them. Before the first step. */
bool zero_attach(Backend *zero, const GPT2 *model, Error *e);
/* Who wants to know when each unit's gradients and weights were under way (row "ranks", from the communicator's thread), and how long the host waited for
 * them (row "waiting for ranks"). NULL: nobody. Between steps. */
typedef void (*ZeroSpan)(void *context, const char *row, const char *name, size_t unit, double begin, double end);
void zero_spans(Backend *zero, ZeroSpan span, void *context);

#ifdef __cplusplus
}
#endif
#endif
