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
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t room);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t room, unsigned seed);

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

/* A safetensors file from two bytes that give the size of its data (all zero) and a JSON header, whose length is filled in. */
static inline void fuzz_write_safetensors(const char *name, const uint8_t *data, size_t size) {
    size_t zeros = size < 2 ? 0 : data[0] + 256u * data[1], header = size < 2 ? 0 : size - 2;
    uint8_t *file = (uint8_t *)xcalloc(8 + header + zeros, 1);
    for (int i = 0; i < 8; i++) file[i] = (uint8_t)((uint64_t)header >> 8 * i);
    if (header) memcpy(file + 8, data + 2, header);
    fuzz_write(name, file, 8 + header + zeros);
    free(file);
}

static inline long long fuzz_number(const uint8_t *digits, size_t n) {
    long long value = 0;
    for (size_t i = 0; i < n && i < 17; i++) value = 10 * value + digits[i] - '0';
    return value;
}

/* Half of the mutations replace one number of a text by another that is often too much for somebody; the rest are libFuzzer's. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t room, unsigned seed) {
    static const char *const others[] = {"0", "1", "-1", "2", "127", "128", "129", "255", "256", "65536", "2147483648", "4294967296",
                                         "9223372036854775807", "18446744073709551616", "0.5", "-0.0", "1e308", "null", "\"\"", "[]", "{}", "true"};
    enum { N_OTHERS = sizeof others / sizeof *others };
    size_t at = size ? seed / 2 % size : 0, end;
    while (at < size && (data[at] < '0' || data[at] > '9')) at++;
    if (seed % 2 || at == size) return LLVMFuzzerMutate(data, size, room);
    while (at > 0 && data[at - 1] >= '0' && data[at - 1] <= '9') at--;
    for (end = at; end < size && data[end] >= '0' && data[end] <= '9'; end++) {}
    char other[32];
    unsigned choice = seed / 7 % (N_OTHERS + 4);
    if (choice < N_OTHERS) snprintf(other, sizeof other, "%s", others[choice]);
    else snprintf(other, sizeof other, "%lld", fuzz_number(data + at, end - at) + (int)(seed / 97 % 9) - 4); /* a neighbour */
    size_t length = strlen(other), rest = size - end;
    if (at + length + rest > room) return LLVMFuzzerMutate(data, size, room);
    memmove(data + at + length, data + end, rest);
    memcpy(data + at, other, length);
    return at + length + rest;
}

/* What was refused was refused with a code and a message; what was accepted left none. Returns ok. */
static inline bool fuzz_verdict(bool ok, const Error *e) {
    if (!ok) CHECK(e->code != 0 && e->text[0] && memchr(e->text, 0, sizeof e->text), "refused without a message");
    return ok;
}
#endif
