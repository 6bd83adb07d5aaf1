/* What matmul.cu (plans and their use) and matmul_measure.cu (the choice of algorithms) share: cuBLASLt's side of a product. */
#ifndef LLMC_CUDA_MATMUL_LT_CUH
#define LLMC_CUDA_MATMUL_LT_CUH
#include "backend.cuh"
#ifdef LLMC_EMU
#include "dev/emu/cublaslt_twin.h"
#else
#include <cublasLt.h>
#endif

namespace LLMC_NS {

enum { MOST_CANDIDATES = 96, WORKSPACE = 64 << 20 };

struct Candidate {
    cublasLtMatmulAlgo_t algo;
    OwnChoice own;            /* with a tile: one of ours, and algo says nothing */
    size_t workspace;
};
enum PlanState {
    PLAN_NEW,                 /* candidates wait for matmul_measure */
    PLAN_CHOSEN,              /* `chosen` is used */
    PLAN_PLAIN                /* there is nothing: matmul_plain, or the caller composes */
};
struct Plan {
    Product product;
    PlanState state;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t left, right, out; /* column-major: out (N, M) = left (N, K) right (K, M); left is our b, right our a */
    Candidate *candidates;    /* while new */
    int n_candidates;
    size_t workspace;         /* the most that any candidate needs, then that of the chosen one */
    Candidate chosen;
    double seconds;           /* of the chosen one; 0: not timed */
    double best[2];           /* of the library's best and of our best, where both were timed in this process; else 0 */
    bool from_file;
    /* of a fused product that a caller has compared with a plain one and a pass of `bytes` */
    bool asked, fuse;
    size_t plain;             /* index of the plain one's plan */
    size_t bytes;
};
struct Matmul {
    cublasLtHandle_t handle;
    char where[192];          /* GPU, library version and compute type: the first words of a key in the plan file */
    PlanFile file;
    Plan *plans;
    size_t n_plans, plans_room;
    uint32_t *slots;          /* hash table of indices + 1 */
    size_t n_slots;           /* a power of two, at least twice n_plans */
    bool warm, copy_tried;    /* the GPU has its clocks; there has been an attempt to measure a copy */
    double copy_rate;         /* bytes read and written a second by a copy; 0: not measured */
};

/* Fails the process with EXIT_DEVICE, naming what was being done and for which product (may be NULL). */
void lt_check(cublasStatus_t status, const char *doing, const Product *p);
/* One product on the stream under that algorithm. */
cublasStatus_t candidate_issue(CudaBackend *, const Plan *, const Candidate *, const Operands *, void *workspace);
/* What was chosen, into the plan file's table. */
void keep_plan(Matmul *, Plan *);
void keep_copy_rate(Matmul *);
void recall_copy_rate(Matmul *); /* from the plan file; 0 stays where it is not there */

} /* namespace */
#endif
