/* Reads a story back: all derivations by exhaustive search, and the probability from the grammar's weights alone. */
#include "language.h"
#include <math.h>
#include <string.h>

/* What is still to come: the rest of a template, then the rest of the one that used its rule. */
typedef struct Frame {
    const Part *next, *end;
    const struct Frame *up;
} Frame;

typedef struct {
    const Language *l;
    const char *text;
    size_t bytes;
    int value[STORY_VARS];
    Parse *parse;
} Reader;

static void search(Reader *r, Frame frame, size_t at, double log_p, int choices);

static void no_further(Reader *r, size_t at, Text expected) {
    if (at < r->parse->failed_at || (at == r->parse->failed_at && r->parse->expected.n)) return;
    r->parse->failed_at = at;
    r->parse->expected = expected;
}

static bool reads(Reader *r, size_t at, Text t) {
    if (t.n <= r->bytes - at && memcmp(r->text + at, t.s, t.n) == 0) return true;
    size_t same = 0;
    while (same < t.n && at + same < r->bytes && r->text[at + same] == t.s[same]) same++;
    no_further(r, at + same, (Text){t.s + same, t.n - same});
    return false;
}

static Text word(const Reader *r, const Part *p, int value) {
    const WordSet *set = &r->l->sets[p->set];
    return set->texts[(size_t)value * 2 * (size_t)set->n_forms + (size_t)p->form];
}

static void found(Reader *r, double log_p, int choices) {
    r->parse->derivations++;
    r->parse->nats = -log_p;
    r->parse->choices = choices;
    memcpy(r->parse->value, r->value, sizeof r->value);
}

static void try_word(Reader *r, const Part *p, int value, Frame rest, size_t at, double log_p, int choices) {
    Text t = word(r, p, value);
    if (!reads(r, at, t)) return;
    int old = p->var >= 0 ? r->value[p->var] : 0;
    if (p->var >= 0) r->value[p->var] = value;
    search(r, rest, at + t.n, log_p, choices + 1);
    if (p->var >= 0) r->value[p->var] = old;
}

static void search_draw(Reader *r, const Part *p, Frame rest, size_t at, double log_p, int choices) {
    int n = r->l->sets[p->set].n, allowed = n;
    bool excluded[1024] = {false};
    CHECK(n <= 1024, "%d words in a set", n);
    for (int i = 0; i < p->n_others; i++) {
        int v = r->value[p->others[i]];
        if (!excluded[v]) allowed--;
        excluded[v] = true;
    }
    for (int v = 0; v < n; v++)
        if (!excluded[v]) try_word(r, p, v, rest, at, log_p - log(allowed), choices);
}

static void search_pick(Reader *r, const Part *p, Frame rest, size_t at, double log_p, int choices) {
    for (int i = 0; i < p->n_others; i++) try_word(r, p, r->value[p->others[i]], rest, at, log_p - log(p->n_others), choices);
}

static void search_rule(Reader *r, const Rule *rule, Frame rest, size_t at, double log_p, int choices) {
    for (int i = 0; i < rule->n; i++) {
        const Template *t = &rule->alternatives[i];
        Frame inner = {t->parts, t->parts + t->n_parts, &rest};
        search(r, inner, at, log_p + log((double)t->weight / rule->total), choices + 1);
    }
}

static void search(Reader *r, Frame frame, size_t at, double log_p, int choices) {
    for (;;) {
        while (frame.next == frame.end) {
            if (!frame.up) {
                if (at == r->bytes) found(r, log_p, choices);
                else no_further(r, at, (Text){"", 0});
                return;
            }
            frame = *frame.up;
        }
        const Part *p = frame.next++;
        if (p->kind == PART_DRAW) { search_draw(r, p, frame, at, log_p, choices); return; }
        if (p->kind == PART_PICK) { search_pick(r, p, frame, at, log_p, choices); return; }
        if (p->kind == PART_RULE) { search_rule(r, &r->l->rules[p->rule], frame, at, log_p, choices); return; }
        Text t = p->kind == PART_SAY ? word(r, p, r->value[p->var]) : p->text;
        if (!reads(r, at, t)) return;
        at += t.n;
    }
}

void story_parse(const Language *l, const char *text, size_t bytes, Parse *parse) {
    *parse = (Parse){0};
    Reader r = {.l = l, .text = text, .bytes = bytes, .parse = parse};
    for (int v = 0; v < STORY_VARS; v++) r.value[v] = -1;
    const Part start = {.kind = PART_RULE, .rule = l->start};
    search(&r, (Frame){&start, &start + 1, NULL}, 0, 0, 0);
}
