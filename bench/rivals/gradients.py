"""What people write instead: the Gram and the combination in plain torch, five ways.

Each rival is at its best: sums of the Gram in float32 (the paper's code adds up in the gradients'
dtype), one transfer to the host, torch's fused AdamW behind it.
"""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor

from bench.harness.problems import ADAMW, STEPS_BEFORE, Tensors, Weights

Grads = Sequence[Tensors]
# Elements per block of the flattened copy: matrix products take sizes below 2^31.
_FLAT_BLOCK = 1 << 28
# What is compiled anew for every m, at several seconds each, is compiled for these.
COMPILED_FOR = (2, 4)


class Rival:
    """A way to do both halves of a step.

    `gram(grads)` is [m, m] float64 on the CPU; `combine(grads, alpha)`, which comes after it on the
    same gradients, G0 = Σ α_i g_i, one tensor per parameter.
    """

    def update(self, weights: Weights, grads: Grads, alpha: Sequence[float]) -> None:
        """One AdamW step along G0."""
        weights.step_of_adamw(self.combine(grads, alpha))

    def forget(self) -> None:
        """Free what `gram` keeps for `combine`."""


class Paper(Rival):
    """The paper's arithmetic: per parameter, `(a * b).sum()` and `α_1 * g_1 + α_2 * g_2 + ...`."""

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum()

    def add(self, total: Tensor, a: float, g: Tensor) -> Tensor:
        return total + a * g

    def gram(self, grads: Grads) -> Tensor:
        upper = combinations_with_replacement(grads, 2)
        sums = [torch.stack([*map(self.dot, *pair)]).float().sum() for pair in upper]
        return _symmetric(torch.stack(sums), len(grads))

    def combine(self, grads: Grads, alpha: Sequence[float]) -> Tensors:
        combined = []
        for column in zip(*grads, strict=True):
            total = alpha[0] * column[0]
            for a, g in zip(alpha[1:], column[1:], strict=True):
                total = self.add(total, a, g)
            combined.append(total)
        return combined


class Dot(Paper):
    """The same with `torch.dot` and sums in place: what per-parameter torch can do."""

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.dot(a.view(-1), b.view(-1))

    def add(self, total: Tensor, a: float, g: Tensor) -> Tensor:
        return total.add_(g, alpha=a)


class Foreach(Rival):
    """`torch._foreach`: norms of g_i and of g_i + g_j (there is no dot), and sums in place."""

    def gram(self, grads: Grads) -> Tensor:
        squares = []
        for i, one in enumerate(grads):
            squares.append(_square(one))
            squares += [_square(torch._foreach_add(one, other)) for other in grads[i + 1 :]]
        M = _symmetric(torch.stack(squares), len(grads))
        of_sums = M - M.diagonal() - M.diagonal()[:, None]
        return (of_sums / 2).diagonal_scatter(M.diagonal())

    def combine(self, grads: Grads, alpha: Sequence[float]) -> Tensors:
        total = torch._foreach_mul(grads[0], alpha[0])
        for a, one in zip(alpha[1:], grads[1:], strict=True):
            torch._foreach_add_(total, one, alpha=a)
        return list(total)


class Cat(Rival):
    """`torch.cat` into m rows, G Gᵀ and αᵀG: one flattened copy serves both."""

    def __init__(self) -> None:
        self.forget()

    def gram(self, grads: Grads) -> Tensor:
        self.forget()
        blocks = _flattened(grads)
        M = torch.stack([G @ G.T for G, _ in blocks]).float().sum(0).cpu().double()
        self.blocks = blocks  # now that nothing can fail: a rival that failed holds no memory
        return M

    def combine(self, grads: Grads, alpha: Sequence[float]) -> Tensors:
        row = torch.tensor(alpha, dtype=grads[0][0].dtype, device=grads[0][0].device)
        flat = [piece for G, sizes in self.blocks for piece in (row @ G).split(sizes)]
        self.forget()
        return [piece.view_as(g) for piece, g in zip(flat, grads[0], strict=True)]

    def forget(self) -> None:
        self.blocks: list[tuple[Tensor, list[int]]] = []


class Compiled(Rival):
    """`torch.compile` of the plain arithmetic: every gradient is read once, a launch per tensor."""

    def gram(self, grads: Grads) -> Tensor:
        compiled = _compiled(_products)
        sums = [compiled([g.view(-1) for g in column]) for column in zip(*grads, strict=True)]
        return _symmetric(torch.stack(sums).sum(0), len(grads))

    def update(self, weights: Weights, grads: Grads, alpha: Sequence[float]) -> None:
        compiled, device = _compiled(_adamw), grads[0][0].device
        beta1, beta2 = ADAMW["betas"]
        t = STEPS_BEFORE + 1
        rates = [ADAMW["lr"] / (1 - beta1**t), (1 - beta2**t) ** -0.5]
        numbers = torch.tensor([*rates, *alpha], dtype=torch.float32).to(device)
        rows = zip(weights.theirs, weights.exp_avgs, weights.exp_avg_sqs, *grads, strict=True)
        for row in rows:
            p, m, v, *gs = (t.detach().view(-1) for t in row)
            compiled(p, m, v, gs, numbers)


def rivals(m: int, skip: Sequence[str]) -> dict[str, Rival]:
    """Those that are measured at m objectives, by name."""
    found = {"paper": Paper(), "dot": Dot(), "foreach": Foreach(), "cat": Cat()}
    if m in COMPILED_FOR:
        found["compile"] = Compiled()
    return {name: rival for name, rival in found.items() if name not in skip}


def _square(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors, dtype=torch.float32)).square().sum()


def _symmetric(upper: Tensor, m: int) -> Tensor:
    """[m, m] float64 on the CPU from the m(m+1)/2 entries of its upper half."""
    M = torch.zeros(m, m, dtype=torch.float64)
    row, column = torch.triu_indices(m, m)
    M[row, column] = M[column, row] = upper.cpu().double()
    return M


def _flattened(grads: Grads) -> list[tuple[Tensor, list[int]]]:
    """[m, n] blocks of whole tensors, each with the sizes of its tensors."""
    blocks, sizes, size = [], [], 0
    for k, g in enumerate(grads[0], start=1):
        sizes.append(g.numel())
        size += g.numel()
        if size >= _FLAT_BLOCK or k == len(grads[0]):
            block = g.new_empty(len(grads), size)
            for row, one in zip(block, grads, strict=True):
                torch.cat([t.view(-1) for t in one[k - len(sizes) : k]], out=row)
            blocks.append((block, sizes))
            sizes, size = [], 0
    return blocks


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Sizes are symbols: one compilation for all tensors of a model instead of one for each size.
    # Every m and dtype is a recompilation; at its limit torch would quietly run the plain code.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=True, fullgraph=True)


def _products(gs: Tensors) -> Tensor:
    wide = [g.float() for g in gs]
    return torch.stack([(a * b).sum() for i, a in enumerate(wide) for b in wide[i:]])


def _adamw(p: Tensor, m: Tensor, v: Tensor, gs: Tensors, numbers: Tensor) -> None:
    """`numbers`: lr/(1-β1^t), 1/√(1-β2^t), α."""
    beta1, beta2 = ADAMW["betas"]
    g = sum(numbers[2 + i] * one.float() for i, one in enumerate(gs))
    m_new = beta1 * m.float() + (1 - beta1) * g
    v_new = beta2 * v.float() + (1 - beta2) * g * g
    change = numbers[0] * m_new / (v_new.sqrt() * numbers[1] + ADAMW["eps"])
    p.copy_(p.float() * (1 - ADAMW["lr"] * ADAMW["weight_decay"]) - change)
    m.copy_(m_new)
    v.copy_(v_new)
