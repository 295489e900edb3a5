// The Python side of cpu_kernels.hpp. raco_fast/backends/cpu.py knows tensors and builds the tables;
// what is checked here keeps the kernels inside the tables. Nothing can check that the addresses are
// those of memory of the stated lengths.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "cpu/cpu_kernels.hpp"
#include "cpu/cpu_target.hpp"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;
using Addresses = Array<std::int64_t>;
using Dtypes = Array<std::uint8_t>;

void require(bool condition, const char* message) {
  if (!condition) throw py::value_error(message);
}

void check_dtypes(const Dtypes& dtypes, std::int64_t n) {
  require(dtypes.ndim() == 1 && dtypes.shape(0) == n, "dtypes must be [n]");
  for (std::int64_t k = 0; k < n; ++k)
    require(dtypes.data()[k] < raco::kDtypes, "dtypes must be codes of DTYPES");
}

raco::Lists lists(const Addresses& grads, const Addresses& lengths, const Dtypes& dtypes) {
  require(grads.ndim() == 2 && grads.shape(0) >= 1 && grads.shape(0) <= raco::kMaxLists,
          "grads must be [m, n] with 1 <= m <= 32");
  const std::int64_t n = grads.shape(1);
  require(lengths.ndim() == 1 && lengths.shape(0) == n, "lengths must be [n]");
  for (std::int64_t k = 0; k < n; ++k) require(lengths.data()[k] >= 0, "lengths must be >= 0");
  check_dtypes(dtypes, n);
  return {static_cast<int>(grads.shape(0)), n, grads.data(), lengths.data(), dtypes.data()};
}

raco::Tensors tensors(const Addresses& addresses, const Dtypes& dtypes, std::int64_t n) {
  require(addresses.ndim() == 1 && addresses.shape(0) == n, "addresses must be [n]");
  check_dtypes(dtypes, n);
  return {addresses.data(), dtypes.data()};
}

const double* numbers(const Array<double>& values, std::int64_t n, const char* message) {
  require(values.ndim() == 1 && values.shape(0) == n, message);
  return values.data();
}

raco::Execution execution(int threads, int target) {
  const auto& known = raco::targets();
  require(threads >= 1, "threads must be >= 1");
  require(target >= 0 && target < static_cast<int>(known.size()), "target must index CPU_TARGETS");
  return {threads, known[static_cast<std::size_t>(target)]};
}

// Arithmetic is float64 where a tensor is, so one column must not mix it with other dtypes.
void check_width(const Dtypes& a, const Dtypes& b, py::ssize_t k) {
  constexpr auto wide = static_cast<std::uint8_t>(raco::Dtype::float64);
  require((a.data()[k] == wide) == (b.data()[k] == wide),
          "float64 and other dtypes must not meet in one column");
}

void check_width(const Dtypes& a, const Dtypes& b) {
  for (py::ssize_t k = 0; k < a.shape(0); ++k) check_width(a, b, k);
}

void check_bfloat16(const Dtypes& dtypes, const char* message) {
  constexpr auto bfloat16 = static_cast<std::uint8_t>(raco::Dtype::bfloat16);
  for (py::ssize_t k = 0; k < dtypes.size(); ++k) require(dtypes.data()[k] == bfloat16, message);
}

// Weights that are not rounded to nearest are bfloat16, and those of `split` have residuals.
void check_rounding(raco::Rounding rounding, const Dtypes& params, const Addresses& residuals,
                    const Dtypes& residual_dtypes) {
  if (rounding != raco::Rounding::nearest)
    check_bfloat16(params, "rounding is for bfloat16 parameters");
  tensors(residuals, residual_dtypes, rounding == raco::Rounding::split ? params.shape(0) : 0);
  check_bfloat16(residual_dtypes, "residuals must be stored as bfloat16");
}

void check_places(const Array<std::int64_t>& places, std::int64_t n) {
  require(places.ndim() == 2 && places.shape(0) == n && places.shape(1) == 4,
          "places must be [n, 4] for stochastic rounding, else [0, 4]");
}

py::array_t<double> products(const Addresses& grads, const Addresses& lengths,
                             const Dtypes& dtypes, int threads, int target) {
  const raco::Lists table = lists(grads, lengths, dtypes);
  const raco::Execution how = execution(threads, target);
  py::array_t<double> found({table.n, std::int64_t{table.m}, std::int64_t{table.m}});
  double* out = found.mutable_data();
  {
    py::gil_scoped_release release;
    raco::products(table, how, out);
  }
  return found;
}

py::array_t<double> products_in_metric(const Addresses& grads, const Addresses& lengths,
                                       const Dtypes& dtypes, const Addresses& moments,
                                       const Dtypes& moment_dtypes, const Array<double>& numbers,
                                       int threads, int target) {
  const raco::Lists table = lists(grads, lengths, dtypes);
  const raco::Tensors second = tensors(moments, moment_dtypes, table.n);
  for (std::int64_t k = 0; k < table.n; ++k)
    if (moments.data()[k] != 0) check_width(dtypes, moment_dtypes, k);
  require(numbers.ndim() == 2 && numbers.shape(0) == table.n && numbers.shape(1) == 3,
          "numbers must be [n, 3]");
  const raco::Metric metric = {second.address, second.dtype, numbers.data()};
  const raco::Execution how = execution(threads, target);
  py::array_t<double> found({table.n, std::int64_t{2}, std::int64_t{table.m}, std::int64_t{table.m}});
  double* out = found.mutable_data();
  {
    py::gil_scoped_release release;
    raco::products_in_metric(table, metric, how, out);
  }
  return found;
}

// t: the address of [groups, n] numbers of the arithmetic's type, which the caller vouches for.
void fold(std::int64_t t, std::int64_t n, const Array<double>& U, const Addresses& out, int dtype,
          bool fresh, std::optional<py::array_t<double, py::array::c_style>> sums, int threads,
          int target) {
  require(U.ndim() == 2 && U.shape(0) >= 1 && U.shape(0) <= raco::kMaxLists,
          "U must be [m, groups] with 1 <= m <= 32");
  const auto m = static_cast<int>(U.shape(0));
  require(n >= 0, "n must be >= 0");
  require(out.ndim() == 1 && out.shape(0) == m, "out must be [m]");
  require(dtype >= 0 && dtype < raco::kDtypes, "dtype must be a code of DTYPES");
  double* products = nullptr;
  if (sums.has_value()) {
    require(sums->ndim() == 2 && sums->shape(0) == m && sums->shape(1) == m, "sums must be [m, m]");
    products = sums->mutable_data();
  }
  const raco::Groups layer = {m,          static_cast<int>(U.shape(1)),
                              n,          reinterpret_cast<const void*>(t),
                              U.data(),   out.data(),
                              static_cast<raco::Dtype>(dtype), fresh};
  const raco::Execution how = execution(threads, target);
  py::gil_scoped_release release;
  raco::fold(layer, how, products);
}

void combine(const Addresses& grads, const Addresses& lengths, const Dtypes& dtypes,
             const Array<double>& alpha, const Addresses& out, const Dtypes& out_dtypes,
             int threads, int target) {
  const raco::Lists table = lists(grads, lengths, dtypes);
  const double* coefficients = numbers(alpha, table.m, "alpha must be [m]");
  const raco::Tensors targets = tensors(out, out_dtypes, table.n);
  check_width(dtypes, out_dtypes);
  const raco::Execution how = execution(threads, target);
  py::gil_scoped_release release;
  raco::combine(table, coefficients, targets, how);
}

void combine_adamw(const Addresses& grads, const Addresses& lengths, const Dtypes& dtypes,
                   const Array<double>& alpha, const Addresses& params, const Dtypes& param_dtypes,
                   const Addresses& exp_avgs, const Dtypes& exp_avg_dtypes,
                   const Addresses& exp_avg_sqs, const Dtypes& exp_avg_sq_dtypes, double decay,
                   double beta1, double beta2, double eps, const Array<double>& step_sizes,
                   const Array<double>& root_corrections, int rounding, const Array<double>& steps,
                   std::uint32_t seed, const Addresses& residuals, const Dtypes& residual_dtypes,
                   const Array<std::int64_t>& places, int threads, int target) {
  const raco::Lists table = lists(grads, lengths, dtypes);
  const std::int64_t n = table.n;
  const double* coefficients = numbers(alpha, table.m, "alpha must be [m]");
  const raco::Tensors p = tensors(params, param_dtypes, n), m = tensors(exp_avgs, exp_avg_dtypes, n),
                      v = tensors(exp_avg_sqs, exp_avg_sq_dtypes, n);
  for (const Dtypes* other : {&dtypes, &exp_avg_dtypes, &exp_avg_sq_dtypes})
    check_width(param_dtypes, *other);
  require(rounding >= 0 && rounding < raco::kRoundings, "rounding must index ROUNDINGS");
  const auto how_rounded = static_cast<raco::Rounding>(rounding);
  check_rounding(how_rounded, param_dtypes, residuals, residual_dtypes);
  check_places(places, how_rounded == raco::Rounding::stochastic ? n : 0);
  const raco::AdamW adamw = {decay,
                             beta1,
                             beta2,
                             eps,
                             numbers(step_sizes, n, "step_sizes must be [n]"),
                             numbers(root_corrections, n, "root_corrections must be [n]"),
                             how_rounded,
                             numbers(steps, n, "steps must be [n]"),
                             seed,
                             residuals.size() == 0 ? nullptr : residuals.data(),
                             places.data()};
  const raco::Execution how = execution(threads, target);
  py::gil_scoped_release release;
  raco::combine_adamw(table, coefficients, p, m, v, adamw, how);
}

}  // namespace

void bind_cpu(py::module_& module) {
  module.attr("DTYPES") = py::make_tuple("float32", "bfloat16", "float16", "float64");
  module.attr("ROUNDINGS") = py::make_tuple("nearest", "stochastic", "split");
  module.attr("BLOCK") = raco::kBlock;
  module.attr("CHUNK") = raco::kChunk;
  py::list names;
  for (const raco::Target* target : raco::targets()) names.append(target->name);
  module.attr("CPU_TARGETS") = py::tuple(names);
  module.def("products", &products, py::arg("grads"), py::arg("lengths"), py::arg("dtypes"),
             py::arg("threads"), py::arg("target") = 0,
             "grads [m, n] addresses, lengths [n], dtypes [n] -> [n, m, m]; csrc/cpu/cpu_kernels.hpp.");
  module.def("products_in_metric", &products_in_metric, py::arg("grads"), py::arg("lengths"),
             py::arg("dtypes"), py::arg("moments"), py::arg("moment_dtypes"), py::arg("numbers"),
             py::arg("threads"), py::arg("target") = 0,
             "The same, moments [n] addresses or 0, their dtypes [n], numbers [n, 3] -> "
             "[n, 2, m, m]; csrc/cpu/cpu_kernels.hpp.");
  module.def("fold", &fold, py::arg("t"), py::arg("n"), py::arg("U"), py::arg("out"),
             py::arg("dtype"), py::arg("fresh"), py::arg("sums"), py::arg("threads"),
             py::arg("target") = 0, "Writes a layer's m gradients; csrc/cpu/cpu_kernels.hpp.");
  module.def("combine", &combine, py::arg("grads"), py::arg("lengths"), py::arg("dtypes"),
             py::arg("alpha"), py::arg("out"), py::arg("out_dtypes"), py::arg("threads"),
             py::arg("target") = 0, "Writes G0 to `out`; csrc/cpu/cpu_kernels.hpp.");
  module.def("combine_adamw", &combine_adamw, py::arg("grads"), py::arg("lengths"),
             py::arg("dtypes"), py::arg("alpha"), py::arg("params"), py::arg("param_dtypes"),
             py::arg("exp_avgs"), py::arg("exp_avg_dtypes"), py::arg("exp_avg_sqs"),
             py::arg("exp_avg_sq_dtypes"), py::arg("decay"), py::arg("beta1"), py::arg("beta2"),
             py::arg("eps"), py::arg("step_sizes"), py::arg("root_corrections"),
             py::arg("rounding"), py::arg("steps"), py::arg("seed"), py::arg("residuals"),
             py::arg("residual_dtypes"), py::arg("places"), py::arg("threads"),
             py::arg("target") = 0, "One AdamW step along G0, in place; csrc/cpu/cpu_kernels.hpp.");
}
