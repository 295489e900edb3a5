"""The C++ backend for CPU tensors: hands addresses and lengths to `csrc/cpu_kernels.*`.

Gradients, parameters and states are each read from memory once (written once), on as many threads
as `torch.get_num_threads()` says. The functions are those of `reference.py`, under the same
signatures; `obstacle` and `adamw_obstacle` say why a call is not for them, and `choose.py`, which
asks, hands it to the reference then.

Tables of addresses, lengths and dtypes are kept with the finding of `call_cache.py`, for the same
tensors at the same places: for many small ones, building them takes longer than the kernels.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raco_fast import _C
from raco_fast.backends.call_cache import advance
from raco_fast.backends.reference import AdamWOptions, Gradients
from raco_fast.backends.rounding import NEAREST, Rounding

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Tables(NamedTuple):
    """Addresses, lengths and dtypes as the kernels take them."""

    grads: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]
    written: list[tuple[NDArray[np.int64], NDArray[np.uint8]]]


Prepared: TypeAlias = "dict[Hashable, Tables]"
"""The tables of one call; the caller drops them when an address or layout changes."""

DTYPES = {getattr(torch, name): code for code, name in enumerate(_C.DTYPES)}
_ROUNDINGS = {name: code for code, name in enumerate(_C.ROUNDINGS)}
_PLAIN = (Tensor, torch.nn.Parameter)


def obstacle(columns: Iterable[Sequence[Tensor | None]]) -> str | None:
    """Why the kernels cannot take these tensors, or None if they can.

    Args:
        columns: for every parameter its tensors (gradients, states, ...), None where missing.
    """
    for column in columns:
        first: Tensor | None = None
        for t in column:
            if t is None:
                continue
            if first is None:
                first = t
            found = _obstacle_of(t) or (None if t is first else _mismatch(t, first))
            if found is not None:
                return found
    return None


def adamw_obstacle(options: AdamWOptions) -> str | None:
    """Why the kernel cannot take an AdamW step with these options, or None if it can."""
    values = dict(options)
    for name in ("amsgrad", "capturable", "differentiable"):
        if values[name]:
            return f"{name}=True"
    for name in ("foreach", "fused"):
        if values[name] is not None:
            return f"{name} is set, which asks for one of torch's own implementations"
    for name in ("lr", "beta1", "beta2"):
        value = values[name]
        if isinstance(value, Tensor) and (value.requires_grad or not value.is_cpu):
            return f"{name} is a tensor that requires grad or is not on the CPU"
    return None


def gram(grads: Gradients, prepared: Prepared | None = None) -> Tensor:
    """Gram matrix of m per-objective gradients; see `reference.gram`.

    Args:
        prepared: what this function left for exactly these tensors, or nothing yet.
    """
    found = _recalled(prepared, grads, [])
    return torch.from_numpy(_C.gram(*found.grads, torch.get_num_threads()))


def combine(grads: Gradients, coefficients: Tensor, out: Sequence[Tensor]) -> None:
    """Write G0 = Σ α_i g_i; see `reference.combine`."""
    found = tables(grads, [out])
    (target,) = found.written
    _C.combine(*found.grads, coefficients.numpy(), *target, torch.get_num_threads())


def combine_adamw(
    params: Sequence[Tensor],
    grads: Gradients,
    coefficients: Tensor,
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    rounding: Rounding = NEAREST,
    prepared: Prepared | None = None,
    **options: Unpack[AdamWOptions],
) -> None:
    """One AdamW step along G0 = Σ α_i g_i; see `reference.combine_adamw`.

    G0, the states and the parameters are float32 in registers (float64 for float64 parameters) and
    rounded once, where torch rounds after each operation: equal to rounding, not to the bit. The
    random bits of stochastic rounding are the same.

    Args:
        prepared: what this function left for exactly these tensors, or nothing yet.
    """
    if not params:
        return
    lr, beta1, beta2 = (float(options[name]) for name in ("lr", "beta1", "beta2"))
    steps = advance(state_steps).numpy()
    sign = -1.0 if options["maximize"] else 1.0
    written = [params, exp_avgs, exp_avg_sqs, rounding.residuals]
    found = _recalled(prepared, grads, written)
    of_params, of_exp_avgs, of_exp_avg_sqs, (residuals, residual_dtypes) = found.written
    _C.combine_adamw(
        *found.grads,
        sign * coefficients.numpy(),
        *of_params,
        *of_exp_avgs,
        *of_exp_avg_sqs,
        decay=1.0 - lr * options["weight_decay"],
        beta1=beta1,
        beta2=beta2,
        eps=options["eps"],
        step_sizes=lr / (1.0 - beta1**steps),
        root_corrections=1.0 / np.sqrt(1.0 - beta2**steps),
        rounding=_ROUNDINGS[rounding.name],
        steps=steps,
        seed=rounding.seed & 0xFFFFFFFF,
        residuals=residuals,
        residual_dtypes=residual_dtypes,
        threads=torch.get_num_threads(),
    )


def _obstacle_of(t: Tensor) -> str | None:
    if type(t) not in _PLAIN:
        return f"a tensor is a {type(t).__name__}"
    if not t.is_cpu:
        return f"a tensor is on {t.device}"
    if t.dtype not in DTYPES:
        return f"a tensor is {t.dtype} (float32, bfloat16, float16 and float64 are supported)"
    if t.layout != torch.strided or not _is_dense(t):
        return "a tensor is expanded, sparse, or a view with gaps"
    if t.is_neg():
        return "a tensor has a pending negation (resolve_neg)"
    return None


def _mismatch(t: Tensor, first: Tensor) -> str | None:
    if t.shape != first.shape:
        return f"tensors of one parameter have the shapes {list(first.shape)} and {list(t.shape)}"
    if not (t.is_contiguous() and first.is_contiguous()) and t.stride() != first.stride():
        return "tensors of one parameter differ in memory layout"
    if (t.dtype == torch.float64) != (first.dtype == torch.float64):
        return f"tensors of one parameter are {first.dtype} and {t.dtype}"
    return None


def _is_dense(t: Tensor) -> bool:
    """Each element of one block of memory exactly once, in any order of the dimensions."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def tables(grads: Gradients, written: Sequence[Sequence[Tensor]] = ()) -> Tables:
    """The tables of a call; the first list of `written`, if any, has the gradients' shapes."""
    columns = list(zip(*grads, strict=True))
    one_of_each = [
        next((g for g in column if g is not None), written[0][k] if written else None)
        for k, column in enumerate(columns)
    ]
    return Tables(
        grads=(
            np.array(
                [[0 if g is None else g.data_ptr() for g in one] for one in grads], dtype=np.int64
            ).reshape(len(grads), -1),
            np.array([0 if t is None else t.numel() for t in one_of_each], dtype=np.int64),
            np.array([0 if t is None else DTYPES[t.dtype] for t in one_of_each], dtype=np.uint8),
        ),
        written=[
            (
                np.array([t.data_ptr() for t in one], dtype=np.int64),
                np.array([DTYPES[t.dtype] for t in one], dtype=np.uint8),
            )
            for one in written
        ],
    )


def _recalled(
    prepared: Prepared | None, grads: Gradients, written: Sequence[Sequence[Tensor]]
) -> Tables:
    """The tables that were left by the call before, or new ones to leave."""
    if prepared is None:
        return tables(grads, written)
    if not prepared:
        prepared["tables"] = tables(grads, written)
    return prepared["tables"]
