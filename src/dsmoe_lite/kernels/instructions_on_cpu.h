// What the instructions of instructions.cuh do, for cuda_on_cpu.h. What a GPU may do late is done as late as allowed in
// even schedules (copies land, and products read shared memory, when somebody waits for them), and at once in odd ones.
#pragma once
#include "cuda_on_cpu.h"

namespace cpu {

inline float half_of(uint32_t pair, int which) { return __bfloat162float({uint16_t(which ? pair >> 16 : pair)}); }

// A 128-byte swizzle: the 16-byte piece of a row is exchanged with the row's number, modulo 8.
inline size_t swizzled(size_t byte) { return byte ^ ((byte >> 7 & 7) << 4); }

// Let the copies of all groups but the last `pending` land; -1: also those of the group that is not committed yet.
inline void finish_copies(Fiber& fiber, int pending) {
  auto late = [&](const Copy& copy) { return int(copy.group) + pending >= int(fiber.copy_group); };
  for (const Copy& copy : fiber.copies)
    if (!late(copy)) copy.from ? memcpy(copy.to, copy.from, copy.bytes) : memset(copy.to, 0, copy.bytes);
  std::erase_if(fiber.copies, [&](const Copy& copy) { return !late(copy); });
}

// A barrier in the 8 bytes that the GPU's has: arrivals still missing and their full number, bytes missing, phase.
struct Count {
  int16_t missing, full;
  int32_t bytes_and_phase;  // twice the bytes, plus the phase

  void settle() {
    if (missing == 0 && bytes_and_phase >> 1 == 0) missing = full, bytes_and_phase ^= 1;
  }
};

inline Count& count_of(uint64_t* barrier) { return *reinterpret_cast<Count*>(barrier); }

}  // namespace cpu

// ---- Ampere

inline void copy_async(void* to, const void* from, bool take) {
  cpu::Fiber& me = *cpu::machine().self;
  if (reinterpret_cast<uintptr_t>(to) % 16 || (take && reinterpret_cast<uintptr_t>(from) % 16))
    cpu::fail("copy_async: an address is no multiple of 16");
  me.copies.push_back({to, take ? from : nullptr, 16, me.copy_group});
  if (!cpu::machine().late()) cpu::finish_copies(me, -1);
}

inline void copy_async_commit() { cpu::machine().self->copy_group++; }

template <int PENDING>
void copy_async_wait() {
  cpu::finish_copies(*cpu::machine().self, PENDING);
}

template <bool TRANSPOSED>
void load_matrices(uint32_t (&r)[4], const void* row, cpu::Place place = cpu::Place::current()) {
  struct Mine {
    uint32_t* r;
    const __nv_bfloat16* row;
  } mine{r, static_cast<const __nv_bfloat16*>(row)};
  cpu::meet_warp(&mine, "load_matrices", place, [](void** all) {
    auto at = [&](unsigned lane) { return static_cast<Mine*>(all[lane]); };
    for (unsigned lane = 0; lane < 32; lane++)
      for (unsigned i = 0; i < 4; i++) {
        unsigned row = lane / 4, column = lane % 4 * 2;
        __nv_bfloat16 low = TRANSPOSED ? at(8 * i + column)->row[row] : at(8 * i + row)->row[column];
        __nv_bfloat16 high = TRANSPOSED ? at(8 * i + column + 1)->row[row] : at(8 * i + row)->row[column + 1];
        at(lane)->r[i] = low.bits | uint32_t(high.bits) << 16;
      }
  });
}

inline void multiply_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                             cpu::Place place = cpu::Place::current()) {
  struct Mine {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } mine{d, a, {b0, b1}};
  cpu::meet_warp(&mine, "multiply_16x8x16", place, [](void** all) {
    float A[16][16], B[16][8];
    for (unsigned lane = 0; lane < 32; lane++) {
      auto* one = static_cast<Mine*>(all[lane]);
      unsigned g = lane / 4, t = lane % 4 * 2;
      for (unsigned i = 0; i < 4; i++)
        for (int h = 0; h < 2; h++) A[g + i % 2 * 8][t + h + i / 2 * 8] = cpu::half_of(one->a[i], h);
      for (unsigned i = 0; i < 2; i++)
        for (int h = 0; h < 2; h++) B[t + h + i * 8][g] = cpu::half_of(one->b[i], h);
    }
    for (unsigned lane = 0; lane < 32; lane++) {
      auto* one = static_cast<Mine*>(all[lane]);
      for (unsigned i = 0; i < 4; i++)
        for (unsigned k = 0; k < 16; k++) one->d[i] += A[lane / 4 + i / 2 * 8][k] * B[k][lane % 4 * 2 + i % 2];
    }
  });
}

// ---- Hopper

using Barrier = uint64_t;

// A tensor of bfloat16 seen in three dimensions, innermost first, and the box that one copy moves.
struct TensorMap {
  const __nv_bfloat16* data;
  uint64_t size[3], stride[3];  // elements
  uint32_t box[2];              // the third side is 1
};

inline void barrier_init(Barrier* barrier, int arrivals) {
  cpu::count_of(barrier) = {int16_t(arrivals), int16_t(arrivals), 0};
}

inline void barrier_init_fence() {}

inline void barrier_arrive(Barrier* barrier) {
  cpu::count_of(barrier).missing--;
  cpu::count_of(barrier).settle();
}

inline void barrier_arrive_expect(Barrier* barrier, uint32_t bytes) {
  cpu::count_of(barrier).bytes_and_phase += 2 * int32_t(bytes);
  barrier_arrive(barrier);
}

inline void barrier_wait(Barrier* barrier, uint32_t parity, cpu::Place place = cpu::Place::current()) {
  auto over = [=] { return uint32_t(cpu::count_of(barrier).bytes_and_phase & 1) != parity; };
  cpu::poll(over, "barrier_wait", place);
}

inline void copy_box(void* to, const TensorMap* map, int x, int y, int z, Barrier* barrier) {
  if (reinterpret_cast<uintptr_t>(to) % 1024) cpu::fail("copy_box: the target is no multiple of 1024");
  auto transfer = [=, map = *map] {
    char* target = static_cast<char*>(to);
    for (uint32_t row = 0; row < map.box[1]; row++)
      for (uint32_t column = 0; column < map.box[0]; column++) {
        bool inside = x >= 0 && y >= 0 && x + column < map.size[0] && y + row < map.size[1] && uint64_t(z) < map.size[2];
        __nv_bfloat16 value{0};
        if (inside) value = map.data[(x + column) + (y + row) * map.stride[1] + z * map.stride[2]];
        memcpy(target + cpu::swizzled((row * map.box[0] + column) * 2), &value, 2);
      }
    cpu::count_of(barrier).bytes_and_phase -= 2 * int32_t(map.box[0] * map.box[1] * 2);
    cpu::count_of(barrier).settle();
  };
  if (cpu::machine().late())
    cpu::machine().transfers.push_back(transfer);
  else
    transfer();
}

inline void shared_fence() {}

inline void named_barrier(int id, int threads, cpu::Place place = cpu::Place::current()) {
  cpu::Machine& m = cpu::machine();
  cpu::meet(m.barriers[id], threads, m.self->thread, nullptr, "named_barrier", place, [](void**) {});
}

template <int REGISTERS>
void registers_down_to() {}
template <int REGISTERS>
void registers_up_to() {}

inline void product_fence() {}

// The list of a warpgroup's products; an empty entry closes a group.
inline std::vector<std::function<void()>>& products_of_group() {
  return cpu::machine().products[cpu::machine().self->thread / cpu::WARPGROUP];
}

inline void product_commit(cpu::Place place = cpu::Place::current()) {
  auto& list = products_of_group();
  cpu::meet_warpgroup(nullptr, "product_commit", place, [&](void**) { list.push_back(nullptr); });
}

template <int PENDING>
void product_wait(cpu::Place place = cpu::Place::current()) {
  auto& list = products_of_group();
  cpu::meet_warpgroup(nullptr, "product_wait", place, [&](void**) {
    auto open = std::count(list.begin(), list.end(), nullptr);
    while (open > PENDING) {
      if (list.front()) list.front()(); else open--;
      list.erase(list.begin());
    }
  });
}

inline void settle(float (&)[64]) {}

inline uint64_t matrix_descriptor(const void* start, int block) {
  uint64_t address = (static_cast<const char*>(start) - cpu::machine().shared()) >> 4;
  return address | uint64_t(block >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

namespace cpu {

// Element (i, k) of the matrix that a descriptor names, i counting its rows (columns, for b).
template <int TRANSPOSED>
float element(uint64_t descriptor, unsigned i, unsigned k) {
  size_t start = (descriptor & 0x3FFF) << 4, block = (descriptor >> 16 & 0x3FFF) << 4, eight = (descriptor >> 32 & 0x3FFF) << 4;
  size_t plain = TRANSPOSED ? i / 64 * block + k / 8 * eight + k % 8 * 128 + i % 64 * 2
                            : i / 8 * eight + i % 8 * 128 + k * 2;
  __nv_bfloat16 value;
  memcpy(&value, machine().shared() + swizzled(start + plain), 2);
  return __bfloat162float(value);
}

}  // namespace cpu

template <int TRANSPOSED_A, int TRANSPOSED_B>
void multiply_64x128x16(float (&d)[64], uint64_t a, uint64_t b, cpu::Place place = cpu::Place::current()) {
  auto& list = products_of_group();
  struct Mine {
    float* d;
    uint64_t a, b;
  } mine{d, a, b};
  cpu::meet_warpgroup(&mine, "multiply_64x128x16", place, [&](void** all) {
    std::vector<float*> out(cpu::WARPGROUP);
    auto* first = static_cast<Mine*>(all[0]);
    for (unsigned thread = 0; thread < cpu::WARPGROUP; thread++) {
      auto* one = static_cast<Mine*>(all[thread]);
      out[thread] = one->d;
      if (one->a != first->a || one->b != first->b) cpu::fail("multiply_64x128x16: threads name different matrices");
    }
    auto product = [out, a = first->a, b = first->b] {
      float A[64][16], B[128][16];
      for (unsigned k = 0; k < 16; k++) {
        for (unsigned i = 0; i < 64; i++) A[i][k] = cpu::element<TRANSPOSED_A>(a, i, k);
        for (unsigned j = 0; j < 128; j++) B[j][k] = cpu::element<TRANSPOSED_B>(b, j, k);
      }
      for (unsigned thread = 0; thread < cpu::WARPGROUP; thread++)
        for (unsigned r = 0; r < 64; r++) {
          unsigned i = thread / 32 * 16 + thread % 32 / 4 + r / 2 % 2 * 8, j = r / 4 * 8 + thread % 4 * 2 + r % 2;
          for (unsigned k = 0; k < 16; k++) out[thread][r] += A[i][k] * B[j][k];
        }
    };
    if (cpu::machine().late())
      list.push_back(product);
    else
      product();
  });
}
