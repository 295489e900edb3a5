"""One backward pass for any number of objectives whose losses are functions of sequence scores.

    L_i = F_i(score_1 ... score_B)     A_ib = ∂L_i/∂score_b     g_i = Σ_b A_ib ∇score_b

A costs m tiny autograd calls above the scores. Below them Σ_b s_b score_b is propagated once, with
seeds s_b that `segments.Factored` takes from A, and every prepared layer forms its m parameter
gradients from the rows of its input and dY. That is exact as long as sequences do not meet inside
the model and every trained parameter belongs to a layer with a rule. `inspection.py` finds out
before the first time; later passes notice a gradient that came past the rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from raco_fast.segments import Factored, Segments
from raco_fast.tap import Call, Collector, collecting, name_of

Buffers = Callable[[Tensor], tuple[Tensor, bool]]
"""Parameter -> ([m, *shape] to add to, whether it is fresh memory to be overwritten)."""


def sensitivities(losses: Sequence[Tensor], scores: Tensor) -> Tensor:
    """A = ∂L/∂scores, float64 [m, B] on the CPU; zeros for a loss that does not depend on them."""
    rows = []
    for loss in losses:
        row = None
        if loss.requires_grad:
            with _freed_graphs_named("losses"):
                (row,) = torch.autograd.grad(loss, scores, retain_graph=True, allow_unused=True)
        rows.append(torch.zeros_like(scores) if row is None else row)
    return torch.stack(rows).detach().double().cpu()


def check_scores(scores: Tensor) -> None:
    """Raise unless `scores` is a [B] tensor with a graph."""
    if not isinstance(scores, Tensor):
        raise TypeError(f"`scores` must be a tensor [B], got {type(scores).__name__}")
    if scores.ndim != 1:
        raise ValueError(
            f"`scores` must have shape [B], one score per sequence, got {list(scores.shape)}; sum "
            f"the token log-probabilities of each sequence"
        )
    if not scores.requires_grad:
        raise ValueError(
            "`scores` must require grad: it has no graph to the model; compute it outside of "
            "torch.no_grad() and do not detach it before the losses"
        )


def propagate(
    scores: Tensor,
    seeds: Tensor,
    *,
    inputs: Sequence[Tensor] | None = None,
    retain_graph: bool = False,
) -> None:
    """The backward pass of Σ_b seeds_b scores_b; seeds are rounded to the scores' dtype.

    Args:
        inputs: the tensors whose gradients count; others keep their .grad (None: all leaves).
    """
    with _freed_graphs_named("scores"):
        torch.autograd.backward(
            [scores], [seeds.to(scores)], retain_graph=retain_graph, inputs=inputs
        )


@contextmanager
def _freed_graphs_named(argument: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise RuntimeError(
            f"`{argument}` belong to a graph that an earlier backward pass has freed; run the "
            f"model again, once for each call of backward"
        ) from error


def entries(call: Call, n_scores: int) -> tuple[Tensor | None, int]:
    """(declared index of a layer's rows, or None: row b is b; how often they are repeated before).

    Raises:
        ValueError: the rows cannot be told apart by sequence.
    """
    shape = tuple(call.shape)
    if call.index is None:
        if shape[0] != n_scores:
            raise ValueError(
                f"`scores` has {n_scores} sequences, but the input of layer {call.layer!r} has "
                f"shape {shape}, so its rows cannot be told apart; score the rows of one batch in "
                f"their order, or declare them with `raco_fast.sequences` around the forward pass"
            )
        return None, 1
    n = len(call.index)
    leading = [math.prod(shape[:k]) for k in range(1, len(shape) + 1)]
    behind = shape[2:-1] if shape[0] == 1 else ()  # tokens behind the heads: [1, heads, tokens, d]
    if (n in leading) == (n in behind):
        raise ValueError(
            f"`sequences` declared {n} rows, but the input of layer {call.layer!r} has shape "
            f"{shape}; give one index for each of its rows"
        )
    if n and int(call.index.max()) >= n_scores:
        raise ValueError(
            f"`sequences` declared sequence {int(call.index.max())}, but there are {n_scores} "
            f"`scores`; number them from 0"
        )
    return call.index, 1 if n in leading else math.prod(shape[: 2 + behind.index(n)])


class GradientCollector:
    """Adds every layer's share to the m gradients of each parameter."""

    def __init__(self, factored: Factored, buffers: Buffers, wanted: Iterable[Tensor]) -> None:
        self._factored, self._buffers, self._wanted = factored, buffers, set(wanted)

    def collect(self, call: Call) -> None:
        """G_i += Σ_g U_ig t_g for the parameters of one layer."""
        out: dict[Tensor, tuple[Tensor, bool]] = {}
        for p, rows, use in call.uses(arranged(self._factored, call)):
            if p in self._wanted:
                if p not in out:
                    out[p] = self._buffers(p)
                gradients, fresh = out[p]
                use.add_to(gradients[:, rows], self._factored.coefficients, fresh)


def arranged(factored: Factored, call: Call) -> Segments:
    """How the rows of one layer belong to the groups of sequences."""
    index, outer = entries(call, len(factored.group))
    return factored.segments(index, call.dy.device, outer)


@contextmanager
def set_aside(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Empty p.grad for the block; parameters that have one at its end are put on the list."""
    held = [(p, p.grad) for p in parameters]
    stray: list[Tensor] = []
    for p in parameters:
        p.grad = None
    try:
        yield stray
    finally:
        for p, grad in held:
            if p.grad is not None:
                stray.append(p)
            p.grad = grad


def collect(
    collector: Collector,
    scores: Tensor,
    seeds: Tensor,
    wanted: Sequence[Tensor],
    *,
    retain_graph: bool = False,
) -> None:
    """A backward pass from which the collector gets what belongs to the wanted parameters.

    Raises:
        RuntimeError: a parameter got a gradient past every rule; what was collected is wrong.
    """
    with set_aside(wanted) as stray, collecting(collector):
        propagate(scores, seeds, inputs=wanted, retain_graph=retain_graph)
    if stray:
        raise RuntimeError(
            f"{name_of(stray[0])} got a gradient past every rule, which it did not in the first "
            f"backward pass; call zero_grad(), and leave `scores` out for models that change"
        )


def one_backward(
    losses: Sequence[Tensor], scores: Tensor, wanted: Sequence[Tensor], buffers: Buffers
) -> None:
    """Add every objective's gradient to its buffers, with one backward pass.

    Args:
        losses: m scalars, functions of `scores`; one without a graph has gradient zero.
        scores: [B], with the graph of a prepared model, which is used up.
        wanted: parameters to form gradients for.
        buffers: see `Buffers`.
    Raises:
        RuntimeError: a parameter got a gradient past every rule; those of this batch are wrong.
        ValueError: rows that cannot be told apart by sequence.
    """
    factored = Factored.of(sensitivities(losses, scores))
    if factored.coefficients.shape[1] == 0:
        return  # no objective has anything in this batch
    collect(GradientCollector(factored, buffers, wanted), scores, factored.seeds, wanted)
