/* Token shards: finding them, checking their headers, reading windows of tokens, writing new ones.
 * At most a quarter of the allowed file descriptors stay open per dataset; shards beyond that are opened for each read,
 * so that any number of shards works. Knows nothing of the order of samples (loader.c) or of text (tokenizer.c). */
#include "shards.h"
#include "../base/io.h"
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

enum { HEADER_BYTES = 1024, HEAD_BYTES = 4096, END_BYTES = 65536, CHUNK_TOKENS = 4096, TEXT_MIN = 32 };
_Static_assert(sizeof(off_t) == 8, "file offsets need 64 bits");

typedef struct {
    int32_t magic, version;
    unsigned token_bytes;
} Format;
static const Format formats[] = {{20240520, 1, 2}, {20240801, 7, 4}};
enum { N_FORMATS = sizeof formats / sizeof *formats };

/* What people give by mistake, told by its first bytes. None can begin a shard of GPT-2's ids without a header, except by a
 * coincidence of 32 bits or more. */
static const struct {
    const char *bytes;
    size_t n;
    const char *what, *hint;
} foreign[] = {
    {"\x8a\xd8\x34\x01", 4, "a multiple-choice evaluation file (20240522)", "give a token shard (20240520 or 20240801)"},
    {"\xc6\xd7\x34\x01", 4, "model weights (20240326)", "weights go to --init-from"},
    {"\xc8\xd7\x34\x01", 4, "a tokenizer file (20240328)", "give a token shard (20240520 or 20240801)"},
    {"\x01\x34\xd8\x88\0\0\0\1", 8, "a big-endian 20240520 header", "write its numbers in little-endian byte order"},
    {"\x01\x34\xd9\xa1\0\0\0\7", 8, "a big-endian 20240801 header", "write its numbers in little-endian byte order"},
    {"\x93NUMPY", 6, "a NumPy .npy file", "write the raw ids instead: array.astype('<u2').tofile(...)"},
    {"PAR1\x15", 5, "a Parquet file", "extract its text and encode it with `tokenize encode`"},
    {"\x1f\x8b\x08\x08", 4, "a gzip file", "unpack it first"},
};

static uint32_t le32(const uint8_t *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}
static uint32_t le16(const uint8_t *p) { return (uint32_t)p[0] | (uint32_t)p[1] << 8; }

static void put32(uint8_t *p, uint32_t v) {
    for (int i = 0; i < 4; i++) p[i] = (uint8_t)(v >> 8 * i);
}

/* ---- reading bytes ------------------------------------------------------------------------------------------------ */

/* All of [offset, offset + bytes), or a message that says where the file ended. */
static bool read_fd(int fd, const char *path, uint64_t offset, void *to, size_t bytes, Error *e) {
    for (size_t done = 0; done < bytes;) {
        ssize_t n = pread(fd, (char *)to + done, bytes - done, (off_t)(offset + done));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return fail(e, EXIT_DATA, "%s: byte %" PRIu64 ": cannot read: %s", path, offset + done, strerror(errno));
        if (n == 0)
            return fail(e, EXIT_DATA,
                        "%s: byte %" PRIu64 ": found the end of the file, expected tokens up to byte %" PRIu64
                        "; the file became shorter after it was opened: restore it and start again",
                        path, offset + done, offset + bytes);
        done += (size_t)n;
    }
    return true;
}

static int open_shard(const char *path, Error *e) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) fail(e, EXIT_DATA, "%s: cannot open: %s", path, strerror(errno));
    return fd;
}

static bool read_shard(const Shard *s, uint64_t offset, void *to, size_t bytes, Error *e) {
    if (s->fd >= 0) return read_fd(s->fd, s->path, offset, to, bytes, e);
    int fd = open_shard(s->path, e);
    if (fd < 0) return false;
    bool ok = read_fd(fd, s->path, offset, to, bytes, e);
    close(fd);
    return ok;
}

/* ---- what kind of file is it -------------------------------------------------------------------------------------- */

/* Bytes of the UTF-8 character at p, 0 when it is not one or is a control character that text does not hold. A character
 * cut off by the end of the buffer counts as whole. */
static size_t text_character(const uint8_t *p, size_t n) {
    if (p[0] < 0x80) return p[0] >= 0x20 ? p[0] != 0x7f : (p[0] >= '\t' && p[0] <= '\r');
    size_t length = p[0] >= 0xc2 && p[0] < 0xe0 ? 2 : p[0] >= 0xe0 && p[0] < 0xf0 ? 3 : p[0] >= 0xf0 && p[0] < 0xf5 ? 4 : 0;
    for (size_t i = 1; i < length && i < n; i++)
        if ((p[i] & 0xc0) != 0x80) return 0;
    return length;
}

/* 32 bytes of token ids that happen to be text are less likely than one in 10^9, 4,096 impossible. */
static bool looks_like_text(const uint8_t *p, size_t n) {
    if (n < TEXT_MIN) return false;
    for (size_t i = 0, length; i < n; i += length)
        if (!(length = text_character(p + i, n - i))) return false;
    return true;
}

static const Format *format_of(const uint8_t *head, size_t n) {
    for (size_t i = 0; n >= 4 && i < N_FORMATS; i++)
        if ((int32_t)le32(head) == formats[i].magic) return &formats[i];
    return NULL;
}

static bool refuse_foreign(const char *path, const uint8_t *head, size_t n, Error *e) {
    for (size_t i = 0; i < sizeof foreign / sizeof *foreign; i++)
        if (n >= foreign[i].n && !memcmp(head, foreign[i].bytes, foreign[i].n))
            return fail(e, EXIT_DATA, "%s: byte 0: found %s, expected token ids; %s", path, foreign[i].what, foreign[i].hint);
    if (looks_like_text(head, n))
        return fail(e, EXIT_DATA,
                    "%s: byte 0: found text, expected token ids; encode it with `tokenize encode`, or give train_gpt2 the "
                    "text file itself under a name that does not end in .bin", path);
    return true;
}

static bool parse_header(Shard *s, const Format *f, uint64_t size, const uint8_t *head, Error *e) {
    if (size < HEADER_BYTES)
        return fail(e, EXIT_DATA,
                    "%s: byte %" PRIu64 ": found the end of the file, expected a header of %d bytes (it begins with %d); "
                    "the file was cut short: copy or make it again", s->path, size, HEADER_BYTES, f->magic);
    int32_t version = (int32_t)le32(head + 4), count = (int32_t)le32(head + 8);
    if (version != f->version)
        return fail(e, EXIT_DATA,
                    "%s: byte 4: found version %d, expected %d for a %d shard (uint%u); make the shard again with "
                    "`tokenize encode`", s->path, version, f->version, f->magic, 8 * f->token_bytes);
    uint64_t body = size - HEADER_BYTES, n = body / f->token_bytes;
    if (body % f->token_bytes)
        return fail(e, EXIT_DATA,
                    "%s: byte %" PRIu64 ": found part of a token at the end of %" PRIu64 " bytes, expected %u bytes a token "
                    "after a header of %d; the file was cut short: copy or make it again",
                    s->path, HEADER_BYTES + n * f->token_bytes, size, f->token_bytes, HEADER_BYTES);
    /* A count that does not fit in the header's int32 was wrapped or saturated by whoever wrote it. */
    bool overflowed = n > INT32_MAX && ((uint32_t)count == (uint32_t)n || count == INT32_MAX);
    if (count != (int64_t)n && !overflowed)
        return fail(e, EXIT_DATA,
                    "%s: byte 8: found a count of %d tokens, expected %" PRIu64 " by the file's size of %" PRIu64
                    " bytes; the file was cut short or is damaged: copy or make it again", s->path, count, n, size);
    s->token_bytes = f->token_bytes;
    s->header_bytes = HEADER_BYTES;
    s->n_tokens = n;
    return true;
}

static bool parse_head(Shard *s, uint64_t size, const uint8_t *head, size_t n, Error *e) {
    const Format *f = format_of(head, n);
    if (f) return parse_header(s, f, size, head, e);
    if (size == 0)
        return fail(e, EXIT_DATA, "%s: byte 0: found an empty file, expected token ids; make the shard again", s->path);
    if (!refuse_foreign(s->path, head, n, e)) return false;
    if (size % 2)
        return fail(e, EXIT_DATA,
                    "%s: byte %" PRIu64 ": found half a token at the end of %" PRIu64 " bytes, expected uint16 ids (no header "
                    "20240520 or 20240801 at byte 0); the file was cut short or is not a token shard", s->path, size - 1, size);
    s->token_bytes = 2;
    s->header_bytes = 0;
    s->n_tokens = size / 2;
    return true;
}

/* ---- the dataset -------------------------------------------------------------------------------------------------- */

static void hash_number(XXH3_state_t *hash, uint64_t v) {
    uint8_t bytes[8];
    for (int i = 0; i < 8; i++) bytes[i] = (uint8_t)(v >> 8 * i);
    XXH3_128bits_update(hash, bytes, 8);
}

/* Name, size, both ends; the header lies in the first one. */
static bool hash_shard(XXH3_state_t *hash, const Shard *s, int fd, uint64_t size, Error *e) {
    const char *slash = strrchr(s->path, '/'), *name = slash ? slash + 1 : s->path;
    XXH3_128bits_update(hash, name, strlen(name) + 1);
    hash_number(hash, size);
    size_t n = size < END_BYTES ? (size_t)size : END_BYTES;
    char *ends = xmalloc(2 * END_BYTES);
    bool ok = read_fd(fd, s->path, 0, ends, n, e) && read_fd(fd, s->path, size - n, ends + n, n, e);
    if (ok) XXH3_128bits_update(hash, ends, 2 * n);
    free(ends);
    return ok;
}

static bool shard_open(Shard *s, size_t T, XXH3_state_t *hash, Error *e) {
    struct stat st;
    if (stat(s->path, &st)) return fail(e, EXIT_DATA, "%s: %s", s->path, strerror(errno));
    if (S_ISDIR(st.st_mode))
        return fail(e, EXIT_DATA, "%s: found a directory, expected a token shard; give its files as '%s%s*.bin', in quotes",
                    s->path, s->path, s->path[strlen(s->path) - 1] == '/' ? "" : "/");
    if (!S_ISREG(st.st_mode))
        return fail(e, EXIT_DATA, "%s: found a device or pipe, expected a regular file: shards are read at any place", s->path);
    if ((s->fd = open_shard(s->path, e)) < 0) return false;
    uint64_t size = (uint64_t)st.st_size;
    uint8_t head[HEAD_BYTES];
    size_t n = size < HEAD_BYTES ? (size_t)size : HEAD_BYTES;
    if (!read_fd(s->fd, s->path, 0, head, n, e) || !parse_head(s, size, head, n, e) ||
        !hash_shard(hash, s, s->fd, size, e))
        return false;
    s->n_windows = s->n_tokens && T ? (s->n_tokens - 1) / T : 0;
    return true;
}

static int compare_paths(const void *a, const void *b) { return strcmp(((const Shard *)a)->path, ((const Shard *)b)->path); }

static bool find_shards(Dataset *d, const char *pattern, Error *e) {
    struct stat st;
    glob_t found = {0};
    if (lstat(pattern, &st) == 0) { /* a name that exists is that file, whatever characters it has */
        d->shards = xcalloc(1, sizeof *d->shards);
        d->shards[d->n_shards++] = (Shard){.path = xstrdup(pattern), .fd = -1};
        return true;
    }
    if (!strpbrk(pattern, "*?[~")) return fail(e, EXIT_DATA, "%s: %s; give a token shard or a glob in quotes", pattern, strerror(errno));
    int status = glob(pattern, GLOB_ERR | GLOB_TILDE | GLOB_NOSORT, NULL, &found);
    if (status == GLOB_NOMATCH)
        return fail(e, EXIT_DATA, "%s: no file matches; give a token shard or a glob in quotes, such as 'shards/train_*.bin'", pattern);
    if (status) {
        globfree(&found);
        return fail(e, EXIT_DATA, "%s: cannot list the files: %s", pattern, status == GLOB_NOSPACE ? "out of memory" : strerror(errno));
    }
    d->shards = xcalloc(found.gl_pathc, sizeof *d->shards);
    for (size_t i = 0; i < found.gl_pathc; i++)
        d->shards[d->n_shards++] = (Shard){.path = xstrdup(found.gl_pathv[i]), .fd = -1};
    globfree(&found);
    qsort(d->shards, d->n_shards, sizeof *d->shards, compare_paths); /* by bytes: the same order in every locale */
    return true;
}

/* Shards that keep their descriptor: a quarter of the limit, so that two datasets and everything else fit. */
static size_t descriptors_to_keep(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit)) return 16;
    return limit.rlim_cur == RLIM_INFINITY ? SIZE_MAX : (size_t)limit.rlim_cur / 4;
}

static bool open_all(Dataset *d, XXH3_state_t *hash, Error *e) {
    size_t keep = descriptors_to_keep();
    XXH3_128bits_reset(hash);
    for (size_t i = 0; i < d->n_shards; i++) {
        Shard *s = &d->shards[i];
        if (!shard_open(s, d->T, hash, e)) return false;
        if (i >= keep) {
            close(s->fd);
            s->fd = -1;
        }
        s->first_window = d->n_windows;
        d->n_windows += s->n_windows;
        d->n_tokens += s->n_tokens;
    }
    XXH128_canonical_t c;
    XXH128_canonicalFromHash(&c, XXH3_128bits_digest(hash));
    for (int i = 0; i < 16; i++) sprintf(d->fingerprint + 2 * i, "%02x", c.digest[i]);
    return true;
}

bool dataset_open(Dataset *dataset, const char *pattern, size_t T, Error *e) {
    *dataset = (Dataset){.T = T};
    XXH3_state_t *hash = XXH3_createState();
    CHECK(hash, "out of host memory");
    bool ok = find_shards(dataset, pattern, e) && open_all(dataset, hash, e);
    XXH3_freeState(hash);
    if (ok && T && !dataset->n_windows)
        ok = fail(e, EXIT_DATA,
                  "%s: found %zu file(s) with %" PRIu64 " tokens, the longest too short for one sample: expected at least %zu "
                  "tokens in a file (sequence length %zu and one more); give more text or a smaller --seq-len",
                  pattern, dataset->n_shards, dataset->n_tokens, T + 1, T);
    if (!ok) dataset_close(dataset);
    return ok;
}

void dataset_close(Dataset *dataset) {
    for (size_t i = 0; i < dataset->n_shards; i++) {
        if (dataset->shards[i].fd >= 0) close(dataset->shards[i].fd);
        free(dataset->shards[i].path);
    }
    free(dataset->shards);
    *dataset = (Dataset){0};
}

/* The last shard that begins at or before w; empty ones share their first window with the next. */
static const Shard *shard_of(const Dataset *d, uint64_t w) {
    size_t low = 0, high = d->n_shards;
    while (high - low > 1) {
        size_t middle = low + (high - low) / 2;
        if (d->shards[middle].first_window <= w) low = middle;
        else high = middle;
    }
    return &d->shards[low];
}

bool dataset_window(const Dataset *dataset, uint64_t w, size_t V, int32_t *inputs, int32_t *targets, Error *e) {
    CHECK(w < dataset->n_windows, "window %" PRIu64 " of %" PRIu64, w, dataset->n_windows);
    const Shard *s = shard_of(dataset, w);
    uint8_t bytes[CHUNK_TOKENS * 4];
    size_t T = dataset->T;
    uint64_t offset = s->header_bytes + (w - s->first_window) * T * s->token_bytes;
    for (size_t t = 0, n; t <= T; t += n, offset += n * s->token_bytes) {
        n = T + 1 - t < CHUNK_TOKENS ? T + 1 - t : CHUNK_TOKENS;
        if (!read_shard(s, offset, bytes, n * s->token_bytes, e)) return false;
        for (size_t i = 0; i < n; i++) {
            uint32_t id = s->token_bytes == 2 ? le16(bytes + 2 * i) : le32(bytes + 4 * i);
            if (id >= V)
                return fail(e, EXIT_DATA,
                            "%s: byte %" PRIu64 ": found token id %" PRIu32 ", expected ids below the vocabulary size %zu; "
                            "the shard was made with another tokenizer, is damaged, or has another format",
                            s->path, offset + i * s->token_bytes, id, V);
            if (t + i < T) inputs[t + i] = (int32_t)id;
            if (t + i > 0) targets[t + i - 1] = (int32_t)id;
        }
    }
    return true;
}

bool shard_tokens(const Shard *shard, uint64_t from, size_t n, int32_t *tokens, Error *e) {
    CHECK(from <= shard->n_tokens && n <= shard->n_tokens - from, "tokens %" PRIu64 " + %zu of %" PRIu64, from, n, shard->n_tokens);
    uint8_t *raw = xmalloc(n * shard->token_bytes);
    bool ok = read_shard(shard, shard->header_bytes + from * shard->token_bytes, raw, n * shard->token_bytes, e);
    for (size_t i = 0; ok && i < n; i++) tokens[i] = (int32_t)(shard->token_bytes == 2 ? le16(raw + 2 * i) : le32(raw + 4 * i));
    free(raw);
    return ok;
}

bool shard_is_tokens(const char *path) {
    size_t n = strlen(path);
    if (n >= 4 && !strcmp(path + n - 4, ".bin")) return true;
    Dataset d = {0};
    uint8_t head[4];
    Error ignored;
    int fd = find_shards(&d, path, &ignored) ? open(d.shards[0].path, O_RDONLY | O_CLOEXEC | O_NONBLOCK) : -1;
    bool found = fd >= 0 && pread(fd, head, 4, 0) == 4 && format_of(head, 4);
    if (fd >= 0) close(fd);
    dataset_close(&d);
    return found;
}

/* ---- writing ------------------------------------------------------------------------------------------------------ */

/* The file grows as PATH.tmp, whose header says 0 tokens until the commit: it never looks complete. */
struct ShardWriter {
    char *path, *temporary;
    int fd;
    const Format *format;
    size_t V, used;           /* bytes in the buffer */
    uint64_t n_tokens;
    uint8_t buffer[1 << 20];
};

static bool write_at(ShardWriter *w, const void *data, size_t bytes, uint64_t offset, Error *e) {
    for (size_t done = 0; done < bytes;) {
        ssize_t n = pwrite(w->fd, (const char *)data + done, bytes - done, (off_t)(offset + done));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0)
            return fail(e, EXIT_STORAGE, "%s: byte %" PRIu64 ": cannot write: %s", w->temporary, offset + done, strerror(errno));
        done += (size_t)n;
    }
    return true;
}

static bool write_header(ShardWriter *w, uint64_t n_tokens, Error *e) {
    uint8_t header[HEADER_BYTES] = {0};
    put32(header, (uint32_t)w->format->magic);
    put32(header + 4, (uint32_t)w->format->version);
    put32(header + 8, (uint32_t)n_tokens); /* wraps beyond 32 bits; readers then go by the size */
    return write_at(w, header, sizeof header, 0, e);
}

static bool flush(ShardWriter *w, Error *e) {
    uint64_t end = HEADER_BYTES + w->n_tokens * w->format->token_bytes;
    bool ok = write_at(w, w->buffer, w->used, end - w->used, e);
    w->used = 0;
    return ok;
}

ShardWriter *shard_create(const char *path, size_t V, Error *e) {
    struct stat st;
    if (stat(path, &st) == 0 && !S_ISREG(st.st_mode)) {  /* the finished shard takes the place of what stands there */
        fail(e, EXIT_STORAGE, "%s: found a directory or device, expected the name of a file to write; choose another name", path);
        return NULL;
    }
    ShardWriter *w = xcalloc(1, sizeof *w);
    w->path = xstrdup(path);
    w->temporary = xasprintf("%s.tmp", path);
    w->format = &formats[V > 65536];
    w->V = V;
    w->fd = open(w->temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (w->fd < 0) fail(e, EXIT_STORAGE, "%s: cannot create: %s", w->temporary, strerror(errno));
    if (w->fd >= 0 && write_header(w, 0, e)) return w;
    shard_abandon(w);
    return NULL;
}

bool shard_append(ShardWriter *w, const int32_t *tokens, size_t n, Error *e) {
    for (size_t i = 0; i < n; i++) {
        if (tokens[i] < 0 || (size_t)tokens[i] >= w->V)
            return fail(e, EXIT_DATA, "%s: token %" PRIu64 ": found id %d, expected 0 to %zu", w->path, w->n_tokens, tokens[i], w->V - 1);
        if (w->used + 4 > sizeof w->buffer && !flush(w, e)) return false;
        uint8_t bytes[4];
        put32(bytes, (uint32_t)tokens[i]);
        memcpy(w->buffer + w->used, bytes, w->format->token_bytes);
        w->used += w->format->token_bytes;
        w->n_tokens++;
    }
    return true;
}

bool shard_commit(ShardWriter *w, Error *e) {
    bool ok = flush(w, e) && write_header(w, w->n_tokens, e);
    if (ok && fsync(w->fd)) ok = fail(e, EXIT_STORAGE, "%s: cannot write to disk: %s", w->temporary, strerror(errno));
    int closed = close(w->fd);
    w->fd = -1;
    if (ok && closed) ok = fail(e, EXIT_STORAGE, "%s: cannot close: %s", w->temporary, strerror(errno));
    ok = ok && path_rename(w->temporary, w->path, e);
    if (!ok) {
        shard_abandon(w);
        return false;
    }
    free(w->path);
    free(w->temporary);
    free(w);
    return true;
}

void shard_abandon(ShardWriter *w) {
    if (w->fd >= 0) close(w->fd);
    unlink(w->temporary);
    free(w->path);
    free(w->temporary);
    free(w);
}
