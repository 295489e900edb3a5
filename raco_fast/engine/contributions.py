"""What one use of a parameter in a forward pass adds to its per-objective gradients.

A use knows, for each group g of sequences (`sequences.py`), the gradient t_g of the parameter; the
m gradients are G_i = Σ_g U_ig t_g. It can add them to m buffers, or give the inner products
K_gh = ⟨t_g, t_h⟩ from which the Gram matrix follows as U K Uᵀ without any of the m gradients:

    MatrixUse   t_g = dY_gᵀ X_g: every weight that multiplies (Linear, Conv1D, a block of a head)
    EntryUse    the same from the t of every entry, where that is small, and rows summed over the
                group: biases, norm weights
    ThinUse     a matrix with few rows or columns (LoRA's), from rows that lie in any order
    LookupUse   t_g = rows of dY added up by token id: embeddings

Sums are float32 (float64 for float64) whatever the dtype of x and dY, so a bfloat16 gradient is
rounded once.
"""

from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from raco_fast.backends import ops
from raco_fast.backends.transfer import sent
from raco_fast.backends.weight_grad import (
    add_thin,
    batched_product,
    of_groups,
    operand,
    product,
    row_blocks,
    store,
    widened,
)
from raco_fast.engine.inner_products import products, products_within
from raco_fast.engine.sequences import Segments

# Numbers for which a call costs more than its arithmetic.
_FEW = 1 << 18
# How many times as long as its short side a matrix is that counts as thin: below, a product for
# every further objective costs more than putting the rows in order.
_THIN = 16


class Rows(Protocol):
    """Something that can give some rows of its t_g without the others."""

    def at(self, ids: Tensor) -> Tensor:
        """[groups, len(ids), *rest]: the rows `ids` (sorted, distinct) of every t_g."""


class Use(Rows, Protocol):
    """One use of one parameter; see the module's docstring."""

    def add_to(self, out: Tensor, U: Tensor | None, fresh: bool) -> object:
        """out [m, *shape of the parameter] += Σ_g U_ig t_g; = where `fresh`.

        Args:
            U: [m, groups]; None stands for one group with coefficient 1.
        """

    def gram(self) -> Tensor:
        """K [groups, groups] float64 on the parameter's device."""

    def within(self, each: int) -> Tensor:
        """The blocks of K of so many consecutive groups: [groups / each, each, each] float64."""

    def add_and_look(
        self, out: Tensor, U: Tensor, fresh: bool, each: int, products: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """`add_to` and `within` at the price of one where t_g is formed for both.

        Returns:
            What `within` gives; with `products` also those of `out` where they are to be had.
        """
        self.add_to(out, U, fresh)
        return self.within(each), None


class MatrixUse(Use):
    """t_g = dY_gᵀ X_g, of shape [d_out, d_in].

    Args:
        x, dy: [entries, inner, d_in] and [entries, inner, d_out], ordered by `segments`.
    """

    def __init__(self, x: Tensor, dy: Tensor, segments: Segments) -> None:
        for rows in (x, dy):
            _check_arranged(rows, segments)
        inner = x.shape[1]
        self._x, self._dy = x.flatten(0, 1), dy.flatten(0, 1)
        self.bounds = [offset * inner for offset in segments.offsets]

    @cached_property
    def x(self) -> Tensor:
        """[rows, d_in] as plain products read it."""
        return operand(self._x)

    @cached_property
    def dy(self) -> Tensor:
        """[rows, d_out] as plain products read it."""
        return operand(self._dy)

    def add_to(
        self, out: Tensor, U: Tensor | None, fresh: bool, products: bool = False
    ) -> Tensor | None:
        """As `Use.add_to`; returns the `products` of `out` where `ops.weight_grad` has them."""
        return ops.weight_grad(self._x, self._dy, self.bounds, U, out, fresh, products)

    def add_and_look(
        self, out: Tensor, U: Tensor, fresh: bool, each: int, products: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        if self._x.is_cuda:  # whose kernel forms no t_g
            of_out = self.add_to(out, U, fresh, products)
            return self.within(each), of_out
        found: list[Tensor] = []

        def look(t: Tensor) -> None:
            found.append(products_within(t, each))

        rows = self._x, self._dy, self.bounds
        of_out = ops.weight_grad(*rows, U, out, fresh, products, look)
        return torch.stack(found).sum(0), of_out

    def within(self, each: int) -> Tensor:
        """From token pairs or from blocks of t_g, whichever is the smaller product."""
        d_out, d_in = self.dy.shape[1], self.x.shape[1]
        sizes = torch.tensor(self.bounds[::each]).diff()
        if int((sizes**2).sum()) * (d_out + d_in) < int(sizes.sum()) * d_out * d_in:
            return self._within_of_token_pairs(each)
        groups = len(self.bounds) - 1
        K = self.x.new_zeros(groups // each, each, each, dtype=torch.float64)
        for start, stop in row_blocks(d_out, 4 * groups * d_in):
            K += products_within(self._t(self.dy[:, start:stop]).flatten(1), each)
        return K

    def _within_of_token_pairs(self, each: int) -> Tensor:
        found = self.x.new_zeros(len(self.bounds) - 1, each, dtype=torch.float64)
        for first in range(0, len(found), each):
            ends = self.bounds[first : first + each + 1]
            rows = slice(ends[0], ends[-1])
            pairs = product(self.x[rows], self.x[rows].T)
            pairs.mul_(product(self.dy[rows], self.dy[rows].T))
            sizes = [stop - start for start, stop in pairwise(ends)]
            for k, of_group in enumerate(torch.split(pairs, sizes)):
                columns = of_group.sum(0, dtype=torch.float64)
                found[first + k] = torch.stack([c.sum() for c in torch.split(columns, sizes)])
        return found.view(-1, each, each)

    def gram(self) -> Tensor:
        """From token pairs where that is the smaller product ("ghost"), else from blocks of t_g."""
        rows, (d_out, d_in) = len(self.x), (self.dy.shape[1], self.x.shape[1])
        if rows * (d_out + d_in) < 2 * d_out * d_in:
            return self._gram_of_token_pairs()
        K = _zeros(len(self.bounds) - 1, self.x)
        for start, stop in row_blocks(d_out, 4 * len(K) * d_in):
            K += products(self._t(self.dy[:, start:stop]).flatten(1))
        return K

    def _gram_of_token_pairs(self) -> Tensor:
        """K_gh = Σ over tokens s of g and t of h of (x_s · x_t)(dy_s · dy_t)."""
        groups = len(self.bounds) - 1
        K = _zeros(groups, self.x)
        for g in range(groups):
            of_g, later = slice(*self.bounds[g : g + 2]), slice(self.bounds[g], None)
            pairs = product(self.x[of_g], self.x[later].T)
            pairs.mul_(product(self.dy[of_g], self.dy[later].T))
            columns = pairs.sum(0, dtype=torch.float64)
            sizes = [b - a for a, b in zip(self.bounds[g:], self.bounds[g + 1 :], strict=False)]
            row = torch.stack([part.sum() for part in torch.split(columns, sizes)])
            K[g, g:] = K[g:, g] = row
        return K

    def at(self, ids: Tensor) -> Tensor:
        return self._t(self.dy.index_select(1, ids))

    def _t(self, dy: Tensor) -> Tensor:
        return of_groups(self.x, dy, self.bounds)


class EntryUse(Use):
    """t of each entry, small enough to be held: nothing large is put in the order of the groups.

    Args:
        t: [entries, *shape of the parameter], float32 or wider, in the order of the layer.
    """

    def __init__(self, t: Tensor, segments: Segments) -> None:
        self.t, self.segments = t, segments

    def add_to(self, out: Tensor, U: Tensor | None, fresh: bool) -> None:
        if U is None:
            store(out, self.segments.summed(self.t), fresh)
            return
        U, t, target = self.segments.spread(U, self.t), self.t.flatten(1), out.flatten(1)
        if fresh and out.dtype == t.dtype:
            torch.mm(U, t, out=target)
        else:
            store(target, U @ t, fresh)

    def gram(self) -> Tensor:
        return products(self.segments.summed(self.t).flatten(1))

    def within(self, each: int) -> Tensor:
        return products_within(self.segments.summed(self.t).flatten(1), each)

    def at(self, ids: Tensor) -> Tensor:
        return self.segments.summed(self.t).index_select(1, ids)


class FactorsUse(EntryUse):
    """t of each entry as its two factors, so that the products of many layers can be one.

    Args:
        x, dy: [entries, inner, d_in] and [entries, inner, d_out], in the order of the layer.
    """

    def __init__(self, x: Tensor, dy: Tensor, segments: Segments) -> None:
        self.x, self.dy, self.segments = x, dy, segments

    @cached_property
    def t(self) -> Tensor:  # type: ignore[override]
        return batched_product(self.dy.transpose(1, 2), self.x)


def vector_use(rows: Tensor, segments: Segments) -> EntryUse:
    """t_g = the sum of the group's rows, of shape [d], from a layer's rows [..., d] as they lie."""
    return EntryUse(widened(segments.split(rows)).sum(1), segments)


def vector_use_of_arranged(rows: Tensor, segments: Segments) -> EntryUse:
    """The same from rows [entries, inner, d] that `segments` has put in order."""
    _check_arranged(rows, segments)
    inner, count = rows.shape[1], segments.count
    by_row = Segments(rows.shape[0] * inner, None, tuple(b * inner for b in segments.offsets))
    t = by_row.summed(widened(rows).flatten(0, 1))
    return EntryUse(t, Segments(count, None, tuple(range(count + 1))))


class ThinUse(Use):
    """t_g = dY_gᵀ X_g where one of both has few columns: nothing wide is put in order.

    Each row of the thin side is scaled by its m coefficients, and one product gives all gradients.

    Args:
        x, dy: [..., d_in] and [..., d_out], as the layer has them.
    """

    def __init__(self, x: Tensor, dy: Tensor, segments: Segments) -> None:
        self._x, self._dy, self._segments = x, dy, segments

    @cached_property
    def _arranged(self) -> MatrixUse:
        arranged = self._segments.arranged
        return MatrixUse(arranged(self._x), arranged(self._dy), self._segments)

    def add_to(self, out: Tensor, U: Tensor | None, fresh: bool) -> None:
        d_out, d_in = out.shape[1:]
        if U is None or len(U) * min(d_out, d_in) > max(d_out, d_in):
            self._arranged.add_to(out, U, fresh)
            return
        x, dy = (operand(self._segments.split(rows)) for rows in (self._x, self._dy))
        scales = self._segments.spread(U, widened(x[:0]), x.shape[1])
        add_thin(x.flatten(0, 1), dy.flatten(0, 1), scales, out, fresh)

    def gram(self) -> Tensor:
        return self._arranged.gram()

    def within(self, each: int) -> Tensor:
        return self._arranged.within(each)

    def add_and_look(
        self, out: Tensor, U: Tensor, fresh: bool, each: int, products: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Rows have to be put in order for t_g, which then gives the gradients as well."""
        return self._arranged.add_and_look(out, U, fresh, each, products)

    def at(self, ids: Tensor) -> Tensor:
        return self._arranged.at(ids)


def matrix_use(x: Tensor, dy: Tensor, segments: Segments) -> Use:
    """t_g = dY_gᵀ X_g of a layer's x [..., d_in] and dy [..., d_out] as they lie.

    A thin matrix (LoRA's) costs less to form for every entry than its rows cost to put in order.
    """
    d_in, d_out = x.shape[-1], dy.shape[-1]
    rows, held = x.numel() // max(1, d_in), segments.entries * d_in * d_out
    # Rows in order already cost nothing but a call for each group.
    most = _FEW if segments.order is None else max(_FEW, rows * (d_in + d_out))
    if held <= most:
        return FactorsUse(segments.split(x), segments.split(dy), segments)
    if _THIN * min(d_in, d_out) <= max(d_in, d_out):
        return ThinUse(x, dy, segments)
    return MatrixUse(segments.arranged(x), segments.arranged(dy), segments)


class LookupUse(Use):
    """t_g = Σ over the group's rows r of dY_r at row ids_r, of shape [vocabulary, d].

    Args:
        ids: [entries, inner, 1] int64; dy: [entries, inner, d]; both ordered by `segments`.
        scale: factor of the lookup's output.
        padding: the id whose row gets no gradient, or None.
    """

    def __init__(
        self, ids: Tensor, dy: Tensor, segments: Segments, scale: float, padding: int | None
    ) -> None:
        for rows in (ids, dy):
            _check_arranged(rows, segments)
        inner = ids.shape[1]
        self.group = segments.of_rows(inner, dy.device)
        self.count = segments.count
        self.all_ids, self.dy = ids.flatten(), widened(dy).flatten(0, 1) * scale
        if padding is not None:  # chosen, not multiplied by 0, which keeps NaN and infinity
            self.dy = torch.where((self.all_ids != padding)[:, None], self.dy, 0.0)
        self.ids, self.place = torch.unique(self.all_ids, return_inverse=True)

    def add_to(self, out: Tensor, U: Tensor | None, fresh: bool) -> None:
        if fresh:
            out.zero_()
        U = self.dy.new_ones(1, 1) if U is None else sent(U.to(self.dy.dtype), self.dy.device)
        for target, scale in zip(out, U[:, self.group], strict=True):
            rows = self.dy.new_zeros(len(self.ids), self.dy.shape[1])
            # Not index_add_, which adds in no fixed order on a GPU.
            rows.index_put_((self.place,), self.dy * scale[:, None], accumulate=True)
            target[self.ids] += rows.to(target.dtype)

    def gram(self) -> Tensor:
        K = _zeros(self.count, self.dy)
        for start, stop in self.blocks():
            K += products(self.at(self.ids[start:stop]).flatten(1))
        return K

    def within(self, each: int) -> Tensor:
        K = self.dy.new_zeros(self.count // each, each, each, dtype=torch.float64)
        for start, stop in self.blocks():
            K += products_within(self.at(self.ids[start:stop]).flatten(1), each)
        return K

    def at(self, ids: Tensor) -> Tensor:
        t = self.dy.new_zeros(self.count, len(ids), self.dy.shape[1])
        place = torch.searchsorted(ids, self.all_ids).clamp_(max=len(ids) - 1)
        here = ids[place] == self.all_ids
        t.index_put_((self.group[here], place[here]), self.dy[here], accumulate=True)
        return t

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of `ids` whose t_g together stay small."""
        row_bytes = self.count * self.dy.shape[1] * self.dy.element_size()
        return row_blocks(len(self.ids), row_bytes)


def _check_arranged(rows: Tensor, segments: Segments) -> None:
    if rows.ndim != 3 or len(rows) != segments.offsets[-1]:
        raise ValueError(
            f"the rows of a use must have shape [{segments.offsets[-1]} entries, inner, d], got "
            f"{list(rows.shape)}; order them by segments.arranged(rows)"
        )


def _zeros(groups: int, like: Tensor) -> Tensor:
    return torch.zeros(groups, groups, dtype=torch.float64, device=like.device)
