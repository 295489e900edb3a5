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

// The point closest to w of {0 <= p <= upper on `member`, sum over it = mass}: w + t, clamped. As
// Bitran and Hax (1981): where clamping adds more than it takes, what is clamped at 0 stays there,
// else what is clamped at its cap.
void shift_onto(const Problem& P, bool* member, DD mass, DD* p) {
  while (true) {
    int count = 0;
    DD missing = mass, added(0.0), taken(0.0);
    for (int i = 0; i < P.m; ++i) {
      if (!member[i]) continue;
      ++count;
      missing -= P.target[i];
    }
    if (count == 0) return;
    for (int i = 0; i < P.m; ++i) {
      if (!member[i]) continue;
      p[i] = P.target[i] + missing / DD(count);
      if (p[i] < DD(0.0)) added -= p[i];
      if (p[i] > P.upper[i]) taken += p[i] - P.upper[i];
    }
    if (added.hi == 0.0 && taken.hi == 0.0) return;
    for (int i = 0; i < P.m; ++i) {
      if (!member[i] || (taken > added ? p[i] <= P.upper[i] : p[i] >= DD(0.0))) continue;
      p[i] = taken > added ? P.upper[i] : DD(0.0);
      mass -= p[i];
      member[i] = false;
    }
  }
}

// c = 0: f = b'p. The optimal face is {b_i = level}, below which all caps are full and above which
// p is 0; w moves onto it.
void solve_linear_program(const Problem& P, Optimum& result) {
  DD level = *std::min_element(P.b, P.b + P.m), mass(1.0);
  fill_caps(P, P.b, result.p);
  result.lower = DD(0.0);
  for (int i = 0; i < P.m; ++i) {
    result.lower += result.p[i] * P.b[i];
    if (P.capped && result.p[i].hi > 0.0) level = std::max(level, P.b[i]);
  }
  const double rounding = std::min(8.0 * P.m * kEps * magnitude(P, P.w), 1e-12 * P.scale);
  bool member[N];
  for (int i = 0; i < P.m; ++i) {
    const double above = static_cast<double>(P.b[i] - level);
    member[i] = std::fabs(above) <= rounding * P.norm[i];
    if (member[i]) continue;
    result.p[i] = above < 0.0 ? P.upper[i] : DD(0.0);
    mass -= result.p[i];
  }
  shift_onto(P, member, mass, result.p);
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

// What of p_i is rounding of 0 or of its cap becomes that.
DD at_bound(const Problem& P, int i, DD x) {
  const bool nothing = x.hi < kNothing;
  if (P.capped && (P.upper[i] - x).hi < kNothing && !(nothing && x.hi < 0.5 * P.upper[i].hi))
    return P.upper[i];
  return nothing ? DD(0.0) : x;
}

// p and the lower bound that a corral has come to.
template <class Found>
void read_off(const Problem& P, const Found& corral, Optimum& result) {
  const bool at_kink = corral.at_origin && corral.shortest_is_feasible(corral.point_magnitude());
  for (int i = 0; i < P.m; ++i) result.p[i] = DD(0.0);
  corral.points.add_points(at_kink ? corral.shortest() : corral.p, corral.n, result.p);
  for (int i = 0; i < P.m; ++i) result.p[i] = at_bound(P, i, result.p[i]);
  result.lower = corral.points.least(corral.y);
}

// As good a point as there is where nothing may lie under caps below `small`: what they could add
// is at most that much, and the bound says how much it is.
void without_small_caps(const Problem& P, double small, Optimum& result) {
  Problem reduced = P;
  DD room(0.0);
  for (int i = 0; i < P.m; ++i) {
    if (P.upper[i].hi < small) reduced.upper[i] = DD(0.0);
    room += reduced.upper[i];
  }
  if (room < DD(1.0)) return;
  Corral<double, CappedSimplex> rough(reduced);
  rough.start();
  rough.minimise();
  Corral<DD, CappedSimplex> exact(reduced);
  exact.start_from(rough);
  exact.minimise();
  Optimum other;
  read_off(reduced, exact, other);
  other.lower = CappedSimplex<DD>(P).least(exact.y);
  if (f_above(P, other, other.p) < f_above(P, result, result.p)) result = other;
}

// What tiny caps let through may be less than the rounding in a Gp of large terms, and all the same
// decide whether a kink can be reached. Then the Gram is taken at its word, and if that does not
// help the way there is another one. Returns false where not even that closes the gap: p is then
// the best of points that leave tiny caps empty, and no longer that of the corral.
bool close_gap(const Problem& P, Corral<DD, CappedSimplex>& corral, Optimum& result) {
  const double closed = 1e-12 * P.scale * corral.point_magnitude();
  for (bool at_face_value : {true, false}) {
    if (f_above(P, result, result.p) <= closed) return true;
    if (!at_face_value) corral.start();
    corral.at_face_value = at_face_value;
    result.converged = corral.minimise();
    read_off(P, corral, result);
  }
  const double bound = 1e-10 * P.scale * *std::max_element(P.norm, P.norm + P.m);
  if (f_above(P, result, result.p) <= bound) return true;
  for (double small : {1e-9, 1e-7, 1e-6, 1e-5, 1e-4}) without_small_caps(P, small, result);
  result.converged = f_above(P, result, result.p) <= bound;
  result.cap_active = true;
  return false;
}

bool close_gap(const Problem&, Corral<DD, Simplex>&, Optimum&) { return true; }

// m >= 3, or caps: the corral in float64, again in double-double, then the minimiser closest to w.
template <template <class> class Points>
void solve_general(const Problem& P, Optimum& result) {
  Corral<double, Points> rough(P);
  rough.start();
  rough.minimise();
  Corral<DD, Points> exact(P);
  exact.start_from(rough);
  result.converged = exact.minimise();
  read_off(P, exact, result);
  if (!close_gap(P, exact, result)) return;

  // y_i is this for what lies between its bounds, at least for p_i = 0, at most at a cap.
  DD level = exact.level;
  if (P.capped) {
    level = *std::min_element(exact.y, exact.y + P.m);
    for (int i = 0; i < P.m; ++i)
      if (result.p[i].hi > 0.0) level = std::max(level, exact.y[i]);
  }
  double slack[N];
  const double rounding = 16.0 * P.m * kEps * exact.slack_magnitude();
  for (int i = 0; i < P.m; ++i) {
    slack[i] = rounding * (P.norm[i] + exact.point_magnitude());
    result.cap_active |= P.capped && static_cast<double>(level - exact.y[i]) > slack[i];
  }
  const bool ray = P.linear_term && !exact.at_origin &&
                   std::fabs(exact.level.hi) <= rounding * exact.point_magnitude();
  // Which directions are null is a matter of the rounding in M; a choice that costs f is undone.
  const double allowed = 1e-12 * P.scale * exact.point_magnitude() + f_above(P, result, result.p);
  for (double null_below : {8.0 * P.m * kEps, 0.5 * kNoise}) {
    DD candidate[N];
    std::copy(result.p, result.p + P.m, candidate);
    if (!closest_minimiser(P, exact.y, level, slack, null_below, ray, candidate)) return;
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
  } else if (P.capped) {
    solve_general<CappedSimplex>(P, result);
  } else if (P.m == 2) {
    solve_pair(P, result);
  } else {
    solve_general<Simplex>(P, result);
  }
}

}  // namespace raco
