// A grouped matrix product, C_e = A_e B_e for every expert e, apart from how a block multiplies: which tile of which
// expert a block has, where the operands' elements lie, and what happens to a sum once it is complete.
#pragma once
#include "launch.cuh"

// As BLAS calls A and B, all of them row-major. N counts the rows of all experts.
//   NT: rows (N, k) times matrices (E, n, k)^T, into (N, n).   Forward.
//   NN: rows (N, k) times matrices (E, k, n), into (N, n).     Gradients of rows.
//   TN: rows (N, m)^T times rows (N, n), into (E, m, n).       Gradients of matrices; k runs over an expert's rows.
enum class Layout { NT, NN, TN };

// How operands are put together: one product; two that share A (W_gate x and W_up x); the sum of two.
enum class Form { ONE, DUAL, SUM };

template <class T>
struct Operands {
  const T *a[2], *b[2];
};

struct Sizes {
  const int* ends;  // (E,) cumulative rows
  int experts, rows, m, n, k;  // m is read in TN only, k in the others
};

// One tile of the result, and the range of k that it sums over. In NT and NN m counts the rows of all experts; in TN k
// does.
struct Tile {
  int expert, m, m_end, n, k, k_end;
};

// Tiles a launch has at most: what an expert's rows do not fill is not known on the host.
template <Layout LAYOUT, int BM, int BN>
long most_tiles(const Sizes& s) {
  long columns = ceil_div(s.n, BN);
  return LAYOUT == Layout::TN ? long(s.experts) * ceil_div(s.m, BM) * columns : (s.rows / BM + long(s.experts)) * columns;
}

// Where a walk through the experts stands: `before` tiles belong to experts before `expert`.
struct Cursor {
  int expert = 0;
  long before = 0;
};

// Move the cursor on to the expert that owns `number` and describe that tile; false past the last one.
template <Layout LAYOUT, int BM, int BN>
__device__ __forceinline__ bool find_tile(const Sizes& s, long number, Cursor& cursor, Tile& tile) {
  int columns = ceil_div(s.n, BN);
  for (; cursor.expert < s.experts; cursor.expert++) {
    int start = cursor.expert ? s.ends[cursor.expert - 1] : 0, end = s.ends[cursor.expert];
    int down = ceil_div(LAYOUT == Layout::TN ? s.m : end - start, BM);
    if (number < cursor.before + long(down) * columns) {
      int inside = int(number - cursor.before);
      int m = inside % down * BM, n = inside / down * BN;  // down first: neighbours share columns of B
      if (LAYOUT == Layout::TN)
        tile = {cursor.expert, m, s.m, n, start, end};
      else
        tile = {cursor.expert, start + m, end, n, 0, s.k};
      return true;
    }
    cursor.before += long(down) * columns;
  }
  return false;
}

// Every row must have an expert: ends[-1] = N. No printf here: around a call of a function ptxas would serialise wgmma.
__device__ __forceinline__ void require_ends(const Sizes& s) {
  if (blockIdx.x != 0 || threadIdx.x != 0 || s.ends[s.experts - 1] == s.rows) return;
#ifdef CUDA_ON_CPU
  cpu::fail("ends[-1] = " + std::to_string(s.ends[s.experts - 1]) + " must be the number of rows, " + std::to_string(s.rows));
#else
  __trap();
#endif
}

// Where A(m, k) and B(n, k) lie.
template <Layout LAYOUT>
__device__ __forceinline__ size_t a_index(const Sizes& s, int m, int k) {
  return LAYOUT == Layout::TN ? size_t(k) * s.m + m : size_t(m) * s.k + k;
}

template <Layout LAYOUT>
__device__ __forceinline__ size_t b_index(const Sizes& s, int expert, int n, int k) {
  if (LAYOUT == Layout::NT) return (size_t(expert) * s.n + n) * s.k + k;
  if (LAYOUT == Layout::NN) return (size_t(expert) * s.k + k) * s.n + n;
  return size_t(k) * s.n + n;
}

// The row of the result, as the epilogues count: in TN the experts' matrices stand under each other.
template <Layout LAYOUT>
__device__ __forceinline__ size_t out_row(const Sizes& s, const Tile& tile, int m) {
  return LAYOUT == Layout::TN ? size_t(tile.expert) * s.m + m : m;
}

// ---- What happens to complete sums. `write` gets W neighbours of one row; SUMS: it returns its share of a number that
// belongs to the whole row, which the kernel adds up and leaves in `sums`, one column for each of `slots`.

// Hand W neighbours to the epilogue, of both products where there are two; its share of the row's number, or 0.
template <Form FORM, class Epilogue, int W>
__device__ __forceinline__ float write_out(const Epilogue& out, size_t row, int column, int n, const float (&one)[W],
                                           const float (&other)[W]) {
  if constexpr (Epilogue::SUMS) return out.write(row, column, n, one);
  if constexpr (FORM == Form::DUAL)
    out.write(row, column, n, one, other);
  else
    out.write(row, column, n, one);
  return 0;
}

template <class T>
struct Store {
  static constexpr bool SUMS = false;
  T* out;

  template <int W>
  __device__ __forceinline__ void write(size_t row, int column, int n, const float (&sum)[W]) const {
    Vector<T, W> result;
#pragma unroll
    for (int j = 0; j < W; j++) result.at[j] = rounded<T>(sum[j]);
    *reinterpret_cast<Vector<T, W>*>(out + row * n + column) = result;
  }
};

// hidden = silu(a) * b * gate, with a = W_gate x and b = W_up x; a and b are kept for the backward pass, or null.
template <class T>
struct SwiGLU {
  static constexpr bool SUMS = false;
  const T* gates;
  T *hidden, *a, *b;

  template <int W>
  __device__ __forceinline__ void write(size_t row, int column, int n, const float (&gate)[W], const float (&up)[W]) const {
    float g = float_of(gates[row]), product[W];
#pragma unroll
    for (int j = 0; j < W; j++) product[j] = gate[j] / (1 + expf(-gate[j])) * up[j] * g;
    Store<T>{hidden}.write(row, column, n, product);
    if (a) Store<T>{a}.write(row, column, n, gate);
    if (b) Store<T>{b}.write(row, column, n, up);
  }
};

// From d = dL/d(hidden), hidden = gate * silu(a) * b: da and db over a and b, hidden once more, and dL/d(gate).
template <class T>
struct SwiGLUBackward {
  static constexpr bool SUMS = true;
  const T* gates;
  T *hidden, *a, *b;
  float* sums;
  int slots;

  template <int W>
  __device__ __forceinline__ float write(size_t row, int column, int n, const float (&d)[W]) const {
    auto* as = reinterpret_cast<Vector<T, W>*>(a + row * n + column);
    auto* bs = reinterpret_cast<Vector<T, W>*>(b + row * n + column);
    Vector<T, W> av = *as, bv = *bs, h;
    float g = float_of(gates[row]), d_gate = 0;
#pragma unroll
    for (int j = 0; j < W; j++) {
      float x = float_of(av.at[j]), y = float_of(bv.at[j]);
      float sigmoid = 1 / (1 + expf(-x)), silu = x * sigmoid;
      d_gate += d[j] * silu * y;
      h.at[j] = rounded<T>(silu * y * g);
      av.at[j] = rounded<T>(d[j] * g * y * sigmoid * (1 + x * (1 - sigmoid)));
      bv.at[j] = rounded<T>(d[j] * g * silu);
    }
    *as = av;
    *bs = bv;
    *reinterpret_cast<Vector<T, W>*>(hidden + row * n + column) = h;
    return d_gate;
  }
};
