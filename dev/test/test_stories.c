/* The language of the quick start: one derivation a text, probabilities that agree between writer, reader and formula, stories that
 * are consistent, and a proof of uniqueness that sees planted ambiguities. */
#include "test.h"
#include "../../llmc/base/rng.h"
#include "../data/stories/language.h"

static Language lang;

static size_t write_one(uint64_t seed, uint64_t index, char *out, double *nats) {
    *nats = 0;
    size_t n = story_write(&lang, seed, RNG_STORY, index, out, nats);
    out[n] = 0;
    return n;
}

static char *room(void) { return malloc(lang.facts.max_bytes + 100); }

/* Reads each story back: all parses are counted, by exhaustive search. */
TEST(writer_and_reader_agree) {
    char *s = room();
    for (uint64_t i = 0; i < 20000; i++) {
        double nats;
        Parse p;
        size_t n = write_one(i % 3, i, s, &nats);
        story_parse(&lang, s, n, &p);
        EXPECT(p.derivations == 1, "story %d has %d derivations: %s", (int)i, (int)p.derivations, s);
        EXPECT(fabs(p.nats - nats) < 1e-9, "story %d: written with %.12g nats, read with %.12g", (int)i, nats, p.nats);
        EXPECT(n <= lang.facts.max_bytes && n > 200, "story %d has %d bytes", (int)i, (int)n);
    }
    free(s);
}

/* A character that no story holds, a missing end, a surplus character: refused at that very byte. */
TEST(a_changed_story_is_refused) {
    char *s = room();
    for (uint64_t i = 0; i < 300; i++) {
        double nats;
        Parse p;
        size_t n = write_one(9, i, s, &nats);
        for (uint32_t k = 0; k < 40; k++) {
            size_t at = rng_u32(4, 1, k, i) % n;
            char old = s[at];
            s[at] = '#';
            story_parse(&lang, s, n, &p);
            EXPECT(p.derivations == 0 && p.failed_at == at, "%d derivations, failed at %d, changed at %d: %s", (int)p.derivations, (int)p.failed_at,
                   (int)at, s);
            s[at] = old;
        }
        story_parse(&lang, s, n - 1, &p);
        EXPECT(p.derivations == 0 && p.failed_at == n - 1, "cut story %d", (int)i);
        s[n] = ' ';
        story_parse(&lang, s, n + 1, &p);
        EXPECT(p.derivations == 0 && p.failed_at == n, "longer story %d", (int)i);
    }
    free(s);
}

/* A word exchanged for another of its set where the story needs the same one: the later place is where it fails. */
TEST(an_inconsistent_story_is_refused_where_it_goes_wrong) {
    char *s = room();
    int tried = 0;
    for (uint64_t i = 0; i < 10000 && tried < 200; i++) {
        double nats;
        size_t n = write_one(5, i, s, &nats);
        char *moon = strstr(s, "promise to Otto");
        if (!moon) continue;
        tried++;
        char *later = strstr(moon + 15, "Otto");
        EXPECT(later != NULL, "the friend is named again: %s", s);
        if (!later) continue;
        memcpy(later, "Hugo", 4);
        Parse p;
        story_parse(&lang, s, n, &p);
        EXPECT(p.derivations == 0 && p.failed_at >= (size_t)(later - s) && p.failed_at <= (size_t)(later - s) + 4, "failed at %d, changed at %d: %s",
               (int)p.failed_at, (int)(later - s), s);
    }
    EXPECT(tried >= 10, "%d stories with a promise to Otto", tried);
    free(s);
}

TEST(same_seed_same_story_and_any_story_alone) {
    char *a = room(), *b = room();
    double x, y;
    size_t n = write_one(7, 1000000007u, a, &x), m = write_one(7, 1000000007u, b, &y);
    EXPECT(n == m && memcmp(a, b, n) == 0 && x == y, "the same story twice");
    write_one(8, 1000000007u, b, &y);
    EXPECT(strcmp(a, b) != 0, "another seed");
    y = 0;
    b[story_write(&lang, 7, RNG_STORY + 1, 1000000007u, b, &y)] = 0;
    EXPECT(strcmp(a, b) != 0, "another stream");
    free(a), free(b);
}

/* Entropy, length and their spread: the formulas against the mean of many stories, within five standard errors. */
TEST(entropy_by_formula_is_the_mean) {
    enum { N = 100000 };
    char *s = room();
    double sum = 0, squares = 0, bytes = 0, bytes2 = 0;
    for (uint64_t i = 0; i < N; i++) {
        double nats, n = (double)write_one(11, i, s, &nats);
        sum += nats, squares += nats * nats, bytes += n, bytes2 += n * n;
    }
    double mean = sum / N, error = sqrt((squares / N - mean * mean) / N), length = bytes / N, length_error = sqrt((bytes2 / N - length * length) / N);
    EXPECT(fabs(mean - lang.facts.nats) < 5 * error, "mean %.4f, formula %.4f, standard error %.4f", mean, lang.facts.nats, error);
    EXPECT(fabs(length - lang.facts.bytes) < 5 * length_error, "mean %.3f, formula %.3f, standard error %.3f", length, lang.facts.bytes, length_error);
    EXPECT(lang.facts.nats > 50 && lang.facts.collision < 1e-20, "%.3f nats, chance of equal stories %.3g", lang.facts.nats, lang.facts.collision);
    free(s);
}

/* A language small enough to write out: every text, its probability, their sum. */
TEST(a_small_language_by_hand) {
    static const char *const lines[] = {"words w: w", "a, b, c", "", "rule story", "3 x[p:w][:w-p]<p>{end}", "1 y", "", "rule end", "1 .", "1 !", NULL};
    Language l;
    Error e = {0};
    EXPECT(language_compile(&l, lines, &e), "%s", e.text);
    double total = 0, entropy = 0, collision = 0;
    int n = 0;
    for (int code = 0; code < 4 * 4 * 4 * 2; code++) {
        char text[8];
        int length = snprintf(text, sizeof text, "x%c%c%c%c", "abcd"[code & 3], "abcd"[code >> 2 & 3], "abcd"[code >> 4 & 3], ".!"[code >> 6]);
        Parse p;
        story_parse(&l, text, (size_t)length, &p);
        bool ours = (code & 3) < 3 && (code >> 2 & 3) < 3 && (code & 3) == (code >> 4 & 3) && (code & 3) != (code >> 2 & 3);
        EXPECT(p.derivations == (ours ? 1u : 0u), "%s: %d", text, (int)p.derivations);
        if (!ours) continue;
        EXPECT(fabs(p.nats + log(0.75 / 3 / 2 / 2)) < 1e-12, "%s: %.12g", text, p.nats);
        n++, total += exp(-p.nats), entropy += exp(-p.nats) * p.nats, collision += exp(-2 * p.nats);
    }
    Parse y;
    story_parse(&l, "y", 1, &y);
    EXPECT(n == 12 && y.derivations == 1 && fabs(total + exp(-y.nats) - 1) < 1e-12, "%d texts, sum of probabilities %.15g", n, total + exp(-y.nats));
    EXPECT(fabs(entropy + exp(-y.nats) * y.nats - l.facts.nats) < 1e-12, "entropy %.12g", l.facts.nats);
    EXPECT(fabs(collision + exp(-2 * y.nats) - l.facts.collision) < 1e-12, "collision %.12g", l.facts.collision);
    int counts[4] = {0};   /* and the writer's frequencies: x, y; a first; excluded words never */
    for (uint64_t i = 0; i < 40000; i++) {
        char out[16];
        double nats = 0;
        size_t m = story_write(&l, 3, RNG_STORY, i, out, &nats);
        counts[0] += out[0] == 'x', counts[1] += out[0] == 'x' && out[1] == 'a', counts[2] += m > 1 && out[1] == out[2];
        counts[3] += m == 5 && out[2] == 'c' && out[4] == '!';
    }
    EXPECT(abs(counts[0] - 30000) < 450 && abs(counts[1] - 10000) < 450 && counts[2] == 0 && abs(counts[3] - 5000) < 350, "%d %d %d %d", counts[0],
           counts[1], counts[2], counts[3]);
    language_free(&l);
}

typedef struct { const char *what, *message; const char *const *lines; } BadGrammar;
#define LINES(...) (const char *const[]){__VA_ARGS__, NULL}
#define WORDS "words w: w", "cat, dog, cow", ""

/* Grammars that must be refused, and what the message must say. */
static const BadGrammar bad_grammars[] = {
    {"the same text twice", "begin the same text", LINES(WORDS, "rule story", "1 a b", "1 a b")},
    {"one text begins another", "begin the same text", LINES(WORDS, "rule story", "1 a", "1 a b")},
    {"two rules, one text", "begin the same text", LINES("rule story", "1 {p}", "1 {q}", "", "rule p", "1 ab", "1 c", "", "rule q", "1 d", "1 ab")},
    {"ambiguous only with what follows", "begin the same text", LINES("rule story", "1 {p}bc", "", "rule p", "1 a", "1 abc")},
    {"a word of a set written out", "begin the same text", LINES(WORDS, "rule story", "1 [:w].", "1 dog.")},
    {"remembered words that may be equal", "begin the same text",
     LINES(WORDS, "rule story", "1 [a:w] [b:w] {end}", "", "rule end", "1 <a>", "1 <b>")},
    {"a pick between words that may be equal", "may hold the same word", LINES(WORDS, "rule story", "1 [a:w] [b:w] [c=a|b]")},
    {"words that begin alike", "begin alike", LINES("words w: w", "cat, cattle", "", "rule story", "1 [:w] x")},
    {"a word twice", "begin alike", LINES("words w: w", "cat, cat", "", "rule story", "1 [:w]")},
    {"a drawn form that is the same for two words", "begin alike", LINES("words w: w/he", "cat/it, dog/it", "", "rule story", "1 [:w.he]")},
    {"not set on every path", "not set on every path", LINES(WORDS, "rule story", "1 {p}{q}", "", "rule p", "1 x[a:w]", "1 y", "", "rule q", "1 <a>")},
    {"set twice", "set twice", LINES(WORDS, "rule story", "1 [a:w] {p}", "", "rule p", "1 [a:w]")},
    {"recursion", "contains itself", LINES("rule story", "1 a{story}", "1 b")},
    {"unknown set", "unknown word set", LINES("rule story", "1 [:w]")},
    {"unknown form", "unknown form", LINES(WORDS, "rule story", "1 [a:w] <a.his>")},
    {"unknown variable", "unknown variable", LINES(WORDS, "rule story", "1 <b>")},
    {"unknown rule", "has no alternatives", LINES("rule story", "1 {x}")},
    {"missing form", "must have 2 forms", LINES("words w: w/he", "cat", "", "rule story", "1 a")},
    {"open bracket", "not closed", LINES(WORDS, "rule story", "1 [a:w")},
    {"no weight", "a weight, a space", LINES("rule story", "a")},
    {"weights too large", "a weight, a space", LINES("rule story", "200 a", "56 b")},
    {"a line outside", "expected 'words", LINES("hello")},
};

TEST(bad_grammars_are_refused) {
    for (size_t i = 0; i < sizeof bad_grammars / sizeof *bad_grammars; i++) {
        Language l;
        Error e = {0};
        bool ok = language_compile(&l, bad_grammars[i].lines, &e);
        EXPECT(!ok && strstr(e.text, bad_grammars[i].message), "%s: %s", bad_grammars[i].what, ok ? "accepted" : e.text);
        language_free(&l);
    }
}

/* Those that look like it but are fine. */
static const char *const *const good_grammars[] = {
    LINES(WORDS, "rule story", "1 [a:w] [b:w-a] {end}", "", "rule end", "1 <a>", "1 <b>"),
    LINES("rule story", "1 {p}c", "", "rule p", "1 ab", "1 ad"),
    LINES("rule story", "1 {p}c", "", "rule p", "1 a", "1 ab"),
    LINES(WORDS, "rule story", "1 [a:w] {p} <a>", "", "rule p", "1 the [b:w-a]", "1 <a> x"),
    LINES(WORDS, "rule story", "1 [:W] [a:w] <A>"),
};

TEST(unambiguous_grammars_are_accepted) {
    for (size_t i = 0; i < sizeof good_grammars / sizeof *good_grammars; i++) {
        Language l;
        Error e = {0};
        EXPECT(language_compile(&l, good_grammars[i], &e), "%d: %s", (int)i, e.text);
        language_free(&l);
    }
}

static const char *const *const twice = LINES("rule story", "1 {p}{p}", "", "rule p", "1 a", "1 aa");

/* The exhaustive reader sees an ambiguity too, when the proof is not asked. */
TEST(the_reader_counts_derivations) {
    Language l;
    Error e = {0};
    bool ok = language_compile(&l, twice, &e);
    Parse p;
    EXPECT(!ok && strstr(e.text, "begin the same text"), "%s", e.text);
    story_parse(&l, "aaa", 3, &p);
    EXPECT(p.derivations == 2 && fabs(p.nats - log(4)) < 1e-12, "%d derivations, %.3f nats", (int)p.derivations, p.nats);
    language_free(&l);
}

/* What the stories promise about themselves, seen in the words that the reader recovers. */
TEST(stories_are_consistent) {
    static const struct { const char *a, *b; } different[] = {{"hero", "friend"}, {"hero", "third"}, {"friend", "third"}, {"color", "color2"},
                                                              {"thing", "thing2"}, {"thing", "thing3"}, {"job", "job2"}, {"kind", "fkind"}};
    char *s = room();
    int owners = 0, races = 0;
    for (uint64_t i = 0; i < 5000; i++) {
        double nats;
        Parse p;
        story_parse(&lang, s, write_one(13, i, s, &nats), &p);
        int value[8][2], winner = -1, hero = -1, friend = -1;
        for (size_t k = 0; k < 8; k++) value[k][0] = value[k][1] = -1;
        for (int v = 0; v < lang.n_vars; v++) {
            if (strcmp(lang.vars[v], "winner") == 0) winner = p.value[v];
            if (strcmp(lang.vars[v], "hero") == 0) hero = p.value[v];
            if (strcmp(lang.vars[v], "friend") == 0) friend = p.value[v];
            for (size_t k = 0; k < 8; k++) {
                if (strcmp(lang.vars[v], different[k].a) == 0) value[k][0] = p.value[v];
                if (strcmp(lang.vars[v], different[k].b) == 0) value[k][1] = p.value[v];
            }
        }
        for (size_t k = 0; k < 8; k++)
            EXPECT(value[k][0] < 0 || value[k][0] != value[k][1], "%s and %s are the same: %s", different[k].a, different[k].b, s);
        if (winner < 0) continue;
        EXPECT(winner == hero || winner == friend, "the winner took part: %s", s);
        races++, owners += winner == hero;
    }
    EXPECT(races > 200 && abs(2 * owners - races) < races / 3, "%d races, the hero won %d", races, owners);
    free(s);
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    Error e = {0};
    if (!language_compile(&lang, story_grammar, &e)) {
        printf("FAILED compile: %s\n0 passed, 1 failed\n", e.text);
        return 1;
    }
    RUN(writer_and_reader_agree);
    RUN(a_changed_story_is_refused);
    RUN(an_inconsistent_story_is_refused_where_it_goes_wrong);
    RUN(same_seed_same_story_and_any_story_alone);
    RUN(entropy_by_formula_is_the_mean);
    RUN(a_small_language_by_hand);
    RUN(bad_grammars_are_refused);
    RUN(unambiguous_grammars_are_accepted);
    RUN(the_reader_counts_derivations);
    RUN(stories_are_consistent);
    language_free(&lang);
    return test_done();
}
