// How the copy engine sees a tensor of bfloat16: three dimensions, and boxes of 64 columns, 128 bytes, swizzled.
#pragma once
#include "instructions.cuh"
#include "launch.cuh"

#ifndef CUDA_ON_CPU
#include <cudaTypedefs.h>
#endif

// Describe matrices (count, rows, columns), row-major; a box has `box_rows` rows. The code of an error, 0 if none.
inline int describe(TensorMap* map, const bf16* data, int count, int rows, int columns, int box_rows) {
#ifdef CUDA_ON_CPU
  if (!count || !rows || !columns) {
    cpu::machine().error = "describe: a side is 0";  // as cuTensorMapEncodeTiled
    return 1;
  }
  uint64_t size = uint64_t(rows) * columns;
  *map = {data, {uint64_t(columns), uint64_t(rows), uint64_t(count)}, {1, uint64_t(columns), size}, {64, unsigned(box_rows)}};
  return 0;
#else
  void* found = nullptr;
  cudaDriverEntryPointQueryResult answer;
#if CUDART_VERSION >= 12050
  auto code = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &answer);
#else
  auto code = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &answer);
#endif
  if (code != cudaSuccess) return code;
  if (answer != cudaDriverEntryPointSuccess) return cudaErrorSymbolNotFound;
  cuuint64_t sizes[3] = {cuuint64_t(columns), cuuint64_t(rows), cuuint64_t(count)};
  cuuint64_t strides[2] = {cuuint64_t(columns) * 2, cuuint64_t(columns) * rows * 2};
  cuuint32_t box[3] = {64, cuuint32_t(box_rows), 1}, steps[3] = {1, 1, 1};
  auto encode = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  auto made = encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<bf16*>(data), sizes, strides, box, steps,
                     CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                     CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made == CUDA_SUCCESS ? 0 : cudaErrorInvalidValue;
#endif
}
