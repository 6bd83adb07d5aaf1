/* Matrix products, own and OpenBLAS, against a triple loop in double; and the promised order of summation, bit for bit.
 * Error bound: at most twice that of the plain float loop, plus the rounding of the result (DESIGN.md, decision 13). */
#include "llmc/cpu/cpu.h"
#include "llmc/base/rng.h"
#include "test.h"

typedef struct { size_t M, N, K; } Size;
static const Size sizes[] = {{1, 1, 1}, {1, 1, 7}, {1, 50, 1600}, {7, 1, 13}, {5, 17, 256}, {6, 16, 257}, {13, 31, 61},
                             {67, 1600, 3}, {97, 130, 513}, {255, 129, 67}, {1031, 66, 33}, {33, 50, 4099}};
enum { N_SIZES = sizeof sizes / sizeof *sizes };
typedef struct { const char *name; bool ta, tb, add, bias; } Form;
static const Form forms[] = {{"x w^T + b", false, true, false, true}, {"dy w", false, false, false, false},
                             {"+= dy^T x", true, false, true, false}, {"x w^T", false, true, false, false}};
enum { N_FORMS = sizeof forms / sizeof *forms };

static float *values(size_t n, uint32_t stream) {
    float *x = xmalloc(n * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = rng_normal(7, stream, 0, i);
    return x;
}

static Gemm product(const Form *f, Size s, float *c, const float *a, const float *b, const float *bias) {
    return (Gemm){.c = c, .c_row = s.N, .a = a, .a_row = f->ta ? 1 : s.K, .a_col = f->ta ? s.M : 1, .b = b,
                  .b_row = f->tb ? 1 : s.N, .b_col = f->tb ? s.K : 1, .bias = f->bias ? bias : NULL,
                  .M = s.M, .N = s.N, .K = s.K, .add = f->add};
}

/* Largest errors over the result. */
typedef struct { double ours, plain, size; } Errors;
static void compare(Errors *e, const Gemm *g, const float *c0) {
    for (size_t m = 0; m < g->M; m++)
        for (size_t n = 0; n < g->N; n++) {
            double exact = 0;
            float plain = 0, base = g->add ? c0[m * g->N + n] : g->bias ? g->bias[n] : 0;
            for (size_t k = 0; k < g->K; k++) {
                float a = g->a[m * g->a_row + k * g->a_col], b = g->b[k * g->b_row + n * g->b_col];
                exact += (double)a * (double)b;
                plain += a * b;
            }
            exact += (double)base;
            double ours = fabs((double)g->c[m * g->N + n] - exact), off = fabs((double)(plain + base) - exact);
            e->ours = ours <= e->ours ? e->ours : ours; /* a NaN stays */
            e->plain = fmax(e->plain, off);
            e->size = fmax(e->size, fabs(exact));
        }
}

/* Small results are drawn several times, so that the largest error of the plain loop is no accident. */
static void check_product(const Form *f, Size s, const char *which) {
    Errors e = {0};
    float *scratch = xmalloc(cpu_gemm_scratch_bytes());
    for (size_t draws = 0, done = 0; done < 512; draws += 4, done += s.M * s.N) {
        float *a = values(s.M * s.K, (uint32_t)draws), *b = values(s.N * s.K, (uint32_t)draws + 1);
        float *c0 = values(s.M * s.N, (uint32_t)draws + 2), *bias = values(s.N, (uint32_t)draws + 3);
        float *c = xmalloc(s.M * s.N * sizeof *c);
        for (size_t i = 0; i < s.M * s.N; i++) c[i] = f->add ? c0[i] : NAN;
        Gemm g = product(f, s, c, a, b, bias);
        cpu_gemm(&g, scratch);
        compare(&e, &g, c0);
        free(a); free(b); free(c0); free(bias); free(c);
    }
    EXPECT(e.ours <= 2 * e.plain + 0x1p-24 * e.size, "%s %s %zu x %zu x %zu: error %g, plain float loop %g", which, f->name,
           s.M, s.N, s.K, e.ours, e.plain);
    free(scratch);
}

static void check_all(bool blas) {
    if (!cpu_gemm_use_blas(blas)) SKIP("OpenBLAS is not in this build");
    for (int i = 0; i < N_SIZES; i++)
        for (int f = 0; f < N_FORMS; f++) check_product(&forms[f], sizes[i], blas ? "OpenBLAS" : "own");
}
TEST(own_against_double) { check_all(false); }
TEST(openblas_against_double) { check_all(true); }

static void set_threads(int n) {
#ifdef _OPENMP
    omp_set_num_threads(n);
#else
    (void)n;
#endif
}

/* c of a whole product, fresh memory */
static float *run(const Form *f, Size s, const float *a, const float *b, const float *bias) {
    float *c = xmalloc(s.M * s.N * sizeof *c), *scratch = xmalloc(cpu_gemm_scratch_bytes());
    for (size_t i = 0; i < s.M * s.N; i++) c[i] = f->add ? 0.5f : NAN;
    Gemm g = product(f, s, c, a, b, bias);
    cpu_gemm(&g, scratch);
    free(scratch);
    return c;
}

TEST(own_bits_do_not_depend_on_threads) {
    cpu_gemm_use_blas(false);
    int before = cpu_threads();
    for (int i = 0; i < N_SIZES; i++)
        for (int f = 0; f < N_FORMS; f++) {
            Size s = sizes[i];
            float *a = values(s.M * s.K, 1), *b = values(s.N * s.K, 2), *bias = values(s.N, 3), *c[3];
            for (int t = 0; t < 3; t++) {
                set_threads(t + 1);
                c[t] = run(&forms[f], s, a, b, bias);
            }
            for (int t = 1; t < 3; t++)
                EXPECT(!memcmp(c[0], c[t], s.M * s.N * sizeof(float)), "%s %zu x %zu x %zu: 1 and %d threads differ",
                       forms[f].name, s.M, s.N, s.K, t + 1);
            for (int t = 0; t < 3; t++) free(c[t]);
            free(a); free(b); free(bias);
        }
    set_threads(before);
}

/* Any rows and any columns computed alone have the bits that they have in the whole product. */
TEST(own_bits_do_not_depend_on_the_batch) {
    cpu_gemm_use_blas(false);
    Size s = {1031, 131, 600};
    const Form *f = &forms[0];
    float *a = values(s.M * s.K, 1), *b = values(s.N * s.K, 2), *bias = values(s.N, 3), *whole = run(f, s, a, b, bias);
    const size_t parts[][4] = {{0, 1, 0, 131}, {1030, 1, 0, 131}, {5, 7, 0, 131}, {500, 530, 17, 50}, {3, 2, 130, 1}};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        size_t m0 = parts[i][0], M = parts[i][1], n0 = parts[i][2], N = parts[i][3];
        float *c = run(f, (Size){M, N, s.K}, a + m0 * s.K, b + n0 * s.K, bias + n0);
        for (size_t m = 0; m < M; m++)
            EXPECT(!memcmp(c + m * N, whole + (m0 + m) * s.N + n0, N * sizeof *c), "row %zu, columns from %zu", m0 + m, n0);
        free(c);
    }
    free(a); free(b); free(bias); free(whole);
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    RUN(own_against_double);
    RUN(openblas_against_double);
    RUN(own_bits_do_not_depend_on_threads);
    RUN(own_bits_do_not_depend_on_the_batch);
    return test_done();
}
