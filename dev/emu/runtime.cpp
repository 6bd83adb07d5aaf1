/* The emulator's runtime library: streams, events, graphs, memory. What a stream was given runs when somebody waits for it, as late as CUDA
 * allows: a host buffer that is changed too early shows. Refused: what CUDA refuses while a stream is captured, copies outside allocations. */
#include "inside.h"
#include <deque>
#include <memory>
#include <mutex>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include <vector>

namespace emu {

/* Any thread may call; one at a time is inside, with all that it runs. */
static std::recursive_mutex inside;
#define ONE_AT_A_TIME std::lock_guard<std::recursive_mutex> alone(inside)

/* ---- the order of work ---------------------------------------------------------------------------------------------------------- */
typedef std::function<void()> Work;
struct Graph { std::vector<Work> work; };
struct Stream {
    std::deque<Work> queue;
    Graph *capture;
    const Event *timing;      /* the event whose recording has opened a measurement, else NULL */
    bool mixed;               /* in it, something else than work that need not be computed */
};
struct Record { Stream *stream; bool done; double at; };
struct Event { std::shared_ptr<Record> record; bool times; };
static double device_clock;   /* seconds */

static std::vector<Stream *> streams;
static Stream default_stream;
static int n_capturing;
static bool capture_broken;   /* something was refused meanwhile: the capture ends without a graph */
static Stream *stream_of(cudaStream_t s) { return s ? s : &default_stream; }

/* Runs what was queued, in order, until `until` is done (all of it when NULL). */
static void drain(Stream *s, const Record *until) {
    while (!s->queue.empty() && !(until && until->done)) {
        Work work = std::move(s->queue.front());
        s->queue.pop_front();
        work();
    }
}

static void push(Stream *s, Work work) {
    if (s->capture) s->capture->work.push_back(std::move(work));
    else s->queue.push_back(std::move(work));
}

void device_time_passes(double seconds) { device_clock += seconds; }

void enqueue(cudaStream_t stream, std::function<void()> work, double seconds, std::function<void()> timed) {
    ONE_AT_A_TIME;
    Stream *s = stream_of(stream);
    push(s, [=]() {
        device_clock += seconds;
        if (timed && s->timing && !s->mixed) return timed();
        s->mixed = s->mixed || !timed;
        work();
    });
}

static double declared = -1; /* seconds of the next launch, or none */
void declare_launches(double seconds) { declared = seconds > 0 ? seconds : -1; }

void enqueue_launch(const char *name, dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster, bool early, cudaStream_t stream, std::function<void()> thread) {
    size_t threads = (size_t)block.x * block.y * block.z;
    if (threads == 0 || threads > MAX_THREADS || block.x > MAX_THREADS || block.y > MAX_THREADS || block.z > 64)
        return host_fault(name, "a block of %ux%ux%u threads; hardware takes 1 to 1024, z to 64", block.x, block.y, block.z);
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
        return host_fault(name, "a grid of %ux%ux%u blocks; hardware takes 1 to 2^31-1, 65535, 65535", grid.x, grid.y, grid.z);
    const size_t limit = cluster ? HOPPER_SHARED_LIMIT : SHARED_LIMIT;
    if (shared_bytes > limit) return host_fault(name, "%zu bytes of dynamic shared memory; a block has at most %zu", shared_bytes, limit);
    if (cluster > MAX_CLUSTER || (cluster && grid.x % cluster))
        return host_fault(name, "clusters of %u blocks in a grid of %u along x; at most %d, and whole ones", cluster, grid.x, (int)MAX_CLUSTER);
    if (declared < 0) return enqueue(stream, [=]() { run_grid(name, grid, block, shared_bytes, cluster, early, thread); });
    enqueue(stream, [=]() { run_grid(name, grid, block, shared_bytes, cluster, early, thread); }, declared, []() {});
    declared = 0;
}

/* While a stream is captured, nothing may wait for the device or change its memory; who tries loses the capture too. */
static cudaError_t refused() { return capture_broken = true, cudaErrorStreamCaptureUnsupported; }
#define REFUSE_WHILE_CAPTURING                                                                                         \
    if (n_capturing) return refused()

/* ---- memory ------------------------------------------------------------------------------------------------------------------- */
std::map<char *, size_t> device_memory;
static std::map<char *, size_t> pinned_memory;
static size_t device_used;
static bool is_within(const std::map<char *, size_t> &memory, const void *p, size_t bytes) {
    auto m = memory.upper_bound((char *)p);
    if (m == memory.begin()) return false;
    --m;
    return (size_t)((const char *)p - m->first) <= m->second && bytes <= m->second - (size_t)((const char *)p - m->first);
}
bool is_device(const void *p, size_t bytes) { return is_within(device_memory, p, bytes); }
static size_t device_total() {
    const char *s = getenv("LLMC_EMU_MEMORY");
    return s ? (size_t)strtoull(s, nullptr, 10) : (size_t)4 << 30;
}

static int device_count() {
    const char *s = getenv("LLMC_EMU_GPUS");
    return s ? atoi(s) : 1;
}
cudaError_t cudaGetDeviceCount(int *count) { return *count = device_count(), *count ? cudaSuccess : cudaErrorNoDevice; }
cudaError_t cudaSetDevice(int ordinal) { return ordinal < 0 || ordinal >= device_count() ? cudaErrorInvalidValue : cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int ordinal) {
    ONE_AT_A_TIME;
    if (ordinal < 0 || ordinal >= device_count()) return cudaErrorInvalidValue;
    memset(p, 0, sizeof *p);
    gethostname(p->uuid.bytes, sizeof p->uuid.bytes - 1);
    p->uuid.bytes[15] = (char)ordinal;
    snprintf(p->name, sizeof p->name, "emulated GPU");
    const char *capability = getenv("LLMC_EMU_CAPABILITY");
    const int tenths = capability ? (int)(10 * atof(capability) + 0.5) : 90;
    p->major = tenths / 10, p->minor = tenths % 10, p->multiProcessorCount = 4; /* few: loops over the grid take more than one round in small tests */
    p->totalGlobalMem = device_total();
    p->sharedMemPerBlockOptin = SHARED_LIMIT;
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    ONE_AT_A_TIME;
    *total = device_total();
    *free_bytes = *total > device_used ? *total - device_used : 0;
    return cudaSuccess;
}
cudaError_t cudaMalloc(void **p, size_t bytes) {
    ONE_AT_A_TIME;
    REFUSE_WHILE_CAPTURING;
    *p = nullptr;
    if (bytes > device_total() || device_used > device_total() - bytes) return cudaErrorMemoryAllocation;
    if (posix_memalign(p, 256, bytes + CANARY)) return cudaErrorMemoryAllocation;
    memset(*p, 0xFF, bytes);
    canary_set((char *)*p + bytes);
    device_memory[(char *)*p] = bytes;
    device_used += bytes;
    return cudaSuccess;
}
cudaError_t cudaFree(void *p) {
    ONE_AT_A_TIME;
    REFUSE_WHILE_CAPTURING;
    if (!p) return cudaSuccess;
    cudaDeviceSynchronize();
    auto found = device_memory.find((char *)p);
    if (found == device_memory.end()) return cudaErrorInvalidValue;
    device_used -= found->second;
    device_memory.erase(found);
    free(p);
    return cudaSuccess;
}
cudaError_t cudaMallocHost(void **p, size_t bytes) {
    ONE_AT_A_TIME;
    REFUSE_WHILE_CAPTURING;
    if (posix_memalign(p, 4096, bytes ? bytes : 1)) return cudaErrorMemoryAllocation;
    memset(*p, 0xFF, bytes);
    pinned_memory[(char *)*p] = bytes;
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void *p) {
    ONE_AT_A_TIME;
    REFUSE_WHILE_CAPTURING;
    if (!p) return cudaSuccess;
    cudaDeviceSynchronize();
    if (!pinned_memory.erase((char *)p)) return cudaErrorInvalidValue;
    free(p);
    return cudaSuccess;
}

/* Pinned host memory is read and written when the stream gets there; other memory at once, as CUDA does. */
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    ONE_AT_A_TIME;
    Stream *s = stream_of(stream);
    if (!bytes) return cudaSuccess;
    if (kind != cudaMemcpyDeviceToHost && !is_within(device_memory, to, bytes)) return cudaErrorInvalidValue;
    if (kind != cudaMemcpyHostToDevice && !is_within(device_memory, from, bytes)) return cudaErrorInvalidValue;
    if (kind == cudaMemcpyHostToDevice && !is_within(pinned_memory, from, bytes)) {
        if (s->capture) return refused();
        auto copy = std::make_shared<std::vector<char>>((const char *)from, (const char *)from + bytes);
        enqueue(stream, [=]() { memcpy(to, copy->data(), bytes); });
        return cudaSuccess;
    }
    if (kind == cudaMemcpyDeviceToHost && !is_within(pinned_memory, to, bytes)) {
        if (s->capture) return refused();
        drain(s, nullptr);
        memcpy(to, from, bytes);
        return cudaSuccess;
    }
    enqueue(stream, [=]() { memcpy(to, from, bytes); }, 1e-6 + (double)bytes / 1e12);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream) {
    ONE_AT_A_TIME;
    if (!is_within(device_memory, p, bytes)) return cudaErrorInvalidValue;
    if (bytes) enqueue(stream, [=]() { memset(p, value, bytes); });
    return cudaSuccess;
}

/* ---- streams, events, graphs ---------------------------------------------------------------------------------------------------- */
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) {
    ONE_AT_A_TIME;
    *stream = new Stream{};
    streams.push_back(*stream);
    return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, void (*fn)(void *), void *arg) { return enqueue(stream, [=]() { fn(arg); }), cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t s) {
    ONE_AT_A_TIME;
    if (s->capture) return refused();
    drain(s, nullptr);
    for (size_t i = 0; i < streams.size(); i++)
        if (streams[i] == s) streams.erase(streams.begin() + (long)i);
    delete s;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) {
    ONE_AT_A_TIME;
    REFUSE_WHILE_CAPTURING;
    drain(stream_of(s), nullptr);
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
    ONE_AT_A_TIME;
    REFUSE_WHILE_CAPTURING;
    drain(&default_stream, nullptr);
    for (Stream *s : streams) drain(s, nullptr);
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return *event = new Event{{}, !(flags & cudaEventDisableTiming)}, cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    ONE_AT_A_TIME;
    if (stream_of(stream)->capture) return refused(); /* CUDA allows it, to fork and join; the backend has no use for it */
    auto record = std::make_shared<Record>(Record{stream_of(stream), false, 0});
    const Event *timer = event->times ? event : nullptr; /* for its address alone */
    event->record = record;
    push(record->stream, [record, timer]() {
        Stream *s = record->stream;
        record->done = true, record->at = device_clock;
        if (!timer) return;
        s->timing = s->timing && s->timing != timer ? nullptr : timer; /* the second closes; the first once more begins anew */
        s->mixed = false;
    });
    return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t begin, cudaEvent_t end) {
    ONE_AT_A_TIME;
    if (!begin->times || !end->times || !begin->record || !end->record) return cudaErrorInvalidResourceHandle;
    if (!begin->record->done || !end->record->done) return cudaErrorNotReady;
    return *milliseconds = (float)(1e3 * (end->record->at - begin->record->at)), cudaSuccess;
}
static void wait_for(const std::shared_ptr<Record> &record) {
    if (record && !record->done) drain(record->stream, record.get());
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    ONE_AT_A_TIME;
    std::shared_ptr<Record> record = event->record;
    if (stream_of(stream)->capture) return refused(); /* the graph would depend on work that is not in it */
    if (record) push(stream_of(stream), [record]() { wait_for(record); });
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    ONE_AT_A_TIME;
    REFUSE_WHILE_CAPTURING;
    wait_for(event->record);
    return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    ONE_AT_A_TIME;
    Stream *s = stream_of(stream);
    if (s->capture) return cudaErrorStreamCaptureUnsupported;
    s->capture = new Graph{};
    if (n_capturing++ == 0) capture_broken = false;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    ONE_AT_A_TIME;
    Stream *s = stream_of(stream);
    if (!s->capture) return cudaErrorInvalidValue;
    *graph = s->capture;
    s->capture = nullptr;
    n_capturing--;
    if (!capture_broken) return cudaSuccess;
    delete *graph;
    return *graph = nullptr, cudaErrorStreamCaptureInvalidated;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long) { return *exec = new Graph(*graph), cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    ONE_AT_A_TIME;
    for (const Work &work : exec->work) push(stream_of(stream), work);
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    ONE_AT_A_TIME;
    cudaDeviceSynchronize();
    return delete exec, cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char *cudaGetErrorString(cudaError_t status) {
    switch (status) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted while a stream is captured";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInvalidResourceHandle: return "invalid resource handle";
    case cudaErrorNotReady: return "device not ready";
    case cudaErrorInvalidValue: break;
    }
    return "invalid argument";
}

} /* namespace emu */
