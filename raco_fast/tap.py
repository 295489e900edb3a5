"""`Tap`: where the backward pass of a prepared layer meets the per-objective gradients.

A prepared layer computes its output with its parameters detached: autograd propagates through it
but forms no gradient for them. The output then passes through `Tap`, whose backward pass hands x
and dY to the layer's rule, for the ordinary gradient, or, while a collector runs, for what the
collector makes of them (m gradients, a Gram matrix). A collector's backward pass leaves p.grad
alone, so whatever does arrive there came past every rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import Context, copy_context
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from raco_fast.layers import Rule
from raco_fast.segments import ALL_ROWS, Segments
from raco_fast.uses import Rows, Use


class Call(Protocol):
    """One call of a layer, on its way back.

    `layer`: its name; `index`: what `sequences` declared; `shape`: of its input; `dy`: the gradient
    of its output, [*leading dimensions of the input, ...].
    """

    layer: str
    index: Tensor | None
    shape: torch.Size
    dy: Tensor

    def uses(self, segments: Segments) -> Iterable[tuple[Tensor, slice, Use]]:
        """(parameter, rows of it, what this call adds to their gradients); may be asked again."""

    def rows(self, parameter: Tensor, segments: Segments) -> Rows:
        """What this call adds to some rows of one parameter's gradients."""


class Collector(Protocol):
    """Takes what the layers of one backward pass give."""

    def collect(self, call: Call) -> None:
        """Called for every prepared layer, in the order of the backward pass."""


_names = WeakIdKeyDictionary()


def remember_names(model: nn.Module) -> None:
    """So that messages can call parameters by their names."""
    for name, p in model.named_parameters():
        _names[p] = name


def name_of(p: Tensor) -> str:
    """What a message calls a parameter."""
    return f"parameter {_names[p]!r}" if p in _names else f"a parameter of shape {list(p.shape)}"


# Not a ContextVar: on a GPU autograd runs the backward pass in threads of its own. What is one (a
# forced backend) is brought along from the thread that started the pass.
_running: list[tuple[Collector, Context]] = []


@contextmanager
def collecting(collector: Collector) -> Iterator[None]:
    """Backward passes inside the block feed the collector instead of p.grad."""
    if _running:
        raise RuntimeError(
            "a backward pass over several objectives is under way in this process; wait for it"
        )
    _running.append((collector, copy_context()))
    try:
        yield
    finally:
        _running.pop()


@dataclass(frozen=True)
class Site:
    """The layer that a `Tap` stands behind, and how its rows were declared in this forward pass."""

    layer: str
    module: nn.Module
    rule: Rule
    names: tuple[str, ...]
    index: Tensor | None
    strict: bool


class Tapped(torch.autograd.Function):
    """A function whose last tensor inputs are parameters that only collectors need to see.

    Its nodes have the attributes `parameters` and `strict`.
    """

    LEADING: int  # tensor inputs before the parameters


class Tap(Tapped):
    """Identity on y = layer(x), with the gradients of the layer's parameters in its backward."""

    LEADING = 2

    @staticmethod
    def forward(ctx: Any, site: Site, y: Tensor, x: Tensor, *parameters: Tensor) -> Tensor:
        """y again; the parameters are those of `site.names`."""
        # Autocast has multiplied x in y's dtype; kept in its own it would take twice the memory.
        narrower = x.is_floating_point() and y.element_size() < x.element_size()
        ctx.save_for_backward(x.to(y.dtype) if narrower else x)
        ctx.site, ctx.parameters, ctx.strict = site, parameters, site.strict
        # Shares y's version counter, so a later in-place change is noticed where it would do harm;
        # y itself would be a view, on which in-place changes are forbidden.
        return y.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """dY for the layer; None for the parameters while a collector runs."""
        (x,) = ctx.saved_tensors
        call = _LayerCall(ctx.site, x, dy, ctx.parameters)
        return None, dy, None, *parameter_gradients(call, ctx.parameters)


class _LayerCall:
    def __init__(self, site: Site, x: Tensor, dy: Tensor, parameters: tuple[Tensor, ...]) -> None:
        self.layer, self.index, self.shape, self.dy = site.layer, site.index, x.shape, dy
        self._site, self._x, self._parameters = site, x, parameters

    def uses(self, segments: Segments) -> list[tuple[Tensor, slice, Use]]:
        site = self._site
        by_name = site.rule(site.module, self._x, self.dy, segments)
        if missing := [name for name in site.names if name not in by_name]:
            raise ValueError(
                f"the rule of layer {site.layer!r} ({type(site.module).__name__}) gives nothing "
                f"for {missing}; return a use for each of its parameters, or freeze them"
            )
        named = zip(site.names, self._parameters, strict=True)
        return [(p, slice(None), by_name[name]) for name, p in named]

    def rows(self, parameter: Tensor, segments: Segments) -> Rows:
        return next(use for p, _, use in self.uses(segments) if p is parameter)


def parameter_gradients(call: Call, parameters: tuple[Tensor, ...]) -> list[Tensor | None]:
    """What a layer's backward pass returns for its parameters: with a collector running, None."""
    with torch.autocast(call.dy.device.type, enabled=False):
        if _running:
            collector, context = _running[-1]
            context.copy().run(collector.collect, call)  # a context serves one thread at a time
            return [None] * len(parameters)
        gradients = [p.new_empty(1, *p.shape) for p in parameters]
        of = dict(zip(parameters, gradients, strict=True))
        for p, rows, use in call.uses(ALL_ROWS):
            use.add_to(of[p][:, rows], None, fresh=True)
        return [gradient[0] for gradient in gradients]
