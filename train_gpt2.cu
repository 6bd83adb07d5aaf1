/* The program: options -> session -> what was asked for. Plain C that nvcc accepts too. */
#include "llmc/base/version.h"
#include "llmc/run/session.h"
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* Ranks on one machine share its cores. */
static void set_threads(const Config *options, const Comm *comm) {
    (void)options, (void)comm;
#ifdef _OPENMP
    if (options->threads > 0) omp_set_num_threads((int)options->threads);
    else if (comm->local_size > 1) omp_set_num_threads(omp_get_num_procs() > comm->local_size ? omp_get_num_procs() / comm->local_size : 1);
#endif
}

static int run(const Config *options) {
    Error e = {0};
    Session session;
    Comm *comm = ranks_meet(options, &e);
    if (!comm) return error_print(&e);
    set_threads(options, comm);
    int code = EXIT_OK;
    if (!session_open(&session, options, comm, &e)) {
        code = comm->rank ? e.code : error_print(&e);
        comm_barrier(comm);             /* none leaves before rank 0 has said why */
    } else code = options->dry_run ? run_dry(&session) : options->eval_only ? run_eval(&session) : options->generate ? run_generate(&session) : run_train(&session);
    session_close(&session);
    if (comm->size > 1 && code != EXIT_OK && code != EXIT_REQUEUE) { /* the others lose this rank when it ends, not before: the first to end is the cause */
        fflush(NULL);
        _exit(code);
    }
    comm->destroy(comm);
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
