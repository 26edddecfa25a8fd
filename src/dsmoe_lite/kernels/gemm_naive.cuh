// Rung 1: one thread an output. Every number it multiplies comes from global memory, and is fetched again by the next.
#pragma once
#include "grouped.cuh"

constexpr int NAIVE_THREADS = 256;

template <class T>
__global__ void gemm_naive(Operands<T> in, Sizes s, Store<T> out) {
  require_ends(s);
  long index = long(blockIdx.x) * NAIVE_THREADS + threadIdx.x;
  if (index >= long(s.rows) * s.n) return;
  int row = int(index / s.n), column = int(index % s.n), expert = 0;
  while (expert + 1 < s.experts && row >= s.ends[expert]) expert++;
  const T* a = in.a[0] + a_index<Layout::NT>(s, row, 0);
  const T* b = in.b[0] + b_index<Layout::NT>(s, expert, column, 0);
  float sum[1] = {0};
  for (int k = 0; k < s.k; k++) sum[0] += float_of(a[k]) * float_of(b[k]);
  out.write(row, column, s.n, sum);
}
