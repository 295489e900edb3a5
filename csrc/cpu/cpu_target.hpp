// One target = the inner functions compiled for one instruction set. The *_kernel.hpp are
// included once per target (cpu_baseline.cpp, cpu_avx2.cpp, cpu_avx512.cpp), each time inside a
// namespace of its own.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu_kernels.hpp"

namespace raco {

constexpr int kLanes = 8;      // partial sums of a dot product; the same on every target
constexpr int kBlock = 512;    // elements of one gradient at a time: 8 gradients fill half of an L1
constexpr int kChunk = 16384;  // elements of one column that a thread takes at a time

// The gradients that one column has, from some element on.
struct Present {
  int count;
  int index[kMaxLists];  // which objective
  const void* data[kMaxLists];
  double alpha[kMaxLists];
  Dtype dtype;
};

struct Slice {
  void* data;
  Dtype dtype;
};

// Whose random bits a chunk gets: those of its elements' numbers in the whole tensor. Element e of
// the column has number offset + (e / width) * pitch + e % width there, offset + e for width 0.
struct Place {
  std::uint32_t seed, step, tensor;
  std::int64_t start;  // the chunk's first element in the column
  std::int64_t offset, width, pitch;
};

struct Step {
  double decay, beta1, beta2, eps, step_size, root_correction;
  Rounding rounding;
  Place place;     // for stochastic rounding
  void* residual;  // of the chunk, or null
};

// The second moment of one column from some element on (null: none), and the numbers of its metric.
struct Moment {
  Slice second;
  double root, eps, factor;
};

// The objectives' numbers, where all of them are present.
constexpr int kEvery[kMaxLists] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                   16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};

// out_i = sum over groups of U_ig t_g (+ out_i), from some element on; see fold_kernel.hpp.
struct Fold {
  int m, groups;
  const void* t;  // [groups] rows of the arithmetic's type, `pitch` elements apart
  std::int64_t pitch;
  const void* U;  // [m, groups] of that type
  void* out[kMaxLists];
  Dtype dtype;  // of out
  bool fresh;   // overwrite
};

struct Target {
  const char* name;
  // sums[(i * m + j) * kLanes + lane] += products of n elements, for i <= j
  void (*gram)(const Present& grads, int m, std::int64_t n, double* sums);
  // the same sums, and behind them those in the metric of a second moment; see metric_kernel.hpp
  void (*gram_in_metric)(const Present& grads, const Moment& moment, int m, std::int64_t n,
                         double* sums);
  // the sums of `gram` of what it writes, unless they are null
  void (*fold)(const Fold& fold, std::int64_t n, double* sums);
  void (*combine)(const Present& grads, std::int64_t n, Slice out);
  void (*adamw)(const Present& grads, std::int64_t n, Slice param, Slice exp_avg,
                Slice exp_avg_sq, const Step& step);
};

extern const Target kBaseline;
#if defined(__x86_64__) && defined(__GNUC__)
#define RACO_X86_TARGETS 1
extern const Target kAvx2;
extern const Target kAvx512;
#endif

}  // namespace raco
