// One route per size of problem to the minimiser of problem.hpp that is closest to w.
#pragma once

#include "problem.hpp"

namespace raco {

struct Optimum {
  DD p[N];
  DD lower;  // min_i y_i: a lower bound of f
  int steps = 0;
  bool converged = true;
};

// sqrt(x'Mx), and 0 where it is rounding of M: a direction made of noise must not be amplified.
DD norm_or_zero(const Problem& P, const double* x);

void weights_are_optimal(const Problem& P, Optimum& result);

// Fills p (on the unit simplex), its lower bound and the number of major steps; s may be 0, not
// w'Mw.
void minimise(const Problem& P, Optimum& result);

}  // namespace raco
