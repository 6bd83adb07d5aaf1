/* Text to ids: pre-tokens are looked up in a bounded cache, then in the vocabulary, and merged by rank only when both miss.
 * Short pre-tokens are merged by scanning for the lowest rank, long ones with a heap: n log n on any input. */
#include "tokenizer_internal.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

enum { SHORT_WORD = 48, CACHE_KEY = 32, CACHE_IDS = 7, CACHE_MIN_BITS = 8, CACHE_MAX_BITS = 15 };

/* One cache line. Key: the bytes, zeros, and the length in the last byte. */
typedef struct {
    uint64_t key[CACHE_KEY / 8];
    int32_t n, ids[CACHE_IDS];
} CacheSlot;

struct Encoder {
    const Tokenizer *t;
    CacheSlot *cache;   /* direct mapped; NULL: none */
    unsigned bits;
};

void id_list_append(IdList *list, int32_t id) {
    if (list->n == list->capacity) {
        list->capacity = list->capacity ? 2 * list->capacity : 64;
        list->ids = xrealloc(list->ids, list->capacity * sizeof *list->ids);
    }
    list->ids[list->n++] = id;
}

static void reserve(IdList *list, size_t more) {
    if (list->capacity - list->n >= more) return;
    while (list->capacity - list->n < more) list->capacity = list->capacity ? 2 * list->capacity : 64;
    list->ids = xrealloc(list->ids, list->capacity * sizeof *list->ids);
}

/* ---- merging ---- */

static inline size_t pair_slot(int32_t left, int32_t right, unsigned bits) {
    uint64_t key = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    return (size_t)(key * 0x9E3779B97F4A7C15u >> (64 - bits));
}

/* The merge of two neighbours; an empty slot (rank NO_RANK) when they do not merge. */
static inline const PairSlot *find_merge(const Tokenizer *t, int32_t left, int32_t right) {
    size_t mask = ((size_t)1 << t->pair_bits) - 1;
    for (size_t i = pair_slot(left, right, t->pair_bits);; i = (i + 1) & mask) {
        const PairSlot *s = &t->pairs[i];
        if (s->rank == NO_RANK || (s->left == left && s->right == right)) return s;
    }
}

static size_t merge_short(const Tokenizer *t, int32_t *ids, size_t n) {
    int32_t rank[SHORT_WORD], merged[SHORT_WORD];
    for (size_t i = 0; i + 1 < n; i++) {
        const PairSlot *s = find_merge(t, ids[i], ids[i + 1]);
        rank[i] = s->rank, merged[i] = s->id;
    }
    while (n > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < n; i++)
            if (rank[i] < rank[best]) best = i;
        if (rank[best] == NO_RANK) break;
        ids[best] = merged[best];
        n--;
        for (size_t i = best + 1; i < n; i++) ids[i] = ids[i + 1], rank[i - 1] = rank[i], merged[i - 1] = merged[i];
        for (size_t i = best ? best - 1 : 0; i <= best && i + 1 < n; i++) {
            const PairSlot *s = find_merge(t, ids[i], ids[i + 1]);
            rank[i] = s->rank, merged[i] = s->id;
        }
    }
    return n;
}

typedef struct { int32_t rank; size_t at; } Candidate;
typedef struct { Candidate *items; size_t n, capacity; } Heap;

static inline bool before(Candidate a, Candidate b) { return a.rank != b.rank ? a.rank < b.rank : a.at < b.at; }

static void heap_push(Heap *h, Candidate c) {
    if (h->n == h->capacity) {
        h->capacity = h->capacity ? 2 * h->capacity : 256;
        h->items = xrealloc(h->items, h->capacity * sizeof *h->items);
    }
    size_t i = h->n++;
    for (; i && before(c, h->items[(i - 1) / 2]); i = (i - 1) / 2) h->items[i] = h->items[(i - 1) / 2];
    h->items[i] = c;
}

static Candidate heap_pop(Heap *h) {
    Candidate top = h->items[0], last = h->items[--h->n];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < h->n; i = child) {
        if (child + 1 < h->n && before(h->items[child + 1], h->items[child])) child++;
        if (!before(h->items[child], last)) break;
        h->items[i] = h->items[child];
    }
    h->items[i] = last;
    return top;
}

/* A doubly linked list over ids; a symbol merged into its left neighbour has id -1. Entries of the heap are checked when they
 * come up: stale when the pair at that place has changed. */
typedef struct { size_t prev, next; } Link;
#define NONE SIZE_MAX

static void consider(const Tokenizer *t, Heap *h, const int32_t *ids, const Link *links, size_t at) {
    if (at == NONE || links[at].next == NONE) return;
    int32_t rank = find_merge(t, ids[at], ids[links[at].next])->rank;
    if (rank != NO_RANK) heap_push(h, (Candidate){rank, at});
}

static size_t merge_long(const Tokenizer *t, int32_t *ids, size_t n) {
    Heap h = {0};
    Link *links = xmalloc(n * sizeof *links);
    for (size_t i = 0; i < n; i++) links[i] = (Link){i ? i - 1 : NONE, i + 1 < n ? i + 1 : NONE};
    for (size_t i = 0; i < n; i++) consider(t, &h, ids, links, i);
    while (h.n) {
        Candidate c = heap_pop(&h);
        size_t right = links[c.at].next;
        if (ids[c.at] < 0 || right == NONE) continue;
        const PairSlot *s = find_merge(t, ids[c.at], ids[right]);
        if (s->rank != c.rank) continue;
        ids[c.at] = s->id;
        ids[right] = -1;
        links[c.at].next = links[right].next;
        if (links[right].next != NONE) links[links[right].next].prev = c.at;
        consider(t, &h, ids, links, links[c.at].prev);
        consider(t, &h, ids, links, c.at);
    }
    size_t kept = 0;
    for (size_t i = 0; i < n; i++)
        if (ids[i] >= 0) ids[kept++] = ids[i];
    free(links);
    free(h.items);
    return kept;
}

size_t bpe_merge(const Tokenizer *t, int32_t *ids, size_t n) {
    return n <= SHORT_WORD ? merge_short(t, ids, n) : merge_long(t, ids, n);
}

/* ---- words of the vocabulary ---- */

static size_t word_slot(const Tokenizer *t, const char *bytes, size_t n) {
    size_t mask = ((size_t)1 << t->word_bits) - 1;
    for (size_t i = (size_t)XXH3_64bits(bytes, n) & mask;; i = (i + 1) & mask) {
        int32_t id = t->words[i];
        if (id < 0) return i;
        if (t->offset[id + 1] - t->offset[id] == n && !memcmp(t->bytes + t->offset[id], bytes, n)) return i;
    }
}

static unsigned bits_for(size_t n) {
    unsigned bits = 4;
    while ((size_t)1 << bits < 2 * n) bits++;
    return bits;
}

static bool index_merges(Tokenizer *t, Error *e) {
    t->pair_bits = bits_for(t->n_merges);
    size_t slots = (size_t)1 << t->pair_bits;
    t->pairs = xmalloc(slots * sizeof *t->pairs);
    for (size_t i = 0; i < slots; i++) t->pairs[i] = (PairSlot){-1, -1, NO_RANK, -1};
    for (size_t rank = 0; rank < t->n_merges; rank++) {
        const Merge *m = &t->merges[rank];
        PairSlot *s = (PairSlot *)find_merge(t, m->left, m->right);
        if (s->rank != NO_RANK)
            return fail(e, EXIT_DATA, "merges %d and %zu (counted from 0) join the same two tokens, %d and %d; each pair may "
                        "stand once", s->rank, rank, m->left, m->right);
        *s = (PairSlot){m->left, m->right, (int32_t)rank, m->id};
    }
    return true;
}

/* Ids of the bytes, in *ids; grown as needed. */
static void byte_ids(const Tokenizer *t, const char *bytes, size_t n, int32_t *ids) {
    for (size_t i = 0; i < n; i++) ids[i] = t->byte_id[(unsigned char)bytes[i]];
}

static void index_words(Tokenizer *t) {
    t->word_bits = bits_for(t->V);
    size_t slots = (size_t)1 << t->word_bits;
    t->words = xmalloc(slots * sizeof *t->words);
    memset(t->words, 0xff, slots * sizeof *t->words);
    int32_t *ids = NULL;
    size_t capacity = 0;
    for (size_t i = 0; i < t->V; i++) {
        const char *bytes = t->bytes + t->offset[i];
        size_t n = t->offset[i + 1] - t->offset[i];
        if (n > capacity) ids = xrealloc(ids, (capacity = 2 * n) * sizeof *ids);
        byte_ids(t, bytes, n, ids);
        if (n && bpe_merge(t, ids, n) == 1 && ids[0] == (int32_t)i) t->words[word_slot(t, bytes, n)] = (int32_t)i;
    }
    free(ids);
}

bool tokenizer_index(Tokenizer *t, Error *e) {
    split_init();
    for (size_t b = 0; b < 256; b++) t->byte_id[b] = -1;
    for (size_t i = t->V; i-- > 0;)
        if (t->offset[i + 1] - t->offset[i] == 1) t->byte_id[(unsigned char)t->bytes[t->offset[i]]] = (int32_t)i;
    for (unsigned b = 0; b < 256; b++)
        if (t->byte_id[b] < 0)
            return fail(e, EXIT_DATA, "the vocabulary has no token for byte 0x%02x; a byte-level vocabulary needs all 256", b);
    if (!index_merges(t, e)) return false;
    index_words(t);
    XXH3_state_t *hash = XXH3_createState();
    XXH3_128bits_reset(hash);
    for (size_t i = 0; i < t->V; i++) {
        uint64_t n = t->offset[i + 1] - t->offset[i];
        XXH3_128bits_update(hash, &n, sizeof n);
        XXH3_128bits_update(hash, t->bytes + t->offset[i], n);
    }
    XXH3_128bits_update(hash, t->merges, t->n_merges * sizeof *t->merges);
    XXH128_hash_t h = XXH3_128bits_digest(hash);
    XXH3_freeState(hash);
    snprintf(t->fingerprint, sizeof t->fingerprint, "%016llx%016llx", (unsigned long long)h.high64, (unsigned long long)h.low64);
    return true;
}

/* ---- encoding ---- */

/* The cache pays from a few kilobytes on; its size follows the text's. */
Encoder *encoder_create(const Tokenizer *t, size_t expected_bytes) {
    Encoder *encoder = xcalloc(1, sizeof *encoder);
    encoder->t = t;
    if (expected_bytes < 4096) return encoder;
    encoder->bits = CACHE_MIN_BITS;
    while (encoder->bits < CACHE_MAX_BITS && ((size_t)32 << encoder->bits) < expected_bytes) encoder->bits++;
    encoder->cache = xcalloc((size_t)1 << encoder->bits, sizeof *encoder->cache);
    return encoder;
}

void encoder_destroy(Encoder *encoder) {
    if (encoder) free(encoder->cache);
    free(encoder);
}

static void encode_word(const Tokenizer *t, const char *word, size_t n, IdList *out) {
    int32_t id = t->words[word_slot(t, word, n)];
    if (id >= 0) {
        id_list_append(out, id);
        return;
    }
    reserve(out, n);
    byte_ids(t, word, n, out->ids + out->n);
    out->n += bpe_merge(t, out->ids + out->n, n);
}

static inline void load_key(uint64_t key[CACHE_KEY / 8], const char *word, size_t n, const char *end) {
    static const uint8_t keep[2 * CACHE_KEY] = {
        255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255,
        255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255};
    if (end - word >= CACHE_KEY) {
        uint64_t mask[CACHE_KEY / 8];
        memcpy(key, word, CACHE_KEY);
        memcpy(mask, keep + CACHE_KEY - n, CACHE_KEY);
        for (int i = 0; i < CACHE_KEY / 8; i++) key[i] &= mask[i];
    } else {
        memset(key, 0, CACHE_KEY);
        memcpy(key, word, n);
    }
    key[CACHE_KEY / 8 - 1] |= (uint64_t)n << 56;
}

static inline size_t cache_slot(const uint64_t key[CACHE_KEY / 8], unsigned bits) {
    uint64_t h = key[0] * 0x9E3779B97F4A7C15u ^ key[1] * 0xC2B2AE3D27D4EB4Fu ^ key[2] * 0x165667B19E3779F9u ^ key[3] * 0x27D4EB2F165667C5u;
    h ^= h >> 29;
    return (size_t)(h * 0x9E3779B97F4A7C15u >> (64 - bits));
}

static inline void encode_cached(Encoder *encoder, const char *word, size_t n, const char *end, IdList *out) {
    uint64_t key[CACHE_KEY / 8];
    load_key(key, word, n, end);
    CacheSlot *slot = &encoder->cache[cache_slot(key, encoder->bits)];
    if (!memcmp(slot->key, key, sizeof key)) {
        reserve(out, CACHE_IDS);
        memcpy(out->ids + out->n, slot->ids, sizeof slot->ids);  /* a constant size is one move; n says how many count */
        out->n += (size_t)slot->n;
        return;
    }
    size_t from = out->n;
    encode_word(encoder->t, word, n, out);
    if (out->n - from > CACHE_IDS) return;
    memcpy(slot->key, key, sizeof key);
    slot->n = (int32_t)(out->n - from);
    memcpy(slot->ids, out->ids + from, (out->n - from) * sizeof *out->ids);
}

void encoder_encode(Encoder *encoder, const char *text, size_t bytes, IdList *out) {
    const Tokenizer *t = encoder->t;
    const char *end = text + bytes;
    reserve(out, bytes / 4 + 16);
    for (const char *p = text; p < end;) {
        size_t n = split_next((const unsigned char *)p, (const unsigned char *)end);
        if (n == 1) id_list_append(out, t->byte_id[(unsigned char)*p]);
        else if (encoder->cache && n < CACHE_KEY) encode_cached(encoder, p, n, end, out);
        else encode_word(t, p, n, out);
        p += n;
    }
}

void tokenizer_encode(const Tokenizer *t, const char *text, size_t bytes, int32_t **ids, size_t *n, size_t *capacity) {
    IdList out = {*ids, *n, *capacity};
    Encoder *encoder = encoder_create(t, bytes);
    encoder_encode(encoder, text, bytes, &out);
    encoder_destroy(encoder);
    *ids = out.ids, *n = out.n, *capacity = out.capacity;
}
