/* What the parts of the tokenizer share: its tables, the splitter, and the encoder with its cache. Private to llmc/data. */
#ifndef LLMC_DATA_TOKENIZER_INTERNAL_H
#define LLMC_DATA_TOKENIZER_INTERNAL_H
#include "tokenizer.h"

/* ---- Characters and pre-tokens (tokenizer_split.c) ---- */

typedef enum { CLASS_OTHER, CLASS_LETTER, CLASS_NUMBER, CLASS_SPACE, CLASS_BAD_BYTE } CharClass;

/* Ranges of code points that are \p{L} or \p{N} (tokenizer_classes.c, recorded from the peers by dev/reference/record_tokenizer.py).
 * Each entry is first << 8 | length - 1; a longer range takes several entries. */
extern const uint32_t unicode_letters[], unicode_numbers[], unicode_spaces[];
extern const size_t n_unicode_letters, n_unicode_numbers, n_unicode_spaces;

void split_init(void);  /* builds the table of classes; any number of times, from any thread; before any call below */
CharClass unicode_class(uint32_t code_point);
/* Length of the character at p < end and its code point; 0: the byte at p does not start a valid UTF-8 sequence. */
size_t utf8_decode(const unsigned char *p, const unsigned char *end, uint32_t *code_point);
size_t utf8_encode(uint32_t code_point, char out[4]);
/* Length of the pre-token that starts at p < end. */
size_t split_next(const unsigned char *p, const unsigned char *end);
/* Largest c in (0, limit] such that text[0, c) and text[c, bytes) split on their own as they do together; 0: none. limit < bytes. */
size_t split_safe_cut(const char *text, size_t bytes, size_t limit);

/* ---- GPT-2's printable alphabet (tokenizer.c) ---- */

uint32_t byte_to_char(unsigned char byte);
int char_to_byte(uint32_t code_point);  /* -1: not in the alphabet */

/* ---- Tables of a tokenizer ---- */

enum { NO_RANK = 0x7fffffff };
typedef struct { int32_t left, right, id; } Merge;                  /* in order of rank */
typedef struct { int32_t left, right, rank, id; } PairSlot;         /* empty: rank NO_RANK */

struct Tokenizer {
    size_t V;
    char *bytes;               /* all tokens, one after the other */
    size_t *offset;            /* (V + 1): token i is bytes[offset[i], offset[i + 1]) */
    Merge *merges;
    size_t n_merges;
    int32_t end_of_text;
    /* derived by tokenizer_index */
    int32_t byte_id[256];
    PairSlot *pairs;           /* open addressing, 2^pair_bits slots */
    unsigned pair_bits;
    int32_t *words;            /* open addressing by the token's bytes: ids of tokens that encode to themselves, or -1 */
    unsigned word_bits;
    char fingerprint[33];
};

/* Fills what is derived from tokens and merges. False: a byte has no token, or a merge stands twice (EXIT_DATA). */
bool tokenizer_index(Tokenizer *t, Error *e);

/* ---- Encoding with a word cache that lives as long as its owner wants (one per thread) ---- */

typedef struct { int32_t *ids; size_t n, capacity; } IdList;
typedef struct Encoder Encoder;
Encoder *encoder_create(const Tokenizer *t, size_t expected_bytes);
void encoder_destroy(Encoder *encoder);
void encoder_encode(Encoder *encoder, const char *text, size_t bytes, IdList *out);
void id_list_append(IdList *list, int32_t id);
/* Ids of one pre-token by merging alone, no cache: ids (n bytes in, result out in place); returns the number left. */
size_t bpe_merge(const Tokenizer *t, int32_t *ids, size_t n);

/* ---- Text files as documents, in pieces (tokenizer_text.c) ---- */

typedef struct TextReader TextReader;
typedef struct {
    const char *text;     /* valid until the next call */
    size_t bytes;         /* at least 1 */
    bool first;           /* of its document; a document is a file, or with a marker a part of a file; empty ones are left out */
    uint64_t offset;      /* in all files, one after the other, markers counted */
} TextPiece;
/* paths: "-" is standard input. marker: NULL or "": none; it is left out, with its line where it stands on one of its own.
 * piece_bytes: about how much a piece holds, at least 1. */
TextReader *text_reader_create(char **paths, size_t n_paths, const char *marker, size_t piece_bytes);
int text_reader_next(TextReader *r, TextPiece *piece, Error *e);  /* 1: a piece; 0: the end; -1: error (EXIT_DATA) */
void text_reader_destroy(TextReader *r);

#endif
