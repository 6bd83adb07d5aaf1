/* The order of training data. The p-th sample of a run is window permute(seed, p / n_windows, p % n_windows): a keyed
 * permutation per epoch (a Feistel network with cycle walking: O(1) memory, no state). So the global batch of step s is samples
 * [s*G, (s+1)*G), a function of (seed, dataset, G) alone, never of ranks, micro-batch or accumulation, and the position in the data is one integer. */
#ifndef LLMC_DATA_LOADER_H
#define LLMC_DATA_LOADER_H
#include "shards.h"
#ifdef __cplusplus
extern "C" {
#endif

/* A bijection of [0, n), n >= 1, chosen by (seed, epoch). Source: Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains". */
uint64_t permute(uint64_t seed, uint64_t epoch, uint64_t n, uint64_t i);

typedef struct Loader Loader;
typedef struct {
    const Dataset *dataset;
    size_t V;                 /* every id must be below */
    uint64_t seed;
    size_t global_batch;      /* G: samples per step, all ranks */
    size_t rank, world;       /* this rank takes samples [rank*G/world, (rank+1)*G/world) of each step; world divides G */
    size_t B;                 /* micro-batch; divides G/world */
    uint64_t position;        /* samples consumed by the run so far, all ranks: where to start, a multiple of G */
    size_t ahead;             /* micro-batches read ahead by a thread; 0 = 4 */
} LoaderConfig;
Loader *loader_create(const LoaderConfig *config, Error *e);
void loader_destroy(Loader *loader);
/* The next micro-batch, (B, T) each; valid until the next call. Blocks only if the reader is behind. False: a read failed
 * (file, offset in *e). */
bool loader_next(Loader *loader, const int32_t **inputs, const int32_t **targets, Error *e);
uint64_t loader_position(const Loader *loader);   /* samples of whole steps handed out, all ranks */

#ifdef __cplusplus
}
#endif
#endif
