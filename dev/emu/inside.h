/* Between the files of the emulator: emu.cpp (threads, blocks, what kernels call), emu_hopper.cpp (the same of Hopper's own instructions),
 * runtime.cpp (streams, memory, graphs), cublaslt_twin.cpp. */
#ifndef LLMC_EMU_INSIDE_H
#define LLMC_EMU_INSIDE_H
#include "emu.h"
#include <deque>
#include <map>
#include <memory>
#include <vector>

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
enum { MAX_THREADS = 1024, SHARED_LIMIT = 99 * 1024, HOPPER_SHARED_LIMIT = 227 * 1024, MAX_CLUSTER = 8, CANARY = EMU_ASAN ? 0 : 256 };
void canary_set(char *end);
bool canary_alive(const char *end);

extern std::map<char *, size_t> device_memory; /* allocations: first byte, bytes */
bool is_device(const void *p, size_t bytes);   /* within one of them */

void device_time_passes(double seconds);       /* in work that waits: its time is real, that of kernels is declared */
/* cluster: blocks that run together, of a kernel for Hopper; 0: a kernel for every GPU. */
void run_grid(const char *name, dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster, bool early, const std::function<void()> &thread);
/* A fault that no thread of a kernel made: reported like theirs; comes back if on_fault does. */
void host_fault(const char *kernel, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* ---- threads, warps, blocks: of emu.cpp, which runs them, and emu_hopper.cpp --------------------------------------------------------- */
#if !defined(__x86_64__) || defined(LLMC_EMU_UCONTEXT)
#define EMU_UCONTEXT 1
#else
#define EMU_UCONTEXT 0
#endif
#if EMU_UCONTEXT
} /* namespace emu */
#include <ucontext.h>
namespace emu {
typedef ucontext_t Context;
#else
typedef void *Context;        /* the stack pointer; all else is on the stack */
#endif

enum State { NEW, READY, AT_BARRIER, AT_MEETING, AT_FRONT, AT_MBARRIER, AT_NAMED, AT_CLUSTER, AT_PRODUCTS, AT_STORES, DONE };
struct Copy { char *to; const char *from; int bytes; };

/* The sums of a chain of wgmma on the same registers, from the first of them until its threads have waited for the last. */
struct Sums {
    int N, stride;            /* elements of a row, padded */
    uint64_t first;           /* number of the chain's first product */
    std::vector<float> sum;   /* (64, stride) */
};
struct Chain { float *d; std::shared_ptr<Sums> sums; uint64_t last; }; /* a thread's view of it; d holds poison meanwhile */
struct Product {
    int N, issued, waited;    /* threads that have */
    bool a_mn, b_mn, in_registers, accumulate, done;
    uint64_t a, b;
    std::vector<uint32_t> registers; /* (128, 4) of A */
    std::vector<const uint32_t *> fragments; /* where each thread has them */
    std::shared_ptr<Sums> sums;
};
struct Warpgroup {
    std::deque<Product> products;
    uint64_t first;           /* number of the deque's first */
    std::vector<int> registers; /* what setmaxnreg was told, in order; negative: dec */
};

/* A copy from shared to global memory, until its thread has waited for it altogether. */
struct Store {
    const char *what;
    struct Block *block;
    size_t first;             /* byte of its shared memory */
    std::vector<char> source; /* as it was when the copy was issued */
    std::function<void(const char *)> write; /* empty once it is written */
    bool read;
};

struct Fiber : Thread {
    Context context;
    char *stack;              /* NULL before it runs first and after it is done */
    State state;
    int warp, block;          /* of the cluster */
    std::vector<std::vector<Copy>> groups; /* cp.async, oldest first; the last one is open */
    /* of Hopper's own: */
    const void *waits_for;    /* the barrier of AT_MBARRIER and AT_NAMED */
    unsigned parity;
    std::vector<std::vector<std::shared_ptr<Store>>> stores; /* as groups, oldest first; the last one is open */
    uint64_t issued, waited, target; /* products: issued, waited for, and up to where it waits now */
    std::vector<uint64_t> committed; /* ends of open groups */
    std::vector<Chain> chains;
    bool begun;               /* has waited for the kernels in front */
    bool fenced, cluster_arrived;
    unsigned cluster_phase;
    size_t register_calls;
};
struct Warp {
    int first, lanes, ready, arrived, left; /* first: fiber; ready: NEW or READY; left: lanes that are done */
    unsigned generation;
    const char *what;
    LaneValue values[2][32];
};
struct Mbarrier { unsigned count, pending, phase; int64_t bytes; }; /* bytes expected and not here yet */
struct Named { int count, arrived, by_warp[MAX_THREADS / 32]; };
struct Block {
    uint3 index;
    char *shared;
    int n_at_barrier, n_done;
    const char *barrier_file;
    int barrier_line;
    /* of Hopper's own: */
    std::map<const void *, Mbarrier> mbarriers;
    Named named[16];
    Warpgroup warpgroups[MAX_THREADS / 128];
    std::vector<char> fenced; /* shared memory as the asynchronous proxy may see it */
};
extern std::vector<Fiber> fibers;
extern std::vector<Warp> warps;
extern std::vector<Block> blocks;
extern int n_threads, n_warps, n_blocks; /* of a block, of a block, of a cluster */
extern size_t shared_size;
extern const char *kernel_name;
extern bool abandoned, on_hopper, launched_early;

static inline Fiber *running() { return static_cast<Fiber *>(current); }
void wait_as(State state);
void expect_begun(const char *what);
void wake(Fiber *f, State from);
void await_front();           /* the kernels in front have ended */

void hopper_begin();          /* a cluster; its blocks are prepared */
bool hopper_idle();           /* nobody can go on: lets one asynchronous thing happen that somebody waits for; false: there is none */
void hopper_leave();          /* the running thread ends */
void hopper_end();            /* all of them have */
size_t hopper_waiting(char *text, size_t room); /* who waits for what, for the report of a deadlock */

} /* namespace emu */
#endif
