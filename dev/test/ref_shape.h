/* The sizes of a reference call (ref_ops.h), and how large they may be. */
#ifndef LLMC_TEST_REF_SHAPE_H
#define LLMC_TEST_REF_SHAPE_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
typedef struct {
    size_t B, T, C, H, D, V, N, OC, chunk;
    bool gelu_in, gelu_out;
    int32_t *ids;
} Shape;
enum { REF_LARGEST_C = 16384, REF_LARGEST_T = 512, REF_LARGEST_V = 131072 };
#endif
