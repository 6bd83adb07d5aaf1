/* The table of options at work: values from text, config files, the command line, --help, and text from values.
 * Numbers are read and written in the C locale whatever the process has set. Not here: what the options mean, and rules
 * between several of them. */
#include "options.h"
#include "io.h"
#include <ctype.h>
#include <errno.h>
#include <locale.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Bounds from here on are "no bound" in messages and help. */
#define UNBOUNDED 1e18

/* ---- numbers as text -------------------------------------------------------------------------------------------- */

static locale_t c_locale(void) {
    static locale_t c;
    if (!c) c = newlocale(LC_ALL_MASK, "C", (locale_t)0);
    CHECK(c, "no C locale");
    return c;
}

/* The fewest of 15 to 17 significant digits that read back to the same value. */
static void double_text(char out[40], double value) {
    locale_t old = uselocale(c_locale());
    for (int digits = 15; digits <= 17; digits++) {
        snprintf(out, 40, "%.*g", digits, value);
        if (strtod(out, NULL) == value) break;
    }
    uselocale(old);
}

/* "an integer from 1 to 64", "a number of at least 0" */
static void range_text(const Option *o, char *out, size_t n) {
    char low[40], high[40];
    double_text(low, o->min);
    double_text(high, o->max);
    const char *what = o->type == OPT_INT ? "an integer" : "a number";
    bool has_low = o->min > -UNBOUNDED, has_high = o->max < UNBOUNDED;
    if (has_low && has_high) snprintf(out, n, "%s from %s to %s", what, low, high);
    else if (has_low) snprintf(out, n, "%s of at least %s", what, low);
    else if (has_high) snprintf(out, n, "%s of at most %s", what, high);
    else snprintf(out, n, "%s", what);
    if (o->choices) snprintf(out + strlen(out), n - strlen(out), ", or %s", o->choices);
}

/* [+-]digits[.digits][e[+-]digits][k|M|G] taken apart. */
typedef struct {
    bool negative;
    const char *digits;   /* mantissa with its point */
    size_t n_digits;
    long exponent;        /* of ten: what e says, without the suffix */
    char suffix;          /* 0, 'k', 'M', 'G' */
} Number;

static bool number_parse(const char *s, Number *number) {
    *number = (Number){.negative = *s == '-'};
    if (*s == '-' || *s == '+') s++;
    number->digits = s;
    bool any = false, point = false;
    for (; isdigit((unsigned char)*s) || (*s == '.' && !point); s++) {
        any |= *s != '.';
        point |= *s == '.';
    }
    number->n_digits = (size_t)(s - number->digits);
    if (!any) return false;
    if (*s == 'e' || *s == 'E') {
        const char *digit = s + 1 + (s[1] == '-' || s[1] == '+');
        if (!isdigit((unsigned char)*digit)) return false;
        long limit = 99999, exponent = 0;
        for (; isdigit((unsigned char)*digit); digit++)
            if (exponent < limit) exponent = exponent * 10 + (*digit - '0');
        number->exponent = s[1] == '-' ? -exponent : exponent;
        s = digit;
    }
    if (*s == 'K') number->suffix = 'k', s++;
    else if (*s == 'k' || *s == 'M' || *s == 'G') number->suffix = *s++;
    return *s == 0;
}

/* Exact: every digit counts, nothing is rounded. False where the value is no integer or does not fit. */
static bool number_to_int(const Number *number, int64_t *out) {
    long scale = number->exponent + (number->suffix == 'k' ? 3 : number->suffix == 'M' ? 6 : number->suffix == 'G' ? 9 : 0);
    size_t n = number->n_digits, end = n;
    const char *point = memchr(number->digits, '.', n);
    if (point) scale -= (long)(number->digits + n - point) - 1;
    while (end > 0 && (number->digits[end - 1] == '0' || number->digits[end - 1] == '.')) scale += number->digits[--end] == '0';
    uint64_t value = 0, limit = (uint64_t)INT64_MAX + number->negative;
    for (size_t i = 0; i < end; i++) {
        if (number->digits[i] == '.') continue;
        uint64_t digit = (uint64_t)(number->digits[i] - '0');
        if (value > (limit - digit) / 10) return false;
        value = value * 10 + digit;
    }
    if (value && scale < 0) return false;
    for (; value && scale > 0; scale--) {
        if (value > limit / 10) return false;
        value *= 10;
    }
    *out = number->negative ? (int64_t)(0 - value) : (int64_t)value;
    return true;
}

/* Nearest double; false where it overflows or where something that is not 0 becomes 0. */
static bool number_to_double(const Number *number, const char *text, double *out) {
    *out = strtod_l(text, NULL, c_locale());
    bool zero = true;
    for (size_t i = 0; i < number->n_digits; i++) zero &= number->digits[i] == '0' || number->digits[i] == '.';
    return !number->suffix && isfinite(*out) && (zero || *out != 0);
}

/* ---- one value -------------------------------------------------------------------------------------------------- */

static void *field(const Option *o, void *values) { return (char *)values + o->offset; }

static bool number_set(const Option *o, void *at, const char *label, const char *text, Error *e) {
    char range[128];
    range_text(o, range, sizeof range);
    Number number;
    int64_t integer = 0;
    double real = 0;
    const char *why = "";
    if (o->choices && !strcmp(text, o->choices)) return memset(at, 0, sizeof integer), true;
    if (!number_parse(text, &number)) why = o->type == OPT_INT ? " (like 1000, 10k, 2M or 1e9)" : " (like 0.1 or 1e-4)";
    else if (o->type == OPT_INT) {
        if (!number_to_int(&number, &integer)) why = " that fits 64 bits";
        real = (double)integer;
    } else if (!number_to_double(&number, text, &real)) why = number.suffix ? " without a suffix" : " that a double can hold";
    if (*why || real < o->min || real > o->max) return fail(e, EXIT_USAGE, "%s: found \"%.80s\", expected %s%s", label, text, range, why);
    if (o->type == OPT_INT) memcpy(at, &integer, sizeof integer);
    else memcpy(at, &real, sizeof real);
    return true;
}

static bool choice_matches(const char *choices, const char *text) {
    size_t n = strlen(text);
    for (const char *s = choices; s; s = strchr(s, '|') ? strchr(s, '|') + 1 : NULL)
        if (!strncmp(s, text, n) && n && (s[n] == '|' || !s[n]) && !memchr(text, '|', n)) return true;
    return false;
}

static void string_set(const Option *o, void *values, char *text) {
    char *old;
    memcpy(&old, field(o, values), sizeof old);
    free(old);
    memcpy(field(o, values), &text, sizeof text);
}

static bool value_set(const Option *o, void *values, const char *label, const char *text, Error *e) {
    switch (o->type) {
    case OPT_BOOL: {
        bool yes = !strcmp(text, "true");
        if (!yes && strcmp(text, "false")) return fail(e, EXIT_USAGE, "%s: found \"%.80s\", expected true or false", label, text);
        memcpy(field(o, values), &yes, sizeof yes);
        return true;
    }
    case OPT_INT:
    case OPT_FLOAT: return number_set(o, field(o, values), label, text, e);
    case OPT_CHOICE:
        if (!choice_matches(o->choices, text)) return fail(e, EXIT_USAGE, "%s: found \"%.80s\", expected one of %s", label, text, o->choices);
        break;
    case OPT_STRING: break;
    }
    string_set(o, values, xstrdup(text));
    return true;
}

static void value_default(const Option *o, void *values) {
    static const size_t sizes[] = {[OPT_BOOL] = sizeof(bool), [OPT_INT] = sizeof(int64_t), [OPT_FLOAT] = sizeof(double),
                                   [OPT_STRING] = sizeof(char *), [OPT_CHOICE] = sizeof(char *)};
    memset(field(o, values), 0, sizes[o->type]);
    Error e = {0};
    CHECK(!o->default_text || value_set(o, values, o->name, o->default_text, &e), "bad default in the table of options: %s", e.text);
}

/* ---- names ------------------------------------------------------------------------------------------------------ */

static int find(const OptionTable *table, const char *name, size_t n) {
    for (int i = 0; i < table->n; i++)
        if (!strncmp(table->options[i].name, name, n) && !table->options[i].name[n]) return i;
    return -1;
}

enum { WORD_MAX = 64 };

/* Insertions, deletions, substitutions and swaps of neighbours (optimal string alignment: Damerau 1964, Levenshtein 1966). */
static size_t edit_distance(const char *a, const char *b) {
    size_t n = strlen(a), m = strlen(b), d[3][WORD_MAX + 1];
    for (size_t j = 0; j <= m; j++) d[0][j] = j;
    for (size_t i = 1; i <= n; i++) {
        size_t *row = d[i % 3], *before = d[(i + 2) % 3], *before2 = d[(i + 1) % 3];
        row[0] = i;
        for (size_t j = 1; j <= m; j++) {
            size_t best = before[j - 1] + (a[i - 1] != b[j - 1]);
            if (before[j] + 1 < best) best = before[j] + 1;
            if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] && before2[j - 2] + 1 < best) best = before2[j - 2] + 1;
            row[j] = best;
        }
    }
    return d[n % 3][m];
}

const char *options_nearest(const OptionTable *table, const char *word) {
    size_t n = strlen(word), best = (n + 2) / 3 + 1, longest = 0;
    const char *nearest = NULL, *shared = NULL;
    if (n > WORD_MAX) return NULL;
    for (int i = 0; i < table->n; i++) {
        const char *name = table->options[i].name;
        size_t length = strlen(name), distance = length <= WORD_MAX ? edit_distance(word, name) : best;
        if (distance < best) best = distance, nearest = name;
        size_t common = n < length ? n : length;
        if (common > longest && common >= 3 && !strncmp(name, word, common)) longest = common, shared = name;
    }
    return nearest ? nearest : shared;
}

/* "did you mean --NAME? " in out, or "". */
static const char *suggestion(const OptionTable *table, const char *word, const char *dashes, char out[128]) {
    const char *nearest = options_nearest(table, word);
    if (!nearest && !strncmp(word, "no-", 3)) nearest = options_nearest(table, word + 3);
    out[0] = 0;
    if (nearest) snprintf(out, 128, "did you mean %s%s? ", dashes, nearest);
    return out;
}

/* ---- config file ------------------------------------------------------------------------------------------------ */

typedef struct {
    const OptionTable *table;
    void *values;
    OptionSource *sources;   /* may be NULL */
    const char *file;
    int line;
    int *set_in;             /* line that set each option, 0 = none */
} Config;

static int hex_digit(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* Undoes quote() in place: s stands behind the opening quote. Returns what follows the closing one, NULL if malformed. */
static char *unquote(char *s) {
    char *out = s;
    for (; *s && *s != '"'; s++) {
        if (*s != '\\') {
            *out++ = *s;
            continue;
        }
        s++;
        if (*s == 'x') {
            int high = hex_digit(s[1]), low = high < 0 ? -1 : hex_digit(s[2]);
            if (low < 0 || (high == 0 && low == 0)) return NULL;
            *out++ = (char)(high * 16 + low);
            s += 2;
        } else if (*s && strchr("ntr\"\\", *s)) *out++ = (char)(*s == 'n' ? '\n' : *s == 't' ? '\t' : *s == 'r' ? '\r' : *s);
        else return NULL;
    }
    if (*s != '"') return NULL;
    *out = 0;
    return s + 1;
}

static bool is_blank(char c) { return c == ' ' || c == '\t' || c == '\r'; }
static char *skip_blanks(char *s) {
    while (is_blank(*s)) s++;
    return s;
}
static void cut_blanks(char *s, char *end) {
    while (end > s && is_blank(end[-1])) end--;
    *end = 0;
}

/* Cuts a value out of the rest of a line: quoted, or up to the end or a # that follows a blank. */
static bool config_value(char **text, bool *quoted, const char *label, Error *e) {
    char *s = skip_blanks(*text);
    *quoted = *s == '"';
    *text = s + *quoted;
    if (*quoted) {
        char *rest = unquote(s + 1);
        if (!rest)
            return fail(e, EXIT_USAGE, "%s: the quoted value has no closing \" or an unknown escape; known are \\n \\t \\r \\\" \\\\ \\xHH", label);
        rest = skip_blanks(rest);
        return !*rest || *rest == '#' || fail(e, EXIT_USAGE, "%s: found \"%.40s\" after the closing quote, expected the end of the line", label, rest);
    }
    char *end = s;
    while (*end && !(*end == '#' && (end == s || is_blank(end[-1])))) end++;
    cut_blanks(s, end);
    return *s || fail(e, EXIT_USAGE, "%s: the value is missing; give one or remove the line", label);
}

/* These only make sense on the command line, and are not saved. */
static bool command_line_only(const char *name) { return !strcmp(name, "config") || !strcmp(name, "help") || !strcmp(name, "version"); }

static bool config_set(Config *c, const char *name, char *value, Error *e) {
    char label[4200], near[128];
    int i = find(c->table, name, strlen(name));
    snprintf(label, sizeof label, "%s:%d: %.80s", c->file, c->line, name);
    if (i < 0)
        return fail(e, EXIT_USAGE, "%s: no such option; %slines are NAME = VALUE with the names that --help shows, without dashes", label,
                    suggestion(c->table, name + strspn(name, "-"), "", near));
    if (command_line_only(name)) return fail(e, EXIT_USAGE, "%s: can only be given on the command line", label);
    if (c->set_in[i]) return fail(e, EXIT_USAGE, "%s: was set in line %d already; keep one of the two", label, c->set_in[i]);
    c->set_in[i] = c->line;
    bool quoted;
    if (!config_value(&value, &quoted, label, e)) return false;
    if (!*value && c->table->options[i].type != OPT_STRING) return fail(e, EXIT_USAGE, "%s: the value is empty", label);
    if (!value_set(&c->table->options[i], c->values, label, value, e)) return false;
    if (c->sources) c->sources[i] = FROM_FILE;
    return true;
}

static bool config_line(Config *c, char *line, Error *e) {
    line = skip_blanks(line);
    if (!*line || *line == '#') return true;
    char *equals = strchr(line, '=');
    if (!equals)
        return fail(e, EXIT_USAGE, "%s:%d: found \"%.60s\", expected NAME = VALUE, or # and a comment", c->file, c->line, line);
    cut_blanks(line, equals);
    return config_set(c, line, equals + 1, e);
}

static bool config_read(Config *c, Error *e) {
    size_t n;
    char *text = file_read(c->file, &n, e);
    if (!text) {
        if (e) e->code = EXIT_USAGE;
        return fail_in(e, "--config");
    }
    bool ok = strlen(text) == n || fail(e, EXIT_USAGE, "--config: %s: found a NUL byte at %zu, expected lines of text", c->file, strlen(text));
    char *rest = text + (strncmp(text, "\xEF\xBB\xBF", 3) ? 0 : 3);
    for (char *line; ok && (line = strsep(&rest, "\n"));) {
        c->line++;
        ok = config_line(c, line, e);
    }
    free(text);
    return ok;
}

/* ---- command line ----------------------------------------------------------------------------------------------- */

typedef struct {
    const OptionTable *table;
    int argc;
    char **argv;
    const char **text;  /* value of each option, NULL = not given */
    char **args;        /* the other words */
    int n_args;
    bool takes_args;
} CommandLine;

/* Finds the option that a word --NAME or --no-NAME means; n is the length of the name in the word. */
static int find_word(const CommandLine *c, const char *name, size_t n, bool *negated, Error *e) {
    int i = find(c->table, name, n);
    *negated = false;
    if (i >= 0) return i;
    if (n > 3 && !strncmp(name, "no-", 3) && (i = find(c->table, name + 3, n - 3)) >= 0) {
        *negated = true;
        if (c->table->options[i].type == OPT_BOOL && !name[n]) return i;
        if (name[n]) fail(e, EXIT_USAGE, "--%.80s: a --no-... option takes no value; write --no-%s", name, c->table->options[i].name);
        else fail(e, EXIT_USAGE, "--%.80s: --%s takes a value and cannot be negated", name, c->table->options[i].name);
        return -1;
    }
    char near[128], word[WORD_MAX + 1];
    snprintf(word, sizeof word, "%.*s", (int)(n < WORD_MAX ? n : WORD_MAX), name);
    fail(e, EXIT_USAGE, "unknown option --%s; %s%s --help lists them all", word, suggestion(c->table, word, "--", near), c->table->program);
    return -1;
}

/* Takes the option in argv[*at], and its value from the next word where needed. */
static bool take_option(CommandLine *c, int *at, Error *e) {
    int word = *at;
    const char *name = c->argv[word] + 2, *equals = strchr(name, '=');
    size_t n = equals ? (size_t)(equals - name) : strlen(name);
    bool negated;
    int i = find_word(c, name, n, &negated, e);
    if (i < 0) return false;
    const Option *o = &c->table->options[i];
    const char *text = equals ? equals + 1 : o->type == OPT_BOOL ? (negated ? "false" : "true") : NULL;
    const char *value_name = o->value_name ? o->value_name : "VALUE";
    if (!text) {
        const char *next = word + 1 < c->argc ? c->argv[word + 1] : NULL;
        if (!next) return fail(e, EXIT_USAGE, "--%s: the value is missing; write --%s %s", o->name, o->name, value_name);
        if (!strncmp(next, "--", 2))
            return fail(e, EXIT_USAGE, "--%s: the value is missing before %.60s; write --%s %s (or --%s=%.60s if that is the value)", o->name, next,
                        o->name, value_name, o->name, next);
        text = next;
        ++*at;
    }
    if (!*text) return fail(e, EXIT_USAGE, "--%s: the value is empty; give one or leave the option out", o->name);
    c->text[i] = text;
    return true;
}

static bool take_words(CommandLine *c, Error *e) {
    bool options_end = false;
    for (int at = 1; at < c->argc; at++) {
        const char *word = c->argv[at];
        char near[128];
        if (!options_end && !strcmp(word, "--")) options_end = true;
        else if (!options_end && !strncmp(word, "--", 2)) {
            if (!take_option(c, &at, e)) return false;
        } else if (!options_end && word[0] == '-' && word[1])
            return fail(e, EXIT_USAGE, "unknown option %.60s; %soptions are long ones with two dashes, see %s --help", word,
                        suggestion(c->table, word + 1, "--", near), c->table->program);
        else if (c->takes_args) c->args[c->n_args++] = c->argv[at];
        else return fail(e, EXIT_USAGE, "found the word \"%.80s\", expected only options (--name value); see %s --help", word, c->table->program);
    }
    return true;
}

static bool apply(const CommandLine *c, void *values, OptionSource *sources, Error *e) {
    const OptionTable *table = c->table;
    int config = find(table, "config", 6);
    if (config >= 0 && c->text[config]) {
        Config file = {.table = table, .values = values, .sources = sources, .file = c->text[config],
                       .set_in = xcalloc((size_t)table->n, sizeof(int))};
        bool ok = config_read(&file, e);
        free(file.set_in);
        if (!ok) return false;
    }
    for (int i = 0; i < table->n; i++) {
        if (!c->text[i]) continue;
        char label[80];
        snprintf(label, sizeof label, "--%s", table->options[i].name);
        if (!value_set(&table->options[i], values, label, c->text[i], e)) return false;
        if (sources) sources[i] = FROM_COMMAND_LINE;
    }
    return true;
}

bool options_parse(const OptionTable *table, void *values, OptionSource *sources, int argc, char **argv,
                   char ***args, int *n_args, Error *e) {
    size_t n = (size_t)table->n;
    for (int i = 0; i < table->n; i++) {
        value_default(&table->options[i], values);
        if (sources) sources[i] = FROM_DEFAULT;
    }
    CommandLine c = {.table = table, .argc = argc, .argv = argv, .takes_args = args != NULL};
    c.text = xcalloc(n, sizeof *c.text);
    c.args = xcalloc((size_t)argc + 1, sizeof *c.args);
    bool ok = take_words(&c, e) && apply(&c, values, sources, e);
    free(c.text);
    if (ok && args) {
        *args = c.args;
        *n_args = c.n_args;
    } else free(c.args);
    if (!ok) options_free(table, values);
    return ok;
}

void options_free(const OptionTable *table, void *values) {
    for (int i = 0; i < table->n; i++)
        if (table->options[i].type == OPT_STRING || table->options[i].type == OPT_CHOICE) string_set(&table->options[i], values, NULL);
}

/* ---- text from values ------------------------------------------------------------------------------------------- */

char *options_value_text(const OptionTable *table, const void *values, int i) {
    const Option *o = &table->options[i];
    const char *at = (const char *)values + o->offset;
    bool yes;
    int64_t integer;
    double real;
    const char *string;
    char text[40];
    switch (o->type) {
    case OPT_BOOL: memcpy(&yes, at, sizeof yes); return xstrdup(yes ? "true" : "false");
    case OPT_INT:
        memcpy(&integer, at, sizeof integer);
        if (!integer && o->choices) return xstrdup(o->choices);
        return integer || o->default_text ? xasprintf("%lld", (long long)integer) : NULL;
    case OPT_FLOAT:
        memcpy(&real, at, sizeof real);
        double_text(text, real);
        return real != 0 || o->default_text ? xstrdup(text) : NULL;
    case OPT_STRING:
    case OPT_CHOICE: memcpy(&string, at, sizeof string); return string ? xstrdup(string) : NULL;
    }
    return NULL;
}

/* Writes value as config_value reads it: quoted only where it must be. */
static void quote(FILE *out, const char *value) {
    size_t n = strlen(value);
    bool plain = n && value[0] != '"' && !isspace((unsigned char)value[0]) && !isspace((unsigned char)value[n - 1]);
    for (size_t i = 0; i < n; i++) plain &= (unsigned char)value[i] >= 32 && value[i] != '#' && value[i] != 127;
    if (plain) {
        fputs(value, out);
        return;
    }
    fputc('"', out);
    for (const char *s = value; *s; s++) {
        unsigned char c = (unsigned char)*s;
        if (c == '"' || c == '\\') fprintf(out, "\\%c", c);
        else if (c == '\n') fputs("\\n", out);
        else if (c < 32 || c == 127) fprintf(out, "\\x%02x", c);
        else fputc(c, out);
    }
    fputc('"', out);
}

char *options_to_config(const OptionTable *table, const void *values) {
    char *text = NULL;
    size_t n = 0;
    FILE *out = open_memstream(&text, &n);
    CHECK(out, "out of host memory for a configuration");
    for (int i = 0; i < table->n; i++) {
        char *value = options_value_text(table, values, i);
        if (value && !command_line_only(table->options[i].name)) {
            fprintf(out, "%s = ", table->options[i].name);
            quote(out, value);
            fputc('\n', out);
        }
        free(value);
    }
    CHECK(fclose(out) == 0, "out of host memory for a configuration");
    return text;
}

/* ---- help ------------------------------------------------------------------------------------------------------- */

enum { HELP_WIDTH = 100, HELP_COLUMN = 30 };

/* Words of text from column HELP_COLUMN on, broken at HELP_WIDTH; column is where the cursor stands. */
static void wrapped(FILE *out, int column, const char *text) {
    if (column >= HELP_COLUMN) fputc('\n', out), column = 0;
    fprintf(out, "%*s", HELP_COLUMN - column, "");
    column = HELP_COLUMN;
    while (*text) {
        int n = (int)strcspn(text, " ");
        if (column > HELP_COLUMN && column + 1 + n > HELP_WIDTH) {
            fprintf(out, "\n%*s", HELP_COLUMN, "");
            column = HELP_COLUMN;
        }
        column += fprintf(out, "%s%.*s", column > HELP_COLUMN ? " " : "", n, text);
        text += n;
        text += strspn(text, " ");
    }
    fputc('\n', out);
}

/* "[default: 10; an integer from 1 to 64]" */
static char *default_and_range(const Option *o) {
    char range[160] = "", *choices = NULL;
    if (o->type == OPT_INT || o->type == OPT_FLOAT) range_text(o, range, sizeof range);
    if (o->type == OPT_CHOICE) {
        choices = xstrdup(o->choices);
        for (char *s = choices; (s = strchr(s, '|'));) *s = '/';
        snprintf(range, sizeof range, "one of %.140s", choices);
    }
    free(choices);
    const char *value = o->type == OPT_BOOL ? (o->default_text && !strcmp(o->default_text, "true") ? "on" : NULL) : o->default_text;
    if (value && *range) return xasprintf(" [default: %s; %s]", value, range);
    if (value) return xasprintf(" [default: %s]", value);
    return *range ? xasprintf(" [%s]", range) : xstrdup("");
}

static void help_row(const Option *o, FILE *out) {
    bool on = o->type == OPT_BOOL && o->default_text && !strcmp(o->default_text, "true");
    int column = fprintf(out, "  --%s%s", on ? "[no-]" : "", o->name);
    if (o->type != OPT_BOOL) column += fprintf(out, " %s", o->value_name ? o->value_name : "VALUE");
    char *more = default_and_range(o), *text = xasprintf("%s%s", o->help, more);
    wrapped(out, column, text);
    free(more);
    free(text);
}

void options_help(const OptionTable *table, FILE *out) {
    fprintf(out, "usage: %s\n", table->usage);
    const char *group = NULL;
    for (int i = 0; i < table->n; i++) {
        const Option *o = &table->options[i];
        if (o->group && (!group || strcmp(group, o->group))) fprintf(out, "\n%s:\n", group = o->group);
        help_row(o, out);
    }
    fputs("\nIntegers may end in k, M or G (10^3, 10^6, 10^9). A flag is turned off by --no-FLAG.\n", out);
}
