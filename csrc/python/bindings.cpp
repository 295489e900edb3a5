// raco_fast._C: the extension's one entry, and the solver's Python side. Users' mistakes are caught
// in raco_fast/solver/dual.py; what is checked here only keeps memory safe.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "solver/dual.hpp"
#include "solver/problem.hpp"

namespace py = pybind11;

void bind_cpu(py::module_& module);
void bind_layout(py::module_& module);

using Array = py::array_t<double, py::array::c_style | py::array::forcecast>;

// The array itself where it is float64 and contiguous, which dual.py sees to: letting pybind11
// convert the arguments costs more than the solver at m = 2.
static Array rows(const py::array& values) {
  if (Array::check_(values)) return py::reinterpret_borrow<Array>(values);
  Array converted = Array::ensure(values);
  if (!converted) throw py::type_error("gram and weights must hold real numbers");
  return converted;
}

static py::array_t<double> solve(const py::array& gram_values, const py::array& weight_values,
                                 double c, int rule, double option) {
  const Array gram = rows(gram_values), weights = rows(weight_values);
  const py::ssize_t dims = gram.ndim();
  if (dims != 2 && dims != 3) throw py::value_error("gram must be [m, m] or [n, m, m]");
  const py::ssize_t m = gram.shape(dims - 1), n = dims == 3 ? gram.shape(0) : 1;
  if (m < 1 || m > raco::kMaxObjectives || gram.shape(dims - 2) != m)
    throw py::value_error("gram must be square with 1 <= m <= 32");
  if (weights.ndim() != 1 || weights.shape(0) != m) throw py::value_error("weights must be [m]");
  if (rule < 0 || rule >= raco::kRules) throw py::value_error("rule must be 0 to 5");
  if (!(option >= 1.0)) throw py::value_error("option must be at least 1");
  const py::ssize_t size = raco::packed_size(static_cast<int>(m));
  py::array_t<double> packed =
      dims == 3 ? py::array_t<double>({n, size}) : py::array_t<double>(size);
  const double* in = gram.data();
  const double* w = weights.data();
  double* out = packed.mutable_data();
  {
    py::gil_scoped_release release;
    for (py::ssize_t k = 0; k < n; ++k)
      raco::solve(in + k * m * m, w, static_cast<int>(m), c, static_cast<raco::Rule>(rule), option,
                  out + k * size);
  }
  return packed;
}

PYBIND11_MODULE(_C, module) {
  module.doc() = "C++ parts of raco_fast: the exact dual solver, the Gram and the update on a CPU.";
  module.attr("MAX_OBJECTIVES") = raco::kMaxObjectives;
  module.attr("SCALARS") = static_cast<int>(raco::kScalars);
  module.def("solve", &solve, py::arg("gram"), py::arg("weights"), py::arg("c"), py::arg("rule"),
             py::arg("option") = 1.0,
             "gram [m, m] or [n, m, m], weights [m] -> [3m + SCALARS] or [n, 3m + SCALARS]; "
             "csrc/solver/dual.hpp documents the layout of a row.");
  bind_cpu(module);
  bind_layout(module);
}
