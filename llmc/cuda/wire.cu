/* Gradients on the wire in bf16: rounded before they are sent, summed in float32 where they arrive. In the queue beside the ops. */
#include "backend.cuh"

namespace LLMC_NS {

enum { THREADS = 256, W = 8 /* elements a thread takes at once: 16 bytes of bf16 */, BLOCKS = 132 /* a row; the copies beside leave the SMs to the ops */ };

/* bf16 bits of x, to nearest even; a NaN stays one. */
static __device__ __forceinline__ uint16_t wire_round(float x) {
    __nv_bfloat16 half = __float2bfloat16_rn(x);
    uint16_t bits;
    memcpy(&bits, &half, sizeof bits);
    return bits;
}
static __device__ __forceinline__ float wire_widen(uint16_t bits) { return __uint_as_float((unsigned)bits << 16); }

/* to[r, i] = from[r stride + i] rounded to bf16, for rows r other than own; to (rows, n) bf16 =, from float32 in.
 * Bytes: 6 an element, the floor. Both sides aligned to 16 bytes where n and stride are multiples of 8 (VECTOR), else by elements. */
template <bool VECTOR> __global__ void __launch_bounds__(THREADS) wire_round_kernel(uint16_t *to, const float *from, size_t stride, size_t n, unsigned own) {
    begin_kernel();
    const unsigned row = blockIdx.y;
    if (row == own) return;
    const size_t first = (size_t)blockIdx.x * THREADS + threadIdx.x, step = (size_t)gridDim.x * THREADS;
    to += row * n, from += row * stride;
    enum { N = VECTOR ? W : 1 };
    for (size_t i = first * N; i < n; i += step * N) {
        Piece<uint16_t, N> out;
        float v[N];
        uint16_t bits[N];
        unpack(v, load_piece<N>(from + i));
        for (int k = 0; k < N; k++) bits[k] = wire_round(v[k]);
        memcpy(out.raw, bits, sizeof bits);
        store_piece(to + i, out);
    }
}

/* data[i] = sum over r = 0, 1, ... of what part r has for i: row r of others, and for own data[i] itself rounded to bf16; in float32, in that order, so
 * with the bits of the sockets' communicator. data (n) float32 in and =, others (parts, n) bf16 in, whose row own is not read.
 * Bytes: 8 + 2 (parts - 1) an element, the floor. */
template <bool VECTOR> __global__ void __launch_bounds__(THREADS) wire_sum_kernel(float *data, const uint16_t *others, unsigned parts, unsigned own, size_t n) {
    begin_kernel();
    enum { N = VECTOR ? W : 1 };
    const size_t first = ((size_t)blockIdx.x * THREADS + threadIdx.x) * N, step = (size_t)gridDim.x * THREADS * N;
    for (size_t i = first; i < n; i += step) {
        float mine[N], sum[N];
        unpack(mine, load_piece<N>(data + i));
        for (int k = 0; k < N; k++) sum[k] = -0.0f; /* which keeps all bits of what is added first */
        for (unsigned r = 0; r < parts; r++) {
            uint16_t bits[N] = {};
            if (r != own) {
                Piece<uint16_t, N> x = load_piece<N>(others + r * n + i);
                memcpy(bits, x.raw, sizeof bits);
            }
            for (int k = 0; k < N; k++) sum[k] += wire_widen(r == own ? wire_round(mine[k]) : bits[k]);
        }
        store_piece(data + i, pack<float>(sum));
    }
}

static unsigned blocks_for(size_t n) { return (unsigned)min((size_t)BLOCKS, ceil_div(n, (size_t)THREADS * W)); }

void cuda_side_round(Backend *b, uint16_t *to, const float *from, size_t rows, size_t stride, size_t n, size_t own) {
    CHECK(rows && n && stride >= n && rows < 65536, "%zu rows of %zu, %zu apart", rows, n, stride);
    bool vector = n % W == 0 && stride % W == 0 && (uintptr_t)from % 16 == 0 && (uintptr_t)to % 16 == 0;
    dim3 grid(blocks_for(n), (unsigned)rows);
    if (vector) LAUNCH(wire_round_kernel<true>, grid, dim3(THREADS), 0, cuda_of(b)->side_stream, to, from, stride, n, (unsigned)own);
    else LAUNCH(wire_round_kernel<false>, grid, dim3(THREADS), 0, cuda_of(b)->side_stream, to, from, stride, n, (unsigned)own);
}

void cuda_side_sum(Backend *b, float *data, const uint16_t *others, size_t parts, size_t own, size_t n) {
    CHECK(parts && n && own < parts, "part %zu of %zu, %zu elements", own, parts, n);
    bool vector = n % W == 0 && (uintptr_t)data % 16 == 0 && (uintptr_t)others % 16 == 0;
    if (vector) LAUNCH(wire_sum_kernel<true>, dim3(blocks_for(n)), dim3(THREADS), 0, cuda_of(b)->side_stream, data, others, (unsigned)parts, (unsigned)own, n);
    else LAUNCH(wire_sum_kernel<false>, dim3(blocks_for(n)), dim3(THREADS), 0, cuda_of(b)->side_stream, data, others, (unsigned)parts, (unsigned)own, n);
}

} /* namespace */
