"""The labels of a row: which objectives its source labels, hard and soft labels, pair weights."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from raco_fast.dpo.data.formats.cells import spelled
from raco_fast.dpo.data.formats.fields import as_float
from raco_fast.dpo.data.formats.format import Format
from raco_fast.dpo.data.label_columns import LabelColumn, sign_times
from raco_fast.dpo.data.rows import Row, RowError
from raco_fast.dpo.data.values import is_number, shape, show


@dataclass(frozen=True)
class Labelling:
    """How the rows of one source are labelled.

    Args:
        names: objectives of the run.
        declared: those the source is said to label; None: all of them.
        columns: objective -> the field that labels it, where a setting says so.
        derived: the objective that needs no label, for it is derived from length; or None.
        found: objectives that a row was labelled for by a field.
    """

    names: tuple[str, ...]
    declared: tuple[str, ...] | None
    columns: Mapping[str, LabelColumn]
    derived: str | None
    found: set[str] = field(default_factory=set)
    _of_all: dict[str, LabelColumn] = field(init=False)

    def __post_init__(self) -> None:
        """An objective that no setting names has the field of its own name."""
        of_all = {name: self.columns.get(name) or LabelColumn(name) for name in self.names}
        object.__setattr__(self, "_of_all", of_all)

    def key(self, objective: str) -> str:
        """What the objective is called in a row's own objects: its field's name, or its own."""
        return self._of_all[objective].column

    def of(self, row: Row, form: Format) -> dict[str, float]:
        """The labels this row carries; an objective the source is not said to label is left out.

        Raises:
            RowError: a missing or unknown label.
            ValueError: a source whose settings do not fit its format.
        """
        if form.label is None:
            return self._of_preferred(row, form)
        labels: dict[str, float] = {}
        for name in self._asked(row, form):
            label = self._label(row, form, form.label, name)
            if label is not None:
                labels[name] = label
                self.found.add(name)
            elif name != self.derived:
                raise RowError(
                    f"{row.where}: a row must label every objective of its source, got no field "
                    f"for {name!r} ({form.name!r} format, fields {form.fields(row)}); write 0 "
                    f"where a pair is not labelled, set `objective` to the ones this file labels, "
                    f"or say in `objectives` which field labels which"
                )
        return labels

    def _asked(self, row: Row, form: Format) -> tuple[str, ...]:
        """The objectives to look for; one, unless fields are named, in a format with one label."""
        asked = self.declared or self.names
        if form.only is None or all(name in self.columns for name in asked):
            return asked
        return (self._one(row, form),)

    def _label(
        self, row: Row, form: Format, label_of: Callable[[Row, str], float | None], name: str
    ) -> float | None:
        column = self._of_all[name]
        grade = label_of(row, column.column)
        if grade is None and form.only is not None and name not in self.columns:
            grade = label_of(row, form.only)
        soft = soft_label(row, column.column)
        if soft and grade is not None:
            raise row.error(
                f"preference_probabilities.{column.column}",
                "stand for an objective without a hard label",
                f"the label {grade:g} beside it",
                "remove one of the two",
            )
        if grade is not None:
            return column.label(grade)
        return None if soft is None else column.turned(soft)

    def _of_preferred(self, row: Row, form: Format) -> dict[str, float]:
        """The one label of a format without label fields, whose response a is the preferred one."""
        if self.columns:
            raise ValueError(
                f"{row.where}: `objectives` must be empty for a {form.name!r} file, which has no "
                f"label fields, got {sorted(self.columns)}; use `objective`"
            )
        name = self._one(row, form)
        soft = soft_label(row, name)
        if soft is None and "preference_probabilities" in row.data:
            raise row.error(
                "preference_probabilities", f"hold {name!r}", "another", "correct the name"
            )
        return {name: soft or 1}

    def _one(self, row: Row, form: Format) -> str:
        """The objective that a format with one label labels."""
        own = self.declared or tuple(n for n in self.names if n != self.derived)
        if len(own) != 1:
            raise ValueError(
                f"{row.where}: `objective` must name the one objective that a {form.name!r} file "
                f"labels, got {list(own)}; add e.g. `objective: {own[0] if own else self.names[0]}`"
                " to the source"
            )
        return own[0]

    def unused_columns(self) -> dict[str, str]:
        """Entries of `objectives` that no row had the field of."""
        return {n: each.column for n, each in self.columns.items() if n not in self.found}


def soft_label(row: Row, column: str) -> float | None:
    """Label from `preference_probabilities`, None where it has no such column.

    A probability q that a is preferred is +q, or -(1 - q) where that is larger. So 0 remains free
    to say "not labelled", as null does, and +0.5 says that neither is better.

    Raises:
        RowError: not an object, or not a number in [0, 1].
    """
    given = _optional(row, "preference_probabilities")
    if given is None:
        return None
    if row.sides is not None:
        name, rule = "preference_probabilities", "stand in a row that is one pair"
        raise row.error(name, rule, "several answers", "use the 'raco' format")
    if not isinstance(given, dict):
        name, rule = "preference_probabilities", "map objectives to probabilities"
        raise row.error(name, rule, shape(given), "write an object")
    if column not in given:
        return None
    q = given[column]
    if q is None:
        return 0
    if not is_number(q) or not 0 <= q <= 1:
        raise row.error(
            f"preference_probabilities.{column}",
            "be in [0, 1]",
            show(q),
            "it is the probability that response a is preferred",
        )
    return sign_times(1.0, q) if q >= 0.5 else sign_times(-1.0, 1 - q)


def pair_weights(row: Row, columns: Mapping[str, str]) -> dict[str, float]:
    """Objective -> weight of the pair, where that is not 1, from the field `pair_weights`.

    Args:
        row: the field is one number for all objectives, or an object.
        columns: objective -> key in that object, of the objectives this row labels.
    Raises:
        RowError: an objective without a weight, or one that is not a positive number.
    """
    given = _optional(row, "pair_weights")
    if given is None:
        return {}
    weights = {}
    for name, column in columns.items():
        value = given.get(column) if isinstance(given, dict) else given
        weight = as_float(value)
        if not 0 < weight < math.inf:
            raise row.error(
                f"pair_weights.{column}" if isinstance(given, dict) else "pair_weights",
                "be a positive number, or one for every objective that the row labels",
                show(value),
                "write 1 for a plain pair, and label 0 to leave a pair out",
            )
        weights[name] = weight
    return {name: weight for name, weight in weights.items() if weight != 1.0}


def _optional(row: Row, name: str) -> Any:
    """A field of a row that is a pair by itself; refused where two rows make one pair."""
    if "ratings_a" in row.data:
        sides = (row.data["ratings_a"], row.data.get("ratings_b"))
        if any(isinstance(side, dict) and name in side for side in sides):
            raise row.error(
                name, "stand in a row that is a pair", "one response's", "use the 'raco' format"
            )
    return spelled(row.data.get(name))
