/* What may not change a bit of the model's results, at shapes that are nobody's favourite: recomputation policy, number of threads, being
 * wrapped by count or trace, a shorter batch than the positions allow. Values are held to references in test_gpt2.cu. */
#include "../../llmc/cpu/cpu.h"
#include "../../llmc/gpt2.h"
#include "test.h"
#include <unistd.h>

typedef struct {
    size_t V, L, H, C, T, B, used; /* used: length of the batch's sequences, at most T */
} Shape;
static const Shape shapes[] = {
    {1, 1, 1, 1, 1, 1, 1},        {2, 1, 1, 3, 2, 1, 2},      {130, 2, 3, 15, 7, 3, 5}, {258, 1, 5, 40, 33, 2, 33},
    {97, 3, 2, 26, 65, 1, 64},    {50, 1, 25, 400, 5, 1, 5}, {1000, 2, 1, 128, 17, 2, 16},
};
enum { SHAPES = sizeof shapes / sizeof *shapes };

static void need(bool ok, const Error *e) { CHECK(ok, "%s", e->text); }

/* Losses of the rows, then all gradients. */
typedef struct {
    float *values;
    size_t n, finite;
} Result;

static Result pass(Backend *be, const Shape *s, Keep keep) {
    Error e = {0};
    GPT2Config c = {.V = s->V, .L = s->L, .H = s->H, .C = s->C, .T = s->T};
    GPT2 model;
    Acts acts;
    size_t rows = s->B * s->used;
    need(gpt2_config_check(&c, &e), &e);
    need(gpt2_create(&model, be, &c, true, &e), &e);
    gpt2_init(&model, 3);
    need(gpt2_acts_create(&acts, &model, s->B, s->used, keep, true, &e), &e);
    int32_t *ids = xmalloc((rows + 1) * sizeof *ids);
    for (size_t i = 0; i <= rows; i++) ids[i] = (int32_t)((i * 2654435761u >> 7) % s->V);
    gpt2_forward_backward(&model, &acts, ids, ids + 1, 1.0f / (float)rows);
    size_t n = model.layout.n_elements;
    Result r = {xmalloc((rows + n) * sizeof(float)), rows + n, 0};
    be->download(be, r.values, acts.losses.p, rows * sizeof(float));
    be->download(be, r.values + rows, model.grads.p, n * sizeof(float));
    for (size_t i = 0; i < r.n; i++) r.finite += isfinite(r.values[i]) != 0;
    free(ids);
    gpt2_acts_destroy(&acts, &model);
    gpt2_destroy(&model);
    return r;
}

static void expect_same(const char *what, const Shape *s, const Result *a, Result b) {
    size_t differing = 0;
    for (size_t i = 0; i < a->n && a->n == b.n; i++) differing += memcmp(&a->values[i], &b.values[i], sizeof(float)) != 0;
    EXPECT(a->n == b.n && differing == 0, "%s, V %zu L %zu H %zu C %zu T %zu B %zu: %zu of %zu values differ", what, s->V, s->L, s->H, s->C, s->used, s->B, differing, a->n);
    EXPECT(a->finite == a->n, "%s: %zu of %zu values are finite", what, a->finite, a->n);
    free(b.values);
}

static Backend *cpu(void) {
    Error e = {0};
    Backend *be = cpu_backend_create(&e);
    need(be != NULL, &e);
    return be;
}

TEST(recompute_policies) {
    Backend *be = cpu();
    for (int i = 0; i < SHAPES; i++) {
        Result all = pass(be, &shapes[i], KEEP_ALL);
        expect_same("same again", &shapes[i], &all, pass(be, &shapes[i], KEEP_ALL));
        expect_same("gelu", &shapes[i], &all, pass(be, &shapes[i], KEEP_NO_GELU));
        expect_same("block", &shapes[i], &all, pass(be, &shapes[i], KEEP_RESIDUAL));
        free(all.values);
    }
    be->destroy(be);
}

TEST(threads_with_own_products) {
#ifdef _OPENMP
    bool blas = cpu_gemm_uses_blas();
    int before = omp_get_max_threads();
    cpu_gemm_use_blas(false);
    Backend *be = cpu();
    for (int i = 0; i < SHAPES; i++) {
        omp_set_num_threads(1);
        Result one = pass(be, &shapes[i], KEEP_ALL);
        for (int n = 2; n <= 5; n += 3) {
            omp_set_num_threads(n);
            expect_same("threads", &shapes[i], &one, pass(be, &shapes[i], KEEP_ALL));
        }
        free(one.values);
    }
    be->destroy(be);
    omp_set_num_threads(before);
    cpu_gemm_use_blas(blas);
#else
    SKIP("built without OpenMP");
#endif
}

TEST(wrappers) {
    Backend *be = cpu();
    Error e = {0};
    char *path = xasprintf("%s/llmc_bits_XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
    int fd = mkstemp(path);
    CHECK(fd >= 0, "mkstemp");
    close(fd);
    for (int i = 0; i < SHAPES; i++) {
        Backend *count = count_backend_create(be), *trace = trace_backend_create(be, path, &e);
        need(trace != NULL, &e);
        Result plain = pass(be, &shapes[i], KEEP_RESIDUAL);
        expect_same("count", &shapes[i], &plain, pass(count, &shapes[i], KEEP_RESIDUAL));
        expect_same("trace", &shapes[i], &plain, pass(trace, &shapes[i], KEEP_RESIDUAL));
        const uint64_t *calls = count_backend_calls(count);
        size_t L = shapes[i].L;
        EXPECT(calls[OP_linear_backward] == 4 * L && calls[OP_attention_forward] == 2 * L && calls[OP_add_norm_backward] == 2 * L + 1,
               "with recomputation by block: %d linear_backward, %d attention_forward, %d add_norm_backward for %zu layers",
               (int)calls[OP_linear_backward], (int)calls[OP_attention_forward], (int)calls[OP_add_norm_backward], L);
        free(plain.values);
        count->destroy(count);
        trace->destroy(trace);
    }
    unlink(path);
    free(path);
    be->destroy(be);
}

/* Positions beyond the length of the batch get no gradient. */
TEST(shorter_batch_than_positions) {
    Backend *be = cpu();
    const Shape long_ = {130, 2, 3, 15, 40, 2, 11};
    Result a = pass(be, &long_, KEEP_ALL);
    size_t rows = 2 * 11, wpe = rows + 256 * 15, nonzero = 0;
    for (size_t i = wpe + 11 * 15; i < wpe + 40 * 15; i++) nonzero += a.values[i] != 0;
    EXPECT(nonzero == 0, "%zu gradients of positions that the batch does not have", nonzero);
    EXPECT(a.values[wpe] != 0 && a.values[wpe + 11 * 15 - 1] != 0, "positions of the batch have no gradient");
    EXPECT(a.finite == a.n, "%zu of %zu values are finite", a.finite, a.n);
    free(a.values);
    be->destroy(be);
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    RUN(recompute_policies);
    RUN(threads_with_own_products);
    RUN(wrappers);
    RUN(shorter_batch_than_positions);
    return test_done();
}
