/* For the compiler alone (test_hopper_build.sh): every function of llmc/cuda/hopper.cuh once, and the pipeline of planted/hopper.cuh. */
#include "llmc/cuda/hopper.cuh"
namespace LLMC_NS {
#include "dev/test/planted/hopper.cuh"

/* One product of each form, N = 2 R, results out. */
template <int R> __global__ void __launch_bounds__(128, 1) probe_wgmma_kernel(float *out, const uint32_t *in) {
    DYNAMIC_SHARED(unsigned char, shared);
    const uint64_t k = tile_descriptor<SWIZZLE_128, K_MAJOR>(shared_address(shared), 64), mn = tile_descriptor<SWIZZLE_64, MN_MAJOR>(shared_address(shared), 16);
    const uint32_t a[4] = {in[threadIdx.x], in[128], in[256], in[384]};
    float d[R];
    wgmma_fence(d);
    wgmma_ss<K_MAJOR, K_MAJOR>(d, k, k, false);
    wgmma_ss<MN_MAJOR, K_MAJOR>(d, mn, k, true);
    wgmma_ss<K_MAJOR, MN_MAJOR>(d, k, mn, true);
    wgmma_ss<MN_MAJOR, MN_MAJOR>(d, mn, mn, true);
    wgmma_rs<K_MAJOR>(d, a, k, true);
    wgmma_rs<MN_MAJOR>(d, a, mn, true);
    wgmma_commit();
    wgmma_wait<0>(d);
    UNROLL for (int i = 0; i < R; i++) out[threadIdx.x * R + i] = d[i];
}
__global__ void probe_kernel(float *out, const float *in, const __grid_constant__ TensorMap two, const __grid_constant__ TensorMap three,
                             const __grid_constant__ TensorMap four) {
    DYNAMIC_SHARED(float, shared);
    uint64_t *barrier = (uint64_t *)(void *)(shared + 4096);
    if (threadIdx.x == 0) {
        tma_prefetch(two);
        mbarrier_init(barrier, 1);
        fence_mbarrier_init();
    }
    cluster_arrive(), cluster_wait();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(barrier, 4);
        tma_load(shared, two, barrier, 1, 2), tma_load(shared, three, barrier, 1, 2, 3), tma_load(shared, four, barrier, 1, 2, 3, 4);
        tma_load_multicast(shared, two, barrier, 3, 1, 2), tma_load_multicast(shared, three, barrier, 3, 1, 2, 3), tma_load_multicast(shared, four, barrier, 3, 1, 2, 3, 4);
        bulk_load(shared, in, 64, barrier);
        cluster_store_async(shared, 1, 2.0f, barrier);
        mbarrier_arrive(barrier), mbarrier_arrive_remote(barrier, 1), mbarrier_return_remote(barrier, 1);
    }
    mbarrier_wait(barrier, 0), mbarrier_wait_cluster(barrier, 1);
    if (threadIdx.x < 32) named_arrive(3, 64);
    else named_sync(3, 64);
    cluster_store(shared, 0, cluster_load(shared + 1, cluster_rank()));
    fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        tma_store(two, shared, 1, 2), tma_store(three, shared, 1, 2, 3), tma_store(four, shared, 1, 2, 3, 4);
        bulk_store(out, shared, 64);
        bulk_commit(), bulk_wait_read<0>(), bulk_wait<0>();
    }
}

#define PROBE(N) (const void *)probe_wgmma_kernel<N / 2>
extern const void *const probes[];
const void *const probes[] = {PROBE(8), PROBE(16), PROBE(24), PROBE(32), PROBE(64), PROBE(96), PROBE(128), PROBE(160), PROBE(192), PROBE(256), (const void *)probe_kernel,
                              (const void *)hopper::cluster_sum_kernel<hopper::NONE>};
void probe_launches(cudaStream_t stream, TensorMap map);
void probe_launches(cudaStream_t stream, TensorMap map) {
    LAUNCH_HOPPER((hopper::gemm_kernel<hopper::NONE, 1>), 1, dim3(2), dim3(384), hopper::GEMM_SHARED, stream, map, map, map, 4);
    LAUNCH_HOPPER((hopper::gemm_kernel<hopper::NONE, 2>), 2, dim3(2), dim3(384), hopper::GEMM_SHARED, stream, map, map, map, 4);
}

} /* namespace */
