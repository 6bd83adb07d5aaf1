/* See kernel_cupti.h. scripts/find_cuda.sh gives LLMC_CUPTI_LIBRARY, the library beside the header, and LLMC_CUPTI_KERNEL, _MEMCPY and _MEMSET, the
 * newest structures that the header has for these records. What is read of them has stood in the same place from CUDA 9 to 13.0
 * (test_kernel_trace.c looks), and a newer library's records are only longer: so library and header need not be of one version. */
#include "kernel_cupti.h"

#ifndef LLMC_CUPTI_LIBRARY
bool cupti_built(Error *e) { return fail(e, EXIT_USAGE, "--kernels: this build is without CUPTI: it is in CUDA builds where the toolkit has cupti.h and libcupti.so"); }
bool cupti_begin(Trace *t, Error *e) { (void)t; return cupti_built(e); }
bool cupti_discard(Error *e) { return cupti_built(e); }
bool cupti_end(Error *e) { return cupti_built(e); }
#else
#include <cupti.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { BUFFER_BYTES = 1 << 20, BUFFER_ALIGNMENT = 8 };

static struct {
    void *library;
    CUptiResult (*register_callbacks)(CUpti_BuffersCallbackRequestFunc, CUpti_BuffersCallbackCompleteFunc);
    CUptiResult (*enable)(CUpti_ActivityKind);
    CUptiResult (*disable)(CUpti_ActivityKind);
    CUptiResult (*flush_all)(uint32_t);
    CUptiResult (*next_record)(uint8_t *, size_t, CUpti_Activity **);
    CUptiResult (*dropped)(CUcontext, uint32_t, size_t *);
    CUptiResult (*result_string)(CUptiResult, const char **);
} cupti;

/* CUPTI delivers on a thread of its own. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Trace *trace; /* NULL: records are of no interest */

static const CUpti_ActivityKind kinds[] = {CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL, CUPTI_ACTIVITY_KIND_MEMCPY, CUPTI_ACTIVITY_KIND_MEMSET};
enum { KINDS = sizeof kinds / sizeof *kinds };

bool cupti_built(Error *e) { (void)e; return true; }

/* ISO C has no conversion from an object pointer to a function pointer; POSIX has. */
static bool find(void *function, const char *name, Error *e) {
    void *symbol = dlsym(cupti.library, name);
    memcpy(function, &symbol, sizeof symbol);
    return symbol || fail(e, EXIT_DEVICE, "libcupti has no %s", name);
}

static bool load(Error *e) {
    if (cupti.library) return true;
    const char *named = getenv("LLMC_CUPTI"), *paths[] = {LLMC_CUPTI_LIBRARY, "libcupti.so.13", "libcupti.so.12", "libcupti.so"};
    size_t n = sizeof paths / sizeof *paths;
    if (named && *named) paths[0] = named, n = 1;
    for (size_t i = 0; i < n && !cupti.library; i++) {
        cupti.library = dlopen(paths[i], RTLD_NOW | RTLD_LOCAL);
        if (!cupti.library && i == 0) fail(e, EXIT_DEVICE, "%s", dlerror());
    }
    if (!cupti.library) return false;
    if (find(&cupti.register_callbacks, "cuptiActivityRegisterCallbacks", e) && find(&cupti.enable, "cuptiActivityEnable", e) &&
        find(&cupti.disable, "cuptiActivityDisable", e) && find(&cupti.flush_all, "cuptiActivityFlushAll", e) &&
        find(&cupti.next_record, "cuptiActivityGetNextRecord", e) && find(&cupti.dropped, "cuptiActivityGetNumDroppedRecords", e) &&
        find(&cupti.result_string, "cuptiGetResultString", e)) {
        if (e) *e = (Error){0}; /* of a place without the library, where a later one has it */
        return true;
    }
    dlclose(cupti.library);
    cupti.library = NULL;
    return false;
}

static bool ok(CUptiResult result, const char *what, Error *e) {
    const char *words = "unknown error";
    if (result == CUPTI_SUCCESS) return true;
    cupti.result_string(result, &words);
    return fail(e, EXIT_DEVICE, "CUPTI, %s: %s (%d)", what, words, (int)result);
}

/* ---- records ----------------------------------------------------------------------------------------------------------------------- */

static void add_kernel(const LLMC_CUPTI_KERNEL *k) {
    trace_add(trace, k->name ? k->name : "[nameless kernel]",
              (TraceEvent){.kind = TRACE_KERNEL, .stream = k->streamId, .start = k->start, .end = k->end,
                           .grid = {(uint32_t)k->gridX, (uint32_t)k->gridY, (uint32_t)k->gridZ}, .block = {(uint32_t)k->blockX, (uint32_t)k->blockY, (uint32_t)k->blockZ},
                           .registers = k->registersPerThread, .shared = (uint32_t)(k->staticSharedMemory + k->dynamicSharedMemory)});
}

static void add_copy(const LLMC_CUPTI_MEMCPY *m) {
    bool from_host = m->copyKind == CUPTI_ACTIVITY_MEMCPY_KIND_HTOD, to_host = m->copyKind == CUPTI_ACTIVITY_MEMCPY_KIND_DTOH;
    trace_add(trace, from_host ? "[copy from the host]" : to_host ? "[copy to the host]" : "[copy]",
              (TraceEvent){.kind = from_host || to_host ? TRACE_HOST_COPY : TRACE_COPY, .stream = m->streamId, .start = m->start, .end = m->end, .bytes = m->bytes});
}

static void add_fill(const LLMC_CUPTI_MEMSET *m) {
    trace_add(trace, "[fill]", (TraceEvent){.kind = TRACE_FILL, .stream = m->streamId, .start = m->start, .end = m->end, .bytes = m->bytes});
}

static void CUPTIAPI buffer_requested(uint8_t **buffer, size_t *size, size_t *max_records) {
    *buffer = aligned_alloc(BUFFER_ALIGNMENT, BUFFER_BYTES); /* NULL: CUPTI counts what it drops */
    *size = *buffer ? BUFFER_BYTES : 0;
    *max_records = 0;
}

static void CUPTIAPI buffer_completed(CUcontext context, uint32_t stream, uint8_t *buffer, size_t size, size_t valid) {
    (void)context, (void)stream, (void)size; /* of old; NULL and 0 today */
    CUpti_Activity *record = NULL;
    CUptiResult result = CUPTI_SUCCESS;
    size_t dropped = 0;
    pthread_mutex_lock(&lock);
    while (trace && valid > 0 && (result = cupti.next_record(buffer, valid, &record)) == CUPTI_SUCCESS) {
        if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) add_kernel((const LLMC_CUPTI_KERNEL *)record);
        else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) add_copy((const LLMC_CUPTI_MEMCPY *)record);
        else if (record->kind == CUPTI_ACTIVITY_KIND_MEMSET) add_fill((const LLMC_CUPTI_MEMSET *)record);
    }
    cupti.dropped(NULL, 0, &dropped);
    if (result != CUPTI_SUCCESS && result != CUPTI_ERROR_MAX_LIMIT_REACHED) dropped++; /* an unreadable rest: one at least */
    if (trace) trace->dropped += dropped;
    pthread_mutex_unlock(&lock);
    free(buffer);
}

/* ---- begin and end ----------------------------------------------------------------------------------------------------------------- */

static bool flush(Error *e) { return ok(cupti.flush_all(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED), "delivering records", e); }

bool cupti_begin(Trace *t, Error *e) {
    int on = 0;
    if (!load(e)) return false;
    trace = t;
    bool good = ok(cupti.register_callbacks(buffer_requested, buffer_completed), "registering for records", e);
    while (good && on < KINDS && (good = ok(cupti.enable(kinds[on]), "switching records on", e))) on++;
    if (good) return true;
    while (on > 0) cupti.disable(kinds[--on]);
    trace = NULL;
    return false;
}

bool cupti_discard(Error *e) {
    bool good = flush(e);
    pthread_mutex_lock(&lock);
    trace_clear(trace);
    pthread_mutex_unlock(&lock);
    return good;
}

/* Of the C++ runtime, which every build with kernels links; the caller frees the result. */
char *__cxa_demangle(const char *name, char *buffer, size_t *length, int *status);

bool cupti_end(Error *e) {
    bool good = flush(e);
    for (int i = 0; i < KINDS; i++) good = ok(cupti.disable(kinds[i]), "switching records off", good ? e : NULL) && good;
    pthread_mutex_lock(&lock);
    Trace *t = trace;
    trace = NULL;
    pthread_mutex_unlock(&lock);
    for (int i = 0; i < t->n_names; i++) {
        int status;
        char *name = strncmp(t->names[i], "_Z", 2) ? NULL : __cxa_demangle(t->names[i], NULL, NULL, &status);
        if (!name) continue; /* names of C, and those in brackets */
        free(t->names[i]);
        t->names[i] = name;
    }
    return good && (t->n > 0 || fail(e, EXIT_DEVICE, "CUPTI gave no record with times (%zu without, %zu dropped)", t->untimed, t->dropped));
}
#endif
