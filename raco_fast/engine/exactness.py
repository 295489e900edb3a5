"""`Exactness`: whether one backward pass will do, asked at every call.

What autograd's graph shows (`graph.py`) is looked at each time; what it cannot show is found by
spot checks (`spot_check.py`) at the calls 1, 2, 4, 8 ..., then at every N-th, and wherever a pass
looks like none that was checked. A call that is not exact is done by one backward pass per
objective, and it is said; after a spot check has failed, so are all later calls.
"""

import re
import sys
import warnings
import zlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raco_fast.distributed.processes import Processes
from raco_fast.distributed.scatter import obstacle
from raco_fast.engine.backward import PastRulesError, sensitivities
from raco_fast.engine.graph import ScoreGraph
from raco_fast.engine.scattered_check import ScatteredCheck
from raco_fast.engine.sequences import Factored
from raco_fast.engine.spot_check import SpotCheck
from raco_fast.engine.tap import Checks, NotExactError, name_of


@dataclass(frozen=True)
class Pass:
    """A call that one backward pass serves.

    `A`: ∂L/∂scores, float64 [m, B]; `factored`: A = U · seeds; `check`: the spot check that is due.
    """

    graph: ScoreGraph
    A: Tensor
    factored: Factored
    check: SpotCheck | ScatteredCheck | None


class Exactness:
    """What is known of the passes of one training run. A copy begins anew.

    Attributes:
        checks: to be made whatever the model was prepared for.
    """

    def __init__(self, processes: Processes, checks: Checks | None = None) -> None:
        self.checks = checks
        self._processes = processes
        self._known: set[Hashable] = set()
        self._misfits: set[str] = set()
        self._calls = 0
        self._said: set[str] = set()
        self._mismatch: str | None = None

    def look(
        self,
        losses: dict[str, Tensor],
        scores: Tensor,
        wanted: Sequence[Tensor],
        scattered: bool = False,
        hooks_run: bool = False,
    ) -> Pass | None:
        """A call for which one backward pass will do; None where it will not, on any process.

        Args:
            losses: objective name -> scalar.
            scores: [B].
            wanted: the parameters whose gradients count.
            scattered: the pass sends parts of gradients to other processes.
            hooks_run: hooks of parameters will see the gradients that count.
        Raises:
            RuntimeError: the model was not prepared.
            NotExactError: it will not do, and the model was prepared with strict=True.
            ValueError: a loss that does not depend on `scores`.
        """
        found: Any = None

        def decide() -> tuple[bool, bool]:
            nonlocal found
            graph = ScoreGraph(losses, scores, wanted, self._known, self._misfits)
            graph.checks = self.checks or graph.checks
            obstacle = self._mismatch or _conditions(wanted, scattered, hooks_run) or graph.obstacle
            A = factored = None
            if obstacle is None:
                A = sensitivities(list(losses.values()), scores)
                factored, obstacle = _factored(A, graph.pairs())
            found = graph, obstacle, A, factored
            due = obstacle is None and factored is not None and self._due(graph, factored)
            return obstacle is not None, due

        wrong, due = self._processes.agree(decide, 2)
        graph, obstacle, A, factored = found
        if wrong:
            self._say(graph, str(self._processes.say(obstacle)))
            return None
        if scattered:
            self._check_order(graph)
            factored = factored.spread_over(self._processes.size)
        if not due:
            return Pass(graph, A, factored, None)
        if scattered:
            check = ScatteredCheck(graph, A, self._calls, self._processes)
            return Pass(graph, A, factored, check)
        # DistributedDataParallel, of one process too, would take part in the ordinary pass.
        quietly = torch.distributed.is_available() and torch.distributed.is_initialized()
        return Pass(graph, A, factored, SpotCheck(graph, A, seed=self._calls, quietly=quietly))

    def _check_order(self, graph: ScoreGraph) -> None:
        """Raise unless all processes will send the same gradients in the same order."""
        layers = repr(
            [(node.layer, [tuple(p.shape) for p in node.parameters]) for node in graph.taps]
        )
        if not self._processes.alike(torch.tensor([zlib.crc32(layers.encode())])):
            raise RuntimeError(
                "the processes have called different layers, or in another order, so gradients of "
                "different layers would be summed; call the same ones everywhere, or use "
                "mode='autograd'"
            )

    def _due(self, graph: ScoreGraph, factored: Factored) -> bool:
        """Whether a spot check is due at this call."""
        every, groups = graph.checks.every, factored.coefficients.shape[1]
        if every is None:
            self._known |= graph.facts
        if every is None or (groups == 0 and self._processes.size == 1):
            return False
        self._calls += 1  # with others, also where there is nothing here: they count alike
        n = self._calls
        graph.facts.add(("groups", groups > 1))  # with one, nothing shows that sequences meet
        scheduled = n % every == 0 if n > every else n & (n - 1) == 0
        return scheduled or not graph.facts <= self._known

    def checked(
        self, graph: ScoreGraph, check: SpotCheck | ScatteredCheck, run: Callable[[], str | None]
    ) -> bool:
        """Run a pass and its spot check, which says what is wrong; whether the pass may be used.

        Raises:
            NotExactError: it may not, and the model was prepared with strict=True.
        """
        try:
            mismatch = run()
        except PastRulesError as error:
            mismatch = str(error).partition("; ")[0]
        mismatch = self._processes.say(mismatch)
        if mismatch is None:
            if check.conclusive:
                self._known |= graph.facts
            return True
        self._mismatch = mismatch
        self._say(graph, mismatch)
        return False

    def _say(self, graph: ScoreGraph, obstacle: str) -> None:
        message = f"one backward pass for all objectives would be wrong here: {obstacle}"
        if graph.checks.strict:
            raise NotExactError(f"{message}; mend it, or prepare the model with strict=False")
        kind = re.sub(r"\d+", "", obstacle)  # not once for every shape
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(
                f"{message}; taking one pass per objective", stacklevel=_depth_in_package()
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return Exactness, (self._processes, self.checks)


def _conditions(wanted: Sequence[Tensor], scattered: bool, hooks_run: bool) -> str | None:
    """What stands in the way whatever the model is."""
    for p in wanted:
        if scattered and (found := obstacle(p)):
            return found
        hooks = p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None)
        if hooks and not hooks_run:
            return f"{name_of(p)} has a hook, which only autograd's gradients reach"
    return None


def _factored(A: Tensor, pairs: list[tuple[int, int]]) -> tuple[Factored, str | None]:
    """A = U · seeds, and why that will not do for sequences that share rows."""
    factored = Factored.of(A, pairs)
    apart = factored.apart(pairs)
    if apart is None:
        return factored, None
    return factored, (
        f"sequences {apart[0]} and {apart[1]} share rows, and the losses do not see the two as a "
        f"pair, through one h(a) - h(b); give such losses rows of their own"
    )


def _depth_in_package() -> int:
    """The `stacklevel` for which the function that calls this names the user's line."""
    frame, depth = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("raco_fast."):
        frame, depth = frame.f_back, depth + 1
    return depth
