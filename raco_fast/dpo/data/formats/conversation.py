"""Where the prompt ends and the answer begins: turns, transcripts, and prompts inside both sides.

A transcript is Anthropic's form of a conversation in one text, "\\n\\nHuman: ... \\n\\nAssistant:
...". Without a `prompt` field, the turns both sides share are the prompt. Two plain texts without a
prompt (TRL's fourth form) are refused: the prompt's end could only be guessed from the common
characters, and two answers that begin alike would move the guess into the answer.
"""

import re

from raco_fast.dpo.data.formats.cells import said
from raco_fast.dpo.data.formats.fields import as_text, field
from raco_fast.dpo.data.formats.format import Content
from raco_fast.dpo.data.formats.turns import Turn, as_turns
from raco_fast.dpo.data.rows import Row
from raco_fast.dpo.data.values import show

_HUMAN = "\n\nHuman:"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def transcript(row: Row, name: str, text: str) -> list[Turn]:
    """Turns of a transcript; the space around each turn's text is not part of it."""
    if not text.startswith(_HUMAN):
        raise row.error(
            name,
            "be turns, or a transcript that begins with '\\n\\nHuman:'",
            f"{len(text)} characters of text",
            "add a `prompt` field: without one, prompt and answer cannot be told apart",
        )
    _, *pieces = _TURN.split(text)
    spoken = zip(pieces[::2], pieces[1::2], strict=True)
    return [{"role": _ROLES[who], "content": said.strip()} for who, said in spoken]


def prompt_turns(row: Row) -> list[Turn]:
    """The field `prompt`: turns, one user's text, or a transcript that opens the answer."""
    value = said(row, "prompt", field(row, "prompt"))
    if not isinstance(value, str):
        return as_turns(row, "prompt", value)
    if value.startswith(_HUMAN):
        turns = transcript(row, "prompt", value)
        opens_answer = turns[-1] == {"role": "assistant", "content": ""}
        return turns[:-1] if opens_answer else turns
    return [{"role": "user", "content": value}]


def two_sides(row: Row, a: str, b: str) -> Content:
    """Two fields that hold an answer each, or a conversation that ends with one."""
    values = {name: said(row, name, field(row, name)) for name in (a, b)}
    are_texts = [isinstance(value, str) for value in values.values()]
    if are_texts[0] != are_texts[1]:
        kinds = " and ".join(type(value).__name__ for value in values.values())
        raise row.error(
            b, f"be of the same kind as `{a}`", kinds, "write both as text or both as turns"
        )
    prompt = prompt_turns(row) if "prompt" in row.data else None
    if prompt is not None and are_texts[0] and not values[a].startswith(_HUMAN):
        return prompt, as_text(row, a, values[a]), as_text(row, b, values[b])
    read = transcript if are_texts[0] else as_turns
    sides = [(name, read(row, name, value)) for name, value in values.items()]
    return split_sides(row, sides, prompt)


def split_sides(
    row: Row, sides: list[tuple[str, list[Turn]]], prompt: list[Turn] | None = None
) -> Content:
    """Prompt and answers of two (field name, turns); by default the prompt is what both share.

    A side's last turn is never part of the prompt.
    """
    (name_a, a), (name_b, b) = sides
    if prompt is None:
        n = 0
        while n < min(len(a), len(b)) - 1 and a[n] == b[n]:
            n += 1
        prompt = a[:n]
    return prompt, _answer(row, name_a, a, prompt), _answer(row, name_b, b, prompt)


def _answer(row: Row, name: str, turns: list[Turn], prompt: list[Turn]) -> Turn:
    """The one assistant turn that follows the prompt (which the turns may repeat)."""
    rest = turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns
    if [turn["role"] for turn in rest] != ["assistant"]:
        roles = ", ".join(show(turn["role"]) for turn in rest[:6]) or "nothing"
        raise row.error(
            name,
            "add one assistant turn to the prompt",
            f"{len(rest)} turns ({roles})",
            "keep one response a row, with the same turns before it on both sides",
        )
    return rest[0]
