// Double-double arithmetic: a number is the unevaluated sum hi + lo with |lo| <= ulp(hi) / 2.
//
// Why it is here: ||Gp|| = sqrt(p'Mp). When gradients cancel, p'Mp is a tiny difference of large
// terms, and a float64 sum leaves an error of sqrt(2^-53) ~ 1e-8 in the norm. About 32 digits make
// that error 1e-16, and let a face's equations be solved as the float64 Gram states them.
// Error bounds (Knuth TwoSum, Dekker TwoProduct): a few 2^-104 of the *terms*, which is what the
// solver needs; the cheap addition is not relatively accurate under cancellation and need not be.
// Must not be compiled with -ffast-math or with contraction of the error terms.
#pragma once

#include <cmath>

namespace raco {

struct DD {
  double hi, lo;
  DD() = default;  // uninitialised, like double: work arrays are not cleared
  constexpr DD(double h, double l = 0.0) : hi(h), lo(l) {}
  explicit operator double() const { return hi; }
};

inline DD quick_two_sum(double a, double b) {  // exact when |a| >= |b|
  double s = a + b;
  return {s, b - (s - a)};
}

inline DD two_sum(double a, double b) {  // s + e == a + b exactly
  double s = a + b, t = s - a;
  return {s, (a - (s - t)) + (b - t)};
}

inline DD two_prod(double a, double b) {  // p + e == a * b exactly
  double p = a * b;
#if defined(__FMA__) || defined(__aarch64__)
  return {p, std::fma(a, b, -p)};
#else  // without the instruction std::fma is a library call; Dekker's splitting is inlined
  constexpr double split = 134217729.0;  // 2^27 + 1
  double ta = split * a, ah = ta - (ta - a), al = a - ah;
  double tb = split * b, bh = tb - (tb - b), bl = b - bh;
  return {p, ((ah * bh - p) + ah * bl + al * bh) + al * bl};
#endif
}

inline DD operator-(DD a) { return {-a.hi, -a.lo}; }

inline DD operator+(DD a, DD b) {
  DD s = two_sum(a.hi, b.hi);
  return quick_two_sum(s.hi, s.lo + (a.lo + b.lo));
}

inline DD operator-(DD a, DD b) { return a + (-b); }

inline DD operator*(DD a, DD b) {
  DD p = two_prod(a.hi, b.hi);
  return quick_two_sum(p.hi, p.lo + (a.hi * b.lo + a.lo * b.hi));
}

inline DD operator*(double a, DD b) {
  DD p = two_prod(a, b.hi);
  return quick_two_sum(p.hi, p.lo + a * b.lo);
}

inline DD operator/(DD a, DD b) {
  double q = a.hi / b.hi;
  DD r = a - q * b;
  return quick_two_sum(q, r.hi / b.hi);
}

inline DD& operator+=(DD& a, DD b) { return a = a + b; }
inline DD& operator-=(DD& a, DD b) { return a = a - b; }

inline bool operator<(DD a, DD b) { return a.hi < b.hi || (a.hi == b.hi && a.lo < b.lo); }
inline bool operator>(DD a, DD b) { return b < a; }
inline bool operator<=(DD a, DD b) { return !(b < a); }
inline bool operator>=(DD a, DD b) { return !(a < b); }

inline DD root(DD a) {  // sqrt, with 0 for the small negative numbers that rounding produces
  if (a.hi <= 0.0) return {0.0};
  double x = std::sqrt(a.hi);
  DD r = a - two_prod(x, x);
  return quick_two_sum(x, r.hi / (2.0 * x));
}

inline double root(double a) { return a > 0.0 ? std::sqrt(a) : 0.0; }

}  // namespace raco
