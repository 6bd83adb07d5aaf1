/* Counter-based random numbers: a value is a function of (seed, stream, step, index) and of nothing else, so it
 * does not depend on who computes it or in which order. Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers:
 * As Easy as 1, 2, 3"); header only, so that a GPU kernel computes the same bits. */
#ifndef LLMC_BASE_RNG_H
#define LLMC_BASE_RNG_H
#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define RNG_FN static __host__ __device__ inline
#else
#define RNG_FN static inline
#endif

/* Streams keep uses of one seed apart. A parameter tensor t initialises from RNG_INIT + t. */
enum { RNG_INIT = 0x1000, RNG_DATA = 0x2000, RNG_SAMPLE = 0x3000, RNG_ROUND = 0x4000, RNG_STORY = 0x5000 };

typedef struct {
    uint32_t v[4];
} Rng4;

/* 128 random bits for counter (index, step) under key (seed, mixed with stream). */
RNG_FN Rng4 rng4(uint64_t seed, uint32_t stream, uint32_t step, uint64_t index) {
    uint32_t c0 = (uint32_t)index, c1 = (uint32_t)(index >> 32), c2 = step, c3 = stream;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        uint32_t h0 = (uint32_t)(p0 >> 32), l0 = (uint32_t)p0, h1 = (uint32_t)(p1 >> 32), l1 = (uint32_t)p1;
        c0 = h1 ^ c1 ^ k0; c1 = l1; c2 = h0 ^ c3 ^ k1; c3 = l0;
        k0 += 0x9E3779B9u; k1 += 0xBB67AE85u;
    }
    Rng4 r = {{c0, c1, c2, c3}};
    return r;
}

RNG_FN uint32_t rng_u32(uint64_t seed, uint32_t stream, uint32_t step, uint64_t index) {
    return rng4(seed, stream, step, index).v[0];
}

/* Uniform in [0, 1), 53 bits. */
RNG_FN double rng_uniform(uint64_t seed, uint32_t stream, uint32_t step, uint64_t index) {
    Rng4 r = rng4(seed, stream, step, index);
    return (double)((((uint64_t)r.v[0] << 32) | r.v[1]) >> 11) * (1.0 / 9007199254740992.0);
}

/* Standard normal (Box-Muller in double, rounded once). */
RNG_FN float rng_normal(uint64_t seed, uint32_t stream, uint32_t step, uint64_t index) {
    Rng4 r = rng4(seed, stream, step, index);
    double u = ((double)r.v[0] + 1.0) * (1.0 / 4294967296.0); /* (0, 1] */
    double t = (double)r.v[1] * (6.283185307179586476925 / 4294967296.0);
    return (float)(sqrt(-2.0 * log(u)) * cos(t));
}
#endif
