// Makes the tensor maps of ptx::tma_load, on the host.
#pragma once

#include "common/ptx_sm90.cuh"

#if NLD_ON_DEVICE
#include <cuda.h>
#endif

namespace nld {

// A tensor in global memory, dimension 0 innermost and contiguous, and the box of it that one copy brings.
struct TensorMapSpec {
  const void* data;
  DType dtype;
  int rank;              // 1 to 5
  int64_t dims[5];       // elements
  int64_t strides[5];    // elements; [0] is 1
  int box[5];            // elements, at most 256 each
  ptx::Swizzle swizzle;  // then a row of the box is as wide as it
};

// Null, or why the hardware cannot do it.
inline LaunchError make_tensor_map(ptx::TensorMap* map, const TensorMapSpec& spec) {
  const int64_t size = spec.dtype == DType::kF32 ? 4 : 2, row_bytes = spec.box[0] * size;
  const int span = static_cast<int>(spec.swizzle);
  if (spec.rank < 1 || spec.rank > 5) return "tensor map: rank must be 1 to 5";
  if (reinterpret_cast<uintptr_t>(spec.data) % 16 != 0) return "tensor map: address must be a multiple of 16 bytes";
  for (int i = 0; i < spec.rank; ++i) {
    if (spec.box[i] < 1 || spec.box[i] > 256) return "tensor map: box sides must be 1 to 256";
    if (spec.dims[i] < 1 || spec.dims[i] > int64_t{1} << 32) return "tensor map: dimensions must be 1 to 2^32";
    if (i > 0 &&
        (spec.strides[i] * size % 16 != 0 || spec.strides[i] < 1 || spec.strides[i] * size >= int64_t{1} << 40)) {
      return "tensor map: strides must be multiples of 16 bytes below 2^40";
    }
  }
  if (row_bytes % 16 != 0) return "tensor map: a row of the box must be a multiple of 16 bytes";
  if (span != 0 && row_bytes != span) return "tensor map: a row of the box must be as wide as the swizzle";
#if NLD_ON_DEVICE
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found{};
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (found != cudaDriverEntryPointSuccess) return "tensor map: the driver is too old for tensor copies";
  const auto type = spec.dtype == DType::kF32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                    : spec.dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const auto swizzle = span == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                       : span == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                       : span == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                    : CU_TENSOR_MAP_SWIZZLE_NONE;
  cuuint64_t dims[5], strides[4];
  cuuint32_t box[5], steps[5];
  for (int i = 0; i < spec.rank; ++i) {
    dims[i] = static_cast<cuuint64_t>(spec.dims[i]);
    box[i] = static_cast<cuuint32_t>(spec.box[i]);
    steps[i] = 1;
    if (i > 0) strides[i - 1] = static_cast<cuuint64_t>(spec.strides[i] * size);
  }
  static_assert(sizeof(CUtensorMap) == sizeof(ptx::TensorMap));
  CUtensorMap made;
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry)(
      &made, type, static_cast<cuuint32_t>(spec.rank), const_cast<void*>(spec.data), dims, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) return "tensor map: the driver refused it";
  memcpy(map, &made, sizeof made);
#else
  *map = {};
  map->base = spec.data;
  map->rank = spec.rank;
  map->elem_bytes = static_cast<unsigned>(size);
  map->swizzle_bytes = static_cast<unsigned>(span);
  for (int i = 0; i < spec.rank; ++i) {
    map->dims[i] = static_cast<uint64_t>(spec.dims[i]);
    map->stride_bytes[i] = static_cast<uint64_t>((i == 0 ? 1 : spec.strides[i]) * size);
    map->box[i] = static_cast<unsigned>(spec.box[i]);
  }
#endif
  return nullptr;
}

}  // namespace nld
