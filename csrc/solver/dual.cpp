#include "dual.hpp"

#include <algorithm>
#include <limits>

#include "minimise.hpp"

namespace raco {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct Finding {
  Status status;
  int row, column;
};

// The checks a Gram must pass; an asymmetry or an excess below 1e-3 is taken as rounding (float32).
Finding inspect(const double* gram, int m) {
  double sum = 0.0;
  for (int i = 0; i < m * m; ++i) sum += gram[i] * 0.0;  // 0, or NaN as soon as one is not finite
  if (!(sum == 0.0)) return {Status::kNonFinite, 0, 0};
  double largest = 0.0;
  for (int i = 0; i < m; ++i) largest = std::max(largest, gram[i * m + i]);
  for (int i = 0; i < m; ++i)
    if (gram[i * m + i] < -1e-12 * largest || (gram[i * m + i] < 0.0 && largest == 0.0))
      return {Status::kNegativeDiagonal, i, i};
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < i; ++j) {
      const double a = gram[i * m + j], b = gram[j * m + i];
      const double ni = root(gram[i * m + i]), nj = root(gram[j * m + j]);
      if (std::fabs(a - b) > 1e-3 * ni * nj) return {Status::kAsymmetric, i, j};
      if (std::fabs(a) > (1.0 + 1e-3) * ni * nj) return {Status::kNotGram, i, j};
    }
  return {Status::kOk, 0, 0};
}

// Fills M, norm and w; returns e with M = gram * 4^-e.
int normalise(const double* gram, const double* weights, int m, Problem& P) {
  double largest = 0.0;
  for (int i = 0; i < m; ++i) largest = std::max(largest, gram[i * m + i]);
  int exponent;
  std::frexp(largest, &exponent);
  const int e = exponent >> 1;
  P.m = m;
  // Two factors: 4^-e alone would overflow for the smallest Grams.
  const double first = std::ldexp(1.0, -e), second = first;
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < i; ++j) {
      double a = gram[i * m + j], b = gram[j * m + i];
      P.M[i][j] = P.M[j][i] = (a == b ? a : 0.5 * a + 0.5 * b) * first * second;
    }
    P.M[i][i] = std::max(gram[i * m + i], 0.0) * first * second;
    P.norm[i] = root(P.M[i][i]);
    P.w[i] = weights[i];
  }
  P.total = DD(0.0);
  for (int i = 0; i < m; ++i) P.total += DD(P.w[i]);
  const bool exact = P.total.hi == 1.0 && P.total.lo == 0.0;
  for (int i = 0; i < m; ++i) P.target[i] = exact ? DD(P.w[i]) : DD(P.w[i]) / P.total;
  return e;
}

// p in float64; a p_i that differs from w_i by rounding is w_i, so clipping reports real changes.
void round_to_double(const Problem& P, const DD* exact, double* p) {
  for (int i = 0; i < P.m; ++i) {
    p[i] = (exact[i] * P.total).hi;
    if (std::fabs(p[i] - P.w[i]) <= 4.0 * kEps * P.w[i]) p[i] = P.w[i];
  }
}

// (p^-q + w^-q)^(-1/q) as min (1 + (min / max)^q)^(-1/q): no power overflows, and 0 stays 0.
double smooth_min(double p, double w, double q) {
  const double low = std::min(p, w), high = std::max(p, w);
  if (low == 0.0) return 0.0;
  return low * std::exp(-std::log1p(std::pow(low / high, q)) / q);
}

void clip(const Problem& P, Rule rule, double option, const double* p, double* p_clipped) {
  for (int i = 0; i < P.m; ++i) {
    p_clipped[i] = p[i];
    if (rule == Rule::kCagradClip) p_clipped[i] = std::min(p[i], P.w[i]);
    if (rule == Rule::kSmooth) p_clipped[i] = smooth_min(p[i], P.w[i], option);
  }
}

// Only the direction of p_clipped matters: clipping acts where p_clipped is no multiple of p.
bool changes_direction(const double* p, const double* p_clipped, int m) {
  double smallest = 1.0, largest = 0.0;
  for (int i = 0; i < m; ++i) {
    if (p[i] == 0.0) continue;
    const double ratio = p_clipped[i] / p[i];
    smallest = std::min(smallest, ratio);
    largest = std::max(largest, ratio);
  }
  return largest - smallest > 1e-12 * largest;
}

// What is known once M, norm and w are: b = Mw, s = c ||g0|| (mgda: 0 and 1), the caps. Returns
// ||g0||.
DD state_problem(double c, Rule rule, double option, Problem& P) {
  const DD g0 = norm_or_zero(P, P.w), one(1.0);
  P.capped = rule == Rule::kInside && std::isfinite(option);
  for (int i = 0; i < P.m; ++i)
    P.upper[i] = P.capped ? std::min(one, option * P.target[i]) : one;
  P.linear_term = rule != Rule::kMgda;
  P.s = P.linear_term ? DD(c) * g0 : DD(1.0);
  P.scale = P.linear_term ? g0.hi : 1.0;
  for (int i = 0; i < P.m; ++i) {
    P.b[i] = DD(0.0);
    for (int j = 0; P.linear_term && j < P.m; ++j)
      if (P.w[j] != 0.0) P.b[i] += two_prod(P.M[i][j], P.w[j]);
  }
  return g0;
}

DD linear_part(const Problem& P, const double* x) {  // b'x
  DD sum(0.0);
  for (int i = 0; i < P.m; ++i) sum += x[i] * P.b[i];
  return sum;
}

// Fills alpha from p and p_clipped; returns ||sum_i alpha_i g_i||, for which no sum is needed:
// ||g0 + s u||, u = G p_clipped / ||G p_clipped||, is sqrt(||g0||^2 + 2 s <g0, u> + s^2).
DD combine(const Problem& P, Rule rule, DD g0, DD gp, const double* p_clipped, double* alpha) {
  if (rule == Rule::kMgda) {
    std::copy(p_clipped, p_clipped + P.m, alpha);
    return gp;
  }
  std::copy(P.w, P.w + P.m, alpha);
  if (rule == Rule::kLinear || gp.hi == 0.0) return g0;
  const DD ratio = P.s / gp;
  for (int i = 0; i < P.m; ++i) alpha[i] = (DD(P.w[i]) + p_clipped[i] * ratio).hi;
  return root(g0 * g0 + DD(2.0) * ratio * linear_part(P, p_clipped) + P.s * P.s);
}

void report_finding(double* packed, int m, Finding finding) {
  std::fill(packed, packed + packed_size(m), kNaN);
  double* scalar = packed + 3 * m;
  scalar[kClipActive] = 0.0;
  scalar[kStatus] = static_cast<double>(finding.status);
  scalar[kRow] = finding.row;
  scalar[kColumn] = finding.column;
}

}  // namespace

void solve(const double* gram, const double* weights, int m, double c, Rule rule, double option,
           double* packed) {
  const Finding finding = inspect(gram, m);
  report_finding(packed, m, finding);
  if (finding.status != Status::kOk) return;

  Problem P;
  const int e = normalise(gram, weights, m, P);
  const DD g0 = state_problem(c, rule, option, P);
  Optimum best;
  const bool trivial = rule == Rule::kLinear || g0.hi == 0.0;
  trivial ? weights_are_optimal(P, best) : minimise(P, best);

  double *p = packed, *p_clipped = packed + m, *alpha = packed + 2 * m, *scalar = packed + 3 * m;
  round_to_double(P, best.p, p);
  for (int i = 0; P.capped && i < m; ++i) p[i] = std::min(p[i], option * P.w[i]);
  clip(P, rule, option, p, p_clipped);
  const bool clipped = !std::equal(p, p + m, p_clipped);
  const DD gp = norm_or_zero(P, p), gp_clipped = clipped ? norm_or_zero(P, p_clipped) : gp;
  const DD value = linear_part(P, p) + P.s * gp;
  const DD update = combine(P, rule, g0, gp_clipped, p_clipped, alpha);
  const double gap = trivial ? 0.0 : std::max(0.0, (value - P.total * best.lower).hi);

  // Norms have the unit of sqrt(M), f that of M (of sqrt(M) for mgda, where it is a norm).
  const double unit = std::ldexp(1.0, e), f_unit = P.linear_term ? unit : 1.0;
  scalar[kGap] = gap * unit * f_unit;
  scalar[kValue] = value.hi * unit * f_unit;
  scalar[kG0Norm] = g0.hi * unit;
  scalar[kGpNorm] = gp_clipped.hi * unit;
  scalar[kUpdateNorm] = update.hi * unit;
  scalar[kClipActive] = best.cap_active || (clipped && changes_direction(p, p_clipped, m));
  if (!best.converged) scalar[kStatus] = static_cast<double>(Status::kUnconverged);
}

}  // namespace raco
