// What every kernel of this folder shares: numbers, vectors of 16 bytes, shared memory, and a launch that is checked.
#pragma once

#ifdef CUDA_ON_CPU_BUILD
#include "cuda_on_cpu.h"
#else
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdio>
#endif

using bf16 = __nv_bfloat16;

__device__ __forceinline__ float float_of(float value) { return value; }
__device__ __forceinline__ float float_of(bf16 value) { return __bfloat162float(value); }

template <class T>
__device__ __forceinline__ T rounded(float value) {
  if constexpr (sizeof(T) == 4)
    return value;
  else
    return __float2bfloat16(value);
}

// W neighbours that are read and written together.
template <class T, int W>
struct alignas(sizeof(T) * W) Vector {
  T at[W];
};

// The block's dynamic shared memory, as the one struct the kernel keeps there.
template <class S>
__device__ __forceinline__ S& shared_memory() {
#ifdef CUDA_ON_CPU
  return *reinterpret_cast<S*>(cpu::machine().shared());
#else
  extern __shared__ __align__(1024) unsigned char bytes[];
  return *reinterpret_cast<S*>(bytes);
#endif
}

// End the program with a message if an index from the outside is not in [0, limit).
__device__ __forceinline__ void require_index(long index, long limit, const char* what) {
  if (index >= 0 && index < limit) return;
#ifdef CUDA_ON_CPU
  cpu::fail(std::string(what) + " " + std::to_string(index) + " is not in 0 .. " + std::to_string(limit - 1));
#else
  printf("%s %ld is not in 0 .. %ld\n", what, index, limit - 1);
  __trap();
#endif
}

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Launch a kernel; the code of its error, 0 if there is none. An empty grid is no launch.
template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared, cudaStream_t stream, A... arguments) {
  if (grid.x == 0) return 0;
#ifdef CUDA_ON_CPU
  return cpu::run(grid, threads, shared, [=] { kernel(arguments...); });
#else
  if (shared > 48 << 10) {
    auto allowed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (allowed != cudaSuccess) return allowed;
  }
  kernel<<<grid, threads, shared, stream>>>(arguments...);
  return cudaGetLastError();
#endif
}

// What the GPU in use is: the major number of its compute capability, and its multiprocessors, as many blocks as a
// kernel that stays on the GPU needs. The CPU passes for a small one of every kind.
struct Gpu {
  int generation = 9, multiprocessors = 2;
};

// Ask the driver; the code of an error, 0 if there is none.
inline int look_at(Gpu* gpu) {
#ifdef CUDA_ON_CPU
  *gpu = {};
  return 0;
#else
  int device = 0;
  auto code = cudaGetDevice(&device);
  if (code == cudaSuccess) code = cudaSetDevice(device);  // makes its context current, in any thread
  if (code == cudaSuccess) code = cudaDeviceGetAttribute(&gpu->generation, cudaDevAttrComputeCapabilityMajor, device);
  if (code == cudaSuccess)
    code = cudaDeviceGetAttribute(&gpu->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  return code;
#endif
}
