"""The Triton backend: `reference.py`'s signatures, on CUDA tensors, in the kernels of `kernels/`.

What is decided here and not in the kernels: which tensors they can take (`unsupported`), copies of
gradients whose elements lie in another order than their parameter's, and the numbers of a step,
which are computed in float64 where the step counts live and sent to the device in one copy.
Nothing here waits for the device except the result of `gram`, which its signature puts on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raco_fast.kernels import combine_adamw as adamw_kernels
from raco_fast.kernels import gram as gram_kernels
from raco_fast.kernels.tables import is_dense, same_order, to_device

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from raco_fast.reference import AdamWOptions, Gradients

MAX_OBJECTIVES = 32


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


def gram(grads: Gradients) -> Tensor:
    """Gram matrix of m per-objective gradients; as `reference.gram`.

    Args:
        grads: m <= 32 lists of n tensors or None, on one CUDA device.
    Returns:
        [m, m] float64 on the CPU, exactly symmetric; equal inputs on equal cards give equal bits.
    Source: arXiv 2602.02495, Algorithm 1, line 5.
    """
    first = next((g for one in grads for g in one if g is not None), None)
    if first is None:
        return torch.zeros(len(grads), len(grads), dtype=torch.float64)
    columns = [_ordered(column) for column in zip(*grads, strict=True)]
    return gram_kernels.gram(_transposed(columns, len(grads)), first.device).cpu()


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
        adamw_kernels.combine(_transposed(columns, len(grads)), alpha, targets)


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
    """One AdamW step along G0 = Σ α_i g_i; as `reference.combine_adamw`, to rounding.

    G0 is not rounded to the parameters' dtype on the way. Coefficients that are not finite leave
    parameters and states as they are (step counts on the CPU advance: the caller knows better).
    `foreach` and `fused` make no difference.

    Args:
        max_exp_avg_sqs: unused; amsgrad stays on the reference backend.
    Raises:
        ValueError: a parameter or state whose elements overlap or have gaps (an expanded tensor).
    """
    if not params:
        return
    device = params[0].device
    torch._foreach_add_(list(state_steps), 1)
    rows = hyper_rows(state_steps, options)
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
        seed=shared[m + 2 :],  # read by stochastic rounding only
    )
    columns = [
        _ordered(column, like=p) for column, p in zip(zip(*grads, strict=True), params, strict=True)
    ]
    adamw_kernels.combine_adamw(
        params, _transposed(columns, m), exp_avgs, exp_avg_sqs, rows, scalars
    )


def hyper_rows(state_steps: Sequence[Tensor], options: AdamWOptions) -> Tensor:
    """The numbers of a step, one row per tensor: [n, 7] float32, columns as in `kernels.HYPER`.

    They are computed in float64, on the device where the step counts (already advanced) or lr and
    betas are: on the CPU for free, on the GPU without waiting for it.
    """
    lr, beta1, beta2 = options["lr"], options["beta1"], options["beta2"]
    places = [x.device for x in (state_steps[0], lr, beta1, beta2) if isinstance(x, Tensor)]
    device = next((place for place in places if place.type == "cuda"), places[0])
    t = torch.stack(list(state_steps)).reshape(-1).to(device, torch.float64)

    def number(x: float | Tensor) -> float | Tensor:
        return x.to(device, torch.float64) if isinstance(x, Tensor) else x

    lr, beta1, beta2 = number(lr), number(beta1), number(beta2)
    columns = [
        lr / (1 - beta1**t),
        lr * options["weight_decay"],
        1 - beta1,
        1 - beta2,
        (1 - beta2**t).rsqrt(),
        options["eps"],
        -1.0 if options["maximize"] else 1.0,
    ]
    rows = torch.empty(len(t), len(columns), dtype=torch.float64, device=device)
    for i, column in enumerate(columns):
        rows[:, i] = column
    return rows.float()


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
