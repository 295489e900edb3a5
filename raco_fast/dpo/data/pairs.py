"""A preference pair: what it holds, when it is valid, and what is derived from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from raco_fast.dpo.data.rows import Row, show

__all__ = ["ConciseRule", "PreferencePair", "check_content"]

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class PreferencePair:
    """Two responses to one prompt, with a label per objective.

    Attributes:
        id: unique over all sources of a run.
        prompt: turns {"role": "system" | "user" | "assistant", "content": str}, ending with user.
        response_a: one answer, as text.
        response_b: the other.
        preferences: +1 a preferred, -1 b preferred, 0 tie or not labelled, for every objective.
    """

    id: str
    prompt: list[dict[str, str]]
    response_a: str
    response_b: str
    preferences: dict[str, int]


@dataclass(frozen=True)
class ConciseRule:
    """Label an objective from length: the shorter response is preferred.

    The label is 0 when the lengths differ by less than `relative` of the longer one or by less
    than `absolute` tokens. Rows that carry a label field for the objective keep it, a 0 included,
    unless `overwrite`.

    Attributes:
        count: text -> number of tokens (`tokenization.token_counter`).
        objective: the objective to label.
        relative: fraction of the longer response, in [0, 1).
        absolute: tokens, at least 0.
        overwrite: replace labels that the data already carries.
    """

    count: Callable[[str], int]
    objective: str = "concise"
    relative: float = 0.10
    absolute: int = 3
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Check the thresholds."""
        if not 0 <= self.relative < 1:
            raise ValueError(
                f"`relative` must lie in [0, 1), got {self.relative}; 0.1 means 10 % of the longer"
            )
        if self.absolute < 0:
            raise ValueError(f"`absolute` must be at least 0 tokens, got {self.absolute}; use 0")

    def label(self, response_a: str, response_b: str) -> int:
        """+1 when a is shorter, -1 when b is, 0 when they are about equally long."""
        a, b = self.count(response_a), self.count(response_b)
        if abs(a - b) < self.absolute or abs(a - b) < self.relative * max(a, b):
            return 0
        return (b > a) - (a > b)


def check_content(
    row: Row, prompt: Sequence[Mapping[str, str]], response_a: str, response_b: str
) -> None:
    """Raise unless these can be a pair: a prompt that asks, and two different, non-empty answers.

    Raises:
        ValueError: an unknown role.
        RowError: an empty turn or response, identical responses, or a prompt without a last user
            turn.
    """
    if not prompt or prompt[-1]["role"] != "user":
        last = f"the role {show(prompt[-1]['role'])} at its end" if prompt else "no turns"
        raise row.unusable(
            "prompt", "end with a user turn", last, "move a final assistant turn to the responses"
        )
    for k, turn in enumerate(prompt):
        if turn["role"] not in _ROLES or (turn["role"] == "system" and k > 0):
            raise row.error(
                f"prompt[{k}].role",
                "be 'user' or 'assistant' ('system' in the first turn only)",
                show(turn["role"]),
                "rename or remove the turn",
            )
        if not turn["content"].strip():
            raise row.unusable(
                f"prompt[{k}].content", "hold text", "an empty turn", "remove the row or the turn"
            )
    for side, text in (("a", response_a), ("b", response_b)):
        if not text.strip():
            raise row.unusable(
                f"response {side}", "hold text", "an empty response", "remove the row"
            )
    if response_a.strip() == response_b.strip():
        raise row.unusable(
            "responses", "differ", "two identical ones", "remove the row: it prefers nothing"
        )
