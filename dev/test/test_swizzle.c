/* The map of tiles in shared memory (llmc/cuda/swizzle.h): every chunk has a place of its own, the lanes' addresses are those of the matrices that
 * they are to be, and no access of the attention kernels meets a bank conflict: eight lanes of 16 bytes, or 32 lanes of 4, hit 32 banks once. */
#include "llmc/cuda/swizzle.h"
#include "test.h"

static const unsigned row_sizes[] = {128, 256}; /* bytes: heads of 64 and 128 in bf16 */
enum { ROWS = 128 };

/* Whether n accesses of `bytes` bytes cover 32 banks of 4 bytes, each once. */
static bool all_banks_once(const unsigned *offsets, unsigned n, unsigned bytes) {
    unsigned hits[32] = {0};
    for (unsigned i = 0; i < n; i++)
        for (unsigned b = 0; b < bytes; b += 4) hits[(offsets[i] + b) / 4 % 32]++;
    for (int bank = 0; bank < 32; bank++)
        if (hits[bank] != 1) return false;
    return true;
}

TEST(every_chunk_has_a_place) {
    for (int s = 0; s < 2; s++) {
        unsigned chunks = row_sizes[s] / 16;
        bool *taken = calloc((size_t)ROWS * chunks, 1);
        for (unsigned row = 0; row < ROWS; row++)
            for (unsigned chunk = 0; chunk < chunks; chunk++) {
                unsigned at = swizzled(row, chunk, row_sizes[s]);
                EXPECT(at % 16 == 0 && at / 16 < ROWS * chunks && !taken[at / 16], "row %u, chunk %u of %u bytes: %u", row, chunk, row_sizes[s], at);
                if (at / 16 < ROWS * chunks) taken[at / 16] = true;
            }
        free(taken);
    }
}

/* ldmatrix_x4 at every place the kernels use: matrix j has its eight rows from lanes 8 j .. 8 j + 7, which are one phase. */
TEST(ldmatrix) {
    for (int s = 0; s < 2; s++)
        for (unsigned R = 0; R < ROWS; R += 16)
            for (unsigned K = 0; K < row_sizes[s] / 32; K++)
                for (unsigned j = 0; j < 4; j++) {
                    unsigned by_rows[8], by_chunks[8], size = row_sizes[s];
                    for (unsigned i = 0; i < 8; i++) {
                        by_rows[i] = swizzle_at(swizzle_rows_first(8 * j + i, size), K) + R * size;
                        by_chunks[i] = swizzle_at(swizzle_chunks_first(8 * j + i, size), K) + R * size;
                        EXPECT(by_rows[i] == swizzled(R + j % 2 * 8 + i, 2 * K + j / 2, size), "rows first: matrix %u, row %u, K %u", j, R + i, K);
                        EXPECT(by_chunks[i] == swizzled(R + j / 2 * 8 + i, 2 * K + j % 2, size), "chunks first: matrix %u, row %u, K %u", j, R + i, K);
                    }
                    EXPECT(all_banks_once(by_rows, 8, 16) && all_banks_once(by_chunks, 8, 16), "matrix %u of rows %u, chunks %u", j, R, 2 * K);
                }
}

/* Copies in and out: a quarter warp has eight neighbouring chunks of a row. */
TEST(copies_of_16_bytes) {
    for (int s = 0; s < 2; s++)
        for (unsigned row = 0; row < ROWS; row++)
            for (unsigned chunk = 0; chunk < row_sizes[s] / 16; chunk += 8) {
                unsigned offsets[8];
                for (unsigned i = 0; i < 8; i++) offsets[i] = swizzled(row, chunk + i, row_sizes[s]);
                EXPECT(all_banks_once(offsets, 8, 16), "row %u, chunk %u of %u bytes", row, chunk, row_sizes[s]);
            }
}

/* Results on their way out: lane 4 g + t writes 4 bytes, the t-th of a chunk of row g. */
TEST(fragments_of_4_bytes) {
    for (int s = 0; s < 2; s++)
        for (unsigned row = 0; row < ROWS; row += 8)
            for (unsigned chunk = 0; chunk < row_sizes[s] / 16; chunk++) {
                unsigned offsets[32];
                for (unsigned lane = 0; lane < 32; lane++) offsets[lane] = swizzled(row + lane / 4, chunk, row_sizes[s]) + lane % 4 * 4;
                EXPECT(all_banks_once(offsets, 32, 4), "row %u, chunk %u of %u bytes", row, chunk, row_sizes[s]);
            }
}

/* The test itself notices: without the swizzle eight rows of a chunk fall on the same four banks. */
TEST(plain_rows_conflict) {
    unsigned offsets[8];
    for (unsigned i = 0; i < 8; i++) offsets[i] = i * 128;
    EXPECT(!all_banks_once(offsets, 8, 16), "eight rows of 128 bytes");
}

int main(int argc, char **argv) {
    test_start(argc, argv);
    RUN(every_chunk_has_a_place);
    RUN(ldmatrix);
    RUN(copies_of_16_bytes);
    RUN(fragments_of_4_bytes);
    RUN(plain_rows_conflict);
    return test_done();
}
