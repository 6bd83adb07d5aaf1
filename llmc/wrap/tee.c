/* Runs every op on two backends and compares what they write. The first one's result counts. Before each op the operands' content is copied
 * from the first's memory into shadow buffers of the second, so that differences do not add up and are named where they arise.
 * What attention saves is opaque: each backend keeps its own, from forward to backward. Both must have one compute type. */
#include "wrapper.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { LINES_PER_OPERAND = 3, MAX_LINES = 200 };

typedef struct { /* the second backend's stand-in for an address of the first */
    const void *of;
    void *p;
    size_t bytes;
    bool saved;
} Shadow;

typedef struct { const char *p; size_t bytes; } Block;

typedef struct {
    Wrapper w;
    Backend *second;
    double tolerance;
    FILE *report;
    uint64_t differences;
    int lines;
    Shadow *shadows;
    size_t n_shadows;
    Block *blocks;            /* what was allocated through us: on release their shadows go too */
    size_t n_blocks;
    char *host[2];            /* content of one operand, of both backends */
    size_t host_bytes;
} Tee;

static Shadow *find_shadow(Tee *tee, const void *of, bool saved) {
    for (size_t i = 0; i < tee->n_shadows; i++)
        if (tee->shadows[i].of == of && tee->shadows[i].saved == saved) return &tee->shadows[i];
    return NULL;
}

/* Makes sure that there is a shadow of at least that size. */
static void provide_shadow(Tee *tee, const void *of, bool saved, size_t bytes) {
    Shadow *shadow = find_shadow(tee, of, saved);
    if (shadow && shadow->bytes >= bytes) return;
    if (shadow) tee->second->release(tee->second, shadow->p);
    else {
        tee->shadows = xrealloc(tee->shadows, (tee->n_shadows + 1) * sizeof *tee->shadows);
        shadow = &tee->shadows[tee->n_shadows++];
    }
    Error e = {0};
    void *p = tee->second->alloc(tee->second, MEM_OTHER, "tee shadow", bytes, &e);
    CHECK(p, "tee: %s", e.text);
    *shadow = (Shadow){of, p, bytes, saved};
}

static void provide_host(Tee *tee, size_t bytes) {
    if (tee->host_bytes >= bytes) return;
    for (int i = 0; i < 2; i++) tee->host[i] = xrealloc(tee->host[i], bytes);
    tee->host_bytes = bytes;
}

static void count_difference(Tee *tee, OpId op, const Operand *o, const char *where, double a, double b, int *lines) {
    tee->differences++;
    if (!tee->report || tee->lines >= MAX_LINES || (*lines)++ >= LINES_PER_OPERAND) return;
    tee->lines++;
    fprintf(tee->report, "tee: %s.%s%s: %s %.9g, %s %.9g\n", op_names[op], o->name, where, tee->w.backend.inner->name, a, tee->second->name, b);
}

/* NaN never passes, and infinity only beside the same infinity. */
static bool close_enough(double a, double b, double tolerance) {
    if (!isfinite(a) || !isfinite(b)) return a == b;
    return fabs(a - b) <= tolerance * (1 + fabs(b));
}

static float element(const Backend *b, const Operand *o, const char *values, size_t i) {
    float value;
    if ((o->kind == KIND_ACT || o->kind == KIND_PAR) && b->elem_bytes == 2) { /* bf16: the upper half of a float */
        uint16_t half;
        memcpy(&half, values + 2 * i, 2);
        uint32_t bits = (uint32_t)half << 16;
        memcpy(&value, &bits, 4);
    } else memcpy(&value, values + 4 * i, 4);
    return value;
}

static void compare_elements(Tee *tee, OpId op, const Operand *o) {
    int lines = 0;
    for (size_t i = 0; i < o->n; i++) {
        float a = element(&tee->w.backend, o, tee->host[0], i), b = element(&tee->w.backend, o, tee->host[1], i);
        if (close_enough(a, b, tee->tolerance)) continue;
        char where[32];
        snprintf(where, sizeof where, "[%zu]", i);
        count_difference(tee, op, o, where, a, b, &lines);
    }
}

static void compare_step(Tee *tee, OpId op, const Operand *o) {
    const StepState *a = (const StepState *)(const void *)tee->host[0], *b = (const StepState *)(const void *)tee->host[1];
    int lines = 0;
#define REAL(field) if (!close_enough((double)a->field, (double)b->field, tee->tolerance)) \
        count_difference(tee, op, o, "." #field, (double)a->field, (double)b->field, &lines);
#define EXACT(field) if (a->field != b->field) count_difference(tee, op, o, "." #field, (double)a->field, (double)b->field, &lines);
    REAL(lr) REAL(beta1) REAL(beta2) REAL(eps) REAL(weight_decay) REAL(grad_clip) REAL(loss_limit) REAL(norm_limit) REAL(loss_rows)
    EXACT(seed) EXACT(step) EXACT(rounding)
    REAL(loss_sum) REAL(sum_squares) REAL(loss) REAL(grad_norm) REAL(grad_scale)
    EXACT(skip) EXACT(updates)
#undef REAL
#undef EXACT
}

/* args of the second: the same call with its shadows, filled with the first's content. */
static void make_second_args(Tee *tee, OpId op, const void *args, const Operand *operands, int n, void *second_args) {
    Backend *first = tee->w.backend.inner, *second = tee->second;
    Operand theirs[OP_MAX_OPERANDS];
    op_operands(second, op, args, theirs);
    memcpy(second_args, args, op_args_bytes[op]);
    for (int i = 0; i < n; i++) { /* first all buffers: operands may share one, with different sizes */
        if (!operands[i].p) continue;
        bool saved = operands[i].kind == KIND_SAVED;
        CHECK(!saved || operands[i].mode != MODE_IN || find_shadow(tee, operands[i].p, true),
              "tee: %s reads what no forward saved", op_names[op]);
        provide_shadow(tee, operands[i].p, saved, operand_bytes(second, &theirs[i]));
    }
    for (int i = 0; i < n; i++) {
        const Operand *o = &operands[i];
        if (!o->p) continue;
        void *p = find_shadow(tee, o->p, o->kind == KIND_SAVED)->p;
        memcpy((char *)second_args + o->field, &p, sizeof p);
        if (o->kind == KIND_SAVED) continue;
        size_t bytes = operand_bytes(first, o);
        provide_host(tee, bytes);
        first->download(first, tee->host[0], o->p, bytes);
        second->upload(second, p, tee->host[0], bytes);
    }
}

static void compare_outputs(Tee *tee, OpId op, const Operand *operands, int n) {
    Backend *first = tee->w.backend.inner, *second = tee->second;
    for (int i = 0; i < n; i++) {
        const Operand *o = &operands[i];
        if (!o->p || o->mode == MODE_IN || o->kind == KIND_SAVED) continue;
        size_t bytes = operand_bytes(first, o);
        first->download(first, tee->host[0], o->p, bytes);
        second->download(second, tee->host[1], find_shadow(tee, o->p, false)->p, bytes);
        if (o->kind == KIND_STEP) compare_step(tee, op, o);
        else compare_elements(tee, op, o);
    }
}

static void tee_run(Backend *b, OpId op, const void *args) {
    Tee *tee = (Tee *)b;
    if (tee->w.planning) {
        op_run(b->inner, op, args);
        op_run(tee->second, op, args);
        return;
    }
    union {
#define MEMBER(name, Args) Args name;
        LLMC_OPS(MEMBER)
#undef MEMBER
    } second_args;
    Operand operands[OP_MAX_OPERANDS];
    int n = op_operands(b->inner, op, args, operands);
    make_second_args(tee, op, args, operands, n, &second_args);
    op_run(b->inner, op, args);
    op_run(tee->second, op, &second_args);
    compare_outputs(tee, op, operands, n);
}

static void *tee_alloc(Backend *b, MemClass class, const char *what, size_t bytes, Error *e) {
    Tee *tee = (Tee *)b;
    void *p = wrapper_alloc(b, class, what, bytes, e);
    if (!p) return NULL;
    tee->blocks = xrealloc(tee->blocks, (tee->n_blocks + 1) * sizeof *tee->blocks);
    tee->blocks[tee->n_blocks++] = (Block){p, bytes};
    return p;
}

static void drop_shadows(Tee *tee, const char *begin, size_t bytes) {
    for (size_t i = tee->n_shadows; i-- > 0;) {
        uintptr_t at = (uintptr_t)tee->shadows[i].of - (uintptr_t)begin;
        if (at >= bytes && at != 0) continue;
        tee->second->release(tee->second, tee->shadows[i].p);
        tee->shadows[i] = tee->shadows[--tee->n_shadows];
    }
}

static void tee_release(Backend *b, void *p) {
    Tee *tee = (Tee *)b;
    for (size_t i = 0; i < tee->n_blocks; i++) {
        if (tee->blocks[i].p != p) continue;
        drop_shadows(tee, p, tee->blocks[i].bytes);
        tee->blocks[i] = tee->blocks[--tee->n_blocks];
        break;
    }
    wrapper_release(b, p);
}

static void tee_plan_begin(Backend *b) {
    wrapper_plan_begin(b);
    Backend *second = ((Tee *)b)->second;
    second->plan_begin(second);
}

static bool tee_plan_end(Backend *b, Error *e) {
    Backend *second = ((Tee *)b)->second;
    bool first_ok = wrapper_plan_end(b, e);
    return second->plan_end(second, first_ok ? e : NULL) && first_ok;
}

static void tee_mark(Backend *b, Mark mark, size_t unit) {
    wrapper_mark(b, mark, unit);
    Backend *second = ((Tee *)b)->second;
    second->mark(second, mark, unit);
}

static void tee_sync(Backend *b) {
    wrapper_sync(b);
    Backend *second = ((Tee *)b)->second;
    second->sync(second);
}

static void tee_destroy(Backend *b) {
    Tee *tee = (Tee *)b;
    for (size_t i = 0; i < tee->n_shadows; i++) tee->second->release(tee->second, tee->shadows[i].p);
    free(tee->shadows);
    free(tee->blocks);
    for (int i = 0; i < 2; i++) free(tee->host[i]);
    wrapper_destroy(b);
}

Backend *tee_backend_create(Backend *first, Backend *second, double tolerance, FILE *report) {
    CHECK(first->elem_bytes == second->elem_bytes && !strcmp(first->dtype, second->dtype) && (first->elem_bytes == 4 || !strcmp(first->dtype, "bf16")),
          "tee compares backends of one compute type, fp32 or bf16: %s has %s, %s has %s", first->name, first->dtype, second->name, second->dtype);
    Tee *tee = xcalloc(1, sizeof *tee);
    wrapper_init(&tee->w, "tee", first, tee_run);
    Backend *b = &tee->w.backend;
    b->alloc = tee_alloc;
    b->release = tee_release;
    b->plan_begin = tee_plan_begin;
    b->plan_end = tee_plan_end;
    b->mark = tee_mark;
    b->sync = tee_sync;
    b->host_memory = false;   /* there are two of it */
    b->destroy = tee_destroy;
    tee->second = second;
    tee->tolerance = tolerance;
    tee->report = report;
    return b;
}

uint64_t tee_backend_differences(const Backend *tee) { return ((const Tee *)tee)->differences; }
