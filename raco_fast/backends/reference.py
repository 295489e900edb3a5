"""The plain-torch backend: the twin that every fast kernel is compared with, and its fallback.

Operations over lists of tensors, without a flattened copy of the model (that for one layer is in
`weight_grad.py`):

    products       ⟨g_i, g_j⟩ of each tensor of a model; `gram`, M, is their sum
    gram_in_metric M, and the same of √D g_i for AdamW's D
    combine        G0 = Σ α_i g_i, written to one tensor per parameter
    combine_adamw  the same G0, formed bucket by bucket and handed to torch's own AdamW; where
                   bfloat16 weights are rounded otherwise than to nearest, on float32 copies

Products are float32 (float64 for float64 gradients) whatever the gradient dtype; their sums are
float64 and run in a fixed order, so equal inputs give equal bits with any number of threads.
A missing gradient (None) counts as zeros.  Source: arXiv 2602.02495, Algorithm 1.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations_with_replacement

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from raco_fast.backends.summed import summed
from raco_fast.backends.types import Built, Call, Gradients, Metric, Update
from raco_fast.backends.weight_grad import weight_grad as weight_grad
from raco_fast.backends.weight_grad import widened

name = "reference"
on_device = unproved = False

# Elements per sum of products: m blocks stay in a cache, so each gradient is read from memory once
# although it takes part in m products. On the CPU fewer than the 32768 from which torch cuts a sum
# by the number of threads; on a device, where it does not, so many that launches cost little.
_BLOCK = 32_000
_DEVICE_BLOCK = 1 << 20
# Devices without float64: there sums of a block are float32, which torch forms as a tree.
_WITHOUT_FLOAT64 = ("mps",)
# Bytes of G0 that exist at one time in combine_adamw; a whole G0 would be an (m + 1)-th gradient.
_BUCKET_BYTES = 64 << 20


def missing() -> str | None:
    """None: every machine can run it."""
    return None


def obstacle(call: Call, forced: bool) -> str | None:
    """None: it takes every call."""
    return None


def gram(grads: Gradients, built: Built | None = None) -> Tensor:
    """Gram matrix [m, m] of m lists of gradients; complex numbers count as pairs of real ones."""
    return summed(products(grads))


def gram_in_metric(grads: Gradients, metric: Metric, built: Built | None = None) -> Tensor:
    """[2, m, m]: the Gram matrix, and that of the gradients times √D."""
    return summed(_products(grads, metric))


def products(grads: Gradients, built: Built | None = None) -> Tensor:
    """Inner products [n, m, m] of each tensor's m gradients."""
    return _products(grads, None)[:, 0]


def _products(grads: Gradients, metric: Metric | None) -> Tensor:
    """[n, 1 or 2, m, m], of each tensor's m gradients and, with a metric, of those times √D."""
    m, parts = len(grads), 1 if metric is None else 2
    places: dict[torch.device, list[tuple[int, int, int, int]]] = {}
    dots: dict[torch.device, list[Tensor]] = {}
    for k, column in enumerate(zip(*grads, strict=True)):
        v = None if metric is None else metric.moments[k]
        for device, (moment, *block) in _blocks((v, *column)):
            kinds = [block]
            if moment is not None and metric is not None:
                root = _root_of_weight(moment, *metric.numbers[k].tolist())
                kinds.append([None if g is None else g * root for g in block])
            for part, rows in enumerate(kinds):
                for i, j in combinations_with_replacement(range(m), 2):
                    a, b = rows[i], rows[j]
                    if a is not None and b is not None:
                        places.setdefault(device, []).append((k, part, i, j))
                        dots.setdefault(device, []).append(_dot(a, b))
    found = torch.zeros(len(grads[0]), parts, m, m, dtype=torch.float64).numpy()
    for device, of_device in dots.items():
        values = torch.stack(of_device).cpu().tolist()  # one transfer per device
        for place, value in zip(places[device], values, strict=True):
            found[place] += value
    upper = torch.from_numpy(found)
    return upper + upper.triu(1).mT


def _root_of_weight(v: Tensor, root: float, eps: float, factor: float) -> Tensor:
    """√D of a block; 0 where v is."""
    found = (factor / (v.sqrt() * root + eps)).sqrt()
    return found.where(v != 0, 0.0)


def combine(grads: Gradients, coefficients: Tensor, out: Sequence[Tensor]) -> None:
    """Write G0 = Σ α_i g_i; zeros where every gradient is None."""
    alpha = coefficients.tolist()
    for column, target in zip(zip(*grads, strict=True), out, strict=True):
        if all(g is None for g in column):
            target.zero_()
        elif (total := _weighted_sum(column, alpha)) is not target:
            target.copy_(total)


def combine_adamw(update: Update, coefficients: Tensor, built: Built | None = None) -> None:
    """One AdamW step along G0 = Σ α_i g_i; parameters and states change in place.

    With one objective and α = 1 the gradient itself goes to torch's `adamw`, so the result is
    that of `torch.optim.AdamW` to the last bit. With another rounding than to nearest, `adamw`
    runs on float32 weights and states, which are then rounded: "split" with float32 states is
    `torch.optim.AdamW` on float32 parameters, to the last bit.
    """
    params, options, rounding = update.params, update.options, update.rounding
    alpha = coefficients.tolist()
    columns = list(zip(*update.grads, strict=True))
    for bucket in _buckets(params):
        maxima = bucket if options.amsgrad else []
        stored = [
            [update.exp_avgs[k] for k in bucket],
            [update.exp_avg_sqs[k] for k in bucket],
            [update.max_exp_avg_sqs[k] for k in maxima],
        ]
        weights, states = [params[k] for k in bucket], stored
        if rounding.name != "nearest":
            weights = [rounding.opened(params[k], k) for k in bucket]
            states = [[s.float() for s in one] for one in stored]
        combined = [
            _weighted_sum(columns[k], alpha).to(w.dtype)
            for k, w in zip(bucket, weights, strict=True)
        ]
        adamw(
            weights,
            combined,
            states[0],
            states[1],
            states[2],
            [update.steps[k] for k in bucket],
            has_complex=any(w.is_complex() for w in weights),
            **vars(options),
        )
        if rounding.name != "nearest":
            for k, w in zip(bucket, weights, strict=True):
                rounding.store(w, params[k], k, update.steps[k])
            for one, wide in zip(stored, states, strict=True):
                for state, new in zip(one, wide, strict=True):
                    state.copy_(new)


def _blocks(column: Sequence[Tensor | None]) -> Iterator[tuple[torch.device, list[Tensor | None]]]:
    """Cut the tensors of one parameter alike into flat blocks of product precision."""
    flat = [None if g is None else _as_real(g.detach()).reshape(-1) for g in column]
    present = [f for f in flat if f is not None]
    if not present:
        return
    device = present[0].device
    size = _BLOCK if device.type == "cpu" else _DEVICE_BLOCK
    for start in range(0, present[0].numel(), size):
        yield device, [None if f is None else widened(f[start : start + size]) for f in flat]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ of two blocks. Not by `torch.dot`: how that adds float32 products is a matter of the
    machine and its threads, and on some it is further from float64 than any kernel.
    """
    wide = torch.float32 if a.device.type in _WITHOUT_FLOAT64 else torch.float64
    return (a * b).sum(dtype=torch.promote_types(a.dtype, wide))


def _weighted_sum(column: Sequence[Tensor | None], alpha: Sequence[float]) -> Tensor:
    """Σ α_i g_i in at least float32; the gradient itself where it is alone with α = 1."""
    terms = [(a, g) for a, g in zip(alpha, column, strict=True) if g is not None]
    assert terms, "a parameter without any gradient reached combine_adamw"
    (a, g), *rest = terms
    if not rest and a == 1.0:
        return g
    total = widened(g) * a
    for a, g in rest:
        total.add_(g, alpha=a)
    return total


def _buckets(params: Sequence[Tensor]) -> Iterator[list[int]]:
    """Consecutive indices whose tensors together stay near `_BUCKET_BYTES`."""
    bucket: list[int] = []
    size = 0
    for k, p in enumerate(params):
        bucket.append(k)
        size += p.numel() * p.element_size()
        if size >= _BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def _as_real(g: Tensor) -> Tensor:
    return torch.view_as_real(g.resolve_conj()) if g.is_complex() else g
