/* A library that answers as CUPTI's activity API would, for test_kernel_trace.c and bench_step --kernels on the emulator: each flush plays the same
 * steps on a thread of its own, through the buffers it asks for. From the environment: MOCK_STEPS, how many (3); MOCK_REFUSES, the call that fails;
 * MOCK_DROPS, records lost; MOCK_UNTIMED, kernels without times; MOCK_BREAKS, a record of no kind at the end. */
#ifdef LLMC_CUPTI_LIBRARY
#include <cupti.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#pragma GCC visibility push(default)
static CUpti_BuffersCallbackRequestFunc request;
static CUpti_BuffersCallbackCompleteFunc complete;
static bool on[CUPTI_ACTIVITY_KIND_COUNT];
static uint64_t now = 1000000;
static size_t lost;
static struct { uint8_t *bytes; size_t size, used, records, most; } buffer;

static CUptiResult answer(const char *call) {
    const char *refused = getenv("MOCK_REFUSES");
    return refused && !strcmp(refused, call) ? CUPTI_ERROR_NOT_INITIALIZED : CUPTI_SUCCESS;
}
static size_t number(const char *name, size_t otherwise) { return getenv(name) ? strtoul(getenv(name), NULL, 10) : otherwise; }

static void hand_over(void) {
    if (buffer.bytes) complete(NULL, 0, buffer.bytes, buffer.size, buffer.used);
    buffer.bytes = NULL;
}

static void put(const void *record, size_t bytes, CUpti_ActivityKind kind) {
    if (!on[kind]) return;
    if (buffer.bytes && (buffer.used + bytes > buffer.size || (buffer.most && buffer.records == buffer.most))) hand_over();
    if (!buffer.bytes) {
        buffer.used = buffer.records = 0;
        request(&buffer.bytes, &buffer.size, &buffer.most);
        if (buffer.bytes && ((uintptr_t)buffer.bytes % 8 || buffer.size < 4096)) fprintf(stderr, "a buffer CUPTI would not take\n"), abort();
    }
    if (!buffer.bytes) { lost++; return; }
    memcpy(buffer.bytes + buffer.used, record, bytes);
    buffer.used += bytes, buffer.records++;
}

static void kernel(const char *name, uint64_t start, uint64_t end, uint32_t stream, int grid, int registers) {
    bool untimed = getenv("MOCK_UNTIMED") && !strcmp(name, getenv("MOCK_UNTIMED"));
    LLMC_CUPTI_KERNEL k = {.kind = CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL, .name = name, .start = untimed ? 0 : now + start, .end = untimed ? 0 : now + end, .streamId = stream,
                           .gridX = grid, .gridY = 2, .gridZ = 1, .blockX = 128, .blockY = 1, .blockZ = 1, .registersPerThread = (uint16_t)registers,
                           .staticSharedMemory = 16, .dynamicSharedMemory = 1024};
    put(&k, sizeof k, CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
}
static void copy(CUpti_ActivityMemcpyKind kind, uint64_t start, uint64_t end, uint32_t stream) {
    LLMC_CUPTI_MEMCPY m = {.kind = CUPTI_ACTIVITY_KIND_MEMCPY, .copyKind = (uint8_t)kind, .bytes = 4096, .start = now + start, .end = now + end, .streamId = stream};
    put(&m, sizeof m, CUPTI_ACTIVITY_KIND_MEMCPY);
}
static void fill(uint64_t start, uint64_t end, uint32_t stream) {
    LLMC_CUPTI_MEMSET m = {.kind = CUPTI_ACTIVITY_KIND_MEMSET, .bytes = 64, .start = now + start, .end = now + end, .streamId = stream};
    put(&m, sizeof m, CUPTI_ACTIVITY_KIND_MEMSET);
}

/* 100 us a step, out of order as streams deliver them: [fill] 0-1; product 2-42 twice, the second begins 2 us early; 4 us later attention, under the
 * first 3 us of which a copy from the host runs and before which one to the host took 3 of the 4; adamw until 98; 2 us until the next step. */
static void *play(void *unused) {
    static const char product[] = "_ZN4bf1613matmul_kernelILi64EEEvPf", attention[] = "_ZN4bf1624attention_forward_kernelILi64ELb1EEEvPKfm", adamw[] = "adamw_kernel";
    for (size_t steps = number("MOCK_STEPS", 3); steps > 0; steps--, now += 100000) {
        kernel(attention, 86000, 90000, 8, 3, 168);
        copy(CUPTI_ACTIVITY_MEMCPY_KIND_HTOD, 86000, 89000, 9);
        fill(0, 1000, 7);
        kernel(product, 2000, 42000, 7, 66, 240);
        kernel(product, 40000, 82000, 7, 66, 240);
        copy(CUPTI_ACTIVITY_MEMCPY_KIND_DTOH, 82500, 85500, 7);
        copy(CUPTI_ACTIVITY_MEMCPY_KIND_DTOD, 90500, 91500, 7);
        kernel(adamw, 92000, 98000, 7, 1000, 32);
    }
    if (getenv("MOCK_BREAKS")) put(&(CUpti_Activity){.kind = CUPTI_ACTIVITY_KIND_INVALID}, sizeof(CUpti_Activity), CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
    lost += number("MOCK_DROPS", 0);
    hand_over();
    return unused;
}

CUptiResult cuptiActivityRegisterCallbacks(CUpti_BuffersCallbackRequestFunc r, CUpti_BuffersCallbackCompleteFunc c) {
    request = r, complete = c;
    return answer("register");
}
CUptiResult cuptiActivityEnable(CUpti_ActivityKind kind) {
    if (answer("enable") != CUPTI_SUCCESS && kind == CUPTI_ACTIVITY_KIND_MEMSET) return answer("enable"); /* the last one asked for */
    if (on[kind]) return CUPTI_ERROR_INVALID_OPERATION; /* stricter than CUPTI: whoever switches on switches off */
    on[kind] = true;
    return CUPTI_SUCCESS;
}
CUptiResult cuptiActivityDisable(CUpti_ActivityKind kind) { return on[kind] = false, answer("disable"); }
CUptiResult cuptiActivityFlushAll(uint32_t flag) {
    pthread_t thread;
    if (flag != CUPTI_ACTIVITY_FLAG_FLUSH_FORCED || !request) return CUPTI_ERROR_INVALID_OPERATION;
    if (pthread_create(&thread, NULL, play, NULL) || pthread_join(thread, NULL)) return CUPTI_ERROR_UNKNOWN;
    return answer("flush");
}
CUptiResult cuptiActivityGetNextRecord(uint8_t *bytes, size_t valid, CUpti_Activity **record) {
    size_t size = 0;
    if (*record) switch ((*record)->kind) {
        case CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL: size = sizeof(LLMC_CUPTI_KERNEL); break;
        case CUPTI_ACTIVITY_KIND_MEMCPY: size = sizeof(LLMC_CUPTI_MEMCPY); break;
        default: size = sizeof(LLMC_CUPTI_MEMSET); break;
    }
    uint8_t *next = *record ? (uint8_t *)*record + size : bytes;
    if (next >= bytes + valid) return CUPTI_ERROR_MAX_LIMIT_REACHED;
    *record = (CUpti_Activity *)next;
    return (*record)->kind == CUPTI_ACTIVITY_KIND_INVALID ? CUPTI_ERROR_INVALID_KIND : CUPTI_SUCCESS;
}
CUptiResult cuptiActivityGetNumDroppedRecords(CUcontext context, uint32_t stream, size_t *dropped) {
    (void)context, (void)stream;
    *dropped = lost;
    lost = 0;
    return CUPTI_SUCCESS;
}
CUptiResult cuptiGetResultString(CUptiResult result, const char **words) {
    *words = result == CUPTI_ERROR_NOT_INITIALIZED ? "CUPTI_ERROR_NOT_INITIALIZED" : "another error";
    return CUPTI_SUCCESS;
}
#endif
