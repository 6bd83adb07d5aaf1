/* The safetensors container: round trips, every conversion, a corpus of malformed files, and random damage that must never crash. */
#include "../../llmc/base/rng.h"
#include "../../llmc/run/safetensors.h"
#include "test.h"
#include <sys/stat.h>
#include <unistd.h>

static char dir[256], file[300];

static void write_file(const void *data, size_t bytes) {
    FILE *f = fopen(file, "wb");
    fwrite(data, 1, bytes, f);
    fclose(f);
}

/* header text + data_bytes zero bytes */
static void write_header(const char *header, size_t data_bytes) {
    uint64_t length = strlen(header);
    char *all = calloc(1, 8 + length + data_bytes);
    memcpy(all, &length, 8);
    memcpy(all + 8, header, length);
    write_file(all, 8 + length + data_bytes);
    free(all);
}

static StTensor entry(const char *name, StDtype dtype, const char *dtype_name, uint64_t begin, uint64_t elements, uint64_t bytes) {
    StTensor t = {.name = (char *)name, .dtype = dtype, .n_dims = 1, .shape = {elements}, .begin = begin, .end = begin + bytes};
    snprintf(t.dtype_name, sizeof t.dtype_name, "%s", dtype_name);
    return t;
}

TEST(round_trip_keeps_every_bit) {
    float a[6] = {1, -0.0f, 3.4e38f, 1e-45f, -7, 0.1f}, b[3] = {4, 5, 6}, got[6];
    StTensor tensors[3] = {entry("a.weight", ST_F32, "F32", 0, 6, 24), entry("empty", ST_F32, "F32", 24, 0, 0), entry("b", ST_F32, "F32", 24, 3, 12)};
    tensors[0].n_dims = 2, tensors[0].shape[0] = 2, tensors[0].shape[1] = 3;
    Error e = {0};
    FileWriter *w = file_create(file, &e);
    EXPECT(st_write_header(w, tensors, 3, "{\"format\":\"pt\",\"x\":\"\\u00e9\"}", &e) && file_write(w, a, 24, &e) && file_write(w, b, 12, &e) &&
           file_commit(w, NULL, NULL, &e), "%s", e.text);
    StFile f;
    EXPECT(st_open(&f, file, &e), "%s", e.text);
    EXPECT(f.n == 3 && f.data_start % 8 == 0 && strstr(f.metadata_json, "\"format\":\"pt\""));
    const StTensor *t = st_find(&f, "a.weight");
    EXPECT(t && t->n_dims == 2 && t->shape[0] == 2 && t->shape[1] == 3 && !strcmp(t->dtype_name, "F32"));
    EXPECT(t && st_read_f32(&f, t, got, &e) && !memcmp(got, a, 24));
    EXPECT(st_read_f32(&f, st_find(&f, "b"), got, &e) && !memcmp(got, b, 12));
    EXPECT(st_find(&f, "empty") && st_read_f32(&f, st_find(&f, "empty"), got, &e));
    EXPECT(!st_find(&f, "a"));
    st_close(&f);
}

/* The value of a binary16 by its definition. */
static double half_value(unsigned h) {
    int exponent = (h >> 10) & 31, mantissa = h & 1023;
    double x = exponent == 31 ? (mantissa ? NAN : INFINITY) : exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
    return h & 0x8000 ? -x : x;
}

static void conversions(StDtype dtype, const char *name, const void *raw, size_t bytes, size_t n, float *got) {
    StTensor t = entry("x", dtype, name, 0, n, bytes);
    Error e = {0};
    FileWriter *w = file_create(file, &e);
    EXPECT(st_write_header(w, &t, 1, NULL, &e) && file_write(w, raw, bytes, &e) && file_commit(w, NULL, NULL, &e), "%s", e.text);
    StFile f;
    EXPECT(st_open(&f, file, &e) && st_read_f32(&f, &f.tensors[0], got, &e), "%s", e.text);
    st_close(&f);
}

TEST(all_65536_halves_and_bfloats) {
    enum { N = 65536 };
    static uint16_t raw[N];
    static float got[N];
    for (unsigned i = 0; i < N; i++) raw[i] = (uint16_t)i;
    conversions(ST_F16, "F16", raw, sizeof raw, N, got);
    for (unsigned i = 0; i < N; i++) {
        double want = half_value(i);
        EXPECT(isnan(want) ? isnan(got[i]) : ((double)got[i] == want && !signbit(got[i]) == !signbit(want)), "half %04x: %g, expected %g", i, (double)got[i], want);
    }
    conversions(ST_BF16, "BF16", raw, sizeof raw, N, got);
    for (unsigned i = 0; i < N; i++) {
        uint32_t bits;
        memcpy(&bits, &got[i], 4);
        EXPECT(bits == i << 16, "bfloat %04x", i);
    }
}

TEST(doubles_are_rounded_once) {
    enum { N = 20000 };  /* more than one chunk */
    static double raw[N];
    static float got[N];
    for (int i = 0; i < N; i++) raw[i] = rng_uniform(1, 0, 0, (uint64_t)i) * pow(10, i % 60 - 30);
    conversions(ST_F64, "F64", raw, sizeof raw, N, got);
    for (int i = 0; i < N; i++) EXPECT(got[i] == (float)raw[i], "element %d", i);
}

TEST(malformed_files_are_named) {
    static const struct { const char *header; size_t data; const char *expect; } cases[] = {
        {"[]", 0, "not a JSON object"}, {"{\"a\":", 0, "not a JSON object"}, {"{} x", 0, "not a JSON object"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}", 8, "duplicate"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}", 4, "found 4 bytes of data, expected 2 elements"},
        {"{\"a\":{\"dtype\":\"F99\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "unknown dtype"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}}", 4, "malformed"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1.5],\"data_offsets\":[0,4]}}", 4, "malformed"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,4]}}", 4, "malformed"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,0]}}", 0, "malformed"},
        {"{\"a\":{\"dtype\":\"F64\",\"shape\":[4611686018427387904],\"data_offsets\":[0,0]}}", 0, "expected 4611686018427387904 elements"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[99999999999999999999],\"data_offsets\":[0,4]}}", 4, "not a JSON object"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,0]}}", 4, "increasing"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[-4,0]}}", 4, "increasing"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4,8]}}", 4, "malformed"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, "malformed"}, {"{\"a\":7}", 0, "malformed"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4],\"z\":1}}", 4, "malformed"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 3, "cut off"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 5, "damaged"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}", 8, "gap"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\"b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[4,12]}}", 12, "overlap"},
        {"{\"__metadata__\":{\"n\":1}}", 0, "not a string"}, {"{\"__metadata__\":[]}", 0, "not an object"}, {"{\"a\\u0000b\":1}", 0, "not a JSON object"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        StFile f;
        Error e = {0};
        write_header(cases[i].header, cases[i].data);
        bool opened = st_open(&f, file, &e);
        EXPECT(!opened && e.code == EXIT_DATA && strstr(e.text, cases[i].expect) && strstr(e.text, file), "case %zu: %s", i, e.text);
        if (opened) st_close(&f);
    }
}

TEST(short_huge_and_absent_files) {
    static const uint64_t lengths[] = {0, 1, 3, 100000001, UINT64_MAX, (uint64_t)1 << 63};
    StFile f;
    Error e = {0};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        char all[10] = {0, 0, 0, 0, 0, 0, 0, 0, '{', '}'};
        memcpy(all, &lengths[i], 8);
        write_file(all, sizeof all);
        EXPECT(!st_open(&f, file, &e) && strstr(e.text, "claims"), "length %zu: %s", i, e.text);
    }
    for (size_t bytes = 0; bytes < 10; bytes++) {
        write_file("\2\0\0\0\0\0\0\0{}", bytes);
        EXPECT(!st_open(&f, file, &e), "%zu bytes", bytes);
    }
    write_file("\2\0\0\0\0\0\0\0{}", 10);
    EXPECT(st_open(&f, file, &e) && f.n == 0, "%s", e.text);
    st_close(&f);
    EXPECT(!st_open(&f, dir, &e) && strstr(e.text, "regular"), "%s", e.text);
    EXPECT(!st_open(&f, "/nowhere/at/all", &e) && strstr(e.text, "No such file"), "%s", e.text);
}

TEST(a_file_cut_while_open_is_an_error) {
    float got[4];
    StFile f;
    Error e = {0};
    write_header("{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]}}", 16);
    EXPECT(st_open(&f, file, &e), "%s", e.text);
    EXPECT(truncate(file, (off_t)f.file_bytes - 1) == 0);
    EXPECT(!st_read_f32(&f, &f.tensors[0], got, &e) && strstr(e.text, "tensor a") && strstr(e.text, "too early"), "%s", e.text);
    st_close(&f);
}

TEST(integers_are_not_weights) {
    float got[4];
    StFile f;
    Error e = {0};
    write_header("{\"a\":{\"dtype\":\"I64\",\"shape\":[2],\"data_offsets\":[0,16]}}", 16);
    EXPECT(st_open(&f, file, &e) && !st_read_f32(&f, &f.tensors[0], got, &e) && strstr(e.text, "found dtype I64"), "%s", e.text);
    st_close(&f);
}

/* Random damage to a valid file: st_open answers, and what it accepts can be read. Under the sanitizers this is the fuzzer's little brother. */
TEST(random_damage_never_crashes) {
    static const char header[] = "{\"__metadata__\":{\"format\":\"pt\"},\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]},"
                                 "\"bb\":{\"dtype\":\"BF16\",\"shape\":[5],\"data_offsets\":[24,34]}}";
    uint64_t length = sizeof header - 1;
    char good[sizeof header + 8 + 34] = {0};
    memcpy(good, &length, 8);
    memcpy(good + 8, header, length);
    size_t bytes = 8 + length + 34;
    int accepted = 0;
    for (uint64_t i = 0; i < 5000; i++) {
        char bad[sizeof good];
        memcpy(bad, good, bytes);
        for (uint64_t k = 0; k <= i % 4; k++) {
            Rng4 r = rng4(7, 0, (uint32_t)k, i);
            bad[r.v[0] % (r.v[1] % 8 ? bytes : 8)] = r.v[2] % 3 ? "0123456789{}[],:\"-F"[r.v[3] % 18] : (char)r.v[3];
        }
        StFile f;
        Error e = {0};
        float values[256];
        write_file(bad, bytes - (i % 5 == 0 ? rng_u32(8, 0, 0, i) % bytes : 0));
        bool ok = st_open(&f, file, &e);
        EXPECT(ok || (e.code == EXIT_DATA && e.text[0]), "case %llu", (unsigned long long)i);
        for (size_t t = 0; ok && t < f.n; t++)
            if (f.tensors[t].end - f.tensors[t].begin <= sizeof good) st_read_f32(&f, &f.tensors[t], values, &e);
        accepted += ok;
        if (ok) st_close(&f);
    }
    EXPECT(accepted > 50 && accepted < 4500, "%d accepted", accepted);
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    snprintf(dir, sizeof dir, "%s/llmc_st_XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
    if (!mkdtemp(dir)) return 1;
    snprintf(file, sizeof file, "%s/x.safetensors", dir);
    RUN(round_trip_keeps_every_bit);
    RUN(all_65536_halves_and_bfloats);
    RUN(doubles_are_rounded_once);
    RUN(malformed_files_are_named);
    RUN(short_huge_and_absent_files);
    RUN(a_file_cut_while_open_is_an_error);
    RUN(integers_are_not_weights);
    RUN(random_damage_never_crashes);
    path_remove_tree(dir, NULL);
    return test_done();
}
