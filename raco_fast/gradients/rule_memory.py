"""What combination rules need beyond one Gram matrix: their state, and the losses of a step."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from raco_fast.distributed.processes import Processes
from raco_fast.solver.apply import checked_state
from raco_fast.solver.dual import solve_present
from raco_fast.solver.registry import RuleLike, check_rule, label_of
from raco_fast.solver.rule import Rule, State
from raco_fast.solver.solution import DualSolution


class RuleMemory:
    """State and losses between the backward passes and steps of one set of gradients.

    Attributes:
        keep_losses: whether the losses of backward passes are summed; no device is waited for.
            A step has their means over the processes.
    """

    def __init__(self, keep_losses: bool, processes: Processes) -> None:
        self.keep_losses = keep_losses
        self._processes = processes
        self._losses: dict[str, Tensor | None] = {}
        self._rule: Rule | None = None
        self._state: State = {}

    def add(self, losses: Iterable[tuple[str, Tensor]]) -> None:
        """Add one micro-batch's losses to their sums, where they are kept."""
        for name, loss in losses if self.keep_losses else ():
            value = loss.detach().reshape(()).to(torch.promote_types(loss.dtype, torch.float32))
            if (before := self._losses.get(name, torch.zeros_like(value))) is not None:
                self._losses[name] = before.to(value.device) + value

    def miss(self, name: str) -> None:
        """Note a backward pass of `name` whose loss was not passed in."""
        self._losses[name] = None

    def forget_losses(self) -> None:
        """Begin a new step."""
        self._losses.clear()

    def state_of(self, rule: Rule, names: Sequence[str]) -> dict[str, Any]:
        """The rule's state as plain JSON, with the order of its objectives; {} without one."""
        if rule != self._rule or not self._state:
            return {}
        values = {key: value.tolist() for key, value in self._state.items()}
        return {"objectives": list(names), "values": values}

    def restore(self, rule: Rule, names: Sequence[str], saved: Mapping[str, Any]) -> None:
        """Go on from what `state_of` gave, also where the objectives have another order."""
        state = checked_state(rule, len(names), saved.get("values"))
        if saved:
            places = [saved["objectives"].index(name) for name in names]
            for key, value in state.items():
                for axis in range(value.ndim):
                    value = value.take(places, axis)
                state[key] = value
        self._rule, self._state = rule, state if saved else {}

    def solve(
        self,
        gram: Tensor,
        weights: Mapping[str, float],
        present: Sequence[str],
        c: float,
        rule: RuleLike,
    ) -> DualSolution:
        """`solve_present` with the losses and the state of before; keeps the next state.

        Raises:
            RuntimeError: the rule needs losses, and some were not seen.
        """
        rule = check_rule(rule)
        if rule != self._rule:
            self._rule, self._state = rule, {}
        losses = self._values(rule, present) if rule.needs_losses else None
        solution = solve_present(gram, weights, present, c, rule, losses=losses, state=self._state)
        self._state = solution.state
        return solution

    def _values(self, rule: Rule, present: Sequence[str]) -> dict[str, float]:
        seen = {name: self._losses.get(name) for name in present}
        if missing := [name for name, loss in seen.items() if loss is None]:
            raise RuntimeError(
                f"the rule {label_of(rule)} needs the losses, and those of {missing} were not "
                f"seen; pass them to backward(losses) instead of calling loss.backward(), and for "
                f"`combine` build ObjectiveGradients with keep_losses=True"
            )
        own = torch.tensor([float(x) for x in seen.values() if x is not None], dtype=torch.float64)
        means = self._processes.sum(own) / self._processes.size
        return dict(zip(seen, means.tolist(), strict=True))
