"""The C++ backend for CPU tensors: hands addresses and lengths to `csrc/cpu/cpu_kernels.hpp`.

Gradients, parameters and states are each read from memory once (written once), on as many threads
as `torch.get_num_threads()` says. Tables of addresses, lengths and dtypes are kept in `built`:
for many small tensors, building them takes longer than the kernels.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import increment_version

from raco_fast import _C
from raco_fast.backends import weight_grad as plain
from raco_fast.backends.plan import advance
from raco_fast.backends.summed import summed
from raco_fast.backends.types import AdamWOptions, Built, Call, Gradients, Metric, Update
from raco_fast.kernels.tables import is_dense

name = "cpu"
on_device = unproved = False

DTYPES = {getattr(torch, dtype): code for code, dtype in enumerate(_C.DTYPES)}
_ROUNDINGS = {rounding: code for code, rounding in enumerate(_C.ROUNDINGS)}
_NO_PLACES = np.empty((0, 4), dtype=np.int64)
_PLAIN = (Tensor, torch.nn.Parameter)


class Tables(NamedTuple):
    """Addresses, lengths and dtypes as the kernels take them; `beside`: what is not a gradient."""

    grads: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]
    beside: list[tuple[NDArray[np.int64], NDArray[np.uint8]]]


def missing() -> str | None:
    """None: every machine can run it."""
    return None


def obstacle(call: Call, forced: bool) -> str | None:
    """Why the kernels cannot take these tensors; see `types.Backend`.

    `weight_grad` takes all CPU tensors: torch's matrix products are the fast ones.
    """
    if call.operation == "weight_grad":
        return None if call.read[0][0].is_cpu else "a tensor is not on the CPU"  # type: ignore[union-attr]
    found = call.recorded()
    if found is None and call.options is not None:
        found = _obstacle_of_options(call.options)
    return found or _obstacle_of_tensors(call)


def gram(grads: Gradients, built: Built) -> Tensor:
    """Gram matrix of m per-objective gradients."""
    return summed(products(grads, built))


def gram_in_metric(grads: Gradients, metric: Metric, built: Built) -> Tensor:
    """Gram matrix, and that in a metric of AdamW's, of m per-objective gradients."""
    found = _recalled(built, grads, [metric.moments])
    numbers, threads = metric.numbers.numpy(), torch.get_num_threads()
    return summed(
        torch.from_numpy(
            _C.products_in_metric(*found.grads, *found.beside[0], numbers, threads=threads)
        )
    )


def products(grads: Gradients, built: Built) -> Tensor:
    """Inner products of each tensor's m gradients, the same bits whatever the other tensors are."""
    found = _recalled(built, grads, [])
    return torch.from_numpy(_C.products(*found.grads, torch.get_num_threads()))


def combine(grads: Gradients, coefficients: Tensor, out: Sequence[Tensor]) -> None:
    """Write G0 = Σ α_i g_i."""
    found = tables(grads, [out])
    _C.combine(*found.grads, coefficients.numpy(), *found.beside[0], torch.get_num_threads())
    increment_version(out)


def combine_adamw(update: Update, coefficients: Tensor, built: Built) -> None:
    """One AdamW step along G0 = Σ α_i g_i.

    G0, the states and the parameters are float32 in registers (float64 for float64 parameters) and
    rounded once, where torch rounds after each operation: equal to rounding, not to the bit. The
    random bits of stochastic rounding are the same.
    """
    if not update.params:
        return
    options, rounding, written = update.options, update.rounding, update.written
    lr, beta1, beta2 = float(options.lr), float(options.beta1), float(options.beta2)
    steps = advance(update.steps).numpy()
    sign = -1.0 if options.maximize else 1.0
    found = _recalled(built, update.grads, [*written[:3], rounding.residuals])
    of_params, of_exp_avgs, of_exp_avg_sqs, (residuals, residual_dtypes) = found.beside
    _C.combine_adamw(
        *found.grads,
        sign * coefficients.numpy(),
        *of_params,
        *of_exp_avgs,
        *of_exp_avg_sqs,
        decay=1.0 - lr * options.weight_decay,
        beta1=beta1,
        beta2=beta2,
        eps=options.eps,
        step_sizes=lr / (1.0 - beta1**steps),
        root_corrections=1.0 / np.sqrt(1.0 - beta2**steps),
        rounding=_ROUNDINGS[rounding.name],
        steps=steps,
        seed=rounding.seed & 0xFFFFFFFF,
        residuals=residuals,
        residual_dtypes=residual_dtypes,
        places=rounding.place_table(len(steps)) if rounding.name == "stochastic" else _NO_PLACES,
        threads=torch.get_num_threads(),
    )
    increment_version([t for one in written for t in one])


def weight_grad(
    x: Tensor,
    dy: Tensor,
    bounds: Sequence[int],
    U: Tensor | None,
    out: Tensor,
    fresh: bool,
    products: bool = False,
    look: Callable[[Tensor], None] | None = None,
) -> Tensor | None:
    """Write or add the m weight gradients of a layer, and their products while in the cache.

    As in plain torch, but that a block of the groups' t_g is read once, for all objectives.
    """
    x, dy = plain.operand(x), plain.operand(dy)
    groups, (d_out, d_in) = len(bounds) - 1, out.shape[1:]
    folds = U is not None and (look is not None or plain.folds(len(U), len(x), groups))
    if U is None or not folds or not _can_fold(x, out):
        plain.weight_grad(x, dy, bounds, U, out, fresh, False, look)
        return None
    # A block's products are terms of their own where it ends with a chunk of the Gram matrix's sum.
    row_bytes = x.element_size() * groups * d_in
    chunk_rows = _C.CHUNK // math.gcd(_C.CHUNK, d_in)
    whole = plain.block_rows(row_bytes) >= d_out
    aligned = products and not whole and chunk_rows <= 4 * plain.block_rows(row_bytes)
    rows = plain.block_rows(row_bytes, chunk_rows if aligned else 1)
    sums = np.zeros((len(U), len(U))) if products and (whole or aligned) else None
    for start, stop in plain.blocks(d_out, rows):
        t = plain.of_groups(x, dy[:, start:stop], bounds)
        if look is not None:
            look(t.flatten(1))
        at = np.array([g.data_ptr() for g in out[:, start:stop].unbind()])
        n, dtype = (stop - start) * d_in, DTYPES[out.dtype]
        _C.fold(t.data_ptr(), n, U.numpy(), at, dtype, fresh, sums, torch.get_num_threads())
    increment_version([out])
    return None if sums is None else torch.from_numpy(sums)


def _can_fold(x: Tensor, out: Tensor) -> bool:
    """Whether the kernel has the dtypes and layout; x as `operand` gives it."""
    wide = torch.float64 if out.dtype == torch.float64 else torch.float32
    return out.dtype in DTYPES and x.dtype == wide and out[0].is_contiguous() and not out.is_neg()


def _obstacle_of_options(options: AdamWOptions) -> str | None:
    for name in ("amsgrad", "capturable", "differentiable"):
        if getattr(options, name):
            return f"{name}=True"
    for name in ("foreach", "fused"):
        if getattr(options, name) is not None:
            return f"{name} is set, which asks for one of torch's own implementations"
    for name in ("lr", "beta1", "beta2"):
        value = getattr(options, name)
        if isinstance(value, Tensor) and (value.requires_grad or not value.is_cpu):
            return f"{name} is a tensor that requires grad or is not on the CPU"
    return None


def _obstacle_of_tensors(call: Call) -> str | None:
    """Each parameter's tensors (gradients, states, ...) by themselves, and against the first."""
    for column in zip(*call.lists, strict=True):
        first: Tensor | None = None
        for t in column:
            if t is None:
                continue
            first = t if first is None else first
            found = _obstacle_of(t) or (None if t is first else _mismatch(t, first))
            if found is not None:
                return found
    return None


def _obstacle_of(t: Tensor) -> str | None:
    if type(t) not in _PLAIN:
        return f"a tensor is a {type(t).__name__}"
    if not t.is_cpu:
        return f"a tensor is on {t.device}"
    if t.dtype not in DTYPES:
        return f"a tensor is {t.dtype} (float32, bfloat16, float16 and float64 are supported)"
    if t.layout != torch.strided or not (t.is_contiguous() or is_dense(t)):
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


def tables(grads: Gradients, beside: Sequence[Sequence[Tensor | None]] = ()) -> Tables:
    """The tables of a call; the first list of `beside`, if any, has the gradients' shapes."""
    one_of_each = [
        next((g for g in column if g is not None), beside[0][k] if beside else None)
        for k, column in enumerate(zip(*grads, strict=True))
    ]
    addresses = [[0 if g is None else g.data_ptr() for g in one] for one in grads]
    lengths = [0 if t is None else t.numel() for t in one_of_each]
    return Tables(
        grads=(
            np.array(addresses, dtype=np.int64).reshape(len(grads), -1),
            np.array(lengths, dtype=np.int64),
            _codes(one_of_each),
        ),
        beside=[
            (np.array([0 if t is None else t.data_ptr() for t in one], dtype=np.int64), _codes(one))
            for one in beside
        ],
    )


def _codes(tensors: Sequence[Tensor | None]) -> NDArray[np.uint8]:
    return np.array([0 if t is None else DTYPES[t.dtype] for t in tensors], dtype=np.uint8)


def _recalled(built: Built, grads: Gradients, beside: Sequence[Sequence[Tensor | None]]) -> Tables:
    """The tables that an earlier call left, or new ones to leave."""
    if "tables" not in built:
        built["tables"] = tables(grads, beside)
    found: Tables = built["tables"]
    return found
