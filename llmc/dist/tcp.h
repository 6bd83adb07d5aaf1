/* The communicator over sockets: what launch.c hands to it. Inside dist/ only. */
#ifndef LLMC_DIST_TCP_H
#define LLMC_DIST_TCP_H
#include "comm.h"

/* sockets: size of them, connected stream sockets (TCP, or Unix), sockets[r] to rank r, sockets[rank] unused (-1). They are the communicator's
 * from here on. limit: seconds an operation may take until comm->phase says otherwise. */
Comm *tcp_comm_create(int rank, int size, int local_rank, int local_size, const int *sockets, double limit);
#endif
