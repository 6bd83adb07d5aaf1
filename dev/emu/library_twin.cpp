/* The twins of the libraries behind the CUDA backend, compiled once per compute type: cuBLASLt's products as plain loops with the library's
 * roundings (sums in float; an epilogue sees the sum before it is rounded), no cuDNN, no NVML. LLMC_EMU_MATMUL in the environment: "plain"
 * uses our own kernel instead, for what it can do, and fuses nothing else; "check" has matmul_check look at every product. */
#include "llmc/cuda/backend.cuh"
#include <memory>
#include <vector>

namespace LLMC_NS {

struct Matmul { int plans; };

Matmul *matmul_create(CudaBackend *, const char *, Error *) { return new Matmul{0}; }
void matmul_destroy(Matmul *m) { delete m; }
void matmul_plan(CudaBackend *cuda, const Product *) { cuda->matmul->plans++; }
static bool mode_is(const char *mode) {
    const char *found = getenv("LLMC_EMU_MATMUL");
    return found && !strcmp(found, mode);
}
static bool in_plain_kernel(const Product *p) { return p->epilogue == EPI_NONE || p->epilogue == EPI_BIAS; }
bool matmul_supported(CudaBackend *, const Product *p) { return !mode_is("plain") || in_plain_kernel(p); }
bool matmul_fuse(CudaBackend *, const Product *, const Product *, size_t) { return true; }
void matmul_measure(CudaBackend *) {}
void matmul_print_plans(CudaBackend *cuda, FILE *out) { fprintf(out, "products: plain loops on a CPU (%d planned)\n", cuda->matmul->plans); }

/* ---- products: packed panels, sums in float over k ascending ----------------------------------------------------------- */

enum { TILE_M = 128, TILE_N = 256, TILE_K = 256, ROWS = 4, COLUMNS = 8 };
typedef float Vector __attribute__((vector_size(4 * COLUMNS)));
struct Tile {
    float sum[TILE_M][TILE_N];
    float a[TILE_M / ROWS][TILE_K][ROWS];        /* a block of op(a), zeros beyond its edge */
    Vector b[TILE_N / COLUMNS][TILE_K];          /* and of op(b) */
};

/* to[i / WIDTH][k][i % WIDTH] = the block of `count` rows and `depth` columns at (first, k0) of a matrix stored with that stride; stored
 * transposed: element (i, k) stands at x[k * row + i]. */
template <int WIDTH> static void pack(float *to, const elem *x, size_t row, bool transposed, size_t first, size_t count, size_t k0, size_t depth) {
    for (size_t group = 0; group < ceil_div(count, (size_t)WIDTH); group++)
        for (size_t k = 0; k < depth; k++)
            for (size_t j = 0; j < WIDTH; j++) {
                size_t i = group * WIDTH + j;
                const elem *p = transposed ? x + (k0 + k) * row + first + i : x + (first + i) * row + k0 + k;
                to[(group * TILE_K + k) * WIDTH + j] = i < count ? to_float(*p) : 0.0f;
            }
}

static void multiply_tile(Tile *t, size_t rows, size_t columns, size_t depth) {
    for (size_t panel = 0; panel < ceil_div(columns, (size_t)COLUMNS); panel++)
        for (size_t group = 0; group < ceil_div(rows, (size_t)ROWS); group++) {
            Vector sum[ROWS];
            for (size_t r = 0; r < ROWS; r++) memcpy(&sum[r], &t->sum[group * ROWS + r][panel * COLUMNS], sizeof sum[r]);
            for (size_t k = 0; k < depth; k++)
                for (size_t r = 0; r < ROWS; r++) sum[r] += t->a[group][k][r] * t->b[panel][k];
            for (size_t r = 0; r < ROWS; r++) memcpy(&t->sum[group * ROWS + r][panel * COLUMNS], &sum[r], sizeof sum[r]);
        }
}

static float gelu_of(float x) { return 0.5f * x * (1.0f + tanhf(0.7978845608f * (x + 0.044715f * x * x * x))); }
static float gelu_slope(float x) {
    float t = tanhf(0.7978845608f * (x + 0.044715f * x * x * x));
    return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.7978845608f * (1.0f + 0.134145f * x * x);
}

/* The epilogues see the sum in float; what they store is rounded once. */
static void finish_tile(const Product *p, const Operands *o, const Tile *t, size_t m0, size_t rows, size_t n0, size_t columns) {
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < columns; j++) {
            size_t at = (m0 + i) * p->c_row + n0 + j;
            float x = t->sum[i][j];
            if (p->epilogue == EPI_BIAS || p->epilogue == EPI_BIAS_GELU) x += to_float(o->bias[n0 + j]);
            if (p->epilogue == EPI_BIAS_GELU) o->aux[at] = to_elem(x), x = gelu_of(x);
            if (p->epilogue == EPI_DGELU) x *= gelu_slope(to_float(o->aux[at]));
            if (!p->c_float) ((elem *)o->c)[at] = to_elem(x);
            else ((float *)o->c)[at] = p->add ? ((float *)o->c)[at] + x : x;
        }
}

static void row_sums(const Product *p, const Operands *o) {
    for (size_t m = 0; m < p->M; m++) o->bias_grad[m] = 0;
    for (size_t k = 0; k < p->K; k++)
        for (size_t m = 0; m < p->M; m++) o->bias_grad[m] += to_float(p->a_transposed ? o->a[k * p->a_row + m] : o->a[m * p->a_row + k]);
}

static void multiply(const Product *p, const Operands *o) {
    std::vector<Tile> tile(1);
    Tile *t = tile.data();
    for (size_t m0 = 0; m0 < p->M; m0 += TILE_M)
        for (size_t n0 = 0; n0 < p->N; n0 += TILE_N) {
            size_t rows = min(p->M - m0, (size_t)TILE_M), columns = min(p->N - n0, (size_t)TILE_N);
            memset(t->sum, 0, sizeof t->sum);
            for (size_t k0 = 0; k0 < p->K; k0 += TILE_K) {
                size_t depth = min(p->K - k0, (size_t)TILE_K);
                pack<ROWS>(&t->a[0][0][0], o->a, p->a_row, p->a_transposed, m0, rows, k0, depth);
                pack<COLUMNS>((float *)t->b, o->b, p->b_row, !p->b_transposed, n0, columns, k0, depth);
                multiply_tile(t, rows, columns, depth);
            }
            finish_tile(p, o, t, m0, rows, n0, columns);
        }
    if (p->epilogue == EPI_BIAS_GRAD) row_sums(p, o);
}

/* The product once more, into a matrix of its own, under the eyes of matmul_check. */
static void check(CudaBackend *cuda, const Product *p, const Operands *o) {
    const Product product = *p;
    Operands operands = *o;
    auto c = std::make_shared<std::vector<float>>(p->M * p->c_row, 0.0f);
    auto samples = std::make_shared<std::vector<ProductSample>>(PRODUCT_SAMPLES);
    operands.c = c->data();
    emu::enqueue(cuda->stream, [=]() { multiply(&product, &operands); });
    matmul_check(cuda, &product, &operands, samples->data());
    emu::enqueue(cuda->stream, [=]() {
        (void)c; /* lives until here */
        char text[PRODUCT_TEXT];
        for (const ProductSample &s : *samples) CHECK(s.error <= 1, "product %s: error %g of what is allowed", product_text(&product, text), (double)s.error);
    });
}

void matmul(CudaBackend *cuda, const Product *p, const Operands *o) {
    const Product product = *p;
    const Operands operands = *o;
    CHECK(p->M && p->N && p->K && (!p->add || p->c_float), "a product of %zu x %zu x %zu", p->M, p->N, p->K);
    CHECK(o->c && o->a && o->b, "a product without its matrices");
    if (mode_is("plain") && in_plain_kernel(p)) return matmul_plain(cuda, p, o);
    emu::enqueue(cuda->stream, [=]() { multiply(&product, &operands); });
    if (mode_is("check")) check(cuda, p, o);
}

void *cudnn_create(CudaBackend *, Error *e) {
    fail(e, EXIT_USAGE, "--attention cudnn: not on the emulator; use --attention ours");
    return NULL;
}
void cudnn_destroy(void *) {}
bool cudnn_attention_forward(CudaBackend *, const AttentionForward *) { return false; }
bool cudnn_attention_backward(CudaBackend *, const AttentionBackward *) { return false; }
bool health_read(CudaBackend *, DeviceHealth *) { return false; }

} /* namespace */
