"""Preference pairs as one row of tokens, in which nothing is padding and no prompt is there twice.

    [prompt | a | b | prompt | a | b | ...]        a pair's rows follow each other

The responses of a pair share the rows of their longest common token prefix. The positions of b go
on where that prefix ends, b sees the prefix and not a, and the prefix's last token predicts the
first token of both. Without sharing, every response has its prompt to itself:
[prompt | a | prompt | b | ...], as sequences are packed elsewhere.

Attention is by document, branch and position: a token sees those of its document, of the prefix or
its own branch, whose position is not behind its own. A layer that mixes tokens in another way
(a convolution, a state space, linear attention) would mix neighbours that are none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

Ids = Sequence[int]

_OF_HOST = ("sequence", "shared_with", "scored")


@dataclass(frozen=True)
class PackedRows:
    """B pairs in one row of T tokens, of which N places are scored.

    Scores are numbered as in a batch of 2B rows: responses a of all pairs, then responses b.

    Attributes:
        input_ids, position_ids: int64 [1, T].
        document: int64 [T], tokens that may see each other: a pair, or a sequence.
        branch: int64 [T]: 0 the shared prefix, 1 response a, 2 response b.
        sequence: int64 [T], the score that a token adds to.
        shared_with: int64 [T], the second score that it adds to, -1 where there is none.
        sources: int64 [N], the token whose hidden state predicts the scored one.
        targets: int64 [N], the scored tokens.
        scored: int64 [N], the score each of them counts in.
        place: int64 [N], score * longest + its place in its response.
        past: bool [N], whether it lies past the end of the pair's shorter response.
        pairs: B.
        longest: tokens of the longest response, at least 1.
    """

    input_ids: Tensor
    position_ids: Tensor
    document: Tensor
    branch: Tensor
    sequence: Tensor
    shared_with: Tensor
    sources: Tensor
    targets: Tensor
    scored: Tensor
    place: Tensor
    past: Tensor
    pairs: int
    longest: int

    @property
    def tokens(self) -> int:
        """T."""
        return self.input_ids.shape[1]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedRows:
        """On another device, but for what the host alone reads: which score a token adds to."""
        moved = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and field.name not in _OF_HOST:
                moved[field.name] = value.to(device, non_blocking=non_blocking)
        return PackedRows(**(vars(self) | moved))

    def repeated(self, copies: int) -> PackedRows:
        """Every pair so many times, as further pairs: scores [copies, 2B] in this order."""
        if copies == 1:
            return self

        def tiled(x: Tensor, step: int = 0) -> Tensor:
            shift = torch.arange(copies, device=x.device) * step
            return (x[..., None, :] + shift[:, None]).flatten(-2) if step else x.repeat(copies)

        scores, count = 2 * self.pairs, int(self.document.max()) + 1
        shared = torch.where(self.shared_with < 0, -scores * copies, self.shared_with)
        return PackedRows(
            self.input_ids.repeat(1, copies),
            self.position_ids.repeat(1, copies),
            tiled(self.document, count),
            tiled(self.branch),
            tiled(self.sequence, scores),
            tiled(shared, scores).clamp(min=-1),
            tiled(self.sources, self.tokens),
            tiled(self.targets),
            tiled(self.scored, scores),
            tiled(self.place, scores * self.longest),
            tiled(self.past),
            self.pairs * copies,
            self.longest,
        )


def pair_rows(
    prompt_ids: Sequence[Ids], a_ids: Sequence[Ids], b_ids: Sequence[Ids], *, share: bool = True
) -> PackedRows:
    """Pack B pairs into one row of tokens.

        rows = raco_fast.dpo.pair_rows(prompt_ids, a_ids, b_ids)
        logps = raco_fast.dpo.packed_logps(model, rows)      # [2B]: responses a, then b
        margin = logps[:B] - logps[B:]
        losses = {name: -logsigmoid(beta * label * margin).mean() for name, label in ...}
        opt.backward(losses, scores=logps)

    Args:
        prompt_ids: B prompts, each with at least one token.
        a_ids, b_ids: B responses each.
        share: whether a pair's responses share their prompt's rows. One backward pass is exact for
            such rows where every loss sees the pair through one h(a) - h(b), and falls back to one
            pass per objective elsewhere.
    Raises:
        ValueError: no pair, numbers of prompts and responses that differ, an empty prompt.
    """
    if not len(prompt_ids) == len(a_ids) == len(b_ids) or not len(prompt_ids):
        raise ValueError(
            f"`prompt_ids`, `a_ids` and `b_ids` must hold as many lists, at least one, got "
            f"{len(prompt_ids)}, {len(a_ids)} and {len(b_ids)}; give every pair all three"
        )
    row = _Row(len(prompt_ids))
    for k, (prompt, a, b) in enumerate(zip(prompt_ids, a_ids, b_ids, strict=True)):
        if not len(prompt):
            raise ValueError(
                f"`prompt_ids`[{k}] must hold at least one token, got none: nothing predicts the "
                f"first token of a row; start with a BOS token"
            )
        row.add(k, list(prompt), list(a), list(b), share)
    return row.packed()


def shared_prefix(a: Ids, b: Ids) -> int:
    """Tokens that two lists begin with alike."""
    shorter = min(len(a), len(b))
    return next((k for k in range(shorter) if a[k] != b[k]), shorter)


def row_length(prompt: Ids, a: Ids, b: Ids, *, share: bool) -> int:
    """Tokens that a pair takes."""
    both = 2 * len(prompt) + len(a) + len(b)
    return both - len(prompt) - shared_prefix(a, b) if share else both


class _Row:
    """Grows by pairs."""

    def __init__(self, pairs: int) -> None:
        self._pairs, self._documents = pairs, 0
        self._ids: list[int] = []
        # Runs of rows, (tokens, first position, document, branch, sequence, shared_with), and of
        # scored tokens, (score, first place, tokens, sources, end of the shorter response).
        self._runs: list[tuple[int, int, int, int, int, int]] = []
        self._scored: list[tuple[int, list[int], list[int], int]] = []

    def add(self, k: int, prompt: list[int], a: list[int], b: list[int], share: bool) -> None:
        """Pair k of the batch."""
        shorter = min(len(a), len(b))
        score_a, score_b = k, self._pairs + k
        if not share:
            for score, response in ((score_a, a), (score_b, b)):
                first = self._append(prompt + response, 0, 0, score, -1)
                at = [*range(first, first + len(prompt) + len(response))]
                self._score(score, response, at[len(prompt) - 1 :], shorter)
                self._documents += 1
            return
        common = shared_prefix(a, b)
        prefix = prompt + a[:common]
        first = self._append(prefix, 0, 0, score_a, score_b)
        at = [*range(first, first + len(prefix))]
        for branch, score, response in ((1, score_a, a), (2, score_b, b)):
            own = response[common:]
            start = self._append(own, len(prefix), branch, score, -1)
            rows = [*at[len(prompt) - 1 :], *range(start, start + len(own))]
            self._score(score, response, rows, shorter)
        self._documents += 1

    def _append(self, ids: list[int], position: int, branch: int, score: int, second: int) -> int:
        first = len(self._ids)
        self._ids += ids
        self._runs.append((len(ids), position, self._documents, branch, score, second))
        return first

    def _score(self, score: int, response: list[int], rows: list[int], shorter: int) -> None:
        """`rows`: of the prompt's last token and those of the response."""
        self._scored.append((score, response, rows[: len(response)], shorter))

    def packed(self) -> PackedRows:
        """All pairs so far."""
        runs = torch.tensor(self._runs)
        of_rows = runs.repeat_interleave(runs[:, 0], dim=0)
        begins = (runs[:, 0].cumsum(0) - runs[:, 0]).repeat_interleave(runs[:, 0])
        longest = max(1, *(len(response) for _, response, _, _ in self._scored))
        positions = torch.arange(len(self._ids)) - begins + of_rows[:, 1]
        document, branch, sequence, shared_with = of_rows[:, 2:].T.contiguous()
        return PackedRows(
            torch.tensor(self._ids)[None],
            positions[None],
            document,
            branch,
            sequence,
            shared_with,
            torch.tensor([row for _, _, rows, _ in self._scored for row in rows]),
            torch.tensor([t for _, response, _, _ in self._scored for t in response]),
            torch.tensor([s for s, response, _, _ in self._scored for _ in response]),
            torch.tensor([s * longest + k for s, x, _, _ in self._scored for k in range(len(x))]),
            torch.tensor([k >= n for _, x, _, n in self._scored for k in range(len(x))]),
            self._pairs,
            longest,
        )
