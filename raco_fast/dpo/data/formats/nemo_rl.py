"""`nemo-rl`: context (turns) and completions {completion, rank}; each two are a pair, 0 is best."""

from raco_fast.dpo.data.formats.answers import better_rank, each_two, two_of
from raco_fast.dpo.data.formats.fields import field
from raco_fast.dpo.data.formats.format import Content, Format
from raco_fast.dpo.data.formats.turns import as_answer, as_turns
from raco_fast.dpo.data.rows import Row


def _content(row: Row) -> Content:
    a, b = (
        as_answer(row, f"{at}.completion", each.get("completion"))
        for at, each in two_of(row, "completions")
    )
    return as_turns(row, "context", field(row, "context")), a, b


FORMAT = Format(
    "nemo-rl",
    {"context", "completions"},
    _content,
    lambda row, name: better_rank(row, two_of(row, "completions")) if name == "rank" else None,
    only="rank",
    join=each_two("completions"),
    label_fields=lambda row: ("rank",),
)
