"""docs/results.md says what the committed records say."""

from pathlib import Path

from bench.results_page import page

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_written_from_the_records() -> None:
    assert page() == (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
