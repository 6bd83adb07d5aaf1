/* The CUDA backend as a value: device, memory with its accounting, scratch by plan, uploads and posts through pinned memory, recordings. The
 * ops are in the files beside this one, one subject a file. Nothing here waits for the device but what its contract says. */
#include "backend.cuh"
#include "../base/gpus.h"
#include <stdio.h>

namespace LLMC_NS {

/* ---- errors of the machine ------------------------------------------------------------------------------------------- */

bool early_launch;
static const CudaBackend *failing; /* whose memory table a fatal error prints */

void cuda_check(cudaError_t status, const char *doing) {
    if (status == cudaSuccess) return;
    fprintf(stderr, "error: CUDA: %s while %s", cudaGetErrorString(status), doing);
    if (failing) fprintf(stderr, " (in or after %s, on %s)", op_names[failing->op], failing->device_name);
    fprintf(stderr, "; LLMC_SYNC=1 in the environment names the launch\n");
    exit(EXIT_DEVICE);
}

#ifndef LLMC_EMU
static bool sync_each_launch() {
    static int on = -1;
    if (on < 0) on = getenv("LLMC_SYNC") != NULL;
    return on > 0;
}

void launch_prepare(const void *kernel, const char *name, size_t shared_bytes) {
    enum { KNOWN = 256 };
    static const void *known[KNOWN];  /* kernels whose limit is raised already, and to what */
    static size_t raised[KNOWN];
    if (shared_bytes <= 48 * 1024) return;
    int i = 0;
    while (i < KNOWN && known[i] && known[i] != kernel) i++;
    CHECK(i < KNOWN, "%s: more than %d kernels with large shared memory", name, (int)KNOWN);
    if (raised[i] >= shared_bytes) return;
    cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
    if (status != cudaSuccess) {
        fprintf(stderr, "error: CUDA: %s: %zu bytes of shared memory: %s\n", name, shared_bytes, cudaGetErrorString(status));
        exit(EXIT_DEVICE);
    }
    known[i] = kernel, raised[i] = shared_bytes;
}

void launch_done(const char *name, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, cudaError_t status) {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone; /* of this launch's stream: a process may have several backends */
    if (status == cudaSuccess && sync_each_launch()) status = cudaStreamIsCapturing(stream, &capture);
    if (status == cudaSuccess && sync_each_launch() && capture == cudaStreamCaptureStatusNone) {
        status = cudaStreamSynchronize(stream);
        fprintf(stderr, "launch %s<<<(%u,%u,%u), (%u,%u,%u), %zu>>>: %s\n", name, grid.x, grid.y, grid.z, block.x, block.y, block.z, shared_bytes, cudaGetErrorString(status));
    }
    if (status == cudaSuccess) return;
    fprintf(stderr, "error: CUDA: %s<<<(%u,%u,%u), (%u,%u,%u), %zu>>> in %s: %s\n", name, grid.x, grid.y, grid.z, block.x, block.y, block.z, shared_bytes,
            failing ? op_names[failing->op] : "?", cudaGetErrorString(status));
    exit(EXIT_DEVICE);
}
#endif

/* ---- memory ---------------------------------------------------------------------------------------------------------------- */

static void forget_recordings(CudaBackend *cuda) {
    CHECK(cuda->recording < 0, "memory changes inside a recording");
    for (int i = 0; i < RECORDINGS; i++) {
        if (cuda->recordings[i].graph) cuda_check(cudaGraphExecDestroy(cuda->recordings[i].graph), "dropping a graph");
        cuda->recordings[i] = Recording{};
    }
}

static size_t cuda_room(Backend *b) {
    size_t free_bytes = 0, total = 0;
    (void)b;
    cuda_check(cudaMemGetInfo(&free_bytes, &total), "asking for free memory");
    return free_bytes;
}

/* The memory table, its largest rows by name, and what did not fit. */
static bool out_of_memory(CudaBackend *cuda, MemClass class_, const char *what, size_t bytes, Error *e) {
    char table[1200];
    size_t at = 0, total = 0, free_bytes = 0, device = 0;
    cudaMemGetInfo(&free_bytes, &device);
    for (int i = 0; i < MEM_CLASS_COUNT; i++) {
        total += cuda->base.memory[i];
        int n = snprintf(table + at, sizeof table - at, "\n  %-12s %14.1f MiB", mem_class_names[i], (double)cuda->base.memory[i] / 1048576);
        at += n > 0 && at + (size_t)n < sizeof table ? (size_t)n : 0;
    }
    return fail(e, EXIT_DATA,
                "out of memory on the GPU (%s): %s (%s) needs %.1f MiB beside the %.1f MiB in use; %.1f of %.1f MiB are free. Use a smaller --batch "
                "(--batch auto finds the largest), a smaller --head-chunk, --recompute block, or a smaller model. In use:%s",
                cuda->device_name, what, mem_class_names[class_], (double)bytes / 1048576, (double)total / 1048576, (double)free_bytes / 1048576,
                (double)device / 1048576, table);
}

static void *cuda_alloc(Backend *b, MemClass class_, const char *what, size_t bytes, Error *e) {
    CudaBackend *cuda = cuda_of(b);
    void *p = NULL;
    CHECK(class_ < MEM_CLASS_COUNT, "%s: memory class %d", what, (int)class_);
    CHECK(cuda->recording < 0, "%s: an allocation inside a recording", what);
    const cudaError_t status = cudaMalloc(&p, bytes ? bytes : 1);
    if (status != cudaSuccess) {
        if (status != cudaErrorMemoryAllocation) cuda_check(status, "allocating memory"); /* such as the failure of an earlier kernel */
        cudaGetLastError();
        out_of_memory(cuda, class_, what, bytes, e);
        return NULL;
    }
    cuda_check(cudaMemsetAsync(p, 0, bytes, cuda->stream), "clearing new memory");
    if (cuda->n_blocks == cuda->blocks_room) {
        cuda->blocks_room = cuda->blocks_room ? 2 * cuda->blocks_room : 64;
        cuda->blocks = (Block *)xrealloc(cuda->blocks, cuda->blocks_room * sizeof *cuda->blocks);
    }
    Block *block = &cuda->blocks[cuda->n_blocks++];
    *block = Block{p, bytes, class_, ""};
    snprintf(block->what, sizeof block->what, "%s", what);
    b->memory[class_] += bytes;
    if (b->memory[class_] > b->memory_peak[class_]) b->memory_peak[class_] = b->memory[class_];
    return p;
}

static void cuda_release(Backend *b, void *p) {
    CudaBackend *cuda = cuda_of(b);
    if (!p) return;
    size_t i = cuda->n_blocks;
    while (i > 0 && cuda->blocks[i - 1].p != p) i--;
    CHECK(i > 0, "release of %p, which alloc did not give", p);
    forget_recordings(cuda);
    b->memory[cuda->blocks[i - 1].class_] -= cuda->blocks[i - 1].bytes;
    cuda->blocks[i - 1] = cuda->blocks[--cuda->n_blocks];
    cuda_check(cudaStreamSynchronize(cuda->stream), "waiting before memory is freed");
    cuda_check(cudaFree(p), "freeing memory");
}

/* Small pieces go through a ring of pinned slots: the host copies into one and returns; the copy stream brings it to a device slot, ahead of
 * the ops that still run; the op stream moves it from there to its place, in order. A slot is waited for only when the ring has come round. */
static void upload_small(CudaBackend *cuda, void *to, const void *from_host, size_t bytes) {
    auto *slot = &cuda->ring[cuda->ring_next++ % RING_SLOTS];
    if (slot->busy) cuda_check(cudaEventSynchronize(slot->taken), "waiting for an upload");
    slot->busy = true;
    memcpy(slot->host, from_host, bytes);
    cuda_check(cudaMemcpyAsync(slot->device, slot->host, bytes, cudaMemcpyHostToDevice, cuda->copy_stream), "uploading");
    cuda_check(cudaEventRecord(slot->uploaded, cuda->copy_stream), "uploading");
    cuda_check(cudaStreamWaitEvent(cuda->stream, slot->uploaded, 0), "uploading");
    cuda_check(cudaMemcpyAsync(to, slot->device, bytes, cudaMemcpyDeviceToDevice, cuda->stream), "uploading");
    cuda_check(cudaEventRecord(slot->taken, cuda->stream), "uploading");
}

static void cuda_upload(Backend *b, void *to, const void *from_host, size_t bytes) {
    CudaBackend *cuda = cuda_of(b);
    CHECK(cuda->recording < 0, "an upload inside a recording");
    if (bytes == 0) return;
    if (bytes <= RING_BYTES) return upload_small(cuda, to, from_host, bytes);
    cuda_check(cudaMemcpyAsync(to, from_host, bytes, cudaMemcpyHostToDevice, cuda->stream), "uploading");
    cuda_check(cudaStreamSynchronize(cuda->stream), "uploading");
}

static void cuda_download(Backend *b, void *to_host, const void *from, size_t bytes) {
    CudaBackend *cuda = cuda_of(b);
    CHECK(cuda->recording < 0, "a download inside a recording");
    if (bytes) cuda_check(cudaMemcpyAsync(to_host, from, bytes, cudaMemcpyDeviceToHost, cuda->stream), "downloading");
    cuda_check(cudaStreamSynchronize(cuda->stream), "downloading");
}

static void cuda_fill_zero(Backend *b, void *p, size_t bytes) {
    if (bytes) cuda_check(cudaMemsetAsync(p, 0, bytes, cuda_of(b)->stream), "filling with zeros");
}

static void cuda_post(Backend *b, int slot, const void *from, size_t bytes) {
    CudaBackend *cuda = cuda_of(b);
    CHECK(slot >= 0 && slot < POST_SLOTS && bytes <= POST_BYTES && !cuda->posts[slot].bytes, "post of %zu bytes into slot %d", bytes, slot);
    cuda_check(cudaMemcpyAsync(cuda->posts[slot].host, from, bytes, cudaMemcpyDeviceToHost, cuda->stream), "posting");
    cuda_check(cudaEventRecord(cuda->posts[slot].done, cuda->stream), "posting");
    cuda->posts[slot].bytes = bytes;
}

static void cuda_collect(Backend *b, int slot, void *to_host, size_t bytes) {
    CudaBackend *cuda = cuda_of(b);
    CHECK(slot >= 0 && slot < POST_SLOTS && bytes == cuda->posts[slot].bytes, "collect of %zu bytes from slot %d", bytes, slot);
    cuda_check(cudaEventSynchronize(cuda->posts[slot].done), "waiting for a result");
    memcpy(to_host, cuda->posts[slot].host, bytes);
    cuda->posts[slot].bytes = 0;
}

/* ---- copies beside the ops: a stream each way, so that both of the device's copy engines have work ------------------------------ */

static void cuda_staging_destroy(Backend *b, Staging *s) {
    (void)b;
    CudaStaging *staging = (CudaStaging *)s;
    if (!s) return;
    cuda_check(cudaEventSynchronize(staging->fetched), "waiting for a copy");
    cuda_check(cudaEventSynchronize(staging->brought), "waiting for a copy");
    cuda_check(cudaFreeHost(s->host), "freeing pinned memory");
    for (cudaEvent_t event : {staging->issued, staging->fetched, staging->brought}) cuda_check(cudaEventDestroy(event), "destroying an event");
    free(s);
}

static Staging *cuda_staging_create(Backend *b, const char *what, size_t bytes, Error *e) {
    void *host = NULL;
    CHECK(cuda_of(b)->recording < 0, "%s: an allocation inside a recording", what);
    const cudaError_t status = cudaMallocHost(&host, bytes ? bytes : 1);
    if (status != cudaSuccess) {
        cudaGetLastError();
        fail(e, EXIT_DATA, "%s: %.1f MiB of pinned host memory are not to be had (%s); each process needs that much beside its GPU when it cannot use NCCL; "
             "start fewer processes on this machine, or raise its limit of locked memory (ulimit -l)", what, (double)bytes / 1048576, cudaGetErrorString(status));
        return NULL;
    }
    CudaStaging *staging = (CudaStaging *)xcalloc(1, sizeof *staging);
    staging->base = Staging{(char *)host, bytes};
    for (cudaEvent_t *event : {&staging->issued, &staging->fetched, &staging->brought})
        cuda_check(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "creating an event");
    return &staging->base;
}

static void cuda_fetch(Backend *b, Staging *s, size_t at, const void *from, size_t bytes) {
    CudaBackend *cuda = cuda_of(b);
    CudaStaging *staging = (CudaStaging *)s;
    CHECK(cuda->recording < 0 && at <= s->bytes && bytes <= s->bytes - at, "fetch of %zu bytes at %zu into %zu, or inside a recording", bytes, at, s->bytes);
    cuda_check(cudaEventRecord(staging->issued, cuda->stream), "fetching");
    cuda_check(cudaStreamWaitEvent(cuda->fetch_stream, staging->issued, 0), "fetching");
    if (bytes) cuda_check(cudaMemcpyAsync(s->host + at, from, bytes, cudaMemcpyDeviceToHost, cuda->fetch_stream), "fetching");
    cuda_check(cudaEventRecord(staging->fetched, cuda->fetch_stream), "fetching");
}

static void cuda_fetch_wait(Backend *b, Staging *s) {
    cuda_check(cudaSetDevice(cuda_of(b)->options.ordinal), "choosing the GPU"); /* a new thread would open GPU 0 */
    cuda_check(cudaEventSynchronize(((CudaStaging *)s)->fetched), "waiting for a copy");
}

/* The next fetch of the staging is behind this: its `issued` is behind the op stream's wait. */
static void cuda_bring(Backend *b, void *to, Staging *s, size_t at, size_t bytes) {
    CudaBackend *cuda = cuda_of(b);
    CudaStaging *staging = (CudaStaging *)s;
    CHECK(cuda->recording < 0 && at <= s->bytes && bytes <= s->bytes - at, "bring of %zu bytes at %zu from %zu, or inside a recording", bytes, at, s->bytes);
    cuda_check(cudaStreamWaitEvent(cuda->bring_stream, staging->fetched, 0), "bringing");
    if (bytes) cuda_check(cudaMemcpyAsync(to, s->host + at, bytes, cudaMemcpyHostToDevice, cuda->bring_stream), "bringing");
    cuda_check(cudaEventRecord(staging->brought, cuda->bring_stream), "bringing");
    cuda_check(cudaStreamWaitEvent(cuda->stream, staging->brought, 0), "bringing");
}

/* ---- the queue for communication between devices --------------------------------------------------------------------------------- */

static void *cuda_side_begin(Backend *b) {
    CudaBackend *cuda = cuda_of(b);
    CHECK(cuda->recording < 0, "communication inside a recording");
    cuda_check(cudaEventRecord(cuda->side_begun, cuda->stream), "beginning to communicate");
    cuda_check(cudaStreamWaitEvent(cuda->side_stream, cuda->side_begun, 0), "beginning to communicate");
    return cuda->side_stream;
}

static void cuda_side_call(Backend *b, void (*fn)(void *), void *arg) { cuda_check(cudaLaunchHostFunc(cuda_of(b)->side_stream, fn, arg), "communicating"); }

static void cuda_side_end(Backend *b, size_t marker) {
    CudaBackend *cuda = cuda_of(b);
    if (marker >= cuda->n_side_ends) {
        cuda->side_ends = (cudaEvent_t *)xrealloc(cuda->side_ends, (marker + 1) * sizeof *cuda->side_ends);
        while (cuda->n_side_ends <= marker) cuda->side_ends[cuda->n_side_ends++] = NULL;
    }
    if (!cuda->side_ends[marker]) cuda_check(cudaEventCreateWithFlags(&cuda->side_ends[marker], cudaEventDisableTiming), "creating an event");
    cuda_check(cudaEventRecord(cuda->side_ends[marker], cuda->side_stream), "communicating");
}

/* Those that are over. */
static void count_stalls(CudaBackend *cuda) {
    for (Stall *s = cuda->stalls; s < cuda->stalls + cuda->n_stalls; s++) {
        float milliseconds = 0;
        cudaError_t status = s->open ? cudaEventElapsedTime(&milliseconds, s->begin, s->end) : cudaErrorNotReady;
        if (status == cudaErrorNotReady) continue;
        cuda_check(status, "timing a wait");
        cuda->side_waited += 1e-3 * milliseconds;
        s->open = false;
    }
}

static Stall *free_stall(CudaBackend *cuda) {
    for (int again = 0; again < 2; again++) {
        for (Stall *s = cuda->stalls; s < cuda->stalls + cuda->n_stalls; s++)
            if (!s->open) return s;
        if (!again) count_stalls(cuda);
    }
    cuda->stalls = (Stall *)xrealloc(cuda->stalls, ++cuda->n_stalls * sizeof *cuda->stalls);
    Stall *s = &cuda->stalls[cuda->n_stalls - 1];
    *s = Stall{};
    for (cudaEvent_t *event : {&s->begin, &s->end}) cuda_check(cudaEventCreateWithFlags(event, 0), "creating an event");
    return s;
}

static void cuda_side_wait(Backend *b, size_t marker) {
    CudaBackend *cuda = cuda_of(b);
    CHECK(cuda->recording < 0 && marker < cuda->n_side_ends && cuda->side_ends[marker], "marker %zu of %zu, or inside a recording", marker, cuda->n_side_ends);
    Stall *s = free_stall(cuda);
    cuda_check(cudaEventRecord(s->begin, cuda->stream), "communicating");
    cuda_check(cudaStreamWaitEvent(cuda->stream, cuda->side_ends[marker], 0), "communicating");
    cuda_check(cudaEventRecord(s->end, cuda->stream), "communicating");
    s->open = true;
}

static double cuda_side_waited(Backend *b) {
    count_stalls(cuda_of(b));
    return cuda_of(b)->side_waited;
}

/* ---- scratch ------------------------------------------------------------------------------------------------------------------ */

void *scratch_bytes(CudaBackend *cuda, size_t bytes, const char *what) {
    size_t at = cuda->scratch_used;
    cuda->scratch_used = at + round_up(bytes, (size_t)256);
    if (cuda->planning) {
        if (cuda->scratch_used > cuda->scratch_need) cuda->scratch_need = cuda->scratch_used;
        return NULL;
    }
    CHECK(cuda->scratch_used <= cuda->scratch_bytes, "%s: %s needs %zu bytes of scratch, %zu in all; the plan allocated %zu. Was it planned with this shape?",
          op_names[cuda->op], what, bytes, cuda->scratch_used, cuda->scratch_bytes);
    return cuda->scratch + at;
}

static void cuda_plan_begin(Backend *b) {
    CHECK(!cuda_of(b)->planning, "plan_begin inside a plan");
    cuda_of(b)->planning = true;
}

static bool cuda_plan_end(Backend *b, Error *e) {
    CudaBackend *cuda = cuda_of(b);
    CHECK(cuda->planning, "plan_end without plan_begin");
    cuda->planning = false;
    if (cuda->scratch_need > cuda->scratch_bytes) {
        cuda_release(b, cuda->scratch);
        cuda->scratch_bytes = 0;
        cuda->scratch = (char *)cuda_alloc(b, MEM_SCRATCH, "scratch", cuda->scratch_need, e);
        if (!cuda->scratch) return cuda->scratch_need = 0, false;
        cuda->scratch_bytes = cuda->scratch_need;
    }
    matmul_measure(cuda);
    return true;
}

static void cuda_mark(Backend *b, Mark mark, size_t unit) { (void)b, (void)mark, (void)unit; }

static void cuda_sync(Backend *b) {
    for (cudaStream_t stream : {cuda_of(b)->stream, cuda_of(b)->fetch_stream, cuda_of(b)->bring_stream, cuda_of(b)->side_stream})
        cuda_check(cudaStreamSynchronize(stream), "waiting for the device");
}

/* ---- recordings: the first time as it comes (libraries set themselves up), the second time into a graph, from then on the graph ------- */

static bool cuda_replay(Backend *b, uint64_t key) {
    CudaBackend *cuda = cuda_of(b);
    CHECK(cuda->recording < 0 && key, "a recording inside a recording, or key 0");
    if (!cuda->options.graphs || cuda->planning) return false;
    int i = 0;
    while (i < RECORDINGS && cuda->recordings[i].key && cuda->recordings[i].key != key) i++;
    if (i == RECORDINGS) return false; /* more stretches than there is room for: these few are issued each time */
    Recording *r = &cuda->recordings[i];
    r->key = key;
    if (r->graph) {
        cuda_check(cudaGraphLaunch(r->graph, cuda->stream), "replaying a recorded stretch");
        return true;
    }
    if (r->calls++ > 0) {
        cuda_check(cudaStreamBeginCapture(cuda->stream, cudaStreamCaptureModeThreadLocal), "beginning to record");
        cuda->recording = i;
    }
    return false;
}

static void cuda_record_end(Backend *b, uint64_t key) {
    CudaBackend *cuda = cuda_of(b);
    if (cuda->recording < 0) return;
    Recording *r = &cuda->recordings[cuda->recording];
    CHECK(r->key == key, "record_end of another stretch");
    cudaGraph_t graph;
    cuda->recording = -1;
    cuda_check(cudaStreamEndCapture(cuda->stream, &graph), "ending a recording");
    cuda_check(cudaGraphInstantiate(&r->graph, graph, 0), "making a graph");
    cuda_check(cudaGraphDestroy(graph), "making a graph");
    cuda_check(cudaGraphLaunch(r->graph, cuda->stream), "replaying a recorded stretch");
}

/* ---- creation --------------------------------------------------------------------------------------------------------------------- */

/* Dense bf16 products per second as sold; fp32 has no figure there. */
static double peak_flops_of(const char *name) {
    const GpuKind *kind = gpu_by_reported(name);
    return LLMC_BF16 && kind ? kind->peak_flops : 0;
}

static bool open_device(CudaBackend *cuda, Error *e) {
    int count = 0, wanted = cuda->options.ordinal;
    cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess || count == 0)
        return fail(e, EXIT_USAGE, "--device cuda: no usable NVIDIA GPU or driver (%s); use --device cpu, or look at what nvidia-smi says",
                    status != cudaSuccess ? cudaGetErrorString(status) : "none found");
    if (cuda->options.wrap) wanted %= count;
    if (wanted < 0 || wanted >= count) return fail(e, EXIT_USAGE, "--gpu %d: found %d GPU%s, expected a number from 0 to %d", wanted, count, count == 1 ? "" : "s", count - 1);
    cudaDeviceProp prop;
    cuda_check(cudaSetDevice(wanted), "choosing the GPU");
    cuda_check(cudaGetDeviceProperties(&prop, wanted), "asking for the GPU's properties");
    snprintf(cuda->device_name, sizeof cuda->device_name, "%.*s", (int)sizeof cuda->device_name - 1, prop.name);
    for (int i = 0; i < 16; i++) snprintf(cuda->device_id + 2 * i, 3, "%02x", (unsigned)(unsigned char)prop.uuid.bytes[i]);
    cuda->options.ordinal = wanted, cuda->base.device_count = count;
    cuda->sm_count = prop.multiProcessorCount;
    cuda->capability = 10 * prop.major + prop.minor;
    cuda->shared_limit = prop.sharedMemPerBlockOptin;
    if (cuda->capability < 80) return fail(e, EXIT_USAGE, "--device cuda: %s has compute capability %d.%d; expected 8.0 (A100) or later", prop.name, prop.major, prop.minor);
    return true;
}

static void create_streams(CudaBackend *cuda) {
    cuda_check(cudaStreamCreateWithFlags(&cuda->stream, cudaStreamNonBlocking), "creating a stream");
    for (cudaStream_t *stream : {&cuda->copy_stream, &cuda->fetch_stream, &cuda->bring_stream, &cuda->side_stream})
        cuda_check(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking), "creating a stream");
    cuda_check(cudaEventCreateWithFlags(&cuda->side_begun, cudaEventDisableTiming), "creating an event");
    for (auto &slot : cuda->ring) {
        cuda_check(cudaMallocHost((void **)&slot.host, RING_BYTES), "allocating pinned memory");
        cuda_check(cudaMalloc((void **)&slot.device, RING_BYTES), "allocating memory for uploads");
        cuda_check(cudaEventCreateWithFlags(&slot.uploaded, cudaEventDisableTiming), "creating an event");
        cuda_check(cudaEventCreateWithFlags(&slot.taken, cudaEventDisableTiming), "creating an event");
    }
    for (auto &post : cuda->posts) {
        cuda_check(cudaMallocHost((void **)&post.host, POST_BYTES), "allocating pinned memory");
        cuda_check(cudaEventCreateWithFlags(&post.done, cudaEventDisableTiming), "creating an event");
    }
}

static void cuda_destroy(Backend *b) {
    CudaBackend *cuda = cuda_of(b);
    if (cuda->stream) {
        cudaStreamSynchronize(cuda->stream);
        forget_recordings(cuda);
    }
    if (cuda->matmul) matmul_destroy(cuda->matmul);
    if (cuda->cudnn) cudnn_destroy(cuda->cudnn);
    for (size_t i = 0; i < cuda->n_blocks; i++) cudaFree(cuda->blocks[i].p);
    for (auto &slot : cuda->ring) {
        if (!slot.host) continue;
        cudaFreeHost(slot.host), cudaFree(slot.device);
        cudaEventDestroy(slot.uploaded), cudaEventDestroy(slot.taken);
    }
    for (auto &post : cuda->posts)
        if (post.host) cudaFreeHost(post.host), cudaEventDestroy(post.done);
    for (size_t i = 0; i < cuda->n_side_ends; i++)
        if (cuda->side_ends[i]) cudaEventDestroy(cuda->side_ends[i]);
    if (cuda->side_begun) cudaEventDestroy(cuda->side_begun);
    for (size_t i = 0; i < cuda->n_stalls; i++) cudaEventDestroy(cuda->stalls[i].begin), cudaEventDestroy(cuda->stalls[i].end);
    free(cuda->stalls);
    free(cuda->side_ends);
    for (cudaStream_t stream : {cuda->stream, cuda->copy_stream, cuda->fetch_stream, cuda->bring_stream, cuda->side_stream})
        if (stream) cudaStreamDestroy(stream);
    if (failing == cuda) failing = NULL;
    free(cuda->blocks);
    free(cuda);
}

static void print_plans(Backend *b, FILE *out) { matmul_print_plans(cuda_of(b), out); }
static bool health(Backend *b, DeviceHealth *h) { return health_read(cuda_of(b), h); }

static void fill_in(CudaBackend *cuda) {
    Backend *b = &cuda->base;
#ifdef LLMC_EMU
    b->name = "emu";
#else
    b->name = "cuda";
#endif
    b->dtype = LLMC_BF16 ? "bf16" : "fp32";
    b->elem_bytes = sizeof(elem);
    b->gelu_rounds_first = sizeof(elem) == 4 || !cuda->options.fuse_gelu;
    b->device = cuda->device_name, b->device_id = cuda->device_id;
    b->peak_flops = peak_flops_of(cuda->device_name);
    b->alloc = cuda_alloc, b->release = cuda_release, b->upload = cuda_upload, b->download = cuda_download;
    b->fill_zero = cuda_fill_zero, b->room = cuda_room, b->post = cuda_post, b->collect = cuda_collect;
    b->staging_create = cuda_staging_create, b->staging_destroy = cuda_staging_destroy;
    b->fetch = cuda_fetch, b->fetch_wait = cuda_fetch_wait, b->bring = cuda_bring;
    b->side_begin = cuda_side_begin, b->side_call = cuda_side_call, b->side_end = cuda_side_end, b->side_wait = cuda_side_wait;
    b->side_waited = cuda_side_waited, b->side_round = cuda_side_round, b->side_sum = cuda_side_sum;
    b->attention_saved_bytes = cuda_attention_saved_bytes;
#define LLMC_CUDA_OP(op, Args) b->op = cuda_##op;
    LLMC_OPS(LLMC_CUDA_OP)
#undef LLMC_CUDA_OP
    b->plan_begin = cuda_plan_begin, b->plan_end = cuda_plan_end, b->mark = cuda_mark;
    b->replay = cuda_replay, b->record_end = cuda_record_end, b->sync = cuda_sync;
    b->print_plans = print_plans, b->health = health, b->destroy = cuda_destroy;
}

/* A kernel must wait for the one in front itself, which code for older architectures does not; and graphs keep such launches from CUDA 12.3 on. */
static bool can_launch_early(const CudaBackend *cuda) {
    int driver = 12030, runtime = 12030;
#ifndef LLMC_EMU
    cuda_check(cudaDriverGetVersion(&driver), "asking for the driver's version");
    cuda_check(cudaRuntimeGetVersion(&runtime), "asking for the runtime's version");
#endif
    return cuda->capability >= 90 && code_version() >= 90 && (!cuda->options.graphs || (driver >= 12030 && runtime >= 12030));
}

Backend *backend_create(const CudaOptions *options, Error *e) {
    CudaBackend *cuda = (CudaBackend *)xcalloc(1, sizeof *cuda);
    cuda->options = *options;
    cuda->recording = -1;
    fill_in(cuda);
    bool ok = open_device(cuda, e);
    early_launch = ok && options->early_launch && can_launch_early(cuda);
#ifdef LLMC_EMU
    emu::must_begin = true;
#endif
    if (ok) {
        cuda->base.peak_flops = peak_flops_of(cuda->device_name);
        if (options->own_products != OWN_OFF && !LLMC_BF16) ok = fail(e, EXIT_USAGE, "--own-products: these products are in bf16 alone; use --dtype bf16, or --own-products off");
        else if (options->own_products != OWN_OFF && cuda->capability != 90)
            ok = fail(e, EXIT_USAGE, "--own-products: %s has compute capability %d.%d; these products are for 9.0 (H100, H200) alone; use --own-products off", cuda->device_name,
                      cuda->capability / 10, cuda->capability % 10);
#if LLMC_BF16
        else if (options->own_products != OWN_OFF && code_version() != 90)
            ok = fail(e, EXIT_USAGE, "--own-products: this build has no code for sm_90a (make cuda ARCH='80 90a'); use --own-products off");
#endif
    }
    if (ok) {
        failing = cuda;
        create_streams(cuda);
        ok = (cuda->matmul = matmul_create(cuda, options->plan_file, e)) != NULL;
    }
    if (ok && options->attention && !strcmp(options->attention, "cudnn")) ok = (cuda->cudnn = cudnn_create(cuda, e)) != NULL;
    if (ok && options->attention && !strcmp(options->attention, "hopper")) ok = cuda->hopper_attention = hopper_attention_create(cuda, e);
    if (ok) return &cuda->base;
    cuda_destroy(&cuda->base);
    return NULL;
}

} /* namespace */
