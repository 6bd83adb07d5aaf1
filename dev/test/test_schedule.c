/* Learning-rate schedules against their closed forms, at their ends, and for monotonicity and bounds over many sizes. */
#include "llmc/run/schedule.h"
#include "test.h"

static const ScheduleKind kinds[] = {SCHEDULE_COSINE, SCHEDULE_LINEAR, SCHEDULE_CONSTANT, SCHEDULE_WSD};
static const int64_t sizes[][2] = { /* steps, warmup */
    {1, 0}, {1, 1}, {2, 0}, {2, 1}, {3, 1}, {10, 0}, {10, 9}, {10, 10}, {10, 25}, {97, 13}, {1000, 100}, {20000, 700}};
enum { N_SIZES = sizeof sizes / sizeof sizes[0] };

static bool near(double a, double b) { return fabs(a - b) <= 1e-12 * fabs(b) + 1e-300; }

TEST(names) {
    static const char *const names[] = {"cosine", "linear", "constant", "wsd"};
    for (int i = 0; i < 4; i++) {
        ScheduleKind kind = (ScheduleKind)99;
        EXPECT(schedule_kind_by_name(&kind, names[i], NULL) && kind == kinds[i], "%s", names[i]);
    }
    Error e = {0};
    ScheduleKind kind;
    EXPECT(!schedule_kind_by_name(&kind, "cos", &e) && e.code == EXIT_USAGE && strstr(e.text, "\"cos\"") && strstr(e.text, "wsd"), "%s", e.text);
}

TEST(warmup) {
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < N_SIZES; i++) {
            Schedule s = {kinds[k], 6e-4, 0.1, sizes[i][1], sizes[i][0], 0.2};
            for (int64_t t = 0; t < s.warmup && t < s.steps; t++)
                EXPECT(near(schedule_lr(&s, t), s.lr * (double)(t + 1) / (double)s.warmup), "kind %d, size %d, step %d", k, i, (int)t);
            if (s.warmup && s.warmup <= s.steps) EXPECT(schedule_lr(&s, s.warmup - 1) == s.lr, "the warm-up ends at the peak");
        }
}

/* Exact, not near: the first step after warm-up has the peak (cosine, linear), the last one the final fraction. */
TEST(ends) {
    static const double fractions[] = {0, 0.1, 0.3, 1.0 / 3, 0.7, 1};
    for (int f = 0; f < 6; f++)
        for (int i = 0; i < N_SIZES; i++)
            for (int k = 0; k < 4; k++) {
                Schedule s = {kinds[k], 6e-4, fractions[f], sizes[i][1], sizes[i][0], 0.2};
                if (s.warmup >= s.steps) continue;
                double first = schedule_lr(&s, s.warmup), last = schedule_lr(&s, s.steps - 1);
                if (s.steps - s.warmup > 1 && s.kind != SCHEDULE_WSD) EXPECT(first == s.lr, "kind %d, size %d: %.17g", k, i, first);
                if (s.kind == SCHEDULE_CONSTANT) EXPECT(last == s.lr, "%.17g", last);
                else if (s.steps > 1) EXPECT(last == s.lr * s.final_fraction, "kind %d, size %d, f %g: %.17g", k, i, s.final_fraction, last);
                EXPECT(schedule_lr(&s, s.steps + 5) == last && schedule_lr(&s, -1) == schedule_lr(&s, 0), "outside the run");
            }
}

TEST(single_step) {
    Schedule s = {SCHEDULE_COSINE, 2, 0, 0, 1, 0};
    EXPECT(schedule_lr(&s, 0) == 2, "a run of one step trains at the peak");
    s.kind = SCHEDULE_LINEAR;
    EXPECT(schedule_lr(&s, 0) == 2, "%g", schedule_lr(&s, 0));
    s.warmup = 4;
    EXPECT(schedule_lr(&s, 0) == 0.5, "warm-up longer than the run: %g", schedule_lr(&s, 0));
}

/* Values by hand: cosine at a half and a third of the way, linear at a quarter, WSD's 1 - sqrt. */
TEST(closed_forms) {
    Schedule s = {SCHEDULE_COSINE, 1, 0.2, 10, 23, 0};
    EXPECT(near(schedule_lr(&s, 16), 0.6), "%.17g", schedule_lr(&s, 16));
    EXPECT(near(schedule_lr(&s, 14), 0.2 + 0.8 * 0.75), "%.17g", schedule_lr(&s, 14));
    s.kind = SCHEDULE_LINEAR;
    EXPECT(near(schedule_lr(&s, 13), 0.8), "%.17g", schedule_lr(&s, 13));
    Schedule w = {SCHEDULE_WSD, 1, 0, 5, 100, 0.25};
    EXPECT(schedule_lr(&w, 74) == 1, "the plateau ends before step 75");
    EXPECT(near(schedule_lr(&w, 75), 1 - sqrt(1.0 / 25)), "%.17g", schedule_lr(&w, 75));
    EXPECT(near(schedule_lr(&w, 83), 1 - sqrt(9.0 / 25)), "%.17g", schedule_lr(&w, 83));
    EXPECT(schedule_lr(&w, 99) == 0, "%.17g", schedule_lr(&w, 99));
    w.decay_fraction = 0;
    EXPECT(schedule_lr(&w, 99) == 1, "no decay asked for");
    w.decay_fraction = 1;
    EXPECT(schedule_lr(&w, 4) == 1 && near(schedule_lr(&w, 5), 1 - sqrt(1.0 / 95)), "the decay never reaches into the warm-up");
    w.decay_fraction = 1e-9;
    EXPECT(schedule_lr(&w, 98) == 1 && schedule_lr(&w, 99) == 0, "at least one step of decay");
}

TEST(monotone_and_bounded) {
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < N_SIZES; i++)
            for (int f = 0; f <= 10; f += 5) {
                Schedule s = {kinds[k], 3e-4, f / 10.0, sizes[i][1], sizes[i][0], 0.37};
                double before = 0;
                for (int64_t t = 0; t < s.steps; t++) {
                    double lr = schedule_lr(&s, t);
                    EXPECT(lr >= 0 && lr <= s.lr, "kind %d, size %d, step %d: %.17g", k, i, (int)t, lr);
                    if (t >= s.warmup) EXPECT(lr >= s.lr * s.final_fraction, "below the floor: %.17g", lr);
                    if (t && t < s.warmup) EXPECT(lr > before, "warm-up rises");
                    if (t && t >= s.warmup) EXPECT(lr <= before, "kind %d, size %d, step %d: rises to %.17g", k, i, (int)t, lr);
                    before = lr;
                }
            }
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    RUN(names);
    RUN(warmup);
    RUN(ends);
    RUN(single_step);
    RUN(closed_forms);
    RUN(monotone_and_bounded);
    return test_done();
}
