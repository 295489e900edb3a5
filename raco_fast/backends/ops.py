"""One function per operation: checks the arguments and calls the backend that `choose` picks.

A `Plan` is for callers that repeat an operation on the same tensors; without one, everything is
checked and built anew.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import compress

import torch
from torch import Tensor

from raco_fast.backends.arguments import (
    check_coefficients,
    check_metric,
    check_rows,
    check_update,
)
from raco_fast.backends.choose import chosen, planned
from raco_fast.backends.plan import Plan
from raco_fast.backends.summed import summed
from raco_fast.backends.types import Call, Gradients, Metric, Update


def gram(grads: Gradients, plan: Plan | None = None) -> Tensor:
    """Gram matrix of m per-objective gradients.

    Args:
        grads: m lists of n tensors or None (zeros); tensor k has the same shape, dtype and device
            in every list.
        plan: the caller's, if it has one.
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
    return gram_beside(grads, [], plan)[0]


def products(grads: Gradients, plan: Plan | None = None) -> Tensor:
    """The inner products of each tensor's m gradients, of which `gram` is the sum.

    Args:
        grads: as for `gram`.
        plan: the caller's, if it has one.
    Returns:
        [n, m, m] float64 on the CPU. Those of a tensor are the same bits whatever other tensors
        the call has.
    Raises:
        ValueError, TypeError: as for `gram`.
    """
    backend, built = planned(Call("products", len(grads), (), grads), plan)
    return backend.products(grads, built)


def gram_beside(
    grads: Gradients,
    numbers: Sequence[Tensor],
    plan: Plan | None = None,
    known: Sequence[Tensor | None] = (),
) -> tuple[Tensor, list[float]]:
    """`gram`, and the values of tensors of one element that the host needs at the same time.

    Where the Gram is on a CUDA device, all of it is one copy and one wait: for this stream only.
    `known`: see `gram_where_it_is`.
    """
    return together(gram_where_it_is(grads, plan, known), numbers)


def together(M: Tensor, numbers: Sequence[Tensor]) -> tuple[Tensor, list[float]]:
    """(M on the CPU, the values of tensors of one element), as one copy and one wait."""
    if not M.is_cuda:
        return M, [float(x) for x in numbers]
    sent = torch.cat([x.reshape(-1).to(M) for x in (M, *numbers)])
    arrived = torch.empty(sent.shape, dtype=sent.dtype, pin_memory=True)
    arrived.copy_(sent, non_blocking=True)
    torch.cuda.current_stream(sent.device).synchronize()
    return arrived[: M.numel()].view_as(M), arrived[M.numel() :].tolist()


def gram_where_it_is(
    grads: Gradients, plan: Plan | None = None, known: Sequence[Tensor | None] = ()
) -> Tensor:
    """`gram`, but not waited for: on the device of the gradients if the backend leaves it there.

    Args:
        grads: as for `gram`.
        plan: the caller's, if it has one.
        known: nothing, or for each tensor what `products` gave, or `weight_grad`; None where they
            are to be taken. On the CPU M is the same bits whichever they are, on a device the same
            to rounding. While a CUDA graph is captured, which would read at every replay what was
            known now, none is used.
    """
    kept = [of_tensor for of_tensor in known if of_tensor is not None]
    on_device = not all(of_tensor.is_cpu for of_tensor in kept)
    if not kept or (on_device and _capturing()):
        backend, built = planned(Call("gram", len(grads), (), grads), plan)
        return within_cauchy_schwarz(backend.gram(grads, built))
    taken = [of_tensor is None for of_tensor in known]
    rest = [list(compress(one, taken)) for one in grads]
    if on_device:
        return within_cauchy_schwarz(_with_rest(kept, rest, plan))
    anew: Iterator[Tensor] = iter(products(rest, plan) if any(taken) else ())
    of_each = [next(anew) if of_tensor is None else of_tensor for of_tensor in known]
    return within_cauchy_schwarz(summed(torch.stack(of_each)))


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _with_rest(kept: Sequence[Tensor], rest: Gradients, plan: Plan | None) -> Tensor:
    """The sum of known products, in their order on each device, and of the Gram of the rest."""
    of_device: dict[torch.device, list[Tensor]] = {}
    for of_tensor in kept:
        of_device.setdefault(of_tensor.device, []).append(of_tensor)
    parts = [torch.stack(alike).sum(0) for alike in of_device.values()]
    if rest[0]:
        backend, built = planned(Call("gram", len(rest), (), rest), plan)
        parts.append(backend.gram(rest, built))
    M = parts[0]
    for part in parts[1:]:
        if part.device != M.device:  # layers on several devices: the host adds them up
            M, part = M.cpu(), part.cpu()
        M = M + part
    return M


def gram_in_metric(grads: Gradients, metric: Metric, plan: Plan | None = None) -> Tensor:
    """`gram`, and the Gram matrix in the metric of AdamW's update, from one pass over memory.

    Args:
        grads: as for `gram`.
        metric: D of every tensor.
        plan: the caller's, if it has one.
    Returns:
        [2, m, m] float64, not waited for: M with the bits of `gram`, and Σ_e g_i[e] D[e] g_j[e], as
        products of √D g_i in the precision of those of M. Where v is NaN it is not finite.
    Raises:
        ValueError, TypeError: as for `gram`, or `metric` does not fit `grads`.
    """
    check_metric(grads, metric)
    call = Call("gram_in_metric", len(grads), (), grads, beside=[metric.moments])
    backend, built = planned(call, plan)
    return within_cauchy_schwarz(backend.gram_in_metric(grads, metric, built))


def combine(
    grads: Gradients, coefficients: Tensor, out: Sequence[Tensor], plan: Plan | None = None
) -> None:
    """Write G0 = Σ α_i g_i to `out`, in float32 arithmetic or better.

    Args:
        grads: as for `gram`.
        coefficients: [m] float64 on the CPU, α.
        out: n tensors of the gradients' shapes; out[k] may be one of the gradients of tensor k.
        plan: the caller's, if it has one.
    Raises:
        ValueError: as for `gram`, or `coefficients` or `out` do not fit `grads`.
        TypeError: as for `gram`.
    """
    check_coefficients(grads, coefficients, out=out)
    backend, _ = planned(Call("combine", len(grads), [out], grads), plan)
    backend.combine(grads, coefficients, out)


def combine_adamw(update: Update, coefficients: Tensor, plan: Plan | None = None) -> None:
    """One AdamW step along G0 = Σ α_i g_i; parameters and states change in place.

    Args:
        update: everything else.
        coefficients: [m] float64, α (gradient clipping and unscaling folded in); on the CPU, or
            on a device whose backend reads them there, where NaN skips the step.
        plan: the caller's, if it has one.
    Raises:
        ValueError, TypeError: as for `gram`, or `coefficients`, parameters, states or residuals do
            not fit `grads`.
    """
    check_update(update, coefficients)
    grads, options = update.grads, update.options
    call = Call("combine_adamw", len(grads), update.written, grads, options)
    backend, built = planned(call, plan)
    if not (coefficients.is_cpu or backend.on_device):
        raise RuntimeError(
            f"coefficients on {coefficients.device} need a backend that reads them there, got "
            f"{backend.name!r}; pass coefficients.cpu()"
        )
    backend.combine_adamw(update, coefficients, built)


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
    """Write or add the m weight gradients G_i = Σ_g U_ig dY_gᵀ X_g of one layer.

    Products and sums are float32 (float64 for float64); a gradient is rounded once.

    Args:
        x: [rows, d_in], the layer's inputs, ordered by groups.
        dy: [rows, d_out], the gradients of its outputs.
        bounds: groups + 1 offsets: group g is the rows bounds[g]:bounds[g + 1].
        U: [m, groups], best on the CPU; None stands for one group with coefficient 1.
        out: [m, d_out, d_in], of any floating dtype; overwritten where `fresh`, else added to.
        products: whether inner products of what `out` holds then are of use.
        look: is shown dY_gᵀ X_g of all groups, [groups, n] for a block of rows of the weight at a
            time; needs U.
    Returns:
        They, [m, m] float64, where the backend has them on the way; else None. On the CPU they are
        what `products` gives, to the bit; of a device they stay there, in an order of their own.
    Raises:
        ValueError: shapes that do not fit together.
    """
    check_rows(x, dy, bounds, U, out)
    call = Call("weight_grad", len(out), [[out]], [[x], [dy]], bounds=bounds)
    return chosen(call).weight_grad(x, dy, bounds, U, out, fresh, products, look)


def within_cauchy_schwarz(M: Tensor) -> Tensor:
    """M [.., m, m] with |M_ij| <= √(M_ii M_jj).

    Rounding, and squares that underflow where products do not (a saturated loss beside an
    ordinary one), leave a matrix that is no Gram matrix, which the solver would refuse.
    """
    squares = M.diagonal(dim1=-2, dim2=-1)
    norms = squares.sqrt()
    bound = norms[..., :, None] * norms[..., None, :]
    bounded = torch.maximum(torch.minimum(M, bound), -bound)
    bounded.diagonal(dim1=-2, dim2=-1).copy_(squares)
    return bounded
