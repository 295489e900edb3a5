"""A convex quadratic programme between bounds, exactly, on the few variables of a Gram matrix.

    min ½ x'Hx + q'x  subject to  lower <= x <= upper  and, if there is a row,  row'x = row'start

A primal active set. On the face of the free variables the minimiser is one eigendecomposition away,
also where H is singular: along a null direction the objective is a line, which is followed to the
next bound. Variables that meet a bound leave the free set; at the minimiser of a face the one with
the worst multiplier enters it. All free variables are strictly inside, so every step goes down and
no face is met twice. Source: Nocedal and Wright, Numerical Optimization, chapter 16.5.
"""

import numpy as np

from raco_fast.solver.rule import Array, Index, Mask

_EPS = float(np.finfo(np.float64).eps)


def minimise(
    H: Array,
    q: Array,
    terms: Array,
    start: Array,
    lower: Array,
    upper: Array,
    row: Array | None = None,
) -> Array | None:
    """[m], a minimiser; None if the objective falls without end.

    Args:
        H: [m, m], positive semidefinite, with ones on the diagonal (or rows of zeros): tolerances
            are rounding relative to that.
        q: [m].
        terms: [m], the size of the terms that q is a sum of, whose rounding is in it.
        start: [m], within the bounds; they may be infinite.
        row: [m], positive; None for bounds only.
    Raises:
        ArithmeticError: more steps than faces that could reasonably be met.
    """
    m, x = len(q), start.astype(np.float64)
    free, refined = (lower < x) & (x < upper), False
    for _ in range(50 * m):
        y = q + H @ x
        rounding = 16.0 * m * _EPS * (terms + abs(H) @ abs(x))
        if free.any():
            d, line = _direction(H, y, free, row, rounding)
            room = np.full(m, np.inf)
            np.divide(np.where(d < 0.0, lower, upper) - x, d, out=room, where=free & (d != 0.0))
            step = min(np.inf if line else 1.0, room.min())
            if step == np.inf:
                return None
            x = x + step * d
            met = free & (room <= step * (1.0 + 1e-12))
            x[met] = np.where(d < 0.0, lower, upper)[met]
            free &= ~met
            if met.any():
                continue
            y = q + H @ x
        entering = _worst(y, x, free, lower, upper, row, rounding)
        if not len(entering) and refined:
            return x
        # A second step on the last face, as the first one left the rounding of where it came from.
        refined = not len(entering)
        free[entering] = True
    raise ArithmeticError(f"the quadratic programme did not settle: H = {H.tolist()}, q = {q}")


def nonnegative(H: Array, q: Array, terms: Array) -> Array | None:
    """`minimise` over x >= 0, from x = 0."""
    zero = np.zeros(len(q))
    return minimise(H, q, terms, zero, zero, np.full(len(q), np.inf))


def _direction(
    H: Array, y: Array, free: Mask, row: Array | None, rounding: Array
) -> tuple[Array, bool]:
    """(way to the minimiser of the face, False), or (a line downwards that has no end, True)."""
    Z = np.eye(len(y))[:, free]
    if row is not None:  # the variable with the largest share in the row follows from the others
        k = np.argmax(np.where(free, row, -np.inf))
        Z[k] = -row[free] / row[k]
        Z = np.delete(Z, np.count_nonzero(free[:k]), axis=1)
    if Z.shape[1] == 0:
        return np.zeros(len(y)), False
    curvature, V = np.linalg.eigh(Z.T @ H @ Z)
    slope = V.T @ (Z.T @ y)
    flat = curvature <= 16.0 * len(y) * _EPS * max(1.0, curvature[-1])
    line = flat & (abs(slope) > np.linalg.norm(rounding))
    if line.any():
        d = -Z @ (V @ np.where(line, slope, 0.0))
        # A component that is rounding of 0 would be followed to a bound however far away.
        return np.where(abs(d) > 1e-12 * abs(d).max(), d, 0.0), True
    return -Z @ (V @ np.where(flat, 0.0, slope / np.where(flat, 1.0, curvature))), False


def _worst(
    y: Array, x: Array, free: Mask, lower: Array, upper: Array, row: Array | None, rounding: Array
) -> Index:
    """The indices of variables that should leave their bounds; none at the optimum."""
    below, above = ~free & (x == lower) & (lower < upper), ~free & (x == upper) & (lower < upper)
    if row is not None:
        y, rounding = y / row, rounding / row
        if free.any():
            level, slack = (np.average(v[free], weights=row[free] ** 2) for v in (y, rounding))
            y, rounding = y - level, rounding + slack
        elif below.any() and above.any():  # no free variable gives the row's multiplier: two move
            up = np.argmin(np.where(below, y, np.inf))
            down = np.argmax(np.where(above, y, -np.inf))
            fine = y[down] - y[up] <= rounding[down] + rounding[up]
            return np.array([] if fine else [up, down], dtype=int)
        else:
            return np.array([], dtype=int)
    violation = np.where(below, -y, np.where(above, y, -np.inf)) - rounding
    worst = np.argmax(violation)
    return np.array([worst] if violation[worst] > 0.0 else [], dtype=int)
