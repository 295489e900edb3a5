"""`LightTap`: a tap without a function of its own, for layers with few rows.

A `Tap` costs a call into Python on the way forward and another on the way back, more than such a
layer's arithmetic. A light tap only notes the layer's input at the node of autograd's graph that
made its output; a collecting pass has the gradient of that output captured by autograd itself, and
hands all layers over once the pass is done.

So it keeps x as long as the graph lives, and the pass keeps every dY to its end: for few rows only.
"""

from collections.abc import Hashable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

from raco_fast.distributed.fsdp2 import owners_of
from raco_fast.engine.declaration import Declared, Entries
from raco_fast.engine.tap import Checks, Node, Site

Edge: TypeAlias = tuple[Node, int]
"""(A node, which of its outputs); the node is None where no gradient is wanted."""

OfCall: TypeAlias = tuple[Site, Checks, nn.Module, tuple[Tensor, ...], Declared | None]
"""(What is the same at every call, what `prepare` was told, the layer, what the graph has in place
of its parameters, what `sequences` declared)."""

# Numbers of x and y together.
_FEW_ROWS = 1 << 15
_KEY = "raco_fast"

# Kinds of nodes at which anything was noted: the others need not be asked.
_kinds: set[type] = set()


class LightTap:
    """What is known of one call of a layer, with the attributes of a `Tapped` node.

    `below`: where the layer's input comes from; `output`: which of the node's outputs is the
    layer's. It holds nothing of its own node, which would keep the graph alive forever.
    """

    __slots__ = ("_of_call", "_of_y", "_version", "_x", "below", "entries", "output", "shape")
    broadcasts = False

    def __init__(self, of_call: OfCall, y: Tensor, x: Tensor, output: int) -> None:
        self._of_call, self._of_y = of_call, y.shape
        self.entries: Entries | None = None
        # Autocast has multiplied x in y's dtype; kept in its own it would take twice the memory.
        self._x: Tensor | None = x if y.element_size() >= x.element_size() else x.to(y.dtype)
        self._version = self._x._version
        self.shape, self.output = x.shape, output
        self.below: Edge
        source = x.grad_fn
        if source is None:
            self.below = get_gradient_edge(x)[:2] if x.requires_grad else (None, 0)
        else:
            self.below = source, x.output_nr

    @property
    def site(self) -> Site:
        """What is the same at every call of the layer."""
        return self._of_call[0]

    @property
    def checks(self) -> Checks:
        """What `prepare` was told."""
        return self._of_call[1]

    @property
    def module(self) -> nn.Module:
        """The layer."""
        return self._of_call[2]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What the graph has in place of the layer's parameters."""
        return self._of_call[3]

    @property
    def index(self) -> Declared | None:
        """What `sequences` declared."""
        return self._of_call[4]

    @property
    def layer(self) -> str:
        """Its name."""
        return self.site.layer

    @property
    def look(self) -> Hashable:
        """What tells a layer that has changed from before."""
        return self.site.look

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The trained ones of the layer."""
        return owners_of(self.leaves)

    @property
    def x(self) -> Tensor:
        """The layer's input.

        Raises:
            RuntimeError: it was changed since, or a backward pass has used the graph up.
        """
        if self._x is None:
            raise RuntimeError(
                "trying to go backward through the graph a second time; use retain_graph=True"
            )
        if self._x._version != self._version:
            raise RuntimeError(
                f"the input of layer {self.layer!r} has been modified by an inplace operation "
                f"after the layer had read it; its gradient needs it as it was"
            )
        return self._x

    def dy(self, captured: Tensor) -> Tensor:
        """The gradient of the layer's output, from that of what the node made."""
        return captured.reshape(self._of_y)

    def use_up(self) -> None:
        """Hold no input any more."""
        self._x = None


def left(of_call: OfCall, y: Tensor, x: Tensor) -> bool:
    """Leave a light tap at y = layer(x), where that will do."""
    if x.numel() + y.numel() > _FEW_ROWS or not x.is_floating_point():
        return False
    made = _made(y)
    if made is None:
        return False
    node: Node = made.grad_fn
    source: Node = x.grad_fn
    if (
        node is None
        # The layer gave its input back, or what a tapped layer within it gave.
        or node is source
        or isinstance(node, BackwardCFunction)
        or _KEY in (notes := node.metadata)
        or made is x._base
        # Checkpointing, or tensors that wait on another device.
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        or torch._C._are_functorch_transforms_active()
        # Where processes exchange a layer's gradients as they come, all have to come in one order,
        # and other processes may have more rows.
        or (torch.distributed.is_available() and torch.distributed.is_initialized())
    ):
        return False
    notes[_KEY] = LightTap(of_call, y, x, made.output_nr)
    _kinds.add(type(node))
    return True


def _made(y: Tensor) -> Tensor | None:
    """What a layer made, in another shape perhaps; None where y is a part of it.

    A biased product of three dimensions is a view, and if it is changed in place another node takes
    the place of its own.
    """
    base = y._base
    if base is None:
        return y
    whole = base.numel() == y.numel() and base.is_contiguous() and y.is_contiguous()
    return base if whole and base.dtype == y.dtype else None


def may_have_light_taps(kind: type) -> bool:
    """Whether a light tap was ever left at a node of this type."""
    return kind in _kinds


def light_tap(node: Node) -> LightTap | None:
    """What was left at a node."""
    if not may_have_light_taps(type(node)):
        return None
    found: LightTap | None = node.metadata.get(_KEY)
    return found
