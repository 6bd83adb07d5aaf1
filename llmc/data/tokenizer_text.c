/* Reads text files of any size as documents, in pieces that can be split into pre-tokens on their own: a cut never changes an id.
 * Holds one piece in memory (more only where a text has no safe cut for that long). Knows nothing of tokens. */
#include "tokenizer_internal.h"
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct TextReader {
    char **paths;
    size_t n_paths, next;     /* next file to open */
    int fd;                   /* -1: none open */
    bool eof;
    const char *marker;       /* NULL: none */
    size_t marker_bytes;
    size_t piece_bytes, want; /* bytes to have before cutting */
    char *buffer;             /* unread text: [start, end) */
    size_t start, end, capacity;
    size_t searched;          /* of the unread text: no marker begins there */
    bool first;               /* the next piece is the first of its document */
    bool line_start;          /* the unread text begins a line */
    uint64_t offset;          /* of the unread text in all files, one after the other */
};

TextReader *text_reader_create(char **paths, size_t n_paths, const char *marker, size_t piece_bytes) {
    TextReader *r = xcalloc(1, sizeof *r);
    r->paths = paths, r->n_paths = n_paths, r->fd = -1;
    r->marker = marker && *marker ? marker : NULL;
    r->marker_bytes = r->marker ? strlen(marker) : 0;
    r->piece_bytes = piece_bytes + r->marker_bytes + 8;  /* room for an unfinished character or marker at the end */
    return r;
}

static void close_file(TextReader *r) {
    if (r->fd > STDIN_FILENO) close(r->fd);
    r->fd = -1;
}

void text_reader_destroy(TextReader *r) {
    if (!r) return;
    close_file(r);
    free(r->buffer);
    free(r);
}

static bool open_next(TextReader *r, Error *e) {
    const char *path = r->paths[r->next];
    r->fd = strcmp(path, "-") ? open(path, O_RDONLY | O_CLOEXEC) : STDIN_FILENO;
    if (r->fd < 0) return fail(e, EXIT_DATA, "%s: cannot open: %s; expected a text file, or - for standard input", path, strerror(errno));
    r->next++;
    r->eof = false;
    r->start = r->end = r->searched = 0;
    r->want = r->piece_bytes;
    r->first = r->line_start = true;
    return true;
}

/* Reads until `want` bytes are there or the file ends. */
static bool refill(TextReader *r, Error *e) {
    if (r->start) memmove(r->buffer, r->buffer + r->start, r->end - r->start);
    r->end -= r->start;
    r->start = 0;
    if (r->capacity < 2 * r->want) r->buffer = xrealloc(r->buffer, r->capacity = 2 * r->want);
    while (r->end < r->want && !r->eof) {
        ssize_t n = read(r->fd, r->buffer + r->end, r->capacity - r->end);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return fail(e, EXIT_DATA, "%s: cannot read: %s; expected a text file", r->paths[r->next - 1], strerror(errno));
        r->eof = n == 0;
        r->end += (size_t)n;
    }
    return true;
}

static void take(TextReader *r, size_t bytes) {
    if (bytes) r->line_start = r->buffer[r->start + bytes - 1] == '\n';
    r->start += bytes;
    r->offset += bytes;
    r->searched -= bytes < r->searched ? bytes : r->searched;
    r->want = r->piece_bytes;
}

static TextPiece give(TextReader *r, size_t bytes, bool ends_document) {
    TextPiece piece = {r->buffer + r->start, bytes, r->first, r->offset};
    take(r, bytes);
    r->first = ends_document;
    return piece;
}

/* Bytes of the marker that begins at `at` of the unread text, and of its line's end where it stands on a line of its own. */
static size_t marker_line(const TextReader *r, size_t at) {
    const char *text = r->buffer + r->start, *after = text + at + r->marker_bytes, *end = r->buffer + r->end;
    bool begins = at ? text[at - 1] == '\n' : r->line_start;
    size_t line_end = after < end && *after == '\n' ? 1 : end - after > 1 && after[0] == '\r' && after[1] == '\n' ? 2 : 0;
    return r->marker_bytes + (begins ? line_end : 0);
}

/* One step on the unread text: true when it gives a piece; else some was skipped, or more is wanted (*more). */
static bool step(TextReader *r, TextPiece *piece, bool *more) {
    size_t unread = r->end - r->start;
    const char *text = r->buffer + r->start;
    const char *found = r->marker ? memmem(text + r->searched, unread - r->searched, r->marker, r->marker_bytes) : NULL;
    if (found) {
        size_t at = (size_t)(found - text);
        r->searched = at;
        if (at) {
            *piece = give(r, at, true);
            return true;
        }
        if (unread < r->marker_bytes + 2 && !r->eof) {
            r->want = unread + r->piece_bytes;
            *more = true;
            return false;
        }
        size_t skipped = marker_line(r, 0);
        take(r, skipped);
        r->first = true;
        return false;
    }
    r->searched = unread < r->marker_bytes ? 0 : unread - r->marker_bytes;
    size_t cut = r->eof ? unread : unread < r->want ? 0 : split_safe_cut(text, unread, unread - r->marker_bytes - 4);
    if (cut) {
        *piece = give(r, cut, r->eof);
        return true;
    }
    if (unread >= r->want) r->want = 2 * unread;
    *more = true;
    return false;
}

int text_reader_next(TextReader *r, TextPiece *piece, Error *e) {
    for (;;) {
        if (r->fd < 0) {
            if (r->next == r->n_paths) return 0;
            if (!open_next(r, e)) return -1;
        }
        bool more = false;
        if (r->end > r->start && step(r, piece, &more)) return 1;
        if (r->end > r->start && !more) continue;
        if (r->eof) close_file(r);
        else if (!refill(r, e)) return -1;
    }
}
