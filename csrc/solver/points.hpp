// The points whose hull the active set searches, as their Gram matrix and linear terms.
//
//   Simplex        the objectives themselves: the hull of {e_i} is the simplex
//   CappedSimplex  the vertices of {p in the simplex, p <= u}. A vertex fills the caps of some
//                  objectives and gives the rest to one more. There are exponentially many, but the
//                  one with the least y'v is greedy: fill caps in the order of y.
//
// Both give a corral the same face: point k of it has the gradient G v_k, and
//   gram(k, r) = v_k'M v_r,   linear(k) = b'v_k,   terms(k) = sum_i v_ki ||g_i|| >= ||G v_k||,
// which is the size that the rounding of everything about the point is relative to.
#pragma once

#include <algorithm>
#include <utility>

#include "problem.hpp"

namespace raco {

// The vertex v [m] of {p in the simplex, p <= upper} with the least y'v.
template <class Real>
void fill_caps(const Problem& P, const Real* y, Real* v) {
  int order[N];
  for (int i = 0; i < P.m; ++i) {
    int k = i;
    for (; k > 0 && y[i] < y[order[k - 1]]; --k) order[k] = order[k - 1];
    order[k] = i;
  }
  DD rest(1.0);
  for (int k = 0; k < P.m; ++k) {
    const int i = order[k];
    const DD part = rest < P.upper[i] ? rest : P.upper[i];
    v[i] = Real(part);
    rest -= part;
  }
}

template <class Real>
class Simplex {
 public:
  explicit Simplex(const Problem& problem) : P(problem) {}

  double terms(int k) const { return P.norm[index[k]]; }
  double square(int k) const { return P.M[index[k]][index[k]]; }
  Real gram(int k, int r) const { return Real(P.M[index[k]][index[r]]); }
  Real linear(int k) const { return Real(P.b[index[k]]); }

  void start() {
    int best = 0;
    for (int i = 1; i < P.m; ++i)
      if (value(i) < value(best)) best = i;
    index[0] = best;
  }

  template <class Other>
  void start_from(const Simplex<Other>& other, int n) {
    std::copy(other.index, other.index + n, index);
  }

  void remove(int k, int n) { std::copy(index + k + 1, index + n, index + k); }

  // Adds the point that lies furthest below the level to n others; returns its name for `ban`, or
  // -1 if none lies further below it than `least`, per length that a step towards it changes.
  int propose(int n, const Real* y, Real level, double p_magnitude, double least,
              double& violation) {
    unsigned excluded = banned;
    for (int k = 0; k < n; ++k) excluded |= 1u << index[k];
    int worst = -1;
    for (int i = 0; i < P.m; ++i) {
      if (excluded >> i & 1u) continue;
      const double ratio = static_cast<double>(level - y[i]) / (P.norm[i] + p_magnitude);
      if (ratio > least) least = ratio, worst = i;
    }
    if (worst < 0) return -1;
    index[n] = worst;
    violation = static_cast<double>(level - y[worst]);
    return worst;
  }

  void ban(int name) { banned |= 1u << name; }
  void allow_all() { banned = 0; }

  void add_products(const Real* q, int n, Real* y) const {  // y += M sum_k q_k v_k
    for (int i = 0; i < P.m; ++i)
      for (int k = 0; k < n; ++k) y[i] += P.M[i][index[k]] * q[k];
  }

  void add_points(const Real* x, int n, DD* p) const {  // p += sum_k x_k v_k
    for (int k = 0; k < n; ++k) p[index[k]] += DD(x[k]);
  }

  Real least(const Real* y) const { return *std::min_element(y, y + P.m); }  // of y'v, v any point

  int index[N];  // the objective of each point

 private:
  double value(int i) const {
    return static_cast<double>(P.b[i]) + static_cast<double>(P.s) * P.norm[i];
  }

  const Problem& P;
  unsigned banned = 0;
};

template <class Real>
class CappedSimplex {
 public:
  explicit CappedSimplex(const Problem& problem) : P(problem) {
    for (int k = 0; k < N; ++k) row[k] = k;
  }

  double terms(int k) const { return size[row[k]]; }
  double square(int k) const { return size[row[k]] * size[row[k]]; }
  Real linear(int k) const { return b[row[k]]; }
  Real gram(int k, int r) const {
    Real sum(0.0);
    for (int i = 0; i < P.m; ++i) sum += v[row[k]][i] * Mv[row[r]][i];
    return sum;
  }

  void start() {  // where f's bound sum_i p_i (b_i + s ||g_i||) is least
    Real bound[N] = {};
    for (int i = 0; i < P.m; ++i) bound[i] = Real(P.b[i]) + Real(P.s) * Real(P.norm[i]);
    fill_caps(P, bound, v[row[0]]);
    measure(row[0]);
  }

  template <class Other>
  void start_from(const CappedSimplex<Other>& other, int n) {
    for (int k = 0; k < n; ++k) {
      // Vertices are made anew, so that none has the rounding of the other precision.
      Real order[N];
      for (int i = 0; i < P.m; ++i) order[i] = Real(-static_cast<double>(other.filled(k, i)));
      fill_caps(P, order, v[row[k]]);
      measure(row[k]);
    }
  }

  // How full objective i is in point k: 1 at its cap.
  double filled(int k, int i) const {
    const double u = P.upper[i].hi;
    return u > 0.0 ? static_cast<double>(v[row[k]][i]) / u : 0.0;
  }

  void remove(int k, int n) { std::rotate(row + k, row + k + 1, row + n); }

  int propose(int n, const Real* y, Real level, double p_magnitude, double least,
              double& violation) {
    if (n == P.m || stopped) return -1;
    const int fresh = row[n];
    fill_caps(P, y, v[fresh]);
    measure(fresh);
    Real below(0.0);
    for (int i = 0; i < P.m; ++i) below += v[fresh][i] * (level - y[i]);
    violation = static_cast<double>(below);
    return violation > least * (size[fresh] + p_magnitude) ? 0 : -1;
  }

  // The point with the least y'v was no way down, so no other is.
  void ban(int) { stopped = true; }
  void allow_all() { stopped = false; }

  void add_products(const Real* q, int n, Real* y) const {
    for (int k = 0; k < n; ++k)
      for (int i = 0; i < P.m; ++i) y[i] += Mv[row[k]][i] * q[k];
  }

  void add_points(const Real* x, int n, DD* p) const {
    for (int k = 0; k < n; ++k)
      for (int i = 0; i < P.m; ++i) p[i] += DD(x[k] * v[row[k]][i]);
  }

  Real least(const Real* y) const {
    Real lowest[N] = {}, sum(0.0);
    fill_caps(P, y, lowest);
    for (int i = 0; i < P.m; ++i) sum += lowest[i] * y[i];
    return sum;
  }

 private:
  void measure(int k) {
    size[k] = 0.0;
    b[k] = Real(0.0);
    for (int i = 0; i < P.m; ++i) {
      size[k] += static_cast<double>(v[k][i]) * P.norm[i];
      b[k] += v[k][i] * Real(P.b[i]);
      Mv[k][i] = Real(0.0);
      for (int j = 0; j < P.m; ++j) Mv[k][i] += P.M[i][j] * v[k][j];
    }
  }

  const Problem& P;
  int row[N];  // where point k lies in the arrays
  Real v[N][N], Mv[N][N], b[N];
  double size[N];
  bool stopped = false;
};

}  // namespace raco
