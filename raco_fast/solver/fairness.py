"""α-fair coefficients by Newton's method: (Ha)_i = (a_i / ω_i)^(-1/α) with a > 0.

They minimise ½ a'Ha - Σ ω_i^(1/α) φ(a_i), φ' = a^(-1/α), which is convex and has a minimum unless
some positive combination of the gradients is zero. The unknown is z_i = a_i ‖g_i‖, which leaves a
matrix of cosines, and the Newton system is scaled by z on both sides.
Sources: the formula is Eq. 4 of arXiv 2402.15638; weights ω of α-fairness are those of Mo and
Walrand, Fair end-to-end window-based congestion control, 2000.
"""

import numpy as np

from raco_fast.solver.rule import Array, Index, Problem, where_present
from raco_fast.solver.rules.conflict_averse import shortest

_STATIONARY = 1e-7
"""A combination of unit vectors that is shorter than this is rounding of their Gram matrix."""


def fair_coefficients(problem: Problem, alpha: float) -> Array:
    """[n, m] with ω_i = m w_i, so that equal weights are the plain method.

    An objective with weight 0 or a gradient of zero has the coefficient 0, and the others are
    solved without it. Where some positive combination of the gradients is zero (the point is Pareto
    stationary) no coefficients solve the equation: those of that combination are returned, and the
    update is zero.
    """
    weights = problem.m * problem.weights

    def solve(rows: Index, places: Index) -> Array:
        C = problem.cosines[rows][:, places][:, :, places]
        norms, omega = problem.norms[rows][:, places], weights[places]
        p, length = shortest(C)
        # κ of C z = κ z^(-1/α), scaled by its largest: z is times that to the power α / (1 + α).
        log_kappa = (np.log(norms) + np.log(omega)) / alpha - np.log(norms)
        largest = log_kappa.max(1, keepdims=True)
        kappa, unit = np.exp(log_kappa - largest), np.exp(largest * (alpha / (1.0 + alpha)))
        found = [
            unit[k] * _newton(C[k], kappa[k], 1.0 / alpha, p[k])
            if length[k] > _STATIONARY
            else p[k]
            for k in range(len(C))
        ]
        return np.array(found) / norms

    return where_present((problem.norms > 0.0) & (weights > 0.0), solve)


def _newton(C: Array, kappa: Array, power: float, p: Array) -> Array:
    """z > 0 with C z = κ z^-power, from a point between p (of the shortest Gp) and even ones.

    A z_i that is too small to matter in the other equations follows from its own; in the Newton
    system it would shorten the step of all, which ends where some z_i would be negative.
    """
    z = p + 1.0 / len(p)
    z = z * ((kappa @ z ** (1.0 - power)) / (z @ C @ z)) ** (1.0 / (1.0 + power))
    least = np.inf
    for _ in range(400):
        y = C @ z
        small = (z < 1e-9 * z.max()) & (y > 0.0)
        alone = (kappa / np.where(small, y, kappa)) ** (1.0 / power)
        z = np.where(small, np.minimum(alone, 1e-8 * z.max()), z)
        big = np.flatnonzero(~small)
        S, e = C[big] * z[big, None] * z, kappa[big] * z[big] ** (1.0 - power)
        residual = S.sum(1) - e
        wrong = float((abs(residual) / (abs(S).sum(1) + e)).max())
        # The rounding of C is added: a system that is singular to that must have an answer too.
        curvature = S[:, big] + np.diag(power * e + 1e-15 * z[big] ** 2)
        change = -np.linalg.solve(curvature, residual)
        step, slope = min(1.0, 0.99 / max(-change.min(), 1e-300)), residual @ change
        noise = 4.0 * np.finfo(float).eps * (abs(S).sum() + e.sum())
        near = -slope <= max(1e-10 * e.sum(), noise)  # the objective cannot tell such points apart
        if wrong <= 1e-15 or (near and wrong < 1e-9 and wrong >= 0.5 * least):
            return z
        least = wrong
        value = _objective(C, kappa, power, z)
        while True:
            there = z.copy()
            there[big] *= 1.0 + step * change
            if near or _objective(C, kappa, power, there) <= value + 1e-4 * step * slope:
                break
            step *= 0.5
        z = there
    raise ArithmeticError(f"Newton's method did not settle for cosines {C.tolist()}, κ = {kappa}")


def _objective(C: Array, kappa: Array, power: float, z: Array) -> float:
    utility = np.log(z) if power == 1.0 else z ** (1.0 - power) / (1.0 - power)
    return float(0.5 * z @ C @ z - kappa @ utility)
