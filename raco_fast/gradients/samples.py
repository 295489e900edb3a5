"""Which sample each score of a pass belongs to, and what a step's samples have with themselves."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from raco_fast.distributed.processes import Processes
from raco_fast.solver.u_statistic import SampleSums

Labelled = Mapping[str, Tensor | Sequence[bool]]


class Said(NamedTuple):
    """What a call of `backward` says of its samples."""

    samples: Sequence[int] | Tensor | None = None
    labelled: Labelled | None = None


class Samples(NamedTuple):
    """The samples of a pass: independent draws of the data, mostly preference pairs.

    `of_scores`: int64 [B], from 0; `weights`: float64 [m, samples], how much each counts for each
    objective: 1 where it is labelled, 0 where not; of a whole micro-batch, its labelled scores.
    """

    of_scores: Tensor
    weights: Tensor

    @classmethod
    def of(
        cls,
        A: Tensor,
        pairs: Sequence[tuple[int, int]],
        names: Sequence[str],
        said: Said,
    ) -> "Samples":
        """Those of a pass with A = ∂L/∂scores [m, B].

        Args:
            pairs: scores that share rows, and so a sample.
            names: of the objectives.
            said: `samples`, [B] integers, of each score; None: `pairs` say it, or the pass is one
                sample. `labelled`: objective name -> [B], which scores count for it; None: those
                that it depends on.
        Raises:
            ValueError: a wrong shape, or `samples` or `labelled` contradict the pass.
            TypeError: `samples` are no integers.
        """
        (samples, labelled), count = said, A.shape[1]
        counts = A != 0 if labelled is None else _labelled(A, names, labelled)
        if samples is None and not pairs:
            whole = torch.zeros(count, dtype=torch.int64)
            return cls(whole, counts.double().sum(1, keepdim=True))
        of_scores = _of_pairs(pairs, count) if samples is None else _given(samples, pairs, count)
        _, of_scores = torch.unique(of_scores, return_inverse=True)
        weights = A.new_zeros(len(A), int(of_scores.max()) + 1 if count else 0)
        weights.index_add_(1, of_scores, counts.double())
        return cls(of_scores, (weights > 0).double())


def _labelled(A: Tensor, names: Sequence[str], labelled: Labelled) -> Tensor:
    rows = []
    for name, row in zip(names, A, strict=True):
        given = torch.as_tensor(labelled.get(name, row != 0)).bool().cpu()
        if given.shape != row.shape:
            raise ValueError(
                f"`labelled`[{name!r}] must have one entry a score, shape {list(row.shape)}, got "
                f"{list(given.shape)}"
            )
        unsaid = (row.abs() > 0) & ~given  # not of NaN, which skips the step
        if bool(unsaid.any()):
            raise ValueError(
                f"`labelled`[{name!r}] must be true wherever the loss depends on a score, and is "
                f"false at score {int(unsaid.nonzero()[0])}; it says which scores "
                f"the loss is a mean of"
            )
        rows.append(given)
    return torch.stack(rows)


def _of_pairs(pairs: Sequence[tuple[int, int]], count: int) -> Tensor:
    of_scores = torch.arange(count)
    for a, b in pairs:
        of_scores[of_scores == of_scores[b]] = int(of_scores[a])
    alone = set(range(count)) - {score for pair in pairs for score in pair}
    if alone:
        raise ValueError(
            f"`samples` must be given where some scores share rows with others and some do not, as "
            f"score {min(alone)}: whether it is a sample by itself is not known; give the number "
            f"of the pair that each score belongs to"
        )
    return of_scores


def _given(samples: Sequence[int] | Tensor, pairs: Sequence[tuple[int, int]], count: int) -> Tensor:
    of_scores = torch.as_tensor(samples).cpu()
    if of_scores.is_floating_point() or of_scores.is_complex() or of_scores.dtype == torch.bool:
        raise TypeError(f"`samples` must be integers, got {of_scores.dtype}")
    if of_scores.shape != (count,):
        raise ValueError(
            f"`samples` must have one entry a score, shape [{count}], got {list(of_scores.shape)}; "
            f"give the number of the pair that each score belongs to"
        )
    first, second = of_scores[torch.tensor(pairs, dtype=torch.int64).view(-1, 2)].unbind(1)
    if bool((first != second).any()):
        k = int((first != second).nonzero()[0])
        raise ValueError(
            f"`samples` must be the same for scores {pairs[k][0]} and {pairs[k][1]}, which share "
            f"rows, got {int(first[k])} and {int(second[k])}; samples are independent of each other"
        )
    return of_scores.long()


class StepSamples:
    """The sums of a step's passes; see `SampleSums`.

    Args:
        m: the number of objectives.
    """

    def __init__(self, m: int) -> None:
        self._m = m
        self.forget()

    def forget(self) -> None:
        """Begin a new step."""
        # C of gradients that are this process's own, and of those divided by the processes already.
        self._own, self._shares, self._common = torch.zeros(
            3, self._m, self._m, dtype=torch.float64
        )
        self._counts = torch.zeros(self._m + 1, dtype=torch.float64)
        self._pending: list[tuple[Callable[[], Tensor], Tensor]] = []

    def add(self, products: Callable[[], Tensor], weights: Tensor, divided: bool = False) -> None:
        """Add one pass.

        Args:
            products: gives [m, m] float64 on the CPU, Σ over its samples; called with `sums`, so
                that no pass waits for a device.
            weights: [m, samples].
            divided: whether they are of gradients divided by the number of processes.
        """
        self._pending.append((products, self._shares if divided else self._own))
        self._common += weights @ weights.T
        self._counts += torch.cat([weights.sum(1), weights.new_tensor([weights.shape[1]])])

    def sums(self, processes: Processes, factor: float) -> SampleSums:
        """Those of all processes, the same bits on all.

        Args:
            factor: by which the gradients have been multiplied since they were formed.
        """
        for of_pass, into in self._pending:
            into += of_pass()
        self._pending.clear()
        products = self._shares + self._own / processes.size**2
        flat = torch.cat([products.flatten(), self._common.flatten(), self._counts])
        flat = processes.sum(flat)
        square = self._m**2
        products, common = flat[: 2 * square].view(2, self._m, self._m).numpy()
        counts = flat[2 * square :].numpy()
        return SampleSums(products * factor**2, counts[:-1], common, int(counts[-1]))
