/* The ranks of a run as its loop sees them: how they meet, what they say. */
#ifndef LLMC_RUN_RANKS_H
#define LLMC_RUN_RANKS_H
#include "../dist/comm.h"
#include "config.h"
#ifdef __cplusplus
extern "C" {
#endif

/* Which rank this process is, by its environment or, with --processes, by forking (the parent does not return); and the meeting of all. Afterwards
 * standard output is rank 0's alone: that of the others goes to nobody, or with --rank-logs, like their standard error, to a file of their own. */
Comm *ranks_meet(const Config *options, Error *e);
/* While true, what this rank writes to standard error is dropped, because rank 0 says the same. Rank 0 is never silent. */
void ranks_silent(const Comm *comm, bool silent);

#ifdef __cplusplus
}
#endif
#endif
