"""The formats by name, which of them a file is in, and how to add one."""

from collections.abc import Set
from difflib import SequenceMatcher

from raco_fast.dpo.data.formats import (
    chosen_rejected,
    helpsteer2,
    helpsteer_preferences,
    nectar,
    nemo_rl,
    pku,
    preference_collection,
    qa_feedback,
    question,
    raco,
    raco_s,
    sharegpt,
    shp,
    summarize,
    summary_ab,
    text_score,
    ultrafeedback,
)
from raco_fast.dpo.data.formats.fields import listed
from raco_fast.dpo.data.formats.format import Format
from raco_fast.dpo.data.rows import Row

# Where the fields of a row fit several formats, it is in the last of them.
_BUILT_IN = (
    text_score.FORMAT,
    helpsteer2.FORMAT,
    helpsteer_preferences.HELPSTEER2_PREFERENCE,
    helpsteer_preferences.HELPSTEER3,
    pku.FORMAT,
    shp.FORMAT,
    summarize.COMPARISONS,
    summarize.AXES,
    nectar.FORMAT,
    nemo_rl.FORMAT,
    ultrafeedback.FORMAT,
    preference_collection.FORMAT,
    qa_feedback.FORMAT,
    chosen_rejected.FORMAT,
    question.ARGILLA,
    question.ORCA,
    question.ALPACA,
    sharegpt.FORMAT,
    raco_s.FORMAT,
    summary_ab.FORMAT,
    raco.FORMAT,
)

FORMATS: dict[str, Format] = {form.name: form for form in _BUILT_IN}
"""The formats by name, those of `register_format` included."""


def register_format(form: Format) -> None:
    """Let data sources be in a format of one's own; docs/data.md has an example.

    Args:
        form: used where a source names it, or where the source's format is "auto" and `form.fits`
            its first row; it is asked before the formats that were there already.
    Raises:
        ValueError: the name is taken.
    """
    if form.name in {"auto", *FORMATS}:
        raise ValueError(
            f"`form.name` must be a new name, got {form.name!r}; known are {sorted(FORMATS)}"
        )
    FORMATS[form.name] = form


def format_named(name: str) -> Format:
    """The format of that name. Raises ValueError with the known names."""
    if name not in FORMATS:
        raise ValueError(f"`format` must be 'auto' or one of {sorted(FORMATS)}, got {name!r}")
    return FORMATS[name]


def find_format(names: Set[str]) -> Format | None:
    """The format that a file is in whose first row has fields of these names; None if in none."""
    return next((form for form in reversed(FORMATS.values()) if form.fits(names)), None)


def unknown_format(row: Row) -> ValueError:
    """The error for a first row that is in no format: its fields, and the three nearest formats."""
    names = set(row.data)
    return ValueError(
        f"{row.where}: `format` must be recognisable from the first row's fields, got "
        f"{listed(names)}; nearest are {_nearest(names)}: rename the fields, or add a format of "
        "your own with `register_format` (docs/data.md lists all formats)"
    )


def _nearest(names: Set[str]) -> str:
    """The three formats whose fields a row has the most of, and which it lacks."""
    near = sorted(FORMATS.values(), key=lambda form: -_likeness(form.needs, names))[:3]
    return ", ".join(f"{form.name!r} ({_lacking(form, names)})" for form in near)


def _lacking(form: Format, names: Set[str]) -> str:
    missing = form.needs - names
    return f"without {listed(missing)}" if missing else "without a label field that it knows"


def _likeness(needs: Set[str], names: Set[str]) -> float:
    """Share of the fields of a format that a row has; one of a like name counts in part."""
    return sum(
        1.0 if need in names else max((_alike(need, name) for name in names), default=0.0)
        for need in needs
    ) / len(needs)


def _alike(a: str, b: str) -> float:
    """How alike two names are, from 0 to 1/2; 0 where they have little in common."""
    ratio = SequenceMatcher(None, a.casefold(), b[:40].casefold()).ratio()
    return ratio / 2 if ratio > 0.7 else 0.0
