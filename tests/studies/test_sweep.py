"""Sweeps of a tiny model: the runs are those of `train`, made once, and one failing ends alone."""

import dataclasses
import json
from pathlib import Path

import pytest

from raco_fast.dpo.run.config import TrainConfig
from raco_fast.dpo.run.trainer import train
from raco_fast.settings.parsing import from_settings
from raco_fast.settings.text import read
from raco_fast.studies.finished import read_finished
from raco_fast.studies.plan import planned
from raco_fast.studies.sweep import sweep, table
from raco_fast.studies.sweep_config import SweepConfig

RULES = ["linear", "cagrad-clip"]
WEIGHTS = [{"sure": 0.7, "kind": 0.3}, {"sure": 0.2, "kind": 0.8}]
GRID = {"rule": RULES, "weights": WEIGHTS}


@pytest.fixture
def base(settings) -> dict:
    """Of three steps, the last checkpoint kept."""
    return settings | {"max_steps": 3, "epochs": 1, "eval_every": 2}


def make(base: dict, folder: Path, **changes) -> SweepConfig:
    given = {"base": base, "grid": GRID, "output_dir": str(folder), "jobs": 2, "threads": 1}
    return SweepConfig(**(given | changes))


def test_every_run_is_that_of_train_by_itself_after_one_reference_pass(runs, base, tmp_path, capfd):
    config = make(base, tmp_path / "sweep")
    result = sweep(config)
    assert [end.status for end in result.ends.values()] == ["finished"] * 4
    assert "sweep: 4 runs in" in capfd.readouterr().out
    for run in result.runs:
        given = read(run.config.folder / "config.yaml")
        assert from_settings(TrainConfig, given) == run.config
    # One of each rule, by the config in its folder, elsewhere and with a cache of its own.
    for run in (result.runs[0], result.runs[3]):
        other = {"output_dir": str(tmp_path / "alone"), "cache_dir": str(tmp_path / "its own")}
        alone = from_settings(TrainConfig, read(run.config.folder / "config.yaml") | other)
        alone = dataclasses.replace(alone, output_dir=str(tmp_path / run.name / "alone"))
        train(alone)
        runs.assert_same_run(alone, run.config)
    assert runs.steps(result.runs[0].config) != runs.steps(result.runs[3].config)

    # Training and held-out pairs: 8 times needed, scored twice, read 6 times.
    cache = {file.name for file in Path(base["cache_dir"]).iterdir()}
    logs = [(run.config.folder / "log.txt").read_text() for run in result.runs]
    assert len(cache) == 2
    assert sum(log.count("reference log-probabilities of") for log in logs) == 6

    found = read_finished(result.runs[1].config.folder)
    assert (found.threads, found.run["total_steps"]) == (1, 3)
    assert found.evaluation == runs.evaluations(result.runs[1].config)[-1] | {}
    lines = table(result).splitlines()
    assert lines[0].split() == ["rule", "weights", "run", "sure", "kind"]
    assert lines[2].startswith("linear       sure 0.2/kind 0.8  finished  ")
    assert f"{found.evaluation['eval_rewards/accuracies/kind']:.3f}" in lines[2]
    of_all = json.loads((config.folder / "runs.json").read_text())
    assert [each["status"] for each in of_all] == ["finished"] * 4
    assert of_all[1]["evaluation"] == found.evaluation

    again = sweep(dataclasses.replace(config, jobs=1))
    assert "4 of them finished before" in capfd.readouterr().out
    assert table(again) == table(result)
    with pytest.raises(ValueError, match=r"another finished run \(lr: 0.01 there, 0.02 now\)"):
        sweep(make(base | {"lr": 0.02}, config.folder))
    data = Path(base["data"][0]["path"])
    copied = tmp_path / "moved.jsonl"
    copied.write_bytes(data.read_bytes())
    with pytest.raises(ValueError, match=r"another finished run \(data.path: .* choose another"):
        planned(make(base | {"data": [{"path": str(copied)}]}, config.folder))
