/* The backend that computes nothing: it hands out addresses that nothing may touch, adds up memory by class, and CHECKs that the operands
 * of every op lie in live memory of sufficient size. For --dry-run of any model on any machine, and for finding wrong shapes.
 * Scratch is a matter of each real backend: here it is 0. */
#include "wrapper.h"
#include <stdlib.h>
#include <string.h>

typedef struct {
    uintptr_t begin;
    size_t bytes;
    MemClass class;
} Block;

typedef struct {
    Wrapper w;
    Block *blocks;            /* live, ascending: addresses are never used twice */
    size_t n, capacity;
    uintptr_t next;
} Null;

static void *null_alloc(Backend *b, MemClass class, const char *what, size_t bytes, Error *e) {
    Null *null = (Null *)b;
    const size_t step = bytes / 256 * 256 + 512; /* at least 256 unused bytes between blocks */
    if (step < bytes || null->next + step < null->next) {
        fail(e, EXIT_DATA, "%s: %zu bytes are more than any address space holds", what, bytes);
        return NULL;
    }
    if (null->n == null->capacity) {
        null->capacity = null->capacity ? 2 * null->capacity : 64;
        null->blocks = xrealloc(null->blocks, null->capacity * sizeof *null->blocks);
    }
    null->blocks[null->n++] = (Block){null->next, bytes, class};
    b->memory[class] += bytes;
    if (b->memory[class] > b->memory_peak[class]) b->memory_peak[class] = b->memory[class];
    void *p = (void *)null->next;
    null->next += step;
    return p;
}

static void null_release(Backend *b, void *p) {
    if (!p) return;
    Null *null = (Null *)b;
    size_t i = 0;
    while (i < null->n && null->blocks[i].begin != (uintptr_t)p) i++;
    CHECK(i < null->n, "release of %p, which is not allocated", p);
    b->memory[null->blocks[i].class] -= null->blocks[i].bytes;
    memmove(&null->blocks[i], &null->blocks[i + 1], (--null->n - i) * sizeof *null->blocks);
}

/* Whether [p, p + bytes) lies within one live block. */
static bool null_holds(const Null *null, const void *p, size_t bytes) {
    size_t low = 0, high = null->n; /* the last block that begins at or before p is low - 1 */
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (null->blocks[middle].begin <= (uintptr_t)p) low = middle + 1;
        else high = middle;
    }
    if (low == 0) return false;
    const Block *block = &null->blocks[low - 1];
    size_t at = (uintptr_t)p - block->begin;
    return at <= block->bytes && bytes <= block->bytes - at;
}

static void null_run(Backend *b, OpId op, const void *args) {
    Operand operands[OP_MAX_OPERANDS];
    int n = op_operands(b, op, args, operands);
    for (int i = 0; i < n; i++) {
        const Operand *o = &operands[i];
        CHECK(o->p || o->optional, "%s: operand %s is absent", op_names[op], o->name);
        CHECK(!o->p || null_holds((Null *)b, o->p, operand_bytes(b, o)), "%s: operand %s of %zu bytes is not within one allocation",
              op_names[op], o->name, operand_bytes(b, o));
    }
}

static void null_upload(Backend *b, void *to, const void *from, size_t bytes) {
    (void)from;
    CHECK(null_holds((Null *)b, to, bytes), "upload of %zu bytes is not within one allocation", bytes);
}

static void null_download(Backend *b, void *to, const void *from, size_t bytes) {
    CHECK(null_holds((Null *)b, from, bytes), "download of %zu bytes is not within one allocation", bytes);
    memset(to, 0, bytes);
}

static void null_fill_zero(Backend *b, void *p, size_t bytes) {
    CHECK(null_holds((Null *)b, p, bytes), "fill_zero of %zu bytes is not within one allocation", bytes);
}

static size_t null_room(Backend *b) { (void)b; return SIZE_MAX; }

static void null_post(Backend *b, int slot, const void *from, size_t bytes) {
    CHECK(slot >= 0 && slot < POST_SLOTS && bytes <= POST_BYTES, "post of %zu bytes in slot %d", bytes, slot);
    CHECK(null_holds((Null *)b, from, bytes), "post of %zu bytes is not within one allocation", bytes);
}

static void null_collect(Backend *b, int slot, void *to, size_t bytes) {
    (void)b, (void)slot;
    memset(to, 0, bytes);
}

static Staging *null_staging_create(Backend *b, const char *what, size_t bytes, Error *e) {
    (void)b, (void)what, (void)e;
    Staging *s = xcalloc(1, sizeof *s);
    s->bytes = bytes;
    return s;
}

static void null_staging_destroy(Backend *b, Staging *s) { (void)b, free(s); }

static void null_fetch(Backend *b, Staging *s, size_t at, const void *from, size_t bytes) {
    CHECK(null_holds((Null *)b, from, bytes) && at + bytes <= s->bytes, "fetch of %zu bytes is not within one allocation, or not within the staging", bytes);
}

static void null_fetch_wait(Backend *b, Staging *s) { (void)b, (void)s; }

static void null_bring(Backend *b, void *to, Staging *s, size_t at, size_t bytes) { null_fetch(b, s, at, to, bytes); }

static size_t null_saved_bytes(Backend *b, size_t B, size_t T, size_t H, size_t D) {
    (void)b, (void)D;
    return B * H * T * sizeof(float);
}

static void null_plan_begin(Backend *b) { (void)b; }
static bool null_plan_end(Backend *b, Error *e) { (void)b, (void)e; return true; }
static void null_mark(Backend *b, Mark mark, size_t unit) { (void)b, (void)mark, (void)unit; }
static void null_sync(Backend *b) { (void)b; }

static void null_destroy(Backend *b) {
    free(((Null *)b)->blocks);
    free(b);
}

Backend *null_backend_create(const char *dtype) {
    bool bf16 = strcmp(dtype, "bf16") == 0;
    CHECK(bf16 || strcmp(dtype, "fp32") == 0, "no compute type %s", dtype);
    Null *null = xcalloc(1, sizeof *null);
    null->next = 1 << 20;
    null->w.run = null_run;
    null->w.backend = (Backend){
        .name = "null", .dtype = bf16 ? "bf16" : "fp32", .elem_bytes = bf16 ? 2 : sizeof(float), .gelu_rounds_first = true,
        .alloc = null_alloc, .release = null_release, .upload = null_upload, .download = null_download,
        .fill_zero = null_fill_zero, .room = null_room, .post = null_post, .collect = null_collect,
        .staging_create = null_staging_create, .staging_destroy = null_staging_destroy, .fetch = null_fetch, .fetch_wait = null_fetch_wait,
        .bring = null_bring, .attention_saved_bytes = null_saved_bytes, .plan_begin = null_plan_begin,
        .plan_end = null_plan_end, .mark = null_mark, .replay = wrapper_replay, .record_end = wrapper_record_end, .sync = null_sync, .destroy = null_destroy,
    };
    wrapper_set_ops(&null->w.backend);
    return &null->w.backend;
}
