/* Ranks joined by MPI instead of sockets of their own: for machines where nothing but MPI crosses the network. */
#ifndef LLMC_DIST_MPI_WIRE_H
#define LLMC_DIST_MPI_WIRE_H
#include "launch.h"

/* As comm_connect (launch.h), for ranks that an MPI launcher has started. The communicator is tcp.c's, with its order of sums, messages and limits; what it writes to and
 * reads from its sockets is carried by MPI, all of whose calls are made by one thread. EXIT_USAGE: the build has no MPI, no MPI launcher has started
 * this process, the world of MPI is another than the launcher's, the proofs differ.
 * Before destroy, phase says by its limit how many seconds the other ranks may take to come to theirs; MPI is finalized if they do. */
Comm *mpi_connect(const Launch *launch, const char *proof, double limit, Error *e);
#endif
