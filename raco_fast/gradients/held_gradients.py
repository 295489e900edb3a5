"""`HeldGradients`: the gradients of several objectives between backward passes and steps.

With one objective p.grad is its gradient, as always in torch. With m objectives p.grad holds an
`ObjectiveGrad`, a stand-in that owns one buffer per objective (its file says why).
`objective(name)` lends that objective's buffers to p.grad, so autograd accumulates in place and
hooks, wrappers and micro-batches work as for a single loss; afterwards the stand-in is back.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from raco_fast.backends.arguments import check_dense
from raco_fast.backends.plan import Plan
from raco_fast.distributed.dtensor import any_dtensor, check_meshes
from raco_fast.distributed.fsdp2 import note_sharded
from raco_fast.distributed.processes import GroupLike, Processes
from raco_fast.distributed.replicas import check_replicas
from raco_fast.engine.exactness import Exactness
from raco_fast.gradients.buffer_pool import HostMemory
from raco_fast.gradients.expectation import Expectation
from raco_fast.gradients.faster_mode import FasterMode
from raco_fast.gradients.lending import Lent, left_in_private, lend, take_back, versions
from raco_fast.gradients.objective_grad import (
    ObjectiveGrad,
    Touched,
    along_p_grad,
    of_objectives,
    stand_in_of,
    touched,
)
from raco_fast.gradients.overflow import clear_overflow
from raco_fast.gradients.own_gradients import refuse_own
from raco_fast.gradients.pass_count import PassCount
from raco_fast.gradients.reduced import Reduced
from raco_fast.gradients.rule_memory import RuleMemory
from raco_fast.solver.gram_options import GramOptions
from raco_fast.solver.registry import RuleLike
from raco_fast.solver.solution import DualSolution
from raco_fast.solver.weights import ReadOnlyWeights, check_weights, weights_of


class HeldGradients:
    """What every backward pass of `ObjectiveGradients` leaves, and what a step takes."""

    def __init__(
        self,
        params: Iterable[Tensor] | Callable[[], Iterable[Tensor]],
        weights: Mapping[str, float] | Sequence[float] | Tensor,
        *,
        keep_losses: bool = False,
        process_group: GroupLike = "world",
        gram: str = "batch",
        gram_ema: float | None = None,
        c_mode: str = "batch",
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
        self.faster_mode = FasterMode(self.processes)
        self.plan = Plan()  # of the operations on these gradients
        self.passes = PassCount()
        self._memory = HostMemory()
        self.for_rules = RuleMemory(keep_losses, self.processes)
        options = GramOptions(gram, gram_ema, c_mode)
        self.expectation = Expectation(self.names, options, self.processes)

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
        if self.expectation.wanted:
            raise RuntimeError(
                f"gram='unbiased' has to see what every sample has with itself, which "
                f"`with objective({name!r}):` does not show; use backward(losses, scores=scores), "
                f"or gram='batch'"
            )
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
        """The accumulated gradient of each objective at `p`; None where it did not touch p.

        They are the memory that a step reads, and may be written to; not with gram="unbiased",
        whose products of samples would be of other gradients: the next pass or step refuses.
        """
        if len(self.names) == 1:
            return {self.names[0]: p.grad}
        held = stand_in_of(p, self.names)
        if held is not None:
            held.escape()
            if self.expectation.wanted and held.handed_out is None:
                held.handed_out = held.versions
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
        self.passes.stepped()
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

    def refuse_metric(self, caller: str) -> None:
        """Raise ValueError where the metric of an optimizer's update is asked of something else."""
        if self.expectation.options.metric != "euclidean":
            raise ValueError(
                f"metric='adam' needs every element of every objective's gradient and AdamW's "
                f"state, and {caller} lacks one of both; take step() after backward(losses) in "
                f"mode 'one_backward' or 'autograd', or set opt.metric = 'euclidean'"
            )

    def solve(
        self,
        M: Tensor,
        c: float,
        rule: RuleLike,
        *,
        present: Sequence[str] | None = None,
        scale: float = 1.0,
        in_metric: Tensor | None = None,
    ) -> DualSolution:
        """The coefficients for a step's Gram matrix; all processes call it.

        Args:
            M: [m, m] float64 on the CPU, of unscaled gradients where `scale` is known.
            present: the objectives that take part; by default `self.present`.
            scale: GradScaler's factor, which the gradients had when they were formed.
            in_metric: [m, m], the matrix to be solved in place of M, in the metric of the update.
        Raises:
            RuntimeError: as `RuleMemory.solve`, or `Expectation.solve`.
        """
        present = self.present if present is None else present
        rules, weights = self.for_rules, self.weights
        if in_metric is not None:
            return rules.solve(in_metric, weights, present, c, rule).measured_by(M)
        if not self.expectation.wanted:
            return rules.solve(M, weights, present, c, rule)
        self._handed_out()
        factor = self._unscaled() / scale
        return self.expectation.solve(M, weights, present, c, rule, rules, factor)

    def _handed_out(self) -> list[ObjectiveGrad]:
        """Gradients that `of` gave, of gram="unbiased".

        Raises:
            RuntimeError: somebody has written to them.
        """
        stand_ins = (p.grad for p in self.parameters())
        found = [g for g in stand_ins if isinstance(g, ObjectiveGrad) and g.handed_out is not None]
        for g in found:
            if g.handed_out != g.versions:
                raise RuntimeError(
                    f"gradients of a parameter of shape {list(g.shape)}, which opt.gradients.of(p) "
                    f"gave, have been written to: gram='unbiased' knows what the samples of a pass "
                    f"have with themselves, not what was made of it. Write to copies, limit the "
                    f"update with max_grad_norm, or set gram='batch'"
                )
        return found

    def _unscaled(self) -> float:
        """By what a GradScaler has multiplied the gradients since they were formed."""
        stand_ins = (p.grad for p in self.parameters())
        factors = (g.unscaled for g in stand_ins if isinstance(g, ObjectiveGrad))
        return next((float(f) for f in factors if f is not None), 1.0)

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
        self.passes.forget()
        self._held, self._in_private = False, None
        self.for_rules.forget_losses()
        self.expectation.samples.forget()

    def _notice_cleared(self, params: Sequence[Tensor]) -> None:
        """model.zero_grad() empties p.grad without telling us: then no objective has run."""
        if self._held and all(p.grad is None for p in params):
            self.forget()

    def trained(self) -> list[Tensor]:
        """The parameters that require grad."""
        return [p for p in self.parameters() if p.requires_grad]
