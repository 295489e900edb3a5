"""`sharegpt`: conversations, chosen and rejected, whose turns are {from, value}.

LLaMA-Factory's form for preferences: `conversations` is the prompt, the answers are a turn each, or
its text.
"""

from typing import Any

from raco_fast.dpo.data.formats.cells import spelled
from raco_fast.dpo.data.formats.fields import as_list, as_text, field, listed
from raco_fast.dpo.data.formats.format import Content, Format
from raco_fast.dpo.data.formats.turns import Turn, as_answer, as_turns
from raco_fast.dpo.data.rows import Row
from raco_fast.dpo.data.values import shape, show

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_call": "assistant",
}


def _turn(row: Row, name: str, given: object) -> dict[str, Any]:
    """A turn as other formats write it; its value stays to be checked where that is done."""
    if not isinstance(given, dict) or not {"from", "value"} <= given.keys():
        found = listed(given) if isinstance(given, dict) else shape(given)
        raise row.error(name, "have a from and a value", found, "add them")
    role = given["from"]
    if not isinstance(role, str) or role not in _ROLES:
        rule = f"be one of {sorted(_ROLES)}"
        raise row.error(f"{name}.from", rule, show(role), "rename it")
    if role == "function_call":
        calls = as_text(row, f"{name}.value", given["value"])
        return {"role": "assistant", "content": "", "tool_calls": _in_a_list(calls)}
    return {"role": _ROLES[role], "content": given["value"]}


def _in_a_list(calls: str) -> str:
    """JSON of one call or of a list of them, as that of a list."""
    return calls if calls.lstrip().startswith("[") else f"[{calls}]"


def _content(row: Row) -> Content:
    given = as_list(field(row, "conversations"))
    if given is None:
        cure = 'write [{"from": .., "value": ..}]'
        found = shape(row.data["conversations"])
        raise row.error("conversations", "be a list of turns", found, cure)
    turns = [_turn(row, f"conversations[{k}]", each) for k, each in enumerate(given)]
    a, b = (_answer(row, name) for name in ("chosen", "rejected"))
    return as_turns(row, "conversations", turns), a, b


def _answer(row: Row, name: str) -> str | Turn:
    value = field(row, name)
    inner = spelled(value)
    if isinstance(value, str) and not isinstance(inner, dict):
        return as_text(row, name, value)
    return as_answer(row, name, _turn(row, name, inner))


FORMAT = Format("sharegpt", {"conversations", "chosen", "rejected"}, _content)
