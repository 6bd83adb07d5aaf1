/* What a long run owes to those who share it: it stops or saves when asked (signals, a time limit, files in the run directory), on all ranks at the
 * same step; it says which rank is slow and which GPU is not well; it ends when copies that must be alike are not. The loop asks and tells; what
 * then happens is the loop's. */
#ifndef LLMC_RUN_TOGETHER_H
#define LLMC_RUN_TOGETHER_H
#include "../dist/comm.h"
#include "../gpt2.h"
#include "log.h"
#ifdef __cplusplus
extern "C" {
#endif

/* "3h", "45m", "1h30m", "90s", "90": seconds, above 0; -1: not understood. */
double duration_parse(const char *text);

/* SIGINT, SIGTERM, SIGHUP, SIGUSR1: noted; a second one leaves at once. What is ignored (nohup) stays ignored. Again is no harm. */
void together_listen(void);

enum { WINDOW_STEPS = 20, WINDOWS_SLOW = 3 };
typedef struct {
    Comm *comm;
    Backend *backend;
    MetricsLog *metrics;
    double (*now)(void);
    /* wishes: files and time are rank 0's to watch */
    char *stop_file, *save_file;  /* NULL: not watched */
    double until;                 /* on the clock `now`; INFINITY: no limit */
    const char *limit;            /* the limit as it was given */
    double looked;                /* for the files */
    bool stop, save;              /* this rank wants it, until it is done */
    char why[80];                 /* of stop */
    double step_seconds, save_seconds; /* the longest of late; the last (before: a guess) */
    /* the slow rank */
    double own;                   /* seconds this rank has computed, not waiting for others, since the window began */
    int64_t steps;                /* of the window */
    int slowest, in_row, named;   /* rank that was slow in the last windows, and in how many; the one that was named. -1: none */
    double ratio;                 /* sum over those windows */
    /* health */
    double checked;
    uint64_t throttles;           /* reasons that have been said */
    int64_t ecc;                  /* errors that have been said, or were there before; -1: not known */
    char note[300];               /* not yet said; "" : none */
} Together;

/* max_time: NULL, or as duration_parse takes it, counted from `started` on the clock seconds_now(). save_seconds: what a save may take, before one is measured. */
void together_begin(Together *t, Comm *comm, Backend *backend, MetricsLog *metrics, const char *dir, const char *max_time, double started, double save_seconds);
/* The run has ended with this exit code: files whose wish is fulfilled go. */
void together_end(Together *t, int code);

/* Whether this rank wants the run to end; of the Together that began last. Cheap: asked before each step and each batch of a validation. */
bool together_stop(void);
/* In words: "signal 15", "--max-time 3h", "the file STOP", or, where this rank has not asked, "a signal to another rank". */
const char *together_why(Together *t);
/* Whether this rank wants a checkpoint; and that it was made, in so many seconds (below 0: there was nothing to save). */
bool together_wants_save(Together *t);
void together_saved(Together *t, double seconds);

/* After each step, on all ranks: what it took, and how much of that this rank has computed itself. Says and records what is to be said. */
bool together_step(Together *t, int64_t step, double seconds, double own_seconds, Error *e);

/* All ranks: hashes of what must be the same on each (weights; where each holds them whole, master, m and v too) are compared. False: *e (EXIT_DEVICE) says
 * which ranks and tensor differ, the same on all. */
bool replicas_check(const GPT2 *model, Comm *comm, int64_t step, int64_t saved_step, Error *e);

#ifdef __cplusplus
}
#endif
#endif
