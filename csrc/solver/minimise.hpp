// One route per size of problem to the minimiser of problem.hpp that is closest to w.
#pragma once

#include "problem.hpp"

namespace raco {

struct Optimum {
  DD p[N];
  DD lower;  // min over the feasible points of y'p: a lower bound of f
  bool converged = true;
  bool cap_active = false;  // some p_i would be larger without its cap
};

// sqrt(x'Mx), and 0 where it is rounding of M: a direction made of noise must not be amplified.
DD norm_or_zero(const Problem& P, const double* x);

void weights_are_optimal(const Problem& P, Optimum& result);

// Fills p (on the unit simplex) and its lower bound; s may be 0, not w'Mw.
void minimise(const Problem& P, Optimum& result);

}  // namespace raco
