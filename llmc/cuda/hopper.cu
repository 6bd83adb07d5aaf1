/* Tensor maps for Hopper's copy engine (hopper.cuh): the rules of cuTensorMapEncodeTiled and a little more, checked here with names; then the driver,
 * whose function is looked up at run time, so that nothing links against it. */
#include "hopper.cuh"
#ifndef LLMC_EMU
#include <cuda.h>
#endif

namespace LLMC_NS {

#ifdef LLMC_EMU
static void encode(TensorMap *map, const void *base, int rank, const size_t *dim, const size_t *stride_bytes, const unsigned *box, TileSwizzle swizzle) {
    emu::TensorBox t = {emu::TENSOR_MAGIC, (char *)base, {1, 1, 1, 1}, {2, 0, 0, 0}, {1, 1, 1, 1}, swizzle_span(swizzle), rank};
    static_assert(sizeof t <= sizeof *map, "the twin of a tensor map is no larger than one");
    for (int i = 0; i < rank; i++) t.dim[i] = dim[i], t.box[i] = box[i];
    for (int i = 1; i < rank; i++) t.stride[i] = stride_bytes[i - 1];
    memcpy(map, &t, sizeof t);
}
#else
typedef CUresult (*EncodeTiled)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *, const cuuint64_t *, const cuuint32_t *, const cuuint32_t *,
                                CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
static EncodeTiled find_encode() {
    void *found = NULL;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    cuda_check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result), "looking for cuTensorMapEncodeTiled");
#else
    cuda_check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result), "looking for cuTensorMapEncodeTiled");
#endif
    if (result != cudaDriverEntryPointSuccess || !found) cuda_check(cudaErrorNotSupported, "looking for cuTensorMapEncodeTiled: the driver must be one for CUDA 12 or later");
    return (EncodeTiled)found;
}
static void encode(TensorMap *map, const void *base, int rank, const size_t *dim, const size_t *stride_bytes, const unsigned *box, TileSwizzle swizzle) {
    static const EncodeTiled encode_tiled = find_encode();
    static const CUtensorMapSwizzle swizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_32B};
    CUtensorMap made;
    cuuint64_t dims[4], strides[3];
    cuuint32_t boxes[4], steps[4] = {1, 1, 1, 1};
    for (int i = 0; i < rank; i++) dims[i] = dim[i], boxes[i] = box[i];
    for (int i = 1; i < rank; i++) strides[i - 1] = stride_bytes[i - 1];
    const CUresult result = encode_tiled(&made, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, (cuuint32_t)rank, (void *)base, dims, strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                         swizzles[swizzle], CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    CHECK(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled: error %d; rank %d, inner dimension %zu of %u, swizzle %d", (int)result, rank, dim[0], box[0], (int)swizzle);
    static_assert(sizeof made == sizeof *map, "a tensor map has 128 bytes");
    memcpy(map, &made, sizeof made);
}
#endif

TensorMap tensor_map(const void *base, int rank, const size_t *dim, const size_t *stride_bytes, const unsigned *box, TileSwizzle swizzle) {
    const unsigned inner = 2 * box[0], span = swizzle_span(swizzle);
    CHECK(rank >= 2 && rank <= 4, "tensor_map: rank %d", rank);
    CHECK((uintptr_t)base % 16 == 0, "tensor_map: base %p is not aligned to 16 bytes", base);
    CHECK(swizzle == SWIZZLE_NONE ? inner % 16 == 0 : inner == span, "tensor_map: rows of the box have %u bytes; the swizzle takes %u", inner, span);
    for (int i = 0; i < rank; i++) {
        CHECK(dim[i] >= 1 && dim[i] <= (size_t)1 << 32, "tensor_map: dimension %d is %zu", i, dim[i]);
        CHECK(box[i] >= 1 && box[i] <= 256, "tensor_map: the box has %u in dimension %d; 1 to 256", box[i], i);
        if (i) CHECK(stride_bytes[i - 1] % 16 == 0 && stride_bytes[i - 1] < (size_t)1 << 40, "tensor_map: stride %d is %zu bytes; a multiple of 16, below 2^40", i, stride_bytes[i - 1]);
    }
    TensorMap map;
    encode(&map, base, rank, dim, stride_bytes, box, swizzle);
    return map;
}

} /* namespace */
