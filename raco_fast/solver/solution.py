"""`DualSolution`: names for the numbers of a solved problem, which lie packed in one row."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raco_fast import _C
from raco_fast.solver.expected_gram import Estimate
from raco_fast.solver.rule import State, size

# The scalars behind p, p_clipped and coefficients in a packed row: enum Scalar of
# csrc/solver/dual.hpp.
GAP, VALUE, G0_NORM, GP_NORM, UPDATE_NORM, CLIP_ACTIVE, STATUS, ROW, COLUMN = range(_C.SCALARS)
STATUSES = ("ok", "non_finite", "negative_diagonal", "asymmetric", "not_gram", "unconverged")
"""In the order of enum Status of csrc/solver/dual.hpp."""
NON_FINITE, NEGATIVE_DIAGONAL, ASYMMETRIC, NOT_GRAM = range(1, 5)


def _part(index: int, doc: str) -> property:
    """The values of one of the three arrays in a packed row."""

    def read(solution: "DualSolution") -> Any:
        m = len(solution.names)
        return solution._array(solution._packed[..., index * m : (index + 1) * m])

    return property(read, doc=doc)


def _scalar(index: int, doc: str) -> property:
    """One of the numbers behind them; an array of them for a batch."""

    def read(solution: "DualSolution") -> Any:
        values = solution._packed[..., 3 * len(solution.names) + index]
        return float(values) if values.ndim == 0 else solution._array(values)

    return property(read, doc=doc)


class DualSolution:
    """What `solve_dual` found, for one problem or a batch of n (then every value has a leading n).

    Arrays are float64, torch tensors on the CPU if the Gram was a tensor, numpy arrays otherwise.
    Scalars are Python numbers for one problem, arrays [n] for a batch.

    The rules "linear", "cagrad", "cagrad-clip" and "mgda" are the minimisers of a dual problem; of
    other rules there is no p, and p, p_clipped, gap, value and gp_norm are NaN, clip_active is
    None.

    Attributes:
        names, weights, c, rule: what was asked; weights is [m], rule its name with its options.
        gram: [m, m], the input as float64.
        p: [m], the minimiser of f on the simplex that is closest to the weights; with the clip
            "inside" among p <= kappa w.
        p_clipped: [m], min(p, weights) under "cagrad-clip", its smooth minimum with the clip
            "smooth"; p otherwise.
        coefficients: [m], the update is sum_i coefficients_i g_i.
        gap: certificate of optimality, f(p) minus a lower bound of f, >= 0, in the unit of `value`.
        value: f(p) (under "mgda" the norm ||Gp||).
        g0_norm, gp_norm, update_norm: ||g0||, ||G p_clipped||, ||sum_i coefficients_i g_i||; a norm
            that is rounding error of its own terms is 0.
        clip_active: clipping changed the direction of Gp, and so the update. (Where p is not the
            weights some p_i exceeds w_i, but at a vertex of the simplex only the length changes.)
            With the clip "inside": some p_i would be larger without its cap.
        finite: False when the Gram holds NaN or infinity; every other result is NaN then.
        converged: False if the solver stopped before the optimum (`gap` is valid all the same).
        status: what became of the problem, in a word; for a batch a numpy array of n of them:
            "ok"; "non_finite"; "unconverged"; or, in a batch only, why the matrix is no Gram matrix
            and every other result is NaN: "negative_diagonal", "asymmetric", "not_gram"
            (|M_ij| > ||g_i|| ||g_j||).
        cosines: [m, m] between gradients, 0 where a gradient is zero.
        state: what a rule with a memory goes on from; {} for others, and for a batch.
        expected: with gram="unbiased" the estimate that was solved in place of `gram`, with its
            errors; p, gap, value and clip_active are of that problem, p_clipped is what is made of
            it (`along`), and the norms are those of `gram`, the batch's. None otherwise.
        in_metric: with metric="adam" the Gram matrix [m, m] that was solved in place of `gram`, in
            the metric of AdamW's update; p, gap, value and clip_active are of that problem, and the
            three norms those of `gram`. None otherwise, and in steps without a second moment.
        cosines_in_metric: [m, m] of `in_metric`; None without.
    """

    __slots__ = (
        "_gram",
        "_in_metric",
        "_packed",
        "_tensor",
        "_weights",
        "c",
        "expected",
        "names",
        "rule",
        "state",
    )

    def __init__(
        self,
        names: tuple[str, ...],
        weights: NDArray[np.float64],
        c: float,
        rule: str,
        gram: NDArray[np.float64],
        packed: NDArray[np.float64],
        tensor: bool,
        state: State | None = None,
    ) -> None:
        """Names the parts of packed [.., 3m + SCALARS]; `solve_dual` is the one that calls this."""
        self.names = names
        self.c = c
        self.rule = rule
        self.state = state or {}
        self.expected: Estimate | None = None
        self._in_metric: NDArray[np.float64] | None = None
        self._weights = weights
        self._gram = gram
        self._packed = packed
        self._tensor = tensor

    def _array(self, values: NDArray[np.float64]) -> Any:
        return torch.from_numpy(values.copy()) if self._tensor else values.copy()

    def _flag(self, flags: NDArray[np.bool_]) -> Any:
        if self._packed.ndim == 1:
            return bool(flags)
        return torch.from_numpy(flags) if self._tensor else flags

    def _status(self) -> NDArray[np.float64]:
        status: NDArray[np.float64] = self._packed[..., 3 * len(self.names) + STATUS]
        return status

    @property
    def gram(self) -> Any:
        """[.., m, m] the Gram matrix."""
        return self._array(self._gram)

    @property
    def weights(self) -> Any:
        """[m] the weights."""
        return self._array(self._weights)

    p = _part(0, "[.., m] the minimiser of f on the simplex that is closest to the weights.")
    p_clipped = _part(1, '[.., m] min(p, weights) under "cagrad-clip", p otherwise.')
    coefficients = _part(2, "[.., m] the coefficients of the gradients in the update.")
    gap = _scalar(GAP, "f(p) minus its lower bound, >= 0.")
    value = _scalar(VALUE, "f(p).")
    g0_norm = _scalar(G0_NORM, "||g0|| = sqrt(w'Mw).")
    gp_norm = _scalar(GP_NORM, "||G p_clipped||.")
    update_norm = _scalar(UPDATE_NORM, "Norm of the update, from the Gram.")

    @property
    def clip_active(self) -> Any:
        """Whether clipping changed the coefficients; None for a rule without a certificate."""
        flags = self._packed[..., 3 * len(self.names) + CLIP_ACTIVE]
        return None if np.isnan(flags).any() else self._flag(flags != 0.0)

    @property
    def finite(self) -> Any:
        """Whether the Gram was finite."""
        return self._flag(self._status() != NON_FINITE)

    @property
    def converged(self) -> Any:
        """Whether the solver came to the optimum."""
        return self._flag(self._status() == 0.0)

    @property
    def status(self) -> Any:
        """What became of the problem, in a word; [n] of them for a batch."""
        words = np.array(STATUSES)[self._status().astype(int)]
        return str(words) if words.ndim == 0 else words

    @property
    def cosines(self) -> Any:
        """[.., m, m] cosines between the gradients; 0 where a gradient is zero."""
        return self._array(_cosines(self._gram))

    @property
    def in_metric(self) -> Any:
        """[m, m] the Gram matrix in the metric of the update; None where that is Euclidean."""
        return None if self._in_metric is None else self._array(self._in_metric)

    @property
    def cosines_in_metric(self) -> Any:
        """[m, m] cosines in the metric of the update; None where that is the Euclidean one."""
        return None if self._in_metric is None else self._array(_cosines(self._in_metric))

    def among(self, names: tuple[str, ...]) -> "DualSolution":
        """The same solution of one problem where there are more objectives, all of weight 0."""
        m, k, places = len(names), len(self.names), [names.index(name) for name in self.names]
        gram, packed = np.zeros((m, m)), np.zeros(3 * m + _C.SCALARS)
        gram[np.ix_(places, places)] = self._gram
        packed[: 3 * m].reshape(3, m)[:, places] = self._packed[: 3 * k].reshape(3, k)
        packed[3 * m :] = self._packed[3 * k :]
        weights = np.zeros(m)
        weights[places] = self._weights
        return DualSolution(
            names, weights, self.c, self.rule, gram, packed, self._tensor, self.state
        )

    def along(self, gram: torch.Tensor, estimate: Estimate, c_mode: str) -> "DualSolution":
        """What an estimate's solution comes to for gradients with the Gram matrix `gram`.

        It counts λ, and 1 - λ the weights: with CAGrad, p̃ = λ p̃ + (1 - λ) w; with other rules
        α = λ α + (1 - λ) (Σ |α_i|) w.

        Args:
            gram: [m, m] float64 on the CPU, finite.
            estimate: whose Gram matrix was solved, and λ.
            c_mode: of which matrix the norms in CAGrad's α = w + (c ‖g0‖ / ‖G̃p‖) p̃ are: "batch",
                of `gram`; "signal", of the estimate (1 - λ: of gradients that are all one).
        """
        m, packed, M = len(self.names), self._packed.copy(), gram.numpy()
        coefficients, p, w = packed[2 * m : 3 * m], packed[m : 2 * m], self._weights
        shrinkage = estimate.shrinkage

        def norm(x: NDArray[np.float64], of: NDArray[np.float64] = M) -> float:
            return float(size(of[None], x[None])[0])

        if self.rule.partition("(")[0] in ("cagrad", "cagrad-clip"):  # with whatever clip
            p[:] = shrinkage * p + (1.0 - shrinkage) * w
            of = M
            if c_mode == "signal":
                one = float(w @ np.diagonal(estimate.gram))
                of = shrinkage * estimate.gram + (1.0 - shrinkage) * one
            length = norm(p, of)
            coefficients[:] = w + (self.c * norm(w, of) / length if length > 0.0 else 0.0) * p
        else:
            prior = abs(coefficients).sum() * w
            coefficients[:] = shrinkage * coefficients + (1.0 - shrinkage) * prior
        found = self._with_norms(M, packed)
        found.expected = estimate
        return found

    def measured_by(self, gram: torch.Tensor) -> "DualSolution":
        """The same coefficients, of gradients whose Euclidean Gram matrix [m, m] is `gram`.

        The matrix that was solved is `in_metric`.
        """
        found = self._with_norms(gram.numpy(), self._packed.copy())
        found._in_metric = self._gram
        return found

    def _with_norms(self, M: NDArray[np.float64], packed: NDArray[np.float64]) -> "DualSolution":
        """`packed` with the three norms that gradients with the Gram matrix M have."""
        m = len(self.names)
        if self.finite:
            for place, x in (
                (G0_NORM, self._weights),
                (GP_NORM, packed[m : 2 * m]),
                (UPDATE_NORM, packed[2 * m : 3 * m]),
            ):
                length = np.nan if np.isnan(x).any() else size(M[None], x[None])[0]
                packed[3 * m + place] = length
        return DualSolution(
            self.names, self._weights, self.c, self.rule, M, packed, self._tensor, self.state
        )

    def __repr__(self) -> str:
        """One line a part for one problem, one line in all for a batch."""
        head, clip_active = f"DualSolution(rule={self.rule!r}, c={self.c:g}", self.clip_active
        certified = clip_active is not None
        if self._packed.ndim == 2:
            clipped = f", clip_active in {np.count_nonzero(clip_active)}" if certified else ""
            return f"{head}, n={len(self._packed)}, m={len(self.names)}{clipped})"
        if not self.finite:
            return f"{head}, finite=False)"
        found = f", gap={self.gap:.1e}, clip_active={clip_active}" if certified else ""
        lines = [f"{head}{found},"]
        for name in ("weights", *(("p", "p_clipped") if certified else ()), "coefficients"):
            values = zip(self.names, getattr(self, name).tolist(), strict=True)
            lines.append(f"  {name}={{{', '.join(f'{n}: {v:.6g}' for n, v in values)}}},")
        norms = f"g0_norm={self.g0_norm:.6g}, "
        norms += f"gp_norm={self.gp_norm:.6g}, " if certified else ""
        return "\n".join([*lines, f"  {norms}update_norm={self.update_norm:.6g})"])


def _cosines(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    norms = np.sqrt(np.maximum(np.diagonal(gram, axis1=-2, axis2=-1), 0.0))
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms != 0.0)
    with np.errstate(invalid="ignore"):  # a Gram that is not finite gives NaN
        cosines = gram * inverse[..., :, None] * inverse[..., None, :]
    return np.clip(cosines, -1.0, 1.0)
