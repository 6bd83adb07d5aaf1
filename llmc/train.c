/* One optimizer step: accumulate, reduce, decide, update. */
#include "train.h"
#include <string.h>

/* What this rank updates of each unit. */
static void update_units(Trainer *trainer) {
    GPT2 *model = trainer->model;
    Backend *be = model->backend;
    for (size_t unit = 0; unit < model->layout.n_units; unit++) {
        UnitPart p = gpt2_updated(model, unit);
        size_t first = model->segments_begin[unit];
        be->adamw(be, &(AdamW){.params = {(char *)model->params.p + p.first * be->elem_bytes}, .master = {model->master.p + p.master}, .m = {model->m.p + p.held},
                               .v = {model->v.p + p.held}, .grads = {model->grads.p + p.first}, .step = trainer->state, .segments = model->segments + first,
                               .n_segments = model->segments_begin[unit + 1] - first, .n = p.n, .index = p.index});
    }
}

/* From gradients to weights. The sum of squares is over this rank's part of each unit, whatever it updates. */
static void update(Trainer *trainer) {
    GPT2 *model = trainer->model;
    Backend *be = model->backend;
    const ParamLayout *layout = &model->layout;
    for (size_t unit = 0; unit < layout->n_units; unit++) {
        UnitPart p = gpt2_part(model, unit);
        be->sum_squares(be, &(SumSquares){.step = trainer->state, .grads = {model->grads.p + p.first}, .n = p.n});
    }
    be->step_decide(be, &(StepDecide){.step = trainer->state});
    if (model->ranks.n > 1) update_units(trainer);
    else be->adamw(be, &(AdamW){.params = model->params, .master = model->master, .m = model->m, .v = model->v, .grads = model->grads,
                           .step = trainer->state, .segments = layout->segments, .n_segments = layout->n_segments, .n = layout->n_elements});
}

bool trainer_create(Trainer *trainer, GPT2 *model, Acts *acts, Error *e) {
    Backend *be = model->backend;
    *trainer = (Trainer){.model = model, .acts = acts};
    trainer->state.p = (StepState *)be->alloc(be, MEM_OTHER, "step state", sizeof(StepState), e);
    if (!trainer->state.p) return false;
    be->plan_begin(be);
    be->loss_sum(be, &(LossSum){.step = trainer->state, .losses = acts->losses, .n = acts->B * acts->T});
    update(trainer);
    if (be->plan_end(be, e)) return true;
    trainer_destroy(trainer);
    return false;
}

void trainer_destroy(Trainer *trainer) {
    if (trainer->state.p) trainer->model->backend->release(trainer->model->backend, trainer->state.p);
    *trainer = (Trainer){0};
}

void trainer_set_updates(Trainer *trainer, int64_t updates) {
    Backend *be = trainer->model->backend;
    be->upload(be, &trainer->state.p->updates, &updates, sizeof updates);
}

/* Everything of the state but the count of updates, which only step_decide changes. */
static void begin_step(Trainer *trainer, const StepParams *p, size_t n_micro) {
    Backend *be = trainer->model->backend;
    StepState s = {.lr = p->lr, .beta1 = p->beta1, .beta2 = p->beta2, .eps = p->eps, .weight_decay = p->weight_decay,
                   .grad_clip = p->grad_clip, .loss_limit = p->loss_limit, .norm_limit = p->norm_limit,
                   .loss_rows = (double)n_micro * (double)(trainer->acts->B * trainer->acts->T) * (double)trainer->model->ranks.n, .seed = p->seed,
                   .step = p->step, .rounding = p->rounding, .wishes = p->stop * WISH_STOP + p->save * WISH_SAVE};
    be->upload(be, trainer->state.p, &s, offsetof(StepState, updates));
}

/* The update as one stretch: its arguments are the trainer's own memory. */
static void replay_update(Trainer *trainer) {
    GPT2 *model = trainer->model;
    Backend *be = model->backend;
    const uint64_t words[] = {3, (uintptr_t)trainer->state.p, (uintptr_t)model->params.p, (uintptr_t)model->grads.p, (uintptr_t)model->m.p};
    uint64_t key = gpt2_stretch_key(words, sizeof words / sizeof *words);
    if (be->replay(be, key)) return;
    update(trainer);
    be->record_end(be, key);
}

bool train_issue(Trainer *trainer, const StepParams *params, size_t n_micro, MicroBatchFn next, void *context) {
    GPT2 *model = trainer->model;
    Acts *acts = trainer->acts;
    Backend *be = model->backend;
    size_t rows = acts->B * acts->T;
    float scale = (float)(1.0 / ((double)n_micro * (double)rows * (double)model->ranks.n));
    CHECK(trainer->issued - trainer->collected < POST_SLOTS, "%d steps are not collected", POST_SLOTS);

    begin_step(trainer, params, n_micro);
    be->fill_zero(be, model->grads.p, model->layout.n_elements * sizeof(float));
    for (size_t i = 0; i < n_micro; i++) {
        const int32_t *tokens, *targets;
        if (!next(context, i, &tokens, &targets)) return false;
        acts->more = i + 1 < n_micro;
        gpt2_forward_backward(model, acts, tokens, targets, scale);
        be->loss_sum(be, &(LossSum){.step = trainer->state, .losses = acts->losses, .n = rows});
    }
    replay_update(trainer);
    be->post(be, (int)(trainer->issued++ % POST_SLOTS), trainer->state.p, sizeof(StepState));
    return true;
}
_Static_assert(sizeof(StepState) <= POST_BYTES, "the step's numbers go into one post");

StepResult train_result(Trainer *trainer) {
    Backend *be = trainer->model->backend;
    StepState s;
    CHECK(trainer->collected < trainer->issued, "no step to collect");
    be->collect(be, (int)(trainer->collected++ % POST_SLOTS), &s, sizeof s);
    return (StepResult){.loss = s.loss, .grad_norm = s.grad_norm, .skip = s.skip, .updates = s.updates,
                        .stop = (int)((int64_t)s.wishes % WISH_SAVE), .save = (int)((int64_t)s.wishes / WISH_SAVE)};
}

StepResult train_step(Trainer *trainer, const StepParams *params, size_t n_micro, MicroBatchFn next, void *context) {
    CHECK(trainer->issued == trainer->collected, "a step is not collected");
    if (!train_issue(trainer, params, n_micro, next, context)) return (StepResult){.given_up = true};
    return train_result(trainer);
}
