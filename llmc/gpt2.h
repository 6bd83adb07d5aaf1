/* The GPT-2 model: configuration, parameter table, activation table, forward, backward. No device word in it.
 * Radford et al. 2019; pre-LN blocks, tied embeddings, learned positions. */
#ifndef LLMC_GPT2_H
#define LLMC_GPT2_H
#include "ops.h"
#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    size_t V;                 /* vocabulary (rows of wte in a file) */
    size_t Vp;                /* V padded to a multiple of 128, inside only */
    size_t L, H, C, T;        /* layers, heads, channels, longest sequence */
} GPT2Config;

/* Sets Vp and checks the numbers; *e: EXIT_USAGE with what is wrong. */
bool gpt2_config_check(GPT2Config *config, Error *e);
/* gpt2, gpt2-medium, gpt2-large, gpt2-xl, 124M, 350M, 774M, 1558M, gpt3-125m ... gpt3-13b. EXIT_USAGE with the known names. */
bool gpt2_config_by_name(GPT2Config *config, const char *name, Error *e);
double gpt2_flops_per_token(const GPT2Config *config, size_t T); /* 6 N + 6 L C T, N all parameters, padded vocabulary */

/* ---- the parameter table ----------------------------------------------------------------------------------------
 * X(field, checkpoint name, scope, rows, columns, Conv1D, init, decay)
 * scope: UNIT_EMBED (unit 0), UNIT_BLOCK (units 1..L, %zu in the name is the block), UNIT_FINAL (unit L+1).
 * Held as (rows, columns) = (out, in). Conv1D = 1: Hugging Face stores it as (in, out). A vector has rows = 1.
 * init: 'n' N(0, 0.02), 'r' N(0, 0.02 / sqrt(2L)) residual projections, '0', '1'. decay: weight decay applies. */
#define GPT2_PARAMS(X)                                                                                                 \
    X(wte, "wte.weight", UNIT_EMBED, c->Vp, c->C, 0, 'n', 1)                                                           \
    X(wpe, "wpe.weight", UNIT_EMBED, c->T, c->C, 0, 'n', 1)                                                            \
    X(ln1w, "h.%zu.ln_1.weight", UNIT_BLOCK, 1, c->C, 0, '1', 0)                                                       \
    X(ln1b, "h.%zu.ln_1.bias", UNIT_BLOCK, 1, c->C, 0, '0', 0)                                                         \
    X(qkvw, "h.%zu.attn.c_attn.weight", UNIT_BLOCK, 3 * c->C, c->C, 1, 'n', 1)                                         \
    X(qkvb, "h.%zu.attn.c_attn.bias", UNIT_BLOCK, 1, 3 * c->C, 0, '0', 0)                                              \
    X(attprojw, "h.%zu.attn.c_proj.weight", UNIT_BLOCK, c->C, c->C, 1, 'r', 1)                                         \
    X(attprojb, "h.%zu.attn.c_proj.bias", UNIT_BLOCK, 1, c->C, 0, '0', 0)                                              \
    X(ln2w, "h.%zu.ln_2.weight", UNIT_BLOCK, 1, c->C, 0, '1', 0)                                                       \
    X(ln2b, "h.%zu.ln_2.bias", UNIT_BLOCK, 1, c->C, 0, '0', 0)                                                         \
    X(fcw, "h.%zu.mlp.c_fc.weight", UNIT_BLOCK, 4 * c->C, c->C, 1, 'n', 1)                                             \
    X(fcb, "h.%zu.mlp.c_fc.bias", UNIT_BLOCK, 1, 4 * c->C, 0, '0', 0)                                                  \
    X(fcprojw, "h.%zu.mlp.c_proj.weight", UNIT_BLOCK, c->C, 4 * c->C, 1, 'r', 1)                                       \
    X(fcprojb, "h.%zu.mlp.c_proj.bias", UNIT_BLOCK, 1, c->C, 0, '0', 0)                                                \
    X(lnfw, "ln_f.weight", UNIT_FINAL, 1, c->C, 0, '1', 0)                                                             \
    X(lnfb, "ln_f.bias", UNIT_FINAL, 1, c->C, 0, '0', 0)
enum { UNIT_EMBED, UNIT_BLOCK, UNIT_FINAL };

#define GPT2_PARAM_ENUM(field, ...) PARAM_##field,
typedef enum { GPT2_PARAMS(GPT2_PARAM_ENUM) PARAM_COUNT } ParamId;
#undef GPT2_PARAM_ENUM

/* One tensor of the flat parameter space. Offsets are in elements and the same in params, master, grads, m and v. */
typedef struct {
    char name[48];            /* Hugging Face name, without the "transformer." prefix */
    ParamId id;
    size_t unit;              /* 0 embedding, 1..L blocks, L+1 final norm */
    size_t rows, cols;        /* in memory: (out, in); wte has Vp rows */
    size_t file_rows;         /* rows that a file holds: V for wte, else rows */
    bool conv1d;              /* a file holds it transposed */
    char init;
    bool decay;
    size_t offset;
} ParamTensor;

/* All tensors in order, units contiguous. Each tensor starts on a multiple of 64 elements, each unit on one of `unit_align`
 * (so that any number of ranks can divide it); the gaps hold zeros for ever. */
typedef struct {
    ParamTensor *tensors;     /* n_tensors = 2 + 12 L + 2, walked in file order */
    size_t n_tensors;
    size_t *unit_begin;       /* L + 3 offsets: unit u is [unit_begin[u], unit_begin[u+1]) */
    size_t *unit_index;       /* the same offsets with units aligned for one rank */
    size_t n_units;           /* L + 2 */
    size_t n_elements;        /* of the flat space, gaps included */
    size_t n_params;          /* as published: no padding anywhere */
    AdamWSegment *segments;   /* runs of equal decay, gaps between them left out */
    size_t n_segments;
} ParamLayout;
void gpt2_layout(ParamLayout *layout, const GPT2Config *config, size_t unit_align);
void gpt2_layout_free(ParamLayout *layout);

/* ---- the model --------------------------------------------------------------------------------------------------- */
/* The ranks that train together. Each unit is cut into n equal parts, one a rank. sharded (ZeRO-1, Rajbhandari et al. 2020): a rank holds m, v
 * and, where it is apart from the weights, master of its own parts alone, one after the other. Weights and gradients are whole on each. */
typedef struct { size_t rank, n; bool sharded; } Ranks;

typedef struct {
    GPT2Config config;
    Backend *backend;
    ParamLayout layout;
    Ranks ranks;
    Par params;               /* compute type */
    Master master;            /* float32; the same memory as params where the compute type is fp32 */
    Grad grads;               /* trainable models only, as are m and v */
    Moment m, v;
    AdamWSegment *segments;   /* several ranks: unit by unit, from the beginning of what this rank updates of it; NULL for one rank */
    size_t *segments_begin;   /* of unit u [segments_begin[u], segments_begin[u+1]) */
    size_t head_chunk;        /* rows that head_loss takes at a time; 0 = the backend's choice. Set before activations are made */
} GPT2;

bool gpt2_create(GPT2 *model, Backend *backend, const GPT2Config *config, bool trainable, Error *e); /* for one rank */
bool gpt2_create_ranks(GPT2 *model, Backend *backend, const GPT2Config *config, bool trainable, Ranks ranks, Error *e);
/* What of unit `unit` is this rank's: n elements from `first` of the flat space on, `held` of m and v, `master` of master. `index`: where they
 * would begin in the flat space of one rank (whose units are aligned otherwise), so that what is random does not depend on the number of ranks. */
typedef struct { size_t first, n, held, master, index; } UnitPart;
UnitPart gpt2_part(const GPT2 *model, size_t unit);
UnitPart gpt2_updated(const GPT2 *model, size_t unit);       /* what of the unit this rank updates: its part if sharded, else all */
/* The elements [begin, end) of a tensor in memory order that m and v hold here, the first of them at *held; none: begin == end. */
void gpt2_held(const GPT2 *model, const ParamTensor *t, size_t *begin, size_t *end, size_t *held);
void gpt2_destroy(GPT2 *model);
void gpt2_init(GPT2 *model, uint64_t seed);    /* every value a function of (seed, tensor, index) alone */
/* Host copies of one tensor in the file's layout: file_rows x cols, transposed when conv1d. which: PARAM_MASTER ... Where this rank holds a part
 * alone, get is an error of ours, and set stores that part. */
enum { PARAM_MASTER, PARAM_GRAD, PARAM_M, PARAM_V };
void gpt2_tensor_to_file(const ParamTensor *t, const float *memory_values, float *file_values); /* the change of layout alone */
void gpt2_tensor_get(const GPT2 *model, const ParamTensor *t, int which, float *file_values);
void gpt2_tensor_set(GPT2 *model, const ParamTensor *t, int which, const float *file_values);
/* Names a stretch of ops for backend->replay: equal for equal words alone, as far as 64 bits go. */
uint64_t gpt2_stretch_key(const uint64_t *words, size_t n);
void gpt2_params_changed(GPT2 *model);         /* after setting master values: params = cast(master), to nearest */
/* The same for a run that is resumed after `updates` updates: params as adamw left them. rounding: a ROUND_ value. */
void gpt2_params_rounded(GPT2 *model, int rounding, uint64_t seed, int64_t updates);

/* Recomputation policy: what the forward keeps for the backward. All give the same bits. */
typedef enum { KEEP_ALL, KEEP_NO_GELU, KEEP_RESIDUAL /* block inputs only */, KEEP_NONE /* inference */ } Keep;

/* ---- activations: X(field, type, elements, smallest policy under which a block shares one buffer with all others) ----
 * A row is per block unless shared. N = B*T. */
#define GPT2_ACTS(X)                                                                                                   \
    X(res1, Act, N * C, KEEP_NONE)            /* block input: x + y */                                                 \
    X(ln1, Act, N * C, KEEP_RESIDUAL)                                                                                  \
    X(ln1_mean, Stat, N, KEEP_RESIDUAL)                                                                                \
    X(ln1_rstd, Stat, N, KEEP_RESIDUAL)                                                                                \
    X(qkv, Act, N * 3 * C, KEEP_RESIDUAL)                                                                              \
    X(att, Act, N * C, KEEP_RESIDUAL)                                                                                  \
    X(att_saved, Saved, saved_bytes, KEEP_RESIDUAL)                                                                    \
    X(res2, Act, N * C, KEEP_RESIDUAL)                                                                                 \
    X(ln2, Act, N * C, KEEP_RESIDUAL)                                                                                  \
    X(ln2_mean, Stat, N, KEEP_RESIDUAL)                                                                                \
    X(ln2_rstd, Stat, N, KEEP_RESIDUAL)                                                                                \
    X(fc_pre, Act, N * 4 * C, KEEP_RESIDUAL)                                                                           \
    X(fc, Act, N * 4 * C, KEEP_NO_GELU)

typedef struct {
#define GPT2_ACT_FIELD(field, Type, elements, policy) Type field;
    GPT2_ACTS(GPT2_ACT_FIELD)
#undef GPT2_ACT_FIELD
} BlockActs;

typedef struct {
    struct Decoder *decoder;  /* whose cache the attention goes over; NULL: each forward stands for itself */
    size_t B, T;              /* shape of a micro-batch; T at most config.T. Either may be lowered between forwards */
    Keep keep;
    bool backward;
    bool more;                /* a backward with more of the same step to follow: no gradient is final after it */
    BlockActs *blocks;        /* L, some fields shared */
    Act x, y;                 /* (N, C) the residual pair: x running sum, y not added yet */
    Act lnf; Stat lnf_mean, lnf_rstd; Act resf;
    Stat losses;              /* (N) per-row losses of the last forward, -1 targets: 0 */
    Tokens tokens, targets;   /* (B, T) */
    /* gradients of activations, reused by all blocks: of the residual stream (N, C), of a branch's narrow activation (N, C), of
     * its wide one (N, 4C): qkv or fc */
    Act dres, dnarrow, dwide;
} Acts;

/* Allocates and plans scratch (runs the step once in plan mode). Training and evaluation each have their own. */
bool gpt2_acts_create(Acts *acts, GPT2 *model, size_t B, size_t T, Keep keep, bool backward, Error *e);
void gpt2_acts_destroy(Acts *acts, GPT2 *model);

/* tokens, targets: (B, T) host int32, ids checked by the loader. targets NULL: no head (use gpt2_logits after it). Fills
 * acts->losses (mean nats are the sum over rows / count of targets >= 0). */
void gpt2_forward(GPT2 *model, Acts *acts, const int32_t *tokens, const int32_t *targets);
/* Forward, loss and backward: grads += gradient of (sum of losses * loss_scale). */
void gpt2_forward_backward(GPT2 *model, Acts *acts, const int32_t *tokens, const int32_t *targets, float loss_scale);
/* Logits of row `row` (b * T + t) of the last forward: V floats on the host. scratch: V floats of the backend's memory. */
void gpt2_logits(GPT2 *model, Acts *acts, size_t row, Stat scratch, float *logits);

/* ---- generation: one sequence, whose keys and values are kept, so that a new token costs one row -------------------- */
typedef struct Decoder {
    Acts acts;                /* of the tokens of one call */
    Act *caches;              /* L of (1, room, 2C) */
    Stat logits;              /* (V) */
    size_t room, length;      /* tokens that the caches hold at most, and hold now; 0 begins a new sequence */
} Decoder;

/* room: longest sequence, at most config.T; n: most tokens of one call. Plans calls of n tokens and of 1. */
bool gpt2_decoder_create(Decoder *decoder, GPT2 *model, size_t room, size_t n, Error *e);
void gpt2_decoder_destroy(Decoder *decoder, GPT2 *model);
/* Appends n tokens to the sequence; logits: V floats on the host, of the token after them. What gpt2_forward of the whole sequence gives
 * for its last row, to rounding. */
void gpt2_decode(GPT2 *model, Decoder *decoder, const int32_t *tokens, size_t n, float *logits);

#ifdef __cplusplus
}
#endif
#endif
