"""`text-score`: text [transcript, transcript] and score [number, number].

The transcript with the higher score comes first, so the one objective's label is +1.
"""

from raco_fast.dpo.data.formats.conversation import split_sides, transcript
from raco_fast.dpo.data.formats.fields import as_list, as_number, as_text, field
from raco_fast.dpo.data.formats.format import Content, Format
from raco_fast.dpo.data.rows import Row
from raco_fast.dpo.data.values import shape


def _content(row: Row) -> Content:
    for name in ("text", "score"):
        value = as_list(field(row, name))
        if value is None or len(value) != 2:
            found = shape(row.data[name])
            raise row.error(name, "be a list of two", found, "give one entry a response")
    given, both = as_list(row.data["score"]) or [], as_list(row.data["text"]) or []
    scores = [as_number(row, f"score[{k}]", score) for k, score in enumerate(given)]
    if scores[0] == scores[1]:
        raise row.error("score", "differ", "two equal scores", "remove the row: it is a tie")
    first = 0 if scores[0] > scores[1] else 1
    texts = [as_text(row, "text", both[k]) for k in (first, 1 - first)]
    return split_sides(row, [("text", transcript(row, "text", text)) for text in texts])


FORMAT = Format("text-score", {"text", "score"}, _content)
