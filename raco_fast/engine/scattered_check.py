"""`ScatteredCheck`: a spot check where every process has its parts of the gradients.

As `SpotCheck`, but both sides are averages over processes, of which this one has parts: those that
the collecting pass has scattered, and those of the ordinary pass, which are scattered in the same
way. No wrapper takes part in it: it would keep what it accumulates, or average it twice. Norms are
added up over processes, so that all of them come to one verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from raco_fast.distributed.dtensor import is_dtensor, local
from raco_fast.distributed.processes import Processes
from raco_fast.distributed.scatter import Scatter, counted
from raco_fast.engine.deviations import on_host
from raco_fast.engine.graph import ScoreGraph
from raco_fast.engine.spot_check import ANOTHER_SCALE, described, random_weights, rounding_bound
from raco_fast.engine.tap import plainly


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
        with plainly(wide.device.type):  # autocast would round the combination
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
        rows: list[Sequence[Tensor]] = []
        for p in params:
            truth = expected[p]
            found = self._found.get(p, torch.zeros_like(truth))
            size = self._squares.get(p, torch.zeros((), dtype=torch.float64))
            rows.append([(found - truth).square().sum(), truth.square().sum(), size])
        differences, truths, sizes = self._summed(rows)
        self.conclusive = all(map(isfinite, (*differences, *sizes)))
        doubtful = [
            k for k, p in enumerate(params) if differences[k] > rounding_bound(p, sizes[k], 0.0)
        ]
        if not doubtful or not self.conclusive:
            return None
        again = self._ordinary(ANOTHER_SCALE, scattered)
        (noises,) = self._summed([[(again[p] - expected[p]).square().sum()] for p in params])
        wrong = {
            params[k]: differences[k] / max(sizes[k], truths[k])
            for k in doubtful
            if differences[k] > rounding_bound(params[k], sizes[k], noises[k])
        }
        return described(self._graph, wrong, self._processes) if wrong else None

    def _summed(self, squares: list[Sequence[Tensor]]) -> list[list[float]]:
        """Norms over all processes of squares of parts, one list [k] for each parameter."""
        here = on_host([x for of_p in squares for x in of_p]).view(len(squares), -1)
        counts = [counted(p, self._processes) for p in self._graph.wanted]
        counted_here = torch.tensor(counts, dtype=torch.float64)[:, None] * here
        sums: list[list[float]] = self._processes.sum(counted_here).sqrt().T.tolist()
        return sums

    def _ordinary(self, scale: float, scattered: Sequence[Tensor]) -> dict[Tensor, Tensor]:
        """Flat parts of Σ_i r_i g_i by autograd, in at least float32."""
        graph, size = self._graph, self._processes.size
        used = [p for p in graph.wanted if p in graph.leaves]
        leaves, seeds = [graph.leaves[p] for p in used], (self._seeds * scale).to(graph.scores)
        grads = torch.autograd.grad(
            [graph.scores], leaves, [seeds], retain_graph=True, allow_unused=True
        )
        parts: dict[Tensor, Tensor] = {}

        def keep(p: Tensor, part: Tensor) -> None:
            parts[p] = part[0] / size

        sent = {p for p in used if is_dtensor(p)} | set(scattered)
        scatter = Scatter(1, dict.fromkeys(sent, 1), graph.leaves, keep, self._processes)
        for p, g in zip(used, grads, strict=True):
            if p in sent:
                buffer, _ = scatter.buffers(p)
                buffer[0].zero_() if g is None else buffer[0].copy_(g)
                scatter.filled([p])
            elif g is not None:
                parts[p] = g
        scatter.finish()
        return {p: _wide(parts.get(p, torch.zeros_like(local(p)))) / scale for p in graph.wanted}


def _wide(g: Tensor) -> Tensor:
    return g.detach().reshape(-1).to(torch.promote_types(g.dtype, torch.float32))
