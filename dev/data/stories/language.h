/* A probabilistic grammar of short stories that knows the exact probability of every text it writes, because every text has exactly
 * one derivation. The generator walks the grammar forwards (language.c), the scorer reads a text back (parse.c), unique.c proves
 * that no two derivations give the same text. The words themselves are in grammar.c. Not a general parser: no recursion.
 *
 * Grammar source, line by line; a blank line ends a paragraph:
 *   words NAME: form/form/...     a word set; then its words, separated by commas, each with all its forms
 *   rule NAME                     then one alternative a line: an integer weight, a space, a template. The rule "story" is the start.
 * In a template:
 *   [v:set] [v:set.form] [:set]   draws a word, each equally likely, and writes it (first form unless named); v remembers it
 *   [v:set-a,b]                   likewise, but none of the words that a and b hold
 *   [v=a|b]                       one of the words that a and b hold, equally likely; v remembers it
 *   <v> <v.form>                  writes the word that v holds
 *   {rule}                        one alternative of a rule, by weight
 * A set or form written with a capital first letter writes its word with one. */
#ifndef STORIES_LANGUAGE_H
#define STORIES_LANGUAGE_H
#include "../../../llmc/base/error.h"
#include <stdint.h>

enum { STORY_VARS = 64, STORY_FORMS = 8, STORY_OTHERS = 4 };

typedef struct { const char *s; size_t n; } Text;

typedef struct {
    char *name;
    int n, n_forms;
    char *form_names[STORY_FORMS];
    Text *texts;                 /* (n, 2, n_forms): as written, then with a capital first letter */
} WordSet;

typedef enum { PART_TEXT, PART_DRAW, PART_PICK, PART_SAY, PART_RULE } PartKind;
typedef struct {
    PartKind kind;
    Text text;                   /* PART_TEXT */
    int var;                     /* PART_DRAW (-1: not remembered), PART_PICK, PART_SAY */
    int form;                    /* index into (2, n_forms) */
    int set;                     /* of the word written */
    int others[STORY_OTHERS], n_others; /* PART_DRAW: words of these are excluded; PART_PICK: one of these is taken */
    int rule;                    /* PART_RULE */
    double nats;                 /* PART_DRAW, PART_PICK: ln of the number of equally likely words */
} Part;

typedef struct {
    uint32_t weight;
    double nats;                 /* -ln(weight / total) */
    Part *parts;
    int n_parts, line;           /* line of the source */
} Template;

typedef struct {
    char *name;
    Template *alternatives;
    int n;
    uint32_t total;              /* of the weights, at most 255 */
    uint8_t *by_weight;          /* (total): alternative i stands there weight times */
} Rule;

/* Exact properties of the language, from the grammar alone. */
typedef struct {
    double nats;                 /* entropy of a story */
    double bytes;                /* expected length */
    double collision;            /* probability that two stories are the same text: sum of p^2 */
    size_t max_bytes;
} StoryFacts;

typedef struct {
    WordSet *sets;
    Rule *rules;
    int n_sets, n_rules, n_vars, start;
    char *vars[STORY_VARS];
    int var_set[STORY_VARS];
    uint64_t distinct[STORY_VARS]; /* bit b of distinct[a]: a and b never hold the same word of their set */
    StoryFacts facts;
    void **blocks;               /* everything allocated */
    size_t n_blocks;
} Language;

extern const char *const story_grammar[];   /* lines, NULL at the end */

/* Compiles a grammar, checks it (every name known, every variable set before use on every path, no recursion) and proves that
 * derivations are unique. EXIT_USAGE with the line. */
bool language_compile(Language *l, const char *const *lines, Error *e);
void language_free(Language *l);
/* The last step of language_compile: no two alternatives of a rule, where the rule is used, and no two words of a drawn set can begin
 * the same text, so a text decides every choice from left to right. The message names the two. */
bool language_check_unique(const Language *l, Error *e);

/* Story `index` of a stream, a function of (seed, stream, index) alone; out has room for facts.max_bytes. Returns its length;
 * adds -ln of its probability to *nats. A choice has probability w/W up to the 2^-32 grain of the random numbers. */
size_t story_write(const Language *l, uint64_t seed, uint32_t stream, uint64_t index, char *out, double *nats);

typedef struct {
    uint64_t derivations;        /* all of them; 1 for a text of the language, 0 for any other */
    double nats;                 /* of the last one found */
    int choices;                 /* in it */
    int value[STORY_VARS];       /* word index that each variable holds in it, -1 where unset */
    size_t failed_at;            /* for 0 derivations: the byte that no derivation gets past */
    Text expected;               /* a text that would have fitted there */
} Parse;
/* Reads one story back by trying every alternative and every word; nothing of the generator's tables is used. */
void story_parse(const Language *l, const char *text, size_t bytes, Parse *parse);
#endif
