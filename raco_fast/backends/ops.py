"""One function per operation: checks the arguments and calls the backend that `choose` picks.

`gram`, `combine` and `combine_adamw` exist once per backend under the signatures of `reference.py`,
`weight_grad` in "triton" and "reference".
`gram_on_device` and `combine_adamw_on_device` are a step that never waits for the device; only
"triton" has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from raco_fast.backends.arguments import check_coefficients, check_length, check_rows
from raco_fast.backends.call_cache import Finding
from raco_fast.backends.choose import BUILT, backend_of_weight_grad, finding_for, triton
from raco_fast.backends.reference import AdamWOptions, Gradients
from raco_fast.backends.rounding import NEAREST, Rounding

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from raco_fast.solver.on_device import DeviceStep


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
    return gram_beside(grads, [])[0]


def gram_beside(grads: Gradients, numbers: Sequence[Tensor]) -> tuple[Tensor, list[float]]:
    """`gram`, and the values of tensors of one element that the host needs at the same time.

    On CUDA devices with the Triton backend all of it is one copy and one wait.
    """
    finding = finding_for("gram", grads)
    module = BUILT[finding.backend]
    if finding.backend == "triton":
        M, values = module.gram_beside(grads, numbers, finding.prepared)
    else:
        M, values = module.gram(grads, **_kept(finding)), [float(x) for x in numbers]
    return within_cauchy_schwarz(M), values


def gram_on_device(grads: Gradients) -> Tensor:
    """`gram` as [m, m] float64 on the gradients' device; nothing waits for it.

    Entries are those of the kernel: the kernel that solves the dual applies the bounds of `gram`.
    Only where `device_obstacle` is None; raises as `gram`.
    """
    M: Tensor = triton().gram_on_device(grads, finding_for("gram", grads).prepared)
    return M


def combine_adamw_on_device(
    params: Sequence[Tensor],
    grads: Gradients,
    step: DeviceStep,
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    rounding: Rounding = NEAREST,
    **options: Unpack[AdamWOptions],
) -> None:
    """`combine_adamw` with the coefficients of `step`, which only the device knows."""
    written = [params, exp_avgs, exp_avg_sqs]
    if rounding.name == "split":
        written.append(rounding.residuals)
    finding = finding_for("combine_adamw", grads, *written, options=options)
    _note_writes("triton", *written)
    triton().combine_adamw_on_device(
        params,
        grads,
        step,
        exp_avgs,
        exp_avg_sqs,
        state_steps,
        rounding,
        finding.prepared,
        **options,
    )


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
    check_coefficients(grads, coefficients)
    check_length("out", out, grads)
    backend = finding_for("combine", grads, out).backend
    _note_writes(backend, out)
    BUILT[backend].combine(grads, coefficients, out)


def combine_adamw(
    params: Sequence[Tensor],
    grads: Gradients,
    coefficients: Tensor,
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    rounding: Rounding = NEAREST,
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
        rounding: of the parameters, see `rounding.Rounding`.
        **options: the group's AdamW hyper-parameters, see `reference.AdamWOptions`.
    Raises:
        ValueError: `coefficients`, `params` or the states do not fit `grads`.
    """
    check_coefficients(grads, coefficients)
    of_each_parameter = {"params": params, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    for name, tensors in {**of_each_parameter, "state_steps": state_steps}.items():
        check_length(name, tensors, grads)
    written = [params, exp_avgs, exp_avg_sqs]
    if rounding.name == "split":
        check_length("rounding.residuals", rounding.residuals, grads)
        written.append(rounding.residuals)
    finding = finding_for("combine_adamw", grads, *written, options=options)
    _note_writes(finding.backend, *written)
    BUILT[finding.backend].combine_adamw(
        params,
        grads,
        coefficients,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        state_steps,
        rounding,
        **_kept(finding),
        **options,
    )


def weight_grad(
    x: Tensor, dy: Tensor, bounds: Sequence[int], U: Tensor | None, out: Tensor, fresh: bool
) -> None:
    """Write or add the m weight gradients G_i = Σ_g U_ig dY_gᵀ X_g of one layer.

    Products and sums are float32 (float64 for float64); a gradient is rounded once.

    Args:
        x: [rows, d_in], the layer's inputs, ordered by groups.
        dy: [rows, d_out], the gradients of its outputs.
        bounds: groups + 1 offsets: group g is the rows bounds[g]:bounds[g + 1].
        U: [m, groups], best on the CPU; None stands for one group with coefficient 1.
        out: [m, d_out, d_in], of any floating dtype; overwritten where `fresh`, else added to.
    Raises:
        ValueError: shapes that do not fit together.
    """
    check_rows(x, dy, bounds, U, out)
    chosen = backend_of_weight_grad(x, dy, bounds, U, out)
    BUILT[chosen].weight_grad(x, dy, bounds, U, out, fresh)


def within_cauchy_schwarz(M: Tensor) -> Tensor:
    """Rounding, and squares that underflow where products do not (a saturated loss beside an
    ordinary one), leave a matrix that is no Gram matrix, which the solver would refuse.
    """
    norms = M.diagonal().sqrt()
    bound = torch.outer(norms, norms)
    bounded = torch.maximum(torch.minimum(M, bound), -bound)
    bounded.diagonal().copy_(M.diagonal())
    return bounded


def _kept(finding: Finding) -> dict[str, Any]:
    """Where a backend keeps its tables for the next call with the same tensors."""
    return {} if finding.backend == "reference" else {"prepared": finding.prepared}


def _note_writes(backend: str, *written: Sequence[Tensor]) -> None:
    """Tells autograd that these change in place; of plain torch it knows."""
    if backend != "reference":
        increment_version([t for some in written for t in some])
