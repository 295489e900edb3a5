"""`SpotCheck`: what one collecting pass gave, held against an ordinary backward pass.

For random numbers r_i, Σ_i r_i g_i is the gradient of Σ_b (rᵀA)_b score_b: one ordinary backward
pass of the same graph, in which no rule and no grouping of rows has a part. Whatever the collecting
pass did wrong at this batch, a rule that does not fit, sequences that met, scores in another order,
makes a difference. A difference that is no larger than what rounding makes of the ordinary gradient
itself, when its seeds are scaled, is rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import combinations, count
from math import comb, isfinite
from typing import Any, TypeAlias

import torch
from torch import Tensor

from raco_fast.backends.weight_grad import widened
from raco_fast.distributed.processes import Processes
from raco_fast.engine.backward import collect, nothing_past_rules, propagate
from raco_fast.engine.deviations import Bundles, Take, fit_in_one, of_combinations, on_host
from raco_fast.engine.graph import ScoreGraph
from raco_fast.engine.tap import Call, Collector, name_of

# A difference is looked into from this size on, in units of the parameter's own gradients, and is
# an error if it is besides this many times as large as that between two ordinary passes.
_DOUBTFUL = 1e-4
_TIMES_NOISE = 6.0
ANOTHER_SCALE = 1.37  # not a power of two: every product is rounded anew

_Sizes: TypeAlias = tuple[list[float], list[float]]
"""Of several parameters: sizes of the differences, and of the gradients that were combined."""


class SpotCheck:
    """One comparison.

    Args:
        graph: of the batch; it has to be retained.
        A: ∂L/∂scores, float64 [m, B].
        seed: of the random numbers.
        quietly: run no hook of a parameter, such as DistributedDataParallel's, at the price of
            memory for all gradients of one pass.

    `r`: float64 [m], in units in which every objective counts alike.
    """

    def __init__(self, graph: ScoreGraph, A: Tensor, seed: int, quietly: bool = False) -> None:
        self._graph, self._quietly = graph, quietly
        self.r = random_weights(A.abs().amax(1), seed)
        self._seeds = self.r @ A

    def gradients_of(self, formed: Mapping[Tensor, Tensor]) -> str | None:
        """What is wrong with gradients [m, *shape] of the parameters, None if nothing is."""

        def deviations(params: list[Tensor], expected: list[Tensor]) -> _Sizes:
            return of_combinations(self.r, [formed.get(p) for p in params], expected)

        return self._mismatch(deviations)

    def grams_of(self, grams: Mapping[Tensor, Tensor]) -> str | None:
        """What is wrong with each parameter's part [m, m] of the Gram matrix, None if nothing is.

        rᵀMr has to be the squared norm of the ordinary gradient.
        """
        nothing = torch.zeros(len(self.r), len(self.r), dtype=torch.float64)

        def deviations(params: list[Tensor], expected: list[Tensor]) -> _Sizes:
            norms = on_host(torch._foreach_norm(expected, 2, dtype=torch.float64))
            M = torch.stack([grams.get(p, nothing) for p in params])
            sizes = (M.diagonal(dim1=1, dim2=2) @ self.r.square()).clamp(min=0.0).sqrt()
            differences = ((M @ self.r) @ self.r - norms.square()).abs()
            differences /= torch.maximum(sizes, norms).clamp(min=1e-300)
            return differences.tolist(), sizes.tolist()

        return self._mismatch(deviations)

    def _mismatch(self, deviations: Callable[[list[Tensor], list[Tensor]], _Sizes]) -> str | None:
        """What is wrong; no more gradients are held at a time than a bundle, and the doubtful."""
        doubtful: dict[Tensor, tuple[float, float, Tensor]] = {}
        self.conclusive = True

        def compare(params: list[Tensor], expected: list[Tensor]) -> None:
            found = zip(params, expected, *deviations(params, expected), strict=True)
            for p, e, difference, size in found:
                self.conclusive = self.conclusive and isfinite(difference + size)
                if difference > rounding_bound(p, size, 0.0):
                    doubtful[p] = difference, size, e

        self._ordinary(self._graph.wanted, 1.0, compare)
        if not self.conclusive:
            return None
        wrong = {}

        def judge(params: list[Tensor], again: list[Tensor]) -> None:
            for p, g in zip(params, again, strict=True):
                difference, size, expected = doubtful[p]
                moved = widened(g) / ANOTHER_SCALE - widened(expected)
                if difference > rounding_bound(p, size, float(moved.norm())):
                    wrong[p] = difference / max(size, float(widened(expected).norm()))

        self._ordinary(list(doubtful), ANOTHER_SCALE, judge)
        return described(self._graph, wrong, Processes(None)) if wrong else None

    def _ordinary(self, parameters: Sequence[Tensor], scale: float, take: Take) -> None:
        """Hand over Σ_i r_i g_i of each parameter, times `scale`, by autograd, and free it."""
        if not parameters:
            return
        scores, left = self._graph.scores, set(parameters)
        seeds = self._seeds * scale
        bundles = Bundles(take)
        with ExitStack() as stack:
            stack.enter_context(nothing_past_rules(self._graph.wanted))
            if self._quietly or fit_in_one(parameters):
                found = torch.autograd.grad(
                    [scores], parameters, [seeds.to(scores)], retain_graph=True, allow_unused=True
                )
                for p, g in zip(parameters, found, strict=True):
                    if g is not None:
                        left.discard(p)
                        bundles.add(p, g)
            else:

                @torch.no_grad()
                def hand_over(p: Tensor) -> None:
                    assert p.grad is not None
                    grad, p.grad = p.grad, None
                    left.discard(p)
                    bundles.add(p, grad)

                for p in parameters:
                    hook = p.register_post_accumulate_grad_hook(hand_over)  # type: ignore[no-untyped-call]
                    stack.callback(hook.remove)
                propagate(scores, seeds, inputs=parameters, retain_graph=True)
        for p in left:  # no score depends on it
            bundles.add(p, torch.zeros_like(p))
        bundles.finish()


def random_weights(largest: Tensor, seed: int) -> Tensor:
    """r, float64 [m], so that every objective counts alike; `largest`: ∂L/∂score of each."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, largest.shape, generator=generator) * 2.0 - 1.0
    sizes = 0.5 + torch.rand(largest.shape, generator=generator, dtype=torch.float64)
    return torch.where(largest > 0, signs * sizes / largest, 0.0)


def described(graph: ScoreGraph, wrong: dict[Tensor, float], processes: Processes) -> str:
    """What to say of parameters whose gradients differ, by so much of their size."""
    p = max(wrong, key=lambda p: wrong[p])
    layer = graph.layer_of.get(p)
    where = "" if layer is None else f" in layer {layer!r}"
    why = mixing(graph, processes) or (
        "the rule of that layer does not describe what it computed"
        if layer is not None
        else "no rule sees it"
    )
    return (
        f"the gradients of {name_of(p)}{where} differ from those of an ordinary backward pass "
        f"by {wrong[p]:.1e} of their size: {why}"
    )


def rounding_bound(p: Tensor, size: Any, noise: float) -> Any:
    """The largest difference between two ways to a gradient of p that can be rounding.

    Args:
        size: of the gradients that are combined.
        noise: how far an ordinary gradient moves when its seeds are scaled by `ANOTHER_SCALE`.
    """
    return max(_DOUBTFUL, torch.finfo(p.dtype).eps) * size + _TIMES_NOISE * noise


def mixing(graph: ScoreGraph, processes: Processes) -> str | None:
    """Where sequences meet, found by extra backward passes of some scores only; None: nowhere.

    A score may depend on no row but its own. For any two sequences there is a pass with a seed on
    the one and none on the other, and one the other way round. All processes take as many passes,
    whatever they have in their batches. The graph is kept.
    """
    codes = _codes(len(graph.scores))
    count = int(processes.largest(torch.tensor(len(codes))))
    reached: list[str] = []
    for seeded in [*codes, *codes.new_zeros(count - len(codes), codes.shape[1])]:
        collect(_looking(seeded, reached), graph, seeded, retain_graph=True)
        if reached and processes.size == 1:
            break
    if reached:
        return processes.say(
            f"in layer {reached[-1]!r} a score depends on rows of another sequence, so the "
            f"model mixes sequences, or `scores` are in another order than the rows"
        )
    return processes.say(None)


def _codes(n: int) -> Tensor:
    """bool [digits, n]: n codes of as many ones, so that none contains another; fewest digits."""
    digits = next(k for k in count() if comb(k, k // 2) >= n)
    codes = torch.zeros(digits, n, dtype=torch.bool)
    for b, ones in zip(range(n), combinations(range(digits), digits // 2), strict=False):
        codes[list(ones), b] = True
    return codes


def _looking(seeded: Tensor, reached: list[str]) -> Collector:
    """Notes the layers of which rows of sequences without a seed have a gradient."""

    def collect(call: Call) -> None:
        index, outer = call.entries
        has_seed = seeded if index is None else index.of_rows(seeded.int()).bool()
        others = (~has_seed).nonzero()[:, 0].to(call.dy.device)
        if bool((call.dy.reshape(outer, len(has_seed), -1).index_select(1, others) != 0).any()):
            reached.append(call.layer)

    return collect
