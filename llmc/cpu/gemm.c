/* Matrix products: OpenBLAS where it is in the build, and our own, packed and tiled for registers and caches (the scheme
 * of Goto and van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication"). The order of summation of our own
 * is promised in cpu.h. Knows no op. */
#include "cpu.h"
#include "simd.h"
#ifdef LLMC_OPENBLAS
#include <cblas.h>
#endif

/* A is packed in strips of MR rows, B in strips of NR columns, both cut every KC terms: a piece of a strip of B (KC x NR)
 * stays in the first-level cache while the pieces of A stream past it. KC is part of the promised order of summation. */
enum { KC = 256, A_FLOATS = 512 * 1024, GROUP_A = 8, GROUP_B = 4 };

size_t cpu_gemm_scratch_bytes(void) { return sizeof(float) * (A_FLOATS + (size_t)cpu_threads() * GROUP_B * KC * NR); }

#ifdef LLMC_OPENBLAS
static bool use_blas = true;
#else
static bool use_blas;
#endif
bool cpu_gemm_uses_blas(void) { return use_blas; }
bool cpu_gemm_use_blas(bool on) {
#ifdef LLMC_OPENBLAS
    use_blas = on;
    return true;
#else
    return !on;
#endif
}

/* strip[k * width + i] = x[i * row + k * col] for i < n, 0 for n <= i < width. The prefetch is for rows of x that lie far
 * apart, which the hardware does not foresee. */
SIMD_FN void pack_strip(float *strip, size_t width, const float *x, size_t row, size_t col, size_t n, size_t K) {
    if (n < width) memset(strip, 0, K * width * sizeof *strip);
    if (row != 1) {
        transpose(strip, width, x, row, n, K);
        return;
    }
    for (size_t k = 0; n < width && k < K; k++) memcpy(strip + k * width, x + k * col, n * sizeof *x);
    for (size_t k = 0; n == width && k < K; k++) {
        __builtin_prefetch(x + (k + 16) * col);
        memcpy(strip + k * width, x + k * col, width * sizeof *x);
    }
}

/* The next `strips` strips of x, which has n rows left, KC * width floats apart. Where the terms of a row are not neighbours,
 * a few terms at a time for all strips, so that a cache line that several strips share is read once. */
SIMD_FN void pack_strips(float *to, size_t width, size_t strips, const float *x, size_t row, size_t col, size_t n, size_t K) {
    size_t terms = row == 1 ? 8 : K;
    for (size_t k = 0; k < K; k += terms)
        for (size_t s = 0; s < strips; s++)
            pack_strip(to + s * KC * width + k * width, width, x + s * width * row + k * col, row, col,
                       size_min(width, n - s * width), size_min(terms, K - k));
}

/* One tile of c, at most MR x NR: base + a b. */
static void own_tile(const Gemm *g, size_t m, size_t n, size_t K, bool first, const float *a, const float *b) {
    size_t rows = size_min(MR, g->M - m), cols = size_min(NR, g->N - n);
    float *c = g->c + m * g->c_row + n;
    for (size_t r = 0; r < rows; r++) __builtin_prefetch(c + r * g->c_row, 1);
    vf t[MR][2];
    tile_product(t, K, a, 1, MR, b, NR);
    bool load = g->add || !first;
    float bias[NR] = {0}, out[NR];
    if (!load && g->bias) memcpy(bias, g->bias + n, cols * sizeof *bias);
    for (size_t r = 0; r < rows; r++, c += g->c_row) {
        const float *base = load ? c : bias;
        if (cols < NR) base = memcpy(out, base, cols * sizeof *out);
        vf low = vf_load(base) + t[r][0], high = vf_load(base + VW) + t[r][1];
        if (cols < NR) {
            vf_store(out, low);
            vf_store(out + VW, high);
            memcpy(c, out, cols * sizeof *out);
        } else {
            vf_store(c, low);
            vf_store(c + VW, high);
        }
    }
}

/* Rows [m0, m0+M) and terms [k0, k0+K) of the product: what is packed of A at a time. */
typedef struct {
    size_t m0, M, k0, K, strips;
    float *packed;            /* piece k of strip i: KC x MR floats at (k / KC * strips + i) * KC * MR */
} Part;

static void pack_a(const Gemm *g, const Part *p, size_t k, size_t i) {
    pack_strips(p->packed + (k / KC * p->strips + i) * KC * MR, MR, size_min(GROUP_A, p->strips - i),
                g->a + (p->m0 + i * MR) * g->a_row + (p->k0 + k) * g->a_col, g->a_row, g->a_col, p->M - i * MR,
                size_min(KC, p->K - k));
}

/* Strips [i, end) of the part times the GROUP_B strips of columns from n on. */
static void own_columns(const Gemm *g, const Part *p, size_t i, size_t end, size_t n, float *pb) {
    size_t columns = size_min(GROUP_B, div_up(g->N - n, NR));
    for (size_t k = 0; k < p->K; k += KC) {
        size_t K = size_min(KC, p->K - k);
        pack_strips(pb, NR, columns, g->b + (p->k0 + k) * g->b_row + n * g->b_col, g->b_col, g->b_row, g->N - n, K);
        for (size_t j = 0; j < columns; j++)
            for (size_t s = i; s < end; s++)
                own_tile(g, p->m0 + s * MR, n + j * NR, K, p->k0 + k == 0, p->packed + (k / KC * p->strips + s) * KC * MR,
                         pb + j * KC * NR);
    }
}

/* Runs inside a parallel region; ends at a barrier. Rows are split among jobs only when columns are too few for the threads. */
static void own_part(const Gemm *g, const Part *p, float *pb) {
    size_t groups = div_up(p->strips, GROUP_A), columns = div_up(g->N, GROUP_B * NR);
    size_t splits = size_min(p->strips, div_up(4 * (size_t)cpu_team(), columns)), rows = div_up(p->strips, splits);
#pragma omp for schedule(dynamic)
    for (size_t job = 0; job < groups * div_up(p->K, KC); job++) pack_a(g, p, job / groups * KC, job % groups * GROUP_A);
#pragma omp for schedule(dynamic)
    for (size_t job = 0; job < splits * columns; job++) {
        size_t i = job / columns * rows;
        own_columns(g, p, i, size_min(i + rows, p->strips), job % columns * GROUP_B * NR, pb);
    }
}

static void own_gemm(const Gemm *g, float *scratch) {
    size_t K_all = round_up(g->K, KC), K_step = size_min(K_all, 4 * KC);
    size_t M_step = size_min(round_up(g->M, MR), A_FLOATS / K_step / MR * MR);
    K_step = size_min(K_all, A_FLOATS / M_step / KC * KC);
#pragma omp parallel if (g->M * g->N * g->K > 100000)
    for (size_t m = 0; m < g->M; m += M_step)
        for (size_t k = 0; k < g->K; k += K_step) {
            size_t M = size_min(M_step, g->M - m);
            Part part = {m, M, k, size_min(K_step, g->K - k), div_up(M, MR), scratch};
            own_part(g, &part, scratch + A_FLOATS + (size_t)cpu_thread() * GROUP_B * KC * NR);
        }
}

#ifdef LLMC_OPENBLAS
static void blas_gemm(const Gemm *g) {
    bool ta = g->a_col != 1, tb = g->b_col != 1;
    /* A stride along a dimension of length 1 may be anything; OpenBLAS wants it no shorter than the row. */
    size_t lda = ta ? g->a_col : g->a_row, ldb = tb ? g->b_col : g->b_row;
    if (lda < (ta ? g->M : g->K)) lda = ta ? g->M : g->K;
    if (ldb < (tb ? g->K : g->N)) ldb = tb ? g->K : g->N;
    if (g->bias && !g->add)
        for (size_t m = 0; m < g->M; m++) memcpy(g->c + m * g->c_row, g->bias, g->N * sizeof *g->c);
    cblas_sgemm(CblasRowMajor, ta ? CblasTrans : CblasNoTrans, tb ? CblasTrans : CblasNoTrans, (int)g->M, (int)g->N,
                (int)g->K, 1.0f, g->a, (int)lda, g->b, (int)ldb, g->add || g->bias ? 1.0f : 0.0f, g->c, (int)g->c_row);
}
#endif

void cpu_gemm(const Gemm *g, void *scratch) {
    CHECK(g->M && g->N && g->K, "product of %zu x %zu x %zu", g->M, g->N, g->K);
#ifdef LLMC_OPENBLAS
    if (use_blas) {
        blas_gemm(g);
        return;
    }
#endif
    own_gemm(g, scratch);
}
