/* Loss and gradient norm against their recent past. Only finite values of steps that were applied enter a window, so that no NaN
 * can spoil it. Not here: the decision to skip (the backend's step_decide, from the limits) and to stop (the program's). */
#include "monitor.h"
#include "../ops.h"
#include <float.h>
#include <math.h>

/* Mean and population deviation, oldest value first; false while the window is not full. */
static bool window_moments(const MonitorWindow *w, double *mean, double *deviation) {
    if (w->n < MONITOR_WINDOW) return false;
    double sum = 0, squares = 0;
    for (uint32_t i = 0; i < MONITOR_WINDOW; i++) sum += w->values[(w->next + i) % MONITOR_WINDOW];
    *mean = sum / MONITOR_WINDOW;
    for (uint32_t i = 0; i < MONITOR_WINDOW; i++) {
        double d = w->values[(w->next + i) % MONITOR_WINDOW] - *mean;
        squares += d * d;
    }
    *deviation = sqrt(squares / MONITOR_WINDOW);
    return true;
}

static double z_of(double value, double mean, double deviation) { return deviation > 0 ? (value - mean) / deviation : 0; }

double monitor_z(const MonitorWindow *w, double value) {
    double mean, deviation;
    if (!isfinite(value) || !window_moments(w, &mean, &deviation)) return NAN;
    return z_of(value, mean, deviation);
}

float monitor_limit(const MonitorWindow *w, double z_limit) {
    double mean, deviation;
    if (!(z_limit > 0) || !window_moments(w, &mean, &deviation)) return INFINITY;
    if (z_of(FLT_MAX, mean, deviation) <= z_limit) return INFINITY;
    /* The nearest float to the formula may lie above it: z itself decides. It cannot lie more than half a float below. */
    float limit = (float)fmin(mean + z_limit * deviation, FLT_MAX);
    while (z_of(limit, mean, deviation) > z_limit) limit = nextafterf(limit, -INFINITY);
    return limit;
}

static void window_add(MonitorWindow *w, float value) {
    uint32_t at = w->next % MONITOR_WINDOW;
    w->values[at] = value;
    w->next = (at + 1) % MONITOR_WINDOW;
    if (w->n < MONITOR_WINDOW) w->n++;
}

bool monitor_lifts_limits(const Monitor *m, int64_t max_in_row) { return m->spikes_in_row >= max_in_row; }

void monitor_step(Monitor *m, float loss, float norm, int skip) {
    bool finite = isfinite(loss) && isfinite(norm) && skip != SKIP_NONFINITE;
    m->nonfinite_total += !finite;
    m->nonfinite_in_row = finite ? 0 : m->nonfinite_in_row + 1;
    if (!finite) return;
    if (skip != SKIP_NONE) {
        m->spikes_total++;
        m->spikes_in_row++;
        return;
    }
    m->spikes_in_row = 0;
    window_add(&m->loss, loss);
    window_add(&m->norm, norm);
}
