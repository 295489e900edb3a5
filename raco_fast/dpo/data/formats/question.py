"""Rows of a question and two answers, each a text of its own, one of which was chosen.

- `orca`: question (or input), chosen, rejected and maybe system, as in the Orca pairs of Intel and
  of Argilla. Argilla's have a status, of which "tie" is no label.
- `argilla`: instruction, chosen_response, rejected_response, as in UltraFeedback's first
  binarization.
- `alpaca`: instruction, chosen, rejected and maybe input and history, as LLaMA-Factory has it.
"""

from collections.abc import Set

from raco_fast.dpo.data.formats.chosen_rejected import scored_below
from raco_fast.dpo.data.formats.fields import as_list, as_text, text
from raco_fast.dpo.data.formats.format import Content, Format
from raco_fast.dpo.data.formats.turns import Turn
from raco_fast.dpo.data.rows import Row
from raco_fast.dpo.data.values import shape


def _user(said: str) -> Turn:
    return {"role": "user", "content": said}


def _of_orca(row: Row) -> Content:
    name = "question" if "question" in row.data else "input"
    return [_user(text(row, name))], text(row, "chosen"), text(row, "rejected")


def _orca_label(row: Row, name: str) -> float | None:
    if name != "chosen":
        return None
    return 0.0 if row.data.get("status") == "tie" else 1.0


def _is_orca(names: Set[str]) -> bool:
    return bool(names & {"question", "input"}) and not names & {"prompt", "instruction"}


def _of_argilla(row: Row) -> Content:
    prompt = [_user(text(row, "instruction"))]
    return prompt, text(row, "chosen_response"), text(row, "rejected_response")


def _of_alpaca(row: Row) -> Content:
    asked, more = text(row, "instruction"), row.data.get("input")
    if more is not None and as_text(row, "input", more):
        asked = f"{asked}\n{more}"
    return [*_history(row), _user(asked)], text(row, "chosen"), text(row, "rejected")


def _history(row: Row) -> list[Turn]:
    """Earlier turns: a list of [question, answer]."""
    given = row.data.get("history") or []
    turns: list[Turn] = []
    for k, said in enumerate([given] if (listed := as_list(given)) is None else listed):
        if not isinstance(said, list) or len(said) != 2:
            rule, cure = "be a list of [question, answer]", "write both texts"
            raise row.error(f"history[{k}]", rule, shape(said), cure)
        asked, answer = (as_text(row, f"history[{k}]", value) for value in said)
        turns += [_user(asked), {"role": "assistant", "content": answer}]
    return turns


ORCA = Format(
    "orca",
    {"chosen", "rejected"},
    _of_orca,
    _orca_label,
    also=_is_orca,
    only="chosen",
    contradiction=scored_below,
)
ARGILLA = Format(
    "argilla",
    {"instruction", "chosen_response", "rejected_response"},
    _of_argilla,
    contradiction=scored_below,
)
ALPACA = Format(
    "alpaca",
    {"instruction", "chosen", "rejected"},
    _of_alpaca,
    also=lambda names: "prompt" not in names,
    contradiction=scored_below,
)
