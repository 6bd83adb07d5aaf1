/* The training loop: resume, step, log, validate, sample, save, stop. One optimizer step itself is train.c's. */
#include "../base/io.h"
#include "../base/timer.h"
#include "../dist/zero.h"
#include "../train.h"
#include "generate.h"
#include "log.h"
#include "session.h"
#include "together.h"
#include "../base/version.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* A step between its issuing and its result. */
typedef struct {
    double lr, begin, end;            /* end: when issuing it ended */
    double own;                       /* seconds of issuing in which this rank did not wait for others; not where devices wait for each other */
    bool lifted;                      /* without limits, after --max-skipped in a row */
} Issued;

typedef struct {
    Session *session;
    const Config *options;
    Comm *comm;
    Together together;
    bool stop, save;                  /* all ranks know that one was asked to stop, to save */
    bool agreed;                      /* the error is all ranks': rank 0 says it */
    Backend *backend, *trace;         /* trace: the wrapper around the backend while --trace records, else NULL */
    GPT2 model;
    Acts acts, val_acts;
    Trainer trainer;
    Loader *loader;
    TrainState state;
    RunIdentity identity;
    FixedFact facts[28];
    MetricsLog metrics;
    int64_t saved_step;               /* of the newest checkpoint; -1: none */
    bool unsaved;                     /* the state has changed since the last one was begun */
    Saving *saving;                   /* the save under way, or NULL */
    SaveMemory save_memory;
    int64_t saving_step;
    double side_waited;               /* seconds that the device's ops had stood and waited for others when a step was last finished */
    double saving_since, saving_held; /* when it began, and how many seconds training has waited for it */
    double started;                   /* of this process's training */
    int64_t first_step;               /* where this process began, */
    double step_seconds;              /* and how long its steps took together */
    Issued issued[POST_SLOTS];        /* steps issued whose results are not collected yet, oldest first: state.step knows nothing of them */
    int n_issued;
    double done;                      /* when the last collected step was done */
    bool resumed;
    Error *e;                         /* where a failing micro-batch says why */
} Run;

/* Whether the run is to end: on all ranks at the same step. */
static bool ending(const Run *r) { return r->comm->size > 1 ? r->stop : together_stop(); }

/* Whether all ranks say ok. */
static bool agree(Run *r, bool ok, Error *e) {
    ok = comm_agree(r->comm, ok, e);
    if (!ok && r->comm->size > 1) r->agreed = true;
    return ok;
}

/* What this rank is about to do, and how long the others may have to wait for it. */
static void phase(const Run *r, const char *what, double patience) {
    Comm *devices = r->session->devices;
    r->comm->phase(r->comm, what, r->state.step + r->n_issued, patience * r->options->timeout);
    if (devices) devices->phase(devices, what, r->state.step + r->n_issued, patience * r->options->timeout);
    fault_point(what, r->state.step + r->n_issued);
}

/* ---- what a resumed run must find unchanged ----------------------------------------------------------------------- */

static void add_later_fact(Run *r, const char *class_name, const char *name, char *value, const char *absent) {
    CHECK(r->identity.n_facts < sizeof r->facts / sizeof *r->facts, "too many facts at %s", name);
    r->facts[r->identity.n_facts++] = (FixedFact){class_name, name, value, absent};
    r->identity.facts = r->facts;
}
static void add_fact(Run *r, const char *class_name, const char *name, char *value) { add_later_fact(r, class_name, name, value, NULL); }

static void collect_facts(Run *r) {
    const Session *s = r->session;
    const Config *o = r->options;
    const GPT2Config *c = &s->shape;
    add_fact(r, "data", "training data", xstrdup(s->train.fingerprint));
    add_fact(r, "data", "validation data", xstrdup(s->val.n_shards ? s->val.fingerprint : "none"));
    add_fact(r, "tokenizer", "tokenizer", xstrdup(s->tokenizer ? tokenizer_fingerprint(s->tokenizer) : "none"));
    add_fact(r, "shape", "layers", xasprintf("%zu", c->L));
    add_fact(r, "shape", "heads", xasprintf("%zu", c->H));
    add_fact(r, "shape", "channels", xasprintf("%zu", c->C));
    add_fact(r, "shape", "positions", xasprintf("%zu", c->T));
    add_fact(r, "shape", "vocabulary", xasprintf("%zu", c->V));
    add_fact(r, "batch", "sequence length", xasprintf("%zu", s->T));
    add_fact(r, "batch", "samples per step", xasprintf("%zu", s->samples_per_step));
    add_fact(r, "schedule", "lr-schedule", xstrdup(o->lr_schedule));
    add_fact(r, "schedule", "lr", xasprintf("%.17g", o->lr));
    add_fact(r, "schedule", "final-lr", xasprintf("%.17g", o->final_lr));
    add_fact(r, "schedule", "decay-fraction", xasprintf("%.17g", o->decay_fraction));
    add_fact(r, "schedule", "warmup", xasprintf("%lld", (long long)s->schedule.warmup));
    add_fact(r, "schedule", "steps", xasprintf("%lld", (long long)s->schedule.steps));
    add_fact(r, "optimizer", "beta1, beta2, eps", xasprintf("%.17g, %.17g, %.17g", o->beta1, o->beta2, o->eps));
    add_fact(r, "optimizer", "weight-decay", xasprintf("%.17g", o->weight_decay));
    add_fact(r, "optimizer", "grad-clip", xasprintf("%.17g", o->grad_clip));
    add_fact(r, "optimizer", "skip z, loss and norm", xasprintf("%.17g, %.17g", o->skip_loss_z, o->skip_norm_z));
    if (o->skip_loss_z > 0 || o->skip_norm_z > 0) add_fact(r, "optimizer", "max-skipped", xasprintf("%lld", (long long)o->max_skipped));
    add_fact(r, "seed", "seed", xasprintf("%lld", (long long)o->seed));
    /* what came with GPUs: older runs computed in float32, and rounded nothing */
    add_later_fact(r, "device", "dtype", xstrdup(r->backend->dtype), "fp32");
    add_later_fact(r, "device", "attention", xstrdup(o->attention), "ours");
    add_later_fact(r, "device", "gelu", xstrdup(r->backend->gelu_rounds_first ? "of the rounded sum" : "fused"), "of the rounded sum");
    add_later_fact(r, "optimizer", "rounding", xstrdup(o->rounding), "nearest");
}

/* ---- start -------------------------------------------------------------------------------------------------------- */

static void write_span(void *trace, const char *row, const char *name, size_t unit, double begin, double end) {
    trace_backend_span(trace, row, name, unit, begin, end);
}

static bool create_all(Run *r, Error *e) {
    const Config *o = r->options;
    Session *s = r->session;
    r->backend = s->backend;
    if (o->trace && !r->comm->rank && !(r->trace = trace_backend_create(r->backend, o->trace, e))) return false;
    Backend *be = r->trace ? r->trace : r->backend;
    if (!gpt2_create_ranks(&r->model, be, &s->shape, true, s->ranks, e)) return false;
    if (r->comm->size > 1 && !zero_attach(s->backend, &r->model, e)) return false;
    if (r->comm->size > 1 && r->trace) zero_spans(s->backend, write_span, r->trace);
    r->model.head_chunk = (size_t)o->head_chunk;
    if (!gpt2_acts_create(&r->acts, &r->model, s->B, s->T, keep_by_name(o->recompute), true, e) ||
        (s->val.n_shards && !gpt2_acts_create(&r->val_acts, &r->model, s->B, s->T, KEEP_NONE, false, e)) ||
        !trainer_create(&r->trainer, &r->model, &r->acts, e))
        return false;
    session_print(s, be->memory, be->room(be), stdout);
    session_print_plans(s, stdout);
    if (o->sample_every && !s->tokenizer) printf("no samples will be printed: no tokenizer is known; give --tokenizer DIR\n");
    return true;
}

static int rounding_of(const Config *o) { return strcmp(o->rounding, "stochastic") == 0 ? ROUND_STOCHASTIC : ROUND_NEAREST; }

/* Rank 0 looks for all. False with no error: there is none. */
static bool find_newest(Run *r, char path[4096], Error *e) {
    bool found = !r->comm->rank && checkpoint_newest(r->options->out, path, stderr, e);
    if (!agree(r, !e->code, e)) return false;
    char *text = comm_broadcast_text(r->comm, found ? path : NULL, 0);
    found = text != NULL;
    if (found) snprintf(path, 4096, "%s", text);
    free(text);
    return found;
}

static bool begin_run(Run *r, Error *e) {
    const Config *o = r->options;
    r->state = (TrainState){.seed = (uint64_t)o->seed, .last_val_step = -1, .best_val_loss = NAN, .last_val_loss = NAN};
    bool ok = run_id_create(r->identity.run_id) || fail(e, EXIT_STORAGE, "no random bytes for a run id from the system");
    if (!agree(r, ok, e)) return false;
    char *id = comm_broadcast_text(r->comm, r->identity.run_id, 0);
    snprintf(r->identity.run_id, sizeof r->identity.run_id, "%s", id);
    free(id);
    if (!r->session->init_from) gpt2_init(&r->model, (uint64_t)o->seed);
    else if (!import_weights(r->session->init_from, &r->model, e)) return false;
    r->saved_step = -1;
    r->unsaved = true;
    return true;
}

/* Newest valid checkpoint, or a new run from --init-from or from the seed. */
static bool resume_or_begin(Run *r, Error *e) {
    const Config *o = r->options;
    char path[4096];
    bool found = find_newest(r, path, e);
    if (!found && e->code) return false;
    if (found && strcmp(o->resume, "never") == 0)
        return fail(e, EXIT_USAGE, "%s already holds a run (newest checkpoint %s) and --resume never was given; give a new --out, or --resume auto to continue", o->out, path);
    if (found) {
        if (!agree(r, checkpoint_load(path, &r->model, &r->state, &r->identity, o->allow_change, e), e)) return false;
        printf("resuming from %s: step %lld of %lld%s\n", path, (long long)r->state.step, (long long)r->session->schedule.steps,
               r->session->init_from ? "; the weights are its own, not those of --init-from" : "");
        gpt2_params_rounded(&r->model, rounding_of(o), r->state.seed, r->state.updates);
        r->saved_step = r->state.step;
        r->state.seed = (uint64_t)o->seed;  /* another one only where --allow-change says so */
        r->resumed = true;
    } else if (!begin_run(r, e)) return false;
    if (r->state.step > r->session->schedule.steps)
        return fail(e, EXIT_USAGE, "%s is of step %lld, beyond the %lld steps asked for; raise --steps, --tokens or --epochs", path,
                    (long long)r->state.step, (long long)r->session->schedule.steps);
    trainer_set_updates(&r->trainer, r->state.updates);
    return true;
}

static bool open_loader(Run *r, Error *e) {
    Session *s = r->session;
    uint64_t position = r->state.samples;
    if (position % s->samples_per_step)   /* only after an allowed change of the batch */
        position = (position / s->samples_per_step + 1) * s->samples_per_step;
    if (position != r->state.samples)
        printf("the new total batch begins at sample %llu; %llu samples of this epoch are passed over\n", (unsigned long long)position,
               (unsigned long long)(position - r->state.samples));
    LoaderConfig config = {.dataset = &s->train, .V = s->shape.V, .seed = r->state.seed, .global_batch = s->samples_per_step,
                           .rank = s->ranks.rank, .world = s->ranks.n, .B = s->B, .position = position};
    r->state.samples = position;
    return (r->loader = loader_create(&config, e)) != NULL;
}

static bool open_metrics(Run *r, Error *e) {
    const Session *s = r->session;
    if (r->comm->rank) return true;
    char *path = path_join(r->options->out, "metrics.jsonl"), *config = options_to_config(&config_table, r->options);
    char *config_path = path_join(r->options->out, "config.txt");
    Record record;
    record_begin(&record, r->resumed ? "resume" : "start");
    record_string(&record, "run", r->identity.run_id);
    record_string(&record, "build", llmc_build_id());
    record_string(&record, "backend", r->backend->name);
    if (r->backend->device) record_string(&record, "device", r->backend->device);
    if (r->backend->peak_flops > 0) record_double(&record, "peak_flops", r->backend->peak_flops);
    record_int(&record, "step", r->state.step);
    record_int(&record, "steps", s->schedule.steps);
    record_int(&record, "ranks", r->comm->size);
    record_int(&record, "parameters", (int64_t)r->model.layout.n_params);
    record_double(&record, "flops_per_token", gpt2_flops_per_token(&s->shape, s->T));
    record_string(&record, "config", config);
    for (size_t i = 0; i < r->identity.n_facts; i++) record_string(&record, r->facts[i].name, r->facts[i].value);
    bool ok = metrics_open(&r->metrics, path, e) && metrics_write(&r->metrics, &record, e) && file_replace(config_path, config, strlen(config), e);
    free(path);
    free(config);
    free(config_path);
    return ok;
}

/* ---- a step ------------------------------------------------------------------------------------------------------- */

static bool next_micro_batch(void *context, size_t i, const int32_t **tokens, const int32_t **targets) {
    Run *r = context;
    fault_point("micro", (int64_t)i);
    return loader_next(r->loader, tokens, targets, r->e);
}

static bool validate(Run *r, Error *e) {
    Session *s = r->session;
    if (!s->val.n_shards || r->state.last_val_step == r->state.step) return true;
    double begin = seconds_now();
    Evaluation v;
    phase(r, "validation", 10);
    r->backend->sync(r->backend);     /* the weights of all ranks are here: from now on each goes its own way */
    if (!evaluate(&r->model, &r->val_acts, &s->val, (uint64_t)r->options->val_batches, r->comm, together_stop, &v, e)) return agree(r, false, e);
    if (!v.tokens) r->stop = true;
    if (!v.tokens) return true;       /* asked to stop: the resumed run begins with this validation */
    r->unsaved = true;
    r->state.last_val_step = r->state.step;
    r->state.last_val_loss = v.loss;
    if (!(r->state.best_val_loss <= v.loss)) r->state.best_val_loss = v.loss;
    printf("step %lld: validation loss %.6f, perplexity %.2f (%llu tokens, %.1f s)\n", (long long)r->state.step, v.loss, exp(v.loss),
           (unsigned long long)v.tokens, seconds_now() - begin);
    Record record;
    record_begin(&record, "validation");
    record_int(&record, "step", r->state.step);
    record_double(&record, "loss", v.loss);
    record_int(&record, "tokens", (int64_t)v.tokens);
    return metrics_write(&r->metrics, &record, e);
}

static bool sample(Run *r, Error *e) {
    Session *s = r->session;
    phase(r, "sample", 10);
    r->backend->sync(r->backend);     /* the weights of all ranks are here; the text is rank 0's */
    if (!s->tokenizer || r->comm->rank) return true;
    size_t n = 1, most = (size_t)r->options->sample_tokens, bytes;
    int32_t end = tokenizer_end_of_text(s->tokenizer), *ids = xmalloc((most + 1) * sizeof *ids);
    ids[0] = end >= 0 ? end : 0;
    Sampling sampling = {.temperature = r->options->temperature, .top_k = r->options->top_k, .top_p = r->options->top_p,
                         .seed = (uint64_t)r->options->seed + (uint64_t)r->state.step};
    n = generate(&r->model, ids, n, most, end, &sampling, NULL, NULL, e);
    if (n) {
        char *text = tokenizer_decode(s->tokenizer, ids + 1, n - 1 - (n > 1 && ids[n - 1] == end), &bytes);
        printf("--- sample at step %lld ---\n", (long long)r->state.step);
        fwrite(text, 1, bytes, stdout);  /* which may hold NUL */
        printf("\n---\n");
        free(text);
    }
    free(ids);
    return n > 0;
}

static const char *const skip_names[] = {"", "non-finite loss or gradient", "loss above its window", "gradient norm above its window"};

/* "(+0.31z)", or nothing while the window fills. */
static const char *z_text(char out[16], double z) {
    if (isfinite(z)) snprintf(out, 16, " (%+.2fz)", z);
    else out[0] = 0;
    return out;
}

/* " | MFU 43.1 %", of a device whose peak is known; nothing on the CPU. FLOPs per token as in the start-up table. */
static const char *mfu_text(char out[40], const Backend *b, double mfu) {
    out[0] = 0;
    if (b->peak_flops > 0) snprintf(out, 40, " | MFU %.1f %%", 100 * mfu);
    else if (b->device) snprintf(out, 40, " | MFU n/a");
    return out;
}

static const char *health_text(char out[200], const DeviceHealth *h) {
    out[0] = 0;
    if (!h) return out;
    int n = snprintf(out, 200, " | %.0f W, %.0f C, %.0f MHz", h->watts, h->celsius, h->sm_mhz);
    if (h->throttle_text[0]) n += snprintf(out + n, 200 - (size_t)n, ", throttled: %s", h->throttle_text);
    if (h->ecc_uncorrected > 0) snprintf(out + n, 200 - (size_t)n, ", %lld ECC errors", (long long)h->ecc_uncorrected);
    return out;
}

static void record_health(Record *record, const DeviceHealth *h) {
    record_double(record, "watts", h->watts);
    record_double(record, "celsius", h->celsius);
    record_double(record, "sm_mhz", h->sm_mhz);
    record_double(record, "memory_mhz", h->memory_mhz);
    record_string(record, "throttled", h->throttle_text);
    record_int(record, "ecc_uncorrected", h->ecc_uncorrected);
}

/* seconds: of this step; the time left is estimated from all steps of this process. */
static bool report_step(Run *r, const StepResult *result, double lr, double z_loss, double z_norm, double seconds, Error *e) {
    const Session *s = r->session;
    double rate = (double)(s->samples_per_step * s->T) / seconds;
    double mfu = r->backend->peak_flops > 0 ? rate * gpt2_flops_per_token(&s->shape, s->T) / r->backend->peak_flops : (double)NAN;
    int64_t step = r->state.step, steps = s->schedule.steps;
    DeviceHealth now, *health = r->options->gpu_stats && r->backend->health && r->backend->health(r->backend, &now) ? &now : NULL;
    if (step % r->options->log_every == 0 || step == steps || result->skip) {
        char za[16], zb[16], left[32], tokens[32];
        char mfu_column[40], health_column[200];
        format_duration(left, r->step_seconds / (double)(step - r->first_step) * (double)(steps - step));
        format_count(tokens, rate);
        printf("step %*lld/%lld | loss %.4f%s | norm %.3f%s | lr %.2e | %.0f ms | %s tok/s%s%s | ETA %s%s%s\n", (int)snprintf(NULL, 0, "%lld", (long long)steps),
               (long long)step, (long long)steps, (double)result->loss, z_text(za, z_loss), (double)result->grad_norm, z_text(zb, z_norm), lr,
               1e3 * seconds, tokens, mfu_text(mfu_column, r->backend, mfu), health_text(health_column, health), left, result->skip ? " | update skipped: " : "", skip_names[result->skip]);
        fflush(stdout);
    }
    Record record;
    record_begin(&record, "step");
    record_int(&record, "step", step);
    record_double(&record, "loss", (double)result->loss);
    record_double(&record, "loss_z", z_loss);
    record_double(&record, "norm", (double)result->grad_norm);
    record_double(&record, "norm_z", z_norm);
    record_double(&record, "lr", lr);
    record_double(&record, "ms", 1e3 * seconds);
    record_double(&record, "tokens_per_second", rate);
    if (r->backend->device) record_double(&record, "mfu", mfu);
    if (health) record_health(&record, health);
    record_int(&record, "samples", (int64_t)r->state.samples);
    record_string(&record, "skipped", skip_names[result->skip]);
    return metrics_write(&r->metrics, &record, e);
}

/* Waits for the save under way, if there is one. */
static bool finish_saving(Run *r, Error *e) {
    if (!r->saving) return true;
    double begin = seconds_now();
    phase(r, "saving", 10);
    bool ok = checkpoint_finish(r->saving, e);
    r->saving = NULL;
    if (!ok) return agree(r, false, e);
    double end = seconds_now();
    long long step = r->saved_step = r->saving_step;
    r->saving_held += end - begin;
    printf("step %lld: saved %s/step_%08lld (%.1f s, %.0f ms of them in training's way)\n", step, r->options->out, step, end - r->saving_since, 1e3 * r->saving_held);
    fflush(stdout);
    together_saved(&r->together, end - r->saving_since);
    return true;
}

/* When a step was done: now where its result had to be waited for; when its issuing ended where the backend computes as it is called. */
static double done_time(const Run *r, const Issued *i, double before_collecting) {
    double now = seconds_now();
    return now - before_collecting > 1e-4 || i->end <= r->done ? now : i->end;
}

/* Collects the oldest issued step: from here on the state, the log and the monitor know of it. */
static bool finish_step(Run *r, Error *e) {
    const Config *o = r->options;
    const Session *s = r->session;
    Monitor *monitor = &r->state.monitor;
    Issued i = r->issued[0];
    memmove(&r->issued[0], &r->issued[1], sizeof r->issued - sizeof *r->issued);
    r->n_issued--;
    double before = seconds_now();
    StepResult result = train_result(&r->trainer);
    double done = done_time(r, &i, before), seconds = done - fmax(r->done, i.begin), own = i.own + seconds_now() - before;
    double stood = s->devices ? s->device->side_waited(s->device) : 0; /* there the host waits for no rank; the ops do, in the device's queue */
    if (s->devices) own = fmax(seconds - (stood - r->side_waited), 0), r->side_waited = stood;
    double z_loss = monitor_z(&monitor->loss, (double)result.loss), z_norm = monitor_z(&monitor->norm, (double)result.grad_norm);
    monitor_step(monitor, result.loss, result.grad_norm, result.skip);
    r->state.step++;
    r->state.updates = result.updates;
    r->state.samples += s->samples_per_step;
    r->unsaved = true;
    r->stop = r->stop || result.stop > 0;
    r->save = r->save || result.save > 0;
    r->done = done;
    r->step_seconds += seconds;
    if (!report_step(r, &result, i.lr, z_loss, z_norm, seconds, e) || !together_step(&r->together, r->state.step, seconds, own, e)) return false;
    if (i.lifted && result.skip == SKIP_NONE)
        printf("step %lld: applied without limits, as the %lld before it were skipped (--max-skipped)\n", (long long)r->state.step, (long long)o->max_skipped);
    if (monitor->nonfinite_in_row >= o->max_nonfinite) {
        finish_saving(r, &(Error){0});
        r->agreed = true;
        return fail(e, EXIT_NONFINITE, "%lld steps in a row had a non-finite loss or gradient norm, up to step %lld; their updates were skipped, so the weights are "
                    "unharmed. The newest checkpoint is of step %lld; lower --lr (with --allow-change schedule), or look at the data",
                    (long long)monitor->nonfinite_in_row, (long long)r->state.step, (long long)r->saved_step);
    }
    return true;
}

/* Before anything that looks at the state. */
static bool finish_all(Run *r, Error *e) {
    while (r->n_issued)
        if (!finish_step(r, e)) return false;
    return true;
}

/* So that no checkpoint is made of a state that is not the same on all. */
static bool check_replicas(Run *r, Error *e) {
    if (!finish_all(r, e)) return false;
    phase(r, "comparing replicas", 10);
    r->agreed = !replicas_check(&r->model, r->comm, r->state.step, r->saved_step, e);
    return !r->agreed;
}

/* Between steps: the save under way becomes a checkpoint when all ranks' files are written. */
static bool go_on_saving(Run *r, Error *e) {
    if (!r->saving) return true;
    double begin = seconds_now();
    bool ready = checkpoint_ready(r->saving);
    r->saving_held += seconds_now() - begin;
    return !ready || finish_saving(r, e);
}

/* Training goes on before the checkpoint is there, unless this is the end of it. */
static bool save(Run *r, Error *e) {
    const Config *o = r->options;
    if (!finish_all(r, e)) return false;
    together_saved(&r->together, -1);
    r->save = false;
    bool goes_on = !ending(r) && r->state.step < r->session->schedule.steps && strcmp(o->save_async, "on") == 0;
    if (r->unsaved) {
        if (!finish_saving(r, e) || (r->comm->size > 1 && o->check_replicas && !check_replicas(r, e))) return false;
        double begin = r->saving_since = seconds_now();
        phase(r, "saving", 10);
        r->state.seconds += begin - r->started;
        r->started = begin;
        r->backend->sync(r->backend);
        SaveHow how = {.apart = goes_on, .keep = (int)o->keep, .keep_every = o->keep_every, .memory = &r->save_memory,
                       .report = r->comm->rank ? NULL : stderr};
        r->saving = checkpoint_begin(o->out, &r->model, &r->state, &r->identity, &how, e);
        if (!r->saving) return agree(r, false, e);
        r->saving_step = r->state.step;
        r->unsaved = false;
        r->saving_held = seconds_now() - begin;
    }
    return goes_on || finish_saving(r, e);
}

/* The data cannot go on, but what was trained so far is whole. Of several ranks the others do not know of it: they have their last checkpoint. */
static void save_before_leaving(Run *r) {
    Error second = {0};
    if (r->comm->size > 1) return;
    if (finish_all(r, &second) && r->state.step > 0 && save(r, &second)) finish_saving(r, &second);
    if (second.code) error_print(&second);
}

/* Test builds: what a failing memory does. */
static void flip_bit(const Run *r) {
    unsigned char byte, *at = (unsigned char *)r->model.params.p + r->model.layout.tensors[2].offset * r->backend->elem_bytes;
    r->backend->download(r->backend, &byte, at, 1);
    byte ^= 1;
    r->backend->upload(r->backend, at, &byte, 1);
}

/* Issues the next step. Its result is collected after the one that follows has been issued, so that the device need not wait for the host;
 * with limits on loss or norm at once, as each result moves the limits of the next step. */
static bool one_step(Run *r, Error *e) {
    const Config *o = r->options;
    const Session *s = r->session;
    Monitor *monitor = &r->state.monitor;
    int64_t step = r->state.step + r->n_issued;
    bool at_once = o->skip_loss_z > 0 || o->skip_norm_z > 0, lifted = at_once && monitor_lifts_limits(monitor, o->max_skipped);
    StepParams p = {.lr = (float)schedule_lr(&s->schedule, step), .beta1 = (float)o->beta1, .beta2 = (float)o->beta2, .eps = (float)o->eps,
                    .weight_decay = (float)o->weight_decay, .grad_clip = (float)o->grad_clip,
                    .loss_limit = monitor_limit(&monitor->loss, lifted ? 0 : o->skip_loss_z),
                    .norm_limit = monitor_limit(&monitor->norm, lifted ? 0 : o->skip_norm_z),
                    .seed = r->state.seed, .step = step, .rounding = rounding_of(o), .stop = together_stop(),
                    .save = together_wants_save(&r->together)};
    Issued *i = &r->issued[r->n_issued];
    *i = (Issued){.lr = (double)p.lr, .begin = seconds_now(), .lifted = lifted};
    double waited = r->comm->waited;
    fault_point("step", step);
    phase(r, "training", 1);
    if (!train_issue(&r->trainer, &p, s->n_micro, next_micro_batch, r)) return save_before_leaving(r), false;
    i->end = seconds_now();
    i->own = i->end - i->begin - (r->comm->waited - waited);
    if (fault_flip("step", step)) flip_bit(r);
    r->n_issued++;
    return (!at_once && r->n_issued < POST_SLOTS) || finish_step(r, e);
}

/* True when something that happens every `every` steps (0: never) is due after `step` steps. */
static bool due(int64_t every, int64_t step) { return every > 0 && step % every == 0; }

static void end_trace(Run *r) {
    if (!r->trace) return;
    if (r->model.backend) r->model.backend = r->backend;
    if (r->comm->size > 1) zero_spans(r->backend, NULL, NULL);
    r->trace->destroy(r->trace);
    r->trace = NULL;
    printf("trace written to %s\n", r->options->trace);
}

/* What is due after the steps issued so far: validation, sample, checkpoint. What a stop cut off, or a crash undid, the resumed run makes up for. */
static bool between_steps(Run *r, bool last, Error *e) {
    const Config *o = r->options;
    int64_t step = r->state.step + r->n_issued;
    bool fresh = step > r->first_step;  /* else a resumed run would print its sample again */
    if (!go_on_saving(r, e)) return false;
    if ((last || due(o->val_every, step) || due(o->sample_every, step)) && !finish_all(r, e)) return false;
    if ((last || due(o->val_every, step)) && !validate(r, e)) return false;
    if (fresh && o->sample_every && (last || due(o->sample_every, step)) && !ending(r) && !sample(r, e)) return false;
    if (last || ending(r) || r->save || (step > 0 && due(o->save_every, step))) return save(r, e);
    return !(fresh && r->comm->size > 1 && due(o->check_replicas, step)) || check_replicas(r, e);
}

static int loop(Run *r, Error *e) {
    while (true) {
        int64_t step = r->state.step + r->n_issued;
        bool last = step >= r->session->schedule.steps;
        if (!between_steps(r, last, e)) return e->code;
        if (last && (!r->session->val.n_shards || r->state.last_val_step == step)) return EXIT_OK;
        if (ending(r) && save(r, e)) {
            printf("stopped by %s after step %lld, saved; the same command continues\n", together_why(&r->together), (long long)r->state.step);
            return EXIT_REQUEUE;
        }
        if (e->code || !one_step(r, e)) return e->code;
        if (!r->trace || r->state.step + r->n_issued - r->first_step < r->options->trace_steps) continue;
        if (!finish_all(r, e)) return e->code;
        end_trace(r);
    }
}

/* A first save is guessed at 12 bytes a parameter and 200 MB/s. A signal that came during the start is known to all before the first step. */
static void begin_together(Run *r) {
    const Config *o = r->options;
    together_begin(&r->together, r->comm, r->backend, &r->metrics, o->out, o->max_time, o->started, 12.0 / 200e6 * (double)r->model.layout.n_params / r->comm->size);
    double asked = together_stop();
    comm_sum(r->comm, &asked, 1);
    r->stop = asked > 0;
}

static void close_run(Run *r) {
    if (r->saving) checkpoint_abandon(r->saving);
    free(r->save_memory.p);
    if (r->loader) loader_destroy(r->loader);
    if (r->metrics.fd >= 0) metrics_close(&r->metrics);
    end_trace(r);
    if (r->model.backend) {
        if (r->trainer.state.p) trainer_destroy(&r->trainer);
        if (r->val_acts.blocks) gpt2_acts_destroy(&r->val_acts, &r->model);
        if (r->acts.blocks) gpt2_acts_destroy(&r->acts, &r->model);
        gpt2_destroy(&r->model);
    }
    for (size_t i = 0; i < r->identity.n_facts; i++) free((char *)r->facts[i].value);
}

int run_train(Session *s) {
    Error error = {0}, *e = &error;
    Run r = {.session = s, .options = s->options, .comm = s->comm, .metrics = {.fd = -1}, .e = e,
             .identity = {.tokenizer_dir = s->tokenizer_dir, .comm = s->comm}};
    int code = 0;
    together_listen();
    /* Rank 0 first: what it measures of its GPU the others find in the plan file, so that all, and a resumed run, compute with the same algorithms. */
    bool created = agree(&r, s->comm->rank || create_all(&r, e), e) && agree(&r, !s->comm->rank || create_all(&r, e), e);
    if (created) collect_facts(&r);
    if (!created || !agree(&r, resume_or_begin(&r, e), e) || !agree(&r, open_loader(&r, e) && open_metrics(&r, e), e)) code = e->code;
    if (!code) {
        r.first_step = r.state.step;
        r.started = seconds_now();
        begin_together(&r);
        code = loop(&r, e);
    }
    Error second = {0};
    if (!e->code || r.agreed || s->comm->size == 1) finish_saving(&r, &second); /* what is under way is of a good state, whatever ends the run */
    if (second.code && e->code && !r.comm->rank) error_print(&second);
    else if (second.code && !e->code) *e = second;
    if (e->code && r.agreed && r.comm->rank) code = e->code;
    else if (e->code) {
        if (r.comm->rank) fail_in(e, "rank %d", r.comm->rank);
        code = error_print(e);
    } else if (code == EXIT_OK) {
        printf("done: %lld steps, %lld updates", (long long)r.state.step, (long long)r.state.updates);
        if (isfinite(r.state.last_val_loss)) printf(", validation loss %.6f (best %.6f)", r.state.last_val_loss, r.state.best_val_loss);
        printf(", %s/step_%08lld\n", s->options->out, (long long)r.state.step);
    }
    if (!e->code || r.agreed) comm_barrier(r.comm); /* none leaves before rank 0 has said why */
    together_end(&r.together, code);
    close_run(&r);
    return code;
}
