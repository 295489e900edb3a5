"""`verify`: hold every mode against autograd on the user's own model and batch."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raco_fast.distributed.dtensor import is_dtensor
from raco_fast.engine.prepare import prepare
from raco_fast.engine.spot_check import ANOTHER_SCALE, rounding_bound
from raco_fast.engine.tap import Checks
from raco_fast.gradients.objective_gradients import ObjectiveGradients
from raco_fast.optim.gram_first import gram_first

Batch = Callable[[nn.Module], tuple[Mapping[str, Tensor], Tensor]]
"""model -> (objective name -> loss, scores [B]), with a fresh graph at every call."""

_Gradients = dict[Tensor, Tensor]
"""Parameter -> float64 [k, *shape], zeros where nothing touches it."""


class Verification(dict[str, float]):
    """Parameter name -> largest relative difference from autograd over the modes, largest first.

    `modes`: mode -> the same for that mode alone; `wrong`: the parameters whose difference is more
    than rounding; `reason`: why that is, as far as it can be told, None where nothing is wrong.
    """

    modes: dict[str, dict[str, float]]
    wrong: list[str]
    reason: str | None

    def by_layer(self) -> dict[str, float]:
        """Layer -> the largest difference of its parameters, largest first."""
        layers: dict[str, float] = defaultdict(float)
        for name, error in self.items():
            layer = name.rpartition(".")[0] or name
            layers[layer] = max(layers[layer], error)
        return dict(sorted(layers.items(), key=lambda item: -item[1]))

    def __str__(self) -> str:
        """A line for each layer, and one for each mode."""
        layers = self.by_layer()
        width = max(map(len, layers), default=0)
        lines = [f"{layer:<{width}}  {error:.1e}" for layer, error in layers.items()]
        for mode, errors in self.modes.items():
            lines.append(f"mode {mode}: at most {max(errors.values(), default=0.0):.1e}")
        if self.wrong:
            lines.append(f"more than rounding: {', '.join(self.wrong)}; {self.reason}")
        return "\n".join(lines)


def verify(model: nn.Module, batch: Batch, *, quiet: bool = False) -> Verification:
    """Compare the gradients of every mode with those of one backward pass per objective.

    The modes are "one_backward", "gram_first" and "gram_first, keep_dy"; of the last two, G0 is
    compared with the same combination of autograd's gradients. The model's gradients are left as
    they were; random numbers (dropout) start alike in all of them.

    Args:
        model: with or without `prepare`.
        batch: runs the model once and returns its losses and scores.
        quiet: do not print the table.
    Returns:
        Parameter name -> ||G' - G|| / ||G|| over all objectives, G by autograd, largest first: a
        few units in the last place of the parameters' dtype when all is well. `wrong` lists those
        that differ by more than rounding: more than scaling the losses changes autograd's own.
    Raises:
        ValueError, RuntimeError: one backward pass is not exact for this model; says why.
    """
    names: dict[Tensor, str] = {p: n for n, p in model.named_parameters() if p.requires_grad}
    if any(map(is_dtensor, names)):
        raise ValueError(
            "`model` must have plain parameters, got DTensors: verify compares whole gradients; "
            "call it on one process, before fully_shard or parallelize_module (spot checks go on "
            "comparing afterwards)"
        )
    held = [(p, p.grad) for p in names]
    try:
        expected = _by_autograd(model, batch, list(names), 1.0)
        again = _by_autograd(model, batch, list(names), ANOTHER_SCALE)
        with prepare(model, strict=True):
            runs = {"one_backward": _by_one_backward(model, batch, list(names), None)}
            for keep_dy in (False, True):
                mode = "gram_first, keep_dy" if keep_dy else "gram_first"
                runs[mode] = _by_gram_first(model, batch, list(names), keep_dy)
    finally:
        for p, grad in held:
            p.grad = grad
    # Of each mode and parameter: the difference, beside what rounding makes of autograd's own.
    modes: dict[str, dict[str, float]] = {mode: {} for mode in runs}
    wrong = set()
    for mode, (found, of_objectives) in runs.items():
        for p, name in names.items():
            truth, other, scale = (
                torch.tensordot(of_objectives, g, 1)
                for g in (expected[p], again[p], expected[p].abs())
            )
            difference, size = float((found[p] - truth).norm()), float(truth.norm())
            modes[mode][name] = difference / size if size else difference
            noise = float((other - truth).norm())
            if not difference <= rounding_bound(p, float(scale.norm()), noise):
                wrong.add(name)
    largest = {name: max(errors[name] for errors in modes.values()) for name in names.values()}
    result = Verification(sorted(largest.items(), key=lambda item: -item[1]))
    result.modes, result.wrong = modes, [name for name in result if name in wrong]
    result.reason = _reason(model, batch, list(names), held) if wrong else None
    if not quiet:
        print(result)
    return result


def _run(model: nn.Module, batch: Batch, params: Sequence[Tensor]) -> tuple[Any, Tensor]:
    """(losses, scores) of a batch, from the random numbers that every mode begins with."""
    for p in params:
        p.grad = None
    devices = [p.device for p in params if p.is_cuda][:1]
    with torch.random.fork_rng(devices):
        return batch(model)


def _by_autograd(
    model: nn.Module, batch: Batch, params: Sequence[Tensor], scale: float
) -> _Gradients:
    losses, _ = _run(model, batch, params)
    columns = []
    for loss in losses.values():
        grads: Sequence[Tensor | None] = [None] * len(params)
        if loss.requires_grad:
            seed = torch.full_like(loss, scale)
            grads = torch.autograd.grad(loss, params, seed, retain_graph=True, allow_unused=True)
        columns.append(grads)
    return {
        p: _stacked(p, of_p) / scale
        for p, of_p in zip(params, zip(*columns, strict=True), strict=True)
    }


def _gradients_of(
    params: Sequence[Tensor], losses: Mapping[str, Tensor], check_every: int | None = None
) -> ObjectiveGradients:
    weights = dict.fromkeys(losses, 1 / len(losses))
    gradients = ObjectiveGradients(params, weights, process_group=None)  # on this process's batch
    gradients.exactness.checks = Checks(strict=True, every=check_every)
    return gradients


def _by_one_backward(
    model: nn.Module, batch: Batch, params: Sequence[Tensor], check_every: int | None
) -> tuple[_Gradients, Tensor]:
    losses, scores = _run(model, batch, params)
    gradients = _gradients_of(params, losses, check_every)
    gradients.backward(losses, scores=scores, mode="one_backward")
    found = {p: _stacked(p, list(gradients.of(p).values())) for p in params}
    return found, torch.eye(len(losses), dtype=torch.float64)


def _by_gram_first(
    model: nn.Module, batch: Batch, params: Sequence[Tensor], keep_dy: bool
) -> tuple[_Gradients, Tensor]:
    losses, scores = _run(model, batch, params)
    gradients = _gradients_of(params, losses)
    solution = gram_first(gradients, losses, scores, keep_dy=keep_dy)
    found = {p: _stacked(p, [p.grad]) for p in params}
    return found, torch.as_tensor(solution.coefficients)[None]


def _reason(
    model: nn.Module,
    batch: Batch,
    params: Sequence[Tensor],
    held: Sequence[tuple[Tensor, Tensor | None]],
) -> str:
    """What a spot check has to say."""
    try:
        with prepare(model, strict=True):
            _by_one_backward(model, batch, params, 1)
    except ValueError as error:
        return str(error)
    finally:
        for p, grad in held:
            p.grad = grad
    return "mode one_backward passes its spot check"


def _stacked(p: Tensor, grads: Sequence[Tensor | None]) -> Tensor:
    return torch.stack([torch.zeros_like(p) if g is None else g for g in grads]).double()
