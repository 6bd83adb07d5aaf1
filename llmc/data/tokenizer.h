/* Byte-level BPE as in GPT-2 (Radford et al. 2019; Sennrich et al. 2016): split by GPT-2's pattern, bytes to printable code points,
 * merges by rank. Thread-safe after loading. */
#ifndef LLMC_DATA_TOKENIZER_H
#define LLMC_DATA_TOKENIZER_H
#include "../base/error.h"
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

typedef struct Tokenizer Tokenizer;

/* dir holds vocab.json + merges.txt, or tokenizer.json of that kind; or path names a tokenizer.json itself. EXIT_DATA. */
Tokenizer *tokenizer_load(const char *path, Error *e);
bool tokenizer_save(const Tokenizer *t, const char *dir, Error *e);    /* vocab.json, merges.txt, tokenizer_config.json */
void tokenizer_free(Tokenizer *t);
size_t tokenizer_vocab_size(const Tokenizer *t);
int32_t tokenizer_end_of_text(const Tokenizer *t);                     /* id of <|endoftext|>, -1 when there is none */
const char *tokenizer_fingerprint(const Tokenizer *t);                 /* 32 hex digits: XXH3-128 of all tokens and merges */

/* Appends the ids of text to *ids (grown with realloc; *n used, *capacity allocated). Any bytes are accepted: where
 * text is not valid UTF-8, the bad bytes are encoded as bytes. "<|endoftext|>" in text is ordinary text. */
void tokenizer_encode(const Tokenizer *t, const char *text, size_t bytes, int32_t **ids, size_t *n, size_t *capacity);
/* The bytes of one token; length in *bytes. Unknown id: NULL. Not NUL-terminated. */
const char *tokenizer_token(const Tokenizer *t, int32_t id, size_t *bytes);
/* Decoded bytes of ids, NUL-terminated; caller frees. */
char *tokenizer_decode(const Tokenizer *t, const int32_t *ids, size_t n, size_t *bytes);

/* Training: feed texts (each one is split on its own), then finish. Vocabulary = 256 bytes + merges + <|endoftext|> (last id).
 * Pairs by count; ties as Hugging Face tokenizers breaks them. */
typedef struct BpeTrainer BpeTrainer;
BpeTrainer *bpe_trainer_create(size_t vocab_size, Error *e);           /* at least 257 */
void bpe_trainer_feed(BpeTrainer *trainer, const char *text, size_t bytes);
/* Feeds whole files ("-": stdin) of any size, in pieces cut where no pre-token can span; document_marker (NULL: none) is left out of the text. */
bool bpe_trainer_feed_files(BpeTrainer *trainer, char **paths, size_t n_paths, const char *document_marker, Error *e);
void bpe_trainer_free(BpeTrainer *trainer);                            /* without finishing; NULL is fine */
/* progress may be NULL: called with merges done and wanted. Fewer merges than asked for when no pair occurs twice. Frees trainer. */
Tokenizer *bpe_trainer_finish(BpeTrainer *trainer, void (*progress)(size_t done, size_t of), Error *e);

/* Encodes text files ("-": stdin) to one token shard: in pieces at safe split points, on all cores, with progress on stderr.
 * separator: <|endoftext|> before each document: a file, or with document_marker each part of a file between markers; empty ones are left out.
 * validation_path, fraction: the last fraction of the documents goes there instead; where that is less than one document, the last
 * fraction of the text, cut at a safe point. NULL: none. Errors: EXIT_DATA, EXIT_USAGE (fraction; no <|endoftext|> to separate with), EXIT_STORAGE. */
typedef struct {
    const Tokenizer *tokenizer;
    const char *out_path;
    const char *validation_path;
    double validation_fraction;
    bool separator;
    const char *document_marker;  /* e.g. "<|endoftext|>", anywhere in the text; left out, with its line where it stands alone on one; NULL, "": none */
    bool quiet;
    int threads;                  /* 0: one per core. The result does not depend on it, */
    size_t piece_bytes;           /* nor on this (about how much text a thread takes at a time); 0: 1 MiB */
    uint64_t train_tokens, validation_tokens, train_bytes, validation_bytes; /* results */
} EncodeJob;
bool tokenizer_encode_files(EncodeJob *job, char **paths, size_t n_paths, Error *e);

#ifdef __cplusplus
}
#endif
#endif
