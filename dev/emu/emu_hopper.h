/* The twins of llmc/cuda/hopper.cuh. What each does, when, and what is a fault stands in emu_hopper.cpp. */
#ifndef LLMC_EMU_HOPPER_H
#define LLMC_EMU_HOPPER_H
#include "emu.h"

namespace emu {
/* What the twin of a tensor map says. Dimensions and coordinates innermost first; span: bytes within which chunks are exchanged, 16 for none. */
struct TensorBox {
    uint64_t magic;
    char *base;
    uint64_t dim[4], stride[4]; /* elements, bytes */
    uint32_t box[4], span;
    int rank;
};
const uint64_t TENSOR_MAGIC = 0x70616d726f736e65ull;

uint32_t shared_offset(const void *p);
void mbarrier_start(uint64_t *barrier, unsigned count);
void mbarrier_count(uint64_t *barrier, int rank, unsigned bytes); /* rank of the cluster, or -1: this block */
void mbarrier_block(uint64_t *barrier, unsigned parity);
void tensor_load(void *shared, const void *map, uint64_t *barrier, unsigned mask, int rank, const int *at); /* mask of blocks; 0: this one */
void tensor_store(const void *map, const void *shared, int rank, const int *at);
void linear_load(void *shared, const void *global, unsigned bytes, uint64_t *barrier);
void linear_store(void *global, const void *shared, unsigned bytes);
void store_commit();
void store_wait(int open, bool written); /* of all but the `open` newest groups: read, or written too */
void proxy_fence();
/* d: N / 2 registers; a: four registers of A, or NULL for the descriptor. */
void product(float *d, int N, const uint32_t *a, uint64_t desc_a, bool a_mn, uint64_t desc_b, bool b_mn, bool accumulate);
void product_fence();
void product_commit();
void product_wait(int open);
void named_barrier(unsigned id, unsigned threads, bool wait);
void set_registers(int n, bool more);
unsigned rank_in_cluster();
void cluster_signal();
void cluster_await();
char *remote(const char *what, const void *p, unsigned rank, size_t bytes);
void remote_store(float *p, unsigned rank, float x, uint64_t *barrier);
} /* namespace emu */

#ifdef LLMC_NS
namespace LLMC_NS {

static inline uint32_t shared_address(const void *p) { return emu::shared_offset(p); }

static inline void mbarrier_init(uint64_t *barrier, unsigned count) { emu::mbarrier_start(barrier, count); }
static inline void fence_mbarrier_init() {}
static inline void mbarrier_arrive(uint64_t *barrier) { emu::mbarrier_count(barrier, -1, 0); }
static inline void mbarrier_arrive_remote(uint64_t *barrier, unsigned rank) { emu::mbarrier_count(barrier, (int)rank, 0); }
static inline void mbarrier_return_remote(uint64_t *barrier, unsigned rank) { emu::mbarrier_count(barrier, (int)rank, 0); }
static inline void mbarrier_arrive_expect(uint64_t *barrier, unsigned bytes) { emu::mbarrier_count(barrier, -1, bytes); }
static inline void mbarrier_wait(uint64_t *barrier, unsigned parity) { emu::mbarrier_block(barrier, parity); }
static inline void mbarrier_wait_cluster(uint64_t *barrier, unsigned parity) { emu::mbarrier_block(barrier, parity); }

static inline void tma_prefetch(const TensorMap &) {}
template <class... C> static inline void tma_load(void *shared, const TensorMap &map, uint64_t *barrier, C... at) {
    const int c[] = {(int)at...};
    emu::tensor_load(shared, &map, barrier, 0, (int)sizeof...(C), c);
}
template <class... C> static inline void tma_load_multicast(void *shared, const TensorMap &map, uint64_t *barrier, uint16_t mask, C... at) {
    const int c[] = {(int)at...};
    emu::tensor_load(shared, &map, barrier, mask, (int)sizeof...(C), c);
}
template <class... C> static inline void tma_store(const TensorMap &map, const void *shared, C... at) {
    const int c[] = {(int)at...};
    emu::tensor_store(&map, shared, (int)sizeof...(C), c);
}
static inline void bulk_load(void *shared, const void *global, unsigned bytes, uint64_t *barrier) { emu::linear_load(shared, global, bytes, barrier); }
static inline void bulk_store(void *global, const void *shared, unsigned bytes) { emu::linear_store(global, shared, bytes); }
static inline void bulk_commit() { emu::store_commit(); }
template <int N> static inline void bulk_wait_read() { emu::store_wait(N, false); }
template <int N> static inline void bulk_wait() { emu::store_wait(N, true); }
static inline void fence_proxy_async() { emu::proxy_fence(); }

template <Major A, Major B, int R> static inline void wgmma_ss(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) {
    emu::product(d, 2 * R, nullptr, a, A == MN_MAJOR, b, B == MN_MAJOR, accumulate);
}
template <Major B, int R> static inline void wgmma_rs(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    emu::product(d, 2 * R, a, 0, false, b, B == MN_MAJOR, accumulate);
}
template <class... D> static inline void wgmma_fence(D &...) { emu::product_fence(); }
static inline void wgmma_commit() { emu::product_commit(); }
template <int N, class... D> static inline void wgmma_wait(D &...) { emu::product_wait(N); }

template <int N> static inline void registers_more() { emu::set_registers(N, true); }
template <int N> static inline void registers_fewer() { emu::set_registers(N, false); }
static inline void named_sync(unsigned id, unsigned threads) { emu::named_barrier(id, threads, true); }
static inline void named_arrive(unsigned id, unsigned threads) { emu::named_barrier(id, threads, false); }

static inline unsigned cluster_rank() { return emu::rank_in_cluster(); }
static inline void cluster_arrive() { emu::cluster_signal(); }
static inline void cluster_wait() { emu::cluster_await(); }
static inline float cluster_load(const float *p, unsigned rank) { return *(float *)(void *)emu::remote("cluster_load", p, rank, sizeof *p); }
static inline void cluster_store(float *p, unsigned rank, float x) { *(float *)(void *)emu::remote("cluster_store", p, rank, sizeof *p) = x; }
static inline void cluster_store_async(float *p, unsigned rank, float x, uint64_t *barrier) { emu::remote_store(p, rank, x, barrier); }

} /* namespace */
#endif
#endif
