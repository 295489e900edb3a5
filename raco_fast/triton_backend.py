"""The Triton backend: `reference.py`'s signatures, on CUDA tensors, in the kernels of `kernels/`.

What is decided here and not in the kernels: which tensors they can take (`unsupported`), copies of
gradients whose elements lie in another order than their parameter's, and the numbers of a step,
which are computed in float64 where the step counts live and sent to the device in one copy.
Nothing here waits for the device except `gram` and `gram_beside`, whose results the host needs: one
copy through pinned memory, and one wait. `gram_on_device` and `combine_adamw_on_device` are the two
halves of a step that never waits.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from raco_fast.kernels import combine as combine_kernels
from raco_fast.kernels import combine_adamw as adamw_kernels
from raco_fast.kernels import gram as gram_kernels
from raco_fast.kernels.rounding import RESIDUALS
from raco_fast.kernels.tables import (
    TensorTable,
    build,
    capturing,
    is_dense,
    keep_for_graph,
    same_order,
    stream_of,
    to_device,
    upload,
)
from raco_fast.layout import advance
from raco_fast.rounding import NEAREST, Rounding
from raco_fast.triton_weight_grad import weight_grad as weight_grad

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from raco_fast.device_step import DeviceStep
    from raco_fast.reference import AdamWOptions, Gradients

MAX_OBJECTIVES = 32

Prepared: TypeAlias = "dict[Hashable, list[TensorTable]]"
"""Stream -> the tables of one call; the caller drops it when an address or layout changes."""


def unsupported(m: int, tensors: Iterable[Tensor | None], **options: object) -> str | None:
    """Why the kernels cannot do an operation on these tensors; None if they can.

    Args:
        m: the number of objectives.
        tensors: gradients, parameters and states.
        **options: those of `combine_adamw`, where it is the operation.
    """
    if m > MAX_OBJECTIVES:
        return f"its kernels take at most {MAX_OBJECTIVES} objectives, got {m}"
    for name in ("amsgrad", "differentiable"):
        if options.get(name):
            return f"its kernels do not have {name}=True"
    first: Tensor | None = None
    for t in tensors:
        if t is None:
            continue
        first = t if first is None else first
        if type(t) not in (Tensor, torch.nn.Parameter):
            return f"its kernels take plain tensors, got a {type(t).__name__}"
        if t.dtype not in gram_kernels.DTYPES:
            return f"its kernels take bfloat16, float16 and float32, got {t.dtype}"
        if t.device != first.device:
            return f"its kernels take tensors of one device, got {first.device} and {t.device}"
        if t.is_neg():
            return "its kernels do not take lazily negated views; pass tensor.resolve_neg()"
    return None


def gram(grads: Gradients, prepared: Prepared | None = None) -> Tensor:
    """Gram matrix of m per-objective gradients; as `reference.gram`.

    Args:
        grads: m <= 32 lists of n tensors or None, on one CUDA device.
        prepared: what this function left for exactly these gradients, or nothing yet.
    Returns:
        [m, m] float64 on the CPU, exactly symmetric; equal inputs on equal cards give equal bits.
    Source: arXiv 2602.02495, Algorithm 1, line 5.
    """
    return gram_beside(grads, [], prepared)[0]


def gram_beside(
    grads: Gradients, numbers: Sequence[Tensor], prepared: Prepared | None = None
) -> tuple[Tensor, list[float]]:
    """`gram`, and tensors of one element that reach the host in the same copy."""
    m = len(grads)
    if all(g is None for one in grads for g in one):
        return torch.zeros(m, m, dtype=torch.float64), [float(x) for x in numbers]
    total = gram_on_device(grads, prepared)
    sent = _to_host(torch.cat([x.reshape(-1).to(total) for x in (total, *numbers)]))
    return sent[: m * m].reshape(m, m), sent[m * m :].tolist()


def gram_on_device(grads: Gradients, prepared: Prepared | None = None) -> Tensor:
    """`gram` without its way to the host: [m, m] float64 on the device of the gradients.

    Args:
        grads: at least one is not None.
        prepared: what this function left for exactly these gradients, or nothing yet.
    """
    device = next(g.device for one in grads for g in one if g is not None)
    m = len(grads)
    tables = _recalled(prepared, device)
    if tables is None:
        columns = [_ordered(column) for column in zip(*grads, strict=True)]
        ordered = _transposed(columns, m)
        if m > gram_kernels.MAX_UNROLLED:
            return gram_kernels.gram(ordered, device)
        tables = build(ordered, m, device)
        _leave(prepared, tables, device, grads, ordered)
    return gram_kernels.gram(grads, device, tables=tables)


def combine(grads: Gradients, coefficients: Tensor, out: Sequence[Tensor]) -> None:
    """Write G0 = Σ α_i g_i; as `reference.combine`.

    Raises:
        ValueError: an output whose elements overlap or have gaps (an expanded tensor).
    """
    columns, targets = [], []
    for column, target in zip(zip(*grads, strict=True), out, strict=True):
        if all(g is None for g in column):
            target.zero_()
        else:
            columns.append(_ordered(column, like=target))
            targets.append(target)
    if targets:
        alpha = to_device(coefficients.float(), targets[0].device)
        combine_kernels.combine(_transposed(columns, len(grads)), alpha, targets)


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
    """One AdamW step along G0 = Σ α_i g_i; as `reference.combine_adamw`, to rounding.

    G0 is not rounded to the parameters' dtype on the way. Coefficients that are not finite leave
    parameters and states as they are (step counts on the CPU advance: the caller knows better).
    `foreach` and `fused` make no difference.

    Args:
        max_exp_avg_sqs: unused; amsgrad stays on the reference backend.
        prepared: what this function left for exactly these tensors, or nothing yet.
    Raises:
        ValueError: a parameter or state whose elements overlap or have gaps (an expanded tensor).
    """
    if not params:
        return
    device = params[0].device
    steps = advance(state_steps)
    # All alike unless a parameter joined later; then Python computes the seven numbers faster.
    counts = set(steps.tolist()) if steps.is_cpu else set()
    rows = _hyper_rows(counts.pop() if len(counts) == 1 else steps, len(steps), options)
    shared = torch.cat([coefficients.float(), torch.tensor([1.0, 1.0, 0.0])])
    if rows.device == device:
        shared = to_device(shared, device)
    else:
        rows, shared = _sent_together(rows, shared, device)
    m = len(grads)
    scalars = adamw_kernels.Scalars(
        alpha=shared[:m],
        clip=shared[m : m + 1],
        grad_scale=shared[m + 1 : m + 2],
        found_inf=shared[m + 2 :],
        seed=_seed(rounding, device),
    )
    _launch(params, grads, exp_avgs, exp_avg_sqs, rows, scalars, rounding, prepared)


def combine_adamw_on_device(
    params: Sequence[Tensor],
    grads: Gradients,
    step: DeviceStep,
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    rounding: Rounding = NEAREST,
    prepared: Prepared | None = None,
    **options: Unpack[AdamWOptions],
) -> None:
    """`combine_adamw` with coefficients that only the device knows; nothing waits for it.

    Args:
        step: after its `solve`. Where it skips the step, step counts do not advance either.
        state_steps: n scalar tensors on the device.
    """
    torch._foreach_add_(list(state_steps), step.runs)
    scalars = adamw_kernels.Scalars(
        alpha=step.alpha,
        clip=step.clip,
        grad_scale=step.grad_scale,
        found_inf=step.never,
        seed=_seed(rounding, params[0].device),
    )
    rows = hyper_rows(torch.stack(list(state_steps)).reshape(-1), options)
    _launch(params, grads, exp_avgs, exp_avg_sqs, rows, scalars, rounding, prepared)


def _launch(
    params: Sequence[Tensor],
    grads: Gradients,
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    rows: Tensor,
    scalars: adamw_kernels.Scalars,
    rounding: Rounding,
    prepared: Prepared | None,
) -> None:
    device = rows.device
    stored_as = RESIDUALS.get(rounding.name, torch.bfloat16)
    residuals = [r.view(stored_as) for r in rounding.residuals] or None
    tables = _recalled(prepared, device)
    if tables is None:
        pairs = zip(zip(*grads, strict=True), params, strict=True)
        ordered = _transposed([_ordered(column, like=p) for column, p in pairs], len(grads))
        written = [params, exp_avgs, exp_avg_sqs, *([residuals] if residuals else [])]
        tables = build([*ordered, *written], len(grads), device)
        _leave(prepared, tables, device, grads, ordered)
    adamw_kernels.combine_adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        rows,
        scalars,
        rounding.name,
        residuals,
        tables,
    )


def _seed(rounding: Rounding, device: torch.device) -> Tensor:
    """On the device: int64 [1]. It stays the same from step to step, as the bits do not."""
    return upload(np.array([rounding.seed & 0xFFFFFFFF]), device)


def _recalled(prepared: Prepared | None, device: torch.device) -> list[TensorTable] | None:
    """The tables left by an earlier call on this stream; inside of a graph, of any stream."""
    if not prepared:
        return None
    if capturing(device):
        return keep_for_graph(next(iter(prepared.values())))
    return prepared.get(stream_of(device))


def _leave(
    prepared: Prepared | None,
    tables: list[TensorTable],
    device: torch.device,
    grads: Gradients,
    ordered: Gradients,
) -> None:
    """Keep the tables for the next call, unless they point at copies, which end with this one."""
    pairs = zip(grads, ordered, strict=True)
    own = all(a is b for one, other in pairs for a, b in zip(one, other, strict=True))
    if prepared is not None and own and not capturing(device):
        prepared[stream_of(device)] = tables


def hyper_rows(steps: Tensor, options: AdamWOptions) -> Tensor:
    """The numbers of a step, one row per tensor: [n, 8] float32, columns `combine_adamw.HYPER`.

    They are computed in float64, on the device where the step counts ([n], already advanced) or lr
    and betas are: on the CPU for free, on the GPU without waiting for it.
    """
    return _hyper_rows(steps, len(steps), options)


def _hyper_rows(t: float | Tensor, n: int, options: AdamWOptions) -> Tensor:
    """`hyper_rows` of n tensors from their step counts, or from the one they all have."""
    lr, beta1, beta2 = options["lr"], options["beta1"], options["beta2"]
    places = [x.device for x in (t, lr, beta1, beta2) if isinstance(x, Tensor)]
    device = next((place for place in places if place.type == "cuda"), torch.device("cpu"))
    t = t.to(device, torch.float64) if isinstance(t, Tensor) else t

    def number(x: float | Tensor) -> float | Tensor:
        # A copy of a CPU tensor to the device would wait for it; torch reads such a number too.
        if isinstance(x, Tensor):
            return float(x) if x.is_cpu else x.to(device, torch.float64)
        return x

    lr, beta1, beta2 = number(lr), number(beta1), number(beta2)
    columns = [
        lr / (1 - beta1**t),
        lr * options["weight_decay"],
        1 - beta1,
        1 - beta2,
        (1 - beta2**t) ** -0.5,
        options["eps"],
        -1.0 if options["maximize"] else 1.0,
        t,
    ]
    if not any(isinstance(column, Tensor) for column in columns):
        return torch.tensor(columns, dtype=torch.float32).repeat(n, 1)
    rows = torch.empty(n, len(columns), dtype=torch.float64, device=device)
    for i, column in enumerate(columns):
        rows[:, i] = column
    return rows.float()


def _to_host(values: Tensor) -> Tensor:
    """A CPU copy, with the one wait of a step: for this stream, not for the device."""
    if not values.is_cuda:
        return values
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    torch.cuda.current_stream(values.device).synchronize()
    return copy


def _sent_together(rows: Tensor, shared: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both on the device, in one copy."""
    sent = to_device(torch.cat([rows.flatten(), shared.to(rows.device)]), device)
    return sent[: rows.numel()].view_as(rows), sent[rows.numel() :]


def _ordered(column: Sequence[Tensor | None], like: Tensor | None = None) -> list[Tensor | None]:
    """The gradients of one parameter with their elements in one order, that of `like`.

    A gradient in another order (transposed, expanded, sliced) is copied; this is rare.
    """
    if like is None:
        like = next((g for g in column if g is not None and is_dense(g)), None)
    ordered: list[Tensor | None] = []
    for g in column:
        if g is None or (like is not None and same_order(g, like)):
            ordered.append(g)
        elif like is None:
            ordered.append(g.contiguous())
        else:
            ordered.append(torch.empty_like(like, dtype=g.dtype).copy_(g))
    return ordered


def _transposed(columns: Sequence[Sequence[Tensor | None]], m: int) -> Gradients:
    return [[column[i] for column in columns] for i in range(m)]
