/* The forwarding that all wrappers share; one generated function per op. */
#include "wrapper.h"
#include <stdlib.h>
#include <string.h>

#define OP(name, Args) static void wrapped_##name(Backend *b, const Args *args) { ((Wrapper *)b)->run(b, OP_##name, args); }
LLMC_OPS(OP)
#undef OP

void wrapper_set_ops(Backend *backend) {
#define SET(name, Args) backend->name = wrapped_##name;
    LLMC_OPS(SET)
#undef SET
}

/* inner's figures of memory use become the wrapper's */
static void copy_memory(Backend *b) {
    memcpy(b->memory, b->inner->memory, sizeof b->memory);
    memcpy(b->memory_peak, b->inner->memory_peak, sizeof b->memory_peak);
}

void *wrapper_alloc(Backend *b, MemClass class, const char *what, size_t bytes, Error *e) {
    void *p = b->inner->alloc(b->inner, class, what, bytes, e);
    copy_memory(b);
    return p;
}

void wrapper_release(Backend *b, void *p) {
    b->inner->release(b->inner, p);
    copy_memory(b);
}

static void wrapped_upload(Backend *b, void *to, const void *from, size_t bytes) { b->inner->upload(b->inner, to, from, bytes); }
static void wrapped_download(Backend *b, void *to, const void *from, size_t bytes) { b->inner->download(b->inner, to, from, bytes); }
static void wrapped_fill_zero(Backend *b, void *p, size_t bytes) { b->inner->fill_zero(b->inner, p, bytes); }

static size_t wrapped_room(Backend *b) { return b->inner->room(b->inner); }
static void wrapped_post(Backend *b, int slot, const void *from, size_t bytes) { b->inner->post(b->inner, slot, from, bytes); }
static void wrapped_collect(Backend *b, int slot, void *to, size_t bytes) { b->inner->collect(b->inner, slot, to, bytes); }

static Staging *wrapped_staging_create(Backend *b, const char *what, size_t bytes, Error *e) { return b->inner->staging_create(b->inner, what, bytes, e); }
static void wrapped_staging_destroy(Backend *b, Staging *s) { b->inner->staging_destroy(b->inner, s); }
static void wrapped_fetch(Backend *b, Staging *s, size_t at, const void *from, size_t bytes) { b->inner->fetch(b->inner, s, at, from, bytes); }
static void wrapped_fetch_wait(Backend *b, Staging *s) { b->inner->fetch_wait(b->inner, s); }
static void wrapped_bring(Backend *b, void *to, Staging *s, size_t at, size_t bytes) { b->inner->bring(b->inner, to, s, at, bytes); }

static void *wrapped_side_begin(Backend *b) { return b->inner->side_begin(b->inner); }
static void wrapped_side_end(Backend *b, size_t marker) { b->inner->side_end(b->inner, marker); }
static void wrapped_side_wait(Backend *b, size_t marker) { b->inner->side_wait(b->inner, marker); }

static size_t wrapped_saved_bytes(Backend *b, size_t B, size_t T, size_t H, size_t D) {
    return b->inner->attention_saved_bytes(b->inner, B, T, H, D);
}

void wrapper_plan_begin(Backend *b) {
    ((Wrapper *)b)->planning = true;
    b->inner->plan_begin(b->inner);
}

bool wrapper_plan_end(Backend *b, Error *e) {
    ((Wrapper *)b)->planning = false;
    bool ok = b->inner->plan_end(b->inner, e);
    copy_memory(b);
    return ok;
}

void wrapper_mark(Backend *b, Mark mark, size_t unit) { b->inner->mark(b->inner, mark, unit); }
bool wrapper_replay(Backend *b, uint64_t key) { (void)b, (void)key; return false; }
void wrapper_record_end(Backend *b, uint64_t key) { (void)b, (void)key; }
static void wrapped_print_plans(Backend *b, FILE *out) { b->inner->print_plans(b->inner, out); }
static bool wrapped_health(Backend *b, DeviceHealth *health) { return b->inner->health(b->inner, health); }
void wrapper_sync(Backend *b) { b->inner->sync(b->inner); }

void wrapper_destroy(Backend *b) {
    free(((Wrapper *)b)->name);
    free(b);
}

void wrapper_init(Wrapper *w, const char *kind, Backend *inner, void (*run_op)(Backend *, OpId, const void *args)) {
    w->name = xasprintf("%s(%s)", kind, inner->name);
    w->run = run_op;
    w->backend = (Backend){
        .name = w->name, .dtype = inner->dtype, .elem_bytes = inner->elem_bytes, .gelu_rounds_first = inner->gelu_rounds_first,
        .device = inner->device, .device_id = inner->device_id, .device_count = inner->device_count, .peak_flops = inner->peak_flops, .host_memory = inner->host_memory, .inner = inner,
        .alloc = wrapper_alloc, .release = wrapper_release, .upload = wrapped_upload, .download = wrapped_download,
        .fill_zero = wrapped_fill_zero, .room = wrapped_room, .post = wrapped_post, .collect = wrapped_collect,
        .staging_create = wrapped_staging_create, .staging_destroy = wrapped_staging_destroy, .fetch = wrapped_fetch, .fetch_wait = wrapped_fetch_wait,
        .bring = wrapped_bring, .attention_saved_bytes = wrapped_saved_bytes, .plan_begin = wrapper_plan_begin,
        .plan_end = wrapper_plan_end, .mark = wrapper_mark, .replay = wrapper_replay, .record_end = wrapper_record_end, .sync = wrapper_sync,
        .print_plans = inner->print_plans ? wrapped_print_plans : NULL, .health = inner->health ? wrapped_health : NULL, .destroy = wrapper_destroy,
    };
    if (inner->side_begin) {
        w->backend.side_begin = wrapped_side_begin, w->backend.side_end = wrapped_side_end, w->backend.side_wait = wrapped_side_wait;
    }
    wrapper_set_ops(&w->backend);
    copy_memory(&w->backend);
}
