/* From what the user calls data to token files: text is tokenized once into RUN/data (and a BPE vocabulary trained on it where
 * none is given); token shards are used where they lie. RUN/data/source.json is written last and names what it was made from. */
#include "../base/io.h"
#include "session.h"
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static bool is_text(const char *path) { return path && !strpbrk(path, "*?[") && !shard_is_tokens(path); }

/* Compression gains little past these sizes at the model sizes that fit such texts. */
static size_t default_vocab_size(uint64_t bytes) {
    static const struct { uint64_t bytes; size_t vocab; } sizes[] = {
        {200000, 512}, {2000000, 1024}, {20000000, 4096}, {200000000, 8192}, {2000000000, 16384}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (bytes < sizes[i].bytes) return sizes[i].vocab;
    return 32768;
}

static void show_merges(size_t done, size_t of) {
    if (isatty(2)) fprintf(stderr, "\rtraining the tokenizer: %zu of %zu merges%s", done, of, done >= of ? "\n" : "");
}

static bool train_tokenizer(Session *s, const char *dir, uint64_t text_bytes, Error *e) {
    size_t vocab = s->options->vocab_size ? (size_t)s->options->vocab_size : default_vocab_size(text_bytes);
    fprintf(stderr, "tokenizer: training a BPE vocabulary of %zu on %s%s\n", vocab, s->options->data,
            s->options->vocab_size ? "" : " (size chosen by the text's; --vocab-size to change)");
    BpeTrainer *trainer = bpe_trainer_create(vocab, e);
    if (!trainer) return false;
    char *paths[] = {(char *)s->options->data};
    if (!bpe_trainer_feed_files(trainer, paths, 1, "<|endoftext|>", e)) return bpe_trainer_free(trainer), false;
    s->tokenizer = bpe_trainer_finish(trainer, show_merges, e);
    return s->tokenizer && dir_create(dir, e) && tokenizer_save(s->tokenizer, dir, e);
}

static bool encode(const Session *s, const char *text, const char *out, const char *val_out, Error *e) {
    EncodeJob job = {.tokenizer = s->tokenizer, .out_path = out, .validation_path = val_out, .separator = true,
                     .validation_fraction = val_out ? s->options->val_fraction : 0,
                     .document_marker = tokenizer_end_of_text(s->tokenizer) >= 0 ? "<|endoftext|>" : NULL};
    char *paths[] = {(char *)text};
    if (!tokenizer_encode_files(&job, paths, 1, e)) return false;
    fprintf(stderr, "tokenized %s: %llu tokens", text, (unsigned long long)job.train_tokens);
    if (val_out) fprintf(stderr, " for training, %llu for validation", (unsigned long long)job.validation_tokens);
    fprintf(stderr, "\n");
    return true;
}

/* What RUN/data is made from, as JSON; compared before reuse. */
static json_t *source_of(const Session *s, Error *e) {
    const Config *o = s->options;
    char data[33] = "", val[33] = "";
    if (is_text(o->data) && !file_hash(o->data, NULL, data, e)) return NULL;
    if (is_text(o->val) && !file_hash(o->val, NULL, val, e)) return NULL;
    return json_pack("{ss ss ss sI sf}", "data", data, "val", val, "tokenizer", s->tokenizer ? tokenizer_fingerprint(s->tokenizer) : "",
                     "vocab_size", (json_int_t)o->vocab_size, "val_fraction", o->val ? 0.0 : o->val_fraction);
}

static bool make_token_files(Session *s, const char *dir, Error *e) {
    const Config *o = s->options;
    char *tokenizer_dir = path_join(dir, "tokenizer"), *train = path_join(dir, "train.bin"), *val = path_join(dir, "val.bin");
    bool ok = dir_create(dir, e), split = is_text(o->data) && !o->val;
    if (ok && !s->tokenizer && is_text(o->data)) {
        uint64_t bytes = 0;
        ok = file_hash(o->data, &bytes, NULL, e) && train_tokenizer(s, tokenizer_dir, bytes, e);
    }
    if (ok && !s->tokenizer)
        ok = fail(e, EXIT_USAGE, "--val %s is text, but no tokenizer is known; give --tokenizer DIR, or --val as token shards", o->val);
    if (ok && is_text(o->data)) ok = encode(s, o->data, train, split ? val : NULL, e);
    if (ok && is_text(o->val)) ok = encode(s, o->val, val, NULL, e);
    free(tokenizer_dir);
    free(train);
    free(val);
    return ok;
}

/* Reuses DIR when its source.json says what source says, else makes it anew. */
static bool token_files(Session *s, const char *dir, Error *e) {
    char *mark = path_join(dir, "source.json"), *tokenizer_dir = path_join(dir, "tokenizer");
    json_t *source = source_of(s, e), *old = path_exists(mark) ? json_load_file(mark, 0, NULL) : NULL;
    bool ok = source != NULL;
    if (ok && old && !json_equal(source, old))
        ok = fail(e, EXIT_DATA, "%s was made from another text or tokenizer than the ones given now (see source.json there); "
                  "give the former --data, --val, --tokenizer and --vocab-size, or another --out", dir);
    else if (ok && old) {
        if (!s->tokenizer && path_is_dir(tokenizer_dir)) ok = (s->tokenizer = tokenizer_load(tokenizer_dir, e)) != NULL;
    } else if (ok && (ok = make_token_files(s, dir, e))) {
        char *text = json_dumps(source, JSON_INDENT(1) | JSON_SORT_KEYS);
        ok = file_replace(mark, text, strlen(text), e);
        free(text);
    }
    if (ok && !s->tokenizer_dir && path_is_dir(tokenizer_dir)) s->tokenizer_dir = xstrdup(tokenizer_dir);
    json_decref(source);
    json_decref(old);
    free(mark);
    free(tokenizer_dir);
    return ok;
}

static char *folder_for_token_files(Session *s, Error *e) {
    if (s->options->out && !s->options->eval_only) return path_join(s->options->out, "data");
    const char *tmp = getenv("TMPDIR");
    char *dir = path_join(tmp && *tmp ? tmp : "/tmp", "llmc-XXXXXX");
    if (mkdtemp(dir)) return s->temporary = xstrdup(dir), dir;
    fail(e, EXIT_STORAGE, "cannot make a temporary folder %s; set TMPDIR to a writable one", dir);
    free(dir);
    return NULL;
}

bool prepare_data(Session *s, Error *e) {
    const Config *o = s->options;
    const char *data = o->eval_only ? NULL : o->data;
    char *dir = NULL, *train = NULL, *val = NULL;
    bool ok = true;
    if (is_text(data) || is_text(o->val)) {
        for (int i = 0; i < 2 && ok; i++) {
            const char *path = i ? o->val : data;
            if (is_text(path) && access(path, R_OK) != 0)
                ok = fail(e, EXIT_DATA, "--%s %s: no such file, or not readable; expected a text file or token shards", i ? "val" : "data", path);
        }
        ok = ok && (dir = folder_for_token_files(s, e)) && token_files(s, dir, e);
    }
    if (ok && data) train = is_text(data) ? path_join(dir, "train.bin") : xstrdup(data);
    if (ok && (is_text(o->val) || (!o->val && is_text(data)))) val = path_join(dir, "val.bin");
    else if (ok && o->val) val = xstrdup(o->val);
    ok = ok && (!train || dataset_open(&s->train, train, s->T, e)) && (!val || dataset_open(&s->val, val, s->T, e));
    free(dir);
    free(train);
    free(val);
    return ok;
}
