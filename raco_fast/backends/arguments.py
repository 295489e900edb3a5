"""What every backend relies on: lists of tensors that fit together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from raco_fast.backends.types import Gradients, Metric, Update


def check_coefficients(grads: Gradients, coefficients: Tensor, **lists: Sequence[Tensor]) -> None:
    """Raise ValueError unless there is a coefficient per objective, and lists of a tensor each."""
    if coefficients.shape != (len(grads),):
        raise ValueError(
            f"`coefficients` must have shape [{len(grads)}], one number per objective, "
            f"got {list(coefficients.shape)}"
        )
    for name, values in lists.items():
        if len(values) != len(grads[0]):
            raise ValueError(
                f"`{name}` must have one tensor per gradient, got {len(values)} for {len(grads[0])}"
            )


def check_update(update: Update, coefficients: Tensor) -> None:
    """Raise ValueError unless an update's lists are equally long and its rounding fits."""
    rounding = update.rounding
    lists = {name: getattr(update, name) for name in ("params", "exp_avgs", "exp_avg_sqs", "steps")}
    if rounding.name == "split":
        lists["rounding.residuals"] = rounding.residuals
    check_coefficients(update.grads, coefficients, **lists)
    if rounding.places and len(rounding.places) != len(update.params):
        raise ValueError(
            f"`rounding.places` must be empty or have one place per parameter, got "
            f"{len(rounding.places)} for {len(update.params)}"
        )
    if rounding.name != "nearest":
        wrong = next((p.dtype for p in update.params if p.dtype != torch.bfloat16), None)
        if wrong is not None:
            raise ValueError(
                f"`rounding`={rounding.name!r} is for bfloat16 parameters, got {wrong}; use "
                f"rounding='nearest'"
            )


def check_metric(grads: Gradients, metric: Metric) -> None:
    """Raise ValueError unless a metric has a second moment and three numbers for every tensor."""
    n = len(grads[0]) if grads else 0
    if len(metric.moments) != n or metric.numbers.shape != (n, 3):
        raise ValueError(
            f"`metric` must have one second moment and three numbers per gradient, got "
            f"{len(metric.moments)} and {list(metric.numbers.shape)} for {n}"
        )


def check_moments(grads: Gradients, moments: Sequence[Tensor | None]) -> None:
    """Raise unless the second moments of a metric are dense and lie as their gradients do."""
    for k, (v, *column) in enumerate(zip(moments, *grads, strict=True)):
        g = next((g for g in column if g is not None), None)
        if v is None or g is None:
            continue
        check_dense(v, f"`metric.moments`[{k}]")
        if (v.shape, v.device) != (g.shape, g.device):
            raise ValueError(
                f"`metric.moments`[{k}] must have the shape and device of its gradients, got "
                f"{list(v.shape)} on {v.device} and {list(g.shape)} on {g.device}"
            )


def check_gradients(grads: Gradients) -> None:
    """Raise unless the lists are equally long and their tensors alike; see `ops.gram`."""
    if not grads:
        raise ValueError("`grads` must hold at least one list of gradients, got none")
    for i, of_objective in enumerate(grads):
        if len(of_objective) != len(grads[0]):
            raise ValueError(
                f"`grads` must hold lists of equal length, got {len(grads[0])} tensors in list 0 "
                f"and {len(of_objective)} in list {i}; put None where a gradient is missing"
            )
    for k, column in enumerate(zip(*grads, strict=True)):
        present = [(i, g) for i, g in enumerate(column) if g is not None]
        for i, g in present:
            check_dense(g, f"`grads`[{i}][{k}]")
            first, reference_grad = present[0]
            for attribute in ("shape", "dtype", "device"):
                expected, found = getattr(reference_grad, attribute), getattr(g, attribute)
                if found != expected:
                    raise ValueError(
                        f"`grads`[{i}][{k}] must have the {attribute} of `grads`[{first}][{k}], "
                        f"got {_shown(found)} and {_shown(expected)}"
                    )


def check_rows(x: Tensor, dy: Tensor, bounds: Sequence[int], U: Tensor | None, out: Tensor) -> None:
    """Raise ValueError unless the rows of a layer, their groups and the gradients fit together."""
    if not (x.ndim == dy.ndim == 2 and bounds[0] == 0 and bounds[-1] == len(x) == len(dy)):
        raise ValueError(
            f"`x` and `dy` must be [{bounds[-1]} rows, features], as `bounds` say, got "
            f"{list(x.shape)} and {list(dy.shape)}; flatten what is before the features"
        )
    m, groups = (1, len(bounds) - 1) if U is None else U.shape
    if groups != len(bounds) - 1 or out.shape != (m, dy.shape[1], x.shape[1]):
        raise ValueError(
            f"`U` must have {len(bounds) - 1} columns, one per group, and `out` must be "
            f"[{m} objectives, {dy.shape[1]}, {x.shape[1]}], got {groups} columns and "
            f"{list(out.shape)}"
        )


def check_dense(g: Tensor, name: str) -> None:
    """Raise TypeError, calling the tensor `name`, if it is sparse or quantized."""
    if g.layout != torch.strided or g.is_quantized:
        kind = "quantized" if g.is_quantized else str(g.layout).removeprefix("torch.")
        raise TypeError(
            f"{name} must be a dense tensor, got {kind}; sparse gradients are not supported: "
            f"build the embedding with sparse=False, or call .to_dense()"
        )


def _shown(value: object) -> str:
    return str(list(value)) if isinstance(value, torch.Size) else str(value)
