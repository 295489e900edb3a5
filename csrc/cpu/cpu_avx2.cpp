// The kernels for AVX2.
#include "cpu_target.hpp"

#if defined(RACO_X86_TARGETS)
#include "half.hpp"

// To the end of the file, because templates are instantiated there. Nothing of the standard
// library may be instantiated below: the linker could pick that copy for every processor.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif

#define RACO_VECTOR_BYTES 32

namespace raco {
namespace avx2 {
#include "gram_kernel.hpp"
#include "fold_kernel.hpp"
#include "rounding_kernel.hpp"
#include "update_kernel.hpp"
#include "metric_kernel.hpp"
}  // namespace avx2

const Target kAvx2 = {"avx2", avx2::gram, avx2::gram_in_metric, avx2::fold, avx2::combine, avx2::adamw};

}  // namespace raco

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
