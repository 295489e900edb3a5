"""Which field labels an objective, which end of it is preferred, and how sure its labels are."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from raco_fast.dpo.data.choices import check_choices


@dataclass(frozen=True)
class LabelColumn:
    """The field that labels an objective.

    Args:
        column: its name: of a field, or of what the format makes a label of (docs/data.md).
        prefer: the response of which value is preferred: `lower` turns the sign.
        soft: makes soft labels of a graded field: least difference -> probability that the response
            it speaks for is better, in [0.5, 1] and not falling. {1: 0.75, 3: 1.0} says 0.75 of
            differences from 1 on and 1 from 3 on; smaller ones are not labelled. None: hard labels,
            the sign.
    Raises:
        ValueError: an empty name, an unknown word, or a table that is none.
    """

    column: str
    prefer: Literal["higher", "lower"] = "higher"
    soft: dict[float, float] | None = None

    def __post_init__(self) -> None:
        """Check; the table's keys become numbers, which are text in JSON."""
        check_choices(self)
        if not isinstance(self.column, str) or not self.column.strip():
            raise ValueError(f"`column` must name a field, got {self.column!r}")
        if self.soft is not None:
            object.__setattr__(self, "soft", _table(self.soft))

    def label(self, grade: float) -> float:
        """The label of a pair whose field speaks for response a by `grade`, for b if negative.

        Returns:
            As `PreferencePair.preferences`: sign times probability, 0 where not labelled.
        """
        size, sign = abs(grade), math.copysign(1.0, grade)
        if self.prefer == "lower":
            sign = -sign
        if self.soft is None:
            return int(sign) if size > 0 else 0
        probability = max((q for least, q in self.soft.items() if least <= size), default=0.0)
        return sign_times(sign, probability)

    def turned(self, label: float) -> float:
        """A label that is there already, with its sign as `prefer` has it."""
        return -label if self.prefer == "lower" else label


def sign_times(sign: float, probability: float) -> float:
    """A label of the pair's likelier response; 1, -1 and 0 are whole numbers, +0.5 is neither."""
    if probability in (0, 1):
        return int(sign * probability)
    return 0.5 if probability == 0.5 else sign * probability


def as_columns(given: Mapping[str, str | LabelColumn]) -> dict[str, LabelColumn]:
    """Objective -> field, where a name alone stands for the field of that name."""
    return {
        name: LabelColumn(each) if isinstance(each, str) else each for name, each in given.items()
    }


def _table(given: Mapping[float, float]) -> dict[float, float]:
    try:
        table = dict(sorted((float(least), float(q)) for least, q in given.items()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"`soft` must map numbers to probabilities, got {given!r}") from error
    values = list(table.values())
    if not table or values != sorted(values) or not 0.5 <= values[0] <= values[-1] <= 1:
        raise ValueError(
            f"`soft` must map least differences to probabilities in [0.5, 1] that do not fall, got "
            f"{given!r}; write e.g. {{1: 0.75, 2: 1.0}}"
        )
    if not all(0 <= least < math.inf for least in table) or table.get(0.0, 0.5) != 0.5:
        raise ValueError(
            f"`soft` must map differences of at least 0, and 0 to 0.5 if at all, got {given!r}; a "
            f"difference of 0 prefers neither response"
        )
    return table
