#include "cpu_kernels.hpp"

#include <algorithm>

#include "cpu_target.hpp"
#include "parallel.hpp"

namespace raco {

namespace {

// Below this many elements a thread costs more than it saves.
constexpr std::int64_t kPerThread = 1 << 17;
struct Chunk {
  std::int64_t column, start, count;
};

// The work as a function of the lengths alone.
class Plan {
 public:
  explicit Plan(const Lists& grads) {
    for (std::int64_t k = 0; k < grads.n; ++k) {
      for (std::int64_t start = 0; start < grads.length[k]; start += kChunk)
        chunks_.push_back({k, start, std::min<std::int64_t>(kChunk, grads.length[k] - start)});
      elements_ += grads.length[k];
    }
  }

  const std::vector<Chunk>& chunks() const { return chunks_; }

  template <class Body>  // body(number of the chunk, chunk)
  void run(int threads, const Body& body) const {
    const auto useful = static_cast<int>(std::min<std::int64_t>(elements_ / kPerThread + 1, threads));
    parallel_for(static_cast<std::int64_t>(chunks_.size()), useful, [&](std::int64_t number) {
      body(number, chunks_[static_cast<std::size_t>(number)]);
    });
  }

 private:
  std::vector<Chunk> chunks_;
  std::int64_t elements_ = 0;
};

std::int64_t size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32: return 4;
    case Dtype::float64: return 8;
    default: return 2;
  }
}

Slice slice(const Tensors& tensors, const Chunk& chunk) {
  const auto dtype = static_cast<Dtype>(tensors.dtype[chunk.column]);
  return {reinterpret_cast<char*>(tensors.address[chunk.column]) + chunk.start * size_of(dtype),
          dtype};
}

// alpha: null for the Gram, which is of the gradients themselves.
Present present(const Lists& grads, const Chunk& chunk, const double* alpha) {
  Present found;
  found.count = 0;
  found.dtype = static_cast<Dtype>(grads.dtype[chunk.column]);
  for (int i = 0; i < grads.m; ++i) {
    const std::int64_t address = grads.address[i * grads.n + chunk.column];
    if (address == 0) continue;
    found.index[found.count] = i;
    found.data[found.count] =
        reinterpret_cast<const char*>(address) + chunk.start * size_of(found.dtype);
    found.alpha[found.count] = alpha == nullptr ? 1.0 : alpha[i];
    ++found.count;
  }
  return found;
}

Place place(const AdamW& adamw, const Chunk& chunk) {
  if (adamw.rounding != Rounding::stochastic) return {};
  const auto t = static_cast<std::uint32_t>(static_cast<std::int64_t>(adamw.step[chunk.column]));
  const std::int64_t* of_column = adamw.places + 4 * chunk.column;
  return {adamw.seed, t, static_cast<std::uint32_t>(of_column[0]),
          chunk.start, of_column[1], of_column[2], of_column[3]};
}

// A residual has 2 bytes per element.
void* residual(const AdamW& adamw, const Chunk& chunk) {
  if (adamw.residual == nullptr) return nullptr;
  return reinterpret_cast<char*>(adamw.residual[chunk.column]) + 2 * chunk.start;
}

// out[column] += the products of every chunk of a column, in the order of the chunks, whoever forms
// them: of_chunk(chunk, lanes) adds kLanes sums of each pair i <= j to Matrices x m x m x kLanes
// zeros.
template <int Matrices, class OfChunk>
void add_products(const Plan& plan, int m, int threads, double* out, const OfChunk& of_chunk) {
  const std::size_t pairs = static_cast<std::size_t>(Matrices) * m * m;
  std::vector<double> of_chunks(plan.chunks().size() * pairs);
  plan.run(threads, [&](std::int64_t number, const Chunk& chunk) {
    alignas(64) double lanes[Matrices * kMaxLists * kMaxLists * kLanes];
    std::fill_n(lanes, pairs * kLanes, 0.0);
    of_chunk(chunk, lanes);
    double* const sums = of_chunks.data() + static_cast<std::size_t>(number) * pairs;
    for (std::size_t pair = 0; pair < pairs; ++pair)
      for (int l = 0; l < kLanes; ++l) sums[pair] += lanes[pair * kLanes + l];
  });
  const double* sums = of_chunks.data();
  for (const Chunk& chunk : plan.chunks()) {
    double* M = out + static_cast<std::size_t>(chunk.column) * pairs;
    for (int matrix = 0; matrix < Matrices; ++matrix, M += m * m, sums += m * m)
      for (int i = 0; i < m; ++i)
        for (int j = i; j < m; ++j) M[j * m + i] = M[i * m + j] += sums[i * m + j];
  }
}

bool runs_here(const Target& target) {
#if defined(RACO_X86_TARGETS)
  __builtin_cpu_init();
  if (&target == &kAvx2) return __builtin_cpu_supports("avx2");
  if (&target == &kAvx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
#endif
  return &target == &kBaseline;
}

}  // namespace

const std::vector<const Target*>& targets() {
  static const std::vector<const Target*> found = [] {
    std::vector<const Target*> usable;
    for (const Target* target : {
#if defined(RACO_X86_TARGETS)
             &kAvx512, &kAvx2,
#endif
             &kBaseline})
      if (runs_here(*target)) usable.push_back(target);
    return usable;
  }();
  return found;
}

void products(const Lists& grads, const Execution& how, double* out) {
  std::fill_n(out, grads.n * grads.m * grads.m, 0.0);
  add_products<1>(Plan(grads), grads.m, how.threads, out, [&](const Chunk& chunk, double* lanes) {
    how.target->gram(present(grads, chunk, nullptr), grads.m, chunk.count, lanes);
  });
}

void products_in_metric(const Lists& grads, const Metric& metric, const Execution& how,
                        double* out) {
  std::fill_n(out, 2 * grads.n * grads.m * grads.m, 0.0);
  const Tensors moments = {metric.address, metric.dtype};
  add_products<2>(Plan(grads), grads.m, how.threads, out, [&](const Chunk& chunk, double* lanes) {
    const double* const numbers = metric.numbers + 3 * chunk.column;
    Moment moment = {{nullptr, Dtype::float32}, numbers[0], numbers[1], numbers[2]};
    if (metric.address[chunk.column] != 0) moment.second = slice(moments, chunk);
    how.target->gram_in_metric(present(grads, chunk, nullptr), moment, grads.m, chunk.count, lanes);
  });
}

void fold(const Groups& layer, const Execution& how, double* sums) {
  const bool wide = layer.dtype == Dtype::float64;
  const std::int64_t width = wide ? sizeof(double) : sizeof(float);
  const std::vector<double> U(layer.U, layer.U + layer.m * layer.groups);
  const std::vector<float> narrow(U.begin(), U.end());
  const auto of_chunk = [&](const Chunk& chunk, double* lanes) {
    Fold part;
    part.m = layer.m, part.groups = layer.groups;
    part.t = static_cast<const char*>(layer.t) + chunk.start * width, part.pitch = layer.n;
    part.U = wide ? static_cast<const void*>(U.data()) : narrow.data();
    for (int i = 0; i < layer.m; ++i)
      part.out[i] = reinterpret_cast<char*>(layer.out[i]) + chunk.start * size_of(layer.dtype);
    part.dtype = layer.dtype, part.fresh = layer.fresh;
    how.target->fold(part, chunk.count, lanes);
  };
  const auto dtype = static_cast<std::uint8_t>(layer.dtype);
  const Plan plan(Lists{layer.m, 1, layer.out, &layer.n, &dtype});
  if (sums != nullptr) return add_products<1>(plan, layer.m, how.threads, sums, of_chunk);
  plan.run(how.threads, [&](std::int64_t, const Chunk& chunk) { of_chunk(chunk, nullptr); });
}

void combine(const Lists& grads, const double* alpha, const Tensors& out, const Execution& how) {
  Plan(grads).run(how.threads, [&](std::int64_t, const Chunk& chunk) {
    how.target->combine(present(grads, chunk, alpha), chunk.count, slice(out, chunk));
  });
}

void combine_adamw(const Lists& grads, const double* alpha, const Tensors& params,
                   const Tensors& exp_avgs, const Tensors& exp_avg_sqs, const AdamW& adamw,
                   const Execution& how) {
  Plan(grads).run(how.threads, [&](std::int64_t, const Chunk& chunk) {
    const Step step = {adamw.decay, adamw.beta1, adamw.beta2, adamw.eps,
                       adamw.step_size[chunk.column], adamw.root_correction[chunk.column],
                       adamw.rounding, place(adamw, chunk), residual(adamw, chunk)};
    how.target->adamw(present(grads, chunk, alpha), chunk.count, slice(params, chunk),
                      slice(exp_avgs, chunk), slice(exp_avg_sqs, chunk), step);
  });
}

}  // namespace raco
