"""A preference pair: what it holds, when it is valid, and what is derived from it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raco_fast.dpo.data.rows import Row, is_number, shape, show

_ROLES = ("system", "user", "assistant")


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


def soft_label(row: Row, column: str) -> float | None:
    """Label from `preference_probabilities`, None where it has no such column.

    A probability q that a is preferred is +q, or -(1 - q) where that is larger. So 0 remains free
    to say "not labelled", and +0.5 says that neither is better.

    Raises:
        ValueError: not an object, or not a number in [0, 1].
    """
    given = _optional(row, "preference_probabilities")
    if given is None:
        return None
    if not isinstance(given, dict):
        name, rule = "preference_probabilities", "map objectives to probabilities"
        raise row.error(name, rule, shape(given), "write an object")
    if column not in given:
        return None
    q = given[column]
    if not is_number(q) or not 0 <= q <= 1:
        raise row.error(
            f"preference_probabilities.{column}",
            "be in [0, 1]",
            show(q),
            "it is the probability that response a is preferred",
        )
    label = q if q >= 0.5 else q - 1
    return int(label) if label in (-1, 1) else label


def pair_weights(row: Row, columns: Mapping[str, str]) -> dict[str, float]:
    """Objective -> weight of the pair, where that is not 1, from the field `pair_weights`.

    Args:
        row: the field is one number for all objectives, or an object.
        columns: objective -> key in that object, of the objectives this row labels.
    Raises:
        ValueError: an objective without a weight, or one that is not a positive number.
    """
    given = _optional(row, "pair_weights")
    if given is None:
        return {}
    weights = {}
    for name, column in columns.items():
        value = given.get(column) if isinstance(given, dict) else given
        if not is_number(value) or not 0 < value < math.inf:
            raise row.error(
                f"pair_weights.{column}" if isinstance(given, dict) else "pair_weights",
                "be a positive number, or one for every objective that the row labels",
                show(value),
                "write 1 for a plain pair, and label 0 to leave a pair out",
            )
        weights[name] = float(value)
    return {name: weight for name, weight in weights.items() if weight != 1.0}


def _optional(row: Row, name: str) -> Any:
    """A field of a row that is a pair by itself; refused where two rows make one pair."""
    sides = (row.data.get("ratings_a"), row.data.get("ratings_b"))
    if any(isinstance(side, dict) and name in side for side in sides):
        raise row.error(
            name, "stand in a row that is a pair", "one response's", "use the 'raco' format"
        )
    return row.data.get(name)
