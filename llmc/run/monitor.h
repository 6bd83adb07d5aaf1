/* Watches loss and gradient norm: z-scores over a window of past finite values, limits above which a step is skipped, and the count of
 * non-finite steps in a row. All of it is plain data that goes into the checkpoint. */
#ifndef LLMC_RUN_MONITOR_H
#define LLMC_RUN_MONITOR_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif
enum { MONITOR_WINDOW = 128 };
typedef struct {
    float values[MONITOR_WINDOW]; /* ring of finite values */
    uint32_t n, next;
} MonitorWindow;
typedef struct {
    MonitorWindow loss, norm;
    int64_t nonfinite_in_row, nonfinite_total, spikes_total;
    int64_t spikes_in_row;        /* skipped for a limit since the last applied step; non-finite steps between them do not count */
} Monitor;
/* z of value against the window; NaN while the window is not full or for a non-finite value. Population deviation, in double, oldest
 * first. 0 where all values of the window are equal: no spread says nothing about what is unusual. */
double monitor_z(const MonitorWindow *w, double value);
/* Largest float whose z is at most z_limit; INFINITY when that is all of them, when z_limit <= 0 or while the window is not full. */
float monitor_limit(const MonitorWindow *w, double z_limit);
/* True when max_in_row steps in a row were skipped for a limit: the level has shifted, not spiked, and the next step goes without
 * limits. It is then part of the window, so that after some such steps the window knows the new level and skipping ends by itself. */
bool monitor_lifts_limits(const Monitor *m, int64_t max_in_row);
/* Takes a step's outcome (skip: a SKIP_ value of ops.h). Non-finite and skipped values do not enter the window. */
void monitor_step(Monitor *m, float loss, float norm, int skip);
#ifdef __cplusplus
}
#endif
#endif
