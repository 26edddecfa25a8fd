// Rung 4: mma.sync fed by ldmatrix, with copies that run ahead (cp.async, three stages) into a swizzled shared memory.
// Runs on sm_80 and newer. Widths must be multiples of 8: a copy moves 16 bytes.
#pragma once
#include "grouped.cuh"
#include "instructions.cuh"

namespace mma_rung {

constexpr int BM = 128, BN = 128, BK = 64, STAGES = 3, THREADS = 256;
constexpr int WARPS_N = 4, WARP_M = 64, WARP_N = 32;  // 2 x 4 warps, each with 64 x 32 of the tile

// A tile of an operand, 128 of m or n by 64 of k. k is contiguous (KMAJOR): 128 rows of 8 pieces of 16 bytes; else 64
// rows of 16 pieces. The piece of a row is exchanged by the row's number, so that 8 rows of a column lie in 8 different
// groups of banks.
template <bool KMAJOR>
__device__ __forceinline__ int place(int row, int piece) {
  return row * (KMAJOR ? BK : BM) + ((piece ^ (row & 7)) * 8);
}

struct Stage {
  bf16 a[BM * BK], b[BN * BK];
};

struct Shared {
  Stage stage[STAGES];
};

// What column of which matrix stands in row `r` of B's tile: with two matrices, eight of one and eight of the other in
// turn, so that one thread ends up with both sums of an output.
template <Form FORM>
__device__ __forceinline__ int column_of(int r) {
  return FORM == Form::DUAL ? r / 16 * 8 + r % 8 : r;
}

// Start the copies of one stage, k0 .. k0 + 63 of the pair.
template <Layout LAYOUT, Form FORM>
__device__ __forceinline__ void fetch(Stage& stage, const Operands<bf16>& in, const Sizes& s, const Tile& tile, int pair,
                                      int k0) {
  constexpr bool A_KMAJOR = LAYOUT != Layout::TN, B_KMAJOR = LAYOUT == Layout::NT;
#pragma unroll
  for (int i = 0; i < BM * BK / 8 / THREADS; i++) {
    int one = threadIdx.x + i * THREADS;
    int row = one / (A_KMAJOR ? 8 : 16), piece = one % (A_KMAJOR ? 8 : 16);
    int m = tile.m + (A_KMAJOR ? row : piece * 8), k = k0 + (A_KMAJOR ? piece * 8 : row);
    bool take = m < tile.m_end && k < tile.k_end;
    copy_async(&stage.a[place<A_KMAJOR>(row, piece)], take ? in.a[pair] + a_index<LAYOUT>(s, m, k) : in.a[pair], take);
  }
#pragma unroll
  for (int i = 0; i < BN * BK / 8 / THREADS; i++) {
    int one = threadIdx.x + i * THREADS;
    int row = one / (B_KMAJOR ? 8 : 16), piece = one % (B_KMAJOR ? 8 : 16);
    int n = tile.n + (B_KMAJOR ? column_of<FORM>(row) : piece * 8), k = k0 + (B_KMAJOR ? piece * 8 : row);
    const bf16* b = in.b[FORM == Form::DUAL ? row / 8 % 2 : pair];
    bool take = n < s.n && k < tile.k_end;
    copy_async(&stage.b[place<B_KMAJOR>(row, piece)], take ? b + b_index<LAYOUT>(s, tile.expert, n, k) : b, take);
  }
}

// Multiply one stage: 4 steps of 16 in k, for each warp 4 x 4 products of 16 x 8.
template <Layout LAYOUT>
__device__ __forceinline__ void multiply(const Stage& stage, int m0, int n0, int lane, float (&sum)[4][4][4]) {
  constexpr bool A_KMAJOR = LAYOUT != Layout::TN, B_KMAJOR = LAYOUT == Layout::NT;
#pragma unroll
  for (int k = 0; k < BK; k += 16) {
    uint32_t a[4][4], b[2][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int m = m0 + 16 * i;
      int at = A_KMAJOR ? place<true>(m + lane % 16, k / 8 + lane / 16)
                        : place<false>(k + lane % 8 + lane / 16 * 8, m / 8 + lane / 8 % 2);
      load_matrices<!A_KMAJOR>(a[i], &stage.a[at]);
    }
#pragma unroll
    for (int j = 0; j < 2; j++) {
      int n = n0 + 16 * j;
      int at = B_KMAJOR ? place<true>(n + lane % 8 + lane / 16 * 8, k / 8 + lane / 8 % 2)
                        : place<false>(k + lane % 16, n / 8 + lane / 16);
      load_matrices<!B_KMAJOR>(b[j], &stage.b[at]);
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) multiply_16x8x16(sum[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
  }
}

// A thread holds, of each 16 x 8, two neighbours in row lane / 4 and two in the row 8 below.
template <Layout LAYOUT, Form FORM, class Epilogue>
__device__ __forceinline__ void finish(const Sizes& s, const Tile& tile, const Epilogue& out, int warp, int lane,
                                       const float (&sum)[4][4][4]) {
  constexpr int MATRICES = FORM == Form::DUAL ? 2 : 1;
  int m0 = tile.m + warp / WARPS_N * WARP_M, n0 = warp % WARPS_N * WARP_N;
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int m = m0 + 16 * i + lane / 4 + 8 * half;
      size_t row = out_row<LAYOUT>(s, tile, m);
      float of_row = 0;
#pragma unroll
      for (int j = 0; j < 4; j += MATRICES) {
        int n = tile.n + column_of<FORM>(n0 + 8 * j) + lane % 4 * 2;
        if (m >= tile.m_end || n >= s.n) continue;
        const auto &first = sum[i][j], &second = sum[i][j + MATRICES - 1];
        float one[2] = {first[2 * half], first[2 * half + 1]}, other[2] = {second[2 * half], second[2 * half + 1]};
        of_row += write_out<FORM>(out, row, n, s.n, one, other);
      }
      if constexpr (Epilogue::SUMS) {
        for (int step = 2; step; step /= 2) of_row += __shfl_xor_sync(0xFFFFFFFF, of_row, step);
        int slot = tile.n / BN * WARPS_N + warp % WARPS_N;
        if (lane % 4 == 0 && m < tile.m_end) out.sums[size_t(m) * out.slots + slot] = of_row;
      }
    }
}

template <Layout LAYOUT, Form FORM, class Epilogue>
__global__ __launch_bounds__(THREADS) void gemm(const __grid_constant__ Operands<bf16> in, Sizes s, Epilogue out) {
  constexpr int OUT_N = FORM == Form::DUAL ? BN / 2 : BN;
  static_assert(FORM != Form::DUAL || LAYOUT == Layout::NT);
  require_ends(s);
  auto& shared = shared_memory<Shared>();
  Cursor cursor;
  Tile tile;
  if (!find_tile<LAYOUT, BM, OUT_N>(s, blockIdx.x, cursor, tile)) return;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int m0 = warp / WARPS_N * WARP_M, n0 = warp % WARPS_N * WARP_N;
  int steps = ceil_div(tile.k_end - tile.k, BK), total = FORM == Form::SUM ? 2 * steps : steps;
  float sum[4][4][4] = {};

  auto fetch_step = [&](int i) {
    if (i < total) fetch<LAYOUT, FORM>(shared.stage[i % STAGES], in, s, tile, i / steps, tile.k + i % steps * BK);
    copy_async_commit();  // an empty group too, so that counting groups counts steps
  };
  for (int i = 0; i < STAGES - 1; i++) fetch_step(i);
  for (int i = 0; i < total; i++) {
    copy_async_wait<STAGES - 2>();
    __syncthreads();  // step i has landed for all, and step i - 1, whose stage is filled next, is read by none
    fetch_step(i + STAGES - 1);
    multiply<LAYOUT>(shared.stage[i % STAGES], m0, n0, lane, sum);
  }
  finish<LAYOUT, FORM>(s, tile, out, warp, lane, sum);
}

}  // namespace mma_rung
