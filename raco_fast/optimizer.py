"""`ClippedCAGradAdamW`: AdamW along one direction that respects m objectives and their weights.

step():   M = ⟨g_i, g_j⟩        of the accumulated gradients, once per step
          α = solve_dual(M)     DESIGN: CAGrad-Clip, on m numbers
          G0 = Σ α_i g_i        AdamW's gradient; ‖G0‖ is known from M, so clipping costs nothing

Everything else is `torch.optim.AdamW`: constructor, state, checkpoints, schedulers, hooks.
Source: arXiv 2602.02495, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from raco_fast import ops
from raco_fast.dual import DualSolution, check_c, check_rule, solve_dual
from raco_fast.gradients import ObjectiveGradients, check_max_grad_norm, clip_factor
from raco_fast.reference import AdamWOptions

_OWN_STATE = "raco"  # key of our part of a state_dict; torch.optim.AdamW reads past it


class ClippedCAGradAdamW(AdamW):
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

    Args:
        params: parameters or parameter groups (own lr, betas, eps, weight_decay, ... per group).
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        weights: objective name -> weight, or a sequence of weights (names "0", "1", ...);
            non-negative, sum 1.
        c: radius of the search around the weighted gradient, 0 <= c < 1.
        rule: "cagrad-clip", "cagrad", "linear" or "mgda".
        max_grad_norm: clip ‖G0‖ over all parameters, as `torch.nn.utils.clip_grad_norm_`.
        amsgrad, maximize, foreach, capturable, differentiable, fused: as in `torch.optim.AdamW`.
            Gradient combination itself synchronizes with the host, so `capturable` fixes the
            state's layout but a step cannot be captured in a CUDA graph.
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
        rule: str = "cagrad-clip",
        max_grad_norm: float | None = None,
        amsgrad: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        self.c = check_c(c)
        self.rule = check_rule(rule)
        check_max_grad_norm(max_grad_norm)
        self.gradients = ObjectiveGradients(self._parameters, weights)
        self.max_grad_norm = max_grad_norm
        self.solution: DualSolution | None = None
        self.skipped_steps = 0
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
    def weights(self) -> dict[str, float]:
        """Objective name -> weight."""
        return self.gradients.weights

    def backward(self, losses: Mapping[str, Tensor] | Sequence[Tensor]) -> None:
        """Backpropagate every objective's loss; see `ObjectiveGradients.backward`."""
        self.gradients.backward(losses)

    def objective(self, name: str) -> AbstractContextManager[None]:
        """Backward passes inside the block belong to `name`; see `ObjectiveGradients.objective`."""
        return self.gradients.objective(name)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear p.grad and with it the accumulated gradients of every objective."""
        super().zero_grad(set_to_none)
        self.gradients.forget()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Solve for the common direction and take one AdamW step along it.

        Args:
            closure: re-evaluates the model: zeroes the gradients, runs `backward` for every
                objective, and returns whatever `step` is to return (a loss, or a dict of losses).
        Returns:
            The closure's result, or None.
        Raises:
            RuntimeError: several objectives, and one has had no backward pass since the gradients
                were zeroed, or p.grad was filled outside of any objective.
            TypeError: a sparse gradient.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        with torch.set_grad_enabled(bool(self.defaults["differentiable"])):
            self._step()
        return result

    def _step(self) -> None:
        self.gradients.check_complete()
        touched = self.gradients.touched()
        scale = self._loss_scale()
        M = ops.gram(self.gradients.lists(touched)) / scale**2
        if self._found_inf():
            M.fill_(torch.nan)
        self.solution = solution = solve_dual(M, self.weights, self.c, self.rule)
        if not solution.finite:
            self.skipped_steps += 1
            return
        factor = clip_factor(float(solution.update_norm), self.max_grad_norm)
        coefficients = torch.as_tensor(solution.coefficients) * (factor / scale)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params, coefficients)

    def _update(self, group: dict[str, Any], params: list[Tensor], coefficients: Tensor) -> None:
        states = [self._state_of(p, group) for p in params]
        ops.combine_adamw(
            params,
            self.gradients.lists(params),
            coefficients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else [],
            [state["step"] for state in states],
            **_options_of(group),
        )

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """AdamW's state of p, made at p's first step: same keys, dtypes and devices."""
        state: dict[str, Tensor] = self.state[p]
        if not state:
            wide = torch.get_default_dtype() == torch.float64 and not group["fused"]
            on_device = group["capturable"] or group["fused"]
            state["step"] = torch.zeros(
                (),
                dtype=torch.float64 if wide else torch.float32,
                device=p.device if on_device else "cpu",
            )
            names = ["exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * group["amsgrad"]]
            for name in names:
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state

    def _loss_scale(self) -> float:
        """GradScaler's factor that is still in the gradients; 1 after `scaler.unscale_`."""
        scale = getattr(self, "grad_scale", None)
        return 1.0 if scale is None else float(scale)

    def _found_inf(self) -> bool:
        return float(getattr(self, "found_inf", 0.0)) > 0.0

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state_dict plus the key "raco" (weights, c, rule, ...), which AdamW ignores."""
        state_dict: dict[str, Any] = super().state_dict()
        state_dict[_OWN_STATE] = {
            "weights": dict(self.weights),
            "c": self.c,
            "rule": self.rule,
            "max_grad_norm": self.max_grad_norm,
            "skipped_steps": self.skipped_steps,
        }
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class or of `torch.optim.AdamW`.

        As torch does for lr, the saved weights, c, rule and max_grad_norm replace the
        constructor's; a checkpoint of AdamW has none, and the constructor's stay.

        Raises:
            ValueError: the checkpoint is for other objectives (nothing has been loaded then), or
                its parameter groups do not fit.
        """
        own = state_dict.get(_OWN_STATE)
        if own is not None and tuple(own["weights"]) != self.objective_names:
            raise ValueError(
                f"`state_dict` is of an optimizer for the objectives {tuple(own['weights'])}, this "
                f"one has {self.objective_names}; build it with the checkpoint's `weights`, or "
                f"delete state_dict[{_OWN_STATE!r}] to keep only AdamW's state"
            )
        super().load_state_dict(state_dict)
        if own is not None:
            self.gradients.weights = dict(own["weights"])
            self.c = own["c"]
            self.rule = own["rule"]
            self.max_grad_norm = own["max_grad_norm"]
            self.skipped_steps = own["skipped_steps"]

    def __getstate__(self) -> dict[str, Any]:
        own = ("gradients", "c", "rule", "max_grad_norm", "solution", "skipped_steps")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __repr__(self) -> str:
        backends = [
            ops.update_backend(group["params"], _options_of(group)) for group in self.param_groups
        ]
        own = {
            "weights": self.weights,
            "c": self.c,
            "rule": self.rule,
            "max_grad_norm": self.max_grad_norm,
            "backend": ", ".join(dict.fromkeys(backends)),
        }
        lines = "".join(f"{name}: {value}\n" for name, value in own.items())
        return super().__repr__().removesuffix(")") + lines + ")"


def _options_of(group: dict[str, Any]) -> AdamWOptions:
    beta1, beta2 = group["betas"]
    return {
        "lr": group["lr"],
        "beta1": beta1,
        "beta2": beta2,
        "eps": group["eps"],
        "weight_decay": group["weight_decay"],
        "amsgrad": group["amsgrad"],
        "maximize": group["maximize"],
        "foreach": group["foreach"],
        "capturable": group["capturable"],
        "differentiable": group["differentiable"],
        "fused": group["fused"],
    }
