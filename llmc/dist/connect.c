/* The rendezvous and the communicator on top of it. */
#include "mesh.h"
#include "tcp.h"
#include <stdlib.h>
#include <unistd.h>

Comm *comm_connect(const Launch *l, const char *proof, double limit, Error *e) {
    if (l->size == 1 && l->listener >= 0) close(l->listener);
    if (l->size == 1) return comm_alone();
    int *sockets = xcalloc((size_t)l->size, sizeof *sockets);
    Comm *c = mesh_connect(l, proof, limit, sockets, e) ? tcp_comm_create(l->rank, l->size, l->local_rank, l->local_size, sockets, limit) : NULL;
    free(sockets);
    return c;
}
