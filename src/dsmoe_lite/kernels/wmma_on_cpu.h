// The parts of <mma.h> that gemm_wmma.cuh uses, for cuda_on_cpu.h. Which number of a fragment a thread holds is not
// defined by CUDA, so that no kernel may rely on it; here thread l holds numbers 8l .. 8l + 7 of the 16 x 16, by rows.
#pragma once
#include "cuda_on_cpu.h"

namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major };

template <class Use, int M, int N, int K, class T, class Order = void>
struct fragment {
  static_assert(M == 16 && N == 16 && K == 16);
  T x[8];
};

template <class F, class T>
void fill_fragment(F& fragment, T value) {
  for (auto& one : fragment.x) one = value;
}

template <class Use, class T, class Order>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Order>& to, const T* from, unsigned stride,
                      cpu::Place place = cpu::Place::current()) {
  cpu::meet_warp(nullptr, "load_matrix_sync", place, [](void**) {});
  for (unsigned i = 0; i < 8; i++) {
    unsigned row = cpu::lane() / 2, column = cpu::lane() % 2 * 8 + i;
    to.x[i] = std::is_same_v<Order, row_major> ? from[row * stride + column] : from[column * stride + row];
  }
}

template <class A, class B>
void mma_sync(fragment<accumulator, 16, 16, 16, float>& d, const A& a, const B& b,
              const fragment<accumulator, 16, 16, 16, float>& c, cpu::Place place = cpu::Place::current()) {
  for (unsigned i = 0; i < 8; i++) d.x[i] = c.x[i];
  struct Mine {
    float* d;
    const __nv_bfloat16 *a, *b;
  } mine{d.x, a.x, b.x};
  cpu::meet_warp(&mine, "mma_sync", place, [](void** all) {
    auto at = [&](unsigned lane) { return static_cast<Mine*>(all[lane]); };
    for (unsigned row = 0; row < 16; row++)
      for (unsigned column = 0; column < 16; column++)
        for (unsigned k = 0; k < 16; k++)
          at(row * 2 + column / 8)->d[column % 8] +=
              __bfloat162float(at(row * 2 + k / 8)->a[k % 8]) * __bfloat162float(at(k * 2 + column / 8)->b[column % 8]);
  });
}

inline void store_matrix_sync(float* to, const fragment<accumulator, 16, 16, 16, float>& from, unsigned stride, layout_t,
                              cpu::Place place = cpu::Place::current()) {
  cpu::meet_warp(nullptr, "store_matrix_sync", place, [](void**) {});
  for (unsigned i = 0; i < 8; i++) to[cpu::lane() / 2 * stride + cpu::lane() % 2 * 8 + i] = from.x[i];
}

}  // namespace nvcuda::wmma
