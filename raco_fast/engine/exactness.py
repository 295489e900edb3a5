"""`Exactness`: whether one backward pass will do, asked at every call.

What autograd's graph shows (`graph.py`) is looked at each time; what it cannot show is found by
spot checks (`spot_check.py`) at the calls 1, 2, 4, 8 ..., then at every N-th, and wherever a pass
looks like none that was checked. A call that is not exact is done by one backward pass per
objective, and it is said; after a spot check has failed, so are all later calls.
"""

import re
import sys
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from raco_fast.engine.backward import PastRulesError
from raco_fast.engine.graph import ScoreGraph
from raco_fast.engine.sequences import Factored
from raco_fast.engine.spot_check import SpotCheck
from raco_fast.engine.tap import Checks, NotExactError, name_of


class Exactness:
    """What is known of the passes of one training run. A copy begins anew.

    Args:
        checks: to be made whatever the model was prepared for.
    """

    def __init__(self, checks: Checks | None = None) -> None:
        self._checks = checks
        self._known: set[Hashable] = set()
        self._misfits: set[str] = set()
        self._calls = 0
        self._said: set[str] = set()
        self._mismatch: str | None = None

    def graph(
        self, losses: dict[str, Tensor], scores: Tensor, wanted: Sequence[Tensor]
    ) -> ScoreGraph | None:
        """The graph of a call for which one backward pass will do; None where it will not.

        Raises:
            RuntimeError: the model was not prepared.
            NotExactError: it will not do, and the model was prepared with strict=True.
            ValueError: a loss that does not depend on `scores`.
        """
        graph = ScoreGraph(losses, scores, wanted, self._known, self._misfits)
        graph.checks = self._checks or graph.checks
        obstacle = self._mismatch or _conditions(wanted) or graph.obstacle
        if obstacle is None:
            return graph
        self._say(graph, obstacle)
        return None

    def check(self, graph: ScoreGraph, A: Tensor, factored: Factored) -> SpotCheck | None:
        """The spot check that is due at this call, if one is."""
        every, groups = graph.checks.every, factored.coefficients.shape[1]
        if every is None:
            self._known |= graph.facts
        if every is None or groups == 0:
            return None
        self._calls += 1
        n = self._calls
        graph.facts.add(("groups", groups > 1))  # with one, nothing shows that sequences meet
        scheduled = n % every == 0 if n > every else n & (n - 1) == 0
        if scheduled or not graph.facts <= self._known:
            return SpotCheck(graph, A, seed=n)
        return None

    def checked(self, graph: ScoreGraph, check: SpotCheck, run: Callable[[], str | None]) -> bool:
        """Run a pass and its spot check, which says what is wrong; whether the pass may be used.

        Raises:
            NotExactError: it may not, and the model was prepared with strict=True.
        """
        try:
            mismatch = run()
        except PastRulesError as error:
            mismatch = str(error).partition("; ")[0]
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
        return Exactness, (self._checks,)


def _conditions(wanted: Sequence[Tensor]) -> str | None:
    """What stands in the way whatever the model is."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return "it does not reduce gradients over several processes yet"
    for p in wanted:
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
            return f"{name_of(p)} has a hook, which only autograd's gradients reach"
    return None


def _depth_in_package() -> int:
    """The `stacklevel` for which the function that calls this names the user's line."""
    frame, depth = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("raco_fast."):
        frame, depth = frame.f_back, depth + 1
    return depth
