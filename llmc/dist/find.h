/* Where rank 0 is: host and port, or a file that says so. Inside dist/ only. */
#ifndef LLMC_DIST_FIND_H
#define LLMC_DIST_FIND_H
#include "door.h"
#include "launch.h"

/* Connects to rank 0, again and again until the deadline; -1 then, with one message (limit is for its text). */
int find_rank0(const Launch *l, double deadline, double limit, Banner *banner, Error *e);
/* The file, for rank 0: written at once or not at all; removed where it is still this run's. */
bool meeting_file_write(const char *path, int port, uint64_t nonce, Error *e);
void meeting_file_remove(const char *path, uint64_t nonce);
/* Another rank 0 has written it since. */
bool meeting_file_is_of_another(const char *path, uint64_t nonce);
#endif
