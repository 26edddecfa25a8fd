// Rung 2: a block fetches a tile of A and of B into shared memory once, and every thread of it multiplies from there.
// The rung that trains in float32, and with widths that are no multiple of 8.
#pragma once
#include "grouped.cuh"

namespace tiled {

constexpr int BM = 64, BN = 64, BK = 16, THREADS = 256;

template <Form FORM>
struct Shared {
  static constexpr int OUTPUTS = FORM == Form::DUAL ? 2 : 1;
  float a[BK][BM + 4];  // + 4: threads that write a column hit different banks
  float b[OUTPUTS][BK][BN + 4];
};

// Copy k0 .. k0 + 15 of the tile's rows and columns, zeros from outside. Neighbours fetch neighbours, however A lies.
template <class T, Layout LAYOUT, Form FORM>
__device__ __forceinline__ void fetch(Shared<FORM>& shared, const Operands<T>& in, const Sizes& s, const Tile& tile, int pair,
                                      int k0) {
  for (int i = threadIdx.x; i < BM * BK; i += THREADS) {
    int m = LAYOUT == Layout::TN ? i % BM : i / BK, k = LAYOUT == Layout::TN ? i / BM : i % BK;
    bool inside = tile.m + m < tile.m_end && k0 + k < tile.k_end;
    shared.a[k][m] = inside ? float_of(in.a[pair][a_index<LAYOUT>(s, tile.m + m, k0 + k)]) : 0;
  }
  for (int i = threadIdx.x; i < BN * BK; i += THREADS) {
    int n = LAYOUT == Layout::NT ? i / BK : i % BN, k = LAYOUT == Layout::NT ? i % BK : i / BN;
    bool inside = tile.n + n < s.n && k0 + k < tile.k_end;
    size_t at = inside ? b_index<LAYOUT>(s, tile.expert, tile.n + n, k0 + k) : 0;
#pragma unroll
    for (int o = 0; o < Shared<FORM>::OUTPUTS; o++)
      shared.b[o][k][n] = inside ? float_of(in.b[FORM == Form::SUM ? pair : o][at]) : 0;
  }
}

// Thread (y, x) of 16 x 16 has rows 4y .. 4y + 3 and columns x, x + 16, x + 32, x + 48.
template <Form FORM>
__device__ __forceinline__ void multiply(const Shared<FORM>& shared, int y, int x,
                                         float (&sum)[Shared<FORM>::OUTPUTS][4][4]) {
#pragma unroll
  for (int k = 0; k < BK; k++)
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int o = 0; o < Shared<FORM>::OUTPUTS; o++)
#pragma unroll
        for (int j = 0; j < 4; j++) sum[o][i][j] += shared.a[k][4 * y + i] * shared.b[o][k][x + 16 * j];
}

template <Layout LAYOUT, Form FORM, class Epilogue>
__device__ __forceinline__ void finish(const Sizes& s, const Tile& tile, const Epilogue& out, int y, int x,
                                       const float (&sum)[Shared<FORM>::OUTPUTS][4][4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int m = tile.m + 4 * y + i;
    float of_row = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      int n = tile.n + x + 16 * j;
      if (m >= tile.m_end || n >= s.n) continue;
      float one[1] = {sum[0][i][j]}, other[1] = {sum[Shared<FORM>::OUTPUTS - 1][i][j]};
      of_row += write_out<FORM>(out, out_row<LAYOUT>(s, tile, m), n, s.n, one, other);
    }
    if constexpr (Epilogue::SUMS) {
      for (int step = 8; step; step /= 2) of_row += __shfl_xor_sync(0xFFFFFFFF, of_row, step);
      if (x == 0 && m < tile.m_end) out.sums[size_t(m) * out.slots + tile.n / BN] = of_row;
    }
  }
}

template <class T, Layout LAYOUT, Form FORM, class Epilogue>
__global__ __launch_bounds__(THREADS) void gemm(const __grid_constant__ Operands<T> in, Sizes s, Epilogue out) {
  require_ends(s);
  auto& shared = shared_memory<Shared<FORM>>();
  Cursor cursor;
  Tile tile;
  if (!find_tile<LAYOUT, BM, BN>(s, blockIdx.x, cursor, tile)) return;
  int x = threadIdx.x % 16, y = threadIdx.x / 16;
  float sum[Shared<FORM>::OUTPUTS][4][4] = {};
  for (int pair = 0; pair < (FORM == Form::SUM ? 2 : 1); pair++)
    for (int k = tile.k; k < tile.k_end; k += BK) {
      fetch<T, LAYOUT, FORM>(shared, in, s, tile, pair, k);
      __syncthreads();  // nobody multiplies before all have fetched
      multiply(shared, y, x, sum);
      __syncthreads();  // nobody fetches the next before all have multiplied
    }
  finish<LAYOUT, FORM>(s, tile, out, y, x, sum);
}

}  // namespace tiled
