"""The Triton backend: the operations on CUDA tensors, in the kernels of `kernels/`.

What is decided here and not in the kernels: which tensors they take, copies of gradients whose
elements lie in another order than their parameter's, and the numbers of a step on their way to the
device. Nothing here waits for the device. Triton is imported at the first use of a kernel, so that
`import raco_fast` does not need it.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from raco_fast.backends import weight_grad as plain
from raco_fast.backends.plan import advance
from raco_fast.backends.rounding import Place
from raco_fast.backends.types import AdamWOptions, Built, Call, Gradients, Metric, Update
from raco_fast.kernels.tables import (
    ALIGNMENT,
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
from raco_fast.kernels.weight_grad_plan import pays

name = "triton"
on_device = True
unproved = True  # compilers, drivers and cards differ

MAX_OBJECTIVES = 32
_HALVES = (torch.bfloat16, torch.float16)
_DTYPES = (*_HALVES, torch.float32)


@cache
def missing() -> str | None:
    """What this machine lacks for the kernels, with the cure."""
    if find_spec("triton") is None:
        return "the package triton is missing; pip install 'raco-fast[triton]'"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device; install a CUDA build of torch on a machine with one"
    return None


def obstacle(call: Call, forced: bool) -> str | None:
    """Why a call is not for the kernels; see `types.Backend`.

    Unless it is forced, `weight_grad` must be modelled to be faster than plain products.
    """
    found = missing() or _impossible(call)
    if found is not None or forced:
        return found
    if next(call.tensors(), None) is None:
        return "there are no tensors"
    return _slower(call) if call.operation == "weight_grad" else None


def gram(grads: Gradients, built: Built) -> Tensor:
    """Gram matrix of m <= 32 lists of gradients: [m, m] float64 on their device."""
    from raco_fast.kernels import gram as kernels

    m = len(grads)
    device = next((g.device for one in grads for g in one if g is not None), None)
    if device is None:
        return torch.zeros(m, m, dtype=torch.float64)
    tables = _recalled(built, device)
    if tables is None:
        ordered = _in_one_order(grads)
        if m > kernels.MAX_UNROLLED:
            return kernels.gram(ordered, device)
        tables = build(ordered, m, device)
        _leave(built, tables, device, grads, ordered)
    return kernels.gram(grads, device, tables=tables)


def gram_in_metric(grads: Gradients, metric: Metric, built: Built) -> Tensor:
    """Gram matrix, and that in a metric of AdamW's: [2, m, m] float64 on the gradients' device."""
    from raco_fast.kernels import gram_in_metric as kernels

    m, moments = len(grads), metric.moments
    device = next((g.device for one in grads for g in one if g is not None), None)
    if device is None:
        return torch.zeros(2, m, m, dtype=torch.float64)
    numbers = to_device(metric.numbers.float(), device)
    tables = _recalled(built, device)
    if tables is None:
        columns = zip(moments, *grads, strict=True)
        dense = ((t for t in column if t is not None and is_dense(t)) for column in columns)
        like = [next(of_column, None) for of_column in dense]
        *ordered, moments = _in_one_order([*grads, moments], like)
        if m > kernels.MAX_UNROLLED:
            return kernels.gram_in_metric(ordered, moments, numbers, device)
        tables = build([*ordered, moments], m, device)
        _leave(built, tables, device, [*grads, metric.moments], [*ordered, moments])
    return kernels.gram_in_metric(grads, metric.moments, numbers, device, tables)


def products(grads: Gradients, built: Built) -> Tensor:
    """Inner products [n, m, m] of each tensor's m <= 32 gradients: a launch for each tensor."""
    m = len(grads)
    of_each = [gram([[g] for g in column], {}).cpu() for column in zip(*grads, strict=True)]
    return torch.stack(of_each) if of_each else torch.zeros(0, m, m, dtype=torch.float64)


def combine(grads: Gradients, coefficients: Tensor, out: Sequence[Tensor]) -> None:
    """Write G0 = Σ α_i g_i; ValueError for an output that overlaps or has gaps."""
    from raco_fast.kernels.combine import combine as launch

    empty = [all(g is None for g in column) for column in zip(*grads, strict=True)]
    for target, nothing in zip(out, empty, strict=True):
        if nothing:
            target.zero_()
    if not all(empty):
        alpha = to_device(coefficients.float(), out[0].device)
        launch(_in_one_order(grads, out), alpha, out)
    increment_version(out)


def combine_adamw(update: Update, coefficients: Tensor, built: Built) -> None:
    """One AdamW step along G0 = Σ α_i g_i, in float32 and rounded once.

    Coefficients that are not finite leave parameters and states as they are, and step counts too if
    they are on the coefficients' device. ValueError for a parameter or state that overlaps or has
    gaps.
    """
    from raco_fast.kernels.combine_adamw import combine_adamw as launch

    if not update.params:
        return
    device, m = update.params[0].device, len(update.grads)
    rows = _advanced_rows(update, coefficients)
    alpha = coefficients.float()
    if rows.is_cpu and alpha.is_cpu:  # one copy
        sent = to_device(torch.cat([rows.flatten(), alpha]), device)
        rows, alpha = sent[: rows.numel()].view_as(rows), sent[rows.numel() :]
    seed = upload(np.array([update.rounding.seed & 0xFFFFFFFF]), device)
    tables = _recalled(built, device)
    if tables is None:
        ordered = _in_one_order(update.grads, update.params)
        *written, residuals = *update.written[:3], update.rounding.residuals
        written += [[r.view(torch.int16) for r in residuals]] if residuals else []
        tables = build([*ordered, *written], m, device)
        _leave(built, tables, device, update.grads, ordered)
    hyper, alpha = to_device(rows, device), to_device(alpha, device)
    launch(tables, m, hyper, alpha, seed, update.rounding.name, *_places(update, device))
    increment_version([t for one in update.written for t in one])


def _places(update: Update, device: torch.device) -> tuple[Tensor | None, bool]:
    """Where the parameters lie in whole tensors, and whether elements need keys of their own."""
    rounding, params = update.rounding, update.params
    if rounding.name != "stochastic":
        return None, False
    rows = any(_has_rows(place, params[k].numel()) for k, place in enumerate(rounding.places))
    return upload(rounding.place_table(len(params)), device), rows


def _has_rows(place: Place, count: int) -> bool:
    """Whether elements in one chunk may have numbers with gaps, or with different high halves."""
    end = place.offset + count - 1
    return place.width > 0 or (place.offset > 0 and place.offset >> 32 != end >> 32)


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
    """Write or add the m weight gradients of a layer; for one objective that is a plain product.

    Rows that lie with gaps are copied. The table of k-blocks and the coefficients, alike for all
    layers of one pass, are sent once. The kernel holds no t_g that could be shown to `look`, for
    which plain products form them. Products stay on the device, and are those of m <= 8.
    """
    if U is None or len(U) == 1 or look is not None:
        plain.weight_grad(x, dy, bounds, U, out, fresh, False, look)
        return None
    from raco_fast.kernels.weight_grad import weight_grad as launch

    rows = x.contiguous(), dy.contiguous(), bounds
    found = launch(*rows, U.float(), out.unbind(), accumulate=not fresh, products=products)
    increment_version([out])
    return found


def is_on_device(t: Tensor) -> bool:
    """Whether a tensor is where the kernels run."""
    return t.is_cuda


def _impossible(call: Call) -> str | None:
    """What the kernels cannot do."""
    if call.m > MAX_OBJECTIVES:
        return f"its kernels take at most {MAX_OBJECTIVES} objectives, got {call.m}"
    first: Tensor | None = None
    for t in call.tensors():
        first = t if first is None else first
        if not is_on_device(t):
            return "its kernels take CUDA tensors; move the model with .to('cuda')"
        if call.operation == "weight_grad" and call.m == 1:
            return None  # a plain product
        if type(t) not in (Tensor, torch.nn.Parameter):
            return f"its kernels take plain tensors, got a {type(t).__name__}"
        if t.dtype not in _DTYPES:
            return f"its kernels take bfloat16, float16 and float32, got {t.dtype}"
        if t.device != first.device:
            return f"its kernels take tensors of one device, got {first.device} and {t.device}"
        if t.is_neg():
            return "its kernels do not take lazily negated views; pass tensor.resolve_neg()"
    for option in ("amsgrad", "differentiable"):
        if getattr(call.options, option, False):
            return f"its kernels do not have {option}=True"
    return _impossible_layer(call) if call.operation == "weight_grad" else call.recorded()


def _impossible_layer(call: Call) -> str | None:
    out, x, dy = call.tensors()
    if x.dtype not in _HALVES or dy.dtype != x.dtype:
        return (
            f"its kernel takes bfloat16 or float16 inputs and output gradients of one dtype, got "
            f"{x.dtype} and {dy.dtype}"
        )
    if not out[0].is_contiguous():
        return f"its kernel writes contiguous gradients, got strides {out.stride()[1:]}"
    return None


def _slower(call: Call) -> str | None:
    """Why plain torch is the better choice for a layer."""
    if call.m == 1:
        return "one product is a plain product"
    out, x, dy = call.tensors()
    if any(t.data_ptr() % ALIGNMENT for t in (x, dy, out)):
        return f"rows at addresses that are no multiple of {ALIGNMENT} are read one by one"
    groups = sum(start < stop for start, stop in pairwise(call.bounds))
    d_in, d_out = x.shape[1], dy.shape[1]
    if not groups or not pays(len(x), groups, call.m, d_in, d_out):
        return (
            f"m = {call.m} plain products are modelled to be faster for {len(x)} rows in {groups} "
            f"groups, {d_in} by {d_out} features"
        )
    return None


def _advanced_rows(update: Update, coefficients: Tensor) -> Tensor:
    """The step counts advanced, and `hyper_rows` of them."""
    steps = list(update.steps)
    if update.options.capturable and steps[0].device == coefficients.device:
        # Not where the step is skipped, which only the device knows.
        taken = coefficients.isfinite().all().to(steps[0].dtype)
        torch._foreach_add_(steps, [taken] * len(steps))  # with one tensor it waits for the device
        return hyper_rows(torch.stack(steps).reshape(-1), len(steps), update.options)
    counts = advance(steps)
    # All alike unless a parameter joined later; then Python computes the seven numbers faster.
    alike = set(counts.tolist()) if counts.is_cpu else set()
    return hyper_rows(alike.pop() if len(alike) == 1 else counts, len(steps), update.options)


def hyper_rows(t: float | Tensor, n: int, options: AdamWOptions) -> Tensor:
    """The numbers of a step, one row per tensor: [n, 8] float32, columns `combine_adamw.HYPER`.

    They are computed in float64, on the device where the step counts or lr and betas are: on the
    CPU for free, on the GPU without waiting for it.

    Args:
        t: the tensors' step counts [n], already advanced, or the one that they all have.
        n: the number of tensors.
        options: of their group.
    """
    numbers = (t, options.lr, options.beta1, options.beta2)
    places = [x.device for x in numbers if isinstance(x, Tensor)]
    device = next((place for place in places if place.type == "cuda"), torch.device("cpu"))
    t = t.to(device, torch.float64) if isinstance(t, Tensor) else t

    def number(x: float | Tensor) -> float | Tensor:
        # A copy of a CPU tensor to the device would wait for it; torch reads such a number too.
        if isinstance(x, Tensor):
            return float(x) if x.is_cpu else x.to(device, torch.float64)
        return x

    lr, beta1, beta2 = number(options.lr), number(options.beta1), number(options.beta2)
    columns = [
        lr / (1 - beta1**t),
        lr * options.weight_decay,
        1 - beta1,
        1 - beta2,
        (1 - beta2**t) ** -0.5,
        options.eps,
        -1.0 if options.maximize else 1.0,
        t,
    ]
    if not any(isinstance(column, Tensor) for column in columns):
        return torch.tensor(columns, dtype=torch.float32).repeat(n, 1)
    rows = torch.empty(n, len(columns), dtype=torch.float64, device=device)
    for i, column in enumerate(columns):
        rows[:, i] = column
    return rows.float()


def _recalled(built: Built, device: torch.device) -> list[TensorTable] | None:
    """The tables left by an earlier call on this stream; inside of a graph, of any stream."""
    if not built:
        return None
    if capturing(device):
        found: list[TensorTable] = keep_for_graph(next(iter(built.values())))
        return found
    return built.get(stream_of(device))


def _leave(
    built: Built,
    tables: list[TensorTable],
    device: torch.device,
    grads: Gradients,
    ordered: Gradients,
) -> None:
    """Keep the tables for the next call, unless they point at copies, which end with this one."""
    pairs = zip(grads, ordered, strict=True)
    own = all(a is b for one, other in pairs for a, b in zip(one, other, strict=True))
    if own and not capturing(device):
        built[stream_of(device)] = tables


def _in_one_order(grads: Gradients, like: Sequence[Tensor | None] | None = None) -> Gradients:
    """Gradients whose elements lie in the order of `like`, or else of each other.

    One in another order (transposed, expanded, sliced) is copied; this is rare.
    """
    columns = []
    for k, column in enumerate(zip(*grads, strict=True)):
        model = (
            like[k] if like else next((g for g in column if g is not None and is_dense(g)), None)
        )
        columns.append([_ordered(g, model) for g in column])
    return [[column[i] for column in columns] for i in range(len(grads))]


def _ordered(g: Tensor | None, like: Tensor | None) -> Tensor | None:
    if g is None or (like is not None and same_order(g, like)):
        return g
    return g.contiguous() if like is None else torch.empty_like(like, dtype=g.dtype).copy_(g)
