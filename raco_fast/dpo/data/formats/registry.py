"""The formats by name, which of them a file is in, and how to add one."""

from raco_fast.dpo.data.formats import (
    chosen_rejected,
    helpsteer2,
    pku,
    raco,
    raco_s,
    summary_ab,
    text_score,
)
from raco_fast.dpo.data.formats.fields import listed
from raco_fast.dpo.data.formats.format import Format
from raco_fast.dpo.data.rows import Row

# Where the fields of a row fit several formats, it is in the last of them.
_BUILT_IN = (text_score, helpsteer2, pku, chosen_rejected, raco_s, summary_ab, raco)

FORMATS: dict[str, Format] = {module.FORMAT.name: module.FORMAT for module in _BUILT_IN}
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


def detect_format(row: Row) -> Format:
    """The format whose fields the row has. Raises ValueError that lists the fields found."""
    names = set(row.data)
    for form in reversed(FORMATS.values()):
        if form.fits(names):
            return form
    raise ValueError(
        f"{row.where}: `format` must be recognisable from the first row's fields, got "
        f"{listed(names)}; rename the fields to a format of {sorted(FORMATS)} (the fields of each "
        "are in raco_fast/dpo/data/formats), or add yours with `register_format`"
    )
