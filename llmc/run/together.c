/* Wishes to stop or to save, equal replicas, the slow rank, the health of the devices. */
#include "together.h"
#include "../base/io.h"
#include "../base/timer.h"
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>

/* ---- wishes ------------------------------------------------------------------------------------------------------- */

static volatile sig_atomic_t stop_signal;
static struct timespec stop_time;
/* A second one leaves at once; but launchers often signal both a process and its group, and that is one. */
static void on_signal(int number) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (!stop_signal) {
        stop_time = now;
        stop_signal = number;
    } else if ((double)(now.tv_sec - stop_time.tv_sec) + 1e-9 * (double)(now.tv_nsec - stop_time.tv_nsec) >= 1) {
        signal(number, SIG_DFL);
        raise(number);
    }
}

void together_listen(void) {
    const int numbers[] = {SIGINT, SIGTERM, SIGHUP, SIGUSR1};
    static bool listening;
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers && !listening; i++)
        if (signal(numbers[i], on_signal) == SIG_IGN) signal(numbers[i], SIG_IGN);
    listening = true;
}

double duration_parse(const char *text) {
    double total = 0;
    if (!*text) return -1;
    for (char *end; *text; text = end) {
        if (!strspn(text, "0123456789.")) return -1;
        double n = strtod(text, &end), unit = *end == 'h' ? 3600 : *end == 'm' ? 60 : 1;
        bool known = *end && strchr("hms", *end);
        if (end == text || (*end && !known)) return -1;
        total += n * unit;
        end += known;
    }
    return total > 0 && total < 1e10 ? total : -1;
}

static Together *current;

void together_begin(Together *t, Comm *comm, Backend *backend, MetricsLog *metrics, const char *dir, const char *max_time, double started, double save_seconds) {
    *t = (Together){.comm = comm, .backend = backend, .metrics = metrics, .now = seconds_now, .until = INFINITY, .limit = max_time, .looked = -INFINITY,
                    .checked = -INFINITY, .save_seconds = save_seconds, .slowest = -1, .named = -1, .ecc = -1};
    current = t;
    if (comm->rank) return;
    if (max_time) t->until = started + duration_parse(max_time);
    t->stop_file = path_join(dir, "STOP"), t->save_file = path_join(dir, "SAVE");
}

void together_end(Together *t, int code) {
    bool fulfilled = code == EXIT_OK || code == EXIT_REQUEUE;
    if (fulfilled && t->stop_file) unlink(t->stop_file);
    if (fulfilled && t->save_file) unlink(t->save_file);
    free(t->stop_file);
    free(t->save_file);
    t->stop_file = t->save_file = NULL;
    if (current == t) current = NULL;
}

/* The files, once a second. Deleting SAVE before it is done takes the wish back too late: there will be one checkpoint more. */
static void look_for_files(Together *t, double now) {
    if (!t->stop_file || now - t->looked < 1) return;
    t->looked = now;
    t->save = t->save || path_exists(t->save_file);
    if (t->stop || !path_exists(t->stop_file)) return;
    t->stop = true;
    snprintf(t->why, sizeof t->why, "the file STOP");
}

/* A wish is fulfilled only after the steps that are under way, and one more. */
static double time_to_leave(const Together *t) { return (POST_SLOTS + 1) * t->step_seconds + t->save_seconds; }

bool together_stop(void) {
    Together *t = current;
    if (!t) return stop_signal != 0;
    double now = t->now();
    look_for_files(t, now);
    if (!t->stop && stop_signal) snprintf(t->why, sizeof t->why, "signal %d", (int)stop_signal);
    else if (!t->stop && now + time_to_leave(t) >= t->until) snprintf(t->why, sizeof t->why, "--max-time %s", t->limit);
    t->stop = t->stop || *t->why;
    return t->stop;
}

const char *together_why(Together *t) { return t->stop ? t->why : "a signal to another rank"; }

bool together_wants_save(Together *t) {
    look_for_files(t, t->now());
    return t->save;
}

void together_saved(Together *t, double seconds) {
    if (seconds >= 0) t->save_seconds = seconds;
    if (t->save) unlink(t->save_file);
    t->save = false;
}

/* ---- what is said of a rank --------------------------------------------------------------------------------------- */

/* All ranks; rank `of` has the text. Rank 0 says and records it. */
static bool say_of(Together *t, int64_t step, int of, const char *kind, const char *text, Error *e) {
    char host[65] = "?";
    gethostname(host, sizeof host - 1);
    char *line = xasprintf("rank %d (host %s) %s", of, host, of == t->comm->rank ? text : ""), *theirs = comm_broadcast_text(t->comm, line, of);
    Record record;
    bool ok = true;
    if (!t->comm->rank) {
        printf("step %lld: %s\n", (long long)step, theirs);
        record_begin(&record, kind);
        record_int(&record, "step", step);
        record_int(&record, "rank", of);
        record_string(&record, "text", theirs);
        ok = metrics_write(t->metrics, &record, e);
    }
    free(line);
    free(theirs);
    return ok;
}

/* ---- the slow rank ------------------------------------------------------------------------------------------------ */

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

typedef struct { double seconds, note; } Report; /* of a window: per step; 1: there is something to say of this rank's device */

/* Slow: more than a tenth and 2 ms above the median, of two ranks above the other one, in several windows in a row. It is named once, until it has been well in between. */
static bool judge_slow(Together *t, int64_t step, const Report *all, Error *e) {
    int n = t->comm->size, slowest = 0;
    double *sorted = xcalloc((size_t)n, sizeof *sorted);
    for (int r = 0; r < n; r++) {
        sorted[r] = all[r].seconds;
        if (all[r].seconds > all[slowest].seconds) slowest = r;
    }
    qsort(sorted, (size_t)n, sizeof *sorted, by_value);
    double most = sorted[n - 1], median = sorted[(n - 1) / 2];
    free(sorted);
    if (!(most > 1.1 * median && most > median + 2e-3)) slowest = -1;
    if (slowest != t->slowest || slowest < 0) t->in_row = 0, t->ratio = 0, t->named = slowest == t->named ? t->named : -1;
    t->slowest = slowest;
    if (slowest < 0) return true;
    t->in_row++, t->ratio += most / median;
    if (t->in_row < WINDOWS_SLOW || t->named == slowest) return true;
    char text[200];
    snprintf(text, sizeof text, "computes %.0f %% slower than the median (%.1f ms a step against %.1f ms)", 100 * (t->ratio / t->in_row - 1), 1e3 * most, 1e3 * median);
    t->named = slowest;
    return say_of(t, step, slowest, "slow_rank", text, e);
}

/* ---- the health of this rank's device ----------------------------------------------------------------------------- */

/* Each reason to throttle is said once, errors when there are more of them. */
static void look_at_health(Together *t, double now) {
    DeviceHealth h;
    if (!t->backend->health || now - t->checked < 10) return;
    t->checked = now;
    if (!t->backend->health(t->backend, &h)) return;
    size_t n = strlen(t->note), room = sizeof t->note;
    if (h.throttle_text[0] && h.throttle & ~t->throttles) {
        n += (size_t)snprintf(t->note + n, room - n, "%sis throttled: %s", n ? "; " : "", h.throttle_text);
        t->throttles |= h.throttle;
    }
    if (n < room && t->ecc >= 0 && h.ecc_uncorrected > t->ecc)
        snprintf(t->note + n, room - n, "%shas %lld new uncorrected ECC errors: its results can be wrong", n ? "; " : "", (long long)(h.ecc_uncorrected - t->ecc));
    if (h.ecc_uncorrected >= 0) t->ecc = h.ecc_uncorrected;
}

/* ---- after a step ------------------------------------------------------------------------------------------------- */

static bool end_window(Together *t, int64_t step, Error *e) {
    size_t n = (size_t)t->comm->size;
    Report *all = xcalloc(n, sizeof *all);
    bool ok = true;
    all[t->comm->rank] = (Report){t->own / (double)t->steps, t->note[0] != 0};
    t->comm->wait(t->comm, t->comm->all_gather(t->comm, all, n * sizeof *all));
    for (size_t r = 0; r < n; r++)
        if (all[r].note > 0) ok = say_of(t, step, (int)r, "gpu_health", t->note, e) && ok;
    if (n > 1) ok = judge_slow(t, step, all, e) && ok;
    free(all);
    t->note[0] = 0, t->own = 0, t->steps = 0;
    return ok;
}

bool together_step(Together *t, int64_t step, double seconds, double own_seconds, Error *e) {
    t->step_seconds = fmax(seconds, 0.9 * t->step_seconds);
    t->own += own_seconds;
    t->steps++;
    look_at_health(t, t->now());
    return (t->steps < WINDOW_STEPS && (t->comm->size > 1 || !t->note[0])) || end_window(t, step, e);
}

/* ---- replicas ----------------------------------------------------------------------------------------------------- */

enum { KINDS_MOST = 4, PIECE = 4 << 20 };
typedef struct { const char *name; const char *p; size_t element; } Held; /* one array of the flat space */

static int held_alike(const GPT2 *m, Held held[KINDS_MOST]) {
    int n = 0;
    held[n++] = (Held){"weights", (const char *)m->params.p, m->backend->elem_bytes};
    if (m->ranks.sharded) return n;
    if ((const void *)m->master.p != m->params.p) held[n++] = (Held){"master weights", (const char *)m->master.p, sizeof(float)};
    held[n++] = (Held){"first moment", (const char *)m->m.p, sizeof(float)};
    held[n++] = (Held){"second moment", (const char *)m->v.p, sizeof(float)};
    return n;
}

static uint64_t hash_bytes(const GPT2 *m, XXH3_state_t *state, char *room, const char *from, size_t bytes) {
    if (m->backend->host_memory) return XXH3_64bits(from, bytes);
    XXH3_64bits_reset(state);
    for (size_t at = 0; at < bytes; at += PIECE) {
        size_t n = bytes - at < PIECE ? bytes - at : PIECE;
        m->backend->download(m->backend, room, from + at, n);
        XXH3_64bits_update(state, room, n);
    }
    return XXH3_64bits_digest(state);
}

/* hashes (n_tensors, kinds) */
static void hash_all(const GPT2 *m, const Held *held, int kinds, uint64_t *hashes) {
    XXH3_state_t *state = XXH3_createState();
    char *room = m->backend->host_memory ? NULL : xmalloc(PIECE);
    CHECK(state, "out of host memory for a checksum");
    m->backend->sync(m->backend);
    for (size_t i = 0; i < m->layout.n_tensors; i++)
        for (int k = 0; k < kinds; k++) {
            const ParamTensor *t = &m->layout.tensors[i];
            *hashes++ = hash_bytes(m, state, room, held[k].p + t->offset * held[k].element, t->rows * t->cols * held[k].element);
        }
    free(room);
    XXH3_freeState(state);
}

/* The rank whose hashes (size, n) most ranks have; the lowest of several. */
static int majority(const uint64_t *all, int size, size_t n) {
    int best = 0, most = 0;
    for (int r = 0; r < size; r++) {
        int alike = 0;
        for (int s = 0; s < size; s++) alike += !memcmp(all + (size_t)r * n, all + (size_t)s * n, n * sizeof *all);
        if (alike > most) best = r, most = alike;
    }
    return best;
}

/* Which ranks are not as rank `right` is, and the first hash in which one differs. */
static size_t name_odd(const uint64_t *all, int size, size_t n, int right, char *text, size_t room) {
    size_t first = n, used = 0;
    for (int r = 0; r < size; r++) {
        size_t i = 0;
        while (i < n && all[(size_t)r * n + i] == all[(size_t)right * n + i]) i++;
        if (i == n) continue;
        if (used < room) used += (size_t)snprintf(text + used, room - used, "%s%d", used ? ", " : "", r);
        if (i < first) first = i;
    }
    return first;
}

bool replicas_check(const GPT2 *m, Comm *comm, int64_t step, int64_t saved_step, Error *e) {
    Held held[KINDS_MOST];
    int kinds = held_alike(m, held), size = comm->size;
    size_t n = m->layout.n_tensors * (size_t)kinds;
    uint64_t *all = xcalloc(n * (size_t)size, sizeof *all), *own = all + n * (size_t)comm->rank, *sums = xcalloc((size_t)size, sizeof *sums);
    hash_all(m, held, kinds, own);
    sums[comm->rank] = XXH3_64bits(own, n * sizeof *own);
    comm->wait(comm, comm->all_gather(comm, sums, (size_t)size * sizeof *sums));
    int right = majority(sums, size, 1), alike = 0;
    for (int r = 0; r < size; r++) alike += sums[r] == sums[right];
    free(sums);
    if (alike == size) return free(all), true;
    char odd[200] = "", before[100] = "there is no checkpoint yet: start anew";
    comm->wait(comm, comm->all_gather(comm, all, n * (size_t)size * sizeof *all));
    size_t first = name_odd(all, size, n, right, odd, sizeof odd);
    CHECK(first < n, "%d of %d ranks are alike, and no tensor differs", alike, size);
    free(all);
    if (saved_step >= 0) snprintf(before, sizeof before, "the newest checkpoint is of step %lld, and the same command continues from it", (long long)saved_step);
    return fail(e, EXIT_DEVICE, "after step %lld the ranks do not hold the same (--check-replicas): unlike %s: rank%s %s of %d, first in %s of tensor %s. "
                "Memory or a processor of that machine has failed, or its software is another; look at it, or leave it out; %s",
                (long long)step, 2 * alike > size ? "the majority" : "rank 0", alike + 1 < size ? "s" : "", odd, size, held[first % (size_t)kinds].name,
                m->layout.tensors[first / (size_t)kinds].name, before);
}
