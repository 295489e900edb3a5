"""One function per operation: checks the arguments and picks the backend, in this one place.

Every backend is a module with the functions `gram`, `combine` and `combine_adamw` of
`reference.py`, under the same signatures. The choice is made for each call, by one rule:

    "cpu"        if every tensor of the call is a plain torch tensor on the CPU, float32, bfloat16,
                 float16 or float64 (float64 not mixed with others at one parameter), without gaps
                 or overlaps, and the tensors of one parameter share shape and memory layout; for
                 `combine_adamw` also without amsgrad, capturable, differentiable, a forced
                 `foreach` or `fused`, and hyper-parameters that require grad; never where autograd
                 would record the operation
    "reference"  otherwise, for the whole call
    "triton"     never by itself: its kernels for CUDA tensors have been compiled and interpreted,
                 not yet run on a device, so they are used inside `backend("triton")` only

One tensor that does not qualify hands its call to the reference, not the others: a parameter group
is one call of `combine_adamw`, and `gram` is one call over all groups. `update_backend` says what
will run (and repr(optimizer) shows it); a forced backend that cannot run the call raises.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raco_fast import cpu, reference
from raco_fast.reference import AdamWOptions, Gradients

if TYPE_CHECKING:
    from typing_extensions import Unpack

BACKENDS = ("triton", "cpu", "reference")
_BUILT: dict[str, ModuleType] = {"cpu": cpu, "reference": reference}
_forced: ContextVar[str | None] = ContextVar("raco_fast_backend", default=None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend inside a `with` block (this thread or task only).

    An operation inside the block that the backend cannot run raises RuntimeError with the reason.

    Args:
        name: "triton", "cpu" or "reference".
    Raises:
        ValueError: the name is unknown.
        RuntimeError: this machine cannot run that backend.
    """
    if name not in BACKENDS:
        raise ValueError(f"`name` must be one of {BACKENDS}, got {name!r}; correct the spelling")
    if name == "triton" and (missing := _missing_for_triton()) is not None:
        raise RuntimeError(f"backend 'triton' cannot run here: {missing}; or use backend('cpu')")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def update_backend(params: Sequence[Tensor], options: AdamWOptions) -> str:
    """The backend of `combine_adamw` for gradients and states laid out like `params`."""
    obstacle = cpu.adamw_obstacle(options) or cpu.obstacle((p,) for p in params)
    return _forced.get() or ("cpu" if obstacle is None else "reference")


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
    module = _module("gram", grads)
    return _within_cauchy_schwarz(module.gram(grads))


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
    _module("combine", grads, out).combine(grads, coefficients, out)


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
        ValueError: `coefficients`, `params` or the states do not fit `grads`.
    """
    _check_coefficients(grads, coefficients)
    of_each_parameter = {"params": params, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    for name, tensors in {**of_each_parameter, "state_steps": state_steps}.items():
        _check_length(name, tensors, grads)
    module = _module("combine_adamw", grads, params, exp_avgs, exp_avg_sqs, options=options)
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


def _module(
    operation: str,
    grads: Gradients,
    *others: Sequence[Tensor],
    options: AdamWOptions | None = None,
) -> ModuleType:
    """The backend that is forced, else "cpu" where it can run, else "reference".

    Args:
        operation: its name, for the error.
        grads: m lists of gradients.
        *others: further tensors of each parameter; the first list is written to.
        options: those of `combine_adamw`, where it is the operation.
    """
    forced = _forced.get()
    if forced == "reference":
        return _BUILT["reference"]
    obstacle = None
    written = others[0] if others else ()
    if torch.is_grad_enabled() and any(t.requires_grad for t in written):
        obstacle = "autograd would record it (use torch.no_grad())"
    if forced == "triton":
        obstacle = obstacle or _triton_obstacle(grads, others, options)
        module = None if obstacle else _triton()
    else:
        obstacle = obstacle or (None if options is None else cpu.adamw_obstacle(options))
        obstacle = obstacle or cpu.obstacle(zip(*others, *grads, strict=True))
        module = _BUILT["cpu"] if obstacle is None else None
    if module is not None:
        return module
    if forced is None:
        return _BUILT["reference"]
    raise RuntimeError(
        f"backend {forced!r} cannot run this {operation}: {obstacle}; do not force a backend, or "
        f"use backend('reference')"
    )


def _triton_obstacle(
    grads: Gradients, others: Sequence[Sequence[Tensor]], options: AdamWOptions | None
) -> str | None:
    tensors = [t for some in (*others, *grads) for t in some if t is not None]
    if any(not t.is_cuda for t in tensors):
        return "its kernels take CUDA tensors; move the model with .to('cuda')"
    named = {} if options is None else dict(options)
    reason: str | None = _triton().unsupported(len(grads), tensors, **named)
    return reason


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
