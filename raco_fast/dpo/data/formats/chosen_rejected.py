"""`chosen-rejected`: chosen, rejected and maybe prompt, each as text, turns or transcript.

TRL's preference formats, Anthropic's transcripts, and the many data sets like them (UltraFeedback
binarized, Capybara, Tulu 3, Skywork). The one objective's label is +1.
"""

from raco_fast.dpo.data.formats.cells import spelled
from raco_fast.dpo.data.formats.conversation import two_sides
from raco_fast.dpo.data.formats.format import Format
from raco_fast.dpo.data.rows import Row
from raco_fast.dpo.data.values import is_number

# How data sets call the scores of the two responses, which say more than which one was chosen.
_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)


def scored_below(row: Row) -> str | None:
    """What speaks against a row's labels: the chosen response is scored below the rejected one."""
    for chosen, rejected in _SCORES:
        if chosen in row.data and rejected in row.data:
            a, b = spelled(row.data[chosen]), spelled(row.data[rejected])
            if is_number(a) and is_number(b) and a < b:
                return f"`{chosen}` is below `{rejected}`"
    return None


FORMAT = Format(
    "chosen-rejected",
    {"chosen", "rejected"},
    lambda row: two_sides(row, "chosen", "rejected"),
    contradiction=scored_below,
)
