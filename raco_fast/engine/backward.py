"""One backward pass for any number of objectives whose losses are functions of sequence scores.

    L_i = F_i(score_1 ... score_B)     A_ib = ∂L_i/∂score_b     g_i = Σ_b A_ib ∇score_b

A costs m tiny autograd calls above the scores. Below them Σ_b s_b score_b is propagated once, with
seeds s_b that `sequences.Factored` takes from A, and every prepared layer forms its m parameter
gradients from the rows of its input and dY. That is exact as long as sequences do not meet inside
the model and every trained parameter belongs to a layer with a rule; `exactness.py` sees to it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from raco_fast.backends.transfer import sent
from raco_fast.engine.gradient_collector import GradientCollector, Into
from raco_fast.engine.graph import ScoreGraph
from raco_fast.engine.sample_products import SampleProducts
from raco_fast.engine.sequences import Factored
from raco_fast.engine.tap import (
    ANCHOR,
    Collector,
    Node,
    Running,
    collecting,
    hand_over,
    layer_call,
    name_of,
)


def sensitivities(losses: Sequence[Tensor], scores: Tensor) -> Tensor:
    """A = ∂L/∂scores, float64 [m, B] on the CPU; zeros for a loss that does not depend on them."""
    rows = []
    with _hooks_aside(scores):
        for loss in losses:
            row = None
            if loss.requires_grad:
                with _freed_graphs_named("losses"):
                    (row,) = torch.autograd.grad(loss, scores, retain_graph=True, allow_unused=True)
            rows.append(torch.zeros_like(scores) if row is None else row)
    return torch.stack(rows).detach().double().cpu()


@contextmanager
def _hooks_aside(scores: Tensor) -> Iterator[None]:
    """Scores that a module wrapped by FSDP2 returned have a hook that gathers its parameters: once
    for every objective, and only on processes where that objective has a label.
    """
    hooks = scores._backward_hooks
    held = dict(hooks or {})
    if hooks:
        hooks.clear()
    try:
        yield
    finally:
        if hooks is not None:
            hooks.update(held)


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
    scores: Tensor, seeds: Tensor, *, inputs: Sequence[Tensor], retain_graph: bool = False
) -> None:
    """The backward pass of Σ_b seeds_b scores_b; seeds are rounded to the scores' dtype.

    Args:
        inputs: the leaves whose gradients count; others keep their .grad.
    """
    with _freed_graphs_named("scores"):
        torch.autograd.backward(
            [scores],
            [sent(seeds.to(scores.dtype), scores.device)],
            retain_graph=retain_graph,
            inputs=inputs,
        )


def backward_of_others(
    others: Sequence[Tensor], losses: Sequence[Tensor], weights: Iterable[float]
) -> None:
    """Give leaves that belong to no objective the gradient of the weighted sum Σ w_i L_i.

    It adds to their .grad, as in torch; the graph is kept.
    """
    pairs = zip(losses, weights, strict=True)
    terms = [(loss, w) for loss, w in pairs if loss.requires_grad and w > 0.0]
    if others and terms:
        torch.autograd.backward(
            [loss for loss, _ in terms],
            [torch.full_like(loss, w) for loss, w in terms],
            retain_graph=True,
            inputs=others,
        )


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


def use_up(graph: ScoreGraph) -> None:
    """Free what a graph that was retained still holds.

    A backward pass without any gradient computes nothing and frees what it passes through.
    Otherwise the losses and scores of a loop would keep one batch's activations alive during the
    next.
    """
    nothing: Tensor = _NoGradient.apply(graph.scores)  # type: ignore[no-untyped-call]
    light = graph.light_taps()
    ends: list[Any] = [*light.values(), ANCHOR]
    torch.autograd.grad([nothing], ends, [torch.ones_like(nothing)], allow_unused=True)
    for tap in light:
        tap.use_up()


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


class PastRulesError(RuntimeError):
    """A parameter got a gradient that no rule has seen; what was collected is wrong."""


@contextmanager
def nothing_past_rules(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Empty p.grad for a pass that must leave it so; `PastRulesError` where it does not.

    A function may run a backward pass of its own inside its backward, which no graph shows.
    """
    held = [(p, p.grad) for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        yield
        stray = [p for p in parameters if p.grad is not None]
    finally:
        for p, grad in held:
            p.grad = grad
    if stray:
        raise PastRulesError(
            f"{name_of(stray[0])} got a gradient past every rule, from a backward pass inside "
            f"another; call zero_grad(), and leave `scores` out for one backward pass per objective"
        )


def collect(
    collector: Collector, graph: ScoreGraph, seeds: Tensor, *, retain_graph: bool = False
) -> None:
    """A backward pass of Σ_b seeds_b score_b from which the collector gets every layer's call.

    Raises:
        PastRulesError: a parameter got a gradient past every rule.
    """
    if not graph.taps:
        return
    light = graph.light_taps()
    nodes = [tap for tap in graph.taps if tap not in graph.lookups and tap not in light]
    with ExitStack() as stack:
        stack.enter_context(nothing_past_rules(graph.wanted))
        running = stack.enter_context(collecting(collector, nodes))
        for tap, (add, shape) in graph.lookups.items():
            hook = add.register_prehook(_of_every_sequence(running, tap, shape))
            stack.callback(hook.remove)
        for kind in {graph.scores.device.type, *(p.device.type for p in graph.wanted)}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        dys = _captured(graph, seeds, list(light.values()), retain_graph)
        with torch.no_grad(), _freed_graphs_named("scores"):
            for tap, dy in zip(light, dys, strict=True):
                if dy is not None:
                    collector(layer_call(tap, tap.x, tap.dy(dy)))
                if not retain_graph:
                    tap.use_up()


def _captured(
    graph: ScoreGraph, seeds: Tensor, edges: Sequence[GradientEdge], retain_graph: bool
) -> Sequence[Tensor | None]:
    """The gradients of Σ_b seeds_b scores_b at some edges, None where none arrives."""
    scores = graph.scores
    if not edges:
        propagate(scores, seeds, inputs=[ANCHOR], retain_graph=retain_graph)
        return ()
    ends: list[Any] = [*edges, ANCHOR]
    with _freed_graphs_named("scores"):
        found = torch.autograd.grad(
            [scores],
            ends,
            [sent(seeds.to(scores.dtype), scores.device)],
            retain_graph=retain_graph,
            allow_unused=True,
        )
    return found[:-1]


def _of_every_sequence(
    running: Running, tap: Node, shape: torch.Size
) -> Callable[[Sequence[Tensor]], None]:
    """Hands over a lookup as if it had been made for every row that its output was added to."""

    def before(grad_outputs: Sequence[Tensor]) -> None:
        ids = tap.saved_tensors[0].expand(shape)
        hand_over(running, layer_call(tap, ids, grad_outputs[0]))

    return before


def one_backward(
    graph: ScoreGraph,
    factored: Factored,
    into: Into,
    *,
    retain_graph: bool = False,
    samples: SampleProducts | None = None,
) -> None:
    """Add every objective's gradient to where it belongs, with one backward pass.

    Args:
        graph: of a prepared model, without an obstacle; it is used up unless `retain_graph`.
        factored: A = ∂L/∂scores.
        into: what they are added to.
        samples: also gets what every sample has with itself, where that is wanted.
    """
    if factored.coefficients.shape[1]:
        collector = GradientCollector(factored, into, graph.wanted, samples)
        collect(collector.collect, graph, factored.seeds, retain_graph=retain_graph)
        collector.finish()
        into.finish()
        return
    # No score has a seed, and a pass would reach no layer. Autograd gives zeros then, which an
    # optimizer steps along (weight decay, momentum); it leaves alone what has no gradient at all.
    for p in graph.uses:
        gradients, fresh = into.buffers(p)
        if fresh:
            gradients.zero_()
    if not retain_graph:
        use_up(graph)
