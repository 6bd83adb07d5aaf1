/* The safetensors reader: a whole file, or a JSON header that gets its length and some data. */
#include "fuzz.h"
#include "llmc/run/safetensors.h"

enum { MOST_ELEMENTS = 1 << 20 };

static void read_all(const StFile *f) {
    Error e = {0};
    for (size_t i = 0; i < f->n; i++) {
        const StTensor *t = &f->tensors[i];
        CHECK(t->begin <= t->end && f->data_start + t->end <= f->file_bytes, "tensor %s lies outside the file", t->name);
        CHECK(st_find(f, t->name) == t, "tensor %s is not found by its name", t->name);
        uint64_t n = 1;
        for (int d = 0; d < t->n_dims; d++) n = t->shape[d] && n > MOST_ELEMENTS / t->shape[d] ? MOST_ELEMENTS + 1 : n * t->shape[d];
        if (n > MOST_ELEMENTS) continue;
        float *values = xmalloc(n * sizeof *values);
        fuzz_verdict(st_read_f32(f, t, values, &e), &e);
        free(values);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 1) return 0;
    if (data[0] % 2) fuzz_write_safetensors("x.safetensors", data + 1, size - 1);
    else fuzz_write("x.safetensors", data + 1, size - 1);
    char *path = fuzz_path("x.safetensors");
    StFile f;
    Error e = {0};
    if (fuzz_verdict(st_open(&f, path, &e), &e)) {
        read_all(&f);
        st_close(&f);
    }
    free(path);
    return 0;
}
