"""`ClippedCAGradAdamW`: AdamW along one direction that respects m objectives and their weights.

step():   M = ⟨g_i, g_j⟩        of the accumulated gradients, once per step
          α = solve_dual(M)     CAGrad-Clip, on m numbers
          G0 = Σ α_i g_i        AdamW's gradient; ‖G0‖ is known from M, so clipping costs nothing

Everything else is `torch.optim.AdamW`: constructor, state, checkpoints, schedulers, hooks.
Source: arXiv 2602.02495, Algorithm 1.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from raco_fast.backends import choose, ops
from raco_fast.backends.types import AdamWOptions, Call
from raco_fast.distributed.processes import GroupLike
from raco_fast.gradients.norm_clip import clip_factor
from raco_fast.gradients.objective_grad import Touched, along_p_grad, here, joined
from raco_fast.gradients.reduced import Reduced
from raco_fast.gradients.samples import Labelled
from raco_fast.gradients.second_moments import SecondMoments
from raco_fast.optim.adamw_part import asks_for_states, make_states, stepping, updates
from raco_fast.optim.direction import Direction, refuse_scaled
from raco_fast.optim.gram_first import gram_first
from raco_fast.optim.lost_updates import LostUpdates
from raco_fast.optim.metric import second_moments
from raco_fast.optim.settings import AdamWWithSettings, check_group
from raco_fast.solver import on_device
from raco_fast.solver.dual import solve_dual
from raco_fast.solver.gram_options import GramOptions
from raco_fast.solver.on_device import DeviceStep
from raco_fast.solver.registry import RuleLike, label_of
from raco_fast.solver.solution import DualSolution


class ClippedCAGradAdamW(AdamWWithSettings):
    """AdamW on the CAGrad-Clip combination of several objectives' gradients.

    With one objective and c = 0 it is `torch.optim.AdamW` (a plain `loss.backward()` then counts
    as that objective's), except that a step whose gradient is not finite is skipped: to the last
    bit on the "reference" backend, to rounding on the faster "cpu" backend, which repr names and
    `raco_fast.backend` forces. With several, each backward pass belongs to an objective:

        opt.backward({"helpful": loss_h, "harmless": loss_s}); opt.step(); opt.zero_grad()

    Gradients add up over backward passes until `zero_grad()`; the dual problem is solved once per
    `step()`. A parameter that an objective does not touch has gradient zero there; one that no
    objective touches is left alone, with its state. `step()` leaves p.grad as it was (one
    objective: the gradient; several: an `ObjectiveGrad`, read it with `opt.gradients.of(p)`).

    A step with a non-finite Gram changes no parameter and no state: `skipped_steps` counts it and
    `solution.finite` is False. GradScaler works as with any optimizer: scale each loss, then
    `scaler.step(opt)`; also with `scaler.unscale_(opt)`.

    The settings `weights`, `c`, `rule`, `gram`, `gram_ema`, `c_mode`, `metric`, `max_grad_norm`,
    `rounding` and `seed` are attributes that may be set between steps, and are checked then:
    `opt.weights = {"helpful": 0.7, ...}`. An objective of weight 0 needs no loss; a step without
    one is solved for the others, and has zeros for it in `solution`.

    Args:
        params: parameters or parameter groups (own lr, betas, eps, weight_decay, ... per group).
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        weights: objective name -> weight, or a sequence of weights (names "0", "1", ...);
            non-negative, sum 1.
        c: radius of the search around the weighted gradient, 0 <= c < 1.
        rule: "cagrad-clip", "cagrad", "linear", "mgda", or another of docs/rules.md, as a name, as
            {"name": name, option: value} or as a `raco_fast.Rule`.
        max_grad_norm: clip ‖G0‖ over all parameters, as `torch.nn.utils.clip_grad_norm_`.
        rounding: of bfloat16 parameters (others are not affected): "nearest", "stochastic" or
            "split" (an exact float32 weight, 2 bytes more); docs/backends.md compares them. A
            parameter group may have its own. Where nearest drops most updates of 16-bit
            parameters, a warning says so, once; it looks at steps 1, 2, 4, 8, ... that are not
            captured, nor taken in a backward pass.
        seed: of stochastic rounding, together with the step count; any integer.
        process_group: the processes that train together, each on its own part of a batch: "world"
            (all, once torch.distributed is initialised), a process group, or None for this process
            alone beside independent runs. docs/distributed.md says what they send.
        gram: which Gram matrix the coefficients are found from: "batch", that of a step's
            gradients, as in the paper; "unbiased", an estimate of that of their expectation, which
            the noise of a batch does not bias (docs/conflict.md; this library's own method). It
            needs `backward(losses, scores=scores)`; the update stays that of the batch's gradients.
        gram_ema: of "unbiased": what a step keeps of the average over those before, in (0, 1).
            None chooses it from the noise: an average over 20 to 200 steps.
        c_mode: of "unbiased": whose norms the length of CAGrad's correction is found from: the
            "batch"'s, as in the paper, or the "signal"'s, which noise does not lengthen.
        metric: in which gradients are multiplied with each other for the matrix that is solved:
            "euclidean", as in the paper, or "adam", elementwise by lr / (√v̂ + eps) of the state
            before the step, in which AdamW's update is a gradient step (docs/method.md; ours, and
            unreviewed). Norms, `max_grad_norm` too, stay Euclidean. Not with "unbiased", mode
            "gram_first" or `combine`.
        amsgrad, maximize, foreach, capturable, differentiable, fused: as in `torch.optim.AdamW`.
            With `capturable` in every group, parameters on one CUDA device and at most 2
            objectives, `step()` never waits for the device and can be captured in a CUDA graph,
            after at least one step outside of it (see docs/backends.md); `solution` and
            `skipped_steps` wait for the device when they are read. Elsewhere `capturable` fixes
            the state's layout only.
    Raises:
        ValueError, TypeError: an argument outside its range (names it, the rule and the cure).
    """

    # Makes GradScaler hand over grad_scale and found_inf instead of unscaling p.grad itself.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        weights: Mapping[str, float] | Sequence[float],
        c: float = 0.4,
        rule: RuleLike = "cagrad-clip",
        max_grad_norm: float | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        process_group: GroupLike = "world",
        gram: str = "batch",
        gram_ema: float | None = None,
        c_mode: str = "batch",
        metric: str = "euclidean",
        amsgrad: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        options = GramOptions(gram, gram_ema, c_mode, metric)
        self.settle(weights, c, rule, max_grad_norm, rounding, seed, process_group, options)
        self._solution: DualSolution | None = None
        self._skipped_on_host = 0
        self._on_device: DeviceStep | None = None
        self._direction: Direction | None = None
        self._lost_updates = LostUpdates()
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )

    @property
    def objective_names(self) -> tuple[str, ...]:
        """The objectives in the order of every [m] and [m, m] array in `solution`."""
        return self.gradients.names

    @property
    def solution(self) -> DualSolution | None:
        """The dual solution of the last step; read from the device if it was solved there."""
        return self._solution if self._on_device is None else self._on_device.solution()

    @property
    def skipped_steps(self) -> int:
        """The number of steps whose gradients were not finite."""
        return self._skipped_on_host + (0 if self._on_device is None else self._on_device.skipped)

    @skipped_steps.setter
    def skipped_steps(self, count: int) -> None:
        if self._on_device is not None:
            self._on_device.skipped = 0
        self._skipped_on_host = count

    def backward(
        self,
        losses: Mapping[str, Tensor] | Sequence[Tensor],
        *,
        scores: Tensor | None = None,
        mode: str | None = None,
        samples: Sequence[int] | Tensor | None = None,
        labelled: Labelled | None = None,
        keep_dy: bool = False,
        step_in_backward: bool = False,
    ) -> None:
        """Backpropagate every objective's loss; see `ObjectiveGradients.backward`.

        Args:
            losses, scores, samples, labelled: as there.
            mode: as there, or "gram_first": the common direction is found before any gradient is
                formed, and p.grad holds it until `step()`; see `raco_fast.gram_first`.
            keep_dy: of "gram_first".
            step_in_backward: of "gram_first": update each parameter as soon as its gradient exists
                and free the gradient; `step()` then has nothing left to do. Not with GradScaler,
                which has to see the gradients first.
        Raises:
            RuntimeError: p.grad still holds the common direction of an earlier "gram_first"; or
                `step_in_backward` with losses that a GradScaler has scaled.
        """
        if mode != "gram_first":
            if keep_dy or step_in_backward:
                raise ValueError(
                    f"`keep_dy` and `step_in_backward` need mode='gram_first', got mode={mode!r}"
                )
            self._leave_direction()
            self.gradients.backward(
                losses, scores=scores, mode=mode, samples=samples, labelled=labelled
            )
            return
        on_gradient = None
        if step_in_backward:
            refuse_scaled(losses)
            on_gradient = stepping(self.param_groups, self.state, self.rounding, self.seed)
        self._solution = solution = gram_first(
            self.gradients,
            losses,
            scores,
            c=self.c,
            rule=self._rule,
            max_grad_norm=self.max_grad_norm if step_in_backward else None,
            samples=samples,
            labelled=labelled,
            keep_dy=keep_dy,
            on_gradient=on_gradient,
        )
        self._direction = Direction(
            self._parameters(), finite=bool(solution.finite), taken=step_in_backward
        )

    def objective(self, name: str) -> AbstractContextManager[None]:
        """Backward passes inside the block belong to `name`; see `ObjectiveGradients.objective`."""
        self._leave_direction()
        return self.gradients.objective(name)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear p.grad and with it the accumulated gradients of every objective."""
        super().zero_grad(set_to_none)
        self.gradients.forget()
        self._direction = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Solve for the common direction and take one AdamW step along it.

        Args:
            closure: re-evaluates the model: zeroes the gradients, runs `backward` for every
                objective, and returns whatever `step` is to return (a loss, or a dict of losses).
        Returns:
            The closure's result, or None.
        Raises:
            RuntimeError: several objectives, and one has had no backward pass since the gradients
                were zeroed, or p.grad was filled outside of any objective; or a GradScaler steps
                after `step_in_backward`.
            TypeError: a sparse gradient.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        try:
            with torch.set_grad_enabled(bool(self.defaults["differentiable"])):
                self._step()
        except (RuntimeError, TypeError, ValueError):
            # GradScaler deletes these after a step that returns, and multiplies by those it finds.
            for name in ("grad_scale", "found_inf"):
                self.__dict__.pop(name, None)
            raise
        return result

    def _step(self) -> None:
        for group in self.param_groups:
            check_group(group)
        if self._direction is not None and self._direction.holds(self._parameters()):
            self._step_along(self._direction)
            return
        self._direction = None
        if len(self.objective_names) > 1 and asks_for_states(self.param_groups, self.state):
            make_states(self.param_groups, self.state, self.rounding)
            return
        reduced = self.gradients.reduced(group["params"] for group in self.param_groups)
        params, _ = joined(reduced.groups)
        obstacle = self._waits(reduced)
        if obstacle is None:
            self._step_on_device(reduced, params[0].device)
        elif params and params[0].is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"this step cannot be captured in a CUDA graph: {obstacle}; take it outside of "
                f"the graph"
            )
        else:
            self._step_through_host(reduced)

    def _waits(self, reduced: Reduced) -> str | None:
        """Why a step has to wait for the device; None if it need not."""
        if not all(group["capturable"] for group in self.param_groups):
            return "a parameter group has capturable=False"
        if self.gradients.expectation.wanted:
            return "gram='unbiased' is estimated on the host"
        if self._turned:
            return "metric='adam' is solved on the host"
        if self.gradients.present != self.objective_names:
            return "an objective of weight 0 has no loss"
        if reduced.waits is not None:
            return reduced.waits
        groups = [here(group) for group in reduced.groups]
        grads = joined(groups).grads
        m = len(grads)
        calls = [Call("gram", m, (), grads)]
        for group, (params, of_group) in zip(self.param_groups, groups, strict=True):
            options = AdamWOptions.of(group)
            calls += [Call("combine_adamw", m, [params], of_group, options)] if params else []
        found = (choose.waits(call, self.gradients.plan) for call in calls)
        return on_device.obstacle(m, label_of(self._rule)) or next(filter(None, found), None)

    def _step_through_host(self, reduced: Reduced) -> None:
        """The general step: one wait for the device, for the Gram matrix."""
        self._leave_device()
        moments = second_moments(self.param_groups, self.state) if self._turned else None
        M, in_metric, scale = self._gram(reduced, moments)
        self._solution = solution = self.gradients.solve(
            M, self.c, self._rule, scale=scale, in_metric=in_metric
        )
        self._update(reduced, solution, scale)

    @property
    def _turned(self) -> bool:
        """Whether the matrix that is solved is in the metric of the update."""
        return self.metric == "adam" and len(self.objective_names) > 1

    def _leave_direction(self) -> None:
        if self._direction is not None:
            self._direction.check_cleared(self._parameters())
            self._direction = None

    def _step_along(self, direction: Direction) -> None:
        """After mode "gram_first": p.grad holds the common direction already."""
        direction.check_unscaled(getattr(self, "grad_scale", None))
        self._leave_device()
        if not direction.finite:
            self._skipped_on_host += 1
        elif not direction.taken:
            groups = [along_p_grad(group["params"]) for group in self.param_groups]
            reduced = self.gradients.reduced_groups(groups)
            M, _, scale = self._gram(reduced, None)
            self._update(reduced, solve_dual(M, [1.0], c=0.0), scale)
            return  # the same gradients may be stepped along again, as with AdamW
        self._direction = None

    def _gram(
        self, reduced: Reduced, moments: SecondMoments | None
    ) -> tuple[Tensor, Tensor | None, float]:
        """(Gram of the unscaled gradients, that in their moments' metric where there is one,
        GradScaler's factor that is still in them).
        """
        asked = [getattr(self, name, None) for name in ("grad_scale", "found_inf")]
        numbers = [x for x in asked if isinstance(x, Tensor)]
        M, values = reduced.gram(numbers, self._settings_of_step, moments)
        read = iter(values)
        scale, found_inf = (next(read) if isinstance(x, Tensor) else x for x in asked)
        scale = 1.0 if scale is None else float(scale)
        M /= scale**2
        if found_inf:
            M.fill_(torch.nan)
        if moments is None:
            return M, None, scale
        M, in_metric = M
        if not M.isfinite().all():
            in_metric.fill_(torch.nan)
        # Zero, where gradients are not: no element of theirs has a second moment yet.
        known = bool((in_metric.diagonal() != 0.0).any())
        return M, in_metric if known else None, scale

    def _settings_of_step(self) -> dict[str, Any]:
        """What a step depends on besides gradients; numbers on a device are not waited for."""
        names = ("lr", "betas", "eps", "weight_decay")
        own = self._settings()
        for result in ("rule_state", "gram_state", "skipped_steps"):
            del own[result]
        groups = [[group[name] for name in names] for group in self.param_groups]
        return {**own, "groups": [[x for x in g if not isinstance(x, Tensor)] for g in groups]}

    def _update(self, reduced: Reduced, solution: DualSolution, scale: float) -> None:
        """AdamW along the solution's combination of each group's gradients."""
        if not solution.finite:
            self._skipped_on_host += 1
            return
        factor = clip_factor(float(solution.update_norm), self.max_grad_norm)
        coefficients = torch.as_tensor(solution.coefficients) * (factor / scale)
        groups, along = reduced.along(coefficients)
        with self._lost_updates.watched(self.param_groups, groups, self.state, self.rounding):
            self._take(groups, along)

    def _step_on_device(self, reduced: Reduced, device: torch.device) -> None:
        """The step of `capturable`: nothing waits, nothing is read back."""
        m = len(self.objective_names)
        if self._on_device is None or self._on_device.device != device:
            self._leave_device()
            self._on_device = DeviceStep(m, device)
        coefficients = self._on_device.solve(
            reduced.gram_on_device(),
            self.weights,
            self.c,
            label_of(self._rule),
            self.max_grad_norm,
            getattr(self, "grad_scale", None),
            getattr(self, "found_inf", None),
        )
        self._take(reduced.groups, coefficients)

    def _leave_device(self) -> None:
        """Read the solution and the skipped steps from the device; later steps are on the host."""
        if self._on_device is not None:
            self._solution, self._skipped_on_host = self.solution, self.skipped_steps
            self._on_device = None

    def _take(self, groups: Sequence[Touched], coefficients: Tensor) -> None:
        for update in updates(self.param_groups, groups, self.state, self.rounding, self.seed):
            ops.combine_adamw(update, coefficients, self.gradients.plan)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def __getstate__(self) -> dict[str, Any]:
        of_steps = {"_solution": self.solution, "_skipped_on_host": self.skipped_steps}
        # A copy begins without gradients, wherever they are: on the device or in p.grad.
        anew = {"_on_device": None, "_direction": None, "_lost_updates": LostUpdates()}
        return {**super().__getstate__(), **of_steps, **anew}

    def __repr__(self) -> str:
        backends = []
        for group in self.param_groups:
            of_group, options = [group["params"]], AdamWOptions.of(group)
            backends.append(choose.name_of(Call("combine_adamw", 1, of_group, of_group, options)))
        own = {
            "weights": dict(self.weights),
            "c": self.c,
            "rule": label_of(self._rule),
            "max_grad_norm": self.max_grad_norm,
            "gram": self.gram,
            "metric": self.metric,
            "rounding": self.rounding,
            "backend": ", ".join(dict.fromkeys(backends)),
        }
        lines = "".join(f"{name}: {value}\n" for name, value in own.items())
        groups = super().__repr__().replace("    raco: None\n", "")
        return groups.removesuffix(")") + lines + ")"
