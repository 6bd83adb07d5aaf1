/* Learning rate as a function of the step: a linear warm-up, then one of four shapes. Not here: reading options. */
#include "schedule.h"
#include <math.h>
#include <string.h>

bool schedule_kind_by_name(ScheduleKind *kind, const char *name, Error *e) {
    static const char *const names[] = {"cosine", "linear", "constant", "wsd"};
    for (int i = 0; i < 4; i++)
        if (!strcmp(name, names[i])) {
            *kind = (ScheduleKind)i;
            return true;
        }
    return fail(e, EXIT_USAGE, "learning-rate schedule: found \"%s\", expected cosine, linear, constant or wsd", name);
}

/* Part of the way from the first step after warm-up (0) to the last step (1). A run of one step is at its start. */
static double progress(const Schedule *s, int64_t step) {
    int64_t length = s->steps - 1 - s->warmup;
    if (length > 0) return (double)(step - s->warmup) / (double)length;
    return s->steps > 1 ? 1 : 0;
}

/* WSD: 0 on the plateau, then in D equal parts to 1 at the last step; D = decay_fraction of all steps, at least one step where
 * the fraction is not 0, and never reaching back into the warm-up. */
static double wsd_progress(const Schedule *s, int64_t step) {
    int64_t decay = s->decay_fraction > 0 ? llround(s->decay_fraction * (double)s->steps) : 0;
    if (decay < 1 && s->decay_fraction > 0) decay = 1;
    if (decay > s->steps - s->warmup) decay = s->steps - s->warmup;
    int64_t into = step + 1 - (s->steps - decay);
    return decay > 0 && into > 0 ? (double)into / (double)decay : 0;
}

/* step < warmup: lr (step + 1) / warmup. After it lr (f + (1 - f) c), f = final_fraction, with p from 0 to 1:
 *   cosine  c = (1 + cos(pi p)) / 2             linear  c = 1 - p
 *   wsd     c = 1 - sqrt(p), p = 0 before the decay     constant  lr itself
 * The ends are exact in floating point: cos(pi) rounds to -1, and f + (1 - f) to 1 for 0 <= f <= 1. */
double schedule_lr(const Schedule *s, int64_t step) {
    if (step > s->steps - 1) step = s->steps - 1;
    if (step < 0) step = 0;
    if (step < s->warmup) return s->lr * ((double)(step + 1) / (double)s->warmup);
    double c = 1;
    switch (s->kind) {
    case SCHEDULE_COSINE: c = 0.5 * (1 + cos(M_PI * progress(s, step))); break;
    case SCHEDULE_LINEAR: c = 1 - progress(s, step); break;
    case SCHEDULE_WSD: c = 1 - sqrt(wsd_progress(s, step)); break;
    case SCHEDULE_CONSTANT: return s->lr;
    }
    return s->lr * (s->final_fraction + (1 - s->final_fraction) * c);
}
