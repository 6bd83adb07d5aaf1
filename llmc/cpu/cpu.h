/* Inside the CPU backend: its state, its scratch, and the matrix product that its ops share.
 * Nothing outside llmc/cpu includes this, except tests and benches of these parts. */
#ifndef LLMC_CPU_CPU_H
#define LLMC_CPU_CPU_H
#include "../ops.h"
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    void *p;
    size_t bytes;
    MemClass class_;
} CpuBlock;

typedef struct {
    Backend base;
    CpuBlock *blocks;         /* what alloc has given out */
    size_t n_blocks, blocks_room;
    bool planning;            /* between plan_begin and plan_end */
    size_t need;              /* bytes: most scratch that any op stated so far, in all plans */
    void *scratch;
    size_t scratch_bytes;
    struct { size_t bytes; char content[POST_BYTES]; } posts[POST_SLOTS];
} CpuBackend;

/* Scratch of one op, 256-byte aligned, content undefined. NULL while planning: the op then returns at once. */
void *cpu_scratch(Backend *backend, size_t bytes, const char *op);
/* For ops without scratch: true while planning. */
static inline bool cpu_planning(const Backend *backend) { return ((const CpuBackend *)backend)->planning; }

static inline int cpu_threads(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}
static inline int cpu_thread(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}
/* Threads of the parallel region that this runs in. */
static inline int cpu_team(void) {
#ifdef _OPENMP
    return omp_get_num_threads();
#else
    return 1;
#endif
}
static inline size_t size_min(size_t a, size_t b) { return a < b ? a : b; }
static inline size_t div_up(size_t a, size_t b) { return (a + b - 1) / b; }
static inline size_t round_up(size_t a, size_t b) { return div_up(a, b) * b; }

/* c[m,n] = base + sum over k of A[m,k] B[k,n], with base = c itself (add), bias[n], or 0.
 * A[m,k] = a[m * a_row + k * a_col], B[k,n] = b[k * b_row + n * b_col]; in each, one of the two strides is 1.
 * The own product sums each element over k ascending, in runs of 256, whatever M, N, the element's place and the number
 * of threads are: a row computed alone has the bits that it has in a batch. OpenBLAS promises none of that. */
typedef struct {
    float *c;
    size_t c_row;
    const float *a;
    size_t a_row, a_col;
    const float *b;
    size_t b_row, b_col;
    const float *bias;        /* (N), or NULL */
    size_t M, N, K;
    bool add;
} Gemm;
void cpu_gemm(const Gemm *g, void *scratch);
size_t cpu_gemm_scratch_bytes(void);
bool cpu_gemm_use_blas(bool on);  /* false when OpenBLAS is not in this build */
bool cpu_gemm_uses_blas(void);

/* out[i] = gelu(pre[i]), n values; the bits of a value do not depend on its place. */
void cpu_gelu(float *out, const float *pre, size_t n);
/* dpre[i] *= gelu'(pre[i]) */
void cpu_gelu_backward(float *dpre, const float *pre, size_t n);

#define LLMC_CPU_OP(name, Args) void cpu_##name(Backend *, const Args *);
LLMC_OPS(LLMC_CPU_OP)
#undef LLMC_CPU_OP
size_t cpu_attention_saved_bytes(Backend *, size_t B, size_t T, size_t H, size_t D);

#ifdef __cplusplus
}
#endif
#endif
