"""What of a source is not used, or speaks against itself: counted, and the first row named."""

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from raco_fast.dpo.data.pairs import PreferencePair
from raco_fast.dpo.data.rows import Row, RowError

logger = logging.getLogger(__name__)


@dataclass
class Noted:
    """How often something was seen, and where first."""

    count: int = 0
    first: str = ""

    def add(self, first: str) -> None:
        """Count one more."""
        self.count += 1
        self.first = self.first or first


@dataclass
class NotUsed:
    """What one source's pairs are without.

    Args:
        policy: "error" raises for a row that cannot be used; "skip" counts it.
        bad: rows that cannot be used.
        same: pairs of a row with several answers, whose two are the same.
        tied: other pairs of such rows that no objective is labelled for.
        against: rows that speak against their own labels.
        labels: objective -> pairs labelled for it.
    """

    policy: str
    bad: Noted = field(default_factory=Noted)
    same: Noted = field(default_factory=Noted)
    tied: Noted = field(default_factory=Noted)
    against: Noted = field(default_factory=Noted)
    labels: Counter[str] = field(default_factory=Counter)

    def add(self, error: RowError) -> None:
        """Raise the error of a row, or count it."""
        if self.policy == "error":
            raise error
        self.bad.add(str(error))

    def why(self) -> str:
        """Why there is no pair at all, in a clause."""
        if self.bad.count:
            return f"{self.bad.count} left out, the first because: {self.bad.first}"
        return (
            f"of its answers, {self.same.count} pairs are the same and {self.tied.count} others "
            f"are told apart by no objective"
        )

    def note_contradiction(self, row: Row, found: str | None) -> None:
        """Count a row that speaks against its labels, if it does."""
        if found is not None:
            self.against.add(f"{row.where}: {found}")

    def note_labels(self, pair: PreferencePair) -> None:
        """Count the labels of a pair that is used."""
        self.labels.update(name for name, label in pair.preferences.items() if label)

    def report(self, path: str, asked: Iterable[str]) -> None:
        """Log what there is to tell, a line for each kind."""
        sentences = {
            "left out %d rows, the first because: %s": self.bad,
            "left out %d pairs of identical answers, the first: %s": self.same,
            "%d rows speak against their own labels, which were kept; the first: %s": self.against,
        }
        for sentence, noted in sentences.items():
            if noted.count:
                logger.warning(f"%s: {sentence}", path, noted.count, noted.first)
        if self.tied.count:
            logger.info(
                "%s: left out %d pairs of answers that no objective tells apart",
                path,
                self.tied.count,
            )
        never = [name for name in asked if not self.labels[name]]
        if never:
            logger.warning(
                "%s: labels no pair for %s: each is a tie or null; correct the field or take the "
                "objective out of what this source labels",
                path,
                ", ".join(map(repr, never)),
            )
