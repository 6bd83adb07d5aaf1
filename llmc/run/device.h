/* Which backend computes, from --device, --dtype and what this build and this machine have. */
#ifndef LLMC_RUN_DEVICE_H
#define LLMC_RUN_DEVICE_H
#include "../ops.h"
#include "config.h"
#ifdef __cplusplus
extern "C" {
#endif

enum { DEVICE_LINE = 1000 };
/* The backend of a run; NULL with *e: EXIT_USAGE when it is not in this build, not on this machine, or cannot do what is asked. line: its
 * name, device and compute type, and why not another where --device auto found no GPU. plan_file: CudaOptions; outlives the backend.
 * local_rank of local_size processes of the run on this machine: each takes a GPU of its own, as long as there are any. */
Backend *device_open(const Config *options, const char *plan_file, int local_rank, int local_size, char line[DEVICE_LINE], Error *e);
/* The compute type that --dry-run plans with, and the name of the device; opens nothing. */
const char *device_planned(const Config *options, char line[DEVICE_LINE]);

#ifdef __cplusplus
}
#endif
#endif
