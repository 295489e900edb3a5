"""`Tap`: where the backward pass of a prepared layer meets the per-objective gradients.

A prepared layer runs as it always did, and autograd's graph of it is complete. Its output then
passes through `Tap`, an identity whose backward pass sees x and dY. In an ordinary backward pass
that is all: every gradient is autograd's own. In a *collecting* pass the gradient asked of autograd
is that of `ANCHOR`, a leaf that hangs on every tap. So autograd goes wherever there is a tap, forms
no parameter's gradient on its way, and each tap hands its layer's x and dY to the collector, which
forms m gradients or a Gram matrix from them.

Collectors are set on the nodes of one graph, so passes over other graphs, also in other threads,
are not affected.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context, copy_context
from dataclasses import dataclass
from threading import get_ident
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from raco_fast.distributed.fsdp2 import noted_name, owners_of
from raco_fast.engine.contributions import Rows, Use
from raco_fast.engine.declaration import Declared, Entries
from raco_fast.engine.layer_rules import LayerRule
from raco_fast.engine.sequences import Segments

Node: TypeAlias = Any
"""A node of autograd's graph; a `Tapped` one has the attributes that `Tapped` lists."""

ANCHOR = torch.zeros((), device="cpu", requires_grad=True)
EVERY_ROW = slice(None)


class Call(Protocol):
    """One call of a layer, on its way back.

    `layer`: its name; `entries`: see `sequences.entries`; `dy`: the gradient of its output, with
    the leading dimensions of the input.
    """

    layer: str
    entries: Entries
    dy: Tensor

    def uses(self, segments: Segments) -> Iterable[tuple[Tensor, slice, Use]]:
        """(parameter, rows of it, what this call adds to their gradients); may be asked again."""

    def rows(self, parameter: Tensor, segments: Segments) -> Rows:
        """What this call adds to some rows of one parameter's gradients."""

    def keep(self) -> None:
        """Before it is kept beyond the pass: hold nothing of the graph."""


Collector: TypeAlias = Callable[[Call], None]
"""Called for every prepared layer, in the order of the backward pass."""


_names = WeakIdKeyDictionary()
_reasons = WeakIdKeyDictionary()


def remember_names(model: nn.Module) -> None:
    """So that messages can call parameters by their names."""
    for name, p in model.named_parameters():
        _names[p] = name


def is_prepared(p: Tensor) -> bool:
    """Whether p belongs to a model that was prepared."""
    return p in _names or noted_name(p) is not None


def name_of(p: Tensor) -> str:
    """What a message calls a parameter."""
    name = _names.get(p) or noted_name(p)  # type: ignore[no-untyped-call]
    return f"a parameter of shape {list(p.shape)}" if name is None else f"parameter {name!r}"


def remember_reason(parameters: Iterable[Tensor], reason: str) -> None:
    """Note why the layer of some parameters has no tap, for messages."""
    for p in parameters:
        _reasons[p] = reason


def reason_for(p: Tensor) -> str:
    """Why no rule sees p, as far as it is known."""
    general = (
        "its layer has no rule (register_layer_rule), was compiled or wrapped before it was "
        "prepared, or the parameter is used directly"
    )
    return str(_reasons[p]) if p in _reasons else general


class NotExactError(ValueError):
    """One backward pass would be wrong, and the model was prepared with strict=True."""


@dataclass(frozen=True)
class Checks:
    """What `prepare` was told: `strict`, and how often to compare (None: never)."""

    strict: bool = False
    every: int | None = None


@dataclass(frozen=True)
class Site:
    """What is the same at every call of a layer, as long as the layer stays as it is.

    `names`: of its trained parameters; `look`: what tells a layer that has changed from before;
    `obstacle`: why its calls cannot be tapped, or None; then it has a `rule`.
    """

    layer: str
    names: tuple[str, ...]
    rule: LayerRule | None
    look: Hashable
    obstacle: str | None
    checks: Checks


class Tapped(torch.autograd.Function):
    """A function that hands the gradients of some parameters to collectors.

    Its nodes have the attributes that `note` sets, and two that are set for a collecting pass:
    `entries`, how their rows are told apart, and `collector`.
    """

    BELOW: int  # which of its edges leads on to where the layer's input comes from

    @staticmethod
    def note(
        ctx: Node,
        *,
        layer: str,
        parameters: tuple[Tensor, ...],
        leaves: tuple[Tensor, ...],
        index: Declared | None,
        shape: torch.Size,
        look: Hashable,
        checks: Checks | None,
        broadcasts: bool,
    ) -> None:
        """Set the attributes of a node.

        `leaves`: what the graph has in place of `parameters`; `index`: what `sequences` declared;
        `shape`: of the layer's input; `look`: compared from call to call, to notice a layer that
        has changed; `checks`: None without `prepare`; `broadcasts`: whether its output may be added
        to more rows than it has.
        """
        ctx.layer, ctx.parameters, ctx.leaves = layer, parameters, leaves
        ctx.index, ctx.shape = index, shape
        ctx.set_materialize_grads(False)
        ctx.look, ctx.checks, ctx.broadcasts = look, checks, broadcasts
        ctx.entries = ctx.collector = None


class Tap(Tapped):
    """Identity on y = layer(x) that keeps x."""

    BELOW = 1

    @staticmethod
    def forward(
        ctx: Node,
        site: Site,
        module: nn.Module,
        leaves: tuple[Tensor, ...],
        index: Declared | None,
        y: Tensor,
        x: Tensor,
        anchor: Tensor,
    ) -> Tensor:
        """y again."""
        rows = x.is_floating_point()
        # Autocast has multiplied x in y's dtype; kept in its own it would take twice the memory.
        narrower = rows and y.element_size() < x.element_size()
        ctx.save_for_backward(x.to(y.dtype) if narrower else x)
        ctx.site, ctx.module = site, module
        # As `Tapped.note`, whose call would cost more than what it does: there is a tap a layer.
        ctx.set_materialize_grads(False)
        ctx.layer, ctx.checks, ctx.look = site.layer, site.checks, site.look
        ctx.leaves, ctx.parameters = leaves, owners_of(leaves)
        ctx.index, ctx.shape, ctx.broadcasts = index, x.shape, not rows
        ctx.entries = ctx.collector = None
        # Shares y's version counter, so a later in-place change is noticed where it would do harm;
        # y itself would be a view, on which in-place changes are forbidden.
        return y.detach()

    @staticmethod
    def backward(ctx: Node, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        """dY for the layer, whose own backward pass goes on from there."""
        if ctx.collector is not None and dy is not None:
            hand_over(ctx.collector, layer_call(ctx, ctx.saved_tensors[0], dy))
        return None, None, None, None, dy, None, None


# `Tap.apply`, less what it looks for in Python: transforms of torch.func, which are asked for here.
_apply: Callable[..., Tensor] = super(torch.autograd.Function, Tap).apply


def tapped(*args: Any) -> Tensor:
    """The output of `Tap.forward`, with a node of autograd's graph."""
    if torch._C._are_functorch_transforms_active():
        transformed: Tensor = Tap.apply(*args)  # type: ignore[no-untyped-call]
        return transformed
    return _apply(*args)


def layer_call(node: Node, x: Tensor, dy: Tensor) -> Call:
    """What the tap `node` hands over for the input x and the gradient dy of the output."""
    return _LayerCall(node, x, dy)


class _LayerCall:
    __slots__ = ("_module", "_parameters", "_site", "_x", "dy", "entries", "layer")

    def __init__(self, node: Node, x: Tensor, dy: Tensor) -> None:
        self._site, self._module, self._parameters = node.site, node.module, node.parameters
        self.layer, self.entries, self.dy = node.layer, node.entries, dy
        self._x = x

    def uses(self, segments: Segments) -> list[tuple[Tensor, slice, Use]]:
        site, module = self._site, self._module
        assert site.rule is not None, "without a rule no call is tapped"
        by_name = site.rule(module, self._x, self.dy, segments)
        if missing := [name for name in site.names if name not in by_name]:
            raise ValueError(
                f"the rule of layer {site.layer!r} ({type(module).__name__}) gives nothing "
                f"for {missing}; return a use for each of its parameters, or freeze them"
            )
        pairs = zip(site.names, self._parameters, strict=True)
        return [(p, EVERY_ROW, by_name[name]) for name, p in pairs]

    def rows(self, parameter: Tensor, segments: Segments) -> Rows:
        return next(use for p, _, use in self.uses(segments) if p is parameter)

    def keep(self) -> None:
        self._x = self._x.detach()


Running: TypeAlias = tuple[Collector, int, Context]
"""A collector, and the thread and context that its pass was started in."""


def hand_over(running: Running, call: Call) -> None:
    """Give a call to the collector of its pass."""
    collector, thread, context = running
    if get_ident() == thread:
        collector(call)
        return
    # On a GPU autograd runs the backward pass in threads of its own; what is a context variable
    # (a forced backend) comes from the one that started it. A context serves one at a time.
    run = context.copy().run
    kind = call.dy.device.type
    if torch.is_grad_enabled() or torch.is_autocast_enabled(kind):
        with plainly(kind):
            run(collector, call)
    else:  # as autograd has brought it along
        run(collector, call)


@contextmanager
def plainly(kind: str) -> Iterator[None]:
    """Neither autograd nor autocast takes part in what is computed on a kind of device."""
    with torch.no_grad(), torch.autocast(kind, enabled=False):
        yield


@contextmanager
def collecting(collector: Collector, nodes: Sequence[Node]) -> Iterator[Running]:
    """Backward passes through the taps `nodes` inside the block feed the collector."""
    if any(node.collector is not None for node in nodes):
        raise RuntimeError(
            "a backward pass over several objectives is under way in this graph; wait for it"
        )
    running = (collector, get_ident(), copy_context())
    for node in nodes:
        node.collector = running
    try:
        yield running
    finally:
        for node in nodes:
            node.collector = None
