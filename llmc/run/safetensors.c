/* The safetensors container, strict in reading, as Hugging Face's own reader in writing (header padded with spaces to 8 bytes).
 * Knows nothing of GPT-2. Little-endian hosts only, as the format's data. */
#include "checkpoint_private.h"
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { HEADER_LIMIT = 100000000, CHUNK = 65536 };

static const struct {
    const char *name;
    StDtype dtype;
    unsigned bytes;
} dtypes[] = {
    {"F32", ST_F32, 4},   {"F16", ST_F16, 2},   {"BF16", ST_BF16, 2}, {"F64", ST_F64, 8},         {"I64", ST_I64, 8},
    {"I32", ST_I32, 4},   {"U8", ST_U8, 1},     {"BOOL", ST_OTHER, 1}, {"I8", ST_OTHER, 1},        {"I16", ST_OTHER, 2},
    {"U16", ST_OTHER, 2}, {"U32", ST_OTHER, 4}, {"U64", ST_OTHER, 8}, {"F8_E4M3", ST_OTHER, 1},   {"F8_E5M2", ST_OTHER, 1},
};
enum { N_DTYPES = sizeof dtypes / sizeof *dtypes };

bool pread_full(int fd, void *to, size_t bytes, uint64_t offset) {
    size_t done = 0;
    while (done < bytes) {
        ssize_t n = pread(fd, (char *)to + done, bytes - done, (off_t)(offset + done));
        if (n < 0 && errno == EINTR) continue;
        if (n == 0) errno = 0;
        if (n <= 0) return false;
        done += (size_t)n;
    }
    return true;
}

static const char *read_trouble(void) { return errno ? strerror(errno) : "the file ended too early"; }

/* Bytes of one tensor from its header entry; false when the entry is malformed. */
static bool tensor_shape(StTensor *t, const json_t *shape, uint64_t *elements) {
    if (!json_is_array(shape) || json_array_size(shape) > sizeof t->shape / sizeof *t->shape) return false;
    *elements = 1;
    t->n_dims = (int)json_array_size(shape);
    for (int i = 0; i < t->n_dims; i++) {
        const json_t *n = json_array_get(shape, (size_t)i);
        if (!json_is_integer(n) || json_integer_value(n) < 0) return false;
        t->shape[i] = (uint64_t)json_integer_value(n);
        if (__builtin_mul_overflow(*elements, t->shape[i], elements)) return false;
    }
    return true;
}

static bool tensor_parse(const char *path, StTensor *t, const char *name, const json_t *entry, Error *e) {
    const char *dtype = json_string_value(json_object_get(entry, "dtype"));
    const json_t *offsets = json_object_get(entry, "data_offsets");
    uint64_t elements, bytes;
    t->name = xstrdup(name);
    if (!json_is_object(entry) || json_object_size(entry) != 3 || !dtype || json_array_size(offsets) != 2 ||
        !tensor_shape(t, json_object_get(entry, "shape"), &elements))
        return fail(e, EXIT_DATA, "%s: tensor %.200s: its header entry is malformed, expected {dtype, shape (at most 8 dimensions), "
                    "data_offsets: [begin, end]}; the file is damaged or not safetensors", path, name);
    int d = 0;
    while (d < N_DTYPES && strcmp(dtypes[d].name, dtype) != 0) d++;
    if (d == N_DTYPES)
        return fail(e, EXIT_DATA, "%s: tensor %.200s: unknown dtype \"%.20s\"; expected F32, F16, BF16 or F64", path, name, dtype);
    t->dtype = dtypes[d].dtype;
    snprintf(t->dtype_name, sizeof t->dtype_name, "%s", dtype);
    const json_t *begin = json_array_get(offsets, 0), *end = json_array_get(offsets, 1);
    if (!json_is_integer(begin) || !json_is_integer(end) || json_integer_value(begin) < 0 ||
        json_integer_value(end) < json_integer_value(begin))
        return fail(e, EXIT_DATA, "%s: tensor %.200s: data_offsets are not two increasing offsets; the file is damaged", path, name);
    t->begin = (uint64_t)json_integer_value(begin);
    t->end = (uint64_t)json_integer_value(end);
    if (__builtin_mul_overflow(elements, (uint64_t)dtypes[d].bytes, &bytes) || bytes != t->end - t->begin)
        return fail(e, EXIT_DATA, "%s: tensor %.200s: found %llu bytes of data, expected %llu elements of %s; the file is damaged", path,
                    name, (unsigned long long)(t->end - t->begin), (unsigned long long)elements, dtype);
    return true;
}

static int by_begin(const void *a, const void *b) {
    const StTensor *x = a, *y = b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return x->end < y->end ? -1 : x->end > y->end;  /* an empty tensor stands before its neighbour */
}

/* The tensors must tile the data exactly. */
static bool check_tiling(const StFile *f, Error *e) {
    uint64_t at = 0, data_bytes = f->file_bytes - f->data_start;
    for (size_t i = 0; i < f->n; at = f->tensors[i++].end)
        if (f->tensors[i].begin != at)
            return fail(e, EXIT_DATA, "%s: tensor %.200s begins at data offset %llu, expected %llu: %s; the file is damaged", f->path,
                        f->tensors[i].name, (unsigned long long)f->tensors[i].begin, (unsigned long long)at,
                        f->tensors[i].begin < at ? "tensors overlap" : "there is a gap");
    if (at != data_bytes)
        return fail(e, EXIT_DATA, "%s: found %llu bytes of data, expected %llu by the header (last tensor %.200s); the file is %s", f->path,
                    (unsigned long long)data_bytes, (unsigned long long)at, f->n ? f->tensors[f->n - 1].name : "none",
                    data_bytes < at ? "cut off: copy it again" : "damaged");
    return true;
}

static bool metadata_parse(StFile *f, json_t *metadata, Error *e) {
    const char *key;
    json_t *value;
    json_object_foreach(metadata, key, value) {
        if (!json_is_string(value))
            return fail(e, EXIT_DATA, "%s: __metadata__ entry %.100s is not a string; the file is not safetensors", f->path, key);
    }
    if (!json_is_object(metadata)) return fail(e, EXIT_DATA, "%s: __metadata__ is not an object; the file is not safetensors", f->path);
    f->metadata_json = json_dumps(metadata, JSON_COMPACT);
    CHECK(f->metadata_json, "json_dumps of the metadata of %s", f->path);
    return true;
}

static bool header_parse(StFile *f, json_t *header, Error *e) {
    const char *name;
    json_t *entry;
    f->tensors = xcalloc(json_object_size(header), sizeof *f->tensors);
    json_object_foreach(header, name, entry) {
        bool ok = strcmp(name, "__metadata__") == 0 ? metadata_parse(f, entry, e)
                                                    : tensor_parse(f->path, &f->tensors[f->n++], name, entry, e);
        if (!ok) return false;
    }
    if (f->n) qsort(f->tensors, f->n, sizeof *f->tensors, by_begin);
    return check_tiling(f, e);
}

static bool header_read(StFile *f, Error *e) {
    struct stat st;
    uint64_t length;
    if (fstat(f->fd, &st)) return fail(e, EXIT_DATA, "%s: cannot stat: %s", f->path, strerror(errno));
    if (!S_ISREG(st.st_mode)) return fail(e, EXIT_DATA, "%s is not a regular file; expected a safetensors file", f->path);
    f->file_bytes = (uint64_t)st.st_size;
    if (f->file_bytes < 10) return fail(e, EXIT_DATA, "%s: found %llu bytes, a safetensors file has at least 10", f->path,
                                        (unsigned long long)f->file_bytes);
    if (!pread_full(f->fd, &length, sizeof length, 0)) return fail(e, EXIT_DATA, "%s: cannot read: %s", f->path, read_trouble());
    if (length < 2 || length > HEADER_LIMIT || length > f->file_bytes - 8)
        return fail(e, EXIT_DATA, "%s: the header claims %llu bytes, expected 2 to %llu (file of %llu bytes, limit %d); the file is cut off or not "
                    "safetensors", f->path, (unsigned long long)length,
                    (unsigned long long)(f->file_bytes - 8 < HEADER_LIMIT ? f->file_bytes - 8 : HEADER_LIMIT),
                    (unsigned long long)f->file_bytes, HEADER_LIMIT);
    f->data_start = 8 + length;
    char *text = xmalloc(length);
    json_t *header = NULL;
    json_error_t where;
    bool ok = pread_full(f->fd, text, length, 8);
    if (!ok) fail(e, EXIT_DATA, "%s: cannot read the header: %s", f->path, read_trouble());
    else if (text[0] != '{' || !(header = json_loadb(text, length, JSON_REJECT_DUPLICATES, &where)))
        ok = fail(e, EXIT_DATA, "%s: the header is not a JSON object%s%s; the file is damaged or not safetensors", f->path,
                  text[0] == '{' ? ": " : "", text[0] == '{' ? where.text : "");
    else ok = header_parse(f, header, e);
    json_decref(header);
    free(text);
    return ok;
}

bool st_open(StFile *f, const char *path, Error *e) {
    *f = (StFile){.path = xstrdup(path), .fd = open(path, O_RDONLY | O_CLOEXEC)};
    if (f->fd < 0) {
        fail(e, EXIT_DATA, "cannot open %s: %s", path, strerror(errno));
        st_close(f);
        return false;
    }
    if (header_read(f, e)) return true;
    st_close(f);
    return false;
}

void st_close(StFile *f) {
    if (f->path && f->fd >= 0) close(f->fd);
    for (size_t i = 0; i < f->n; i++) free(f->tensors[i].name);
    free(f->tensors);
    free(f->metadata_json);
    free(f->path);
    *f = (StFile){.fd = -1};
}

const StTensor *st_find(const StFile *f, const char *name) {
    for (size_t i = 0; i < f->n; i++)
        if (strcmp(f->tensors[i].name, name) == 0) return &f->tensors[i];
    return NULL;
}

static float bits_to_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* IEEE 754 binary16, subnormals, infinities and NaN included. */
static float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 1023u;
    if (exponent == 31) return bits_to_float(sign | 0x7f800000u | mantissa << 13);
    if (exponent) return bits_to_float(sign | (exponent + 112) << 23 | mantissa << 13);
    float tiny = (float)mantissa * 0x1p-24f;
    return sign ? -tiny : tiny;
}

/* NOLINTBEGIN(clang-analyzer-core.*): raw is what pread_full has filled */
static void convert(float *values, const void *raw, size_t n, StDtype dtype) {
    for (size_t i = 0; i < n; i++)
        if (dtype == ST_F16) values[i] = half_to_float(((const uint16_t *)raw)[i]);
        else if (dtype == ST_BF16) values[i] = bits_to_float((uint32_t)((const uint16_t *)raw)[i] << 16);
        else values[i] = (float)((const double *)raw)[i];
}
/* NOLINTEND(clang-analyzer-core.*) */

bool st_read_f32(const StFile *f, const StTensor *t, float *values, Error *e) {
    uint64_t begin = f->data_start + t->begin, bytes = t->end - t->begin;
    size_t size = t->dtype == ST_F32 ? 4 : t->dtype == ST_F64 ? 8 : 2, n = (size_t)bytes / size;
    if (t->dtype > ST_F64)
        return fail(e, EXIT_DATA, "%s: tensor %.200s: found dtype %s, expected F32, F16, BF16 or F64", f->path, t->name, t->dtype_name);
    bool ok = true;
    if (t->dtype == ST_F32) ok = pread_full(f->fd, values, (size_t)bytes, begin);
    else {
        double raw[CHUNK / 8];
        for (size_t i = 0, k; ok && i < n; i += k) {
            k = n - i < CHUNK / size ? n - i : CHUNK / size;
            if ((ok = pread_full(f->fd, raw, k * size, begin + i * size))) convert(values + i, raw, k, t->dtype);
        }
    }
    if (!ok) fail(e, EXIT_DATA, "%s: tensor %.200s at byte %llu: cannot read: %s", f->path, t->name, (unsigned long long)begin, read_trouble());
    return ok;
}

static json_t *tensor_entry(const StTensor *t) {
    json_t *shape = json_array();
    for (int i = 0; i < t->n_dims; i++) json_array_append_new(shape, json_integer((json_int_t)t->shape[i]));
    return json_pack("{s:s, s:o, s:[I, I]}", "dtype", t->dtype_name, "shape", shape, "data_offsets", (json_int_t)t->begin,
                     (json_int_t)t->end);
}

bool st_write_header(FileWriter *w, const StTensor *tensors, size_t n, const char *metadata_json, Error *e) {
    json_t *header = json_object();
    if (metadata_json) json_object_set_new(header, "__metadata__", json_loads(metadata_json, JSON_REJECT_DUPLICATES, NULL));
    for (size_t i = 0; i < n; i++) {
        CHECK(tensors[i].begin == (i ? tensors[i - 1].end : 0), "tensor %s leaves a gap", tensors[i].name);
        CHECK(json_object_set_new(header, tensors[i].name, tensor_entry(&tensors[i])) == 0, "tensor name %s", tensors[i].name);
    }
    CHECK(json_object_size(header) == n + (metadata_json != NULL), "duplicate tensor names or bad metadata %s", metadata_json);
    char *text = json_dumps(header, JSON_COMPACT);
    CHECK(text, "json_dumps of %zu tensors", n);
    uint64_t used = strlen(text), length = (used + 7) / 8 * 8;
    bool ok = length <= HEADER_LIMIT ||
              fail(e, EXIT_STORAGE, "a safetensors header of %llu bytes is over the limit of %d", (unsigned long long)length, HEADER_LIMIT);
    ok = ok && file_write(w, &length, sizeof length, e) && file_write(w, text, used, e) && file_write(w, "        ", length - used, e);
    free(text);
    json_decref(header);
    return ok;
}
