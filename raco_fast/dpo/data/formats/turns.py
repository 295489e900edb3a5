"""Turns of a conversation: role, content, and the further fields that a chat template can use."""

from typing import Any

from raco_fast.dpo.data.formats.cells import said
from raco_fast.dpo.data.formats.fields import as_list, as_objects, as_text, listed, unpacked
from raco_fast.dpo.data.rows import Row
from raco_fast.dpo.data.values import is_empty, shape

Turn = dict[str, Any]
"""{"role": "system" | "user" | "assistant" | "tool", "content": text}, and further fields."""

# What chat templates call the call of a function, the call a result belongs to, the function that
# gave it, and what a model thought before it answered or called.
_TEXTS = ("tool_call_id", "name", "reasoning_content", "reasoning", "thinking", "tool_plan")


def as_turns(row: Row, name: str, value: object) -> list[Turn]:
    """A value that has to be a list of turns; fields that say nothing (null) are left out."""
    turns = as_list(value)
    if turns is None:
        raise row.error(
            name, "be a list of turns", shape(value), 'write [{"role": .., "content": ..}]'
        )
    return [_as_turn(row, f"{name}[{k}]", turn) for k, turn in enumerate(turns)]


def as_answer(row: Row, name: str, value: object) -> str | Turn:
    """A value that has to be an answer: its text, or one assistant turn, alone or in a list."""
    value = said(row, name, value)
    (turn,) = value if isinstance(value, list) and len(value) == 1 else (value,)
    if not isinstance(turn, dict):
        return as_text(row, name, value)
    answer = _as_turn(row, name, turn)
    if answer["role"] != "assistant":
        found = f"the role of {shape(answer['role'])}"
        raise row.error(f"{name}.role", "be 'assistant'", found, "an answer is the model's turn")
    return answer


def answer_parts(answer: str | Turn) -> tuple[str, dict[str, Any]]:
    """The text of an answer, and the further fields of its turn."""
    if isinstance(answer, str):
        return answer, {}
    return answer["content"], {k: v for k, v in answer.items() if k not in ("role", "content")}


def _as_turn(row: Row, name: str, turn: object) -> Turn:
    calling = isinstance(turn, dict) and not is_empty(turn.get("tool_calls"))
    needed = {"role"} if calling else {"role", "content"}
    if not isinstance(turn, dict) or not needed <= set(turn):
        found = listed(turn) if isinstance(turn, dict) else shape(turn)
        raise row.error(name, "have a role and a content", found, "add them")
    content = turn.get("content")
    if content is None and calling:
        content = ""
    read: Turn = {
        "role": as_text(row, f"{name}.role", turn["role"]),
        "content": as_text(row, f"{name}.content", content),
    }
    for key, value in turn.items():
        if key in read or is_empty(value):
            continue
        if key == "tool_calls":
            calls = _as_calls(row, f"{name}.{key}", value)
            read |= {key: calls} if calls else {}
        elif key in _TEXTS:
            read[key] = as_text(row, f"{name}.{key}", value)
        else:
            row.use.turns_with[key] += 1
    return read


def _as_calls(row: Row, name: str, value: object) -> list[dict[str, Any]]:
    """Calls of functions: each has a name and arguments, by itself or under "function".

    Arguments are an object, which OpenAI's interface writes as JSON in a text. Chat templates are
    written for objects: they would quote such a text once more.
    """
    calls = as_objects(row, name, value)
    for k, call in enumerate(calls):
        function = call.get("function", call)
        where = f"{name}[{k}]"
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            found = shape(function) if not isinstance(function, dict) else listed(function)
            cure = 'write {"name": .., "arguments": {..}}'
            raise row.error(where, "name a function", found, cure)
        arguments = unpacked(row, f"{where}.arguments", function.get("arguments"))
        if not isinstance(arguments, dict):
            found = shape(arguments)
            raise row.error(f"{where}.arguments", "be an object", found, "write {} for none")
        function["arguments"] = arguments
    return calls
