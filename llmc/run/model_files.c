/* The files of a checkpoint that hold tensors, and the config and tokenizer files that make it a Hugging Face model directory.
 * One tensor at a time passes through one host buffer, whatever the model's size; or all that is written was copied to the host before.
 * Optimizer state: entry m.NAME / v.NAME is a flat piece of that tensor as held in memory, (out, in), without padding; the metadata entry
 * range.NAME = "begin end" says which elements. A process of many writes its pieces, and any number of processes reads them back. */
#include "checkpoint_private.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* ---- writing safetensors ---- */

typedef void (*FetchFn)(void *context, size_t i, float *values);

static bool write_values(FileWriter *w, const StTensor *tensors, size_t n, FetchFn fetch, void *context, PartTensor *out, Error *e) {
    bool ok = true;
    for (size_t i = 0; ok && i < n; i++) {
        size_t bytes = (size_t)(tensors[i].end - tensors[i].begin);
        float *values = xmalloc(bytes);
        fetch(context, i, values);
        out[i] = (PartTensor){.name = xstrdup(tensors[i].name), .begin = tensors[i].begin, .bytes = bytes};
        hash_hex(values, bytes, out[i].hash);
        ok = file_write(w, values, bytes, e);
        free(values);
    }
    return ok;
}

/* Size and checksum of the file just written; the header is read back to learn where its data starts. */
static bool part_finish(FileWriter *w, const char *path, Part *part, Error *e) {
    if (!file_commit(w, &part->bytes, part->hash, e)) return false;
    if (!part->n_tensors) return true;
    StFile f;
    if (!st_open(&f, path, e)) return false;
    for (size_t i = 0; i < part->n_tensors; i++) part->tensors[i].begin += f.data_start;
    st_close(&f);
    return true;
}

static bool write_tensors(const char *dir, const char *name, const StTensor *tensors, size_t n, FetchFn fetch, void *context,
                          const char *metadata, Manifest *m, Error *e) {
    char *path = path_join(dir, name);
    Part *part = manifest_add(m, name);
    part->tensors = xcalloc(n, sizeof *part->tensors);
    part->n_tensors = n;
    FileWriter *w = file_create(path, e);
    bool ok = w != NULL;
    if (ok && !(st_write_header(w, tensors, n, metadata, e) && write_values(w, tensors, n, fetch, context, part->tensors, e))) {
        file_abandon(w);
        ok = false;
    } else ok = ok && part_finish(w, path, part, e);
    free(path);
    return ok;
}

/* ---- the model as it is, or copies of it ---- */

static bool master_in_parts(const GPT2 *model) { return model->ranks.sharded && (void *)model->master.p != model->params.p; }

/* Elements of m, and of v, on this rank. Where each rank holds a whole copy, rank 0's counts. */
static size_t moments_held(size_t n_elements, Ranks ranks) { return ranks.sharded ? n_elements / ranks.n : ranks.rank ? 0 : n_elements; }

size_t source_bytes(size_t n_elements, Ranks ranks) { return ((ranks.rank ? 0 : n_elements) + 2 * moments_held(n_elements, ranks)) * sizeof(float); }

/* Memory that the machine can give without swapping; SIZE_MAX: not known. */
static size_t memory_available(void) {
    static const char key[] = "MemAvailable:";
    FILE *f = fopen("/proc/meminfo", "r");
    char line[128];
    unsigned long long kib = 0;
    while (f && !kib && fgets(line, sizeof line, f))
        if (strncmp(line, key, strlen(key)) == 0) kib = strtoull(line + strlen(key), NULL, 10);
    if (f) fclose(f);
    return kib ? (size_t)kib * 1024 : SIZE_MAX;
}

bool source_reserve(Source *s, SaveMemory *memory) {
    const GPT2 *model = s->model;
    const size_t n = model->layout.n_elements, held = moments_held(n, model->ranks), bytes = source_bytes(n, model->ranks) + 1; /* there may be nothing to copy */
    if (memory->bytes < bytes) {
        void *p = bytes > memory_available() / (size_t)s->comm->local_size ? NULL : realloc(memory->p, bytes);
        if (!p) return false;
        *memory = (SaveMemory){p, bytes};
    }
    s->copies = memory->p;
    s->master = s->copies;
    s->m = s->copies + (model->ranks.rank ? 0 : n);
    s->v = s->m + held;
    return true;
}

/* values: of the whole unit, in memory order, on all ranks, each of which has downloaded its part. */
static void collect_unit(const Source *s, size_t unit, float *values) {
    const size_t first = s->model->layout.unit_begin[unit], n = s->model->layout.unit_begin[unit + 1] - first;
    UnitPart p = gpt2_part(s->model, unit);
    s->model->backend->download(s->model->backend, values + (p.first - first), s->model->master.p + p.master, p.n * sizeof(float));
    s->comm->wait(s->comm, s->comm->all_gather(s->comm, values, n * sizeof(float)));
}

static size_t largest_unit(const GPT2 *model) {
    size_t largest = 0;
    for (size_t u = 0; u < model->layout.n_units; u++) {
        size_t n = model->layout.unit_begin[u + 1] - model->layout.unit_begin[u];
        if (n > largest) largest = n;
    }
    return largest;
}

void source_copy(Source *s) {
    const GPT2 *model = s->model;
    Backend *be = model->backend;
    const size_t n = model->layout.n_elements, held = moments_held(n, model->ranks);
    float *passing = master_in_parts(model) && model->ranks.rank ? xmalloc(largest_unit(model) * sizeof *passing) : NULL;
    for (size_t u = 0; master_in_parts(model) && u < model->layout.n_units; u++) collect_unit(s, u, passing ? passing : s->master + model->layout.unit_begin[u]);
    free(passing);
    if (!master_in_parts(model) && !model->ranks.rank) be->download(be, s->master, model->master.p, n * sizeof(float));
    if (!held) return;
    be->download(be, s->m, model->m.p, held * sizeof(float));
    be->download(be, s->v, model->v.p, held * sizeof(float));
}

/* Master weights; where the ranks hold parts of them and there are no copies, a unit at a time is collected from all. */
typedef struct {
    const Source *source;
    float *values;            /* of unit `next` - 1, in memory order */
    size_t next;
} MasterReader;

static bool collects(const MasterReader *r) { return !r->source->copies && master_in_parts(r->source->model); }

static void next_unit(MasterReader *r) {
    if (!r->values) r->values = xmalloc(largest_unit(r->source->model) * sizeof(float));
    collect_unit(r->source, r->next++, r->values);
}

/* All ranks have collected as many units, whatever became of the file. */
static void reader_end(MasterReader *r) {
    while (collects(r) && r->next < r->source->model->layout.n_units) next_unit(r);
    free(r->values);
}

void join_model_files(const Source *s) { reader_end(&(MasterReader){.source = s}); }

static void fetch_master(void *context, size_t i, float *values) {
    MasterReader *r = context;
    const GPT2 *model = r->source->model;
    const ParamTensor *t = &model->layout.tensors[i];
    if (collects(r)) {
        while (r->next <= t->unit) next_unit(r);
        gpt2_tensor_to_file(t, r->values + (t->offset - model->layout.unit_begin[t->unit]), values);
    } else if (r->source->copies) gpt2_tensor_to_file(t, r->source->master + t->offset, values);
    else gpt2_tensor_get(model, t, PARAM_MASTER, values);
}

/* What a file holds of a tensor: vectors are the ones without decay (a matrix may have one row). */
StTensor file_tensor(const ParamTensor *t, uint64_t begin) {
    StTensor st = {.name = (char *)t->name, .dtype = ST_F32, .dtype_name = "F32", .n_dims = t->decay ? 2 : 1, .begin = begin};
    st.shape[0] = t->decay ? (t->conv1d ? t->cols : t->file_rows) : t->cols;
    st.shape[1] = t->conv1d ? t->file_rows : t->cols;
    st.end = begin + t->file_rows * t->cols * sizeof(float);
    return st;
}

static bool write_model_file(const char *dir, const Source *s, Manifest *m, Error *e) {
    const ParamLayout *layout = &s->model->layout;
    StTensor *tensors = xcalloc(layout->n_tensors, sizeof *tensors);
    for (size_t i = 0; i < layout->n_tensors; i++) tensors[i] = file_tensor(&layout->tensors[i], i ? tensors[i - 1].end : 0);
    char *metadata = m->run_id[0] ? xasprintf("{\"format\":\"pt\",\"run_id\":\"%s\",\"step\":\"%lld\"}", m->run_id, (long long)m->step)
                                  : xstrdup("{\"format\":\"pt\"}");
    MasterReader reader = {.source = s};
    bool ok = write_tensors(dir, "model.safetensors", tensors, layout->n_tensors, fetch_master, &reader, metadata, m, e);
    reader_end(&reader);
    free(metadata);
    free(tensors);
    return ok;
}

/* ---- optimizer state ---- */

/* What this rank holds of m and v: a piece of each tensor, where there is one. */
typedef struct { const ParamTensor *tensor; size_t begin, end, held; } Piece;
typedef struct {
    const Source *source;
    Piece *pieces;
    size_t n;
} Pieces;

static Pieces pieces_held(const Source *s) {
    const GPT2 *model = s->model;
    Pieces p = {.source = s, .pieces = xcalloc(model->layout.n_tensors, sizeof *p.pieces)};
    for (size_t i = 0; i < model->layout.n_tensors; i++) {
        Piece *piece = &p.pieces[p.n];
        piece->tensor = &model->layout.tensors[i];
        gpt2_held(model, piece->tensor, &piece->begin, &piece->end, &piece->held);
        if (piece->begin < piece->end) p.n++;
    }
    return p;
}

/* First all of m, then all of v. */
static void fetch_moment(void *context, size_t i, float *values) {
    const Pieces *p = context;
    const Piece *piece = &p->pieces[i % p->n];
    const Source *s = p->source;
    size_t bytes = (piece->end - piece->begin) * sizeof(float);
    if (s->copies) memcpy(values, (i < p->n ? s->m : s->v) + piece->held, bytes);
    else s->model->backend->download(s->model->backend, values, (i < p->n ? s->model->m.p : s->model->v.p) + piece->held, bytes);
}

static char *optimizer_metadata(const Pieces *p, const Ranks *ranks, const Manifest *m) {
    char text[64], world[24];
    snprintf(text, sizeof text, "%zu", ranks->rank);
    snprintf(world, sizeof world, "%zu", ranks->n);
    json_t *root = json_pack("{s:s, s:s, s:s, s:s, s:s}", "format", "llmc-optimizer", "run_id", m->run_id, "rank", text, "world", world,
                             "version", "1");
    snprintf(text, sizeof text, "%lld", (long long)m->step);
    json_object_set_new(root, "step", json_string(text));
    for (size_t i = 0; i < p->n; i++) {
        char key[64];
        snprintf(key, sizeof key, "range.%s", p->pieces[i].tensor->name);
        snprintf(text, sizeof text, "%zu %zu", p->pieces[i].begin, p->pieces[i].end);
        json_object_set_new(root, key, json_string(text));
    }
    char *json = json_dumps(root, JSON_COMPACT);
    CHECK(json, "json_dumps of the optimizer's metadata");
    json_decref(root);
    return json;
}

bool write_optimizer_file(const char *dir, const Source *s, Manifest *m, Error *e) {
    Pieces p = pieces_held(s);
    const Ranks ranks = s->model->ranks.sharded ? s->model->ranks : (Ranks){.n = 1};
    StTensor *tensors = xcalloc(2 * p.n + 1, sizeof *tensors);
    for (size_t i = 0; i < 2 * p.n; i++) {
        const Piece *piece = &p.pieces[i % p.n]; /* NOLINT(clang-analyzer-core.DivideZero): i < 2 n */
        size_t elements = piece->end - piece->begin;
        tensors[i] = (StTensor){.name = xasprintf("%c.%s", i < p.n ? 'm' : 'v', piece->tensor->name), .dtype_name = "F32", .n_dims = 1,
                                .shape = {elements}, .begin = i ? tensors[i - 1].end : 0};
        tensors[i].end = tensors[i].begin + elements * sizeof(float);
    }
    char *metadata = optimizer_metadata(&p, &ranks, m), *name = xasprintf("optimizer-%04zu-of-%04zu.safetensors", ranks.rank, ranks.n);
    bool ok = !p.n || write_tensors(dir, name, tensors, 2 * p.n, fetch_moment, &p, metadata, m, e);
    free(metadata);
    free(name);
    for (size_t i = 0; i < 2 * p.n; i++) free(tensors[i].name);
    free(tensors);
    free(p.pieces);
    return ok;
}

/* ---- reading optimizer state ---- */

/* "BEGIN END", in elements. */
static bool range_from_text(const char *text, size_t *begin, size_t *end) {
    char *after;
    if (!text || text[strspn(text, "0123456789 ")]) return false;
    errno = 0;
    *begin = strtoull(text, &after, 10);
    if (*after != ' ') return false;
    *end = strtoull(after + 1, &after, 10);
    return !*after && !errno && *begin <= *end;
}

/* The piece of tensor `name` in a file: m and v entries and the range that both cover. False: malformed. *moment NULL: not there. */
static bool piece_find(const OptimizerSet *set, size_t file, const ParamTensor *t, const StTensor *moment[2], size_t *begin, size_t *end) {
    char key[64];
    for (int k = 0; k < 2; k++) {
        snprintf(key, sizeof key, "%c.%s", "mv"[k], t->name);
        moment[k] = st_find(&set->files[file], key);
    }
    snprintf(key, sizeof key, "range.%s", t->name);
    const char *range = json_string_value(json_object_get(set->metadata[file], key));
    if (!moment[0] && !moment[1]) return true;
    if (!moment[0] || !moment[1] || !range_from_text(range, begin, end)) return false;
    for (int k = 0; k < 2; k++)
        if (moment[k]->dtype != ST_F32 || (moment[k]->end - moment[k]->begin) / sizeof(float) != *end - *begin) return false;
    return true;
}

/* Every element of the tensor must lie in exactly one piece; counts the entries used. */
static bool pieces_check(const OptimizerSet *set, const char *dir, const ParamTensor *t, size_t *used, Error *e) {
    size_t n = t->file_rows * t->cols, covered = 0, begin = 0, end = 0;
    for (bool found = true; found && covered < n;) {
        found = false;
        for (size_t i = 0; i < set->n && !found; i++) {
            const StTensor *moment[2];
            if (!piece_find(set, i, t, moment, &begin, &end))
                return fail(e, EXIT_DATA, "%s: tensors m.%s and v.%s and their range in the metadata do not agree; the file is damaged",
                            set->files[i].path, t->name, t->name);
            found = moment[0] && begin == covered && end > begin;
        }
        if (found) covered = end, *used += 2;
    }
    if (covered == n) return true;
    return fail(e, EXIT_DATA, "%s: optimizer state of tensor %s: found elements [0, %zu), expected [0, %zu); a shard is missing or belongs to "
                "another model", dir, t->name, covered, n);
}

bool optimizer_open(OptimizerSet *set, const char *dir, const Manifest *m, const GPT2 *model, Error *e) {
    /* NOLINTNEXTLINE(bugprone-sizeof-expression): metadata is an array of pointers */
    *set = (OptimizerSet){.files = xcalloc(m->n, sizeof *set->files), .metadata = xcalloc(m->n, sizeof *set->metadata)};
    size_t entries = 0, used = 0;
    bool ok = true;
    for (size_t i = 0; ok && i < m->n; i++) {
        if (strncmp(m->parts[i].name, "optimizer-", 10) != 0) continue;
        char *path = path_join(dir, m->parts[i].name);
        if ((ok = st_open(&set->files[set->n], path, e))) {
            const StFile *f = &set->files[set->n];
            entries += f->n;
            set->metadata[set->n++] = f->metadata_json ? json_loads(f->metadata_json, JSON_REJECT_DUPLICATES, NULL) : json_object();
        }
        free(path);
    }
    for (size_t i = 0; ok && i < model->layout.n_tensors; i++) ok = pieces_check(set, dir, &model->layout.tensors[i], &used, e);
    if (ok && used != entries)
        ok = fail(e, EXIT_DATA, "%s: the optimizer files hold %zu tensors, expected %zu; they overlap or belong to another model", dir, entries, used);
    if (!ok) optimizer_close(set);
    return ok;
}

bool optimizer_read(const OptimizerSet *set, GPT2 *model, Error *e) {
    size_t largest = 0, begin = 0, end = 0;
    for (size_t i = 0; i < model->layout.n_tensors; i++) {
        const ParamTensor *t = &model->layout.tensors[i];
        if (t->file_rows * t->cols > largest) largest = t->file_rows * t->cols;
    }
    float *values = xmalloc(largest * sizeof *values);
    bool ok = true;
    for (size_t i = 0; ok && i < model->layout.n_tensors * set->n; i++) {
        const ParamTensor *t = &model->layout.tensors[i / set->n];
        const StFile *f = &set->files[i % set->n];
        const StTensor *moment[2];
        ok = piece_find(set, i % set->n, t, moment, &begin, &end);
        CHECK(ok, "optimizer_open accepted %s", f->path);
        size_t first, last, held;
        gpt2_held(model, t, &first, &last, &held);
        const size_t from = begin > first ? begin : first, to = end < last ? end : last;
        for (int k = 0; ok && k < 2 && moment[k] && from < to; k++) {
            ok = st_read_f32(f, moment[k], values, e);
            float *at = (k ? model->v.p : model->m.p) + held + (from - first);
            if (ok) model->backend->upload(model->backend, at, values + (from - begin), (to - from) * sizeof(float));
        }
    }
    free(values);
    return ok;
}

void optimizer_close(OptimizerSet *set) {
    for (size_t i = 0; i < set->n; i++) {
        st_close(&set->files[i]);
        json_decref(set->metadata[i]);
    }
    free(set->files);
    free(set->metadata);
    *set = (OptimizerSet){0};
}

/* ---- small files ---- */

static bool write_bytes(const char *dir, const char *name, const void *data, size_t bytes, Manifest *m, Error *e) {
    char *path = path_join(dir, name);
    Part *part = manifest_add(m, name);
    FileWriter *w = file_create(path, e);
    bool ok = w != NULL;
    if (ok && !file_write(w, data, bytes, e)) {
        file_abandon(w);
        ok = false;
    } else ok = ok && part_finish(w, path, part, e);
    free(path);
    return ok;
}

bool write_text_file(const char *dir, const char *name, const char *text, Manifest *m, Error *e) {
    return write_bytes(dir, name, text, strlen(text), m, e);
}

/* <|endoftext|> is the last id of our own vocabularies and of GPT-2's, whose 50257 rows some files pad to 50304. */
static json_int_t end_of_text(size_t V) { return V > 50257 && V <= 50304 ? 50256 : (json_int_t)V - 1; }

static bool write_config_file(const char *dir, const GPT2Config *c, Manifest *m, Error *e) {
    json_t *root = json_pack("{s:s, s:[s], s:I, s:I, s:I, s:I, s:I, s:n, s:s, s:f, s:f, s:I, s:I, s:f, s:f, s:f, s:b, s:b, s:s}",
        "model_type", "gpt2", "architectures", "GPT2LMHeadModel", "vocab_size", (json_int_t)c->V, "n_positions", (json_int_t)c->T,
        "n_embd", (json_int_t)c->C, "n_layer", (json_int_t)c->L, "n_head", (json_int_t)c->H, "n_inner", "activation_function", "gelu_new",
        "layer_norm_epsilon", 1e-5, "initializer_range", 0.02, "bos_token_id", end_of_text(c->V), "eos_token_id", end_of_text(c->V),
        "resid_pdrop", 0.0, "embd_pdrop", 0.0, "attn_pdrop", 0.0, "scale_attn_weights", 1, "tie_word_embeddings", 1, "torch_dtype",
        "float32");
    CHECK(root, "json_pack of config.json");
    if (m->run_id[0]) json_object_set_new(root, "llmc", json_pack("{s:s, s:I}", "run_id", m->run_id, "step", (json_int_t)m->step));
    char *text = json_dumps(root, JSON_INDENT(2) | JSON_REAL_PRECISION(15));
    CHECK(text, "json_dumps of config.json");
    bool ok = write_text_file(dir, "config.json", text, m, e);
    free(text);
    json_decref(root);
    return ok;
}

static bool copy_tokenizer_files(const char *dir, const char *tokenizer_dir, Manifest *m, Error *e) {
    static const char *const names[] = {"vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"};
    bool ok = true;
    for (size_t i = 0; ok && i < sizeof names / sizeof *names; i++) {
        char *from = path_join(tokenizer_dir, names[i]);
        size_t bytes = 0;
        char *data = path_exists(from) ? file_read(from, &bytes, e) : NULL;
        if (data) ok = write_bytes(dir, names[i], data, bytes, m, e);
        else if (path_exists(from)) ok = false;
        free(data);
        free(from);
    }
    return ok;
}

bool write_model_files(const char *dir, const Source *s, const char *tokenizer_dir, Manifest *m, Error *e) {
    return write_model_file(dir, s, m, e) && write_config_file(dir, &s->model->config, m, e) &&
           (!tokenizer_dir || copy_tokenizer_files(dir, tokenizer_dir, m, e));
}
