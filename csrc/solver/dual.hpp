// The dual problem of conflict-averse gradient descent on the m x m Gram matrix. No torch here.
//
//   p             = argmin over the simplex of f(p) = b'p + s sqrt(p'Mp)     (problem.hpp)
//   p_clipped     = min(p, w), never renormalised        (cagrad-clip; p itself for the others)
//                   kInside: p <= kappa w holds in the argmin, and p is not clipped again
//                   kSmooth: (p^-q + w^-q)^(-1/q), which is min(p, w) for q -> inf
//   coefficients  = w + (s / ||Gp_clipped||) p_clipped   (w where ||Gp_clipped|| is 0; p for mgda)
//   gap           = f(p) - min over feasible p' of y'p',  y = b + Mq, ||Gq|| <= s
//
// For any such q and any p': f(p') >= b'p' + p'Mq = p'y, so the gap bounds how far p is from
// optimal. On the simplex the minimum is min_i y_i; under caps they are filled in the order of y.
// q = s p / ||Gp|| is the usual choice; where Gp = 0 it is any subgradient.
#pragma once

namespace raco {

enum class Rule { kLinear = 0, kCagrad = 1, kCagradClip = 2, kMgda = 3, kInside = 4, kSmooth = 5 };
constexpr int kRules = 6;

enum class Status {
  kOk = 0,
  kNonFinite = 1,         // p and coefficients are NaN
  kNegativeDiagonal = 2,  // these three: the matrix is no Gram matrix; (i, j) is the first entry
  kAsymmetric = 3,
  kNotGram = 4,           // |M_ij| > ||g_i|| ||g_j||
  kUnconverged = 5,       // no optimum within the cap on steps; p and gap are valid all the same
};

// The result of one problem: p [m], p_clipped [m], coefficients [m], then these, in one row.
enum Scalar {
  kGap,
  kValue,
  kG0Norm,
  kGpNorm,
  kUpdateNorm,
  kClipActive,
  kStatus,
  kRow,
  kColumn,
  kScalars
};

constexpr int packed_size(int m) { return 3 * m + kScalars; }

// gram [m][m] row-major, weights [m] on the simplex, 1 <= m <= 32, 0 <= c < 1; option: kappa in
// [1, inf] of kInside, q in [1, inf] of kSmooth, ignored by the others; packed [packed_size(m)].
// Allocates nothing and touches no global state.
void solve(const double* gram, const double* weights, int m, double c, Rule rule, double option,
           double* packed);

}  // namespace raco
