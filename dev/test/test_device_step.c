/* The head and the step's ops of the CUDA backend, on a GPU or emulated, where a list of shapes does not reach: NaN and ignored rows, more segments than one launch
 * takes, pointers that are not aligned, skipped and recorded steps, the values at the edge of stochastic rounding. */
#include "llmc/base/rng.h"
#include "backends.h"
#include <math.h>

#ifdef DEVICE_NAME
static Backend *gpu, *cpu;

static void *room(Backend *b, size_t bytes, const void *content) {
    Error e = {0};
    void *p = b->alloc(b, MEM_OTHER, "test", bytes, &e);
    CHECK(p, "%s", e.text);
    if (content) b->upload(b, p, content, bytes);
    return p;
}

static void run(Backend *b, OpId op, const void *args) {
    Error e = {0};
    b->plan_begin(b);
    op_run(b, op, args);
    CHECK(b->plan_end(b, &e), "%s", e.text);
    op_run(b, op, args);
}

static float uniform(uint32_t stream, size_t i) { return (float)(2 * rng_uniform(9, stream, 0, i) - 1); }

static size_t put_elems(char *host, const float *x, size_t n) { /* truncated where the compute type is bf16; returns the bytes */
    for (size_t i = 0; i < n; i++) memcpy(host + i * gpu->elem_bytes, (const char *)&x[i] + 4 - gpu->elem_bytes, gpu->elem_bytes);
    return n * gpu->elem_bytes;
}

static float elem_at(const char *host, size_t i) {
    float x = 0;
    memcpy((char *)&x + 4 - gpu->elem_bytes, host + i * gpu->elem_bytes, gpu->elem_bytes);
    return x;
}

/* ---- head ------------------------------------------------------------------------------------------------------------- */
enum { N = 6, C = 8, V = 1003, VP = 1024 };

/* Losses and dx of N rows; row `bad` of x begins with `value`. */
static void head(float *losses, float *dx, const int32_t *targets, size_t bad, float value) {
    float x[N * C], w[VP * C] = {0};
    char host[VP * C * 4], back[N * C * 4];
    HeadLoss a = {.N = N, .C = C, .V = V, .Vp = VP, .scale = 1.0f / N, .chunk = 4};
    for (size_t i = 0; i < N * C; i++) x[i] = uniform(1, i);
    for (size_t i = 0; i < V * C; i++) w[i] = uniform(2, i);
    x[bad * C] = value;
    a.x.p = room(gpu, put_elems(host, x, N * C), host);
    a.w.p = room(gpu, put_elems(host, w, VP * C), host);
    a.losses.p = room(gpu, N * 4, NULL);
    a.dx.p = room(gpu, N * C * gpu->elem_bytes, NULL);
    a.dw.p = room(gpu, VP * C * 4, NULL);
    a.targets.p = room(gpu, N * 4, targets);
    run(gpu, OP_head_loss, &a);
    gpu->download(gpu, losses, a.losses.p, N * 4);
    gpu->download(gpu, back, a.dx.p, N * C * gpu->elem_bytes);
    for (size_t i = 0; i < N * C; i++) dx[i] = elem_at(back, i);
    void *const all[] = {a.x.p, a.w.p, a.losses.p, a.dx.p, a.dw.p, a.targets.p};
    for (int i = 0; i < 6; i++) gpu->release(gpu, all[i]);
}

TEST(a_bad_logit_shows_in_its_row_alone) {
    const int32_t targets[N] = {5, 0, V - 1, 700, 8, 1};
    const float values[] = {NAN, INFINITY, -INFINITY};
    for (size_t bad = 0; bad < N; bad++)
        for (int k = 0; k < 3; k++) {
            float losses[2][N], dx[2][N * C];
            head(losses[0], dx[0], targets, bad, 0.5f);
            head(losses[1], dx[1], targets, bad, values[k]);
            for (size_t n = 0; n < N; n++) {
                bool same = losses[0][n] == losses[1][n] && !memcmp(dx[0] + n * C, dx[1] + n * C, C * 4);
                if (n != bad) EXPECT(same, "row %zu changes with row %zu", n, bad);
                else EXPECT(!isfinite(losses[1][n]) && !isfinite(dx[1][n * C + 1]), "row %zu, %g: loss %g, dx %g", n, (double)values[k],
                            (double)losses[1][n], (double)dx[1][n * C + 1]);
            }
        }
}

TEST(ignored_rows_count_for_nothing) {
    const int32_t targets[N] = {-1, 0, -1, 700, -1, -1};
    float losses[N], dx[N * C];
    head(losses, dx, targets, 2, NAN);
    for (size_t i = 0; i < N * C; i++)
        if (targets[i / C] < 0) EXPECT(losses[i / C] == 0 && dx[i] == 0, "row %zu: loss %g, dx %g", i / C, (double)losses[i / C], (double)dx[i]);
        else EXPECT(losses[i / C] > 0 && dx[i] != 0, "row %zu: loss %g, dx %g", i / C, (double)losses[i / C], (double)dx[i]);
}

/* ---- a step ------------------------------------------------------------------------------------------------------------ */
static const StepState example = {
    .lr = 0.01f, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .weight_decay = 0.1f, .grad_clip = 1, .loss_limit = INFINITY, .norm_limit = INFINITY,
    .loss_rows = 24, .seed = 3, .step = 5, .loss_sum = 36.5, .sum_squares = 16, .grad_scale = 0.25f, .updates = 4};

/* The flat arrays of an optimizer on a backend, `shift` elements after their blocks' begin. */
typedef struct {
    Backend *b;
    size_t n, shift;
    void *blocks[5];          /* params, master, m, v, grads */
    float *host[5];
    AdamW a;
} Flat;

static Flat flat_create(Backend *b, size_t n, size_t shift, const StepState *s) {
    Flat f = {.b = b, .n = n, .shift = shift};
    for (int k = 0; k < 5; k++) {
        f.host[k] = xcalloc(n + shift, sizeof(float));
        for (size_t i = 0; i < n; i++) f.host[k][shift + i] = k == 3 ? 0.01f * (uniform(3, i) + 1) : uniform(10 + (uint32_t)k, i);
        f.blocks[k] = room(b, (n + shift) * sizeof(float), k ? f.host[k] : NULL);
    }
    f.a = (AdamW){.params = {(char *)f.blocks[0] + shift * b->elem_bytes}, .master = {(float *)f.blocks[1] + shift}, .m = {(float *)f.blocks[2] + shift},
                  .v = {(float *)f.blocks[3] + shift}, .grads = {(float *)f.blocks[4] + shift}, .step = {room(b, sizeof *s, s)}, .n = n};
    return f;
}

static void flat_read(Flat *f) {
    for (int k = 0; k < 5; k++) f->b->download(f->b, f->host[k], f->blocks[k], (f->n + f->shift) * (k ? 4 : f->b->elem_bytes));
}

static void flat_destroy(Flat *f) {
    for (int k = 0; k < 5; k++) f->b->release(f->b, f->blocks[k]), free(f->host[k]);
    f->b->release(f->b, f->a.step.p);
}

/* Bits of params, master, m, v, as far as both shifts have them. */
static bool flat_same(const Flat *x, const Flat *y) {
    for (int k = 0; k < 4; k++) {
        size_t each = k ? 4 : x->b->elem_bytes;
        if (memcmp((char *)x->host[k] + x->shift * each, (char *)y->host[k] + y->shift * each, x->n * each)) return false;
    }
    return true;
}

/* Many short segments of odd lengths with gaps, some empty; returns how many. */
static size_t odd_segments(AdamWSegment *segments, size_t most, size_t n) {
    size_t count = 0;
    for (size_t at = 1; count < most && at < n; count++) {
        size_t length = rng_u32(5, 0, 0, count) % 41, room_left = n - at;
        segments[count] = (AdamWSegment){at, length < room_left ? length : room_left, count % 3 == 0};
        at += length + rng_u32(5, 0, 1, count) % 3;
    }
    return count;
}

TEST(adamw_takes_more_segments_than_a_launch) {
    enum { MOST = 1000, LENGTH = 30011 };
    AdamWSegment segments[MOST];
    size_t count = odd_segments(segments, MOST, LENGTH), last = segments[count - 1].first + segments[count - 1].n;
    Flat ours = flat_create(gpu, LENGTH, 0, &example), exact = flat_create(cpu, LENGTH, 0, &example);
    Flat *const both[] = {&ours, &exact};
    for (int k = 0; k < 2; k++) {
        both[k]->a.segments = segments, both[k]->a.n_segments = count;
        run(both[k]->b, OP_adamw, &both[k]->a);
        flat_read(both[k]);
    }
    EXPECT(count > 3 * 192 && last > 10000, "%zu segments up to %zu", count, last);
    for (int k = 1; k < 4; k++)
        for (size_t i = 0; i < LENGTH; i++) {
            float x = ours.host[k][i], y = exact.host[k][i];
            EXPECT(fabsf(x - y) <= 0x1p-21f * (fabsf(y) + 0.01f), "array %d, element %zu: %.9g, on the cpu %.9g", k, i, (double)x, (double)y);
        }
    flat_destroy(&ours), flat_destroy(&exact);
}

TEST(alignment_changes_no_bit) {
    enum { LENGTH = 40003 };
    const AdamWSegment segments[2] = {{0, 20001, 1}, {20001, 20002, 0}};
    StepState s = example, sums[2];
    s.rounding = ROUND_STOCHASTIC;
    Flat f[2] = {flat_create(gpu, LENGTH, 0, &s), flat_create(gpu, LENGTH, 1, &s)};
    for (int k = 0; k < 2; k++) {
        f[k].a.segments = segments, f[k].a.n_segments = 2;
        run(gpu, OP_sum_squares, &(SumSquares){.step = f[k].a.step, .grads = f[k].a.grads, .n = LENGTH});
        run(gpu, OP_loss_sum, &(LossSum){.step = f[k].a.step, .losses = {f[k].a.grads.p}, .n = LENGTH});
        run(gpu, OP_adamw, &f[k].a);
        gpu->download(gpu, &sums[k], f[k].a.step.p, sizeof s);
        flat_read(&f[k]);
        run(gpu, OP_cast_params, &(CastParams){.out = f[k].a.params, .in = f[k].a.master, .n = LENGTH, .rounding = s.rounding, .seed = s.seed,
                                               .updates = s.updates});
    }
    EXPECT(sums[0].sum_squares > 16 && !memcmp(&sums[0], &sums[1], sizeof s), "sums %.17g %.17g", sums[0].sum_squares, sums[1].sum_squares);
    EXPECT(flat_same(&f[0], &f[1]), "adamw");
    for (int k = 0; k < 2; k++) {
        char *cast = xcalloc(LENGTH, gpu->elem_bytes);
        gpu->download(gpu, cast, f[k].a.params.p, LENGTH * gpu->elem_bytes);
        EXPECT(!memcmp(cast, (char *)f[k].host[0] + f[k].shift * gpu->elem_bytes, LENGTH * gpu->elem_bytes), "cast_params, shift %d", k);
        free(cast);
    }
    flat_destroy(&f[0]), flat_destroy(&f[1]);
}

/* A whole step, issued or replayed: the numbers come from the device each time. Its third update is skipped. */
static void steps(Flat *f, uint64_t key) {
    const SumSquares sum = {.step = f->a.step, .grads = f->a.grads, .n = f->n};
    const StepDecide decide = {.step = f->a.step};
    Error e = {0};
    gpu->plan_begin(gpu);
    gpu->sum_squares(gpu, &sum), gpu->step_decide(gpu, &decide), gpu->adamw(gpu, &f->a);
    CHECK(gpu->plan_end(gpu, &e), "%s", e.text);
    for (int i = 0; i < 5; i++) {
        StepState s;
        gpu->download(gpu, &s, f->a.step.p, sizeof s);
        s.sum_squares = 0, s.loss_sum = i == 2 ? NAN : 30, s.lr = 0.01f / (float)(i + 1);
        gpu->upload(gpu, f->a.step.p, &s, sizeof s);
        if (key && gpu->replay(gpu, key)) continue;
        gpu->sum_squares(gpu, &sum), gpu->step_decide(gpu, &decide), gpu->adamw(gpu, &f->a);
        if (key) gpu->record_end(gpu, key);
    }
}

TEST(recorded_steps_have_the_bits_of_issued_ones) {
    const AdamWSegment segments[1] = {{3, 9990, 1}};
    StepState s[2];
    Flat f[2] = {flat_create(gpu, 10000, 0, &example), flat_create(gpu, 10000, 0, &example)};
    for (int k = 0; k < 2; k++) {
        f[k].a.segments = segments, f[k].a.n_segments = 1;
        steps(&f[k], k ? 77 : 0);
        flat_read(&f[k]);
        gpu->download(gpu, &s[k], f[k].a.step.p, sizeof *s);
    }
    EXPECT(flat_same(&f[0], &f[1]) && !memcmp(&s[0], &s[1], sizeof *s), "they differ");
    EXPECT(s[0].updates == example.updates + 4, "%lld updates: the one with a NaN was to be skipped", (long long)s[0].updates);
    flat_destroy(&f[0]), flat_destroy(&f[1]);
}

TEST(a_skipped_step_changes_nothing) {
    const AdamWSegment segments[1] = {{0, 1000, 1}};
    StepState s = example;
    s.skip = SKIP_NORM;
    Flat before = flat_create(gpu, 1000, 0, &s), after = flat_create(gpu, 1000, 0, &s);
    after.a.segments = segments, after.a.n_segments = 1;
    run(gpu, OP_adamw, &after.a);
    flat_read(&before), flat_read(&after);
    EXPECT(flat_same(&before, &after), "it does");
    flat_destroy(&before), flat_destroy(&after);
}

TEST(stochastic_rounding_at_the_edges) {
    const float exact[] = {0, -0.0f, 1, -1.5f, 0x1p-126f, 0x1.fep127f, INFINITY, -INFINITY, 0x1p-133f};
    enum { EXACT = sizeof exact / sizeof *exact, TRIES = 1000 };
    float in[TRIES * 4];
    char back[sizeof in];
    for (size_t i = 0; i < TRIES * 4; i++) in[i] = i % 4 ? exact[i % EXACT] : i % 8 ? NAN : 1 + 0x1p-9f; /* a quarter of the way to the next */
    uint32_t quiet_low = 0x7f800001u;      /* a NaN that lies in the bits cut off */
    memcpy(&in[4], &quiet_low, 4);
    CastParams a = {.out = {room(gpu, sizeof in, NULL)}, .in = {room(gpu, sizeof in, in)}, .n = TRIES * 4, .rounding = ROUND_STOCHASTIC, .seed = 11,
                    .updates = 3};
    run(gpu, OP_cast_params, &a);
    gpu->download(gpu, back, a.out.p, TRIES * 4 * gpu->elem_bytes);
    size_t up = 0, quarters = TRIES / 2;
    for (size_t i = 0; i < TRIES * 4; i++) {
        float x = elem_at(back, i);
        if (i % 4) EXPECT(!memcmp(&x, &in[i], 4), "element %zu: %g for %g", i, (double)x, (double)in[i]);
        else if (i % 8) EXPECT(isnan(x), "element %zu: %g for a NaN", i, (double)x);
        else up += x == 1 + 0x1p-7f;
    }
    if (gpu->elem_bytes == 2) EXPECT(fabs((double)up - 0.25 * (double)quarters) < 6 * sqrt(0.1875 * (double)quarters), "%zu of %zu up", up, quarters);
    gpu->release(gpu, a.out.p), gpu->release(gpu, a.in.p);
}

TEST(stochastic_rounding_takes_the_words_of_the_contract) {
    enum { LENGTH = 1003 };
    float in[LENGTH];
    char back[sizeof in];
    for (size_t i = 0; i < LENGTH; i++) in[i] = uniform(4, i);
    CastParams a = {.out = {room(gpu, sizeof in, NULL)}, .in = {room(gpu, sizeof in, in)}, .n = LENGTH, .rounding = ROUND_STOCHASTIC, .seed = 11,
                    .updates = 3};
    run(gpu, OP_cast_params, &a);
    gpu->download(gpu, back, a.out.p, LENGTH * gpu->elem_bytes);
    for (size_t i = 0; i < LENGTH && gpu->elem_bytes == 2; i++) {
        uint32_t bits;
        uint16_t found;
        memcpy(&bits, &in[i], 4), memcpy(&found, back + 2 * i, 2);
        uint32_t want = (bits + (rng4(11, RNG_ROUND, 3, i / 4).v[i % 4] & 0xffff)) >> 16;
        EXPECT(found == want, "element %zu: %04x, wanted %04x", i, found, want);
    }
    gpu->release(gpu, a.out.p), gpu->release(gpu, a.in.p);
}

#define RUN_ON(test) (snprintf(title, sizeof title, "%s, %s", name, #test), test_run(title, test_##test))
static void run_on(const char *name, Backend *device) {
    Error e = {0};
    gpu = device, cpu = cpu_backend_create(&e);
    CHECK(cpu, "%s", e.text);
    char title[128];
    RUN_ON(a_bad_logit_shows_in_its_row_alone);
    RUN_ON(ignored_rows_count_for_nothing);
    RUN_ON(adamw_takes_more_segments_than_a_launch);
    RUN_ON(alignment_changes_no_bit);
    RUN_ON(recorded_steps_have_the_bits_of_issued_ones);
    RUN_ON(a_skipped_step_changes_nothing);
    RUN_ON(stochastic_rounding_at_the_edges);
    RUN_ON(stochastic_rounding_takes_the_words_of_the_contract);
    gpu->destroy(gpu);
    cpu->destroy(cpu);
}

#else
#define run_on NULL
#endif

int main(int argc, char **argv) { return device_main(argc, argv, run_on); }
