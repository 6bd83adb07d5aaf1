/* Training a byte-level BPE vocabulary: unique pre-tokens with counts, then merges of the most frequent pair (Sennrich et al. 2016),
 * with counts kept up to date by the words a merge touches. Order, ties and bookkeeping are those of the trainer of Hugging Face
 * tokenizers with min_frequency 2: highest count first, then the smaller pair of ids. One difference: counts are 64-bit here. */
#include "tokenizer_internal.h"
#include <stdlib.h>
#include <string.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

/* ---- byte strings, each kept once: string i is bytes[offset[i], offset[i + 1]) ---- */

typedef struct {
    char *bytes;
    size_t used, room;
    size_t *offset, n, capacity;
    uint32_t *slots;  /* index + 1; 0: empty */
    unsigned bits;
} Strings;

static void strings_init(Strings *s) {
    *s = (Strings){.bits = 12, .capacity = 1024};
    s->slots = xcalloc((size_t)1 << s->bits, sizeof *s->slots);
    s->offset = xcalloc(s->capacity + 1, sizeof *s->offset);
}

static void strings_free(Strings *s) {
    free(s->bytes);
    free(s->offset);
    free(s->slots);
}

static size_t strings_slot(const Strings *s, const char *bytes, size_t n) {
    size_t mask = ((size_t)1 << s->bits) - 1;
    for (size_t i = (size_t)XXH3_64bits(bytes, n) & mask;; i = (i + 1) & mask) {
        if (!s->slots[i]) return i;
        size_t at = s->slots[i] - 1;
        if (s->offset[at + 1] - s->offset[at] == n && !memcmp(s->bytes + s->offset[at], bytes, n)) return i;
    }
}

static void strings_grow(Strings *s) {
    free(s->slots);
    s->bits++;
    s->slots = xcalloc((size_t)1 << s->bits, sizeof *s->slots);
    for (size_t i = 0; i < s->n; i++)
        s->slots[strings_slot(s, s->bytes + s->offset[i], s->offset[i + 1] - s->offset[i])] = (uint32_t)i + 1;
}

/* Index of the string; it is new when that equals the n of before. */
static size_t strings_add(Strings *s, const char *bytes, size_t n) {
    size_t slot = strings_slot(s, bytes, n);
    if (s->slots[slot]) return s->slots[slot] - 1;
    CHECK(s->n < UINT32_MAX - 1, "%zu different strings", s->n);
    if (s->room - s->used < n) s->bytes = xrealloc(s->bytes, s->room = 2 * (s->used + n) + 4096);
    if (s->n == s->capacity) s->offset = xrealloc(s->offset, ((s->capacity *= 2) + 1) * sizeof *s->offset);
    memcpy(s->bytes + s->used, bytes, n);
    s->used += n;
    s->slots[slot] = (uint32_t)++s->n;
    s->offset[s->n] = s->used;
    if (2 * s->n > (size_t)1 << s->bits) strings_grow(s);
    return s->n - 1;
}

/* ---- counting ---- */

struct BpeTrainer {
    size_t vocab_size;
    Strings words;
    int64_t *counts;
    size_t capacity;
};

BpeTrainer *bpe_trainer_create(size_t vocab_size, Error *e) {
    if (vocab_size < 257 || vocab_size > INT32_MAX / 2) {
        fail(e, EXIT_USAGE, "vocabulary of %zu; expected from 257 (256 bytes and <|endoftext|>) to %d", vocab_size, INT32_MAX / 2);
        return NULL;
    }
    split_init();
    BpeTrainer *trainer = xcalloc(1, sizeof *trainer);
    trainer->vocab_size = vocab_size;
    strings_init(&trainer->words);
    return trainer;
}

void bpe_trainer_feed(BpeTrainer *trainer, const char *text, size_t bytes) {
    const char *end = text + bytes;
    for (const char *p = text; p < end;) {
        size_t n = split_next((const unsigned char *)p, (const unsigned char *)end);
        size_t word = strings_add(&trainer->words, p, n);
        if (word >= trainer->capacity) {
            trainer->counts = xrealloc(trainer->counts, (2 * word + 1024) * sizeof *trainer->counts);
            memset(trainer->counts + trainer->capacity, 0, (2 * word + 1024 - trainer->capacity) * sizeof *trainer->counts);
            trainer->capacity = 2 * word + 1024;
        }
        trainer->counts[word]++;
        p += n;
    }
}

bool bpe_trainer_feed_files(BpeTrainer *trainer, char **paths, size_t n_paths, const char *document_marker, Error *e) {
    TextReader *reader = text_reader_create(paths, n_paths, document_marker, 1 << 20);
    TextPiece piece;
    int got;
    while ((got = text_reader_next(reader, &piece, e)) > 0) bpe_trainer_feed(trainer, piece.text, piece.bytes);
    text_reader_destroy(reader);
    return got == 0;
}

void bpe_trainer_free(BpeTrainer *trainer) {
    if (!trainer) return;
    strings_free(&trainer->words);
    free(trainer->counts);
    free(trainer);
}

/* ---- merging ---- */

typedef struct { uint32_t *items; size_t n, capacity; } WordList;

typedef struct {
    int32_t left, right;
    int64_t count;
    WordList fresh;      /* words that gained this pair in the current step */
} Pair;

/* A pair waiting for its turn, with the words that gained it in one step. Its count may be out of date: checked when it comes up. */
typedef struct {
    int64_t count;
    int32_t left, right;
    size_t pair;
    WordList words;
} Waiting;

typedef struct {
    int32_t *symbols;       /* of all words */
    size_t *first;          /* word w is symbols[first[w], first[w] + length[w]); lengths shrink */
    size_t *length;
    const int64_t *counts;
    Strings tokens;
    Pair *pairs;
    size_t n_pairs, pair_capacity;
    uint32_t *slots;        /* index of pair + 1 by (left, right) */
    unsigned bits;
    uint32_t *gained;       /* pairs whose fresh list is not empty */
    size_t n_gained, gained_capacity;
    Waiting *heap;
    size_t n_heap, heap_capacity;
    Merge *merges;
    size_t n_merges, merge_capacity;
} Merging;

static size_t pair_slot(const Merging *m, int32_t left, int32_t right) {
    size_t mask = ((size_t)1 << m->bits) - 1;
    uint64_t key = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    for (size_t i = (size_t)(key * 0x9E3779B97F4A7C15u >> (64 - m->bits));; i = (i + 1) & mask) {
        if (!m->slots[i]) return i;
        const Pair *p = &m->pairs[m->slots[i] - 1];
        if (p->left == left && p->right == right) return i;
    }
}

static size_t pair_index(Merging *m, int32_t left, int32_t right) {
    size_t slot = pair_slot(m, left, right);
    if (m->slots[slot]) return m->slots[slot] - 1;
    CHECK(m->n_pairs < UINT32_MAX - 1, "%zu different pairs", m->n_pairs);
    if (m->n_pairs == m->pair_capacity) m->pairs = xrealloc(m->pairs, (m->pair_capacity = 2 * m->pair_capacity + 1024) * sizeof *m->pairs);
    m->pairs[m->n_pairs] = (Pair){.left = left, .right = right};
    m->slots[slot] = (uint32_t)++m->n_pairs;
    if (2 * m->n_pairs > (size_t)1 << m->bits) {
        free(m->slots);
        m->slots = xcalloc((size_t)1 << ++m->bits, sizeof *m->slots);
        for (size_t i = 0; i < m->n_pairs; i++) m->slots[pair_slot(m, m->pairs[i].left, m->pairs[i].right)] = (uint32_t)i + 1;
    }
    return m->n_pairs - 1;
}

static void lose_pair(Merging *m, int32_t left, int32_t right, size_t word) {
    m->pairs[pair_index(m, left, right)].count -= m->counts[word];
}

static void gain_pair(Merging *m, int32_t left, int32_t right, size_t word) {
    size_t at = pair_index(m, left, right);
    Pair *p = &m->pairs[at];
    p->count += m->counts[word];
    WordList *l = &p->fresh;
    if (l->n && l->items[l->n - 1] == word) return;
    if (!l->n) {
        if (m->n_gained == m->gained_capacity)
            m->gained = xrealloc(m->gained, (m->gained_capacity = 2 * m->gained_capacity + 256) * sizeof *m->gained);
        m->gained[m->n_gained++] = (uint32_t)at;
    }
    if (l->n == l->capacity) l->items = xrealloc(l->items, (l->capacity = 2 * l->capacity + 2) * sizeof *l->items);
    l->items[l->n++] = (uint32_t)word;
}

static bool sooner(const Waiting *a, const Waiting *b) {
    if (a->count != b->count) return a->count > b->count;
    return a->left != b->left ? a->left < b->left : a->right < b->right;
}

static void heap_push(Merging *m, Waiting w) {
    if (m->n_heap == m->heap_capacity) m->heap = xrealloc(m->heap, (m->heap_capacity = 2 * m->heap_capacity + 1024) * sizeof *m->heap);
    size_t i = m->n_heap++;
    for (; i && sooner(&w, &m->heap[(i - 1) / 2]); i = (i - 1) / 2) m->heap[i] = m->heap[(i - 1) / 2];
    m->heap[i] = w;
}

static Waiting heap_pop(Merging *m) {
    Waiting top = m->heap[0], last = m->heap[--m->n_heap];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < m->n_heap; i = child) {
        if (child + 1 < m->n_heap && sooner(&m->heap[child + 1], &m->heap[child])) child++;
        if (!sooner(&m->heap[child], &last)) break;
        m->heap[i] = m->heap[child];
    }
    m->heap[i] = last;
    return top;
}

/* The pairs gained in this step join the heap. */
static void queue_gained(Merging *m) {
    for (size_t i = 0; i < m->n_gained; i++) {
        Pair *p = &m->pairs[m->gained[i]];
        if (p->count > 0) heap_push(m, (Waiting){p->count, p->left, p->right, m->gained[i], p->fresh});
        else free(p->fresh.items);
        p->fresh = (WordList){0};
    }
    m->n_gained = 0;
}

/* Replaces left right by id in one word, from left to right, and books the neighbours' pairs. */
static void merge_in_word(Merging *m, size_t word, int32_t left, int32_t right, int32_t id) {
    int32_t *s = m->symbols + m->first[word];
    size_t n = m->length[word], out = 0;
    for (size_t in = 0; in < n; out++) {
        if (s[in] != left || in + 1 == n || s[in + 1] != right) {
            s[out] = s[in++];
            continue;
        }
        if (out) lose_pair(m, s[out - 1], left, word), gain_pair(m, s[out - 1], id, word);
        in += 2;
        if (in < n) lose_pair(m, right, s[in], word), gain_pair(m, id, s[in], word);
        s[out] = id;
    }
    m->length[word] = out;
}

/* The token a merge makes. No other merge makes the same one: between two boundaries that still stand, the merges so far acted on
 * the same bytes in the same way everywhere, so an earlier merge into this token would have merged here too. */
static int32_t joined_token(Merging *m, int32_t left, int32_t right) {
    size_t before = m->tokens.n;
    const size_t *offset = m->tokens.offset;
    size_t a = offset[left + 1] - offset[left], b = offset[right + 1] - offset[right];
    char *text = xmalloc(a + b);
    memcpy(text, m->tokens.bytes + offset[left], a);
    memcpy(text + a, m->tokens.bytes + offset[right], b);
    int32_t id = (int32_t)strings_add(&m->tokens, text, a + b);
    CHECK(m->tokens.n == before + 1, "tokens %d and %d make token %d again", left, right, id);
    free(text);
    return id;
}

static void merging_init(Merging *m, const BpeTrainer *trainer) {
    const Strings *words = &trainer->words;
    int32_t id_of_byte[256];
    *m = (Merging){.counts = trainer->counts, .bits = 12};
    strings_init(&m->tokens);
    for (uint32_t c = 0; c < 0x144; c++) {  /* the alphabet in order of its characters */
        int byte = char_to_byte(c);
        if (byte >= 0) id_of_byte[byte] = (int32_t)strings_add(&m->tokens, &(char){(char)byte}, 1);
    }
    m->slots = xcalloc((size_t)1 << m->bits, sizeof *m->slots);
    m->symbols = xmalloc(words->used * sizeof *m->symbols);
    m->first = xmalloc(words->n * sizeof *m->first);
    m->length = xmalloc(words->n * sizeof *m->length);
    for (size_t i = 0; i < words->used; i++) m->symbols[i] = id_of_byte[(unsigned char)words->bytes[i]];
    for (size_t w = 0; w < words->n; w++) {
        m->first[w] = words->offset[w];
        m->length[w] = words->offset[w + 1] - words->offset[w];
        for (size_t i = 0; i + 1 < m->length[w]; i++) gain_pair(m, m->symbols[m->first[w] + i], m->symbols[m->first[w] + i + 1], w);
    }
    queue_gained(m);
}

static void merging_free(Merging *m) {
    for (size_t i = 0; i < m->n_heap; i++) free(m->heap[i].words.items);
    free(m->heap);
    free(m->symbols);
    free(m->first);
    free(m->length);
    strings_free(&m->tokens);
    free(m->pairs);
    free(m->slots);
    free(m->gained);
    free(m->merges);
}

static void record_merge(Merging *m, Merge merge) {
    if (m->n_merges == m->merge_capacity)
        m->merges = xrealloc(m->merges, (m->merge_capacity = 2 * m->merge_capacity + 256) * sizeof *m->merges);
    m->merges[m->n_merges++] = merge;
}

/* False: no pair occurs twice any more. */
static bool merge_most_frequent(Merging *m) {
    while (m->n_heap) {
        Waiting top = heap_pop(m);
        int64_t count = m->pairs[top.pair].count;
        if (count != top.count) {
            top.count = count;
            heap_push(m, top);
            continue;
        }
        if (count >= 2) {
            int32_t id = joined_token(m, top.left, top.right);
            record_merge(m, (Merge){top.left, top.right, id});
            for (size_t i = 0; i < top.words.n; i++) merge_in_word(m, top.words.items[i], top.left, top.right, id);
            queue_gained(m);
        }
        free(top.words.items); /* NOLINT(clang-analyzer-unix.Malloc): popped, so that nothing else holds it */
        return count >= 2;
    }
    return false;
}

static Tokenizer *to_tokenizer(Merging *m, Error *e) {
    Tokenizer *t = xcalloc(1, sizeof *t);
    t->n_merges = m->n_merges;
    t->end_of_text = (int32_t)strings_add(&m->tokens, "<|endoftext|>", 13);
    t->V = m->tokens.n;
    t->bytes = m->tokens.bytes, m->tokens.bytes = NULL;
    t->offset = m->tokens.offset, m->tokens.offset = NULL;
    t->merges = m->merges, m->merges = NULL;
    if (tokenizer_index(t, e)) return t;
    tokenizer_free(t);
    return NULL;
}

Tokenizer *bpe_trainer_finish(BpeTrainer *trainer, void (*progress)(size_t done, size_t of), Error *e) {
    Merging m;
    merging_init(&m, trainer);
    size_t wanted = trainer->vocab_size - 1, report = 0;  /* the last token is <|endoftext|> */
    while (m.tokens.n < wanted && merge_most_frequent(&m))
        if (progress && m.tokens.n - 256 >= report) {
            progress(m.tokens.n - 256, wanted - 256);
            report = m.tokens.n - 256 + (wanted - 256) / 200 + 1;
        }
    if (progress) progress(m.tokens.n - 256, wanted - 256);
    Tokenizer *t = to_tokenizer(&m, e);
    merging_free(&m);
    bpe_trainer_free(trainer);
    return t;
}
