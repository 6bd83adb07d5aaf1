/* The program: options -> session -> what was asked for. Plain C that nvcc accepts too. */
#include "llmc/base/version.h"
#include "llmc/run/session.h"
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

static void set_threads(const Config *options) {
    (void)options;
#ifdef _OPENMP
    if (options->threads > 0) omp_set_num_threads((int)options->threads);
#endif
}

static int run(const Config *options) {
    Error e = {0};
    Session session;
    set_threads(options);
    int code = session_open(&session, options, &e) ? EXIT_OK : error_print(&e);
    if (code == EXIT_OK)
        code = options->dry_run ? run_dry(&session) : options->eval_only ? run_eval(&session) : options->generate ? run_generate(&session) : run_train(&session);
    session_close(&session);
    return code;
}

int main(int argc, char **argv) {
    Error e = {0};
    Config options;
    setvbuf(stdout, NULL, _IOLBF, 0);  /* a line is seen when it is said, in a file too */
    if (!config_parse(&options, argc, argv, &e)) return error_print(&e);
    int code = EXIT_OK;
    if (options.help) options_help(&config_table, stdout);
    else if (options.version) version_print(stdout);
    else code = run(&options);
    config_free(&options);
    return code;
}
