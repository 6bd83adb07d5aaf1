/* Proof that a grammar gives every text exactly one derivation: at each place where a choice is made, two alternatives followed by
 * everything that can come after them never begin the same text. Compared symbolically: a remembered word stands for any word of
 * its set (except where two variables are known to differ), so a grammar may be refused without need but never accepted wrongly. */
#include "language.h"
#include <string.h>

typedef struct Frame {
    const Part *next, *end;
    const struct Frame *up;
} Frame;

/* One of two texts being compared: characters that must come now, then the frame. */
typedef struct {
    Text pending;
    Frame frame;
} Side;

typedef struct {
    const Language *l;
    uint64_t shared;             /* variables set before the choice: both sides hold the same words in them */
} Pair;

static bool may_agree(const Pair *pair, Side a, Side b);

/* The part that comes next, NULL at the end of the story. */
static const Part *head(Side *s) {
    while (s->frame.next == s->frame.end) {
        if (!s->frame.up) return NULL;
        s->frame = *s->frame.up;
    }
    return s->frame.next;
}

static bool is_word(const Part *p) { return p->kind == PART_DRAW || p->kind == PART_PICK || p->kind == PART_SAY; }

static bool any_alternative_agrees(const Pair *pair, Side a, Side b) {
    const Rule *rule = &pair->l->rules[a.frame.next++->rule];
    for (int i = 0; i < rule->n; i++) {
        const Template *t = &rule->alternatives[i];
        Side inner = {{"", 0}, {t->parts, t->parts + t->n_parts, &a.frame}};
        if (may_agree(pair, inner, b)) return true;
    }
    return false;
}

static bool any_word_agrees(const Pair *pair, Side a, Side b) {
    const Part *p = a.frame.next++;
    const WordSet *set = &pair->l->sets[p->set];
    for (int v = 0; v < set->n; v++) {
        a.pending = set->texts[(size_t)v * 2 * (size_t)set->n_forms + (size_t)p->form];
        if (may_agree(pair, a, b)) return true;
    }
    return false;
}

/* Known to hold different words: true within one derivation, and across two when one of the variables is common to both. */
static bool differ(const Pair *pair, const Part *x, const Part *y) {
    if (x->form != y->form || x->set != y->set) return false;
    if (y->kind == PART_SAY && pair->shared >> y->var & 1 && x->kind == PART_DRAW)
        for (int i = 0; i < x->n_others; i++)
            if (x->others[i] == y->var) return true;
    if (x->kind != PART_SAY || y->kind != PART_SAY || !((pair->shared >> x->var | pair->shared >> y->var) & 1)) return false;
    return (pair->l->distinct[x->var] >> y->var | pair->l->distinct[y->var] >> x->var) & 1;
}

static bool may_agree(const Pair *pair, Side a, Side b) {
    for (;;) {
        const Part *x = a.pending.n ? NULL : head(&a), *y = b.pending.n ? NULL : head(&b);
        if ((!a.pending.n && !x) || (!b.pending.n && !y)) return true;   /* one text is the beginning of the other */
        if (x && x->kind == PART_TEXT) { a.pending = x->text; a.frame.next++; x = NULL; }
        if (y && y->kind == PART_TEXT) { b.pending = y->text; b.frame.next++; y = NULL; }
        if (x && x->kind == PART_RULE) return any_alternative_agrees(pair, a, b);
        if (y && y->kind == PART_RULE) return any_alternative_agrees(pair, b, a);
        if (x && y && (differ(pair, x, y) || differ(pair, y, x))) return false;
        if (x && y && x->set == y->set && x->form == y->form) {   /* words of a form are equal or soon differ: see check_words */
            a.frame.next++, b.frame.next++;
            continue;
        }
        if (x) return any_word_agrees(pair, a, b);
        if (y) return any_word_agrees(pair, b, a);
        size_t n = a.pending.n < b.pending.n ? a.pending.n : b.pending.n;
        if (memcmp(a.pending.s, b.pending.s, n) != 0) return false;
        a.pending.s += n, a.pending.n -= n;
        b.pending.s += n, b.pending.n -= n;
    }
}

static bool check_alternatives(const Pair *pair, const Rule *r, const Frame *after, Error *e) {
    for (int i = 0; i < r->n; i++)
        for (int k = 0; k < i; k++) {
            const Template *x = &r->alternatives[i], *y = &r->alternatives[k];
            Side a = {{"", 0}, {x->parts, x->parts + x->n_parts, after}}, b = {{"", 0}, {y->parts, y->parts + y->n_parts, after}};
            if (may_agree(pair, a, b))
                return fail(e, EXIT_USAGE, "grammar: rule '%s': the alternatives in lines %d and %d can begin the same text; make them differ",
                            r->name, y->line, x->line);
        }
    return true;
}

/* Every use of every rule, with what can follow it. *bound: variables set on all paths. */
static bool check_uses(const Language *l, int rule, Frame after, uint64_t *bound, Error *e) {
    const Rule *r = &l->rules[rule];
    Pair pair = {l, *bound};
    if (!check_alternatives(&pair, r, &after, e)) return false;
    uint64_t all = ~(uint64_t)0;
    for (int i = 0; i < r->n; i++) {
        const Template *t = &r->alternatives[i];
        uint64_t here = *bound;
        for (int k = 0; k < t->n_parts; k++) {
            const Part *p = &t->parts[k];
            Frame rest = {p + 1, t->parts + t->n_parts, &after};
            if (p->kind == PART_RULE && !check_uses(l, p->rule, rest, &here, e)) return false;
            if (p->kind != PART_RULE && is_word(p) && p->var >= 0) here |= (uint64_t)1 << p->var;
        }
        all &= here;
    }
    *bound = all;
    return true;
}

/* No word is the beginning of another one of its set, in any form; a form that is drawn has no word twice. */
static bool check_words(const WordSet *set, int form, bool drawn, Error *e) {
    size_t row = 2 * (size_t)set->n_forms;
    for (int i = 0; i < set->n; i++)
        for (int k = 0; k < i; k++) {
            Text a = set->texts[(size_t)i * row + (size_t)form], b = set->texts[(size_t)k * row + (size_t)form];
            size_t n = a.n < b.n ? a.n : b.n;
            if (memcmp(a.s, b.s, n) == 0 && (drawn || a.n != b.n))
                return fail(e, EXIT_USAGE, "grammar: word set '%s': '%s' and '%s' begin alike", set->name, b.s, a.s);
        }
    return true;
}

static bool check_sets(const Language *l, Error *e) {
    for (int i = 0; i < l->n_sets; i++)
        for (int f = 0; f < 2 * l->sets[i].n_forms; f++)
            if (!check_words(&l->sets[i], f, false, e)) return false;
    for (int i = 0; i < l->n_rules; i++)
        for (int k = 0; k < l->rules[i].n; k++) {
            const Template *t = &l->rules[i].alternatives[k];
            for (int j = 0; j < t->n_parts; j++) {
                const Part *p = &t->parts[j];
                if ((p->kind == PART_DRAW || p->kind == PART_PICK) && !check_words(&l->sets[p->set], p->form, true, e)) return false;
            }
        }
    return true;
}

bool language_check_unique(const Language *l, Error *e) {
    uint64_t bound = 0;
    return check_sets(l, e) && check_uses(l, l->start, (Frame){NULL, NULL, NULL}, &bound, e);
}
