/* Finding and loading checkpoints, and exporting models. Saving: save.c. File contents: model_files.c, state_json.c, manifest.c. What is removed:
 * retain.c. */
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

bool export_model(const char *dir, const GPT2 *model, const char *tokenizer_dir, Error *e) {
    Manifest m = {0};
    bool ok = dir_create(dir, e) && write_model_files(dir, &(Source){.model = model}, tokenizer_dir, &m, e) && dir_sync(dir, e);
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
    Comm *c = id->comm;
    bool ok = manifest_check(dir, &m, c ? (size_t)c->rank : 0, c ? (size_t)c->size : 1, e) && state_read(dir, &root, &found, run_id, e);
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
