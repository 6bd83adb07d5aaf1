/* The step as a queue of messages beside a queue of blocks, and the MFU that others reached. */
#include "predict.h"
#include <math.h>
#include <string.h>

/* ---- what others reported ----------------------------------------------------------------------------------------- */

/* Until there are records of our own. FLOPs as everywhere here: 6 N + 6 L C T a token, over the dense bf16 peak.
 * H100: llm.c on 8 x H100 (PERFORMANCE.md): 124M 468-471k tokens/s a GPU, 1558M 46.8-47.7k; the middle of each.
 * A100: llm.c on 8 x A100 80GB (discussion 481 and its author's words elsewhere): 124M, 18,865 steps of 524,288 tokens in about 90 minutes; 350M, 60,000 such
 * steps (FORMATS.md) in 14 hours. To two digits, and whole runs, validation included.
 * All are of whole steps: what those runs waited for messages is in them, and the prediction adds its own, 0.3 % at 124M. */
typedef struct { const char *gpu; double n_params, mfu; const char *whose; } Reported;
static const char on_h100[] = "as llm.c reported for 124M and 1558M on 8 H100", on_a100[] = "as llm.c's runs of 124M and 350M took on 8 A100";
static const Reported reported[] = {
    {"H100", 124439808, 0.381, on_h100},
    {"H100", 1557611200, 0.469, on_h100},
    {"A100", 124439808, 0.59, on_a100},
    {"A100", 354823168, 0.57, on_a100},
};

double predict_mfu(const char *gpu, double n_params, const char **whose) {
    const Reported *low = strncmp(gpu, "A100", 4) == 0 ? &reported[2] : &reported[0], *high = low + 1;
    double at = log(n_params / low->n_params) / log(high->n_params / low->n_params);
    *whose = low->whose;
    return low->mfu + (high->mfu - low->mfu) * fmin(fmax(at, 0), 1);
}

/* ---- messages ----------------------------------------------------------------------------------------------------- */

/* In two stages: the G GPUs of a node pass (G-1)/G of the bytes S to each other over the bus; each then has S/G, which the M nodes share out: (M-1)/M of it,
 * times the G GPUs that use a node's network at once. Together a GPU sends (G-1)/G S + (M-1)/M S/G = (W-1)/W S. The time before the first byte is left out. */
double predict_message(const Cluster *c, double bytes) {
    double G = (double)c->gpus, M = (double)c->nodes;
    return (c->gpus > 1 ? (G - 1) / G * bytes / c->bus : 0) + (c->nodes > 1 ? (M - 1) / M * bytes / c->network : 0);
}

/* Seconds from a unit's last gradient to the end of its messages. Without ZeRO-1 the sums come back to all, in float32. */
static double reduce_seconds(const Cluster *c, const Work *w, size_t unit) {
    double n = (double)w->elements[unit];
    return predict_message(c, n * (double)w->wire_bytes) + (w->sharded ? 0 : predict_message(c, n * (double)sizeof(float)));
}

static double gather_seconds(const Cluster *c, const Work *w, size_t unit) {
    return w->sharded ? predict_message(c, (double)w->elements[unit] * (double)w->weight_bytes) : 0;
}

/* ---- the step ----------------------------------------------------------------------------------------------------- */

/* Seconds that a micro-batch's forward spends in one block and in the head; a backward takes twice as long, and once more for what is recomputed. */
typedef struct { double block, head; } Forward;

static Forward forward_of(const Cluster *c, const Work *w) {
    double head = 6.0 * (double)(w->elements[0] + w->elements[w->n_units - 1]), blocks = fmax(w->flops_per_token - head, 0);
    double rate = 3 * c->peak_flops * c->mfu / (double)w->tokens; /* a forward is a third of the FLOPs */
    return (Forward){blocks / (double)(w->n_units - 2) / rate, (w->flops_per_token - blocks) / rate};
}

/* The last micro-batch's backward from the end of the head's on: final norm, blocks from the last to the first, embedding, whose gradient is the head's too. A
 * unit's message follows those before it, once its gradient is final. What is left when the backward ends is waited for. */
static double exposed_reduce(const Cluster *c, const Work *w, Forward f) {
    double now = 0, sent = reduce_seconds(c, w, w->n_units - 1);
    for (size_t unit = w->n_units - 2; unit >= 1; unit--) {
        now += (w->recompute ? 3 : 2) * f.block;
        sent = fmax(sent, now) + reduce_seconds(c, w, unit);
    }
    return fmax(sent, now) + reduce_seconds(c, w, 0) - now;
}

/* The next forward: embedding, blocks, final norm with head, each as soon as its weights are there. */
static double exposed_gather(const Cluster *c, const Work *w, Forward f) {
    double there = gather_seconds(c, w, 0), now = there, waited = there;
    for (size_t unit = 1; unit < w->n_units; unit++) {
        there += gather_seconds(c, w, unit);
        waited += fmax(there - now, 0);
        now = fmax(there, now) + f.block;
    }
    return waited;
}

Prediction predict_step(const Cluster *c, const Work *w) {
    Forward f = forward_of(c, w);
    double W = (double)(c->gpus * c->nodes), blocks = (double)(w->n_units - 2), tokens = (double)w->tokens * (double)w->n_micro, elements = 0;
    Prediction p = {.compute = (double)w->n_micro * (3 * f.head + (w->recompute ? 4 : 3) * blocks * f.block)};
    for (size_t unit = 0; unit < w->n_units; unit++) {
        elements += (double)w->elements[unit];
        p.reduce += reduce_seconds(c, w, unit), p.gather += gather_seconds(c, w, unit);
    }
    p.reduce_bytes = (W - 1) / W * elements * (double)(w->wire_bytes + (w->sharded ? 0 : sizeof(float)));
    p.gather_bytes = w->sharded ? (W - 1) / W * elements * (double)w->weight_bytes : 0;
    p.reduce_exposed = exposed_reduce(c, w, f), p.gather_exposed = exposed_gather(c, w, f);
    p.step = p.compute + p.reduce_exposed + p.gather_exposed;
    p.tokens_per_second = W * tokens / p.step;
    p.mfu = p.tokens_per_second * w->flops_per_token / (W * c->peak_flops);
    return p;
}
