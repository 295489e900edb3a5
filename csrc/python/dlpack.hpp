// The part of DLPack's C exchange interface (version 1) that reads a tensor without owning it.
//
// A framework hands out this table as the capsule `__dlpack_c_exchange_api__` of its tensor type.
// Reading a tensor through it costs some 10 ns, reading its attributes from Python 100 ns each.
// Layouts and names are those of https://dmlc.github.io/dlpack/latest/c_api.html.
#pragma once

#include <cstdint>

namespace raco::dlpack {

constexpr std::int32_t kCpu = 1;   // device_type
constexpr std::uint8_t kFloat = 2;  // code

struct Tensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t ndim;
  std::uint8_t code, bits;
  std::uint16_t lanes;
  std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};

struct Exchange {
  std::uint32_t major, minor;
  void* previous;
  void *allocate, *own, *import;
  int (*read)(void* py_object, Tensor* out);  // 0, or -1 with a Python exception
  void* work_stream;
};

}  // namespace raco::dlpack
