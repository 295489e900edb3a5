// The kernels for AVX-512: vectors of 32 bytes as for AVX2, but 32 registers and masks.
#include "cpu_target.hpp"

#if defined(RACO_X86_TARGETS)
#include "half.hpp"

// To the end of the file, because templates are instantiated there. Nothing of the standard
// library may be instantiated below: the linker could pick that copy for every processor.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,avx512f,avx512vl,avx512bw,avx512dq"))), apply_to = function)
#else
#pragma GCC target("avx2,avx512f,avx512vl,avx512bw,avx512dq")
#endif

#define RACO_VECTOR_BYTES 32

namespace raco {
namespace avx512 {
#include "gram_kernel.hpp"
#include "fold_kernel.hpp"
#include "rounding_kernel.hpp"
#include "update_kernel.hpp"
#include "metric_kernel.hpp"
}  // namespace avx512

const Target kAvx512 = {"avx512", avx512::gram, avx512::gram_in_metric, avx512::fold, avx512::combine, avx512::adamw};

}  // namespace raco

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
