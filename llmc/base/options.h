/* One table of options drives parsing, range checks, --help, --config files, the saved configuration and the README's
 * table. Long GNU-style options only: --name value, --name=value, and --flag / --no-flag for booleans. */
#ifndef LLMC_BASE_OPTIONS_H
#define LLMC_BASE_OPTIONS_H
#include "error.h"
#include <stdint.h>
#include <stdio.h>
#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    OPT_BOOL,   /* bool */
    OPT_INT,    /* int64_t; accepts 1000, 10k, 2M, 1G (powers of 1000) and 1e9; range [min, max]; the word in choices, if any, stands for 0 */
    OPT_FLOAT,  /* double; range [min, max]; NaN and infinity are refused */
    OPT_STRING, /* const char * (NULL when absent and no default) */
    OPT_CHOICE  /* const char *, one of choices "a|b|c" */
} OptionType;

typedef struct {
    const char *name;         /* without the dashes */
    OptionType type;
    size_t offset;            /* of the field in the program's options struct */
    const char *default_text; /* parsed like a value; NULL = zero/NULL ("not given") */
    double min, max;          /* OPT_INT, OPT_FLOAT */
    const char *choices;      /* OPT_CHOICE; OPT_INT: one word */
    const char *group;        /* heading in --help; rows of a group stand together */
    const char *value_name;   /* FILE, N, ... in --help; NULL for booleans */
    const char *help;
} Option;

typedef struct {
    const char *program;   /* for the usage line and messages */
    const char *usage;     /* printed by --help after "usage: "; further lines are indented by 7 blanks */
    const Option *options;
    int n;
} OptionTable;

/* Where each option's value came from. */
typedef enum { FROM_DEFAULT, FROM_FILE, FROM_COMMAND_LINE } OptionSource;

/* Sets defaults, reads --config FILE where given (name = value lines, # comments, same names), then the command line, which
 * wins; of an option given twice on it the last counts, so that a script's options can be overridden by appending. sources (table->n entries) may be NULL. Non-option words go to args/n_args if
 * args is not NULL (*args is allocated, caller frees), else they are an error. Errors: EXIT_USAGE with the nearest known name
 * for an unknown option, the range for a value outside it, file:line for a line of a config file. --help and --version are
 * ordinary OPT_BOOL rows. Strings in *values stay valid until options_free; nothing is left to free after a failure. */
bool options_parse(const OptionTable *table, void *values, OptionSource *sources, int argc, char **argv,
                   char ***args, int *n_args, Error *e);
void options_free(const OptionTable *table, void *values);
void options_help(const OptionTable *table, FILE *out);
/* Value of row i as text that parses back to the same value (the fewest digits that do); caller frees; NULL when not given:
 * a NULL string, or 0 in a row without a default. */
char *options_value_text(const OptionTable *table, const void *values, int i);
/* Writes "name = value" lines that --config reads back to the same values; caller frees. Rows named config, help and version
 * belong to one command line and are left out. Strings that need it are in double quotes, with \n \t \r \" \\ \xHH. */
char *options_to_config(const OptionTable *table, const void *values);
/* The known name with the smallest edit distance to word, else one that word begins or that begins word, else NULL. */
const char *options_nearest(const OptionTable *table, const char *word);

#ifdef __cplusplus
}
#endif
#endif
