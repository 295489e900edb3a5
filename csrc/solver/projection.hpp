// The minimiser closest to w, where the minimiser is not unique.
//
// Gp is unique (f is strictly convex across rays), p is not when gradients are dependent. The
// optimal set is a polytope: {p = p* + Zt >= 0}, the columns of Z spanning {d : 1'd = 0, Gd = 0} on
// E = {i : y_i = level}, the objectives whose weight may change; p <= upper joins where there are
// caps. This file finds Z and projects w on it. One family more: where f* = 0 with Gp = u, every
// shorter Gp = kappa u in the hull is optimal too (f is homogeneous); then Gd may also point along
// u, and kappa >= 0 joins the constraints.
#pragma once

#include "problem.hpp"

namespace raco {

// Replaces p [m] by the point of its optimal set that is closest to w. y [m] is the certificate at
// p, the level what y is where p lies strictly between its bounds, y_slack [m] how far from the
// level an objective may lie and still belong to E; a direction counts as null when ||Gd||^2 is
// below null_below of its terms; `ray` says that f* = 0 and ||Gq|| = s (the extra family). Returns
// false, p untouched, when the minimiser is unique.
bool closest_minimiser(const Problem& P, const DD* y, DD level, const double* y_slack,
                       double null_below, bool ray, DD* p);

}  // namespace raco
