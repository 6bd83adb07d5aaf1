/* What a step on many GPUs takes, from sizes and rates alone: nothing is measured and nothing of a device is asked. For --dry-run --gpus. */
#ifndef LLMC_RUN_PREDICT_H
#define LLMC_RUN_PREDICT_H
#include <stdbool.h>
#include <stddef.h>
#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    size_t gpus, nodes;       /* of a node; W = gpus x nodes */
    double peak_flops;        /* a GPU's dense products a second */
    double mfu;               /* the part of it that a GPU reaches while it computes; model FLOPs alone, 6 N + 6 L C T a token */
    double bus, network;      /* bytes a second: a GPU to those of its node; a node to the other nodes */
} Cluster;

typedef struct {
    const size_t *elements;   /* by unit: 0 the embedding, 1..n_units-2 the blocks, last the final norm; padding included */
    size_t n_units;
    double flops_per_token;
    size_t tokens, n_micro;   /* of a rank: tokens of a micro-batch, micro-batches of a step */
    size_t wire_bytes;        /* of a gradient on its way */
    size_t weight_bytes;
    bool sharded;             /* ZeRO-1 */
    bool recompute;           /* the blocks' forward again in the backward */
} Work;

typedef struct {
    double compute;                             /* seconds of a step */
    double reduce_bytes, gather_bytes;          /* that a GPU sends in a step, and receives */
    double reduce, gather;                      /* seconds of all messages, one after the other */
    double reduce_exposed, gather_exposed;      /* what of it the step waits for */
    double step, mfu, tokens_per_second;        /* of all GPUs */
} Prediction;

/* Seconds of one reduce-scatter or one all-gather of `bytes`. */
double predict_message(const Cluster *c, double bytes);
Prediction predict_step(const Cluster *c, const Work *w);

/* The MFU that others reported for whole steps on a GPU of that name (GPU_NAMES), or on H100 where there is no report; between two sizes in proportion to
 * log N, beyond the ends that of the end. *whose says so in words. */
double predict_mfu(const char *gpu, double n_params, const char **whose);

#ifdef __cplusplus
}
#endif
#endif
