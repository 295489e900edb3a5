"""Per-objective gradients, accumulated over micro-batches.

With one objective p.grad is its gradient, as always in torch. With m objectives p.grad holds an
`ObjectiveGrad`, a stand-in that owns one buffer per objective (its file says why).
`objective(name)` lends that objective's buffers to p.grad, so autograd accumulates in place and
hooks, DDP and micro-batches work as they do for a single loss; afterwards the stand-in is back.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import compress

import torch
from torch import Tensor

from raco_fast.backends.arguments import check_dense
from raco_fast.backends.plan import Plan
from raco_fast.distributed.dtensor import any_dtensor, check_meshes, is_dtensor
from raco_fast.distributed.foreign import refuse_foreign
from raco_fast.distributed.fsdp2 import note_sharded
from raco_fast.distributed.processes import GroupLike, Processes
from raco_fast.distributed.replicas import check_replicas
from raco_fast.engine.backward import backward_of_others, one_backward, use_up
from raco_fast.engine.exactness import Exactness, Pass
from raco_fast.engine.graph import ScoreGraph, other_leaves
from raco_fast.gradients.accumulation import Accumulation
from raco_fast.gradients.buffer_pool import HostMemory
from raco_fast.gradients.check_losses import given_names, ordered_losses, refuse_constants
from raco_fast.gradients.lending import Lent, left_in_private, lend, take_back, versions
from raco_fast.gradients.objective_grad import (
    Touched,
    along_p_grad,
    of_objectives,
    stand_in_of,
    touched,
)
from raco_fast.gradients.overflow import clear_overflow
from raco_fast.gradients.own_gradients import (
    averaged_backward,
    backward_of_each,
    mark_own,
    refuse_averaged,
    refuse_own,
)
from raco_fast.gradients.reduced import Reduced
from raco_fast.gradients.rule_memory import RuleMemory
from raco_fast.gradients.scattered_accumulation import ScatteredAccumulation
from raco_fast.solver.weights import ReadOnlyWeights, check_weights, weights_of


class ObjectiveGradients:
    """The gradients of m objectives with respect to the same parameters.

    Args:
        params: the parameters, or a function that returns them. A function is asked anew at every
            backward pass, so parameters may be added or swapped in between.
        weights: objective name -> weight, or a sequence of weights (names "0", "1", ...).
        keep_losses: sum the losses of a step's backward passes, for `combine` with a rule that
            needs them; the optimizer and `gram_first` see to it themselves.
        process_group: the processes that train these parameters together: "world", a
            torch.distributed group, or None for this process alone. See docs/distributed.md.
    Raises:
        ValueError: wrong weights, no parameter, or a group that this process is not in.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Callable[[], Iterable[Tensor]],
        weights: Mapping[str, float] | Sequence[float] | Tensor,
        *,
        keep_losses: bool = False,
        process_group: GroupLike = "world",
    ) -> None:
        self.processes = Processes(process_group)
        note_sharded()
        self.names, values = check_weights(weights)
        self._weights = dict(zip(self.names, values, strict=True))
        if isinstance(params, Tensor | torch.nn.Module):
            raise TypeError(
                f"`params` must be an iterable of tensors, got a {type(params).__name__}; "
                f"pass model.parameters(), or a list"
            )
        self._source = params if callable(params) else list(params)
        if not callable(params) and not self._source:
            raise ValueError("`params` must hold at least one parameter, got none")
        self._ran: set[str] = set()
        self._held = self._busy = False
        self._open: str | None = None
        self._in_private: str | None = None  # the objective whose gradients FSDP2 keeps yet
        self._replicas_checked = False
        self.exactness = Exactness(self.processes)
        self.plan = Plan()  # of the operations on these gradients
        self._memory = HostMemory()
        self.for_rules = RuleMemory(keep_losses, self.processes)

    @property
    def weights(self) -> ReadOnlyWeights:
        """Objective name -> weight; set all of them at once, in any order."""
        return ReadOnlyWeights(self._weights)

    @weights.setter
    def weights(self, weights: Mapping[str, float] | Sequence[float] | Tensor) -> None:
        self._weights = weights_of(self.names, weights)

    @property
    def present(self) -> tuple[str, ...]:
        """The objectives of the next step: all, but those of weight 0 without a backward pass."""
        if not self._ran or len(self.names) == 1:
            return self.names
        return tuple(name for name, w in self._weights.items() if w > 0.0 or name in self._ran)

    def parameters(self) -> list[Tensor]:
        """The parameters as they are now, each once."""
        source = self._source() if callable(self._source) else self._source
        return list({id(p): p for p in source}.values())  # Tensor's own hash is Python code

    def backward(
        self,
        losses: Mapping[str, Tensor] | Sequence[Tensor],
        *,
        scores: Tensor | None = None,
        mode: str | None = None,
    ) -> None:
        """Backpropagate every objective's loss into that objective's gradients.

        Mode "autograd": m backward passes in weight order; the graph is kept for all but the last,
        so the losses may share a forward pass. Mode "one_backward": one pass, if the losses are
        functions of `scores` and the model was prepared. Gradients add to what earlier calls left
        (micro-batches).

        Every call in mode "one_backward" looks whether one pass is exact, and some compare it with
        an ordinary one (`raco_fast.prepare` says when); where it is not, it warns, names the
        reason, and takes m passes. Leaves that are not of these parameters get the gradient of the
        weighted sum Σ w_i L_i in every mode, by one more pass.

        Args:
            losses: objective name -> scalar, or m scalars in weight order. With `scores`, a loss
                without a graph is allowed: that objective has nothing in this batch. A mapping may
                leave out an objective of weight 0; if no batch of a step has its loss, the step is
                solved without it.
            scores: [B] with the graph of a model that `raco_fast.prepare` prepared: one number per
                sequence, in the order of the batch's rows (`raco_fast.sequences` declares others).
            mode: by default "one_backward" with `scores` and "autograd" without.
        Raises:
            ValueError: unknown mode, or "one_backward" without `scores`; objectives missing or
                unknown, wrong number, not a scalar, a loss (with `scores`: every loss) that depends
                on nothing that requires grad; scores without a graph or of the wrong shape. Nothing
                has been backpropagated then.
            TypeError: `losses` is neither a mapping nor a sequence, or a loss is not a tensor.
            RuntimeError: the model was not prepared, or its graph is used up.
        """
        mode = mode or ("autograd" if scores is None else "one_backward")
        if mode not in ("autograd", "one_backward"):
            raise ValueError(f"`mode` must be 'autograd' or 'one_backward', got {mode!r}")
        if scores is None and mode == "one_backward":
            raise ValueError(
                "`scores` must be given in mode 'one_backward': the [B] sequence scores that the "
                "losses are functions of, with their graph"
            )
        given, ordered = self.checked_losses(losses, scores)
        absent = set(self.names) - set(given) - self._ran
        if self.for_rules.keep_losses and all(p.grad is None for p in self.parameters()):
            self.for_rules.forget_losses()  # model.zero_grad() does not say so
        try:
            self._propagate(ordered, scores, in_one=mode == "one_backward")
        finally:
            self._ran -= absent
        self.for_rules.add((n, x) for n, x in zip(self.names, ordered, strict=True) if n in given)

    def checked_losses(
        self, losses: Mapping[str, Tensor] | Sequence[Tensor], scores: Tensor | None
    ) -> tuple[tuple[str, ...], list[Tensor]]:
        """(the objectives that have a loss on any process, the losses in weight order).

        Raises:
            ValueError, TypeError, RuntimeError: as `backward`, on all processes if on one.
        """
        ordered: list[Tensor] = []

        def decide() -> list[bool]:
            given = given_names(losses, self._weights)
            ordered[:] = ordered_losses(losses, scores, self.names, given)
            if self.processes.size > 1:
                self._check_ready(ordered)
            return [any(x.requires_grad for x in ordered), *(name in given for name in self.names)]

        learns, *flags = self.processes.agree(decide, 1 + len(self.names))
        given = tuple(compress(self.names, flags))
        if not learns:
            refuse_constants(given or self.names)
        return given, ordered

    def _check_ready(self, losses: Sequence[Tensor]) -> None:
        """What has to hold on several processes before a backward pass."""
        params = self.parameters()
        if not self._replicas_checked:
            refuse_foreign(params)
        refuse_averaged([p for p in params if not is_dtensor(p)])
        if not self.sharded:
            # Under FSDP2 leaves are gathered parameters, which belong to DTensors.
            for leaf in other_leaves(losses, params):
                if isinstance(leaf, torch.nn.Parameter):
                    refuse_foreign([leaf])
                    raise RuntimeError(
                        f"the losses train a parameter of shape {list(leaf.shape)} that is not one "
                        f"of these gradients', and whose gradient nobody would average over the "
                        f"processes; freeze it, or give it to the optimizer as well"
                    )

    @property
    def together(self) -> Processes:
        """The processes to decide with; of one objective and plain tensors, none but this."""
        return self.processes if self._several else Processes(None)

    @property
    def _several(self) -> bool:
        if self.processes.size == 1:
            return False
        return len(self.names) > 1 or self.sharded

    @property
    def sharded(self) -> bool:
        """Whether some parameter is a DTensor."""
        return any_dtensor(self.parameters())

    @property
    def scattered(self) -> bool:
        """Whether gradients have parts that other processes keep."""
        return self._several or self.sharded

    def _propagate(self, ordered: list[Tensor], scores: Tensor | None, in_one: bool) -> None:
        if in_one and len(ordered) > 1:
            assert scores is not None, "checked: one backward pass starts from the scores"
            with self.alone():
                served = self._one_backward(ordered, scores)
            if served:
                return
        if self._several and scores is not None and self.sharded:
            # Collectives wait in every backward pass, also where an objective has nothing here.
            ordered = [x if x.requires_grad else x + 0.0 * scores.sum() for x in ordered]
        self._backward_of_each(ordered)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hooks that a pass over all objectives runs must not begin another one."""
        if self._busy:
            raise RuntimeError(
                "a backward pass over several objectives is under way for these gradients; wait "
                "for it"
            )
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def _backward_of_each(self, losses: Sequence[Tensor]) -> None:
        """m backward passes; the graph is kept for all but the last."""
        params = self.parameters()
        if self._several and not self.sharded:
            clear_overflow(params)
            self._notice_cleared(params)
            backward_of_each(losses, self.trained(), self.names)
            self._note_all_ran()
            return
        if self.processes.size > 1 and not self.sharded:
            clear_overflow(params)
            averaged_backward(losses[0], self.trained(), self.processes)
            return
        others = []
        if len(losses) > 1 and not self.sharded:
            others = other_leaves(losses, params)
        backward_of_others(others, losses, self._weights.values())
        inputs = self.trained() if others else None
        for i, (name, loss) in enumerate(zip(self.names, losses, strict=True)):
            with self._objective(name):
                if loss.requires_grad:
                    torch.autograd.backward([loss], retain_graph=i + 1 < len(losses), inputs=inputs)
        if self._several:
            mark_own(self.trained(), self.names, self.processes)

    def _note_all_ran(self) -> None:
        """Every objective has had its backward pass, the one of `backward`."""
        if self._several:
            mark_own(self.trained(), self.names, self.processes)
        self._held = self._held or any(p.grad is not None for p in self.trained())
        self._ran.update(self.names)

    @contextmanager
    def objective(self, name: str) -> Iterator[None]:
        """Everything that backward passes add to p.grad inside the block belongs to `name`.

        p.grad is handed back when the block ends, also by an exception; what a failed backward
        pass had already added stays until the gradients are zeroed.

        Raises:
            ValueError: unknown objective.
            RuntimeError: inside another objective's block, or with more than one objective when
                p.grad was filled outside of any.
            TypeError: the block left a sparse gradient.
        """
        if self._several:
            self.together.agree(lambda: refuse_own(self.parameters()), 0)
        with self._objective(name):
            yield
        self.for_rules.miss(name)

    @contextmanager
    def _objective(self, name: str) -> Iterator[None]:
        if name not in self.names:
            raise ValueError(f"`name` must be one of the objectives {self.names}, got {name!r}")
        if self._open is not None:
            raise RuntimeError(
                f"objective({name!r}) was entered inside objective({self._open!r}); close it first"
            )
        params = self.parameters()
        clear_overflow(params)
        lent: Lent = []
        if len(self.names) > 1:
            self._notice_cleared(params)
            lent = lend(params, self.names, name)
        self._refuse_private(name)
        self._open, before = name, versions(lent)
        try:
            yield
            self._in_private = name if left_in_private(lent, before) else None
        finally:
            self._open = None
            sparse = take_back(lent, self.names, name)
            self._held = self._held or any(p.grad is not None for p, _, _ in lent)
            if sparse is not None:
                check_dense(sparse, f"the gradient of objective {name!r}")
        self._ran.add(name)

    def _refuse_private(self, name: str | None) -> None:
        """Raise RuntimeError if FSDP2 would add to what it keeps of another objective."""
        if self._in_private not in (None, name):
            raise RuntimeError(
                f"FSDP2 has not reduced the gradients of objective {self._in_private!r} yet: with "
                f"set_requires_gradient_sync(False) it keeps one sum, of whatever objective. Leave "
                f"it True, so that each backward pass is reduced; or keep it False only until the "
                f"last `with objective({self._in_private!r}):`, before another objective's; or use "
                f"backward(losses, scores=scores)"
            )

    def of(self, p: Tensor) -> dict[str, Tensor | None]:
        """The accumulated gradient of each objective at `p`; None where it did not touch p."""
        if len(self.names) == 1:
            return {self.names[0]: p.grad}
        held = stand_in_of(p, self.names)
        buffers = [None] * len(self.names) if held is None else held.buffers
        return dict(zip(self.names, buffers, strict=True))

    def collect(self, groups: Iterable[Sequence[Tensor]] | None = None) -> list[Touched]:
        """What a step needs: each group's touched parameters and their gradients.

        Of an objective that is not `present` there are none.

        Args:
            groups: of the parameters; by default one group of all.
        Raises:
            RuntimeError: no backward pass since the gradients were zeroed, an objective left out,
                or p.grad filled (other than with zeros) outside of any objective. One objective:
                never, p.grad is its gradient.
        """
        groups = [self.parameters()] if groups is None else list(groups)
        self._refuse_private(None)
        if len(self.names) == 1:
            return [along_p_grad(params) for params in groups]
        found = [touched(params, self.names) for params in groups]
        if None in found:
            for params in groups:
                for p in params:
                    stand_in_of(p, self.names)
            found = [touched(params, self.names) for params in groups]
        collected = [one for one in found if one is not None]
        if self._held and not any(one.params for one in collected):
            self.forget()  # model.zero_grad() empties p.grad without telling us
        if not self._ran:
            raise RuntimeError(
                f"step without backward: the objectives {self.names} have no gradients; call "
                f"backward(losses) or loss.backward() inside `with objective(name):` first"
            )
        present = self.present
        missing = [name for name in present if name not in self._ran]
        if missing:
            raise RuntimeError(
                f"the objectives {missing} have had no backward pass since the last zero_grad(); "
                f"give each one a loss (a zero that keeps the graph, e.g. `0.0 * scores.sum()`, "
                f"where a batch has nothing for it), or give it weight 0"
            )
        if len(present) < len(self.names):
            chosen = [name in present for name in self.names]
            collected = [of_objectives(one, chosen) for one in collected]
        return collected

    def reduced(self, groups: Iterable[Sequence[Tensor]] | None = None) -> Reduced:
        """What `collect` gives, summed over processes as far as a step needs it.

        Raises:
            RuntimeError: as `collect`, on all processes if on one; or as `Reduced`.
        """
        found: list[Touched] = []

        def collect() -> None:
            found.extend(self.collect(groups))
            if self._several:
                check_meshes(self.parameters(), self.processes.size)

        self.together.agree(collect, 0)
        self.check_replicas()
        return self.reduced_groups(found)

    def check_replicas(self) -> None:
        """Once: raise RuntimeError unless all processes have the same parameters."""
        if self._several and not self._replicas_checked:
            check_replicas(self.trained(), self.processes)
            self._replicas_checked = True

    def reduced_groups(self, groups: Sequence[Touched]) -> Reduced:
        """The same for gradients that are known."""
        return Reduced(groups, len(self.names), self.processes, self.plan)

    def zero(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all objectives.

        Args:
            set_to_none: False fills them with zeros and keeps their memory, as in torch.
        """
        for p in self.parameters():
            if set_to_none:
                p.grad = None
            elif p.grad is not None:
                p.grad.detach_().zero_() if p.grad.requires_grad else p.grad.zero_()
        self.forget()

    def forget(self) -> None:
        """Note that p.grad was cleared elsewhere: every objective needs a new backward pass."""
        self._ran.clear()
        self._held, self._in_private = False, None
        self.for_rules.forget_losses()

    def _one_backward(self, losses: list[Tensor], scores: Tensor) -> bool:
        """Serve all losses with one pass; False, and nothing done, where it is not exact."""
        served = self.look(losses, scores, scattered=self.sharded)
        if served is None:
            return False
        graph, check = served.graph, served.check
        params = self.parameters()
        clear_overflow(params)
        self._notice_cleared(params)
        into = self._accumulation(graph, graph.wanted)
        graph.retained = check is not None or bool(graph.others)
        if check is not None:
            # The gradients to be compared are formed apart, and then once more on top of what is
            # there, so that a check does not change the bits of a run.
            apart = into if into.is_fresh else self._accumulation(graph, [])

            def run() -> str | None:
                one_backward(graph, served.factored, apart, retain_graph=True)
                return check.gradients_of(apart.gradients())

            if not self.exactness.checked(graph, check, run):
                return False
        if check is None or not into.is_fresh:
            one_backward(graph, served.factored, into, retain_graph=graph.retained)
        if not self.sharded:
            backward_of_others(graph.others, losses, self._weights.values())
        if graph.retained:
            use_up(graph)
        into.store()
        self._note_all_ran()
        return True

    def _accumulation(
        self, graph: ScoreGraph, params: Sequence[Tensor]
    ) -> Accumulation | ScatteredAccumulation:
        if self.sharded:
            return ScatteredAccumulation(graph, params, self.names, self._memory, self.processes)
        return Accumulation(params, self.names, self._memory)

    def _notice_cleared(self, params: Sequence[Tensor]) -> None:
        """model.zero_grad() empties p.grad without telling us: then no objective has run."""
        if self._held and all(p.grad is None for p in params):
            self.forget()

    def trained(self) -> list[Tensor]:
        """The parameters that require grad."""
        return [p for p in self.parameters() if p.requires_grad]

    def look(
        self, losses: Sequence[Tensor], scores: Tensor, scattered: bool, hooks_run: bool = False
    ) -> Pass | None:
        """What one backward pass needs of losses for which it is exact, None where it is not."""
        named = dict(zip(self.names, losses, strict=True))
        return self.exactness.look(named, scores, self.trained(), scattered, hooks_run)
