/* NVML by dlopen. The few functions and numbers used are declared here as NVIDIA's NVML API reference gives them. */
#include "nvml.h"
#include <dlfcn.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { NVML_SUCCESS = 0, TEMPERATURE_GPU = 0, CLOCK_SM = 1, CLOCK_MEM = 2, ERRORS_UNCORRECTED = 1, SINCE_RESET /* volatile */ = 0 };
typedef void *Device;

static struct {
    void *library;
    int (*init)(void);
    int (*by_pci)(const char *, Device *);
    int (*power)(Device, unsigned *milliwatts);
    int (*temperature)(Device, int sensor, unsigned *celsius);
    int (*clock)(Device, int domain, unsigned *mhz);
    int (*reasons)(Device, unsigned long long *bits);
    int (*ecc)(Device, int kind, int counter, unsigned long long *errors);
} nvml;

/* ISO C has no conversion from an object pointer to a function pointer; POSIX has. */
static void find(void *function, const char *name) {
    void *symbol = dlsym(nvml.library, name);
    memcpy(function, &symbol, sizeof symbol);
}

static bool load(void) {
    if (nvml.library) return true;
    const char *path = getenv("LLMC_NVML");
    nvml.library = dlopen(path && *path ? path : "libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!nvml.library) return false;
    find(&nvml.init, "nvmlInit_v2");
    find(&nvml.by_pci, "nvmlDeviceGetHandleByPciBusId_v2");
    find(&nvml.power, "nvmlDeviceGetPowerUsage");
    find(&nvml.temperature, "nvmlDeviceGetTemperature");
    find(&nvml.clock, "nvmlDeviceGetClockInfo");
    find(&nvml.reasons, "nvmlDeviceGetCurrentClocksEventReasons");
    if (!nvml.reasons) find(&nvml.reasons, "nvmlDeviceGetCurrentClocksThrottleReasons"); /* its name before driver 535 */
    find(&nvml.ecc, "nvmlDeviceGetTotalEccErrors");
    if (nvml.init && nvml.by_pci && nvml.init() == NVML_SUCCESS) return true;
    dlclose(nvml.library);
    nvml.library = NULL;
    return false;
}

/* The reasons that hold clocks below what the work would get; idle (bit 0) is none. */
static void reasons_in_words(uint64_t bits, char *text, size_t size) {
    static const struct { uint64_t bit; const char *words; } reasons[] = {
        {0x02, "clocks set by the user"}, {0x04, "power cap"},   {0x08, "hardware slowdown"}, {0x10, "sync boost"},
        {0x20, "thermal (software)"},     {0x40, "thermal (hardware)"}, {0x80, "power brake"},      {0x100, "display clocks"}};
    size_t at = 0;
    text[0] = 0;
    for (size_t i = 0; i < sizeof reasons / sizeof *reasons; i++)
        if (bits & reasons[i].bit && at < size) at += (size_t)snprintf(text + at, size - at, "%s%s", at ? ", " : "", reasons[i].words);
}

bool nvml_read(const char *pci_bus_id, DeviceHealth *health) {
    Device device;
    unsigned value;
    unsigned long long wide;
    *health = (DeviceHealth){.watts = NAN, .celsius = NAN, .sm_mhz = NAN, .memory_mhz = NAN, .ecc_uncorrected = -1};
    if (!load() || nvml.by_pci(pci_bus_id, &device) != NVML_SUCCESS) return false;
    if (nvml.power && nvml.power(device, &value) == NVML_SUCCESS) health->watts = 1e-3 * value;
    if (nvml.temperature && nvml.temperature(device, TEMPERATURE_GPU, &value) == NVML_SUCCESS) health->celsius = value;
    if (nvml.clock && nvml.clock(device, CLOCK_SM, &value) == NVML_SUCCESS) health->sm_mhz = value;
    if (nvml.clock && nvml.clock(device, CLOCK_MEM, &value) == NVML_SUCCESS) health->memory_mhz = value;
    if (nvml.reasons && nvml.reasons(device, &wide) == NVML_SUCCESS) {
        health->throttle = wide;
        reasons_in_words(wide, health->throttle_text, sizeof health->throttle_text);
    }
    if (nvml.ecc && nvml.ecc(device, ERRORS_UNCORRECTED, SINCE_RESET, &wide) == NVML_SUCCESS) health->ecc_uncorrected = (int64_t)wide;
    return true;
}
