// Tokens to the rows of their experts, and back: copies, W numbers (16 bytes where the width allows) a thread.
#pragma once
#include "launch.cuh"

// out (N, D): row n is x[token[n]].
template <class T, int W>
__global__ void permute(const T* x, const long long* token, int tokens, int width, T* out) {
  long row = blockIdx.x, from = token[row];
  require_index(from, tokens, "permute: token");
  auto* source = reinterpret_cast<const Vector<T, W>*>(x + from * width);
  auto* target = reinterpret_cast<Vector<T, W>*>(out + row * width);
  for (int i = threadIdx.x; i < width / W; i += blockDim.x) target[i] = source[i];
}

// y (T, D): token t is the sum of rows row_of_choice[t, 0 .. K), in float32, in that order; -1 is no row. No atomics.
template <class T, int W>
__global__ void combine(const T* rows, const int* row_of_choice, int n_rows, int top_k, int width, T* y) {
  long token = blockIdx.x;
  auto* target = reinterpret_cast<Vector<T, W>*>(y + token * width);
  for (int i = threadIdx.x; i < width / W; i += blockDim.x) {
    float sum[W] = {};
    for (int k = 0; k < top_k; k++) {
      long row = row_of_choice[token * top_k + k];
      if (row == -1) continue;
      require_index(row, n_rows, "combine: row");
      Vector<T, W> part = reinterpret_cast<const Vector<T, W>*>(rows + row * width)[i];
#pragma unroll
      for (int j = 0; j < W; j++) sum[j] += float_of(part.at[j]);
    }
    Vector<T, W> result;
#pragma unroll
    for (int j = 0; j < W; j++) result.at[j] = rounded<T>(sum[j]);
    target[i] = result;
  }
}
