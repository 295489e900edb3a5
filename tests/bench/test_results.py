"""docs/results.md says what the committed metrics of the real run say."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_written_from_the_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench" / "real_run"))
    report = importlib.import_module("report")
    assert report.page() == (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
