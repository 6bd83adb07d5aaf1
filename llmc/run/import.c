/* Models from elsewhere in Hugging Face form: a directory (one safetensors file or several with an index), or a single safetensors file.
 * llm.c weights files: import_bin.c. Nothing of a foreign file is believed: names, shapes and settings are compared first. */
#include "checkpoint_private.h"
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

enum { SIZE_LIMIT = 1 << 24 };  /* of a field in config.json; gpt2_config_check knows the finer limits */

static const char *const PREFIX = "transformer.";

static const char *without_prefix(const char *name) { return strncmp(name, PREFIX, strlen(PREFIX)) ? name : name + strlen(PREFIX); }

/* ---- the files ---- */

static bool weights_add(WeightSet *set, const char *dir, const char *name, Error *e) {
    char *path = path_join(dir, name);
    set->files = xrealloc(set->files, (set->n + 1) * sizeof *set->files);
    bool ok = st_open(&set->files[set->n], path, e);
    if (ok) set->n++;
    free(path);
    return ok;
}

/* The files that model.safetensors.index.json spreads the tensors over. */
static bool weights_add_shards(WeightSet *set, const char *dir, const char *index_path, Error *e) {
    json_t *root = json_read_object(index_path, e), *map = json_object_get(root, "weight_map"), *file;
    json_t *seen = json_object();
    const char *tensor;
    bool ok = root != NULL;
    if (ok && !json_is_object(map)) ok = fail(e, EXIT_DATA, "%s: found no \"weight_map\" object; the index is damaged", index_path);
    if (ok) json_object_foreach(map, tensor, file) {
        const char *name = json_string_value(file);
        if (!name || !*name || strchr(name, '/') || name[0] == '.')
            ok = fail(e, EXIT_DATA, "%s: tensor %.200s: its file name is not a plain name; the index is damaged", index_path, tensor);
        else if (!json_object_get(seen, name)) {
            json_object_set_new(seen, name, json_true());
            ok = weights_add(set, dir, name, e);
        }
        if (!ok) break;
    }
    json_decref(seen);
    json_decref(root);
    return ok;
}

static bool weights_open_dir(WeightSet *set, const char *dir, Error *e) {
    char *single = path_join(dir, "model.safetensors"), *index = path_join(dir, "model.safetensors.index.json");
    char *pickle = path_join(dir, "pytorch_model.bin");
    bool ok;
    if (path_exists(single)) ok = weights_add(set, dir, "model.safetensors", e);
    else if (path_exists(index)) ok = weights_add_shards(set, dir, index, e);
    else if (path_exists(pickle))
        ok = fail(e, EXIT_DATA, "%s: found pytorch_model.bin, which is a Python pickle; expected model.safetensors. Convert it once in Python: "
                  "GPT2LMHeadModel.from_pretrained(DIR).save_pretrained(DIR, safe_serialization=True)", dir);
    else ok = fail(e, EXIT_DATA, "%s: found neither model.safetensors nor model.safetensors.index.json; is it a model directory?", dir);
    free(single);
    free(index);
    free(pickle);
    return ok;
}

bool weights_open(WeightSet *set, const char *path, Error *e) {
    *set = (WeightSet){0};
    bool ok = path_is_dir(path) ? weights_open_dir(set, path, e) : weights_add(set, "", path, e);
    if (!ok) weights_close(set);
    return ok;
}

void weights_close(WeightSet *set) {
    for (size_t i = 0; i < set->n; i++) st_close(&set->files[i]);
    free(set->files);
    *set = (WeightSet){0};
}

/* The tensor of that name, with or without prefix; NULL: not there. */
static const StTensor *weights_find(const WeightSet *set, const char *name, const StFile **file) {
    char prefixed[96];
    snprintf(prefixed, sizeof prefixed, "%s%s", PREFIX, name);
    if (file) *file = NULL;
    for (size_t i = 0; i < set->n; i++) {
        const StTensor *t = st_find(&set->files[i], name);
        if (!t) t = st_find(&set->files[i], prefixed);
        if (file) *file = &set->files[i];
        if (t) return t;
    }
    return NULL;
}

/* ---- tensors against the model ---- */

/* Differences found, the first few in words. */
typedef struct {
    char text[1000];
    int n;
} Problems;

static void problem_add(Problems *p, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void problem_add(Problems *p, const char *format, ...) {
    size_t used = strlen(p->text);
    if (p->n++ >= 5) return;
    va_list args;
    va_start(args, format);
    if (used + 3 < sizeof p->text) used += (size_t)snprintf(p->text + used, sizeof p->text - used, "\n  ");
    vsnprintf(p->text + used, sizeof p->text - used, format, args);
    va_end(args);
}

static void shape_text(char out[200], const StTensor *t) {
    size_t used = (size_t)snprintf(out, 200, "(");
    for (int i = 0; i < t->n_dims && used < 180; i++)
        used += (size_t)snprintf(out + used, 200 - used, "%s%llu", i ? ", " : "", (unsigned long long)t->shape[i]);
    snprintf(out + used, 200 - used, ")");
}

static void expected_check(Problems *p, const WeightSet *set, const ParamTensor *t) {
    StTensor expected = file_tensor(t, 0);
    const StTensor *found = weights_find(set, t->name, NULL);
    char a[200], b[200];
    shape_text(b, &expected);
    if (!found) {
        problem_add(p, "missing: %s %s", t->name, b);
        return;
    }
    bool same = found->n_dims == expected.n_dims && found->dtype <= ST_F64;
    for (int i = 0; same && i < expected.n_dims; i++) same = found->shape[i] == expected.shape[i];
    if (same) return;
    shape_text(a, found);
    problem_add(p, "%s: found %s %s, expected F32, F16, BF16 or F64 %s", t->name, found->dtype_name, a, b);
}

static bool ends_with(const char *s, const char *end) {
    size_t n = strlen(s), k = strlen(end);
    return n >= k && strcmp(s + n - k, end) == 0;
}

/* Masks that old files carry are no parameters; the head is compared on its own. */
static bool name_ignored(const char *name) {
    return ends_with(name, ".attn.bias") || ends_with(name, ".attn.masked_bias") || strcmp(name, "lm_head.weight") == 0;
}

static void surplus_check(Problems *p, const WeightSet *set, const GPT2 *model) {
    for (size_t f = 0; f < set->n; f++)
        for (size_t i = 0; i < set->files[f].n; i++) {
            const StTensor *t = &set->files[f].tensors[i];
            const char *name = without_prefix(t->name);
            char shape[200];
            bool known = name_ignored(name);
            for (size_t k = 0; !known && k < model->layout.n_tensors; k++) known = strcmp(model->layout.tensors[k].name, name) == 0;
            shape_text(shape, t);
            if (!known) problem_add(p, "surplus: %.200s %s", t->name, shape);
            else if (!name_ignored(name) && weights_find(set, name, NULL) != t) problem_add(p, "twice: %.200s %s", t->name, shape);
        }
}

/* A head of its own would be lost here: the model ties it to wte. */
static bool head_check(const WeightSet *set, const char *path, Error *e) {
    const StFile *head_file, *wte_file;
    const StTensor *head = weights_find(set, "lm_head.weight", &head_file), *wte = weights_find(set, "wte.weight", &wte_file);
    if (!head) return true;
    if (head->dtype != wte->dtype || head->n_dims != 2 || head->shape[0] != wte->shape[0] || head->shape[1] != wte->shape[1])
        return fail(e, EXIT_DATA, "%s: lm_head.weight has another shape or dtype than wte.weight; untied heads are not supported", path);
    size_t n = (size_t)(wte->shape[0] * wte->shape[1]), i = 0;
    float *a = xmalloc(n * sizeof *a), *b = xmalloc(n * sizeof *b);
    bool ok = st_read_f32(head_file, head, a, e) && st_read_f32(wte_file, wte, b, e);
    if (ok && memcmp(a, b, n * sizeof *a)) {
        while (memcmp(&a[i], &b[i], sizeof *a) == 0) i++;
        ok = fail(e, EXIT_DATA, "%s: lm_head.weight differs from wte.weight (row %zu, column %zu: %g, expected %g); untied heads are not supported",
                  path, i / (size_t)wte->shape[1], i % (size_t)wte->shape[1], (double)a[i], (double)b[i]);
    }
    free(a);
    free(b);
    return ok;
}

bool weights_check(const WeightSet *set, const char *path, const GPT2 *model, Error *e) {
    Problems p = {.n = 0};
    for (size_t i = 0; i < model->layout.n_tensors; i++) expected_check(&p, set, &model->layout.tensors[i]);
    surplus_check(&p, set, model);
    if (p.n)
        return fail(e, EXIT_DATA, "%s: the tensors are not those of a GPT-2 with V %zu, L %zu, C %zu, T %zu: %d difference%s%s%s", path,
                    model->config.V, model->config.L, model->config.C, model->config.T, p.n, p.n > 1 ? "s" : "", p.text,
                    p.n > 5 ? "\n  ..." : "");
    return head_check(set, path, e);
}

bool weights_read(const WeightSet *set, GPT2 *model, bool finite, Error *e) {
    bool ok = true;
    for (size_t i = 0; ok && i < model->layout.n_tensors; i++) {
        const ParamTensor *t = &model->layout.tensors[i];
        const StFile *file;
        const StTensor *found = weights_find(set, t->name, &file);
        CHECK(found, "weights_check accepted a file without %s", t->name);
        size_t n = t->file_rows * t->cols;
        float *values = xmalloc(n * sizeof *values);
        ok = st_read_f32(file, found, values, e);
        for (size_t k = 0; ok && finite && k < n; k++)
            if (!isfinite(values[k]))
                ok = fail(e, EXIT_DATA, "%s: tensor %s: element %zu is %g; weights must be finite", file->path, t->name, k, (double)values[k]);
        if (ok) gpt2_tensor_set(model, t, PARAM_MASTER, values);
        free(values);
    }
    if (ok) gpt2_params_changed(model);
    return ok;
}

/* ---- config.json ---- */

static bool size_field(const json_t *root, const char *path, const char *name, size_t *out, Error *e) {
    const json_t *value = json_object_get(root, name);
    if (!json_is_integer(value) || json_integer_value(value) < 1 || json_integer_value(value) > SIZE_LIMIT)
        return fail(e, EXIT_DATA, "%s: field %s is %s, expected an integer from 1 to %d", path, name, value ? "something else" : "missing",
                    SIZE_LIMIT);
    *out = (size_t)json_integer_value(value);
    return true;
}

/* A field that is absent or null has its default, which is the supported value. */
static bool unsupported(const json_t *root, const char *path, const char *name, bool ok, const char *expected, Error *e) {
    const json_t *value = json_object_get(root, name);
    if (!value || json_is_null(value) || ok) return true;
    char *found = json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT);
    fail(e, EXIT_DATA, "%s: field %s: found %.200s, supported is only %s", path, name, found ? found : "?", expected);
    free(found);
    return false;
}

static bool is_text(const json_t *root, const char *name, const char *text) {
    const char *value = json_string_value(json_object_get(root, name));
    return value && strcmp(value, text) == 0;
}

static bool features_check(const json_t *root, const char *path, size_t C, Error *e) {
    const json_t *inner = json_object_get(root, "n_inner"), *epsilon = json_object_get(root, "layer_norm_epsilon");
    bool gelu = is_text(root, "activation_function", "gelu_new") || is_text(root, "activation_function", "gelu_pytorch_tanh");
    return unsupported(root, path, "model_type", is_text(root, "model_type", "gpt2"), "\"gpt2\"", e) &&
           unsupported(root, path, "activation_function", gelu, "\"gelu_new\" or \"gelu_pytorch_tanh\"", e) &&
           unsupported(root, path, "n_inner", json_is_integer(inner) && json_integer_value(inner) == 4 * (json_int_t)C, "null or 4 n_embd", e) &&
           unsupported(root, path, "layer_norm_epsilon", fabs(json_number_value(epsilon) - 1e-5) < 1e-12, "1e-05", e) &&
           unsupported(root, path, "scale_attn_weights", json_is_true(json_object_get(root, "scale_attn_weights")), "true", e) &&
           unsupported(root, path, "scale_attn_by_inverse_layer_idx",
                       json_is_false(json_object_get(root, "scale_attn_by_inverse_layer_idx")), "false", e) &&
           unsupported(root, path, "add_cross_attention", json_is_false(json_object_get(root, "add_cross_attention")), "false", e) &&
           unsupported(root, path, "tie_word_embeddings", json_is_true(json_object_get(root, "tie_word_embeddings")), "true", e);
}

static bool config_read(const char *path, GPT2Config *c, Error *e) {
    json_t *root = json_read_object(path, e);
    *c = (GPT2Config){0};
    bool ok = root && size_field(root, path, "vocab_size", &c->V, e) && size_field(root, path, "n_positions", &c->T, e) &&
              size_field(root, path, "n_embd", &c->C, e) && size_field(root, path, "n_layer", &c->L, e) &&
              size_field(root, path, "n_head", &c->H, e) && features_check(root, path, c->C, e);
    json_decref(root);
    return ok;
}

/* The directory that a path names or lies in; caller frees. */
static char *dir_of(const char *path) {
    const char *slash = strrchr(path, '/');
    if (path_is_dir(path)) return xstrdup(path);
    return slash ? xasprintf("%.*s", (int)(slash - path + (slash == path)), path) : xstrdup(".");
}

/* config.json in the directory or beside the file; NULL: none. */
static char *config_path(const char *path) {
    char *dir = dir_of(path), *config = path_join(dir, "config.json");
    free(dir);
    if (path_exists(config)) return config;
    free(config);
    return NULL;
}

/* Shape from the tensors of a file that has no config.json. Tensors cannot tell the number of heads. */
static bool config_infer(const char *path, GPT2Config *c, Error *e) {
    WeightSet set;
    char name[64];
    if (!weights_open(&set, path, e)) return false;
    const StTensor *wte = weights_find(&set, "wte.weight", NULL), *wpe = weights_find(&set, "wpe.weight", NULL);
    *c = (GPT2Config){0};
    bool ok = (wte && wpe && wte->n_dims == 2 && wpe->n_dims == 2) ||
              fail(e, EXIT_DATA, "%s: found no wte.weight and wpe.weight matrices; it is not a GPT-2", path);
    if (ok) {
        *c = (GPT2Config){.V = (size_t)wte->shape[0], .C = (size_t)wte->shape[1], .T = (size_t)wpe->shape[0], .H = (size_t)wte->shape[1] / 64};
        do snprintf(name, sizeof name, "h.%zu.ln_1.weight", c->L);
        while (weights_find(&set, name, NULL) && ++c->L);
        ok = (c->C && c->C % 64 == 0) ||
             fail(e, EXIT_DATA, "%s: no config.json beside it, and %zu channels do not divide into heads of 64; put the model's config.json "
                  "(n_head) beside it", path, c->C);
    }
    weights_close(&set);
    if (ok) fprintf(stderr, "note: %s has no config.json beside it: heads of size 64 assumed, so %zu heads\n", path, c->H);
    return ok;
}

bool import_config(const char *path, GPT2Config *config, Error *e) {
    char *json = NULL;
    bool ok;
    if (!path_exists(path)) return fail(e, EXIT_DATA, "%s does not exist; expected a model directory, a .safetensors file or a llm.c .bin", path);
    if (bin_is_weights(path)) ok = bin_config(path, config, e);
    else if ((json = config_path(path))) ok = config_read(json, config, e);
    else if (path_is_dir(path)) ok = fail(e, EXIT_DATA, "%s: found no config.json; expected a Hugging Face GPT-2 directory", path);
    else ok = config_infer(path, config, e);
    if (ok && !gpt2_config_check(config, e)) {
        ok = fail_in(e, "%s", path);
        if (e) e->code = EXIT_DATA;
    }
    free(json);
    return ok;
}

bool import_weights(const char *path, GPT2 *model, Error *e) {
    if (bin_is_weights(path)) return bin_weights(path, model, e);
    char *json = config_path(path);
    GPT2Config found = model->config;
    bool ok = !json || config_read(json, &found, e);
    if (ok && found.H != model->config.H)
        ok = fail(e, EXIT_DATA, "%s: found %zu heads, the model has %zu", json, found.H, model->config.H);
    free(json);
    WeightSet set;
    if (!ok || !weights_open(&set, path, e)) return false;
    ok = weights_check(&set, path, model, e) && weights_read(&set, model, true, e);
    weights_close(&set);
    return ok;
}

static bool has(const char *dir, const char *name) {
    char *path = path_join(dir, name);
    bool found = path_exists(path);
    free(path);
    return found;
}

char *import_tokenizer_dir(const char *path) {
    char *dir = dir_of(path);
    if ((has(dir, "vocab.json") && has(dir, "merges.txt")) || has(dir, "tokenizer.json")) return dir;
    free(dir);
    return NULL;
}
