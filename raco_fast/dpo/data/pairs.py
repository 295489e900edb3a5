"""A preference pair: what it holds, when it is valid, and what is derived from it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raco_fast.dpo.data.rows import Row, RowError
from raco_fast.dpo.data.values import show


class SameAnswersError(RowError):
    """Two answers are the same, so that neither can be preferred."""


@dataclass(frozen=True)
class PreferencePair:
    """Two responses to one prompt, with a label per objective.

    Attributes:
        id: unique over all sources of a run.
        prompt: turns {"role": "system" | "user" | "assistant" | "tool", "content": str}, and
            whatever else a turn holds for the chat template (tool_calls, reasoning_content ...).
        response_a: one answer, as text; may be empty where `answer_a` holds tool_calls.
        response_b: the other.
        preferences: +1 a preferred, -1 b preferred, 0 tie or not labelled, for every objective;
            of a soft label the sign times the probability that it is right, at least 0.5.
        pair_weights: what the pair's loss is multiplied by, where that is not 1.
        tools: JSON schemas of the functions on offer, for the chat template's `tools`.
        answer_a, answer_b: further fields of the answer's turn (tool_calls, reasoning_content ...).
    """

    id: str
    prompt: list[dict[str, Any]]
    response_a: str
    response_b: str
    preferences: dict[str, float]
    pair_weights: dict[str, float] = field(default_factory=dict)
    tools: list[dict[str, Any]] = field(default_factory=list)
    answer_a: dict[str, Any] = field(default_factory=dict)
    answer_b: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ConciseRule:
    """Label an objective from length: the shorter response is preferred.

    Rows that carry a label field for the objective keep it, a 0 included.

    Attributes:
        count: text -> number of tokens (`raco_fast.dpo.data.tokenization.token_counter`).
        objective: the objective to label.
    """

    count: Callable[[str], int]
    objective: str = "concise"

    def label(self, response_a: str, response_b: str) -> int:
        """+1 when a is shorter, -1 when b is; 0 within 3 tokens or 10 % of the longer one."""
        a, b = self.count(response_a), self.count(response_b)
        if abs(a - b) < 3 or abs(a - b) < 0.1 * max(a, b):
            return 0
        return (b > a) - (a > b)


def check_content(
    row: Row,
    prompt: Sequence[Mapping[str, Any]],
    answer_a: tuple[str, Mapping[str, Any]],
    answer_b: tuple[str, Mapping[str, Any]],
) -> None:
    """Raise unless these can be a pair: a prompt that asks, and two different, non-empty answers.

    Args:
        prompt: turns.
        answer_a, answer_b: text, and further fields of the turn; text may be empty beside a call.
    Raises:
        RowError: an unknown role, an empty turn or response, a prompt that does not end with a turn
            to answer; `SameAnswersError` for identical responses.
    """
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        last = f"the role {show(prompt[-1]['role'])} at its end" if prompt else "no turns"
        raise row.error(
            "prompt",
            "end with a user or tool turn",
            last,
            "move a final assistant turn to the responses",
        )
    for k, turn in enumerate(prompt):
        _check_turn(row, k, turn, prompt[k - 1] if k else {"role": None})
    for side, (text, fields) in (("a", answer_a), ("b", answer_b)):
        if not text.strip() and "tool_calls" not in fields:
            raise row.error(f"response {side}", "hold text", "an empty response", "remove the row")
    if (answer_a[0].strip(), answer_a[1]) == (answer_b[0].strip(), answer_b[1]):
        raise SameAnswersError(
            f"{row.where}: `responses` must differ, got two identical ones; remove the row: it "
            f"prefers nothing"
        )


def _check_turn(row: Row, k: int, turn: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    role = turn["role"]
    answers_call = before["role"] == "tool" or "tool_calls" in before
    if not (
        role in ("user", "assistant")
        or (role == "system" and k == 0)
        or (role == "tool" and answers_call)
    ):
        raise row.error(
            f"prompt[{k}].role",
            "be 'user', 'assistant', or 'tool' after a turn with tool_calls ('system' in the first "
            "turn only)",
            show(role),
            "rename or remove the turn",
        )
    if not turn["content"].strip() and role != "tool" and "tool_calls" not in turn:
        raise row.error(
            f"prompt[{k}].content", "hold text", "an empty turn", "remove the row or the turn"
        )
