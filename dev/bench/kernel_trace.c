/* See kernel_trace.h. */
#include "kernel_trace.h"
#include "../../llmc/base/error.h"
#include <ctype.h>
#include <stdlib.h>
#include <string.h>

void trace_add(Trace *t, const char *name, TraceEvent e) {
    if (!e.start || e.end < e.start) { t->untimed++; return; }
    for (e.name = 0; e.name < t->n_names && strcmp(t->names[e.name], name) != 0;) e.name++;
    if (e.name == t->n_names) {
        t->names = xrealloc(t->names, (size_t)(t->n_names + 1) * sizeof *t->names);
        t->names[t->n_names++] = xstrdup(name);
    }
    if (t->n == t->room) t->events = xrealloc(t->events, (t->room = 2 * t->room + 1024) * sizeof *t->events);
    t->events[t->n++] = e;
}

static void free_names(char **names, int n) {
    for (int i = 0; i < n; i++) free(names[i]);
    free(names);
}

void trace_clear(Trace *t) {
    free_names(t->names, t->n_names);
    free(t->events);
    *t = (Trace){0};
}

/* ---- names ------------------------------------------------------------------------------------------------------------------------- */

static bool in_word(char c) { return isalnum((unsigned char)c) || c == '_'; }

/* The end of the group that opens at s: "(...)". */
static const char *group_end(const char *s) {
    int depth = 0;
    do depth += (*s == '(') - (*s == ')');
    while (*s++ && depth > 0);
    return s;
}

/* Where a kernel's own name begins and ends within "void a::(anonymous namespace)::b<X>::name<Y>(Z)". */
static void own_name(const char *s, const char **begin, const char **end) {
    static const char anonymous[] = "(anonymous namespace)";
    int depth = 0;
    for (*begin = s; *s; s++) {
        if (!strncmp(s, anonymous, sizeof anonymous - 1)) { s += sizeof anonymous - 2; continue; }
        if (*s == '<') depth++;
        else if (*s == '>') depth--;
        else if (depth > 0) continue;
        else if (*s == '(' || *s == '[') break;
        else if (*s == ' ' || (*s == ':' && s[1] == ':')) *begin = s + (*s == ' ' ? 1 : 2);
    }
    *end = s;
}

void trace_short_name(char *out, size_t size, const char *demangled) {
    const char *s, *end;
    size_t n = 0;
    int depth = 0;
    own_name(demangled, &s, &end);
    if (s == end) s = demangled, end = s + strlen(s);
    for (; s < end && n + 1 < size; s++) {
        if (*s == '(' && depth > 0) { /* a cast, "(bool)1", or an anonymous namespace: neither tells anything */
            const char *after = group_end(s);
            if (in_word(*after) || *after == '-' || *after == ':') { s = after - 1; continue; }
        }
        if (depth >= 2 && *s != '<' && *s != '>') continue;
        if (*s == ':' && s[1] == ':') { /* takes back the qualifier, "a" or "a<..>" */
            if (n && out[n - 1] == '>') while (n && out[--n] != '<') {}
            while (n && in_word(out[n - 1])) n--;
            s++;
            continue;
        }
        if (*s == '>' && n && out[n - 1] == ' ') n--;
        if (*s == '<' && ++depth > 2) continue;
        if (*s == '>' && depth-- > 2) continue;
        if (*s == '>' && depth == 1)
            for (int dots = 0; dots < 2 && n + 1 < size; dots++) out[n++] = '.';
        if (n + 1 < size) out[n++] = *s;
    }
    if (s < end && size > 4) memcpy(out + n - 3, "...", 3);
    out[n] = 0;
}

/* Two kernels that shorten to the same name: the second gets "#2". */
static char **short_names(const Trace *t) {
    char **names = xcalloc((size_t)t->n_names + 1, sizeof *names);
    for (int i = 0; i < t->n_names; i++) {
        char name[200];
        int alike = 1;
        trace_short_name(name, sizeof name, t->names[i]);
        size_t length = strlen(name);
        for (int j = 0; j < i; j++) alike += !strncmp(names[j], name, length) && (!names[j][length] || !strncmp(names[j] + length, " #", 2));
        names[i] = alike > 1 ? xasprintf("%s #%d", name, alike) : xstrdup(name);
    }
    return names;
}

/* ---- analysis ---------------------------------------------------------------------------------------------------------------------- */

static int by_start(const void *a, const void *b) {
    const TraceEvent *x = a, *y = b;
    if (x->start != y->start) return x->start < y->start ? -1 : 1;
    return (x->end > y->end) - (x->end < y->end);
}
static int by_own(const void *a, const void *b) {
    const TraceRow *x = a, *y = b;
    if (x->own != y->own) return x->own > y->own ? -1 : 1;
    return (x->total < y->total) - (x->total > y->total);
}
static int by_total(const void *a, const void *b) {
    const TracePair *x = a, *y = b;
    return (x->total < y->total) - (x->total > y->total);
}

static bool same_launch(const TraceEvent *a, const TraceEvent *b) {
    return a->name == b->name && a->kind == b->kind && !memcmp(a->grid, b->grid, sizeof a->grid) && !memcmp(a->block, b->block, sizeof a->block) &&
           a->registers == b->registers && a->shared == b->shared;
}

static TraceRow *row_of(TraceReport *r, const TraceEvent *e) {
    size_t i = 0;
    while (i < r->n_rows && !same_launch(&r->rows[i].first, e)) i++;
    if (i == r->n_rows) {
        r->rows = xrealloc(r->rows, (i + 1) * sizeof *r->rows);
        r->rows[r->n_rows++] = (TraceRow){.first = *e, .least = UINT64_MAX};
    }
    return &r->rows[i];
}

/* What copies to and from the host take of a gap; next: the events before the gap's end. A moment with two copies counts once. */
static uint64_t copies_in(TraceReport *r, const TraceEvent *events, size_t next, uint64_t from, uint64_t to) {
    uint64_t sum = 0;
    for (size_t i = 0; i < next; i++) {
        const TraceEvent *e = &events[i];
        if (e->kind != TRACE_HOST_COPY || e->end <= from) continue;
        uint64_t start = e->start > from ? e->start : from, end = e->end < to ? e->end : to;
        row_of(r, e)->own += end - start;
        sum += end - start;
        from = end;
    }
    return sum;
}

static void add_gap(TraceReport *r, int after, int before, uint64_t length, uint64_t copying) {
    r->gaps++;
    r->idle += length;
    r->copying += copying;
    if (length <= TRACE_GAP) return;
    r->wide_gaps++;
    r->wide += length;
    if (length > r->widest) r->widest = length;
    size_t i = 0;
    while (i < r->n_pairs && (r->pairs[i].after != after || r->pairs[i].before != before)) i++;
    if (i == r->n_pairs) {
        r->pairs = xrealloc(r->pairs, (i + 1) * sizeof *r->pairs);
        r->pairs[r->n_pairs++] = (TracePair){.after = after, .before = before};
    }
    TracePair *p = &r->pairs[i];
    p->n++;
    p->total += length;
    p->copying += copying;
    if (length > p->most) p->most = length;
}

/* The latest end so far of each stream. */
typedef struct { uint32_t *id; uint64_t *end; size_t n; } Streams;

static uint64_t *end_of(Streams *s, uint32_t id) {
    size_t i = 0;
    while (i < s->n && s->id[i] != id) i++;
    if (i == s->n) {
        s->id = xrealloc(s->id, (i + 1) * sizeof *s->id);
        s->end = xrealloc(s->end, (i + 1) * sizeof *s->end);
        s->id[s->n] = id, s->end[s->n++] = 0;
    }
    return &s->end[i];
}

TraceReport trace_report(Trace *t) {
    TraceReport r = {.names = short_names(t), .n_names = t->n_names};
    Streams streams = {0};
    uint64_t begin = 0, reach = 0;  /* the first start; the latest end so far */
    int last = 0;                   /* and whose it is */
    if (t->n) qsort(t->events, t->n, sizeof *t->events, by_start);
    for (size_t i = 0; i < t->n; i++) {
        const TraceEvent *e = &t->events[i];
        TraceRow *row = row_of(&r, e);
        uint64_t length = e->end - e->start;
        row->calls++;
        row->total += length;
        row->bytes += e->bytes;
        if (length < row->least) row->least = length;
        if (length > row->most) row->most = length;
        if (e->kind == TRACE_HOST_COPY) continue;
        if (!r.activities++) begin = reach = e->start;
        uint64_t *stream_end = end_of(&streams, e->stream);
        if (e->start > reach) add_gap(&r, last, e->name, e->start - reach, copies_in(&r, t->events, i, reach, e->start));
        else if (e->start < *stream_end) r.early++, r.early_time += (e->end < *stream_end ? e->end : *stream_end) - e->start;
        else if (e->start < reach) r.beside++, r.beside_time += (e->end < reach ? e->end : reach) - e->start;
        if (e->end > *stream_end) *stream_end = e->end;
        if (e->end < reach) continue;
        uint64_t own = e->end - (e->start > reach ? e->start : reach);
        row->own += own;
        r.busy += own;
        reach = e->end, last = e->name;
    }
    r.span = reach - begin;
    if (r.n_rows) qsort(r.rows, r.n_rows, sizeof *r.rows, by_own);
    if (r.n_pairs) qsort(r.pairs, r.n_pairs, sizeof *r.pairs, by_total);
    free(streams.id);
    free(streams.end);
    return r;
}

void trace_report_free(TraceReport *r) {
    free_names(r->names, r->n_names);
    free(r->rows);
    free(r->pairs);
    *r = (TraceReport){0};
}

/* ---- in words and as JSON ------------------------------------------------------------------------------------------------------------ */

/* "12" or, where steps differ, "12.4" */
static void print_per_step(FILE *out, int width, size_t count, size_t steps) {
    fprintf(out, count % steps ? "%*.1f" : "%*.0f", width, (double)count / (double)steps);
}

static void print_row(FILE *out, const TraceReport *r, const TraceRow *row, double us) {
    const TraceEvent *e = &row->first;
    char shape[100];
    if (e->kind == TRACE_KERNEL) snprintf(shape, sizeof shape, "%4u %7u  %u,%u,%u x %u,%u,%u", e->registers, e->shared, e->grid[0], e->grid[1], e->grid[2], e->block[0], e->block[1], e->block[2]);
    else snprintf(shape, sizeof shape, "%4s %7s  %.0f bytes", "", "", (double)row->bytes / (double)row->calls);
    fprintf(out, " %9.2f %8.2f %8.2f %8.2f %-42s  %s\n", us * (double)row->total, 1e-3 * (double)row->total / (double)row->calls, 1e-3 * (double)row->least,
            1e-3 * (double)row->most, shape, r->names[e->name]);
}

/* Rows of a thousandth of the step and more; the others in one. */
static void print_rows(FILE *out, const TraceReport *r, size_t steps) {
    double us = 1e-3 / (double)steps, percent = 100 / (double)r->span;
    uint64_t rest = 0;
    size_t others = 0, calls = 0;
    fprintf(out, "%10s %6s %6s %9s %8s %8s %8s %4s %7s  %-28s  %s\n", "own us", "%", "calls", "us/step", "mean", "least", "most", "regs", "shared", "grid x block", "kernel");
    for (size_t i = 0; i < r->n_rows; i++) {
        const TraceRow *row = &r->rows[i];
        if (1000 * row->total < r->span) {
            others++, rest += row->own, calls += row->calls;
            continue;
        }
        fprintf(out, "%10.2f %6.1f ", us * (double)row->own, percent * (double)row->own);
        print_per_step(out, 6, row->calls, steps);
        print_row(out, r, row, us);
    }
    if (others) {
        fprintf(out, "%10.2f %6.1f ", us * (double)rest, percent * (double)rest);
        print_per_step(out, 6, calls, steps);
        fprintf(out, " %81s  %zu more, each under 0.1 %%\n", "", others);
    }
    uint64_t nothing = r->idle - r->copying;
    fprintf(out, "%10.2f %6.1f %6s %81s  nothing ran\n%10.2f %6.1f %6s %81s  sum\n", us * (double)nothing, percent * (double)nothing, "", "", us * (double)r->span, 100.0, "", "");
}

static void print_pairs(FILE *out, const TraceReport *r, size_t steps) {
    enum { SHOWN = 12 };
    double us = 1e-3 / (double)steps;
    uint64_t rest = 0;
    size_t n = 0;
    if (r->n_pairs) fprintf(out, "%10s %6s %9s %9s  %s\n", "us/step", "gaps", "most us", "copying", "gaps over 2 us: after -> before (copying: us a step of them under a copy to or from the host)");
    for (size_t i = 0; i < r->n_pairs; i++) {
        const TracePair *p = &r->pairs[i];
        if (i >= SHOWN) { rest += p->total, n += p->n; continue; }
        fprintf(out, "%10.2f ", us * (double)p->total);
        print_per_step(out, 6, p->n, steps);
        fprintf(out, " %9.2f %9.2f  %s -> %s\n", 1e-3 * (double)p->most, us * (double)p->copying, r->names[p->after], r->names[p->before]);
    }
    if (n) {
        fprintf(out, "%10.2f ", us * (double)rest);
        print_per_step(out, 6, n, steps);
        fprintf(out, " %9s %9s  %zu more pairs\n", "", "", r->n_pairs - SHOWN);
    }
}

void trace_print(FILE *out, const Trace *t, const TraceReport *r, TraceSteps s) {
    double n = (double)s.steps, us = 1e-3 / n, busy = us * (double)r->busy, idle = us * (double)r->idle, added = 1e6 * (s.traced - s.untraced);
    fprintf(out, "by kernel: %zu steps under CUPTI take %.3f ms each, %.3f without it: tracing adds %.1f us, %.2f for each of %.0f kernels, fills and copies, and widens gaps\n",
            s.steps, 1e3 * s.traced, 1e3 * s.untraced, added, added * n / (double)r->activities, (double)r->activities / n);
    if (t->dropped || t->untimed) fprintf(out, "INCOMPLETE: CUPTI lost %zu records, %zu more have no times; what follows lacks them, and gaps are where they were\n", t->dropped, t->untimed);
    print_rows(out, r, s.steps);
    fprintf(out, "(own: what a kernel adds to the time in which something ran; less than us/step where it overlaps those before it)\n");
    fprintf(out, "device: something ran in %.2f us of a step, nothing in %.2f (%.2f %%); the step without tracing is %.2f us longer than what ran\n", busy, idle,
            100 * (double)r->idle / (double)r->span, 1e6 * s.untraced - busy);
    fprintf(out, "gaps: %.1f a step; over 2 us %.1f, %.2f us together, the longest %.2f\n", (double)r->gaps / n, (double)r->wide_gaps / n, us * (double)r->wide, 1e-3 * (double)r->widest);
    fprintf(out, "overlaps: %.1f a step begin before the one in front of their stream has ended (early launch), by %.2f us; %.1f beside other streams, %.2f us\n",
            (double)r->early / n, us * (double)r->early_time, (double)r->beside / n, us * (double)r->beside_time);
    print_pairs(out, r, s.steps);
}

static void json_string(FILE *out, const char *s) {
    fputc('"', out);
    for (; *s; s++) fprintf(out, *s == '"' || *s == '\\' ? "\\%c" : "%c", (unsigned char)*s < ' ' ? ' ' : *s);
    fputc('"', out);
}

void trace_json(FILE *out, const Trace *t, const TraceReport *r, TraceSteps s) {
    static const char *const kinds[] = {"kernel", "fill", "copy", "host copy"};
    double n = (double)s.steps, each = 1e-9 / n;
    fprintf(out, "\"trace\": {\"steps\": %zu, \"step_s\": %.6g, \"untraced_step_s\": %.6g, \"dropped\": %zu, \"untimed\": %zu, \"activities\": %.6g, \"span_s\": %.6g, \"busy_s\": %.6g, "
            "\"idle_s\": %.6g, \"copying_s\": %.6g, \"gaps\": %.6g, \"wide_gaps\": %.6g, \"wide_gaps_s\": %.6g, \"widest_gap_s\": %.6g, \"early\": %.6g, \"early_s\": %.6g, "
            "\"beside\": %.6g, \"beside_s\": %.6g},\n\"kernels\": [", s.steps, s.traced, s.untraced, t->dropped, t->untimed, (double)r->activities / n, each * (double)r->span,
            each * (double)r->busy, each * (double)r->idle, each * (double)r->copying, (double)r->gaps / n, (double)r->wide_gaps / n, each * (double)r->wide, 1e-9 * (double)r->widest,
            (double)r->early / n, each * (double)r->early_time, (double)r->beside / n, each * (double)r->beside_time);
    for (size_t i = 0; i < r->n_rows; i++) {
        const TraceRow *row = &r->rows[i];
        const TraceEvent *e = &row->first;
        fprintf(out, "%s\n  {\"kernel\": ", i ? "," : "");
        json_string(out, r->names[e->name]);
        fprintf(out, ", \"kind\": \"%s\", \"calls\": %.6g, \"seconds\": %.6g, \"own_s\": %.6g, \"mean_s\": %.6g, \"min_s\": %.6g, \"max_s\": %.6g, \"registers\": %u, \"shared_bytes\": %u, "
                "\"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], \"bytes\": %.6g}", kinds[e->kind], (double)row->calls / n, each * (double)row->total, each * (double)row->own,
                1e-9 * (double)row->total / (double)row->calls, 1e-9 * (double)row->least, 1e-9 * (double)row->most, e->registers, e->shared, e->grid[0], e->grid[1], e->grid[2],
                e->block[0], e->block[1], e->block[2], (double)row->bytes / n);
    }
    fprintf(out, "\n],\n\"gaps\": [");
    for (size_t i = 0; i < r->n_pairs; i++) {
        const TracePair *p = &r->pairs[i];
        fprintf(out, "%s\n  {\"after\": ", i ? "," : "");
        json_string(out, r->names[p->after]);
        fprintf(out, ", \"before\": ");
        json_string(out, r->names[p->before]);
        fprintf(out, ", \"gaps\": %.6g, \"seconds\": %.6g, \"max_s\": %.6g, \"copying_s\": %.6g}", (double)p->n / n, each * (double)p->total, 1e-9 * (double)p->most, each * (double)p->copying);
    }
    fprintf(out, "\n]");
}
