/* Compiles the grammar, computes its exact entropy, and writes stories. */
#include "language.h"
#include "../../../llmc/base/rng.h"
#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- memory: everything belongs to the language and is freed with it ---- */

static void *keep(Language *l, void *block) {
    l->blocks = xrealloc(l->blocks, (l->n_blocks + 1) * sizeof *l->blocks);
    return l->blocks[l->n_blocks++] = block;
}

static char *keep_text(Language *l, const char *s, size_t n) {
    char *copy = keep(l, xcalloc(n + 1, 1));
    memcpy(copy, s, n);
    return copy;
}

static Text keep_capital(Language *l, Text t) {
    char *copy = keep_text(l, t.s, t.n);
    copy[0] = (char)toupper((unsigned char)copy[0]);
    return (Text){copy, t.n};
}

void language_free(Language *l) {
    for (int i = 0; i < l->n_rules; i++) {
        for (int k = 0; k < l->rules[i].n; k++) free(l->rules[i].alternatives[k].parts);
        free(l->rules[i].alternatives);
    }
    for (size_t i = 0; i < l->n_blocks; i++) free(l->blocks[i]);
    free(l->blocks);
    free(l->sets);
    free(l->rules);
    memset(l, 0, sizeof *l);
}

/* ---- names ---- */

static bool same(const char *name, const char *s, size_t n) { return strlen(name) == n && memcmp(name, s, n) == 0; }

/* Equal but for a capital first letter of s; *capital says whether it has one that name lacks. */
static bool same_but_case(const char *name, const char *s, size_t n, bool *capital) {
    *capital = n > 0 && isupper((unsigned char)s[0]) && !isupper((unsigned char)name[0]);
    if (!*capital) return same(name, s, n);
    return strlen(name) == n && name[0] == tolower((unsigned char)s[0]) && memcmp(name + 1, s + 1, n - 1) == 0;
}

static int find_set(const Language *l, Text name, bool *capital) {
    for (int i = 0; i < l->n_sets; i++)
        if (same_but_case(l->sets[i].name, name.s, name.n, capital)) return i;
    return -1;
}

static int find_form(const WordSet *set, Text name) {
    bool capital;
    for (int i = 0; i < set->n_forms; i++)
        if (same_but_case(set->form_names[i], name.s, name.n, &capital)) return i + (capital ? set->n_forms : 0);
    return -1;
}

static int find_var(const Language *l, Text name, bool *capital) {
    for (int i = 0; i < l->n_vars; i++)
        if (same_but_case(l->vars[i], name.s, name.n, capital)) return i;
    return -1;
}

/* Rules may be used before their paragraph comes. */
static int rule_named(Language *l, Text name) {
    for (int i = 0; i < l->n_rules; i++)
        if (same(l->rules[i].name, name.s, name.n)) return i;
    l->rules = xrealloc(l->rules, (size_t)(l->n_rules + 1) * sizeof *l->rules);
    l->rules[l->n_rules] = (Rule){.name = keep_text(l, name.s, name.n)};
    return l->n_rules++;
}

static Text trim(Text t) {
    while (t.n && t.s[0] == ' ') t.s++, t.n--;
    while (t.n && t.s[t.n - 1] == ' ') t.n--;
    return t;
}

/* Cuts *rest at the first `end`; the piece before it is returned. */
static Text cut(Text *rest, char end) {
    const char *p = memchr(rest->s, end, rest->n);
    Text piece = {rest->s, p ? (size_t)(p - rest->s) : rest->n};
    size_t used = piece.n + (p != NULL);
    rest->s += used;
    rest->n -= used;
    return piece;
}

/* ---- word sets ---- */

static bool add_set(Language *l, Text header, int line, Error *e) {
    l->sets = xrealloc(l->sets, (size_t)(l->n_sets + 1) * sizeof *l->sets);
    WordSet *set = &l->sets[l->n_sets++];
    Text name = trim(cut(&header, ':'));
    *set = (WordSet){.name = keep_text(l, name.s, name.n)};
    for (header = trim(header); header.n && set->n_forms < STORY_FORMS;) {
        Text form = cut(&header, '/');
        set->form_names[set->n_forms++] = keep_text(l, form.s, form.n);
    }
    if (!set->n_forms || header.n) return fail(e, EXIT_USAGE, "grammar line %d: a word set needs 1 to %d forms", line, STORY_FORMS);
    return true;
}

static bool add_words(Language *l, Text rest, int line, Error *e) {
    WordSet *set = &l->sets[l->n_sets - 1];
    size_t row = 2 * (size_t)set->n_forms;
    while (rest.n) {
        Text word = trim(cut(&rest, ',')), whole = word;
        Text *old = set->texts;
        set->texts = xrealloc(old, (size_t)(set->n + 1) * row * sizeof *set->texts);
        Text *forms = set->texts + (size_t)set->n++ * row;
        for (int f = 0; f < set->n_forms; f++) {
            Text form = cut(&word, '/');
            if (!form.n || (f == set->n_forms - 1 && word.n))
                return fail(e, EXIT_USAGE, "grammar line %d: '%.*s' must have %d forms", line, (int)whole.n, whole.s, set->n_forms);
            forms[f] = (Text){keep_text(l, form.s, form.n), form.n};
            forms[f + set->n_forms] = keep_capital(l, forms[f]);
        }
    }
    return true;
}

/* ---- templates ---- */

static bool bad_slot(Error *e, int line, Text slot, const char *why) {
    return fail(e, EXIT_USAGE, "grammar line %d: in '%.*s': %s", line, (int)slot.n, slot.s, why);
}

static bool add_others(Language *l, Part *part, Text list, char between, Text slot, int line, Error *e) {
    while (list.n) {
        bool capital;
        Text name = cut(&list, between);
        int var = find_var(l, name, &capital);
        if (var < 0 || capital) return bad_slot(e, line, name, "unknown variable");
        if (part->n_others == STORY_OTHERS) return bad_slot(e, line, slot, "too many variables");
        part->others[part->n_others++] = var;
    }
    return true;
}

static bool bind_var(Language *l, Part *part, Text name, Text slot, int line, Error *e) {
    bool capital;
    part->var = -1;
    if (!name.n) return true;
    part->var = find_var(l, name, &capital);
    if (part->var < 0) {
        if (l->n_vars == STORY_VARS) return bad_slot(e, line, slot, "too many variables");
        l->vars[l->n_vars] = keep_text(l, name.s, name.n);
        l->var_set[l->n_vars] = part->set;
        l->distinct[l->n_vars] = ~(uint64_t)0;   /* narrowed by every draw */
        part->var = l->n_vars++;
    }
    if (l->var_set[part->var] != part->set) return bad_slot(e, line, slot, "the variable holds words of another set elsewhere");
    uint64_t differs = 0;
    if (part->kind == PART_DRAW)
        for (int i = 0; i < part->n_others; i++) differs |= (uint64_t)1 << part->others[i];
    l->distinct[part->var] &= differs;
    return true;
}

/* [v:set.form-a,b] */
static bool add_draw(Language *l, Part *part, Text slot, int line, Error *e) {
    Text others = slot, name, form;
    Text head = cut(&others, '-');
    name = cut(&head, ':');
    form = head;
    Text set_name = cut(&form, '.');
    bool capital;
    part->kind = PART_DRAW;
    part->set = find_set(l, set_name, &capital);
    if (part->set < 0) return bad_slot(e, line, slot, "unknown word set");
    const WordSet *set = &l->sets[part->set];
    part->form = form.n ? find_form(set, form) : capital ? set->n_forms : 0;
    if (part->form < 0) return bad_slot(e, line, slot, "unknown form");
    if (!add_others(l, part, others, ',', slot, line, e)) return false;
    for (int i = 0; i < part->n_others; i++)
        if (l->var_set[part->others[i]] != part->set) return bad_slot(e, line, slot, "an excluded variable is of another set");
    if (set->n <= part->n_others) return bad_slot(e, line, slot, "no word is left to draw");
    part->nats = log((double)(set->n - part->n_others));
    return bind_var(l, part, name, slot, line, e);
}

/* [v=a|b] */
static bool add_pick(Language *l, Part *part, Text slot, int line, Error *e) {
    Text list = slot, name = cut(&list, '=');
    part->kind = PART_PICK;
    if (!add_others(l, part, list, '|', slot, line, e)) return false;
    if (!part->n_others) return bad_slot(e, line, slot, "nothing to pick from");
    part->set = l->var_set[part->others[0]];
    for (int i = 1; i < part->n_others; i++)
        if (l->var_set[part->others[i]] != part->set) return bad_slot(e, line, slot, "words of different sets");
    part->nats = log((double)part->n_others);
    return bind_var(l, part, name, slot, line, e);
}

/* <v.form> */
static bool add_say(Language *l, Part *part, Text slot, int line, Error *e) {
    Text form = slot, name = cut(&form, '.');
    bool capital;
    part->kind = PART_SAY;
    part->var = find_var(l, name, &capital);
    if (part->var < 0) return bad_slot(e, line, slot, "unknown variable");
    part->set = l->var_set[part->var];
    const WordSet *set = &l->sets[part->set];
    part->form = form.n ? find_form(set, form) : capital ? set->n_forms : 0;
    return part->form >= 0 || bad_slot(e, line, slot, "unknown form");
}

static bool add_part(Language *l, Template *t, Text *rest, Error *e) {
    t->parts = xrealloc(t->parts, (size_t)(t->n_parts + 1) * sizeof *t->parts);
    Part *part = &t->parts[t->n_parts++];
    *part = (Part){.var = -1, .rule = -1, .set = -1};
    size_t plain = 0;
    while (plain < rest->n && !strchr("[<{", rest->s[plain])) plain++;
    if (plain) {
        part->kind = PART_TEXT;
        part->text = (Text){keep_text(l, rest->s, plain), plain};
        rest->s += plain, rest->n -= plain;
        return true;
    }
    char open = rest->s[0], close = (char)(open == '[' ? ']' : open == '<' ? '>' : '}');
    if (!memchr(rest->s, close, rest->n)) return bad_slot(e, t->line, *rest, "the bracket is not closed");
    rest->s++, rest->n--;
    Text slot = cut(rest, close);
    if (open == '<') return add_say(l, part, slot, t->line, e);
    if (open == '[') return memchr(slot.s, '=', slot.n) ? add_pick(l, part, slot, t->line, e) : add_draw(l, part, slot, t->line, e);
    part->kind = PART_RULE;
    part->rule = rule_named(l, slot);
    return true;
}

static bool add_alternative(Language *l, int rule, Text source, int line, Error *e) {
    Template t = {.line = line};
    while (source.n && isdigit((unsigned char)source.s[0]) && t.weight < 256) t.weight = 10 * t.weight + (uint32_t)(source.s[0] - '0'), source.s++, source.n--;
    bool ok = source.n && source.s[0] == ' ' && t.weight > 0 && l->rules[rule].total + t.weight < 256;
    if (!ok) return fail(e, EXIT_USAGE, "grammar line %d: an alternative is a weight, a space and a template; weights of a rule add up to at most 255", line);
    source.s++, source.n--;
    while (ok && source.n) ok = add_part(l, &t, &source, e);
    Rule *r = &l->rules[rule];   /* add_part may have moved the rules */
    r->alternatives = xrealloc(r->alternatives, (size_t)(r->n + 1) * sizeof *r->alternatives);
    r->alternatives[r->n++] = t;
    r->total += t.weight;
    return ok;
}

static void weigh(Language *l, Rule *r) {
    r->by_weight = keep(l, xmalloc(r->total));
    for (int i = 0, k = 0; i < r->n; i++) {
        r->alternatives[i].nats = log((double)r->total / (double)r->alternatives[i].weight);
        for (uint32_t w = 0; w < r->alternatives[i].weight; w++) r->by_weight[k++] = (uint8_t)i;
    }
}

static bool compile_lines(Language *l, const char *const *lines, Error *e) {
    int rule = -1;
    bool words = false, ok = true;
    for (int line = 1; ok && lines[line - 1]; line++) {
        Text t = {lines[line - 1], strlen(lines[line - 1])};
        bool new_set = strncmp(t.s, "words ", 6) == 0, new_rule = strncmp(t.s, "rule ", 5) == 0;
        if (!t.n) words = false, rule = -1;
        else if (new_set) words = true, ok = add_set(l, (Text){t.s + 6, t.n - 6}, line, e);
        else if (new_rule) rule = rule_named(l, (Text){t.s + 5, t.n - 5});
        else if (rule >= 0) ok = add_alternative(l, rule, t, line, e);
        else if (words) ok = add_words(l, t, line, e);
        else ok = fail(e, EXIT_USAGE, "grammar line %d: expected 'words NAME:' or 'rule NAME', found '%s'", line, t.s);
    }
    return ok;
}

/* ---- checks ---- */

typedef struct { uint64_t surely, maybe; } Bound;   /* variables set on all paths, on some */

static bool check_distinct(const Language *l, const Part *p, int line, Error *e) {
    for (int i = 0; i < p->n_others; i++)
        for (int k = 0; k < i; k++) {
            int a = p->others[i], b = p->others[k];
            if (!((l->distinct[a] >> b | l->distinct[b] >> a) & 1))
                return fail(e, EXIT_USAGE, "grammar line %d: '%s' and '%s' may hold the same word", line, l->vars[a], l->vars[b]);
        }
    return true;
}

static bool check_part(const Language *l, const Part *p, int line, Bound *bound, Error *e) {
    uint64_t needed = p->kind == PART_SAY ? (uint64_t)1 << p->var : 0;
    for (int i = 0; i < p->n_others; i++) needed |= (uint64_t)1 << p->others[i];
    for (int v = 0; v < l->n_vars; v++)
        if ((needed & ~bound->surely) >> v & 1) return fail(e, EXIT_USAGE, "grammar line %d: '%s' is not set on every path to here", line, l->vars[v]);
    if (!check_distinct(l, p, line, e)) return false;
    if ((p->kind == PART_DRAW || p->kind == PART_PICK) && p->var >= 0) {
        if (bound->maybe >> p->var & 1) return fail(e, EXIT_USAGE, "grammar line %d: '%s' is set twice in one story", line, l->vars[p->var]);
        bound->surely |= (uint64_t)1 << p->var;
        bound->maybe |= (uint64_t)1 << p->var;
    }
    return true;
}

static bool check_rule(const Language *l, int rule, int depth, Bound *bound, Error *e) {
    const Rule *r = &l->rules[rule];
    if (!r->n) return fail(e, EXIT_USAGE, "grammar: rule '%s' has no alternatives", r->name);
    if (depth > l->n_rules) return fail(e, EXIT_USAGE, "grammar: rule '%s' contains itself", r->name);
    Bound after = {~(uint64_t)0, 0};
    for (int i = 0; i < r->n; i++) {
        const Template *t = &r->alternatives[i];
        Bound here = *bound;
        for (int k = 0; k < t->n_parts; k++) {
            const Part *p = &t->parts[k];
            if (!(p->kind == PART_RULE ? check_rule(l, p->rule, depth + 1, &here, e) : check_part(l, p, t->line, &here, e))) return false;
        }
        after.surely &= here.surely;
        after.maybe |= here.maybe;
    }
    *bound = after;
    return true;
}

/* ---- exact facts ---- */

/* Every word of a set is equally likely in every variable, so the mean length of a form is the plain mean. */
static StoryFacts word_facts(const WordSet *set, int form, double nats) {
    StoryFacts f = {.nats = nats, .collision = exp(-nats)};
    for (int v = 0; v < set->n; v++) {
        size_t n = set->texts[(size_t)v * 2 * (size_t)set->n_forms + (size_t)form].n;
        f.bytes += (double)n / (double)set->n;
        if (n > f.max_bytes) f.max_bytes = n;
    }
    return f;
}

/* A rule's entropy is that of its weights plus the expected entropy of its alternatives: choices never depend on earlier ones except for
 * which words are excluded, and that leaves their number unchanged. */
static StoryFacts rule_facts(const Language *l, int rule) {
    const Rule *r = &l->rules[rule];
    StoryFacts sum = {0};
    for (int i = 0; i < r->n; i++) {
        const Template *t = &r->alternatives[i];
        double p = (double)t->weight / (double)r->total;
        StoryFacts f = {.nats = t->nats, .collision = 1};
        for (int k = 0; k < t->n_parts; k++) {
            const Part *part = &t->parts[k];
            StoryFacts x = part->kind == PART_TEXT ? (StoryFacts){0, (double)part->text.n, 1, part->text.n}
                         : part->kind == PART_RULE ? rule_facts(l, part->rule)
                                                   : word_facts(&l->sets[part->set], part->form, part->nats);
            f = (StoryFacts){f.nats + x.nats, f.bytes + x.bytes, f.collision * x.collision, f.max_bytes + x.max_bytes};
        }
        sum.nats += p * f.nats;
        sum.bytes += p * f.bytes;
        sum.collision += p * p * f.collision;
        if (f.max_bytes > sum.max_bytes) sum.max_bytes = f.max_bytes;
    }
    return sum;
}

bool language_compile(Language *l, const char *const *lines, Error *e) {
    memset(l, 0, sizeof *l);
    bool ok = compile_lines(l, lines, e);
    for (int i = 0; i < l->n_sets; i++) keep(l, l->sets[i].texts);
    if (!ok) return false;
    l->start = rule_named(l, (Text){"story", 5});
    for (int i = 0; i < l->n_rules; i++) weigh(l, &l->rules[i]);
    Bound none = {0, 0};
    if (!check_rule(l, l->start, 0, &none, e)) return false;
    l->facts = rule_facts(l, l->start);
    return language_check_unique(l, e);
}

/* ---- the generator ---- */

typedef struct {
    const Language *l;
    uint64_t seed, index;
    uint32_t stream, block;
    Rng4 bits;
    int left;                    /* of bits */
    char *out;
    double nats;
    int value[STORY_VARS];
} Teller;

/* Uniform in [0, n). */
static inline uint32_t choose(Teller *t, uint32_t n) {
    if (!t->left) {
        t->bits = rng4(t->seed, t->stream, t->block++, t->index);
        t->left = 4;
    }
    return (uint32_t)(((uint64_t)t->bits.v[--t->left] * n) >> 32);
}

static inline void say(Teller *t, Text text) {
    memcpy(t->out, text.s, text.n);
    t->out += text.n;
}

static inline void say_word(Teller *t, const Part *p, int value) {
    const WordSet *set = &t->l->sets[p->set];
    say(t, set->texts[(size_t)value * 2 * (size_t)set->n_forms + (size_t)p->form]);
}

/* The i-th word that none of the others holds. */
static int draw(Teller *t, const Part *p) {
    int i = (int)choose(t, (uint32_t)(t->l->sets[p->set].n - p->n_others)), skipped = 0;
    for (int low = -1; skipped < p->n_others;) {   /* the excluded words in ascending order */
        int next = -1;
        for (int k = 0; k < p->n_others; k++) {
            int v = t->value[p->others[k]];
            if (v > low && (next < 0 || v < next)) next = v;
        }
        if (next > i + skipped) break;
        low = next;
        skipped++;
    }
    return i + skipped;
}

static void tell(Teller *t, int rule) {
    const Rule *r = &t->l->rules[rule];
    const Template *a = &r->alternatives[r->by_weight[choose(t, r->total)]];
    t->nats += a->nats;
    for (const Part *p = a->parts, *end = p + a->n_parts; p < end; p++) {
        int value;
        switch (p->kind) {
        case PART_TEXT: say(t, p->text); continue;
        case PART_RULE: tell(t, p->rule); continue;
        case PART_SAY: say_word(t, p, t->value[p->var]); continue;
        case PART_DRAW: value = draw(t, p); break;
        case PART_PICK: value = t->value[p->others[choose(t, (uint32_t)p->n_others)]]; break;
        default: continue;
        }
        t->nats += p->nats;
        if (p->var >= 0) t->value[p->var] = value;
        say_word(t, p, value);
    }
}

size_t story_write(const Language *l, uint64_t seed, uint32_t stream, uint64_t index, char *out, double *nats) {
    Teller t = {.l = l, .seed = seed, .stream = stream, .index = index, .out = out};
    tell(&t, l->start);
    *nats += t.nats;
    return (size_t)(t.out - out);
}
