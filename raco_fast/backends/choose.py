"""Which backend runs an operation: decided here and nowhere else, and forced by `backend`.

Every backend is a module with the functions `gram`, `combine` and `combine_adamw` of
`reference.py`, under the same signatures; "triton" and "reference" have `weight_grad` as well. The
choice is made for each call, by one rule:

    "cpu"        if every tensor of the call is a plain torch tensor on the CPU, float32, bfloat16,
                 float16 or float64 (float64 not mixed with others at one parameter), without gaps
                 or overlaps, and the tensors of one parameter share shape and memory layout; for
                 `combine_adamw` also without amsgrad, capturable, differentiable, a forced
                 `foreach` or `fused`, and hyper-parameters that require grad; never where
                 autograd would record the operation
    "triton"     if every tensor of the call is a plain torch tensor on one CUDA device, float32,
                 bfloat16 or float16, m <= 32, no amsgrad or differentiable, and the kernels proved
                 themselves there: at the first use on a device in a process they are compared with
                 the reference, and a warning says so if they are not used from then on
    "reference"  otherwise, for the whole call

One tensor that does not qualify hands its call to the reference, not the others: a parameter group
is one call of `combine_adamw`, and `gram` is one call over all groups. `update_backend` says what
will run (and repr(optimizer) shows it); a forced backend that cannot run the call raises.

A step that never waits for the device needs "triton"; `device_obstacle` says where it cannot run.

`weight_grad` is one layer at a time: "triton" for bfloat16 and float16 rows on a CUDA device where
m >= 2 and a model of the costs prefers its kernel, which has a proof of its own there; else
"reference". Forcing "triton" overrides that preference, and forcing "cpu" means "reference".
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from raco_fast.backends import cpu, reference
from raco_fast.backends.arguments import check_gradients
from raco_fast.backends.call_cache import Finding, Findings, describe
from raco_fast.backends.reference import AdamWOptions, Gradients

BACKENDS = ("triton", "cpu", "reference")
BUILT: dict[str, ModuleType] = {"cpu": cpu, "reference": reference}
MAX_ON_DEVICE = 3
"""Objectives whose dual problem has a kernel; more are solved on the host."""

findings = Findings()
_disagreements: dict[tuple[torch.device, str], str | None] = {}
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
    if name == "triton" and (missing := missing_for_triton()) is not None:
        raise RuntimeError(f"backend 'triton' cannot run here: {missing}; or use backend('cpu')")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def update_backend(params: Sequence[Tensor], options: AdamWOptions) -> str:
    """The backend of `combine_adamw` for gradients and states laid out like `params`."""
    forced = _forced.get()
    if forced is not None:
        return forced
    if _on_cuda(params) and missing_for_triton() is None:
        device = params[0].device
        obstacle = _triton_obstacle([params], (), options)
        obstacle = obstacle or _disagreements.get((device, "step"))
        return "triton" if obstacle is None else "reference"
    obstacle = cpu.adamw_obstacle(options) or cpu.obstacle((p,) for p in params)
    return "cpu" if obstacle is None else "reference"


def device_obstacle(
    grads: Gradients, params: Sequence[Tensor], options: Sequence[AdamWOptions]
) -> str | None:
    """Why a whole step cannot stay on the device; None if it can.

    Args:
        grads: m lists of n gradients.
        params: n parameters.
        options: those of every parameter group.
    """
    if _forced.get() not in (None, "triton"):
        return f"backend {_forced.get()!r} is forced"
    if not _on_cuda(params):
        return "the parameters are not on a CUDA device"
    if (missing := missing_for_triton()) is not None:
        return missing
    if len(grads) > MAX_ON_DEVICE:
        return f"the dual problem of m = {len(grads)} objectives is solved on the host"
    lists = [params, *grads]
    seen = describe(lists)
    key = ("whole step", _forced.get(), len(grads), *map(_kind_of, options))
    if findings.find(key, seen, lists) is not None:
        return None
    for of_group in options:
        if (obstacle := _triton_obstacle(grads, [params], of_group)) is not None:
            return obstacle
    if (obstacle := _disagreement(params[0].device)) is None:
        findings.note(key, seen, "triton")
    return obstacle


def finding_for(
    operation: str,
    grads: Gradients,
    *others: Sequence[Tensor],
    options: AdamWOptions | None = None,
) -> Finding:
    """The backend for this call; checked and chosen anew only if its tensors look different.

    Args: as for `backend_of`.
    """
    recorded = torch.is_grad_enabled() and bool(others)  # requires_grad is no part of a layout
    lists = [*others, *grads]
    seen = None if recorded else describe(lists)
    key = (operation, _forced.get(), len(grads), _kind_of(options))
    found = findings.find(key, seen, lists)
    if found is not None:
        return found
    check_gradients(grads)
    chosen = backend_of(operation, grads, *others, options=options)
    return findings.note(key, seen, chosen)


def _kind_of(options: AdamWOptions | None) -> tuple[object, ...]:
    """What of the options decides on the backend: not the values of numbers."""
    if options is None:
        return ()
    return tuple(
        (name, (value.requires_grad, value.device) if isinstance(value, Tensor) else value)
        for name, value in options.items()
        if isinstance(value, (Tensor, bool)) or value is None
    )


def backend_of(
    operation: str,
    grads: Gradients,
    *others: Sequence[Tensor],
    options: AdamWOptions | None = None,
) -> str:
    """The backend that is forced, else the fast one of the tensors' device, else "reference".

    Args:
        operation: its name, for the error.
        grads: m lists of gradients.
        *others: further tensors of each parameter; the first list is written to.
        options: those of `combine_adamw`, where it is the operation.
    """
    forced = _forced.get()
    if forced == "reference":
        return "reference"
    obstacle = None
    written = others[0] if others else ()
    if torch.is_grad_enabled() and any(t.requires_grad for t in written):
        obstacle = "autograd would record it (use torch.no_grad())"
    first = next((t for some in (*others, *grads) for t in some if t is not None), None)
    by_itself = forced is None and first is not None and _on_cuda([first])
    if forced == "triton" or (by_itself and missing_for_triton() is None):
        obstacle = obstacle or _triton_obstacle(grads, others, options)
        if forced is None and first is not None:
            obstacle = obstacle or _disagreement(first.device)
        if obstacle is None:
            triton()
            return "triton"
    else:
        obstacle = obstacle or (options and cpu.adamw_obstacle(options))
        obstacle = obstacle or cpu.obstacle(zip(*others, *grads, strict=True))
        if obstacle is None:
            return "cpu"
    if forced is None:
        return "reference"
    raise _cannot_run(forced, operation, obstacle)


def backend_of_weight_grad(
    x: Tensor, dy: Tensor, bounds: Sequence[int], U: Tensor | None, out: Tensor
) -> str:
    """The backend of `weight_grad` for one layer; arguments as for it, asked at every call."""
    forced = _forced.get()
    by_itself = forced is None and _on_cuda([x]) and missing_for_triton() is None
    if U is None or len(U) < 2 or not (by_itself or forced == "triton"):
        return "reference"
    obstacle = weight_grad_obstacle(x, dy, bounds, len(U), out)
    if obstacle is None:
        return "triton"
    if by_itself:
        return "reference"
    raise _cannot_run("triton", "weight_grad", obstacle)


def weight_grad_obstacle(
    x: Tensor, dy: Tensor, bounds: Sequence[int], m: int, out: Tensor
) -> str | None:
    """Why the kernel does not form the m weight gradients of a layer; None if it does.

    Where it is forced, only what it cannot do counts, not what is slower or unproved.
    """
    from raco_fast.backends import cuda_weight_grad as kernel

    obstacle = _triton_obstacle([[]] * m, [[x, dy, out]], None)
    obstacle = obstacle or kernel.unsupported(x, dy, out)
    if _forced.get() == "triton":
        return obstacle
    obstacle = obstacle or kernel.slower(x, dy, bounds, m, out)
    return obstacle or _disagreement(x.device, "weight_grad")


def _cannot_run(forced: str, operation: str, obstacle: str | None) -> RuntimeError:
    return RuntimeError(
        f"backend {forced!r} cannot run this {operation}: {obstacle}; do not force a backend, or "
        f"use backend('reference')"
    )


def _on_cuda(tensors: Sequence[Tensor]) -> bool:
    return bool(tensors) and tensors[0].is_cuda


def _disagreement(device: torch.device, part: str = "step") -> str | None:
    """What the kernels were found to get wrong on the device; warns once, when it is found.

    `part`: "step" or "weight_grad", so that one that fails leaves the other.
    """
    if (device, part) not in _disagreements:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the kernels have not run on {device} yet and cannot be proved inside of a CUDA "
                f"graph; take a step before capturing one"
            )
        from raco_fast.backends import self_test

        prove = {"step": self_test.disagreement, "weight_grad": self_test.weight_grad_disagreement}
        _disagreements[device, part] = found = prove[part](device)
        if found is not None:
            which = "kernels are" if part == "step" else f"kernel of {part} is"
            warnings.warn(
                f"raco_fast: the Triton {which} not used on {device}: {found}; plain torch "
                f"runs instead. Please report this with `python -m torch.utils.collect_env`",
                stacklevel=2,
            )
    return _disagreements[device, part]


def _triton_obstacle(
    grads: Gradients, others: Sequence[Sequence[Tensor]], options: AdamWOptions | None
) -> str | None:
    tensors = [t for some in (*others, *grads) for t in some if t is not None]
    if not all(_on_cuda([t]) for t in tensors):
        return "its kernels take CUDA tensors; move the model with .to('cuda')"
    named = {} if options is None else dict(options)
    reason: str | None = triton().unsupported(len(grads), tensors, **named)
    return reason


@cache
def missing_for_triton() -> str | None:
    """What this machine lacks for the Triton kernels, with the cure."""
    if find_spec("triton") is None:
        return "the package triton is missing; pip install 'raco-fast[triton]'"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device; install a CUDA build of torch on a machine with one"
    return None


def triton() -> ModuleType:
    """Imported at the first use: `import raco_fast` does not need triton."""
    from raco_fast.backends import cuda

    return BUILT.setdefault("triton", cuda)
