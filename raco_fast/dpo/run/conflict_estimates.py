"""What the sums of `raco-fast conflict` say: cosines, noise, batch sizes, who gains and loses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raco_fast.dpo.run.config import TrainConfig
from raco_fast.dpo.run.conflict import Measured
from raco_fast.solver.dual import solve_dual
from raco_fast.solver.expected_gram import cut
from raco_fast.solver.intervals import Interval, interval, ratio_interval
from raco_fast.solver.pair_sums import PairSums
from raco_fast.solver.registry import check_rule, label_of

Array = NDArray[np.float64]


@dataclass(frozen=True)
class OfObjective:
    """One objective.

    Args:
        labelled, measured: labelled pairs of all training pairs, and of those measured.
        squared_norm: of the expected gradient, unbiased, so that it may be negative.
        noise: tr Σ, the variance of a labelled pair's gradient.
        noise_scale: tr Σ over the squared norm: labelled pairs in whose mean both are as large.
    """

    name: str
    labelled: int
    measured: int
    squared_norm: Interval
    noise: Interval
    noise_scale: Interval


@dataclass(frozen=True)
class OfTwo:
    """Two objectives.

    Args:
        names: of the two.
        common: training pairs labelled for both.
        agreement: of those, the share whose labels agree minus that whose labels conflict.
        product: of the expected gradients; its sign is that of the cosine.
        cosine: between them.
        of_batch: that of the Gram matrix which a step's batch has on average.
        sign_from: pairs in a step from which that has the sign of the cosine; inf where none.
        half_from: from which it is half the cosine at least.
    """

    names: tuple[str, str]
    common: int
    agreement: float
    product: Interval
    cosine: Interval
    of_batch: float
    sign_from: float
    half_from: float


@dataclass(frozen=True)
class OfUpdate:
    """An update, by where its coefficients come from.

    Args:
        source: "weights" (the weighted sum), "batch" or "unbiased".
        coefficients: of the objectives.
        descent: (H α)_i: a small step -ε Σ α_j E g_j lets the expected loss of objective i fall by
            ε (H α)_i; negative where the step works against it.
    """

    source: str
    coefficients: dict[str, float]
    descent: dict[str, Interval]


@dataclass(frozen=True)
class Conflict:
    """All that is told.

    Args:
        pairs, of_pairs: measured, and training pairs.
        pairs_per_step, rule, c: of the config.
        objectives, two, updates: what was found; no updates where an objective that has a weight
            could not be measured.
        unmeasured: objectives with too few labelled pairs.
        batch_sizes, curves: names -> the cosine at every batch size, as `OfTwo.of_batch`.
        scheduled: settings of the config that change during a run, of which the values of the file
            are used.
    """

    pairs: int
    of_pairs: int
    pairs_per_step: int
    rule: str
    c: float
    objectives: list[OfObjective]
    two: list[OfTwo]
    updates: list[OfUpdate]
    unmeasured: list[str]
    batch_sizes: list[float]
    curves: dict[tuple[str, str], list[float]]
    scheduled: list[str]


def estimated(config: TrainConfig, measured: Measured) -> Conflict:
    """What the measured sums say for a config."""
    names, m, sums = config.objectives, len(config.objectives), measured.sums
    known = [i for i in range(m) if _known(i, measured)]
    unmeasured = [name for i, name in enumerate(names) if i not in known]
    sizes = np.geomspace(1, 2.0**14, 57).tolist()
    curves = {
        (names[i], names[j]): [_cosine(sums.of_batches(n), i, j) for n in sizes]
        for i in known
        for j in known
        if i < j
    }
    updates = []
    if not any(config.weights[name] > 0.0 for name in unmeasured) and known:
        updates = _updates(config, measured, known)
    return Conflict(
        pairs=sums.pairs,
        of_pairs=measured.labels.pairs,
        pairs_per_step=config.pairs_per_step,
        rule=label_of(check_rule(config.rule)),
        c=config.c,
        objectives=[_of_objective(names[i], i, measured) for i in range(m)],
        two=[
            _of_two(config, i, j, measured, both=i in known and j in known)
            for i in range(m)
            for j in range(i + 1, m)
        ],
        updates=updates,
        unmeasured=unmeasured,
        batch_sizes=sizes,
        curves=curves,
        scheduled=[s for s in ("c_schedule", "weights_schedule") if getattr(config, s) is not None],
    )


def _known(i: int, measured: Measured) -> bool:
    """Whether its squared norm exists, also without any one block."""
    every = (measured.sums, *measured.left_out)
    return all(bool(np.isfinite(sums.expected[i, i])) for sums in every)


def _each(measured: Measured, of: Callable[[PairSums], float]) -> tuple[float, Array]:
    """A statistic, and its values without one block each."""
    return of(measured.sums), np.array([of(sums) for sums in measured.left_out])


def _of_objective(name: str, i: int, measured: Measured) -> OfObjective:
    square, squares = _each(measured, lambda s: float(s.expected[i, i]))
    noise, noises = _each(measured, lambda s: float(s.noise_of_a_pair[i]))
    return OfObjective(
        name,
        int(measured.labels.counts[i]),
        int(measured.sums.counts[i]),
        interval(square, squares),
        interval(noise, noises),
        ratio_interval(noise, square, noises, squares, (0.0, np.inf)),
    )


def _of_two(config: TrainConfig, i: int, j: int, measured: Measured, both: bool) -> OfTwo:
    labels, sums = measured.labels, measured.sums
    product, products = _each(measured, lambda s: float(s.expected[i, j]))
    length, lengths = _each(measured, lambda s: _lengths(s.expected, i, j))
    found = interval(product, products)
    cosine = ratio_interval(product, length, products, lengths, (-1.0, 1.0))
    of_batch, sign_from, half_from = math.nan, math.inf, math.inf
    if both:
        of_batch = _cosine(sums.of_batches(config.pairs_per_step), i, j)
        sign_from, half_from = batch_sizes(sums, i, j)
    return OfTwo(
        (config.objectives[i], config.objectives[j]),
        int(labels.common[i, j]),
        float(labels.agreement[i, j]),
        found,
        cosine,
        of_batch,
        sign_from,
        half_from,
    )


def _lengths(M: Array, i: int, j: int) -> float:
    """‖g_i‖ ‖g_j‖, of estimates that may be negative."""
    return math.sqrt(max(float(M[i, i]), 0.0) * max(float(M[j, j]), 0.0))


def _cosine(M: Array, i: int, j: int) -> float:
    length = _lengths(M, i, j)
    return float(M[i, j]) / length if length > 0.0 else math.nan


def batch_sizes(sums: PairSums, i: int, j: int) -> tuple[float, float]:
    """Pairs in a step from which its cosine has the sign of the unbiased one, and half its size.

    The step's is (H_ij + x D_ij) / √((H_ii + x D_ii) (H_jj + x D_jj)) at x = 1/n. It has the sign
    up to x = -H_ij / D_ij where that is positive, and half the size up to the smallest positive
    root of (1 + d x)² = (1 + a x)(1 + b x)/4. Infinite where H has no cosine.
    """
    H, D = sums.expected, sums.noise
    if not (H[i, i] > 0.0 and H[j, j] > 0.0 and H[i, j] != 0.0):
        return math.inf, math.inf
    d, a, b = D[i, j] / H[i, j], D[i, i] / H[i, i], D[j, j] / H[j, j]
    roots = np.roots([d * d - a * b / 4.0, 2.0 * d - (a + b) / 4.0, 0.75])
    positive = [float(r.real) for r in roots if abs(r.imag) <= 1e-9 * abs(r) and r.real > 0.0]
    half = max(1.0, 1.0 / min(positive)) if positive else 1.0
    return float(math.floor(max(-d, 0.0)) + 1), float(math.ceil(half - 1e-9))


def _updates(config: TrainConfig, measured: Measured, known: Sequence[int]) -> list[OfUpdate]:
    """The updates of the weighted sum, and of the config's rule by either Gram matrix."""
    places = list(known)
    names = [config.objectives[i] for i in places]
    weights = {name: config.weights[name] for name in names}
    losses = measured.losses[places]
    n = config.pairs_per_step

    def solved(M: Array) -> Array:
        found = solve_dual(cut(M), weights, config.c, config.rule, losses=losses)
        return np.asarray(found.coefficients)

    sources: dict[str, Callable[[PairSums], Array]] = {
        "weights": lambda s: np.array(list(weights.values())),
        "batch": lambda s: solved(s.of_batches(n)),
        "unbiased": lambda s: solved(s.expected),
    }
    sums = measured.sums.of(places)
    left_out = [each.of(places) for each in measured.left_out]
    updates = []
    for source, coefficients in sources.items():
        alpha = coefficients(sums)
        descent = sums.expected @ alpha
        others = np.array([each.expected @ coefficients(each) for each in left_out])
        updates.append(
            OfUpdate(
                source,
                dict(zip(names, alpha.tolist(), strict=True)),
                {name: interval(descent[k], others[:, k]) for k, name in enumerate(names)},
            )
        )
    return updates
