/* Inside the CUDA backend: its state, and what its ops share. */
#ifndef LLMC_CUDA_BACKEND_CUH
#define LLMC_CUDA_BACKEND_CUH
#include "../ops.h"
#include "kernel.cuh"
#include "matmul.cuh"

namespace LLMC_NS {

struct Block { /* what alloc has given out */
    void *p;
    size_t bytes;
    MemClass class_;
    char what[48];
};

enum { RECORDINGS = 16, RING_SLOTS = 8, RING_BYTES = 1 << 20 };

struct Recording {
    uint64_t key;             /* 0: free */
    int calls;                /* how often it was issued */
    cudaGraphExec_t graph;    /* NULL until recorded */
};

struct CudaStaging { /* events: the ops that a fetch is behind; the ends of the newest fetch and the newest bring */
    Staging base;             /* first */
    cudaEvent_t issued, fetched, brought;
};

struct Stall { cudaEvent_t begin, end; bool open; }; /* around a wait of the op stream; open: not yet counted */

struct CudaBackend {
    Backend base;             /* first */
    CudaOptions options;
    cudaStream_t stream;      /* all ops */
    cudaStream_t copy_stream; /* uploads, ahead of the ops */
    cudaStream_t fetch_stream, bring_stream; /* large copies beside the ops, each way */
    cudaStream_t side_stream; /* what devices tell each other */
    cudaEvent_t side_begun, *side_ends; /* by marker; NULL: not yet used */
    size_t n_side_ends, n_stalls;
    Stall *stalls;
    double side_waited;       /* seconds, of the stalls that were counted */
    int sm_count, capability; /* 90 for sm_90 */
    size_t shared_limit;      /* dynamic shared memory of a block */
    char device_name[128], device_id[40];

    Block *blocks;
    size_t n_blocks, blocks_room;

    bool planning;
    OpId op;                  /* the op that runs, for messages */
    char *scratch;
    size_t scratch_bytes, scratch_used, scratch_need;

    struct { char *host, *device; cudaEvent_t uploaded, taken; bool busy; } ring[RING_SLOTS];
    unsigned ring_next;
    struct { char *host; cudaEvent_t done; size_t bytes; } posts[POST_SLOTS];

    Recording recordings[RECORDINGS];
    int recording;            /* index while the stream is captured, else -1 */
    uint64_t launches;        /* of kernels, for reports */

    Matmul *matmul;
    void *cudnn;              /* cudnn.cu's own, NULL: attention is ours */
    bool hopper_attention;    /* by the kernels for Hopper */
};

static inline CudaBackend *cuda_of(Backend *b) { return (CudaBackend *)b; }

/* Begins an op: its scratch is empty again. */
static inline void op_begin(CudaBackend *cuda, OpId op) {
    cuda->op = op;
    cuda->scratch_used = 0;
}
/* n elements of scratch, aligned to 256 bytes, content undefined. While planning the pointer may not be used: an op takes all its scratch
 * and plans its products first, then returns if cuda->planning. */
void *scratch_bytes(CudaBackend *, size_t bytes, const char *what);
template <class T> T *scratch(CudaBackend *cuda, size_t n, const char *what) { return (T *)scratch_bytes(cuda, n * sizeof(T), what); }

/* ---- the ops: cuda_NAME in the file of their subject ---------------------------------------------------------------- */
#define LLMC_CUDA_OP(name, Args) void cuda_##name(Backend *, const Args *);
LLMC_OPS(LLMC_CUDA_OP)
#undef LLMC_CUDA_OP
size_t cuda_attention_saved_bytes(Backend *, size_t B, size_t T, size_t H, size_t D);

/* ---- pieces that several ops use ------------------------------------------------------------------------------------- */
/* out[i] = gelu(pre[i]); dpre[i] = dpre[i] gelu'(pre[i]), each rounded once (gelu.cu). */
void gelu_run(CudaBackend *, elem *out, const elem *pre, size_t n);
void gelu_backward_run(CudaBackend *, elem *dpre, const elem *pre, size_t n);
/* db[c] += sum over rows of dout[r, c], rows in a fixed order, float sums over blocks of rows, then over blocks (bias.cu). Takes scratch:
 * call bias_scratch while planning. */
size_t bias_backward_scratch(size_t N, size_t OC);
void bias_backward_run(CudaBackend *, float *db, const elem *dout, size_t N, size_t OC, float *partial);
/* first[c] += sum over i of partial[i, c] for c < n_first, second[c - n_first] += the same from there on; partial (n, columns), i in a fixed
 * order (bias.cu). What kernels that sum over rows without float atomics end with. second may be absent when n_first = columns. */
void add_partials_run(CudaBackend *, float *first, size_t n_first, float *second, const float *partial, size_t n, size_t columns);

/* The side_ functions of that name in ops.h (wire.cu). */
void cuda_side_round(Backend *, uint16_t *to, const float *from, size_t rows, size_t stride, size_t n, size_t own);
void cuda_side_sum(Backend *, float *data, const uint16_t *others, size_t parts, size_t own, size_t n);

/* cudnn.cu: NULL with *e set where the library is absent or too old. */
void *cudnn_create(CudaBackend *, Error *e);
void cudnn_destroy(void *);
/* False: this shape is not for cuDNN, use ours. Called while planning too (it then states scratch and builds its plan). */
bool cudnn_attention_forward(CudaBackend *, const AttentionForward *);
bool cudnn_attention_backward(CudaBackend *, const AttentionBackward *);

/* step.cu: the architecture that the code was compiled for which this GPU runs, as 80; code that is compiled anew at load has its own number. */
int code_version();
/* attention.cu: whether this GPU, build and compute type have the attention kernels for Hopper; else *e is set. */
bool hopper_attention_create(CudaBackend *, Error *e);

/* health.cu: NVML, loaded at run time. */
bool health_read(CudaBackend *, DeviceHealth *);

} /* namespace */
#endif
