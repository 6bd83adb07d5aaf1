/* Matrix products by cuBLASLt: a table of plans, one a shape. A plan's descriptors and algorithm are settled while planning (matmul_measure.cu
 * times the candidates, unless the plan file knows); in a step a product is a look-up and a call.
 *
 * The library is column-major: our c (M, N) is its (N, M) with the same stride, so it computes c^T = op(b)^T op(a)^T with our b on the left.
 * Of a matrix we store as it is used it takes no transpose; of one we store transposed it takes one. A bias along our n runs down its rows
 * (CUBLASLT_EPILOGUE_BIAS), the sums of our op(a) over k belong to its columns (BGRADB). */
#include "matmul_lt.cuh"

namespace LLMC_NS {

void lt_check(cublasStatus_t status, const char *doing, const Product *p) {
    char text[PRODUCT_TEXT];
    if (status == CUBLAS_STATUS_SUCCESS) return;
    fprintf(stderr, "error: cuBLASLt: %s while %s%s%s\n", cublasLtGetStatusString(status), doing, p ? ", product " : "", p ? product_text(p, text) : "");
    exit(EXIT_DEVICE);
}

/* ---- the table of plans ------------------------------------------------------------------------------------------------ */

static uint64_t hash_of(const Product *p) {
    const uint64_t words[] = {p->M, p->N, p->K, p->a_row, p->b_row, p->c_row,
                              (uint64_t)p->epilogue << 4 | p->a_transposed | p->b_transposed << 1 | p->c_float << 2 | p->add << 3};
    uint64_t h = 0xcbf29ce484222325u; /* FNV-1a, by words */
    for (uint64_t word : words) h = (h ^ word) * 0x100000001b3u, h ^= h >> 32;
    return h;
}

static bool same(const Product *p, const Product *q) {
    return p->M == q->M && p->N == q->N && p->K == q->K && p->a_transposed == q->a_transposed && p->b_transposed == q->b_transposed && p->a_row == q->a_row &&
           p->b_row == q->b_row && p->c_row == q->c_row && p->c_float == q->c_float && p->add == q->add && p->epilogue == q->epilogue;
}

static uint32_t *slot_of(const Matmul *m, const Product *p) {
    for (size_t i = hash_of(p);; i++) {
        uint32_t *slot = &m->slots[i & (m->n_slots - 1)];
        if (!*slot || same(&m->plans[*slot - 1].product, p)) return slot;
    }
}

static Plan *find(const Matmul *m, const Product *p) {
    uint32_t *slot = m->n_slots ? slot_of(m, p) : NULL;
    return slot && *slot ? &m->plans[*slot - 1] : NULL;
}

static Plan *find_planned(const Matmul *m, const Product *p, const char *doing) {
    char text[PRODUCT_TEXT];
    Plan *plan = find(m, p);
    CHECK(plan, "%s a product that was not planned: %s", doing, product_text(p, text));
    return plan;
}

static Plan *insert(Matmul *m, const Product *p) {
    if (m->n_plans == m->plans_room) m->plans = (Plan *)xrealloc(m->plans, (m->plans_room = m->plans_room ? 2 * m->plans_room : 64) * sizeof *m->plans);
    if (2 * (m->n_plans + 1) > m->n_slots) {
        free(m->slots);
        m->n_slots = m->n_slots ? 2 * m->n_slots : 128;
        m->slots = (uint32_t *)xcalloc(m->n_slots, sizeof *m->slots);
        for (size_t i = 0; i < m->n_plans; i++) *slot_of(m, &m->plans[i].product) = (uint32_t)i + 1;
    }
    uint32_t *slot = slot_of(m, p);
    m->plans[m->n_plans] = Plan{};
    m->plans[m->n_plans].product = *p;
    *slot = (uint32_t)++m->n_plans;
    return &m->plans[*slot - 1];
}

/* ---- the plan file: "GPU version dtype PRODUCT" = "algo HEX us MICROSECONDS", "own TILE PARTS us ..." or "none" ------------------------------------- */

enum { KEY = 192 + PRODUCT_TEXT, HEX = 2 * sizeof(cublasLtMatmulAlgo_t) };

static const char *key_of(const Matmul *m, const Product *p, char key[KEY]) {
    char text[PRODUCT_TEXT];
    snprintf(key, KEY, "%s %s", m->where, product_text(p, text));
    return key;
}

/* What is kept is rounded to what the file says, so that a run that reads it decides as the one that wrote it. */
void keep_plan(Matmul *m, Plan *plan) {
    char key[KEY], value[HEX + 64] = "none";
    if (plan->state == PLAN_CHOSEN) {
        const OwnChoice own = plan->chosen.own;
        unsigned char bytes[sizeof plan->chosen.algo];
        memcpy(bytes, &plan->chosen.algo, sizeof bytes);
        size_t at = (size_t)(own.tile ? snprintf(value, sizeof value, "own %s %d", own_tile(own.tile), own.splits) : snprintf(value, sizeof value, "algo "));
        for (size_t i = 0; i < sizeof bytes && !own.tile; i++) at += (size_t)snprintf(value + at, sizeof value - at, "%02x", bytes[i]);
        snprintf(value + at, sizeof value - at, " us %.3f", 1e6 * plan->seconds);
        plan->seconds = 1e-6 * strtod(value + at + 4, NULL);
    }
    plan_file_put(&m->file, key_of(m, &plan->product, key), value);
}

void keep_copy_rate(Matmul *m) {
    char key[KEY], value[64];
    snprintf(key, sizeof key, "%s copy", m->where);
    const int at = snprintf(value, sizeof value, "bytes_per_second ");
    snprintf(value + at, sizeof value - (size_t)at, "%.6e", m->copy_rate);
    m->copy_rate = strtod(value + at, NULL);
    plan_file_put(&m->file, key, value);
}

void recall_copy_rate(Matmul *m) {
    char key[KEY];
    snprintf(key, sizeof key, "%s copy", m->where);
    const char *value = plan_file_get(&m->file, key);
    if (value && (sscanf(value, "bytes_per_second %lf", &m->copy_rate) != 1 || !(m->copy_rate > 0 && m->copy_rate < 1e15))) m->copy_rate = 0;
}

static bool check_algorithm(const Matmul *m, const Plan *plan, const cublasLtMatmulAlgo_t *algo, cublasLtMatmulHeuristicResult_t *result) {
    return cublasLtMatmulAlgoCheck(m->handle, plan->desc, plan->left, plan->right, plan->out, plan->out, algo, result) == CUBLAS_STATUS_SUCCESS;
}

static bool recall_algorithm(const Matmul *m, Plan *plan, const char *value, double *microseconds) {
    char hex[HEX + 1];
    static_assert(HEX == 128, "the width in the format below");
    unsigned char bytes[sizeof plan->chosen.algo];
    cublasLtMatmulHeuristicResult_t result = {};
    if (sscanf(value, "algo %128[0-9a-f] us %lf", hex, microseconds) != 2 || strlen(hex) != HEX) return false;
    for (size_t i = 0; i < sizeof bytes; i++) {
        unsigned byte;
        if (sscanf(hex + 2 * i, "%2x", &byte) != 1) return false;
        bytes[i] = (unsigned char)byte;
    }
    memcpy(&plan->chosen.algo, bytes, sizeof bytes);
    plan->chosen.own = OwnChoice{0, 0};
    const bool ok = check_algorithm(m, plan, &plan->chosen.algo, &result);
    plan->chosen.workspace = result.workspaceSize;
    uint32_t scheme = 0;
    size_t written;
    return ok && cublasLtMatmulAlgoConfigGetAttribute(&plan->chosen.algo, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, &scheme, sizeof scheme, &written) == CUBLAS_STATUS_SUCCESS &&
           !(scheme & CUBLASLT_REDUCTION_SCHEME_INPLACE);
}

static bool recall_own(const CudaBackend *cuda, Plan *plan, const char *value, double *microseconds) {
    char tile[16];
    OwnChoice own = {0, 0};
    if (sscanf(value, "own %15s %d us %lf", tile, &own.splits, microseconds) != 3) return false;
    for (int i = 1; i <= OWN_TILES; i++)
        if (!strcmp(own_tile(i), tile)) own.tile = i;
    if (!own_takes(cuda, &plan->product, own)) return false;
    plan->chosen.own = own, plan->chosen.workspace = own_workspace(&plan->product, own);
    return true;
}

/* A line is believed where the library confirms the algorithm for this product, or we do one of ours. */
static bool recall(CudaBackend *cuda, Plan *plan) {
    Matmul *m = cuda->matmul;
    char key[KEY];
    double microseconds = 0;
    const char *value = plan_file_get(&m->file, key_of(m, &plan->product, key));
    if (!value) return false;
    if (!strcmp(value, "none")) return plan->state = PLAN_PLAIN, plan->from_file = true;
    if (!(recall_own(cuda, plan, value, &microseconds) || recall_algorithm(m, plan, value, &microseconds)) || !(microseconds > 0) || plan->chosen.workspace > WORKSPACE) {
        fprintf(stderr, "warning: plan file %s: the line of \"%s\" is not to be used; the product is timed anew\n", m->file.path, key);
        return false;
    }
    plan->workspace = plan->chosen.workspace;
    plan->seconds = 1e-6 * microseconds;
    plan->state = PLAN_CHOSEN;
    return plan->from_file = true;
}

/* ---- planning ---------------------------------------------------------------------------------------------------------------- */

static const cudaDataType_t ELEM = sizeof(elem) == 2 ? CUDA_R_16BF : CUDA_R_32F;
#define NOMINAL ((void *)(uintptr_t)16) /* a pointer that says alignment: the library reads that of bias and aux off their addresses */

static void set(Plan *plan, cublasLtMatmulDescAttributes_t attribute, const void *value, size_t bytes) {
    lt_check(cublasLtMatmulDescSetAttribute(plan->desc, attribute, value, bytes), "describing a product", &plan->product);
}

static void describe(Plan *plan) {
    static const cublasLtEpilogue_t epilogues[] = {CUBLASLT_EPILOGUE_DEFAULT, CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_GELU_AUX_BIAS, CUBLASLT_EPILOGUE_DGELU,
                                                   CUBLASLT_EPILOGUE_BGRADB};
    const Product *p = &plan->product;
    const int32_t left = p->b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N, right = p->a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    const uint32_t epilogue = epilogues[p->epilogue];
    const int64_t aux_row = (int64_t)p->c_row;
    void *nominal = NOMINAL;
    const char *doing = "describing a product";
    lt_check(cublasLtMatmulDescCreate(&plan->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F), doing, p); /* never TF32: fp32 is the backend for debugging */
    set(plan, CUBLASLT_MATMUL_DESC_TRANSA, &left, sizeof left);
    set(plan, CUBLASLT_MATMUL_DESC_TRANSB, &right, sizeof right);
    set(plan, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
    if (p->epilogue == EPI_BIAS || p->epilogue == EPI_BIAS_GELU || p->epilogue == EPI_BIAS_GRAD)
        set(plan, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &nominal, sizeof nominal);
    if (p->epilogue == EPI_BIAS_GELU || p->epilogue == EPI_DGELU) {
        set(plan, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &nominal, sizeof nominal);
        set(plan, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &aux_row, sizeof aux_row);
    }
    lt_check(cublasLtMatrixLayoutCreate(&plan->left, ELEM, p->b_transposed ? p->K : p->N, p->b_transposed ? p->N : p->K, (int64_t)p->b_row), doing, p);
    lt_check(cublasLtMatrixLayoutCreate(&plan->right, ELEM, p->a_transposed ? p->M : p->K, p->a_transposed ? p->K : p->M, (int64_t)p->a_row), doing, p);
    lt_check(cublasLtMatrixLayoutCreate(&plan->out, p->c_float ? CUDA_R_32F : ELEM, p->N, p->M, (int64_t)p->c_row), doing, p);
}

/* What every row of a matrix is aligned to when its first is, at most 16 bytes: the best kernels ask for 16. */
static uint32_t row_alignment(size_t row, size_t bytes_each) {
    size_t bytes = row * bytes_each, lowest = bytes & (0 - bytes);
    return (uint32_t)min(lowest, (size_t)16);
}
static size_t c_bytes(const Product *p) { return p->c_float ? sizeof(float) : sizeof(elem); }

/* The rules of cublasLt.h for what an epilogue takes; a bias or its gradient has the type of the output. */
static bool has_epilogue(const Product *p) {
    switch (p->epilogue) {
    case EPI_NONE: return true;
    case EPI_BIAS: return !p->c_float || sizeof(elem) == sizeof(float);
    case EPI_BIAS_GELU: case EPI_DGELU: return c_bytes(p) == sizeof(elem) && p->c_row % 8 == 0;
    case EPI_BIAS_GRAD: return c_bytes(p) == sizeof(float);
    }
    return false;
}

static void add_candidate(Plan *plan, const cublasLtMatmulAlgo_t *algo, size_t workspace) {
    if (plan->n_candidates == MOST_CANDIDATES || workspace > WORKSPACE) return;
    for (int i = 0; i < plan->n_candidates; i++)
        if (!memcmp(&plan->candidates[i].algo, algo, sizeof *algo)) return;
    plan->candidates[plan->n_candidates++] = Candidate{*algo, OwnChoice{0, 0}, workspace};
    plan->workspace = max(plan->workspace, workspace);
}

enum { MOST_ASKED = 64 };

/* The heuristic's list, in the order of its estimates; bf16 results are never reduced in bf16, and none in place, where cuBLAS promises that parts of k are added
 * one at a time but not in which order. Returns those that fill the device less than
 * twice over: split-K may be worth more to them than the heuristic thinks. */
static int ask_heuristic(Matmul *m, Plan *plan, size_t workspace, int ask, cublasLtMatmulAlgo_t few[], int most_few) {
    const Product *p = &plan->product;
    cublasLtMatmulHeuristicResult_t results[MOST_ASKED];
    cublasLtMatmulPreference_t preference;
    int n = 0, n_few = 0;
    const uint64_t limit = workspace;
    const uint32_t reduction = p->c_float ? CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE | CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE : CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    const uint32_t left = row_alignment(p->b_row, sizeof(elem)), right = row_alignment(p->a_row, sizeof(elem)), out = row_alignment(p->c_row, c_bytes(p));
    const struct { cublasLtMatmulPreferenceAttributes_t attribute; const void *value; size_t bytes; } settings[] = {
        {CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &limit, sizeof limit}, {CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reduction, sizeof reduction},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &left, sizeof left}, {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &right, sizeof right},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &out, sizeof out}, {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &out, sizeof out}};
    lt_check(cublasLtMatmulPreferenceCreate(&preference), "asking for algorithms", p);
    for (const auto &s : settings) lt_check(cublasLtMatmulPreferenceSetAttribute(preference, s.attribute, s.value, s.bytes), "asking for algorithms", p);
    const cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic(m->handle, plan->desc, plan->left, plan->right, plan->out, plan->out, preference, ask, results, &n);
    if (status != CUBLAS_STATUS_SUCCESS) n = 0; /* nothing for this shape, layout and epilogue */
    cublasLtMatmulPreferenceDestroy(preference);
    for (int i = 0; i < n; i++) {
        if (results[i].state != CUBLAS_STATUS_SUCCESS) continue;
        add_candidate(plan, &results[i].algo, results[i].workspaceSize);
        if (results[i].wavesCount < 2 && n_few < most_few) few[n_few++] = results[i].algo;
    }
    return n_few;
}

/* The same kernels with k cut into parts that are added in float in a separate step, in a fixed order. */
static void add_splits(Matmul *m, Plan *plan, const cublasLtMatmulAlgo_t *algo) {
    static const int32_t parts[] = {2, 3, 4, 6, 8, 12, 16};
    const uint32_t scheme = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    int32_t splits = 0;
    uint32_t schemes = 0;
    size_t written;
    if (cublasLtMatmulAlgoCapGetAttribute(algo, CUBLASLT_ALGO_CAP_SPLITK_SUPPORT, &splits, sizeof splits, &written) != CUBLAS_STATUS_SUCCESS || !splits) return;
    if (cublasLtMatmulAlgoCapGetAttribute(algo, CUBLASLT_ALGO_CAP_REDUCTION_SCHEME_MASK, &schemes, sizeof schemes, &written) != CUBLAS_STATUS_SUCCESS ||
        !(schemes & scheme)) return;
    for (int32_t n : parts) {
        cublasLtMatmulAlgo_t split = *algo;
        cublasLtMatmulHeuristicResult_t result = {};
        if (plan->product.K / (size_t)n < 128) break;
        if (cublasLtMatmulAlgoConfigSetAttribute(&split, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &n, sizeof n) == CUBLAS_STATUS_SUCCESS &&
            cublasLtMatmulAlgoConfigSetAttribute(&split, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, &scheme, sizeof scheme) == CUBLAS_STATUS_SUCCESS &&
            check_algorithm(m, plan, &split, &result))
            add_candidate(plan, &split, result.workspaceSize);
    }
}

static Plan *plan_new(CudaBackend *cuda, const Product *p) {
    Matmul *m = cuda->matmul;
    Plan *plan = insert(m, p);
    describe(plan);
    if (!has_epilogue(p)) return plan->state = PLAN_PLAIN, plan;
    if (recall(cuda, plan)) return plan;
    cublasLtMatmulAlgo_t few[6];
    plan->candidates = (Candidate *)xcalloc(MOST_CANDIDATES + OWN_TILES, sizeof *plan->candidates);
    const int n_few = ask_heuristic(m, plan, WORKSPACE, 8, few, (int)(sizeof few / sizeof *few)); /* the most promising first: time is short */
    for (int i = 0; i < n_few; i++) add_splits(m, plan, &few[i]);
    ask_heuristic(m, plan, WORKSPACE, MOST_ASKED, NULL, 0);
    ask_heuristic(m, plan, 0, MOST_ASKED, NULL, 0);
    OwnChoice own[OWN_TILES]; /* after the library's, whose first is taken where nothing can be timed */
    const int n_own = own_choices(cuda, p, own);
    if (n_own && cuda->options.own_products == OWN_ONLY) plan->n_candidates = 0, plan->workspace = 0;
    for (int i = 0; i < n_own; i++) {
        plan->candidates[plan->n_candidates++] = Candidate{{}, own[i], own_workspace(p, own[i])};
        plan->workspace = max(plan->workspace, own_workspace(p, own[i]));
    }
    return plan;
}

/* Scratch for one product: the next one may have the same, since the stream runs them in order. */
static void *take_workspace(CudaBackend *cuda, size_t bytes) {
    const size_t used = cuda->scratch_used;
    void *p = bytes ? scratch_bytes(cuda, bytes, "workspace of a matrix product") : NULL;
    cuda->scratch_used = used;
    return p;
}

void matmul_plan(CudaBackend *cuda, const Product *p) {
    CHECK(cuda->planning, "matmul_plan outside of planning");
    CHECK(p->M && p->N && p->K && (!p->add || p->c_float), "a product of %zu x %zu x %zu", p->M, p->N, p->K);
    CHECK(p->a_row >= (p->a_transposed ? p->M : p->K) && p->b_row >= (p->b_transposed ? p->K : p->N) && p->c_row >= p->N,
          "a product of %zu x %zu x %zu in rows of %zu, %zu, %zu", p->M, p->N, p->K, p->a_row, p->b_row, p->c_row);
    Plan *plan = find(cuda->matmul, p);
    if (!plan) plan = plan_new(cuda, p);
    take_workspace(cuda, plan->workspace);
}

bool matmul_supported(CudaBackend *cuda, const Product *p) {
    const Plan *plan = find_planned(cuda->matmul, p, "asking about");
    return plan->state == PLAN_CHOSEN || (plan->state == PLAN_NEW && plan->n_candidates);
}

bool matmul_fuse(CudaBackend *cuda, const Product *fused, const Product *plain, size_t bytes) {
    Matmul *m = cuda->matmul;
    Plan *plan = find_planned(m, fused, "fusing");
    if (cuda->planning) {
        plan->asked = true, plan->bytes = bytes;
        plan->plain = (size_t)(find_planned(m, plain, "fusing") - m->plans);
        return true;
    }
    CHECK(plan->asked && plan->state != PLAN_NEW, "a fusion that was not planned");
    return plan->fuse;
}

/* ---- in a step ------------------------------------------------------------------------------------------------------------------ */

cublasStatus_t candidate_issue(CudaBackend *cuda, const Plan *plan, const Candidate *candidate, const Operands *o, void *workspace) {
    const Product *p = &plan->product;
    if (candidate->own.tile) return own_issue(cuda, p, candidate->own, o, workspace), CUBLAS_STATUS_SUCCESS;
    const float one = 1, kept = p->add ? 1 : 0;
    const void *bias = p->epilogue == EPI_BIAS_GRAD ? (const void *)o->bias_grad : p->epilogue == EPI_BIAS || p->epilogue == EPI_BIAS_GELU ? o->bias : NULL;
    const void *aux = p->epilogue == EPI_BIAS_GELU || p->epilogue == EPI_DGELU ? o->aux : NULL;
    cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
    if (bias) status = cublasLtMatmulDescSetAttribute(plan->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias);
    if (aux && status == CUBLAS_STATUS_SUCCESS) status = cublasLtMatmulDescSetAttribute(plan->desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &aux, sizeof aux);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    return cublasLtMatmul(cuda->matmul->handle, plan->desc, &one, o->b, plan->left, o->a, plan->right, &kept, o->c, plan->out, o->c, plan->out, &candidate->algo,
                          workspace, candidate->workspace, cuda->stream);
}

/* Whether the operands are aligned as the plan was told. */
static bool aligned(const Product *p, const Operands *o) {
    const uintptr_t odd = ((uintptr_t)o->a & (row_alignment(p->a_row, sizeof(elem)) - 1)) | ((uintptr_t)o->b & (row_alignment(p->b_row, sizeof(elem)) - 1)) |
                          ((uintptr_t)o->c & (row_alignment(p->c_row, c_bytes(p)) - 1));
    const uintptr_t extra = (p->epilogue == EPI_BIAS || p->epilogue == EPI_BIAS_GELU ? (uintptr_t)o->bias : 0) |
                            (p->epilogue == EPI_BIAS_GELU || p->epilogue == EPI_DGELU ? (uintptr_t)o->aux : 0) |
                            (p->epilogue == EPI_BIAS_GRAD ? (uintptr_t)o->bias_grad : 0);
    return !odd && !(extra & 15);
}

void matmul(CudaBackend *cuda, const Product *p, const Operands *o) {
    const Plan *plan = find_planned(cuda->matmul, p, "running");
    CHECK(!cuda->planning && plan->state != PLAN_NEW, "a product before its plan is complete");
    CHECK(o->c && o->a && o->b && (p->epilogue != EPI_BIAS || o->bias) && (p->epilogue != EPI_BIAS_GELU || (o->bias && o->aux)) &&
          (p->epilogue != EPI_DGELU || o->aux) && (p->epilogue != EPI_BIAS_GRAD || o->bias_grad), "a product without its operands");
    if (plan->state == PLAN_PLAIN || !aligned(p, o)) return matmul_plain(cuda, p, o);
    lt_check(candidate_issue(cuda, plan, &plan->chosen, o, take_workspace(cuda, plan->workspace)), "multiplying", p);
}

/* ---- creation and report ------------------------------------------------------------------------------------------------------------ */

Matmul *matmul_create(CudaBackend *cuda, const char *plan_file, Error *e) {
    Matmul *m = (Matmul *)xcalloc(1, sizeof *m);
    cublasStatus_t status = cublasLtCreate(&m->handle);
    if (status != CUBLAS_STATUS_SUCCESS) {
        fail(e, EXIT_USAGE, "--device cuda: cuBLASLt %zu does not start on %s: %s; expected a driver as new as the library", cublasLtGetVersion(), cuda->device_name,
             cublasLtGetStatusString(status));
        free(m);
        return NULL;
    }
    size_t at = (size_t)snprintf(m->where, sizeof m->where, "%s", cuda->device_name);
    for (char *c = m->where; *c; c++)
        if (*c == ' ' || *c == '=') *c = '_';
    snprintf(m->where + at, sizeof m->where - at, " cublasLt-%zu%s %s", cublasLtGetVersion(), cuda->options.own_products == OWN_ONLY ? "+own-1-only" : cuda->options.own_products == OWN_ON ? "+own-1" : "",
             sizeof(elem) == 2 ? "bf16" : "fp32"); /* what our kernels are, beside the library's version: raise it with them */
    plan_file_open(&m->file, plan_file);
    return m;
}

void matmul_destroy(Matmul *m) {
    for (size_t i = 0; i < m->n_plans; i++) {
        cublasLtMatrixLayoutDestroy(m->plans[i].left), cublasLtMatrixLayoutDestroy(m->plans[i].right), cublasLtMatrixLayoutDestroy(m->plans[i].out);
        cublasLtMatmulDescDestroy(m->plans[i].desc);
        free(m->plans[i].candidates);
    }
    cublasLtDestroy(m->handle);
    plan_file_close(&m->file);
    free(m->plans);
    free(m->slots);
    free(m);
}

static uint32_t config_of(const Plan *plan, cublasLtMatmulAlgoConfigAttributes_t attribute, size_t bytes) {
    uint32_t value = 0;
    uint16_t narrow = 0;
    size_t written;
    void *to = bytes == sizeof narrow ? (void *)&narrow : (void *)&value;
    if (cublasLtMatmulAlgoConfigGetAttribute(&plan->chosen.algo, attribute, to, bytes, &written) != CUBLAS_STATUS_SUCCESS) return 0;
    return bytes == sizeof narrow ? narrow : value;
}

/* Tiles, stages and cluster shapes are cublasLt.h's numbers (cublasLtMatmulTile_t, ...Stages_t, cublasLtClusterShape_t); the usual tiles by
 * their size in the library's rows (our n) x columns (our m). */
static const char *tile_name(uint32_t id, char name[16]) {
#define TILE(size) {CUBLASLT_MATMUL_TILE_##size, #size}
    static const struct { uint32_t id; const char *name; } known[] = {
        TILE(64x64), TILE(128x64), TILE(64x128), TILE(128x128), TILE(256x64), TILE(64x256), TILE(128x256), TILE(256x128), TILE(128x160), TILE(160x128),
        TILE(192x128), TILE(128x192), TILE(128x96), TILE(96x128), TILE(64x96), TILE(96x64), TILE(32x128), TILE(128x32), TILE(64x32), TILE(32x64)};
#undef TILE
    for (const auto &k : known)
        if (k.id == id) return k.name;
    snprintf(name, 16, "#%u", id);
    return name;
}

static void print_algorithm(FILE *out, const Plan *plan) {
    char tile[16];
    const OwnChoice own = plan->chosen.own;
    if (own.tile) { fprintf(out, "own %s - 2 %d %.1f MiB", own_tile(own.tile), own.splits, (double)plan->chosen.workspace / 1048576); return; }
    fprintf(out, "%u %s %u %u %u %.1f MiB", config_of(plan, CUBLASLT_ALGO_CONFIG_ID, 4), tile_name(config_of(plan, CUBLASLT_ALGO_CONFIG_TILE_ID, 4), tile),
            config_of(plan, CUBLASLT_ALGO_CONFIG_STAGES_ID, 4), config_of(plan, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, 2),
            config_of(plan, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, 4), (double)plan->chosen.workspace / 1048576);
}

void matmul_print_plans(CudaBackend *cuda, FILE *out) {
    const Matmul *m = cuda->matmul;
    fprintf(out, "products (%s): shape | algorithm tile stages cluster split-K workspace | time TFLOP/s of peak\n", m->where);
    for (size_t i = 0; i < m->n_plans; i++) {
        const Plan *plan = &m->plans[i];
        const Product *p = &plan->product;
        const double rate = plan->seconds > 0 ? 2.0 * (double)p->M * (double)p->N * (double)p->K / plan->seconds : 0;
        char text[PRODUCT_TEXT], time[64] = "not timed", peak[16] = "n/a";
        if (rate > 0 && cuda->base.peak_flops > 0) snprintf(peak, sizeof peak, "%.1f %%", 100 * rate / cuda->base.peak_flops);
        if (rate > 0) snprintf(time, sizeof time, "%.1f us %.1f TFLOP/s %s", 1e6 * plan->seconds, 1e-12 * rate, peak);
        fprintf(out, "  %s | ", product_text(p, text));
        if (plan->state == PLAN_CHOSEN) print_algorithm(out, plan), fprintf(out, " | %s%s", time, plan->from_file ? ", from the plan file" : "");
        else if (plan->state == PLAN_NEW) fprintf(out, "not chosen yet");
        else fprintf(out, "%s", p->epilogue == EPI_NONE || p->epilogue == EPI_BIAS ? "our plain kernel" : "not in the library");
        if (plan->best[0] > 0) fprintf(out, " | library %.1f us, own %.1f us", 1e6 * plan->best[0], 1e6 * plan->best[1]);
        fprintf(out, "%s\n", !plan->asked ? "" : plan->fuse ? " | fused" : " | composed");
    }
    if (m->copy_rate > 0) fprintf(out, "  a copy moves %.2f TB/s, reads and writes\n", 1e-12 * m->copy_rate);
}

} /* namespace */
