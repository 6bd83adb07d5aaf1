/* Hopper's own instructions, after the PTX ISA manual (sections mbarrier, cp.async.bulk, wgmma, barrier.cluster, setmaxnreg).
 * When: whatever is asynchronous happens as late as may be, when no thread can go on and somebody waits for it: copies to shared memory one at a
 * time, oldest first, then products, then reads of copies to global memory, whose writes come when their thread waits for them or at the block's end. With
 * schedule.early copies are done at once, products still late: the order in which a buffer that is released too soon is overwritten before it is read. With
 * schedule.newest products come first and of the copies the newest: hardware promises no order among copies.
 * Faults: an mbarrier not initialised, written over, with more arrivals or bytes than it expects, or with bytes missing at the end; unaligned or
 * too large boxes, tiles not aligned to their swizzle's pattern; what a descriptor cannot say; warps of a warpgroup in different wgmma; registers
 * of sums touched, or of A changed, while products are under way (an array of A's is looked at in the wait, so it must not end before); wgmma
 * without fence, commit, wait; operands that were written since the last fence_proxy_async (by whoever: the fence of one thread shows what all
 * have written); what a copy to global memory reads changed, or a copy to there issued, before its thread has waited; a thread that ends without
 * that wait; shared memory of a block that has ended, or before the first cluster barrier; setmaxnreg beyond what a block of this size has; copies
 * from or to global memory by a thread that has not begun. A wait that never ends is a deadlock, and its report names the barrier.
 * Not seen: what memory fences order between threads. */
#include "emu_hopper.h"
#include "inside.h"
#include <algorithm>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

namespace emu {

static const uint64_t ALIVE = 0x7265697272616221ull; /* what an mbarrier's eight bytes hold */
static const uint32_t POISON = 0x7fc0dead;           /* in registers of sums under way */
enum { MOST_BYTES = (1 << 20) - 1, GROUP = 128 };

struct Arrival { Block *block; uint64_t *barrier; unsigned bytes; std::function<void()> write; };
static std::deque<Arrival> arrivals; /* copies to shared memory under way, oldest first */
static std::vector<const Store *> reading; /* copies to global memory whose thread has not waited until they have read */
static unsigned cluster_phase, cluster_arrived;

static Block *own() { return &blocks[(size_t)running()->block]; }
static int in_block(const Fiber *f) { return (int)(f - fibers.data()) - f->block * n_threads; }

/* A fault of the running thread or, between threads, of the launch. */
static void __attribute__((format(printf, 1, 2))) trouble(const char *format, ...) {
    char text[500];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (current) fault("%s", text);
    if (!abandoned) host_fault(kernel_name, "%s", text);
}
static void needs_hopper(const char *what) {
    if (!on_hopper) fault("%s in a kernel that LAUNCH has launched: LAUNCH_HOPPER", what);
}

/* Of what copies from or to global memory. */
static void needs_front(const char *what) {
    needs_hopper(what);
    expect_begun(what);
}

/* ---- shared memory, as the asynchronous proxy sees it --------------------------------------------------------------------------------- */

uint32_t shared_offset(const void *p) {
    check_shared("shared_address", p, 1);
    return (uint32_t)((const char *)p - own()->shared);
}
static void async_write(Block *b, char *to, const void *from, size_t bytes) {
    memcpy(to, from, bytes);
    memcpy(&b->fenced[(size_t)(to - b->shared)], from, bytes);
}
static size_t first_difference(const char *a, const char *b) { /* there is one */
    size_t i = 0;
    while (a[i] == b[i]) i++;
    return i;
}
static const char *async_read(Block *b, size_t offset, size_t bytes, const char *what) {
    static const char nothing[16] = {0};
    if (offset + bytes > shared_size) return trouble("%s: reads at byte %zu of %zu of shared memory", what, offset, shared_size), nothing;
    if (memcmp(b->shared + offset, &b->fenced[offset], bytes))
        trouble("%s: byte %zu of shared memory was written and no fence_proxy_async followed", what, offset + first_difference(b->shared + offset, &b->fenced[offset]));
    return b->shared + offset;
}
void proxy_fence() {
    needs_hopper("fence_proxy_async");
    if (shared_size) memcpy(own()->fenced.data(), own()->shared, shared_size);
}

/* The same place in a block of the cluster. */
static Block *block_of_rank(const char *what, unsigned rank) {
    if (rank >= (unsigned)n_blocks) fault("%s: block %u of a cluster of %d", what, rank, n_blocks);
    Block *b = &blocks[rank];
    if (b->n_done == n_threads) fault("%s: block %u of the cluster has ended", what, rank);
    if (b != own() && !cluster_phase) fault("%s: block %u of the cluster need not have begun: no cluster barrier came before", what, rank);
    return b;
}
char *remote(const char *what, const void *p, unsigned rank, size_t bytes) {
    needs_hopper(what);
    check_shared(what, p, bytes);
    return block_of_rank(what, rank)->shared + ((const char *)p - own()->shared);
}

/* ---- mbarrier ---------------------------------------------------------------------------------------------------------------------------- */

static Mbarrier *mbarrier_at(const char *what, Block *b, const uint64_t *p) {
    const size_t offset = (size_t)((const char *)p - b->shared);
    auto found = b->mbarriers.find(p);
    if (found == b->mbarriers.end()) return trouble("%s: no mbarrier was initialised at byte %zu of shared memory", what, offset), nullptr;
    if (*p != ALIVE) return trouble("%s: the mbarrier at byte %zu of shared memory was written over", what, offset), nullptr;
    return &found->second;
}
void mbarrier_start(uint64_t *barrier, unsigned count) {
    needs_hopper("mbarrier_init");
    check_shared("mbarrier_init", barrier, sizeof *barrier);
    if (!count || count > MOST_BYTES) fault("mbarrier_init: %u arrivals; hardware takes 1 to 2^20 - 1", count);
    if (!own()->mbarriers.emplace(barrier, Mbarrier{count, count, 0, 0}).second) fault("mbarrier_init: twice at byte %u", shared_offset(barrier));
    *barrier = ALIVE;
}
static void mbarrier_check_phase(Block *b, const uint64_t *p, Mbarrier *m) {
    const size_t offset = (size_t)((const char *)p - b->shared);
    if (m->bytes > MOST_BYTES || m->bytes < -MOST_BYTES) return trouble("the mbarrier at byte %zu: %lld bytes outstanding; at most 2^20 - 1", offset, (long long)m->bytes);
    if (m->pending || m->bytes > 0) return;
    if (m->bytes < 0) return trouble("the mbarrier at byte %zu: %lld bytes more have come than its phase expects", offset, -(long long)m->bytes);
    m->phase++, m->pending = m->count;
    const size_t first = (size_t)((b - blocks.data()) * n_threads);
    for (size_t i = first; i < first + (size_t)n_threads; i++)
        if (fibers[i].waits_for == p) wake(&fibers[i], AT_MBARRIER);
}
static void mbarrier_arrived(Block *b, uint64_t *p, unsigned bytes) {
    Mbarrier *m = mbarrier_at("an arrival", b, p);
    if (!m->pending) fault("the mbarrier at byte %zu: more arrivals than the %u of a phase", (size_t)((char *)p - b->shared), m->count);
    m->bytes += bytes, m->pending--;
    mbarrier_check_phase(b, p, m);
}
void mbarrier_count(uint64_t *barrier, int rank, unsigned bytes) {
    needs_hopper("mbarrier_arrive");
    if (rank < 0) return mbarrier_arrived(own(), barrier, bytes);
    uint64_t *there = (uint64_t *)(void *)remote("mbarrier_arrive_remote", barrier, (unsigned)rank, sizeof *barrier);
    mbarrier_arrived(block_of_rank("mbarrier_arrive_remote", (unsigned)rank), there, bytes);
}
void mbarrier_block(uint64_t *barrier, unsigned parity) {
    needs_hopper("mbarrier_wait");
    Fiber *f = running();
    const Mbarrier *m = mbarrier_at("mbarrier_wait", own(), barrier);
    if (parity > 1) fault("mbarrier_wait: parity %u", parity);
    f->waits_for = barrier, f->parity = parity;
    while ((m->phase & 1) == parity) wait_as(AT_MBARRIER);
    f->waits_for = nullptr;
}

/* ---- copies to shared memory ---------------------------------------------------------------------------------------------------------------- */

static void arrive(const Arrival &a) {
    a.write();
    Mbarrier *m = mbarrier_at("a copy's arrival", a.block, a.barrier);
    if (!m) return;
    m->bytes -= a.bytes;
    mbarrier_check_phase(a.block, a.barrier, m);
}
static void send(const char *what, Block *b, const void *to, uint64_t *barrier, unsigned bytes, std::function<void()> write) {
    static Arrival now; /* not on the stack, which a fault never unwinds */
    now = {b, barrier, bytes, std::move(write)};
    const size_t first = (size_t)((const char *)to - b->shared);
    for (const Store *s : reading)
        if (s->block == b && first < s->first + s->source.size() && s->first < first + bytes)
            fault("%s: to byte %zu of shared memory, where a %s may still read: bulk_wait_read of the thread that issued it comes first", what, first, s->what);
    mbarrier_at(what, b, barrier);
    if (schedule.early) arrive(now);
    else arrivals.push_back(now);
}
static void check_range(const char *what, const void *shared, size_t bytes, size_t alignment) {
    check_shared(what, shared, 1);
    if (bytes > shared_size - shared_offset(shared)) fault("%s: %zu bytes at byte %u of %zu of shared memory", what, bytes, shared_offset(shared), shared_size);
    if ((uintptr_t)shared % alignment) fault("%s: shared address is not aligned to %zu bytes", what, alignment);
}

void linear_load(void *shared, const void *global, unsigned bytes, uint64_t *barrier) {
    needs_front("bulk_load");
    if (!bytes || bytes % 16) fault("bulk_load: %u bytes; a multiple of 16", bytes);
    check_range("bulk_load", shared, bytes, 16);
    check_aligned("bulk_load: global side", global, 16);
    if (!is_device(global, bytes)) fault("bulk_load: %u bytes that are not in device memory", bytes);
    Block *b = own();
    send("bulk_load", b, shared, barrier, bytes, [=]() { async_write(b, (char *)shared, global, bytes); });
}
void remote_store(float *p, unsigned rank, float x, uint64_t *barrier) {
    char *to = remote("cluster_store_async", p, rank, sizeof x);
    Block *b = block_of_rank("cluster_store_async", rank);
    uint64_t *there = (uint64_t *)(void *)remote("cluster_store_async", barrier, rank, sizeof *barrier);
    send("cluster_store_async", b, to, there, sizeof x, [=]() { async_write(b, to, &x, sizeof x); });
}

static TensorBox box_of(const char *what, const void *map, int rank, const void *shared) {
    TensorBox t;
    memcpy(&t, map, sizeof t);
    if (t.magic != TENSOR_MAGIC) fault("%s: not a tensor map", what);
    if (t.rank != rank) fault("%s: %d coordinates for a tensor of rank %d", what, rank, t.rank);
    size_t bytes = 2, extent = 2 * t.dim[0];
    for (int i = 0; i < rank; i++) bytes *= t.box[i], extent += i ? (t.dim[i] - 1) * t.stride[i] : 0;
    check_range(what, shared, bytes, t.span > 16 ? 8 * t.span : 128); /* hardware: 128; but then the pattern begins elsewhere */
    if (!is_device(t.base, extent)) fault("%s: the tensor's %zu bytes are not in device memory", what, extent);
    return t;
}
static size_t box_bytes(const TensorBox &t) { return (size_t)2 * t.box[0] * t.box[1] * t.box[2] * t.box[3]; }

/* Each chunk of 16 bytes of the box: chunk(its place in the box in shared memory, its elements in global memory, how many are within the tensor). */
template <class Chunk> static void for_chunks(const TensorBox &t, const int *at, Chunk chunk) {
    uint32_t i[4], linear = 0;
    for (i[3] = 0; i[3] < t.box[3]; i[3]++)
        for (i[2] = 0; i[2] < t.box[2]; i[2]++)
            for (i[1] = 0; i[1] < t.box[1]; i[1]++)
                for (i[0] = 0; i[0] < t.box[0]; i[0] += 8, linear += 16) {
                    char *row = t.base;
                    bool within = true;
                    for (int d = 1; d < 4; d++) {
                        const int64_t x = (int64_t)at[d] + i[d];
                        within = within && x >= 0 && x < (int64_t)t.dim[d];
                        row += x * (int64_t)t.stride[d];
                    }
                    const int64_t x = (int64_t)at[0] + i[0], n = (int64_t)t.dim[0];
                    const int from = !within || x >= n ? 8 : x < 0 ? (int)(x < -8 ? 8 : -x) : 0, to = !within || x >= n ? 8 : (int)(n - x < 8 ? n - x : 8);
                    chunk(linear ^ (linear >> 7 & (t.span / 16 - 1)) << 4, row + 2 * x, from, to);
                }
}
struct At { int c[4]; };
static At coordinates(int rank, const int *at) {
    At c = {};
    memcpy(c.c, at, (size_t)rank * sizeof *at);
    return c;
}

void tensor_load(void *shared, const void *map, uint64_t *barrier, unsigned mask, int rank, const int *at) {
    needs_front("tma_load");
    const TensorBox t = box_of("tma_load", map, rank, shared);
    const At c = coordinates(rank, at);
    const unsigned to = mask ? mask : 1u << rank_in_cluster();
    check_shared("tma_load: mbarrier", barrier, sizeof *barrier);
    for (unsigned r = 0; r < 16; r++) {
        if (!(to >> r & 1)) continue;
        Block *b = block_of_rank("tma_load", r);
        char *there = b->shared + ((char *)shared - own()->shared);
        uint64_t *its = (uint64_t *)(void *)(b->shared + ((char *)barrier - own()->shared));
        send("tma_load", b, there, its, (unsigned)box_bytes(t), [=]() {
            for_chunks(t, c.c, [=](uint32_t place, const char *global, int from, int end) {
                char chunk[16] = {0};
                if (from < end) memcpy(chunk + 2 * from, global + 2 * from, (size_t)(2 * (end - from)));
                async_write(b, there + place, chunk, 16);
            });
        });
    }
}

/* ---- copies to global memory ------------------------------------------------------------------------------------------------------------------ */

/* Asked for before the function that writes is made, which a fault would not unmake. */
static const char *store_source(const char *what, const void *shared, size_t bytes) { return async_read(own(), shared_offset(shared), bytes, what); }
static void store_write(Store *s) {
    if (s->write) s->write(s->source.data());
    s->write = nullptr;
}
static void store_issue(const char *what, const char *source, size_t bytes, std::function<void(const char *)> write) {
    Fiber *f = running();
    if (f->stores.empty()) f->stores.emplace_back();
    f->stores.back().push_back(std::make_shared<Store>(Store{what, own(), shared_offset(source), {source, source + bytes}, std::move(write), false}));
    reading.push_back(f->stores.back().back().get());
    if (schedule.early) store_write(f->stores.back().back().get());
}
void linear_store(void *global, const void *shared, unsigned bytes) {
    needs_front("bulk_store");
    if (!bytes || bytes % 16) fault("bulk_store: %u bytes; a multiple of 16", bytes);
    check_range("bulk_store", shared, bytes, 16);
    check_aligned("bulk_store: global side", global, 16);
    if (!is_device(global, bytes)) fault("bulk_store: %u bytes that are not in device memory", bytes);
    const char *now = store_source("bulk_store", shared, bytes);
    store_issue("bulk_store", now, bytes, [=](const char *source) { memcpy(global, source, bytes); });
}
void tensor_store(const void *map, const void *shared, int rank, const int *at) {
    needs_front("tma_store");
    const TensorBox t = box_of("tma_store", map, rank, shared);
    const At c = coordinates(rank, at);
    const char *now = store_source("tma_store", shared, box_bytes(t));
    store_issue("tma_store", now, box_bytes(t), [=](const char *source) {
        for_chunks(t, c.c, [=](uint32_t place, char *global, int from, int end) {
            if (from < end) memcpy(global + 2 * from, source + place + 2 * from, (size_t)(2 * (end - from)));
        });
    });
}
void store_commit() {
    Fiber *f = running();
    if (f->stores.empty()) f->stores.emplace_back();
    f->stores.emplace_back();
}
static bool is_read(const Fiber *f, size_t groups) {
    for (size_t g = 0; g < groups; g++)
        for (const auto &s : f->stores[g])
            if (!s->read) return false;
    return true;
}
void store_wait(int open, bool written) {
    Fiber *f = running();
    const size_t n = f->stores.size(), end = n > 1 + (size_t)open ? n - 1 - (size_t)open : 0; /* the last one is not committed */
    if (!open && n && !f->stores.back().empty()) fault("bulk_wait before bulk_commit");
    if (!schedule.early && !is_read(f, end)) wait_as(AT_STORES);
    for (size_t g = 0; g < end; g++)
        for (const auto &s : f->stores[g]) {
            const char *now = s->block->shared + s->first;
            if (!s->read && memcmp(now, s->source.data(), s->source.size()))
                fault("%s of %zu bytes from byte %zu of shared memory: byte %zu was written before this wait", s->what, s->source.size(), s->first,
                      s->first + first_difference(now, s->source.data()));
            if (!s->read) reading.erase(std::find(reading.begin(), reading.end(), s.get()));
            s->read = true;
            if (written) store_write(s.get());
        }
    if (written) f->stores.erase(f->stores.begin(), f->stores.begin() + (long)end);
}
/* Of the threads that wait for their copies to have read, one. */
static bool read_one() {
    for (size_t i = 0; i < (size_t)(n_blocks * n_threads); i++)
        if (fibers[i].state == AT_STORES) return wake(&fibers[i], AT_STORES), true;
    return false;
}

/* ---- wgmma -------------------------------------------------------------------------------------------------------------------------------------- */

/* Where a descriptor says that the 16-byte chunk lies, `major` along its contiguous dimension in elements (a multiple of 8), `other` across. The canonical
 * layouts of the manual, in bytes. K-major: ((8, m), (T, 2)) : ((span, SBO), (1, 16)), without swizzle ((16, SBO), (1, LBO)). MN-major:
 * ((T, span / 16, m), (8, 2)) : ((1, 16, LBO), (span, SBO)), without swizzle ((T, 1, m), (8, 2)) : ((1, -, SBO), (16, LBO)). */
struct Descriptor {
    uint32_t start, leading, stride, span;
    explicit Descriptor(uint64_t d) {
        static const uint32_t spans[4] = {16, 128, 64, 32};
        start = (uint32_t)(d & 0x3fff) << 4, leading = (uint32_t)(d >> 16 & 0x3fff) << 4, stride = (uint32_t)(d >> 32 & 0x3fff) << 4, span = spans[d >> 62];
    }
    uint32_t place(bool mn_major, uint32_t major, uint32_t other) const {
        uint32_t at = start + other % 8 * span;
        if (!mn_major) at += other / 8 * stride + major / 8 * (span == 16 ? leading : 16);
        else if (span == 16) at += major / 8 * stride + other / 8 * leading;
        else at += major * 2 % span + major * 2 / span * leading + other / 8 * stride;
        return at ^ (at >> 7 & (span / 16 - 1)) << 4;
    }
};
static void check_descriptor(const char *which, uint64_t d, bool mn_major) {
    const Descriptor x(d);
    if (d & ~0xC00E3FFF3FFF3FFFull) fault("wgmma: descriptor of %s: bits that must be zero are not: %016llx", which, (unsigned long long)d);
    if (d >> 49 & 7) fault("wgmma: descriptor of %s: base offset %u: tiles begin at their pattern here", which, (unsigned)(d >> 49 & 7));
    const uint32_t start = mn_major || x.span == 16 ? x.start : x.start & ~(x.span - 1); /* K-major: may be advanced within the span */
    if (x.span > 16 && start % (8 * x.span)) fault("wgmma: descriptor of %s: start %u is not at the pattern of a swizzle of %u bytes", which, x.start, x.span);
    if (!mn_major && x.span > 16 && x.start % x.span + 32 > x.span) fault("wgmma: descriptor of %s: 16 elements of k from byte %u leave the span of %u bytes", which, x.start, x.span);
}

/* sum (64, stride) += A (64, 16) B (16, stride), k ascending; products of bf16 are exact, so a fused multiply-add changes nothing. */
typedef float V8 __attribute__((vector_size(32)));
static inline __attribute__((always_inline)) void product_loop(float *sum, const float *A, const float *B, int stride) {
    for (int row = 0; row < 64; row++)
        for (int n = 0; n < stride; n += 32) {
            V8 s0, s1, s2, s3, b0, b1, b2, b3;
            float *s = sum + row * stride + n;
            memcpy(&s0, s, 32), memcpy(&s1, s + 8, 32), memcpy(&s2, s + 16, 32), memcpy(&s3, s + 24, 32);
            for (int k = 0; k < 16; k++) {
                const float *b = B + k * stride + n, a = A[row * 16 + k];
                memcpy(&b0, b, 32), memcpy(&b1, b + 8, 32), memcpy(&b2, b + 16, 32), memcpy(&b3, b + 24, 32);
                s0 += a * b0, s1 += a * b1, s2 += a * b2, s3 += a * b3;
            }
            memcpy(s, &s0, 32), memcpy(s + 8, &s1, 32), memcpy(s + 16, &s2, 32), memcpy(s + 24, &s3, 32);
        }
}
static void product_plain(float *sum, const float *A, const float *B, int stride) { product_loop(sum, A, B, stride); }
#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) static void product_avx2(float *sum, const float *A, const float *B, int stride) { product_loop(sum, A, B, stride); }
#else
#define product_avx2 product_plain
#define __builtin_cpu_supports(x) 0
#endif

static float from_bf16(const char *p) {
    __nv_bfloat16 x;
    memcpy(&x, p, sizeof x);
    return __bfloat162float(x);
}
/* Operand (rows of MN, 16 of k) to to[mn * mn_stride + k * k_stride]. */
static void read_operand(Block *b, const char *which, uint64_t d, bool mn_major, int rows, float *to, int mn_stride, int k_stride) {
    const Descriptor x(d);
    const int along = mn_major ? rows : 16, across = mn_major ? 16 : rows, step = mn_major ? mn_stride : k_stride, next = mn_major ? k_stride : mn_stride;
    for (int other = 0; other < across; other++)
        for (int major = 0; major < along; major += 8) {
            const char *chunk = async_read(b, x.place(mn_major, (uint32_t)major, (uint32_t)other), 16, which);
            uint16_t bits[8];
            memcpy(bits, chunk, sizeof bits);
            for (int i = 0; i < 8; i++) to[(major + i) * step + other * next] = __uint_as_float((uint32_t)bits[i] << 16);
        }
}
static void multiply(Block *b, Product *p) {
    alignas(32) static float A[64 * 16], B[16 * 256];
    Sums *s = p->sums.get();
    const int stride = s->stride;
    static const bool fast = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (p->in_registers)
        for (int t = 0; t < GROUP; t++)
            for (int i = 0; i < 8; i++) { /* as A of mma.m16n8k16, rows 16 w + .. of warp w */
                const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, k = t % 4 * 2 + i % 2 + i / 4 * 8;
                A[row * 16 + k] = from_bf16((const char *)&p->registers[(size_t)(4 * t)] + 2 * i);
            }
    else read_operand(b, "wgmma, A", p->a, p->a_mn, 64, A, 16, 1);
    for (int k = 0; k < 16; k++)
        for (int n = p->N; n < stride; n++) B[k * stride + n] = 0;
    read_operand(b, "wgmma, B", p->b, p->b_mn, p->N, B, 1, stride);
    if (!p->accumulate) memset(s->sum.data(), 0, s->sum.size() * sizeof(float));
    (fast ? product_avx2 : product_plain)(s->sum.data(), A, B, stride);
    p->done = true;
}

static Warpgroup *warpgroup(const char *what) {
    needs_hopper(what);
    Fiber *f = running();
    if (in_block(f) / GROUP * GROUP + GROUP > n_threads) fault("%s: the block's last warps are no warpgroup of four", what);
    return &own()->warpgroups[in_block(f) / GROUP];
}
/* Thread t of the warpgroup: each(register, its place among the sums). */
template <class Each> static inline void for_registers(Sums *s, int t, Each each) {
    float *upper = &s->sum[(size_t)((t / 32 * 16 + t % 32 / 4) * s->stride + t % 4 * 2)], *lower = upper + 8 * s->stride;
    for (int j = 0; j < s->N / 2; j += 4) each(j, upper[2 * j]), each(j + 1, upper[2 * j + 1]), each(j + 2, lower[2 * j]), each(j + 3, lower[2 * j + 1]);
}

static std::shared_ptr<Sums> begin_chain(Fiber *f, Product *p, float *d, uint64_t number) {
    if (!f->fenced) fault("wgmma: the sums' registers need wgmma_fence before the first wgmma, and again after a wait");
    if (p->issued && p->sums->first != number) fault("wgmma: this thread begins new sums, others of its warpgroup go on with theirs");
    if (!p->issued) {
        const int stride = (p->N + 31) / 32 * 32;
        p->sums = std::make_shared<Sums>(Sums{p->N, stride, number, std::vector<float>((size_t)(64 * stride))});
    }
    for (const Chain &c : f->chains)
        if (d < c.d + c.sums->N / 2 && c.d < d + p->N / 2) fault("wgmma: the sums overlap others under way");
    for_registers(p->sums.get(), in_block(f) % GROUP, [d](int i, float &sum) { sum = d[i], memcpy(&d[i], &POISON, sizeof POISON); });
    return p->sums;
}
void product(float *d, int N, const uint32_t *a, uint64_t desc_a, bool a_mn, uint64_t desc_b, bool b_mn, bool accumulate) {
    Warpgroup *g = warpgroup("wgmma");
    Fiber *f = running();
    const uint64_t number = f->issued;
    if (!a) check_descriptor("A", desc_a, a_mn);
    else if (!f->fenced) fault("wgmma: A in registers needs wgmma_fence after they are written");
    check_descriptor("B", desc_b, b_mn);
    if (number - g->first == g->products.size()) {
        g->products.emplace_back(Product{N, 0, 0, a_mn, b_mn, a != nullptr, accumulate, false, desc_a, desc_b, {}, {}, nullptr});
        if (a) g->products.back().registers.resize(4 * GROUP), g->products.back().fragments.resize(GROUP);
    }
    Product *p = &g->products[number - g->first];
    if (p->N != N || p->a != desc_a || p->b != desc_b || p->a_mn != a_mn || p->b_mn != b_mn || p->in_registers != (a != nullptr) || p->accumulate != accumulate)
        fault("wgmma: the threads of a warpgroup are at different ones: N %d and %d, A %016llx and %016llx, B %016llx and %016llx", N, p->N,
              (unsigned long long)desc_a, (unsigned long long)p->a, (unsigned long long)desc_b, (unsigned long long)p->b);
    Chain *chain = nullptr;
    for (Chain &c : f->chains)
        if (c.d == d) chain = &c;
    if (!chain) {
        f->chains.push_back({d, begin_chain(f, p, d, number), number});
    } else {
        if (chain->sums->N != N) fault("wgmma: N %d on sums of N %d under way", N, chain->sums->N);
        if (p->issued && p->sums != chain->sums) fault("wgmma: this thread goes on with other sums than others of its warpgroup");
        p->sums = chain->sums, chain->last = number;
    }
    if (a) memcpy(&p->registers[(size_t)(in_block(f) % GROUP * 4)], a, 4 * sizeof *a), p->fragments[(size_t)(in_block(f) % GROUP)] = a;
    f->issued++;
    p->issued++;
}
void product_fence() { warpgroup("wgmma_fence"), running()->fenced = true; }
void product_commit() { warpgroup("wgmma_commit"), running()->committed.push_back(running()->issued); }

/* What this thread's products before `end` have summed, into its registers. */
static void collect(Fiber *f, uint64_t end) {
    for (size_t k = 0; k < f->chains.size();) {
        const Chain &c = f->chains[k];
        if (c.last >= end) { k++; continue; }
        float *d = c.d;
        for_registers(c.sums.get(), in_block(f) % GROUP, [d](int i, float &sum) {
            if (memcmp(&d[i], &POISON, sizeof POISON)) fault("wgmma: register %d of the sums was written before wgmma_wait", i);
            d[i] = sum;
        });
        f->chains.erase(f->chains.begin() + (long)k);
    }
}
static void check_fragment(const Product &p, size_t thread) {
    for (size_t i = 0; p.in_registers && i < 4; i++)
        if (p.fragments[thread][i] != p.registers[4 * thread + i]) fault("wgmma: register %zu of A was written, or its array ended, before wgmma_wait", i);
}
void product_wait(int open) {
    Warpgroup *g = warpgroup("wgmma_wait");
    Fiber *f = running();
    const size_t n = f->committed.size();
    if (f->issued > (n ? f->committed.back() : f->waited)) fault("wgmma_wait before wgmma_commit");
    f->fenced = false;
    if (n <= (size_t)open) return;
    const uint64_t end = f->committed[n - (size_t)open - 1];
    f->committed.erase(f->committed.begin(), f->committed.end() - open);
    f->target = end;
    while (end > g->first && !g->products[end - 1 - g->first].done) wait_as(AT_PRODUCTS);
    for (uint64_t i = f->waited; i < end; i++) check_fragment(g->products[i - g->first], (size_t)(in_block(f) % GROUP)), g->products[i - g->first].waited++;
    f->waited = end;
    collect(f, end);
    for (; !g->products.empty() && g->products.front().waited == GROUP; g->first++) g->products.pop_front();
}
/* The products of one warpgroup that somebody waits for and that all 128 threads have issued. */
static bool multiply_one() {
    for (size_t i = 0; i < fibers.size() && i < (size_t)(n_blocks * n_threads); i++) {
        Fiber *f = &fibers[i];
        if (f->state != AT_PRODUCTS) continue;
        Block *b = &blocks[(size_t)f->block];
        Warpgroup *g = &b->warpgroups[in_block(f) / GROUP];
        if (g->products[f->target - 1 - g->first].issued < GROUP) continue;
        for (uint64_t k = g->first; k < f->target && !abandoned; k++)
            if (!g->products[k - g->first].done) multiply(b, &g->products[k - g->first]);
        const size_t first = (size_t)(f->block * n_threads + in_block(f) / GROUP * GROUP);
        for (size_t k = first; k < first + GROUP; k++)
            if (fibers[k].state == AT_PRODUCTS && g->products[fibers[k].target - 1 - g->first].done) wake(&fibers[k], AT_PRODUCTS);
        return true;
    }
    return false;
}

/* ---- named barriers, setmaxnreg, clusters -------------------------------------------------------------------------------------------------------- */

void named_barrier(unsigned id, unsigned threads, bool wait) {
    const char *what = wait ? "named_sync" : "named_arrive";
    needs_hopper(what);
    if (id < 1 || id > 15) fault("%s: barrier %u; 1 to 15 (0 is __syncthreads)", what, id);
    if (!threads || threads % 32 || threads > (unsigned)n_threads) fault("%s: %u threads in a block of %d; whole warps", what, threads, n_threads);
    Fiber *f = running();
    Named *x = &own()->named[id];
    int *mine = &x->by_warp[in_block(f) / 32];
    if (!x->arrived) x->count = (int)threads;
    if (x->count != (int)threads) fault("%s: barrier %u with %u threads, others came to it with %d", what, id, threads, x->count);
    if (++*mine > 32) fault("%s: barrier %u: a warp comes twice before all have come", what, id);
    if (++x->arrived < x->count) {
        f->waits_for = x;
        if (wait) wait_as(AT_NAMED);
        f->waits_for = nullptr;
        return;
    }
    for (int &w : x->by_warp) {
        if (w % 32) fault("%s: barrier %u: %d lanes of a warp came", what, id, w);
        w = 0;
    }
    x->arrived = 0;
    const size_t first = (size_t)(f->block * n_threads);
    for (size_t i = first; i < first + (size_t)n_threads; i++)
        if (fibers[i].waits_for == x) wake(&fibers[i], AT_NAMED);
}

/* Registers: 64 K an SM; a block that is launched alone gets at most what its threads share of them, in units of 8. */
void set_registers(int n, bool more) {
    Warpgroup *g = warpgroup("setmaxnreg");
    Fiber *f = running();
    if (n % 8 || n < 24 || n > 256) fault("setmaxnreg: %d registers; multiples of 8 from 24 to 256", n);
    if (f->register_calls == g->registers.size()) g->registers.push_back(more ? n : -n);
    if (g->registers[f->register_calls] != (more ? n : -n)) fault("setmaxnreg: the threads of a warpgroup ask for %d and %d", n, abs(g->registers[f->register_calls]));
    f->register_calls++;
    const int launched = std::min(65536 / n_threads / 8 * 8, 256), pool = launched * n_threads;
    int sum = 0;
    for (int w = 0; w * GROUP < n_threads; w++) {
        const Warpgroup &x = own()->warpgroups[w];
        sum += GROUP * (x.registers.empty() ? 24 : abs(x.registers.back())); /* who has not spoken yet may still give */
    }
    if (sum > pool) fault("setmaxnreg: %d registers of all threads; a block of %d threads has %d", sum, n_threads, pool);
}

unsigned rank_in_cluster() { return (unsigned)running()->block; }
void cluster_signal() {
    needs_hopper("cluster_arrive");
    Fiber *f = running();
    if (f->cluster_arrived) fault("cluster_arrive twice without cluster_wait");
    f->cluster_arrived = true, f->cluster_phase = cluster_phase;
    if (++cluster_arrived < (unsigned)(n_threads * n_blocks)) return;
    cluster_arrived = 0, cluster_phase++;
    for (size_t i = 0; i < (size_t)(n_blocks * n_threads); i++) wake(&fibers[i], AT_CLUSTER);
}
void cluster_await() {
    needs_hopper("cluster_wait");
    Fiber *f = running();
    if (!f->cluster_arrived) fault("cluster_wait without cluster_arrive");
    if (f->cluster_phase == cluster_phase) wait_as(AT_CLUSTER);
    f->cluster_arrived = false;
}

/* ---- a cluster's life ----------------------------------------------------------------------------------------------------------------------------- */

void hopper_begin() {
    arrivals.clear(), reading.clear();
    cluster_phase = cluster_arrived = 0;
    for (Block &b : blocks) {
        b.mbarriers.clear();
        for (Named &n : b.named) n = {};
        for (Warpgroup &g : b.warpgroups) g = {};
        b.fenced.assign(shared_size, (char)0xFF);
    }
    for (Fiber &f : fibers) {
        f.waits_for = nullptr, f.issued = f.waited = f.target = 0;
        f.stores.clear(), f.committed.clear(), f.chains.clear();
        f.fenced = f.cluster_arrived = false, f.register_calls = 0;
    }
}

bool hopper_idle() {
    if (schedule.newest && multiply_one()) return true;
    for (size_t n = arrivals.size(), j = 0; j < n; j++)
        for (size_t k = 0, i = schedule.newest ? n - 1 - j : j; k < (size_t)(n_blocks * n_threads); k++)
            if (fibers[k].state == AT_MBARRIER && fibers[k].waits_for == arrivals[i].barrier) {
                Arrival a = std::move(arrivals[i]);
                arrivals.erase(arrivals.begin() + (long)i);
                return arrive(a), true;
            }
    return multiply_one() || read_one();
}

void hopper_leave() {
    const Fiber *f = running();
    if (f->issued > f->waited) fault("a thread leaves with %llu wgmma not waited for", (unsigned long long)(f->issued - f->waited));
    if (!is_read(f, f->stores.size())) fault("a thread leaves while its copies from shared to global memory may still read: bulk_wait_read<0>");
    if (f->cluster_arrived) fault("a thread leaves between cluster_arrive and cluster_wait");
}

void hopper_end() {
    for (size_t i = 0; i < (size_t)(n_blocks * n_threads); i++)
        for (const auto &group : fibers[i].stores)
            for (const auto &s : group) store_write(s.get());
    for (const Block &b : blocks) {
        for (const auto &m : b.mbarriers)
            if (m.second.bytes && arrivals.empty()) trouble("the mbarrier at byte %td expects %lld bytes at the block's end", (const char *)m.first - b.shared, (long long)m.second.bytes);
        for (int id = 1; id < 16; id++)
            if (b.named[id].arrived) trouble("named barrier %d: %d of %d threads came, and the block has ended", id, b.named[id].arrived, b.named[id].count);
        const size_t first = (size_t)((&b - blocks.data()) * n_threads);
        for (size_t t = 0; t < (size_t)(n_threads / GROUP * GROUP); t++)
            if (fibers[first + t].register_calls != fibers[first + t / GROUP * GROUP].register_calls) trouble("setmaxnreg: not all threads of a warpgroup came to it");
    }
    if (!arrivals.empty())
        trouble("%zu copies to shared memory are under way at the end, the first for the mbarrier at byte %td", arrivals.size(),
                (char *)arrivals[0].barrier - arrivals[0].block->shared);
}

size_t hopper_waiting(char *text, size_t room) {
    size_t n = 0, at = 0;
    int last = -1;
    text[0] = 0;
    for (size_t i = 0; i < (size_t)(n_blocks * n_threads); i++) {
        const Fiber &f = fibers[i];
        if (f.state < AT_MBARRIER || f.state == DONE) continue;
        n++;
        if (f.warp == last || at + 1 >= room) continue;
        last = f.warp;
        const Block &b = blocks[(size_t)f.block];
        int k = snprintf(text + at, room - at, "; block %d warp %d: ", f.block, f.warp % n_warps);
        at += (size_t)k < room - at ? (size_t)k : room - at - 1;
        if (f.state == AT_MBARRIER) {
            const Mbarrier &m = b.mbarriers.at(f.waits_for);
            k = snprintf(text + at, room - at, "mbarrier at byte %td, parity %u, lacks %u of %u arrivals, %lld bytes", (const char *)f.waits_for - b.shared, f.parity,
                         m.pending, m.count, (long long)m.bytes);
        } else if (f.state == AT_NAMED) {
            const Named *x = (const Named *)f.waits_for;
            k = snprintf(text + at, room - at, "named barrier %td, %d of %d came", x - b.named, x->arrived, x->count);
        } else if (f.state == AT_CLUSTER) k = snprintf(text + at, room - at, "cluster barrier, %u of %d came", cluster_arrived, n_threads * n_blocks);
        else k = snprintf(text + at, room - at, "wgmma_wait, until all its warpgroup has issued");
        at += (size_t)k < room - at ? (size_t)k : room - at - 1;
    }
    return n;
}

} /* namespace emu */
