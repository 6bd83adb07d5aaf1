/* Matrix products: OpenBLAS where it is in the build, and our own, packed and tiled for registers and caches (the scheme
 * of Goto and van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication"). The order of summation of our own
 * is promised in cpu.h. Knows no op. */
#include "cpu.h"
#include "simd.h"
#ifdef LLMC_OPENBLAS
#include <cblas.h>
#endif

/* One packed strip of B (KC x NR) stays in the first-level cache, a few of A (KC x MR each) in the second, the packed block of
 * B in the third. KC is part of the promised order of summation. */
enum { KC = 256, MC = 170 * MR, NC = 64 * NR };
enum { PANEL = 8 };  /* strips of A per job */

size_t cpu_gemm_scratch_bytes(void) { return sizeof(float) * KC * ((size_t)MC + NC); }

static bool use_blas;
bool cpu_gemm_uses_blas(void) { return use_blas; }
bool cpu_gemm_use_blas(bool on) {
#ifdef LLMC_OPENBLAS
    use_blas = on;
    return true;
#else
    return !on;
#endif
}

/* strip[k * width + i] = x[i * row + k * col] for i < n, 0 for n <= i < width */
static inline void pack_strip(float *strip, size_t width, const float *x, size_t row, size_t col, size_t n, size_t K) {
    if (n < width) memset(strip, 0, K * width * sizeof *strip);
    if (row == 1) {
        if (n == width)
            for (size_t k = 0; k < K; k++) memcpy(strip + k * width, x + k * col, width * sizeof *x);
        else
            for (size_t k = 0; k < K; k++) memcpy(strip + k * width, x + k * col, n * sizeof *x);
    } else if (col == 1) {
        transpose(strip, width, x, row, n, K);
    } else {
        for (size_t k = 0; k < K; k++)
            for (size_t i = 0; i < n; i++) strip[k * width + i] = x[i * row + k * col];
    }
}

/* One tile of c, at most MR x NR: base + a b. */
static void own_tile(const Gemm *g, size_t m, size_t n, size_t K, bool first, const float *a, const float *b) {
    vf t[MR][2];
    tile_product(t, K, a, 1, MR, b, NR);
    float *c = g->c + m * g->c_row + n;
    size_t rows = size_min(MR, g->M - m), cols = size_min(NR, g->N - n);
    bool load = g->add || !first;
    float bias[NR] = {0}, out[NR];
    if (!load && g->bias) memcpy(bias, g->bias + n, cols * sizeof *bias);
    for (size_t r = 0; r < rows; r++, c += g->c_row) {
        if (cols == NR) {
            const float *base = load ? c : bias;
            vf_store(c, vf_load(base) + t[r][0]);
            vf_store(c + VW, vf_load(base + VW) + t[r][1]);
        } else {
            memcpy(out, load ? c : bias, cols * sizeof *out);
            vf_store(out, vf_load(out) + t[r][0]);
            vf_store(out + VW, vf_load(out + VW) + t[r][1]);
            memcpy(c, out, cols * sizeof *out);
        }
    }
}

/* The block [m0, m0+M) x [n0, n0+N) of c with the terms [k0, k0+K). Runs inside a parallel region; ends at a barrier. */
static void own_block(const Gemm *g, size_t m0, size_t M, size_t n0, size_t N, size_t k0, size_t K, float *pa, float *pb) {
    size_t strips_a = div_up(M, MR), strips_b = div_up(N, NR), panels = div_up(strips_a, PANEL);
#pragma omp for schedule(dynamic, 4) nowait
    for (size_t i = 0; i < strips_a; i++)
        pack_strip(pa + i * MR * KC, MR, g->a + (m0 + i * MR) * g->a_row + k0 * g->a_col, g->a_row, g->a_col,
                   size_min(MR, M - i * MR), K);
#pragma omp for schedule(dynamic, 4)
    for (size_t j = 0; j < strips_b; j++)
        pack_strip(pb + j * NR * KC, NR, g->b + k0 * g->b_row + (n0 + j * NR) * g->b_col, g->b_col, g->b_row,
                   size_min(NR, N - j * NR), K);
#pragma omp for schedule(dynamic, 4)
    for (size_t job = 0; job < panels * strips_b; job++) {
        size_t i = job / strips_b * PANEL, end = size_min(i + PANEL, strips_a), j = job % strips_b;
        for (; i < end; i++)
            own_tile(g, m0 + i * MR, n0 + j * NR, K, k0 == 0, pa + i * MR * KC, pb + j * NR * KC);
    }
}

static void own_gemm(const Gemm *g, float *pa) {
    float *pb = pa + (size_t)KC * MC;
#pragma omp parallel if (g->M * g->N * g->K > 100000)
    for (size_t m = 0; m < g->M; m += MC)
        for (size_t n = 0; n < g->N; n += NC)
            for (size_t k = 0; k < g->K; k += KC)
                own_block(g, m, size_min(MC, g->M - m), n, size_min(NC, g->N - n), k, size_min(KC, g->K - k), pa, pb);
}

#ifdef LLMC_OPENBLAS
static void blas_gemm(const Gemm *g) {
    bool ta = g->a_col != 1, tb = g->b_col != 1;
    if (g->bias && !g->add)
        for (size_t m = 0; m < g->M; m++) memcpy(g->c + m * g->c_row, g->bias, g->N * sizeof *g->c);
    cblas_sgemm(CblasRowMajor, ta ? CblasTrans : CblasNoTrans, tb ? CblasTrans : CblasNoTrans, (int)g->M, (int)g->N,
                (int)g->K, 1.0f, g->a, (int)(ta ? g->a_col : g->a_row), g->b, (int)(tb ? g->b_col : g->b_row),
                g->add || g->bias ? 1.0f : 0.0f, g->c, (int)g->c_row);
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
