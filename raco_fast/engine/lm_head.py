"""Token log-probabilities through a language model's head, without its full logits.

    logp_n = z_n[target_n] - log Σ_v exp z_n[v],        z = shape(h Wᵀ + b)

The vocabulary is cut into blocks: a block's logits [N, block] exist one at a time, in the forward
pass for the running log-sum-exp, and again in the backward pass. A block of W's rows then gets its
whole gradient in one product over all tokens, rounded once, and each objective's share of it (or
its part of the Gram matrix) while the block is there; cut by tokens instead, a gradient of the
whole head would have to be kept for every objective, and a bfloat16 one be rounded in every chunk.

Logits, log Σ exp and ∂L/∂z are float32 also where h and W are bfloat16: logits rounded to it put
about 0.2 nats on a margin of 32 tokens (bench/margin_noise.py). On a GPU ∂L/∂z is rounded where a
product reads it, beside operands that are bfloat16 themselves; sums over it are float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raco_fast.backends.weight_grad import blocks, operand, widened
from raco_fast.distributed.fsdp2 import owner_of
from raco_fast.engine.contributions import MatrixUse, Rows, Use, vector_use_of_arranged
from raco_fast.engine.declaration import Declared, Entries, declared
from raco_fast.engine.head_products import add_hidden_gradient, logits
from raco_fast.engine.sequences import ALL_ROWS, Segments
from raco_fast.engine.tap import ANCHOR, Tapped, hand_over


@dataclass(frozen=True)
class LogitShape:
    """What some architectures do to logits before the softmax: z = cap tanh(factor y / cap)."""

    factor: float = 1.0
    cap: float | None = None

    def __call__(self, y: Tensor) -> Tensor:
        """The logits z; may overwrite y."""
        return self.logits(self.squashed(y))

    def squashed(self, y: Tensor) -> Tensor:
        """tanh(factor y / cap), or factor y without a cap; in place."""
        t = y.mul_(self.factor) if self.factor != 1.0 else y
        return t if self.cap is None else t.div_(self.cap).tanh_()

    def logits(self, t: Tensor) -> Tensor:
        """z of what `squashed` gave; t itself without a cap."""
        return t if self.cap is None else t * self.cap

    def chained(self, dz: Tensor, t: Tensor) -> Tensor:
        """∂L/∂y from ∂L/∂z, in place; from t, for z / cap is rounded where 1 - t² is small."""
        if self.cap is not None:
            dz.mul_(1 - t.square())
        return dz.mul_(self.factor) if self.factor != 1.0 else dz


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    shape: LogitShape | None = None,
    max_logits: int = 1 << 25,
) -> Tensor:
    """log p(target) of every row.

    Args:
        hidden: [N, d] float.
        weight: [V, d] of the head; bias: [V] or None.
        targets: int64 [N].
        shape: what the model does to its logits.
        max_logits: logits that exist at one time.
    Returns:
        float32 [N] (float64 for float64), differentiable in hidden, weight and bias. With
        `raco_fast.sequences(index)` around the call, index[n] is the sequence of row n.
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    block = _block_of(max_logits, len(targets), cuda=hidden.is_cuda)
    head = _Head(weight, bias, targets, shape or LogitShape(), hidden.dtype, block, declared())
    trained = [p for p in (weight, bias) if p is not None and p.requires_grad]
    logps: Tensor = _TokenLogps.apply(  # type: ignore[no-untyped-call]
        head, hidden, ANCHOR if torch.is_grad_enabled() and trained else None, *trained
    )
    return logps


def _block_of(max_logits: int, tokens: int, *, cuda: bool) -> int:
    """Rows of W at a time; whole vectors of memory, which its kernels need, where they run."""
    block = max(1, max_logits // max(1, tokens))
    return block // 16 * 16 or block if cuda else block


@dataclass(frozen=True)
class _Head:
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    shape: LogitShape
    dtype: torch.dtype
    block: int
    index: Declared | None

    def blocks(self) -> Iterator[slice]:
        """Rows of W whose logits exist at one time."""
        return (slice(*ends) for ends in blocks(len(self.weight), self.block))

    def squashed(self, hidden: Tensor, rows: slice | Tensor) -> Tensor:
        """`LogitShape.squashed` of y [N, rows]; hidden as `operand` gave it."""
        bias = None if self.bias is None else self.bias.detach()[rows]
        return self.shape.squashed(logits(hidden, self.weight.detach()[rows], bias, self.dtype))

    def add_hidden_gradient(self, dx: Tensor, dy: Tensor, rows: slice) -> None:
        """dx [N, d] += what ∂L/∂y [N, rows] gives."""
        add_hidden_gradient(dx, dy, self.weight.detach()[rows], self.dtype)

    def log_sum_exp(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(log Σ exp z, z[target]) of every row, float64: rounded once, not in every block."""
        total = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float64)
        chosen = torch.zeros_like(total)
        hidden = operand(hidden)
        for rows in self.blocks():
            z = self.shape.logits(self.squashed(hidden, rows))
            inside = (self.targets >= rows.start) & (self.targets < rows.stop)
            place = torch.where(inside, self.targets - rows.start, 0)[:, None]
            chosen += torch.where(inside, z.gather(1, place)[:, 0], 0.0)
            total = torch.logaddexp(total, z.logsumexp(1).double())
        return total, chosen


@dataclass(frozen=True)
class _Backward:
    """∂L/∂y of the head's logits, block by block; all rows ordered by `segments`.

    `hidden`: [entries, inner, d], as `operand` gave it; `total`, `targets`, `dlogps`:
    [entries * inner].
    """

    head: _Head
    segments: Segments
    hidden: Tensor
    total: Tensor
    targets: Tensor
    dlogps: Tensor

    def use(self, parameter: Tensor, dy: Tensor) -> Use:
        """What rows of the weight or the bias get from ∂L/∂y [entries * inner, rows]."""
        by_entry = dy.view(*self.hidden.shape[:2], dy.shape[1])
        if parameter is self.head.bias:
            return vector_use_of_arranged(by_entry, self.segments)
        return MatrixUse(self.hidden, by_entry, self.segments)

    def at(self, rows: slice | Tensor) -> Tensor:
        """∂L/∂y [entries * inner, rows] in hidden's dtype."""
        t = self.head.squashed(self.hidden.flatten(0, 1), rows)
        z, total = self.head.shape.logits(t), self.total[:, None].to(t.dtype)
        dz = z.sub_(total).exp_().neg_()  # where z is t, without a cap, t is not read again
        if isinstance(rows, slice):
            inside = (self.targets >= rows.start) & (self.targets < rows.stop)
            place = torch.where(inside, self.targets - rows.start, 0)
        else:
            place = torch.searchsorted(rows, self.targets).clamp_(max=len(rows) - 1)
            inside = rows[place] == self.targets
        dz.scatter_add_(1, place[:, None], inside.to(dz.dtype)[:, None])
        dy = self.head.shape.chained(dz.mul_(self.dlogps[:, None]), t)
        return dy.to(self.hidden.dtype)


class _TokenLogps(Tapped):
    BELOW = 0

    @staticmethod
    def forward(
        ctx: Any, head: _Head, hidden: Tensor, anchor: Tensor | None, *parameters: Tensor
    ) -> Tensor:
        total, chosen = head.log_sum_exp(hidden)
        ctx.save_for_backward(hidden, total)
        ctx.head = head
        Tapped.note(
            ctx,
            layer="the head",
            parameters=tuple(map(owner_of, parameters)),
            leaves=parameters,
            index=head.index,
            shape=hidden.shape,
            look=len(parameters),
            checks=None,
            broadcasts=False,
        )
        return (chosen - total).to(widened(hidden[:0]).dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlogps: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, total = ctx.saved_tensors
        if dlogps is None:
            return None, None, None, *[None] * len(ctx.parameters)
        at_rows = dlogps[:, None]
        call = _HeadCall(ctx.entries, at_rows, ctx.head, hidden.detach(), total, ctx.leaves)
        if ctx.collector is not None:
            hand_over(ctx.collector, call)
            return None, call.hidden_gradient(), None, *[None] * len(ctx.parameters)
        return None, *call.ordinary_gradients()


@dataclass(eq=False)
class _HeadCall:
    """A `Call`; `dy`: ∂L/∂logps [N, 1], `total`: log Σ exp z [N]."""

    entries: Entries
    dy: Tensor
    _head: _Head
    _hidden: Tensor
    _total: Tensor
    _parameters: tuple[Tensor, ...]
    layer: str = "the head"
    _hidden_gradient: Tensor | None = None

    def uses(self, segments: Segments) -> Iterator[tuple[Tensor, slice, Use]]:
        """A block of the head at a time; the gradient of `hidden` grows on the way."""
        back = self._arranged(segments)
        dx = widened(back.hidden[:0]).new_zeros(back.hidden.shape)
        for rows in self._head.blocks():
            dy = back.at(rows)
            self._head.add_hidden_gradient(dx.flatten(0, 1), dy, rows)
            for p in self._parameters:
                yield owner_of(p), rows, back.use(p, dy)
        self._hidden_gradient = segments.restored(dx, self._hidden)

    def rows(self, parameter: Tensor, segments: Segments) -> Rows:
        """Rows of a parameter's t_g at the price of their own logits."""
        leaf = next(p for p in self._parameters if owner_of(p) is parameter)
        return _HeadRows(self._arranged(segments), leaf)

    def keep(self) -> None:
        """Nothing of the graph is held."""

    def _arranged(self, segments: Segments) -> _Backward:
        columns = (self._total[:, None], self._head.targets[:, None], self.dy)
        rows = (segments.arranged(x).flatten() for x in columns)
        hidden = operand(segments.arranged(self._hidden))
        return _Backward(self._head, segments, hidden, *rows)

    def ordinary_gradients(self) -> tuple[Tensor | None, ...]:
        """Those of `hidden`, of the anchor (None) and of the parameters."""
        gradients = {owner_of(p): p.new_empty(1, *p.shape) for p in self._parameters}
        with torch.autocast(self.dy.device.type, enabled=False):
            for p, rows, use in self.uses(ALL_ROWS):
                use.add_to(gradients[p][:, rows], None, fresh=True)
            hidden = self.hidden_gradient()
        return hidden, None, *(gradient[0] for gradient in gradients.values())

    def hidden_gradient(self) -> Tensor:
        """∂L/∂hidden: formed beside the parameters' gradients, or by itself without them."""
        if self._hidden_gradient is None:
            for _ in self.uses(ALL_ROWS):
                pass
        assert self._hidden_gradient is not None
        return self._hidden_gradient


@dataclass(frozen=True)
class _HeadRows:
    back: _Backward
    parameter: Tensor

    def at(self, ids: Tensor) -> Tensor:
        parts = []
        for start, stop in blocks(len(ids), self.back.head.block):
            some = ids[start:stop]
            use = self.back.use(self.parameter, self.back.at(some))
            parts.append(use.at(torch.arange(len(some), device=ids.device)))
        return torch.cat(parts, 1)
