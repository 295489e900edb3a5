// Where the tensors of some lists are and how they are laid out, as bytes to compare with those of
// the step before: what was checked and built for equal bytes holds again. Nothing is kept alive.
#include "bind_layout.hpp"

#include <pybind11/numpy.h>

#include <algorithm>
#include <vector>

#include "dlpack.hpp"

namespace py = pybind11;

namespace {

const raco::dlpack::Exchange& exchange(const py::capsule& capsule) {
  const auto* table = capsule.get_pointer<const raco::dlpack::Exchange>();
  if (table->major != 1 || table->read == nullptr)
    throw py::value_error("the tensors do not speak version 1 of DLPack's exchange interface");
  return *table;
}

py::bytes bytes_of(const std::vector<std::int64_t>& words) {
  return py::bytes(reinterpret_cast<const char*>(words.data()), words.size() * sizeof(words[0]));
}

// Device, dtype, shape and strides in 2 + 2 ndim words.
void append(std::vector<std::int64_t>& words, const raco::dlpack::Tensor& t) {
  const std::size_t used = words.size();
  words.resize(used + 2 + 2 * t.ndim);
  std::int64_t* out = words.data() + used;
  *out++ = (std::int64_t{t.device_type} << 32) | static_cast<std::uint32_t>(t.device_id);
  *out++ = (std::int64_t{t.ndim} << 32) | (t.code << 24) | (t.bits << 16) | t.lanes;
  for (int i = 0; i < t.ndim; ++i) *out++ = t.shape[i];
  for (int i = 0; i < t.ndim; ++i) *out++ = t.strides[i];
}

// Both as int64: data addresses (0 for None), and K, n, then what `append` writes of each tensor
// (-1 for None). None if the lists differ in length or hold anything but tensors of exactly the
// types given.
py::object describe(const py::list& lists, const py::tuple& types, const py::capsule& capsule) {
  const auto& table = exchange(capsule);
  std::vector<const PyTypeObject*> plain;
  for (const py::handle type : types)
    plain.push_back(reinterpret_cast<const PyTypeObject*>(type.ptr()));
  const std::size_t n = lists.empty() ? 0 : py::len(lists[0]);
  std::vector<std::int64_t> addresses, layout = {static_cast<std::int64_t>(lists.size()),
                                                 static_cast<std::int64_t>(n)};
  addresses.reserve(lists.size() * n);
  layout.reserve(2 + lists.size() * n * 8);
  for (const py::handle one : lists) {
    const auto list = py::cast<py::list>(one);
    if (list.size() != n) return py::none();
    for (std::size_t k = 0; k < n; ++k) {
      PyObject* item = PyList_GET_ITEM(list.ptr(), k);
      if (item == Py_None) {
        addresses.push_back(0);
        layout.push_back(-1);
        continue;
      }
      if (std::find(plain.begin(), plain.end(), Py_TYPE(item)) == plain.end()) return py::none();
      raco::dlpack::Tensor t;
      if (table.read(item, &t) != 0) {  // sparse, quantized: DLPack cannot say what they are
        PyErr_Clear();
        return py::none();
      }
      addresses.push_back(reinterpret_cast<std::int64_t>(t.data) + t.byte_offset);
      append(layout, t);
    }
  }
  return py::make_tuple(bytes_of(addresses), bytes_of(layout));
}

// Adds 1 to step counts, float scalars on the CPU, and returns them as float64; None, and nothing
// changed, if one is anything else.
py::object advance(const py::list& steps, const py::tuple& types, const py::capsule& capsule) {
  const auto& table = exchange(capsule);
  std::vector<raco::dlpack::Tensor> found(steps.size());
  for (std::size_t k = 0; k < found.size(); ++k) {
    PyObject* item = PyList_GET_ITEM(steps.ptr(), k);
    bool plain = false;
    for (const py::handle type : types)
      plain |= Py_TYPE(item) == reinterpret_cast<PyTypeObject*>(type.ptr());
    if (!plain) return py::none();
    if (table.read(item, &found[k]) != 0) {
      PyErr_Clear();
      return py::none();
    }
    const auto& t = found[k];
    if (t.device_type != raco::dlpack::kCpu || t.ndim != 0 || t.code != raco::dlpack::kFloat ||
        (t.bits != 32 && t.bits != 64))
      return py::none();
  }
  py::array_t<double> counts(static_cast<py::ssize_t>(found.size()));
  double* out = counts.mutable_data();
  for (const auto& t : found) {
    auto* at = static_cast<char*>(t.data) + t.byte_offset;
    *out++ = t.bits == 32 ? *reinterpret_cast<float*>(at) += 1.0f
                          : *reinterpret_cast<double*>(at) += 1.0;
  }
  return counts;
}

}  // namespace

void bind_layout(py::module_& module) {
  module.def("describe", &describe, py::arg("lists"), py::arg("types"), py::arg("exchange"),
             "Lists of tensors or None -> (addresses, layout) as bytes, or None if some are not "
             "plain; csrc/python/bind_layout.cpp.");
  module.def("advance", &advance, py::arg("steps"), py::arg("types"), py::arg("exchange"),
             "Adds 1 to step counts on the CPU and returns them as float64, or None if some are "
             "elsewhere or no floats.");
}
