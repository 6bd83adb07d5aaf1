/* The ranks' share of a step: what is sent when, and who waits for it. */
#include "zero.h"
#include "../base/timer.h"
#include "../wrap/wrapper.h"
#include <stdlib.h>
#include <string.h>

/* What of one unit travels between the ranks: its gradients, or its weights. */
typedef struct {
    struct Zero *z;
    const char *name;
    size_t unit;
    Staging *staging;         /* the host's copy, where the backend's memory is not the host's, else NULL */
    CommTicket ticket;        /* 0: nothing is under way */
    size_t marker;            /* between devices: the end of its operations in their queue */
    double began;             /* the communicator's thread alone */
} Flight;

typedef struct Zero {
    Wrapper w;
    Comm *comm, *devices;     /* devices: NULL, or carries what travels from device to device */
    Wire wire;
    const GPT2 *model;        /* NULL before zero_attach */
    Flight *grads, *params;   /* (n_units) */
    size_t n_flights;         /* of each */
    ZeroSpan span;            /* NULL: nobody wants to know */
    void *span_context;
} Zero;

static Zero *zero_of(Backend *b) { return (Zero *)b; }
static bool at_work(const Zero *z) { return z->model && !z->w.planning; }

static size_t unit_begin(const Zero *z, size_t unit) { return z->model->layout.unit_begin[unit]; }
static size_t unit_elements(const Zero *z, size_t unit) { return unit_begin(z, unit + 1) - unit_begin(z, unit); }

static float *host_grads(const Zero *z, size_t unit) {
    Staging *s = z->grads[unit].staging;
    return s ? (float *)(void *)s->host : z->model->grads.p + unit_begin(z, unit);
}
static char *host_params(const Zero *z, size_t unit) {
    Staging *s = z->params[unit].staging;
    return s ? s->host : (char *)z->model->params.p + unit_begin(z, unit) * z->w.backend.elem_bytes;
}

/* Which unit holds element `at` of the flat space. */
static size_t unit_at(const Zero *z, size_t at) {
    size_t unit = 0;
    while (unit_begin(z, unit + 1) <= at) unit++;
    return unit;
}

/* ---- what is under way -------------------------------------------------------------------------------------------- */

/* Both run on the communicator's thread, before and after a flight's operations: it is that thread that waits for the copy from the device, while the
 * host issues on and the device computes on. */
static void flight_begins(void *arg) {
    Flight *f = arg;
    Backend *inner = f->z->w.backend.inner;
    if (f->staging) inner->fetch_wait(inner, f->staging);
    f->began = seconds_now();
}
static void flight_ends(void *arg) {
    Flight *f = arg;
    if (f->z->span) f->z->span(f->z->span_context, "ranks", f->name, f->unit, f->began, seconds_now());
}

/* Who carries what travels; from here on it is behind the ops issued so far. */
static Comm *carrier(Zero *z) {
    Backend *inner = z->w.backend.inner;
    if (z->devices) inner->side_begin(inner);
    return z->devices ? z->devices : z->comm;
}

static void flight_sent(Flight *f, Comm *c) {
    Backend *inner = f->z->w.backend.inner;
    f->ticket = c->call(c, flight_ends, f);
    if (f->z->devices) inner->side_end(inner, f->marker);
}

static void flight_wait(Flight *f) {
    Zero *z = f->z;
    Backend *inner = z->w.backend.inner;
    if (z->devices) {
        f->ticket = 0;
        inner->side_wait(inner, f->marker);
        return;
    }
    double begin = seconds_now();
    z->comm->wait(z->comm, f->ticket);
    f->ticket = 0;
    if (z->span) z->span(z->span_context, "waiting for ranks", f->name, f->unit, begin, seconds_now());
}

/* ---- gradients ---------------------------------------------------------------------------------------------------- */

static void grads_final(Zero *z, size_t unit) {
    Backend *inner = z->w.backend.inner;
    Comm *c = carrier(z);
    Flight *f = &z->grads[unit];
    size_t n = unit_elements(z, unit);
    if (f->staging) inner->fetch(inner, f->staging, 0, z->model->grads.p + unit_begin(z, unit), n * sizeof(float));
    c->call(c, flight_begins, f);
    c->reduce_scatter(c, host_grads(z, unit), n, z->wire);
    if (!z->model->ranks.sharded) c->all_gather(c, host_grads(z, unit), n * sizeof(float));
    flight_sent(f, c);
}

/* Sums are there before the norm is taken of them. */
static void await_grads(Zero *z, size_t unit) {
    Backend *inner = z->w.backend.inner;
    Flight *f = &z->grads[unit];
    if (!f->ticket) return;
    flight_wait(f);
    if (!f->staging) return;
    UnitPart p = gpt2_updated(z->model, unit);
    inner->bring(inner, z->model->grads.p + p.first, f->staging, (p.first - unit_begin(z, unit)) * sizeof(float), p.n * sizeof(float));
}

/* ---- the decision ------------------------------------------------------------------------------------------------- */

typedef struct { double loss_sum, sum_squares, wishes; } Sums;
_Static_assert(offsetof(StepState, wishes) - offsetof(StepState, loss_sum) == offsetof(Sums, wishes), "the sums of StepState lie together");

static void sum_state(Zero *z, Step step) {
    Backend *inner = z->w.backend.inner;
    Sums sums;
    if (z->devices) {
        size_t marker = 2 * z->n_flights;
        carrier(z)->all_reduce(z->devices, &step.p->loss_sum, sizeof sums / sizeof(double));
        inner->side_end(inner, marker);
        inner->side_wait(inner, marker);
        return;
    }
    inner->download(inner, &sums, &step.p->loss_sum, sizeof sums);
    comm_sum(z->comm, (double *)&sums, sizeof sums / sizeof(double));
    inner->upload(inner, &step.p->loss_sum, &sums, sizeof sums);
}

/* ---- weights ------------------------------------------------------------------------------------------------------ */

/* This rank's part of the weights has changed. */
static void gather_params(Zero *z, const void *params) {
    Backend *b = &z->w.backend, *inner = b->inner;
    if (!z->model->ranks.sharded) return;
    Comm *c = carrier(z);
    size_t unit = unit_at(z, (size_t)((const char *)params - (const char *)z->model->params.p) / b->elem_bytes);
    Flight *f = &z->params[unit];
    UnitPart p = gpt2_part(z->model, unit);
    if (f->staging) inner->fetch(inner, f->staging, (p.first - unit_begin(z, unit)) * b->elem_bytes, (const char *)z->model->params.p + p.first * b->elem_bytes, p.n * b->elem_bytes);
    c->call(c, flight_begins, f);
    c->all_gather(c, host_params(z, unit), unit_elements(z, unit) * b->elem_bytes);
    flight_sent(f, c);
}

static void await_params(Zero *z, size_t unit) {
    Backend *b = &z->w.backend, *inner = b->inner;
    Flight *f = &z->params[unit];
    if (!f->ticket) return;
    flight_wait(f);
    if (f->staging) inner->bring(inner, (char *)z->model->params.p + unit_begin(z, unit) * b->elem_bytes, f->staging, 0, unit_elements(z, unit) * b->elem_bytes);
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

static void forget_flights(Zero *z) {
    Backend *inner = z->w.backend.inner;
    for (size_t i = 0; i < z->n_flights; i++) {
        inner->staging_destroy(inner, z->grads[i].staging);
        inner->staging_destroy(inner, z->params[i].staging);
    }
    free(z->grads);
    free(z->params);
    z->grads = z->params = NULL;
    z->n_flights = 0;
}

static void zero_destroy(Backend *b) {
    await_all_params(zero_of(b));
    forget_flights(zero_of(b));
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

static void queue_call(void *device, void (*fn)(void *), void *arg) { ((Backend *)device)->side_call(device, fn, arg); }
static void queue_round(void *device, uint16_t *to, const float *from, size_t rows, size_t stride, size_t n, size_t own) {
    ((Backend *)device)->side_round(device, to, from, rows, stride, n, own);
}
static void queue_sum(void *device, float *data, const uint16_t *others, size_t parts, size_t own, size_t n) {
    ((Backend *)device)->side_sum(device, data, others, parts, own, n);
}

bool zero_queue_create(DeviceQueue *queue, Backend *device, Wire wire, size_t room_bytes, Error *e) {
    *queue = (DeviceQueue){.stream = device->side_begin(device), .context = device, .call = queue_call, .round = queue_round, .sum = queue_sum,
                           .emulated = strcmp(device->name, "emu") == 0};
    if (wire != WIRE_BF16) return true;
    queue->room_elements = room_bytes / sizeof *queue->room;
    return (queue->room = device->alloc(device, MEM_SCRATCH, "gradients on the wire", room_bytes, e)) != NULL;
}

void zero_queue_destroy(DeviceQueue *queue) {
    Backend *device = queue->context;
    if (queue->room) device->release(device, queue->room);
    *queue = (DeviceQueue){0};
}

void zero_between_devices(Backend *b, Comm *devices) {
    Zero *z = zero_of(b);
    CHECK(!z->model && b->side_begin && devices->rank == z->comm->rank && devices->size == z->comm->size, "%s between %s devices", devices->name, b->name);
    z->devices = devices;
}

bool zero_attach(Backend *b, const GPT2 *model, Error *e) {
    Zero *z = zero_of(b);
    const Ranks *r = &model->ranks;
    size_t n = model->layout.n_units;
    CHECK(!z->model && r->rank == (size_t)z->comm->rank && r->n == (size_t)z->comm->size, "rank %zu of %zu on rank %d of %d", r->rank, r->n, z->comm->rank,
          z->comm->size);
    forget_flights(z);
    z->model = model;
    z->grads = xcalloc(n, sizeof *z->grads);
    z->params = xcalloc(n, sizeof *z->params);
    z->n_flights = n;
    for (size_t unit = 0; unit < n; unit++) {
        Flight *g = &z->grads[unit], *p = &z->params[unit];
        *g = (Flight){.z = z, .name = "gradients", .unit = unit, .marker = unit};
        *p = (Flight){.z = z, .name = "weights", .unit = unit, .marker = n + unit};
        if (b->host_memory || z->devices) continue;
        if (!(g->staging = b->staging_create(b, "gradients of a unit", unit_elements(z, unit) * sizeof(float), e))) return false;
        if (r->sharded && !(p->staging = b->staging_create(b, "weights of a unit", unit_elements(z, unit) * b->elem_bytes, e))) return false;
    }
    return true;
}

void zero_spans(Backend *b, ZeroSpan span, void *context) {
    Zero *z = zero_of(b);
    await_all_params(z);
    if (z->devices) wrapper_sync(b); /* also what is called when the queue gets there */
    z->span = span;
    z->span_context = context;
}
