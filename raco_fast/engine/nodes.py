"""What a node of autograd's graph is, and where it leads on to.

A tapped layer counts as one node: from its tap the way leads to where the layer's input comes from.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch

from raco_fast.engine.light_tap import Edge, LightTap, light_tap
from raco_fast.engine.tap import Node, Tap, Tapped

PLAIN, LEAF, TAPPED, BATCH_NORM, REENTRANT = range(5)
_BY_NAME = {
    "AccumulateGrad": LEAF,
    "NativeBatchNormBackward0": BATCH_NORM,
    "CudnnBatchNormBackward0": BATCH_NORM,
    "MiopenBatchNormBackward0": BATCH_NORM,
    "CheckpointFunctionBackward": REENTRANT,
}
AnyTap: TypeAlias = Node | LightTap


def role_of(kind: type) -> int:
    """What nodes of a type are; a plain one may have a light tap."""
    name = kind.__name__
    if name.endswith("Backward"):  # of a function in Python; torch's own end in a digit
        forward = getattr(kind, "_forward_cls", None)
        if isinstance(forward, type) and issubclass(forward, Tapped):
            return TAPPED
    return _BY_NAME.get(name, PLAIN)


def tap_at(node: Node, role: int) -> AnyTap | None:
    """The tap that a node is, or that was left at it."""
    if role == TAPPED:
        return node
    return light_tap(node) if role == PLAIN else None


def edges(node: Node, tap: AnyTap | None) -> Sequence[Edge]:
    """Where a node leads on to."""
    if isinstance(tap, LightTap):
        return (tap.below,)
    found: Sequence[Edge] = node.next_functions
    return found if tap is None else found[_below(node) : _below(node) + 1]


def kind_of(node: Node, tap: AnyTap | None) -> type:
    """What tells nodes apart: whether a layer's tap is a light one depends on its rows alone."""
    return Tap._backward_cls if isinstance(tap, LightTap) else type(node)


def own_end(node: Node, tap: AnyTap) -> Edge | None:
    """Where the layer's own part of the graph begins; None: the tap's function is the layer."""
    if isinstance(tap, LightTap):
        return node, tap.output
    if _below(node) == 0:
        return None
    own: Edge = node.next_functions[0]
    return own


def reaches_out(node: Node, tap: AnyTap) -> bool:
    """Whether a layer's own part of the graph ends elsewhere than at its input and parameters."""
    top = own_end(node, tap)
    if top is None:
        return False
    own = {id(p) for p in tap.leaves}
    (at_input,) = edges(node, tap)
    stack = [top]
    seen = {at_input, top}
    while stack:
        below, _ = stack.pop()
        role = role_of(type(below))
        if role == LEAF and id(below.variable) not in own:
            return True
        if below is not top[0] and tap_at(below, role) is not None:
            return True
        for edge in below.next_functions:
            if edge[0] is not None and edge not in seen:
                seen.add(edge)
                stack.append(edge)
    return False


def added_to_sequences(above: list[tuple[Node, int]]) -> tuple[Node, torch.Size] | None:
    """(the node that adds a lookup's output to more rows than it has, the shape of those rows).

    Positions are looked up once, as [T] or [1, T], and added to the words of every sequence. The
    gradient of the sum has the row of each sequence that the lookup's own gradient adds up.
    """
    if len(above) != 1:
        return None
    ((add, place),) = above
    if type(add).__name__ != "AddBackward0" or (place == 1 and add._saved_alpha != 1):
        return None
    return add, add._input_metadata[0].shape[:-1]


def _below(node: Node) -> int:
    below: int = type(node)._forward_cls.BELOW
    return below
