"""`shp`: history, human_ref_A, human_ref_B and labels, which is 1 where A is preferred and 0 for B.

`score_ratio`, by how many times the votes of one exceed the other's, is a label of the same sign.
"""

from raco_fast.dpo.data.formats.cells import spelled
from raco_fast.dpo.data.formats.fields import as_choice, as_number, text
from raco_fast.dpo.data.formats.format import Content, Format
from raco_fast.dpo.data.rows import Row
from raco_fast.dpo.data.values import is_number


def _content(row: Row) -> Content:
    prompt = [{"role": "user", "content": text(row, "history")}]
    return prompt, text(row, "human_ref_A"), text(row, "human_ref_B")


def _label(row: Row, name: str) -> float | None:
    if name not in ("labels", "score_ratio") or name not in row.data:
        return None
    sign = as_choice(row, "labels", row.data.get("labels"), (1, 0), "be 1 for A or 0 for B")
    return sign * as_number(row, name, row.data[name]) if name == "score_ratio" else sign


def _contradiction(row: Row) -> str | None:
    a, b, label = (spelled(row.data.get(name)) for name in ("score_A", "score_B", "labels"))
    if is_number(a) and is_number(b) and label in (0, 1) and (a < b if label else b < a):
        return "`labels` names the response of the lower score"
    return None


FORMAT = Format(
    "shp",
    {"history", "human_ref_A", "human_ref_B", "labels"},
    _content,
    _label,
    only="labels",
    label_fields=lambda row: ("labels", "score_ratio"),
    is_label=lambda name, value: name in ("labels", "score_ratio"),
    contradiction=_contradiction,
)
