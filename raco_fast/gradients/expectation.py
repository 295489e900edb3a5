"""`Expectation`: where a step's Gram matrix becomes that of the expected gradients."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raco_fast.distributed.processes import Processes
from raco_fast.gradients.rule_memory import RuleMemory
from raco_fast.gradients.samples import StepSamples
from raco_fast.solver.expected_gram import ExpectedGram
from raco_fast.solver.gram_options import GramOptions
from raco_fast.solver.registry import RuleLike, check_rule
from raco_fast.solver.solution import DualSolution
from raco_fast.solver.u_statistic import SampleSums

# Steps after which an entry that no step has had is told of.
_PATIENCE = 20


class Expectation:
    """The estimate of one set of gradients, between its passes and steps.

    Attributes:
        options: which Gram matrix is solved; may be set between steps.
        samples: of the passes since the last step.
    """

    def __init__(self, names: Sequence[str], options: GramOptions, processes: Processes) -> None:
        self._names, self._processes = tuple(names), processes
        self._options = options
        self.samples = StepSamples(len(self._names))
        self._expected = ExpectedGram(len(self._names), options.gram_ema)
        self._steps = 0
        self._told = False

    @property
    def options(self) -> GramOptions:
        """Which Gram matrix is solved."""
        return self._options

    @options.setter
    def options(self, options: GramOptions) -> None:
        self._options, self._expected.ema = options, options.gram_ema

    @property
    def wanted(self) -> bool:
        """Whether passes have to collect what their samples have with themselves."""
        return self._options.unbiased and len(self._names) > 1

    def state(self) -> dict[str, Any]:
        """The averages as plain JSON, with the order of the objectives; {} without any."""
        values = self._expected.state()
        return {"objectives": list(self._names), "values": values} if values else {}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `state` gave, also where the objectives have another order."""
        given = list(saved["objectives"]) if saved else []
        if saved and sorted(given) != sorted(self._names):
            raise ValueError(
                f"`gram_state` must be of the objectives {self._names}, got {tuple(given)}; {{}} "
                f"begins anew"
            )
        places = [given.index(name) for name in self._names] if saved else []
        self._expected.restore(saved["values"] if saved else {}, places)

    def solve(
        self,
        M: Tensor,
        weights: Mapping[str, float],
        present: Sequence[str],
        c: float,
        rule: RuleLike,
        rules: RuleMemory,
        factor: float,
    ) -> DualSolution:
        """The coefficients of a step; all processes call it.

        Args:
            M: [m, m] float64 on the CPU, the batch's.
            weights, present, c, rule: as for `RuleMemory.solve`.
            rules: whose rule is asked.
            factor: by which the gradients have been multiplied since the passes.
        Raises:
            RuntimeError: there is no pair of different samples, and none was seen before.
        """
        sums = self.samples.sums(self._processes, factor)
        if not bool(torch.isfinite(M).all()):
            return rules.solve(M, weights, present, c, rule)
        gram = M.numpy()
        if np.isfinite(sums.products).all():
            if not self._expected.known:
                _check_samples(sums)
            self._expected.take(gram, sums)
            self._steps += 1
        values = np.array(list(weights.values()))
        places = [self._names.index(name) for name in present]
        estimate = self._expected.estimate(gram, sums.counts, values, places)
        self._tell_unseen(estimate.mean, places)
        if check_rule(rule).needs_losses:
            weights, present = _with_losses(weights, present, gram.diagonal()[places])
        solution = rules.solve(torch.from_numpy(estimate.gram), weights, present, c, rule)
        return solution.along(M, estimate, self._options.c_mode)

    def _tell_unseen(self, mean: Any, places: Sequence[int]) -> None:
        unseen = np.argwhere(np.isnan(mean[np.ix_(places, places)]))
        if self._told or not len(unseen) or self._steps < _PATIENCE:
            return
        self._told = True
        i, j = (self._names[places[k]] for k in unseen[0])
        warnings.warn(
            f"no step so far had two different samples of which one is labelled for {i!r} and the "
            f"other for {j!r}, so gram='unbiased' knows nothing of their product, and every update "
            f"is that of gradients without a conflict; use more samples in a step, or gram='batch'",
            stacklevel=2,
        )


def _with_losses(
    weights: Mapping[str, float], present: Sequence[str], squares: NDArray[np.float64]
) -> tuple[Mapping[str, float], Sequence[str]]:
    """The weights and objectives without those that no pair of the step is labelled for.

    The estimate knows their gradients from other steps, but nobody their loss; and their gradient
    in this step, zero, adds nothing with any coefficient.
    """
    kept = [name for name, square in zip(present, squares, strict=True) if square > 0.0]
    total = sum(weights[name] for name in kept)
    if len(kept) == len(present) or total == 0.0:
        return weights, present
    return {n: weights[n] / total if n in kept else 0.0 for n in weights}, kept


def _check_samples(sums: SampleSums) -> None:
    if sums.samples < 2:
        raise RuntimeError(
            f"gram='unbiased' needs at least two independent samples in a step, for products "
            f"between them, got {sums.samples}. Use more than one pair a step; say which scores "
            f"are of one pair with backward(..., samples=[number of the pair of each score]), "
            f"without which a whole backward pass is one sample; or set gram='batch'"
        )
