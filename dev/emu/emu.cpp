/* The emulator: fibers, the turns of warps, barriers and meetings, cp.async, blocks and grids.
 * Reported as faults: a barrier that not all threads of the block reach, or reach at different lines; lanes of a warp in different collectives;
 * a thread that left while others wait; masks that are not full; accesses of ptx functions outside the shared buffer or unaligned; writes just
 * past the shared buffer or a device allocation (anywhere outside them under AddressSanitizer, for which each is a block of its own); with
 * blocks kept apart, two blocks that write one place. Shared memory and new global memory hold NaN. */
#include "inside.h"
#include <set>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string>
#include <sys/mman.h>
#include <vector>
#if EMU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define UNWATCHED __attribute__((no_sanitize("address"))) /* a frame that its function never leaves must not poison its stack */
#else
#define UNWATCHED
#endif
#if !defined(__x86_64__) || defined(LLMC_EMU_UCONTEXT)
#define EMU_UCONTEXT 1
#include <ucontext.h>
#else
#define EMU_UCONTEXT 0
#endif

namespace emu {

static const size_t STACK_BYTES = EMU_ASAN ? 256 * 1024 : 128 * 1024;

/* ---- fibers ---------------------------------------------------------------------------------------------------------- */
#if EMU_UCONTEXT
typedef ucontext_t Context;
static void switch_context(Context *save, Context *to) { swapcontext(save, to); }
#else
typedef void *Context;        /* the stack pointer; all else is on the stack */
extern "C" void llmc_emu_switch(void **save, void *to);
asm(R"(
.pushsection .text
.hidden llmc_emu_switch
.globl llmc_emu_switch
.type llmc_emu_switch,@function
llmc_emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size llmc_emu_switch,.-llmc_emu_switch
.popsection
)");
static void switch_context(Context *save, Context *to) { llmc_emu_switch(save, *to); }
#endif

enum State { NEW, READY, AT_BARRIER, AT_MEETING, DONE };
struct Copy { char *to; const char *from; int bytes; };
struct Fiber : Thread {
    Context context;
    char *stack;              /* NULL before it runs first and after it is done */
    State state;
    int warp;
    std::vector<std::vector<Copy>> groups; /* cp.async, oldest first; the last one is open */
};
struct Warp {
    int lanes, ready, arrived, left; /* ready: NEW or READY; left: lanes that are done */
    unsigned generation;
    const char *what;
    LaneValue values[2][32];
};

Thread *current;
dim3 block_size, grid_size;
Schedule schedule = {ASCENDING, 0, false, false};
void (*on_fault)(const char *message);

static Fiber fibers[MAX_THREADS];
static Warp warps[MAX_THREADS / 32];
static int n_threads, n_warps, n_at_barrier, n_done;
static const char *barrier_file;
static int barrier_line;
static const std::function<void()> *body;
static const char *kernel_name = "";
static char *shared_buffer;
static size_t shared_size;
static uint64_t n_launches, n_switches;
static bool abandoned;        /* a fault was handled by on_fault: the grid is given up */
static Context scheduler_context;
static std::vector<char *> free_stacks; /* the one used last comes next: a thread that does not wait costs a warm stack and two switches */
static Fiber *running() { return static_cast<Fiber *>(current); }

#if EMU_ASAN
static const void *scheduler_stack;
static size_t scheduler_stack_bytes;
#endif

/* for_ever: the fiber will not be run again. */
UNWATCHED static void to_scheduler(bool for_ever) {
    Fiber *f = running();
#if EMU_ASAN
    void *fake = nullptr;
    __sanitizer_start_switch_fiber(for_ever ? nullptr : &fake, scheduler_stack, scheduler_stack_bytes);
    switch_context(&f->context, &scheduler_context);
    __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_stack_bytes);
#else
    (void)for_ever;
    switch_context(&f->context, &scheduler_context);
#endif
}

static void to_fiber(Fiber *f) {
    current = f;
    n_switches++;
#if EMU_ASAN
    void *fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, f->stack, STACK_BYTES);
    switch_context(&scheduler_context, &f->context);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    switch_context(&scheduler_context, &f->context);
#endif
    current = nullptr;
}

static char *take_stack() {
    if (!free_stacks.empty()) {
        char *stack = free_stacks.back();
        free_stacks.pop_back();
        return stack;
    }
    static size_t n_stacks;
    const size_t guard = 65536, shift = n_stacks++ % 64 * 192; /* a multiple of any page size; tops of stacks in different sets of the caches */
    char *p = (char *)mmap(nullptr, STACK_BYTES + guard + 64 * 192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED || mprotect(p, guard, PROT_NONE)) { perror("emulator: stack"); abort(); }
    return p + guard + shift;
}

static void return_stack(Fiber *f) {
    free_stacks.push_back(f->stack);
    f->stack = nullptr;
}

/* ---- faults ------------------------------------------------------------------------------------------------------------ */
static void report(const char *message) {
    if (on_fault) return on_fault(message);
    fprintf(stderr, "emulator: %s\n", message);
    abort();
}

void fault(const char *format, ...) {
    char text[600], message[900];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (!current) {
        fprintf(stderr, "emulator: outside a kernel: %s\n", text);
        abort();
    }
    snprintf(message, sizeof message, "%s: %s (block %u,%u,%u thread %u,%u,%u)", kernel_name, text, blockIdx.x, blockIdx.y, blockIdx.z,
             threadIdx.x, threadIdx.y, threadIdx.z);
    report(message);
    abandoned = true;
    while (true) to_scheduler(false);
}

void host_fault(const char *kernel, const char *format, ...) {
    char text[600], message[900];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    snprintf(message, sizeof message, "%s: %s", kernel, text);
    report(message);
    abandoned = true;
}

/* NaN as float and as bf16, and one that signals: adding zero to it changes it. */
void canary_set(char *end) {
    for (int i = 0; i < CANARY; i++) end[i] = (char)"\xEE\xFF\xA0\x7F"[i % 4];
}
bool canary_alive(const char *end) {
    for (int i = 0; i < CANARY; i++)
        if (end[i] != (char)"\xEE\xFF\xA0\x7F"[i % 4]) return false;
    return true;
}

/* ---- barriers and meetings ----------------------------------------------------------------------------------------------- */
static void wait_as(State state) {
    Fiber *f = running();
    f->state = state;
    warps[f->warp].ready--;
    to_scheduler(false);
}
static void wake(Fiber *f, State from) {
    if (f->state != from) return;
    f->state = READY;
    warps[f->warp].ready++;
}

void sync_threads(const char *file, int line) {
    if (n_at_barrier == 0) barrier_file = file, barrier_line = line;
    else if (line != barrier_line || (file != barrier_file && strcmp(file, barrier_file)))
        fault("divergent barrier: this thread at %s:%d, others at %s:%d", file, line, barrier_file, barrier_line);
    if (n_done) fault("__syncthreads at %s:%d after %d threads have left", file, line, n_done);
    if (++n_at_barrier < n_threads) return wait_as(AT_BARRIER);
    n_at_barrier = 0;
    for (int i = 0; i < n_threads; i++) wake(&fibers[i], AT_BARRIER);
}

void full_mask(unsigned mask) {
    if (mask != 0xffffffffu) fault("a collective with mask 0x%08x: only whole warps meet here", mask);
}

const LaneValue *meet(const char *what, const void *mine, size_t bytes, void (*compute)(LaneValue *)) {
    Fiber *f = running();
    Warp *w = &warps[f->warp];
    if (w->lanes != 32) fault("%s in a warp of %d threads", what, w->lanes);
    if (w->left) fault("%s after %d lanes of the warp have left", what, w->left);
    if (w->arrived == 0) w->what = what;
    else if (w->what != what && strcmp(w->what, what)) fault("this lane is at %s, others of its warp at %s", what, w->what);
    LaneValue *values = w->values[w->generation & 1]; /* two: a lane may come to the next meeting before another has read this one's */
    if (bytes) memcpy(values[f->lane], mine, bytes);
    if (++w->arrived < 32) {
        wait_as(AT_MEETING);
        return values;
    }
    if (compute) compute(values);
    w->arrived = 0;
    w->generation++;
    for (int lane = 0; lane < 32; lane++) wake(&fibers[f->warp * 32 + lane], AT_MEETING);
    return values;
}

/* The end of a thread. */
static void leave() {
    Fiber *f = running();
    Warp *w = &warps[f->warp];
    f->state = DONE;
    n_done++;
    w->left++;
    w->ready--;
    if (n_at_barrier) fault("a thread leaves while %d wait at %s:%d", n_at_barrier, barrier_file, barrier_line);
    if (w->arrived) fault("a thread leaves while %d lanes of its warp wait at %s", w->arrived, w->what);
}

/* ---- cp.async -------------------------------------------------------------------------------------------------------------- */
static void arrive(const Copy &c) {
    if (c.bytes) memcpy(c.to, c.from, (size_t)c.bytes);
    else memset(c.to, 0, 16);
}
/* As late as may be, when waited for, or with schedule.early at once: the two ends of what hardware may do. */
void cp_async(void *shared, const void *global, int bytes) {
    Fiber *f = running();
    Copy c = {(char *)shared, (const char *)global, bytes};
    if (f->groups.empty()) f->groups.emplace_back();
    if (schedule.early) arrive(c);
    else f->groups.back().push_back(c);
}
void cp_async_commit_group() {
    Fiber *f = running();
    if (f->groups.empty()) f->groups.emplace_back();
    f->groups.emplace_back();
}
void cp_async_wait_group(int open) {
    Fiber *f = running();
    while (f->groups.size() > 1 + (size_t)open) { /* the last one is not committed */
        for (const Copy &c : f->groups.front()) arrive(c);
        f->groups.erase(f->groups.begin());
    }
}

void *dynamic_shared() { return shared_buffer; }
size_t dynamic_shared_bytes() { return shared_size; }
void check_shared(const char *what, const void *p, size_t bytes) {
    const char *c = (const char *)p;
    if (c < shared_buffer || c + bytes > shared_buffer + shared_size)
        fault("%s: address is %td bytes into the block's %zu bytes of shared memory", what, c - shared_buffer, shared_size);
    if ((uintptr_t)p % bytes) fault("%s: shared address is not aligned to %zu bytes", what, bytes);
}
void check_aligned(const char *what, const void *p, size_t bytes) {
    if ((uintptr_t)p % bytes) fault("%s: address %p is not aligned to %zu bytes", what, p, bytes);
}

/* ---- a block -------------------------------------------------------------------------------------------------------------- */
UNWATCHED static void fiber_main() {
#if EMU_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
    (*body)();
    leave();
    to_scheduler(true);
    abort();
}

static void start(Fiber *f) {
    f->state = READY;
    f->stack = take_stack();
#if EMU_UCONTEXT
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = f->stack, f->context.uc_stack.ss_size = STACK_BYTES, f->context.uc_link = nullptr;
    makecontext(&f->context, fiber_main, 0);
#else
    void **top = (void **)(void *)(f->stack + STACK_BYTES) - 1;
    *top = nullptr;           /* where fiber_main would return to; keeps the stack aligned as after a call */
    *--top = (void *)fiber_main;
    top -= 6;
    memset(top, 0, 6 * sizeof *top);
    f->context = top;
#endif
}

/* The next warp to run, or -1. */
static int next_warp(int last) {
    int favoured = schedule.warp % n_warps;
    if (schedule.order == AHEAD && warps[favoured].ready) return favoured;
    for (int i = 0; i < n_warps; i++) {
        int w = schedule.order == REVERSED ? n_warps - 1 - i : schedule.order == IN_TURN ? (last + 1 + i) % n_warps : i;
        if (schedule.order == BEHIND && w == favoured) continue;
        if (warps[w].ready) return w;
    }
    return schedule.order == BEHIND && warps[favoured].ready ? favoured : -1;
}

static void prepare_block(uint3 index) {
    n_at_barrier = n_done = 0;
    for (int w = 0; w < n_warps; w++) {
        warps[w].arrived = warps[w].left = 0;
        warps[w].lanes = warps[w].ready = n_threads - w * 32 < 32 ? n_threads - w * 32 : 32;
    }
    for (int i = 0; i < n_threads; i++) {
        Fiber *f = &fibers[i];
        unsigned k = (unsigned)i;
        f->thread_index = {k % block_size.x, k / block_size.x % block_size.y, k / (block_size.x * block_size.y)};
        f->block_index = index;
        f->warp = i / 32, f->lane = i % 32;
        f->state = NEW;
        f->groups.clear();
    }
    if (!shared_size) return;
    memset(shared_buffer, 0xFF, shared_size);
    canary_set(shared_buffer + shared_size);
}

/* One turn: each lane that is ready, up to where it waits. */
static void run_warp(int warp) {
    int lanes = warps[warp].lanes;
    for (int k = 0; k < lanes && !abandoned; k++) {
        Fiber *f = &fibers[warp * 32 + (schedule.order == REVERSED ? lanes - 1 - k : k)];
        if (f->state == NEW) start(f);
        if (f->state != READY) continue;
        to_fiber(f);
        if (f->state == DONE && !abandoned) return_stack(f);
    }
}

static void report_deadlock() {
    const char *collective = "no collective";
    for (int w = 0; w < n_warps; w++)
        if (warps[w].arrived) collective = warps[w].what;
    host_fault(kernel_name, "deadlock: of %d threads %d are done, %d wait at %s:%d, %d in %s", n_threads, n_done, n_at_barrier,
               n_at_barrier ? barrier_file : "no barrier", n_at_barrier ? barrier_line : 0, n_threads - n_done - n_at_barrier, collective);
}

/* Threads that a fault has left mid-way are forgotten; what their frames told AddressSanitizer is, too. */
static void give_up_block() {
    for (int i = 0; i < n_threads; i++) {
        if (!fibers[i].stack) continue;
#if EMU_ASAN
        __asan_unpoison_memory_region(fibers[i].stack, STACK_BYTES);
#endif
        return_stack(&fibers[i]);
    }
}

static void run_block(uint3 index) {
    prepare_block(index);
    for (int warp = n_warps - 1; !abandoned && (warp = next_warp(warp)) >= 0;) run_warp(warp);
    if (!abandoned && n_done < n_threads) report_deadlock();
    if (!abandoned && shared_size && !canary_alive(shared_buffer + shared_size))
        host_fault(kernel_name, "a write past the end of the block's %zu bytes of shared memory (block %u,%u,%u)", shared_size, index.x, index.y,
                   index.z);
    if (abandoned) give_up_block();
}

/* ---- blocks apart: each runs on global memory as the launch found it, and what all wrote is put together afterwards --------------------
 * So one block cannot see what another wrote, as it might not on hardware, and two that write different values to one place are found. Places
 * of atomics are common to all. */
struct Apart { std::vector<char> before, after; };
static std::map<char *, Apart> apart;
static std::set<char *> atomics;
void atomic_access(void *p) {
    if (schedule.apart) atomics.insert((char *)p);
}

static void apart_begin() {
    atomics.clear();
    for (const auto &m : device_memory) {
        Apart &a = apart[m.first];
        a.before.assign(m.first, m.first + m.second);
        a.after = a.before;
    }
}

static void apart_collect_range(char *now, Apart &a, size_t first, size_t n, size_t bytes, uint3 index) {
    for (size_t i = first; i < first + n && !abandoned; i++) {
        if (now[i] == a.before[i]) continue;
        if (a.after[i] != a.before[i] && a.after[i] != now[i])
            host_fault(kernel_name, "block %u,%u,%u writes byte %zu of an allocation of %zu bytes, where another block has written something else",
                       index.x, index.y, index.z, i, bytes);
        a.after[i] = now[i];
        now[i] = a.before[i];
    }
}

static void apart_collect(uint3 index) {
    const size_t chunk = 4096;
    for (char *p : atomics) {
        auto m = device_memory.upper_bound(p);
        if (m == device_memory.begin() || p >= (--m)->first + m->second) continue; /* shared memory */
        memcpy(&apart[m->first].before[(size_t)(p - m->first)], p, 4);
        memcpy(&apart[m->first].after[(size_t)(p - m->first)], p, 4);
    }
    for (auto &a : apart)
        for (size_t i = 0, bytes = a.second.before.size(); i < bytes; i += chunk) {
            size_t n = bytes - i < chunk ? bytes - i : chunk;
            if (memcmp(a.first + i, &a.second.before[i], n)) apart_collect_range(a.first, a.second, i, n, bytes, index);
        }
}

static void apart_end() {
    for (auto &a : apart)
        if (!a.second.after.empty()) memcpy(a.first, a.second.after.data(), a.second.after.size());
    apart.clear();
}

/* ---- a grid ------------------------------------------------------------------------------------------------------------------ */
void run_grid(const char *name, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()> &thread) {
    void *buffer = nullptr;
    kernel_name = name;
    block_size = block, grid_size = grid;
    n_threads = (int)(block.x * block.y * block.z);
    n_warps = (n_threads + 31) / 32;
    body = &thread;
    abandoned = false;
    shared_size = shared_bytes;
    if (shared_bytes && posix_memalign(&buffer, 1024, shared_bytes + CANARY)) { perror("emulator: shared memory"); abort(); }
    shared_buffer = (char *)buffer;
    n_launches++;
    const uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z;
    const bool keep_apart = schedule.apart && blocks > 1;
    if (keep_apart) apart_begin();
    for (uint64_t i = 0; i < blocks && !abandoned; i++) {
        uint64_t k = schedule.order == REVERSED ? blocks - 1 - i : i;
        uint3 index = {(unsigned)(k % grid.x), (unsigned)(k / grid.x % grid.y), (unsigned)(k / grid.x / grid.y)};
        run_block(index);
        if (keep_apart) apart_collect(index);
    }
    if (keep_apart) apart_end();
    free(buffer);
    shared_buffer = nullptr, shared_size = 0;
    for (const auto &m : device_memory) {
        if (canary_alive(m.first + m.second)) continue;
        canary_set(m.first + m.second);
        host_fault(name, "a write past the end of an allocation of %zu bytes", m.second);
    }
    kernel_name = "";
}

uint64_t launches() { return n_launches; }
uint64_t switches() { return n_switches; }

bool schedule_parse(const char *text, Schedule *s) {
    Schedule found = {ASCENDING, 0, false, false};
    while (*text) {
        size_t n = strcspn(text, ",");
        std::string word(text, n);
        char *end = nullptr;
        text += n + (text[n] == ',');
        if (word == "ascending") found.order = ASCENDING;
        else if (word == "reversed") found.order = REVERSED;
        else if (word == "in-turn") found.order = IN_TURN;
        else if (word == "apart") found.apart = true;
        else if (word == "early") found.early = true;
        else if (word.rfind("ahead:", 0) == 0 || word.rfind("behind:", 0) == 0) {
            const char *digits = word.c_str() + word.find(':') + 1;
            found.order = word[0] == 'a' ? AHEAD : BEHIND;
            found.warp = (int)strtol(digits, &end, 10);
            if (end == digits || *end || found.warp < 0) return false;
        } else return false;
    }
    return *s = found, true;
}

static bool read_schedule() {
    const char *s = getenv("LLMC_EMU_SCHEDULE");
    if (!s || schedule_parse(s, &schedule)) return true;
    fprintf(stderr, "LLMC_EMU_SCHEDULE: found \"%s\", expected ascending, reversed, ahead:K, behind:K or in-turn, and apart, early; commas between\n",
            s);
    exit(2);
}
__attribute__((unused)) static const bool schedule_read = read_schedule();

} /* namespace emu */
