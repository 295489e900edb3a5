"""The cells of the miniature study, a job of one, and what its report makes of records."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.miniature import report, run
from bench.miniature.cells import Cell, jobs, read_cells
from raco_fast.demo.config import DemoConfig
from raco_fast.studies.fronts import hypervolume

TINY = replace(
    DemoConfig(quick=True).sized(),
    quick=False,
    seeds=2,
    rules=("linear", "cagrad-clip"),
    coverage_shares=(0.8, 0.2),
    warm_up_steps=2,
    steps=3,
    documents=4,
)


def test_the_study_can_be_read_and_shares_its_warm_ups() -> None:
    cells = read_cells()
    assert len({cell.name for cell in cells}) == len(cells)
    assert cells[0].name == "base"
    assert len(list(jobs(cells))) == sum(c.config.seeds * len(c.methods) for c in cells)


@pytest.mark.parametrize(
    ("settings", "error"),
    [("{warmup: 3}", "a cell has settings of the demo only"), ("{layers: 3}", "`layers` must be")],
)
def test_a_study_that_cannot_be_run_is_refused(tmp_path: Path, settings: str, error: str) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(f"base: {{layers: 2}}\ncells:\n  base: {{}}\n  other: {settings}\n")
    with pytest.raises((TypeError, ValueError), match=error):
        read_cells(file)


@pytest.mark.slow
def test_a_cell_is_run_written_once_and_reported(tmp_path: Path, monkeypatch) -> None:
    cell = Cell("base", TINY)
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "_STARTS", tmp_path)
    monkeypatch.setattr(report, "read_cells", lambda: [cell])
    for _, seed, rule, gram in reversed(list(jobs([cell]))):
        run.write(cell, run.align_seed(TINY, cell, seed, rule, gram))
    assert run.done_already(cell) == {job[1:] for job in jobs([cell])}
    (tmp_path / "machine.txt").write_text("a machine\n")
    (finished,), missing = report.read()
    assert missing == []
    lines = [json.loads(x) for x in (tmp_path / "base.jsonl").read_text().splitlines()]
    scores = [list(r["scores"].values()) for r in lines if r["rule"] == "linear" and r["seed"] == 1]
    volume = finished.volume(("linear", "batch"))
    assert volume is not None
    assert volume.values[1] == pytest.approx(hypervolume(scores, [0.0] * 3))
    page = "\n".join(report.part())
    assert "`cagrad-clip`" in page
    assert "a machine" in page
