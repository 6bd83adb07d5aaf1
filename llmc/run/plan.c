/* What a run would need: memory by class, planned with the backend that allocates nothing. For --dry-run and --batch auto. */
#include "device.h"
#include "log.h"
#include "session.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Bytes by class for micro-batches of B, scratch of the ops left out; trains: with gradients, moments and what a backward needs. */
static bool plan_memory(const Session *s, const char *dtype, size_t B, bool trains, bool validates, size_t memory[MEM_CLASS_COUNT], Error *e) {
    Backend *null = null_backend_create(dtype);
    GPT2 model;
    Acts acts = {0}, val_acts = {0};
    bool ok = gpt2_create_ranks(&model, null, &s->shape, trains, s->ranks, e);
    if (ok) {
        ok = (!trains || gpt2_acts_create(&acts, &model, B, s->T, keep_by_name(s->options->recompute), true, e)) &&
             (!validates || gpt2_acts_create(&val_acts, &model, B, s->T, KEEP_NONE, false, e));
        memcpy(memory, null->memory, sizeof null->memory);
        if (val_acts.blocks) gpt2_acts_destroy(&val_acts, &model);
        if (acts.blocks) gpt2_acts_destroy(&acts, &model);
        gpt2_destroy(&model);
    }
    null->destroy(null);
    return ok;
}

/* ---- --batch auto ---- */

/* What the ops' scratch takes at most, by backend: chunks of logits, tiles of attention; on a GPU 1 GiB of logits at most, the library's
 * workspace, and the buffers in which products are measured before the first step. A small device has smaller shapes. */
static size_t scratch_allowance(const Backend *b, size_t room) {
    size_t most = strcmp(b->name, "cpu") == 0 ? (size_t)256 << 20 : (size_t)3 << 30;
    return room / 8 < most ? room / 8 : most;
}

static bool batch_bytes(const Session *s, size_t B, size_t *bytes, Error *e) {
    size_t memory[MEM_CLASS_COUNT];
    bool trains = !s->options->eval_only;
    *bytes = 0;
    if (!plan_memory(s, s->backend->dtype, B, trains, !trains || s->val.n_shards > 0, memory, e)) return false;
    for (int i = 0; i < MEM_CLASS_COUNT; i++) *bytes += memory[i];
    return true;
}

/* Of all ranks, so that they choose alike. Ranks that compute in the host's memory share it. */
static size_t least_room(const Session *s) {
    double *rooms = xcalloc((size_t)s->comm->size, sizeof *rooms), least;
    rooms[s->comm->rank] = (double)s->backend->room(s->backend) / (s->backend->host_memory ? s->comm->local_size : 1);
    comm_sum(s->comm, rooms, (size_t)s->comm->size);
    least = rooms[0];
    for (int r = 1; r < s->comm->size; r++) least = fmin(least, rooms[r]);
    free(rooms);
    return (size_t)least;
}

bool plan_batch(Session *s, Error *e) {
    size_t room = least_room(s), scratch = scratch_allowance(s->backend, room), spare = room / 20, kept_back = spare + scratch;
    size_t usable = room > kept_back ? room - kept_back : 0, samples = (size_t)s->options->total_batch / s->T / s->ranks.n, bytes;
    const Dataset *data = s->options->eval_only ? &s->val : &s->train;
    size_t low = 0, high = samples ? samples : data->n_windows < (1u << 20) ? (size_t)data->n_windows : 1u << 20;
    while (low < high) {               /* low fits, high + 1 does not */
        size_t middle = low + (high - low + 1) / 2;
        if (!batch_bytes(s, middle, &bytes, e)) return false;
        if (bytes <= usable) low = middle;
        else high = middle - 1;
    }
    while (low && samples && samples % low) low--;
    s->B = low ? low : 1;
    if (!batch_bytes(s, s->B, &bytes, e)) return false;
    char text[4][32];
    format_bytes(text[0], (double)bytes), format_bytes(text[1], (double)room), format_bytes(text[2], (double)scratch), format_bytes(text[3], (double)spare);
    if (!low && bytes > usable)
        return fail(e, EXIT_DATA, "--batch auto: one sample of %zu tokens needs %s, the device has %s, of which %s for scratch and 5 %% (%s) are left alone; "
                    "use a smaller model, a shorter --seq-len or --recompute block", s->T, text[0], text[1], text[2], text[3]);
    fprintf(stderr, "batch: %zu (the largest that fits%s: needs %s of %s; %s for scratch and 5 %% are left alone)\n", s->B,
            samples ? " and divides the samples of --total-batch" : "", text[0], text[1], text[2]);
    return true;
}

/* ---- --dry-run ---- */

int run_dry(Session *s) {
    Error e = {0};
    const Config *o = s->options;
    size_t memory[MEM_CLASS_COUNT];
    bool val = s->val.n_shards > 0 || !o->data || data_is_text(o->data) || o->val;
    if (!plan_memory(s, device_planned(o, s->backend_line), s->B, true, val, memory, &e)) return error_print(&e);
    printf("plan (nothing is allocated%s; scratch of the ops comes on top):\n", s->ranks.n > 1 ? "; memory is of one rank" : "");
    session_print(s, memory, SIZE_MAX, stdout);
    return EXIT_OK;
}
