/* The tokenizer against goldens recorded from Hugging Face tokenizers (dev/reference/record_tokenizer.py), against PCRE2 running
 * GPT-2's pattern, and on bytes that are no text at all. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "../../llmc/base/io.h"
#include "../../llmc/base/rng.h"
#include "../../llmc/base/timer.h"
#include "../../llmc/data/tokenizer_internal.h"
#include "test.h"
#include <jansson.h>
#include <pcre2.h>
#include <unistd.h>

#define GOLDEN "dev/test/golden/tokenizer_hf"
static char folder[256];
static uint64_t drawn;

static uint32_t draw(uint32_t below) { return rng_u32(20240520, 0x7e57, 0, drawn++) % below; }
static char *in_folder(const char *name) { return path_join(folder, name); }

static Tokenizer *golden_tokenizer(void) {
    Error e = {0};
    Tokenizer *t = tokenizer_load(GOLDEN, &e);
    CHECK(t, "%s", e.text);
    return t;
}

static json_t *golden_json(const char *name) {
    json_error_t error;
    char *path = path_join(GOLDEN, name);
    json_t *root = json_load_file(path, JSON_ALLOW_NUL, &error);
    CHECK(root, "%s:%d: %s", path, error.line, error.text);
    free(path);
    return root;
}

static IdList encode(const Tokenizer *t, const char *text, size_t n) {
    IdList l = {0};
    tokenizer_encode(t, text, n, &l.ids, &l.n, &l.capacity);
    return l;
}

static bool decodes_to(const Tokenizer *t, const IdList *l, const char *text, size_t n) {
    size_t bytes;
    char *back = tokenizer_decode(t, l->ids, l->n, &bytes);
    bool same = bytes == n && !memcmp(back, text, n);
    free(back);
    return same;
}

/* ---- the splitter ---- */

TEST(split_examples) {
    static const char *const cases[][8] = {
        {"it's", "it", "'s"}, {" 's", " '", "s"}, {"a  b", "a", " ", " b"}, {"a\n\nb", "a", "\n", "\n", "b"}, {"a \n", "a", " \n"},
        {"x1!", "x", "1", "!"}, {"'lla", "'ll", "a"}, {"\xe3\x80\x80x", "\xe3\x80\x80", "x"}, {" \x80 ", " ", "\x80", " "}, {"a\xff\xff" "b", "a", "\xff", "\xff", "b"}};
    split_init();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *p = cases[i][0], *end = p + strlen(p);
        for (int k = 1; k < 8 && cases[i][k]; k++) {
            size_t n = p < end ? split_next((const unsigned char *)p, (const unsigned char *)end) : 0;
            EXPECT(n == strlen(cases[i][k]), "\"%s\", piece %d: %zu bytes", cases[i][0], k, n);
            p += n;
        }
        EXPECT(p == end, "\"%s\": not used up", cases[i][0]);
    }
}

typedef struct { pcre2_code *code; pcre2_match_data *match; } Pattern;

static Pattern compile(const char *text) {
    int error;
    size_t at;
    Pattern p = {pcre2_compile((PCRE2_SPTR)text, PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_UCP, &error, &at, NULL), NULL};
    CHECK(p.code, "pattern %s: error %d at %zu", text, error, at);
    pcre2_jit_compile(p.code, PCRE2_JIT_COMPLETE);
    p.match = pcre2_match_data_create_from_pattern(p.code, NULL);
    return p;
}

static void release(Pattern *p) {
    pcre2_match_data_free(p->match);
    pcre2_code_free(p->code);
}

/* Length of the match at `at`; 0: none there. */
static size_t match_at(const Pattern *p, const char *text, size_t n, size_t at) {
    int r = pcre2_match(p->code, (PCRE2_SPTR)text, n, at, PCRE2_ANCHORED | PCRE2_NO_UTF_CHECK, p->match, NULL);
    return r > 0 ? pcre2_get_ovector_pointer(p->match)[1] - at : 0;
}

/* Where PCRE2's Unicode is older it may not know a letter or number yet (then it calls it other); U+180E it takes for white
 * space, which Unicode ended in 6.3. No other difference is allowed. */
static bool agrees(const Pattern class[3], uint32_t c, bool *excused) {
    char text[4];
    size_t n = utf8_encode(c, text);
    CharClass theirs = CLASS_OTHER, ours = unicode_class(c);
    if (match_at(&class[0], text, n, 0)) theirs = CLASS_LETTER;
    else if (match_at(&class[1], text, n, 0)) theirs = CLASS_NUMBER;
    else if (match_at(&class[2], text, n, 0)) theirs = CLASS_SPACE;
    *excused = (c == 0x180e && theirs == CLASS_SPACE) || (theirs == CLASS_OTHER && (ours == CLASS_LETTER || ours == CLASS_NUMBER) && c > 0x377);
    return theirs == ours;
}

static uint8_t common[0x110000];  /* 1: both have the same class. Filled by compare_classes */

/* How many differ; those that may not fail the test. */
static size_t compare_classes(void) {
    Pattern class[3] = {compile("\\p{L}"), compile("\\p{N}"), compile("\\s")};
    size_t different = 0;
    split_init();
    for (uint32_t c = 0; c < 0x110000; c++) {
        if (c >= 0xd800 && c < 0xe000) continue;
        bool excused;
        common[c] = agrees(class, c, &excused);
        if (common[c]) continue;
        different++;
        EXPECT(excused, "U+%04X is of class %d here", c, unicode_class(c));
    }
    for (int i = 0; i < 3; i++) release(&class[i]);
    return different;
}

TEST(classes_equal_pcre2s) {
    char version[64];
    size_t different = compare_classes();
    pcre2_config(PCRE2_CONFIG_UNICODE_VERSION, version);
    printf("PCRE2's Unicode %s differs at %zu code points, all newer than it (and U+180E)\n", version, different);
    EXPECT(different < 12000, "%zu", different);
}

static uint32_t draw_code_point(void) {
    static const uint32_t often[] = {' ', ' ', ' ', '\'', 's', 't', 'l', 'v', 'e', 'r', 'd', 'm', 'A', '1', '!', '\n', '\t', 0x85, 0xa0, 0x3000, 0xe9, 0x4e2d, 0xb2, 0x1f600, 0x301};
    static const uint32_t limit[] = {0x80, 0x800, 0x3100, 0x10000, 0x110000};
    uint32_t c = draw(3) ? often[draw(sizeof often / sizeof *often)] : draw(limit[draw(5)]);
    return common[c] ? c : 'x';
}

TEST(split_equals_pcre2s) {
    compare_classes();
    Pattern p = compile("'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+");
    for (int round = 0; round < 200000 && !test_errors; round++) {
        char text[4 * 24];
        size_t n = 0;
        for (uint32_t i = draw(24) + 1; i > 0; i--) n += utf8_encode(draw_code_point(), text + n);
        for (size_t at = 0; at < n && !test_errors;) {
            size_t ours = split_next((const unsigned char *)text + at, (const unsigned char *)text + n), theirs = match_at(&p, text, n, at);
            EXPECT(ours == theirs, "round %d: \"%.*s\" at %zu: %zu, PCRE2 %zu", round, (int)n, text, at, ours, theirs);
            at += theirs ? theirs : n;
        }
    }
    release(&p);
}

static size_t draw_bytes(char *out, size_t most) {
    size_t n = 0;
    for (size_t i = draw((uint32_t)most / 4) + 1; i > 0; i--) {
        if (draw(4)) n += utf8_encode(draw_code_point(), out + n);
        else out[n++] = (char)draw(256);
    }
    return n;
}

/* Boundaries of the text's pre-tokens, as a mask over [0, n]. */
static void boundaries(const char *text, size_t from, size_t to, char *mask) {
    for (size_t at = from; at < to;) {
        mask[at] = 1;
        at += split_next((const unsigned char *)text + at, (const unsigned char *)text + to);
    }
}

TEST(safe_cuts_change_nothing) {
    size_t cuts = 0;
    compare_classes();
    for (int round = 0; round < 100000 && !test_errors; round++) {
        char text[260], whole[260] = {0}, parts[260] = {0};
        size_t n = draw_bytes(text, 64);
        if (n < 2) continue;
        size_t cut = split_safe_cut(text, n, 1 + draw((uint32_t)n - 1));
        if (!cut) continue;
        cuts++;
        boundaries(text, 0, n, whole);
        boundaries(text, 0, cut, parts);
        boundaries(text, cut, n, parts);
        EXPECT(!memcmp(whole, parts, n), "round %d: cut at %zu of %zu", round, cut, n);
    }
    EXPECT(cuts > 50000, "%zu", cuts);
}

/* ---- against Hugging Face ---- */

TEST(strings_equal_hf) {
    Tokenizer *t = golden_tokenizer();
    json_t *cases = golden_json("strings.json"), *entry;
    size_t i;
    json_array_foreach(cases, i, entry) {
        const json_t *text = json_array_get(entry, 0), *ids = json_array_get(entry, 1);
        IdList l = encode(t, json_string_value(text), json_string_length(text));
        EXPECT(l.n == json_array_size(ids), "string %zu: %zu ids, HF has %zu", i, l.n, json_array_size(ids));
        for (size_t k = 0; k < l.n && k < json_array_size(ids); k++)
            EXPECT(l.ids[k] == json_integer_value(json_array_get(ids, k)), "string %zu, id %zu", i, k);
        EXPECT(decodes_to(t, &l, json_string_value(text), json_string_length(text)), "string %zu", i);
        free(l.ids);
    }
    EXPECT(i > 300, "%zu", i);
    json_decref(cases);
    tokenizer_free(t);
}

/* The text that record_tokenizer.py's code_point_text makes: the character in every kind of company. */
static size_t code_point_text(uint32_t c, char *out) {
    size_t n = 0;
    char s[4];
    size_t length = utf8_encode(c, s);
    for (const char *p = "*a*b** *1*\n*  *'s*!*'*"; *p; p++) {
        if (*p == '*') memcpy(out + n, s, length), n += length;
        else out[n++] = *p;
    }
    return n;
}

TEST(every_code_point_equals_hf) {
    Tokenizer *t = golden_tokenizer();
    size_t bytes;
    Error e = {0};
    char *recorded = file_read(GOLDEN "/codepoints.txt", &bytes, &e);
    CHECK(recorded && bytes == 272 * 17, "%s", e.text);
    IdList l = {0};
    for (uint32_t block = 0; block < 272; block++) {
        uint64_t hash = 0xCBF29CE484222325u;
        for (uint32_t c = block * 4096; c < (block + 1) * 4096; c++) {
            char text[64];
            if (c >= 0xd800 && c < 0xe000) continue;
            l.n = 0;
            tokenizer_encode(t, text, code_point_text(c, text), &l.ids, &l.n, &l.capacity);
            for (size_t i = 0; i < l.n; i++) hash = (hash ^ (uint64_t)l.ids[i]) * 0x100000001B3u;
        }
        EXPECT(hash == strtoull(recorded + block * 17, NULL, 16), "code points U+%04X to U+%04X", block * 4096, block * 4096 + 4095);
    }
    free(l.ids);
    free(recorded);
    tokenizer_free(t);
}

/* ---- any bytes ---- */

TEST(any_bytes_come_back) {
    compare_classes();
    Tokenizer *t = golden_tokenizer();
    for (int round = 0; round < 20000 && !test_errors; round++) {
        char text[800];
        size_t n = round < 256 ? 1 : round % 2 ? draw_bytes(text, 200) : draw(200);
        if (round % 2 == 0) for (size_t i = 0; i < n; i++) text[i] = (char)draw(256);
        if (round < 256) text[0] = (char)round;
        IdList l = encode(t, text, n);
        EXPECT(decodes_to(t, &l, text, n), "round %d, %zu bytes", round, n);
        free(l.ids);
    }
    tokenizer_free(t);
}

TEST(bad_bytes_are_tokens_of_their_own) {
    Tokenizer *t = golden_tokenizer();
    static const char *const bad[] = {"\x80", "\xc0\x80", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xe3\x81", "\xf5", "\xff", "\xe0\x80\x80"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char text[16];
        size_t n = (size_t)snprintf(text, sizeof text, "a%sa", bad[i]);
        IdList l = encode(t, text, n);
        EXPECT(l.n == n, "case %zu: %zu ids for %zu bytes", i, l.n, n);
        for (size_t k = 0; k < l.n && k < n; k++) EXPECT(l.ids[k] == t->byte_id[(unsigned char)text[k]], "case %zu byte %zu", i, k);
        free(l.ids);
    }
    tokenizer_free(t);
}

/* Texts long enough for the cache, whose words differ in zero bytes alone or have more ids than a slot holds, again and again. */
TEST(the_cache_changes_nothing) {
    Tokenizer *t = golden_tokenizer();
    size_t bytes, n = 1 << 17;
    Error e = {0};
    char *text = file_read(GOLDEN "/text.txt", &bytes, &e), *odd = xmalloc(n);
    static const char *const words[] = {"\0", "\0\0", "!\0", "!\0\0", "!", "qxzjqkxz", "qxzjqkxzj", "qxzjqkxzjqvxqzkwqxjzkqvwxzqjkx", "zqxjkvqzxw", "\n", " ", "\x80"};
    static const size_t lengths[] = {1, 2, 2, 3, 1, 8, 9, 30, 10, 1, 1, 1};
    size_t used = 0;
    for (uint32_t w; used + 30 < n; used += lengths[w]) w = draw(12), memcpy(odd + used, words[w], lengths[w]);
    for (int kind = 0; kind < 2; kind++) {
        const char *from = kind ? odd : text;
        size_t length = kind ? used : bytes;
        IdList cached = encode(t, from, length), plain = {0};
        Encoder *encoder = encoder_create(t, 0);
        encoder_encode(encoder, from, length, &plain);
        encoder_destroy(encoder);
        EXPECT(cached.n == plain.n && !memcmp(cached.ids, plain.ids, plain.n * sizeof *plain.ids), "kind %d: %zu ids, %zu without", kind, cached.n, plain.n);
        EXPECT(decodes_to(t, &cached, from, length), "kind %d", kind);
        free(cached.ids);
        free(plain.ids);
    }
    free(text);
    free(odd);
    tokenizer_free(t);
}

/* The heap for long words and the scan for short ones merge alike: a text of one class, as a whole and by its definition. */
TEST(long_words_merge_like_short_ones) {
    Tokenizer *t = golden_tokenizer();
    for (int round = 0; round < 3000 && !test_errors; round++) {
        int32_t a[200], b[200];
        size_t n = 2 + draw(198), left = n;
        for (size_t i = 0; i < n; i++) a[i] = b[i] = t->byte_id[(unsigned char)"aetoshrn ld"[draw(11)]];
        for (;;) {  /* the definition: lowest rank first, leftmost first */
            size_t best = left, rank = SIZE_MAX;
            for (size_t i = 0; i + 1 < left; i++)
                for (size_t r = 0; r < t->n_merges && r < rank; r++)
                    if (t->merges[r].left == b[i] && t->merges[r].right == b[i + 1]) best = i, rank = r;
            if (best == left) break;
            b[best] = t->merges[rank].id;
            memmove(b + best + 1, b + best + 2, (left - best - 2) * sizeof *b);
            left--;
        }
        size_t got = bpe_merge(t, a, n);
        EXPECT(got == left && !memcmp(a, b, left * sizeof *a), "round %d, %zu bytes", round, n);
    }
    tokenizer_free(t);
}

TEST(no_quadratic_time) {
    Tokenizer *t = golden_tokenizer();
    size_t n = 1 << 20;
    char *text = xmalloc(n);
    for (int kind = 0; kind < 4; kind++) {
        for (size_t i = 0; i < n; i++) text[i] = kind == 0 ? 'a' : kind == 1 ? ' ' : kind == 2 ? "the"[i % 3] : (char)0xff;
        double started = seconds_now();
        IdList l = encode(t, text, n);
        double took = seconds_now() - started;
        EXPECT(took < 10, "kind %d: %.1f s for 1 MB without a boundary", kind, took);
        EXPECT(decodes_to(t, &l, text, n), "kind %d", kind);
        free(l.ids);
    }
    free(text);
    tokenizer_free(t);
}

/* ---- files ---- */

static bool same_tokenizer(const Tokenizer *a, const Tokenizer *b) {
    return a && b && !strcmp(tokenizer_fingerprint(a), tokenizer_fingerprint(b)) && a->V == b->V && a->n_merges == b->n_merges;
}

TEST(tokenizer_json_is_read) {
    Error e = {0};
    Tokenizer *pair = golden_tokenizer(), *json = tokenizer_load(GOLDEN "/tokenizer.json", &e);
    EXPECT(json, "%s", e.text);
    if (!json) return;
    EXPECT(tokenizer_vocab_size(json) == 1000 && tokenizer_end_of_text(json) == 999);
    EXPECT(tokenizer_vocab_size(pair) == 999 && tokenizer_end_of_text(pair) == -1);
    EXPECT(json->n_merges == pair->n_merges && !memcmp(json->merges, pair->merges, pair->n_merges * sizeof *pair->merges));
    EXPECT(!memcmp(json->bytes, pair->bytes, pair->offset[pair->V]));
    tokenizer_free(pair);
    tokenizer_free(json);
}

/* The older form of merges, "a b" instead of ["a", "b"]. */
TEST(tokenizer_json_with_merges_as_strings) {
    json_error_t error;
    Error e = {0};
    json_t *root = json_load_file(GOLDEN "/tokenizer.json", 0, &error), *strings = json_array(), *entry;
    json_t *model = json_object_get(root, "model");
    size_t i;
    json_array_foreach(json_object_get(model, "merges"), i, entry)
        json_array_append_new(strings, json_sprintf("%s %s", json_string_value(json_array_get(entry, 0)), json_string_value(json_array_get(entry, 1))));
    json_object_set_new(model, "merges", strings);
    char *path = in_folder("tokenizer.json");
    json_dump_file(root, path, 0);
    Tokenizer *a = tokenizer_load(path, &e), *b = tokenizer_load(GOLDEN "/tokenizer.json", NULL), *c = tokenizer_load(folder, NULL);
    EXPECT(same_tokenizer(a, b), "%s", e.text);
    EXPECT(same_tokenizer(c, b), "a directory with tokenizer.json alone");
    unlink(path);
    free(path);
    json_decref(root);
    tokenizer_free(a);
    tokenizer_free(b);
    tokenizer_free(c);
}

TEST(saved_and_loaded_is_the_same) {
    Error e = {0};
    Tokenizer *a = tokenizer_load(GOLDEN "/tokenizer.json", &e);
    char *dir = in_folder("saved/deep");
    EXPECT(tokenizer_save(a, dir, &e), "%s", e.text);
    Tokenizer *b = tokenizer_load(dir, &e);
    EXPECT(same_tokenizer(a, b), "%s", e.text);
    tokenizer_free(a);
    tokenizer_free(b);
    free(dir);
}

TEST(fingerprint_sees_every_part) {
    Tokenizer *t = golden_tokenizer();
    char before[33];
    strcpy(before, tokenizer_fingerprint(t));
    for (int part = 0; part < 2; part++) {
        Error e = {0};
        Tokenizer *u = golden_tokenizer();
        if (part == 0) u->bytes[u->offset[700]] ^= 1;
        else { Merge m = u->merges[10]; u->merges[10] = u->merges[11]; u->merges[11] = m; }
        free(u->pairs);
        free(u->words);
        EXPECT(tokenizer_index(u, &e), "%s", e.text);
        EXPECT(strcmp(before, tokenizer_fingerprint(u)), "part %d", part);
        tokenizer_free(u);
    }
    tokenizer_free(t);
}

static void write_text(const char *name, const char *text, size_t n) {
    char *path = in_folder(name);
    FILE *f = fopen(path, "wb");
    CHECK(f && fwrite(text, 1, n, f) == n && !fclose(f), "%s", path);
    free(path);
}

/* Loads the golden pair after replacing the first `old` by `new` in one of its files. */
static void refused(const char *file, const char *old, const char *new, const char *expected) {
    static const char *const names[] = {"vocab.json", "merges.txt", "tokenizer.json"};
    Error e = {0};
    for (int i = 0; i < 3; i++) {
        char *path = path_join(GOLDEN, names[i]), *here = in_folder(names[i]);
        bool wanted = (i == 2) == !strcmp(file, "tokenizer.json");
        size_t n;
        char *text = file_read(path, &n, &e), *at = strcmp(file, names[i]) ? NULL : strstr(text, old);
        if (!strcmp(file, names[i]) && !at) EXPECT(false, "%s has no %s", file, old);
        char *changed = at ? xasprintf("%.*s%s%s", (int)(at - text), text, new, at + strlen(old)) : xstrdup(text);
        unlink(here);
        if (wanted) write_text(names[i], changed, strlen(changed));
        free(changed);
        free(text);
        free(path);
        free(here);
    }
    Tokenizer *t = tokenizer_load(folder, &e);
    EXPECT(!t && e.code == EXIT_DATA, "%s with %s: was not refused", file, new);
    EXPECT(t || (strstr(e.text, file) && strstr(e.text, expected)), "the message for %s: %s", new, e.text);
    tokenizer_free(t);
}

TEST(bad_files_are_refused) {
    refused("vocab.json", "\"#\":2", "\"#\":3", "two tokens");
    refused("vocab.json", "\"#\":2", "\"#\":2000", "whole number");
    refused("vocab.json", "\"#\":2", "\"#\":-2", "whole number");
    refused("vocab.json", "\"#\":2", "\"#\":\"2\"", "whole number");
    refused("vocab.json", "\"#\":2", "\"# \":2", "byte alphabet");
    refused("vocab.json", "\"#\":2", "\"##\":2", "byte 0x23");
    refused("vocab.json", "\"#\":2", "\"!\":2", "not valid JSON");
    refused("vocab.json", "\"#\":2", "\"#\":2}", "not valid JSON");
    refused("merges.txt", "\nh e\n", "\nhe\n", "one space");
    refused("merges.txt", "\nh e\n", "\nh e x\n", "one space");
    refused("merges.txt", "\nh e\n", "\nq \xce\x93\n", "not in the vocabulary");
    refused("tokenizer.json", "\"type\":\"BPE\"", "\"type\":\"Unigram\"", "Unigram");
    refused("tokenizer.json", "\"normalizer\":null", "\"normalizer\":{\"type\":\"NFC\"}", "NFC");
    refused("tokenizer.json", "\"type\":\"ByteLevel\"", "\"type\":\"Whitespace\"", "Whitespace");
    refused("tokenizer.json", "\"add_prefix_space\":false", "\"add_prefix_space\":true", "add_prefix_space");
    refused("tokenizer.json", "\"dropout\":null", "\"dropout\":0.1", "dropout");
    refused("tokenizer.json", "\"id\":999,", "\"id\":998,", "two tokens");
    refused("tokenizer.json", "\"id\":999,", "", "added_tokens[0]");
    Error e = {0};
    EXPECT(!tokenizer_load("/no/such/place", &e) && e.code == EXIT_DATA && strstr(e.text, "/no/such/place"), "%s", e.text);
}

TEST(a_repeated_merge_is_refused) { refused("tokenizer.json", "\"merges\":[", "\"merges\":[[\"h\",\"e\"],", "join the same"); }

/* ---- training ---- */

static bool is_merge(const Tokenizer *t, const Merge *m, const char *expected) {
    char got[2000];
    size_t n = 0;
    for (int side = 0; side < 2; side++) {
        size_t bytes;
        const char *token = tokenizer_token(t, side ? m->right : m->left, &bytes);
        if (side) got[n++] = ' ';
        for (size_t i = 0; i < bytes && n < sizeof got - 5; i++) n += utf8_encode(byte_to_char((unsigned char)token[i]), got + n);
    }
    return strlen(expected) == n && !memcmp(got, expected, n);
}

static Tokenizer *trained(const char *text, size_t n, size_t size) {
    Error e = {0};
    BpeTrainer *trainer = bpe_trainer_create(size, &e);
    CHECK(trainer, "%s", e.text);
    bpe_trainer_feed(trainer, text, n);
    Tokenizer *t = bpe_trainer_finish(trainer, NULL, &e);
    CHECK(t, "%s", e.text);
    return t;
}

TEST(training_equals_hf) {
    Tokenizer *golden = golden_tokenizer();
    size_t n;
    char *text = file_read(GOLDEN "/text.txt", &n, NULL);
    Tokenizer *t = trained(text, n, 1000);
    EXPECT(t->V == 1000 && t->end_of_text == 999 && t->n_merges == golden->n_merges);
    EXPECT(!memcmp(t->merges, golden->merges, golden->n_merges * sizeof *t->merges));
    EXPECT(!memcmp(t->bytes, golden->bytes, golden->offset[golden->V]));
    free(text);
    tokenizer_free(t);
    tokenizer_free(golden);
}

TEST(training_of_ties_equals_hf) {
    json_t *cases = golden_json("training.json"), *entry;
    size_t i;
    json_array_foreach(cases, i, entry) {
        const json_t *text = json_array_get(entry, 0), *merges = json_array_get(entry, 2);
        Tokenizer *t = trained(json_string_value(text), json_string_length(text), (size_t)json_integer_value(json_array_get(entry, 1)));
        EXPECT(t->n_merges == json_array_size(merges), "case %zu: %zu merges, HF has %zu", i, t->n_merges, json_array_size(merges));
        for (size_t k = 0; k < t->n_merges && k < json_array_size(merges); k++)
            EXPECT(is_merge(t, &t->merges[k], json_string_value(json_array_get(merges, k))), "case %zu, merge %zu", i, k);
        tokenizer_free(t);
    }
    EXPECT(i > 5, "%zu", i);
    json_decref(cases);
}

TEST(vocabulary_sizes_out_of_range) {
    Error e = {0};
    EXPECT(!bpe_trainer_create(256, &e) && e.code == EXIT_USAGE, "%s", e.text);
    Tokenizer *t = trained("any text, any text", 18, 257);
    EXPECT(t->V == 257 && t->n_merges == 0 && t->end_of_text == 256);
    tokenizer_free(t);
}

/* ---- GPT-2's own vocabulary, where it is at hand ---- */

TEST(gpt2_vocabulary) {
    const char *const from[2] = {"../shared/data/gpt2_vocab.json", "../shared/data/gpt2_merges.txt"}, *const to[2] = {"gpt2/vocab.json", "gpt2/merges.txt"};
    if (!path_exists(from[0])) SKIP("%s is not there", from[0]);
    Error e = {0};
    char *dir = in_folder("gpt2");
    EXPECT(dir_create(dir, &e));
    for (int i = 0; i < 2; i++) {
        size_t n;
        char *text = file_read(from[i], &n, &e);
        write_text(to[i], text, n);
        free(text);
    }
    Tokenizer *t = tokenizer_load(dir, &e);
    EXPECT(t, "%s", e.text);
    if (!t) return;
    EXPECT(tokenizer_vocab_size(t) == 50257 && tokenizer_end_of_text(t) == 50256 && t->n_merges == 50000);
    const char *text = "Hello world, it's <|endoftext|>  2024\n";  /* ids as published with GPT-2 */
    static const int32_t ids[] = {15496, 995, 11, 340, 338, 1279, 91, 437, 1659, 5239, 91, 29, 220, 48609, 198};
    IdList l = encode(t, text, strlen(text));
    EXPECT(l.n == sizeof ids / sizeof *ids && !memcmp(l.ids, ids, sizeof ids), "%zu ids", l.n);
    free(l.ids);
    tokenizer_free(t);
    free(dir);
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    snprintf(folder, sizeof folder, "%s/llmc_tokenizer_XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
    CHECK(mkdtemp(folder), "%s", folder);
    RUN(split_examples);
    RUN(classes_equal_pcre2s);
    RUN(split_equals_pcre2s);
    RUN(safe_cuts_change_nothing);
    RUN(strings_equal_hf);
    RUN(every_code_point_equals_hf);
    RUN(any_bytes_come_back);
    RUN(bad_bytes_are_tokens_of_their_own);
    RUN(the_cache_changes_nothing);
    RUN(long_words_merge_like_short_ones);
    RUN(no_quadratic_time);
    RUN(tokenizer_json_is_read);
    RUN(tokenizer_json_with_merges_as_strings);
    RUN(saved_and_loaded_is_the_same);
    RUN(fingerprint_sees_every_part);
    RUN(bad_files_are_refused);
    RUN(a_repeated_merge_is_refused);
    RUN(training_equals_hf);
    RUN(training_of_ties_equals_hf);
    RUN(vocabulary_sizes_out_of_range);
    RUN(gpt2_vocabulary);
    path_remove_tree(folder, NULL);
    return test_done();
}
