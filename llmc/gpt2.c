/* GPT-2: parameters, activations, forward, backward, as calls of ops. Which memory they live in and how an op is computed is the
 * backend's; files, schedules and ranks are elsewhere. */
#include "gpt2.h"
#include "base/rng.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- configuration ------------------------------------------------------------------------------------------------ */

static const struct { const char *name, *alias; GPT2Config config; } known_models[] = {
    {"gpt2", "124M", {50257, 0, 12, 12, 768, 1024}},
    {"gpt2-medium", "350M", {50257, 0, 24, 16, 1024, 1024}},
    {"gpt2-large", "774M", {50257, 0, 36, 20, 1280, 1024}},
    {"gpt2-xl", "1558M", {50257, 0, 48, 25, 1600, 1024}},
    /* GPT-3, Brown et al. 2020, table 2.1. Its 24 heads at C 2048 and C 5140 do not divide; 16 heads and C 5120 are what is trained in practice. */
    {"gpt3-125m", NULL, {50257, 0, 12, 12, 768, 2048}},
    {"gpt3-350m", NULL, {50257, 0, 24, 16, 1024, 2048}},
    {"gpt3-760m", NULL, {50257, 0, 24, 16, 1536, 2048}},
    {"gpt3-1.3b", NULL, {50257, 0, 24, 16, 2048, 2048}},
    {"gpt3-2.7b", NULL, {50257, 0, 32, 32, 2560, 2048}},
    {"gpt3-6.7b", NULL, {50257, 0, 32, 32, 4096, 2048}},
    {"gpt3-13b", NULL, {50257, 0, 40, 40, 5120, 2048}},
};

bool gpt2_config_by_name(GPT2Config *config, const char *name, Error *e) {
    char names[400] = "";
    for (size_t i = 0; i < sizeof known_models / sizeof *known_models; i++) {
        const char *alias = known_models[i].alias;
        if (strcmp(name, known_models[i].name) == 0 || (alias && strcmp(name, alias) == 0)) {
            *config = known_models[i].config;
            return gpt2_config_check(config, e);
        }
        /* NOLINTNEXTLINE(clang-analyzer-security.insecureAPI.strcpy): the names of the table above fit */
        strcat(strcat(names, i ? ", " : ""), known_models[i].name);
    }
    return fail(e, EXIT_USAGE, "--model %s is not a known model; known are %s (or give --layers, --channels, --heads)", name, names);
}

bool gpt2_config_check(GPT2Config *c, Error *e) {
    const struct { const char *name; size_t value, max; } limits[] = {
        {"vocabulary size", c->V, 1u << 24}, {"number of layers", c->L, 10000}, {"number of heads", c->H, 65536},
        {"number of channels", c->C, 1u << 20}, {"sequence length", c->T, 1u << 24}};
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++)
        if (limits[i].value < 1 || limits[i].value > limits[i].max)
            return fail(e, EXIT_USAGE, "model shape: the %s is %zu; expected 1 to %zu", limits[i].name, limits[i].value, limits[i].max);
    if (c->C % c->H)
        return fail(e, EXIT_USAGE, "model shape: %zu channels are not divisible by %zu heads; change --channels or --heads", c->C, c->H);
    c->Vp = (c->V + 127) / 128 * 128;
    return true;
}

double gpt2_flops_per_token(const GPT2Config *config, size_t T) {
    const GPT2Config *c = config;
    double n = 0;
#define ADD_SIZE(field, name, scope, rows, cols, ...) n += (double)(rows) * (double)(cols) * (double)((scope) == UNIT_BLOCK ? c->L : 1);
    GPT2_PARAMS(ADD_SIZE)
#undef ADD_SIZE
    return 6 * n + 6 * (double)c->L * (double)c->C * (double)T;
}

/* ---- parameter layout --------------------------------------------------------------------------------------------- */

static const struct { const char *name; int scope; bool conv1d; char init; bool decay; } param_table[PARAM_COUNT] = {
#define ROW(field, name, scope, rows, cols, conv1d, init, decay) {name, scope, conv1d, init, decay},
    GPT2_PARAMS(ROW)
#undef ROW
};

enum { UNIT_ALIGN = 512, PART_ALIGN = 64 };
static size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

/* Rows and columns of a parameter for this configuration. */
static void param_shape(const GPT2Config *c, ParamId id, size_t *rows, size_t *cols) {
    const size_t shapes[PARAM_COUNT][2] = {
#define SHAPE(field, name, scope, r, k, ...) {r, k},
        GPT2_PARAMS(SHAPE)
#undef SHAPE
    };
    *rows = shapes[id][0];
    *cols = shapes[id][1];
}

static void layout_add(ParamLayout *layout, const GPT2Config *c, ParamId id, size_t unit, size_t *offset) {
    ParamTensor *t = &layout->tensors[layout->n_tensors++];
    *t = (ParamTensor){.id = id, .unit = unit, .conv1d = param_table[id].conv1d, .init = param_table[id].init,
                       .decay = param_table[id].decay, .offset = *offset};
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
    snprintf(t->name, sizeof t->name, param_table[id].name, unit - 1);
#pragma GCC diagnostic pop
    param_shape(c, id, &t->rows, &t->cols);
    t->file_rows = id == PARAM_wte ? c->V : t->rows;
    layout->n_params += t->file_rows * t->cols;
    AdamWSegment *last = layout->n_segments ? &layout->segments[layout->n_segments - 1] : NULL;
    size_t n = t->file_rows * t->cols;
    if (last && last->decay == t->decay && last->first + last->n == t->offset) last->n += n;
    else layout->segments[layout->n_segments++] = (AdamWSegment){t->offset, n, t->decay};
    *offset = round_up(*offset + t->rows * t->cols, 64);
}

void gpt2_layout(ParamLayout *layout, const GPT2Config *config, size_t unit_align) {
    *layout = (ParamLayout){.n_units = config->L + 2};
    size_t most = PARAM_COUNT * (config->L + 2), offset = 0;
    layout->tensors = xcalloc(most, sizeof *layout->tensors);
    layout->segments = xcalloc(most, sizeof *layout->segments);
    layout->unit_begin = xcalloc(config->L + 3, sizeof *layout->unit_begin);
    layout->unit_index = xcalloc(config->L + 3, sizeof *layout->unit_index);
    for (size_t unit = 0; unit < layout->n_units; unit++) {
        int scope = unit == 0 ? UNIT_EMBED : unit <= config->L ? UNIT_BLOCK : UNIT_FINAL;
        layout->unit_begin[unit] = offset;
        for (int id = 0; id < PARAM_COUNT; id++)
            if (param_table[id].scope == scope) layout_add(layout, config, (ParamId)id, unit, &offset);
        layout->unit_index[unit + 1] = layout->unit_index[unit] + round_up(offset - layout->unit_begin[unit], UNIT_ALIGN);
        offset = round_up(offset, unit_align);
    }
    layout->unit_begin[layout->n_units] = layout->n_elements = offset;
}

void gpt2_layout_free(ParamLayout *layout) {
    free(layout->tensors);
    free(layout->segments);
    free(layout->unit_begin);
    free(layout->unit_index);
    *layout = (ParamLayout){0};
}

/* ---- the model's memory ------------------------------------------------------------------------------------------- */

/* Each of n ranks has a whole number of PART_ALIGN elements of a unit; up to 8 ranks that divide it need no more than UNIT_ALIGN. */
static size_t unit_align(size_t ranks) { return UNIT_ALIGN % (ranks * PART_ALIGN) == 0 ? UNIT_ALIGN : UNIT_ALIGN * ranks; }

/* Unit by unit, what of the segments this rank updates. */
static void cut_segments(GPT2 *model) {
    const ParamLayout *layout = &model->layout;
    size_t n = 0;
    model->segments = xcalloc(layout->n_segments + layout->n_units, sizeof *model->segments);
    model->segments_begin = xcalloc(layout->n_units + 1, sizeof *model->segments_begin);
    for (size_t unit = 0; unit < layout->n_units; unit++) {
        UnitPart part = gpt2_updated(model, unit);
        for (size_t i = 0; i < layout->n_segments; i++) {
            const AdamWSegment *s = &layout->segments[i];
            size_t begin = s->first > part.first ? s->first : part.first, end = s->first + s->n;
            if (end > part.first + part.n) end = part.first + part.n;
            if (begin < end) model->segments[n++] = (AdamWSegment){begin - part.first, end - begin, s->decay};
        }
        model->segments_begin[unit + 1] = n;
    }
}

bool gpt2_create(GPT2 *model, Backend *be, const GPT2Config *config, bool trainable, Error *e) {
    return gpt2_create_ranks(model, be, config, trainable, (Ranks){.rank = 0, .n = 1}, e);
}

bool gpt2_create_ranks(GPT2 *model, Backend *be, const GPT2Config *config, bool trainable, Ranks ranks, Error *e) {
    *model = (GPT2){.config = *config, .backend = be, .ranks = ranks};
    gpt2_layout(&model->layout, config, unit_align(ranks.n));
    size_t n = model->layout.n_elements, held = ranks.sharded ? n / ranks.n : n;
    bool same = strcmp(be->dtype, "fp32") == 0;
    model->master.p = be->alloc(be, same ? MEM_WEIGHTS : MEM_MASTER, "master weights (float32)", (same ? n : held) * sizeof(float), e);
    model->params.p = same ? (void *)model->master.p : be->alloc(be, MEM_WEIGHTS, "weights", n * be->elem_bytes, e);
    bool ok = model->master.p && model->params.p;
    if (ok && trainable) {
        model->grads.p = be->alloc(be, MEM_GRADIENTS, "gradients (float32)", n * sizeof(float), e);
        model->m.p = model->grads.p ? be->alloc(be, MEM_OPTIMIZER, "AdamW first moment", held * sizeof(float), e) : NULL;
        model->v.p = model->m.p ? be->alloc(be, MEM_OPTIMIZER, "AdamW second moment", held * sizeof(float), e) : NULL;
        ok = model->v.p != NULL;
    }
    if (ok && ranks.n > 1) cut_segments(model);
    if (!ok) gpt2_destroy(model);
    return ok;
}

static void release(Backend *be, void *p) {
    if (p) be->release(be, p);
}

void gpt2_destroy(GPT2 *model) {
    Backend *be = model->backend;
    if (model->params.p != (void *)model->master.p) release(be, model->params.p);
    release(be, model->master.p);
    release(be, model->grads.p);
    release(be, model->m.p);
    release(be, model->v.p);
    free(model->segments);
    free(model->segments_begin);
    gpt2_layout_free(&model->layout);
    *model = (GPT2){0};
}

static Par par(const GPT2 *m, const ParamTensor *t) { return (Par){(char *)m->params.p + t->offset * m->backend->elem_bytes}; }

static bool master_apart(const GPT2 *m) { return m->params.p != (void *)m->master.p; }

UnitPart gpt2_part(const GPT2 *m, size_t unit) {
    const size_t *begin = m->layout.unit_begin, n = (begin[unit + 1] - begin[unit]) / m->ranks.n;
    UnitPart part = {.first = begin[unit] + m->ranks.rank * n, .n = n};
    part.held = m->ranks.sharded ? begin[unit] / m->ranks.n : part.first;
    part.master = master_apart(m) ? part.held : part.first;
    part.index = m->layout.unit_index[unit] + part.first - begin[unit];
    return part;
}

UnitPart gpt2_updated(const GPT2 *m, size_t unit) {
    if (m->ranks.sharded) return gpt2_part(m, unit);
    const size_t first = m->layout.unit_begin[unit];
    return (UnitPart){.first = first, .n = m->layout.unit_begin[unit + 1] - first, .held = first, .master = first, .index = m->layout.unit_index[unit]};
}

void gpt2_held(const GPT2 *m, const ParamTensor *t, size_t *begin, size_t *end, size_t *held) {
    UnitPart part = gpt2_part(m, t->unit);
    size_t n = t->file_rows * t->cols, last = part.first + part.n;
    *begin = 0, *end = n, *held = t->offset;
    if (!m->ranks.sharded) return;
    *begin = part.first > t->offset ? part.first - t->offset : 0;
    *end = last > t->offset ? last - t->offset : 0;
    if (*begin > n) *begin = n;
    if (*end > n) *end = n;
    if (*end < *begin) *end = *begin;
    *held = part.held + t->offset + *begin - part.first;
}

/* Array `which` of the model; *partial: it holds this rank's parts alone. */
static float *array_of(const GPT2 *m, int which, bool *partial) {
    float *bases[] = {m->master.p, m->grads.p, m->m.p, m->v.p};
    *partial = m->ranks.sharded && which != PARAM_GRAD && (which != PARAM_MASTER || master_apart(m));
    CHECK(bases[which], "the model holds no array %d", which);
    return bases[which];
}

/* A unit's elements in memory order to or from where they are held. */
static void store(GPT2 *m, const ParamTensor *t, int which, const float *values) {
    bool partial;
    float *base = array_of(m, which, &partial);
    size_t begin = 0, end = t->file_rows * t->cols, at = t->offset;
    if (partial) gpt2_held(m, t, &begin, &end, &at);
    if (begin < end) m->backend->upload(m->backend, base + at, values + begin, (end - begin) * sizeof(float));
}

void gpt2_params_rounded(GPT2 *model, int rounding, uint64_t seed, int64_t updates) {
    Backend *be = model->backend;
    if (!master_apart(model)) return;
    for (size_t unit = 0; unit < model->layout.n_units; unit++) {
        UnitPart part = gpt2_updated(model, unit);
        be->cast_params(be, &(CastParams){.out = {(char *)model->params.p + part.first * be->elem_bytes}, .in = {model->master.p + part.master}, .n = part.n,
                                          .rounding = rounding, .seed = seed, .updates = updates, .index = part.index});
    }
}

void gpt2_params_changed(GPT2 *model) { gpt2_params_rounded(model, ROUND_NEAREST, 0, 0); }

void gpt2_init(GPT2 *model, uint64_t seed) {
    for (size_t i = 0; i < model->layout.n_tensors; i++) {
        const ParamTensor *t = &model->layout.tensors[i];
        size_t n = t->file_rows * t->cols;
        float *values = xmalloc(n * sizeof(float));
        float sigma = t->init == 'r' ? 0.02f / sqrtf(2.0f * (float)model->config.L) : 0.02f;
        bool normal = t->init == 'n' || t->init == 'r';
#pragma omp parallel for
        for (size_t k = 0; k < n; k++)
            values[k] = normal ? sigma * rng_normal(seed, (uint32_t)(RNG_INIT + i), 0, k) : t->init == '1' ? 1.0f : 0.0f;
        store(model, t, PARAM_MASTER, values);
        free(values);
    }
    gpt2_params_changed(model);
}

static void transpose(float *out, const float *in, size_t rows, size_t cols) {
    enum { TILE = 32 };
    for (size_t r0 = 0; r0 < rows; r0 += TILE)
        for (size_t c0 = 0; c0 < cols; c0 += TILE)
            for (size_t r = r0; r < rows && r < r0 + TILE; r++)
                for (size_t c = c0; c < cols && c < c0 + TILE; c++) out[c * rows + r] = in[r * cols + c];
}

void gpt2_tensor_to_file(const ParamTensor *t, const float *memory_values, float *file_values) {
    if (t->conv1d) transpose(file_values, memory_values, t->rows, t->cols);
    else memcpy(file_values, memory_values, t->file_rows * t->cols * sizeof(float));
}

void gpt2_tensor_get(const GPT2 *model, const ParamTensor *t, int which, float *file_values) {
    Backend *be = model->backend;
    bool partial;
    const float *from = array_of(model, which, &partial) + t->offset;
    size_t bytes = t->file_rows * t->cols * sizeof(float);
    CHECK(!partial, "%s: this rank holds a part of array %d alone", t->name, which);
    float *here = t->conv1d ? xmalloc(bytes) : file_values;
    be->download(be, here, from, bytes);
    if (!t->conv1d) return;
    transpose(file_values, here, t->rows, t->cols);
    free(here);
}

void gpt2_tensor_set(GPT2 *model, const ParamTensor *t, int which, const float *file_values) {
    float *here = NULL;
    if (t->conv1d) transpose(here = xmalloc(t->file_rows * t->cols * sizeof(float)), file_values, t->cols, t->rows);
    store(model, t, which, here ? here : file_values);
    free(here);
}

/* ---- activations -------------------------------------------------------------------------------------------------- */

/* Handles of one kind are allocated alike; a block's field is its own or, under the policy `keep`, block 0's. */
static bool block_acts_alloc(Acts *a, GPT2 *model, Error *e) {
    Backend *be = model->backend;
    size_t N = a->B * a->T, C = model->config.C, elem = be->elem_bytes;
    size_t saved_bytes = be->attention_saved_bytes(be, a->B, a->T, model->config.H, C / model->config.H);
    const size_t unit_Act = elem, unit_Stat = sizeof(float), unit_Saved = 1;
    for (size_t l = 0; l < model->config.L; l++) {
#define ALLOC(field, Type, elements, policy)                                                                           \
        if (l > 0 && a->keep >= (policy)) a->blocks[l].field = a->blocks[0].field;                                     \
        else if (!(a->blocks[l].field.p = be->alloc(be, MEM_ACTIVATIONS, #field, (elements) * unit_##Type, e))) return false;
        GPT2_ACTS(ALLOC)
#undef ALLOC
    }
    return true;
}

static bool head_acts_alloc(Acts *a, Backend *be, size_t C, Error *e) {
    size_t N = a->B * a->T, NC = N * C * be->elem_bytes;
    const struct { void **p; const char *what; size_t bytes; bool wanted; } rows[] = {
        {&a->x.p, "embedding", NC, true}, {&a->y.p, "branch output", NC, true}, {&a->lnf.p, "final norm", NC, true},
        {&a->resf.p, "final residual", NC, true}, {(void **)&a->lnf_mean.p, "final mean", N * sizeof(float), true},
        {(void **)&a->lnf_rstd.p, "final rstd", N * sizeof(float), true}, {(void **)&a->losses.p, "losses", N * sizeof(float), true},
        {(void **)&a->tokens.p, "tokens", N * sizeof(int32_t), true}, {(void **)&a->targets.p, "targets", N * sizeof(int32_t), true},
        {&a->dres.p, "gradient of the residual stream", NC, a->backward}, {&a->dnarrow.p, "gradient of a branch", NC, a->backward},
        {&a->dwide.p, "gradient of qkv or fc", 4 * NC, a->backward}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        if (rows[i].wanted && !(*rows[i].p = be->alloc(be, MEM_ACTIVATIONS, rows[i].what, rows[i].bytes, e))) return false;
    return true;
}

static void forward(GPT2 *m, Acts *a);
static void head(GPT2 *m, Acts *a, float scale);
static void head_logits(GPT2 *m, Acts *a, size_t row, Stat logits);
static void backward(GPT2 *m, Acts *a);

static bool acts_alloc(Acts *a, GPT2 *model, size_t B, size_t T, Keep keep, bool with_backward, Error *e) {
    CHECK(T >= 1 && T <= model->config.T && B >= 1, "activations for B %zu T %zu, model T %zu", B, T, model->config.T);
    CHECK(!with_backward || (keep != KEEP_NONE && model->grads.p), "a backward needs kept activations and gradients");
    *a = (Acts){.B = B, .T = T, .keep = keep, .backward = with_backward};
    a->blocks = xcalloc(model->config.L, sizeof *a->blocks);
    return block_acts_alloc(a, model, e) && head_acts_alloc(a, model->backend, model->config.C, e);
}

bool gpt2_acts_create(Acts *a, GPT2 *model, size_t B, size_t T, Keep keep, bool with_backward, Error *e) {
    Backend *be = model->backend;
    bool ok = acts_alloc(a, model, B, T, keep, with_backward, e);
    Stat logits = {ok ? (float *)be->alloc(be, MEM_OTHER, "logits of one row", model->config.V * sizeof(float), e) : NULL};
    if (logits.p) {
        be->plan_begin(be);
        forward(model, a);
        head(model, a, 0);
        if (with_backward) backward(model, a);
        head_logits(model, a, 0, logits);
        ok = be->plan_end(be, e);
        be->release(be, logits.p);
    } else ok = false;
    if (!ok) gpt2_acts_destroy(a, model);
    return ok;
}

void gpt2_acts_destroy(Acts *a, GPT2 *model) {
    Backend *be = model->backend;
    for (size_t l = model->config.L; a->blocks && l-- > 0;) {
#define RELEASE(field, ...) if (l == 0 || a->blocks[l].field.p != a->blocks[0].field.p) release(be, a->blocks[l].field.p);
        GPT2_ACTS(RELEASE)
#undef RELEASE
    }
    void *others[] = {a->x.p, a->y.p, a->lnf.p, a->resf.p, a->lnf_mean.p, a->lnf_rstd.p, a->losses.p,
                      a->tokens.p, a->targets.p, a->dres.p, a->dnarrow.p, a->dwide.p};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) release(be, others[i]);
    free(a->blocks);
    *a = (Acts){0};
}

/* ---- forward and backward ----------------------------------------------------------------------------------------- */

/* Parameters and gradients of one unit under their names, found by walking the unit's tensors. */
typedef struct {
#define FIELD(field, ...) Par field; Grad d##field;
    GPT2_PARAMS(FIELD)
#undef FIELD
} Unit;

static Unit unit_of(const GPT2 *m, size_t unit) {
    Unit u = {0};
    size_t first = unit == 0 ? 0 : unit <= m->config.L ? 2 + 12 * (unit - 1) : 2 + 12 * m->config.L;
    for (const ParamTensor *t = m->layout.tensors + first; t < m->layout.tensors + m->layout.n_tensors && t->unit == unit; t++) {
        Grad g = {m->grads.p ? m->grads.p + t->offset : NULL};
        switch (t->id) {
#define SET(field, ...) case PARAM_##field: u.field = par(m, t); u.d##field = g; break;
            GPT2_PARAMS(SET)
#undef SET
        default: break;
        }
    }
    return u;
}
_Static_assert(PARAM_COUNT == 2 + 12 + 2, "unit_of and train's layout walk count on 2 + 12 L + 2 tensors");

/* Up to the MLP's hidden layer; the block's input is x + y. Recomputation calls it again with x = the kept sum. */
static void block_forward_hidden(GPT2 *m, Acts *a, size_t l, const Unit *u, Act x, Act y) {
    Backend *be = m->backend;
    BlockActs *b = &a->blocks[l];
    size_t B = a->B, T = a->T, N = B * T, C = m->config.C, H = m->config.H;
    Act kept = x.p == b->res1.p ? (Act){NULL} : b->res1;
    be->add_norm_forward(be, &(AddNormForward){.out = b->ln1, .residual = kept, .mean = b->ln1_mean, .rstd = b->ln1_rstd,
                                               .x = x, .y = y, .gamma = u->ln1w, .beta = u->ln1b, .N = N, .C = C});
    be->linear_forward(be, &(LinearForward){.out = b->qkv, .inp = b->ln1, .w = u->qkvw, .b = u->qkvb, .N = N, .C = C, .OC = 3 * C});
    if (a->decoder) be->attention_decode(be, &(AttentionDecode){.out = b->att, .cache = a->decoder->caches[l], .qkv = b->qkv, .B = B, .T = a->decoder->room,
                                                                .H = H, .D = C / H, .n = T, .position = a->decoder->length});
    else be->attention_forward(be, &(AttentionForward){.out = b->att, .saved = b->att_saved, .qkv = b->qkv, .B = B, .T = T, .H = H, .D = C / H});
    be->linear_forward(be, &(LinearForward){.out = a->y, .inp = b->att, .w = u->attprojw, .b = u->attprojb, .N = N, .C = C, .OC = C});
    be->add_norm_forward(be, &(AddNormForward){.out = b->ln2, .residual = b->res2, .mean = b->ln2_mean, .rstd = b->ln2_rstd,
                                               .x = b->res1, .y = a->y, .gamma = u->ln2w, .beta = u->ln2b, .N = N, .C = C});
    be->linear_forward(be, &(LinearForward){.out = b->fc, .pre_gelu = b->fc_pre, .inp = b->ln2, .w = u->fcw, .b = u->fcb, .N = N, .C = C, .OC = 4 * C});
}

static void forward(GPT2 *m, Acts *a) {
    Backend *be = m->backend;
    size_t L = m->config.L, C = m->config.C, N = a->B * a->T;
    be->mark(be, MARK_PARAMS_NEEDED, 0);
    Unit u = unit_of(m, 0);
    Par wpe = {(char *)u.wpe.p + (a->decoder ? a->decoder->length : 0) * C * be->elem_bytes}; /* from the first token's position on */
    be->embed_forward(be, &(EmbedForward){.out = a->x, .tokens = a->tokens, .wte = u.wte, .wpe = wpe, .B = a->B, .T = a->T, .C = C, .V = m->config.V});
    Act x = a->x, y = {NULL};
    for (size_t l = 0; l < L; l++) {
        BlockActs *b = &a->blocks[l];
        be->mark(be, MARK_PARAMS_NEEDED, l + 1);
        u = unit_of(m, l + 1);
        block_forward_hidden(m, a, l, &u, x, y);
        be->linear_forward(be, &(LinearForward){.out = a->y, .inp = b->fc, .w = u.fcprojw, .b = u.fcprojb, .N = N, .C = 4 * C, .OC = C});
        x = b->res2;
        y = a->y;
    }
    be->mark(be, MARK_PARAMS_NEEDED, L + 1);
    u = unit_of(m, L + 1);
    be->add_norm_forward(be, &(AddNormForward){.out = a->lnf, .residual = a->resf, .mean = a->lnf_mean, .rstd = a->lnf_rstd,
                                               .x = x, .y = y, .gamma = u.lnfw, .beta = u.lnfb, .N = N, .C = C});
}

/* Loss and, when a backward follows, its gradient into dnarrow. */
static void head(GPT2 *m, Acts *a, float scale) {
    Backend *be = m->backend;
    Unit u = unit_of(m, 0);
    HeadLoss args = {.losses = a->losses, .x = a->lnf, .w = u.wte, .targets = a->targets,
                     .N = a->B * a->T, .C = m->config.C, .V = m->config.V, .Vp = m->config.Vp, .scale = scale, .chunk = m->head_chunk};
    if (a->backward) args.dx = a->dnarrow, args.dw = u.dwte;
    be->head_loss(be, &args);
}

/* The forward's list upside down. dres is the gradient of the block's output and becomes that of its input. */
static void block_backward(GPT2 *m, Acts *a, size_t l, const Unit *u) {
    Backend *be = m->backend;
    BlockActs *b = &a->blocks[l];
    size_t B = a->B, T = a->T, N = B * T, C = m->config.C, H = m->config.H;
    if (a->keep == KEEP_NO_GELU) be->gelu_forward(be, &(GeluForward){.out = b->fc, .pre_gelu = b->fc_pre, .n = N * 4 * C});
    if (a->keep == KEEP_RESIDUAL) block_forward_hidden(m, a, l, u, b->res1, (Act){NULL});

    be->linear_backward(be, &(LinearBackward){.dinp = a->dwide, .dw = u->dfcprojw, .db = u->dfcprojb, .dout = a->dres, .inp = b->fc,
                                              .w = u->fcprojw, .pre_gelu = b->fc_pre, .N = N, .C = 4 * C, .OC = C});
    be->linear_backward(be, &(LinearBackward){.dinp = a->dnarrow, .dw = u->dfcw, .db = u->dfcb, .dout = a->dwide, .inp = b->ln2,
                                              .w = u->fcw, .N = N, .C = C, .OC = 4 * C});
    be->add_norm_backward(be, &(AddNormBackward){.dresidual = a->dres, .dgamma = u->dln2w, .dbeta = u->dln2b, .dout = a->dnarrow, .dthrough = a->dres,
                                                 .residual = b->res2, .mean = b->ln2_mean, .rstd = b->ln2_rstd, .gamma = u->ln2w, .N = N, .C = C});
    be->linear_backward(be, &(LinearBackward){.dinp = a->dnarrow, .dw = u->dattprojw, .db = u->dattprojb, .dout = a->dres, .inp = b->att,
                                              .w = u->attprojw, .N = N, .C = C, .OC = C});
    be->attention_backward(be, &(AttentionBackward){.dqkv = a->dwide, .dout = a->dnarrow, .out = b->att, .saved = b->att_saved, .qkv = b->qkv,
                                                    .B = B, .T = T, .H = H, .D = C / H});
    be->linear_backward(be, &(LinearBackward){.dinp = a->dnarrow, .dw = u->dqkvw, .db = u->dqkvb, .dout = a->dwide, .inp = b->ln1,
                                              .w = u->qkvw, .N = N, .C = C, .OC = 3 * C});
    be->add_norm_backward(be, &(AddNormBackward){.dresidual = a->dres, .dgamma = u->dln1w, .dbeta = u->dln1b, .dout = a->dnarrow, .dthrough = a->dres,
                                                 .residual = b->res1, .mean = b->ln1_mean, .rstd = b->ln1_rstd, .gamma = u->ln1w, .N = N, .C = C});
}

static void backward(GPT2 *m, Acts *a) {
    Backend *be = m->backend;
    size_t L = m->config.L, C = m->config.C, N = a->B * a->T;
    Unit u = unit_of(m, L + 1);
    be->add_norm_backward(be, &(AddNormBackward){.dresidual = a->dres, .dgamma = u.dlnfw, .dbeta = u.dlnfb, .dout = a->dnarrow,
                                                 .residual = a->resf, .mean = a->lnf_mean, .rstd = a->lnf_rstd, .gamma = u.lnfw, .N = N, .C = C});
    if (!a->more) be->mark(be, MARK_GRADS_FINAL, L + 1);
    for (size_t l = L; l-- > 0;) {
        u = unit_of(m, l + 1);
        block_backward(m, a, l, &u);
        if (!a->more) be->mark(be, MARK_GRADS_FINAL, l + 1);
    }
    u = unit_of(m, 0);
    be->embed_backward(be, &(EmbedBackward){.dwte = u.dwte, .dwpe = u.dwpe, .dout = a->dres, .tokens = a->tokens, .B = a->B, .T = a->T, .C = C, .V = m->config.V});
    if (!a->more) be->mark(be, MARK_GRADS_FINAL, 0);
}

static void upload_tokens(GPT2 *m, Acts *a, const int32_t *tokens, const int32_t *targets) {
    Backend *be = m->backend;
    size_t bytes = a->B * a->T * sizeof(int32_t);
    be->upload(be, a->tokens.p, tokens, bytes);
    if (targets) be->upload(be, a->targets.p, targets, bytes);
}

/* FNV-1a, a word at a time, with a last mix. */
uint64_t gpt2_stretch_key(const uint64_t *words, size_t n) {
    uint64_t h = 0xCBF29CE484222325u;
    for (size_t i = 0; i < n; i++) h = (h ^ words[i] ^ words[i] >> 32) * 0x100000001B3u, h ^= h >> 29;
    return h;
}

/* What the arguments of all ops of a pass depend on: the model's and the activations' memory (each told by one buffer, as releasing any
 * forgets all recordings), shape, policy and scale. kind: 0 forward, 1 and loss, 2 and backward, 4 with final gradients. */
static uint64_t pass_key(const GPT2 *m, const Acts *a, uint64_t kind, float scale) {
    uint32_t scale_bits;
    memcpy(&scale_bits, &scale, sizeof scale_bits);
    const uint64_t words[] = {kind, (uintptr_t)m->params.p, (uintptr_t)m->grads.p, (uintptr_t)a->x.p, a->B, a->T, a->keep, scale_bits, m->head_chunk};
    return gpt2_stretch_key(words, sizeof words / sizeof *words);
}

void gpt2_forward(GPT2 *model, Acts *a, const int32_t *tokens, const int32_t *targets) {
    Backend *be = model->backend;
    uint64_t key = pass_key(model, a, targets ? 1 : 0, 0);
    CHECK(!targets || !a->backward, "a forward with loss alone takes activations made without a backward");
    upload_tokens(model, a, tokens, targets);
    if (be->replay(be, key)) return;
    forward(model, a);
    if (targets) head(model, a, 0);
    be->record_end(be, key);
}

void gpt2_forward_backward(GPT2 *model, Acts *a, const int32_t *tokens, const int32_t *targets, float loss_scale) {
    Backend *be = model->backend;
    uint64_t key = pass_key(model, a, a->more ? 2 : 4, loss_scale);
    CHECK(a->backward && targets, "a backward takes targets and activations made for it");
    upload_tokens(model, a, tokens, targets);
    if (be->replay(be, key)) return;
    forward(model, a);
    head(model, a, loss_scale);
    backward(model, a);
    be->record_end(be, key);
}

static void head_logits(GPT2 *m, Acts *a, size_t row, Stat logits) {
    Backend *be = m->backend;
    size_t C = m->config.C;
    be->head_logits(be, &(HeadLogits){.logits = logits, .x = {(char *)a->lnf.p + row * C * be->elem_bytes}, .w = {m->params.p}, .N = 1, .C = C, .V = m->config.V});
}

void gpt2_logits(GPT2 *model, Acts *a, size_t row, Stat scratch, float *logits) {
    CHECK(row < a->B * a->T, "logits of row %zu of %zu", row, a->B * a->T);
    head_logits(model, a, row, scratch);
    model->backend->download(model->backend, logits, scratch.p, model->config.V * sizeof(float));
}

/* ---- generation --------------------------------------------------------------------------------------------------- */

/* The forward of n tokens behind those in the cache. */
static void decode_pass(GPT2 *m, Decoder *d, size_t n) {
    d->acts.decoder = d;
    d->acts.T = n;
    forward(m, &d->acts);
    head_logits(m, &d->acts, n - 1, d->logits);
}

bool gpt2_decoder_create(Decoder *d, GPT2 *model, size_t room, size_t n, Error *e) {
    Backend *be = model->backend;
    CHECK(n >= 1 && n <= room && room <= model->config.T, "a decoder for %zu tokens, %zu at a time; model T %zu", room, n, model->config.T);
    *d = (Decoder){.room = room};
    d->caches = xcalloc(model->config.L, sizeof *d->caches);
    bool ok = acts_alloc(&d->acts, model, 1, n, KEEP_NONE, false, e);
    for (size_t l = 0; ok && l < model->config.L; l++)
        ok = (d->caches[l].p = be->alloc(be, MEM_ACTIVATIONS, "keys and values", room * 2 * model->config.C * be->elem_bytes, e)) != NULL;
    ok = ok && (d->logits.p = (float *)be->alloc(be, MEM_OTHER, "logits of one row", model->config.V * sizeof(float), e)) != NULL;
    if (ok) {
        be->plan_begin(be);
        decode_pass(model, d, n);
        decode_pass(model, d, 1);
        ok = be->plan_end(be, e);
    }
    if (!ok) gpt2_decoder_destroy(d, model);
    return ok;
}

void gpt2_decoder_destroy(Decoder *d, GPT2 *model) {
    Backend *be = model->backend;
    for (size_t l = 0; d->caches && l < model->config.L; l++) release(be, d->caches[l].p);
    release(be, d->logits.p);
    gpt2_acts_destroy(&d->acts, model);
    free(d->caches);
    *d = (Decoder){0};
}

void gpt2_decode(GPT2 *model, Decoder *d, const int32_t *tokens, size_t n, float *logits) {
    Backend *be = model->backend;
    CHECK(n >= 1 && n <= d->room - d->length, "%zu tokens behind %zu, room for %zu", n, d->length, d->room);
    be->upload(be, d->acts.tokens.p, tokens, n * sizeof *tokens);
    decode_pass(model, d, n);
    d->length += n;
    be->download(be, logits, d->logits.p, model->config.V * sizeof *logits);
}
