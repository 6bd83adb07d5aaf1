/* What the fuzzers share: a folder of their own, files in it, and the rule for errors. Each fuzzer reads one kind of input that
 * comes from outside; the first byte of an input chooses among its readers, the rest is the file's content. A crash, a leak, an
 * undefined operation, a CHECK, or a refusal without a message is a finding. */
#ifndef LLMC_FUZZ_H
#define LLMC_FUZZ_H
#include "llmc/base/error.h"
#include "llmc/base/io.h"
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Takes the C library's place: files here need not survive anything, and the runs are many times faster. */
int fsync(int fd) { (void)fd; return 0; }

static char *fuzz_folder;

static inline void fuzz_remove_folder(void) {
    path_remove_tree(fuzz_folder, NULL);
    free(fuzz_folder);
}

/* A file of that name in the fuzzer's own folder, which is made at the first call and removed at exit. Caller frees. */
static inline char *fuzz_path(const char *name) {
    if (!fuzz_folder) {
        const char *parent = getenv("TMPDIR");
        fuzz_folder = xasprintf("%s/llmc_fuzz_XXXXXX", parent ? parent : "/tmp");
        CHECK(mkdtemp(fuzz_folder), "%s", fuzz_folder);
        atexit(fuzz_remove_folder);
    }
    return path_join(fuzz_folder, name);
}

static inline void fuzz_write(const char *name, const void *data, size_t bytes) {
    char *path = fuzz_path(name);
    FILE *f = fopen(path, "wb");
    CHECK(f && fwrite(data, 1, bytes, f) == bytes && fclose(f) == 0, "%s", path);
    free(path);
}

static inline void fuzz_copy(const char *from, const char *name) {
    Error e = {0};
    size_t bytes;
    char *content = file_read(from, &bytes, &e);
    CHECK(content, "%s (run from the top of the tree)", e.text);
    fuzz_write(name, content, bytes);
    free(content);
}

/* What was refused was refused with a code and a message; what was accepted left none. Returns ok. */
static inline bool fuzz_verdict(bool ok, const Error *e) {
    if (!ok) CHECK(e->code != 0 && e->text[0] && memchr(e->text, 0, sizeof e->text), "refused without a message");
    return ok;
}
#endif
