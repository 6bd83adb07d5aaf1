/* The emulator's own tests: what its instructions, collectives, runtime library and schedules do, against the manuals. What it catches is
 * the subject of test_planted. Plain C takes this file too, where there is no C++ compiler. */
#include "dev/test/emu_kit.h"
#ifdef LLMC_EMU
#include "llmc/base/rng.h"
#include <time.h>

namespace LLMC_NS {

/* ---- mma and ldmatrix -------------------------------------------------------------------------------------------------- */
enum { ROW = 64 }; /* elements of a shared row: 8 chunks of 16 bytes, chunk c of row r at place c ^ (r % 8) */
__device__ static elem *swizzled(elem *tile, int row, int col) { return tile + row * ROW + ((col / 8) ^ (row % 8)) * 8 + col % 8; }

/* C (16 x 16) = A (16 x 16, rows of k) B; B is stored (k, n) or, B_BY_N, (n, k). One warp. */
template <bool B_BY_N> __global__ void product_kernel(float *c, const elem *a, const elem *b) {
    DYNAMIC_SHARED(elem, shared);
    elem *sa = shared, *sb = shared + 16 * ROW;
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    const int row = lane % 8 + lane / 8 % 2 * 8, col = lane / 16 * 8;
    for (int i = lane; i < 256; i += 32) *swizzled(sa, i / 16, i % 16) = a[i], *swizzled(sb, i / 16, i % 16) = b[i];
    __syncthreads();
    uint32_t fa[4], fb[4];
    ldmatrix_x4(fa, swizzled(sa, row, col)); /* matrices: (rows 0-7, k 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15): a[0..3] */
    if (B_BY_N) ldmatrix_x4(fb, swizzled(sb, lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8)); /* (n 0-7, k 0-7), (n 0-7, k 8-15), then n 8-15 */
    else ldmatrix_x4_trans(fb, swizzled(sb, row, col)); /* (k 0-7, n 0-7), (k 8-15, n 0-7), then n 8-15 */
    for (int half = 0; half < 2; half++) {
        const uint32_t b2[2] = {fb[2 * half], fb[2 * half + 1]};
        float d[4] = {1, 1, 1, 1};
        mma_m16n8k16(d, fa, b2, d);
        for (int i = 0; i < 4; i++) c[(g + i / 2 * 8) * 16 + half * 8 + 2 * t + i % 2] = d[i];
    }
}

/* Whole numbers, so that every order of summation gives the same bits. */
template <bool B_BY_N> static void check_product(uint32_t seed) {
    Device<elem> a(256), b(256);
    Device<float> c(256);
    for (int i = 0; i < 256; i++) {
        a[i] = to_elem((float)(rng_u32(seed, 0, 0, (uint64_t)i) % 17) - 8);
        b[i] = to_elem((float)(rng_u32(seed, 1, 0, (uint64_t)i) % 17) - 8);
    }
    run((size_t)(2 * 16 * ROW) * sizeof(elem), 1, 32, product_kernel<B_BY_N>, c.p, a.p, b.p);
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) {
            float want = 1;
            for (int k = 0; k < 16; k++) want += to_float(a[m * 16 + k]) * to_float(B_BY_N ? b[n * 16 + k] : b[k * 16 + n]);
            EXPECT(c[m * 16 + n] == want, "C[%d,%d] %g, want %g", m, n, (double)c[m * 16 + n], (double)want);
        }
}
TEST(mma_of_ldmatrix_fragments_is_the_product) {
    for (uint32_t seed = 0; seed < 5; seed++) check_product<false>(seed), check_product<true>(seed);
}

template <bool TRANS> __global__ void ldmatrix_kernel(uint32_t *out, const elem *in) {
    DYNAMIC_SHARED(elem, shared);
    for (int i = threadIdx.x; i < 256; i += 32) shared[i] = in[i];
    __syncthreads();
    uint32_t r[4];
    TRANS ? ldmatrix_x4_trans(r, shared + 8 * threadIdx.x) : ldmatrix_x4(r, shared + 8 * threadIdx.x);
    for (int j = 0; j < 4; j++) out[4 * threadIdx.x + j] = r[j];
}
/* The manual's picture: lane 4 g + t holds, of each 8 x 8 matrix, row g, elements 2 t and 2 t + 1; transposed, column g. */
template <bool TRANS> static void check_ldmatrix() {
    Device<elem> in(256);
    Device<uint32_t> out(128);
    for (int i = 0; i < 256; i++) in[i].bits = (uint16_t)(i / 64 << 8 | i / 8 % 8 << 4 | i % 8); /* matrix, row, column: its digits in hexadecimal */
    run(256 * sizeof(elem), 1, 32, ldmatrix_kernel<TRANS>, out.p, in.p);
    for (unsigned lane = 0; lane < 32; lane++)
        for (unsigned j = 0; j < 4; j++) {
            unsigned g = lane / 4, t = 2 * (lane % 4);
            unsigned low = j << 8 | (TRANS ? t << 4 | g : g << 4 | t), high = j << 8 | (TRANS ? (t + 1) << 4 | g : g << 4 | (t + 1));
            EXPECT(out[4 * lane + j] == (low | high << 16), "lane %u r[%u] %08x", lane, j, out[4 * lane + j]);
        }
}
TEST(ldmatrix_by_the_manual) { check_ldmatrix<false>(), check_ldmatrix<true>(); }

/* ---- cp.async ------------------------------------------------------------------------------------------------------------ */
__global__ void copy_kernel(uint32_t *seen, const uint32_t *in) {
    DYNAMIC_SHARED(uint32_t, shared);
    auto look = [&](int when) { for (int i = 0; i < 3; i++) seen[when * 3 + i] = shared[4 * i]; };
    cp_async_16(shared, in);
    cp_async_commit();
    cp_async_16(shared + 4, in + 4);
    cp_async_16(shared + 8, in + 8, false);
    look(0);                  /* the second group is not committed: no wait covers it */
    cp_async_wait<0>();
    look(1);
    cp_async_commit();
    cp_async_wait<1>();
    look(2);
    cp_async_wait<0>();
    look(3);
}
TEST(cp_async_arrives_when_waited_for) {
    Device<uint32_t> in(12), seen(12);
    for (int i = 0; i < 12; i++) in[i] = 100 + (unsigned)i;
    const uint32_t none = 0xffffffffu, late[12] = {none, none, none, 100, none, none, 100, none, none, 100, 104, 0};
    run(48, 1, 1, copy_kernel, seen.p, in.p);
    for (int i = 0; i < 12; i++) EXPECT(seen[i] == late[i], "seen[%d] %u", i, seen[i]);
    emu::schedule.early = true;
    run(48, 1, 1, copy_kernel, seen.p, in.p);
    emu::schedule.early = false;
    for (int i = 0; i < 12; i++) EXPECT(seen[i] == late[9 + i % 3], "early: seen[%d] %u", i, seen[i]);
}

__global__ void bad_access_kernel(const char *in, int which) {
    DYNAMIC_SHARED(char, shared);
    uint32_t r[4];
    if (which == 0) cp_async_16(shared, in + 4);
    if (which == 1) cp_async_16(shared + 8, in);
    if (which == 2) cp_async_16(shared + 1024, in);
    if (which == 3) cp_async_16((void *)in, in);
    if (which == 4) ldmatrix_x4(r, shared + 2);
    if (which == 5) ldmatrix_x4(r, shared + 1016);
    if (which == 6) load_streaming(in + 8);
    if (which == 7) store_streaming(shared + 8, uint4{0, 0, 0, 0});
    if (which == 8) __syncwarp(0xffffu);
    if (which == 9) __shfl_xor_sync(0x0fffffffu, 1.0f, 1);
}
TEST(bad_accesses_and_masks_are_faults) {
    const char *const expected[] = {"cp.async: global side: address", "cp.async: shared address is not aligned", "cp.async: address is 1024 bytes into",
                                    "cp.async: address is", "ldmatrix: shared address is not aligned", "ldmatrix: address is 1016 bytes into",
                                    "load_streaming: address", "store_streaming: address", "mask 0x0000ffff", "mask 0x0fffffff"};
    Device<char> in(64);
    for (int i = 0; i < 10; i++) {
        run(1024, 1, 32, bad_access_kernel, (const char *)in.p, i);
        EXPECT(faults.n == 1 && strstr(faults.text, expected[i]) && strstr(faults.text, test_name), "%d: %d faults: %s", i, faults.n, faults.text);
    }
}

/* ---- collectives ----------------------------------------------------------------------------------------------------------- */
__global__ void shuffle_kernel(int *out) {
    const int lane = threadIdx.x % 32, x = 10 * lane;
    int values[6] = {__shfl_sync(FULL_MASK, x, 5), __shfl_xor_sync(FULL_MASK, x, 3), __shfl_down_sync(FULL_MASK, x, 4), __shfl_up_sync(FULL_MASK, x, 4),
                     (int)__ballot_sync(FULL_MASK, lane % 3 == 0), __shfl_sync(FULL_MASK, x, lane + 33)};
    int all = __all_sync(FULL_MASK, lane < 32) + 2 * __all_sync(FULL_MASK, lane < 31);
    all += 4 * __any_sync(FULL_MASK, lane == 7) + 8 * __any_sync(FULL_MASK, 0);
    for (int i = 0; i < 6; i++) out[threadIdx.x * 7 + i] = values[i];
    out[threadIdx.x * 7 + 6] = all;
}
TEST(shuffles_and_votes) {
    Device<int> out(64 * 7);
    run(0, 1, 64, shuffle_kernel, out.p);
    for (int i = 0; i < 64; i++) {
        int lane = i % 32, ballot = 0, *o = &out[i * 7];
        for (int k = 0; k < 32; k += 3) ballot |= 1 << k;
        EXPECT(o[0] == 50 && o[1] == 10 * (lane ^ 3) && o[2] == 10 * (lane < 28 ? lane + 4 : lane) && o[3] == 10 * (lane < 4 ? lane : lane - 4),
               "thread %d: %d %d %d %d", i, o[0], o[1], o[2], o[3]);
        EXPECT(o[4] == ballot && o[5] == 10 * ((lane + 1) % 32) && o[6] == 5, "thread %d: %x %d %d", i, o[4], o[5], o[6]);
    }
}

__global__ void sums_kernel(float *out, const float *x, double *wide) {
    DYNAMIC_SHARED(char, shared);
    float v = x[threadIdx.x], total = block_sum(v, (float *)shared), again = block_sum(2 * v, (float *)shared);
    double d = block_sum((double)v, (double *)shared);
    float *o = out + 4 * threadIdx.x;
    o[0] = warp_sum(v), o[1] = warp_max(v), o[2] = total, o[3] = again;
    wide[threadIdx.x] = d;
}
TEST(warp_and_block_sums) {
    Device<float> x(160), out(640);
    Device<double> wide(160);
    double sum = 0;
    for (int i = 0; i < 160; i++) sum += x[i] = (float)(rng_u32(1, 0, 0, (uint64_t)i) % 1000) - 700;
    run(256, 1, 160, sums_kernel, out.p, (const float *)x.p, wide.p);
    for (int i = 0; i < 160; i++) {
        float warp = 0, largest = -INFINITY;
        for (int k = i / 32 * 32; k < i / 32 * 32 + 32; k++) warp += x[k], largest = fmaxf(largest, x[k]);
        EXPECT(out[4 * i] == warp && out[4 * i + 1] == largest, "thread %d: %g %g", i, (double)out[4 * i], (double)out[4 * i + 1]);
        EXPECT(out[4 * i + 2] == sum && out[4 * i + 3] == 2 * sum && wide[i] == sum, "thread %d: %g %g %g", i, (double)out[4 * i + 2],
               (double)out[4 * i + 3], wide[i]);
    }
}

template <class T> __global__ void vec_kernel(T *out, const T *in) {
    Vec<T> v = load_vec(in + threadIdx.x * Vec<T>::N);
    store_vec(out + threadIdx.x * Vec<T>::N, v);
}
TEST(vectors_are_sixteen_bytes) {
    Device<elem> in(256), out(256);
    Device<float> fin(128), fout(128);
    for (int i = 0; i < 256; i++) in[i].bits = (uint16_t)i;
    for (int i = 0; i < 128; i++) fin[i] = (float)i;
    run(0, 1, 32, vec_kernel<elem>, out.p, (const elem *)in.p);
    run(0, 1, 32, vec_kernel<float>, fout.p, (const float *)fin.p);
    EXPECT(sizeof(Vec<elem>) == 16 && Vec<elem>::N == 8 && Vec<float>::N == 4 && Vec<double>::N == 2);
    EXPECT(!memcmp(in.p, out.p, 512) && !memcmp(fin.p, fout.p, 512), "content");
}

__global__ void index_kernel(unsigned *out) {
    unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    unsigned digits = blockIdx.z << 24 | blockIdx.y << 20 | blockIdx.x << 16 | threadIdx.z << 8 | threadIdx.y << 4 | threadIdx.x;
    alignas(16) volatile float local[4] = {0, 0, 0, 0};
    out[block * blockDim.x * blockDim.y * blockDim.z + thread] = (uintptr_t)local % 16 ? 0 : digits;
}
TEST(indices_of_threads_and_blocks) {
    Device<unsigned> out(30 * 24);
    launch_named("index_kernel", index_kernel, 0, dim3(2, 3, 5), dim3(4, 3, 2), 0, stream, out.p);
    cudaStreamSynchronize(stream);
    for (unsigned i = 0; i < 30 * 24; i++) {
        unsigned t = i % 24, b = i / 24;
        EXPECT(out[i] == (b / 6 << 24 | b / 2 % 3 << 20 | b % 2 << 16 | t / 12 << 8 | t / 4 % 3 << 4 | t % 4), "%u: %x", i, out[i]);
    }
}

/* ---- poison ------------------------------------------------------------------------------------------------------------------- */
__global__ void poison_kernel(int *bad, const float *global) {
    DYNAMIC_SHARED(float, shared);
    for (unsigned i = threadIdx.x; i < 1000; i += blockDim.x) {
        if (!isnan(shared[i]) || !isnan(to_float(((elem *)shared)[2 * i]))) *bad = 1;
        if (!isnan(global[i])) *bad = 2;
        shared[i] = 0;        /* the next block must not see it */
    }
}
TEST(new_memory_is_nan) {
    Device<float> fresh(1000);
    Device<int> bad(1);
    void *pinned = NULL;
    bad[0] = 0;
    run(4000, 3, 64, poison_kernel, bad.p, (const float *)fresh.p);
    EXPECT(bad[0] == 0, "%d", bad[0]);
    EXPECT(cudaMallocHost(&pinned, 100) == cudaSuccess && isnan(*(float *)pinned), "pinned");
    cudaFreeHost(pinned);
}

/* ---- bf16 --------------------------------------------------------------------------------------------------------------------- */
static float float_of(uint32_t bits) { return __uint_as_float(bits); }
static uint16_t nearest(uint32_t bits) { return __float2bfloat16_rn(float_of(bits)).bits; }
/* All 2^16 values; the ties between neighbours, and the floats beside the ties; against the definition, in double. */
TEST(bf16_rounds_to_nearest_even) {
    for (uint32_t i = 0; i < 65536; i++) {
        elem x = {(uint16_t)i};
        float f = __bfloat162float(x);
        if (isnan(f)) { EXPECT(isnan(__bfloat162float(__float2bfloat16_rn(f))), "%04x", i); continue; }
        EXPECT(__float2bfloat16_rn(f).bits == i, "%04x", i);
        if (isinf(f)) continue;
        uint32_t tie = i << 16 | 0x8000u, away = i + 1, even = i & 1 ? away : i; /* the next is infinity after the largest finite one */
        double middle = ((double)f + ((i & 0x7fff) == 0x7f7f ? copysign(0x1p128, (double)f) : (double)__bfloat162float({(uint16_t)away}))) / 2;
        EXPECT((double)float_of(tie) == middle && nearest(tie) == even, "tie after %04x: %04x", i, nearest(tie));
        EXPECT(nearest(tie - 1) == i && nearest(tie + 1) == away, "beside the tie after %04x", i);
        EXPECT(pack_bf16(float_of(tie), f) == (even | i << 16), "pair %04x", i);
    }
    EXPECT(nearest(0x7f800000u) == 0x7f80 && nearest(0xff800000u) == 0xff80 && nearest(0x7f7fffffu) == 0x7f80, "infinity, and the largest float");
    for (uint32_t low = 1; low < 0x10000; low += 0x101) /* payloads that truncation would turn into infinity */
        EXPECT(isnan(__bfloat162float({nearest(0x7f800000u | low)})) && isnan(__bfloat162float({nearest(0xff800000u | low)})), "NaN of %x", low);
    EXPECT(exp2_fast(-INFINITY) == 0 && exp2_fast(0) == 1 && exp2_fast(-126.5f) == 0 && exp2_fast(-126) == 0x1p-126f && isnan(exp2_fast(NAN)));
}

/* ---- streams, events, graphs ------------------------------------------------------------------------------------------------------ */
__global__ void add_kernel(int *to, const int *from, int n) {
    if ((int)threadIdx.x < n) to[threadIdx.x] += from[threadIdx.x];
}
TEST(work_runs_when_it_is_waited_for) {
    Device<int> a(4), b(4);
    int *pinned, plain = 7;
    EXPECT(cudaMallocHost((void **)&pinned, 8) == cudaSuccess);
    pinned[0] = 1;
    cudaMemsetAsync(a.p, 0, 16, stream);
    cudaMemcpyAsync(a.p, pinned, 4, cudaMemcpyHostToDevice, stream);
    cudaMemcpyAsync(a.p + 1, &plain, 4, cudaMemcpyHostToDevice, stream);
    cudaMemcpyAsync(pinned + 1, a.p, 4, cudaMemcpyDeviceToHost, stream);
    EXPECT(a[0] == -1 && a[1] == -1, "ran at once: %d %d", a[0], a[1]);
    pinned[0] = 2, plain = 8, pinned[1] = 0;
    cudaStreamSynchronize(stream);
    EXPECT(a[0] == 2 && a[1] == 7 && pinned[1] == 2, "a pinned buffer is read late, another at once: %d %d %d", a[0], a[1], pinned[1]);
    EXPECT(cudaMemcpyAsync(a.p + 2, &plain, 12, cudaMemcpyHostToDevice, stream) == cudaErrorInvalidValue, "beyond the allocation");
    EXPECT(cudaMemcpyAsync(&plain, pinned, 4, cudaMemcpyDeviceToHost, stream) == cudaErrorInvalidValue, "from no device memory");
    EXPECT(cudaMemsetAsync(pinned, 0, 4, stream) == cudaErrorInvalidValue, "of no device memory");
    cudaFreeHost(pinned);
}

TEST(events_order_two_streams) {
    Device<int> a(1), one(1);
    cudaStream_t other;
    cudaEvent_t event;
    cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking);
    cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    a[0] = 5, one[0] = 1;
    EXPECT(cudaStreamWaitEvent(stream, event) == cudaSuccess && cudaEventSynchronize(event) == cudaSuccess, "an event never recorded");
    cudaMemsetAsync(a.p, 0, 4, other);
    cudaEventRecord(event, other);
    cudaMemsetAsync(one.p, 1, 4, other); /* behind the event: not waited for */
    cudaStreamWaitEvent(stream, event);
    launch_named("add_kernel", add_kernel, 0, dim3(1), dim3(1), 0, stream, a.p, (const int *)one.p, 1);
    cudaStreamSynchronize(stream);
    EXPECT(a[0] == 1 && one[0] == 1, "%d %x", a[0], one[0]);
    cudaEventRecord(event, stream);
    cudaMemsetAsync(a.p, 0, 4, stream);
    cudaEventSynchronize(event);
    EXPECT(a[0] == 1, "waited for more than the event");
    cudaDeviceSynchronize();
    EXPECT(a[0] == 0 && one[0] == 0x01010101, "%d %x", a[0], one[0]);
    cudaEventDestroy(event);
    cudaStreamDestroy(other);
}

TEST(graphs_record_and_replay) {
    Device<int> sum(2), one(2);
    int *pinned;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaMallocHost((void **)&pinned, 4);
    sum[0] = sum[1] = 0, one[0] = 1, one[1] = 10;
    EXPECT(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess);
    launch_named("add_kernel", add_kernel, 0, dim3(1), dim3(32), 0, stream, sum.p, (const int *)one.p, 2);
    cudaMemcpyAsync(pinned, sum.p, 4, cudaMemcpyDeviceToHost, stream);
    cudaMemsetAsync(sum.p + 1, 0, 4, stream);
    EXPECT(cudaStreamEndCapture(stream, &graph) == cudaSuccess && cudaGraphInstantiate(&exec, graph) == cudaSuccess);
    cudaGraphDestroy(graph);
    cudaStreamSynchronize(stream);
    EXPECT(sum[0] == 0, "ran while it was captured");
    for (int i = 1; i < 4; i++) {
        EXPECT(cudaGraphLaunch(exec, stream) == cudaSuccess);
        cudaStreamSynchronize(stream);
        EXPECT(sum[0] == i && sum[1] == 0 && *pinned == i, "replay %d: %d %d %d", i, sum[0], sum[1], *pinned);
    }
    cudaGraphExecDestroy(exec);
    cudaFreeHost(pinned);
}

TEST(a_capture_refuses_what_cuda_refuses) {
    Device<int> a(1);
    int host = 0;
    void *p = NULL;
    cudaGraph_t graph;
    cudaEvent_t event;
    cudaEventCreateWithFlags(&event, 0);
    cudaEventRecord(event, stream);
    for (int i = 0; i < 9; i++) {
        cudaError_t status = cudaSuccess;
        cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
        if (i == 0) status = cudaMalloc(&p, 4);
        if (i == 1) status = cudaFree(a.p);
        if (i == 2) status = cudaStreamSynchronize(stream);
        if (i == 3) status = cudaDeviceSynchronize();
        if (i == 4) status = cudaEventSynchronize(event);
        if (i == 5) status = cudaMemcpyAsync(&host, a.p, 4, cudaMemcpyDeviceToHost, stream); /* not pinned: it would wait */
        if (i == 6) status = cudaMemcpyAsync(a.p, &host, 4, cudaMemcpyHostToDevice, stream);
        if (i == 7) status = cudaMallocHost(&p, 4);
        if (i == 8) status = cudaStreamWaitEvent(stream, event);
        EXPECT(status == cudaErrorStreamCaptureUnsupported && strstr(cudaGetErrorString(status), "captured"), "%d: %d", i, (int)status);
        EXPECT(cudaStreamEndCapture(stream, &graph) == cudaErrorStreamCaptureInvalidated && !graph, "%d: the capture goes on", i);
    }
    EXPECT(cudaStreamEndCapture(stream, &graph) == cudaErrorInvalidValue, "an end without a begin");
    cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
    EXPECT(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) == cudaErrorStreamCaptureUnsupported, "a capture in a capture");
    EXPECT(cudaStreamEndCapture(stream, &graph) == cudaSuccess, "a clean one after broken ones");
    cudaGraphDestroy(graph);
    cudaEventDestroy(event);
}

TEST(memory_is_counted_and_limited) {
    size_t before, free_bytes, total;
    void *p, *q;
    cudaMemGetInfo(&before, &total);
    EXPECT(cudaMalloc(&p, 1000) == cudaSuccess && (uintptr_t)p % 256 == 0, "%p", p);
    cudaMemGetInfo(&free_bytes, &total);
    EXPECT(before - free_bytes == 1000, "%zu", before - free_bytes);
    EXPECT(cudaMalloc(&q, free_bytes + 1) == cudaErrorMemoryAllocation && cudaMalloc(&q, SIZE_MAX) == cudaErrorMemoryAllocation);
    EXPECT(cudaFree(p) == cudaSuccess && cudaFree(NULL) == cudaSuccess && cudaFree(&before) == cudaErrorInvalidValue);
}

/* ---- limits, faults, schedules ------------------------------------------------------------------------------------------------------- */
__global__ void nothing_kernel() {}
TEST(launches_beyond_hardware_are_faults) {
    const struct { dim3 grid, block; size_t shared; const char *text; } bad[] = {
        {dim3(1), dim3(1025), 0, "1025x1x1 threads"}, {dim3(1), dim3(0), 0, "0x1x1 threads"}, {dim3(1), dim3(2, 2, 65), 0, "2x2x65 threads"},
        {dim3(1), dim3(32, 33), 0, "32x33x1 threads"}, {dim3(0), dim3(1), 0, "0x1x1 blocks"}, {dim3(1, 65536), dim3(1), 0, "1x65536x1 blocks"},
        {dim3(1, 1, 65536), dim3(1), 0, "1x1x65536 blocks"}, {dim3(0x80000000u), dim3(1), 0, "2147483648x1x1 blocks"},
        {dim3(1), dim3(1), 100 * 1024, "102400 bytes"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        uint64_t before = launches();
        faults.n = 0;
        LAUNCH(nothing_kernel, bad[i].grid, bad[i].block, bad[i].shared, stream);
        cudaStreamSynchronize(stream);
        EXPECT(faults.n == 1 && strstr(faults.text, bad[i].text) && strstr(faults.text, "nothing_kernel") && launches() == before, "%zu: %d faults: %s", i,
               faults.n, faults.text);
    }
    faults.n = 0;
    LAUNCH(nothing_kernel, dim3(2, 65535), dim3(1), 0, stream);
    LAUNCH(nothing_kernel, dim3(1), dim3(4, 4, 64), 99 * 1024, stream);
    cudaStreamSynchronize(stream);
    EXPECT(faults.n == 0, "%s", faults.text);
}

__global__ void sometimes_faulty_kernel(int *out, int faulty) {
    volatile char frame[300]; /* what AddressSanitizer poisons the neighbourhood of */
    for (int i = 0; i < 300; i++) frame[i] = (char)i;
    __syncthreads();
    __syncwarp();
    if ((int)threadIdx.x == faulty) __syncthreads();
    __syncwarp();
    __syncthreads();
    out[threadIdx.x] = frame[threadIdx.x];
}
TEST(after_a_fault_the_next_launch_is_whole) {
    Device<int> out(96);
    for (int i = 0; i < 60; i++) {
        memset(out.p, 0, 96 * 4);
        run(64, 4, 96, sometimes_faulty_kernel, out.p, i % 3 ? -1 : i);
        EXPECT(faults.n == (i % 3 == 0), "launch %d: %d faults", i, faults.n);
        for (int k = 0; k < 96 && i % 3; k++) EXPECT(out[k] == k, "launch %d: out[%d] = %d", i, k, out[k]);
    }
}

__global__ void begins_kernel(int where) { /* 0: first of all, 1: after a barrier, 2: after a meeting of the warp, 3: never, 4: twice */
    if (where == 0 || where == 4) begin_kernel();
    if (where == 4) begin_kernel();
    __syncthreads();
    if (where == 1) begin_kernel();
    warp_sum(1);
    if (where == 2) begin_kernel();
}
TEST(kernels_begin_with_begin_kernel) {
    const char *const expected[] = {NULL, "__syncthreads before", "__syncthreads before", "__syncthreads before", "a second time"};
    emu::must_begin = true;
    for (int where = 0; where < 5; where++) {
        run(0, 1, 32, begins_kernel, where);
        EXPECT(expected[where] ? faults.n && strstr(faults.text, expected[where]) : !faults.n, "%d: %s", where, faults.text);
    }
    emu::must_begin = false;
}

enum { STEPS = 3 };
__global__ void turns_kernel(int *turns, int *count) {
    for (int i = 0; i < STEPS; i++) {
        if (threadIdx.x % 32 == 0) turns[atomicAdd(count, 1)] = (int)(100 * blockIdx.x + threadIdx.x / 32);
        __syncwarp();
    }
}
TEST(schedules_change_the_order) {
    const struct { const char *schedule; int turns[2 * 3 * STEPS]; } rows[] = {
        {"ascending", {0, 0, 0, 1, 1, 1, 2, 2, 2, 100, 100, 100, 101, 101, 101, 102, 102, 102}},
        {"reversed", {102, 102, 102, 101, 101, 101, 100, 100, 100, 2, 2, 2, 1, 1, 1, 0, 0, 0}},
        {"ahead:1", {1, 1, 1, 0, 0, 0, 2, 2, 2, 101, 101, 101, 100, 100, 100, 102, 102, 102}},
        {"behind:3,apart", {1, 1, 1, 2, 2, 2, 0, 0, 0, 101, 101, 101, 102, 102, 102, 100, 100, 100}},
        {"in-turn", {0, 1, 2, 0, 1, 2, 0, 1, 2, 100, 101, 102, 100, 101, 102, 100, 101, 102}}};
    Device<int> turns(2 * 3 * STEPS), count(1);
    for (size_t r = 0; r < sizeof rows / sizeof *rows; r++) {
        EXPECT(schedule_parse(rows[r].schedule, &emu::schedule), "%s", rows[r].schedule);
        count[0] = 0;
        run(0, 2, 96, turns_kernel, turns.p, count.p);
        for (int i = 0; i < 2 * 3 * STEPS; i++) EXPECT(turns[i] == rows[r].turns[i], "%s: turn %d is %d's", rows[r].schedule, i, turns[i]);
    }
    emu::schedule = Schedule{ASCENDING, 0, false, false, false};
    for (const char *bad : {"up", "ahead", "ahead:", "ahead:x", "behind:-1", "reversed;early"}) {
        Schedule s;
        EXPECT(!schedule_parse(bad, &s), "%s is understood", bad);
    }
}

__global__ void blocks_kernel(float *out, int *count, int race) {
    if (threadIdx.x == 0) {
        int ticket = atomicAdd(count, 1);
        out[8 + ticket] = (float)blockIdx.x;
        if (race) out[0] += (float)(1 + blockIdx.x); /* two blocks add to one place */
        else out[blockIdx.x] = blockIdx.x > 0 && !isnan(out[blockIdx.x - 1]) ? 7 : 1; /* what the block before it wrote is not to be seen */
    }
}
TEST(blocks_apart_see_nothing_of_each_other) {
    Device<float> out(16);
    Device<int> count(1);
    for (int apart = 0; apart < 2; apart++)
        for (int race = 0; race < 2; race++) {
            emu::schedule.apart = apart;
            memset(out.p, 0xff, 64);
            count[0] = 0;
            if (race) out[0] = 0;
            run(0, 4, 32, blocks_kernel, out.p, count.p, race);
            if (apart && race) EXPECT(faults.n == 1 && strstr(faults.text, "another block"), "%s", faults.text);
            else EXPECT(faults.n == 0 && count[0] == 4 && out[11] == 3 && out[race ? 0 : 3] == (race ? 10 : apart ? 1 : 7), "%g %g", (double)out[0],
                        (double)out[3]);
        }
    emu::schedule.apart = false;
}

/* ---- speed: reported, not tested ------------------------------------------------------------------------------------------------------ */
__global__ void shuffles_kernel(float *out) {
    float x = 1;
    for (int i = 0; i < 1000; i++) x += __shfl_xor_sync(FULL_MASK, x, 1);
    if (x < 0) *out = x;
}
__global__ void plain_kernel(float *out, int n) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) out[i] = (float)i;
}
static double cpu_seconds() {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
TEST(speed) {
    Device<float> out(100000);
    double start = cpu_seconds();
    uint64_t before = switches();
    run(0, 20, 256, shuffles_kernel, out.p);
    double middle = cpu_seconds();
    uint64_t turns = switches() - before;
    run(0, 391, 256, plain_kernel, out.p, 100000);
    printf("speed: %.1f million turns of threads a second of CPU; a thread without collectives takes %.0f ns\n",
           (double)turns / (middle - start) * 1e-6, (cpu_seconds() - middle) / (391 * 256) * 1e9);
    EXPECT(turns >= 20 * 256 * 900 && out[99999] == 99999);
}

static void run_all() {
    RUN(mma_of_ldmatrix_fragments_is_the_product);
    RUN(ldmatrix_by_the_manual);
    RUN(cp_async_arrives_when_waited_for);
    RUN(bad_accesses_and_masks_are_faults);
    RUN(shuffles_and_votes);
    RUN(warp_and_block_sums);
    RUN(vectors_are_sixteen_bytes);
    RUN(indices_of_threads_and_blocks);
    RUN(new_memory_is_nan);
    RUN(bf16_rounds_to_nearest_even);
    RUN(work_runs_when_it_is_waited_for);
    RUN(events_order_two_streams);
    RUN(graphs_record_and_replay);
    RUN(a_capture_refuses_what_cuda_refuses);
    RUN(memory_is_counted_and_limited);
    RUN(launches_beyond_hardware_are_faults);
    RUN(after_a_fault_the_next_launch_is_whole);
    RUN(kernels_begin_with_begin_kernel);
    RUN(schedules_change_the_order);
    RUN(blocks_apart_see_nothing_of_each_other);
    RUN(speed);
}

} /* namespace */
#endif
