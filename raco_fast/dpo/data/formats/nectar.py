"""`nectar`: a transcript and answers {answer, rank}; each two are a pair, rank 1 is the best."""

from raco_fast.dpo.data.formats.answers import better_rank, each_two, two_of
from raco_fast.dpo.data.formats.conversation import prompt_turns
from raco_fast.dpo.data.formats.fields import as_text
from raco_fast.dpo.data.formats.format import Content, Format
from raco_fast.dpo.data.rows import Row


def _content(row: Row) -> Content:
    a, b = (as_text(row, f"{at}.answer", each.get("answer")) for at, each in two_of(row, "answers"))
    return prompt_turns(row), a, b


FORMAT = Format(
    "nectar",
    {"prompt", "answers"},
    _content,
    lambda row, name: better_rank(row, two_of(row, "answers")) if name == "rank" else None,
    only="rank",
    join=each_two("answers"),
    label_fields=lambda row: ("rank",),
)
