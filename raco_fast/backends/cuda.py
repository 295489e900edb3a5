"""The Triton backend: `reference.py`'s signatures, on CUDA tensors, in the kernels of `kernels/`.

What is decided here and not in the kernels: which tensors they can take (`unsupported`), copies of
gradients whose elements lie in another order than their parameter's, and the numbers of a step
(`cuda_numbers.py`).
Nothing here waits for the device except `gram` and `gram_beside`, whose results the host needs: one
copy through pinned memory, and one wait. `gram_on_device` and `combine_adamw_on_device` are the two
halves of a step that never waits.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from raco_fast.backends.call_cache import advance
from raco_fast.backends.cuda_numbers import hyper_rows, seed_of, sent_together, to_host
from raco_fast.backends.cuda_weight_grad import weight_grad as weight_grad
from raco_fast.backends.rounding import NEAREST, Rounding
from raco_fast.kernels import combine as combine_kernels
from raco_fast.kernels import combine_adamw as adamw_kernels
from raco_fast.kernels import gram as gram_kernels
from raco_fast.kernels.tables import (
    TensorTable,
    build,
    capturing,
    is_dense,
    keep_for_graph,
    same_order,
    stream_of,
    to_device,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from raco_fast.backends.reference import AdamWOptions, Gradients
    from raco_fast.solver.on_device import DeviceStep

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
    sent = to_host(torch.cat([x.reshape(-1).to(total) for x in (total, *numbers)]))
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
    rows = hyper_rows(counts.pop() if len(counts) == 1 else steps, len(steps), options)
    shared = torch.cat([coefficients.float(), torch.tensor([1.0, 1.0, 0.0])])
    if rows.device == device:
        shared = to_device(shared, device)
    else:
        rows, shared = sent_together(rows, shared, device)
    m = len(grads)
    scalars = adamw_kernels.Scalars(
        alpha=shared[:m],
        clip=shared[m : m + 1],
        grad_scale=shared[m + 1 : m + 2],
        found_inf=shared[m + 2 :],
        seed=seed_of(rounding, device),
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
        seed=seed_of(rounding, params[0].device),
    )
    steps = torch.stack(list(state_steps)).reshape(-1)
    rows = hyper_rows(steps, len(steps), options)
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
    residuals = [r.view(torch.int16) for r in rounding.residuals] or None
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
