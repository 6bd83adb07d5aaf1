/* Counts the calls per op, plan mode left out. */
#include "wrapper.h"
#include <stdlib.h>

typedef struct {
    Wrapper w;
    uint64_t calls[OP_COUNT];
} Count;

static void count_run(Backend *b, OpId op, const void *args) {
    Count *count = (Count *)b;
    if (!count->w.planning) count->calls[op]++;
    op_run(b->inner, op, args);
}

Backend *count_backend_create(Backend *inner) {
    Count *count = xcalloc(1, sizeof *count);
    wrapper_init(&count->w, "count", inner, count_run);
    return &count->w.backend;
}

const uint64_t *count_backend_calls(const Backend *count) { return ((const Count *)count)->calls; }
