/* Token shards: every format read and written, every kind of damage found with file, offset, found and expected (P26). */
#include "../../llmc/base/rng.h"
#include "../../llmc/data/shards.h"
#include "test.h"
#include <fcntl.h>
#include <ftw.h>
#include <inttypes.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static char dir[256];

static const char *in_dir(const char *format, ...) {
    static char paths[8][512];
    static int next;
    char *path = paths[next++ % 8];
    int n = snprintf(path, 512, "%s/", dir);
    va_list args;
    va_start(args, format);
    vsnprintf(path + n, 512 - (size_t)n, format, args);
    va_end(args);
    return path;
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *f) {
    (void)st, (void)type, (void)f;
    return remove(path);
}
static void empty_dir(void) {
    nftw(dir, remove_one, 16, FTW_DEPTH | FTW_PHYS);
    mkdir(dir, 0700);
}

static const char *write_bytes(const char *name, const void *data, size_t n) {
    const char *path = in_dir("%s", name);
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, n, f) != n || fclose(f)) abort();
    return path;
}

static size_t put_header(uint8_t *to, int32_t magic, int32_t version, int32_t count) {
    int32_t header[256] = {magic, version, count};
    memcpy(to, header, 1024); /* the tests run on little-endian machines */
    return 1024;
}

/* A shard made by hand, not by ShardWriter; id i is ids(i). magic 0: no header. */
static const char *write_shard(const char *name, int32_t magic, size_t n, uint32_t (*ids)(size_t)) {
    uint8_t *data = malloc(1024 + 4 * n);
    size_t used = magic ? put_header(data, magic, magic == 20240520 ? 1 : 7, (int32_t)n) : 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t id = ids(i);
        size_t bytes = magic == 20240801 ? 4 : 2;
        memcpy(data + used, &id, bytes);
        used += bytes;
    }
    const char *path = write_bytes(name, data, used);
    free(data);
    return path;
}
static uint32_t plain_id(size_t i) { return (uint32_t)(i * 7 + 3) % 50257; }
static uint32_t wide_id(size_t i) { return (uint32_t)(i * 1009 + 70000) % 128256; }

/* dataset_open must fail with this code and with all these pieces in its message. */
static void expect_refused(const char *pattern, size_t T, const char *pieces[], size_t n) {
    Dataset d;
    Error e = {0};
    bool opened = dataset_open(&d, pattern, T, &e);
    EXPECT(!opened, "%s was accepted", pattern);
    if (opened) { dataset_close(&d); return; }
    EXPECT(e.code == EXIT_DATA, "code %d", e.code);
    for (size_t i = 0; i < n; i++) EXPECT(strstr(e.text, pieces[i]), "no \"%s\" in: %s", pieces[i], e.text);
    EXPECT(!d.shards && !d.n_shards, "left open after an error");
}
#define REFUSED(pattern, ...)                                                                                          \
    expect_refused(pattern, 8, (const char *[]){__VA_ARGS__}, sizeof((const char *[]){__VA_ARGS__}) / sizeof(char *))

static void expect_windows(const Dataset *d, const Shard *s, uint32_t (*ids)(size_t)) {
    int32_t in[64], out[64];
    Error e = {0};
    for (uint64_t k = 0; k < s->n_windows; k++) {
        EXPECT(dataset_window(d, s->first_window + k, 128256, in, out, &e), "%s", e.text);
        for (size_t t = 0; t < d->T; t++) {
            EXPECT((uint32_t)in[t] == ids(k * d->T + t), "window %d input %zu: %d", (int)k, t, in[t]);
            EXPECT((uint32_t)out[t] == ids(k * d->T + t + 1), "window %d target %zu: %d", (int)k, t, out[t]);
        }
    }
}

TEST(three_formats_and_uneven_shards) {
    empty_dir();
    write_shard("a_5.bin", 20240520, 9, plain_id);
    write_shard("a_2.bin", 20240801, 57, wide_id);
    write_shard("a_0.bin", 20240520, 100, plain_id);
    write_shard("a_4.bin", 20240520, 0, plain_id);
    write_shard("a_3.bin", 20240520, 8, plain_id);   /* one token short of a window */
    write_shard("a_1.bin", 0, 17, plain_id);         /* exactly two windows */
    Dataset d;
    Error e = {0};
    EXPECT(dataset_open(&d, in_dir("a_*.bin"), 8, &e), "%s", e.text);
    if (test_errors) return;
    const uint64_t windows[] = {12, 2, 7, 0, 0, 1}, first[] = {0, 12, 14, 21, 21, 21};
    EXPECT(d.n_shards == 6 && d.n_windows == 22 && d.n_tokens == 191, "%zu %d %d", d.n_shards, (int)d.n_windows, (int)d.n_tokens);
    for (size_t i = 0; i < 6; i++) {
        EXPECT(d.shards[i].n_windows == windows[i] && d.shards[i].first_window == first[i], "shard %zu", i);
        expect_windows(&d, &d.shards[i], i == 2 ? wide_id : plain_id);
    }
    dataset_close(&d);
}

TEST(windows_longer_than_the_read_buffer) {
    empty_dir();
    enum { T = 10000 };
    const char *path = write_shard("long.bin", 20240801, 2 * T + 1, wide_id);
    Dataset d;
    Error e = {0};
    EXPECT(dataset_open(&d, path, T, &e), "%s", e.text);
    static int32_t in[T], out[T];
    for (size_t k = 0; k < 2; k++) {
        EXPECT(dataset_window(&d, k, 128256, in, out, &e), "%s", e.text);
        size_t wrong = 0;
        for (size_t t = 0; t < T; t++) wrong += (uint32_t)in[t] != wide_id(k * T + t) || (uint32_t)out[t] != wide_id(k * T + t + 1);
        EXPECT(!wrong, "%zu wrong ids", wrong);
    }
    dataset_close(&d);
}

TEST(fingerprint_sees_names_sizes_headers_and_ends) {
    empty_dir();
    enum { N = 200000 };
    char first[33], other[33];
    Dataset d;
    Error e = {0};
    const char *path = write_shard("f.bin", 20240520, N, plain_id);
    EXPECT(dataset_open(&d, path, 8, &e), "%s", e.text);
    strcpy(first, d.fingerprint);
    EXPECT(strlen(first) == 32 && strspn(first, "0123456789abcdef") == 32, "%s", first);
    dataset_close(&d);
    const long flips[] = {1000, 1024, 60000, 1024 + 2 * N - 60000, 1024 + 2 * N - 1};
    for (size_t i = 0; i < 5; i++) {
        write_shard("f.bin", 20240520, N, plain_id);
        int fd = open(path, O_RDWR);
        uint8_t byte;
        EXPECT(pread(fd, &byte, 1, flips[i]) == 1, "read");
        byte ^= 1;
        EXPECT(pwrite(fd, &byte, 1, flips[i]) == 1, "write");
        close(fd);
        EXPECT(dataset_open(&d, path, 8, &e) && strcmp(first, d.fingerprint), "byte %ld does not matter", flips[i]);
        dataset_close(&d);
    }
    write_shard("f.bin", 20240520, N + 1, plain_id);
    EXPECT(dataset_open(&d, path, 8, &e) && strcmp(first, d.fingerprint), "the size does not matter");
    dataset_close(&d);
    EXPECT(dataset_open(&d, write_shard("g.bin", 20240520, N, plain_id), 8, &e) && strcmp(first, d.fingerprint), "the name does not matter");
    dataset_close(&d);
    static const uint16_t zeros[250000]; /* without a header and all alike: nothing but the size differs */
    EXPECT(dataset_open(&d, write_bytes("z.bin", zeros, 400000), 8, &e), "%s", e.text);
    strcpy(other, d.fingerprint);
    dataset_close(&d);
    EXPECT(dataset_open(&d, write_bytes("z.bin", zeros, 400002), 8, &e) && strcmp(other, d.fingerprint), "the size alone does not matter");
    dataset_close(&d);
    mkdir(in_dir("other"), 0700);
    EXPECT(dataset_open(&d, write_shard("other/f.bin", 20240520, N, plain_id), 8, &e) && !strcmp(first, d.fingerprint), "the folder matters");
    dataset_close(&d);
}

TEST(P26_damaged_headers) {
    empty_dir();
    uint8_t data[4096] = {0};
    put_header(data, 20240520, 1, 20);
    REFUSED(write_bytes("cut.bin", data, 700), "cut.bin", "byte 700", "1024");
    REFUSED(write_bytes("cut4.bin", data, 4), "cut4.bin", "byte 4", "1024");
    REFUSED(write_bytes("odd.bin", data, 1024 + 41), "odd.bin", "byte 1064", "part of a token");
    REFUSED(write_bytes("more.bin", data, 1024 + 42), "more.bin", "byte 8", "20 tokens", "expected 21");
    REFUSED(write_bytes("less.bin", data, 1024 + 38), "less.bin", "byte 8", "20 tokens", "expected 19");
    put_header(data, 20240520, 1, -5);
    REFUSED(write_bytes("negative.bin", data, 1024 + 40), "byte 8", "-5 tokens", "expected 20");
    put_header(data, 20240520, 7, 20);
    REFUSED(write_bytes("version.bin", data, 1024 + 40), "byte 4", "version 7", "expected 1", "20240520");
    put_header(data, 20240801, 1, 20);
    REFUSED(write_bytes("version32.bin", data, 1024 + 80), "byte 4", "version 1", "expected 7", "20240801");
    put_header(data, 20240801, 7, 20);
    REFUSED(write_bytes("odd32.bin", data, 1024 + 82), "byte 1104", "expected 4 bytes");
    REFUSED(write_bytes("empty.bin", data, 0), "empty.bin", "empty file");
    REFUSED(write_bytes("one.bin", data, 1), "one.bin", "half a token");
    memset(data, 0, sizeof data);
    REFUSED(write_bytes("headerless_odd.bin", data, 1001), "byte 1000", "half a token", "1001 bytes");
}

TEST(P26_other_kinds_of_file) {
    empty_dir();
    uint8_t data[2048] = {0};
    put_header(data, 20240522, 1, 3);
    REFUSED(write_bytes("eval.bin", data, 2000), "multiple-choice", "20240522");
    put_header(data, 20240326, 3, 1024);
    REFUSED(write_bytes("model.bin", data, 2000), "model weights", "--init-from");
    put_header(data, 20240328, 2, 50257);
    REFUSED(write_bytes("tok.bin", data, 2000), "tokenizer", "20240328");
    put_header(data, __builtin_bswap32(20240520), __builtin_bswap32(1), __builtin_bswap32(20));
    REFUSED(write_bytes("big.bin", data, 1064), "big-endian", "little-endian");
    put_header(data, __builtin_bswap32(20240801), __builtin_bswap32(7), __builtin_bswap32(20));
    REFUSED(write_bytes("big32.bin", data, 1104), "big-endian", "20240801");
    memcpy(data, "\x93NUMPY\x01\0", 8);
    REFUSED(write_bytes("x.npy", data, 1000), "NumPy", "tofile");
    const char text[] = "It was a bright cold day, na\xc3\xafve \xe4\xbd\xa0\xe5\xa5\xbd, and the clocks were striking.\n";
    REFUSED(write_bytes("text.bin", text, sizeof text - 1), "found text", "tokenize encode");
    REFUSED(write_bytes("text2.bin", text, sizeof text - 2), "found text", "tokenize encode");
    EXPECT((sizeof text - 1) % 2 == 0 || (sizeof text - 2) % 2 == 0, "one of them is even");
}

TEST(P26_paths) {
    empty_dir();
    REFUSED(in_dir("none.bin"), "none.bin", "No such file");
    REFUSED(in_dir("none_*.bin"), "none_*.bin", "no file matches");
    REFUSED(dir, dir, "directory", "*.bin'");
    mkfifo(in_dir("pipe.bin"), 0600);
    REFUSED(in_dir("pipe.bin"), "pipe.bin", "pipe");
    EXPECT(!symlink("nowhere", in_dir("link.bin")), "symlink");
    REFUSED(in_dir("link.bin"), "link.bin", "No such file");
    write_shard("s_0.bin", 20240520, 8, plain_id);
    write_shard("s_1.bin", 20240520, 5, plain_id);
    REFUSED(in_dir("s_*.bin"), "2 file(s)", "13 tokens", "at least 9", "--seq-len");
    write_shard("odd [name]*?.bin", 20240520, 100, plain_id); /* exists as written: no glob */
    write_shard("odd [name]*XX.bin", 20240520, 100, plain_id);
    Dataset d;
    Error e = {0};
    EXPECT(dataset_open(&d, in_dir("odd [name]*?.bin"), 8, &e) && d.n_shards == 1, "%s", e.text);
    dataset_close(&d);
}

TEST(P26_unreadable) {
    empty_dir();
    const char *path = write_shard("secret.bin", 20240520, 100, plain_id);
    chmod(path, 0);
    chmod(dir, 0755);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) { /* root reads everything: become nobody */
        if (geteuid() == 0 && setuid(65534)) _exit(2);
        Dataset d;
        Error e = {0};
        _exit(!dataset_open(&d, path, 8, &e) && e.code == EXIT_DATA && strstr(e.text, path) && strstr(e.text, "Permission denied") ? 0 : 1);
    }
    int status = 0;
    waitpid(child, &status, 0);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 2) SKIP("cannot change user");
    EXPECT(status == 0, "status %d", status);
}

TEST(P26_ids_out_of_range) {
    empty_dir();
    Dataset d;
    Error e = {0};
    int32_t in[8], out[8];
    for (int wide = 0; wide < 2; wide++) {
        const char *path = write_shard("r.bin", wide ? 20240801 : 20240520, 100, plain_id);
        uint32_t bad = wide ? 0x80000001u : 50257;
        int fd = open(path, O_RDWR);
        off_t at = 1024 + 33 * (wide ? 4 : 2); /* token 33: window 4, t = 1 */
        EXPECT(pwrite(fd, &bad, wide ? 4 : 2, at) > 0, "write");
        close(fd);
        EXPECT(dataset_open(&d, path, 8, &e), "%s", e.text);
        for (uint64_t w = 0; w < d.n_windows; w++) {
            e = (Error){0};
            bool ok = dataset_window(&d, w, 50257, in, out, &e);
            EXPECT(ok == (w != 4), "window %d: %s", (int)w, e.text);
            char offset[32], id[32];
            snprintf(offset, sizeof offset, "byte %d:", (int)at);
            snprintf(id, sizeof id, "id %" PRIu32 ",", bad);
            if (!ok)
                EXPECT(e.code == EXIT_DATA && strstr(e.text, "r.bin") && strstr(e.text, offset) && strstr(e.text, id) &&
                           strstr(e.text, "50257"), "%s", e.text);
        }
        dataset_close(&d);
    }
    /* The token that two windows share is checked in both: target of one, input of the next. */
    const char *path = write_shard("shared.bin", 20240520, 100, plain_id);
    EXPECT(dataset_open(&d, path, 8, &e), "%s", e.text);
    uint32_t largest = 0;
    for (size_t i = 0; i <= 16; i++) largest = plain_id(i) > largest ? plain_id(i) : largest;
    EXPECT(dataset_window(&d, 1, largest + 1, in, out, &e) && !dataset_window(&d, 1, largest, in, out, &e) &&
               dataset_window(&d, 0, largest, in, out, &e), "the range ends at V - 1");
    dataset_close(&d);
}

TEST(P26_file_shrinks_while_open) {
    empty_dir();
    const char *path = write_shard("shrink.bin", 20240520, 1000, plain_id);
    Dataset d;
    Error e = {0};
    int32_t in[8], out[8];
    EXPECT(dataset_open(&d, path, 8, &e), "%s", e.text);
    EXPECT(!truncate(path, 1024 + 2 * 503), "truncate");
    EXPECT(dataset_window(&d, 61, 50257, in, out, &e), "tokens 488..496 are there: %s", e.text);
    EXPECT(!dataset_window(&d, 62, 50257, in, out, &e), "tokens 496..504 are not");
    EXPECT(e.code == EXIT_DATA && strstr(e.text, "shrink.bin") && strstr(e.text, "byte 2030") && strstr(e.text, "shorter"), "%s", e.text);
    dataset_close(&d);
}

/* A sparse file of n tokens whose header holds count; token i of the last ones is set. */
static const char *write_sparse(uint64_t n, int32_t count, uint64_t set_at, uint16_t id) {
    uint8_t header[1024];
    put_header(header, 20240520, 1, count);
    const char *path = write_bytes("sparse.bin", header, 1024);
    int fd = open(path, O_RDWR);
    bool ok = !ftruncate(fd, (off_t)(1024 + 2 * n)) && pwrite(fd, &id, 2, (off_t)(1024 + 2 * set_at)) == 2;
    close(fd);
    return ok ? path : NULL;
}

TEST(P26_sparse_files_over_2_GiB) {
    empty_dir();
    const struct { uint64_t n; int32_t count; bool good; } cases[] = {
        {1200000000u, 1200000000, true},             /* over 2 GiB of bytes */
        {3000000000u, (int32_t)3000000000u, true},   /* the count wrapped */
        {3000000000u, INT32_MAX, true},              /* the count saturated */
        {5000000000u, 705032704, true},              /* over 2^32 tokens: 5e9 - 2^32 */
        {5000000000u, 705032703, false},
        {3000000000u, 1000, false},
        {2100000000u, (int32_t)3000000000u, false},  /* wrapped, then cut short */
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint64_t n = cases[i].n, w = (n - 1) / 8 - 1; /* the last window */
        const char *path = write_sparse(n, cases[i].count, w * 8 + 3, 1234);
        if (!path) SKIP("no sparse file of %" PRIu64 " tokens here", n);
        Dataset d;
        Error e = {0};
        bool ok = dataset_open(&d, path, 8, &e);
        EXPECT(ok == cases[i].good, "case %zu: %s", i, e.text);
        if (!ok) {
            char expected[64];
            snprintf(expected, sizeof expected, "expected %" PRIu64, n);
            EXPECT(strstr(e.text, expected) && strstr(e.text, "byte 8"), "%s", e.text);
            continue;
        }
        int32_t in[8], out[8];
        EXPECT(d.n_tokens == n && d.n_windows == w + 1, "%" PRIu64, d.n_tokens);
        EXPECT(dataset_window(&d, w, 50257, in, out, &e) && in[3] == 1234 && out[2] == 1234 && in[2] == 0, "%s", e.text);
        EXPECT(!dataset_window(&d, w, 1234, in, out, &e), "range");
        char offset[64];
        snprintf(offset, sizeof offset, "byte %" PRIu64 ":", 1024 + 2 * (w * 8 + 3));
        EXPECT(strstr(e.text, offset), "%s", e.text);
        dataset_close(&d);
    }
}

TEST(P26_random_damage_never_crashes) {
    empty_dir();
    int opened = 0, refused = 0;
    for (uint32_t round = 0; round < 1500; round++) {
        uint8_t data[1400];
        bool wide = rng_u32(1, 0, round, 0) & 1;
        size_t n = rng_u32(1, 0, round, 1) % 80, size = put_header(data, wide ? 20240801 : 20240520, wide ? 7 : 1, (int32_t)n);
        for (size_t i = 0; i < n * (wide ? 4 : 2); i++) data[size++] = wide && i % 4 > 1 ? 0 : (uint8_t)rng_u32(1, 1, round, i);
        for (uint32_t k = 0; k < rng_u32(1, 0, round, 2) % 4; k++) {
            uint32_t r = rng_u32(1, 2, round, k), range = r & 1 ? 16 : (uint32_t)size; /* half of the flips hit the header's numbers */
            data[(r >> 8) % range] ^= (uint8_t)(1 << (r >> 1) % 8);
        }
        if (rng_u32(1, 0, round, 3) % 3 == 0) size = rng_u32(1, 0, round, 4) % (size + 1);
        Dataset d;
        Error e = {0};
        int32_t in[8], out[8];
        if (dataset_open(&d, write_bytes("fuzz.bin", data, size), 8, &e)) {
            opened++;
            for (uint64_t w = 0; w < d.n_windows; w++)
                if (!dataset_window(&d, w, 50257, in, out, &e)) EXPECT(strstr(e.text, "fuzz.bin: byte "), "%s", e.text);
            dataset_close(&d);
        } else {
            refused++;
            EXPECT(e.code == EXIT_DATA && strstr(e.text, "fuzz.bin"), "%s", e.text);
        }
    }
    EXPECT(opened > 100 && refused > 100, "%d opened, %d refused", opened, refused);
}

TEST(more_shards_than_descriptors) {
    empty_dir();
    struct rlimit old, low;
    getrlimit(RLIMIT_NOFILE, &old);
    low = old;
    low.rlim_cur = 64;
    char name[32];
    for (int i = 0; i < 300; i++) {
        snprintf(name, sizeof name, "m_%03d.bin", i);
        write_shard(name, 20240520, 17, plain_id);
    }
    setrlimit(RLIMIT_NOFILE, &low);
    Dataset d, second;
    Error e = {0};
    EXPECT(dataset_open(&d, in_dir("m_*.bin"), 8, &e) && d.n_windows == 600, "%s", e.text);
    EXPECT(dataset_open(&second, in_dir("m_*.bin"), 8, &e) && second.n_windows == 600, "%s", e.text);
    for (size_t i = 0; i < d.n_shards; i++) expect_windows(&d, &d.shards[i], plain_id);
    int32_t in[8], out[8];
    unlink(in_dir("m_299.bin"));
    EXPECT(!dataset_window(&d, 599, 50257, in, out, &e) && strstr(e.text, "m_299.bin: cannot open"), "%s", e.text);
    dataset_close(&second);
    dataset_close(&d);
    setrlimit(RLIMIT_NOFILE, &old);
}

TEST(tokens_or_text) {
    empty_dir();
    write_shard("plain", 20240520, 20, plain_id);
    write_shard("wide", 20240801, 20, wide_id);
    write_bytes("story.txt", "Once upon a time", 16);
    write_bytes("tiny", "a", 1);
    EXPECT(shard_is_tokens(in_dir("plain")) && shard_is_tokens(in_dir("wide")) && shard_is_tokens(in_dir("wid*")), "by magic");
    EXPECT(shard_is_tokens("anything.bin") && shard_is_tokens("shards/*.bin"), "by name");
    EXPECT(!shard_is_tokens(in_dir("story.txt")) && !shard_is_tokens(in_dir("tiny")) && !shard_is_tokens(in_dir("none")) &&
               !shard_is_tokens(dir) && !shard_is_tokens("bin") && !shard_is_tokens(""), "text");
}

static void round_trip(size_t V, size_t n, size_t piece) {
    int32_t *ids = malloc(n * 4 + 4);
    for (size_t i = 0; i < n; i++) ids[i] = (int32_t)(rng_u32(V, 0, 0, i) % V);
    if (n) ids[0] = (int32_t)V - 1;
    Error e = {0};
    const char *path = in_dir("w_%zu_%zu.bin", V, n);
    ShardWriter *w = shard_create(path, V, &e);
    EXPECT(w, "%s", e.text);
    if (!w) return;
    for (size_t i = 0; i < n; i += piece) EXPECT(shard_append(w, ids + i, n - i < piece ? n - i : piece, &e), "%s", e.text);
    EXPECT(access(path, F_OK), "complete before the commit");
    EXPECT(shard_commit(w, &e), "%s", e.text);
    struct stat st;
    EXPECT(!stat(path, &st) && (size_t)st.st_size == 1024 + n * (V > 65536 ? 4 : 2), "size %ld", (long)st.st_size);
    EXPECT(access(in_dir("w_%zu_%zu.bin.tmp", V, n), F_OK), "the temporary file is still there");
    Dataset d;
    int32_t in[8], out[8];
    if (n >= 9 && dataset_open(&d, path, 8, &e)) {
        size_t wrong = 0;
        for (uint64_t k = 0; k < d.n_windows; k++) {
            EXPECT(dataset_window(&d, k, V, in, out, &e), "%s", e.text);
            wrong += memcmp(in, ids + 8 * k, 32) || memcmp(out, ids + 8 * k + 1, 32);
        }
        EXPECT(!wrong && d.n_tokens == n, "%zu wrong windows", wrong);
        dataset_close(&d);
    } else EXPECT(n < 9, "%s", e.text);
    free(ids);
}

TEST(writer_round_trip) {
    empty_dir();
    const size_t sizes[] = {0, 1, 9, 1000, 524288, 600001}; /* 524,288 uint16 fill the buffer exactly */
    const size_t vocabularies[] = {1, 50257, 65536, 65537, 128256};
    for (size_t v = 0; v < 5; v++)
        for (size_t i = 0; i < 6; i++) round_trip(vocabularies[v], sizes[i], i == 5 ? 100003 : 777);
}

TEST(writer_never_looks_complete) {
    empty_dir();
    Error e = {0};
    static int32_t ids[600000];
    const char *path = in_dir("half.bin"), *temporary = in_dir("half.bin.tmp");
    ShardWriter *w = shard_create(path, 50257, &e);
    EXPECT(w && shard_append(w, ids, 600000, &e), "%s", e.text);
    EXPECT(access(path, F_OK), "complete before the commit");
    REFUSED(temporary, "half.bin.tmp", "byte 8", "count of 0 tokens"); /* 1 MiB has been written, the header says nothing yet */
    const int32_t bad[] = {5, 50257}, negative[] = {-1};
    EXPECT(!shard_append(w, bad, 2, &e) && e.code == EXIT_DATA && strstr(e.text, "50257"), "%s", e.text);
    EXPECT(!shard_append(w, negative, 1, &e) && strstr(e.text, "-1"), "%s", e.text);
    shard_abandon(w);
    EXPECT(access(path, F_OK) && access(temporary, F_OK), "something is left");
    write_shard("half.bin", 20240520, 100, plain_id);
    w = shard_create(path, 50257, &e);
    EXPECT(w && shard_append(w, ids, 10, &e), "%s", e.text);
    shard_abandon(w);
    Dataset d;
    EXPECT(dataset_open(&d, path, 8, &e) && d.n_tokens == 100, "an abandoned rewrite leaves the old file: %s", e.text);
    dataset_close(&d);
    EXPECT(!shard_create(in_dir("no/such/dir.bin"), 50257, &e) && e.code == EXIT_STORAGE && strstr(e.text, "no/such"), "%s", e.text);
}

TEST(writer_disk_full) {
    ShardWriter *w;
    Error e = {0};
    static int32_t ids[600000];
    struct rlimit old, low;
    empty_dir();
    getrlimit(RLIMIT_FSIZE, &old);
    low = old;
    low.rlim_cur = 500000;
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &low);
    w = shard_create(in_dir("full.bin"), 50257, &e);
    EXPECT(w && !shard_append(w, ids, 600000, &e), "1.2 MB fit into 500,000 bytes");
    EXPECT(e.code == EXIT_STORAGE && strstr(e.text, "byte 500000") && strstr(e.text, "full.bin"), "%s", e.text);
    if (w) shard_abandon(w);
    e = (Error){0};
    w = shard_create(in_dir("full.bin"), 50257, &e);
    EXPECT(w && shard_append(w, ids, 400000, &e), "still in the buffer");
    EXPECT(w && !shard_commit(w, &e) && e.code == EXIT_STORAGE, "%s", e.text);
    setrlimit(RLIMIT_FSIZE, &old);
    EXPECT(access(in_dir("full.bin"), F_OK) && access(in_dir("full.bin.tmp"), F_OK), "something is left");
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    snprintf(dir, sizeof dir, "%s/llmc_shards_XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
    if (!mkdtemp(dir)) return 1;
    RUN(three_formats_and_uneven_shards);
    RUN(windows_longer_than_the_read_buffer);
    RUN(fingerprint_sees_names_sizes_headers_and_ends);
    RUN(P26_damaged_headers);
    RUN(P26_other_kinds_of_file);
    RUN(P26_paths);
    RUN(P26_unreadable);
    RUN(P26_ids_out_of_range);
    RUN(P26_file_shrinks_while_open);
    RUN(P26_sparse_files_over_2_GiB);
    RUN(P26_random_damage_never_crashes);
    RUN(more_shards_than_descriptors);
    RUN(tokens_or_text);
    RUN(writer_round_trip);
    RUN(writer_never_looks_complete);
    RUN(writer_disk_full);
    nftw(dir, remove_one, 16, FTW_DEPTH | FTW_PHYS);
    return test_done();
}
