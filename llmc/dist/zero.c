/* The ranks' share of a step: what is sent when, and who waits for it. */
#include "zero.h"
#include "../wrap/wrapper.h"
#include <stdlib.h>
#include <string.h>

typedef struct {
    Wrapper w;
    Comm *comm;
    Wire wire;
    const GPT2 *model;        /* NULL before zero_attach */
    CommTicket *reduced, *gathered; /* by unit; 0: nothing is under way */
    /* Host copies of gradients and weights, where the backend's memory is not the host's */
    float *grads;
    char *params;
} Zero;

static Zero *zero_of(Backend *b) { return (Zero *)b; }
static bool at_work(const Zero *z) { return z->model && !z->w.planning; }

static size_t unit_begin(const Zero *z, size_t unit) { return z->model->layout.unit_begin[unit]; }
static size_t unit_elements(const Zero *z, size_t unit) { return unit_begin(z, unit + 1) - unit_begin(z, unit); }

static float *host_grads(const Zero *z, size_t at) { return (z->grads ? z->grads : z->model->grads.p) + at; }
static char *host_params(const Zero *z, size_t at) { return (z->params ? z->params : (char *)z->model->params.p) + at * z->w.backend.elem_bytes; }

/* Which unit holds element `at` of the flat space. */
static size_t unit_at(const Zero *z, size_t at) {
    size_t unit = 0;
    while (unit_begin(z, unit + 1) <= at) unit++;
    return unit;
}

/* ---- gradients ---------------------------------------------------------------------------------------------------- */

static void grads_final(Zero *z, size_t unit) {
    Backend *inner = z->w.backend.inner;
    Comm *c = z->comm;
    size_t begin = unit_begin(z, unit), n = unit_elements(z, unit);
    if (z->grads) inner->download(inner, z->grads + begin, z->model->grads.p + begin, n * sizeof(float));
    z->reduced[unit] = c->reduce_scatter(c, host_grads(z, begin), n, z->wire);
    if (!z->model->ranks.sharded) z->reduced[unit] = c->all_gather(c, host_grads(z, begin), n * sizeof(float));
}

/* Sums are there before the norm is taken of them. */
static void await_grads(Zero *z, size_t unit) {
    Backend *inner = z->w.backend.inner;
    z->comm->wait(z->comm, z->reduced[unit]);
    if (z->grads && z->reduced[unit]) {
        UnitPart p = gpt2_updated(z->model, unit);
        inner->upload(inner, z->model->grads.p + p.first, z->grads + p.first, p.n * sizeof(float));
    }
    z->reduced[unit] = 0;
}

/* ---- the decision ------------------------------------------------------------------------------------------------- */

typedef struct { double loss_sum, sum_squares, stop; } Sums;
_Static_assert(offsetof(StepState, stop) - offsetof(StepState, loss_sum) == offsetof(Sums, stop), "the sums of StepState lie together");

static void sum_state(Zero *z, Step step) {
    Backend *inner = z->w.backend.inner;
    Sums sums;
    inner->download(inner, &sums, &step.p->loss_sum, sizeof sums);
    comm_sum(z->comm, (double *)&sums, sizeof sums / sizeof(double));
    inner->upload(inner, &step.p->loss_sum, &sums, sizeof sums);
}

/* ---- weights ------------------------------------------------------------------------------------------------------ */

/* This rank's part of the weights has changed. */
static void gather_params(Zero *z, const void *params) {
    Backend *b = &z->w.backend, *inner = b->inner;
    if (!z->model->ranks.sharded) return;
    size_t unit = unit_at(z, (size_t)((const char *)params - (const char *)z->model->params.p) / b->elem_bytes);
    UnitPart p = gpt2_part(z->model, unit);
    if (z->params) inner->download(inner, host_params(z, p.first), (const char *)z->model->params.p + p.first * b->elem_bytes, p.n * b->elem_bytes);
    z->gathered[unit] = z->comm->all_gather(z->comm, host_params(z, unit_begin(z, unit)), unit_elements(z, unit) * b->elem_bytes);
}

static void await_params(Zero *z, size_t unit) {
    Backend *b = &z->w.backend, *inner = b->inner;
    if (!z->gathered[unit]) return;
    z->comm->wait(z->comm, z->gathered[unit]);
    z->gathered[unit] = 0;
    size_t begin = unit_begin(z, unit);
    if (z->params) inner->upload(inner, (char *)z->model->params.p + begin * b->elem_bytes, host_params(z, begin), unit_elements(z, unit) * b->elem_bytes);
}

static void await_all_params(Zero *z) {
    for (size_t unit = 0; z->model && unit < z->model->layout.n_units; unit++) await_params(z, unit);
}

/* ---- the wrapper -------------------------------------------------------------------------------------------------- */

static void zero_run(Backend *b, OpId op, const void *args) {
    Zero *z = zero_of(b);
    if (at_work(z) && op == OP_sum_squares) await_grads(z, unit_at(z, (size_t)(((const SumSquares *)args)->grads.p - z->model->grads.p)));
    if (at_work(z) && op == OP_step_decide) sum_state(z, ((const StepDecide *)args)->step);
    op_run(b->inner, op, args);
    if (at_work(z) && op == OP_adamw) gather_params(z, ((const AdamW *)args)->params.p);
    if (at_work(z) && op == OP_cast_params) gather_params(z, ((const CastParams *)args)->out.p);
}

static void zero_mark(Backend *b, Mark mark, size_t unit) {
    Zero *z = zero_of(b);
    if (at_work(z) && mark == MARK_PARAMS_NEEDED) await_params(z, unit);
    if (at_work(z) && mark == MARK_GRADS_FINAL) grads_final(z, unit);
    wrapper_mark(b, mark, unit);
}

/* Whoever looks at the memory from outside finds the weights whole. */
static void zero_download(Backend *b, void *to, const void *from, size_t bytes) {
    await_all_params(zero_of(b));
    b->inner->download(b->inner, to, from, bytes);
}

static void zero_sync(Backend *b) {
    await_all_params(zero_of(b));
    wrapper_sync(b);
}

static void zero_release(Backend *b, void *p) {
    Zero *z = zero_of(b);
    if (z->model && (p == z->model->params.p || p == (void *)z->model->grads.p)) {
        await_all_params(z);
        z->model = NULL;
    }
    wrapper_release(b, p);
}

static void zero_destroy(Backend *b) {
    Zero *z = zero_of(b);
    await_all_params(z);
    free(z->reduced);
    free(z->gathered);
    free(z->grads);
    free(z->params);
    wrapper_destroy(b);
}

Backend *zero_backend_create(Backend *inner, Comm *comm, Wire wire) {
    Zero *z = xcalloc(1, sizeof *z);
    wrapper_init(&z->w, "ranks", inner, zero_run);
    z->comm = comm;
    z->wire = wire;
    Backend *b = &z->w.backend;
    b->mark = zero_mark;
    b->download = zero_download;
    b->sync = zero_sync;
    b->release = zero_release;
    b->destroy = zero_destroy;
    return b;
}

void zero_attach(Backend *b, const GPT2 *model) {
    Zero *z = zero_of(b);
    const Ranks *r = &model->ranks;
    size_t n = model->layout.n_elements;
    CHECK(!z->model && r->rank == (size_t)z->comm->rank && r->n == (size_t)z->comm->size, "rank %zu of %zu on rank %d of %d", r->rank, r->n, z->comm->rank,
          z->comm->size);
    z->model = model;
    z->reduced = xcalloc(model->layout.n_units, sizeof *z->reduced);
    z->gathered = xcalloc(model->layout.n_units, sizeof *z->gathered);
    if (b->host_memory) return;
    z->grads = xmalloc(n * sizeof *z->grads);
    if (r->sharded) z->params = xmalloc(n * b->elem_bytes);
}
