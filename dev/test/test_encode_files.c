/* Text files to token shards: documents, separators, validation, pieces and threads, against a plain reading of the same text. */
#include "../../llmc/base/io.h"
#include "../../llmc/base/rng.h"
#include "../../llmc/data/shards.h"
#include "../../llmc/data/tokenizer_internal.h"
#include "test.h"
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#define GOLDEN "dev/test/golden/tokenizer_hf"
#define MARKER "<|endoftext|>"
static char folder[256];
static Tokenizer *tokenizer;
static uint64_t drawn;

static uint32_t draw(uint32_t below) { return rng_u32(7, 0x7e58, 0, drawn++) % below; }
static char *in_folder(const char *name) { return path_join(folder, name); }

static char *write_file(const char *name, const char *text, size_t n) {
    char *path = in_folder(name);
    FILE *f = fopen(path, "wb");
    CHECK(f && fwrite(text, 1, n, f) == n && !fclose(f), "%s", path);
    return path;
}

static char *golden_text(size_t *n) {
    char *text = file_read(GOLDEN "/text.txt", n, NULL);
    CHECK(text, "no golden text");
    return text;
}

static IdList read_shard(const char *name) {
    char *path = in_folder(name);
    Error e = {0};
    Dataset d;
    IdList l = {0};
    EXPECT(dataset_open(&d, path, 0, &e), "%s", e.text);
    if (!e.code) {
        l.n = l.capacity = (size_t)d.n_tokens;
        l.ids = xmalloc(l.n * sizeof *l.ids);
        EXPECT(shard_tokens(&d.shards[0], 0, l.n, l.ids, &e), "%s", e.text);
        dataset_close(&d);
    }
    free(path);
    return l;
}

static void add_document(IdList *l, const char *text, size_t n, bool separator) {
    if (!n) return;
    if (separator) id_list_append(l, tokenizer->end_of_text);
    tokenizer_encode(tokenizer, text, n, &l->ids, &l->n, &l->capacity);
}

static void expect_ids(const char *name, const IdList *wanted, const char *what) {
    IdList got = read_shard(name);
    size_t i = 0;
    while (i < got.n && i < wanted->n && got.ids[i] == wanted->ids[i]) i++;
    EXPECT(got.n == wanted->n && i == got.n, "%s, %s: %zu ids, expected %zu, the first difference at %zu", what, name, got.n, wanted->n, i);
    free(got.ids);
}

static bool run_job(EncodeJob *job, char **paths, size_t n, const char *what) {
    Error e = {0};
    char *out = in_folder("train.bin");
    job->tokenizer = tokenizer, job->out_path = out, job->quiet = true;
    bool ok = tokenizer_encode_files(job, paths, n, &e);
    EXPECT(ok, "%s: %s", what, e.text);
    free(out);
    return ok;
}

TEST(pieces_and_threads_change_nothing) {
    size_t n;
    char *text = golden_text(&n), *path = write_file("a.txt", text, n);
    IdList wanted = {0};
    add_document(&wanted, text, n, true);
    add_document(&wanted, text, n, true);
    static const size_t pieces[] = {1, 7, 100, 4096, 0};
    for (size_t i = 0; i < sizeof pieces / sizeof *pieces; i++)
        for (int threads = 0; threads <= 3; threads++) {
            EncodeJob job = {.separator = true, .piece_bytes = pieces[i], .threads = threads};
            char *paths[] = {path, path}, what[64];
            snprintf(what, sizeof what, "pieces of %zu, %d threads", pieces[i], threads);
            if (run_job(&job, paths, 2, what)) expect_ids("train.bin", &wanted, what);
            EXPECT(job.train_tokens == wanted.n && job.train_bytes == 2 * n && job.validation_tokens == 0);
        }
    free(wanted.ids);
    free(text);
    free(path);
}

/* Random texts full of white space, markers and broken characters, cut as finely as possible. */
TEST(random_texts_in_tiny_pieces) {
    static const char *const parts[] = {" ", "  ", "\n", "a", "it's", "'", "s", "1", "!", "\xc3\xa9", "\xe3\x80\x80", "\xe4\xb8\xad", "\xf0\x9f\x98\x80", "\xff", "\xc3", "<|", "<|endof", "word"};
    for (int round = 0; round < 300 && !test_errors; round++) {
        char text[2048], what[32];
        size_t n = 0;
        for (uint32_t i = draw(300) + 1; i > 0; i--) n += (size_t)sprintf(text + n, "%s", parts[draw(sizeof parts / sizeof *parts)]);
        char *paths[] = {write_file("r.txt", text, n)};
        IdList wanted = {0};
        add_document(&wanted, text, n, false);
        EncodeJob job = {.piece_bytes = 1 + draw(40), .threads = 2, .document_marker = draw(2) ? MARKER : NULL};
        snprintf(what, sizeof what, "round %d", round);
        if (run_job(&job, paths, 1, what)) expect_ids("train.bin", &wanted, what);
        free(wanted.ids);
        free(paths[0]);
    }
}

TEST(documents_between_markers) {
    static const char text[] = MARKER "\none\n" MARKER "\ntwo" MARKER "three\n" MARKER " four\n\n" MARKER "\r\n" MARKER "\n" MARKER "five\n" MARKER;
    static const char *const documents[] = {"one\n", "two", "three\n", " four\n\n", "five\n"};
    char *paths[] = {write_file("m.txt", text, strlen(text))};
    for (int separator = 0; separator < 2; separator++)
        for (size_t piece = 1; piece < 40; piece++) {
            IdList wanted = {0};
            for (size_t i = 0; i < 5; i++) add_document(&wanted, documents[i], strlen(documents[i]), separator);
            EncodeJob job = {.separator = separator, .document_marker = MARKER, .piece_bytes = piece, .threads = 1};
            char what[32];
            snprintf(what, sizeof what, "piece %zu", piece);
            if (run_job(&job, paths, 1, what)) expect_ids("train.bin", &wanted, what);
            free(wanted.ids);
        }
    EncodeJob job = {.separator = false, .threads = 1};
    IdList wanted = {0};
    add_document(&wanted, text, strlen(text), false);
    if (run_job(&job, paths, 1, "no marker")) expect_ids("train.bin", &wanted, "without a marker it is ordinary text");
    free(wanted.ids);
    free(paths[0]);
}

TEST(validation_takes_the_last_documents) {
    char text[4000];
    size_t n = 0, ends[40];
    for (size_t i = 0; i < 40; i++) n += (size_t)sprintf(text + n, "document %zu of %u\n" MARKER "\n", i, draw(1000)), ends[i] = n;
    char *paths[] = {write_file("v.txt", text, n)}, *val = in_folder("val.bin");
    static const struct { double fraction; size_t documents; } cases[] = {{0.1, 4}, {0.5, 20}, {0.025, 1}, {0.999, 39}};
    for (size_t c = 0; c < 4; c++) {
        IdList train = {0}, validation = {0};
        for (size_t i = 0, from = 0; i < 40; from = ends[i++])
            add_document(i < 40 - cases[c].documents ? &train : &validation, text + from, ends[i] - from - strlen(MARKER "\n"), true);
        EncodeJob job = {.separator = true, .document_marker = MARKER, .piece_bytes = 50, .threads = 2, .validation_path = val, .validation_fraction = cases[c].fraction};
        if (run_job(&job, paths, 1, "validation")) {
            expect_ids("train.bin", &train, "documents");
            expect_ids("val.bin", &validation, "documents");
            EXPECT(job.train_tokens == train.n && job.validation_tokens == validation.n);
        }
        free(train.ids);
        free(validation.ids);
    }
    free(val);
    free(paths[0]);
}

/* A single document: the last fraction of its text, and nothing lost or changed but the separator. */
TEST(validation_of_a_single_text) {
    size_t n;
    char *text = golden_text(&n), *val = in_folder("val.bin"), *paths[] = {write_file("s.txt", text, n)};
    IdList wanted = {0};
    add_document(&wanted, text, n, false);
    size_t train_tokens = 0;
    for (size_t piece = 10; piece < 200000; piece *= 10)
        for (int separator = 0; separator < 2; separator++) {
            EncodeJob job = {.separator = separator, .piece_bytes = piece, .threads = 3, .validation_path = val, .validation_fraction = 0.1};
            if (!run_job(&job, paths, 1, "single text")) continue;
            IdList a = read_shard("train.bin"), b = read_shard("val.bin");
            size_t s = (size_t)separator;
            EXPECT(a.n + b.n == wanted.n + 2 * s, "%zu + %zu, %zu", a.n, b.n, wanted.n);
            EXPECT(!memcmp(a.ids + s, wanted.ids, (a.n - s) * sizeof *a.ids) && !memcmp(b.ids + s, wanted.ids + a.n - s, (b.n - s) * sizeof *b.ids));
            EXPECT(!separator || (a.ids[0] == tokenizer->end_of_text && b.ids[0] == tokenizer->end_of_text));
            double part = (double)job.validation_bytes / (double)n;
            EXPECT(part >= 0.1 && part < 0.102, "%g of the text", part);
            if (train_tokens) EXPECT(a.n - s == train_tokens, "the place depends on the size of a piece");
            train_tokens = a.n - s;
            free(a.ids);
            free(b.ids);
        }
    free(wanted.ids);
    free(val);
    free(text);
    free(paths[0]);
}

static void fails(EncodeJob job, const char *path, int code, const char *expected) {
    Error e = {0};
    char *out = in_folder("fails.bin"), *val = in_folder("fails_val.bin"), *paths[] = {(char *)path};
    if (!job.tokenizer) job.tokenizer = tokenizer;
    job.out_path = out, job.quiet = true;
    if (job.validation_path) job.validation_path = val;
    EXPECT(!tokenizer_encode_files(&job, paths, 1, &e) && e.code == code && strstr(e.text, expected), "code %d: %s", e.code, e.text);
    EXPECT(!path_exists(out) && !path_exists(val), "%s: left an output", expected);
    free(out);
    free(val);
}

TEST(errors_leave_nothing_behind) {
    char *text = write_file("t.txt", "some text", 9), *empty = write_file("empty.txt", "", 0);
    Tokenizer *bare = tokenizer_load(GOLDEN, NULL);
    fails((EncodeJob){0}, "/no/such/file", EXIT_DATA, "/no/such/file");
    fails((EncodeJob){0}, folder, EXIT_DATA, "directory");
    fails((EncodeJob){0}, empty, EXIT_DATA, "no text");
    fails((EncodeJob){.tokenizer = bare, .separator = true}, text, EXIT_USAGE, "--no-separator");
    fails((EncodeJob){.validation_path = "x", .validation_fraction = 0}, text, EXIT_USAGE, "fraction");
    fails((EncodeJob){.validation_path = "x", .validation_fraction = 1}, text, EXIT_USAGE, "fraction");
    fails((EncodeJob){.validation_path = "x", .validation_fraction = 0.01}, text, EXIT_DATA, "no text for validation");
    fails((EncodeJob){.validation_path = "x", .validation_fraction = 0.1}, "/no/such/file", EXIT_DATA, "/no/such/file");
    tokenizer_free(bare);
    free(text);
    free(empty);
}

TEST(training_from_files_equals_training_from_text) {
    size_t n;
    char *text = golden_text(&n);
    Error e = {0};
    size_t half = split_safe_cut(text, n, n / 2);
    char *marked = xasprintf("%.*s%s%s", (int)half, text, MARKER, text + half), *path = write_file("marked.txt", marked, strlen(marked));
    BpeTrainer *a = bpe_trainer_create(700, &e), *b = bpe_trainer_create(700, &e);
    bpe_trainer_feed(a, text, n);
    EXPECT(bpe_trainer_feed_files(b, &path, 1, MARKER, &e), "%s", e.text);
    Tokenizer *s = bpe_trainer_finish(a, NULL, &e), *t = bpe_trainer_finish(b, NULL, &e);
    EXPECT(s && t && !strcmp(tokenizer_fingerprint(s), tokenizer_fingerprint(t)));
    tokenizer_free(s);
    tokenizer_free(t);
    BpeTrainer *c = bpe_trainer_create(700, &e);
    char *missing = "/no/such/file";
    EXPECT(!bpe_trainer_feed_files(c, &missing, 1, NULL, &e) && e.code == EXIT_DATA, "%s", e.text);
    bpe_trainer_free(c);
    free(text);
    free(marked);
    free(path);
}

#ifdef __SANITIZE_ADDRESS__
TEST(memory_does_not_grow_with_the_text) { SKIP("AddressSanitizer keeps freed memory"); }
#else
/* Peak memory in KiB of encoding a 1 MB file `times` times, in a child. */
static long peak_memory(char *path, size_t times) {
    struct rusage usage;
    int status;
    pid_t child = fork();
    if (!child) {
        char **paths = xcalloc(times, sizeof *paths);
        for (size_t i = 0; i < times; i++) paths[i] = path;
        EncodeJob job = {.threads = 2, .piece_bytes = 1 << 18};
        _exit(run_job(&job, paths, times, "child") ? 0 : 1);
    }
    EXPECT(child > 0 && wait4(child, &status, 0, &usage) == child && status == 0, "status %d", status);
    return usage.ru_maxrss;
}

TEST(memory_does_not_grow_with_the_text) {
    size_t n;
    char *text = golden_text(&n), *many = xmalloc(21 * n);
    for (size_t i = 0; i < 21; i++) memcpy(many + i * n, text, n);
    char *path = write_file("mega.txt", many, 21 * n);
    long few = peak_memory(path, 4), lots = peak_memory(path, 64);
    EXPECT(lots < few + 4096, "%ld KiB for 4 MB, %ld KiB for 64 MB", few, lots);
    free(text);
    free(many);
    free(path);
}
#endif

int main(int argc, char **argv) {
    Error e = {0};
    test_start(argc, argv);
    snprintf(folder, sizeof folder, "%s/llmc_encode_XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
    CHECK(mkdtemp(folder), "%s", folder);
    tokenizer = tokenizer_load(GOLDEN "/tokenizer.json", &e);
    CHECK(tokenizer, "%s", e.text);
    RUN(pieces_and_threads_change_nothing);
    RUN(random_texts_in_tiny_pieces);
    RUN(documents_between_markers);
    RUN(validation_takes_the_last_documents);
    RUN(validation_of_a_single_text);
    RUN(errors_leave_nothing_behind);
    RUN(training_from_files_equals_training_from_text);
    RUN(memory_does_not_grow_with_the_text);
    tokenizer_free(tokenizer);
    path_remove_tree(folder, NULL);
    return test_done();
}
