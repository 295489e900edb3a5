// Where the tensors of some lists are and how they are laid out, as bytes to compare with those of
// the step before: what was checked and built for equal bytes holds again. Nothing is kept alive.
#include <pybind11/numpy.h>

#include <algorithm>
#include <vector>

#include "dlpack.hpp"

namespace py = pybind11;

namespace {

// Reads tensors of exactly the given types through their exchange interface.
class Reader {
 public:
  Reader(const py::tuple& types, const py::capsule& exchange)
      : table_(exchange.get_pointer<const raco::dlpack::Exchange>()) {
    if (table_->major != 1 || table_->read == nullptr)
      throw py::value_error("the tensors do not speak version 1 of DLPack's exchange interface");
    for (const py::handle type : types)
      types_.push_back(reinterpret_cast<const PyTypeObject*>(type.ptr()));
  }

  // False for other types, and for what DLPack cannot describe: sparse and quantized tensors.
  bool read(PyObject* item, raco::dlpack::Tensor& t) const {
    if (std::find(types_.begin(), types_.end(), Py_TYPE(item)) == types_.end()) return false;
    if (table_->read(item, &t) == 0) return true;
    PyErr_Clear();
    return false;
  }

 private:
  const raco::dlpack::Exchange* table_;
  std::vector<const PyTypeObject*> types_;
};

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
py::object describe(const py::list& lists, const py::tuple& types, const py::capsule& exchange) {
  const Reader reader(types, exchange);
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
      raco::dlpack::Tensor t;
      if (!reader.read(item, t)) return py::none();
      addresses.push_back(reinterpret_cast<std::int64_t>(t.data) + t.byte_offset);
      append(layout, t);
    }
  }
  return py::make_tuple(bytes_of(addresses), bytes_of(layout));
}

// Adds 1 to step counts, float scalars on the CPU, and returns them as float64; None, and nothing
// changed, if one is anything else.
py::object advance(const py::list& steps, const py::tuple& types, const py::capsule& exchange) {
  const Reader reader(types, exchange);
  std::vector<raco::dlpack::Tensor> found(steps.size());
  for (std::size_t k = 0; k < found.size(); ++k) {
    auto& t = found[k];
    if (!reader.read(PyList_GET_ITEM(steps.ptr(), k), t)) return py::none();
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
