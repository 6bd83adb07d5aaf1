/* Saving, finding and loading checkpoints. A save happens under a hidden name; one rename makes it visible, complete and durable.
 * File contents: model_files.c, state_json.c, manifest.c. What is removed: retain.c. */
#include "checkpoint_private.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

bool run_id_create(char run_id[33]) {
    unsigned char bytes[16];
    size_t done = 0;
    while (done < sizeof bytes) {
        ssize_t n = getrandom(bytes + done, sizeof bytes - done, 0);
        if (n < 0 && errno != EINTR) return false;
        if (n > 0) done += (size_t)n;
    }
    for (int i = 0; i < 16; i++) snprintf(run_id + 2 * i, 3, "%02x", bytes[i]);
    return true;
}

/* ---- saving ---- */

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

static bool write_rest(const char *dir, const TrainState *state, const RunIdentity *id, Manifest *m, Error *e) {
    char *text = state_to_json(state, id);
    bool ok = write_text_file(dir, "training_state.json", text, m, e) && manifest_write(dir, m, e) && dir_sync(dir, e);
    free(text);
    return ok;
}

/* Called by all ranks. Where each holds a whole copy of m and v, rank 0's is written. */
static bool write_checkpoint(const char *dir, const GPT2 *model, const TrainState *state, const RunIdentity *id, Comm *comm, Error *e) {
    Manifest m = {.step = state->step};
    bool first = comm->rank == 0, ok = true;
    snprintf(m.run_id, sizeof m.run_id, "%s", id->run_id);
    if (first) ok = write_model_files(dir, model, comm, id->tokenizer_dir, &m, e);
    else join_model_files(model, comm);
    ok = ok && (!(first || model->ranks.sharded) || write_optimizer_file(dir, model, &m, e));
    ok = comm_agree(comm, ok, e);
    if (ok) collect_parts(&m, comm);
    ok = ok && (!first || write_rest(dir, state, id, &m, e));
    manifest_free(&m);
    return ok;
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

static bool save_as(const char *run_dir, const char *final, const GPT2 *model, const TrainState *state, const RunIdentity *id, Comm *comm, Error *e) {
    char *temporary = xasprintf("%s/.tmp-step_%08lld", run_dir, (long long)state->step);
    bool first = comm->rank == 0, ok = comm_agree(comm, !first || (path_remove_tree(temporary, e) && dir_create(temporary, e)), e);
    ok = ok && write_checkpoint(temporary, model, state, id, comm, e) && (!first || publish(temporary, final, e));
    ok = comm_agree(comm, ok, e);
    if (!ok && first) path_remove_tree(temporary, NULL);
    free(temporary);
    return ok;
}

bool checkpoint_save(const char *run_dir, const GPT2 *model, const TrainState *state, const RunIdentity *id, Error *e) {
    CHECK(model->m.p && state->step >= 0 && id->run_id[0], "step %lld of run \"%s\"", (long long)state->step, id->run_id);
    Comm *alone = id->comm ? NULL : comm_alone(), *comm = alone ? alone : id->comm;
    Error ours = {0};
    char *final = xasprintf("%s/step_%08lld", run_dir, (long long)state->step);
    double already = comm->rank == 0 && run_check(run_dir, id, &ours) && already_saved(final, state, id);
    bool ok = comm_agree(comm, !ours.code, &ours), other_run = !ok;
    if (ok) comm_sum(comm, &already, 1);
    ok = ok && (already > 0 || save_as(run_dir, final, model, state, id, comm, &ours));
    if (!ok && !other_run) {
        fail_in(&ours, "the checkpoint of step %lld was not saved (earlier ones are untouched)", (long long)state->step);
        ours.code = EXIT_STORAGE;
    }
    if (!ok && e) *e = ours;
    if (alone) alone->destroy(alone);
    free(final);
    return ok;
}

bool export_model(const char *dir, const GPT2 *model, const char *tokenizer_dir, Error *e) {
    Manifest m = {0};
    bool ok = dir_create(dir, e) && write_model_files(dir, model, NULL, tokenizer_dir, &m, e) && dir_sync(dir, e);
    manifest_free(&m);
    return ok;
}

/* ---- finding ---- */

bool checkpoint_newest(const char *run_dir, char path[4096], FILE *report, Error *e) {
    StepDir *dirs;
    size_t n;
    if (!steps_list(run_dir, &dirs, &n, e)) return false;
    bool found = false;
    for (size_t i = n; !found && i-- > 0;) {
        Error why = {0};
        found = checkpoint_verify(dirs[i].path, &why);
        if (found) snprintf(path, 4096, "%s", dirs[i].path);
        else if (report) fprintf(report, "checkpoint %s rejected: %s\n", dirs[i].path, why.text);
    }
    if (!found && e) *e = (Error){0};
    if (!found && n)
        fail(e, EXIT_NO_CHECKPOINT, "%s: found %zu checkpoint%s, none is valid; restore one from a backup, or start anew in another "
             "directory (--out)", run_dir, n, n > 1 ? "s" : "");
    steps_free(dirs, n);
    return found;
}

/* ---- loading ---- */

static bool config_check(const char *dir, const GPT2 *model, Error *e) {
    GPT2Config found;
    const GPT2Config *c = &model->config;
    if (!import_config(dir, &found, e)) return false;
    return (found.V == c->V && found.L == c->L && found.H == c->H && found.C == c->C && found.T == c->T) ||
           fail(e, EXIT_USAGE, "%s: found a model of vocabulary %zu, layers %zu, heads %zu, channels %zu, sequence %zu; this run's is %zu, %zu, "
                "%zu, %zu, %zu; another shape cannot be continued, so give the former options, or a new --out", dir, found.V, found.L, found.H, found.C, found.T, c->V, c->L, c->H, c->C, c->T);
}

/* All checks that need the files open; the model is not touched before they pass. */
static bool load_tensors(const char *dir, const Manifest *m, GPT2 *model, Error *e) {
    WeightSet weights;
    OptimizerSet optimizer = {0};
    if (!weights_open(&weights, dir, e)) return false;
    bool ok = weights_check(&weights, dir, model, e) && (!model->m.p || optimizer_open(&optimizer, dir, m, model, e));
    ok = ok && weights_read(&weights, model, false, e) && (!model->m.p || optimizer_read(&optimizer, model, e));
    weights_close(&weights);
    optimizer_close(&optimizer);
    return ok;
}

bool checkpoint_load(const char *dir, GPT2 *model, TrainState *state, RunIdentity *id, const char *allow, Error *e) {
    Manifest m;
    TrainState found;
    char run_id[33];
    json_t *root = NULL;
    if (!manifest_read(dir, &m, e)) return false;
    bool ok = manifest_check(dir, &m, true, e) && state_read(dir, &root, &found, run_id, e);
    if (ok && (found.step != m.step || strcmp(run_id, m.run_id) != 0))
        ok = fail(e, EXIT_DATA, "%s: training_state.json is of run %s step %lld, the manifest of run %s step %lld; files were mixed", dir, run_id,
                  (long long)found.step, m.run_id, (long long)m.step);
    ok = ok && facts_compare(dir, root, id, allow, e) && config_check(dir, model, e) && load_tensors(dir, &m, model, e);
    if (ok) {
        *state = found;
        memcpy(id->run_id, run_id, sizeof id->run_id);
    }
    json_decref(root);
    manifest_free(&m);
    return ok;
}

char *checkpoint_fact(const char *dir, const char *name) {
    TrainState state;
    char run_id[33];
    json_t *root;
    if (!state_read(dir, &root, &state, run_id, NULL)) return NULL;
    const char *value = facts_find(root, name);
    char *copy = value ? xstrdup(value) : NULL;
    json_decref(root);
    return copy;
}
