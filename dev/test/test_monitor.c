/* P16: the spike monitor replayed on series with NaN, infinities and huge values, against a slow oracle that keeps the whole
 * history; saved and restored in the middle; limits that agree with z exactly. */
#include "llmc/run/monitor.h"
#include "llmc/base/rng.h"
#include "llmc/ops.h"
#include "test.h"
#include <float.h>

static uint64_t draws;
static double uniform(void) { return rng_uniform(11, 1, 0, draws++); }

/* A training-like series with accidents. */
static float any_value(double level) {
    double u = uniform();
    if (u < 0.02) return NAN;
    if (u < 0.03) return INFINITY;
    if (u < 0.04) return -INFINITY;
    if (u < 0.05) return FLT_MAX;
    if (u < 0.06) return -FLT_MAX;
    if (u < 0.08) return (float)(level * 50);
    if (u < 0.09) return 0;
    return (float)(level + 0.1 * rng_normal(11, 2, 0, draws++));
}

/* All values that were taken, and z by definition over the last MONITOR_WINDOW of them. */
typedef struct { float values[8192]; int n; } History;

static double oracle_z(const History *h, double value) {
    if (h->n < MONITOR_WINDOW || !isfinite(value)) return NAN;
    const float *w = h->values + h->n - MONITOR_WINDOW;
    long double mean = 0, variance = 0;
    for (int i = 0; i < MONITOR_WINDOW; i++) mean += w[i];
    mean /= MONITOR_WINDOW;
    for (int i = 0; i < MONITOR_WINDOW; i++) variance += (w[i] - mean) * (w[i] - mean);
    variance /= MONITOR_WINDOW;
    return variance > 0 ? (double)((value - mean) / sqrtl(variance)) : 0;
}

static bool agree(double a, double b) { return isnan(a) ? isnan(b) : fabs(a - b) <= 1e-9 * (1 + fabs(b)); }

/* What the backend decides (ops.h, StepDecide). */
static int decide(float loss, float norm, float loss_limit, float norm_limit) {
    if (!isfinite(loss) || !isfinite(norm)) return SKIP_NONFINITE;
    return loss > loss_limit ? SKIP_LOSS : norm > norm_limit ? SKIP_NORM : SKIP_NONE;
}

static void replay(double z_limit, int steps) {
    static History losses, norms;
    losses.n = norms.n = 0;
    Monitor m = {0}, restored;
    int64_t in_row = 0, nonfinite = 0, spikes = 0;
    for (int t = 0; t < steps; t++) {
        float loss = any_value(4), norm = any_value(1);
        EXPECT(agree(monitor_z(&m.loss, loss), oracle_z(&losses, loss)), "step %d: z %g, oracle %g", t, monitor_z(&m.loss, loss), oracle_z(&losses, loss));
        EXPECT(agree(monitor_z(&m.norm, norm), oracle_z(&norms, norm)), "step %d", t);
        int skip = decide(loss, norm, monitor_limit(&m.loss, z_limit), monitor_limit(&m.norm, z_limit));
        /* The limit and z are two views of one rule. */
        if (isfinite(loss) && isfinite(norm) && z_limit > 0)
            EXPECT((skip == SKIP_LOSS) == (monitor_z(&m.loss, loss) > z_limit), "step %d: loss %.9g, z %.17g", t, loss, monitor_z(&m.loss, loss));
        memcpy(&restored, &m, sizeof m);
        monitor_step(&m, loss, norm, skip);
        monitor_step(&restored, loss, norm, skip);
        EXPECT(!memcmp(&restored, &m, sizeof m), "step %d: saved and restored differs", t);
        in_row = skip == SKIP_NONFINITE ? in_row + 1 : 0;
        nonfinite += skip == SKIP_NONFINITE;
        spikes += skip == SKIP_LOSS || skip == SKIP_NORM;
        if (skip == SKIP_NONE) losses.values[losses.n++] = loss, norms.values[norms.n++] = norm;
        EXPECT(m.nonfinite_in_row == in_row && m.nonfinite_total == nonfinite && m.spikes_total == spikes, "step %d: counts", t);
    }
    EXPECT(nonfinite > steps / 50 && (z_limit <= 0 || spikes > 0), "the series has no accidents: %d, %d", (int)nonfinite, (int)spikes);
}

TEST(replay_without_limit) { replay(0, 4000); }
TEST(replay_skipping_at_3) { replay(3, 4000); }
TEST(replay_skipping_at_half) { replay(0.5, 4000); }

/* Cut in two at every step of a short series, the bytes end up the same as in one go. */
TEST(resume_changes_nothing) {
    float series[300][2];
    for (int t = 0; t < 300; t++) series[t][0] = any_value(4), series[t][1] = any_value(1);
    Monitor whole = {0};
    for (int t = 0; t < 300; t++) monitor_step(&whole, series[t][0], series[t][1], decide(series[t][0], series[t][1], INFINITY, INFINITY));
    for (int cut = 0; cut <= 300; cut++) {
        Monitor before = {0}, after;
        for (int t = 0; t < cut; t++) monitor_step(&before, series[t][0], series[t][1], decide(series[t][0], series[t][1], INFINITY, INFINITY));
        unsigned char saved[sizeof before];
        memcpy(saved, &before, sizeof saved);
        memset(&before, 0xFF, sizeof before);
        memcpy(&after, saved, sizeof saved);
        for (int t = cut; t < 300; t++) monitor_step(&after, series[t][0], series[t][1], decide(series[t][0], series[t][1], INFINITY, INFINITY));
        EXPECT(!memcmp(&after, &whole, sizeof whole), "cut at %d", cut);
    }
}

TEST(nothing_before_the_window_is_full) {
    Monitor m = {0};
    for (int t = 0; t < MONITOR_WINDOW; t++) {
        EXPECT(isnan(monitor_z(&m.loss, 5)) && isinf(monitor_limit(&m.loss, 3)), "step %d", t);
        monitor_step(&m, (float)(t % 7), 1, SKIP_NONE);
    }
    EXPECT(!isnan(monitor_z(&m.loss, 5)) && isfinite(monitor_limit(&m.loss, 3)));
    EXPECT(isnan(monitor_z(&m.loss, NAN)) && isnan(monitor_z(&m.loss, INFINITY)), "a value that is not finite has no z");
    EXPECT(isinf(monitor_limit(&m.loss, 0)) && isinf(monitor_limit(&m.loss, -1)) && isinf(monitor_limit(&m.loss, NAN)), "no limit asked for");
    EXPECT(monitor_z(&m.norm, 99) == 0 && isinf(monitor_limit(&m.norm, 3)), "equal values say nothing");
}

/* The level of a loss shifts for good: every step would be skipped for ever, so each tenth in a row goes without limits, until the
 * window knows the level. NaN in between changes nothing, nor does saving and restoring after any step. */
TEST(P16_a_shifted_level_is_taken_in) {
    enum { MAX_IN_ROW = 10, STEPS = 600 };
    Monitor m = {0}, other;
    int64_t in_row = 0, applied = 0, last_skipped = 0;
    for (int t = 0; t < 200; t++) monitor_step(&m, (float)(2 + 0.1 * rng_normal(3, 4, 0, (uint64_t)t)), 1, SKIP_NONE);
    for (int t = 0; t < STEPS; t++) {
        float loss = t % 7 == 3 ? NAN : (float)(5 + 0.1 * rng_normal(3, 5, 0, (uint64_t)t));
        bool lifted = monitor_lifts_limits(&m, MAX_IN_ROW);
        EXPECT(lifted == (in_row == MAX_IN_ROW), "step %d: %d in a row", t, (int)in_row);
        int skip = decide(loss, 1, lifted ? INFINITY : monitor_limit(&m.loss, 3), INFINITY);
        memcpy(&other, &m, sizeof m);
        monitor_step(&m, loss, 1, skip);
        monitor_step(&other, loss, 1, skip);
        EXPECT(!memcmp(&m, &other, sizeof m), "step %d: restored differs", t);
        if (skip == SKIP_LOSS) in_row++, last_skipped = t;
        if (skip == SKIP_NONE) in_row = 0, applied++;
        EXPECT(m.spikes_in_row == in_row && in_row <= MAX_IN_ROW, "step %d: %d in a row, counted %d", t, (int)m.spikes_in_row, (int)in_row);
    }
    EXPECT(last_skipped > 60 && last_skipped < 300, "last step skipped: %d", (int)last_skipped);
    EXPECT(applied > STEPS / 2, "%d applied", (int)applied);
}

TEST(known_z) {
    Monitor m = {0};
    for (int t = 0; t < MONITOR_WINDOW; t++) monitor_step(&m, t % 2 ? 3 : 1, 1, SKIP_NONE);
    EXPECT(monitor_z(&m.loss, 5) == 3 && monitor_z(&m.loss, 0) == -2, "mean 2, deviation 1: %g", monitor_z(&m.loss, 5));
    EXPECT(monitor_limit(&m.loss, 3) == 5, "%.9g", monitor_limit(&m.loss, 3));
    monitor_step(&m, NAN, 1, SKIP_NONFINITE);
    monitor_step(&m, 1e9f, 1, SKIP_LOSS);
    monitor_step(&m, 1, 1e9f, SKIP_NORM);
    EXPECT(monitor_z(&m.loss, 5) == 3, "skipped steps leave the window alone");
    monitor_step(&m, 1, NAN, SKIP_NONE);
    EXPECT(monitor_z(&m.loss, 5) == 3 && m.nonfinite_in_row == 1 && m.nonfinite_total == 2 && m.spikes_total == 2, "a bad norm without a skip is caught too");
}

/* Where the ring happens to begin changes no bit: the sums go from the oldest value on. */
TEST(ring_position_changes_nothing) {
    Monitor first = {0}, turned = {0};
    for (int t = 0; t < 55; t++) monitor_step(&turned, 1e6f, 3, SKIP_NONE);
    for (int t = 0; t < MONITOR_WINDOW; t++) {
        /* Terms that cancel: another order of summation leaves another rest. */
        float loss = (float)((uniform() - 0.5) * pow(10, (int)(uniform() * 30)));
        monitor_step(&first, loss, 1, SKIP_NONE);
        monitor_step(&turned, loss, 1, SKIP_NONE);
    }
    EXPECT(first.loss.next != turned.loss.next && monitor_z(&first.loss, 0) == monitor_z(&turned.loss, 0), "z %.17g and %.17g", monitor_z(&first.loss, 0),
           monitor_z(&turned.loss, 0));
}

/* The limit is the largest float whose z is within z_limit, also where floats are huge, tiny or far apart. */
TEST(limit_is_exact) {
    static const double scales[] = {1e-38, 1e-3, 1, 1e20, 1e38}, spreads[] = {1e-6, 0.01, 1};
    for (int s = 0; s < 15; s++) {
        MonitorWindow w = {.n = MONITOR_WINDOW, .next = (uint32_t)(s * 9 % MONITOR_WINDOW)};
        for (int i = 0; i < MONITOR_WINDOW; i++) w.values[i] = (float)(scales[s / 3] * (1 + spreads[s % 3] * uniform()));
        for (double z = 0.001; z < 1e6; z *= 3) {
            float limit = monitor_limit(&w, z);
            if (isinf(limit)) EXPECT(monitor_z(&w, FLT_MAX) <= z, "scale %d, z %g", s, z);
            else EXPECT(monitor_z(&w, limit) <= z && !(monitor_z(&w, nextafterf(limit, INFINITY)) <= z), "scale %d, z %g: limit %.9g has z %.17g", s, z, limit, monitor_z(&w, limit));
        }
    }
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    RUN(replay_without_limit);
    RUN(replay_skipping_at_3);
    RUN(replay_skipping_at_half);
    RUN(resume_changes_nothing);
    RUN(nothing_before_the_window_is_full);
    RUN(P16_a_shifted_level_is_taken_in);
    RUN(known_z);
    RUN(ring_position_changes_nothing);
    RUN(limit_is_exact);
    return test_done();
}
