/* A library that answers as NVML would, for test_nvml.c: one GPU whose figures come from the environment (MOCK_REASONS), without a memory clock. */
#include <stdlib.h>
#include <string.h>

static int initialised;
static const int success = 0, not_supported = 3, not_found = 6;
int nvmlInit_v2(void) { return initialised = 1, getenv("MOCK_NO_DRIVER") ? 9 : success; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *id, void **device) {
    static int the_gpu;
    *device = &the_gpu;
    return initialised && !strcmp(id, "00000000:19:00.0") ? success : not_found;
}
int nvmlDeviceGetPowerUsage(void *d, unsigned *mw) { (void)d; return *mw = 683125, success; }
int nvmlDeviceGetTemperature(void *d, int sensor, unsigned *celsius) { (void)d; return *celsius = 61, sensor == 0 ? success : not_supported; }
int nvmlDeviceGetClockInfo(void *d, int domain, unsigned *mhz) { (void)d; return *mhz = 1755, domain == 1 ? success : not_supported; }
int nvmlDeviceGetCurrentClocksThrottleReasons(void *d, unsigned long long *bits) {
    const char *reasons = getenv("MOCK_REASONS");
    (void)d;
    return *bits = strtoull(reasons ? reasons : "0", NULL, 0), success;
}
int nvmlDeviceGetTotalEccErrors(void *d, int kind, int counter, unsigned long long *errors) {
    (void)d;
    return *errors = kind == 1 && counter == 0 ? 2 : 0, success;
}
