/* Between the files of the emulator: emu.cpp (threads, blocks, what kernels call), runtime.cpp (streams, memory, graphs), cublaslt_twin.cpp. */
#ifndef LLMC_EMU_INSIDE_H
#define LLMC_EMU_INSIDE_H
#include "emu.h"
#include <map>

#if defined(__SANITIZE_ADDRESS__)
#define EMU_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMU_ASAN 1
#endif
#endif
#ifndef EMU_ASAN
#define EMU_ASAN 0
#endif

namespace emu {

/* SHARED_LIMIT: what a block may have on every GPU from sm_80 on (86, 89 and 120 have the least), so that no kernel is right on larger ones alone.
 * Behind a block's shared memory and every device allocation lie CANARY bytes that must not change; AddressSanitizer does better alone. */
enum { MAX_THREADS = 1024, SHARED_LIMIT = 99 * 1024, CANARY = EMU_ASAN ? 0 : 256 };
void canary_set(char *end);
bool canary_alive(const char *end);

extern std::map<char *, size_t> device_memory; /* allocations: first byte, bytes */
bool is_device(const void *p, size_t bytes);   /* within one of them */

void run_grid(const char *name, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()> &thread);
void device_time_passes(double seconds);       /* in work that waits: its time is real, that of kernels is declared */
/* A fault that no thread of a kernel made: reported like theirs; comes back if on_fault does. */
void host_fault(const char *kernel, const char *format, ...) __attribute__((format(printf, 2, 3)));

} /* namespace emu */
#endif
