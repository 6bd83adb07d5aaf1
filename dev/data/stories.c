/* stories: writes training text in a language whose entropy is known, reads such text back to give its exact probability, and
 * judges a validation loss against it. One story a line, each followed by a line <|endoftext|>. The language is in stories/. */
#include "../../llmc/base/io.h"
#include "../../llmc/base/options.h"
#include "../../llmc/base/rng.h"
#include "../../llmc/base/version.h"
#include "../../llmc/run/log.h"
#include "stories/language.h"
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

static const char separator[] = "\n<|endoftext|>\n";   /* the line end of the story, and the marker's line */
enum { SEPARATOR_BYTES = sizeof separator - 1, BUFFER_BYTES = 1 << 20, STREAM_TRAIN = RNG_STORY, STREAM_VAL = RNG_STORY + 1 };

typedef struct {
    bool help, version, facts;
    int64_t bytes, stories, seed, val_bytes, tokens;
    const char *out, *val_out, *report, *score;
    double val_loss;
} Options;

#define AT(field) offsetof(Options, field)
static const Option option_rows[] = {
    {"bytes", OPT_INT, AT(bytes), NULL, 0, 1e15, NULL, "Writing", "N", "write stories until the text has N bytes (8M, 10G)"},
    {"stories", OPT_INT, AT(stories), NULL, 0, 1e12, NULL, "Writing", "N", "or write N stories"},
    {"seed", OPT_INT, AT(seed), "1", 0, 9e15, NULL, "Writing", "N", "same seed, same text"},
    {"out", OPT_STRING, AT(out), NULL, 0, 0, NULL, "Writing", "FILE", "the text; absent: standard output"},
    {"val-out", OPT_STRING, AT(val_out), NULL, 0, 0, NULL, "Writing", "FILE", "also write a validation text, from random numbers of its own"},
    {"val-bytes", OPT_INT, AT(val_bytes), "300k", 1, 1e12, NULL, "Writing", "N", "its size"},
    {"report", OPT_STRING, AT(report), NULL, 0, 0, NULL, "Writing", "FILE", "write what was made as JSON: stories, bytes, nats"},
    {"score", OPT_STRING, AT(score), NULL, 0, 0, NULL, "Reading", "FILE", "read such a text back and print its exact probability (-: standard input)"},
    {"tokens", OPT_INT, AT(tokens), NULL, 0, 1e15, NULL, "Reading", "N", "with --score: tokens that the text became, for nats per token"},
    {"val-loss", OPT_FLOAT, AT(val_loss), NULL, 0, 1e9, NULL, "Reading", "X", "with --score and --tokens: compare a model's loss on that text with the truth"},
    {"facts", OPT_BOOL, AT(facts), NULL, 0, 0, NULL, "Other", NULL, "print the language's entropy, from the grammar alone"},
    {"help", OPT_BOOL, AT(help), NULL, 0, 0, NULL, "Other", NULL, "this text"},
    {"version", OPT_BOOL, AT(version), NULL, 0, 0, NULL, "Other", NULL, "build and features"},
};
#undef AT
enum { N_OPTIONS = sizeof option_rows / sizeof *option_rows };
static const OptionTable option_table = {
    "stories",
    "stories --bytes N --out FILE [--val-out FILE]                 write\n"
    "       stories --score FILE [--tokens N [--val-loss X]]              read back, judge",
    option_rows, N_OPTIONS};

/* ---- sums over stories ---- */

typedef struct {
    int64_t stories;
    double bytes, nats, squares; /* squares: of the nats of each story */
    int64_t shared;              /* stories that also stand in the other text */
} Tally;

static void tally_add(Tally *t, double bytes, double nats) {
    t->stories++;
    t->bytes += bytes;
    t->nats += nats;
    t->squares += nats * nats;
}

/* Standard error of the sum of nats, from the spread of the stories. */
static double tally_error(const Tally *t) {
    double n = (double)t->stories, mean = t->nats / n;
    return n > 1 ? sqrt(fmax(0, t->squares / n - mean * mean) * n * n / (n - 1)) : INFINITY;
}

/* ---- writing ---- */

/* Hashes of the validation stories, so that the training text can be searched for them as it is written. */
typedef struct {
    uint64_t *slots;             /* 0: empty */
    size_t n, size;
} HashSet;

static bool hash_found(const HashSet *set, uint64_t h) {
    if (!set->size) return false;
    for (size_t i = h & (set->size - 1); set->slots[i]; i = (i + 1) & (set->size - 1))
        if (set->slots[i] == h) return true;
    return false;
}

static void hash_insert(HashSet *set, uint64_t h) {
    if (hash_found(set, h)) return;
    if (2 * (set->n + 1) > set->size) {
        HashSet old = *set;
        set->size = old.size ? 2 * old.size : 1024;
        set->slots = xcalloc(set->size, sizeof *set->slots);
        set->n = 0;
        for (size_t i = 0; i < old.size; i++)
            if (old.slots[i]) hash_insert(set, old.slots[i]);
        free(old.slots);
    }
    size_t i = h & (set->size - 1);
    while (set->slots[i]) i = (i + 1) & (set->size - 1);
    set->slots[i] = h;
    set->n++;
}

typedef struct {
    const Language *language;
    const Options *options;
    HashSet val;                 /* filled while the validation text is written */
} Writer;

/* A file, or standard output where file is NULL. */
static bool flush_text(FileWriter *file, const char *buffer, size_t n, Error *e) {
    if (file) return file_write(file, buffer, n, e);
    if (fwrite(buffer, 1, n, stdout) == n && fflush(stdout) == 0) return true;
    return fail(e, EXIT_STORAGE, "could not write to standard output: %s", strerror(errno));
}

static bool write_stories(Writer *w, FileWriter *file, uint32_t stream, int64_t bytes, int64_t stories, char *buffer, Tally *tally, Error *e) {
    const Language *l = w->language;
    Progress progress;
    progress_begin(&progress, stream == STREAM_VAL ? "writing validation stories" : "writing stories", bytes ? "bytes" : "stories",
                   (double)(bytes ? bytes : stories), false);
    size_t used = 0, room = l->facts.max_bytes + SEPARATOR_BYTES;
    bool ok = true;
    for (uint64_t i = 0; ok && (bytes ? tally->bytes < (double)bytes : tally->stories < stories); i++) {
        double nats = 0;
        char *story = buffer + used;
        size_t n = story_write(l, (uint64_t)w->options->seed, stream, i, story, &nats);
        uint64_t hash = w->options->val_out ? XXH3_64bits(story, n) | 1 : 0;
        if (stream == STREAM_VAL) hash_insert(&w->val, hash);
        else if (hash && hash_found(&w->val, hash)) tally->shared++;
        memcpy(story + n, separator, SEPARATOR_BYTES);
        used += n + SEPARATOR_BYTES;
        tally_add(tally, (double)(n + SEPARATOR_BYTES), nats);
        if (used + room <= BUFFER_BYTES) continue;
        ok = flush_text(file, buffer, used, e);
        used = 0;
        progress_update(&progress, bytes ? tally->bytes : (double)tally->stories);
    }
    ok = ok && flush_text(file, buffer, used, e);
    if (ok) progress_end(&progress, bytes ? tally->bytes : (double)tally->stories);
    return ok;
}

static bool write_text(Writer *w, const char *path, uint32_t stream, int64_t bytes, int64_t stories, Tally *tally, Error *e) {
    FileWriter *file = path ? file_create(path, e) : NULL;
    if (path && !file) return false;
    char *buffer = xmalloc(BUFFER_BYTES);
    bool ok = write_stories(w, file, stream, bytes, stories, buffer, tally, e);
    free(buffer);
    if (!file) return ok;
    if (ok) return file_commit(file, NULL, NULL, e);
    file_abandon(file);
    return false;
}

static char *tally_json(const char *name, const Tally *t) {
    return xasprintf("  \"%s\": {\"stories\": %lld, \"bytes\": %.0f, \"nats\": %.17g, \"nats_standard_error\": %.9g, \"nats_per_story\": %.9g, "
                     "\"nats_per_byte\": %.9g}",
                     name, (long long)t->stories, t->bytes, t->nats, t->stories > 1 ? tally_error(t) : 0, t->nats / (double)t->stories, t->nats / t->bytes);
}

/* Bytes of the language's story include its separator, as they do in the files. */
static bool write_report(const Writer *w, const Tally *train, const Tally *val, Error *e) {
    const StoryFacts *f = &w->language->facts;
    char *a = tally_json("train", train), *b = val->stories ? tally_json("val", val) : xasprintf("  \"val\": null");
    char *json = xasprintf("{\n  \"seed\": %lld,\n%s,\n%s,\n  \"train_stories_also_in_val\": %lld,\n"
                           "  \"language\": {\"nats_per_story\": %.17g, \"bytes_per_story\": %.17g, \"chance_of_equal_stories\": %.9g}\n}\n",
                           (long long)w->options->seed, a, b, (long long)train->shared, f->nats, f->bytes + SEPARATOR_BYTES, f->collision);
    bool ok = file_replace(w->options->report, json, strlen(json), e);
    free(a), free(b), free(json);
    return ok;
}

static bool write_all(const Language *l, const Options *o, Error *e) {
    Writer w = {.language = l, .options = o};
    Tally train = {0}, val = {0};
    bool ok = !o->val_out || write_text(&w, o->val_out, STREAM_VAL, o->val_bytes, 0, &val, e);
    ok = ok && write_text(&w, o->out, STREAM_TRAIN, o->bytes, o->stories, &train, e);
    if (ok && train.shared)
        fprintf(stderr, "note: %lld stories of the training text are also in the validation text (by chance)\n", (long long)train.shared);
    ok = ok && (!o->report || write_report(&w, &train, &val, e));
    free(w.val.slots);
    return ok;
}

/* ---- reading back ---- */

static void print_misfit(const char *path, size_t line, const char *text, size_t n, const Parse *p) {
    size_t from = p->failed_at > 30 ? p->failed_at - 30 : 0, shown = n - p->failed_at < 20 ? n - p->failed_at : 20;
    fprintf(stderr, "%s:%zu: not a story: at byte %zu, after \"%.*s\", found \"%.*s\", expected \"%.*s\"\n", path, line, p->failed_at + 1,
            (int)(p->failed_at - from), text + from, (int)shown, text + p->failed_at, (int)p->expected.n, p->expected.s);
}

/* Lines are stories and markers in turn. */
static bool score_lines(const Language *l, const char *path, FILE *in, Tally *tally, int64_t *misfits, Error *e) {
    char *line = NULL;
    size_t capacity = 0, number = 0;
    bool ok = true, after_story = false;
    for (ssize_t n; ok && (n = getline(&line, &capacity, in)) > 0;) {
        number++;
        bool ended = line[n - 1] == '\n';
        size_t length = (size_t)n - ended;
        bool marker = length == SEPARATOR_BYTES - 2 && memcmp(line, separator + 1, length) == 0;
        if (marker != after_story) {
            ok = fail(e, EXIT_DATA, "%s:%zu: expected %s, found %s; stories and lines <|endoftext|> must take turns", path, number,
                      after_story ? "a line <|endoftext|>" : "a story", marker ? "a line <|endoftext|>" : "more text");
        } else if (!marker) {
            Parse p;
            story_parse(l, line, length, &p);
            CHECK(p.derivations <= 1, "%s:%zu has %llu derivations", path, number, (unsigned long long)p.derivations);
            if (p.derivations) tally_add(tally, (double)length + SEPARATOR_BYTES, p.nats);
            else if ((*misfits)++ < 5) print_misfit(path, number, line, length, &p);
        }
        after_story = !marker;
    }
    free(line);
    if (ok && ferror(in)) return fail(e, EXIT_DATA, "%s: could not be read: %s", path, strerror(errno));
    return ok;
}

/* A model q that has not seen the text beats its true probability p by t nats in all with probability at most exp(-t) (Markov on
 * q/p, whose mean is at most 1), so three standard errors of the text's own nats, hundreds of nats, never happen by luck. */
static bool judge(const Options *o, const Tally *t, Error *e) {
    double tokens = (double)o->tokens, floor = t->nats / tokens, error = tally_error(t) / tokens;
    printf("validation loss %.4f, true entropy of the text %.4f nats per token: %.4f above the floor\n", o->val_loss, floor, o->val_loss - floor);
    if (o->val_loss >= floor - 3 * error) return true;
    return fail(e, EXIT_DATA, "LEAK: the validation loss %.4f is below what any honest model can reach on this text (%.4f, standard error %.4f): "
                "the model saw what it had to predict; look for validation text in the training data and for targets visible to attention",
                o->val_loss, floor, error);
}

static bool score(const Language *l, const Options *o, bool judged, Error *e) {
    FILE *in = strcmp(o->score, "-") == 0 ? stdin : fopen(o->score, "r");
    if (!in) return fail(e, EXIT_DATA, "%s: could not open: %s; give a text written by this program", o->score, strerror(errno));
    Tally t = {0};
    int64_t misfits = 0;
    bool ok = score_lines(l, o->score, in, &t, &misfits, e);
    if (in != stdin) fclose(in);
    if (!ok) return false;
    if (t.stories + misfits == 0) return fail(e, EXIT_DATA, "%s: no story in it", o->score);
    printf("%lld stories, %.0f bytes, %.6f nats", (long long)t.stories, t.bytes, t.nats);
    if (t.stories) printf(", %.4f nats per story, %.6f nats per byte", t.nats / (double)t.stories, t.nats / t.bytes);
    printf("\n");
    if (misfits)
        return fail(e, EXIT_DATA, "%s: %lld of %lld stories are not of the language", o->score, (long long)misfits, (long long)(t.stories + misfits));
    if (o->tokens) printf("%.6f nats per token over %lld tokens, standard error %.6f\n", t.nats / (double)o->tokens, (long long)o->tokens, tally_error(&t) / (double)o->tokens);
    return !judged || judge(o, &t, e);
}

/* ---- the program ---- */

static void print_facts(const Language *l) {
    printf("entropy of a story: %.6f nats (%.2f bits)\n", l->facts.nats, l->facts.nats / log(2));
    printf("mean length: %.3f bytes with its separator; entropy %.6f nats per byte\n", l->facts.bytes + SEPARATOR_BYTES,
           l->facts.nats / (l->facts.bytes + SEPARATOR_BYTES));
    printf("chance that two stories are equal: %.3g\n", l->facts.collision);
}

static bool check_together(const Options *o, bool judged, Error *e) {
    if (o->help || o->version || o->facts) return true;
    if (judged && (!o->score || !o->tokens)) return fail(e, EXIT_USAGE, "--val-loss needs the text and its number of tokens: give --score FILE and --tokens N");
    if (o->score) return true;
    if ((o->bytes > 0) + (o->stories > 0) != 1) return fail(e, EXIT_USAGE, "how much text? give one of --bytes N and --stories N (or --score FILE); --help lists the options");
    return true;
}

int main(int argc, char **argv) {
    Error e = {0};
    Options o = {0};
    OptionSource sources[N_OPTIONS];
    if (!options_parse(&option_table, &o, sources, argc, argv, NULL, NULL, &e)) return error_print(&e);
    bool judged = false;
    for (int i = 0; i < N_OPTIONS; i++)
        if (strcmp(option_rows[i].name, "val-loss") == 0) judged = sources[i] != FROM_DEFAULT;
    Language l = {0};
    bool ok = check_together(&o, judged, &e) && language_compile(&l, story_grammar, &e);
    if (ok && o.help) options_help(&option_table, stdout);
    else if (ok && o.version) version_print(stdout);
    else if (ok && o.facts) print_facts(&l);
    else if (ok && o.score) ok = score(&l, &o, judged, &e);
    else if (ok) ok = write_all(&l, &o, &e);
    language_free(&l);
    options_free(&option_table, &o);
    return ok ? EXIT_OK : error_print(&e);
}
