/* Token shards: files of token ids, opened as one long dataset of sample windows.
 * Formats (told apart by the first int32): 20240520 version 1 (uint16), 20240801 version 7 (uint32), both with a 1,024-byte header
 * whose int32 [2] is the token count; else headerless uint16. A count that does not agree with the file's size, odd sizes,
 * unknown versions are errors with file and numbers; where the int32 count overflowed (files over 2 GiB), the size decides. */
#ifndef LLMC_DATA_SHARDS_H
#define LLMC_DATA_SHARDS_H
#include "../base/error.h"
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    char *path;
    int fd;
    unsigned token_bytes;     /* 2 or 4 */
    uint64_t header_bytes;    /* 0 or 1024 */
    uint64_t n_tokens;
    uint64_t n_windows;       /* (n_tokens - 1) / T, 0 for a shorter file */
    uint64_t first_window;    /* sum of n_windows of the shards before */
} Shard;

/* Window w covers tokens [k T, k T + T] of its shard, k = w - first_window: T inputs and T targets, one token shared
 * with the next window. */
typedef struct {
    Shard *shards;            /* sorted by path */
    size_t n_shards;
    size_t T;
    uint64_t n_windows, n_tokens;
    char fingerprint[33];     /* XXH3-128 over names (without folders), sizes, headers, and 64 KiB at both ends of each shard */
} Dataset;

/* pattern: a path or a glob (quoted by the user). EXIT_DATA: nothing matches, bad file, no window of T+1 tokens. T 0: no windows, shards of any length. */
bool dataset_open(Dataset *dataset, const char *pattern, size_t T, Error *e);
void dataset_close(Dataset *dataset);
/* Reads window w: inputs[0..T) and targets[0..T) (targets[t] = token t+1). Each id must be < V: else EXIT_DATA with file, byte
 * offset, the id and V. pread; safe from any thread. */
bool dataset_window(const Dataset *dataset, uint64_t w, size_t V, int32_t *inputs, int32_t *targets, Error *e);
/* Tokens [from, from + n) of one shard, as they stand there (ids from 2^31 on come out negative). */
bool shard_tokens(const Shard *shard, uint64_t from, size_t n, int32_t *tokens, Error *e);
/* True when the file's first int32 is a shard magic or its name ends in .bin; false: treat it as text. */
bool shard_is_tokens(const char *path);
/* Writing: streams tokens to a shard (format 20240520 when V <= 65536, else 20240801); header filled in on commit. */
typedef struct ShardWriter ShardWriter;
ShardWriter *shard_create(const char *path, size_t V, Error *e);
bool shard_append(ShardWriter *w, const int32_t *tokens, size_t n, Error *e);
bool shard_commit(ShardWriter *w, Error *e);  /* frees w */
void shard_abandon(ShardWriter *w);           /* removes the file, frees w */

#ifdef __cplusplus
}
#endif
#endif
