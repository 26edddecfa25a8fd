// CUDA C++ on a CPU: the same kernels, compiled by g++, one fiber a thread.
//
// Made to find mistakes, not to be fast.
// - Warps run one at a time, each as far as it gets, in an order that `cuda_on_cpu_schedule` changes: a missing barrier
//   shows as a wrong result, because shared memory starts as NaN and nobody else has written yet, or already has.
// - A barrier whose threads stand at different lines, or that some thread never reaches, ends the launch with a message
//   that names both places.
// - Asynchronous copies and products happen as late as the program allows, or at once (instructions_on_cpu.h).
#pragma once
#define CUDA_ON_CPU

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <source_location>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

namespace cpu {

using Place = std::source_location;
constexpr unsigned WARP = 32, WARPGROUP = 128, MOST_THREADS = 1024, NAMED_BARRIERS = 16;
constexpr size_t STACK = 1 << 17, MOST_SHARED = 227 << 10, CANARY = 1 << 10;

enum class State { ready, meeting, polling, done };

// What a thread asked for with cp.async and has not yet waited for.
struct Copy {
  void* to;
  const void* from;
  unsigned bytes, group;
};

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  std::unique_ptr<char[]> stack{new char[STACK]};
  bool started;
  State state;
  unsigned thread;
  const char* what;  // it waits in
  Place place;
  std::function<bool()> until;  // while polling
  std::vector<Copy> copies;
  unsigned copy_group;
};

// Threads that wait for each other: all of a block, of a named barrier, of a warp or of a warpgroup.
struct Meeting {
  unsigned arrived = 0;
  std::vector<unsigned> members;
  std::vector<void*> brought = std::vector<void*>(MOST_THREADS);
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Meeting> barriers{NAMED_BARRIERS}, warps{MOST_THREADS / WARP}, warpgroups{MOST_THREADS / WARPGROUP};
  std::vector<std::vector<std::function<void()>>> products{MOST_THREADS / WARPGROUP};  // wgmma, one list a group
  std::vector<std::function<void()>> transfers;  // TMA, oldest first
  std::unique_ptr<char[]> memory{new char[MOST_SHARED + CANARY + 1024]};
  std::function<void()> kernel;
  std::string error;
  jmp_buf scheduler;
  ucontext_t first;
  Fiber* self = nullptr;
  dim3 block, grid;
  unsigned threads = 0, schedule = 0, random = 1;

  bool late() { return schedule % 2 == 0; }
  char* shared() { return memory.get() + (1024 - reinterpret_cast<uintptr_t>(memory.get()) % 1024) % 1024; }
};

inline Machine& machine() {
  static Machine one;
  return one;
}

// Leave the running fiber; it goes on when the scheduler picks it again.
__attribute__((noinline)) inline void leave() {
  Machine& m = machine();
  if (!_setjmp(m.self->at)) _longjmp(m.scheduler, 1);
}

inline std::string where(const Place& place) {
  std::string file = place.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line());
}

// End the launch with a message.
inline void fail(const std::string& message) {
  Machine& m = machine();
  if (m.error.empty()) m.error = "block " + std::to_string(m.block.x) + ": " + message;
  m.self->state = State::done;
  leave();
}

// Wait for `expected` threads; the last one runs `act` on what all have brought, in order of `index`.
template <class Act>
void meet(Meeting& meeting, unsigned expected, unsigned index, void* mine, const char* what, Place place, Act act) {
  Machine& m = machine();
  Fiber& me = *m.self;
  me.what = what;
  me.place = place;
  if (meeting.arrived) {
    const Fiber& other = m.fibers[meeting.members[0]];
    bool same = other.place.line() == place.line() && !strcmp(other.place.file_name(), place.file_name());
    if (!same || strcmp(other.what, what))
      return fail("divergent: thread " + std::to_string(other.thread) + " is in " + other.what + " at " +
                  where(other.place) + ", thread " + std::to_string(me.thread) + " in " + what + " at " + where(place));
  }
  meeting.members.push_back(me.thread);
  meeting.brought[index] = mine;
  if (++meeting.arrived < expected) {
    me.state = State::meeting;
    return leave();
  }
  act(meeting.brought.data());
  for (unsigned thread : meeting.members) m.fibers[thread].state = State::ready;
  meeting.members.clear();
  meeting.arrived = 0;
}

inline unsigned lane() { return machine().self->thread % WARP; }

template <class Act>
void meet_warp(void* mine, const char* what, Place place, Act act) {
  Machine& m = machine();
  meet(m.warps[m.self->thread / WARP], WARP, lane(), mine, what, place, act);
}

template <class Act>
void meet_warpgroup(void* mine, const char* what, Place place, Act act) {
  Machine& m = machine();
  unsigned thread = m.self->thread;
  meet(m.warpgroups[thread / WARPGROUP], WARPGROUP, thread % WARPGROUP, mine, what, place, act);
}

// Wait until `ready`, which other threads or a transfer bring about.
inline void poll(std::function<bool()> ready, const char* what, Place place) {
  if (ready()) return;
  Fiber& me = *machine().self;
  me.what = what;
  me.place = place;
  me.until = std::move(ready);
  me.state = State::polling;
  leave();
}

inline void enter() {
  Machine& m = machine();
  m.kernel();
  m.self->state = State::done;
  leave();
}

__attribute__((noinline)) inline void resume(Fiber& fiber) {
  Machine& m = machine();
  m.self = &fiber;
  if (_setjmp(m.scheduler)) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  swapcontext(&m.first, &fiber.start);
}

inline void start(Fiber& fiber, unsigned thread) {
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = STACK;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, enter, 0);
  fiber.started = false;
  fiber.state = State::ready;
  fiber.thread = thread;
  fiber.copies.clear();
  fiber.copy_group = 0;
}

// Whose turn it is. 0: first to last. 1: last to first. Others: shuffled, the same way in every run.
inline std::vector<unsigned> order(unsigned n) {
  Machine& m = machine();
  std::vector<unsigned> turn(n);
  std::iota(turn.begin(), turn.end(), 0u);
  if (m.schedule == 1) std::reverse(turn.begin(), turn.end());
  for (unsigned i = n; m.schedule > 1 && i > 1; i--) {
    m.random = m.random * 1664525u + 1013904223u;
    std::swap(turn[i - 1], turn[(m.random >> 8) % i]);
  }
  return turn;
}

// Run one warp until each of its threads waits or is done; false if none could run.
inline bool run_warp(unsigned warp) {
  Machine& m = machine();
  bool ran = false, again = true;
  while (again && m.error.empty()) {
    again = false;
    for (unsigned lane : order(WARP)) {
      Fiber& fiber = m.fibers[warp * WARP + lane];
      if (fiber.state != State::ready || !m.error.empty()) continue;
      resume(fiber);
      ran = again = true;
    }
  }
  return ran;
}

inline bool wake_polling() {
  bool woke = false;
  Machine& m = machine();
  for (unsigned t = 0; t < m.threads; t++)
    if (m.fibers[t].state == State::polling && m.fibers[t].until()) {
      m.fibers[t].state = State::ready;
      woke = true;
    }
  return woke;
}

// Who waits where, for the message of a block that cannot go on.
inline std::string standstill() {
  Machine& m = machine();
  std::vector<std::pair<std::string, unsigned>> groups;
  for (unsigned t = 0; t < m.threads; t++) {
    const Fiber& fiber = m.fibers[t];
    std::string text = fiber.state == State::done ? "returned" : std::string("wait in ") + fiber.what + " at " + where(fiber.place);
    auto same = std::find_if(groups.begin(), groups.end(), [&](auto& group) { return group.first == text; });
    if (same == groups.end()) groups.push_back({text, 1}); else same->second++;
  }
  std::string all = "a barrier never completes: ";
  for (auto& [text, count] : groups) all += (&text == &groups[0].first ? "" : ", ") + std::to_string(count) + " threads " + text;
  return all;
}

inline void run_block() {
  Machine& m = machine();
  memset(m.shared(), 0xFF, MOST_SHARED + CANARY);  // NaN, in float and in bfloat16
  m.transfers.clear();
  for (auto* meetings : {&m.barriers, &m.warps, &m.warpgroups})
    for (Meeting& meeting : *meetings) meeting.arrived = 0, meeting.members.clear();
  for (auto& list : m.products) list.clear();
  for (unsigned t = 0; t < m.threads; t++) start(m.fibers[t], t);
  while (m.error.empty()) {
    bool ran = false;
    for (unsigned warp : order(m.threads / WARP)) ran |= run_warp(warp);
    if (ran || wake_polling()) continue;
    auto finished = [&](const Fiber& fiber) { return fiber.state == State::done; };
    if (std::all_of(m.fibers.begin(), m.fibers.begin() + m.threads, finished)) break;
    if (m.transfers.empty()) {
      m.error = "block " + std::to_string(m.block.x) + ": " + standstill();
      break;
    }
    auto oldest = std::move(m.transfers.front());
    m.transfers.erase(m.transfers.begin());
    oldest();
  }
}

// Run a kernel over its grid; 0, or 1 with the message in machine().error.
inline int run(dim3 grid, unsigned threads, size_t shared, std::function<void()> kernel) {
  Machine& m = machine();
  bool fits = threads % WARP == 0 && threads <= MOST_THREADS && shared <= MOST_SHARED;
  m.error = fits ? "" : "a block must be whole warps, at most 1024 threads with 227 KiB of shared memory";
  while (m.fibers.size() < threads) m.fibers.emplace_back();
  m.kernel = std::move(kernel);
  m.grid = grid;
  m.threads = threads;
  for (unsigned y = 0; y < grid.y && m.error.empty(); y++)
    for (unsigned x = 0; x < grid.x && m.error.empty(); x++) {
      m.block = {x, y};
      run_block();
      for (const char* past = m.shared() + shared; m.error.empty() && past < m.shared() + shared + CANARY; past++)
        if (*past != char(0xFF)) m.error = "block " + std::to_string(x) + ": wrote past its shared memory";
    }
  return m.error.empty() ? 0 : 1;
}

template <class T, class From>
T shuffle(T value, From from, const char* what, Place place) {
  struct Mine {
    T in, out;
    unsigned from;
  } mine{value, value, from(lane())};
  meet_warp(&mine, what, place, [](void** all) {
    for (unsigned l = 0; l < WARP; l++) {
      auto* one = static_cast<Mine*>(all[l]);
      one->out = static_cast<Mine*>(all[one->from])->in;
    }
  });
  return mine.out;
}

}  // namespace cpu

extern "C" {

// Even schedules have what is asynchronous done as late as allowed, odd ones at once.
__attribute__((used)) inline void cuda_on_cpu_schedule(unsigned schedule) {
  cpu::machine().schedule = schedule;
  cpu::machine().random = schedule;
}

// Why the last launch failed.
__attribute__((used)) inline const char* cuda_on_cpu_error() { return cpu::machine().error.c_str(); }
}

// ---- what a kernel sees

#define threadIdx (dim3{cpu::machine().self->thread, 0, 0})
#define blockIdx (cpu::machine().block)
#define blockDim (dim3{cpu::machine().threads, 1, 1})
#define gridDim (cpu::machine().grid)

inline void __syncthreads(cpu::Place place = cpu::Place::current()) {
  cpu::Machine& m = cpu::machine();
  cpu::meet(m.barriers[0], m.threads, m.self->thread, nullptr, "__syncthreads", place, [](void**) {});
}

inline void __syncwarp(unsigned = ~0u, cpu::Place place = cpu::Place::current()) {
  cpu::meet_warp(nullptr, "__syncwarp", place, [](void**) {});
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask, cpu::Place place = cpu::Place::current()) {
  return cpu::shuffle(value, [=](unsigned lane) { return lane ^ mask; }, "__shfl_xor_sync", place);
}

template <class T>
T __shfl_sync(unsigned, T value, int from, cpu::Place place = cpu::Place::current()) {
  return cpu::shuffle(value, [=](unsigned) { return unsigned(from); }, "__shfl_sync", place);
}

template <class T>
T atomicAdd(T* at, T value) {
  T before = *at;
  *at += value;
  return before;
}

template <class T>
T min(T a, T b) { return b < a ? b : a; }
template <class T>
T max(T a, T b) { return a < b ? b : a; }

// ---- bfloat16: the upper half of a float, rounded to nearest, ties to even

struct __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  uint32_t bits = uint32_t(value.bits) << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

inline __nv_bfloat16 __float2bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (value != value) return {uint16_t(0x7FFF)};
  return {uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
}

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16(x), __float2bfloat16(y)}; }

// ---- the host's side

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
