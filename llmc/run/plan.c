/* What a run would need: memory by class, planned with the backend that allocates nothing. And, for --gpus, what it would take. For --dry-run and --batch auto. */
#include "../base/gpus.h"
#include "device.h"
#include "log.h"
#include "predict.h"
#include "session.h"
#include <math.h>
#include <stdarg.h>
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

static const GpuKind *planned_gpu(const Config *o) { return !o->gpus ? NULL : gpu_by_name(o->gpu_name ? o->gpu_name : "H100"); }

static const char *dtype_of(const Session *s) {
    char line[DEVICE_LINE];
    return s->backend ? s->backend->dtype : device_planned(s->options, line);
}

static bool plans_validation(const Session *s) {
    const Config *o = s->options;
    return o->eval_only ? false : s->val.n_shards > 0 || (!s->backend && (!o->data || data_is_text(o->data) || o->val));
}

static bool batch_bytes(const Session *s, size_t B, size_t *bytes, Error *e) {
    size_t memory[MEM_CLASS_COUNT];
    bool trains = !s->options->eval_only;
    *bytes = 0;
    if (!plan_memory(s, dtype_of(s), B, trains, !trains || plans_validation(s), memory, e)) return false;
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

typedef struct { size_t all, scratch, spare, usable; } Room;

/* What the ops' scratch takes at most, by backend: chunks of logits, tiles of attention; on a GPU 1 GiB of logits at most, the library's
 * workspace, and the buffers in which products are measured before the first step. A small device has smaller shapes. */
static Room room_of(const Session *s) {
    const GpuKind *gpu = planned_gpu(s->options);
    bool cpu = !gpu && strcmp(s->backend->name, "cpu") == 0;
    size_t all = gpu ? (size_t)gpu->memory : least_room(s), most = cpu ? (size_t)256 << 20 : (size_t)3 << 30;
    size_t scratch = all / 8 < most ? all / 8 : most, spare = all / 20;
    return (Room){all, scratch, spare, all > scratch + spare ? all - scratch - spare : 0};
}

/* Samples of a rank in a step, where --total-batch says. */
static size_t rank_samples(const Session *s) { return (size_t)s->options->total_batch / s->T / s->ranks.n; }

/* The largest micro-batch that fits, and divides rank_samples; 0: none. */
static bool fitting_batch(const Session *s, size_t usable, size_t *B, Error *e) {
    size_t samples = rank_samples(s), windows = (size_t)(s->options->eval_only ? &s->val : &s->train)->n_windows, bytes;
    size_t low = 0, high = samples ? samples : windows && windows < (1u << 20) ? windows : 1u << 20;
    while (low < high) {               /* low fits, high + 1 does not */
        size_t middle = low + (high - low + 1) / 2;
        if (!batch_bytes(s, middle, &bytes, e)) return false;
        if (bytes <= usable) low = middle;
        else high = middle - 1;
    }
    while (low && samples && samples % low) low--;
    *B = low;
    return true;
}

bool plan_batch(Session *s, Error *e) {
    Room room = room_of(s);
    size_t fits, bytes;
    if (!fitting_batch(s, room.usable, &fits, e)) return false;
    s->B = fits ? fits : 1;
    if (!batch_bytes(s, s->B, &bytes, e)) return false;
    char text[4][32];
    format_bytes(text[0], (double)bytes), format_bytes(text[1], (double)room.all), format_bytes(text[2], (double)room.scratch), format_bytes(text[3], (double)room.spare);
    if (!fits && bytes > room.usable)
        return fail(e, EXIT_DATA, "--batch auto: one sample of %zu tokens needs %s, the device has %s, of which %s for scratch and 5 %% (%s) are left alone; "
                    "use a smaller model, a shorter --seq-len or --recompute block", s->T, text[0], text[1], text[2], text[3]);
    fprintf(stderr, "batch: %zu (the largest that fits%s: needs %s of %s; %s for scratch and 5 %% are left alone)\n", s->B,
            rank_samples(s) ? " and divides the samples of --total-batch" : "", text[0], text[1], text[2]);
    return true;
}

/* ---- --dry-run ---- */

enum { GIBI = 1 << 30, FULL_TOKENS = 16384 /* of the micro-batches in the runs that predict_mfu knows, at least */ };

static void row(const char *name, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void row(const char *name, const char *format, ...) {
    va_list args;
    printf("  %-16s ", name);
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf("\n");
}

static bool print_fit(const Session *s, const size_t memory[MEM_CLASS_COUNT], Error *e) {
    Room room = room_of(s);
    size_t total = 0, most;
    for (int i = 0; i < MEM_CLASS_COUNT; i++) total += memory[i];
    if (!fitting_batch(s, room.usable, &most, e)) return false;
    row("memory of a GPU", "%.1f GiB, and %.1f for scratch and 5 %% left alone, of %.1f GiB: %s", (double)total / GIBI,
        (double)(room.all - room.usable) / GIBI, (double)room.all / GIBI, total <= room.usable ? "fits" : "DOES NOT FIT");
    if (most) row("", "the largest --batch that fits%s is %zu", rank_samples(s) ? " and divides --total-batch" : "", most);
    else row("", "no --batch fits; take %s--recompute block, a GPU with more memory, or a smaller model", s->ranks.sharded ? "more GPUs, " : "--zero 1, ");
    return true;
}

static void print_messages(const char *name, double bytes, double seconds, double exposed) {
    row(name, "%.1f MB sent by a GPU in %.2f ms: the step waits for %.2f, %.2f are hidden", 1e-6 * bytes, 1e3 * seconds, 1e3 * exposed, 1e3 * (seconds - exposed));
}

/* Time and cost of the run's tokens. */
static void print_budget(const Session *s, double tokens_per_second, double price) {
    double tokens = (double)s->schedule.steps * (double)s->samples_per_step * (double)s->T, hours = tokens / tokens_per_second / 3600;
    char count[32], name[48], cost[64] = "";
    format_count(count, tokens);
    snprintf(name, sizeof name, "%s tokens", count);
    if (price > 0) snprintf(cost, sizeof cost, ", cost %.2f", hours * (double)s->ranks.n * price);
    row(name, "%.2f days (%.1f hours), %.1f GPU-hours%s; without validation, checkpoints and stops", hours / 24, hours, hours * (double)s->ranks.n, cost);
}

static void print_prediction(const Session *s, const ParamLayout *layout, const size_t *elements) {
    const Config *o = s->options;
    const GpuKind *gpu = planned_gpu(o);
    const char *whose = "as --assume-mfu says";
    Cluster c = {.gpus = (size_t)o->gpus, .nodes = o->nodes ? (size_t)o->nodes : 1, .peak_flops = gpu->peak_flops,
                 .bus = o->bus > 0 ? 1e9 * o->bus : gpu->bus, .network = 1e9 * (o->network > 0 ? o->network : 50)};
    c.mfu = o->assume_mfu > 0 ? o->assume_mfu : predict_mfu(gpu->name, (double)layout->n_params, &whose);
    Work w = {.elements = elements, .n_units = layout->n_units, .flops_per_token = gpt2_flops_per_token(&s->shape, s->T), .tokens = s->B * s->T,
              .n_micro = s->n_micro, .wire_bytes = strcmp(o->reduce_dtype, "bf16") == 0 ? 2 : 4, .weight_bytes = 2, .sharded = s->ranks.sharded,
              .recompute = keep_by_name(o->recompute) == KEEP_RESIDUAL};
    Prediction p = predict_step(&c, &w);
    char count[2][32];
    row("while computing", "MFU %.1f %% of %.1f TFLOP/s bf16, %s%s", 100 * c.mfu, 1e-12 * c.peak_flops, whose,
        w.tokens < FULL_TOKENS && !(o->assume_mfu > 0) ? "; micro-batches this small reach less" : "");
    row("compute", "%.1f ms a step, %zu micro-batch%s of %zu tokens on each GPU", 1e3 * p.compute, s->n_micro, s->n_micro == 1 ? "" : "es", w.tokens);
    if (s->ranks.n > 1) {
        print_messages(w.sharded ? "reduce-scatter" : "all-reduce", p.reduce_bytes, p.reduce, p.reduce_exposed);
        if (w.sharded) print_messages("all-gather", p.gather_bytes, p.gather, p.gather_exposed);
        char beyond[96] = "";
        if (c.nodes > 1) snprintf(beyond, sizeof beyond, ", %g from it to the others%s", 1e-9 * c.network, o->network > 0 ? "" : " (no --network was given)");
        row("over", "%.0f GB/s inside a node%s", 1e-9 * c.bus, beyond);
    }
    format_count(count[0], p.tokens_per_second), format_count(count[1], 86400 * p.tokens_per_second);
    row("step", "%.1f ms, %zu samples, MFU %.1f %%", 1e3 * p.step, s->samples_per_step, 100 * p.mfu);
    row("speed", "%s tokens/s (%.0f a GPU), %s tokens a day", count[0], p.tokens_per_second / (double)s->ranks.n, count[1]);
    print_budget(s, p.tokens_per_second, o->gpu_price);
}

static bool predict(const Session *s, const size_t memory[MEM_CLASS_COUNT], Error *e) {
    const Config *o = s->options;
    Backend *null = null_backend_create("bf16");
    GPT2 model;                        /* whose units are those of as many ranks */
    printf("prediction for %lld x %s, %lld a node (from sizes and rates; nothing was measured):\n", (long long)config_planned_ranks(o), planned_gpu(o)->name,
           (long long)o->gpus);
    bool ok = print_fit(s, memory, e) && gpt2_create_ranks(&model, null, &s->shape, true, s->ranks, e);
    if (ok) {
        size_t *elements = xcalloc(model.layout.n_units, sizeof *elements);
        for (size_t unit = 0; unit < model.layout.n_units; unit++) elements[unit] = model.layout.unit_begin[unit + 1] - model.layout.unit_begin[unit];
        print_prediction(s, &model.layout, elements);
        free(elements);
        gpt2_destroy(&model);
    }
    null->destroy(null);
    return ok;
}

int run_dry(Session *s) {
    Error e = {0};
    size_t memory[MEM_CLASS_COUNT];
    if (!plan_memory(s, dtype_of(s), s->B, true, plans_validation(s), memory, &e)) return error_print(&e);
    printf("plan (nothing is allocated%s; scratch of the ops comes on top):\n", s->ranks.n > 1 ? "; memory is of one rank" : "");
    session_print(s, memory, SIZE_MAX, stdout);
    return !s->options->gpus || predict(s, memory, &e) ? EXIT_OK : error_print(&e);
}
