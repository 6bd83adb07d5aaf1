/* A tokenizer's life: its tokens, decoding, saving. Loading is in tokenizer_load.c, encoding in tokenizer_encode.c. */
#include "../base/io.h"
#include "tokenizer_internal.h"
#include <stdlib.h>
#include <string.h>

/* GPT-2's printable alphabet: printable bytes stand for themselves, the 68 others, in order, for U+0100 onwards. */
static bool stands_for_itself(unsigned byte) {
    return (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
}

uint32_t byte_to_char(unsigned char byte) {
    if (stands_for_itself(byte)) return byte;
    return byte <= 0x20 ? 0x100u + byte : byte <= 0xa0 ? 0x121u + byte - 0x7f : 0x143u;
}

int char_to_byte(uint32_t c) {
    if (c < 0x100) return stands_for_itself(c) ? (int)c : -1;
    if (c <= 0x120) return (int)(c - 0x100);
    if (c <= 0x142) return (int)(c - 0x121 + 0x7f);
    return c == 0x143 ? 0xad : -1;
}

void tokenizer_free(Tokenizer *t) {
    if (!t) return;
    free(t->bytes);
    free(t->offset);
    free(t->merges);
    free(t->pairs);
    free(t->words);
    free(t);
}

size_t tokenizer_vocab_size(const Tokenizer *t) { return t->V; }
int32_t tokenizer_end_of_text(const Tokenizer *t) { return t->end_of_text; }
const char *tokenizer_fingerprint(const Tokenizer *t) { return t->fingerprint; }

const char *tokenizer_token(const Tokenizer *t, int32_t id, size_t *bytes) {
    *bytes = 0;
    if (id < 0 || (size_t)id >= t->V) return NULL;
    *bytes = t->offset[id + 1] - t->offset[id];
    return t->bytes + t->offset[id];
}

char *tokenizer_decode(const Tokenizer *t, const int32_t *ids, size_t n, size_t *bytes) {
    size_t total = 0, length;
    for (size_t i = 0; i < n; i++) tokenizer_token(t, ids[i], &length), total += length;
    char *text = xmalloc(total + 1);
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        const char *token = tokenizer_token(t, ids[i], &length);
        if (length) memcpy(text + at, token, length);
        at += length;
    }
    text[at] = 0;
    *bytes = at;
    return text;
}

/* ---- saving ---- */

typedef struct { char *text; size_t n, capacity; } Text;

static void put(Text *out, const char *s, size_t n) {
    if (out->capacity - out->n < n) {
        out->capacity = 2 * (out->n + n) + 4096;
        out->text = xrealloc(out->text, out->capacity);
    }
    memcpy(out->text + out->n, s, n);
    out->n += n;
}

static void put_string(Text *out, const char *s) { put(out, s, strlen(s)); }

/* A token in the printable alphabet; in JSON the quote and the backslash are the only characters of it that need escaping. */
static void put_token(Text *out, const Tokenizer *t, int32_t id, bool json) {
    size_t n;
    const char *bytes = tokenizer_token(t, id, &n);
    for (size_t i = 0; i < n; i++) {
        char c[4];
        if (json && (bytes[i] == '"' || bytes[i] == '\\')) put(out, "\\", 1);
        put(out, c, utf8_encode(byte_to_char((unsigned char)bytes[i]), c));
    }
}

static bool save_file(Text *out, const char *dir, const char *name, Error *e) {
    char *path = path_join(dir, name);
    bool ok = file_replace(path, out->text, out->n, e);
    free(path);
    free(out->text);
    *out = (Text){0};
    return ok;
}

bool tokenizer_save(const Tokenizer *t, const char *dir, Error *e) {
    if (!dir_create(dir, e)) return false;
    Text out = {0};
    put_string(&out, "{");
    for (size_t i = 0; i < t->V; i++) {
        char number[32];
        put_string(&out, i ? ",\"" : "\"");
        put_token(&out, t, (int32_t)i, true);
        snprintf(number, sizeof number, "\":%zu", i);
        put_string(&out, number);
    }
    put_string(&out, "}\n");
    if (!save_file(&out, dir, "vocab.json", e)) return false;

    put_string(&out, "#version: 0.2\n");
    for (size_t i = 0; i < t->n_merges; i++) {
        put_token(&out, t, t->merges[i].left, false);
        put_string(&out, " ");
        put_token(&out, t, t->merges[i].right, false);
        put_string(&out, "\n");
    }
    if (!save_file(&out, dir, "merges.txt", e)) return false;

    put_string(&out, "{\"tokenizer_class\": \"GPT2Tokenizer\", \"add_prefix_space\": false");
    if (t->end_of_text >= 0)
        put_string(&out, ", \"bos_token\": \"<|endoftext|>\", \"eos_token\": \"<|endoftext|>\", \"unk_token\": \"<|endoftext|>\"");
    put_string(&out, "}\n");
    return save_file(&out, dir, "tokenizer_config.json", e);
}
