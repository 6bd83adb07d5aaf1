/* Our products for Hopper (llmc/cuda/matmul_hopper.cu): the very kernels, on the emulator, against sums in double; every variant, ragged shapes, epilogues,
 * parts of k, schedules. What choosing them does: test_matmul. Plain C takes this file too, where there is no C++ compiler. */
#include "dev/test/emu_kit.h"
#ifdef LLMC_EMU
#include "llmc/base/rng.h"
#include "llmc/cuda/backend.cuh"
#include <vector>

namespace LLMC_NS {

static CudaBackend cuda;

struct Case {
    size_t M, N, K;
    bool a_t, b_t, c_float, add;
    Epilogue epilogue;
    int tile, splits;
    unsigned pad;             /* elements beyond a row, times 8 */
};
struct Result { std::vector<float> c, aux, grad; };

static float random_at(uint32_t seed, size_t i) { return to_float(to_elem((float)rng_u32(seed, 0, 0, i) * 0x1p-31f - 1)); }
/* A stored matrix: what lies beyond its columns stays NaN. */
static void fill(Device<elem> &x, size_t rows, size_t columns, size_t row, uint32_t seed) {
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < columns; c++) x[r * row + c] = to_elem(random_at(seed, r * columns + c));
}
static double gelu(double x) { return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))); }
static double gelu_slope(double x) { return (gelu(x + 1e-5) - gelu(x - 1e-5)) / 2e-5; }

static Product product_of(const Case &t) {
    Product p = {};
    p.M = t.M, p.N = t.N, p.K = t.K, p.a_transposed = t.a_t, p.b_transposed = t.b_t, p.c_float = t.c_float, p.add = t.add, p.epilogue = t.epilogue;
    p.a_row = round_up(t.a_t ? t.M : t.K, (size_t)8) + 8 * t.pad, p.b_row = round_up(t.b_t ? t.K : t.N, (size_t)8) + 8 * t.pad;
    p.c_row = round_up(t.N, (size_t)8) + 8 * t.pad;
    return p;
}

/* One product, checked throughout if so wanted; false: the variant is not there. */
static bool run_case(const Case &t, Result *result, bool check) {
    const Product p = product_of(t);
    const OwnChoice choice = {t.tile, t.splits};
    if (!own_takes(&cuda, &p, choice)) return false;
    const size_t n_c = t.M * p.c_row, a_rows = t.a_t ? t.K : t.M, b_rows = t.b_t ? t.N : t.K, each = t.c_float ? 4 : 2;
    Device<elem> a(a_rows * p.a_row), b(b_rows * p.b_row), bias(t.N), aux(n_c);
    Device<float> c(n_c), grad(t.M), workspace(own_workspace(&p, choice) / 4 + 1);
    fill(a, a_rows, t.a_t ? t.M : t.K, p.a_row, 1), fill(b, b_rows, t.b_t ? t.K : t.N, p.b_row, 2), fill(bias, 1, t.N, t.N, 3);
    if (t.epilogue == EPI_DGELU) fill(aux, t.M, t.N, p.c_row, 4);
    if (t.add)
        for (size_t m = 0; m < t.M; m++)
            for (size_t n = 0; n < t.N; n++) c[m * p.c_row + n] = random_at(5, m * t.N + n);
    Operands o = {c.p, a.p, b.p, bias.p, aux.p, grad.p};
    faults.n = 0, faults.text[0] = 0;
    own_issue(&cuda, &p, choice, &o, workspace.p);
    cudaStreamSynchronize(stream);
    char text[PRODUCT_TEXT], name[32];
    product_text(&p, text), snprintf(name, sizeof name, "%s in %d", own_tile(t.tile), t.splits);
    EXPECT(!faults.n, "%s, %s: %s", text, name, faults.text);
    if (faults.n) return true;
    *result = Result{};
    for (size_t i = 0; i < n_c; i++) result->c.push_back(t.c_float ? c[i] : to_float(((elem *)(void *)c.p)[i])), result->aux.push_back(to_float(aux[i]));
    for (size_t m = 0; m < t.M; m++) result->grad.push_back(grad[m]);
    if (!check) return true;
    std::vector<float> x(t.M * t.K), y(t.K * t.N);
    for (size_t m = 0; m < t.M; m++)
        for (size_t k = 0; k < t.K; k++) x[m * t.K + k] = to_float(t.a_t ? a[k * p.a_row + m] : a[m * p.a_row + k]);
    for (size_t k = 0; k < t.K; k++)
        for (size_t n = 0; n < t.N; n++) y[k * t.N + n] = to_float(t.b_t ? b[n * p.b_row + k] : b[k * p.b_row + n]);
    /* Bounds: 2^-20 of the sum of sizes for other orders, half a unit of the output's last place, and for GELU 2^-16 of its argument or factor. */
    const double rounding = t.c_float ? 0x1p-23 : 0x1p-8;
    size_t wrong = 0, at_m = 0, at_n = 0;
    double wrong_found = 0, wrong_exact = 0;
    std::vector<double> sum(t.N), size(t.N);
    for (size_t m = 0; m < t.M; m++) {
        double row = 0, row_size = 0;
        sum.assign(t.N, 0), size.assign(t.N, 0);
        for (size_t k = 0; k < t.K; k++) {
            const double f = (double)x[m * t.K + k];
            row += f, row_size += fabs(f);
            for (size_t n = 0; n < t.N; n++) sum[n] += f * (double)y[k * t.N + n], size[n] += fabs(f * (double)y[k * t.N + n]);
        }
        if (t.epilogue == EPI_BIAS_GRAD) EXPECT(fabs((double)grad[m] - row) <= 0x1p-20 * row_size, "%s, %s: row sum %zu is %g, exactly %g", text, name, m, (double)grad[m], row);
        for (size_t n = 0; n < p.c_row; n++) {
            const size_t i = m * p.c_row + n;
            const double found = (double)result->c[i];
            if (n >= t.N) { /* padding: as it was */
                uint32_t bits = 0;
                memcpy(&bits, (char *)c.p + i * each, each);
                wrong += bits != (t.c_float ? 0xFFFFFFFFu : 0xFFFFu), at_m = bits != (t.c_float ? 0xFFFFFFFFu : 0xFFFFu) ? m : at_m;
                continue;
            }
            double exact = sum[n], bound = 0x1p-20 * size[n];
            if (t.epilogue == EPI_BIAS || t.epilogue == EPI_BIAS_GELU) exact += (double)to_float(bias[n]), bound += 0x1p-23;
            if (t.epilogue == EPI_BIAS_GELU) {
                if (!(fabs((double)result->aux[i] - exact) <= bound + 0x1p-8 * fabs(exact))) wrong++, at_m = m, at_n = n;
                bound = 1.2 * bound + 0x1p-16 * fabs(exact), exact = gelu(exact);
            }
            if (t.epilogue == EPI_DGELU) bound = 1.2 * bound + 0x1p-16 * fabs(exact), exact *= gelu_slope((double)to_float(aux[i]));
            if (t.add) exact += (double)random_at(5, m * t.N + n), bound += 0x1p-23;
            if (!(fabs(found - exact) <= bound + rounding * fabs(exact))) {
                if (!wrong++) at_m = m, at_n = n, wrong_found = found, wrong_exact = exact;
            }
        }
    }
    EXPECT(!wrong, "%s, %s: %zu wrong, as (%zu, %zu) %g, exactly %g", text, name, wrong, at_m, at_n, wrong_found, wrong_exact);
    return true;
}

/* What each kernel is for: layouts and epilogues; the tiles that have it. */
struct Use { bool a_t, b_t, c_float, add; Epilogue epilogue; int tiles; };
static const Use uses[] = {{false, true, false, false, EPI_NONE, 3},      {false, true, false, false, EPI_BIAS, 3},  {false, true, false, false, EPI_BIAS_GELU, 3},
                           {false, true, true, false, EPI_NONE, 1},       {false, false, false, false, EPI_NONE, 3}, {false, false, false, false, EPI_DGELU, 3},
                           {false, false, true, true, EPI_NONE, 1},       {true, false, true, true, EPI_NONE, 3},    {true, false, true, true, EPI_BIAS_GRAD, 3},
                           {true, false, true, false, EPI_BIAS_GRAD, 3},  {true, false, false, false, EPI_BIAS, 1},  {true, true, false, false, EPI_BIAS, 1},
                           {true, true, true, true, EPI_BIAS_GRAD, 1},    {false, true, true, false, EPI_BIAS_GRAD, 1}};

static int run_uses(size_t M, size_t N, size_t K, unsigned pad) {
    Result r;
    int n = 0;
    for (const Use &u : uses) {
        int tiles = 0;
        for (int tile = 1; tile <= OWN_TILES; tile++) tiles += run_case({M, N, K, u.a_t, u.b_t, u.c_float, u.add, u.epilogue, tile, 1, pad}, &r, true);
        EXPECT(tiles == u.tiles, "a %d b %d float %d epilogue %d: %d tiles, not %d", u.a_t, u.b_t, u.c_float, u.epilogue, tiles, u.tiles);
        n += tiles;
    }
    return n;
}
TEST(every_variant_and_ragged_shapes) {
    run_uses(300, 400, 200, 1); /* more tiles than clusters; all edges cut */
    run_uses(1, 8, 1, 0);
    run_uses(129, 200, 8, 0);
}
TEST(whole_and_odd_shapes) {
    static const size_t shapes[][3] = {{256, 192, 64}, {256, 160, 128}, {37, 56, 24}, {8, 328, 65}, {130, 8, 321}, {2310, 400, 40}, {64, 64, 1000}};
    Result r;
    for (const auto &s : shapes)
        for (int tile = 1; tile <= OWN_TILES; tile++) {
            EXPECT(run_case({s[0], s[1], s[2], false, true, false, false, EPI_BIAS, tile, 1, 0}, &r, true), "tile %d", tile);
            EXPECT(run_case({s[0], s[1], s[2], true, false, true, true, EPI_BIAS_GRAD, tile, 1, 2}, &r, true), "tile %d", tile);
        }
}
TEST(parts_of_k) {
    Result r;
    for (int splits : {2, 3, 5, 16})
        for (int tile = 1; tile <= OWN_TILES; tile++)
            for (int add = 0; add < 2; add++)
                EXPECT(run_case({140, 200, 1030, true, false, true, add == 1, add ? EPI_BIAS_GRAD : EPI_NONE, tile, splits, 1}, &r, true), "tile %d, %d parts", tile, splits);
    const Product p = product_of({64, 64, 100, true, false, true, true, EPI_NONE, 1, 1, 0});
    EXPECT(own_takes(&cuda, &p, {1, 2}) && !own_takes(&cuda, &p, {1, 3}) && !own_takes(&cuda, &p, {1, 0}) && !own_takes(&cuda, &p, {4, 1}) && !own_takes(&cuda, &p, {0, 1}), "parts of 64");
}

static bool same_bits(const Result &a, const Result &b) {
    auto same = [](const std::vector<float> &x, const std::vector<float> &y) { return x.size() == y.size() && !memcmp(x.data(), y.data(), x.size() * sizeof(float)); };
    return same(a.c, b.c) && same(a.aux, b.aux) && same(a.grad, b.grad);
}
TEST(the_same_bits_twice_and_in_all_schedules) {
    static const Case cases[] = {{520, 200, 410, false, true, false, false, EPI_BIAS_GELU, 1, 1, 0}, {520, 168, 410, false, false, false, false, EPI_DGELU, 2, 1, 0},
                                 {520, 264, 330, false, true, false, false, EPI_BIAS, 3, 1, 0},      {200, 200, 1000, true, false, true, true, EPI_BIAS_GRAD, 1, 3, 0}};
    for (const Case &t : cases) {
        Result first, next;
        run_case(t, &first, false);
        for (const char *s : {"ascending", "reversed", "ahead:1", "behind:0", "behind:4,newest", "newest", "reversed,newest", "in-turn", "early", "reversed,early", "apart,early"}) {
            schedule_parse(s, &emu::schedule);
            run_case(t, &next, false);
            EXPECT(same_bits(first, next), "tile %d, epilogue %d: %s gives other bits", t.tile, t.epilogue, s);
        }
        schedule_parse("", &emu::schedule);
    }
}
TEST(what_it_does_not_take) {
    const Case good = {64, 64, 64, false, true, false, false, EPI_BIAS, 1, 1, 0};
    const Product p = product_of(good);
    OwnChoice choices[OWN_TILES];
    EXPECT(own_takes(&cuda, &p, {1, 1}) && own_choices(&cuda, &p, choices) == 3 && choices[0].splits == 1, "it takes the rest");
    for (int i = 0; i < 9; i++) {
        Product q = p;
        CudaBackend other = cuda;
        if (i == 0) q.a_row += 4;
        if (i == 1) q.b_row += 2;
        if (i == 2) q.c_row += 1;
        if (i == 3) q.c_float = true; /* with a bias */
        if (i == 4) q.b_transposed = false, q.epilogue = EPI_BIAS_GELU;
        if (i == 5) q.a_transposed = true, q.epilogue = EPI_DGELU;
        if (i == 6) other.capability = 100;
        if (i == 7) other.options.own_products = OWN_OFF;
        if (i == 8) q.N -= 4;
        EXPECT(!own_takes(&other, &q, {1, 1}) && own_choices(&other, &q, choices) == 0, "case %d", i);
    }
    CudaBackend h100 = cuda;
    h100.sm_count = 132;
    const struct { size_t M, N; int splits; } rules[] = {{768, 768, 5}, {2304, 768, 7}, {3072, 768, 4}, {50304, 768, 1}, {1600, 1600, 1}, {6400, 1600, 1}};
    for (const auto &r : rules) {
        const Product dw = product_of({r.M, r.N, 65536, true, false, true, true, EPI_NONE, 1, 1, 0});
        EXPECT(own_choices(&h100, &dw, choices) == 3 && choices[0].splits == r.splits, "dw %zu x %zu: %d parts, not %d", r.M, r.N, choices[0].splits, r.splits);
    }
}

static void run_all() {
    cuda.stream = stream, cuda.sm_count = 4, cuda.capability = 90, cuda.options.own_products = OWN_ON, cuda.recording = -1;
    RUN(every_variant_and_ragged_shapes);
    RUN(whole_and_odd_shapes);
    RUN(parts_of_k);
    RUN(the_same_bits_twice_and_in_all_schedules);
    RUN(what_it_does_not_take);
}

} /* namespace */
#endif
