/* CUDA on a CPU, for tests: the device words, the built-in variables and functions, and the part of the runtime library that llmc/cuda uses, so
 * that its files compile with a C++ compiler and run. Threads of a block are fibers; blocks (or clusters of them) run one after another; what a stream was given
 * runs when somebody waits for it. Stricter than hardware where hardware forgives: emu.cpp says what is reported.
 * It proves indices, tails, barriers and accumulation; not memory ordering between threads of a running warp, nor speed. */
#ifndef LLMC_EMU_H
#define LLMC_EMU_H
#include <functional>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
/* No __shared__ and no __constant__: a block's shared memory is DYNAMIC_SHARED, which is poisoned before each block. */

namespace emu {

/* ---- types --------------------------------------------------------------------------------------------------------- */
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 { unsigned x, y, z; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct __nv_bfloat16 { uint16_t bits; };
static inline float __bfloat162float(__nv_bfloat16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
static inline __nv_bfloat16 __float2bfloat16_rn(float f) { /* nearest even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
    return {(uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}

/* ---- the running thread --------------------------------------------------------------------------------------------- */
struct Thread {
    uint3 thread_index, block_index;
    int lane;
};
extern Thread *current;
extern dim3 block_size, grid_size;
#define threadIdx (emu::current->thread_index)
#define blockIdx (emu::current->block_index)
#define blockDim (emu::block_size)
#define gridDim (emu::grid_size)

void *dynamic_shared();
size_t dynamic_shared_bytes();

void sync_threads(const char *file, int line);
#define __syncthreads() emu::sync_threads(__FILE__, __LINE__)

/* All 32 lanes meet; each brings `bytes` (at most 64) and may then read what any lane brought, until its next meeting. `what` must be the
 * same for all. The last to come runs `compute(values)` if given: it may replace what the lanes brought by what they take. */
typedef char LaneValue[64];
const LaneValue *meet(const char *what, const void *mine, size_t bytes, void (*compute)(LaneValue *) = nullptr);
void full_mask(unsigned mask);

static inline void __syncwarp(unsigned mask = 0xffffffffu) { full_mask(mask), meet("__syncwarp", nullptr, 0); }
template <class T> T shuffle(unsigned mask, T x, int from) {
    full_mask(mask);
    const LaneValue *all = meet("__shfl_sync", &x, sizeof x);
    memcpy(&x, all[from], sizeof x);
    return x;
}
template <class T> T __shfl_sync(unsigned mask, T x, int lane) { return shuffle(mask, x, lane & 31); }
template <class T> T __shfl_xor_sync(unsigned mask, T x, int lanes) { return shuffle(mask, x, current->lane ^ lanes); }
template <class T> T __shfl_down_sync(unsigned mask, T x, int by) { return shuffle(mask, x, current->lane + by < 32 ? current->lane + by : current->lane); }
template <class T> T __shfl_up_sync(unsigned mask, T x, int by) { return shuffle(mask, x, current->lane - by >= 0 ? current->lane - by : current->lane); }
static inline unsigned __ballot_sync(unsigned mask, int predicate) {
    full_mask(mask);
    const LaneValue *all = meet("__ballot_sync", &predicate, sizeof predicate);
    unsigned result = 0;
    for (int lane = 0; lane < 32; lane++) {
        int p;
        memcpy(&p, all[lane], sizeof p);
        if (p) result |= 1u << lane;
    }
    return result;
}
static inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
static inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }

/* Integers only: sums of floats by atomics are not deterministic, and the backend promises to be. */
void atomic_access(void *p);
static inline int atomicAdd(int *p, int x) { atomic_access(p); int old = *p; *p += x; return old; }
static inline unsigned atomicAdd(unsigned *p, unsigned x) { atomic_access(p); unsigned old = *p; *p += x; return old; }
static inline int atomicMax(int *p, int x) { atomic_access(p); int old = *p; if (x > old) *p = x; return old; }

/* ---- arithmetic ------------------------------------------------------------------------------------------------------ */
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float __frcp_rn(float x) { return 1.0f / x; }
static inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
static inline float __uint_as_float(unsigned x) { float f; memcpy(&f, &x, 4); return f; }
static inline unsigned __float_as_uint(float f) { unsigned x; memcpy(&x, &f, 4); return x; }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <class T> static inline T min(T a, T b) { return b < a ? b : a; }
template <class T> static inline T max(T a, T b) { return a < b ? b : a; }
template <class T> static inline T __ldg(const T *p) { return *p; }
template <class T> static inline T __ldcs(const T *p) { return *p; }
template <class T> static inline void __stcs(T *p, T x) { *p = x; }

/* ---- the runtime library ---------------------------------------------------------------------------------------------- */
enum cudaError_t {
    cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2, cudaErrorNoDevice = 100, cudaErrorInvalidResourceHandle = 400,
    cudaErrorNotReady = 600, cudaErrorStreamCaptureUnsupported = 900, cudaErrorStreamCaptureInvalidated = 901
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
enum { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal, cudaStreamCaptureModeRelaxed };
struct cudaDeviceProp {
    char name[256];
    int major, minor, multiProcessorCount;
    size_t totalGlobalMem, sharedMemPerBlockOptin;
    struct { char bytes[16]; } uuid;
};
typedef struct Stream *cudaStream_t;
typedef struct Event *cudaEvent_t;
typedef struct Graph *cudaGraph_t;
typedef struct Graph *cudaGraphExec_t;
cudaError_t cudaGetDeviceCount(int *count);                         /* LLMC_EMU_GPUS, default 1: one is like another, and none is shared */
cudaError_t cudaSetDevice(int ordinal);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *prop, int ordinal); /* LLMC_EMU_CAPABILITY, default 9.0 */
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes); /* LLMC_EMU_MEMORY bytes in all, default 4 GiB */
cudaError_t cudaMalloc(void **p, size_t bytes);                     /* filled with 0xFF: NaN */
cudaError_t cudaFree(void *p);
cudaError_t cudaMallocHost(void **p, size_t bytes);
cudaError_t cudaFreeHost(void *p);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags);
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, void (*fn)(void *), void *arg);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags = 0);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags);
static inline cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t begin, cudaEvent_t end); /* by the declared times of what ran between them */
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags = 0);
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec);
cudaError_t cudaGetLastError();
const char *cudaGetErrorString(cudaError_t status);

/* Anything else that is to happen in a stream's order: what a library would queue. It takes `seconds` of the device's clock, which stands still
 * otherwise, so that a measurement gives the same on every machine. `timed`, if given, is run in place of `work` where nothing but such work
 * stands between two recordings of events that time: a measurement of it need not compute. It should leave NaN, lest somebody takes it for work. */
void enqueue(cudaStream_t stream, std::function<void()> work, double seconds = 2e-6, std::function<void()> timed = nullptr);
/* From here on launches take so long together, and a measurement need not compute them; 0: as ever. */
void declare_launches(double seconds);

/* ---- launches ------------------------------------------------------------------------------------------------------- */
/* How the warps of a block take turns. One that runs ahead of the others finds missing barriers before a buffer is used again. */
enum Order {
    ASCENDING, REVERSED /* blocks and lanes too */, AHEAD /* one warp before all others */, BEHIND /* one warp after all others */,
    IN_TURN /* each a little */
};
struct Schedule {
    Order order;
    int warp;                 /* of AHEAD and BEHIND, modulo the block's warps */
    bool apart;               /* no block sees what another of its launch wrote; two that write one place are a fault. Slow: copies all memory */
    bool early;               /* asynchronous copies arrive at once instead of when they are waited for */
    bool newest;              /* of Hopper's copies that are waited for the newest arrives first, and products are done before any */
};
/* From LLMC_EMU_SCHEDULE = ascending | reversed | ahead:K | behind:K | in-turn, with ",apart", ",early" and ",newest" if wanted; default ascending. */
extern Schedule schedule;
bool schedule_parse(const char *text, Schedule *s); /* false: not understood. For C: bool emu_use_schedule(const char *text) */

/* What to do with a fault in a kernel (a planted bug's test catches it); the launch is given up. Default: print it and abort. */
extern void (*on_fault)(const char *message);
uint64_t launches();          /* kernels executed so far */
uint64_t switches();          /* turns given to threads so far */

/* cluster: blocks that run together, in a launch for Hopper; 0 in any other. early: before the kernels in front have ended (emu.cpp, front_begin). */
void enqueue_launch(const char *name, dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster, bool early, cudaStream_t stream, std::function<void()> thread);
template <class... P>
void launch(const char *name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster, bool early, cudaStream_t stream, P... args) {
    enqueue_launch(name, grid, block, shared_bytes, cluster, early, stream, [=]() { kernel(args...); });
}

/* Of kernel.cuh: a kernel of the backend says so first of all. must_begin: a thread that meets others, copies in bulk or ends before that faults; in a kernel for
 * Hopper barriers of the block and the cluster may come before. */
extern bool must_begin;
void kernel_begun();

/* For emu_ptx.h */
[[noreturn]] void fault(const char *format, ...) __attribute__((format(printf, 1, 2)));
void cp_async(void *shared, const void *global, int bytes);
void cp_async_commit_group();
void cp_async_wait_group(int open);
void check_shared(const char *what, const void *p, size_t bytes); /* within the block's buffer, aligned to `bytes` */
void check_aligned(const char *what, const void *p, size_t bytes);

} /* namespace emu */
using namespace emu;
#endif
