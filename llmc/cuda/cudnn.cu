/* Attention by cuDNN, to compare ours with (--attention cudnn): both directions as graphs of cuDNN's C backend API. Its one operation for the
 * whole (SDPA) has no causal mask before 9.21, so the graphs are composed of products, reductions and pointwise operations, which cuDNN
 * recognises as attention and runs as fused kernels. Graphs become plans while planning, by shape; a step only executes them. The saved
 * statistic is ours: log sum exp, so either forward serves either backward. Not for the emulator (dev/emu/absent.cpp). */
#ifndef LLMC_EMU
#include "attention.cuh"
#ifdef LLMC_CUDNN
#include <cudnn_backend.h>
#endif
#if LLMC_BF16 && defined(LLMC_CUDNN) && CUDNN_VERSION >= 90000

namespace LLMC_NS {

typedef cudnnBackendDescriptor_t Desc;
enum { OLDEST = 91002, MADE = 256, OPS = 32, PLANS = 64, CANDIDATES = 16 };

/* Tensors that the caller binds; the ones inside a graph are numbered from UID_VIRTUAL on. */
enum Uid { UID_Q = 1, UID_K, UID_V, UID_OUT, UID_STATS, UID_DOUT, UID_DQ, UID_DK, UID_DV, UID_DELTA, UID_SCALE, UID_MASKED, UID_ONE, UID_VIRTUAL };

struct Plan {
    AttentionShape s;
    bool backward;
    Desc plan;                /* NULL: cuDNN does not take this shape */
    size_t workspace;
    Desc made[MADE];          /* all descriptors, the plan's too: destroyed at the end */
    int n_made;
    /* while it is built */
    Desc ops[OPS];
    int n_ops;
    int64_t next_uid;
    char why[300];            /* the first thing that failed; "" : nothing */
    char refused[300];        /* why the first engine did not take the graph */
    int proposed, unsteady;   /* engines; of which not known to give the same bits twice */
};
struct Cudnn {
    cudnnHandle_t handle;
    size_t version;
    Plan *plans[PLANS];
    int n_plans;
};

/* ---- descriptors; after the first failure of a graph nothing more is asked of cuDNN ------------------------------------------------ */

static bool works(Plan *p, cudnnStatus_t status, const char *doing) {
    if (*p->why) return false;
    if (status == CUDNN_STATUS_SUCCESS) return true;
    char text[200] = "";
    cudnnGetLastErrorString(text, sizeof text);
    snprintf(p->why, sizeof p->why, "%s: %s%s%.180s", doing, cudnnGetErrorString(status), *text ? ": " : "", text);
    return false;
}

static Desc make(Plan *p, cudnnBackendDescriptorType_t type) {
    Desc d = NULL;
    if (*p->why || !works(p, cudnnBackendCreateDescriptor(type, &d), "making a descriptor")) return NULL;
    CHECK(p->n_made < MADE, "cuDNN graph of more than %d descriptors", (int)MADE);
    return p->made[p->n_made++] = d;
}
static void set(Plan *p, Desc d, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, int64_t n, const void *values,
                const char *doing) {
    if (!*p->why) works(p, cudnnBackendSetAttribute(d, name, type, n, values), doing);
}
static void set_desc(Plan *p, Desc d, cudnnBackendAttributeName_t name, Desc value, const char *doing) {
    set(p, d, name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &value, doing);
}
static bool finish(Plan *p, Desc d, const char *doing) { return !*p->why && works(p, cudnnBackendFinalize(d), doing); }
static void add(Plan *p, Desc op, const char *doing) {
    if (!finish(p, op, doing)) return;
    CHECK(p->n_ops < OPS, "cuDNN graph of more than %d operations", (int)OPS);
    p->ops[p->n_ops++] = op;
}

/* ---- tensors: always four sizes, (B, H, rows, columns) ----------------------------------------------------------------------------- */

enum Place { BOUND, VIRTUAL, BY_VALUE };
struct Layout { int64_t size[4], stride[4]; };

static Desc tensor(Plan *p, Place place, int64_t uid, cudnnDataType_t type, const Layout &l) {
    const int64_t alignment = 16;
    const bool yes = true;
    Desc d = make(p, CUDNN_BACKEND_TENSOR_DESCRIPTOR);
    if (place == VIRTUAL) uid = p->next_uid++;
    set(p, d, CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &type, "a tensor's type");
    set(p, d, CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, l.size, "a tensor's sizes");
    set(p, d, CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, l.stride, "a tensor's strides");
    set(p, d, CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64, 1, &uid, "a tensor's number");
    set(p, d, CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64, 1, &alignment, "a tensor's alignment");
    if (place == VIRTUAL) set(p, d, CUDNN_ATTR_TENSOR_IS_VIRTUAL, CUDNN_TYPE_BOOLEAN, 1, &yes, "a tensor inside");
    if (place == BY_VALUE) set(p, d, CUDNN_ATTR_TENSOR_IS_BY_VALUE, CUDNN_TYPE_BOOLEAN, 1, &yes, "a number");
    finish(p, d, "a tensor");
    return d;
}

/* The layouts. Of a head's rows in qkv or dqkv, with rows 3C apart, and in out or dout; of the same seen transposed; of scores; of statistics. */
static Layout rows_of(AttentionShape s, int64_t row) {
    return Layout{{(int64_t)s.B, (int64_t)s.H, (int64_t)s.T, (int64_t)s.D}, {(int64_t)s.T * row, (int64_t)s.D, row, 1}};
}
static Layout transposed(Layout l) {
    return Layout{{l.size[0], l.size[1], l.size[3], l.size[2]}, {l.stride[0], l.stride[1], l.stride[3], l.stride[2]}};
}
static Layout dense(AttentionShape s, size_t columns) {
    const int64_t H = (int64_t)s.H, T = (int64_t)s.T, n = (int64_t)columns;
    return Layout{{(int64_t)s.B, H, T, n}, {H * T * n, T * n, n, 1}};
}
static int64_t packed(AttentionShape s) { return 3 * (int64_t)(s.H * s.D); }
static Desc number(Plan *p, int64_t uid) { return tensor(p, BY_VALUE, uid, CUDNN_DATA_FLOAT, Layout{{1, 1, 1, 1}, {1, 1, 1, 1}}); }
static Desc inside(Plan *p, size_t columns) { return tensor(p, VIRTUAL, 0, CUDNN_DATA_FLOAT, dense(p->s, columns)); }

/* ---- operations ------------------------------------------------------------------------------------------------------------------------ */

static void product(Plan *p, Desc c, Desc a, Desc b) {
    const cudnnDataType_t compute = CUDNN_DATA_FLOAT;
    Desc matmul = make(p, CUDNN_BACKEND_MATMUL_DESCRIPTOR), op = make(p, CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR);
    set(p, matmul, CUDNN_ATTR_MATMUL_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &compute, "a product's type");
    finish(p, matmul, "a product's type");
    set_desc(p, op, CUDNN_ATTR_OPERATION_MATMUL_ADESC, a, "a product");
    set_desc(p, op, CUDNN_ATTR_OPERATION_MATMUL_BDESC, b, "a product");
    set_desc(p, op, CUDNN_ATTR_OPERATION_MATMUL_CDESC, c, "a product");
    set_desc(p, op, CUDNN_ATTR_OPERATION_MATMUL_DESC, matmul, "a product");
    add(p, op, "a product");
}

/* y = mode(x), mode(x, b), or t ? x : b. axis: of GEN_INDEX. */
static void pointwise(Plan *p, cudnnPointwiseMode_t mode, Desc y, Desc x, Desc b = NULL, Desc t = NULL, int64_t axis = -1) {
    const bool compares = mode == CUDNN_POINTWISE_CMP_GE;
    const cudnnDataType_t compute = compares ? CUDNN_DATA_BOOLEAN : CUDNN_DATA_FLOAT;
    Desc what = make(p, CUDNN_BACKEND_POINTWISE_DESCRIPTOR), op = make(p, CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR);
    set(p, what, CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, 1, &mode, "a pointwise operation's mode");
    set(p, what, CUDNN_ATTR_POINTWISE_MATH_PREC, CUDNN_TYPE_DATA_TYPE, 1, &compute, "a pointwise operation's type");
    if (axis >= 0) set(p, what, CUDNN_ATTR_POINTWISE_AXIS, CUDNN_TYPE_INT64, 1, &axis, "a pointwise operation's axis");
    finish(p, what, "a pointwise operation's mode");
    set_desc(p, op, CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, what, "a pointwise operation");
    set_desc(p, op, CUDNN_ATTR_OPERATION_POINTWISE_XDESC, x, "a pointwise operation");
    set_desc(p, op, CUDNN_ATTR_OPERATION_POINTWISE_YDESC, y, "a pointwise operation");
    if (b) set_desc(p, op, CUDNN_ATTR_OPERATION_POINTWISE_BDESC, b, "a pointwise operation");
    if (t) set_desc(p, op, CUDNN_ATTR_OPERATION_POINTWISE_TDESC, t, "a pointwise operation");
    add(p, op, "a pointwise operation");
}

/* y (rows, 1) = the sum or maximum of each row of x */
static void reduce(Plan *p, cudnnReduceTensorOp_t mode, Desc y, Desc x) {
    const cudnnDataType_t compute = CUDNN_DATA_FLOAT;
    Desc what = make(p, CUDNN_BACKEND_REDUCTION_DESCRIPTOR), op = make(p, CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR);
    set(p, what, CUDNN_ATTR_REDUCTION_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, &compute, "a reduction's type");
    set(p, what, CUDNN_ATTR_REDUCTION_OPERATOR, CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, 1, &mode, "a reduction's mode");
    finish(p, what, "a reduction's mode");
    set_desc(p, op, CUDNN_ATTR_OPERATION_REDUCTION_DESC, what, "a reduction");
    set_desc(p, op, CUDNN_ATTR_OPERATION_REDUCTION_XDESC, x, "a reduction");
    set_desc(p, op, CUDNN_ATTR_OPERATION_REDUCTION_YDESC, y, "a reduction");
    add(p, op, "a reduction");
}

/* The same elements seen with other sizes and strides: how a graph transposes. */
static Desc view(Plan *p, Desc x, const Layout &l) {
    Desc y = tensor(p, VIRTUAL, 0, CUDNN_DATA_BFLOAT16, l), op = make(p, CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR);
    set_desc(p, op, CUDNN_ATTR_OPERATION_RESHAPE_XDESC, x, "a reshape");
    set_desc(p, op, CUDNN_ATTR_OPERATION_RESHAPE_YDESC, y, "a reshape");
    add(p, op, "a reshape");
    return y;
}

/* x (B, H, T, T) with -infinity above the diagonal: x where row >= column. */
static Desc causal(Plan *p, Desc x) {
    const Layout l = dense(p->s, p->s.T);
    Desc row = tensor(p, VIRTUAL, 0, CUDNN_DATA_INT32, l), column = tensor(p, VIRTUAL, 0, CUDNN_DATA_INT32, l);
    Desc kept = tensor(p, VIRTUAL, 0, CUDNN_DATA_BOOLEAN, l), y = inside(p, p->s.T);
    pointwise(p, CUDNN_POINTWISE_GEN_INDEX, row, x, NULL, NULL, 2);
    pointwise(p, CUDNN_POINTWISE_GEN_INDEX, column, x, NULL, NULL, 3);
    pointwise(p, CUDNN_POINTWISE_CMP_GE, kept, row, column);
    pointwise(p, CUDNN_POINTWISE_BINARY_SELECT, y, x, number(p, UID_MASKED), kept);
    return y;
}

/* ---- the graphs ------------------------------------------------------------------------------------------------------------------------ */

/* stats = log sum exp(scale q k^T, masked), out = exp(... - max) / sum v */
static void forward_graph(Plan *p) {
    const AttentionShape s = p->s;
    const Layout in = rows_of(s, packed(s));
    Desc q = tensor(p, BOUND, UID_Q, CUDNN_DATA_BFLOAT16, in), kt = tensor(p, BOUND, UID_K, CUDNN_DATA_BFLOAT16, transposed(in));
    Desc v = tensor(p, BOUND, UID_V, CUDNN_DATA_BFLOAT16, in), out = tensor(p, BOUND, UID_OUT, CUDNN_DATA_BFLOAT16, rows_of(s, packed(s) / 3));
    Desc stats = tensor(p, BOUND, UID_STATS, CUDNN_DATA_FLOAT, dense(s, 1));
    Desc dot = inside(p, s.T), score = inside(p, s.T), max = inside(p, 1), below = inside(p, s.T), power = inside(p, s.T);
    Desc sum = inside(p, 1), log_sum = inside(p, 1), weight = tensor(p, VIRTUAL, 0, CUDNN_DATA_BFLOAT16, dense(s, s.T));
    product(p, dot, q, kt);
    pointwise(p, CUDNN_POINTWISE_MUL, score, dot, number(p, UID_SCALE));
    Desc masked = causal(p, score);
    reduce(p, CUDNN_REDUCE_TENSOR_MAX, max, masked);
    pointwise(p, CUDNN_POINTWISE_SUB, below, masked, max);
    pointwise(p, CUDNN_POINTWISE_EXP, power, below);
    reduce(p, CUDNN_REDUCE_TENSOR_ADD, sum, power);
    pointwise(p, CUDNN_POINTWISE_LOG, log_sum, sum);
    pointwise(p, CUDNN_POINTWISE_ADD, stats, max, log_sum);
    pointwise(p, CUDNN_POINTWISE_DIV, weight, power, sum);
    product(p, out, weight, v);
}

/* weight = exp(scale q k^T - stats, masked); dv = weight^T dout; ds = weight (dout v^T - delta) scale with delta = row sums of dout out;
 * dk = ds^T q; dq = ds k. That dq is the product itself, and not a float32 sum that blocks add to in any order, is how a graph asks for the
 * deterministic kernel; cuDNN pays for it with a workspace of B H T^2 elements. */
static void backward_graph(Plan *p) {
    const AttentionShape s = p->s;
    const Layout in = rows_of(s, packed(s)), rows = rows_of(s, packed(s) / 3), across = transposed(dense(s, s.T));
    Desc q = tensor(p, BOUND, UID_Q, CUDNN_DATA_BFLOAT16, in), kt = tensor(p, BOUND, UID_K, CUDNN_DATA_BFLOAT16, transposed(in));
    Desc vt = tensor(p, BOUND, UID_V, CUDNN_DATA_BFLOAT16, transposed(in)), out = tensor(p, BOUND, UID_OUT, CUDNN_DATA_BFLOAT16, rows);
    Desc dout = tensor(p, BOUND, UID_DOUT, CUDNN_DATA_BFLOAT16, rows), stats = tensor(p, BOUND, UID_STATS, CUDNN_DATA_FLOAT, dense(s, 1));
    Desc dq = tensor(p, BOUND, UID_DQ, CUDNN_DATA_BFLOAT16, in), dk = tensor(p, BOUND, UID_DK, CUDNN_DATA_BFLOAT16, in);
    Desc dv = tensor(p, BOUND, UID_DV, CUDNN_DATA_BFLOAT16, in), delta = tensor(p, BOUND, UID_DELTA, CUDNN_DATA_FLOAT, dense(s, 1));
    Desc scale = number(p, UID_SCALE), each = inside(p, s.D), row = inside(p, 1), dot = inside(p, s.T), score = inside(p, s.T);
    Desc below = inside(p, s.T), weight = inside(p, s.T), dweight = inside(p, s.T);
    Desc centred = inside(p, s.T), dscore = inside(p, s.T), ds = inside(p, s.T);
    pointwise(p, CUDNN_POINTWISE_MUL, each, dout, out);
    reduce(p, CUDNN_REDUCE_TENSOR_ADD, row, each);
    pointwise(p, CUDNN_POINTWISE_MUL, delta, row, number(p, UID_ONE));
    product(p, dot, q, kt);
    pointwise(p, CUDNN_POINTWISE_MUL, score, dot, scale);
    pointwise(p, CUDNN_POINTWISE_SUB, below, score, stats);
    pointwise(p, CUDNN_POINTWISE_EXP, weight, causal(p, below));
    product(p, dv, view(p, weight, across), dout);
    product(p, dweight, dout, vt);
    pointwise(p, CUDNN_POINTWISE_SUB, centred, dweight, delta);
    pointwise(p, CUDNN_POINTWISE_MUL, dscore, centred, weight);
    pointwise(p, CUDNN_POINTWISE_MUL, ds, dscore, scale);
    product(p, dk, view(p, ds, across), q);
    product(p, dq, ds, view(p, kt, in));
}

/* ---- plans ----------------------------------------------------------------------------------------------------------------------------- */

/* Whether an engine says that its results may differ from run to run. (Not all that should do: what counts is the form of the graph.) */
static bool nondeterministic(Plan *p, Desc config) {
    cudnnBackendNumericalNote_t notes[CUDNN_NUMERICAL_NOTE_TYPE_COUNT];
    int64_t n = 0;
    Desc engine = make(p, CUDNN_BACKEND_ENGINE_DESCRIPTOR);
    if (!engine || cudnnBackendGetAttribute(config, CUDNN_ATTR_ENGINECFG_ENGINE, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &n, &engine) ||
        cudnnBackendGetAttribute(engine, CUDNN_ATTR_ENGINE_NUMERICAL_NOTE, CUDNN_TYPE_NUMERICAL_NOTE, CUDNN_NUMERICAL_NOTE_TYPE_COUNT, &n, notes))
        return true;
    for (int64_t i = 0; i < n && i < CUDNN_NUMERICAL_NOTE_TYPE_COUNT; i++)
        if (notes[i] == CUDNN_NUMERICAL_NOTE_NONDETERMINISTIC) return true;
    return false;
}

/* Of what the heuristic proposes, best first: the first deterministic engine that takes the graph. */
static bool choose(Plan *p, Desc graph, cudnnBackendHeurMode_t mode) {
    Desc heuristic = make(p, CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR), configs[CANDIDATES];
    int64_t n = 0;
    set_desc(p, heuristic, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, graph, "the heuristic's graph");
    set(p, heuristic, CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, 1, &mode, "the heuristic's mode");
    finish(p, heuristic, "asking the heuristic");
    for (int i = 0; i < CANDIDATES; i++) configs[i] = make(p, CUDNN_BACKEND_ENGINECFG_DESCRIPTOR);
    if (*p->why) return false;
    cudnnStatus_t status = cudnnBackendGetAttribute(heuristic, CUDNN_ATTR_ENGINEHEUR_RESULTS, CUDNN_TYPE_BACKEND_DESCRIPTOR, CANDIDATES, &n, configs);
    if (!works(p, status, "asking the heuristic")) return false;
    for (int64_t i = 0; i < n && i < CANDIDATES; i++) {
        int64_t bytes = 0, count = 0;
        p->proposed++;
        if (nondeterministic(p, configs[i])) { p->unsteady++; continue; }
        Desc plan = make(p, CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR);
        set_desc(p, plan, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, configs[i], "a plan's engine");
        if (!finish(p, plan, "the plan")) {
            if (!*p->refused) memcpy(p->refused, p->why, sizeof p->refused);
            *p->why = 0;
            continue;
        }
        if (cudnnBackendGetAttribute(plan, CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE, CUDNN_TYPE_INT64, 1, &count, &bytes)) continue;
        p->plan = plan;
        p->workspace = (size_t)bytes;
        return true;
    }
    return false;
}

static void build(Plan *p, cudnnHandle_t handle) {
    p->next_uid = UID_VIRTUAL;
    if (p->backward) backward_graph(p);
    else forward_graph(p);
    Desc graph = make(p, CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);
    set(p, graph, CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, p->n_ops, p->ops, "the graph's operations");
    set(p, graph, CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle, "the graph's device");
    if (!finish(p, graph, "the graph")) return;
    if (choose(p, graph, CUDNN_HEUR_MODE_A)) return;
    *p->why = 0;
    if (choose(p, graph, CUDNN_HEUR_MODE_FALLBACK) || *p->why) return;
    snprintf(p->why, sizeof p->why, "%.220s; of %d engines %d are not known to be deterministic", *p->refused ? p->refused : "no deterministic engine takes it", p->proposed, p->unsteady);
}

static void drop(Plan *p) {
    while (p->n_made > 0) cudnnBackendDestroyDescriptor(p->made[--p->n_made]);
    free(p);
}

/* What cuDNN is known not to do, or to do wrong, in words; NULL: it may be asked. */
static const char *refusal(const Cudnn *c, AttentionShape s, bool backward) {
    if (s.D % 8 || s.D > 256) return "the head size is not a multiple of 8 up to 256";
    if (s.T == 1) return "one position alone";
    if (backward && c->version <= 91500 && s.T % 128) return "before 9.15.1 its backward needs T to be a multiple of 128";
    return NULL;
}

/* The plan of a shape; it is built where it is first asked for, which is while planning. NULL: ours takes it; said once a shape. */
static Plan *plan_of(CudaBackend *cuda, AttentionShape s, bool backward) {
    Cudnn *c = (Cudnn *)cuda->cudnn;
    for (int i = 0; i < c->n_plans; i++) {
        Plan *p = c->plans[i];
        if (p->backward == backward && p->s.B == s.B && p->s.T == s.T && p->s.H == s.H && p->s.D == s.D) return p->plan ? p : NULL;
    }
    CHECK(cuda->planning, "%s: B %zu, T %zu, H %zu, D %zu was not planned", op_names[cuda->op], s.B, s.T, s.H, s.D);
    CHECK(c->n_plans < PLANS, "more than %d plans of attention", (int)PLANS);
    Plan *p = c->plans[c->n_plans++] = (Plan *)xcalloc(1, sizeof *p);
    const char *no = refusal(c, s, backward);
    p->s = s;
    p->backward = backward;
    if (no) snprintf(p->why, sizeof p->why, "%s", no);
    else build(p, c->handle);
    if (p->plan) return p;
    fprintf(stderr, "note: cuDNN does not take attention_%s(B %zu, T %zu, H %zu, D %zu): %s; ours does it\n", backward ? "backward" : "forward", s.B,
            s.T, s.H, s.D, p->why);
    return NULL;
}

struct Binding { int64_t uid; const void *p; };

static void execute(CudaBackend *cuda, const Plan *p, const Binding *bindings, int n, void *workspace) {
    enum { MOST = 16 };
    const Cudnn *c = (const Cudnn *)cuda->cudnn;
    int64_t uids[MOST];
    const void *pointers[MOST];
    Desc pack = NULL;
    CHECK(n <= MOST, "%d operands of cuDNN", n);
    for (int i = 0; i < n; i++) uids[i] = bindings[i].uid, pointers[i] = bindings[i].p;
    cudnnStatus_t status = cudnnBackendCreateDescriptor(CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR, &pack);
    if (!status) status = cudnnBackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, n, pointers);
    if (!status) status = cudnnBackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, n, uids);
    if (!status) status = cudnnBackendSetAttribute(pack, CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &workspace);
    if (!status) status = cudnnBackendFinalize(pack);
    if (!status) status = cudnnBackendExecute(c->handle, p->plan, pack);
    if (status) {
        char text[300] = "";
        cudnnGetLastErrorString(text, sizeof text);
        fprintf(stderr, "error: cuDNN: %s in %s(B %zu, T %zu, H %zu, D %zu) %s\n", cudnnGetErrorString(status), op_names[cuda->op], p->s.B, p->s.T,
                p->s.H, p->s.D, text);
        exit(EXIT_DEVICE);
    }
    cudnnBackendDestroyDescriptor(pack);
}

/* Numbers that graphs take by value: read when a plan is executed. */
static const float masked_score = -INFINITY, number_one = 1;
static float scale_of(AttentionShape s) { return (float)(1 / sqrt((double)s.D)); }

/* ---- the interface ----------------------------------------------------------------------------------------------------------------------- */

void *cudnn_create(CudaBackend *cuda, Error *e) {
    const size_t version = cudnnGetVersion();
    Cudnn *c = (Cudnn *)xcalloc(1, sizeof *c);
    c->version = version;
    cudnnStatus_t status = CUDNN_STATUS_SUCCESS;
    if (version < OLDEST)
        fail(e, EXIT_USAGE, "--attention cudnn: found cuDNN %zu.%zu.%zu, expected 9.10.2 or later; use --attention ours", version / 10000,
             version / 100 % 100, version % 100);
    else if ((status = cudnnCreate(&c->handle)) || (status = cudnnSetStream(c->handle, cuda->stream)))
        fail(e, EXIT_USAGE, "--attention cudnn: cuDNN does not start: %s; use --attention ours", cudnnGetErrorString(status));
    else return c;
    cudnn_destroy(c);
    return NULL;
}

void cudnn_destroy(void *cudnn) {
    Cudnn *c = (Cudnn *)cudnn;
    while (c->n_plans > 0) drop(c->plans[--c->n_plans]);
    if (c->handle) cudnnDestroy(c->handle);
    free(c);
}

bool cudnn_attention_forward(CudaBackend *cuda, const AttentionForward *a) {
    const AttentionShape s = {a->B, a->T, a->H, a->D};
    Plan *p = plan_of(cuda, s, false);
    if (!p) return false;
    char *workspace = scratch<char>(cuda, p->workspace, "cuDNN's workspace");
    float *unsaved = scratch<float>(cuda, s.B * s.H * s.T, "cuDNN's statistics");
    if (cuda->planning) return true;
    CHECK(a->out.p && a->qkv.p, "attention_forward: operand absent");
    const elem *q = (const elem *)a->qkv.p;
    const size_t C = s.H * s.D;
    const float scale = scale_of(s);
    const Binding b[] = {{UID_Q, q}, {UID_K, q + C}, {UID_V, q + 2 * C}, {UID_OUT, a->out.p}, {UID_STATS, a->saved.p ? a->saved.p : unsaved},
                         {UID_SCALE, &scale}, {UID_MASKED, &masked_score}};
    execute(cuda, p, b, sizeof b / sizeof *b, workspace);
    return true;
}

bool cudnn_attention_backward(CudaBackend *cuda, const AttentionBackward *a) {
    const AttentionShape s = {a->B, a->T, a->H, a->D};
    Plan *p = plan_of(cuda, s, true);
    if (!p) return false;
    char *workspace = scratch<char>(cuda, p->workspace, "cuDNN's workspace");
    float *delta = scratch<float>(cuda, s.B * s.H * s.T, "attention delta");
    if (cuda->planning) return true;
    CHECK(a->dqkv.p && a->dout.p && a->out.p && a->saved.p && a->qkv.p, "attention_backward: operand absent");
    const elem *q = (const elem *)a->qkv.p, *dq = (const elem *)a->dqkv.p;
    const size_t C = s.H * s.D;
    const float scale = scale_of(s);
    const Binding b[] = {{UID_Q, q}, {UID_K, q + C}, {UID_V, q + 2 * C}, {UID_OUT, a->out.p}, {UID_STATS, a->saved.p}, {UID_DOUT, a->dout.p},
                         {UID_DQ, dq}, {UID_DK, dq + C}, {UID_DV, dq + 2 * C}, {UID_DELTA, delta},
                         {UID_SCALE, &scale}, {UID_MASKED, &masked_score}, {UID_ONE, &number_one}};
    execute(cuda, p, b, sizeof b / sizeof *b, workspace);
    return true;
}

} /* namespace */

#else /* fp32, or no cuDNN */

namespace LLMC_NS {

void *cudnn_create(CudaBackend *, Error *e) {
    if (LLMC_BF16) fail(e, EXIT_USAGE, "--attention cudnn: this build has no cuDNN 9; use --attention ours");
    else fail(e, EXIT_USAGE, "--attention cudnn: cuDNN computes attention in bf16 only; use --dtype bf16 or --attention ours");
    return NULL;
}
void cudnn_destroy(void *) {}
bool cudnn_attention_forward(CudaBackend *, const AttentionForward *) { return false; }
bool cudnn_attention_backward(CudaBackend *, const AttentionBackward *) { return false; }

} /* namespace */
#endif
#endif
