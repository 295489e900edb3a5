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
from torch.autograd.graph import GradientEdge

from raco_fast.distributed.dtensor import is_dtensor
from raco_fast.distributed.fsdp2 import owner_of
from raco_fast.engine.declaration import Entries, MisfitError, entries
from raco_fast.engine.light_tap import LightTap, may_have_light_taps
from raco_fast.engine.nodes import (
    BATCH_NORM,
    LEAF,
    PLAIN,
    REENTRANT,
    TAPPED,
    AnyTap,
    added_to_sequences,
    edges,
    kind_of,
    own_end,
    reaches_out,
    role_of,
    tap_at,
)
from raco_fast.engine.tap import ANCHOR, Checks, Node, is_prepared, name_of, reason_for


class ScoreGraph:
    """The graph of one forward pass.

    Args:
        losses: objective name -> scalar; a constant: that objective has no label in this batch.
        scores: [B].
        wanted: the parameters whose gradients count.
        known: facts of passes whose layers need no closer look.
        misfits: layers whose rows could not be told apart at some time; this graph's are added.

    Attributes:
        taps: of the layers that use wanted parameters.
        nodes: tap -> the node that it is or was left at.
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
        self.taps: list[AnyTap] = []
        self.nodes: dict[AnyTap, Node] = {}
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
        for tap in self.taps:
            self._note_layer(tap)

    def shared(self) -> set[Tensor]:
        """The parameters that several calls use: tied, or in a layer that is called again."""
        return {p for p, calls in self.uses.items() if calls > 1}

    def light_taps(self) -> dict[LightTap, GradientEdge]:
        """With where the gradients of their layers' outputs arrive."""
        light = [tap for tap in self.taps if isinstance(tap, LightTap)]
        return {tap: GradientEdge(self.nodes[tap], tap.output) for tap in light}

    def pairs(self) -> list[tuple[int, int]]:
        """Sequences that share rows of some layer."""
        found = {id(tap.index): tap.index for tap in self.taps if tap.index is not None}
        return sorted({pair for declared in found.values() for pair in declared.pairs})

    def _refuse(self, obstacle: str) -> None:
        self.obstacle = self.obstacle or obstacle

    def _walk_scores(self) -> None:
        # Thousands of nodes at every call: what a type means is looked up once.
        roles: dict[type, int] = {}
        below_of: dict[type, set[type]] = {}  # kind of a node -> kinds that it leads on to
        # Depth first, each node once; from a tap only on to where the layer's input comes from.
        root: Node = self.scores.grad_fn
        tap = self._see(root, role_of(type(root)))
        self._check_output(tap, self.scores.output_nr)
        stack = [(root, tap)]
        seen = {root: tap}
        while stack:
            node, tap = stack.pop()
            kind = type(node) if tap is None else kind_of(node, tap)
            kinds_below = below_of.get(kind)
            if kinds_below is None:
                kinds_below = below_of[kind] = set()
            on = node.next_functions if tap is None else edges(node, tap)
            for place, (below, output) in enumerate(on):
                if below is None:
                    continue
                kind_below = type(below)
                role = roles.get(kind_below)
                if role is None:
                    role = roles[kind_below] = role_of(kind_below)
                if role == LEAF:
                    self._leaf(owner_of(below.variable), node, "the scores past every rule")
                    continue
                if below in seen:
                    found = seen[below]
                else:
                    plain = role == PLAIN and not may_have_light_taps(kind_below)
                    seen[below] = found = None if plain else self._see(below, role)
                    stack.append((below, found))
                if found is None:
                    kinds_below.add(kind_below)
                    continue
                kinds_below.add(kind_of(below, found))
                self._check_output(found, output)
                if role == TAPPED:
                    self._into[below].append((node, place))
        for above, kinds_below in below_of.items():
            self.facts.update((above.__name__, below.__name__) for below in kinds_below)

    def _see(self, node: Node, role: int) -> AnyTap | None:
        """What a node below the scores means by itself; its tap."""
        tap = tap_at(node, role)
        if tap is not None:
            self._note_tap(node, tap)
        elif role == BATCH_NORM and node._saved_training:
            self._refuse("batch normalisation in training mode mixes sequences; call its .eval()")
        elif role == REENTRANT:
            self._refuse("reentrant checkpointing hides layers; use use_reentrant=False")
        return tap

    def _check_output(self, tap: AnyTap | None, output: int) -> None:
        if isinstance(tap, LightTap) and tap.output != output:
            self._refuse(f"layer {tap.layer!r} has given more than its output")

    def _note_tap(self, node: Node, tap: AnyTap) -> None:
        wanted = [p for p in tap.parameters if not self._is_other(p)]
        if wanted:
            self.taps.append(tap)
            self.nodes[tap] = node
        for p in wanted:
            self.uses[p] += 1
            self.layer_of[p] = tap.layer
        self.leaves.update(zip(tap.parameters, tap.leaves, strict=True))
        self.checks = tap.checks or self.checks

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
            role = role_of(type(node))
            tap = tap_at(node, role)
            if role == LEAF and not self._is_other(owner_of(node.variable)):
                by = "" if above is None else f", in {above.name()}"
                past = past or f"{name_of(owner_of(node.variable))} reaches {where}{by}"
            for p in () if tap is None else tap.parameters:
                if not self._is_other(p):
                    past = past or f"{name_of(p)} reaches {where}, as in an auxiliary loss"
            if role == REENTRANT:
                past = past or f"reentrant checkpointing hides what reaches {where}"
            for edge in edges(node, tap):
                if edge[0] is not None and edge not in seen:
                    seen.add(edge)
                    stack.append((*edge, node))
        return through, past

    def _place_rows(self) -> None:
        """Tell the rows of every layer apart."""
        misfits, n = [], len(self.scores)
        known: dict[Hashable, Entries] = {}
        # How many tokens a sequence has, as most layers with rows [n, tokens, d] say: without it
        # rows [n * tokens, d] could be anything.
        tokens = [tap for tap in self.taps if len(tap.shape) > 2 - tap.broadcasts]
        lengths = Counter(tap.shape[1] for tap in tokens if tap.shape[0] == n)
        length = max(lengths, key=lambda size: lengths[size]) if lengths else None
        for tap in self.taps:
            shape: Sequence[int] = tap.shape
            lookup = added_to_sequences(self._into[tap]) if tap.broadcasts else None
            if lookup is not None and math.prod(lookup[1]) > math.prod(shape):
                self.lookups[tap], shape = lookup, lookup[1]
            try:
                alike = tuple(shape), id(tap.index)
                if alike not in known:
                    known[alike] = entries(tap.layer, shape, tap.index, n, length)
                tap.entries = known[alike]
            except MisfitError as misfit:
                misfits.append((tap, str(misfit)))
                self.misfits.add(tap.layer)
            else:
                index, outer = tap.entries
                flat = index is None and shape[0] != n
                alone = index is None or index.shared_with is None
                fact = (len(shape), index is None, alone, outer > 1, flat)
                self.facts.add(("rows", tap.layer, *fact))
                if tap.layer in self.misfits:
                    self._refuse(
                        f"layer {tap.layer!r} has had inputs whose rows could not be told apart, "
                        f"so what fits now may fit by chance"
                    )
        if not misfits:
            return
        declared = any(tap.index is not None for tap, _ in misfits)
        if declared and len(misfits) == len(self.taps):
            raise ValueError(misfits[0][1])  # not this layer, but the declaration
        self._refuse(misfits[0][1])

    def _note_layer(self, tap: AnyTap) -> None:
        own = own_end(self.nodes[tap], tap)
        fact = ("layer", tap.layer, tap.look, None if own is None else type(own[0]).__name__)
        if fact not in self._known and reaches_out(self.nodes[tap], tap):
            self._refuse(
                f"layer {tap.layer!r} depends on more than its first argument and its parameters, "
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
        if role_of(type(node)) == LEAF:
            found[id(node.variable)] = node.variable
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                stack.append(below)
    for p in (ANCHOR, *wanted):
        found.pop(id(p), None)
    return list(found.values())
