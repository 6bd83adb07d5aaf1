/* Matrix products of the CUDA backend. On a GPU: cuBLASLt, every algorithm it offers for a shape timed once while planning, where asked for with our
 * own for Hopper beside them (matmul_hopper.cu), the choice kept in a file (matmul.cu); on the emulator the same with a twin of cuBLASLt (dev/emu/cublaslt_twin.h). Row-major throughout. */
#ifndef LLMC_CUDA_MATMUL_CUH
#define LLMC_CUDA_MATMUL_CUH
#include "kernel.cuh"
#include <stdio.h>

namespace LLMC_NS {
struct CudaBackend;

enum Epilogue {
    EPI_NONE,
    EPI_BIAS,                 /* c = a b + bias[n] */
    EPI_BIAS_GELU,            /* aux = a b + bias[n], rounded; c = gelu of the same before rounding */
    EPI_DGELU,                /* c = (a b) gelu'(aux) */
    EPI_BIAS_GRAD             /* besides c: bias_grad[m] = row sums of op(a), float; for dw = dout^T inp that is db of this call alone */
};

/* c (M, N) = or += op(a) (M, K) op(b) (K, N), sums in float. The shape alone decides the plan, so it is the key of the plan table. */
struct Product {
    size_t M, N, K;
    bool a_transposed;        /* a is stored (K, M) */
    bool b_transposed;        /* b is stored (N, K) */
    size_t a_row, b_row, c_row; /* row strides in elements of what is stored */
    bool c_float;             /* c is float; else elem */
    bool add;                 /* += (c_float only) */
    Epilogue epilogue;
};
struct Operands {
    void *c;
    const elem *a, *b;
    const elem *bias;         /* (N) */
    elem *aux;                /* (M, N), rows of c_row: written by EPI_BIAS_GELU, read by EPI_DGELU */
    float *bias_grad;         /* (M) = */
};

/* While planning: states the workspace and prepares the plan; an op takes its other scratch before. EPI_NONE and EPI_BIAS can always be had
 * (matmul_plain where the library has no algorithm). matmul_supported: whether the library has one; a caller whose fused product is not to be
 * had, or is slower than its parts (matmul_fuse), composes it. */
void matmul_plan(CudaBackend *, const Product *);
bool matmul_supported(CudaBackend *, const Product *);
/* Whether the fused product is to be preferred to the plain one followed by a pass that moves `bytes`; decided while planning, from measured
 * times and the measured copy rate, and then fixed: a caller asks while planning too, after it has planned both. */
bool matmul_fuse(CudaBackend *, const Product *fused, const Product *plain, size_t bytes);
void matmul(CudaBackend *, const Product *, const Operands *);

struct Matmul;                /* the table of plans */
Matmul *matmul_create(CudaBackend *, const char *plan_file, Error *e);
void matmul_destroy(Matmul *);
void matmul_print_plans(CudaBackend *, FILE *out); /* a line a plan: shape, epilogue, algorithm, tile, split-K, TFLOP/s, percent of peak */
/* At plan_end: plans are measured with the real buffers' sizes; writes the plan file where it changed. */
void matmul_measure(CudaBackend *);

/* ---- the pieces -------------------------------------------------------------------------------------------------------- */

/* Any shape, stride and alignment, EPI_NONE and EPI_BIAS only: what the library does not take (matmul_plain.cu). */
void matmul_plain(CudaBackend *, const Product *, const Operands *);

/* Our own products for Hopper (matmul_hopper.cu), candidates of the timed search where CudaOptions.own_products says so: a tile and the parts that k is
 * cut into. Workspace: partial sums, with more than one part. */
enum { OWN_TILES = 3, MOST_SPLITS = 16, OWN_WORKSPACE = 64 << 20 };
struct OwnChoice {
    int tile;                 /* 1 to OWN_TILES; 0: not ours */
    int splits;
};
bool own_takes(const CudaBackend *, const Product *, OwnChoice);  /* shape, strides, layout, epilogue, GPU; operands aligned to 16 bytes besides */
int own_choices(const CudaBackend *, const Product *, OwnChoice choices[OWN_TILES]); /* how many, one a tile */
size_t own_workspace(const Product *, OwnChoice);                 /* bytes */
void own_issue(CudaBackend *, const Product *, OwnChoice, const Operands *, void *workspace);
const char *own_tile(int tile);                                   /* "128x192" */

/* Compares what a product gave with a plain sum at some elements (matmul_check.cu). Of an adding product, c was zero before. */
struct ProductSample {
    float error;              /* in units of what rounding may do: above 1, or NaN, is wrong */
    float value;              /* c there */
};
#ifdef LLMC_EMU
enum { PRODUCT_SAMPLES = 8 }; /* threads are dear */
#else
enum { PRODUCT_SAMPLES = 256 };
#endif
void matmul_check(CudaBackend *, const Product *, const Operands *, ProductSample *samples);
/* x[i] uniform in [-size, size], a function of seed and i. */
void random_elements(CudaBackend *, elem *x, size_t n, float size, uint32_t seed);

/* "M=65536 N=3072 K=768 a=n768 b=t768 c=3072 elem = bias": the product in words, all of it (matmul_file.cu). */
enum { PRODUCT_TEXT = 160 };
const char *product_text(const Product *, char text[PRODUCT_TEXT]);
/* The plan file: lines "key = value". A line that is not of this form is named on stderr once and dropped; every other is kept. */
struct PlanFile {
    char *path;               /* NULL: nothing is kept */
    struct Line { char *key, *value; } *lines;
    size_t n, room;
    bool changed;
};
void plan_file_open(PlanFile *, const char *path);      /* a missing file is an empty one */
const char *plan_file_get(PlanFile *, const char *key); /* NULL: not there, and not added by another process since it was read */
void plan_file_put(PlanFile *, const char *key, const char *value);
void plan_file_save(PlanFile *); /* if changed: what others have added since, and ours; by a rename. Failure: a warning */
void plan_file_close(PlanFile *);

} /* namespace */
#endif
