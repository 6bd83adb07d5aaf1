/* tokenize: trains a byte-level BPE vocabulary, encodes text to token shards, decodes shards to text. The work is done in llmc/data. */
#include "../../llmc/base/options.h"
#include "../../llmc/base/version.h"
#include "../../llmc/data/shards.h"
#include "../../llmc/data/tokenizer.h"
#include "../../llmc/run/log.h"
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    bool help, version, separator, quiet;
    int64_t vocab_size, threads;
    double val_fraction;
    const char *out, *tokenizer, *val, *marker;
} Options;

#define AT(field) offsetof(Options, field)
#define HELP {"help", OPT_BOOL, AT(help), NULL, 0, 0, NULL, "Other", NULL, "this text"}
#define QUIET {"quiet", OPT_BOOL, AT(quiet), NULL, 0, 0, NULL, "Other", NULL, "no progress"}
#define MARKER {"document-marker", OPT_STRING, AT(marker), "<|endoftext|>", 0, 0, NULL, "Text", "S", \
                "where this stands in a text, a new document begins; it is left out of the text. none: the whole file is one"}
#define TOKENIZER {"tokenizer", OPT_STRING, AT(tokenizer), NULL, 0, 0, NULL, "Tokenizer", "DIR", \
                   "directory with vocab.json and merges.txt, or with a tokenizer.json, or that file"}

static const Option train_rows[] = {
    {"vocab-size", OPT_INT, AT(vocab_size), NULL, 257, 1e9, NULL, "Tokenizer", "N", "tokens: 256 bytes, N - 257 merges, <|endoftext|>"},
    {"out", OPT_STRING, AT(out), NULL, 0, 0, NULL, "Tokenizer", "DIR", "write vocab.json, merges.txt and tokenizer_config.json there"},
    MARKER, QUIET, HELP};
static const Option encode_rows[] = {
    TOKENIZER,
    {"out", OPT_STRING, AT(out), NULL, 0, 0, NULL, "Tokens", "FILE", "the token shard to write (.bin)"},
    {"val", OPT_STRING, AT(val), NULL, 0, 0, NULL, "Tokens", "FILE", "a second shard for the last part of the documents"},
    {"val-fraction", OPT_FLOAT, AT(val_fraction), "0.05", 1e-9, 1 - 1e-9, NULL, "Tokens", "F",
     "how much of the documents goes there; less than one document: of the text"},
    {"separator", OPT_BOOL, AT(separator), "true", 0, 0, NULL, "Tokens", NULL, "put <|endoftext|> before each document"},
    MARKER,
    {"threads", OPT_INT, AT(threads), "0", 0, 4096, NULL, "Other", "N", "threads that encode; 0: one per core. The result is the same"},
    QUIET, HELP};
static const Option decode_rows[] = {TOKENIZER, HELP};
static const Option main_rows[] = {HELP, {"version", OPT_BOOL, AT(version), NULL, 0, 0, NULL, "Other", NULL, "build and features"}};
#undef AT
#define ROWS(rows) rows, sizeof rows / sizeof *rows
static const OptionTable train_table = {"tokenize train", "tokenize train --vocab-size N --out DIR FILES\n  FILES: text; - is standard input", ROWS(train_rows)};
static const OptionTable encode_table = {
    "tokenize encode", "tokenize encode --tokenizer DIR --out FILE.bin [options] FILES\n  FILES: text; - is standard input", ROWS(encode_rows)};
static const OptionTable decode_table = {"tokenize decode", "tokenize decode --tokenizer DIR FILE.bin\n  writes the text to standard output", ROWS(decode_rows)};
static const OptionTable main_table = {
    "tokenize",
    "tokenize train --vocab-size N --out DIR FILES                           make a vocabulary\n"
    "       tokenize encode --tokenizer DIR --out FILE.bin [options] FILES          text to tokens\n"
    "       tokenize decode --tokenizer DIR FILE.bin                                tokens to text\n"
    "       tokenize train|encode|decode --help                                     their options",
    ROWS(main_rows)};

static bool need(const char *value, const char *name, Error *e) {
    return (value && *value) || fail(e, EXIT_USAGE, "%s is missing; see --help", name);
}

static bool need_files(int n, Error *e) { return n > 0 || fail(e, EXIT_USAGE, "no file given; see --help"); }

static const char *marker_of(const Options *o) { return strcmp(o->marker, "none") ? o->marker : NULL; }

static Progress merging;
static void show_merges(size_t done, size_t of) {
    if (merging.total == 0) progress_begin(&merging, "merging", "merges", (double)of, false);
    if (done < of) progress_update(&merging, (double)done);
}

static bool train(const Options *o, char **paths, int n, Error *e) {
    if (!o->vocab_size) return fail(e, EXIT_USAGE, "--vocab-size is missing; see --help");
    if (!need(o->out, "--out", e) || !need_files(n, e)) return false;
    BpeTrainer *trainer = bpe_trainer_create((size_t)o->vocab_size, e);
    if (!trainer) return false;
    if (!bpe_trainer_feed_files(trainer, paths, (size_t)n, marker_of(o), e)) {
        bpe_trainer_free(trainer);
        return false;
    }
    Tokenizer *t = bpe_trainer_finish(trainer, o->quiet ? NULL : show_merges, e);
    if (!t) return false;
    size_t made = tokenizer_vocab_size(t);
    if (merging.total > 0) progress_end(&merging, (double)made - 257);
    bool ok = tokenizer_save(t, o->out, e);
    if (ok && made < (size_t)o->vocab_size)
        fprintf(stderr, "note: %zu tokens instead of %" PRId64 ": no pair of tokens occurs twice any more; more text makes more\n", made, o->vocab_size);
    if (ok) printf("%s: %zu tokens\n", o->out, made);
    tokenizer_free(t);
    return ok;
}

static bool encode(const Options *o, char **paths, int n, Error *e) {
    if (!need(o->tokenizer, "--tokenizer", e) || !need(o->out, "--out", e) || !need_files(n, e)) return false;
    Tokenizer *t = tokenizer_load(o->tokenizer, e);
    if (!t) return false;
    EncodeJob job = {.tokenizer = t, .out_path = o->out, .validation_path = o->val, .validation_fraction = o->val_fraction,
                     .separator = o->separator, .document_marker = marker_of(o), .quiet = o->quiet, .threads = (int)o->threads};
    bool ok = tokenizer_encode_files(&job, paths, (size_t)n, e);
    if (ok) printf("%s: %" PRIu64 " tokens of %" PRIu64 " bytes\n", o->out, job.train_tokens, job.train_bytes);
    if (ok && o->val) printf("%s: %" PRIu64 " tokens of %" PRIu64 " bytes\n", o->val, job.validation_tokens, job.validation_bytes);
    tokenizer_free(t);
    return ok;
}

static bool decode_shard(const Tokenizer *t, const Shard *s, Error *e) {
    enum { AT_ONCE = 1 << 16 };
    int32_t *ids = xmalloc(AT_ONCE * sizeof *ids);
    bool ok = true;
    for (uint64_t at = 0; ok && at < s->n_tokens; at += AT_ONCE) {
        size_t n = s->n_tokens - at < AT_ONCE ? (size_t)(s->n_tokens - at) : AT_ONCE;
        ok = shard_tokens(s, at, n, ids, e);
        for (size_t i = 0; ok && i < n; i++) {
            size_t bytes;
            const char *token = tokenizer_token(t, ids[i], &bytes);
            if (!token)
                ok = fail(e, EXIT_DATA, "%s: token %" PRIu64 " (byte %" PRIu64 ") is %" PRIu32 ", the tokenizer has %zu; was the shard made with another one?",
                          s->path, at + i, s->header_bytes + (at + i) * s->token_bytes, (uint32_t)ids[i], tokenizer_vocab_size(t));
            else if (fwrite(token, 1, bytes, stdout) != bytes) ok = fail(e, EXIT_STORAGE, "cannot write the text: %s", strerror(errno));
        }
    }
    free(ids);
    return ok;
}

static bool decode(const Options *o, char **paths, int n, Error *e) {
    if (!need(o->tokenizer, "--tokenizer", e) || !need_files(n, e)) return false;
    Tokenizer *t = tokenizer_load(o->tokenizer, e);
    bool ok = t != NULL;
    for (int i = 0; ok && i < n; i++) {
        Dataset d;
        ok = dataset_open(&d, paths[i], 0, e);
        for (size_t k = 0; ok && k < d.n_shards; k++) ok = decode_shard(t, &d.shards[k], e);
        if (d.shards) dataset_close(&d);
    }
    if (ok && fflush(stdout)) ok = fail(e, EXIT_STORAGE, "cannot write the text: %s", strerror(errno));
    tokenizer_free(t);
    return ok;
}

static const struct {
    const char *name;
    const OptionTable *table;
    bool (*run)(const Options *, char **, int, Error *);
} commands[] = {{"train", &train_table, train}, {"encode", &encode_table, encode}, {"decode", &decode_table, decode}};

static bool run_command(size_t command, int argc, char **argv, Error *e) {
    const OptionTable *table = commands[command].table;
    Options o = {0};
    char **paths = NULL;
    int n = 0;
    if (!options_parse(table, &o, NULL, argc, argv, &paths, &n, e)) return false;
    bool ok = true;
    if (o.help) options_help(table, stdout);
    else ok = commands[command].run(&o, paths, n, e);
    free(paths);
    options_free(table, &o);
    return ok;
}

static bool without_command(int argc, char **argv, Error *e) {
    Options o = {0};
    if (argc < 2) return fail(e, EXIT_USAGE, "no command given; expected train, encode or decode. See tokenize --help");
    if (*argv[1] != '-') return fail(e, EXIT_USAGE, "unknown command \"%s\"; expected train, encode or decode. See tokenize --help", argv[1]);
    if (!options_parse(&main_table, &o, NULL, argc, argv, NULL, NULL, e)) return false;
    if (o.version) version_print(stdout);
    else options_help(&main_table, stdout);
    options_free(&main_table, &o);
    return true;
}

int main(int argc, char **argv) {
    Error e = {0};
    size_t command = 0, n_commands = sizeof commands / sizeof *commands;
    while (command < n_commands && (argc < 2 || strcmp(argv[1], commands[command].name))) command++;
    bool ok = command < n_commands ? run_command(command, argc - 1, argv + 1, &e) : without_command(argc, argv, &e);
    return ok ? EXIT_OK : error_print(&e);
}
