// The problem every rule of the solver states: min over the simplex of f(p) = b'p + s sqrt(p'Mp).
//
//   cagrad, cagrad-clip   b = Mw, s = c ||g0||, ||g0|| = sqrt(w'Mw)      (arXiv 2602.02495)
//   mgda                  b = 0,  s = 1
//   clip "inside"         as cagrad, and p <= kappa w
//
// Weights sum to 1 up to rounding only. f is homogeneous, so the problem is solved on the unit
// simplex with w / total, and p = total * p is the answer on the simplex of w itself: identical
// gradients give p = w to the last bit.
//
// M is normalised by an exact power of four, so scaling a Gram by a power of four changes no bit of
// p. Tolerances are relative, and relative to the objective they judge: ||g_j|| is sqrt(M_jj).
#pragma once

#include "double_double.hpp"

namespace raco {

constexpr int kMaxObjectives = 32;
constexpr int N = kMaxObjectives;
constexpr double kEps = 2.220446049250313e-16;

// A squared norm below this fraction of its own terms, (sum_i p_i ||g_i||)^2, is rounding of M.
constexpr double kNoise = 4.0 * kEps;

// A p_i below this is the rounding of double-double; gradients 12 decades apart give 1e-24.
constexpr double kNothing = 1e-26;

struct Problem {
  int m;
  double M[N][N];   // symmetric, normalised
  double norm[N];   // ||g_i||
  double w[N];
  DD total;          // sum of w
  DD target[N];      // w / total
  DD b[N];
  DD s;
  bool linear_term;  // false for mgda, where b = 0
  bool capped;       // whether p <= upper holds too
  DD upper[N];       // kappa w / total, at most 1; 1 where nothing is capped
  double scale;      // f changes by at most ~ scale * ||g_j|| when weight moves to objective j
};

// sum_i |x_i| ||g_i||: the size of the terms that make up a Gx.
inline double magnitude(const Problem& P, const double* x) {
  double sum = 0.0;
  for (int i = 0; i < P.m; ++i) sum += std::fabs(x[i]) * P.norm[i];
  return sum;
}

// x'Mx, exact to ~2^-100 of its terms.
inline DD quadratic(const Problem& P, const double* x) {
  DD sum(0.0);
  for (int i = 0; i < P.m; ++i) {
    if (x[i] == 0.0) continue;
    DD row(0.0);
    for (int j = 0; j < i; ++j)
      if (x[j] != 0.0) row += two_prod(P.M[i][j], x[j]);
    sum += x[i] * (2.0 * row + two_prod(P.M[i][i], x[i]));
  }
  return sum;
}

}  // namespace raco
