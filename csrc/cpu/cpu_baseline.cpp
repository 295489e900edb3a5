// The kernels for the instruction set that the whole build is for: SSE2, NEON, or plain C++.
#include "cpu_target.hpp"
#include "half.hpp"

#if defined(__SSE2__) || defined(__ARM_NEON)
#define RACO_VECTOR_BYTES 16
#else
#define RACO_VECTOR_BYTES 0
#endif

namespace raco {
namespace baseline {
#include "gram_kernel.hpp"
#include "fold_kernel.hpp"
#include "rounding_kernel.hpp"
#include "update_kernel.hpp"
#include "metric_kernel.hpp"
}  // namespace baseline

const Target kBaseline = {"baseline", baseline::gram, baseline::gram_in_metric, baseline::fold, baseline::combine, baseline::adamw};

}  // namespace raco
