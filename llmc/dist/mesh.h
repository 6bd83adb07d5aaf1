/* The rendezvous: what comm_connect hands to a communicator. Inside dist/ only. */
#ifndef LLMC_DIST_MESH_H
#define LLMC_DIST_MESH_H
#include "launch.h"

/* As comm_connect (launch.h), for size > 1: fills sockets (size), sockets[r] connected to rank r, sockets[rank] -1: TCP, blocking, without delay,
 * closed on exec. The launch's listener is closed in any case. On failure all sockets are. */
bool mesh_connect(const Launch *launch, const char *proof, double limit, int *sockets, Error *e);
/* Whether two proofs hold the same; else *e names the first line that differs, as rank `rank` (theirs) and rank 0 (ours) have it. */
bool same_proof(const char *ours, const char *theirs, int rank, Error *e);
#endif
