// Rung 3: the same tiles in bfloat16, multiplied by tensor cores through CUDA's own wmma:: words.
#pragma once
#include "grouped.cuh"

#ifdef CUDA_ON_CPU
#include "wmma_on_cpu.h"
#else
#include <mma.h>
#endif

namespace wmma_rung {

using namespace nvcuda;

constexpr int BM = 64, BN = 64, BK = 32, WARPS = 4, THREADS = 32 * WARPS;
constexpr int PITCH = BK + 8;  // rows 16 bytes longer than their numbers: they start in different banks

struct Shared {
  union {
    struct {
      bf16 a[BM][PITCH], b[BN][PITCH];
    };
    float out[BM][BN + 4];
  };
};

// Copy k0 .. k0 + 31 of the tile's rows and columns, zeros from outside.
__device__ __forceinline__ void fetch(Shared& shared, const Operands<bf16>& in, const Sizes& s, const Tile& tile, int k0) {
  for (int i = threadIdx.x; i < BM * BK; i += THREADS) {
    int r = i / BK, k = i % BK;
    bool inside = k0 + k < s.k;
    bf16 zero = rounded<bf16>(0);
    shared.a[r][k] = inside && tile.m + r < tile.m_end ? in.a[0][a_index<Layout::NT>(s, tile.m + r, k0 + k)] : zero;
    shared.b[r][k] = inside && tile.n + r < s.n ? in.b[0][b_index<Layout::NT>(s, tile.expert, tile.n + r, k0 + k)] : zero;
  }
}

using Sum = wmma::fragment<wmma::accumulator, 16, 16, 16, float>;

// Each of 4 warps has 32 x 32 of the tile, as 2 x 2 fragments of 16 x 16.
__device__ __forceinline__ void multiply(const Shared& shared, int m0, int n0, Sum (&sum)[2][2]) {
  for (int k = 0; k < BK; k += 16) {
    wmma::fragment<wmma::matrix_a, 16, 16, 16, bf16, wmma::row_major> a[2];
    wmma::fragment<wmma::matrix_b, 16, 16, 16, bf16, wmma::col_major> b[2];
    for (int i = 0; i < 2; i++) {
      wmma::load_matrix_sync(a[i], &shared.a[m0 + 16 * i][k], PITCH);
      wmma::load_matrix_sync(b[i], &shared.b[n0 + 16 * i][k], PITCH);
    }
    for (int i = 0; i < 2; i++)
      for (int j = 0; j < 2; j++) wmma::mma_sync(sum[i][j], a[i], b[j], sum[i][j]);
  }
}

__global__ __launch_bounds__(THREADS) void gemm(Operands<bf16> in, Sizes s, Store<bf16> out) {
  require_ends(s);
  auto& shared = shared_memory<Shared>();
  Cursor cursor;
  Tile tile;
  if (!find_tile<Layout::NT, BM, BN>(s, blockIdx.x, cursor, tile)) return;
  int warp = threadIdx.x / 32, m0 = warp / 2 * 32, n0 = warp % 2 * 32;
  Sum sum[2][2];
  for (auto& row : sum)
    for (auto& one : row) wmma::fill_fragment(one, 0.0f);

  for (int k = 0; k < s.k; k += BK) {
    fetch(shared, in, s, tile, k);
    __syncthreads();
    multiply(shared, m0, n0, sum);
    __syncthreads();
  }

  // Only a detour through shared memory tells which number a thread holds.
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 2; j++)
      wmma::store_matrix_sync(&shared.out[m0 + 16 * i][n0 + 16 * j], sum[i][j], BN + 4, wmma::mem_row_major);
  __syncthreads();
  for (int i = threadIdx.x; i < BM * BN; i += THREADS) {
    int m = tile.m + i / BN, n = tile.n + i % BN;
    float one[1] = {shared.out[i / BN][i % BN]};
    if (m < tile.m_end && n < s.n) out.write(m, n, s.n, one);
  }
}

}  // namespace wmma_rung
