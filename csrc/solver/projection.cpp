#include "projection.hpp"

#include <utility>

namespace raco {
namespace {

// LDL' with diagonal pivoting of M' = M_E + sigma 11' (M less aa'/s^2 for a ray, see the header).
// The first `rank` rows of the order are independent objectives, the others follow from them.
struct PivotedGram {
  int n, rank;
  int order[N];
  DD A[N][N];

  void swap(int a, int b) {
    if (a == b) return;
    for (int k = 0; k < n; ++k) std::swap(A[a][k], A[b][k]);
    for (int k = 0; k < n; ++k) std::swap(A[k][a], A[k][b]);
    std::swap(order[a], order[b]);
    std::swap(full[a], full[b]);
  }

  // Right-looking elimination; stops when what is left of every diagonal is rounding of M.
  void factor(double null_below) {
    for (int k = 0; k < n; ++k) full[k] = A[k][k].hi;
    for (rank = 0; rank < n; ++rank) {
      int best = -1;
      double largest = null_below;
      for (int k = rank; k < n; ++k)
        if (A[k][k].hi > largest * full[k]) largest = A[k][k].hi / full[k], best = k;
      if (best < 0) return;
      swap(rank, best);
      const DD inverse = DD(1.0) / A[rank][rank];
      for (int i = rank + 1; i < n; ++i) {
        A[i][rank] = A[i][rank] * inverse;
        for (int j = rank + 1; j <= i; ++j) A[i][j] -= A[i][rank] * A[rank][j];
        for (int j = rank + 1; j < i; ++j) A[j][i] = A[i][j];
      }
    }
  }

  // Row `k` >= rank in terms of the independent rows: x solves L_B' x = (row k of L).
  void dependence(int k, DD* x) const {
    for (int r = rank - 1; r >= 0; --r) {
      DD a = A[k][r];
      for (int j = r + 1; j < rank; ++j) a -= A[j][r] * x[j];
      x[r] = a;
    }
  }

 private:
  double full[N];
};

DD dot(int n, const DD* a, const DD* b) {
  DD sum(0.0);
  for (int i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// Goldfarb and Idnani's dual active set for the identity Hessian:
//   min ||t - t0||^2  subject to  normal_i't >= bound_i.
// It starts at the unconstrained t0 and needs no feasible vertex, so ties do not make it cycle.
class LeastDistance {
 public:
  int dimension, constraints = 0;
  DD normal[2 * N + 1][N], bound[2 * N + 1], t[N];
  bool active[2 * N + 1];

  bool solve() {
    for (int i = 0; i < constraints; ++i) active[i] = false;
    for (int steps = 0; steps < 16 * N; ++steps) {
      int i = most_violated();
      if (i < 0) return true;
      if (!add(i)) return false;
    }
    return false;
  }

 private:
  int most_violated() const {
    int worst = -1;
    double largest = 1e-24;
    for (int i = 0; i < constraints; ++i) {
      if (active[i]) continue;
      double violation = static_cast<double>(bound[i] - dot(dimension, normal[i], t));
      if (violation > largest) largest = violation, worst = i;
    }
    return worst;
  }

  // r = least-squares coefficients of normal_i on the active normals, z = what is left of normal_i.
  void split(int i, DD* r, DD* z) const {
    DD L[N][N], d[N], x[N];
    for (int k = 0; k < size; ++k) {
      DD diagonal = dot(dimension, normal[set[k]], normal[set[k]]);
      x[k] = dot(dimension, normal[set[k]], normal[i]);
      for (int l = 0; l < k; ++l) {
        DD a = dot(dimension, normal[set[k]], normal[set[l]]);
        for (int h = 0; h < l; ++h) a -= L[k][h] * d[h] * L[l][h];
        L[k][l] = a / d[l];
        diagonal -= L[k][l] * a;
        x[k] -= L[k][l] * x[l];
      }
      d[k] = diagonal;
    }
    for (int k = size - 1; k >= 0; --k) {
      r[k] = x[k] / d[k];
      for (int l = k + 1; l < size; ++l) r[k] -= L[l][k] * r[l];
    }
    for (int e = 0; e < dimension; ++e) {
      z[e] = normal[i][e];
      for (int k = 0; k < size; ++k) z[e] -= r[k] * normal[set[k]][e];
    }
  }

  void drop(int k) {
    active[set[k]] = false;
    for (--size; k < size; ++k) {
      set[k] = set[k + 1];
      multiplier[k] = multiplier[k + 1];
    }
  }

  bool add(int i) {
    DD own(0.0), r[N], z[N];
    while (true) {
      split(i, r, z);
      const DD length2 = dot(dimension, z, z);
      const bool dependent = length2.hi <= 1e-24 * dot(dimension, normal[i], normal[i]).hi;
      int blocking = -1;
      DD step(0.0);
      for (int k = 0; k < size; ++k) {
        if (r[k].hi <= 0.0) continue;
        DD ratio = multiplier[k] / r[k];
        if (blocking < 0 || ratio < step) step = ratio, blocking = k;
      }
      if (dependent && blocking < 0) return false;  // no feasible point: cannot be, p* is one
      bool full = false;
      if (!dependent) {
        DD whole = (bound[i] - dot(dimension, normal[i], t)) / length2;
        if (blocking < 0 || whole <= step) step = whole, full = true;
        for (int e = 0; e < dimension; ++e) t[e] += step * z[e];
      }
      for (int k = 0; k < size; ++k) multiplier[k] -= step * r[k];
      own += step;
      if (full) {
        set[size] = i;
        multiplier[size++] = own;
        return active[i] = true;
      }
      drop(blocking);
    }
  }

  int size = 0, set[N];
  DD multiplier[N];
};

// Modified Gram-Schmidt, twice: the columns of Z [n][k] become orthonormal.
void orthonormalise(int n, int k, DD (*Z)[N]) {
  for (int c = 0; c < k; ++c)
    for (int pass = 0; pass < 3; ++pass) {
      for (int e = 0; pass > 0 && e < c; ++e) {
        DD along = dot(n, Z[c], Z[e]);
        for (int i = 0; i < n; ++i) Z[c][i] -= along * Z[e][i];
      }
      DD inverse = DD(1.0) / root(dot(n, Z[c], Z[c]));
      for (int i = 0; i < n; ++i) Z[c][i] = Z[c][i] * inverse;
    }
}

// The null directions of {1'd = 0, Gd = 0} on E as rows of Z [k][n]; returns k. `along` [m] is
// -Mq, of which Gd may be a multiple where there is a ray.
int null_directions(const Problem& P, const int* E, int n, double null_below, bool ray,
                    const DD* along, DD (*Z)[N]) {
  PivotedGram gram;
  gram.n = n;
  double sigma = 0.0;
  for (int i = 0; i < n; ++i) {
    double d = P.M[E[i]][E[i]];
    if (d > 0.0 && (sigma == 0.0 || d < sigma)) sigma = d;
  }
  const DD inverse_s2 = ray ? DD(1.0) / (P.s * P.s) : DD(0.0);
  for (int i = 0; i < n; ++i) {
    gram.order[i] = i;
    for (int j = 0; j < n; ++j) {
      gram.A[i][j] = DD(P.M[E[i]][E[j]]) + DD(sigma == 0.0 ? 1.0 : sigma);
      if (ray) gram.A[i][j] -= along[E[i]] * along[E[j]] * inverse_s2;
    }
  }
  gram.factor(null_below);
  const int k = n - gram.rank;
  for (int c = 0; c < k; ++c) {
    DD x[N];
    gram.dependence(gram.rank + c, x);
    for (int i = 0; i < n; ++i) Z[c][i] = DD(0.0);
    Z[c][gram.order[gram.rank + c]] = DD(1.0);
    for (int r = 0; r < gram.rank; ++r) Z[c][gram.order[r]] = -x[r];
  }
  orthonormalise(n, k, Z);
  return k;
}

}  // namespace

bool closest_minimiser(const Problem& P, const DD* y, DD level, const double* y_slack,
                       double null_below, bool ray, DD* p) {
  int E[N], n = 0;
  DD along[N], moved(1.0);  // -Mq, and the weight on E
  for (int i = 0; i < P.m; ++i) {
    const bool between = p[i] > DD(0.0) && (!P.capped || p[i] < P.upper[i]);
    along[i] = P.capped ? P.b[i] - y[i] : P.b[i];  // without caps y = 0 on E, where f* = 0
    if (between || std::fabs(static_cast<double>(y[i] - level)) <= y_slack[i])
      E[n++] = i;
    else
      moved -= p[i];
  }
  if (n < 2) return false;
  DD Z[N][N];
  const int k = null_directions(P, E, n, null_below, ray, along, Z);
  if (k == 0) return false;

  LeastDistance problem;
  problem.dimension = k;
  for (int c = 0; c < k; ++c) {  // t0 = Z'(w - p*)
    DD sum(0.0);
    for (int i = 0; i < n; ++i) sum += Z[c][i] * (P.target[E[i]] - p[E[i]]);
    problem.t[c] = sum;
  }
  for (int i = 0; i < n; ++i) {  // p*_i + z_i't >= 0
    problem.bound[i] = -p[E[i]];
    for (int c = 0; c < k; ++c) problem.normal[i][c] = Z[c][i];
  }
  problem.constraints = n;
  if (P.capped) {  // and <= upper
    for (int i = 0; i < n; ++i) {
      problem.bound[n + i] = p[E[i]] - P.upper[E[i]];
      for (int c = 0; c < k; ++c) problem.normal[n + i][c] = -Z[c][i];
    }
    problem.constraints = 2 * n;
  }
  if (ray) {  // kappa >= 0: q'Mp >= 0
    DD bp(0.0), size = root(dot(P.m, along, along));
    const int last = problem.constraints++;
    for (int i = 0; i < P.m; ++i)
      if (p[i].hi != 0.0) bp += along[i] * p[i];
    problem.bound[last] = bp / size;
    for (int c = 0; c < k; ++c) {
      DD sum(0.0);
      for (int i = 0; i < n; ++i) sum += Z[c][i] * along[E[i]];
      problem.normal[last][c] = -sum / size;
    }
  }
  if (!problem.solve()) return false;
  DD total(0.0);
  for (int i = 0; i < n; ++i) {
    DD x = p[E[i]] + dot(k, problem.normal[i], problem.t);
    p[E[i]] = problem.active[i] || x.hi < kNothing ? DD(0.0) : x;
    if (P.capped && problem.active[n + i]) p[E[i]] = P.upper[E[i]];
    total += p[E[i]];
  }
  // Gradients twelve decades apart leave an error in 1'd = 0 that double-double cannot remove.
  for (int i = 0; i < n && total.hi > 0.0; ++i) p[E[i]] = p[E[i]] * moved / total;
  return true;
}

}  // namespace raco
