/* The emulator: fibers, the turns of warps, barriers and meetings, cp.async, blocks and grids.
 * Reported as faults: a barrier that not all threads of the block reach, or reach at different lines; lanes of a warp in different collectives;
 * a thread that left while others wait; masks that are not full; accesses of ptx functions outside the shared buffer or unaligned; writes just
 * past the shared buffer or a device allocation (anywhere outside them under AddressSanitizer, for which each is a block of its own); with
 * blocks kept apart, two blocks that write one place; of a launch that is early, a block that does not wait for the kernels in front, and
 * memory written before that. Shared memory and new global memory hold NaN, and all global memory until the kernels in front have ended. */
#include "inside.h"
#include <algorithm>
#include <set>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string>
#include <sys/mman.h>
#if EMU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define UNWATCHED __attribute__((no_sanitize("address"))) /* a frame that its function never leaves must not poison its stack */
#else
#define UNWATCHED
#endif

namespace emu {

static const size_t STACK_BYTES = EMU_ASAN ? 256 * 1024 : 128 * 1024;

/* ---- fibers ---------------------------------------------------------------------------------------------------------- */
#if EMU_UCONTEXT
static void switch_context(Context *save, Context *to) { swapcontext(save, to); }
#else
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

Thread *current;
dim3 block_size, grid_size;
Schedule schedule = {ASCENDING, 0, false, false, false};
void (*on_fault)(const char *message);

std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<Block> blocks;
int n_threads, n_warps, n_blocks;
size_t shared_size;
const char *kernel_name = "";
bool abandoned;               /* a fault was handled by on_fault: the grid is given up */
bool on_hopper, launched_early;
static const std::function<void()> *body;
static uint64_t n_launches, n_switches;
static Context scheduler_context;
static std::vector<char *> free_stacks; /* the one used last comes next: a thread that does not wait costs a warm stack and two switches */
static Block *running_block() { return &blocks[(size_t)running()->block]; }

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
bool must_begin;
void expect_begun(const char *what) {
    if ((must_begin || launched_early) && !running()->begun) fault("%s before this thread's begin_kernel()", what);
}

void wait_as(State state) {
    Fiber *f = running();
    f->state = state;
    warps[(size_t)f->warp].ready--;
    to_scheduler(false);
}
void wake(Fiber *f, State from) {
    if (f->state != from) return;
    f->state = READY;
    warps[(size_t)f->warp].ready++;
}

void sync_threads(const char *file, int line) {
    if (must_begin && !on_hopper) expect_begun("__syncthreads"); /* for Hopper: it must have set up its barriers first */
    Block *b = running_block();
    if (b->n_at_barrier == 0) b->barrier_file = file, b->barrier_line = line;
    else if (line != b->barrier_line || (file != b->barrier_file && strcmp(file, b->barrier_file)))
        fault("divergent barrier: this thread at %s:%d, others at %s:%d", file, line, b->barrier_file, b->barrier_line);
    if (b->n_done) fault("__syncthreads at %s:%d after %d threads have left", file, line, b->n_done);
    if (++b->n_at_barrier < n_threads) return wait_as(AT_BARRIER);
    b->n_at_barrier = 0;
    for (int i = running()->block * n_threads, end = i + n_threads; i < end; i++) wake(&fibers[(size_t)i], AT_BARRIER);
}

void full_mask(unsigned mask) {
    if (mask != 0xffffffffu) fault("a collective with mask 0x%08x: only whole warps meet here", mask);
}

const LaneValue *meet(const char *what, const void *mine, size_t bytes, void (*compute)(LaneValue *)) {
    if (must_begin) expect_begun(what);
    Fiber *f = running();
    Warp *w = &warps[(size_t)f->warp];
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
    for (int lane = 0; lane < 32; lane++) wake(&fibers[(size_t)(w->first + lane)], AT_MEETING);
    return values;
}

/* The end of a thread. */
static void leave() {
    Fiber *f = running();
    Warp *w = &warps[(size_t)f->warp];
    Block *b = running_block();
    if (on_hopper) hopper_leave();
    f->state = DONE;
    b->n_done++;
    w->left++;
    w->ready--;
    if (b->n_at_barrier) fault("a thread leaves while %d wait at %s:%d", b->n_at_barrier, b->barrier_file, b->barrier_line);
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

void *dynamic_shared() { return running_block()->shared; }
size_t dynamic_shared_bytes() { return shared_size; }
void check_shared(const char *what, const void *p, size_t bytes) {
    const char *c = (const char *)p, *shared = running_block()->shared;
    if (c < shared || c + bytes > shared + shared_size)
        fault("%s: address is %td bytes into the block's %zu bytes of shared memory", what, c - shared, shared_size);
    if ((uintptr_t)p % bytes) fault("%s: shared address is not aligned to %zu bytes", what, bytes);
}
void check_aligned(const char *what, const void *p, size_t bytes) {
    if ((uintptr_t)p % bytes) fault("%s: address %p is not aligned to %zu bytes", what, p, bytes);
}

void kernel_begun() {
    if (running()->begun) fault("begin_kernel() a second time");
    await_front();
}

/* ---- the kernels in front of a launch that is early -----------------------------------------------------------------------
 * They end as late as may be: when no thread of the first block or cluster can go on otherwise. Until then device memory holds NaN. */
static std::map<char *, std::vector<char>> behind_front; /* what it holds then */
static bool front_ended;
static void front_begin() {
    for (const auto &m : device_memory) {
        behind_front[m.first].assign(m.first, m.first + m.second);
        memset(m.first, 0xFF, m.second);
    }
}
static void front_end() {
    size_t written = 0, of = 0;
    for (auto &m : behind_front) {
        const size_t bytes = m.second.size();
        const bool same = !bytes || (m.first[0] == (char)0xFF && !memcmp(m.first, m.first + 1, bytes - 1));
        for (size_t i = 0; !same && !of; i++)
            if (m.first[i] != (char)0xFF) written = i, of = bytes;
        memcpy(m.first, m.second.data(), bytes);
    }
    behind_front.clear();
    front_ended = true;
    if (of && !abandoned) host_fault(kernel_name, "byte %zu of an allocation of %zu bytes is written before begin_kernel(), in a kernel that is launched early", written, of);
}
void await_front() {
    if (!front_ended) wait_as(AT_FRONT);
    running()->begun = true;
}
static bool front_idle() {
    if (front_ended) return false;
    front_end();
    for (size_t i = 0; i < (size_t)(n_threads * n_blocks); i++) wake(&fibers[i], AT_FRONT);
    return true;
}

/* ---- a block -------------------------------------------------------------------------------------------------------------- */
UNWATCHED static void fiber_main() {
#if EMU_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
    (*body)();
    if (must_begin) expect_begun("the end");
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
    const int n = n_warps * n_blocks, favoured = schedule.warp % n;
    const Warp *w = warps.data();
    if (schedule.order == AHEAD && w[favoured].ready) return favoured;
    for (int i = 0; i < n; i++) {
        int k = schedule.order == REVERSED ? n - 1 - i : schedule.order == IN_TURN ? (last + 1 + i) % n : i;
        if (schedule.order == BEHIND && k == favoured) continue;
        if (w[k].ready) return k;
    }
    return schedule.order == BEHIND && w[favoured].ready ? favoured : -1;
}

static void prepare_block(int b, uint3 index) {
    Block *block = &blocks[(size_t)b];
    block->index = index, block->n_at_barrier = block->n_done = 0;
    for (int k = 0; k < n_warps; k++) {
        Warp *w = &warps[(size_t)(b * n_warps + k)];
        w->first = b * n_threads + k * 32;
        w->arrived = w->left = 0;
        w->lanes = w->ready = n_threads - k * 32 < 32 ? n_threads - k * 32 : 32;
    }
    for (int i = 0; i < n_threads; i++) {
        Fiber *f = &fibers[(size_t)(b * n_threads + i)];
        unsigned k = (unsigned)i;
        f->thread_index = {k % block_size.x, k / block_size.x % block_size.y, k / (block_size.x * block_size.y)};
        f->block_index = index;
        f->block = b, f->warp = b * n_warps + i / 32, f->lane = i % 32;
        f->state = NEW, f->begun = false;
        f->groups.clear();
    }
    if (!shared_size) return;
    memset(block->shared, 0xFF, shared_size);
    canary_set(block->shared + shared_size);
}

/* One turn: each lane that is ready, up to where it waits. */
static void run_warp(int warp) {
    const int first = warps[(size_t)warp].first, lanes = warps[(size_t)warp].lanes;
    for (int k = 0; k < lanes && !abandoned; k++) {
        Fiber *f = &fibers[(size_t)(first + (schedule.order == REVERSED ? lanes - 1 - k : k))];
        if (f->state == NEW) start(f);
        if (f->state != READY) continue;
        to_fiber(f);
        if (f->state == DONE && !abandoned) return_stack(f);
    }
}

static void report_deadlock() {
    const char *collective = "no collective";
    char others[500] = "";
    int waiting = 0, done = 0, line = 0;
    const char *file = "no barrier";
    for (const Warp &w : warps)
        if (w.arrived) collective = w.what;
    for (const Block &b : blocks) {
        waiting += b.n_at_barrier, done += b.n_done;
        if (b.n_at_barrier) file = b.barrier_file, line = b.barrier_line;
    }
    const size_t elsewhere = on_hopper ? hopper_waiting(others, sizeof others) : 0;
    host_fault(kernel_name, "deadlock: of %d threads %d are done, %d wait at %s:%d, %d in %s%s", n_threads * n_blocks, done, waiting, file, line,
               n_threads * n_blocks - done - waiting - (int)elsewhere, collective, others);
}

/* Threads that a fault has left mid-way are forgotten; what their frames told AddressSanitizer is, too. */
static void give_up_blocks() {
    for (Fiber &f : fibers) {
        if (!f.stack) continue;
#if EMU_ASAN
        __asan_unpoison_memory_region(f.stack, STACK_BYTES);
#endif
        return_stack(&f);
    }
}

/* Blocks first .. first + n_blocks - 1 of the grid: one, or a cluster. */
static void run_blocks(uint64_t first) {
    int done = 0;
    for (int b = 0; b < n_blocks; b++) {
        const uint64_t k = first + (uint64_t)b;
        prepare_block(b, {(unsigned)(k % grid_size.x), (unsigned)(k / grid_size.x % grid_size.y), (unsigned)(k / grid_size.x / grid_size.y)});
    }
    if (on_hopper) hopper_begin();
    for (int warp = n_warps * n_blocks - 1, next; !abandoned;) {
        if ((next = next_warp(warp)) >= 0) run_warp(warp = next);
        else if (!(on_hopper && hopper_idle()) && !front_idle()) break;
    }
    for (const Block &b : blocks) done += b.n_done;
    if (!abandoned && done < n_threads * n_blocks) report_deadlock();
    if (!abandoned && on_hopper) hopper_end();
    for (const Block &b : blocks) {
        const Fiber *f = &fibers[(size_t)((&b - blocks.data()) * n_threads)];
        if (!abandoned && launched_early && !std::any_of(f, f + n_threads, [](const Fiber &x) { return x.begun; }))
            host_fault(kernel_name, "block %u,%u,%u of a kernel that is launched early ends without begin_kernel()", b.index.x, b.index.y, b.index.z);
        if (!abandoned && shared_size && !canary_alive(b.shared + shared_size))
            host_fault(kernel_name, "a write past the end of the block's %zu bytes of shared memory (block %u,%u,%u)", shared_size, b.index.x, b.index.y,
                       b.index.z);
    }
    if (abandoned) give_up_blocks();
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
void run_grid(const char *name, dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster, bool early, const std::function<void()> &thread) {
    kernel_name = name;
    block_size = block, grid_size = grid;
    n_threads = (int)(block.x * block.y * block.z);
    n_warps = (n_threads + 31) / 32;
    n_blocks = cluster > 1 ? (int)cluster : 1;
    on_hopper = cluster > 0;
    launched_early = early, front_ended = !early;
    body = &thread;
    abandoned = false;
    shared_size = shared_bytes;
    if (fibers.size() < (size_t)(n_threads * n_blocks)) fibers.resize((size_t)(n_threads * n_blocks));
    warps.resize((size_t)(n_warps * n_blocks));
    blocks.resize((size_t)n_blocks);
    for (Block &b : blocks) {
        void *buffer = nullptr;
        if (shared_bytes && posix_memalign(&buffer, 1024, shared_bytes + CANARY)) { perror("emulator: shared memory"); abort(); }
        b.shared = (char *)buffer;
    }
    n_launches++;
    const uint64_t total = (uint64_t)grid.x * grid.y * grid.z, n = (uint64_t)n_blocks;
    const bool keep_apart = schedule.apart && total > n;
    if (keep_apart) apart_begin();
    if (early) front_begin();
    for (uint64_t i = 0; i < total && !abandoned; i += n) {
        run_blocks(schedule.order == REVERSED ? total - n - i : i);
        if (keep_apart) apart_collect(blocks[0].index);
    }
    if (!front_ended) front_end();
    if (keep_apart) apart_end();
    for (Block &b : blocks) free(b.shared), b.shared = nullptr;
    shared_size = 0;
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
    Schedule found = {ASCENDING, 0, false, false, false};
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
        else if (word == "newest") found.newest = true;
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
    fprintf(stderr, "LLMC_EMU_SCHEDULE: found \"%s\", expected ascending, reversed, ahead:K, behind:K or in-turn, and apart, early, newest; commas between\n",
            s);
    exit(2);
}
__attribute__((unused)) static const bool schedule_read = read_schedule();

} /* namespace emu */

extern "C" bool emu_use_schedule(const char *text);
extern "C" bool emu_use_schedule(const char *text) { return emu::schedule_parse(text, &emu::schedule); }
