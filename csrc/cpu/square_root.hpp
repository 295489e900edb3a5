// sqrt as an instruction: with -fno-math-errno (setup.py) the compiler vectorises these builtins.
#pragma once

#include "half.hpp"

#if !defined(__GNUC__)
#include <cmath>
#endif

namespace raco {

#if defined(__GNUC__)
RACO_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
RACO_INLINE double square_root(double x) { return __builtin_sqrt(x); }
#else
RACO_INLINE float square_root(float x) { return std::sqrt(x); }
RACO_INLINE double square_root(double x) { return std::sqrt(x); }
#endif

}  // namespace raco
