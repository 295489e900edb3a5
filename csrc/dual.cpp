#include "dual.hpp"

#include <algorithm>
#include <limits>

#include "corral.hpp"
#include "projection.hpp"

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

// sqrt(x'Mx), and 0 where it is rounding of M: a direction made of noise must not be amplified.
DD norm_or_zero(const Problem& P, const double* x) {
  const DD square = quadratic(P, x);
  const double terms = magnitude(P, x);
  return square.hi <= kNoise * terms * terms ? DD(0.0) : root(square);
}

struct Optimum {
  DD p[N];
  DD lower;  // min_i y_i: a lower bound of f
  int steps = 0;
  bool converged = true;
};

// f(p) less its lower bound, p rounded to float64.
double f_above(const Problem& P, const Optimum& result, const DD* p) {
  double rounded[N];
  DD f(0.0);
  for (int i = 0; i < P.m; ++i) {
    rounded[i] = p[i].hi;
    f += rounded[i] * P.b[i];
  }
  return static_cast<double>(f + P.s * norm_or_zero(P, rounded) - result.lower);
}

void weights_are_optimal(const Problem& P, Optimum& result) {
  for (int i = 0; i < P.m; ++i) result.p[i] = P.target[i];
}

// c = 0: f = b'p. The optimal face is {b_i = min b}; w moves onto it by one shift.
void solve_linear_program(const Problem& P, Optimum& result) {
  DD least = P.b[0];
  for (int i = 1; i < P.m; ++i)
    if (P.b[i] < least) least = P.b[i];
  const double rounding = std::min(8.0 * P.m * kEps * magnitude(P, P.w), 1e-12 * P.scale);
  bool member[N];
  int count = 0;
  DD missing(1.0);
  for (int i = 0; i < P.m; ++i) {
    member[i] = static_cast<double>(P.b[i] - least) <= rounding * P.norm[i];
    if (!member[i]) continue;
    ++count;
    missing -= P.target[i];
  }
  for (int i = 0; i < P.m; ++i)
    result.p[i] = member[i] ? P.target[i] + missing / DD(count) : DD(0.0);
  result.lower = least;
}

// m = 2, ||g1 - g2|| below rounding: f is linear in p. Its slope may be known all the same.
void solve_twins(const Problem& P, Optimum& result) {
  const DD f0 = P.b[0] + P.s * DD(P.norm[0]), f1 = P.b[1] + P.s * DD(P.norm[1]);
  const double slope = static_cast<double>(f0 - f1);
  if (std::fabs(slope) <= 32.0 * kEps * P.scale * P.norm[0]) {
    weights_are_optimal(P, result);
  } else {
    result.p[0] = DD(slope < 0.0 ? 1.0 : 0.0);
    result.p[1] = DD(slope < 0.0 ? 0.0 : 1.0);
  }
  result.lower = slope < 0.0 ? f0 : f1;
}

// m = 2 in closed form: equations (1)-(5) of corral.hpp with the difference g1 - g2, then a clamp.
void solve_pair(const Problem& P, Optimum& result) {
  const DD a(P.M[0][0]), b(P.M[0][1]), d(P.M[1][1]);
  const DD difference2 = a - b - b + d;  // ||g1 - g2||^2
  const double sum = P.norm[0] + P.norm[1];
  if (difference2.hi <= kNoise * sum * sum) {
    solve_twins(P, result);
    return;
  }
  const DD slope = P.b[0] - P.b[1];
  const DD x0 = (d - b) / difference2, v = -slope / difference2;
  DD mu0 = (a * d - b * b) / difference2;
  const double terms = std::fabs(x0.hi) * P.norm[0] + std::fabs(1.0 - x0.hi) * P.norm[1];
  const bool origin = mu0.hi <= kNoise * terms * terms;
  if (origin) mu0 = DD(0.0);
  const DD room = P.s * P.s - slope * slope / difference2;
  DD x = room.hi > 0.0 ? x0 + root(mu0 / room) * v : DD(v.hi > 0.0 ? 2.0 : -1.0);
  const bool inside = x > DD(0.0) && x < DD(1.0);
  if (!inside) x = DD(x.hi > 0.5 ? 1.0 : 0.0);
  result.p[0] = x;
  result.p[1] = DD(1.0) - x;
  DD q0, q1;
  if (inside && origin) {
    q0 = v, q1 = -v;
  } else {
    const DD gp = root(x * x * a + DD(2.0) * x * result.p[1] * b + result.p[1] * result.p[1] * d);
    const DD factor = gp.hi > 0.0 ? P.s / gp : DD(0.0);
    q0 = factor * x, q1 = factor * result.p[1];
  }
  const DD y0 = P.b[0] + a * q0 + b * q1, y1 = P.b[1] + b * q0 + d * q1;
  result.lower = y0 < y1 ? y0 : y1;
}

// m >= 3: the corral in float64, again in double-double, then the minimiser closest to w.
void solve_general(const Problem& P, Optimum& result) {
  Corral<double> rough(P);
  rough.start_at_best_vertex();
  rough.minimise();
  Corral<DD> exact(P);
  exact.start_from(rough);
  result.converged = exact.minimise();
  result.steps = rough.steps + exact.steps;

  const bool at_kink = exact.at_origin && exact.shortest_is_feasible(exact.point_magnitude());
  for (int i = 0; i < P.m; ++i) result.p[i] = DD(0.0);
  for (int k = 0; k < exact.n; ++k) {
    DD x = at_kink ? exact.shortest()[k] : exact.p[k];
    result.p[exact.index[k]] = x.hi < kNothing ? DD(0.0) : x;
  }
  result.lower = exact.y[0];
  for (int i = 1; i < P.m; ++i)
    if (exact.y[i] < result.lower) result.lower = exact.y[i];

  double slack[N];
  const double rounding = 16.0 * P.m * kEps * exact.slack_magnitude();
  for (int i = 0; i < P.m; ++i) slack[i] = rounding * (P.norm[i] + exact.point_magnitude());
  const bool ray = P.linear_term && !exact.at_origin &&
                   std::fabs(exact.level.hi) <= rounding * exact.point_magnitude();
  // Which directions are null is a matter of the rounding in M; a choice that costs f is undone.
  const double allowed = 1e-12 * P.scale * exact.point_magnitude() + f_above(P, result, result.p);
  for (double null_below : {8.0 * P.m * kEps, 0.5 * kNoise}) {
    DD candidate[N];
    std::copy(result.p, result.p + P.m, candidate);
    if (!closest_minimiser(P, exact.y, exact.level, slack, null_below, ray, candidate)) return;
    if (f_above(P, result, candidate) > allowed) continue;
    std::copy(candidate, candidate + P.m, result.p);
    return;
  }
}

void minimise(const Problem& P, Optimum& result) {
  if (P.m == 1) {
    result.p[0] = DD(1.0);
    result.lower = P.b[0] + P.s * DD(P.norm[0]);
  } else if (P.s.hi == 0.0) {
    solve_linear_program(P, result);
  } else if (P.m == 2) {
    solve_pair(P, result);
  } else {
    solve_general(P, result);
  }
}

// p in float64; a p_i that differs from w_i by rounding is w_i, so clipping reports real changes.
void round_to_double(const Problem& P, const DD* exact, double* p) {
  for (int i = 0; i < P.m; ++i) {
    p[i] = (exact[i] * P.total).hi;
    if (std::fabs(p[i] - P.w[i]) <= 4.0 * kEps * P.w[i]) p[i] = P.w[i];
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

void fill(double* begin, int n, double value) { std::fill(begin, begin + n, value); }

void report(double* packed, int m, Finding finding) {
  fill(packed, packed_size(m), kNaN);
  double* scalar = packed + 3 * m;
  scalar[kClipActive] = 0.0;
  scalar[kStatus] = static_cast<double>(finding.status);
  scalar[kRow] = finding.row;
  scalar[kColumn] = finding.column;
  scalar[kSteps] = 0.0;
}

}  // namespace

void solve(const double* gram, const double* weights, int m, double c, Rule rule, double* packed) {
  const Finding finding = inspect(gram, m);
  report(packed, m, finding);
  if (finding.status != Status::kOk) return;

  Problem P;
  const int e = normalise(gram, weights, m, P);
  const DD g0 = norm_or_zero(P, P.w);
  P.linear_term = rule != Rule::kMgda;
  P.s = P.linear_term ? DD(c) * g0 : DD(1.0);
  P.scale = P.linear_term ? g0.hi : 1.0;
  for (int i = 0; i < m; ++i) {
    P.b[i] = DD(0.0);
    for (int j = 0; P.linear_term && j < m; ++j)
      if (P.w[j] != 0.0) P.b[i] += two_prod(P.M[i][j], P.w[j]);
  }

  double* p = packed;
  double* p_clipped = packed + m;
  double* alpha = packed + 2 * m;
  Optimum best;
  if (rule == Rule::kLinear || g0.hi == 0.0) {
    weights_are_optimal(P, best);
  } else {
    minimise(P, best);
  }
  round_to_double(P, best.p, p);

  DD bp(0.0), bp_clipped(0.0);
  bool clipped = false;
  for (int i = 0; i < m; ++i) {
    p_clipped[i] = rule == Rule::kCagradClip ? std::min(p[i], P.w[i]) : p[i];
    clipped |= p_clipped[i] != p[i];
    bp += p[i] * P.b[i];
    bp_clipped += p_clipped[i] * P.b[i];
  }
  const DD gp = norm_or_zero(P, p);
  const DD gp_clipped = clipped ? norm_or_zero(P, p_clipped) : gp;
  const DD value = bp + P.s * gp;
  DD update = g0;
  for (int i = 0; i < m; ++i) alpha[i] = P.w[i];
  if (rule == Rule::kMgda) {
    std::copy(p, p + m, alpha);
    update = gp;
  } else if (rule != Rule::kLinear && gp_clipped.hi > 0.0) {
    const DD ratio = P.s / gp_clipped;
    for (int i = 0; i < m; ++i) alpha[i] = static_cast<double>(DD(P.w[i]) + p_clipped[i] * ratio);
    update = root(g0 * g0 + DD(2.0) * ratio * bp_clipped + P.s * P.s);  // ||g0 + s Gp/||Gp||||
  }

  // f has the unit of M (of sqrt(M) for mgda, where it is a norm).
  double* scalar = packed + 3 * m;
  const double unit = std::ldexp(1.0, e), f_unit = P.linear_term ? unit : 1.0;
  const bool certified = rule != Rule::kLinear && g0.hi != 0.0;
  const double gap = certified ? std::max(0.0, static_cast<double>(value - P.total * best.lower)) : 0.0;
  scalar[kGap] = gap * unit * f_unit;
  scalar[kValue] = value.hi * unit * f_unit;
  scalar[kG0Norm] = g0.hi * unit;
  scalar[kGpNorm] = gp_clipped.hi * unit;
  scalar[kUpdateNorm] = update.hi * unit;
  scalar[kClipActive] = clipped && changes_direction(p, p_clipped, m);
  scalar[kSteps] = best.steps;
  if (!best.converged) scalar[kStatus] = static_cast<double>(Status::kUnconverged);
}

}  // namespace raco
