/* The part of cuBLASLt that llmc/cuda/matmul*.cu use, for the emulator: the library's names with its documented meaning, behind them a few
 * algorithms on a CPU whose times are declared. Numbers behind the names are our own. Stricter than the library where it forgives or leaves
 * things undefined; cublasLtGetStatusString then says which rule was broken.
 *
 * LLMC_EMU_MATMUL in the environment when a handle is created: words with commas between.
 *   plain          the heuristic knows nothing: all products are the engine's own
 *   wrong          one more algorithm, the fastest, whose results are off by a sixteenth
 *   unrepeatable   one more, the second fastest, whose results differ from run to run within what rounding may do
 *   slow-epilogue  an epilogue other than a bias costs a second
 *   own-fast       the engine's own products (matmul_hopper.cu) take a twentieth of the plain algorithm's time; else nine tenths
 *   own-wrong      the same, and the first element of each is off by a sixteenth */
#ifndef LLMC_EMU_CUBLASLT_TWIN_H
#define LLMC_EMU_CUBLASLT_TWIN_H
#include "emu.h"

namespace emu {

enum cublasStatus_t {
    CUBLAS_STATUS_SUCCESS, CUBLAS_STATUS_NOT_SUPPORTED, CUBLAS_STATUS_INVALID_VALUE
};
enum cudaDataType_t { CUDA_R_16BF, CUDA_R_32F };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F };
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cublasLtEpilogue_t {
    CUBLASLT_EPILOGUE_DEFAULT,
    CUBLASLT_EPILOGUE_BIAS,          /* + bias[row of D] */
    CUBLASLT_EPILOGUE_GELU_AUX_BIAS, /* aux = the same; D = gelu of it */
    CUBLASLT_EPILOGUE_DGELU,         /* D = the product times gelu'(aux) */
    CUBLASLT_EPILOGUE_BGRADB         /* besides D: bias[column of D] = sum of op(B) over k */
};
enum cublasLtMatmulDescAttributes_t {
    CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB, /* int32_t */
    CUBLASLT_MATMUL_DESC_EPILOGUE,                            /* uint32_t */
    CUBLASLT_MATMUL_DESC_BIAS_POINTER, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD                      /* int64_t */
};
enum cublasLtMatmulPreferenceAttributes_t {
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,   /* uint64_t */
    CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, /* uint32_t, as are the rest */
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES
};
enum cublasLtReductionScheme_t {
    CUBLASLT_REDUCTION_SCHEME_NONE = 0, CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE = 1, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2,
    CUBLASLT_REDUCTION_SCHEME_INPLACE = 4, CUBLASLT_REDUCTION_SCHEME_MASK = 7
};
enum cublasLtMatmulAlgoCapAttributes_t { CUBLASLT_ALGO_CAP_SPLITK_SUPPORT /* int32_t */, CUBLASLT_ALGO_CAP_REDUCTION_SCHEME_MASK /* uint32_t */ };
enum cublasLtMatmulAlgoConfigAttributes_t { /* int32_t or uint32_t; the cluster's shape uint16_t */
    CUBLASLT_ALGO_CONFIG_ID, CUBLASLT_ALGO_CONFIG_TILE_ID, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME,
    CUBLASLT_ALGO_CONFIG_STAGES_ID, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID
};
enum cublasLtMatmulTile_t { /* rows x columns of D */
    CUBLASLT_MATMUL_TILE_UNDEFINED, CUBLASLT_MATMUL_TILE_64x32, CUBLASLT_MATMUL_TILE_32x64, CUBLASLT_MATMUL_TILE_128x32, CUBLASLT_MATMUL_TILE_32x128,
    CUBLASLT_MATMUL_TILE_64x64, CUBLASLT_MATMUL_TILE_96x64, CUBLASLT_MATMUL_TILE_64x96, CUBLASLT_MATMUL_TILE_128x64, CUBLASLT_MATMUL_TILE_64x128,
    CUBLASLT_MATMUL_TILE_256x64, CUBLASLT_MATMUL_TILE_64x256, CUBLASLT_MATMUL_TILE_96x128, CUBLASLT_MATMUL_TILE_128x96, CUBLASLT_MATMUL_TILE_128x128,
    CUBLASLT_MATMUL_TILE_160x128, CUBLASLT_MATMUL_TILE_128x160, CUBLASLT_MATMUL_TILE_192x128, CUBLASLT_MATMUL_TILE_128x192, CUBLASLT_MATMUL_TILE_256x128,
    CUBLASLT_MATMUL_TILE_128x256
};

typedef struct LtHandle *cublasLtHandle_t;
typedef struct LtDesc *cublasLtMatmulDesc_t;
typedef struct LtLayout *cublasLtMatrixLayout_t;
typedef struct LtPreference *cublasLtMatmulPreference_t;
struct cublasLtMatmulAlgo_t { uint64_t data[8]; }; /* opaque; may be copied and kept */
struct cublasLtMatmulHeuristicResult_t {
    cublasLtMatmulAlgo_t algo;
    size_t workspaceSize;
    cublasStatus_t state;     /* of this entry; the others hold nothing unless it is SUCCESS */
    float wavesCount;
};

const char *cublasLtGetStatusString(cublasStatus_t status);
size_t cublasLtGetVersion();
cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle);
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle);

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *desc, cublasComputeType_t compute, cudaDataType_t scale);
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc);
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute, const void *value, size_t bytes);
/* Column-major: element (row, column) at row + column ld. */
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType_t type, uint64_t rows, uint64_t columns, int64_t ld);
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout);
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *preference);
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference);
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute, const void *value,
                                                    size_t bytes);

/* The algorithms for a product in the order of their estimated times, which are not their declared ones. One of a list may refuse to run. */
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t preference, int asked,
                                              cublasLtMatmulHeuristicResult_t results[], int *found);
cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                       cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d, const cublasLtMatmulAlgo_t *algo,
                                       cublasLtMatmulHeuristicResult_t *result);
cublasStatus_t cublasLtMatmulAlgoCapGetAttribute(const cublasLtMatmulAlgo_t *algo, cublasLtMatmulAlgoCapAttributes_t attribute, void *value, size_t bytes,
                                                 size_t *written);
cublasStatus_t cublasLtMatmulAlgoConfigGetAttribute(const cublasLtMatmulAlgo_t *algo, cublasLtMatmulAlgoConfigAttributes_t attribute, void *value,
                                                    size_t bytes, size_t *written);
cublasStatus_t cublasLtMatmulAlgoConfigSetAttribute(cublasLtMatmulAlgo_t *algo, cublasLtMatmulAlgoConfigAttributes_t attribute, const void *value,
                                                    size_t bytes);

/* D = epilogue(alpha op(A) op(B) + beta C), when the stream gets there; alpha and beta are read at once. */
cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void *alpha, const void *a, cublasLtMatrixLayout_t a_layout,
                              const void *b, cublasLtMatrixLayout_t b_layout, const void *beta, const void *c, cublasLtMatrixLayout_t c_layout, void *d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t *algo, void *workspace, size_t workspace_bytes,
                              cudaStream_t stream);

/* Around the launches of one of the engine's own products: their declared time, and that a measurement need not compute them. */
void own_product_begin(double multiply_adds);
void own_product_end(cudaStream_t stream, void *c, bool c_float);

} /* namespace emu */
#endif
