/* P30, the reading of it: a GPU's health through NVML, against a library of ours (nvml_mock.c, built beside this program). */
#include "llmc/cuda/nvml.h"
#include "test.h"

#define GPU "00000000:19:00.0"

/* In this order: a library, once loaded, stays. */
TEST(without_a_library_it_says_no) {
    DeviceHealth h;
    setenv("LLMC_NVML", "/nowhere/libnvidia-ml.so", 1);
    EXPECT(!nvml_read(GPU, &h), "read");
    EXPECT(isnan(h.watts) && isnan(h.celsius) && isnan(h.sm_mhz) && h.throttle == 0 && !*h.throttle_text && h.ecc_uncorrected == -1, "unknowns are not marked");
}

TEST(a_driver_that_does_not_start) {
    DeviceHealth h;
    setenv("MOCK_NO_DRIVER", "1", 1);
    EXPECT(!nvml_read(GPU, &h), "read");
    unsetenv("MOCK_NO_DRIVER");
}

TEST(figures_are_read) {
    DeviceHealth h;
    EXPECT(nvml_read(GPU, &h), "not read");
    EXPECT(fabs(h.watts - 683.125) < 1e-9 && h.celsius == 61 && h.sm_mhz == 1755, "%g W, %g C, %g MHz", h.watts, h.celsius, h.sm_mhz);
    EXPECT(isnan(h.memory_mhz), "a clock that is not reported is %g", h.memory_mhz);
    EXPECT(h.ecc_uncorrected == 2, "%lld errors", (long long)h.ecc_uncorrected);
    EXPECT(h.throttle == 0 && !*h.throttle_text, "%llx '%s'", (unsigned long long)h.throttle, h.throttle_text);
}

TEST(throttling_in_bits_and_words) {
    DeviceHealth h;
    setenv("MOCK_REASONS", "0x1", 1); /* idle: not slowed down */
    EXPECT(nvml_read(GPU, &h) && h.throttle == 1 && !*h.throttle_text, "'%s'", h.throttle_text);
    setenv("MOCK_REASONS", "0x44", 1);
    EXPECT(nvml_read(GPU, &h) && h.throttle == 0x44 && !strcmp(h.throttle_text, "power cap, thermal (hardware)"), "'%s'", h.throttle_text);
    setenv("MOCK_REASONS", "0x1ff", 1); /* all: cut, not overrun */
    EXPECT(nvml_read(GPU, &h) && strlen(h.throttle_text) == sizeof h.throttle_text - 1, "'%s'", h.throttle_text);
}

TEST(another_gpu_is_not_there) {
    DeviceHealth h;
    EXPECT(!nvml_read("00000000:65:00.0", &h), "read");
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    RUN(without_a_library_it_says_no);
    use_beside("LLMC_NVML", "nvml_mock.so");
    RUN(a_driver_that_does_not_start);
    RUN(figures_are_read);
    RUN(throttling_in_bits_and_words);
    RUN(another_gpu_is_not_there);
    return test_done();
}
