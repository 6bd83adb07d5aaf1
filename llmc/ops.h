/* The contract between the model and a backend; the only header that both sides include.
 *
 * An op is one trip through memory. Every op takes one struct of named arguments; an absent operand is zero. Beside each
 * operand stands its shape and what happens to it: `in` read only, `=` every element overwritten (its old content is never
 * read), `+=` accumulated into. Handles are typed by what they point to. ops.c holds the same facts as data (op_operands), from
 * which the tests, the tee and trace wrappers and the byte counts are derived.
 *
 * Letters: B batch, T time, N = B*T rows, C channels, H heads, D = C/H head size, V vocabulary, Vp padded vocabulary.
 * Types: Act and Par elements have the backend's compute type (backend->elem_bytes each); everything else is as written.
 * All tensors are dense and row major. Ops run in the order issued. Unless an op says so, outputs may not overlap inputs.
 * Wrong arguments are an error of ours: a backend CHECKs shapes and aborts with the op's name. */
#ifndef LLMC_OPS_H
#define LLMC_OPS_H
#include "base/error.h"
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#ifdef __cplusplus
extern "C" {
#endif

typedef struct { void *p; } Act;             /* activation, or the gradient of one: compute type */
typedef struct { void *p; } Par;             /* parameter as used by the products: compute type */
typedef struct { float *p; } Grad;           /* gradient of a parameter: float32 accumulator */
typedef struct { float *p; } Stat;           /* float32 statistic of a row: mean, 1/sigma, loss, logits */
typedef struct { float *p; } Master;         /* float32 master weight */
typedef struct { float *p; } Moment;         /* float32 AdamW moment */
typedef struct { int32_t *p; } Tokens;       /* token ids */
typedef struct { void *p; } Saved;           /* what a forward keeps for its backward: opaque, sized by the backend */
typedef struct { struct StepState *p; } Step; /* the step's numbers, in the backend's memory */

/* Everything about the current optimizer step that lives beside the tensors, so that nothing in a step reads the device
 * from the host. The host writes the first part before a step and reads the rest after it. */
typedef struct StepState {
    /* written by the host */
    float lr, beta1, beta2, eps, weight_decay;
    float grad_clip;          /* largest global gradient norm; 0 = no clipping */
    float loss_limit;         /* skip the update when the loss exceeds this; INFINITY = never */
    float norm_limit;         /* likewise for the gradient norm */
    double loss_rows;         /* rows that the mean loss is over: all micro-batches (of all ranks) */
    uint64_t seed;
    int64_t step;             /* optimizer step, from 0; counts skipped ones */
    int32_t rounding;         /* a ROUND_ value: how adamw rounds master to params */
    /* accumulated and decided by ops */
    double loss_sum;          /* += by loss_sum */
    double sum_squares;       /* += by sum_squares */
    double wishes;            /* written by the host: WISH_ of this rank, added; with several ranks the sum of all, once it is decided */
    float loss;               /* mean loss of the step */
    float grad_norm;          /* global norm before clipping */
    float grad_scale;         /* what adamw multiplies gradients by: 1 or grad_clip / grad_norm */
    int32_t skip;             /* a SKIP_ value; not 0: adamw leaves everything as it was */
    int64_t updates;          /* updates applied so far; AdamW's t is updates after this one. Part of a checkpoint */
} StepState;
enum { ROUND_NEAREST = 0, ROUND_STOCHASTIC = 1 };
enum { WISH_STOP = 1, WISH_SAVE = 1 << 20 };  /* an end after this step; a checkpoint: exact in a sum over fewer than 2^20 ranks */
enum { SKIP_NONE = 0, SKIP_NONFINITE = 1, SKIP_LOSS = 2, SKIP_NORM = 3 };

/* ---- argument structs, in the order of a training step ---------------------------------------------------------- */

/* out[b,t] = wte[token[b,t]] + wpe[t] */
typedef struct {
    Act out;                  /* (B, T, C) = */
    Tokens tokens;            /* (B, T) in, each in [0, V) */
    Par wte;                  /* (V, C) in */
    Par wpe;                  /* (T, C) in */
    size_t B, T, C, V;
} EmbedForward;

/* residual = x + y;  out = (residual - mean) * rstd * gamma + beta, per row; rstd = 1/sqrt(variance + 1e-5).
 * Without y the sum is x itself. residual may be the same buffer as x. Layer normalisation, Ba et al. 2016. */
typedef struct {
    Act out;                  /* (N, C) = */
    Act residual;             /* (N, C) = ; may be absent when y is absent and x is kept by the caller */
    Stat mean, rstd;          /* (N) = */
    Act x;                    /* (N, C) in */
    Act y;                    /* (N, C) in, optional */
    Par gamma, beta;          /* (C) in */
    size_t N, C;
} AddNormForward;

/* out = inp w^T + b, and with pre_gelu: pre_gelu = inp w^T + b, out = gelu(pre_gelu), of the sum as pre_gelu stores it where
 * backend->gelu_rounds_first, else of the sum before it was rounded to the compute type (a library's fused epilogue).
 * GELU in its tanh form: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), Hendrycks and Gimpel 2016. */
typedef struct {
    Act out;                  /* (N, OC) = */
    Act pre_gelu;             /* (N, OC) = , optional: present means GELU */
    Act inp;                  /* (N, C) in */
    Par w;                    /* (OC, C) in */
    Par b;                    /* (OC) in */
    size_t N, C, OC;
} LinearForward;

/* out = gelu(pre_gelu), for recomputation; where backend->gelu_rounds_first the same bits as LinearForward's epilogue. */
typedef struct {
    Act out;                  /* (n) = */
    Act pre_gelu;             /* (n) in */
    size_t n;
} GeluForward;

/* Causal multi-head attention: out[b,t,h] = sum over s <= t of softmax_s(q[b,t,h].k[b,s,h] / sqrt(D)) v[b,s,h], where
 * qkv[b,t] = (q of all heads, k of all heads, v of all heads). Online softmax over tiles (Milakov and Gimelshein 2018; Dao et
 * al. 2022): no T x T buffer. saved: backend->attention_saved_bytes(B, T, H, D). */
typedef struct {
    Act out;                  /* (B, T, C) = */
    Saved saved;              /* opaque = , may be absent when no backward follows */
    Act qkv;                  /* (B, T, 3C) in */
    size_t B, T, H, D;
} AttentionForward;

/* Attention for generation, over a cache of keys and values: first cache[b, position + i] = (k, v) of qkv[b, i] for the n new tokens, then
 * out[b,i] = the attention of q[b,i] over rows 0 .. position + i of the cache. position + n <= T. What AttentionForward would give for
 * those rows of the whole sequence, to rounding. */
typedef struct {
    Act out;                  /* (B, n, C) = */
    Act cache;                /* (B, T, 2C) += : rows position .. position + n - 1 overwritten, earlier ones read, later ones left */
    Act qkv;                  /* (B, n, 3C) in */
    size_t B, T, H, D, n, position;
} AttentionDecode;

/* The head, its loss and its backward in one op, chunked over rows inside so that no (N, V) buffer exists.
 * losses[n] = logsumexp_v(x[n].w[v]) - x[n].w[target[n]];  with dx: dlogits = (softmax - onehot) * scale;
 * dx = dlogits w;  dw += dlogits^T x. A target of -1 is ignored: loss 0, gradient 0. */
typedef struct {
    Stat losses;              /* (N) = */
    Act dx;                   /* (N, C) = , optional: absent means loss only */
    Grad dw;                  /* (Vp, C) += , present exactly when dx is */
    Act x;                    /* (N, C) in: the final norm's output */
    Par w;                    /* (Vp, C) in: tied to wte */
    Tokens targets;           /* (N) in, each in [-1, V) */
    size_t N, C, V;
    size_t Vp;                /* rows that w and dw have in memory, at least V: a backend may compute with all of them. Those from V on are
                               * zeros in w, count for nothing, and get += 0 in dw */
    float scale;              /* 1 / rows that the mean is over */
    size_t chunk;             /* rows at a time; 0 = the backend's choice; never changes a bit of the result's meaning */
} HeadLoss;

/* logits = x w^T, for generation */
typedef struct {
    Stat logits;              /* (N, V) = */
    Act x;                    /* (N, C) in */
    Par w;                    /* (V, C) in */
    size_t N, C, V;
} HeadLogits;

/* dinp = dout w [* gelu'(pre_gelu)];  dw += dout^T inp;  db += column sums of dout. With pre_gelu, inp is gelu(pre_gelu). */
typedef struct {
    Act dinp;                 /* (N, C) = , optional */
    Grad dw;                  /* (OC, C) += */
    Grad db;                  /* (OC) += */
    Act dout;                 /* (N, OC) in */
    Act inp;                  /* (N, C) in */
    Par w;                    /* (OC, C) in */
    Act pre_gelu;             /* (N, C) in, optional */
    size_t N, C, OC;
} LinearBackward;

typedef struct {
    Act dqkv;                 /* (B, T, 3C) = */
    Act dout;                 /* (B, T, C) in */
    Act out;                  /* (B, T, C) in: the forward's output */
    Saved saved;              /* opaque in */
    Act qkv;                  /* (B, T, 3C) in */
    size_t B, T, H, D;
} AttentionBackward;

/* Gradient of AddNormForward: dresidual = dthrough + (gradient of the norm); both x and y of the forward have this gradient.
 * dresidual may be the same buffer as dthrough. */
typedef struct {
    Act dresidual;            /* (N, C) = */
    Grad dgamma, dbeta;       /* (C) += */
    Act dout;                 /* (N, C) in: gradient of the normed output */
    Act dthrough;             /* (N, C) in, optional: gradient that arrives along the residual stream */
    Act residual;             /* (N, C) in: the sum that was normalised */
    Stat mean, rstd;          /* (N) in */
    Par gamma;                /* (C) in */
    size_t N, C;
} AddNormBackward;

/* dwte[token] += dout;  dwpe[t] += dout, in a fixed order of summation. */
typedef struct {
    Grad dwte;                /* (V, C) += */
    Grad dwpe;                /* (T, C) += */
    Act dout;                 /* (B, T, C) in */
    Tokens tokens;            /* (B, T) in */
    size_t B, T, C, V;
} EmbedBackward;

/* step.loss_sum += sum of losses, in double, in a fixed order. */
typedef struct {
    Step step;                /* += loss_sum */
    Stat losses;              /* (n) in */
    size_t n;
} LossSum;

/* step.sum_squares += sum of squares of grads, in double, in a fixed order that depends on n alone. */
typedef struct {
    Step step;                /* += sum_squares */
    Grad grads;               /* (n) in */
    size_t n;
} SumSquares;

/* From loss_sum and sum_squares: loss = loss_sum / loss_rows, grad_norm, grad_scale, skip; increments updates unless skipped.
 * NaN or infinity in either skips (SKIP_NONFINITE), before the limits are looked at. */
typedef struct {
    Step step;                /* += : reads the sums and limits, writes loss, grad_norm, grad_scale, skip, updates */
} StepDecide;

/* One run of elements of the flat parameter space with the same weight decay. */
typedef struct {
    size_t first, n;
    int decay;                /* 1: step.weight_decay applies; 0: not */
} AdamWSegment;

/* AdamW (Loshchilov and Hutter 2019) over segments, with g = grads * step.grad_scale and t = step.updates:
 * m = beta1 m + (1-beta1) g;  v = beta2 v + (1-beta2) g^2;
 * master -= lr (m/(1-beta1^t) / (sqrt(v/(1-beta2^t)) + eps) + decay weight_decay master);  params = master, rounded as step.rounding
 * says: to nearest even, or stochastically (up with the probability of the part cut off; random bits as CastParams describes, from step.seed
 * and step.updates: element k of the arrays, i = index + k, takes word i % 4 of rng4(seed, RNG_ROUND, (uint32_t)updates, i / 4)).
 * Elements outside the segments are untouched. Nothing changes when step.skip. params may be master's own buffer. */
typedef struct {
    Par params;               /* (n) = , over the segments */
    Master master;            /* (n) += */
    Moment m, v;              /* (n) += */
    Grad grads;               /* (n) in */
    Step step;                /* in */
    const AdamWSegment *segments; /* host memory, ascending, not overlapping; kept alive by the caller */
    size_t n_segments;
    size_t n;                 /* elements of each flat array */
    size_t index;             /* where the arrays begin in the flat space, a multiple of 4 */
} AdamW;

/* out = in, rounded to the compute type; where that is float32, out may be the same buffer as in. With ROUND_STOCHASTIC and updates > 0: exactly as adamw rounded
 * them in update number `updates` of a run with that seed, so that a resumed run has the same params: element i takes
 * word i % 4 of rng4(seed, RNG_ROUND, (uint32_t)updates, i / 4), i = index + its place in the arrays, and adds its low 16 bits to those cut off. */
typedef struct {
    Par out;                  /* (n) = */
    Master in;                /* (n) in */
    size_t n;
    int rounding;             /* ROUND_ */
    uint64_t seed;
    int64_t updates;
    size_t index;             /* where the arrays begin in the flat space, a multiple of 4 */
} CastParams;

/* ---- the list of ops: X(name, argument struct) ------------------------------------------------------------------- */
#define LLMC_OPS(X)                                                                                                    \
    X(embed_forward, EmbedForward)                                                                                     \
    X(add_norm_forward, AddNormForward)                                                                                \
    X(linear_forward, LinearForward)                                                                                   \
    X(gelu_forward, GeluForward)                                                                                       \
    X(attention_forward, AttentionForward)                                                                             \
    X(attention_decode, AttentionDecode)                                                                               \
    X(head_loss, HeadLoss)                                                                                             \
    X(head_logits, HeadLogits)                                                                                         \
    X(linear_backward, LinearBackward)                                                                                 \
    X(attention_backward, AttentionBackward)                                                                           \
    X(add_norm_backward, AddNormBackward)                                                                              \
    X(embed_backward, EmbedBackward)                                                                                   \
    X(loss_sum, LossSum)                                                                                               \
    X(sum_squares, SumSquares)                                                                                         \
    X(step_decide, StepDecide)                                                                                         \
    X(adamw, AdamW)                                                                                                    \
    X(cast_params, CastParams)

#define LLMC_OP_ENUM(name, Args) OP_##name,
typedef enum { LLMC_OPS(LLMC_OP_ENUM) OP_COUNT } OpId;
#undef LLMC_OP_ENUM

/* What memory is for; rows of the memory table. */
typedef enum {
    MEM_WEIGHTS, MEM_MASTER, MEM_GRADIENTS, MEM_OPTIMIZER, MEM_ACTIVATIONS, MEM_SCRATCH, MEM_OTHER, MEM_CLASS_COUNT
} MemClass;
extern const char *const mem_class_names[MEM_CLASS_COUNT];

/* What the model announces, for whoever overlaps communication; unit 0 is the embedding, 1..L the blocks, L+1 the final norm. */
typedef enum {
    MARK_PARAMS_NEEDED,       /* the next op reads the unit's parameters */
    MARK_GRADS_FINAL          /* no later op of this step adds to the unit's gradients; after its last micro-batch alone */
} Mark;

/* ---- a backend is a value ---------------------------------------------------------------------------------------- */
typedef struct Backend Backend;
enum { POST_SLOTS = 2, POST_BYTES = 256 };
typedef struct {
    double watts, celsius, sm_mhz, memory_mhz;   /* NAN: not known */
    uint64_t throttle;        /* reasons, as NVML's bits; 0: none */
    char throttle_text[100];  /* the reasons that slow the device down, in words; "" : none */
    int64_t ecc_uncorrected;  /* errors since the last reset; -1: not known */
} DeviceHealth;
/* A piece of host memory that a device copies to and from by itself (pinned, where that means something), with one fetch and one bring at a time. */
typedef struct { char *host; size_t bytes; } Staging;
struct Backend {
    const char *name;         /* "cpu", "cuda", ... ; a wrapper: "trace(cpu)" */
    const char *dtype;        /* compute type of Act and Par: "fp32", "bf16" */
    size_t elem_bytes;        /* of an Act or Par element */
    bool gelu_rounds_first;   /* see LinearForward */
    const char *device;       /* what it runs on, for people: "NVIDIA H200"; NULL: nothing to say */
    const char *device_id;    /* which one, of all in the world; NULL: the host */
    int device_count;         /* how many such devices this process sees; 0: the host */
    double peak_flops;        /* dense products a second of the compute type that the device is sold with; 0: not known */
    bool host_memory;         /* the host may read and write what alloc gives, between ops */
    Backend *inner;           /* what a wrapper wraps, else NULL */
    size_t memory[MEM_CLASS_COUNT];      /* bytes allocated now, by class */
    size_t memory_peak[MEM_CLASS_COUNT];

    /* memory. alloc returns zeroed memory aligned to 256 bytes, or NULL with *e set (EXIT_DATA, the memory table in the text) */
    void *(*alloc)(Backend *, MemClass, const char *what, size_t bytes, Error *e);
    void (*release)(Backend *, void *p);
    void (*upload)(Backend *, void *to, const void *from_host, size_t bytes);    /* host buffer reusable on return */
    void (*download)(Backend *, void *to_host, const void *from, size_t bytes);  /* complete on return */
    void (*fill_zero)(Backend *, void *p, size_t bytes);
    size_t (*room)(Backend *);          /* bytes that alloc could still give */
    /* A download in two halves, so that the host need not wait for the device: post queues the copy behind everything issued so far and
     * returns; collect waits for that copy alone. Slots 0 and 1 are independent; at most POST_BYTES. */
    void (*post)(Backend *, int slot, const void *from, size_t bytes);
    void (*collect)(Backend *, int slot, void *to_host, size_t bytes);
    /* Copies beside the ops. fetch queues host[at, at + bytes) = from behind everything issued so far; the ops issued after it do not wait for it
     * and may not write `from` before fetch_wait has returned, which waits for that copy alone and is for any thread. bring queues
     * to = host[at, at + bytes) behind the newest fetch of that staging, which has been waited for, but beside the ops that were issued
     * since: none of them may touch `to`; ops issued from here on wait for it. It reads host until the next fetch_wait, or sync, has returned. */
    Staging *(*staging_create)(Backend *, const char *what, size_t bytes, Error *e); /* EXIT_DATA: no memory */
    void (*staging_destroy)(Backend *, Staging *);                                    /* waits for its copies; NULL: nothing */
    void (*fetch)(Backend *, Staging *, size_t at, const void *from, size_t bytes);
    void (*fetch_wait)(Backend *, Staging *);
    void (*bring)(Backend *, void *to, Staging *, size_t at, size_t bytes);
    /* The device's own queue beside the ops, for communication between devices; NULL, all of these, where there is none. side_begin: what is put into it from
     * here on is behind everything issued so far; returns it (a cudaStream_t). side_end names what was put into it so far, by a small number; side_wait: ops
     * issued from here on wait for that. The host waits for nothing. */
    void *(*side_begin)(Backend *);
    void (*side_end)(Backend *, size_t marker);
    void (*side_wait)(Backend *, size_t marker);
    /* These are a device's; no wrapper has them. side_waited: seconds for which its ops have stood in those waits that are over. In its queue: side_call: the
     * host calls fn(arg) when the queue gets there; fn uses no device. For gradients that travel in bf16, side_round: to (rows, n) = the rows of from, stride
     * elements apart, to nearest even; row own is left out. side_sum: data (n) = sum over the rows of others (parts, n), in their order and in
     * float32; for row own, which is not read, data rounded. */
    double (*side_waited)(Backend *);
    void (*side_call)(Backend *, void (*fn)(void *arg), void *arg);
    void (*side_round)(Backend *, uint16_t *to, const float *from, size_t rows, size_t stride, size_t n, size_t own);
    void (*side_sum)(Backend *, float *data, const uint16_t *others, size_t parts, size_t own, size_t n);
    size_t (*attention_saved_bytes)(Backend *, size_t B, size_t T, size_t H, size_t D);

    /* ops */
#define LLMC_OP_POINTER(name, Args) void (*name)(Backend *, const Args *);
    LLMC_OPS(LLMC_OP_POINTER)
#undef LLMC_OP_POINTER

    /* step control. Between plan_begin and plan_end ops only state what scratch they need; plan_end allocates the largest sum
     * (false with *e set when it does not fit). An op that meets too little scratch is an error of ours. */
    void (*plan_begin)(Backend *);
    bool (*plan_end)(Backend *, Error *e);
    void (*mark)(Backend *, Mark, size_t unit);
    /* A stretch of ops that is issued again and again with the same arguments may be recorded once and then replayed as a whole (a CUDA
     * graph). replay(key) true: the stretch of this key has been issued, the caller issues nothing. False: the caller issues the ops, then
     * calls record_end(key). One key always means the same calls; stretches do not nest, and hold ops, fill_zero and marks only. Releasing
     * memory forgets all recordings. A backend may decline for ever: replay false, record_end without effect. */
    bool (*replay)(Backend *, uint64_t key);
    void (*record_end)(Backend *, uint64_t key);
    void (*sync)(Backend *);            /* all issued work is done */

    /* reports; NULL where there is nothing to report */
    void (*print_plans)(Backend *, FILE *out);            /* the algorithm of every product that was planned */
    bool (*health)(Backend *, DeviceHealth *health);      /* false: not to be had now */
    void (*destroy)(Backend *);         /* frees a wrapper only, not what it wraps */
};

/* Backends and wrappers (each file says more). */
Backend *cpu_backend_create(Error *e);
/* Our own products for Hopper: candidates of the timed search; ONLY: the library's are none where ours are. EXIT_USAGE on another GPU, or with fp32. */
typedef enum { OWN_OFF, OWN_ON, OWN_ONLY } OwnProducts;
typedef struct {
    const char *dtype;        /* "bf16" or "fp32" */
    const char *attention;    /* "ours", "hopper" (on 9.0) or "cudnn" (where the build has it); the latter two bf16 alone */
    const char *plan_file;    /* keeps the chosen algorithms of the products from one process to the next; NULL: nothing is kept */
    bool fuse_gelu;           /* the library's fused GELU epilogue may be used where it is faster (gelu_rounds_first is then false) */
    bool graphs;              /* replay may record */
    int ordinal;              /* which GPU of those that are visible */
    bool wrap;                /* counted round: ordinal modulo their number */
    bool early_launch;        /* a kernel may be launched before the one in front has ended, and waits (sm_90 and later; elsewhere without effect) */
    OwnProducts own_products;
} CudaOptions;
Backend *cuda_backend_create(const CudaOptions *options, Error *e); /* builds with LLMC_CUDA; EXIT_USAGE: no driver, no GPU, too old */
Backend *emu_backend_create(const CudaOptions *options, Error *e);  /* test builds with LLMC_EMU: the same sources on a CPU */
Backend *null_backend_create(const char *dtype);             /* "fp32", "bf16": shapes and memory plan, no compute, no real memory */
Backend *count_backend_create(Backend *inner);               /* calls per op: backend_counts */
Backend *trace_backend_create(Backend *inner, const char *path, Error *e); /* Chrome trace events; EXIT_STORAGE */
Backend *tee_backend_create(Backend *first, Backend *second, double tolerance, FILE *report); /* runs both, compares */
/* A stretch of time on a row of its own, from any thread; seconds as seconds_now gives them; texts that outlive the trace. */
void trace_backend_span(Backend *trace, const char *row, const char *name, size_t unit, double begin, double end);
void trace_backend_summary(Backend *trace, FILE *out);       /* table of time per op; destroy prints it on stderr */
const uint64_t *count_backend_calls(const Backend *count);   /* OP_COUNT numbers */
/* Differences found so far: elements beyond |a-b| <= tolerance * (1 + |b|), and NaN in one or both. */
uint64_t tee_backend_differences(const Backend *tee);

/* ---- ops as data ------------------------------------------------------------------------------------------------- */
typedef enum {
    KIND_ACT, KIND_PAR, KIND_GRAD, KIND_STAT, KIND_MASTER, KIND_MOMENT, KIND_TOKENS, KIND_SAVED, KIND_STEP
} OperandKind;
typedef enum { MODE_IN, MODE_OUT /* = */, MODE_ADD /* += */ } OperandMode;
typedef struct {
    const char *name;
    OperandKind kind;
    OperandMode mode;
    void *p;
    size_t n;                 /* elements; bytes for KIND_SAVED; 1 for KIND_STEP */
    size_t field;             /* offset of the handle in the argument struct */
    bool optional;
} Operand;
enum { OP_MAX_OPERANDS = 12 };
extern const char *const op_names[OP_COUNT];
extern const size_t op_args_bytes[OP_COUNT];
/* Lists the operands of a call, absent ones included (p == NULL); returns how many. */
int op_operands(Backend *backend, OpId op, const void *args, Operand operands[OP_MAX_OPERANDS]);
size_t operand_bytes(const Backend *backend, const Operand *operand);
typedef struct {
    const char *name;         /* "B", "N", ... */
    size_t value;
    size_t field;             /* offset in the argument struct */
} OpSize;
enum { OP_MAX_SIZES = 6 };
int op_sizes(OpId op, const void *args, OpSize sizes[OP_MAX_SIZES]); /* the sizes of a call; returns how many */
double op_bytes(Backend *backend, OpId op, const void *args); /* least bytes moved: each operand once, += twice */
double op_flops(OpId op, const void *args);                   /* of the products (attention: causal half) */
void op_run(Backend *backend, OpId op, const void *args);     /* the call by number */

#ifdef __cplusplus
}
#endif
#endif
