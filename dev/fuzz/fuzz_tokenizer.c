/* Tokenizer files: vocab.json beside good merges, merges.txt beside a good vocabulary, tokenizer.json; and any text through a good
 * tokenizer and back. */
#include "fuzz.h"
#include "llmc/data/tokenizer.h"

#define GOLDEN "dev/test/golden/tokenizer_hf"

/* Decoding gives the text back; every id is one of the vocabulary. Only a vocabulary of all bytes promises that. */
static void round_trip(const Tokenizer *t, const char *text, size_t size, bool exact) {
    int32_t *ids = NULL;
    size_t n = 0, capacity = 0, bytes;
    tokenizer_encode(t, text, size, &ids, &n, &capacity);
    for (size_t i = 0; i < n; i++) CHECK(tokenizer_token(t, ids[i], &bytes), "id %d of %zu", ids[i], tokenizer_vocab_size(t));
    char *back = tokenizer_decode(t, ids, n, &bytes);
    if (exact) CHECK(bytes == size && !memcmp(back, text, size), "%zu bytes came back as %zu", size, bytes);
    free(back);
    free(ids);
}

static void load(const char *path) {
    static const char text[] = "Hello  world, it's 2024!\n\n\tcaf\xc3\xa9 \xe4\xbd\xa0\xe5\xa5\xbd \xf0\x9f\x98\x80 \xff\xfe";
    Error e = {0};
    Tokenizer *t = tokenizer_load(path, &e);
    if (!fuzz_verdict(t != NULL, &e)) return;
    round_trip(t, text, sizeof text - 1, true);
    for (int32_t id = -2; id < (int32_t)tokenizer_vocab_size(t) + 2; id++) {
        size_t bytes;
        const char *token = tokenizer_token(t, id, &bytes);
        CHECK(!token || (id >= 0 && (size_t)id < tokenizer_vocab_size(t)), "token of id %d", id);
    }
    tokenizer_free(t);
}

static const char *const names[] = {"vocab.json", "merges.txt", "tokenizer.json"};

static void start(void) {
    for (int i = 0; i < 2; i++) {
        char *from = path_join(GOLDEN, names[i]);
        fuzz_copy(from, names[i]);
        free(from);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static Tokenizer *good;
    if (size < 1) return 0;
    if (!good) {
        good = tokenizer_load(GOLDEN, NULL);
        start();
    }
    int which = data[0] % 4;
    if (which == 3) { round_trip(good, (const char *)data + 1, size - 1, true); return 0; }
    fuzz_write(names[which], data + 1, size - 1);
    char *path = fuzz_path(names[which]);
    load(which == 2 ? path : fuzz_folder);
    if (which == 2) unlink(path);
    else start();
    free(path);
    return 0;
}
