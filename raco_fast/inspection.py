"""Whether one backward pass is exact for a model: found out before it is relied upon.

Two things can make it wrong: a parameter that reaches the scores, or a loss, past every rule; and
sequences that meet inside the model. The first is read off autograd's graph, the second by probes:
backward passes of some scores, which must leave the rows of all other sequences at zero.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations, count
from math import comb
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raco_fast.one_backward import entries, propagate, set_aside
from raco_fast.tap import Call, Tapped, collecting, name_of


class Exactness:
    """Decides, at the first call that can tell, whether one backward pass will do."""

    def __init__(self) -> None:
        self._decided: bool | None = None

    def __call__(self, losses: Sequence[Tensor], scores: Tensor, wanted: Sequence[Tensor]) -> bool:
        """Whether one backward pass is exact; keeps the graph of `scores`.

        Raises:
            RuntimeError: the model was not prepared.
            ValueError: it is not exact, and the model was prepared with strict=True.
        """
        if self._decided is None:
            inspection = Inspection(losses, scores, wanted)
            obstacle, conclusive = inspection.obstacle, True
            if obstacle is None:
                obstacle, conclusive = probed(scores, wanted)
            if obstacle is not None:
                message = f"one backward pass for all objectives would be wrong here: {obstacle}"
                if inspection.strict:
                    raise ValueError(f"{message}; mend it, or prepare the model with strict=False")
                message += "; taking one pass per objective"
                warnings.warn(message, stacklevel=_depth_in_package())
            if obstacle is not None or conclusive:
                self._decided = obstacle is None
            return obstacle is None
        return self._decided


def _depth_in_package() -> int:
    """The `stacklevel` for which the function that calls this names the user's line."""
    frame, depth = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("raco_fast."):
        frame, depth = frame.f_back, depth + 1
    return depth


class Inspection:
    """What autograd's graph says of the parameters.

    `uses`: how many calls of prepared layers use each parameter; `strict`: a layer asks for errors
    instead of warnings; `obstacle`: why one backward pass would be wrong, or None.
    """

    def __init__(self, losses: Sequence[Tensor], scores: Tensor, wanted: Sequence[Tensor]) -> None:
        self.uses: Counter[Tensor] = Counter()
        self.strict = False
        self.obstacle: str | None = None
        self._wanted = set(wanted)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.obstacle = "it does not reduce gradients over several processes yet"
        for p in wanted:
            if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
                self.obstacle = f"{name_of(p)} has a hook, which only autograd's gradients reach"
        at_scores = (scores.grad_fn, scores.output_nr)
        roots = [(loss.grad_fn, loss.output_nr) for loss in losses]
        for node, edges in _nodes(roots, stop=at_scores):
            self._note_past_rules(node, edges, "a loss other than through `scores`")
            if _is_tapped(node):
                self._note_auxiliary(node)
        for node, edges in _nodes([at_scores]):
            self._note_past_rules(node, edges, "the scores past every rule")
            if node.name() == "CheckpointFunctionBackward":
                self.obstacle = "reentrant checkpointing hides layers; use use_reentrant=False"
            if _is_tapped(node):
                self.strict = self.strict or node.strict
                self.uses.update(p for p in node.parameters if p in self._wanted)
        if not self.uses:
            raise RuntimeError(
                "`scores` come from a model that was not prepared; call raco_fast.prepare(model) "
                "before the forward pass, or leave `scores` out for one backward pass per objective"
            )

    def shared(self) -> set[Tensor]:
        """The parameters that several calls use: tied, or in a layer that is called again."""
        return {p for p, calls in self.uses.items() if calls > 1}

    def _note_past_rules(self, node: Any, edges: Sequence[Any], where: str) -> None:
        for following, _ in edges:
            p = getattr(following, "variable", None)
            if p is not None and p in self._wanted:
                self.obstacle = (
                    f"{name_of(p)} reaches {where}, in {node.name()}; its layer has no rule "
                    f"(register_rule), was compiled or wrapped before it was prepared, or the "
                    f"parameter is used directly"
                )

    def _note_auxiliary(self, node: Any) -> None:
        for p in self._wanted.intersection(node.parameters):
            self.obstacle = (
                f"{name_of(p)} reaches a loss other than through `scores`, as in an auxiliary "
                f"loss; only what passes through `scores` is seen"
            )


def probed(scores: Tensor, wanted: Sequence[Tensor]) -> tuple[str | None, bool]:
    """(What backward passes of some scores find in the way, whether it holds for later batches).

    A score may depend on no row but its own. For any two sequences there is a pass with a seed on
    the one and none on the other, and one the other way round. The graph is kept.
    """
    conclusive = len(scores) > 1  # with one sequence there is nothing to mix
    for seeded in _codes(len(scores)):
        probe = _Probe(seeded)
        with set_aside(wanted) as stray, collecting(probe):
            propagate(scores, seeded, inputs=wanted, retain_graph=True)
        if probe.mixing is not None:
            return (
                f"in layer {probe.mixing!r} a score depends on rows of another sequence: the model "
                f"mixes sequences, or `scores` are in another order than the rows"
            ), True
        if stray:
            return f"{name_of(stray[0])} got a gradient past every rule", True
        conclusive = conclusive and probe.finite
    return None, conclusive


def _codes(n: int) -> Tensor:
    """bool [digits, n]: n codes of as many ones, so that none contains another; fewest digits."""
    digits = next(k for k in count() if comb(k, k // 2) >= n)
    codes = torch.zeros(digits, n, dtype=torch.bool)
    for b, ones in zip(range(n), combinations(range(digits), digits // 2), strict=False):
        codes[list(ones), b] = True
    return codes


class _Probe:
    """Looks for rows with a gradient that belong to sequences without a seed."""

    def __init__(self, seeded: Tensor) -> None:
        self._seeded = seeded
        self.mixing: str | None = None
        self.finite = True

    def collect(self, call: Call) -> None:
        index, outer = entries(call, len(self._seeded))
        seeded = self._seeded if index is None else self._seeded[index]
        others = (~seeded).nonzero()[:, 0].to(call.dy.device)
        reached = call.dy.reshape(outer, len(seeded), -1).index_select(1, others)
        finite = reached.isfinite()
        # A value that is not finite says nothing about where it came from.
        self.finite = self.finite and bool(finite.all())
        if bool((finite & (reached != 0)).any()):
            self.mixing = call.layer


def _nodes(
    roots: Sequence[tuple[Any, int]], stop: tuple[Any, int] | None = None
) -> Iterator[tuple[Any, Sequence[tuple[Any, int]]]]:
    """Every node on the way down from the roots, once, with its edges but those to a rule.

    An edge is (node, which of its outputs); those to `stop` are not followed.
    """
    stack, visited = list(roots), set()
    while stack:
        edge = stack.pop()
        node, _ = edge
        if node is None or edge == stop or node in visited:
            continue
        visited.add(node)
        edges = node.next_functions
        if _is_tapped(node):
            edges = edges[: type(node)._forward_cls.LEADING]
        yield node, edges
        stack += edges


def _is_tapped(node: Any) -> bool:
    forward = getattr(type(node), "_forward_cls", None)
    return isinstance(forward, type) and issubclass(forward, Tapped)
