// The router in one kernel: scores, the best groups, the K best experts, gates, and how many tokens each expert got.
// One warp a token; lane l looks after experts l, l + 32, ...
#pragma once
#include "launch.cuh"

constexpr int ROUTER_WARPS = 4, ROUTER_TOKENS = 16;  // tokens a block: so many add to a histogram of its own
constexpr int MOST_EXPERTS = 512, PER_LANE = MOST_EXPERTS / 32;
constexpr float TINY = 1e-20f;  // all chosen sigmoids may underflow to 0
constexpr unsigned ALL_LANES = 0xFFFFFFFF;

struct RouterSettings {
  int tokens, experts, top_k, sigmoid, groups, reached, two_best, normalise;
  float scale;
};

struct RouterShared {
  float scores[ROUTER_WARPS][MOST_EXPERTS], ranked[ROUTER_WARPS][MOST_EXPERTS];
  int counts[MOST_EXPERTS];
};

__device__ __forceinline__ float warp_sum(float value) {
  for (int step = 16; step; step /= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
  for (int step = 16; step; step /= 2) value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, step));
  return value;
}

// The largest value of the warp and its id; of equal ones the lowest id. All lanes get the answer.
__device__ __forceinline__ int warp_argmax(float value, int id) {
  for (int step = 16; step; step /= 2) {
    float other = __shfl_xor_sync(ALL_LANES, value, step);
    int other_id = __shfl_xor_sync(ALL_LANES, id, step);
    if (other > value || (other == value && other_id < id)) value = other, id = other_id;
  }
  return id;
}

// Softmax (DeepSeekMoE Eq 5) or sigmoid (DeepSeek-V3 Eq 15) of one token's logits, to shared memory.
__device__ __forceinline__ void score(const float* logits, const RouterSettings& s, int lane, float* scores) {
  float value[PER_LANE], most = -INFINITY, sum = 0;
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    int e = lane + 32 * i;
    value[i] = e < s.experts ? logits[e] : -INFINITY;
    most = fmaxf(most, value[i]);
  }
  if (!s.sigmoid) most = warp_max(most);
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    value[i] = s.sigmoid ? 1 / (1 + expf(-value[i])) : expf(value[i] - most);
    sum += value[i];
  }
  if (!s.sigmoid) sum = warp_sum(sum);
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) {
    int e = lane + 32 * i;
    if (e < s.experts) scores[e] = s.sigmoid ? value[i] : value[i] / sum;
  }
}

// Which groups a token may reach, one bit each: the best by their best score (V2), or by the sum of their best two (V3).
__device__ __forceinline__ unsigned reachable(const float* ranked, const RouterSettings& s, int lane) {
  float first = -INFINITY, second = -INFINITY;
  int size = s.experts / s.groups;
  for (int i = 0; lane < s.groups && i < size; i++) {
    float value = ranked[lane * size + i];
    if (value > first) second = first, first = value;
    else if (value > second) second = value;
  }
  float worth = s.two_best ? first + second : first;
  unsigned reached = 0;
  for (int i = 0; i < s.reached; i++) {
    int best = warp_argmax(worth, lane < s.groups ? lane : 32 + lane);
    if (best < 32) reached |= 1u << best;
    if (lane == best) worth = -INFINITY;
  }
  return reached;
}

// logits (T, E), bias (E) or null -> scores (T, E), ids (T, K), gates (T, K); adds to counts (E).
__global__ void route(const float* logits, const float* bias, RouterSettings s, float* scores, long long* ids, float* gates,
                      int* counts) {
  auto& shared = shared_memory<RouterShared>();
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float *own = shared.scores[warp], *ranked = shared.ranked[warp];
  for (int e = threadIdx.x; e < s.experts; e += blockDim.x) shared.counts[e] = 0;
  __syncthreads();
  for (int i = warp; i < ROUTER_TOKENS; i += ROUTER_WARPS) {
    long token = long(blockIdx.x) * ROUTER_TOKENS + i;
    if (token >= s.tokens) break;
    score(logits + token * s.experts, s, lane, own);
    for (int e = lane; e < s.experts; e += 32) {
      scores[token * s.experts + e] = own[e];
      ranked[e] = own[e] + (bias ? bias[e] : 0);
    }
    __syncwarp();
    unsigned groups = s.reached < s.groups ? reachable(ranked, s, lane) : ALL_LANES;
    int size = s.experts / s.groups;
    float value[PER_LANE];
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
      int e = lane + 32 * j;
      value[j] = e < s.experts && (s.reached == s.groups || groups >> e / size & 1) ? ranked[e] : -INFINITY;
    }
    int mine = 0;  // lane k keeps the k-th choice
    for (int k = 0; k < s.top_k; k++) {
      float best = -INFINITY;
      int id = MOST_EXPERTS;
#pragma unroll
      for (int j = 0; j < PER_LANE; j++)
        if (value[j] > best) best = value[j], id = lane + 32 * j;
      id = warp_argmax(best, id);
      if (lane == k) mine = id;
#pragma unroll
      for (int j = 0; j < PER_LANE; j++)
        if (id == lane + 32 * j) value[j] = -INFINITY;
    }
    bool chose = lane < s.top_k && mine < s.experts;  // false where a score is NaN
    float gate = chose ? own[mine] : 0;
    float sum = s.normalise ? warp_sum(gate) + TINY : 1;
    if (lane < s.top_k) {
      ids[token * s.top_k + lane] = chose ? mine : -1;
      gates[token * s.top_k + lane] = gate / sum * s.scale;
      if (chose) atomicAdd(&shared.counts[mine], 1);
    }
    __syncwarp();
  }
  __syncthreads();
  for (int e = threadIdx.x; e < s.experts; e += blockDim.x)
    if (shared.counts[e]) atomicAdd(&counts[e], shared.counts[e]);
}

// d_scores (T, E) or null, d_gates (T, K) -> d_logits (T, E), through gates and scores; the choice has no gradient.
__global__ void route_backward(const float* scores, const long long* ids, const float* d_scores, const float* d_gates,
                               RouterSettings s, float* d_logits) {
  auto& shared = shared_memory<RouterShared>();
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* d = shared.scores[warp];
  for (int i = warp; i < ROUTER_TOKENS; i += ROUTER_WARPS) {
    long token = long(blockIdx.x) * ROUTER_TOKENS + i;
    if (token >= s.tokens) break;
    const float* own = scores + token * s.experts;
    for (int e = lane; e < s.experts; e += 32) d[e] = d_scores ? d_scores[token * s.experts + e] : 0;
    __syncwarp();
    int id = lane < s.top_k ? int(ids[token * s.top_k + lane]) : -1;
    float affinity = id >= 0 ? own[id] : 0, d_gate = id >= 0 ? d_gates[token * s.top_k + lane] * s.scale : 0;
    if (s.normalise) {  // of a_k / sum a
      float sum = warp_sum(affinity) + TINY;
      d_gate = (d_gate - warp_sum(d_gate * affinity) / sum) / sum;
    }
    if (id >= 0) d[id] += d_gate;  // the K ids of a token differ
    __syncwarp();
    float dot = 0;
    for (int e = lane; e < s.experts; e += 32) dot += d[e] * own[e];
    dot = warp_sum(dot);
    for (int e = lane; e < s.experts; e += 32)
      d_logits[token * s.experts + e] = own[e] * (s.sigmoid ? d[e] * (1 - own[e]) : d[e] - dot);
  }
}
