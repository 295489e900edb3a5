"""`ScatteredCheck`: a spot check where every process has its parts of the gradients.

As `SpotCheck`, but both sides are averages over processes, of which this one has parts: those that
the collecting pass has scattered, and those of the ordinary pass, which FSDP2 has reduced to p.grad
or which are scattered in the same way. Norms are added up over processes, so that all of them come
to one verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from raco_fast.distributed.dtensor import is_dtensor, local, share
from raco_fast.distributed.processes import Processes
from raco_fast.distributed.scatter import Scatter
from raco_fast.engine.backward import nothing_past_rules, propagate
from raco_fast.engine.graph import ScoreGraph
from raco_fast.engine.spot_check import ANOTHER_SCALE, described, random_weights, rounding_bound


class ScatteredCheck:
    """One comparison, by all processes at the same time.

    Args:
        graph: of the batch; it has to be retained.
        A: ∂L/∂scores of this process, float64 [m, B].
        seed: of the random numbers, the same on all processes.
        processes: those that train together.
    """

    def __init__(self, graph: ScoreGraph, A: Tensor, seed: int, processes: Processes) -> None:
        self._graph, self._processes = graph, processes
        self.r = random_weights(processes.largest(A.abs().amax(1)), seed)
        self._seeds = self.r @ A
        self._found: dict[Tensor, Tensor] = {}
        self._squares: dict[Tensor, Tensor] = {}
        self.conclusive = True

    def look(self, p: Tensor, part: Tensor) -> None:
        """Take a part [m, ...] of the m averages of p, as the collecting pass gave it."""
        wide = part.to(torch.promote_types(part.dtype, torch.float32)).flatten(1)
        r = self.r.to(wide)
        self._found[p] = r @ wide
        self._squares[p] = (r * torch.linalg.vector_norm(wide, dim=1)).square().sum().double()

    def gradients_of(self, formed: dict[Tensor, Tensor]) -> str | None:
        """What is wrong with gradients [m, *part] of the parameters, None if nothing is.

        Those of plain tensors are this process's own.
        """
        for p, parts in formed.items():
            self.look(p, parts)
        return self.mismatch([])

    def mismatch(self, scattered: Sequence[Tensor]) -> str | None:
        """What is wrong with what was looked at, None if nothing is.

        Args:
            scattered: the plain tensors of which slices were looked at, not own gradients.
        """
        params = self._graph.wanted
        expected = self._ordinary(1.0, scattered)
        rows = []
        for p in params:
            truth = expected[p]
            found = self._found.get(p, torch.zeros_like(truth))
            squares = (found - truth).square().sum(), truth.square().sum()
            size = self._squares.get(p, torch.zeros((), dtype=torch.float64))
            rows.append(self._counted(p, [*squares, size]))
        differences, truths, sizes = self._summed(rows)
        self.conclusive = all(map(isfinite, (*differences, *sizes)))
        doubtful = [
            k for k, p in enumerate(params) if differences[k] > rounding_bound(p, sizes[k], 0.0)
        ]
        if not doubtful or not self.conclusive:
            return None
        again = self._ordinary(ANOTHER_SCALE, scattered)
        moved = [(again[p] - expected[p]).square().sum() for p in params]
        (noises,) = self._summed(
            [self._counted(p, [x]) for p, x in zip(params, moved, strict=True)]
        )
        wrong = {
            params[k]: differences[k] / max(sizes[k], truths[k])
            for k in doubtful
            if differences[k] > rounding_bound(params[k], sizes[k], noises[k])
        }
        return described(self._graph, wrong, self._processes) if wrong else None

    def _counted(self, p: Tensor, squares: list[Tensor]) -> Tensor:
        counted = share(p, self._processes.size) if is_dtensor(p) else 1.0
        return counted * torch.stack([x.double().cpu() for x in squares])

    def _summed(self, rows: list[Tensor]) -> list[list[float]]:
        sums: list[list[float]] = self._processes.sum(torch.stack(rows)).sqrt().T.tolist()
        return sums

    def _ordinary(self, scale: float, scattered: Sequence[Tensor]) -> dict[Tensor, Tensor]:
        """Flat parts of Σ_i r_i g_i by autograd, in at least float32."""
        graph, size = self._graph, self._processes.size
        used = [p for p in graph.wanted if p in graph.leaves]
        whole: dict[Tensor, Tensor] = {}
        seeds = self._seeds * scale
        if any(is_dtensor(p) for p in used):
            with nothing_past_rules(graph.wanted):
                leaves = [graph.leaves[p] for p in used]
                propagate(graph.scores, seeds, inputs=leaves, retain_graph=True)
                for p in graph.wanted:
                    if p.grad is not None:
                        whole[p], p.grad = local(p.grad), None
        else:  # no hook of a wrapper's may see it
            grads = torch.autograd.grad(
                [graph.scores], used, [seeds.to(graph.scores)], retain_graph=True, allow_unused=True
            )
            whole = {p: g for p, g in zip(used, grads, strict=True) if g is not None}
        parts: dict[Tensor, Tensor] = {}

        def keep(p: Tensor, part: Tensor) -> None:
            parts[p] = part[0] / size

        scatter = Scatter(1, dict.fromkeys(scattered, 1), graph.leaves, keep, self._processes)
        for p in scattered:
            if p in graph.leaves:
                buffer, _ = scatter.buffers(p)
                buffer[0].copy_(whole.get(p, torch.zeros_like(p)))
                scatter.filled([p])
        scatter.finish()
        return {p: _wide(parts.get(p, whole.get(p, _nothing(p)))) / scale for p in graph.wanted}


def _nothing(p: Tensor) -> Tensor:
    return torch.zeros_like(local(p))


def _wide(g: Tensor) -> Tensor:
    return g.detach().reshape(-1).to(torch.promote_types(g.dtype, torch.float32))
