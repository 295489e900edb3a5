"""What became of the pairs that were tokenized, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class EncodeReport:
    """What `encode_pairs` did, in numbers of pairs (responses for `responses_truncated`).

    Attributes:
        pairs: given.
        kept: returned.
        dropped_overlength: too long, with `overlength="drop"`.
        dropped_special_text: spelled a special token, with `special_text="drop"`.
        dropped_identical: both responses became the same tokens (by truncation, most likely).
        prompts_truncated: among the kept.
        responses_truncated: among the kept; up to two a pair.
        boundaries_moved: with a response behind them the prompt's last tokens are other ones.
        header_differs: the template opens an answer for the model otherwise than it writes answers.
        openings_trained: before an answer's text the template writes what its header does not have.
        responses_rewritten: the template changed the text; up to two a pair.
        not_rendered: what pairs hold besides their texts and the template does not write -> pairs.
        prints_date: whether the template writes the date (`TokenOptions.date`) into a pair.
    """

    pairs: int = 0
    kept: int = 0
    dropped_overlength: int = 0
    dropped_special_text: int = 0
    dropped_identical: int = 0
    prompts_truncated: int = 0
    responses_truncated: int = 0
    boundaries_moved: int = 0
    header_differs: int = 0
    openings_trained: int = 0
    responses_rewritten: int = 0
    not_rendered: dict[str, int] = field(default_factory=dict)
    prints_date: bool = False

    def __str__(self) -> str:
        """How many pairs are kept, and what else there is to tell."""
        rest = {name: getattr(self, name) for name in _COUNTS if name not in ("pairs", "kept")}
        told = [f"{name.replace('_', ' ')}: {count}" for name, count in rest.items() if count]
        return ", ".join([f"{self.kept} of {self.pairs} pairs kept", *told])

    def warnings(self) -> list[str]:
        """A sentence for all of one kind that is not lost or trained as one would expect."""
        said = []
        if self.not_rendered:
            what = ", ".join(f"{name} of {n} pairs" for name, n in self.not_rendered.items())
            said.append(
                f"the chat template does not write all that pairs hold, so it is not trained: "
                f"{what}; set `tokens.chat_template` to one that does, or remove it from the data"
            )
        if self.responses_rewritten:
            said.append(
                f"the chat template changed the text of {self.responses_rewritten} responses (it "
                "may take thinking out of them); what it wrote is trained"
            )
        if self.header_differs:
            said.append(
                f"the chat template opens an answer for the model otherwise than it writes the "
                f"answers of {self.header_differs} pairs (thinking, most likely); they are trained "
                "as written, so the model is not trained on what it will continue. Set "
                "`tokens.chat_template` to one whose header is what answers begin with"
            )
        if self.openings_trained:
            said.append(
                f"the chat template begins the answers of {self.openings_trained} pairs with text "
                "that its generation header does not have; it is trained as a part of the "
                "responses, as the model has to write it"
            )
        return said

    @classmethod
    def total(cls, reports: Iterable[EncodeReport]) -> EncodeReport:
        """One report of the pairs of several."""
        counts: Counter[str] = Counter()
        not_rendered: Counter[str] = Counter()
        prints_date = False
        for report in reports:
            counts.update({n: getattr(report, n) for n in _COUNTS})
            not_rendered.update(report.not_rendered)
            prints_date |= report.prints_date
        return cls(**counts, not_rendered=dict(not_rendered), prints_date=prints_date)


_COUNTS = [f.name for f in fields(EncodeReport) if f.name not in ("not_rendered", "prints_date")]
