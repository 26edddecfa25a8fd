// The kernels of a layer of experts, as functions that ctypes can call: pointers, sizes, a stream; the answer is 0 or an
// error's code, which moe_error puts into words. Compiled by nvcc for a GPU, and by g++ with cuda_on_cpu.h for a CPU.
#include "gemm_hopper.cuh"
#include "gemm_mma.cuh"
#include "gemm_naive.cuh"
#include "gemm_tiled.cuh"
#include "gemm_wmma.cuh"
#include "permute.cuh"
#include "router.cuh"
#include "tensor_map.cuh"

namespace {

enum Rung { NAIVE, TILED, WMMA, MMA, HOPPER };
enum Code { UNKNOWN_RUNG = -1, NOT_HOPPER = -2 };

// ---- One launch of a grouped product, by rung

template <class T, Layout LAYOUT, Form FORM, class Epilogue>
int run_tiled(const Operands<T>& in, const Sizes& s, const Epilogue& out, cudaStream_t stream) {
  dim3 grid{unsigned(most_tiles<LAYOUT, tiled::BM, tiled::BN>(s))};
  return launch(tiled::gemm<T, LAYOUT, FORM, Epilogue>, grid, tiled::THREADS, sizeof(tiled::Shared<FORM>), stream, in, s, out);
}

template <Layout LAYOUT, Form FORM, class Epilogue>
int run_mma(const Operands<bf16>& in, const Sizes& s, const Epilogue& out, cudaStream_t stream) {
  constexpr int WIDTH = FORM == Form::DUAL ? mma_rung::BN / 2 : mma_rung::BN;
  dim3 grid{unsigned(most_tiles<LAYOUT, mma_rung::BM, WIDTH>(s))};
  return launch(mma_rung::gemm<LAYOUT, FORM, Epilogue>, grid, mma_rung::THREADS, sizeof(mma_rung::Shared), stream, in, s, out);
}

template <Layout LAYOUT, Form FORM, int HALVES, class Epilogue>
int run_hopper(const Operands<bf16>& in, const Sizes& s, const Epilogue& out, cudaStream_t stream) {
  constexpr int WIDTH = FORM == Form::DUAL ? hopper::BN : hopper::BN * HALVES;
  if (s.rows == 0) return 0;  // there is no map of nothing
  Gpu gpu;
  if (int failed = look_at(&gpu)) return failed;
  if (gpu.generation != 9) return NOT_HOPPER;
  hopper::Maps maps{};
  for (int i = 0; i < (FORM == Form::ONE ? 1 : 2); i++) {
    const bf16* a = in.a[FORM == Form::SUM ? i : 0];
    int failed = LAYOUT == Layout::TN ? describe(&maps.a[i], a, 1, s.rows, s.m, hopper::BK)
                                      : describe(&maps.a[i], a, 1, s.rows, s.k, hopper::BM);
    if (failed) return failed;
    failed = LAYOUT == Layout::TN   ? describe(&maps.b[i], in.b[i], 1, s.rows, s.n, hopper::BK)
             : LAYOUT == Layout::NN ? describe(&maps.b[i], in.b[i], s.experts, s.k, s.n, hopper::BK)
                                    : describe(&maps.b[i], in.b[i], s.experts, s.n, s.k, hopper::BN);
    if (failed) return failed;
  }
  long tiles = most_tiles<LAYOUT, hopper::BM, WIDTH>(s);
  dim3 grid{unsigned(tiles < gpu.multiprocessors ? tiles : gpu.multiprocessors)};
  return launch(hopper::gemm<LAYOUT, FORM, HALVES, Epilogue>, grid, hopper::THREADS, sizeof(hopper::Shared<HALVES>), stream,
                maps, s, out);
}

// The rungs that have every layout, form and epilogue.
template <Layout LAYOUT, Form FORM, int HALVES, template <class> class Epilogue>
int run_any(int rung, bool floats, const void* a0, const void* a1, const void* b0, const void* b1, const Sizes& s,
            const Epilogue<float>& of_floats, const Epilogue<bf16>& of_bf16, cudaStream_t stream) {
  if (floats) {
    if (rung != TILED) return UNKNOWN_RUNG;
    Operands<float> in{{(const float*)a0, (const float*)a1}, {(const float*)b0, (const float*)b1}};
    return run_tiled<float, LAYOUT, FORM>(in, s, of_floats, stream);
  }
  Operands<bf16> in{{(const bf16*)a0, (const bf16*)a1}, {(const bf16*)b0, (const bf16*)b1}};
  if (rung == TILED) return run_tiled<bf16, LAYOUT, FORM>(in, s, of_bf16, stream);
  if (rung == MMA) return run_mma<LAYOUT, FORM>(in, s, of_bf16, stream);
  if (rung == HOPPER) return run_hopper<LAYOUT, FORM, HALVES>(in, s, of_bf16, stream);
  return UNKNOWN_RUNG;
}

template <class T>
int run_naive(const void* rows, const void* matrices, const Sizes& s, void* out, cudaStream_t stream) {
  Operands<T> in{{(const T*)rows}, {(const T*)matrices}};
  dim3 grid{unsigned((long(s.rows) * s.n + NAIVE_THREADS - 1) / NAIVE_THREADS)};
  return launch(gemm_naive<T>, grid, NAIVE_THREADS, 0, stream, in, s, Store<T>{(T*)out});
}

// One block a row, and as many threads as 16-byte pieces, in whole warps.
int threads_for(int pieces) { return pieces >= 256 ? 256 : ceil_div(pieces, 32) * 32; }

template <class T, int W>
int run_permute(const void* x, const long long* token, int tokens, int rows, int width, void* out, cudaStream_t stream) {
  return launch(permute<T, W>, dim3{unsigned(rows)}, threads_for(width / W), 0, stream, (const T*)x, token, tokens, width,
                (T*)out);
}

template <class T, int W>
int run_combine(const void* rows, const int* row_of_choice, int tokens, int n_rows, int top_k, int width, void* y,
                cudaStream_t stream) {
  return launch(combine<T, W>, dim3{unsigned(tokens)}, threads_for(width / W), 0, stream, (const T*)rows, row_of_choice, n_rows, top_k,
                width, (T*)y);
}

}  // namespace

extern "C" {

// What the code of a launch means.
const char* moe_error(int code) {
  if (code == UNKNOWN_RUNG) return "this rung does not have this product in this dtype";
  if (code == NOT_HOPPER) return "the hopper rung needs a GPU of compute capability 9.0";
#ifdef CUDA_ON_CPU
  return cpu::machine().error.c_str();
#else
  return cudaGetErrorString(cudaError_t(code));
#endif
}

// Columns of partial sums that hidden_backward leaves for each row, for hidden width F.
int moe_slots(int rung, int width) {
  if (rung == MMA) return ceil_div(width, mma_rung::BN) * mma_rung::WARPS_N;
  return ceil_div(width, rung == HOPPER ? hopper::BN : tiled::BN);
}

int moe_route(const float* logits, const float* bias, int tokens, int experts, int top_k, int sigmoid, int groups, int reached,
              int two_best, int normalise, float scale, float* scores, long long* ids, float* gates, int* counts,
              cudaStream_t stream) {
  RouterSettings s{tokens, experts, top_k, sigmoid, groups, reached, two_best, normalise, scale};
  return launch(route, dim3{unsigned(ceil_div(tokens, ROUTER_TOKENS))}, 32 * ROUTER_WARPS, sizeof(RouterShared), stream, logits,
                bias, s, scores, ids, gates, counts);
}

int moe_route_backward(const float* scores, const long long* ids, const float* d_scores, const float* d_gates, int tokens,
                       int experts, int top_k, int sigmoid, int normalise, float scale, float* d_logits, cudaStream_t stream) {
  RouterSettings s{tokens, experts, top_k, sigmoid, 1, 1, 0, normalise, scale};
  return launch(route_backward, dim3{unsigned(ceil_div(tokens, ROUTER_TOKENS))}, 32 * ROUTER_WARPS, sizeof(RouterShared), stream,
                scores, ids, d_scores, d_gates, s, d_logits);
}

int moe_permute(int floats, const void* x, const long long* token, int tokens, int rows, int width, void* out,
                cudaStream_t stream) {
  if (floats)
    return width % 4 ? run_permute<float, 1>(x, token, tokens, rows, width, out, stream)
                     : run_permute<float, 4>(x, token, tokens, rows, width, out, stream);
  return width % 8 ? run_permute<bf16, 1>(x, token, tokens, rows, width, out, stream)
                   : run_permute<bf16, 8>(x, token, tokens, rows, width, out, stream);
}

int moe_combine(int floats, const void* rows, const int* row_of_choice, int tokens, int n_rows, int top_k, int width, void* y,
                cudaStream_t stream) {
  if (floats)
    return width % 4 ? run_combine<float, 1>(rows, row_of_choice, tokens, n_rows, top_k, width, y, stream)
                     : run_combine<float, 4>(rows, row_of_choice, tokens, n_rows, top_k, width, y, stream);
  return width % 8 ? run_combine<bf16, 1>(rows, row_of_choice, tokens, n_rows, top_k, width, y, stream)
                   : run_combine<bf16, 8>(rows, row_of_choice, tokens, n_rows, top_k, width, y, stream);
}

// rows (N, k) times matrices (E, n, k)^T -> out (N, n). The product that every rung has.
int moe_multiply(int rung, int floats, const void* rows, const void* matrices, const int* ends, int experts, int n_rows, int n,
                 int k, void* out, cudaStream_t stream) {
  Sizes s{ends, experts, n_rows, 0, n, k};
  if (rung == NAIVE)
    return floats ? run_naive<float>(rows, matrices, s, out, stream) : run_naive<bf16>(rows, matrices, s, out, stream);
  if (rung == WMMA && !floats) {
    Operands<bf16> in{{(const bf16*)rows}, {(const bf16*)matrices}};
    dim3 grid{unsigned(most_tiles<Layout::NT, wmma_rung::BM, wmma_rung::BN>(s))};
    return launch(wmma_rung::gemm, grid, wmma_rung::THREADS, sizeof(wmma_rung::Shared), stream, in, s, Store<bf16>{(bf16*)out});
  }
  return run_any<Layout::NT, Form::ONE, 2>(rung, floats, rows, nullptr, matrices, nullptr, s, Store<float>{(float*)out},
                                           Store<bf16>{(bf16*)out}, stream);
}

// rows (N, D), gate and up (E, F, D), gates (N) -> hidden (N, F); a and b (N, F) too, unless they are null.
int moe_gate_up(int rung, int floats, const void* rows, const void* gate, const void* up, const void* gates, const int* ends,
                int experts, int n_rows, int width, int d_model, void* hidden, void* a, void* b, cudaStream_t stream) {
  Sizes s{ends, experts, n_rows, 0, width, d_model};
  SwiGLU<float> of_floats{(const float*)gates, (float*)hidden, (float*)a, (float*)b};
  SwiGLU<bf16> of_bf16{(const bf16*)gates, (bf16*)hidden, (bf16*)a, (bf16*)b};
  return run_any<Layout::NT, Form::DUAL, 2>(rung, floats, rows, nullptr, gate, up, s, of_floats, of_bf16, stream);
}

// dy_rows (N, D) times down (E, D, F) -> over a and b their gradients, hidden (N, F), sums (N, moe_slots) of d_gates.
int moe_hidden_backward(int rung, int floats, const void* dy_rows, const void* down, const void* gates, const int* ends,
                        int experts, int n_rows, int width, int d_model, void* a, void* b, void* hidden, float* sums,
                        cudaStream_t stream) {
  Sizes s{ends, experts, n_rows, 0, width, d_model};
  int slots = moe_slots(rung, width);
  SwiGLUBackward<float> of_floats{(const float*)gates, (float*)hidden, (float*)a, (float*)b, sums, slots};
  SwiGLUBackward<bf16> of_bf16{(const bf16*)gates, (bf16*)hidden, (bf16*)a, (bf16*)b, sums, slots};
  return run_any<Layout::NN, Form::ONE, 1>(rung, floats, dy_rows, nullptr, down, nullptr, s, of_floats, of_bf16, stream);
}

// da (N, F) times gate (E, F, D), plus db (N, F) times up (E, F, D) -> dx_rows (N, D).
int moe_rows_backward(int rung, int floats, const void* da, const void* db, const void* gate, const void* up, const int* ends,
                      int experts, int n_rows, int d_model, int width, void* dx_rows, cudaStream_t stream) {
  Sizes s{ends, experts, n_rows, 0, d_model, width};
  return run_any<Layout::NN, Form::SUM, 2>(rung, floats, da, db, gate, up, s, Store<float>{(float*)dx_rows},
                                           Store<bf16>{(bf16*)dx_rows}, stream);
}

// left (N, P)^T times right (N, Q), over the rows of each expert -> out (E, P, Q).
int moe_weights_backward(int rung, int floats, const void* left, const void* right, const int* ends, int experts, int n_rows,
                         int p, int q, void* out, cudaStream_t stream) {
  Sizes s{ends, experts, n_rows, p, q, 0};
  return run_any<Layout::TN, Form::ONE, 2>(rung, floats, left, nullptr, right, nullptr, s, Store<float>{(float*)out},
                                           Store<bf16>{(bf16*)out}, stream);
}
}
