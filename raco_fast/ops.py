"""One function per operation: checks the arguments and picks the backend, in this one place.

Every backend is a module with the functions `gram`, `combine` and `combine_adamw` of
`reference.py`, under the same signatures. Left alone, CUDA tensors that the Triton kernels can
take go to them and everything else goes to the reference. Nothing falls back silently: a forced
backend that this installation does not have, or that cannot do the operation, raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from itertools import chain
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raco_fast import reference
from raco_fast.reference import AdamWOptions, Gradients

if TYPE_CHECKING:
    from typing_extensions import Unpack

BACKENDS = ("triton", "cpu", "reference")
_BUILT: dict[str, ModuleType] = {"reference": reference}
_forced: ContextVar[str | None] = ContextVar("raco_fast_backend", default=None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend inside a `with` block (this thread or task only).

    Args:
        name: "triton", "cpu" or "reference".
    Raises:
        ValueError: the name is unknown.
        RuntimeError: this installation does not have that backend.
    """
    if name not in BACKENDS:
        raise ValueError(f"`name` must be one of {BACKENDS}, got {name!r}; correct the spelling")
    if name == "triton" and _missing_for_triton():
        raise RuntimeError(
            f"backend 'triton' cannot run here: {_missing_for_triton()}; "
            f"or use backend('reference')"
        )
    if name != "triton" and name not in _BUILT:
        raise RuntimeError(
            f"backend {name!r} is not built in this installation (it has {tuple(_BUILT)}); "
            f"use backend('reference'), or leave the choice to raco_fast by not forcing one"
        )
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def active_backend(tensors: Iterable[Tensor | None] = (), m: int = 1, **options: object) -> str:
    """The backend that the next operation uses on `tensors`.

    Args:
        tensors: gradients, parameters and states; without any, the answer is for CPU tensors.
        m: the number of objectives.
        **options: those of `combine_adamw`, where it is the operation.
    """
    forced = _forced.get()
    if forced is not None:
        return forced
    return "triton" if _takes_triton(m, list(tensors), options) else "reference"


def gram(grads: Gradients) -> Tensor:
    """Gram matrix of m per-objective gradients.

    Args:
        grads: m lists of n tensors or None (zeros); tensor k has the same shape, dtype and device
            in every list.
    Returns:
        [m, m] float64 on the CPU: float32 products (float64 for float64 gradients), float64
        across blocks, summed in a fixed order. |M_ij| <= ‖g_i‖‖g_j‖ holds exactly; a gradient
        whose squares underflow float32 counts as zero.
    Raises:
        ValueError: no list, lists of unequal length, or tensors that differ in shape, dtype or
            device (names the first that does).
        TypeError: a gradient that is sparse or quantized.
    Source: arXiv 2602.02495, Algorithm 1, line 5.
    """
    _check_gradients(grads)
    return _within_cauchy_schwarz(_module(grads).gram(grads))


def combine(grads: Gradients, coefficients: Tensor, out: Sequence[Tensor]) -> None:
    """Write G0 = Σ α_i g_i to `out`, in float32 arithmetic or better.

    Args:
        grads: as for `gram`.
        coefficients: [m] float64 on the CPU, α.
        out: n tensors of the gradients' shapes; out[k] may be one of the gradients of tensor k.
    Raises:
        ValueError: as for `gram`, or `coefficients` or `out` do not fit `grads`.
        TypeError: as for `gram`.
    """
    _check_gradients(grads)
    _check_coefficients(grads, coefficients)
    _check_length("out", out, grads)
    _module(grads, out).combine(grads, coefficients, out)


def combine_adamw(
    params: Sequence[Tensor],
    grads: Gradients,
    coefficients: Tensor,
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    **options: Unpack[AdamWOptions],
) -> None:
    """One AdamW step along G0 = Σ α_i g_i; parameters and states change in place.

    Args:
        params: n tensors, each with at least one gradient that is not None.
        grads: as for `gram`.
        coefficients: [m] float64 on the CPU, α (gradient clipping and unscaling folded in).
        exp_avgs, exp_avg_sqs: n states of the parameters' shapes.
        max_exp_avg_sqs: n states with `amsgrad`, else empty.
        state_steps: n scalar tensors.
        **options: the group's AdamW hyper-parameters, see `reference.AdamWOptions`.
    Raises:
        ValueError: `coefficients` or `params` do not fit `grads`.
    """
    _check_coefficients(grads, coefficients)
    _check_length("params", params, grads)
    module = _module(grads, params, exp_avgs, exp_avg_sqs, **options)
    module.combine_adamw(
        params,
        grads,
        coefficients,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        state_steps,
        **options,
    )


def _module(grads: Gradients, *others: Sequence[Tensor], **options: object) -> ModuleType:
    """The backend for one operation on these tensors."""
    tensors = list(chain(*grads, *others))
    forced = _forced.get()
    if forced == "triton":
        reason = _triton().unsupported(len(grads), tensors, **options)
        if reason is None and any(t.device.type != "cuda" for t in tensors if t is not None):
            reason = "its kernels take CUDA tensors; move the model with .to('cuda')"
        if reason is not None:
            raise RuntimeError(
                f"backend 'triton' cannot do this: {reason}; or use backend('reference')"
            )
        return _triton()
    if forced is not None:
        return _BUILT[forced]
    return _triton() if _takes_triton(len(grads), tensors, options) else reference


def _takes_triton(m: int, tensors: Sequence[Tensor | None], options: dict[str, object]) -> bool:
    first = next((t for t in tensors if t is not None), None)
    if first is None or first.device.type != "cuda" or _missing_for_triton():
        return False
    return _triton().unsupported(m, tensors, **options) is None


@cache
def _missing_for_triton() -> str | None:
    """What this machine lacks for the Triton kernels, with the cure."""
    if find_spec("triton") is None:
        return "the package triton is missing; pip install 'raco-fast[triton]'"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device; install a CUDA build of torch on a machine with one"
    return None


def _triton() -> ModuleType:
    """Imported at the first use: `import raco_fast` does not need triton."""
    from raco_fast import triton_backend

    return triton_backend


def _within_cauchy_schwarz(M: Tensor) -> Tensor:
    """Rounding, and squares that underflow where products do not (a saturated loss beside an
    ordinary one), leave a matrix that is no Gram matrix, which the solver would refuse.
    """
    norms = M.diagonal().sqrt()
    bound = torch.outer(norms, norms)
    bounded = torch.maximum(torch.minimum(M, bound), -bound)
    bounded.diagonal().copy_(M.diagonal())
    return bounded


def _check_length(name: str, values: Sequence[Tensor], grads: Gradients) -> None:
    if len(values) != len(grads[0]):
        raise ValueError(
            f"`{name}` must have one tensor per gradient, got {len(values)} for {len(grads[0])}"
        )


def _check_coefficients(grads: Gradients, coefficients: Tensor) -> None:
    if coefficients.shape != (len(grads),):
        raise ValueError(
            f"`coefficients` must have shape [{len(grads)}], one number per objective, "
            f"got {list(coefficients.shape)}"
        )


def _check_gradients(grads: Gradients) -> None:
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
