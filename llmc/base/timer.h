/* Wall-clock time. */
#ifndef LLMC_BASE_TIMER_H
#define LLMC_BASE_TIMER_H
#include <time.h>
/* Seconds from an arbitrary origin, monotonic. */
static inline double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
#endif
