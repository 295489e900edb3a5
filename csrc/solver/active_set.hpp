// Active set on f itself, after Wolfe's "Finding the nearest point in a polytope" (1976).
//
// A corral is a set S of affinely independent points (points.hpp: objectives, or vertices under
// caps) with p > 0 on it. On the affine hull {1'p = 1, support S} the minimiser of f is closed form.
// With M' = M_S + sigma 11' (which adds the constant sigma on the hull, and is positive definite
// where M_S need not be):
//
//   (1)  p0 = M'^-1 1 / (1'M'^-1 1)                       the shortest Gp on the hull
//   (2)  v  = mu M'^-1 1 - M'^-1 b,  mu: 1'v = 0          so that Mv + b = mu 1
//   (3)  p(tau) = p0 + tau v,  ||Gp||^2 = mu0 + tau^2 ||Gv||^2,  mu0 = p0'Mp0, ||Gv||^2 = -b'v
//   (4)  stationary where tau = ||Gp|| / s:   tau = sqrt(mu0 / (s^2 - ||Gv||^2))
//   (5)  if ||Gv|| >= s, f decreases along v for ever
//
// Minor cycle: go to p(tau), or as far as the simplex allows; a point that reaches zero
// leaves. Major step: y = b + Mq, q = p0 / tau + v (which is s p / ||Gp||, free of its
// cancellation); an objective with y_j below the common level of the corral enters. f falls each
// time, so no corral returns and no face is ever enumerated. The factorisation is LDL' by rows: one
// entering objective costs O(|S|^2).
//
// Gp = 0 can be optimal (opposite gradients), and f has a kink there. At the kink f = 0 and (4)
// gives tau = 0, so an objective with p0 = 0 belongs to the corral exactly while v > 0: p0 below
// rounding is set to 0, tau to a value below which Gp is rounding, and the certificate is the
// subgradient q = v, ||Gv|| <= s. ||Gv|| grows from corral to corral until no objective is
// violated, or until (5).
//
// The same template runs twice: in float64 to find the corral, then in double-double from that
// corral, usually one factorisation and one look at y, to state p and the certificate to the last
// bit.
#pragma once

#include <algorithm>

#include "points.hpp"
#include "problem.hpp"

namespace raco {

template <class Real>
struct Precision;
template <>
struct Precision<double> {
  static constexpr double enter = 1e-12, pivot = 64 * kEps, rounding = 16 * kEps;
};
template <>
struct Precision<DD> {
  static constexpr double enter = 1e-24, pivot = 1e-27, rounding = 1e-28;
};

template <class Real, template <class> class Points>
class Corral {
  using Limits = Precision<Real>;

 public:
  explicit Corral(const Problem& problem) : points(problem), P(problem) {}

  void start() {
    n = 1;
    points.start();
    p[0] = Real(1.0);
  }

  template <class Other>
  void start_from(const Corral<Other, Points>& other) {
    n = other.n;
    points.start_from(other.points, n);
    for (int k = 0; k < n; ++k) p[k] = Real(other.p[k]);
  }

  // Returns false when the cap on major steps was reached first.
  bool minimise() {
    points.allow_all();
    factored = 0;
    descend();
    price();
    for (int steps = 0; steps < 32 + 8 * P.m; ++steps) {
      double violation;
      const double least = Limits::enter * y_magnitude;
      const int name = points.propose(n, y, level, p_magnitude, least, violation);
      if (name < 0) return true;
      Real before = value();
      p[n++] = Real(0.0);
      if (rounding_only(violation)) {
        --n;
        factored = n;
        points.ban(name);
        continue;
      }
      descend();
      value() < before ? points.allow_all() : points.ban(name);
      price();
    }
    return false;
  }

  int n = 0;            // size of the corral
  Points<Real> points;  // its points
  Real p[N];            // p on the corral, > 0
  Real q[N];            // the certificate on the corral: y = b + Mq, ||Gq|| <= s
  Real y[N];            // per objective
  Real level;           // y on the corral
  bool at_origin = false;  // Gp = 0 up to the rounding of M
  bool at_face_value = false;  // to be set: M has no rounding

  const Real* shortest() const { return p0; }  // p0 of the final corral, p itself where Gp = 0
  bool shortest_is_feasible(double terms) const {
    for (int k = 0; k < n; ++k)
      if (p0[k] < Real(0.0) && !is_rounding(k, terms)) return false;
    return true;
  }
  double slack_magnitude() const { return y_magnitude; }
  double point_magnitude() const { return p_magnitude; }

 private:
  // Row k of LDL' = M', with the forward substitutions L z = 1 and L z = b.
  void factor_row(int k) {
    Real t[N];
    Real diagonal = points.gram(k, k) + Real(sigma);
    const Real full = diagonal;
    Real one(1.0), rhs = points.linear(k);
    for (int r = 0; r < k; ++r) {
      Real a = points.gram(k, r) + Real(sigma);
      for (int l = 0; l < r; ++l) a -= t[l] * L[r][l];
      t[r] = a;
      L[k][r] = a * inverse_d[r];
      diagonal -= a * L[k][r];
      one -= L[k][r] * z1[r];
      rhs -= L[k][r] * zb[r];
    }
    relative_pivot[k] = static_cast<double>(diagonal) / static_cast<double>(full);
    // A dependent objective: the floor turns the step into an exchange along the null direction.
    if (relative_pivot[k] < Limits::pivot) diagonal = Real(Limits::pivot) * full;
    inverse_d[k] = Real(1.0) / diagonal;
    z1[k] = one;
    zb[k] = rhs;
  }

  void factor() {
    double smallest = 0.0;
    for (int k = 0; k < n; ++k) {
      const double d = points.square(k);
      if (d > 0.0 && (smallest == 0.0 || d < smallest)) smallest = d;
    }
    if (smallest == 0.0) smallest = 1.0;
    if (smallest != sigma) factored = 0;
    sigma = smallest;
    for (; factored < n; ++factored) factor_row(factored);
  }

  void back_substitute(const Real* z, Real* x) const {
    for (int k = n - 1; k >= 0; --k) {
      Real a = z[k] * inverse_d[k];
      for (int r = k + 1; r < n; ++r) a -= L[r][k] * x[r];
      x[k] = a;
    }
  }

  void affine_minimiser() {
    factor();
    Real x1[N], xb[N], sum1(0.0), sumb(0.0);
    back_substitute(z1, x1);
    for (int k = 0; k < n; ++k) sum1 += x1[k];
    const Real shifted = Real(1.0) / sum1;
    for (int k = 0; k < n; ++k) p0[k] = x1[k] * shifted;  // (1)
    mu = Real(0.0);
    gv2 = Real(0.0);
    if (P.linear_term) {
      back_substitute(zb, xb);
      for (int k = 0; k < n; ++k) sumb += xb[k];
      mu = sumb * shifted;
      for (int k = 0; k < n; ++k) {
        v[k] = mu * x1[k] - xb[k];  // (2)
        gv2 -= points.linear(k) * v[k];
      }
    } else {
      for (int k = 0; k < n; ++k) v[k] = Real(0.0);
    }
    if (n == 1) v[0] = gv2 = Real(0.0);
    mu0 = shifted - Real(sigma);
    locate();
  }

  // tau, from mu0 and ||Gv||: equations (4), (5), or the kink.
  void locate() {
    const Real room = Real(P.s) * Real(P.s) - gv2;
    unbounded = static_cast<double>(room) <= 0.0;  // (5)
    double terms = 0.0;
    for (int k = 0; k < n; ++k)
      terms += std::fabs(static_cast<double>(p0[k])) * points.terms(k);
    const double arithmetic = Limits::rounding * sigma;
    // Below kNoise, unless s itself is rounding (then f is, and the Gram is taken at face value).
    const bool small = root(kNoise) * terms < 1e-3 * static_cast<double>(P.s);
    at_origin = static_cast<double>(mu0) <= arithmetic ||
                (!at_face_value && static_cast<double>(mu0) <= kNoise * terms * terms && small &&
                 shortest_is_feasible(terms));
    if (at_origin) {
      const double size = std::max(terms, root(sigma));
      for (int k = 0; k < n; ++k)
        if (is_rounding(k, size)) p0[k] = Real(0.0);
      mu0 = Real(0.0);
      tau = Real(root(kNoise) * size / static_cast<double>(P.s));
    } else if (!unbounded) {
      tau = root(mu0 / room);  // (4)
    }
  }

  // p0_k is rounding of M against Gp terms of this size.
  bool is_rounding(int k, double size) const {
    const double x = std::fabs(static_cast<double>(p0[k]));
    return x <= 64.0 * kEps && x * points.terms(k) <= 64.0 * kEps * size;
  }

  void descend() {
    while (true) {
      affine_minimiser();
      int blocking = -1;
      Real step(1.0), direction[N];
      for (int k = 0; k < n; ++k) {
        direction[k] = unbounded ? v[k] : p0[k] + tau * v[k] - p[k];
        if (unbounded ? v[k] >= Real(0.0) : p[k] + direction[k] > Real(0.0)) continue;
        Real ratio = p[k] > Real(0.0) ? p[k] / -direction[k] : Real(0.0);
        if (blocking < 0 || ratio < step) step = ratio, blocking = k;
      }
      if (blocking < 0) break;
      for (int k = 0; k < n; ++k) p[k] += step * direction[k];
      remove(blocking);
    }
    for (int k = 0; k < n; ++k) p[k] = p0[k] + tau * v[k];
  }

  void remove(int k) {
    if (factored > k) factored = k;
    points.remove(k, n);
    --n;
    std::copy(p + k + 1, p + n + 1, p + k);
  }

  // y = b + Mq for every objective.
  void price() {
    double terms = 0.0;
    p_magnitude = 0.0;
    const Real inverse_tau = Real(1.0) / tau;
    for (int k = 0; k < n; ++k) {
      q[k] = at_origin ? v[k] : p0[k] * inverse_tau + v[k];
      terms += std::fabs(static_cast<double>(q[k])) * points.terms(k);
      p_magnitude += static_cast<double>(p[k]) * points.terms(k);
    }
    y_magnitude = terms + P.scale;
    level = at_origin ? mu : mu + mu0 * inverse_tau;
    for (int i = 0; i < P.m; ++i) y[i] = Real(P.b[i]);
    points.add_products(q, n, y);
  }

  // The newest objective depends on the corral up to the rounding of M, so its y differs from the
  // level by rounding alone: letting it in would chase noise from corral to corral.
  bool rounding_only(double violation) {
    if (violation > 1e-13 * P.scale * (points.terms(n - 1) + p_magnitude)) return false;
    factor();
    return relative_pivot[n - 1] < 8.0 * P.m * kEps;
  }

  // f at the affine minimiser; at the kink, where f = 0, a tiny number that falls as ||Gv|| grows.
  Real value() const {
    return at_origin ? Real(-1e-25) * gv2 : mu + mu0 / tau;
  }

  const Problem& P;
  double sigma = 0.0;
  int factored = 0;  // rows of the factorisation that are current
  Real L[N][N], inverse_d[N], z1[N], zb[N];
  double relative_pivot[N];
  Real p0[N], v[N], mu, mu0, gv2, tau;
  bool unbounded = false;
  double p_magnitude = 0.0, y_magnitude = 0.0;
};

}  // namespace raco
