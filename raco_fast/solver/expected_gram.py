"""`ExpectedGram`: an estimate of the Gram matrix of the expected gradients, from step to step.

A step's U-statistic (`u_statistic.py`) is unbiased and noisy, so it is averaged over steps, entry
by entry, and the average is believed as far as it stands out of its own noise. This is this
library's own method; docs/conflict.md says what speaks for it.

    scale       x = H / q: gradients shrink in training, and old steps must not count for more
                because their gradients were longer. q is the average before this step of the
                batch's mean squared norm, so that x stays unbiased given the past.
    average     mean += a (x - mean), a = max(1 / t, 1 - β) at the t-th step that has the entry: the
                plain mean until it is as long as the exponential one. Beside it r = Σ ω², of the
                weights ω of all steps so far, and the variance v of x between steps, so that the
                standard error is √(v r / (1 - r)).
    cut         negative eigenvalues become 0; the rule is asked for this matrix.
    shrinkage   λ = max(0, 1 - 2 noise²/signal²), of the sums of all squared errors and of all
                squared averages; it grows from 0 at t = 3 by 1/17 a step, while the errors
                themselves are uncertain. What the rule says counts λ, and the prior, that there is
                no conflict and the weights are followed, 1 - λ (`DualSolution.along`).

λ is a positive-part James-Stein factor, and its 2 is the least for which nothing that one step
alone has brought counts, however large it is: after k steps of a new size λ is about 1 - 1/k.

Not the matrix is shrunk, but what is concluded from it: where all gradients are one, every point of
the simplex is as good as another, and the slightest deviation from that picks a vertex.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raco_fast.solver.u_statistic import SampleSums

Array = NDArray[np.float64]

# Steps that an average goes over where its length is not given, and the squared relative error that
# it is chosen for.
_SHORTEST, _LONGEST, _ERROR = 20.0, 200.0, 0.01
_NOISE_WEIGHT = 2.0
_FEW_STEPS, _ENOUGH_STEPS = 3.0, 20.0
_OF_ENTRIES = ("mean", "variance", "with_own", "of_own", "concentration", "count")
"""Arrays [m, m] of the state. `with_own`, `of_own`: the covariances, between steps, of the entry
(i, j) with (i, i), and of (i, i) with (j, j)."""


@dataclass(frozen=True)
class Estimate:
    """What is known of the expected gradients after a step; NaN where nothing is known yet.

    `gram`: [m, m], what is solved, a Gram matrix, with λ = 0 that of gradients that are all one;
    `shrinkage`: λ in [0, 1], how much it counts; `steps`: how many the average goes over. `mean`,
    `standard_error`: [m, m], the unbiased average, which is no Gram matrix where it is noise.
    `cosines`, `cosine_errors`: [m, m] of `mean`, which may leave [-1, 1]. `noise`: [m], the trace
    of the covariance of one sample's gradient; `noise_share`: [m], how much of the batch's squared
    norm it is; `noise_scale`: [m], over the squared norm of the expected gradient: the number of
    samples for which noise and signal are as large.
    """

    gram: Array
    shrinkage: float
    steps: float
    mean: Array
    standard_error: Array
    cosines: Array
    cosine_errors: Array
    noise: Array
    noise_share: Array
    noise_scale: Array


@dataclass
class ExpectedGram:
    """The averages over the steps so far, for m objectives.

    Args:
        m: the number of objectives.
        ema: β, what a step keeps of the average before it; None: chosen from the noise.
    """

    m: int
    ema: float | None = None
    _state: dict[str, Array] = field(init=False)

    def __post_init__(self) -> None:
        """Begin with nothing."""
        self._state = {name: np.zeros((self.m, self.m)) for name in _OF_ENTRIES}
        self._state |= {"noise": np.zeros(self.m), "scale": np.zeros(2)}

    @property
    def known(self) -> bool:
        """Whether some step had some entry."""
        return bool(self._state["count"].any())

    def state(self) -> dict[str, Any]:
        """All of it as plain JSON; {} where nothing is known."""
        if not self.known:
            return {}
        return {name: value.tolist() for name, value in self._state.items()}

    def restore(self, saved: Mapping[str, Any], places: Sequence[int]) -> None:
        """Go on from what `state` gave.

        Args:
            places: of each objective among those of the state.
        Raises:
            ValueError: it is of another number of objectives, or of something else.
        """
        self.__post_init__()
        if not saved:
            return
        given = {name: np.array(value, dtype=np.float64) for name, value in saved.items()}
        shapes, wanted = ({k: v.shape for k, v in s.items()} for s in (given, self._state))
        if shapes != wanted:
            raise ValueError(
                f"`gram_state` must have {wanted} for m = {self.m}, got {shapes}; {{}} begins anew"
            )
        for name in (*_OF_ENTRIES, "noise"):
            self._state[name] = given[name][np.ix_(*[places] * given[name].ndim)]
        self._state["scale"] = given["scale"]

    def take(self, gram: Array, sums: SampleSums) -> None:
        """Add one step's U-statistic to the averages.

        Args:
            gram: [m, m], the batch's; it is finite, as are the sums.
            sums: of its samples.
        """
        labelled = sums.counts > 0
        size = float(np.diagonal(gram)[labelled].mean()) if labelled.any() else 0.0
        if not size > 0.0:
            return
        state, beta = self._state, self._beta()
        total, seen = state["scale"]
        x = sums.unbiased(gram) / (total / seen if seen else size)
        exists = np.isfinite(x)
        count = state["count"] + exists
        a = np.where(exists, np.maximum(1.0 / np.maximum(count, 1.0), 1.0 - beta), 0.0)
        step = np.where(exists, x - state["mean"], 0.0)
        own = np.diagonal(step)
        moments = {
            "variance": step**2,
            "with_own": step * own[:, None],
            "of_own": np.outer(own, own),
        }
        for name, moment in moments.items():
            state[name] = (1.0 - a) * (state[name] + a * moment)
        state["concentration"] = (1.0 - a) ** 2 * state["concentration"] + a**2
        state["mean"] = state["mean"] + a * step
        state["count"] = count
        # tr Σ_i / n_i is what the batch's squared norm has too much.
        too_much = np.diagonal(gram) / (total / seen if seen else size) - np.diagonal(x)
        of_one = np.where(np.diagonal(exists), too_much * sums.counts, 0.0)
        state["noise"] = state["noise"] + np.diagonal(a) * (of_one - state["noise"])
        state["scale"] = np.array([beta * total + (1 - beta) * size, beta * seen + (1 - beta)])

    def _beta(self) -> float:
        """What the next step keeps; from steps before it alone, so that it does not choose."""
        if self.ema is not None:
            return self.ema
        r, length = self._state["concentration"], _LONGEST
        known = r > 0.0
        if known.any() and (self._state["count"][known] > _FEW_STEPS).all():
            of_one = self._state["variance"][known] / (1.0 - r[known])
            signal = (self._state["mean"][known] ** 2).sum() - (of_one * r[known]).sum()
            if signal > 0.0:
                length = float(np.clip(of_one.sum() / (_ERROR * signal), _SHORTEST, _LONGEST))
        return 1.0 - 2.0 / (length + 1.0)

    def estimate(
        self, gram: Array, counts: Array, weights: Array, present: Sequence[int]
    ) -> Estimate:
        """What is known after the steps taken so far.

        Args:
            gram: [m, m], the batch's of the last step: its size is the unit.
            counts: [m], labelled samples of the last step.
            weights: [m], the user's.
            present: the objectives that take part; of others `gram` has zeros.
        """
        state, (total, seen) = self._state, self._state["scale"]
        scale = total / seen if seen else float(np.diagonal(gram).mean()) or 1.0
        r = state["concentration"]
        known = r > 0.0
        mean = np.where(known, state["mean"], np.nan)
        squared = _squared_error(state["variance"], r)
        among = np.ix_(present, present)
        E = np.where(known, mean, 0.0)[among]
        shrinkage = believed(E, squared[among], state["count"][among])
        solved = np.zeros((self.m, self.m))
        solved[among] = cut(E)
        if shrinkage == 0.0:
            solved[among] = max(float(weights @ np.diagonal(solved)), 0.0) or 1.0
        squares = np.diagonal(mean)
        norms = np.sqrt(np.where(squares > 0.0, squares, np.nan))
        cosines = mean / np.outer(norms, norms)
        noise = np.where(np.diagonal(known), state["noise"], np.nan)
        of_batch = noise / np.where(counts > 0, counts, np.nan)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = of_batch / (of_batch + np.maximum(squares, 0.0))
        return Estimate(
            gram=solved * scale,
            shrinkage=shrinkage,
            steps=float((1.0 / r[known]).mean()) if known.any() else 0.0,
            mean=mean * scale,
            standard_error=np.where(known, np.sqrt(squared), np.nan) * scale,
            cosines=cosines,
            cosine_errors=self._cosine_errors(cosines, norms),
            noise=noise * scale,
            noise_share=share,
            noise_scale=noise / norms**2,
        )

    def _cosine_errors(self, cosines: Array, norms: Array) -> Array:
        """Standard errors of the cosines to first order in those of their three products."""
        state, product = self._state, np.outer(norms, norms)
        of_squares = np.diagonal(state["variance"]) / norms**4
        with_own = state["with_own"] / norms[:, None] ** 2
        variance = state["variance"] / product**2
        variance = variance - cosines * (with_own + with_own.T) / product
        both = np.add.outer(of_squares, of_squares) + 2.0 * state["of_own"] / product**2
        variance = np.maximum(variance + cosines**2 * both / 4, 0.0)
        return np.sqrt(_squared_error(variance, state["concentration"]))


def _squared_error(variance: Array, r: Array) -> Array:
    """v r / (1 - r) of an average; infinite for one of a single step."""
    several = r < 1.0 - 1e-12
    several &= r > 0.0
    return np.divide(variance * r, 1.0 - r, out=np.full_like(r, np.inf), where=several)


def believed(E: Array, squared_errors: Array, count: Array) -> float:
    """λ in [0, 1]; see the module's docstring.

    Args:
        E, squared_errors: [k, k], the averages and their errors, infinite where unknown.
        count: [k, k], how many steps have had the entry.
    """
    signal = float((E**2).sum())
    if not np.isfinite(squared_errors).all() or signal == 0.0:
        return 0.0
    grown = (float(count.min()) - _FEW_STEPS) / (_ENOUGH_STEPS - _FEW_STEPS)
    noise = float(squared_errors.sum())
    return min(1.0, max(0.0, grown)) * max(0.0, 1.0 - _NOISE_WEIGHT * noise / signal)


def cut(E: Array) -> Array:
    """The Gram matrix that is closest to E [k, k]: without its negative eigenvalues."""
    values, V = np.linalg.eigh((E + E.T) / 2)
    M = (V * np.maximum(values, 0.0)) @ V.T
    squares = np.maximum(np.diagonal(M), 0.0)
    bound = np.sqrt(np.outer(squares, squares))
    found: Array = np.clip((M + M.T) / 2, -bound, bound)  # rounding may leave it just above
    np.fill_diagonal(found, squares)
    return found
