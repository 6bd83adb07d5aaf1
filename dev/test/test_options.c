/* The options table: values, ranges, messages, config files, round trips of random values, and random bytes. */
#include "llmc/base/options.h"
#include "llmc/base/io.h"
#include "llmc/base/rng.h"
#include "test.h"
#include <float.h>
#include <inttypes.h>
#include <locale.h>
#include <unistd.h>

typedef struct {
    const char *config, *out, *prompt, *schedule;
    int64_t steps, any_int, epochs, batch;
    double lr, any_float;
    bool resume, trace, help;
} Values;

#define AT(name) offsetof(Values, name)
static const Option rows[] = {
    {"out", OPT_STRING, AT(out), "run", 0, 0, NULL, "Files", "DIR", "where the run is kept"},
    {"config", OPT_STRING, AT(config), NULL, 0, 0, NULL, "Files", "FILE", "options from a file"},
    {"steps", OPT_INT, AT(steps), "1000", 1, 1e18, NULL, "Training", "N", "optimizer steps"},
    {"epochs", OPT_INT, AT(epochs), NULL, 1, 1e6, NULL, "Training", "N", "passes over the data, in place of --steps; a long line of help that has to be wrapped "
     "because it does not fit into one hundred columns"},
    {"lr", OPT_FLOAT, AT(lr), "6e-4", 0, 10, NULL, "Training", "X", "peak learning rate"},
    {"lr-schedule", OPT_CHOICE, AT(schedule), "cosine", 0, 0, "cosine|linear|constant|wsd", "Training", "NAME", "shape of the learning rate"},
    {"resume", OPT_BOOL, AT(resume), "true", 0, 0, NULL, "Training", NULL, "go on from the newest checkpoint"},
    {"trace", OPT_BOOL, AT(trace), NULL, 0, 0, NULL, "Other", NULL, "time each op"},
    {"any-int", OPT_INT, AT(any_int), "0", -1e19, 1e19, NULL, "Other", "N", "any integer"},
    {"any-float", OPT_FLOAT, AT(any_float), "0", -DBL_MAX, DBL_MAX, NULL, "Other", "X", "any number"},
    {"prompt", OPT_STRING, AT(prompt), NULL, 0, 0, NULL, "Other", "TEXT", "text to go on from"},
    {"batch", OPT_INT, AT(batch), "8", 1, 64, "auto", "Other", "N", "a number or a word"},
    {"help", OPT_BOOL, AT(help), NULL, 0, 0, NULL, "Other", NULL, "this text"},
};
enum { N_ROWS = sizeof rows / sizeof rows[0] };
static const OptionTable table = {"train", "train [options]", rows, N_ROWS};
static char work[4096], *config_path;

/* Parses up to 8 words; NULL ends them. */
static bool parse(Values *v, OptionSource *sources, Error *e, const char *const *words) {
    char *argv[10] = {"train"};
    int argc = 1;
    while (argc < 9 && words[argc - 1]) argv[argc] = (char *)words[argc - 1], argc++;
    e->code = 0;
    e->text[0] = 0;
    return options_parse(&table, v, sources, argc, argv, NULL, NULL, e);
}
#define WORDS(...) (const char *const[]){__VA_ARGS__, NULL}

TEST(a_word_in_place_of_a_number) {
    Values v;
    Error e;
    EXPECT(parse(&v, NULL, &e, WORDS("--batch", "auto")) && v.batch == 0, "%s", e.text);
    char *text = options_to_config(&table, &v);
    EXPECT(strstr(text, "batch = auto\n"), "%s", text);
    options_free(&table, &v);
    EXPECT(file_replace(config_path, text, strlen(text), &e) && parse(&v, NULL, &e, WORDS("--config", config_path)) && v.batch == 0, "%s", e.text);
    options_free(&table, &v);
    free(text);
    EXPECT(parse(&v, NULL, &e, WORDS(NULL)) && v.batch == 8, "%s", e.text);
    options_free(&table, &v);
    EXPECT(!parse(&v, NULL, &e, WORDS("--batch", "0")) && strstr(e.text, "an integer from 1 to 64, or auto"), "%s", e.text);
    EXPECT(!parse(&v, NULL, &e, WORDS("--batch", "automatic")) && strstr(e.text, ", or auto"), "%s", e.text);
}

TEST(defaults_and_sources) {
    Values v;
    Error e;
    OptionSource sources[N_ROWS];
    memset(&v, 0x5A, sizeof v);
    EXPECT(parse(&v, sources, &e, WORDS(NULL)), "%s", e.text);
    EXPECT(!strcmp(v.out, "run") && !strcmp(v.schedule, "cosine") && !v.config && !v.prompt);
    EXPECT(v.steps == 1000 && v.epochs == 0 && v.lr == 6e-4 && v.resume && !v.trace);
    options_free(&table, &v);
    EXPECT(!v.out, "freed strings are gone");
    EXPECT(file_replace(config_path, "lr = 1\nsteps = 5\n", 17, &e));
    EXPECT(parse(&v, sources, &e, WORDS("--steps=7", "--config", config_path)), "%s", e.text);
    EXPECT(v.steps == 7 && v.lr == 1, "the command line wins: %d", (int)v.steps);
    EXPECT(sources[0] == FROM_DEFAULT && sources[2] == FROM_COMMAND_LINE && sources[4] == FROM_FILE);
    options_free(&table, &v);
}

TEST(integers) {
    static const struct { const char *text; int64_t value; } good[] = {
        {"1000", 1000}, {"10k", 10000}, {"10K", 10000}, {"2M", 2000000}, {"3G", 3000000000}, {"1e9", 1000000000}, {"1e18", 1000000000000000000},
        {"2.5k", 2500}, {"1.50e1", 15}, {"100e-2", 1}, {"-5", -5}, {"+5", 5}, {"0", 0}, {"-0", 0}, {"0e999999999999", 0}, {"007", 7}, {"1.", 1}, {".5k", 500},
        {"9223372036854775807", INT64_MAX}, {"-9223372036854775808", INT64_MIN}, {"9007199254740993", 9007199254740993},
        {"9.223372036854775807e18", INT64_MAX}, {"0.000000000000000001e18", 1}, {"1000000000000000000000e-21", 1}};
    Values v;
    Error e;
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        EXPECT(parse(&v, NULL, &e, WORDS("--any-int", good[i].text)), "%s: %s", good[i].text, e.text);
        EXPECT(v.any_int == good[i].value, "%s: %" PRId64, good[i].text, v.any_int);
        options_free(&table, &v);
    }
    static const char *const bad[] = {"1.5", "1_000", "abc", "1e", "1e+", "k", ".", "-", "+", "1kk", "1k ", " 1", "0x10", "1e19", "9223372036854775808",
                                      "-9223372036854775809", "9223372036854775807k", "1e99999999999999999999", "1e-1", "nan", "inf", "--1", "1,5", "1 000", "2.5001k", "1T", "1m"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        char *word = xasprintf("--any-int=%s", bad[i]);
        EXPECT(!parse(&v, NULL, &e, WORDS(word)) && e.code == EXIT_USAGE && strstr(e.text, bad[i]) && strstr(e.text, "expected an integer"), "%s: %s", bad[i], e.text);
        free(word);
    }
}

TEST(floats) {
    static const struct { const char *text; double value; } good[] = {{"0.1", 0.1}, {"1e-4", 1e-4}, {".5", 0.5}, {"5.", 5}, {"-2.5E+3", -2500}, {"0", 0}, {"0e-999", 0},
        {"1.7976931348623157e308", DBL_MAX}, {"4.9406564584124654e-324", 4.9406564584124654e-324}, {"0.30000000000000004", 0.1 + 0.2}};
    static const char *const bad[] = {"nan", "inf", "-inf", "infinity", "1e309", "1e-400", "0x1p3", "1k", "1,5", "", "1e5.5", "1.2.3", "e5", "--"};
    Values v;
    Error e;
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        EXPECT(parse(&v, NULL, &e, WORDS("--any-float", good[i].text)), "%s: %s", good[i].text, e.text);
        EXPECT(v.any_float == good[i].value, "%s: %.17g", good[i].text, v.any_float);
        options_free(&table, &v);
    }
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        char *word = xasprintf("--any-float=%s", bad[i]);
        EXPECT(!parse(&v, NULL, &e, WORDS(word)) && e.code == EXIT_USAGE, "%s: accepted", bad[i]);
        free(word);
    }
}

TEST(booleans) {
    static const struct { const char *word; bool resume; } good[] = {{"--resume", true}, {"--no-resume", false}, {"--resume=true", true}, {"--resume=false", false}};
    static const char *const bad[] = {"--resume=yes", "--resume=", "--no-resume=true", "--no-steps", "--no-steps=4", "--no-"};
    Values v;
    Error e;
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        EXPECT(parse(&v, NULL, &e, WORDS(good[i].word)) && v.resume == good[i].resume, "%s: %s", good[i].word, e.text);
        options_free(&table, &v);
    }
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) EXPECT(!parse(&v, NULL, &e, WORDS(bad[i])) && e.code == EXIT_USAGE, "%s: accepted", bad[i]);
}

TEST(the_last_of_an_option_given_twice_counts) {
    Values v;
    Error e;
    EXPECT(parse(&v, NULL, &e, WORDS("--steps", "5", "--resume", "--steps=6", "--no-resume")), "%s", e.text);
    EXPECT(v.steps == 6 && !v.resume, "steps %d", (int)v.steps);
    options_free(&table, &v);
}

/* Each message names what was found, what was expected, and where. */
TEST(messages) {
    static const struct { const char *words[4]; const char *expected[3]; } cases[] = {
        {{"--steps", "0"}, {"--steps", "\"0\"", "an integer of at least 1"}},
        {{"--epochs=2M"}, {"--epochs", "\"2M\"", "from 1 to 1000000"}},
        {{"--lr", "11"}, {"--lr", "\"11\"", "a number from 0 to 10"}},
        {{"--lr=-1e-9"}, {"--lr", "\"-1e-9\"", "from 0"}},
        {{"--lr-schedule", "cos"}, {"--lr-schedule", "\"cos\"", "cosine|linear|constant|wsd"}},
        {{"--lr-schedule", "cosine|linear"}, {"--lr-schedule", "found", "expected one of"}},
        {{"--lr-schedule=line"}, {"line", "found", "expected one of"}},
        {{"--stpes", "5"}, {"unknown option --stpes", "did you mean --steps?", "--help"}},
        {{"--lr_schedule=wsd"}, {"--lr_schedule", "did you mean --lr-schedule?", ""}},
        {{"--no-tracing"}, {"--no-tracing", "did you mean --trace?", ""}},
        {{"--steps-per-epoch=9"}, {"--steps-per-epoch", "did you mean --steps?", ""}},
        {{"--zzzzzzz"}, {"unknown option --zzzzzzz", "train --help", ""}},
        {{"--steps"}, {"--steps", "value is missing", "--steps N"}},
        {{"--out", "--steps", "5"}, {"--out", "value is missing", "--out=--steps"}},
        {{"--out="}, {"--out", "value is empty", ""}},
        {{"--out", ""}, {"--out", "value is empty", ""}},
        {{"-s", "5"}, {"unknown option -s", "two dashes", "--help"}},
        {{"word"}, {"\"word\"", "expected only options", ""}},
        {{"--", "--steps"}, {"\"--steps\"", "expected only options", ""}},
        {{"--config", "no/such/file"}, {"--config", "no/such/file", "No such file"}},
    };
    Values v;
    Error e;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        EXPECT(!parse(&v, NULL, &e, cases[i].words) && e.code == EXIT_USAGE, "case %zu: code %d", i, e.code);
        for (int k = 0; k < 3; k++) EXPECT(strstr(e.text, cases[i].expected[k]), "case %zu: \"%s\" lacks \"%s\"", i, e.text, cases[i].expected[k]);
    }
    EXPECT(!options_nearest(&table, "zzzzzzz"));
    EXPECT(!strcmp(options_nearest(&table, "lr-schedlue"), "lr-schedule"), "an edit or two");
    const char *swapped = options_nearest(&table, "rl");
    EXPECT(swapped && !strcmp(swapped, "lr"), "a swap is one edit; two would be too far for a word of two letters");
}

TEST(arguments) {
    char *argv[] = {"encode", "a.txt", "--steps", "5", "-", "--", "--b", "c", NULL}, **args = NULL;
    int n_args = 0;
    Values v;
    Error e;
    EXPECT(options_parse(&table, &v, NULL, 8, argv, &args, &n_args, &e), "%s", e.text);
    EXPECT(n_args == 4 && !strcmp(args[0], "a.txt") && !strcmp(args[1], "-") && !strcmp(args[2], "--b") && !strcmp(args[3], "c"), "%d", n_args);
    free(args);
    options_free(&table, &v);
}

/* Parses with --config of this text. */
static bool configure(Values *v, Error *e, const char *text, size_t bytes) {
    unlink(config_path);
    FILE *out = fopen(config_path, "wb"); /* not file_replace: thousands of fsyncs take long */
    EXPECT(out && fwrite(text, 1, bytes, out) == bytes && fclose(out) == 0, "%s", config_path);
    return parse(v, NULL, e, WORDS("--config", config_path));
}

TEST(config_files) {
    static const char text[] = "\xEF\xBB\xBF# a comment\r\n\n  steps =  20k  # trailing\r\n\tout=run#1\nprompt = \" a \\\"b\\\" \\\\ #\\n\\x41\\t\" # more\n"
                               "resume = false\nlr-schedule = wsd\nlr = 1e-3";
    Values v;
    Error e = {0};
    EXPECT(configure(&v, &e, text, strlen(text)), "%s", e.text);
    if (e.code) return;
    EXPECT(v.steps == 20000 && !strcmp(v.out, "run#1") && !v.resume && v.lr == 1e-3 && !strcmp(v.schedule, "wsd"));
    EXPECT(!strcmp(v.prompt, " a \"b\" \\ #\nA\t"), "%s", v.prompt);
    options_free(&table, &v);
}

TEST(config_messages) {
    static const struct { const char *text, *line, *expected; } cases[] = {
        {"steps = 1\nsteps", ":2: ", "NAME = VALUE"}, {"\n\nsteps = x", ":3: steps", "found \"x\""}, {"stesp = 1", ":1: stesp", "did you mean steps?"},
        {"--steps = 1", ":1: --steps", "without dashes"}, {"steps = 1\n#\nsteps = 1", ":3: steps", "line 1"}, {"steps =", ":1: steps", "missing"},
        {"steps = # 5", ":1: steps", "missing"}, {"out = \"abc", ":1: out", "closing"}, {"out = \"a\\q\"", ":1: out", "escape"}, {"out = \"a\\x00\"", ":1: out", "escape"},
        {"out = \"a\" b", ":1: out", "after the closing quote"}, {"config = other", ":1: config", "command line"}, {"= 5", ":1: ", "no such option"},
        {"lr = 11", ":1: lr", "from 0 to 10"}, {"resume = yes", ":1: resume", "true or false"}, {"steps = \"\"", ":1: steps", "empty"}, {"no-resume = true", ":1: no-resume", "resume"}};
    Values v;
    Error e = {0};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        EXPECT(!configure(&v, &e, cases[i].text, strlen(cases[i].text)) && e.code == EXIT_USAGE, "case %zu accepted", i);
        EXPECT(strstr(e.text, config_path) && strstr(e.text, cases[i].line) && strstr(e.text, cases[i].expected), "case %zu: %s", i, e.text);
    }
    EXPECT(!configure(&v, &e, "steps = 1\0\n", 11) && strstr(e.text, "NUL"), "%s", e.text);
    EXPECT(!parse(&v, NULL, &e, WORDS("--config", work)) && e.code == EXIT_USAGE, "a directory: %s", e.text);
}

/* ---- properties ------------------------------------------------------------------------------------------------- */

static uint64_t draws;
static uint64_t any(void) {
    Rng4 r = rng4(7, 1, 0, draws++);
    return (uint64_t)r.v[0] << 32 | r.v[1];
}

static double any_double(void) {
    for (;;) {
        uint64_t bits = any();
        double value;
        memcpy(&value, &bits, sizeof value);
        if (any() % 4 == 0) value = (double)(int64_t)(any() % 2000001 - 1000000) / 1000;
        if (isfinite(value)) return value;
    }
}

static char *any_string(void) {
    static const char often[] = " \t\n\r\"\\#=;\x7f\x01\xff\xc3\xa4-x";
    size_t n = any() % 12;
    char *s = xmalloc(n + 1);
    for (size_t i = 0; i < n; i++) s[i] = any() % 2 ? often[any() % (sizeof often - 1)] : (char)(any() % 255 + 1);
    s[n] = 0;
    return s;
}

/* Every value written by options_to_config is read back bit for bit. */
TEST(config_round_trip) {
    static const char *const schedules[] = {"cosine", "linear", "constant", "wsd"};
    Error e = {0};
    for (int round = 0; round < 1500; round++) {
        Values v = {0}, w;
        char *out = any_string(), *prompt = any() % 4 ? any_string() : NULL;
        v.out = out, v.prompt = prompt, v.config = "never saved", v.schedule = schedules[any() % 4], v.help = true;
        v.steps = (int64_t)(any() % 1000000) + 1, v.epochs = (int64_t)(any() % 3), v.any_int = (int64_t)(any() >> any() % 64);
        if (any() % 2) v.any_int = -v.any_int;
        v.lr = fabs(fmod(any_double(), 10)), v.any_float = any_double();
        v.resume = any() % 2, v.trace = any() % 2;
        char *text = options_to_config(&table, &v);
        EXPECT(configure(&w, &e, text, strlen(text)), "%s in\n%s", e.text, text);
        if (e.code) { free(text), free(out), free(prompt); return; }
        bool strings = !strcmp(w.out, v.out) && !strcmp(w.schedule, v.schedule) && (prompt ? w.prompt && !strcmp(w.prompt, prompt) : !w.prompt);
        bool numbers = w.steps == v.steps && w.epochs == v.epochs && w.any_int == v.any_int && !memcmp(&w.lr, &v.lr, sizeof v.lr) &&
                       w.any_float == v.any_float && w.resume == v.resume && w.trace == v.trace && !w.help;
        EXPECT(strings && numbers && !strcmp(w.config, config_path), "round %d:\n%s", round, text);
        options_free(&table, &w);
        free(text), free(out), free(prompt);
    }
}

/* A value as text on the command line gives the same value. */
TEST(value_text_round_trip) {
    Error e = {0};
    Values v = {0}, w;
    for (int round = 0; round < 20000; round++) {
        v.any_float = any_double();
        v.any_int = (int64_t)(any() >> any() % 64);
        char *real = options_value_text(&table, &v, 9), *integer = options_value_text(&table, &v, 8);
        char *first = xasprintf("--any-float=%s", real), *second = xasprintf("--any-int=%s", integer);
        EXPECT(parse(&w, NULL, &e, WORDS(first, second)), "%s", e.text);
        EXPECT(w.any_float == v.any_float && w.any_int == v.any_int, "%s %s", real, integer);
        options_free(&table, &w);
        free(real), free(integer), free(first), free(second);
    }
    v.any_float = 0.1;
    char *text = options_value_text(&table, &v, 9), *absent = options_value_text(&table, &v, 3);
    EXPECT(!strcmp(text, "0.1") && !absent, "%s", text);
    free(text);
}

/* Random words and bytes: no crash (the sanitizer builds look closer), and every refusal says why. */
TEST(random_words) {
    static const char *const pieces[] = {"--", "-", "=", "no-", "steps", "lr", "out", "resume", "config", "lr-schedule", "5", "1e9", "k", ".", "\"", "true", "wsd", "\xff", "e", "+"};
    int accepted = 0, refused = 0;
    for (int round = 0; round < 30000; round++) {
        char storage[8][160], *argv[9] = {"train"}, **args = NULL;
        int argc = 1 + (int)(any() % 8), n_args = 0;
        for (int i = 1; i < argc; i++) {
            storage[i][0] = 0;
            for (int k = (int)(any() % 6); k >= 0; k--) strcat(storage[i], pieces[k > 3 ? 0 : any() % (sizeof pieces / sizeof pieces[0])]);
            if (any() % 50 == 0) memset(storage[i] + strlen(storage[i]), 'x', 100), storage[i][130] = 0;
            argv[i] = storage[i];
        }
        for (int i = 1; i < argc; i++) storage[i][159] = 0;
        Values v;
        Error e = {0};
        bool ok = options_parse(&table, &v, NULL, argc, argv, any() % 2 ? &args : NULL, &n_args, &e);
        EXPECT(ok || (e.code == EXIT_USAGE && e.text[0]), "refused without a reason");
        accepted += ok;
        refused += !ok;
        if (ok) options_free(&table, &v);
        if (ok) free(args);
    }
    EXPECT(accepted > 100 && refused > 100, "%d accepted, %d refused", accepted, refused);
}

TEST(random_config_bytes) {
    static const char *const pieces[] = {"steps", " = ", "=", "\n", "#", "\"", "\\", "\\x4", "lr", "5", "out", "true", " ", "\r", "resume", "1e400", "\\n", "prompt = \"a\"", "\n", "\n"};
    int accepted = 0;
    for (int round = 0; round < 3000; round++) {
        char text[400] = "";
        size_t n = 0;
        for (int k = (int)(any() % 12); k >= 0; k--) {
            const char *piece = pieces[any() % (sizeof pieces / sizeof pieces[0])];
            memcpy(text + n, piece, strlen(piece));
            n += strlen(piece);
            if (any() % 40 == 0) text[n++] = (char)any();
        }
        Values v;
        Error e = {0};
        bool ok = configure(&v, &e, text, n);
        EXPECT(ok || (e.code == EXIT_USAGE && e.text[0]), "refused without a reason");
        accepted += ok;
        if (ok) options_free(&table, &v);
    }
    EXPECT(accepted > 50, "%d accepted", accepted);
}

TEST(help_text) {
    char *text = NULL;
    size_t n;
    FILE *out = open_memstream(&text, &n);
    options_help(&table, out);
    fclose(out);
    static const char *const expected[] = {"usage: train", "\nFiles:\n", "\nTraining:\n", "\nOther:\n", "  --steps N ", "[default: 1000; an integer of at least 1]",
                                           "cosine/linear/constant/wsd]", "  --[no-]resume ", "  --trace ", "[default: run]"};
    for (size_t i = 0; i < sizeof expected / sizeof expected[0]; i++)
        EXPECT(strstr(text, expected[i]), "\"%s\" is missing in\n%s", expected[i], text);
    EXPECT(strstr(text, "[default: 6e-4; a number from 0 to 10]"), "%s", text);
    for (char *line = text; line && *line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL) {
        EXPECT(strcspn(line, "\n") <= 100, "too wide: %s", line);
        if (!strncmp(line, "  --", 4)) EXPECT(line[29] == ' ' && line[30] != ' ', "not aligned: %.60s", line);
    }
    free(text);
}

TEST(other_locale) {
    static const char *const names[] = {"de_DE.UTF-8", "de_DE.utf8", "fr_FR.UTF-8", "fr_FR.utf8"};
    bool set = false;
    for (int i = 0; i < 4 && !set; i++) set = setlocale(LC_NUMERIC, names[i]) != NULL;
    if (!set) SKIP("no locale with a decimal comma is installed");
    Values v;
    Error e;
    EXPECT(parse(&v, NULL, &e, WORDS("--lr=0.5")) && v.lr == 0.5, "%s", e.text);
    char *text = options_value_text(&table, &v, 4);
    EXPECT(!strcmp(text, "0.5"), "%s", text);
    free(text);
    options_free(&table, &v);
    setlocale(LC_NUMERIC, "C");
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    snprintf(work, sizeof work, "%s/llmc_options.XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
    if (!mkdtemp(work)) return perror(work), 1;
    config_path = path_join(work, "config");
    RUN(defaults_and_sources);
    RUN(a_word_in_place_of_a_number);
    RUN(integers);
    RUN(floats);
    RUN(booleans);
    RUN(the_last_of_an_option_given_twice_counts);
    RUN(messages);
    RUN(arguments);
    RUN(config_files);
    RUN(config_messages);
    RUN(config_round_trip);
    RUN(value_text_round_trip);
    RUN(random_words);
    RUN(random_config_bytes);
    RUN(help_text);
    RUN(other_locale);
    path_remove_tree(work, NULL);
    free(config_path);
    return test_done();
}
