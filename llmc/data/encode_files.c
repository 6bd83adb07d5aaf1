/* Text files to token shards. One thread reads and writes, the others encode; pieces go round in a ring of slots and are written in
 * the order they were read, so the result does not depend on threads or on the size of a piece. Memory: a few pieces per thread. */
#include "../base/io.h"
#include "../run/log.h"
#include "shards.h"
#include "tokenizer_internal.h"
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { TRAIN, VALIDATION, PARTS };

/* A part of a piece: the text up to `end` (from the end of the segment before). */
typedef struct { size_t end; bool first; int part; } Segment;

/* Text on its way to tokens; segments for TRAIN come before those for VALIDATION. */
typedef struct {
    char *text;
    size_t bytes, capacity;
    Segment *segments;
    size_t n_segments, segment_capacity;
    IdList ids;
    size_t n_train;           /* ids of TRAIN, at the front */
    uint64_t part_bytes[PARTS];
    uint64_t read;            /* progress: how far reading was */
    enum { FREE, FILLED, TAKEN, ENCODED } state;
} Slot;

/* Where validation begins: at a document, or at a byte of all files. */
typedef struct { uint64_t first_document, first_byte; } Split;

typedef struct {
    EncodeJob *job;
    int32_t separator;        /* id, or -1 */
    Split split;
    TextReader *reader;
    uint64_t documents;       /* begun so far */
    bool exhausted;
    ShardWriter *out[PARTS];
    Progress progress;
    Slot *slots;
    size_t n_slots, n_threads;
    pthread_mutex_t lock;
    pthread_cond_t filled, encoded;
    size_t next_taken;        /* sequence number of the slot a worker takes next */
    bool stop;
} Pipeline;

/* ---- workers ---- */

static void encode_slot(Encoder *encoder, Slot *s, int32_t separator) {
    size_t from = 0;
    s->ids.n = s->n_train = 0;
    for (size_t i = 0; i < s->n_segments; i++) {
        const Segment *g = &s->segments[i];
        if (g->first && separator >= 0) id_list_append(&s->ids, separator);
        encoder_encode(encoder, s->text + from, g->end - from, &s->ids);
        from = g->end;
        if (g->part == TRAIN) s->n_train = s->ids.n;
    }
}

static void *work(void *argument) {
    Pipeline *p = argument;
    Encoder *encoder = encoder_create(p->job->tokenizer, SIZE_MAX);
    pthread_mutex_lock(&p->lock);
    for (;;) {
        Slot *s = &p->slots[p->next_taken % p->n_slots];
        if (s->state != FILLED) {
            if (p->stop) break;
            pthread_cond_wait(&p->filled, &p->lock);
            continue;
        }
        s->state = TAKEN;
        p->next_taken++;
        pthread_mutex_unlock(&p->lock);
        encode_slot(encoder, s, p->separator);
        pthread_mutex_lock(&p->lock);
        s->state = ENCODED;
        pthread_cond_signal(&p->encoded);
    }
    pthread_mutex_unlock(&p->lock);
    encoder_destroy(encoder);
    return NULL;
}

/* ---- reading ---- */

static void add_segment(Slot *s, const char *text, size_t bytes, bool first, int part) {
    if (s->capacity - s->bytes < bytes) s->text = xrealloc(s->text, s->capacity = 2 * (s->bytes + bytes));
    memcpy(s->text + s->bytes, text, bytes);
    s->bytes += bytes;
    if (s->n_segments == s->segment_capacity)
        s->segments = xrealloc(s->segments, (s->segment_capacity = 2 * s->segment_capacity + 16) * sizeof *s->segments);
    s->segments[s->n_segments++] = (Segment){s->bytes, first, part};
    s->part_bytes[part] += bytes;
}

/* How much of a piece belongs to training. Validation begins at the last safe cut before first_byte. A piece begins at one, so none
 * is missed. */
static size_t train_bytes(const Pipeline *p, const TextPiece *piece) {
    if (p->documents > p->split.first_document) return 0;
    if (piece->offset + piece->bytes <= p->split.first_byte) return piece->bytes;
    if (piece->offset >= p->split.first_byte) return 0;
    return split_safe_cut(piece->text, piece->bytes, (size_t)(p->split.first_byte - piece->offset));
}

static void add_piece(Pipeline *p, Slot *s, const TextPiece *piece) {
    p->documents += piece->first;
    size_t train = train_bytes(p, piece);
    if (train) add_segment(s, piece->text, train, piece->first, TRAIN);
    if (train == piece->bytes) return;
    bool begins = p->split.first_byte != UINT64_MAX;  /* inside a document: what validation has of it counts as a document */
    add_segment(s, piece->text + train, piece->bytes - train, piece->first || begins, VALIDATION);
    if (begins) p->split = (Split){0, UINT64_MAX};
}

static bool fill_slot(Pipeline *p, Slot *s, Error *e) {
    s->bytes = s->n_segments = 0;
    memset(s->part_bytes, 0, sizeof s->part_bytes);
    while (s->bytes < p->job->piece_bytes) {
        TextPiece piece;
        int got = text_reader_next(p->reader, &piece, e);
        if (got < 0) return false;
        if (!got) {
            p->exhausted = true;
            break;
        }
        s->read = piece.offset + piece.bytes;
        add_piece(p, s, &piece);
    }
    return true;
}

/* ---- the ring ---- */

static bool write_slot(Pipeline *p, Slot *s, Error *e) {
    EncodeJob *job = p->job;
    job->train_tokens += s->n_train;
    job->validation_tokens += s->ids.n - s->n_train;
    job->train_bytes += s->part_bytes[TRAIN];
    job->validation_bytes += s->part_bytes[VALIDATION];
    progress_update(&p->progress, (double)s->read);
    if (!shard_append(p->out[TRAIN], s->ids.ids, s->n_train, e)) return false;
    return s->ids.n == s->n_train || shard_append(p->out[VALIDATION], s->ids.ids + s->n_train, s->ids.n - s->n_train, e);
}

/* Fills free slots in turn, and writes encoded ones in turn, until all is written. */
static bool read_and_write(Pipeline *p, Error *e) {
    size_t n_filled = 0, n_written = 0;
    while (!p->exhausted || n_written < n_filled) {
        if (!p->exhausted && n_filled - n_written < p->n_slots) {
            Slot *s = &p->slots[n_filled % p->n_slots];
            if (!fill_slot(p, s, e)) return false;
            pthread_mutex_lock(&p->lock);
            s->state = FILLED;
            pthread_cond_signal(&p->filled);
            pthread_mutex_unlock(&p->lock);
            n_filled++;
            continue;
        }
        Slot *s = &p->slots[n_written % p->n_slots]; /* NOLINT(clang-analyzer-core.DivideZero): n_slots is odd */
        pthread_mutex_lock(&p->lock);
        while (s->state != ENCODED) pthread_cond_wait(&p->encoded, &p->lock);
        s->state = FREE;
        pthread_mutex_unlock(&p->lock);
        if (!write_slot(p, s, e)) return false;
        n_written++;
    }
    return true;
}

static size_t cores(void) {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) ? 1 : (size_t)CPU_COUNT(&set);
}

static bool run(Pipeline *p, Error *e) {
    p->n_threads = p->job->threads > 0 ? (size_t)p->job->threads : cores();
    p->n_slots = 2 * p->n_threads + 1;
    p->slots = xcalloc(p->n_slots, sizeof *p->slots);
    pthread_t *threads = xcalloc(p->n_threads, sizeof *threads);
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->filled, NULL);
    pthread_cond_init(&p->encoded, NULL);
    size_t n = 0;
    while (n < p->n_threads && !pthread_create(&threads[n], NULL, work, p)) n++;
    bool ok = n ? read_and_write(p, e) : fail(e, EXIT_USAGE, "cannot start a thread; is a limit on processes set (ulimit -u)?");
    pthread_mutex_lock(&p->lock);
    p->stop = true;
    pthread_cond_broadcast(&p->filled);
    pthread_mutex_unlock(&p->lock);
    while (n > 0) pthread_join(threads[--n], NULL);
    for (size_t i = 0; i < p->n_slots; i++) {
        free(p->slots[i].text);
        free(p->slots[i].segments);
        free(p->slots[i].ids.ids);
    }
    free(p->slots);
    free(threads);
    pthread_mutex_destroy(&p->lock);
    pthread_cond_destroy(&p->filled);
    pthread_cond_destroy(&p->encoded);
    return ok;
}

/* ---- where validation begins ---- */

/* Regular files' bytes; 0 and *all_regular false when there are others (pipes). */
static uint64_t total_bytes(char **paths, size_t n, bool *all_regular, size_t *not_empty) {
    uint64_t total = 0;
    *all_regular = true;
    *not_empty = 0;
    for (size_t i = 0; i < n; i++) {
        struct stat s;
        if (!strcmp(paths[i], "-") || stat(paths[i], &s) || !S_ISREG(s.st_mode)) {
            *all_regular = false;
            continue;
        }
        total += (uint64_t)s.st_size;
        *not_empty += s.st_size > 0;
    }
    return *all_regular ? total : 0;
}

static bool count_documents(const EncodeJob *job, char **paths, size_t n_paths, uint64_t *documents, Error *e) {
    TextReader *reader = text_reader_create(paths, n_paths, job->document_marker, 1 << 20);
    TextPiece piece;
    int got;
    *documents = 0;
    while ((got = text_reader_next(reader, &piece, e)) > 0) *documents += piece.first;
    text_reader_destroy(reader);
    return got == 0;
}

static bool find_split(const EncodeJob *job, char **paths, size_t n_paths, Split *split, Error *e) {
    bool regular;
    size_t not_empty;
    uint64_t bytes = total_bytes(paths, n_paths, &regular, &not_empty), documents = not_empty;
    if (job->document_marker && *job->document_marker && !count_documents(job, paths, n_paths, &documents, e)) return false;
    uint64_t last = (uint64_t)floor((double)documents * job->validation_fraction + 1e-9);
    *split = last ? (Split){documents - last, UINT64_MAX} : (Split){UINT64_MAX, bytes - (uint64_t)floor((double)bytes * job->validation_fraction)};
    return true;
}

/* The split needs the size before the text is read, so what is no regular file is copied to one first. */
static bool copy_to_file(const char *from, const char *to, Error *e) {
    TextReader *reader = text_reader_create((char **)&from, 1, NULL, 1 << 20);
    FILE *f = fopen(to, "wb");
    bool ok = f || fail(e, EXIT_STORAGE, "%s: cannot create: %s", to, strerror(errno));
    TextPiece piece;
    int got = 0;
    while (ok && (got = text_reader_next(reader, &piece, e)) > 0)
        if (fwrite(piece.text, 1, piece.bytes, f) != piece.bytes) ok = fail(e, EXIT_STORAGE, "%s: cannot write: %s", to, strerror(errno));
    if (f && fclose(f) && ok) ok = fail(e, EXIT_STORAGE, "%s: cannot write: %s", to, strerror(errno));
    text_reader_destroy(reader);
    return ok && got == 0;
}

static bool encode(EncodeJob *job, char **paths, size_t n_paths, Error *e) {
    bool regular;
    size_t not_empty;
    Pipeline p = {.job = job, .separator = job->separator ? job->tokenizer->end_of_text : -1, .split = {UINT64_MAX, UINT64_MAX}};
    uint64_t bytes = total_bytes(paths, n_paths, &regular, &not_empty);
    if (job->validation_path && !find_split(job, paths, n_paths, &p.split, e)) return false;
    p.reader = text_reader_create(paths, n_paths, job->document_marker, job->piece_bytes);
    progress_begin(&p.progress, "tokenizing", "bytes", (double)bytes, job->quiet);
    p.out[TRAIN] = shard_create(job->out_path, job->tokenizer->V, e);
    if (job->validation_path && p.out[TRAIN]) p.out[VALIDATION] = shard_create(job->validation_path, job->tokenizer->V, e);
    bool ok = p.out[TRAIN] && (!job->validation_path || p.out[VALIDATION]) && run(&p, e);
    text_reader_destroy(p.reader);
    if (ok) progress_end(&p.progress, (double)(job->train_bytes + job->validation_bytes));
    if (ok && job->train_tokens == 0) ok = fail(e, EXIT_DATA, "%s: no text%s", paths[0], n_paths > 1 ? " in it or in the files after it" : "");
    if (ok && job->validation_path && job->validation_tokens == 0)
        ok = fail(e, EXIT_DATA, "%s: a fraction of %g of %llu bytes leaves no text for validation", paths[0], job->validation_fraction, (unsigned long long)bytes);
    for (int part = 0; part < PARTS; part++) {
        if (ok && p.out[part]) ok = shard_commit(p.out[part], e);
        else if (p.out[part]) shard_abandon(p.out[part]);
    }
    return ok;
}

bool tokenizer_encode_files(EncodeJob *job, char **paths, size_t n_paths, Error *e) {
    job->train_tokens = job->validation_tokens = job->train_bytes = job->validation_bytes = 0;
    if (!job->piece_bytes) job->piece_bytes = 1 << 20;
    if (job->separator && job->tokenizer->end_of_text < 0)
        return fail(e, EXIT_USAGE, "the tokenizer has no <|endoftext|> to separate documents with; encode without a separator (--no-separator)");
    if (!n_paths) return fail(e, EXIT_USAGE, "no text file given");
    if (!job->validation_path) return encode(job, paths, n_paths, e);
    if (!(job->validation_fraction > 0 && job->validation_fraction < 1))
        return fail(e, EXIT_USAGE, "validation fraction %g; expected more than 0 and less than 1", job->validation_fraction);
    if (!strcmp(job->validation_path, job->out_path)) return fail(e, EXIT_USAGE, "%s is to hold both training and validation text", job->out_path);

    char **files = xcalloc(n_paths, sizeof *files);
    bool ok = true, regular;
    size_t not_empty;
    for (size_t i = 0; ok && i < n_paths; i++) {
        total_bytes(&paths[i], 1, &regular, &not_empty);
        bool copied = !regular && (!strcmp(paths[i], "-") || path_exists(paths[i])) && !path_is_dir(paths[i]);
        files[i] = copied ? xasprintf("%s.input%zu.tmp", job->out_path, i) : xstrdup(paths[i]);
        if (copied) ok = copy_to_file(paths[i], files[i], e);
    }
    ok = ok && encode(job, files, n_paths, e);
    for (size_t i = 0; i < n_paths; i++) {
        if (files[i] && strcmp(files[i], paths[i])) remove(files[i]);
        free(files[i]);
    }
    free(files);
    return ok;
}
