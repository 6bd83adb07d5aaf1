/* Reading vocab.json + merges.txt, or tokenizer.json. Strict: a file that is not exactly of the GPT-2 kind is refused with the
 * place and the reason, because a tokenizer that is slightly wrong trains a model that is silently wrong. */
#include "../base/io.h"
#include "tokenizer_internal.h"
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    const char *path;      /* of the file being read, for messages */
    json_t *vocab;         /* token -> id */
    json_t *added;         /* array of added tokens, or NULL */
    char **text;           /* (V): bytes of each token */
    size_t *bytes;         /* (V) */
    size_t V;
    Merge *merges;
    size_t n_merges, capacity;
} Loading;

static json_t *read_json(const char *path, Error *e) {
    size_t bytes;
    char *text = file_read(path, &bytes, e);
    if (!text) return NULL;
    json_error_t error;
    json_t *root = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &error);
    free(text);
    if (!root) fail(e, EXIT_DATA, "%s:%d: not valid JSON: %s", path, error.line, error.text);
    else if (!json_is_object(root)) {
        fail(e, EXIT_DATA, "%s: expected a JSON object at the top", path);
        json_decref(root);
        root = NULL;
    }
    return root;
}

/* Token text in the printable alphabet -> bytes. */
static bool from_alphabet(Loading *l, const char *key, size_t length, size_t id, Error *e) {
    const unsigned char *p = (const unsigned char *)key, *end = p + length;
    char *out = xmalloc(length + 1);
    size_t n = 0;
    while (p < end) {
        uint32_t c;
        size_t step = utf8_decode(p, end, &c);
        int byte = step ? char_to_byte(c) : -1;
        if (byte < 0) {
            free(out);
            return fail(e, EXIT_DATA, "%s: token \"%s\" (id %zu) has a character that is not in GPT-2's byte alphabet; expected a "
                        "byte-level BPE vocabulary", l->path, key, id);
        }
        out[n++] = (char)byte;
        p += step;
    }
    l->text[id] = out;
    l->bytes[id] = n;
    return true;
}

static bool checked_id(const Loading *l, const char *token, const json_t *value, size_t *id, Error *e) {
    json_int_t v = json_is_integer(value) ? json_integer_value(value) : -1;
    if (v < 0 || (size_t)v >= l->V)
        return fail(e, EXIT_DATA, "%s: id of token \"%s\" is not a whole number from 0 to %zu (the file has %zu tokens)", l->path, token,
                    l->V - 1, l->V);
    if (l->text[v])
        return fail(e, EXIT_DATA, "%s: id %lld stands for two tokens, one of them \"%s\"", l->path, (long long)v, token);
    *id = (size_t)v;
    return true;
}

static const char *added_content(const json_t *entry) { return json_string_value(json_object_get(entry, "content")); }

/* An added token may repeat an entry of the vocabulary; it must then have the same id. */
static bool count_tokens(Loading *l, Error *e) {
    l->V = json_object_size(l->vocab);
    size_t i;
    json_t *entry;
    json_array_foreach(l->added, i, entry) {
        const char *content = added_content(entry);
        const json_t *id = json_object_get(entry, "id");
        if (!content || !*content || !json_is_integer(id))
            return fail(e, EXIT_DATA, "%s: added_tokens[%zu] has no content or no id", l->path, i);
        const json_t *known = json_object_get(l->vocab, content);
        if (!known) l->V++;
        else if (!json_equal(known, id))
            return fail(e, EXIT_DATA, "%s: added token \"%s\" has another id than in the vocabulary", l->path, content);
    }
    if (l->V < 256 || l->V > INT32_MAX / 2)
        return fail(e, EXIT_DATA, "%s: %zu tokens; a byte-level vocabulary has at least 256", l->path, l->V);
    l->text = xcalloc(l->V, sizeof *l->text);
    l->bytes = xcalloc(l->V, sizeof *l->bytes);
    return true;
}

static bool read_tokens(Loading *l, Error *e) {
    if (!count_tokens(l, e)) return false;
    size_t id, i;
    json_t *entry;
    json_array_foreach(l->added, i, entry) {
        const char *content = added_content(entry);
        if (!checked_id(l, content, json_object_get(entry, "id"), &id, e)) return false;
        l->text[id] = xstrdup(content);
        l->bytes[id] = strlen(content);
    }
    const char *key;
    json_object_foreach(l->vocab, key, entry) {
        bool known = json_is_integer(entry) && json_integer_value(entry) >= 0 && (size_t)json_integer_value(entry) < l->V &&
                     l->text[json_integer_value(entry)] && !strcmp(l->text[json_integer_value(entry)], key);
        if (known) continue;  /* an added token that stands in the vocabulary too */
        if (!*key) return fail(e, EXIT_DATA, "%s: a token is empty", l->path);
        if (!checked_id(l, key, entry, &id, e) || !from_alphabet(l, key, strlen(key), id, e)) return false;
    }
    return true;
}

/* ---- merges ---- */

static bool token_id(const Loading *l, const char *token, const char *where, int32_t *id, Error *e) {
    const json_t *value = json_object_get(l->vocab, token);
    if (!value) return fail(e, EXIT_DATA, "%s: token \"%s\" is not in the vocabulary", where, token);
    *id = (int32_t)json_integer_value(value);
    return true;
}

static bool add_merge(Loading *l, const char *left, const char *right, const char *where, Error *e) {
    Merge m;
    char *joined = xasprintf("%s%s", left, right);
    bool ok = token_id(l, left, where, &m.left, e) && token_id(l, right, where, &m.right, e) && token_id(l, joined, where, &m.id, e);
    free(joined);
    if (!ok) return false;
    if (l->n_merges == l->capacity) {
        l->capacity = l->capacity ? 2 * l->capacity : 1024;
        l->merges = xrealloc(l->merges, l->capacity * sizeof *l->merges);
    }
    l->merges[l->n_merges++] = m;
    return true;
}

/* "left right", exactly one space; line is changed. */
static bool add_merge_line(Loading *l, char *line, const char *where, Error *e) {
    char *space = strchr(line, ' ');
    if (!space || space == line || !space[1] || strchr(space + 1, ' '))
        return fail(e, EXIT_DATA, "%s: expected two tokens with one space between them, found \"%s\"", where, line);
    *space = 0;
    return add_merge(l, line, space + 1, where, e);
}

static bool read_merges_text(Loading *l, const char *path, Error *e) {
    size_t bytes;
    char *text = file_read(path, &bytes, e);
    if (!text) return false;
    bool ok = true;
    size_t number = 0;
    if (memchr(text, 0, bytes)) ok = fail(e, EXIT_DATA, "%s: has a zero byte; expected text, one merge a line", path);
    for (char *line = text, *next; ok && line < text + bytes; line = next) {
        number++;
        char *end = memchr(line, '\n', (size_t)(text + bytes - line));
        next = end ? end + 1 : text + bytes;
        if (end) *end = 0;
        size_t n = strlen(line);
        if (n && line[n - 1] == '\r') line[--n] = 0;
        if (!n || (number == 1 && !strncmp(line, "#version", 8))) continue;
        char where[512];
        snprintf(where, sizeof where, "%s:%zu", path, number);
        ok = add_merge_line(l, line, where, e);
    }
    free(text);
    return ok;
}

static bool add_merge_json(Loading *l, const json_t *entry, const char *where, Error *e) {
    if (json_is_string(entry)) {
        char *line = xstrdup(json_string_value(entry));
        bool ok = add_merge_line(l, line, where, e);
        free(line);
        return ok;
    }
    const char *left = json_string_value(json_array_get(entry, 0)), *right = json_string_value(json_array_get(entry, 1));
    if (json_array_size(entry) != 2 || !left || !right)
        return fail(e, EXIT_DATA, "%s: expected \"a b\" or [\"a\", \"b\"]", where);
    return add_merge(l, left, right, where, e);
}

static bool read_merges_json(Loading *l, const json_t *merges, Error *e) {
    if (!json_is_array(merges)) return fail(e, EXIT_DATA, "%s: model.merges is not an array", l->path);
    size_t i;
    json_t *entry;
    json_array_foreach(merges, i, entry) {
        char where[512];
        snprintf(where, sizeof where, "%s: model.merges[%zu]", l->path, i);
        if (!add_merge_json(l, entry, where, e)) return false;
    }
    return true;
}

/* ---- tokenizer.json: is it of GPT-2's kind? ---- */

static bool absent(const json_t *v) {
    return !v || json_is_null(v) || json_is_false(v) || (json_is_string(v) && !*json_string_value(v));
}

static const char *type_of(const json_t *v) {
    const char *type = json_string_value(json_object_get(v, "type"));
    return type ? type : "none";
}

static bool check_kind(const json_t *root, const char *path, Error *e) {
    const json_t *model = json_object_get(root, "model"), *split = json_object_get(root, "pre_tokenizer");
    const char *type = json_string_value(json_object_get(model, "type"));
    if (!json_is_object(model) || (type && strcmp(type, "BPE")))
        return fail(e, EXIT_DATA, "%s: model type is %s; expected BPE", path, type_of(model));
    if (!absent(json_object_get(root, "normalizer")))
        return fail(e, EXIT_DATA, "%s: has a normalizer (%s); GPT-2's kind has none", path, type_of(json_object_get(root, "normalizer")));
    if (strcmp(type_of(split), "ByteLevel"))
        return fail(e, EXIT_DATA, "%s: pre_tokenizer is %s; expected ByteLevel (GPT-2's split pattern)", path, type_of(split));
    if (!absent(json_object_get(split, "add_prefix_space")))
        return fail(e, EXIT_DATA, "%s: pre_tokenizer has add_prefix_space; it must be false", path);
    if (json_is_false(json_object_get(split, "use_regex")))
        return fail(e, EXIT_DATA, "%s: pre_tokenizer has use_regex false; it must be true", path);
    static const char *const unsupported[] = {"dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"};
    for (size_t i = 0; i < sizeof unsupported / sizeof *unsupported; i++)
        if (!absent(json_object_get(model, unsupported[i])))
            return fail(e, EXIT_DATA, "%s: model.%s is set; GPT-2's kind does not use it", path, unsupported[i]);
    return true;
}

/* ---- putting it together ---- */

static Tokenizer *assemble(Loading *l, Error *e) {
    Tokenizer *t = xcalloc(1, sizeof *t);
    t->V = l->V;
    t->end_of_text = -1;
    t->offset = xmalloc((l->V + 1) * sizeof *t->offset);
    t->offset[0] = 0;
    for (size_t i = 0; i < l->V; i++) t->offset[i + 1] = t->offset[i] + l->bytes[i];
    t->bytes = xmalloc(t->offset[l->V] + 1);
    for (size_t i = 0; i < l->V; i++) {
        memcpy(t->bytes + t->offset[i], l->text[i], l->bytes[i]);
        if (l->bytes[i] == 13 && !memcmp(l->text[i], "<|endoftext|>", 13)) t->end_of_text = (int32_t)i;
    }
    t->merges = l->merges;
    t->n_merges = l->n_merges;
    l->merges = NULL;
    if (tokenizer_index(t, e)) return t;
    fail_in(e, "%s", l->path);
    tokenizer_free(t);
    return NULL;
}

static void loading_free(Loading *l) {
    for (size_t i = 0; l->text && i < l->V; i++) free(l->text[i]);
    free(l->text);
    free(l->bytes);
    free(l->merges);
}

static Tokenizer *load_json(const char *path, Error *e) {
    json_t *root = read_json(path, e);
    if (!root) return NULL;
    Tokenizer *t = NULL;
    if (check_kind(root, path, e)) {
        json_t *model = json_object_get(root, "model");
        Loading l = {.path = path, .vocab = json_object_get(model, "vocab"), .added = json_object_get(root, "added_tokens")};
        if (!json_is_object(l.vocab)) fail(e, EXIT_DATA, "%s: model.vocab is not an object", path);
        else if (read_tokens(&l, e) && read_merges_json(&l, json_object_get(model, "merges"), e)) t = assemble(&l, e);
        loading_free(&l);
    }
    json_decref(root);
    return t;
}

static Tokenizer *load_pair(const char *vocab_path, const char *merges_path, Error *e) {
    json_t *root = read_json(vocab_path, e);
    if (!root) return NULL;
    Tokenizer *t = NULL;
    Loading l = {.path = vocab_path, .vocab = root};
    if (read_tokens(&l, e) && read_merges_text(&l, merges_path, e)) t = assemble(&l, e);
    loading_free(&l);
    json_decref(root);
    return t;
}

Tokenizer *tokenizer_load(const char *path, Error *e) {
    if (!path_is_dir(path)) {
        if (path_exists(path)) return load_json(path, e);
        fail(e, EXIT_DATA, "%s: no such tokenizer; expected a directory with vocab.json and merges.txt, or a tokenizer.json", path);
        return NULL;
    }
    char *vocab = path_join(path, "vocab.json"), *merges = path_join(path, "merges.txt"), *json = path_join(path, "tokenizer.json");
    Tokenizer *t = NULL;
    if (path_exists(vocab) && path_exists(merges)) t = load_pair(vocab, merges, e);
    else if (path_exists(json)) t = load_json(json, e);
    else fail(e, EXIT_DATA, "%s: no tokenizer there; expected vocab.json and merges.txt, or tokenizer.json", path);
    free(vocab);
    free(merges);
    free(json);
    return t;
}
