/* Options: a --config file, or a command line with a word in each line. What is accepted, written out and read again is the same. */
#include "fuzz.h"
#include "llmc/run/config.h"

static bool parse(Config *c, char *word, char *value) {
    char *argv[] = {"train_gpt2", word, value, NULL};
    Error e = {0};
    return fuzz_verdict(config_parse(c, 3, argv, &e), &e);
}

static void parse_file(const void *text, size_t bytes) {
    fuzz_write("options.conf", text, bytes);
    char *path = fuzz_path("options.conf");
    Config c, again;
    if (parse(&c, "--config", path)) {
        char *written = options_to_config(&config_table, &c);
        fuzz_write("options.conf", written, strlen(written));
        CHECK(parse(&again, "--config", path), "what was written is not accepted: %s", written);
        char *twice = options_to_config(&config_table, &again);
        CHECK(!strcmp(written, twice), "reading back gives\n%s\ninstead of\n%s", twice, written);
        free(twice);
        free(written);
        config_free(&again);
    }
    config_free(&c);
    free(path);
}

static void parse_words(const char *text, size_t bytes) {
    char *words = memcpy(xcalloc(bytes + 1, 1), text, bytes), *argv[34] = {"train_gpt2"}, *save;
    int argc = 1;
    for (char *word = strtok_r(words, "\n", &save); word && argc < 33; word = strtok_r(NULL, "\n", &save)) argv[argc++] = word;
    Config c;
    Error e = {0};
    fuzz_verdict(config_parse(&c, argc, argv, &e), &e);
    config_free(&c);
    free(words);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 1) return 0;
    if (data[0] % 2) parse_words((const char *)data + 1, size - 1);
    else parse_file(data + 1, size - 1);
    return 0;
}
