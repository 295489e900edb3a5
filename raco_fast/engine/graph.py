"""`ScoreGraph`: what autograd's graph says of the way from parameters to scores to losses.

One walk over the nodes of a forward pass, at every call; a few milliseconds for thirty layers. It
finds the taps that a collecting pass will run through, every parameter that reaches the scores past
them, every way to a loss past the scores, and leaves outside of the parameters that
the objectives train. What it saw is noted as a set of facts, so that a pass unlike all before it is
recognised.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Sequence

import torch
from torch import Tensor, nn

from raco_fast.distributed.dtensor import is_dtensor
from raco_fast.distributed.fsdp2 import owner_of
from raco_fast.engine.declaration import MisfitError, entries
from raco_fast.engine.tap import ANCHOR, Checks, Node, Tapped, is_prepared, name_of, reason_for

_PLAIN, _LEAF, _TAPPED, _BATCH_NORM, _REENTRANT = range(5)
_BY_NAME = {
    "AccumulateGrad": _LEAF,
    "NativeBatchNormBackward0": _BATCH_NORM,
    "CudnnBatchNormBackward0": _BATCH_NORM,
    "MiopenBatchNormBackward0": _BATCH_NORM,
    "CheckpointFunctionBackward": _REENTRANT,
}


class ScoreGraph:
    """The graph of one forward pass.

    Args:
        losses: objective name -> scalar; a constant: that objective has no label in this batch.
        scores: [B].
        wanted: the parameters whose gradients count.
        known: facts of passes whose layers need no closer look.
        misfits: layers whose rows could not be told apart at some time; this graph's are added.

    Attributes:
        taps: nodes of the layers that use wanted parameters.
        lookups: tap of a position lookup -> (node that adds it to every sequence, rows there).
        uses: how many calls of layers use each wanted parameter.
        layer_of: the layer of each.
        leaves: what the graph has in the place of each.
        others: leaves with a gradient that are not wanted.
        obstacle: why one backward pass would be wrong, or None.
        facts: what the pass looks like.
        checks: what the prepared model asks for.
        retained: whether passes so far have kept it.
    Raises:
        RuntimeError: the model was not prepared.
        ValueError: a loss that does not depend on `scores`; rows that were declared wrongly.
    """

    def __init__(
        self,
        losses: dict[str, Tensor],
        scores: Tensor,
        wanted: Sequence[Tensor],
        known: Collection[Hashable],
        misfits: set[str],
    ) -> None:
        self.scores, self.wanted, self.misfits = scores, wanted, misfits
        self.taps: list[Node] = []
        self.lookups: dict[Node, tuple[Node, torch.Size]] = {}
        self.uses: Counter[Tensor] = Counter()
        self.layer_of: dict[Tensor, str] = {}
        self.leaves: dict[Tensor, Tensor] = {}
        self.others: list[Tensor] = []
        self.obstacle: str | None = None
        self.facts: set[Hashable] = set()
        self.checks = Checks()
        self.retained = False
        self._wanted, self._known = {id(p) for p in wanted}, known
        self._gathered = any(is_dtensor(p) for p in wanted)
        self._others: set[int] = set()
        self._into: defaultdict[Node, list[tuple[Node, int]]] = defaultdict(list)
        if scores.grad_fn is not None:
            self._walk_scores()
        if not self.taps and not any(is_prepared(p) for p in wanted):
            raise RuntimeError(
                "`scores` come from a model that was not prepared; call raco_fast.prepare(model) "
                "before the forward pass, or leave `scores` out for one backward pass per objective"
            )
        self._walk_losses(losses)
        self._place_rows()
        for node in self.taps:
            self._note_layer(node)

    def shared(self) -> set[Tensor]:
        """The parameters that several calls use: tied, or in a layer that is called again."""
        return {p for p, calls in self.uses.items() if calls > 1}

    def pairs(self) -> list[tuple[int, int]]:
        """Sequences that share rows of some layer."""
        found = {id(node.index): node.index for node in self.taps if node.index is not None}
        return sorted({pair for declared in found.values() for pair in declared.pairs})

    def _refuse(self, obstacle: str) -> None:
        self.obstacle = self.obstacle or obstacle

    def _walk_scores(self) -> None:
        # Thousands of nodes at every call: what a type means is looked up once.
        roles: dict[type, int] = {}
        below_of: dict[type, set[type]] = {}  # kind of a node -> kinds that it leads on to
        root = self.scores.grad_fn
        # Depth first, each node once; from a tap only on to where the layer's input comes from.
        stack: list[Node] = [root]
        seen = {root}
        roles[type(root)] = _role(root)
        self._see(root, roles[type(root)])
        while stack:
            node = stack.pop()
            kind = type(node)
            edges = node.next_functions
            if roles[kind] == _TAPPED:
                edges = edges[_below(node) : _below(node) + 1]
            kinds_below = below_of.get(kind)
            if kinds_below is None:
                kinds_below = below_of[kind] = set()
            for place, (below, _) in enumerate(edges):
                if below is None:
                    continue
                kind_below = type(below)
                role = roles.get(kind_below)
                if role is None:
                    role = roles[kind_below] = _role(below)
                if role == _LEAF:
                    self._leaf(owner_of(below.variable), node, "the scores past every rule")
                    continue
                kinds_below.add(kind_below)
                if role == _TAPPED:
                    self._into[below].append((node, place))
                if below not in seen:
                    seen.add(below)
                    stack.append(below)
                    if role != _PLAIN:
                        self._see(below, role)
        for above, kinds_below in below_of.items():
            self.facts.update((above.__name__, below.__name__) for below in kinds_below)

    def _see(self, node: Node, role: int) -> None:
        """What a node below the scores means by itself."""
        if role == _TAPPED:
            layer = node.layer
            wanted = [p for p in node.parameters if not self._is_other(p)]
            if wanted:
                self.taps.append(node)
            for p in wanted:
                self.uses[p] += 1
                self.layer_of[p] = layer
            self.leaves.update(zip(node.parameters, node.leaves, strict=True))
            self.checks = node.checks or self.checks
        elif role == _BATCH_NORM and node._saved_training:
            self._refuse("batch normalisation in training mode mixes sequences; call its .eval()")
        elif role == _REENTRANT:
            self._refuse("reentrant checkpointing hides layers; use use_reentrant=False")

    def _leaf(self, p: Tensor, node: Node, where: str) -> None:
        if not self._is_other(p):
            self._refuse(f"{name_of(p)} reaches {where}, in {node.name()}; {reason_for(p)}")

    def _is_other(self, p: Tensor) -> bool:
        """Whether p is not wanted; it is then noted as such."""
        other = id(p) not in self._wanted
        if other and self._gathered and isinstance(p, nn.Parameter):
            self._refuse(
                f"{name_of(p)} may be one that FSDP2 has gathered, and was not sharded when the "
                f"model was prepared or the optimizer made; prepare the whole model before"
            )
        elif other and p.is_leaf and id(p) not in self._others:
            self._others.add(id(p))
            self.others.append(p)
        return other

    def _walk_losses(self, losses: dict[str, Tensor]) -> None:
        at_scores = (self.scores.grad_fn, self.scores.output_nr)
        for name, loss in losses.items():
            if not loss.requires_grad:
                continue
            top = (loss.grad_fn, loss.output_nr)
            through, past = self._walk_loss(top, at_scores) if loss.grad_fn else (False, None)
            if past is not None:
                self._refuse(past)
            elif not through:
                raise ValueError(
                    f"`losses`[{name!r}] must be a function of `scores`, and its graph does not "
                    f"reach them; compute it from that very tensor, or leave `scores` out for one "
                    f"backward pass per objective"
                )

    def _walk_loss(self, top: tuple[Node, int], stop: tuple[Node, int]) -> tuple[bool, str | None]:
        """(Whether a loss depends on the scores, how it reaches wanted parameters past them)."""
        where = "a loss other than through `scores`"
        stack, seen = [(*top, None)], {top}
        through, past = False, None
        while stack:
            node, output, above = stack.pop()
            if (node, output) == stop:
                through = True
                continue
            role = _role(node)
            if role == _LEAF and not self._is_other(owner_of(node.variable)):
                by = "" if above is None else f", in {above.name()}"
                past = past or f"{name_of(owner_of(node.variable))} reaches {where}{by}"
            for p in node.parameters if role == _TAPPED else ():
                if not self._is_other(p):
                    past = past or f"{name_of(p)} reaches {where}, as in an auxiliary loss"
            if role == _REENTRANT:
                past = past or f"reentrant checkpointing hides what reaches {where}"
            for edge in _edges(node):
                if edge[0] is not None and edge not in seen:
                    seen.add(edge)
                    stack.append((*edge, node))
        return through, past

    def _place_rows(self) -> None:
        """Tell the rows of every layer apart."""
        misfits, n = [], len(self.scores)
        # How many tokens a sequence has, as most layers with rows [n, tokens, d] say: without it
        # rows [n * tokens, d] could be anything.
        tokens = [node for node in self.taps if len(node.shape) > 2 - node.broadcasts]
        lengths = Counter(node.shape[1] for node in tokens if node.shape[0] == n)
        length = max(lengths, key=lambda size: lengths[size]) if lengths else None
        for node in self.taps:
            shape: Sequence[int] = node.shape
            lookup = _added_to_sequences(self._into[node]) if node.broadcasts else None
            if lookup is not None and math.prod(lookup[1]) > math.prod(shape):
                self.lookups[node], shape = lookup, lookup[1]
            try:
                node.entries = entries(node.layer, shape, node.index, n, length)
            except MisfitError as misfit:
                misfits.append((node, str(misfit)))
                self.misfits.add(node.layer)
            else:
                index, outer = node.entries
                flat = index is None and shape[0] != n
                alone = index is None or index.shared_with is None
                fact = (len(shape), index is None, alone, outer > 1, flat)
                self.facts.add(("rows", node.layer, *fact))
                if node.layer in self.misfits:
                    self._refuse(
                        f"layer {node.layer!r} has had inputs whose rows could not be told apart, "
                        f"so what fits now may fit by chance"
                    )
        if not misfits:
            return
        declared = any(node.index is not None for node, _ in misfits)
        if declared and len(misfits) == len(self.taps):
            raise ValueError(misfits[0][1])  # not this layer, but the declaration
        self._refuse(misfits[0][1])

    def _note_layer(self, node: Node) -> None:
        fact = ("layer", node.layer, node.look, _name_of_own(node))
        if fact not in self._known and _reaches_out(node):
            self._refuse(
                f"layer {node.layer!r} depends on more than its first argument and its parameters, "
                f"which its rule does not see"
            )
        self.facts.add(fact)


def other_leaves(losses: Iterable[Tensor], wanted: Sequence[Tensor]) -> list[Tensor]:
    """Leaves below the losses that want a gradient and are not `wanted`, each once."""
    found: dict[int, Tensor] = {}
    stack: list[Node] = [loss.grad_fn for loss in losses if loss.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if _role(node) == _LEAF:
            found[id(node.variable)] = node.variable
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                stack.append(below)
    for p in (ANCHOR, *wanted):
        found.pop(id(p), None)
    return list(found.values())


def _role(node: Node) -> int:
    kind = type(node)
    name = kind.__name__
    if name.endswith("Backward"):  # of a function in Python; torch's own end in a digit
        forward = getattr(kind, "_forward_cls", None)
        if isinstance(forward, type) and issubclass(forward, Tapped):
            return _TAPPED
    return _BY_NAME.get(name, _PLAIN)


def _below(node: Node) -> int:
    below: int = type(node)._forward_cls.BELOW
    return below


def _edges(node: Node) -> Sequence[tuple[Node, int]]:
    """Where a node leads on to; a layer, to where its input comes from."""
    edges: Sequence[tuple[Node, int]] = node.next_functions
    return edges[_below(node) : _below(node) + 1] if _role(node) == _TAPPED else edges


def _name_of_own(tap: Node) -> str | None:
    """What the layer behind a tap ends in; None: the function is itself the layer."""
    if _below(tap) == 0:
        return None
    own: Node = tap.next_functions[0][0]
    return type(own).__name__


def _reaches_out(tap: Node) -> bool:
    """Whether a layer's own part of the graph ends elsewhere than at its input and parameters."""
    if _below(tap) == 0:
        return False  # the function is itself the layer
    own, at_input = {id(p) for p in tap.leaves}, tap.next_functions[_below(tap)]
    stack = [tap.next_functions[0]]
    seen = {at_input, *stack}
    while stack:
        node, _ = stack.pop()
        role = _role(node)
        if role == _TAPPED or (role == _LEAF and id(node.variable) not in own):
            return True
        for edge in node.next_functions:
            if edge[0] is not None and edge not in seen:
                seen.add(edge)
                stack.append(edge)
    return False


def _added_to_sequences(above: list[tuple[Node, int]]) -> tuple[Node, torch.Size] | None:
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
