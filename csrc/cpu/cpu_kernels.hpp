// Inner products and the update for lists of tensors in CPU memory, each in one pass over it.
//
//   products       <g_ik, g_jk> of every tensor k                 reads m gradients once
//   in_metric      the same, and <g_ik, D g_jk> for AdamW's D   reads m + 1 once
//   fold           the m gradients of a layer from its groups'   reads groups, writes m
//   combine        out  = sum_i alpha_i g_i                       reads m, writes 1
//   combine_adamw  the same sum and a decoupled AdamW step        reads m + 3, writes 3
//
// Tensors are addresses and lengths: an m x n table of gradients (address 0: no gradient, i.e.
// zeros) and one length and dtype for each of the n columns. Work is cut into chunks that depend
// on the lengths only and every chunk's sums are formed in a fixed order, so the results are the
// same bits for any number of threads, and on every target: lanes are written out, contraction to
// FMA is off (setup.py), and division and square root are correctly rounded by IEEE.
#pragma once

#include <cstdint>
#include <vector>

namespace raco {

enum class Dtype : std::uint8_t { float32, bfloat16, float16, float64 };
constexpr int kDtypes = 4;
constexpr int kMaxLists = 32;

// n columns of m gradients. Gradients of one column share their length and dtype.
struct Lists {
  int m;
  std::int64_t n;
  const std::int64_t* address;  // [m, n], 0 where there is no gradient
  const std::int64_t* length;   // [n], elements
  const std::uint8_t* dtype;    // [n], Dtype
};

// What products and the updates need beside the data: how many threads may run and on which target.
struct Target;
struct Execution {
  int threads;
  const Target* target;
};

// The targets that this processor can run, best first; the last is the plain build.
const std::vector<const Target*>& targets();

// out[k], m x m, symmetric: the inner products of column k's gradients, the same bits whatever other
// columns the call has; their sum over k is the Gram matrix. Float32 products (float64 for float64
// gradients), summed in float32 over at most kBlock / kLanes elements, then in float64.
void products(const Lists& grads, const Execution& how, double* out);

// out[k], 2 x m x m: the same bits, and the inner products in the metric of AdamW's update,
// sum_e g_ik[e] g_jk[e] factor_k / (sqrt(v_k[e]) root_k + eps_k) over the elements with v_k[e] != 0,
// formed as products of each gradient times the root of that weight.
struct Metric {
  const std::int64_t* address;  // [n] of second moments v; 0: the column has no part in it
  const std::uint8_t* dtype;    // [n]
  const double* numbers;        // [n, 3]: root, eps, factor
};
void products_in_metric(const Lists& grads, const Metric& metric, const Execution& how, double* out);

// Writes the m gradients of a layer, out_i = sum_g U_ig t_g, rounded once, or adds them where not
// `fresh`; t is [groups, n] and U [m, groups] in float32 (float64 for float64 gradients), the
// arithmetic's type. Products of what was written, as `products` forms them, are added to the
// m x m numbers `sums` unless it is null: those of n elements that begin at a multiple of kChunk are
// the next terms of the sum over a whole tensor.
struct Groups {
  int m, groups;
  std::int64_t n;
  const void* t;
  const double* U;
  const std::int64_t* out;  // [m] addresses
  Dtype dtype;              // of out
  bool fresh;
};
void fold(const Groups& layer, const Execution& how, double* sums);

// out[k] = sum_i alpha_i g_ik in float32 (float64 for float64 gradients), rounded once to out's
// dtype; zeros where column k has no gradient. out[k] may be one of the gradients of column k.
struct Tensors {
  const std::int64_t* address;  // [n]
  const std::uint8_t* dtype;    // [n]
};
void combine(const Lists& grads, const double* alpha, const Tensors& out, const Execution& how);

// What a bfloat16 parameter becomes; all but nearest are for bfloat16 parameters only.
enum class Rounding : std::uint8_t { nearest, stochastic, split };
constexpr int kRoundings = 3;

// torch.optim.AdamW's step. Step counts belong to a column because parameters may have taken
// different numbers of steps.
struct AdamW {
  double decay;                   // 1 - lr * weight_decay
  double beta1, beta2, eps;
  const double* step_size;        // [n], lr / (1 - beta1^t)
  const double* root_correction;  // [n], 1 / sqrt(1 - beta2^t)
  Rounding rounding;
  const double* step;             // [n], t, for stochastic rounding
  std::uint32_t seed;             // of stochastic rounding
  const std::int64_t* residual;   // [n], addresses of 2 bytes per element for split
  const std::int64_t* places;     // [n, 4] for stochastic rounding: tensor, offset, width, pitch of
                                  // raco_fast/backends/rounding.py's Place
};
void combine_adamw(const Lists& grads, const double* alpha, const Tensors& params,
                   const Tensors& exp_avgs, const Tensors& exp_avg_sqs, const AdamW& adamw,
                   const Execution& how);

}  // namespace raco
