/* The CPU backend as a value: memory with its accounting, scratch by plan, step control. The ops are in the files beside
 * this one, one subject a file; they define what each op means, and other backends are compared with them. */
#include "cpu.h"
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static size_t machine_bytes(void) {
    long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    return pages > 0 && page > 0 ? (size_t)pages * (size_t)page : SIZE_MAX;
}

static bool out_of_memory(const Backend *b, MemClass class_, const char *what, size_t bytes, Error *e) {
    char table[1024];
    size_t at = 0, total = 0;
    for (int i = 0; i < MEM_CLASS_COUNT; i++) {
        total += b->memory[i];
        int n = snprintf(table + at, sizeof table - at, "\n  %-12s %14.1f MiB", mem_class_names[i], (double)b->memory[i] / 1048576);
        at = size_min(at + (size_t)(n > 0 ? n : 0), sizeof table - 1);
    }
    return fail(e, EXIT_DATA,
                "out of memory: %s (%s) needs %.1f MiB beside the %.1f MiB in use; this machine has %.1f MiB. Use a smaller "
                "--batch, a smaller model or --recompute block. In use:%s",
                what, mem_class_names[class_], (double)bytes / 1048576, (double)total / 1048576,
                (double)machine_bytes() / 1048576, table);
}

/* Of the machine's memory; other programs may have some of it. */
static size_t cpu_room(Backend *b) {
    size_t room = machine_bytes();
    for (int i = 0; i < MEM_CLASS_COUNT; i++) room -= size_min(room, b->memory[i]);
    return room;
}

static void count_memory(CpuBackend *cpu, void *p, MemClass class_, size_t bytes) {
    if (cpu->n_blocks == cpu->blocks_room) {
        cpu->blocks_room = cpu->blocks_room ? 2 * cpu->blocks_room : 64;
        cpu->blocks = xrealloc(cpu->blocks, cpu->blocks_room * sizeof *cpu->blocks);
    }
    cpu->blocks[cpu->n_blocks++] = (CpuBlock){p, bytes, class_};
    cpu->base.memory[class_] += bytes;
    if (cpu->base.memory[class_] > cpu->base.memory_peak[class_]) cpu->base.memory_peak[class_] = cpu->base.memory[class_];
}

static void *cpu_alloc(Backend *b, MemClass class_, const char *what, size_t bytes, Error *e) {
    const size_t huge = (size_t)2 << 20;
    void *p = NULL;
    size_t room = bytes ? bytes : 1;
    CHECK(class_ < MEM_CLASS_COUNT, "%s: memory class %d", what, (int)class_);
    if (room > cpu_room(b) || posix_memalign(&p, room >= 2 * huge ? huge : 256, room)) {
        out_of_memory(b, class_, what, bytes, e);
        return NULL;
    }
    if (room >= 2 * huge) madvise(p, room, MADV_HUGEPAGE); /* fewer TLB misses; without it all works, slower */
    memset(p, 0, room);
    count_memory((CpuBackend *)b, p, class_, bytes);
    return p;
}

static void cpu_release(Backend *b, void *p) {
    CpuBackend *cpu = (CpuBackend *)b;
    if (!p) return;
    size_t i = cpu->n_blocks;
    while (i > 0 && cpu->blocks[i - 1].p != p) i--;
    CHECK(i > 0, "release of %p, which alloc did not give", p);
    b->memory[cpu->blocks[i - 1].class_] -= cpu->blocks[i - 1].bytes;
    cpu->blocks[i - 1] = cpu->blocks[--cpu->n_blocks];
    free(p);
}

static void cpu_upload(Backend *b, void *to, const void *from_host, size_t bytes) {
    (void)b;
    if (bytes) memcpy(to, from_host, bytes);
}

static void cpu_download(Backend *b, void *to_host, const void *from, size_t bytes) {
    (void)b;
    if (bytes) memcpy(to_host, from, bytes);
}

/* What was issued is done: the copy is made at once. */
static void cpu_post(Backend *b, int slot, const void *from, size_t bytes) {
    CpuBackend *cpu = (CpuBackend *)b;
    CHECK(slot >= 0 && slot < POST_SLOTS && bytes <= POST_BYTES, "post of %zu bytes in slot %d", bytes, slot);
    memcpy(cpu->posts[slot].content, from, cpu->posts[slot].bytes = bytes);
}

static void cpu_collect(Backend *b, int slot, void *to_host, size_t bytes) {
    CpuBackend *cpu = (CpuBackend *)b;
    CHECK(slot >= 0 && slot < POST_SLOTS && bytes <= cpu->posts[slot].bytes, "collect of %zu bytes from slot %d", bytes, slot);
    memcpy(to_host, cpu->posts[slot].content, bytes);
}

/* What was issued is done: so are the copies. */
static Staging *cpu_staging_create(Backend *b, const char *what, size_t bytes, Error *e) {
    (void)b;
    Staging *s = xcalloc(1, sizeof *s);
    *s = (Staging){malloc(bytes ? bytes : 1), bytes};
    if (s->host) return s;
    free(s);
    fail(e, EXIT_DATA, "out of memory: %s needs %zu bytes", what, bytes);
    return NULL;
}

static void cpu_staging_destroy(Backend *b, Staging *s) {
    (void)b;
    if (s) free(s->host);
    free(s);
}

static void cpu_fetch(Backend *b, Staging *s, size_t at, const void *from, size_t bytes) {
    (void)b;
    CHECK(at <= s->bytes && bytes <= s->bytes - at, "fetch of %zu bytes at %zu into %zu", bytes, at, s->bytes);
    if (bytes) memcpy(s->host + at, from, bytes);
}

static void cpu_fetch_wait(Backend *b, Staging *s) { (void)b, (void)s; }

static void cpu_bring(Backend *b, void *to, Staging *s, size_t at, size_t bytes) {
    (void)b;
    CHECK(at <= s->bytes && bytes <= s->bytes - at, "bring of %zu bytes at %zu from %zu", bytes, at, s->bytes);
    if (bytes) memcpy(to, s->host + at, bytes);
}

static void cpu_fill_zero(Backend *b, void *p, size_t bytes) {
    const size_t block = (size_t)1 << 20;
    (void)b;
#pragma omp parallel for schedule(static) if (bytes > 4 * block)
    for (size_t at = 0; at < bytes; at += block) memset((char *)p + at, 0, size_min(block, bytes - at));
}

void *cpu_scratch(Backend *b, size_t bytes, const char *op) {
    CpuBackend *cpu = (CpuBackend *)b;
    if (cpu->planning) {
        if (bytes > cpu->need) cpu->need = bytes;
        return NULL;
    }
    CHECK(bytes <= cpu->scratch_bytes, "%s needs %zu bytes of scratch, the plan allocated %zu; was it planned with this "
          "shape and this number of threads (%d)?", op, bytes, cpu->scratch_bytes, cpu_threads());
    return cpu->scratch;
}

static void cpu_plan_begin(Backend *b) {
    CpuBackend *cpu = (CpuBackend *)b;
    CHECK(!cpu->planning, "plan_begin inside a plan");
    cpu->planning = true;
}

static bool cpu_plan_end(Backend *b, Error *e) {
    CpuBackend *cpu = (CpuBackend *)b;
    CHECK(cpu->planning, "plan_end without plan_begin");
    cpu->planning = false;
    if (cpu->need <= cpu->scratch_bytes) return true;
    size_t bytes = cpu->need;
    cpu_release(b, cpu->scratch);
    cpu->scratch = cpu_alloc(b, MEM_SCRATCH, "scratch", bytes, e);
    cpu->scratch_bytes = cpu->scratch ? bytes : 0;
    if (!cpu->scratch) cpu->need = 0;
    return cpu->scratch != NULL;
}

static void cpu_mark(Backend *b, Mark mark, size_t unit) {
    (void)b; (void)mark; (void)unit;
}

/* Nothing is gained by recording calls that the CPU has to make anyway. */
static bool cpu_replay(Backend *b, uint64_t key) {
    (void)b; (void)key;
    return false;
}

static void cpu_record_end(Backend *b, uint64_t key) {
    (void)b; (void)key;
}

static void cpu_sync(Backend *b) {
    (void)b;
}

static void cpu_destroy(Backend *b) {
    CpuBackend *cpu = (CpuBackend *)b;
    for (size_t i = 0; i < cpu->n_blocks; i++) free(cpu->blocks[i].p);
    free(cpu->blocks);
    free(cpu);
}

Backend *cpu_backend_create(Error *e) {
    (void)e;
    CpuBackend *cpu = xcalloc(1, sizeof *cpu);
    Backend *b = &cpu->base;
    b->name = "cpu";
    b->dtype = "fp32";
    b->elem_bytes = sizeof(float);
    b->host_memory = true;
    b->gelu_rounds_first = true;
    b->alloc = cpu_alloc;
    b->release = cpu_release;
    b->upload = cpu_upload;
    b->download = cpu_download;
    b->fill_zero = cpu_fill_zero;
    b->room = cpu_room;
    b->post = cpu_post;
    b->collect = cpu_collect;
    b->staging_create = cpu_staging_create;
    b->staging_destroy = cpu_staging_destroy;
    b->fetch = cpu_fetch;
    b->fetch_wait = cpu_fetch_wait;
    b->bring = cpu_bring;
    b->attention_saved_bytes = cpu_attention_saved_bytes;
#define LLMC_CPU_OP(op, Args) b->op = cpu_##op;
    LLMC_OPS(LLMC_CPU_OP)
#undef LLMC_CPU_OP
    b->plan_begin = cpu_plan_begin;
    b->plan_end = cpu_plan_end;
    b->mark = cpu_mark;
    b->replay = cpu_replay;
    b->record_end = cpu_record_end;
    b->sync = cpu_sync;
    b->destroy = cpu_destroy;
    return b;
}
