/* From what the user calls data to token files: text is tokenized once into RUN/data (and a BPE vocabulary trained on it where
 * none is given); token shards are used where they lie. RUN/data/source.json is written last and names what it was made from. */
#include "../base/io.h"
#include "checkpoint_private.h"
#include "session.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

bool data_is_text(const char *path) { return path && !strpbrk(path, "*?[") && !shard_is_tokens(path); }

static uint64_t file_bytes(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 ? (uint64_t)st.st_size : 0;
}

/* Compression gains little past these sizes at the model sizes that fit such texts. */
size_t default_vocab_size(const char *text_path) {
    static const struct { uint64_t bytes; size_t vocab; } sizes[] = {
        {200000, 512}, {2000000, 1024}, {20000000, 4096}, {200000000, 8192}, {2000000000, 16384}};
    uint64_t bytes = file_bytes(text_path);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (bytes < sizes[i].bytes) return sizes[i].vocab;
    return 32768;
}

static void show_merges(size_t done, size_t of) {
    if (isatty(2)) fprintf(stderr, "\rtraining the tokenizer: %zu of %zu merges%s", done, of, done >= of ? "\n" : "");
}

static bool train_tokenizer(Session *s, const char *dir, Error *e) {
    const char *text = s->options->data;
    size_t vocab = s->options->vocab_size ? (size_t)s->options->vocab_size : default_vocab_size(text);
    fprintf(stderr, "tokenizer: training a BPE vocabulary of %zu on %s%s\n", vocab, text,
            s->options->vocab_size ? "" : " (size chosen by the text's; --vocab-size to change)");
    BpeTrainer *trainer = bpe_trainer_create(vocab, e);
    if (!trainer) return fail_in(e, "--vocab-size");
    char *paths[] = {(char *)text};
    if (!bpe_trainer_feed_files(trainer, paths, 1, "<|endoftext|>", e)) return bpe_trainer_free(trainer), false;
    s->tokenizer = bpe_trainer_finish(trainer, show_merges, e);
    if (s->tokenizer && tokenizer_vocab_size(s->tokenizer) < vocab)
        fprintf(stderr, "tokenizer: the text gives only %zu tokens; no further pair of them occurs twice\n", tokenizer_vocab_size(s->tokenizer));
    return s->tokenizer && dir_create(dir, e) && tokenizer_save(s->tokenizer, dir, e);
}

static bool encode(const Session *s, const char *text, const char *out, const char *val_out, Error *e) {
    bool separator = tokenizer_end_of_text(s->tokenizer) >= 0;
    if (!separator) fprintf(stderr, "the tokenizer has no <|endoftext|>: %s becomes one document, without a separator\n", text);
    EncodeJob job = {.tokenizer = s->tokenizer, .out_path = out, .validation_path = val_out, .separator = separator,
                     .validation_fraction = val_out ? s->options->val_fraction : 0, .document_marker = separator ? "<|endoftext|>" : NULL};
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
    if (data_is_text(o->data) && !file_hash(o->data, NULL, data, e)) return NULL;
    if (data_is_text(o->val) && !file_hash(o->val, NULL, val, e)) return NULL;
    return json_pack("{ss ss ss sI sf}", "data", data, "val", val, "tokenizer", s->tokenizer ? tokenizer_fingerprint(s->tokenizer) : "",
                     "vocab_size", (json_int_t)o->vocab_size, "val_fraction", o->val ? 0.0 : o->val_fraction);
}

/* The run's own tokenizer: from RUN/data, or, where that was removed, from the newest checkpoint back into RUN/data. s->tokenizer stays NULL
 * when there is none. */
static bool tokenizer_of_run(Session *s, const char *dir, Error *e) {
    if (path_is_dir(dir)) return (s->tokenizer = tokenizer_load(dir, e)) != NULL;
    StepDir *steps;
    size_t n;
    if (!steps_list(s->options->out, &steps, &n, e)) return false;
    char *from = n ? import_tokenizer_dir(steps[n - 1].path) : NULL;
    bool ok = !from || ((s->tokenizer = tokenizer_load(from, e)) && dir_create(dir, e) && tokenizer_save(s->tokenizer, dir, e));
    steps_free(steps, n);
    free(from);
    return ok;
}

/* The tokenizer that a text needs: the given one; that of the run, where it has one already (keep); else a new one. */
static bool find_tokenizer(Session *s, const char *dir, bool keep, Error *e) {
    const Config *o = s->options;
    if (s->tokenizer) return true;
    if (s->init_from)
        return fail(e, EXIT_USAGE, "--init-from %s comes without tokenizer files, and a new tokenizer would not fit its weights; give the model's own with --tokenizer DIR",
                    s->init_from);
    if (keep && !tokenizer_of_run(s, dir, e)) return false;
    if (s->tokenizer) return true;
    if (data_is_text(o->data) && !o->eval_only) return train_tokenizer(s, dir, e);
    return fail(e, EXIT_USAGE, "--val %s is text, but no tokenizer is known; give --tokenizer DIR, or --val as token shards", o->val);
}

typedef struct {
    char *mark, *tokenizer, *train, *val;  /* paths in RUN/data */
    bool train_text, val_text, split;      /* what is made: from --data, from --val, val.bin as a part of --data */
} TokenFiles;

static bool make_token_files(Session *s, const TokenFiles *f, bool keep_tokenizer, Error *e) {
    return find_tokenizer(s, f->tokenizer, keep_tokenizer, e) &&
           (!f->train_text || encode(s, s->options->data, f->train, f->split ? f->val : NULL, e)) &&
           (!f->val_text || encode(s, s->options->val, f->val, NULL, e));
}

static bool complete(const Session *s, const TokenFiles *f) {
    return (!f->train_text || path_exists(f->train)) && (!(f->val_text || f->split) || path_exists(f->val)) &&
           (s->tokenizer || path_is_dir(f->tokenizer));
}

static bool has_checkpoints(const Config *o, bool *has, Error *e) {
    StepDir *dirs;
    size_t n;
    *has = false;
    if (o->eval_only || !o->out) return true;
    if (!steps_list(o->out, &dirs, &n, e)) return false;
    *has = n > 0;
    steps_free(dirs, n);
    return true;
}

/* Uses the files again when source.json says that they were made from the same, else makes them. A run with checkpoints keeps its
 * tokenizer, and other text only comes in by --allow-change data; without checkpoints there is nothing to protect. */
static bool token_files(Session *s, const char *dir, const TokenFiles *f, Error *e) {
    bool has = false, ok = dir_create(dir, e) && has_checkpoints(s->options, &has, e);
    json_t *source = ok ? source_of(s, e) : NULL, *old = path_exists(f->mark) ? json_load_file(f->mark, 0, NULL) : NULL;
    ok = source != NULL;
    if (ok && old && json_equal(source, old) && complete(s, f)) ok = find_tokenizer(s, f->tokenizer, true, e);
    else if (ok && old && has && !json_equal(source, old) && !change_allowed(s->options, "data") && !change_allowed(s->options, "tokenizer"))
        ok = fail(e, EXIT_USAGE, "%s was made from another text or tokenizer than the ones given now (see source.json there); give the former --data, --val, "
                  "--val-fraction, --tokenizer and --vocab-size, or another --out, or accept other text with --allow-change data", dir);
    else if (ok) {
        char *text = json_dumps(source, JSON_INDENT(1) | JSON_SORT_KEYS);
        ok = path_remove_tree(f->mark, e) && make_token_files(s, f, has, e) && file_replace(f->mark, text, strlen(text), e);
        free(text);
    }
    if (ok && !s->tokenizer_dir && path_is_dir(f->tokenizer)) s->tokenizer_dir = xstrdup(f->tokenizer);
    json_decref(source);
    json_decref(old);
    return ok;
}

/* Looked at before it is opened: a pipe would be waited for, and text is read more than once. */
static bool check_file(const char *option, const char *path, Error *e) {
    struct stat st;
    if (!path || strpbrk(path, "*?[")) return true;
    if (stat(path, &st) != 0 || access(path, R_OK) != 0)
        return fail(e, EXIT_DATA, "--%s %s: %s; expected a text file or token shards", option, path, errno == ENOENT ? "no such file" : strerror(errno));
    if (!S_ISREG(st.st_mode))
        return fail(e, EXIT_DATA, "--%s %s: found %s, expected a text file or token shards; text is read several times, so write it to a file first", option, path,
                    S_ISDIR(st.st_mode) ? "a directory" : "a pipe or device");
    return st.st_size > 0 || fail(e, EXIT_DATA, "--%s %s: the file is empty; expected a text file or token shards", option, path);
}

static char *folder_for_token_files(const Session *s, bool temporary, Error *e) {
    if (!temporary) return path_join(s->options->out, "data");
    const char *tmp = getenv("TMPDIR");
    char *dir = path_join(tmp && *tmp ? tmp : "/tmp", "llmc-XXXXXX");
    if (mkdtemp(dir)) return dir;
    fail(e, EXIT_STORAGE, "cannot make a temporary folder %s; set TMPDIR to a writable one", dir);
    free(dir);
    return NULL;
}

static bool open_datasets(Session *s, const char *train, const char *val, const TokenFiles *f, Error *e) {
    const Config *o = s->options;
    if (train && !dataset_open(&s->train, train, s->T, e)) return f->train_text ? fail_in(e, "--data %s", o->data) : false;
    if (!val || dataset_open(&s->val, val, s->T, e)) return true;
    if (f->split) return fail_in(e, "the validation split of %s (its last part, --val-fraction %g; a larger one may help)", o->data, o->val_fraction);
    return f->val_text ? fail_in(e, "--val %s", o->val) : false;
}

/* A dry run opens token shards, which says how long an epoch is, and leaves text alone. */
bool prepare_data(Session *s, Error *e) {
    const Config *o = s->options;
    const char *data = o->eval_only ? NULL : o->data;
    if (!check_file("data", data, e) || !check_file("val", o->val, e)) return false;
    TokenFiles f = {.train_text = data_is_text(data), .val_text = data_is_text(o->val), .split = data_is_text(data) && !o->val};
    if (o->dry_run) {
        f = (TokenFiles){0};
        return open_datasets(s, data_is_text(data) ? NULL : data, data_is_text(o->val) ? NULL : o->val, &f, e);
    }
    bool text = f.train_text || f.val_text, ok = true;
    char *dir = text ? folder_for_token_files(s, o->eval_only, e) : NULL;
    if (text && !dir) return false;
    if (text) {
        f.mark = path_join(dir, "source.json"), f.tokenizer = path_join(dir, "tokenizer");
        f.train = path_join(dir, "train.bin"), f.val = path_join(dir, "val.bin");
        ok = token_files(s, dir, &f, e);
    }
    ok = ok && open_datasets(s, f.train_text ? f.train : data, f.val_text || f.split ? f.val : o->val, &f, e);
    if (text && o->eval_only) path_remove_tree(dir, NULL);  /* the open files stay readable, and no signal leaves them behind */
    free(dir);
    free(f.mark);
    free(f.tokenizer);
    free(f.train);
    free(f.val);
    return ok;
}
