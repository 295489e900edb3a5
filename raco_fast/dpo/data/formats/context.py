"""What a row of any format may say beside its prompt: a system prompt, and functions on offer."""

from collections.abc import Sequence
from typing import Any

from raco_fast.dpo.data.formats.fields import as_objects, as_text
from raco_fast.dpo.data.formats.turns import Turn
from raco_fast.dpo.data.rows import Row
from raco_fast.dpo.data.values import is_empty

SYSTEM_FIELDS = ("system", "system_prompt")
CONTEXT_FIELDS = (*SYSTEM_FIELDS, "tools")


def with_system(row: Row, prompt: Sequence[Turn]) -> list[Turn]:
    """The prompt with the row's system prompt, if any, as its first turn.

    Raises:
        RowError: two system prompts that differ, of which only one could be used.
    """
    turns = list(prompt)
    given = {name: row.data.get(name) for name in SYSTEM_FIELDS}
    texts = {n: as_text(row, n, value) for n, value in given.items() if not is_empty(value)}
    texts = {name: text for name, text in texts.items() if text.strip()}
    for name, text in texts.items():
        if turns and turns[0]["role"] == "system":
            if turns[0]["content"].strip() != text.strip():
                raise row.error(
                    name, "be the only system prompt", "another one beside it", "remove one of them"
                )
        else:
            turns.insert(0, {"role": "system", "content": text})
    return turns


def tools(row: Row) -> list[dict[str, Any]]:
    """JSON schemas of the functions on offer, from a list of objects or its JSON; [] without."""
    given = row.data.get("tools")
    if is_empty(given) or (isinstance(given, str) and not given.strip()):
        return []
    return as_objects(row, "tools", given)
