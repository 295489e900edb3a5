"""The Gram matrix before any gradient: full fine-tuning in the memory of plain DPO.

    pass one   one backward pass from which only K_gh = ⟨t_g, t_h⟩ is kept;  M = U K Uᵀ, solve for α
    pass two   one ordinary backward pass of Σ_b (αᵀA)_b score_b:  p.grad = G0

The m gradients are never stored. Pass two costs a second activation backward; where memory allows
to keep every layer's dY until α is known, `keep_dy` forms G0 from those instead. The Gram matrix of
gradients accumulated over micro-batches has products between micro-batches, which no pass over one
of them can see, so `gram_first` takes the whole batch of a step at once.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from raco_fast import ops
from raco_fast.clipping import ClippedGrad, clip_factor
from raco_fast.combined import combine
from raco_fast.dual import DualSolution, solve_present
from raco_fast.gradients import ObjectiveGradients
from raco_fast.inspection import Inspection
from raco_fast.objective_grad import is_zero
from raco_fast.objective_losses import given_names, ordered_losses
from raco_fast.objectives import check_max_grad_norm
from raco_fast.one_backward import arranged, collect, propagate, sensitivities
from raco_fast.overflow import clear_overflow, leave_overflow
from raco_fast.segments import ALL_ROWS, Factored
from raco_fast.tap import Call, collecting
from raco_fast.uses import Use, cross


def gram_first(
    gradients: ObjectiveGradients,
    losses: Mapping[str, Tensor] | Sequence[Tensor],
    scores: Tensor | None,
    *,
    c: float = 0.4,
    rule: str = "cagrad-clip",
    max_grad_norm: float | None = None,
    keep_dy: bool = False,
    on_gradient: Callable[[Tensor], None] | None = None,
) -> DualSolution:
    """Write the common update direction G0 into p.grad without forming m gradients.

    Any torch optimizer can step then. Where one backward pass is not exact for the model
    (`ObjectiveGradients.backward` says when and warns), m gradients are formed after all and
    combined.

    Args:
        gradients: says which parameters and weights; its gradients must have been zeroed.
        losses, scores: as for `ObjectiveGradients.backward`, of the whole batch of a step.
        c, rule, max_grad_norm: as for `raco_fast.combine`.
        keep_dy: keep the gradient of every layer's output until α is known, and form G0 with one
            product per layer instead of a second backward pass: faster, at the price of memory
            that grows with the number of tokens.
        on_gradient: called with every parameter as soon as its p.grad is complete, and p.grad is
            freed afterwards: an optimizer that steps here never holds all gradients at once.
    Returns:
        The solution; where it is not finite, p.grad is as after `raco_fast.combine`.
    Raises:
        RuntimeError: gradients have been accumulated already: there is no second micro-batch here.
        ValueError, TypeError: as for `ObjectiveGradients.backward` and `raco_fast.combine`.
    """
    max_grad_norm = check_max_grad_norm(max_grad_norm)
    if scores is None:
        raise ValueError(
            "`scores` must be given: the [B] sequence scores that the losses are functions of"
        )
    given = given_names(losses, gradients.weights)
    ordered = ordered_losses(losses, scores, gradients.names, given)
    wanted = gradients.trained()
    clear_overflow(wanted)
    if not all(p.grad is None or is_zero(p.grad) for p in wanted):
        raise RuntimeError(
            "gram_first cannot add to gradients that are there already: the Gram matrix of a sum "
            "over micro-batches needs all of them; call zero_grad() first and pass the whole batch "
            "at once, or accumulate with backward(losses, scores=scores)"
        )
    for p in wanted:
        p.grad = None  # zeros of zero_grad(set_to_none=False)
    if len(ordered) == 1 or not gradients.exact(ordered, scores):
        gradients.backward(losses, scores=scores)
        solution = combine(gradients, c=c, rule=rule, max_grad_norm=max_grad_norm)
        if on_gradient is not None and not solution.finite:
            gradients.zero()
        for p in wanted:
            if p.grad is not None:
                _hand_over(p, on_gradient)
        return solution
    # A backward pass, its products included, is nothing that autocast should change.
    with torch.autocast(scores.device.type, enabled=False):
        A = sensitivities(ordered, scores)
        inspection = Inspection(ordered, scores, wanted)
        collector = GramCollector(Factored.of(A), wanted, inspection.shared(), keep=keep_dy)
        collect(collector, scores, collector.factored.seeds, wanted, retain_graph=not keep_dy)
        M = ops.within_cauchy_schwarz(collector.gram())
        solution = solve_present(M, gradients.weights, given, c, rule)
        if not solution.finite:
            if on_gradient is None:
                leave_overflow(wanted)
            return solution
        norm = float(solution.update_norm)
        coefficients = torch.as_tensor(solution.coefficients) * clip_factor(norm, max_grad_norm)
        if keep_dy:
            collector.combine(coefficients, on_gradient)
        elif on_gradient is None:
            propagate(scores, coefficients @ A)
        else:
            handing_over = _HandingOver(inspection.uses, on_gradient)
            with collecting(handing_over):
                propagate(scores, coefficients @ A)
            handing_over.flush()
        if max_grad_norm is not None:
            for p in wanted:
                if p.grad is not None:
                    p.grad = ClippedGrad.of(p.grad, norm, max_grad_norm)
    return solution


def _hand_over(p: Tensor, on_gradient: Callable[[Tensor], None] | None) -> None:
    if on_gradient is not None:
        on_gradient(p)
        p.grad = None


class GramCollector:
    """Adds up K over the layers; keeps the calls that are needed again.

    Args:
        factored: A = U · seeds.
        wanted: the parameters whose gradients count.
        shared: those that several calls use, so that products between their uses count as well.
        keep: keep every call, for `combine`.
    """

    def __init__(
        self, factored: Factored, wanted: Sequence[Tensor], shared: set[Tensor], *, keep: bool
    ) -> None:
        self.factored = factored
        self._wanted, self._shared, self._keep = set(wanted), shared, keep
        groups = factored.coefficients.shape[1]
        self._K = torch.zeros(groups, groups, dtype=torch.float64)
        self._calls: list[Call] = []
        self._users: dict[Tensor, list[Call]] = defaultdict(list)

    def collect(self, call: Call) -> None:
        """K += ⟨t_g, t_h⟩ of the parameters of one layer."""
        used = set()
        for p, _, use in call.uses(arranged(self.factored, call)):
            if p in self._wanted:
                self._K = self._K.to(p.device) + use.gram()
                used.add(p)
        for p in used & self._shared:
            self._users[p].append(call)
        if self._keep and used:
            self._calls.append(call)

    @torch.no_grad()
    def gram(self) -> Tensor:
        """M = U K Uᵀ, float64 [m, m] on the CPU."""
        K = self._K.cpu()
        for p, calls in self._users.items():
            for first, second in combinations(calls, 2):
                a, b = (call.rows(p, arranged(self.factored, call)) for call in (first, second))
                part = cross(a, b, p, len(K)).cpu()
                K = K + part + part.T
        U = self.factored.coefficients
        M = U @ K @ U.T
        return (M + M.T) / 2

    @torch.no_grad()
    def combine(self, coefficients: Tensor, on_gradient: Callable[[Tensor], None] | None) -> None:
        """p.grad = Σ_g (αᵀU)_g t_g, one product per layer."""
        U = (coefficients @ self.factored.coefficients)[None]
        for call in self._calls:
            uses = call.uses(arranged(self.factored, call))
            for p in _add_gradients(uses, self._wanted, U) - self._shared:
                _hand_over(p, on_gradient)
        for p in self._users:
            _hand_over(p, on_gradient)
        self._calls.clear()


class _HandingOver:
    """Forms ordinary gradients and hands each parameter over once all its uses are added up.

    It waits for the next layer's turn: until then the parameter's own layer still needs its value,
    for the gradient of its input.
    """

    def __init__(self, uses: Counter[Tensor], on_gradient: Callable[[Tensor], None]) -> None:
        self._left, self._on_gradient = Counter(uses), on_gradient
        self._complete: list[Tensor] = []

    def collect(self, call: Call) -> None:
        self.flush()
        for p in _add_gradients(call.uses(ALL_ROWS), self._left, None):
            self._left[p] -= 1
            if not self._left[p]:
                self._complete.append(p)

    def flush(self) -> None:
        for p in self._complete:
            _hand_over(p, self._on_gradient)
        self._complete.clear()


def _add_gradients(
    uses: Iterable[tuple[Tensor, slice, Use]], wanted: Container[Tensor], U: Tensor | None
) -> set[Tensor]:
    """p.grad += Σ_g U_g t_g for the wanted parameters of one layer, which are returned."""
    fresh: dict[Tensor, bool] = {}
    for p, rows, use in uses:
        if p in wanted:
            fresh.setdefault(p, p.grad is None)
            if p.grad is None:
                p.grad = torch.empty_like(p, memory_format=torch.contiguous_format)
            use.add_to(p.grad[None, rows], U, fresh[p])
    return set(fresh)
