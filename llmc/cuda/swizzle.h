/* Where a tile's elements lie in shared memory so that neither copies nor ldmatrix meet bank conflicts. A tile has rows of row_bytes bytes (a
 * multiple of 128); chunk c (16 bytes) of row r lies where chunk c ^ (r % 8) would. Eight rows of one chunk (a phase of ldmatrix) and eight
 * chunks of one row (a quarter warp of 16-byte accesses) then cover the 32 banks once each: dev/test/test_swizzle.c. Plain C. */
#ifndef LLMC_CUDA_SWIZZLE_H
#define LLMC_CUDA_SWIZZLE_H
#ifdef __CUDACC__
#define LLMC_SWIZZLE static __host__ __device__ __forceinline__
#else
#define LLMC_SWIZZLE static inline
#endif

/* Byte offset of chunk `chunk` of row `row`. */
LLMC_SWIZZLE unsigned swizzled(unsigned row, unsigned chunk, unsigned row_bytes) { return row * row_bytes + ((chunk ^ (row & 7)) << 4); }

/* What a lane adds to the tile's address for an ldmatrix_x4 of two by two 8x8 matrices at rows 0 .. 15, chunks 0 and 1. At row R (a multiple
 * of 8) and chunks 2 K, 2 K + 1: swizzle_at(lane's offset, K) + R * row_bytes, which costs one exclusive or where K is a constant.
 * _rows_first: matrices (rows 0-7, chunk 0), (rows 8-15, chunk 0), (rows 0-7, chunk 1), (rows 8-15, chunk 1): an A operand; transposed, two
 * B operands of neighbouring columns. _chunks_first: (rows 0-7, chunk 0), (rows 0-7, chunk 1), (rows 8-15, chunk 0), (rows 8-15, chunk 1): two
 * B operands whose columns are rows of the tile. */
LLMC_SWIZZLE unsigned swizzle_rows_first(unsigned lane, unsigned row_bytes) {
    return swizzled((lane >> 3 & 1) * 8 + (lane & 7), lane >> 4, row_bytes);
}
LLMC_SWIZZLE unsigned swizzle_chunks_first(unsigned lane, unsigned row_bytes) {
    return swizzled((lane >> 4) * 8 + (lane & 7), lane >> 3 & 1, row_bytes);
}
LLMC_SWIZZLE unsigned swizzle_at(unsigned lane_offset, unsigned K) { return lane_offset ^ (K << 5); }

#endif
