/* Sampling against exact probabilities, generation against argmax by hand, evaluation against losses computed from logits. */
#include "../../llmc/base/rng.h"
#include "../../llmc/cpu/cpu.h"
#include "../../llmc/run/generate.h"
#include "test.h"
#include <unistd.h>

/* ---- sampling ----------------------------------------------------------------------------------------------------- */

enum { V = 10 };
/* Two ties, one of which the top_k of 4 cuts through: ids 1 and 6 share the fourth place. */
static const float example[V] = {0.5f, 1.0f, -2.0f, 2.0f, 1.5f, -INFINITY, 1.0f, 2.0f, -0.25f, 0.0f};

static int32_t sample(const float *logits, size_t n, Sampling s, uint64_t index) {
    float copy[64];
    memcpy(copy, logits, n * sizeof *copy);
    return sample_token(copy, n, &s, index);
}

/* The exact distribution, by counting who stands before whom instead of sorting. */
static void exact_probabilities(const float *logits, Sampling s, double p[V]) {
    double before[V], total = 0, kept = 0;
    int rank[V];
    for (int i = 0; i < V; i++) {
        rank[i] = 0;
        for (int j = 0; j < V; j++) rank[i] += logits[j] > logits[i] || (logits[j] == logits[i] && j < i);
        p[i] = s.top_k && rank[i] >= s.top_k ? 0 : exp(logits[i] / s.temperature);
        total += p[i];
    }
    for (int i = 0; i < V; i++) {
        before[i] = 0;
        for (int j = 0; j < V; j++) before[i] += rank[j] < rank[i] ? p[j] / total : 0;
    }
    for (int i = 0; i < V; i++) kept += p[i] = before[i] < s.top_p ? p[i] / total : 0;
    for (int i = 0; i < V; i++) p[i] /= kept;
}

TEST(draws_follow_the_exact_distribution) {
    enum { DRAWS = 100000 };
    const Sampling cases[] = {
        {1, 0, 1, 1}, {0.7, 0, 1, 2}, {3, 0, 1, 3}, {1, 4, 1, 4}, {1, 1000, 1, 5}, {1, 0, 0.6, 6}, {1, 0, 0.95, 7},
        {0.8, 4, 0.7, 8}, {1.3, 7, 0.97, 9}, {1, 2, 1, 10}, {1, 2, 0.5, 11}, {1, 2, 0.51, 12}, {1, V, 1, 13}};
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        double p[V], chi = 0;
        int count[V] = {0}, df = -1;
        exact_probabilities(example, cases[c], p);
        for (uint64_t i = 0; i < DRAWS; i++) count[sample(example, V, cases[c], i)]++;
        for (int i = 0; i < V; i++) {
            EXPECT(p[i] > 0 || !count[i], "case %zu: id %d has probability 0 and was drawn %d times", c, i, count[i]);
            if (p[i] > 0) chi += (count[i] - p[i] * DRAWS) * (count[i] - p[i] * DRAWS) / (p[i] * DRAWS), df++;
        }
        EXPECT(chi < df + 4 + 4.5 * sqrt(2.0 * df), "case %zu: chi-square %.1f with %d degrees of freedom", c, chi, df);
    }
}

TEST(top_p_of_a_half_keeps_one_of_two_equals) { /* the smallest set that reaches p */
    for (uint64_t i = 0; i < 1000; i++) {
        EXPECT(sample(example, V, (Sampling){1, 2, 0.5, 1}, i) == 3, "the lower id stays");
        EXPECT(sample(example, V, (Sampling){1, 0, 1e-12, 1}, i) == 3 && sample(example, V, (Sampling){1, 0, 0, 1}, i) == 3, "one always stays");
    }
}

TEST(greedy_is_argmax_with_the_lowest_id) {
    for (uint64_t i = 0; i < 1000; i++) {
        float logits[64];
        for (uint64_t k = 0; k < 64; k++) logits[k] = (float)(rng_u32(3, 0, (uint32_t)i, k) % 20); /* many ties */
        int32_t best = 0;
        for (int32_t k = 63; k >= 0; k--) best = logits[k] >= logits[best] ? k : best;
        EXPECT(sample(logits, 64, (Sampling){0, 0, 1, i}, i) == best, "temperature 0");
        EXPECT(sample(logits, 64, (Sampling){0, 5, 0.3, i}, i) == best, "temperature 0 with filters");
        EXPECT(sample(logits, 64, (Sampling){2, 1, 1, i}, i) == best, "top_k 1");
        EXPECT(sample(logits, 64, (Sampling){1, 0, 1e-9, i}, i) == best, "tiny top_p");
    }
}

TEST(a_draw_depends_on_seed_and_index_alone) {
    int same_index = 0, same_seed = 0;
    for (uint64_t i = 0; i < 1000; i++) {
        Sampling s = {1, 0, 1, 77}, other = {1, 0, 1, 78};
        int32_t id = sample(example, V, s, i);
        sample(example, V, other, i);
        EXPECT(sample(example, V, s, i) == id, "draw %d", (int)i);
        same_index += id == sample(example, V, s, i + 1);
        same_seed += id == sample(example, V, other, i);
    }
    EXPECT(same_index < 400 && same_seed < 400, "%d %d of 1000 alike", same_index, same_seed); /* about 200 by chance */
}

TEST(extreme_numbers) {
    const float large[4] = {-3e38f, 3e38f, 2.9e38f, 0}, close[4] = {88888, 88889, 88888.5f, 0};
    int count[4] = {0}, spread[4] = {0};
    for (uint64_t i = 0; i < 40000; i++) {
        EXPECT(sample(large, 4, (Sampling){1, 0, 1, 1}, i) == 1, "softmax of huge logits");
        EXPECT(sample(close, 4, (Sampling){1e-300, 0, 1, 1}, i) == 1, "tiny temperature is greedy");
        count[sample(close, 4, (Sampling){1, 0, 1, 1}, i)]++;
        spread[sample(close, 4, (Sampling){1e300, 0, 1, 1}, i)]++;
    }
    double z = exp(-1) + 1 + exp(-0.5); /* a large common offset cancels */
    EXPECT(fabs(count[0] / 40000.0 - exp(-1) / z) < 0.012 && fabs(count[1] / 40000.0 - 1 / z) < 0.012 && !count[3], "%d %d %d %d",
           count[0], count[1], count[2], count[3]);
    for (int i = 0; i < 4; i++) EXPECT(abs(spread[i] - 10000) < 450, "huge temperature: id %d %d times", i, spread[i]);
}

TEST(logits_that_are_not_finite) {
    const float nan1[4] = {NAN, 1, NAN, 1}, nans[3] = {NAN, NAN, NAN}, low[3] = {-INFINITY, -INFINITY, -INFINITY};
    const float high[4] = {1, INFINITY, NAN, INFINITY};
    for (uint64_t i = 0; i < 300; i++)
        for (int k = 0; k < 4; k++) {
            Sampling s = {k == 0 ? 0 : 1, k == 2 ? 3 : 0, k == 3 ? 0.9 : 1, i};
            int32_t id = sample(nan1, 4, s, i);
            EXPECT(id == 1 || id == 3, "NaN was drawn: %d", id);
            EXPECT(sample(nans, 3, s, i) == 0 && sample(low, 3, s, i) == 0, "nothing to choose from: id 0");
            EXPECT(sample(high, 4, s, i) == 1, "the lowest id of +infinity");
        }
}

/* ---- a small model ------------------------------------------------------------------------------------------------ */

typedef struct {
    Backend *backend;
    GPT2 model;
} Small;

static bool small_open(Small *s) {
    GPT2Config config = {.V = 61, .L = 2, .H = 2, .C = 24, .T = 13};
    Error e = {0};
    bool ok = (s->backend = cpu_backend_create(&e)) && gpt2_config_check(&config, &e) && gpt2_create(&s->model, s->backend, &config, false, &e);
    EXPECT(ok, "%s", e.text);
    if (!ok) return false;
    gpt2_init(&s->model, 4);
    for (size_t i = 0; i < s->model.layout.n_tensors; i++) { /* larger weights, so that the context matters */
        const ParamTensor *t = &s->model.layout.tensors[i];
        float *values = malloc(t->file_rows * t->cols * sizeof *values);
        gpt2_tensor_get(&s->model, t, PARAM_MASTER, values);
        for (size_t k = 0; t->init != '1' && k < t->file_rows * t->cols; k++) values[k] *= 12;
        gpt2_tensor_set(&s->model, t, PARAM_MASTER, values);
        free(values);
    }
    gpt2_params_changed(&s->model);
    return true;
}

static void small_close(Small *s) {
    gpt2_destroy(&s->model);
    s->backend->destroy(s->backend);
}

static size_t memory_now(const Backend *be) {
    size_t sum = 0;
    for (int i = 0; i < MEM_CLASS_COUNT; i++) sum += i == MEM_SCRATCH ? 0 : be->memory[i]; /* scratch stays planned */
    return sum;
}

/* Logits after a context, with activations made for just that context. */
static void logits_by_hand(GPT2 *model, const int32_t *context, size_t n, float *logits) {
    Acts acts;
    Error e = {0};
    EXPECT(gpt2_acts_create(&acts, model, 1, n, KEEP_ALL, false, &e), "%s", e.text);
    Stat scratch = {model->backend->alloc(model->backend, MEM_OTHER, "logits", model->config.V * sizeof(float), &e)};
    gpt2_forward(model, &acts, context, NULL);
    gpt2_logits(model, &acts, n - 1, scratch, logits);
    model->backend->release(model->backend, scratch.p);
    gpt2_acts_destroy(&acts, model);
}

static int32_t emitted[64];
static size_t n_emitted;
static void emit(void *context, int32_t id) {
    EXPECT(context == &n_emitted, "context");
    emitted[n_emitted++] = id;
}

/* Short and long prompts, past the longest context: each token is sample_token of the logits of the last T tokens. */
TEST(generation_is_sampling_from_the_last_tokens) {
    Small s;
    if (!small_open(&s)) return;
    const Sampling samplings[] = {{0, 0, 1, 0}, {1, 0, 1, 9}, {0.8, 20, 0.9, 10}};
    Error e = {0};
    for (size_t prompt = 1; prompt <= 20; prompt += prompt < 11 ? 5 : 1)
        for (size_t k = 0; k < 3; k++) {
            int32_t tokens[64];
            for (size_t i = 0; i < prompt; i++) tokens[i] = (int32_t)(i * 17 % 61);
            size_t before = memory_now(s.backend);
            n_emitted = 0;
            size_t n = generate(&s.model, tokens, prompt, 22, -1, &samplings[k], emit, &n_emitted, &e);
            EXPECT(n == prompt + 22 && n_emitted == 22, "%zu tokens, %zu emitted: %s", n, n_emitted, e.text);
            EXPECT(!memcmp(emitted, tokens + prompt, 22 * sizeof *tokens), "emitted others than returned");
            EXPECT(memory_now(s.backend) == before, "memory is left");
            for (size_t i = 0; i < 22; i++) {
                float logits[61];
                size_t end = prompt + i, used = end < 13 ? end : 13;
                logits_by_hand(&s.model, tokens + end - used, used, logits);
                int32_t id = sample_token(logits, 61, &samplings[k], i);
                EXPECT(id == tokens[end], "prompt %zu, sampling %zu, token %zu: %d, by hand %d", prompt, k, i, tokens[end], id);
            }
        }
    small_close(&s);
}

/* The cache gives what a forward over the whole context gives, to rounding (DESIGN.md, decision 13): with each sequence cut into a prompt and
 * single tokens at each place. The two differ only in their order of summation: 6e-7 of the largest logit as measured (printed below);
 * the bound leaves a factor of three for other vector widths and libraries. */
TEST(decoding_is_the_forward_of_the_whole) {
    Small s;
    if (!small_open(&s)) return;
    double worst = 0;
    for (size_t prompt = 1; prompt <= 13; prompt++) {
        int32_t tokens[13];
        float found[61], wanted[61];
        Decoder d;
        Error e = {0};
        for (size_t i = 0; i < 13; i++) tokens[i] = (int32_t)((i * 17 + prompt * 5) % 61);
        EXPECT(gpt2_decoder_create(&d, &s.model, 13, prompt, &e), "%s", e.text);
        for (int again = 0; again < 2; again++) { /* a sequence begins anew in a used cache */
            d.length = 0;
            for (size_t n = prompt; n <= 13; n++) {
                gpt2_decode(&s.model, &d, tokens + d.length, n - d.length, found);
                logits_by_hand(&s.model, tokens, n, wanted);
                double largest = 0, error = 0;
                for (int v = 0; v < 61; v++) largest = fmax(largest, fabs((double)wanted[v])), error = fmax(error, fabs((double)found[v] - (double)wanted[v]));
                for (int v = 0; v < 61; v++) EXPECT(isfinite(found[v]), "logit %d", v);
                worst = fmax(worst, error / largest);
                EXPECT(error <= 2e-6 * largest && d.length == n, "prompt %zu, %zu tokens: off by %g of %g", prompt, n, error, largest);
            }
        }
        gpt2_decoder_destroy(&d, &s.model);
    }
    printf("largest difference of a logit, relative to the largest logit: %.2g\n", worst);
    small_close(&s);
}

TEST(generation_stops) {
    Small s;
    if (!small_open(&s)) return;
    const Sampling sampling = {1, 0, 1, 5};
    int32_t whole[64] = {3}, part[64] = {3};
    Error e = {0};
    EXPECT(generate(&s.model, whole, 1, 0, -1, &sampling, NULL, NULL, &e) == 1, "nothing asked for");
    EXPECT(generate(&s.model, whole, 1, 20, -1, &sampling, NULL, NULL, &e) == 21, "%s", e.text);
    size_t first = 1;
    while (whole[first] != whole[8]) first++;
    n_emitted = 0;
    size_t n = generate(&s.model, part, 1, 20, whole[8], &sampling, emit, &n_emitted, &e);
    EXPECT(n == first + 1 && n_emitted == first && !memcmp(part, whole, n * sizeof *part), "%zu tokens, stop at %zu", n, first);
    small_close(&s);
}

/* An allocator that fails at the k-th call: an error and no memory left, whichever call it is. */
static void *(*real_alloc)(Backend *, MemClass, const char *, size_t, Error *);
static int allocations_left;
static void *failing_alloc(Backend *be, MemClass class_, const char *what, size_t bytes, Error *e) {
    if (allocations_left-- > 0) return real_alloc(be, class_, what, bytes, e);
    fail(e, EXIT_DATA, "no memory for %s", what);
    return NULL;
}

TEST(generation_without_memory_is_an_error) {
    Small s;
    if (!small_open(&s)) return;
    const Sampling sampling = {0, 0, 1, 5};
    int32_t tokens[64] = {3};
    size_t before = memory_now(s.backend), n = 0;
    real_alloc = s.backend->alloc;
    s.backend->alloc = failing_alloc;
    int failures = 0;
    for (; n == 0 && failures < 200 && !test_errors; failures += n == 0) {
        Error e = {0};
        allocations_left = failures;
        n = generate(&s.model, tokens, 1, 20, -1, &sampling, NULL, NULL, &e);
        EXPECT(n ? n == 21 && !e.code : e.code == EXIT_DATA && strstr(e.text, "no memory for"), "%s", e.text);
        EXPECT(memory_now(s.backend) == before, "allocation %d: memory is left", failures);
    }
    EXPECT(failures > 10 && n == 21, "%d failures", failures);
    s.backend->alloc = real_alloc;
    small_close(&s);
}

/* ---- evaluation --------------------------------------------------------------------------------------------------- */

static char dir[256], shard[300];
enum { T = 13, WINDOWS = 11 };

static bool data_open(Dataset *d, size_t seq_len) {
    Error e = {0};
    ShardWriter *w = shard_create(shard, 61, &e);
    bool ok = w != NULL;
    for (uint64_t i = 0; ok && i < WINDOWS * T + 1; i++) {
        int32_t id = (int32_t)(rng_u32(12, 0, 0, i) % 61);
        ok = shard_append(w, &id, 1, &e);
    }
    ok = ok && shard_commit(w, &e) && dataset_open(d, shard, seq_len, &e);
    EXPECT(ok, "%s", e.text);
    return ok;
}

/* Mean loss of windows [0, n) from logits: log of the sum of exponentials in double, nothing of the head's own loss. */
static double loss_by_hand(GPT2 *model, const Dataset *d, uint64_t n) {
    double sum = 0;
    int32_t in[T], target[T];
    float logits[61];
    for (uint64_t w = 0; w < n; w++) {
        EXPECT(dataset_window(d, w, 61, in, target, NULL), "window");
        for (size_t t = 0; t < d->T; t++) {
            double z = 0;
            logits_by_hand(model, in, t + 1, logits);
            for (int i = 0; i < 61; i++) z += exp(logits[i]);
            sum += log(z) - logits[target[t]];
        }
    }
    return sum / (double)(n * d->T);
}

TEST(evaluation_is_the_mean_of_the_windows_losses) {
    Small s;
    Dataset d;
    if (!small_open(&s)) return;
    const size_t seq_lens[] = {T, 5};
    for (int k = 0; k < 2 && data_open(&d, seq_lens[k]); k++) {
        const struct { size_t B; uint64_t n_batches, windows; } cases[] = {
            {4, 0, d.n_windows}, {4, 2, 8}, {1, 3, 3}, {4, 1000, d.n_windows}, {64, 1, d.n_windows}, {3, 3, 9}};
        for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
            Acts acts;
            Error e = {0};
            Evaluation v = {0};
            EXPECT(gpt2_acts_create(&acts, &s.model, cases[c].B, d.T, KEEP_NONE, false, &e), "%s", e.text);
            EXPECT(evaluate(&s.model, &acts, &d, cases[c].n_batches, NULL, NULL, &v, &e), "%s", e.text);
            double expected = loss_by_hand(&s.model, &d, cases[c].windows);
            EXPECT(v.tokens == cases[c].windows * d.T, "case %zu: %d tokens", c, (int)v.tokens);
            EXPECT(fabs(v.loss - expected) < 2e-6 * expected, "case %zu: %.9f, by hand %.9f", c, v.loss, expected);
            gpt2_acts_destroy(&acts, &s.model);
        }
        dataset_close(&d);
    }
    small_close(&s);
}

/* The rows' losses of one window after the other, added up in double. */
static double sum_of_windows(GPT2 *model, const Dataset *d) {
    Acts acts;
    int32_t in[T], target[T];
    float losses[T];
    double sum = 0;
    EXPECT(gpt2_acts_create(&acts, model, 1, T, KEEP_NONE, false, NULL), "memory");
    for (uint64_t w = 0; w < d->n_windows; w++) {
        EXPECT(dataset_window(d, w, 61, in, target, NULL), "window");
        gpt2_forward(model, &acts, in, target);
        model->backend->download(model->backend, losses, acts.losses.p, sizeof losses);
        for (size_t t = 0; t < T; t++) sum += losses[t];
    }
    gpt2_acts_destroy(&acts, model);
    return sum / (double)(d->n_windows * T);
}

TEST(evaluation_does_not_depend_on_the_batch) {
    Small s;
    Dataset d;
    if (!small_open(&s) || !data_open(&d, T)) return;
    bool blas = cpu_gemm_uses_blas();
    cpu_gemm_use_blas(false); /* OpenBLAS does not promise a row the same bits in another batch */
    double expected = sum_of_windows(&s.model, &d);
    const size_t batches[] = {1, 2, 3, 5, 8, 11, 64};
    for (size_t k = 0; k < 7; k++) {
        Acts acts;
        Error e = {0};
        Evaluation v = {0};
        EXPECT(gpt2_acts_create(&acts, &s.model, batches[k], T, KEEP_NONE, false, &e), "%s", e.text);
        EXPECT(evaluate(&s.model, &acts, &d, 0, NULL, NULL, &v, &e), "%s", e.text);
        EXPECT(v.loss == expected && v.loss > 1, "B %zu: %.17g, window by window: %.17g", batches[k], v.loss, expected);
        gpt2_acts_destroy(&acts, &s.model);
    }
    cpu_gemm_use_blas(blas);
    dataset_close(&d);
    small_close(&s);
}

TEST(evaluation_reports_bad_data) {
    Small s;
    Dataset d;
    if (!small_open(&s) || !data_open(&d, T)) return;
    FILE *f = fopen(shard, "r+b");
    EXPECT(f && !fseek(f, 1024 + 2 * 100, SEEK_SET) && fwrite("\x3d\0", 1, 2, f) == 2 && !fclose(f), "write"); /* id 61 */
    Acts acts;
    Error e = {0};
    Evaluation v = {-1, 7};
    EXPECT(gpt2_acts_create(&acts, &s.model, 2, T, KEEP_NONE, false, &e), "%s", e.text);
    EXPECT(!evaluate(&s.model, &acts, &d, 0, NULL, NULL, &v, &e) && e.code == EXIT_DATA && strstr(e.text, "byte 1224: found token id 61"), "%s", e.text);
    EXPECT(evaluate(&s.model, &acts, &d, 3, NULL, NULL, &v, &e) && v.tokens == 6 * T, "the windows before it are fine");
    gpt2_acts_destroy(&acts, &s.model);
    dataset_close(&d);
    small_close(&s);
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    snprintf(dir, sizeof dir, "%s/llmc_generate_XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
    if (!mkdtemp(dir)) return 1;
    snprintf(shard, sizeof shard, "%s/val.bin", dir);
    RUN(draws_follow_the_exact_distribution);
    RUN(top_p_of_a_half_keeps_one_of_two_equals);
    RUN(greedy_is_argmax_with_the_lowest_id);
    RUN(a_draw_depends_on_seed_and_index_alone);
    RUN(extreme_numbers);
    RUN(logits_that_are_not_finite);
    RUN(generation_is_sampling_from_the_last_tokens);
    RUN(decoding_is_the_forward_of_the_whole);
    RUN(generation_stops);
    RUN(generation_without_memory_is_an_error);
    RUN(evaluation_is_the_mean_of_the_windows_losses);
    RUN(evaluation_does_not_depend_on_the_batch);
    RUN(evaluation_reports_bad_data);
    unlink(shard);
    rmdir(dir);
    return test_done();
}
