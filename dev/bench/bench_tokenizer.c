/* Encoding speed per core, beside Hugging Face tokenizers on one thread where it is installed: same documents, same ids, one run.
 * Usage: bench_tokenizer [TOKENIZER_DIR TEXT]. Without arguments: GPT-2's vocabulary and the texts of ../shared/data, or the
 * small ones of the tests. CPU time, so that other work on the machine counts little. PYTHON names the peer's interpreter. */
#include "../../llmc/base/io.h"
#include "../../llmc/data/tokenizer.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { DOCUMENT_BYTES = 10000, ROUNDS = 5 };

static double cpu_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* The end of the document that begins at `at`: after the first line end DOCUMENT_BYTES on. */
static size_t document_end(const char *text, size_t bytes, size_t at) {
    size_t from = at + DOCUMENT_BYTES < bytes ? at + DOCUMENT_BYTES : bytes;
    const char *end = memchr(text + from, '\n', bytes - from);
    return end ? (size_t)(end - text) + 1 : bytes;
}

typedef struct { double mb_per_second; size_t tokens; unsigned long long hash; } Result;

static Result measure(const Tokenizer *t, const char *text, size_t bytes) {
    Result r = {0, 0, 0xCBF29CE484222325u};
    int32_t *ids = NULL;
    size_t capacity = 0;
    double best = 1e30;
    for (int round = 0; round < ROUNDS; round++) {
        double started = cpu_seconds();
        r.tokens = 0;
        for (size_t at = 0, end; at < bytes; at = end) {
            end = document_end(text, bytes, at);
            tokenizer_encode(t, text + at, end - at, &ids, &r.tokens, &capacity);
        }
        double took = cpu_seconds() - started;
        if (took < best) best = took;
    }
    for (size_t i = 0; i < r.tokens; i++) r.hash = (r.hash ^ (unsigned long long)ids[i]) * 0x100000001B3u;
    free(ids);
    r.mb_per_second = (double)bytes / best / 1e6;
    return r;
}

static bool measure_peer(const char *dir, const char *path, char version[32], Result *r) {
    const char *pythons[] = {getenv("PYTHON"), "python3", "/usr/bin/python3"};
    for (size_t i = 0; i < 3; i++) {
        if (!pythons[i]) continue;
        char *command = xasprintf("%s dev/bench/tokenizer_peer.py '%s' '%s' %d 2>/dev/null", pythons[i], dir, path, DOCUMENT_BYTES);
        FILE *f = popen(command, "r");
        int got = f ? fscanf(f, "%31s %lf %zu %llx", version, &r->mb_per_second, &r->tokens, &r->hash) : 0;
        if (f) pclose(f);
        free(command);
        if (got == 4) return true;
    }
    return false;
}

static bool bench(const char *dir, const char *path) {
    Error e = {0};
    size_t bytes;
    double started = cpu_seconds();
    Tokenizer *t = tokenizer_load(dir, &e);
    double load = cpu_seconds() - started;
    char *text = t ? file_read(path, &bytes, &e) : NULL;
    if (!text) return error_print(&e), false;
    Result ours = measure(t, text, bytes), peer = {0};
    char version[32];
    printf("%s, %.1f MB, vocabulary %zu (loaded in %.3f s): %.1f MB/s, %zu tokens\n", path, (double)bytes / 1e6, tokenizer_vocab_size(t), load,
           ours.mb_per_second, ours.tokens);
    bool same = true;
    if (!measure_peer(dir, path, version, &peer)) printf("  Hugging Face tokenizers is not installed: no comparison\n");
    else {
        same = ours.tokens == peer.tokens && ours.hash == peer.hash;
        printf("  Hugging Face tokenizers %s, one thread: %.2f MB/s; ours is %.1f times as fast; ids %s\n", version, peer.mb_per_second,
               ours.mb_per_second / peer.mb_per_second, same ? "equal" : "DIFFER");
    }
    free(text);
    tokenizer_free(t);
    return same;
}

static void bench_training(const char *path, size_t vocab) {
    Error e = {0};
    BpeTrainer *trainer = bpe_trainer_create(vocab, &e);
    char *paths[] = {(char *)path};
    double started = cpu_seconds();
    if (!bpe_trainer_feed_files(trainer, paths, 1, NULL, &e)) { error_print(&e); return; }
    double fed = cpu_seconds();
    tokenizer_free(bpe_trainer_finish(trainer, NULL, &e));
    printf("%s: training a vocabulary of %zu: counting %.3f s, merging %.3f s\n", path, vocab, fed - started, cpu_seconds() - fed);
}

/* A directory with GPT-2's vocabulary under the names that tokenizers expect. */
static char *gpt2_folder(void) {
    static char dir[] = "/tmp/llmc_bench_tokenizer_XXXXXX";
    const char *const from[] = {"../shared/data/gpt2_vocab.json", "../shared/data/gpt2_merges.txt"}, *const to[] = {"vocab.json", "merges.txt"};
    if (!path_exists(from[0]) || !mkdtemp(dir)) return NULL;
    for (int i = 0; i < 2; i++) {
        size_t n;
        char *text = file_read(from[i], &n, NULL), *path = path_join(dir, to[i]);
        bool ok = text && file_replace(path, text, n, NULL);
        free(text);
        free(path);
        if (!ok) return NULL;
    }
    return dir;
}

int main(int argc, char **argv) {
    if (argc == 3) return bench(argv[1], argv[2]) ? 0 : 1;
    char *dir = gpt2_folder();
    bool ok;
    if (!dir) ok = bench("dev/test/golden/tokenizer_hf", "dev/test/golden/tokenizer_hf/text.txt");
    else {
        ok = bench(dir, "../shared/data/tinyshakespeare.txt");
        ok = bench(dir, "../shared/data/wikitext2_valid.txt") && ok;
        bench_training("../shared/data/tinyshakespeare.txt", 1257);
        bench_training("../shared/data/wikitext2_valid.txt", 10000);
        path_remove_tree(dir, NULL);
    }
    return ok ? 0 : 1;
}
