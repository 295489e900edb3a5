"""Per-objective gradients, accumulated over micro-batches, by one backward pass or by several."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import compress

import torch
from torch import Tensor

from raco_fast.distributed.dtensor import is_dtensor
from raco_fast.distributed.foreign import refuse_foreign
from raco_fast.engine.backward import backward_of_others, one_backward, use_up
from raco_fast.engine.exactness import Pass
from raco_fast.engine.graph import ScoreGraph, other_leaves
from raco_fast.engine.sample_products import SampleProducts
from raco_fast.gradients.accumulation import Accumulation
from raco_fast.gradients.check_losses import given_names, ordered_losses, refuse_constants
from raco_fast.gradients.faster_mode import MODES
from raco_fast.gradients.held_gradients import HeldGradients
from raco_fast.gradients.overflow import clear_overflow
from raco_fast.gradients.own_gradients import (
    averaged_backward,
    backward_of_each,
    mark_own,
    refuse_averaged,
)
from raco_fast.gradients.products_of_pass import ProductsOfPass
from raco_fast.gradients.samples import Labelled, Said, Samples
from raco_fast.gradients.scattered_accumulation import ScatteredAccumulation
from raco_fast.gradients.whole_passes import gram_of_passes


class ObjectiveGradients(HeldGradients):
    """The gradients of m objectives with respect to the same parameters.

    Args:
        params: the parameters, or a function that returns them. A function is asked anew at every
            backward pass, so parameters may be added or swapped in between.
        weights: objective name -> weight, or a sequence of weights (names "0", "1", ...).
        keep_losses: sum the losses of a step's backward passes, for `combine` with a rule that
            needs them; the optimizer and `gram_first` see to it themselves.
        process_group: the processes that train these parameters together: "world", a
            torch.distributed group, or None for this process alone. See docs/distributed.md.
        gram: which Gram matrix coefficients are found from: "batch", that of a step's gradients;
            "unbiased", that of their expectation, as far as it is known. See docs/conflict.md.
        gram_ema, c_mode: of gram="unbiased"; as for `raco_fast.ClippedCAGradAdamW`.
    Raises:
        ValueError: wrong weights or options, no parameter, or a group that this process is not in.
    """

    def backward(
        self,
        losses: Mapping[str, Tensor] | Sequence[Tensor],
        *,
        scores: Tensor | None = None,
        mode: str | None = None,
        samples: Sequence[int] | Tensor | None = None,
        labelled: Labelled | None = None,
    ) -> None:
        """Backpropagate every objective's loss into that objective's gradients.

        Mode "autograd": m backward passes in weight order; the graph is kept for all but the last,
        so the losses may share a forward pass. Mode "one_backward": one pass, if the losses are
        functions of `scores` and the model was prepared. Mode "auto": both in turns in the first
        calls, then the faster one (with gram="unbiased", always one pass). Gradients add to what
        earlier calls left (micro-batches).

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
            samples: of gram="unbiased" (others do not need it): [B] integers, the sample that each
                score belongs to; samples are independent draws of the data, mostly pairs, whose two
                scores are of one. None: `raco_fast.sequences(shared_with=...)` has said it of all
                scores; or else the whole pass is one sample, and several passes of a step, or
                processes, are several, drawn alike and each weighed by its labelled scores.
            labelled: of gram="unbiased": objective -> [B] booleans, the scores that its mean is
                taken over. None: those that the loss depends on, which are fewer where a labelled
                pair has a gradient of zero (hinge).
        Raises:
            ValueError: unknown mode, or no `scores` in one that needs them; objectives missing or
                unknown, wrong number, not a scalar, a loss (with `scores`: every loss) that depends
                on nothing that requires grad; scores without a graph or of the wrong shape. Nothing
                has been backpropagated then.
            TypeError: `losses` is neither a mapping nor a sequence, or a loss is not a tensor.
            RuntimeError: the model was not prepared, or its graph is used up; with gram="unbiased",
                mode "autograd" (also where one pass is not exact) with `samples`, or of sharded
                parameters.
        """
        mode = mode or ("autograd" if scores is None else "one_backward")
        if mode not in (*MODES, "auto"):
            raise ValueError(
                f"`mode` must be 'autograd', 'one_backward' or 'auto', got {mode!r}; leave it out "
                f"for 'one_backward' with `scores` and 'autograd' without"
            )
        if scores is None and mode != "autograd":
            raise ValueError(
                f"`scores` must be given in mode {mode!r}: the [B] sequence scores that the losses "
                f"are functions of, with their graph"
            )
        given, ordered = self.checked_losses(losses, scores)
        absent = set(self.names) - set(given) - self._ran
        if self.for_rules.keep_losses and all(p.grad is None for p in self.parameters()):
            self.for_rules.forget_losses()  # model.zero_grad() does not say so
        handed_out = self._handed_out()
        try:
            said = Said(samples, labelled)
            if mode == "auto" and scores is not None and not self.expectation.wanted:
                with self.faster_mode.mode(scores.device) as faster:
                    self._propagate(ordered, scores, faster == "one_backward", said)
            else:
                self._propagate(ordered, scores, mode != "autograd", said)
        finally:
            self._ran -= absent
            for g in handed_out:  # as this pass has left them
                g.handed_out = g.versions
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

    def _propagate(
        self, ordered: list[Tensor], scores: Tensor | None, in_one: bool, said: Said
    ) -> None:
        if in_one and len(ordered) > 1:
            assert scores is not None, "checked: one backward pass starts from the scores"
            with self.alone():
                served = self._one_backward(ordered, scores, said)
            if served:
                return
        if self.expectation.wanted:
            self._backward_of_a_sample(ordered, said)
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
            self.note_all_ran()
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

    def note_all_ran(self) -> None:
        """Every objective has had its backward pass, the one of `backward`."""
        if self._several:
            mark_own(self.trained(), self.names, self.processes)
        self._held = self._held or any(p.grad is not None for p in self.trained())
        self._ran.update(self.names)

    def _backward_of_a_sample(self, losses: Sequence[Tensor], said: Said) -> None:
        """m passes whose gradients are held apart, for their own products, before they are added.

        Raises:
            RuntimeError: the samples within it would count, or its gradients are sharded.
        """
        if said.samples is not None or said.labelled is not None or self.sharded:
            raise RuntimeError(
                "gram='unbiased' has the products of single samples from one backward pass only, "
                "and this call takes one per objective: it was asked to (mode='autograd'), one "
                "pass would not be exact (a warning says why), or parameters are sharded. Use "
                "mode='one_backward' and mend what the warning names; leave `samples` and "
                "`labelled` out where whole passes, drawn alike, are the samples; or gram='batch'"
            )
        params = self.parameters()
        clear_overflow(params)
        self._notice_cleared(params)
        self._held = False  # p.grad is empty meanwhile, which does not mean that it was cleared
        products = gram_of_passes(params, self.names, lambda: self._backward_of_each(losses))
        self._held = any(p.grad is not None for p in params)
        weights = torch.tensor([[float(x.requires_grad)] for x in losses], dtype=torch.float64)
        self.expectation.samples.add(products.clone, weights)  # which is there already

    def _one_backward(self, losses: list[Tensor], scores: Tensor, said: Said) -> bool:
        """Serve all losses with one pass; False, and nothing done, where it is not exact."""
        served = self.look(losses, scores, scattered=self.sharded)
        if served is None:
            return False
        served, samples = self.parted(served, said)
        graph, check = served.graph, served.check
        params = self.parameters()
        clear_overflow(params)
        self._notice_cleared(params)
        into = self._accumulation(graph, graph.wanted, self._kept_products(graph))
        graph.retained = check is not None or bool(graph.others)
        if check is not None:
            # The gradients to be compared are formed apart, and then once more on top of what is
            # there, so that a check does not change the bits of a run.
            apart = into if into.is_fresh else self._accumulation(graph, [], None)

            def run() -> str | None:
                one_backward(graph, served.factored, apart, retain_graph=True, samples=products)
                return check.gradients_of(apart.gradients())

            products = self.products_of(served)
            if not self.exactness.checked(graph, check, run):
                return False
        if check is None or not into.is_fresh:
            products = self.products_of(served)
            kept = graph.retained
            one_backward(graph, served.factored, into, retain_graph=kept, samples=products)
        if samples is not None and products is not None:
            of_pass = products.products()
            self.expectation.samples.add(of_pass, samples.weights, divided=self.sharded)
        if not self.sharded:
            backward_of_others(graph.others, losses, self._weights.values())
        if graph.retained:
            use_up(graph)
        into.store()
        self.note_all_ran()
        return True

    def _kept_products(self, graph: ScoreGraph) -> ProductsOfPass | None:
        """What takes the products that a step needs; the pass is counted.

        Replicas' own gradients are no use to it: it takes those of their sums over processes.
        """
        last = self.passes.begin()
        euclidean = self.expectation.options.metric == "euclidean"
        if not euclidean or (self._several and not self.sharded):
            return None
        return ProductsOfPass(graph.uses, self.plan, last)

    def _accumulation(
        self, graph: ScoreGraph, params: Sequence[Tensor], products: ProductsOfPass | None
    ) -> Accumulation | ScatteredAccumulation:
        """What a pass adds to."""
        if self.sharded:
            return ScatteredAccumulation(
                graph, params, self.names, self._memory, self.processes, products
            )
        return Accumulation(params, self.names, self._memory, products)

    def parted(self, served: Pass, said: Said) -> tuple[Pass, Samples | None]:
        """A pass whose groups lie in one sample each, and its samples, where they are wanted.

        Raises:
            ValueError, TypeError: as `Samples.of`, on all processes if on one.
        """
        if not self.expectation.wanted:
            return served, None
        found: list[Samples] = []

        def decide() -> None:
            pairs = served.graph.pairs()
            found.append(Samples.of(served.A, pairs, self.names, said))

        self.together.agree(decide, 0)
        return replace(served, factored=served.factored.by_sample(found[0].of_scores)), found[0]

    def products_of(self, served: Pass) -> SampleProducts | None:
        """What collects the products of a pass that `parted` gave; None where nobody wants them."""
        if not self.expectation.wanted:
            return None
        return SampleProducts(served.factored, served.graph.shared())

    def look(
        self, losses: Sequence[Tensor], scores: Tensor, scattered: bool, hooks_run: bool = False
    ) -> Pass | None:
        """What one backward pass needs of losses for which it is exact, None where it is not."""
        named = dict(zip(self.names, losses, strict=True))
        return self.exactness.look(named, scores, self.trained(), scattered, hooks_run)
