/* Learning rate as a function of the step. */
#ifndef LLMC_RUN_SCHEDULE_H
#define LLMC_RUN_SCHEDULE_H
#include "../base/error.h"
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif
typedef enum { SCHEDULE_COSINE, SCHEDULE_LINEAR, SCHEDULE_CONSTANT, SCHEDULE_WSD } ScheduleKind;
typedef struct {
    ScheduleKind kind;
    double lr;                /* peak */
    double final_fraction;    /* lr at the last step / peak (cosine, linear, wsd) */
    int64_t warmup;           /* steps of linear warm-up: lr (s+1)/warmup for s < warmup */
    int64_t steps;            /* total */
    double decay_fraction;    /* wsd: part of the steps, at the end, in which lr falls (1 - sqrt form, Hagele et al. 2024) */
} Schedule;
bool schedule_kind_by_name(ScheduleKind *kind, const char *name, Error *e);
double schedule_lr(const Schedule *s, int64_t step);
#ifdef __cplusplus
}
#endif
#endif
