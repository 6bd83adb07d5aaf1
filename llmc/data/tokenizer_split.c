/* GPT-2's split pattern, by hand:
 *   '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
 * over Unicode 16 classes, as tiktoken and Hugging Face tokenizers have them. A byte that is not part of valid UTF-8
 * is a pre-token of its own (and is no white space). The test compares this with PCRE2 running the pattern itself. */
#include "tokenizer_internal.h"
#include <pthread.h>
#include <string.h>

enum { CODE_POINTS = 0x110000, MULTI = 7 };

static uint8_t packed[CODE_POINTS / 4];  /* two bits a code point */
static uint8_t byte_class[256];          /* of ASCII; MULTI above it */
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void mark(const uint32_t *ranges, size_t n, CharClass class) {
    for (size_t i = 0; i < n; i++) {
        uint32_t first = ranges[i] >> 8, last = first + (ranges[i] & 0xff);
        for (uint32_t c = first; c <= last; c++) packed[c >> 2] |= (uint8_t)((unsigned)class << (2 * (c & 3)));
    }
}

static void build(void) {
    mark(unicode_letters, n_unicode_letters, CLASS_LETTER);
    mark(unicode_numbers, n_unicode_numbers, CLASS_NUMBER);
    mark(unicode_spaces, n_unicode_spaces, CLASS_SPACE);
    for (uint32_t c = 0; c < 256; c++) byte_class[c] = c < 128 ? (uint8_t)unicode_class(c) : MULTI;
}

void split_init(void) { pthread_once(&once, build); }

CharClass unicode_class(uint32_t c) { return (CharClass)(packed[c >> 2] >> (2 * (c & 3)) & 3); }

size_t utf8_decode(const unsigned char *p, const unsigned char *end, uint32_t *code_point) {
    static const uint32_t smallest[5] = {0, 0, 0x80, 0x800, 0x10000};
    unsigned c = *p;
    if (c < 0x80) return *code_point = c, 1;
    size_t n = c < 0xc2 ? 0 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : c < 0xf5 ? 4 : 0;
    if (!n || (size_t)(end - p) < n) return 0;
    uint32_t v = c & (0x7fu >> n);
    for (size_t i = 1; i < n; i++) {
        if ((p[i] & 0xc0) != 0x80) return 0;
        v = v << 6 | (p[i] & 0x3f);
    }
    if (v < smallest[n] || v >= CODE_POINTS || (v >= 0xd800 && v < 0xe000)) return 0;
    return *code_point = v, n;
}

size_t utf8_encode(uint32_t c, char out[4]) {
    if (c < 0x80) return out[0] = (char)c, 1;
    size_t n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (size_t i = n - 1; i > 0; i--, c >>= 6) out[i] = (char)(0x80 | (c & 0x3f));
    out[0] = (char)((0xf00u >> n & 0xf0) | c);
    return n;
}

static inline CharClass class_at(const unsigned char *p, const unsigned char *end, size_t *length) {
    unsigned class = byte_class[*p];
    *length = 1;
    if (class != MULTI) return (CharClass)class;
    uint32_t c;
    size_t n = utf8_decode(p, end, &c);
    if (!n) return CLASS_BAD_BYTE;
    *length = n;
    return unicode_class(c);
}

/* The end of the run of characters of one class that goes on at p. */
static inline const unsigned char *run_end(const unsigned char *p, const unsigned char *end, CharClass class) {
    for (;;) {
        while (p < end && byte_class[*p] == class) p++;
        size_t length;
        if (p == end || *p < 0x80 || class_at(p, end, &length) != class) return p;
        p += length;
    }
}

/* \s+(?!\S)|\s+ : all of a run that ends the text; all but the last of a longer one; a single character. */
static size_t space_run(const unsigned char *p, const unsigned char *end) {
    const unsigned char *at = p, *last = p;
    size_t length;
    while (at < end && class_at(at, end, &length) == CLASS_SPACE) last = at, at += length;
    return (size_t)(at == end || last == p ? at - p : last - p);
}

static size_t contraction(const unsigned char *p, const unsigned char *end) {
    if (end - p < 2) return 0;
    unsigned a = p[1], b = end - p < 3 ? 0 : p[2];
    if (a == 's' || a == 'd' || a == 'm' || a == 't') return 2;
    return (a == 'l' && b == 'l') || (a == 'v' && b == 'e') || (a == 'r' && b == 'e') ? 3 : 0;
}

size_t split_next(const unsigned char *p, const unsigned char *end) {
    size_t length;
    CharClass class = class_at(p, end, &length);
    const unsigned char *from = p + length;
    if (*p == ' ' && from < end) {
        CharClass next = class_at(from, end, &length);
        if (next > CLASS_NUMBER) return space_run(p, end);
        return (size_t)(run_end(from + length, end, next) - p);
    }
    if (class == CLASS_SPACE) return space_run(p, end);
    if (class == CLASS_BAD_BYTE) return 1;
    if (*p == '\'') {
        size_t n = contraction(p, end);
        if (n) return n;
    }
    return (size_t)(run_end(from, end, class) - p);
}

/* The character that ends at p (begin < p), found backwards: no valid sequence has a lead byte inside, so this is the
 * character a forward reading meets. */
static CharClass class_before(const unsigned char *begin, const unsigned char *p, const unsigned char *end) {
    for (size_t back = 1; back <= 4 && back <= (size_t)(p - begin); back++) {
        size_t length;
        CharClass class = class_at(p - back, end, &length);
        if (class != CLASS_BAD_BYTE && length == back) return class;
    }
    return CLASS_BAD_BYTE;
}

/* No pre-token goes on over a change of class except a space before a word and an apostrophe before letters, and nothing
 * but white space depends on what follows it. So a cut is safe where the class changes, unless white space or an
 * apostrophe stands before it. Tested against the split of whole texts. */
size_t split_safe_cut(const char *text, size_t bytes, size_t limit) {
    const unsigned char *begin = (const unsigned char *)text, *end = begin + bytes;
    for (const unsigned char *p = begin + limit; p > begin; p--) {
        if ((*p & 0xc0) == 0x80) continue;
        CharClass before = class_before(begin, p, end);
        if (before == CLASS_SPACE || p[-1] == '\'') continue;
        size_t length;
        if (class_at(p, end, &length) != before || before == CLASS_BAD_BYTE) return (size_t)(p - begin);
    }
    return 0;
}
