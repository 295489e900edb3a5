"""The Gram matrix before any gradient: full fine-tuning in the memory of plain DPO.

    pass one   one backward pass from which only K_gh = ⟨t_g, t_h⟩ is kept;  M = U K Uᵀ, solve for α
    pass two   one ordinary backward pass of Σ_b (αᵀA)_b score_b:  p.grad = G0

The m gradients are never stored. Pass two costs a second activation backward; where memory allows
to keep every layer's dY until α is known, `keep_dy` forms G0 from those instead. The Gram matrix of
gradients accumulated over micro-batches has products between micro-batches, which no pass over one
of them can see, so `gram_first` takes the whole batch of a step at once.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from raco_fast.backends import ops
from raco_fast.engine.backward import backward_of_others, collect, propagate, use_up
from raco_fast.engine.gram_collector import GramCollector, hand_over_gradient
from raco_fast.engine.graph import ScoreGraph
from raco_fast.engine.spot_check import SpotCheck
from raco_fast.engine.tap import NotExactError
from raco_fast.gradients.agreement import check_settings
from raco_fast.gradients.norm_clip import along, clip_factor
from raco_fast.gradients.objective_grad import is_zero
from raco_fast.gradients.objective_gradients import ObjectiveGradients
from raco_fast.gradients.overflow import clear_overflow, leave_overflow
from raco_fast.gradients.samples import Labelled, Said
from raco_fast.optim.combine import combine
from raco_fast.optim.scattered_passes import average_in_p_grad, gram_of
from raco_fast.solver.registry import RuleLike, check_rule, spec_of
from raco_fast.solver.rule import Rule
from raco_fast.solver.solution import DualSolution
from raco_fast.solver.weights import check_max_grad_norm


def gram_first(
    gradients: ObjectiveGradients,
    losses: Mapping[str, Tensor] | Sequence[Tensor],
    scores: Tensor | None,
    *,
    c: float = 0.4,
    rule: RuleLike = "cagrad-clip",
    max_grad_norm: float | None = None,
    samples: Sequence[int] | Tensor | None = None,
    labelled: Labelled | None = None,
    keep_dy: bool = False,
    on_gradient: Callable[[Tensor], None] | None = None,
    backward: Callable[[Tensor], None] | None = None,
) -> DualSolution:
    """Write the common update direction G0 into p.grad without forming m gradients.

    Any torch optimizer can step then. Where one backward pass is not exact for the model
    (`ObjectiveGradients.backward` says when and warns), m gradients are formed after all and
    combined.

    Args:
        gradients: says which parameters and weights; its gradients must have been zeroed.
        losses, scores: as for `ObjectiveGradients.backward`, of the whole batch of a step.
        c, rule, max_grad_norm: as for `raco_fast.combine`; with a GradScaler only rules whose
            coefficients do not change with the scale of the gradients.
        samples, labelled: as for `ObjectiveGradients.backward`.
        keep_dy: keep the gradient of every layer's output until α is known, and form G0 with one
            product per layer instead of a second backward pass: faster, at the price of memory
            that grows with the number of tokens.
        on_gradient: called with every parameter as soon as its p.grad is complete, and p.grad is
            freed afterwards: an optimizer that steps here never holds all gradients at once.
        backward: called with the scalar Σ_b (αᵀA)_b score_b, whose gradient is G0, in place of a
            backward pass of our own: for wrappers that keep gradients elsewhere than in p.grad, as
            DeepSpeed's `engine.backward` does. Not called where the solution is not finite: then
            the wrapper must not step.
    Returns:
        The solution; where it is not finite, p.grad is as after `raco_fast.combine`.
    Raises:
        NotExactError: `backward` is given, and one backward pass is not exact: m gradients have
            nowhere to go.
        RuntimeError: gradients have been accumulated already: there is no second micro-batch here.
        ValueError, TypeError: as for `ObjectiveGradients.backward` and `raco_fast.combine`; its
            Gram matrix knows nothing of single elements, which metric="adam" weighs.
    """
    gradients.refuse_metric("gram_first")
    rule = check_rule(rule)
    limit, said = check_max_grad_norm(max_grad_norm), Said(samples, labelled)
    wish = _Wish(c, rule, limit, said, keep_dy, on_gradient, backward)
    gradients.for_rules.keep_losses |= rule.needs_losses
    if scores is None:
        raise ValueError(
            "`scores` must be given: the [B] sequence scores that the losses are functions of"
        )
    # The losses in the order of the weights, and p.grad empty: there is one batch in a step.
    given, ordered = gradients.checked_losses(losses, scores)
    wanted = gradients.trained()
    clear_overflow(wanted)
    gradients.together.agree(partial(_check, gradients, wanted, wish), 0)
    for p in wanted if backward is None else ():
        p.grad = None  # zeros of zero_grad(set_to_none=False)
    # A backward pass, its products included, is nothing that autocast should change.
    with torch.autocast(scores.device.type, enabled=False):
        collected = None
        if len(ordered) > 1:
            options = gradients.expectation.options
            check_settings((dict(gradients.weights), c, spec_of(rule), options), gradients.together)
            gradients.check_replicas()
            with gradients.alone():
                collected = _collected(gradients, ordered, scores, wish)
        if collected is not None:
            return _follow(collected, gradients, ordered, given, wish)
    if backward is not None:
        raise NotExactError(
            "`backward` needs one backward pass to be exact for this model, and it is not (see the "
            "warning); leave `backward` out, or mend the model"
        )
    # One backward pass is not exact here: m of them, and what they give is combined.
    gradients.backward(losses, scores=scores, mode="autograd", samples=samples, labelled=labelled)
    solution = combine(gradients, c=c, rule=rule, max_grad_norm=max_grad_norm)
    if on_gradient is not None and not solution.finite:
        gradients.zero()
    for p in wanted:
        if p.grad is not None:
            hand_over_gradient(p, on_gradient)
    return solution


@dataclass(frozen=True)
class _Wish:
    """The arguments of `gram_first` that say how, checked."""

    c: float
    rule: Rule
    max_grad_norm: float | None
    said: Said
    keep_dy: bool
    on_gradient: Callable[[Tensor], None] | None
    backward: Callable[[Tensor], None] | None


@dataclass(frozen=True)
class _Collected:
    """What pass one has found.

    `A`: ∂L/∂scores, float64 [m, B]; `M`: float64 [m, m]; `collector`: what it has kept besides,
    None where gradients have parts on several processes.
    """

    graph: ScoreGraph
    A: Tensor
    M: Tensor
    collector: GramCollector | None


def _follow(
    collected: _Collected,
    gradients: ObjectiveGradients,
    losses: Sequence[Tensor],
    given: Sequence[str],
    wish: _Wish,
) -> DualSolution:
    """Solve for α, and p.grad = G0: by pass two, or by products of what pass one has kept."""
    graph, collector, wanted = collected.graph, collected.collector, gradients.trained()
    if not gradients.sharded:
        backward_of_others(graph.others, losses, gradients.weights.values())
    if wish.keep_dy and graph.retained:
        use_up(graph)
    solver = gradients.for_rules
    solver.forget_losses()
    solver.add(zip(gradients.names, losses, strict=True))
    solution = gradients.solve(collected.M, wish.c, wish.rule, present=given)
    if not solution.finite:
        if wish.on_gradient is None and wish.backward is None:
            leave_overflow(wanted)
        return solution
    norm = float(solution.update_norm)
    factor = clip_factor(norm, wish.max_grad_norm)
    coefficients = torch.as_tensor(solution.coefficients) * factor
    seeds = coefficients @ collected.A
    if wish.backward is not None:
        with torch.enable_grad():
            wish.backward((seeds.to(graph.scores) * graph.scores).sum())
        return solution
    if collector is None:
        average_in_p_grad(graph, seeds, gradients.processes)
    elif wish.keep_dy:
        collector.combine(coefficients, wish.on_gradient)
    else:
        _ordinary_pass(graph, seeds, wish.on_gradient)
    for p in wanted:
        if p.grad is not None:
            unbiased = gradients.expectation.wanted
            p.grad = along(p.grad, norm, wish.max_grad_norm, wish.rule, unbiased=unbiased)
    return solution


def _check(gradients: ObjectiveGradients, wanted: Sequence[Tensor], wish: _Wish) -> None:
    """Raise where "gram_first" is not possible."""
    of_one_process = wish.keep_dy or wish.on_gradient is not None
    if wish.backward is not None:
        if of_one_process:
            raise ValueError(
                "`backward` must be None with `keep_dy` or `on_gradient`, which form G0 otherwise; "
                "leave one of both out"
            )
        if len(gradients.names) == 1:
            raise ValueError(
                "`backward` is for several objectives, got one; call it with the loss itself"
            )
        return
    if of_one_process and gradients.scattered:
        raise ValueError(
            "`keep_dy` and `step_in_backward` are for one process without sharded parameters: with "
            "others every gradient has to be reduced first; leave them out"
        )
    if not all(p.grad is None or is_zero(p.grad) for p in wanted):
        raise RuntimeError(
            "gram_first cannot add to gradients that are there already: the Gram matrix of a sum "
            "over micro-batches needs all of them; call zero_grad() first and pass the whole batch "
            "at once, or accumulate with backward(losses, scores=scores)"
        )


def _collected(
    gradients: ObjectiveGradients, losses: Sequence[Tensor], scores: Tensor, wish: _Wish
) -> _Collected | None:
    """Pass one; None where it would be wrong."""
    scattered = gradients.scattered
    served = gradients.look(losses, scores, scattered, hooks_run=wish.backward is not None)
    if served is None:
        return None
    served, samples = gradients.parted(served, wish.said)
    graph, check = served.graph, served.check
    of_step = gradients.expectation.samples
    of_step.forget()
    if scattered:
        products = gradients.products_of(served)
        M = gram_of(served, len(losses), gradients.exactness, gradients.processes, products)
        if M is not None and samples is not None and products is not None:
            of_step.add(products.products(), samples.weights, divided=True)
        return None if M is None else _Collected(graph, served.A, M, None)
    apart, keep = check is not None, wish.keep_dy
    collector = GramCollector(served.factored, graph.wanted, graph.shared(), keep=keep, apart=apart)
    retained = not keep or apart or bool(graph.others)

    def run() -> str | None:
        collect(collector.collect, graph, served.factored.seeds, retain_graph=retained)
        collector.add_products_of_uses()
        return check.grams_of(collector.grams()) if isinstance(check, SpotCheck) else None

    if check is None:
        run()
    elif not gradients.exactness.checked(graph, check, run):
        return None
    graph.retained = retained
    if samples is not None:
        of_step.add(collector.sample_products(), samples.weights)
    return _Collected(graph, served.A, ops.within_cauchy_schwarz(collector.gram()), collector)


def _ordinary_pass(
    graph: ScoreGraph, seeds: Tensor, on_gradient: Callable[[Tensor], None] | None
) -> None:
    """p.grad = the gradient of Σ_b seeds_b score_b, each handed over as soon as it is there."""
    with ExitStack() as stack:
        if on_gradient is not None:
            for p in graph.wanted:
                take = partial(hand_over_gradient, on_gradient=on_gradient)
                hook = p.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]
                stack.callback(hook.remove)
        propagate(graph.scores, seeds, inputs=graph.wanted)
