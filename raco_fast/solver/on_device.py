"""The dual problem of one or two objectives in tensor operations: nothing waits for the device.

    p             = argmin over the simplex of f(p) = b'p + s ‖Gp‖,  b = Mw, s = c ‖g0‖
    p_clipped     = min(p, w), never renormalised
    coefficients  = w + (s / ‖G p_clipped‖) p_clipped              arXiv 2602.02495, Algorithm 1

Two gradients lie in a plane. With an axis along g1 - g2, of length δ,

    g1 = (u1, q),  g2 = (u2, q),   u1 = (M11 - M12) / δ,  u2 = (M12 - M22) / δ,  q = √det M / δ

so a norm is the length of a plane vector, and no small square is formed from large terms. On the
segment between them Gp = (t, q), f(t) = κ t + s √(t² + q²) + const with κ = w1 u1 + w2 u2, and

    t = -κ q / √(s² - κ²),   or an end of the segment where s <= |κ|.

These are the rules, and the tolerances, of csrc/solver/minimise.cpp. More objectives, and other
rules than `RULES`, are solved on the host.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from raco_fast.solver.dual import solve_dual
from raco_fast.solver.rules.conflict_averse import RULES
from raco_fast.solver.solution import DualSolution

MAX_OBJECTIVES = 2

_EPS = 2.0**-52
_NOISE = 4 * _EPS  # a squared norm below this fraction of its own terms is rounding
_SPLIT = 2.0**27 + 1  # Veltkamp's: cuts a float64 into two halves whose products are exact
_EXPONENT = 0x7FF << 52  # the bits of a float64 that make up its power of two


def obstacle(m: int, rule: str) -> str | None:
    """Why the dual problem is not solved on the device; None if it is."""
    if m > MAX_OBJECTIVES:
        return f"the dual problem of m = {m} objectives is solved on the host"
    return None if rule in RULES else f"the rule {rule!r} is solved on the host"


def coefficients(
    gram: Tensor, weights: Sequence[float], c: float, rule: str
) -> tuple[Tensor, Tensor]:
    """The coefficients of the gradients in the update, and the update's norm.

    Args:
        gram: [m, m] float64, m <= 2, finite and symmetric with |M12| <= √(M11 M22).
        weights: [m], non-negative, sum 1 within 1e-6.
        c: radius in [0, 1); "linear" and "mgda" do not use it.
        rule: one of `RULES`.
    Returns:
        ([m], scalar) float64 on the Gram's device, as `solve_dual` has them to rounding.
    """
    if len(weights) == 1:
        norm = gram[0, 0].sqrt()
        added = c if rule in ("cagrad", "cagrad-clip") else 0.0
        alpha = weights[0] * (1.0 + added * (norm > 0.0).double())
        return alpha.reshape(1), alpha * norm
    return _Pair(gram).solved(weights[0], weights[1], c, rule)


class _Pair:
    """Two gradients as vectors of a plane, in units of `unit`, a power of two."""

    def __init__(self, gram: Tensor) -> None:
        a, b, d = gram[0, 0], gram[0, 1], gram[1, 1]
        # Divided by an exact power of two, no square below overflows or underflows.
        power = (torch.maximum(a, d).view(torch.int64) & _EXPONENT).view(torch.float64)
        power = torch.where(power > 0.0, power, 1.0)
        self.unit = power.sqrt()
        a, b, d = a / power, b / power, d / power
        self.norm1, self.norm2 = a.sqrt(), d.sqrt()
        self.to1, self.to2 = a - b, d - b  # ⟨g1, g1 - g2⟩ and ⟨g2, g2 - g1⟩
        square = self.to1 + self.to2
        # ‖g1 - g2‖ below rounding: then the axis is unknown, and the gradients count as parallel.
        self.twins = square <= _NOISE * (self.norm1 + self.norm2).square()
        self.delta = torch.where(self.twins, 1.0, square).sqrt()
        self.u1, self.u2 = self.to1 / self.delta, -self.to2 / self.delta
        self.q = _determinant(a, b, d).clamp_min(0.0).sqrt() / self.delta

    def norm(self, x1: float | Tensor, x2: float | Tensor) -> Tensor:
        """‖x1 g1 + x2 g2‖ for x >= 0, 0 where that is rounding of its terms."""
        terms = x1 * self.norm1 + x2 * self.norm2
        length = torch.hypot(x1 * self.u1 + x2 * self.u2, (x1 + x2) * self.q)
        length = torch.where(self.twins, terms, length)
        return torch.where(length <= _NOISE**0.5 * terms, 0.0, length)

    def solved(self, w1: float, w2: float, c: float, rule: str) -> tuple[Tensor, Tensor]:
        """As `coefficients` returns them."""
        g0, one = self.norm(w1, w2), torch.ones_like(self.q)
        if rule == "linear" or (c == 0.0 and rule != "mgda"):
            return torch.stack([w1 * one, w2 * one]), g0 * self.unit
        p1, p2 = self._minimiser(w1, w2, g0, c, rule == "mgda")
        if rule == "mgda":
            alpha1, alpha2 = p1, p2
        else:
            if rule == "cagrad-clip":
                p1, p2 = p1.clamp_max(w1), p2.clamp_max(w2)
            gp = self.norm(p1, p2)
            factor = torch.where(gp > 0.0, c * g0 / gp, 0.0)
            alpha1, alpha2 = w1 + factor * p1, w2 + factor * p2
        return torch.stack([alpha1, alpha2]), self.norm(alpha1, alpha2) * self.unit

    def _minimiser(
        self, w1: float, w2: float, g0: Tensor, c: float, mgda: bool
    ) -> tuple[Tensor, Tensor]:
        """p; the weights where g0 = 0."""
        total = w1 + w2
        t, slope, scale = torch.zeros_like(g0), torch.zeros_like(g0), torch.ones_like(g0)
        if not mgda:
            slope, scale = w1 * self.to1 - w2 * self.to2, g0
            kappa = slope / self.delta / total
            # A line through the origin, to rounding: f has a kink there, and t is 0 or at an end.
            terms = (self.u2.abs() * self.norm1 + self.u1.abs() * self.norm2) / self.delta
            q = torch.where(self.q <= _NOISE**0.5 * terms, 0.0, self.q)
            # s² - κ² as a product: (cq - √(1-c²) |κ|) (cq + √(1-c²) |κ|).
            side, up = ((1 - c) * (1 + c)) ** 0.5 * kappa.abs(), c * self.q
            room = (up - side) * (up + side)
            end = torch.where(kappa > 0.0, -torch.inf, torch.inf)
            t = torch.where(room > 0.0, -kappa * q / room.clamp_min(0.0).sqrt(), end)
        p1 = ((t - self.u2) / self.delta).clamp(0.0, 1.0)
        p2 = ((self.u1 - t) / self.delta).clamp(0.0, 1.0)
        # Parallel gradients: f is linear, and its slope may be known although δ is not.
        longer = (self.to1 - self.to2) / (self.norm1 + self.norm2)  # ‖g1‖ - ‖g2‖
        slope = slope + (longer if mgda else c * g0 * longer)
        level = slope.abs() <= 32 * _EPS * scale * self.norm1
        parallel1 = torch.where(level, w1 / total, (slope < 0.0).double())
        parallel2 = torch.where(level, w2 / total, (slope > 0.0).double())
        known = g0 > 0.0
        p1 = torch.where(known, total * torch.where(self.twins, parallel1, p1), w1)
        p2 = torch.where(known, total * torch.where(self.twins, parallel2, p2), w2)
        return p1, p2


def _determinant(a: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """ad - b², also where little of it is left: with both products' rounding errors (Dekker)."""
    x, y = torch.stack([a, b]), torch.stack([d, b])
    product = x * y
    x_high = _SPLIT * x - (_SPLIT * x - x)
    y_high = _SPLIT * y - (_SPLIT * y - y)
    x_low, y_low = x - x_high, y - y_high
    lost = ((x_high * y_high - product) + x_high * y_low + x_low * y_high) + x_low * y_low
    return (product[0] - product[1]) + (lost[0] - lost[1])


class DeviceStep:
    """The solution of an optimizer's last step, in buffers that a captured step writes to.

    Args:
        m: the number of objectives, at most MAX_OBJECTIVES.
        device: of the gradients.
    """

    def __init__(self, m: int, device: torch.device) -> None:
        self.device = device
        self._gram = torch.empty(m, m, dtype=torch.float64, device=device)
        self._skipped = torch.zeros(1, dtype=torch.int64, device=device)
        self._asked: tuple[dict[str, float], float, str] | None = None

    def solve(
        self,
        gram: Tensor,
        weights: Mapping[str, float],
        c: float,
        rule: str,
        max_grad_norm: float | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> Tensor:
        """The coefficients of one step, and a count of it if it is skipped.

        Args:
            gram: [m, m] float64 on the device, of gradients times `grad_scale`.
            weights, c, rule, max_grad_norm: as in `ClippedCAGradAdamW`, checked.
            grad_scale, found_inf: GradScaler's, one number each on the device; None for 1 and 0.
        Returns:
            [m] float64 on the device, unscaling and clipping folded in; NaN where the Gram is not
            finite or `found_inf` is set, so that the update leaves everything as it is.
        """
        self._asked = dict(weights), c, rule
        if grad_scale is not None:
            gram = gram / grad_scale.double().square()
        if found_inf is not None:
            gram = torch.where(found_inf == 0.0, gram, torch.nan)
        self._gram.copy_(gram)
        finite = gram.isfinite().all()
        self._skipped += ~finite
        alpha, norm = coefficients(torch.where(finite, gram, 0.0), [*weights.values()], c, rule)
        if max_grad_norm is not None:
            alpha = alpha * (max_grad_norm / (norm + 1e-6)).clamp_max(1.0)
        if grad_scale is not None:
            alpha = alpha / grad_scale
        return torch.where(finite, alpha, torch.nan)

    def solution(self) -> DualSolution:
        """The solution of the last step, also of the last replay; waits for the device.

        The Gram matrix of that step is solved on the host, to the same coefficients but for
        rounding.
        """
        assert self._asked is not None, "a solution was asked for before the first step"
        return solve_dual(self._gram.cpu(), *self._asked)

    @property
    def skipped(self) -> int:
        """How many steps were skipped; waits for the device."""
        return int(self._skipped)

    @skipped.setter
    def skipped(self, count: int) -> None:
        self._skipped.fill_(count)
