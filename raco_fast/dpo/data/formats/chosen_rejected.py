"""`chosen-rejected`: chosen, rejected and maybe prompt, each as text, turns or transcript.

TRL's preference formats and Anthropic's transcripts. The one objective's label is +1.
"""

from raco_fast.dpo.data.formats.conversation import two_sides
from raco_fast.dpo.data.formats.format import Format

FORMAT = Format(
    "chosen-rejected",
    {"chosen", "rejected"}.issubset,
    lambda row: two_sides(row, "chosen", "rejected"),
)
