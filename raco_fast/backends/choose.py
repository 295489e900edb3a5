"""Which backend runs an operation: the first of `BACKENDS` that has no obstacle to it.

The choice is made for each call and for the whole call: a parameter group is one call of
`combine_adamw`, `gram` is one call over all groups, `weight_grad` is one layer at a time. A forced
backend that cannot run the call raises; nothing else decides, and nothing falls back silently.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

import torch
from torch import Tensor

from raco_fast.backends import cpu, cuda, reference
from raco_fast.backends.arguments import check_gradients, check_moments
from raco_fast.backends.plan import Plan, describe
from raco_fast.backends.types import AdamWOptions, Backend, Built, Call

BACKENDS: list[Backend] = [cuda, cpu, reference]
"""In the order in which they are asked. `reference` has no obstacle to anything."""

# What self-tests found wrong, by backend, device and part. Kept for the process, as it depends on
# card, driver and compiler alone: every optimizer would find the same, after seconds of compiling.
_disagreements: dict[tuple[str, torch.device, str], str | None] = {}
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
    names = tuple(b.name for b in BACKENDS)
    if name not in names:
        raise ValueError(f"`name` must be one of {names}, got {name!r}; correct the spelling")
    lacking = BACKENDS[names.index(name)].missing()
    if lacking is not None:
        raise RuntimeError(f"backend {name!r} cannot run here: {lacking}; or use backend('cpu')")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced() -> str | None:
    """The name of the backend that is forced here, if one is."""
    return _forced.get()


def chosen(call: Call) -> Backend:
    """The backend that runs a call.

    Raises:
        RuntimeError: a forced backend cannot run it.
    """
    name, obstacle = forced(), None
    for candidate in BACKENDS:
        if name in (None, candidate.name):
            obstacle = _obstacle(candidate, call, name is not None)
            if obstacle is None:
                return candidate
    raise RuntimeError(
        f"backend {name!r} cannot run this {call.operation}: {obstacle}; do not force a backend, "
        f"or use backend('reference')"
    )


def name_of(call: Call) -> str:
    """The name of the backend that would run a call; nothing is proved on a device for it."""
    return _forced.get() or chosen(replace(call, runs=False)).name


def planned(call: Call, plan: Plan | None) -> tuple[Backend, Built]:
    """`chosen`, and what the backend built for these tensors.

    Gradients are checked, and backends asked, only if the plan does not know tensors like these.

    Raises:
        ValueError, TypeError: as `check_gradients` and `check_moments`.
    """
    seen = None
    if plan is not None and not (torch.is_grad_enabled() and call.written):
        seen = describe(call.lists)  # which does not tell whether a tensor requires grad
    if plan is None or seen is None:
        _check(call)
        return chosen(call), {}
    key = (call.operation, _forced.get(), call.m, _kind_of(call.options))
    finding = plan.find(key, seen, call.lists)
    if finding is None:
        _check(call)
        finding = plan.note(key, seen, call.lists, chosen(call))
    return finding.backend, finding.built


def _check(call: Call) -> None:
    check_gradients(call.read)
    for moments in call.beside:
        check_moments(call.read, moments)


def waits(call: Call, plan: Plan) -> str | None:
    """Why a call of a step has to wait for the device; None if it need not."""
    running, _ = planned(call, plan)
    if running.on_device:
        return None
    if _forced.get() is not None:
        return f"backend {running.name!r} is forced"
    found = next((_obstacle(b, call, False) for b in BACKENDS if b.on_device), None)
    return found or f"backend {running.name!r} was chosen for tensors like these"


def _obstacle(candidate: Backend, call: Call, forced: bool) -> str | None:
    """The backend's own obstacle, or, unless it is forced, what it got wrong on the device."""
    found = candidate.obstacle(call, forced)
    if found is None and candidate.unproved and not forced:
        found = _disagreement(candidate, call)
    return found


def _disagreement(candidate: Backend, call: Call) -> str | None:
    """What a backend was found to get wrong on a call's device; warns once, when it is found."""
    device = next(call.tensors()).device
    # One that fails at the operations of a step may still have the gradients of layers, or the
    # other way round.
    alone = ("weight_grad", "gram_in_metric")
    part = call.operation if call.operation in alone else "step"
    key = (candidate.name, device, part)
    if call.runs and key not in _disagreements:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the kernels have not run on {device} yet and cannot be proved inside of a CUDA "
                f"graph; take a step before capturing one"
            )
        from raco_fast.backends.self_test import disagreement

        _disagreements[key] = found = disagreement(candidate, part, device)
        if found is not None:
            which = "kernels are" if part == "step" else f"kernel of {part} is"
            warnings.warn(
                f"raco_fast: the {candidate.name} {which} not used on {device}: {found}; plain "
                f"torch runs instead. Please report this with `python -m torch.utils.collect_env`",
                stacklevel=2,
            )
    return _disagreements.get(key)


def _kind_of(options: AdamWOptions | None) -> tuple[object, ...]:
    """What of the options decides on the backend: not the values of numbers."""
    return tuple(
        (name, (value.requires_grad, value.device) if isinstance(value, Tensor) else value)
        for name, value in ({} if options is None else vars(options)).items()
        if isinstance(value, (Tensor, bool)) or value is None
    )
