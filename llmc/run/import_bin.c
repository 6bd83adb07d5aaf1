/* llm.c weights files: a header of 256 int32 (20240326; version 3 float32, 5 bfloat16; T, V, L, heads, C, padded V), then the parameters
 * in the order of GPT2_PARAMS, each stacked over the layers, matrices (out, in), wte with its padded rows. Source: FORMATS.md. */
#include "checkpoint_private.h"
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { BIN_MAGIC = 20240326, BIN_HEADER = 1024, BIN_FP32 = 3, BIN_BF16 = 5 };

typedef struct {
    int fd;
    unsigned element_bytes;
    GPT2Config config;        /* Vp as in the file */
} BinFile;

bool bin_is_weights(const char *path) {
    int32_t magic = 0;
    int fd = path_is_dir(path) ? -1 : open(path, O_RDONLY | O_CLOEXEC);
    bool read_it = fd >= 0 && pread_full(fd, &magic, sizeof magic, 0);
    if (fd >= 0) close(fd);
    return read_it && magic == BIN_MAGIC;
}

/* Elements of one layer of parameter `id` as the file holds it; *stacked: how many layers. */
static uint64_t bin_elements(const GPT2Config *c, ParamId id, uint64_t *stacked) {
#define ELEMENTS(field, name, scope, rows, columns, conv, init, decay)                                                 \
    case PARAM_##field: *stacked = (scope) == UNIT_BLOCK ? c->L : 1; return (uint64_t)(rows) * (columns);
    switch (id) {
        GPT2_PARAMS(ELEMENTS)
    case PARAM_COUNT: break;
    }
#undef ELEMENTS
    return 0;
}

static uint64_t bin_offset(const BinFile *b, ParamId id) {
    uint64_t elements = 0, layers, n;
    for (ParamId i = 0; i < id; i++) {
        n = bin_elements(&b->config, i, &layers);
        elements += n * layers;
    }
    return BIN_HEADER + elements * b->element_bytes;
}

static bool bin_header(BinFile *b, const char *path, Error *e) {
    int32_t h[256];
    struct stat st;
    if (fstat(b->fd, &st) || !pread_full(b->fd, h, sizeof h, 0))
        return fail(e, EXIT_DATA, "%s: found no full header of 1024 bytes; the file is cut off", path);
    if (h[1] != BIN_FP32 && h[1] != BIN_BF16)
        return fail(e, EXIT_DATA, "%s: found weights of version %d, supported are 3 (float32) and 5 (bfloat16)", path, h[1]);
    for (int i = 2; i <= 7; i++)
        if (h[i] < 1 || h[i] > 1 << 24)
            return fail(e, EXIT_DATA, "%s: header field %d is %d, expected 1 to 16777216; the file is damaged", path, i, h[i]);
    if (h[7] < h[3]) return fail(e, EXIT_DATA, "%s: padded vocabulary %d is smaller than the vocabulary %d; the file is damaged", path, h[7], h[3]);
    b->config = (GPT2Config){.T = (size_t)h[2], .V = (size_t)h[3], .L = (size_t)h[4], .H = (size_t)h[5], .C = (size_t)h[6], .Vp = (size_t)h[7]};
    b->element_bytes = h[1] == BIN_FP32 ? 4 : 2;
    GPT2Config checked = b->config;
    if (!gpt2_config_check(&checked, e)) {
        if (e) e->code = EXIT_DATA;
        return fail_in(e, "%s", path);
    }
    double parameters = ((double)h[7] + h[2]) * h[6] + (double)h[4] * (12.0 * h[6] * h[6] + 13.0 * h[6]) + 2.0 * h[6];
    uint64_t expected = parameters < 1e15 ? bin_offset(b, PARAM_COUNT) : UINT64_MAX;
    return (uint64_t)st.st_size == expected ||
           fail(e, EXIT_DATA, "%s: found %llu bytes, expected %llu for T %d, V %d (padded %d), L %d, C %d; the file is cut off or damaged", path,
                (unsigned long long)st.st_size, (unsigned long long)expected, h[2], h[3], h[7], h[4], h[6]);
}

static bool bin_open(BinFile *b, const char *path, Error *e) {
    *b = (BinFile){.fd = open(path, O_RDONLY | O_CLOEXEC)};
    if (b->fd < 0) return fail(e, EXIT_DATA, "cannot open %s: %s", path, strerror(errno));
    if (bin_header(b, path, e)) return true;
    close(b->fd);
    return false;
}

bool bin_config(const char *path, GPT2Config *config, Error *e) {
    BinFile b;
    if (!bin_open(&b, path, e)) return false;
    close(b.fd);
    *config = b.config;
    return gpt2_config_check(config, e);
}

/* Widens n bfloat16 values in place, from the last to the first. */
static void widen(float *values, size_t n) {
    for (size_t i = n; i-- > 0;) {
        uint16_t half;
        memcpy(&half, (const char *)values + 2 * i, sizeof half);
        uint32_t bits = (uint32_t)half << 16;
        memcpy(&values[i], &bits, sizeof bits);
    }
}

static bool bin_tensor(const BinFile *b, const char *path, GPT2 *model, const ParamTensor *t, Error *e) {
    uint64_t layers, stride = bin_elements(&b->config, t->id, &layers);
    uint64_t layer = t->unit >= 1 && t->unit <= b->config.L ? t->unit - 1 : 0;
    uint64_t at = bin_offset(b, t->id) + layer * stride * b->element_bytes;
    size_t n = t->file_rows * t->cols;
    float *values = xmalloc(n * sizeof *values);
    bool ok = pread_full(b->fd, values, n * b->element_bytes, at) ||
              fail(e, EXIT_DATA, "%s: tensor %s at byte %llu: cannot read: %s", path, t->name, (unsigned long long)at, strerror(errno));
    if (ok && b->element_bytes == 2) widen(values, n);
    for (size_t i = 0; ok && i < n; i++)
        if (!isfinite(values[i]))
            ok = fail(e, EXIT_DATA, "%s: tensor %s: element %zu (byte %llu) is %g; weights must be finite", path, t->name, i,
                      (unsigned long long)(at + i * b->element_bytes), (double)values[i]);
    /* The file's (out, in) is the layout in memory. */
    if (ok) model->backend->upload(model->backend, model->master.p + t->offset, values, n * sizeof *values);
    free(values);
    return ok;
}

bool bin_weights(const char *path, GPT2 *model, Error *e) {
    BinFile b;
    const GPT2Config *c = &model->config;
    if (!bin_open(&b, path, e)) return false;
    const GPT2Config *f = &b.config;
    bool ok = (f->V == c->V && f->T == c->T && f->L == c->L && f->H == c->H && f->C == c->C) ||
              fail(e, EXIT_DATA, "%s: found T %zu, V %zu, L %zu, H %zu, C %zu; the model has T %zu, V %zu, L %zu, H %zu, C %zu", path, f->T, f->V,
                   f->L, f->H, f->C, c->T, c->V, c->L, c->H, c->C);
    for (size_t i = 0; ok && i < model->layout.n_tensors; i++) ok = bin_tensor(&b, path, model, &model->layout.tensors[i], e);
    if (ok) gpt2_params_changed(model);
    close(b.fd);
    return ok;
}
