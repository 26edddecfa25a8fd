// Rung 5, sm_90a: one warpgroup lets the tensor memory accelerator copy tiles ahead, two multiply with wgmma straight
// from shared memory, and a block stays on its multiprocessor and takes one tile of the result after the other.
#pragma once
#include "grouped.cuh"
#include "instructions.cuh"

namespace hopper {

constexpr int BM = 128, BN = 128, BK = 64, THREADS = 384, CONSUMERS = 256;
constexpr int PART = 128 * BK * 2;  // bytes of 128 of m or n by 64 of k
constexpr int WARPGROUP_M = 64, SLAB = 64 * 128;  // bytes of 64 rows of 128 bytes

struct Maps {
  TensorMap a[2], b[2];
};

// HALVES pieces of B stand beside one of A: 128 columns each, of one matrix, or of two (DUAL).
template <int HALVES>
struct Shared {
  static constexpr int STAGES = HALVES == 2 ? 4 : 6;
  struct {
    unsigned char a[PART], b[HALVES][PART];
  } stage[STAGES];
  Barrier full[STAGES], empty[STAGES];
};

// Where the ring of stages stands; both sides count alike.
template <int STAGES>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// Start the copy of 128 of m or n from `mn` and 64 of k from `k`. k contiguous: one box; else two, 64 columns each.
template <bool KMAJOR>
__device__ __forceinline__ void fetch(unsigned char* to, const TensorMap* map, int mn, int k, int expert,
                                      Barrier* barrier) {
  if constexpr (KMAJOR) {
    copy_box(to, map, k, mn, expert, barrier);
  } else {
    copy_box(to, map, mn, k, expert, barrier);
    copy_box(to + SLAB, map, mn + 64, k, expert, barrier);
  }
}

// Rows `valid` .. 63 of k are another expert's: write zeros over them, in slabs of 64 columns.
__device__ __forceinline__ void clear_tail(unsigned char* slabs, int n_slabs, int valid, int thread) {
  int pieces = (64 - valid) * 8;  // of 16 bytes, in a slab
  for (int i = thread; i < n_slabs * pieces; i += CONSUMERS)
    *reinterpret_cast<uint4*>(slabs + i / pieces * SLAB + valid * 128 + i % pieces * 16) = uint4{0, 0, 0, 0};
}

template <Layout LAYOUT, Form FORM, int HALVES>
__device__ __forceinline__ bool next_tile(const Sizes& s, long number, Cursor& cursor, Tile& tile) {
  return find_tile<LAYOUT, BM, FORM == Form::DUAL ? BN : BN * HALVES>(s, number, cursor, tile);
}

// The thread that has all tiles copied, as far ahead as there are stages.
template <Layout LAYOUT, Form FORM, int HALVES>
__device__ __forceinline__ void produce(Shared<HALVES>& shared, const Maps& maps, const Sizes& s) {
  Ring<Shared<HALVES>::STAGES> ring;
  Cursor cursor;
  Tile tile;
  for (long number = blockIdx.x; next_tile<LAYOUT, FORM, HALVES>(s, number, cursor, tile); number += gridDim.x)
    for (int pair = 0; pair < (FORM == Form::SUM ? 2 : 1); pair++)
      for (int k = tile.k; k < tile.k_end; k += BK, ring.next()) {
        auto& stage = shared.stage[ring.stage];
        Barrier* full = &shared.full[ring.stage];
        barrier_wait(&shared.empty[ring.stage], ring.parity ^ 1);
        barrier_arrive_expect(full, (1 + HALVES) * PART);
        fetch<LAYOUT != Layout::TN>(stage.a, &maps.a[pair], tile.m, k, 0, full);
#pragma unroll
        for (int h = 0; h < HALVES; h++)
          fetch<LAYOUT == Layout::NT>(stage.b[h], &maps.b[FORM == Form::DUAL ? h : pair],
                                      tile.n + (FORM == Form::DUAL ? 0 : h * BN), k,
                                      LAYOUT == Layout::TN ? 0 : tile.expert, full);
      }
}

// A thread of a warpgroup holds, of 64 x 128, rows lane / 4 and lane / 4 + 8 of its warp's 16, two columns of each 8.
template <Layout LAYOUT, Form FORM, int HALVES, class Epilogue>
__device__ __forceinline__ void finish(const Sizes& s, const Tile& tile, const Epilogue& out, int m0, int lane,
                                       const float (&sum)[HALVES][64]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int m = m0 + lane / 4 + 8 * half;
    size_t row = out_row<LAYOUT>(s, tile, m);
    float of_row = 0;
#pragma unroll
    for (int h = 0; h < (FORM == Form::DUAL ? 1 : HALVES); h++)
#pragma unroll
      for (int j = 0; j < 16; j++) {
        int n = tile.n + h * BN + 8 * j + lane % 4 * 2;
        if (m >= tile.m_end || n >= s.n) continue;
        float one[2] = {sum[h][4 * j + 2 * half], sum[h][4 * j + 2 * half + 1]};
        float other[2] = {sum[HALVES - 1][4 * j + 2 * half], sum[HALVES - 1][4 * j + 2 * half + 1]};
        of_row += write_out<FORM>(out, row, n, s.n, one, other);
      }
    if constexpr (Epilogue::SUMS) {
      for (int step = 2; step; step /= 2) of_row += __shfl_xor_sync(0xFFFFFFFF, of_row, step);
      if (lane % 4 == 0 && m < tile.m_end) out.sums[size_t(m) * out.slots + tile.n / (BN * HALVES)] = of_row;
    }
  }
}

// One of the two warpgroups that multiply: 64 rows of every tile.
template <Layout LAYOUT, Form FORM, int HALVES, class Epilogue>
__device__ __forceinline__ void consume(Shared<HALVES>& shared, const Sizes& s, const Epilogue& out) {
  constexpr bool A_KMAJOR = LAYOUT != Layout::TN, B_KMAJOR = LAYOUT == Layout::NT;
  constexpr int A_STEP = A_KMAJOR ? 32 : 2048, B_STEP = B_KMAJOR ? 32 : 2048;  // bytes to the next 16 of k
  int thread = threadIdx.x - 128, warpgroup = thread / 128, warp = thread % 128 / 32, lane = thread % 32;
  Ring<Shared<HALVES>::STAGES> ring;
  Cursor cursor;
  Tile tile;
  for (long number = blockIdx.x; next_tile<LAYOUT, FORM, HALVES>(s, number, cursor, tile); number += gridDim.x) {
    float sum[HALVES][64] = {};
    int read = -1;  // the stage whose products may still run
    for (int pair = 0; pair < (FORM == Form::SUM ? 2 : 1); pair++)
      for (int k = tile.k; k < tile.k_end; k += BK, ring.next()) {
        auto& stage = shared.stage[ring.stage];
        barrier_wait(&shared.full[ring.stage], ring.parity);
        if (LAYOUT == Layout::TN && tile.k_end - k < BK) {
          clear_tail(stage.a, 2, tile.k_end - k, thread);
          clear_tail(stage.b[0], 2 * HALVES, tile.k_end - k, thread);
          shared_fence();
          named_barrier(1, CONSUMERS);
        }
        product_fence();
#pragma unroll
        for (int step = 0; step < BK / 16; step++) {
          uint64_t a = matrix_descriptor(stage.a + warpgroup * SLAB + step * A_STEP, SLAB);
#pragma unroll
          for (int h = 0; h < HALVES; h++)
            multiply_64x128x16<!A_KMAJOR, !B_KMAJOR>(sum[h], a, matrix_descriptor(stage.b[h] + step * B_STEP, SLAB));
        }
        product_commit();
        product_wait<1>();
        if (read >= 0 && lane == 0) barrier_arrive(&shared.empty[read]);
        read = ring.stage;
      }
    product_wait<0>();
    for (auto& half : sum) settle(half);
    if (read >= 0 && lane == 0) barrier_arrive(&shared.empty[read]);
    finish<LAYOUT, FORM, HALVES>(s, tile, out, tile.m + warpgroup * WARPGROUP_M + warp * 16, lane, sum);
  }
}

template <Layout LAYOUT, Form FORM, int HALVES, class Epilogue>
__global__ __launch_bounds__(THREADS, 1) void gemm(const __grid_constant__ Maps maps, Sizes s, Epilogue out) {
  static_assert(FORM != Form::DUAL || HALVES == 2);
#if defined(CUDA_ON_CPU) || defined(__CUDA_ARCH_FEAT_SM90_ALL)  // no other target knows these instructions
  require_ends(s);
  auto& shared = shared_memory<Shared<HALVES>>();
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shared<HALVES>::STAGES; i++) {
      barrier_init(&shared.full[i], 1);
      barrier_init(&shared.empty[i], CONSUMERS / 32);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_down_to<40>();
    if (threadIdx.x == 0) produce<LAYOUT, FORM, HALVES>(shared, maps, s);
  } else {
    registers_up_to<232>();
    consume<LAYOUT, FORM, HALVES>(shared, s, out);
  }
#endif
}

}  // namespace hopper
