"""One HTML file that needs no other: notes, pictures as inline SVG, tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 13px; }
th, td { text-align: left; padding: 0.2rem 0.9rem 0.2rem 0; border-bottom: 1px solid #ddd; }
td { font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 1rem 0; } svg { max-width: 100%; height: auto; }
"""


@dataclass(frozen=True)
class Table:
    """A title, what the table says in a sentence or two, names of columns, and rows."""

    title: str
    text: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def html_page(
    title: str, notes: Sequence[str], tables: Sequence[Table], pictures: Mapping[str, str]
) -> str:
    """The whole page.

    Args:
        title: its headline.
        notes: a paragraph each.
        pictures: name -> SVG text, put in as it is.
    """
    return "\n".join(
        (
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
            f"<style>{_STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            *(f"<p>{escape(note)}</p>" for note in notes),
            *(f"<figure>{svg}</figure>" for svg in pictures.values()),
            *(line for table in tables for line in _table(table)),
            "</body></html>\n",
        )
    )


def _table(table: Table) -> Iterator[str]:
    yield f"<h2>{escape(table.title)}</h2>\n<p>{escape(table.text)}</p>\n<table>"
    yield "<tr>" + "".join(f"<th>{escape(name)}</th>" for name in table.columns) + "</tr>"
    for row in table.rows:
        yield "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
    yield "</table>"
