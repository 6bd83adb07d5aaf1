/* Saving. A save happens under a hidden name; one rename makes it visible, complete and durable. It has two stages, each the work of a thread
 * where the save is apart from training: every rank writes its files; rank 0 describes them all in the manifest, renames, removes old checkpoints.
 * The threads know neither the communicator nor the backend: what ranks tell each other, they tell each other in the threads that train. */
#include "checkpoint_private.h"
#include "log.h"
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

typedef enum { SAVE_WRITING, SAVE_COMMITTING, SAVE_OVER } Stage;
struct Saving {
    char *run_dir, *temporary, *final;
    const char *tokenizer_dir;
    char *state;              /* training_state.json */
    SaveHow how;
    Source source;
    SaveMemory memory;        /* where it is not how.memory */
    Comm *comm, *alone;       /* alone: made for this save, or NULL */
    Manifest m;
    bool there;               /* a valid checkpoint of this state exists: nothing is written */
    Stage stage;
    bool ok;                  /* this rank's work of the stage, once done */
    Error e;
    bool threaded;            /* the work is, or was, thread's: not joined yet */
    pthread_t thread;
    atomic_bool done;         /* the work of the stage, on this rank */
    double n_done;            /* ranks that are done, as of the last question */
    CommTicket asked;         /* of the question, */
    bool asking;              /* which is open */
};

/* Checkpoints of another run in the directory are never mixed with ours. Unreadable ones belong to nobody. */
static bool run_check(const char *run_dir, const RunIdentity *id, Error *e) {
    StepDir *dirs;
    size_t n;
    if (!steps_list(run_dir, &dirs, &n, e)) return false;
    bool ok = true;
    for (size_t i = 0; ok && i < n; i++) {
        Manifest m;
        if (!manifest_read(dirs[i].path, &m, NULL)) continue;
        if (strcmp(m.run_id, id->run_id) != 0)
            ok = fail(e, EXIT_USAGE, "%s belongs to run %s, this is run %s; choose another --out, or resume that run (--resume auto)",
                      dirs[i].path, m.run_id, id->run_id);
        manifest_free(&m);
    }
    steps_free(dirs, n);
    return ok;
}

/* Parts that the other ranks have written go into rank 0's manifest. */
static void collect_parts(Manifest *m, Comm *comm) {
    char *mine = comm->rank && m->n ? part_to_text(&m->parts[0]) : NULL, **texts = comm_gather_texts(comm, mine);
    for (int r = 1; texts && r < comm->size; r++)
        if (texts[r]) CHECK(part_from_text(m, texts[r]), "rank %d describes its file as %s", r, texts[r]);
    for (int r = 0; texts && r < comm->size; r++) free(texts[r]);
    free(texts);
    free(mine);
}

/* Gives the finished directory its name. A directory that has the name already is first renamed to NAME.replaced, under which a valid
 * copy is still found, so that at every moment one of the two is there to resume from. */
static bool publish(const char *temporary, const char *final, Error *e) {
    char *replaced = xasprintf("%s.replaced", final);
    bool had = path_exists(final);
    bool ok = !had || (checkpoint_verify(final, NULL) ? path_remove_tree(replaced, e) && path_rename(final, replaced, e)
                                                      : path_remove_tree(final, e));
    ok = ok && path_rename(temporary, final, e);
    if (ok) ok = path_remove_tree(replaced, e);  /* the new copy is in place and durable */
    else if (had && !path_exists(final) && path_exists(replaced)) path_rename(replaced, final, NULL);
    free(replaced);
    return ok;
}

/* True when `final` is a valid checkpoint of the same state: saving again after a resume at that step. The time spent may differ. */
static bool already_saved(const char *final, const TrainState *state, const RunIdentity *id) {
    if (!path_exists(final) || !checkpoint_verify(final, NULL)) return false;
    TrainState recorded;
    char run_id[33];
    json_t *root;
    if (!state_read(final, &root, &recorded, run_id, NULL)) return false;
    TrainState now = *state;
    now.seconds = recorded.seconds;
    char *a = state_to_json(&recorded, id), *b = state_to_json(&now, id);
    bool same = strcmp(a, b) == 0 && strcmp(run_id, id->run_id) == 0 && facts_compare(final, root, id, NULL, NULL);
    free(a);
    free(b);
    json_decref(root);
    return same;
}

/* ---- the work of the two stages ---- */

static bool not_saved(Saving *s) {
    fail_in(&s->e, "the checkpoint of step %lld was not saved (earlier ones are untouched)", (long long)s->m.step);
    s->e.code = EXIT_STORAGE;
    return false;
}

/* Where each rank holds a whole copy of m and v, rank 0's is written. */
static bool write_parts(Saving *s) {
    bool first = s->comm->rank == 0, ok = true;
    if (first) ok = write_model_files(s->temporary, &s->source, s->tokenizer_dir, &s->m, &s->e);
    else join_model_files(&s->source);
    ok = ok && (!(first || s->source.model->ranks.sharded) || write_optimizer_file(s->temporary, &s->source, &s->m, &s->e));
    return ok || not_saved(s);
}

static bool commit(Saving *s) {
    if (s->comm->rank) return true;
    bool ok = s->there || (write_text_file(s->temporary, "training_state.json", s->state, &s->m, &s->e) && manifest_write(s->temporary, &s->m, &s->e) &&
                           dir_sync(s->temporary, &s->e) && publish(s->temporary, s->final, &s->e));
    if (!ok) return not_saved(s);
    return !s->how.keep || checkpoint_retain(s->run_dir, s->how.keep, s->how.keep_every, &s->e);
}

/* A rank alone goes from one stage to the other without asking. */
static void work(Saving *s) {
    s->ok = s->stage == SAVE_COMMITTING || write_parts(s);
    if (s->ok && (s->stage == SAVE_COMMITTING || s->comm->size == 1)) s->ok = commit(s);
    atomic_store(&s->done, true);
}

static void *work_apart(void *saving) {
    work(saving);
    return NULL;
}

/* Here, where there is no thread to be had. The process's signals are for its other threads. */
static void start(Saving *s, bool apart) {
    sigset_t all, before;
    atomic_store(&s->done, false);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    s->threaded = apart && pthread_create(&s->thread, NULL, work_apart, s) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!s->threaded) work(s);
}

/* ---- all ranks together ---- */

static void end_stage(Saving *s, bool apart) {
    if (s->threaded) pthread_join(s->thread, NULL);
    s->threaded = false;
    s->ok = comm_agree(s->comm, s->ok, &s->e);
    if (!s->ok || s->stage == SAVE_COMMITTING || s->comm->size == 1) {
        s->stage = SAVE_OVER;
        return;
    }
    collect_parts(&s->m, s->comm);
    s->stage = SAVE_COMMITTING;
    start(s, apart);
}

/* Copies for threads to write from. False: some rank has no memory for them. */
static bool copy_model(Saving *s) {
    double lacking = !source_reserve(&s->source, s->how.memory ? s->how.memory : &s->memory);
    comm_sum(s->comm, &lacking, 1);
    if (!(lacking > 0)) {
        source_copy(&s->source);
        return true;
    }
    s->source.copies = NULL;
    char bytes[32];
    format_bytes(bytes, (double)source_bytes(s->source.model->layout.n_elements, s->source.model->ranks));
    if (s->how.report)
        fprintf(s->how.report, "step %lld: the host has no memory for a copy of what is saved (%s); training waits for this save\n", (long long)s->m.step, bytes);
    return false;
}

static void saving_free(Saving *s) {
    manifest_free(&s->m);
    if (s->alone) s->alone->destroy(s->alone);
    free(s->memory.p), free(s->run_dir), free(s->temporary), free(s->final), free(s->state), free(s);
}

static bool prepare(Saving *s, const TrainState *state, const RunIdentity *id) {
    bool first = s->comm->rank == 0;
    double there = first && run_check(s->run_dir, id, &s->e) && already_saved(s->final, state, id);
    if (!comm_agree(s->comm, !s->e.code, &s->e)) return false;
    comm_sum(s->comm, &there, 1);
    s->there = there > 0;
    if (s->there || !first) return comm_agree(s->comm, true, &s->e);
    bool ok = (path_remove_tree(s->temporary, &s->e) && dir_create(s->temporary, &s->e)) || not_saved(s);
    return comm_agree(s->comm, ok, &s->e);
}

Saving *checkpoint_begin(const char *run_dir, const GPT2 *model, const TrainState *state, const RunIdentity *id, const SaveHow *how, Error *e) {
    CHECK(model->m.p && state->step >= 0 && id->run_id[0], "step %lld of run \"%s\"", (long long)state->step, id->run_id);
    Saving *s = xcalloc(1, sizeof *s);
    *s = (Saving){.run_dir = xstrdup(run_dir), .temporary = xasprintf("%s/.tmp-step_%08lld", run_dir, (long long)state->step),
                  .final = xasprintf("%s/step_%08lld", run_dir, (long long)state->step), .tokenizer_dir = id->tokenizer_dir, .state = state_to_json(state, id),
                  .how = *how, .alone = id->comm ? NULL : comm_alone(), .m = {.step = state->step}};
    s->comm = id->comm ? id->comm : s->alone;
    s->source = (Source){.model = model, .comm = s->comm};
    memcpy(s->m.run_id, id->run_id, sizeof s->m.run_id);
    if (!prepare(s, state, id)) {
        if (s->comm->rank == 0 && s->e.code == EXIT_STORAGE) path_remove_tree(s->temporary, NULL);
        if (e) *e = s->e;
        saving_free(s);
        return NULL;
    }
    if (s->there) s->stage = SAVE_COMMITTING;
    start(s, how->apart && (s->there || copy_model(s)));
    return s;
}

static void take_answer(Saving *s) {
    if (s->asking) s->comm->wait(s->comm, s->asked);
    s->asking = false;
}

bool checkpoint_ready(Saving *s) {
    bool asked = s->asking;
    if (s->comm->size == 1) return atomic_load(&s->done);
    take_answer(s);
    if (asked && s->n_done > s->comm->size - 0.5) end_stage(s, true);
    if (s->stage == SAVE_OVER) return true;
    s->n_done = atomic_load(&s->done);
    s->asked = s->comm->all_reduce(s->comm, &s->n_done, 1);
    s->asking = true;
    return false;
}

bool checkpoint_finish(Saving *s, Error *e) {
    take_answer(s);
    while (s->stage != SAVE_OVER) end_stage(s, false);
    bool ok = s->ok;
    if (!ok && s->comm->rank == 0) path_remove_tree(s->temporary, NULL);
    if (!ok && e) *e = s->e;
    saving_free(s);
    return ok;
}

void checkpoint_abandon(Saving *s) {
    take_answer(s);
    if (s->threaded) pthread_join(s->thread, NULL);
    saving_free(s);
}

bool checkpoint_save(const char *run_dir, const GPT2 *model, const TrainState *state, const RunIdentity *id, Error *e) {
    Saving *s = checkpoint_begin(run_dir, model, state, id, &(SaveHow){0}, e);
    return s && checkpoint_finish(s, e);
}

size_t checkpoint_copy_bytes(const GPT2Config *config, Ranks ranks) {
    ParamLayout layout;
    gpt2_layout(&layout, config, 1);
    size_t n = layout.n_elements;
    gpt2_layout_free(&layout);
    return source_bytes(n, (Ranks){.n = ranks.n, .sharded = ranks.sharded});
}
