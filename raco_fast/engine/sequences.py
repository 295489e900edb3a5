"""Which rows of a layer belong to which sequence, and how sequences share one gradient direction.

With A = ∂L/∂scores (m x B) and t_b = ∂(score b)/∂W, the m gradients are G_i = Σ_b A_ib t_b. Columns
of A that are parallel need only one gradient between them, so A is factored as

    A_ib = U_ig s_b        g = group of sequence b, s_b = the seed of its backward pass

and the backward pass of Σ_b s_b score_b delivers rows that already carry their seed. The responses
of one pair are parallel (one is minus the other), and so are pairs on which all objectives agree.
The seeds also give the rows the magnitude of an ordinary backward pass, which float16 needs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite

import torch
from torch import Tensor

from raco_fast.backends.transfer import sent
from raco_fast.backends.weight_grad import blocks
from raco_fast.engine.declaration import Declared

# Columns are parallel if every entry agrees to this, relative to itself: a few float32 roundings,
# as in IPO's division by the number of tokens. Relative to a column's largest entry, what an
# objective with gradients of 1e-6 beside another's 1 has of its own would be lost.
_PARALLEL = 5e-7

# Within a pair the declaration says so, and only rounding has to be told from another direction:
# over all losses of `raco_fast.dpo.losses` that are functions of a pair it is up to 2e-7.
_PARALLEL_PAIR = 2e-6

# Numbers that exist at one time while every column is held against every other.
_COMPARED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Segments:
    """The rows of a layer in the order of their groups.

    `entries`: how many leading entries the layer's tensors have; `order`: those to take, in this
    order (None: all, as they lie); `offsets`: [groups + 1], where each group begins among them;
    `outer`: how often the entries are repeated by dimensions before theirs (heads before tokens);
    `order_on_host`: `order` on the CPU, so that nobody has to wait for a device to send it back.
    """

    entries: int
    order: Tensor | None
    offsets: tuple[int, ...]
    outer: int = 1
    order_on_host: Tensor | None = None

    @property
    def count(self) -> int:
        """The number of groups."""
        return len(self.offsets) - 1

    def split(self, x: Tensor) -> Tensor:
        """[entries, inner, d] of x [..., d], whose entries hold `inner` rows each, as they lie."""
        if self.outer == 1 and x.ndim == 3 and x.shape[0] == self.entries:
            return x
        if not x.numel():
            return x.new_zeros(self.entries, 0, x.shape[-1])
        return x.reshape(self.outer, self.entries, -1, x.shape[-1]).transpose(0, 1).flatten(1, 2)

    def arranged(self, x: Tensor) -> Tensor:
        """[taken, inner, d]: the entries of `split` in the order of their groups."""
        rows = self.split(x)
        return rows if self.order is None else rows.index_select(0, self.order)

    def summed(self, t: Tensor) -> Tensor:
        """[groups, *rest]: t [entries, *rest] added up over the entries of each group."""
        arranged = t if self.order is None else t.index_select(0, self.order)
        found = t.new_zeros(self.count, *t.shape[1:])
        for total, start, stop in zip(found, self.offsets, self.offsets[1:], strict=False):
            torch.sum(arranged[start:stop], 0, out=total)
        return found

    def spread(self, U: Tensor, like: Tensor, inner: int = 1) -> Tensor:
        """[m, entries * inner] of U [m, groups] on the CPU: of each row, 0 where it has no group.

        In the dtype and on the device of `like`; made and sent once a pass, not for every layer.
        """
        key = (id(U), like.dtype, like.device, inner)
        if key not in self._spread:
            # U is kept beside the result, so that its id cannot be given to another.
            self._spread[key] = (U, sent(self._spread_over(U, inner).to(like.dtype), like.device))
        return self._spread[key][1]

    def _spread_over(self, U: Tensor, inner: int) -> Tensor:
        of_entries = U.index_select(1, self.of_rows(1, torch.device("cpu")))
        if self.order is not None:
            order = self.order.cpu() if self.order_on_host is None else self.order_on_host
            everywhere = U.new_zeros(len(U), self.entries)
            of_entries = everywhere.index_copy_(1, order, of_entries)
        return of_entries.repeat_interleave(inner, dim=1)

    @cached_property
    def _spread(self) -> dict[tuple[int, torch.dtype, torch.device, int], tuple[Tensor, Tensor]]:
        return {}

    def restored(self, rows: Tensor, like: Tensor) -> Tensor:
        """`arranged` undone: rows [taken, inner, d] in the places of `like`, zeros elsewhere."""
        assert self.outer == 1, "only arguments of heads are restored, and those are rows"
        if self.order is None:
            return rows.reshape(like.shape).to(like.dtype)
        flat = like.new_zeros(self.entries, *rows.shape[1:])
        return flat.index_copy_(0, self.order, rows.to(like.dtype)).reshape(like.shape)

    def of_rows(self, inner: int, device: torch.device) -> Tensor:
        """int64 [taken * inner]: the group of each arranged row."""
        sizes = torch.tensor(self.offsets).diff() * inner
        return sent(torch.repeat_interleave(torch.arange(self.count), sizes), device)


ALL_ROWS = Segments(1, None, (0, 1))
"""One group of all rows: the ordinary gradient."""


@dataclass
class Factored:
    """A = U · seeds: what one backward pass needs to serve all objectives.

    `seeds`: float64 [B]; `coefficients` U: float64 [m, groups]; `group`: [B], -1 where every
    objective's A_ib is zero. All on the CPU. `each`: as many consecutive groups belong to one
    sample, where `by_sample` has parted them, else 0.
    """

    seeds: Tensor
    coefficients: Tensor
    group: Tensor
    each: int = 0
    _arranged: dict[tuple[int | None, int, torch.device], tuple[Declared | None, Segments]] = field(
        default_factory=dict
    )

    @classmethod
    def of(cls, A: Tensor, pairs: Iterable[tuple[int, int]] = ()) -> "Factored":
        """Factor A [m, B]; columns parallel to rounding share a group.

        Args:
            pairs: sequences that share rows, and so have to share a group (`apart` tells whether
                they do).
        """
        A = A.detach().double().cpu()
        # Each column is seed * direction, its direction being 1 at its leading entry.
        magnitude = A.abs()
        # The first entry within a factor two of the largest: the same one for parallel columns.
        lead = (magnitude >= 0.5 * magnitude.amax(0)).int().argmax(0)
        pairs = list(pairs)
        _lead_alike(lead, magnitude, pairs)
        seeds = A.gather(0, lead[None])[0]
        # A value that is not finite must reach every gradient: its sequence keeps a group.
        used = (seeds != 0) | ~torch.isfinite(A).all(0)
        directions = torch.where(used, A / seeds, 0.0).T.contiguous()  # [B, m]
        _join_pairs(directions, used, pairs)
        group, founders = _grouped(directions, used)
        return cls(torch.where(used, seeds, 0.0), directions[founders].T, group)

    def by_sample(self, sample: Tensor) -> "Factored":
        """The same with groups that lie in one sample each, sample after sample.

        All samples get as many groups; some of them have no rows where directions are fewer.

        Args:
            sample: int64 [B], of each score, any numbers.
        """
        used = (self.group >= 0).nonzero().flatten().tolist()
        of_sample: dict[int, dict[int, None]] = {}  # sample -> its groups, as they come
        for b in used:
            of_sample.setdefault(int(sample[b]), {})[int(self.group[b])] = None
        each = max(map(len, of_sample.values()), default=1)
        place = {
            (s, g): first * each + k
            for first, (s, groups) in enumerate(of_sample.items())
            for k, g in enumerate(groups)
        }
        group = torch.full_like(self.group, -1)
        for b in used:
            group[b] = place[int(sample[b]), int(self.group[b])]
        U = self.coefficients.new_zeros(len(self.coefficients), len(of_sample) * each)
        for (_, g), k in place.items():
            U[:, k] = self.coefficients[:, g]
        return Factored(self.seeds, U, group, each)

    def spread_over(self, size: int) -> "Factored":
        """For a pass whose gradients are summed over so many processes to averages.

        Where no score has a seed there is a group all the same, of zeros: other processes wait.
        """
        groups, group = self.coefficients, self.group
        if groups.shape[1] == 0:
            groups, group = groups.new_zeros(len(groups), 1), torch.zeros_like(group)
        return Factored(self.seeds, groups / size, group)

    def apart(self, pairs: Iterable[tuple[int, int]]) -> tuple[int, int] | None:
        """Two sequences that share rows and not a direction; None where there are none.

        Rows of a sequence without a seed carry the other's gradient alone.
        """
        groups = self.group.tolist()
        return next(
            ((a, b) for a, b in pairs if min(groups[a], groups[b]) >= 0 and groups[a] != groups[b]),
            None,
        )

    def segments(self, index: Declared | None, device: torch.device, outer: int = 1) -> Segments:
        """The rows of a layer whose entry k belongs to the sequences of row k (None: to k)."""
        key = (None if index is None else id(index), outer, device)
        if key not in self._arranged:
            # The index is kept beside the result, so that its id cannot be given to another.
            self._arranged[key] = (index, self._segments(index, device, outer))
        return self._arranged[key][1]

    def _segments(self, index: Declared | None, device: torch.device, outer: int) -> Segments:
        group = self.group if index is None else index.of_rows(self.group)
        taken = (group >= 0).nonzero().flatten()
        order = taken[torch.argsort(group[taken], stable=True)]
        sizes = torch.bincount(group[taken], minlength=self.coefficients.shape[1])
        offsets = (0, *torch.cumsum(sizes, 0).tolist())
        as_they_lie = torch.equal(order, torch.arange(len(group)))
        if as_they_lie:
            return Segments(len(group), None, offsets, outer)
        return Segments(len(group), sent(order, device), offsets, outer, order)


# A device waits while its batch's A is factored, so what follows is done for all columns at once,
# or on plain numbers: a call of torch for each column would take milliseconds.


def _lead_alike(lead: Tensor, magnitude: Tensor, pairs: Iterable[tuple[int, int]]) -> None:
    """Sequences b that share rows with a get a's leading entry, unless a has nothing there."""
    of_each, sizes = lead.tolist(), magnitude.T.tolist()
    for a, b in pairs:
        if sizes[a][of_each[a]] > 0:
            of_each[b] = of_each[a]
    lead.copy_(torch.tensor(of_each))


def _join_pairs(directions: Tensor, used: Tensor, pairs: Iterable[tuple[int, int]]) -> None:
    """Give both of a pair one direction where theirs differ by rounding alone."""
    of_each, has_seed = directions.tolist(), used.tolist()
    for a, b in pairs:
        if has_seed[a] and has_seed[b] and _alike(of_each[a], of_each[b]):
            # What is not finite in one of the two is so in the gradient, whatever the other is.
            both = [x if isfinite(y) else y for x, y in zip(of_each[a], of_each[b], strict=True)]
            of_each[a] = of_each[b] = both
    directions.copy_(torch.tensor(of_each, dtype=directions.dtype).view_as(directions))


def _alike(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(
        abs(x - y) <= _PARALLEL_PAIR * abs(x) or not (isfinite(x) and isfinite(y))
        for x, y in zip(a, b, strict=True)
    )


def _grouped(directions: Tensor, used: Tensor) -> tuple[Tensor, list[int]]:
    """(The group of each sequence, -1 of those not used; the sequence that founded each group).

    Each joins the first group with its direction, or founds one.
    """
    places = used.nonzero().flatten()
    taken = directions[places]
    finite = torch.isfinite(taken)
    found: list[int] = []
    joined: list[int] = []
    for start, stop in blocks(len(taken), max(1, _COMPARED_AT_ONCE // max(1, taken.numel()))):
        here, sound = taken[start:stop, None], finite[start:stop, None]
        near = (taken - here).abs() <= _PARALLEL * here.abs()
        for b, row in enumerate((near | ~(finite | sound)).all(2).tolist(), start):
            mine = next((k for k, f in enumerate(found) if row[f]), len(found))
            if mine == len(found):
                found.append(b)
            joined.append(mine)
    group = torch.full((len(used),), -1)
    group[places] = torch.tensor(joined, dtype=group.dtype)
    return group, places[found].tolist()
