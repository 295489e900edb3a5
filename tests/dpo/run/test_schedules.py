"""Schedules of c and of the weights in whole runs: what a record says, resumes, processes."""

import pytest
import yaml
from launched_runs import Started, assert_done

from raco_fast.dpo.run.trainer import Interrupted, train

RAMP = {"name": "linear", "start": 0.0, "end": 0.8, "steps": 4}
DRAWN = {"name": "dirichlet", "concentration": 4.0, "seed": 1}


def test_a_run_follows_its_schedules_and_a_resumed_one_too(
    runs, make_config, monkeypatch, tmp_path
):
    changes = {"c_schedule": RAMP, "weights_schedule": DRAWN, "eval_data": [], "max_steps": 6}
    whole = make_config(output_dir=str(tmp_path / "whole"), **changes)
    train(whole)
    steps = runs.steps(whole)
    assert [s["raco/c"] for s in steps] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 0.8])
    drawn = [s["raco/weight/sure"] for s in steps]
    assert len(set(drawn)) == len(steps) == 6
    assert [s["raco/weight/kind"] for s in steps] == pytest.approx([1 - x for x in drawn])
    card = (whole.folder / "model" / "README.md").read_text()
    assert 'changed c by `{"name": "linear", "start": 0.0, "end": 0.8, "steps": 4}` and the' in card

    config = make_config(output_dir=str(tmp_path / "stopped"), **changes)
    runs.interrupt_after(monkeypatch, 3)
    with pytest.raises(Interrupted):
        train(config)
    monkeypatch.undo()
    other = make_config(**{**changes, "weights_schedule": None}, output_dir=config.output_dir)
    with pytest.raises(ValueError, match=r"weights_schedule: .*dirichlet.* in the checkpoint"):
        train(other, resume=True)
    train(config, resume=True)
    assert runs.steps(config) == steps
    runs.assert_equal(runs.weights(whole), runs.weights(config))


def test_without_steps_a_schedule_takes_the_whole_run(runs, make_config):
    config = make_config(
        c_schedule={"name": "linear", "end": 0.0},
        weights_schedule={"name": "linear", "start": {"kind": 1.0, "sure": 0.0}},
        eval_data=[],
        max_steps=4,
    )
    train(config)
    steps = runs.steps(config)
    assert [s["raco/c"] for s in steps] == pytest.approx([0.4 * (1 - k / 4) for k in range(4)])
    expected = [0.7 * k / 4 for k in range(4)]
    assert [s["raco/weight/sure"] for s in steps] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"c_schedule": {"name": "sine", "start": 0.1}}, "`c` must be one of constant, linear"),
        ({"c_schedule": {"name": "linear", "start": 2.0}}, r"`c` must be in \[0, 1\), got 2.0"),
        ({"weights_schedule": {"name": "linear", "end": {"sure": 1.0}}}, r"missing \['kind'\]"),
    ],
)
def test_wrong_schedules_are_refused_before_a_model_is_loaded(make_config, changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


@pytest.mark.slow
def test_two_processes_have_the_settings_of_one(runs, settings, save_tiny, tmp_path):
    """Both read from YAML."""
    weights = {"sure": 0.7, "kind": 0.3}
    model = settings["model"] | {"name": str(save_tiny()), "dropout": False}
    found = []
    for processes in (1, 2):
        values = settings | {
            "model": model,
            "c_schedule": RAMP,
            "weights_schedule": {"name": "cosine", "start": weights, "end": {"sure": 0, "kind": 1}},
            "eval_data": [],
            "max_steps": 4,
            "eps": 1e-3,
            "output_dir": str(tmp_path / str(processes)),
        }
        file = tmp_path / f"{processes}.yaml"
        file.write_text(yaml.safe_dump(values, sort_keys=False))
        with Started(("train", str(file)), processes, tmp_path) as started:
            assert_done(started.end())
        lines = (tmp_path / str(processes) / "metrics.jsonl").read_text().splitlines()
        found.append([yaml.safe_load(line) for line in lines])
    for one, two in zip(*found, strict=True):
        for name in ("raco/c", "raco/weight/sure", "raco/weight/kind"):
            assert one[name] == two[name]
        assert one["raco/coefficient/sure"] == pytest.approx(two["raco/coefficient/sure"], rel=1e-4)
    assert found[0][-1]["raco/weight/kind"] > 0.8
