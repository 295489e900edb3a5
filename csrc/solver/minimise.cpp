#include "minimise.hpp"

#include <algorithm>

#include "active_set.hpp"
#include "projection.hpp"

namespace raco {

DD norm_or_zero(const Problem& P, const double* x) {
  const DD square = quadratic(P, x);
  const double terms = magnitude(P, x);
  return square.hi <= kNoise * terms * terms ? DD(0.0) : root(square);
}

void weights_are_optimal(const Problem& P, Optimum& result) {
  for (int i = 0; i < P.m; ++i) result.p[i] = P.target[i];
}

namespace {

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

// m = 2 in closed form: equations (1)-(5) of active_set.hpp with the difference g1 - g2, then a
// clamp.
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

}  // namespace

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

}  // namespace raco
