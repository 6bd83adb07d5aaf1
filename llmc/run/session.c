/* Settles what a run is made of; prints it as a table. */
#include "session.h"
#include "../base/io.h"
#include "../dist/zero.h"
#include "log.h"
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

enum { WIRE_ROOM = 64 << 20 /* bytes: parts of megabytes also between many ranks */ };

static Wire wire_of(const Config *o) { return strcmp(o->reduce_dtype, "bf16") == 0 ? WIRE_BF16 : WIRE_FLOAT32; }

Keep keep_by_name(const char *recompute) {
    return strcmp(recompute, "block") == 0 ? KEEP_RESIDUAL : strcmp(recompute, "gelu") == 0 ? KEEP_NO_GELU : KEEP_ALL;
}

/* A run directory stands for its newest checkpoint. */
static bool settle_init_from(Session *s, Error *e) {
    const char *path = s->options->init_from;
    if (!path) return true;
    char newest[4096];
    char *config = path_join(path, "config.json");
    bool is_run = path_is_dir(path) && !path_exists(config);
    free(config);
    if (!is_run) return (s->init_from = xstrdup(path)) != NULL;
    if (checkpoint_newest(path, newest, stderr, e)) return (s->init_from = xstrdup(newest)) != NULL;
    return e->code ? false : fail(e, EXIT_DATA, "--init-from %s: neither a model (config.json) nor a run directory with checkpoints", path);
}

static bool settle_tokenizer(Session *s, Error *e) {
    if (s->options->tokenizer) s->tokenizer_dir = xstrdup(s->options->tokenizer);
    else if (s->init_from) s->tokenizer_dir = import_tokenizer_dir(s->init_from);
    return !s->tokenizer_dir || (s->tokenizer = tokenizer_load(s->tokenizer_dir, e)) != NULL;
}

/* An option that must agree with the model that --init-from names. */
static bool agrees(const char *name, int64_t given, size_t has, Error *e) {
    return !given || (size_t)given == has ||
           fail(e, EXIT_USAGE, "--%s %lld contradicts --init-from, whose model has %zu; leave the option out", name, (long long)given, has);
}

static bool settle_shape(Session *s, Error *e) {
    const Config *o = s->options;
    GPT2Config *c = &s->shape;
    if (s->init_from) {
        if (o->model) return fail(e, EXIT_USAGE, "--model %s and --init-from exclude each other: the shape comes from the weights", o->model);
        if (!import_config(s->init_from, c, e) || !gpt2_config_check(c, e) || !agrees("layers", o->layers, c->L, e) ||
            !agrees("channels", o->channels, c->C, e) || !agrees("heads", o->heads, c->H, e) || !agrees("vocab-size", o->vocab_size, c->V, e))
            return false;
    } else if (o->model) {
        if (!gpt2_config_by_name(c, o->model, e)) return false;
    } else *c = (GPT2Config){.L = 4, .C = 128, .H = 4, .T = 128};
    if (!s->init_from) {
        if (o->layers) c->L = (size_t)o->layers;
        if (o->channels) c->C = (size_t)o->channels;
        if (o->heads) c->H = (size_t)o->heads;
        if (o->seq_len) c->T = (size_t)o->seq_len;
    }
    s->T = o->seq_len ? (size_t)o->seq_len : c->T;
    if (s->T > c->T) return fail(e, EXIT_USAGE, "--seq-len %zu is longer than the %zu positions of the model in --init-from", s->T, c->T);
    GPT2Config trial = *c;            /* checked now, before any text is tokenized; the vocabulary follows */
    trial.V = c->V ? c->V : 1;
    return gpt2_config_check(&trial, e);
}

/* The backend comes before any work on data, so that a missing GPU is said at once. */
static bool settle_device(Session *s, Error *e) {
    const Config *o = s->options;
    if (o->dry_run) return device_planned(o, s->backend_line) != NULL;
    if (o->plan_file) s->plan_file = xstrdup(o->plan_file);
    else if (!o->eval_only && !o->generate) s->plan_file = path_join(o->out, "matmul_plans.txt");
    s->backend = s->device = device_open(o, s->plan_file, s->comm->local_rank, s->comm->local_size, s->backend_line, e);
    if (s->backend && s->comm->size > 1) s->backend = zero_backend_create(s->device, s->comm, wire_of(o));
    return s->backend != NULL;
}

/* The vocabulary, once a tokenizer is known (before any text is tokenized, where it is given) or is known not to be. */
static bool settle_vocabulary(Session *s, Error *e) {
    size_t has = s->tokenizer ? tokenizer_vocab_size(s->tokenizer) : 0, asked = (size_t)s->options->vocab_size;
    GPT2Config *c = &s->shape;
    if (s->init_from) {
        if (has > c->V)
            return fail(e, EXIT_USAGE, "the tokenizer of %s has %zu tokens, the model only %zu; give the model's own with --tokenizer", s->tokenizer_dir, has, c->V);
        return true;
    }
    if (has && asked && asked < has && s->options->tokenizer)
        return fail(e, EXIT_USAGE, "--vocab-size %zu is less than the %zu tokens of --tokenizer %s", asked, has, s->options->tokenizer);
    if (has) c->V = s->options->tokenizer && asked ? asked : has;
    else if (asked) c->V = asked;
    else if (s->options->dry_run && data_is_text(s->options->data)) c->V = default_vocab_size(s->options->data);
    else {
        c->V = s->train.n_shards && s->train.shards[0].token_bytes == 4 ? 128256 : 50257;
        if (!s->options->dry_run || s->options->data)
            fprintf(stderr, "vocabulary: %zu (%s; --vocab-size or --tokenizer to change)\n", c->V, c->V == 50257 ? "GPT-2's" : "Llama 3's, as the shards are uint32");
    }
    return gpt2_config_check(c, e);
}

/* Micro-batch and total batch; needs no data. */
static bool settle_batch(Session *s, Error *e) {
    const Config *o = s->options;
    size_t T = s->T, B = s->B, unit = B * T * s->ranks.n, total = o->total_batch ? (size_t)o->total_batch : unit;
    char ranks[40] = "";
    if (s->ranks.n > 1) snprintf(ranks, sizeof ranks, " x %zu processes", s->ranks.n);
    if ((double)B * (double)T * (double)s->shape.C * (double)s->shape.L > 1e15)
        return fail(e, EXIT_USAGE, "--batch %zu of %zu tokens needs more memory than any machine has for %zu layers of %zu channels; give a smaller --batch",
                    B, T, s->shape.L, s->shape.C);
    if (total < unit)
        return fail(e, EXIT_USAGE, "--total-batch %zu tokens is less than one micro-batch, --batch %zu x --seq-len %zu%s = %zu; lower --batch or raise --total-batch",
                    total, B, T, ranks, unit);
    if (total % unit)
        return fail(e, EXIT_USAGE, "--total-batch %zu tokens is not a multiple of --batch %zu x --seq-len %zu%s = %zu; nearest multiples are %zu and %zu",
                    total, B, T, ranks, unit, total / unit * unit, (total / unit + 1) * unit);
    s->samples_per_step = total / T;
    s->n_micro = total / unit;
    return true;
}

static bool settle_length(Session *s, Error *e) {
    const Config *o = s->options;
    size_t total = s->samples_per_step * s->T, steps = o->steps ? (size_t)o->steps : 2000;
    if (o->tokens) steps = ((size_t)o->tokens + total - 1) / total;
    if (o->epochs && s->train.n_shards) steps = ((size_t)o->epochs * s->train.n_windows + s->samples_per_step - 1) / s->samples_per_step;
    else if (o->epochs && o->dry_run)
        return fail(e, EXIT_USAGE, "--epochs with --dry-run needs the number of tokens: give --data as token shards, or --steps or --tokens in place of --epochs");
    int64_t warmup = o->warmup >= 0 ? o->warmup : steps / 20 < 700 ? (int64_t)(steps / 20) : 700;
    s->schedule = (Schedule){.lr = o->lr, .final_fraction = o->final_lr, .warmup = warmup, .steps = (int64_t)steps, .decay_fraction = o->decay_fraction};
    return schedule_kind_by_name(&s->schedule.kind, o->lr_schedule, e);
}

/* One process a run directory: two writers would mix their token files and checkpoints. */
static bool take_lock(Session *s, Error *e) {
    const Config *o = s->options;
    if (o->dry_run || o->eval_only || o->generate || s->comm->rank) return true;
    if (!dir_create(o->out, e)) return fail_in(e, "--out %s", o->out);
    char *path = path_join(o->out, "lock");
    s->lock = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    bool ok = s->lock >= 0 || fail(e, EXIT_STORAGE, "%s: cannot create: %s; give a writable --out", path, strerror(errno));
    if (ok && flock(s->lock, LOCK_EX | LOCK_NB) != 0)
        ok = fail(e, EXIT_USAGE, "%s is in use by another process; wait for it, stop it, or give another --out", o->out);
    free(path);
    return ok;
}

/* The micro-batch can be chosen once the vocabulary is known. */
static bool chooses_batch(const Session *s) { return !s->options->batch && !s->options->generate; }

/* What needs no other rank. */
static bool open_here(Session *s, Error *e) {
    const Config *options = s->options;
    s->B = options->batch ? (size_t)options->batch : 1;
    return settle_init_from(s, e) && settle_tokenizer(s, e) && settle_shape(s, e) && settle_device(s, e) && (chooses_batch(s) || settle_batch(s, e)) &&
           (!s->tokenizer || settle_vocabulary(s, e)) && take_lock(s, e) && (options->generate || prepare_data(s, e)) && settle_vocabulary(s, e);
}

/* One GPU a rank, unless asked otherwise. GPUs are compared by their ids: some launchers show each process its own alone, as the first. */
static bool check_gpus(const Session *s, Error *e) {
    enum { ID = 64 };
    Comm *c = s->comm;
    if (c->size == 1) return true;
    char *ids = xcalloc((size_t)c->size, ID);
    if (s->device->device_id) snprintf(ids + c->rank * ID, ID, "%s", s->device->device_id);
    c->wait(c, c->all_gather(c, ids, (size_t)c->size * ID));
    bool ok = true;
    for (int a = 0; a < c->size && ok && !s->options->share_gpus; a++)
        for (int b = 0; b < a && ok; b++)
            if (ids[a * ID] && !memcmp(ids + a * ID, ids + b * ID, ID))
                ok = fail(e, EXIT_USAGE, "ranks %d and %d have the same GPU (%s): found %d processes on this machine and %d GPU%s, expected one GPU for each; start %d here, or give "
                          "--share-gpus (they then compute by turns)", b, a, s->device->device, c->local_size, s->device->device_count, s->device->device_count == 1 ? "" : "s", s->device->device_count);
    free(ids);
    return ok;
}

/* NCCL, where all ranks have a GPU of their own and the library is there. */
static bool settle_transport(Session *s, Error *e) {
    const Config *o = s->options;
    Comm *c = s->comm;
    Error why = {0};
    if (c->size == 1) return true;
    snprintf(s->transport_line, sizeof s->transport_line, "%s", c->name);
    bool asked = strcmp(o->transport, "nccl") == 0, possible = comm_agree(c, s->device->side_begin || fail(&why, EXIT_USAGE, "--transport nccl: found %s, expected --device cuda on all ranks", s->device->name), &why);
    if (strcmp(o->transport, "host") == 0 || strcmp(o->transport, "mpi") == 0 || o->share_gpus) return true;
    if (!possible || !s->device->side_begin) return asked ? (*e = why, false) : true;
    bool ok = zero_queue_create(&s->queue, s->device, wire_of(o), WIRE_ROOM, &why);
    s->devices = comm_agree(c, ok, &why) ? nccl_comm_create(c, &s->queue, o->timeout, &why) : NULL;
    if (s->devices) {
        zero_between_devices(s->backend, s->devices);
        snprintf(s->transport_line, sizeof s->transport_line, "%s", s->devices->name);
    } else if (asked || why.code != EXIT_USAGE) return *e = why, false;
    else snprintf(s->transport_line, sizeof s->transport_line, "%s (%.200s)", c->name, why.text);
    return true;
}

static bool open_together(Session *s, Error *e) {
    if (!s->options->dry_run && (!check_gpus(s, e) || !settle_transport(s, e))) return false;
    return (!chooses_batch(s) || (plan_batch(s, e) && settle_batch(s, e))) && settle_length(s, e);
}

/* Rank 0 first: it takes the lock and makes token files, which the others then find. */
bool session_open(Session *s, const Config *options, Comm *comm, Error *e) {
    size_t n = options->dry_run ? (size_t)config_planned_ranks(options) : (size_t)comm->size;
    *s = (Session){.options = options, .comm = comm, .lock = -1, .ranks = {.rank = (size_t)comm->rank, .n = n, .sharded = n > 1 && strcmp(options->zero, "0") != 0}};
    comm->phase(comm, "start", -1, 10 * options->timeout);
    if (!comm_agree(comm, comm->rank || open_here(s, e), e)) return false;
    ranks_silent(comm, true);
    bool ok = comm_agree(comm, !comm->rank || open_here(s, e), e) && open_together(s, e);
    ranks_silent(comm, false);
    return comm_agree(comm, ok, e);
}

void session_close(Session *s) {
    if (s->train.n_shards) dataset_close(&s->train);
    if (s->val.n_shards) dataset_close(&s->val);
    if (s->tokenizer) tokenizer_free(s->tokenizer);
    if (s->backend && s->backend != s->device) s->backend->destroy(s->backend);
    if (s->devices) s->devices->destroy(s->devices);
    zero_queue_destroy(&s->queue);
    if (s->device) s->device->destroy(s->device);
    free(s->plan_file);
    free(s->init_from);
    free(s->tokenizer_dir);
    if (s->lock >= 0) close(s->lock);
    *s = (Session){.lock = -1};
}

static void row(FILE *out, const char *name, const char *value) { fprintf(out, "  %-16s %s\n", name, value); }

static void print_data(const Session *s, FILE *out) {
    char text[400], n[32];
    for (int i = 0; i < 2; i++) {
        const Dataset *d = i ? &s->val : &s->train;
        if (!d->n_shards) continue;
        format_count(n, (double)d->n_tokens);
        snprintf(text, sizeof text, "%s tokens in %zu file%s, %llu samples", n, d->n_shards, d->n_shards == 1 ? "" : "s", (unsigned long long)d->n_windows);
        row(out, i ? "validation data" : "training data", text);
    }
}

void session_print(const Session *s, const size_t memory[MEM_CLASS_COUNT], size_t room, FILE *out) {
    const GPT2Config *c = &s->shape;
    char text[400], n[32];
    ParamLayout layout;
    gpt2_layout(&layout, c, 1);
    snprintf(text, sizeof text, "L %zu, C %zu, heads %zu, T %zu, vocabulary %zu (padded %zu)", c->L, c->C, c->H, c->T, c->V, c->Vp);
    row(out, "model", text);
    format_count(n, (double)layout.n_params);
    snprintf(text, sizeof text, "%zu (%s)", layout.n_params, n);
    row(out, "parameters", text);
    snprintf(text, sizeof text, "%.0f per token (6 N + 6 L C T)", gpt2_flops_per_token(c, s->T));
    row(out, "FLOPs", text);
    gpt2_layout_free(&layout);
    row(out, "backend", s->backend_line);
    size_t total = 0;
    for (int i = 0; i < MEM_CLASS_COUNT; i++) {
        if (!memory[i]) continue;
        total += memory[i];
        format_bytes(n, (double)memory[i]);
        snprintf(text, sizeof text, "%12s  %s", n, mem_class_names[i]);
        row(out, "memory", text);
    }
    format_bytes(n, (double)total);
    snprintf(text, sizeof text, "%12s  together", n);
    row(out, "memory", text);
    format_bytes(n, (double)room);
    snprintf(text, sizeof text, "%12s  free beside them", n);
    if (room != SIZE_MAX) row(out, "memory", text);
    format_bytes(n, (double)checkpoint_copy_bytes(c, s->ranks));
    snprintf(text, sizeof text, "%12s  of the host%s, for copies that checkpoints are written from (--save-async)", n, s->ranks.n > 1 ? ", by the first rank" : "");
    if (!s->options->eval_only && strcmp(s->options->save_async, "on") == 0) row(out, "memory", text);
    print_data(s, out);
    if (!s->options->eval_only) {
        size_t tokens = s->samples_per_step * s->T;
        int length = snprintf(text, sizeof text, "%zu tokens a step: micro-batch %zu x %zu tokens, %zu accumulated", tokens, s->B, s->T, s->n_micro);
        if (s->ranks.n > 1) snprintf(text + length, sizeof text - (size_t)length, ", %zu ranks", s->ranks.n);
        row(out, "batch", text);
        const char *over = s->transport_line[0] ? s->transport_line : s->comm->size > 1 ? s->comm->name : "";
        snprintf(text, sizeof text, "%zu%s%s, AdamW's state %s", s->ranks.n, *over ? " over " : "", over,
                 s->ranks.sharded ? "in parts (ZeRO-1); memory is of one rank" : "whole on each");
        if (s->ranks.n > 1) row(out, "ranks", text);
        format_count(n, (double)tokens * (double)s->schedule.steps);
        int used = snprintf(text, sizeof text, "%lld, %s tokens", (long long)s->schedule.steps, n);
        if (s->train.n_shards)
            snprintf(text + used, sizeof text - (size_t)used, ", %.2f epochs", (double)s->schedule.steps * (double)s->samples_per_step / (double)s->train.n_windows);
        row(out, "steps", text);
    }
    fflush(out);
}

void session_print_plans(const Session *s, FILE *out) {
    if (!s->options->print_plans) return;
    if (s->backend->print_plans) s->backend->print_plans(s->backend, out);
    else fprintf(out, "plans: %s has no products that are planned\n", s->backend->name);
}
