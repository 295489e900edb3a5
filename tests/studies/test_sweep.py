"""Sweeps of a tiny model: the runs are those of `train`, made once, and go on where they were."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from raco_fast.cli.program import COMMANDS, parser_of
from raco_fast.dpo.run import reference_cache
from raco_fast.dpo.run.config import TrainConfig
from raco_fast.dpo.run.trainer import Interrupted, train
from raco_fast.settings.parsing import from_settings, made
from raco_fast.settings.text import read
from raco_fast.studies import worker
from raco_fast.studies.finished import NAME, read_finished
from raco_fast.studies.plan import planned
from raco_fast.studies.pool import device_of
from raco_fast.studies.sweep import sweep, table
from raco_fast.studies.sweep_config import SweepConfig

pytestmark = pytest.mark.usefixtures("in_process")
WEIGHTS = [{"sure": 0.7, "kind": 0.3}, {"sure": 0.2, "kind": 0.8}]


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """The pairs of every pass of the reference over data."""
    found, scored = [], reference_cache._scored
    monkeypatch.setattr(
        reference_cache, "_scored", lambda *a: found.append(len(a[1])) or scored(*a)
    )
    return found


def statuses(result) -> list[str]:
    return [result.end_of(run).status for run in result.runs]


def test_every_run_is_that_of_train_by_itself_after_one_reference_pass(
    runs, make_sweep, tmp_path, passes, capsys
):
    config = make_sweep()
    result = sweep(config)
    assert statuses(result) == ["finished"] * 4
    assert passes == [16, 8]  # of four runs, over training and held-out pairs
    said = capsys.readouterr().out
    assert "sweep: 4 runs in" in said
    assert "1 at a time with 1 thread(s) each" in said
    assert "sweep: 4 of 4: rule=cagrad-clip,weights=sure0.2_kind0.8 finished" in said
    given = [read(run.config.folder / "config.yaml") for run in result.runs]
    assert [from_settings(TrainConfig, each) for each in given] == [r.config for r in result.runs]
    elsewhere = {"output_dir": str(tmp_path / "alone"), "cache_dir": str(tmp_path / "its own")}
    alone = from_settings(TrainConfig, given[3] | elsewhere)
    train(alone)
    runs.assert_same_run(alone, result.runs[3].config)
    plain, swept = (read_finished(run.folder) for run in (alone, result.runs[3].config))
    assert plain.evaluation == swept.evaluation != {}
    assert (plain.run["data"], plain.run["held_out"]) == (swept.run["data"], swept.run["held_out"])
    assert read_finished(tmp_path) is None
    assert runs.records(result.runs[0].config) != runs.records(result.runs[2].config)

    found = read_finished(result.runs[1].config.folder)
    assert (found.threads, found.run["total_steps"]) == (1, 2)
    assert found.evaluation == runs.evaluations(result.runs[1].config)[-1]
    lines = table(result).splitlines()
    assert lines[0].split() == ["rule", "weights", "run", "sure", "kind"]
    assert lines[2].startswith("linear       sure 0.2/kind 0.8  finished  ")
    assert lines[2].endswith(f"{found.evaluation['eval_rewards/accuracies/kind']:.3f}")
    of_all = json.loads((config.folder / "runs.json").read_text())
    assert [each["status"] for each in of_all] == ["finished"] * 4
    assert of_all[1]["evaluation"] == found.evaluation
    assert of_all[1]["point"] == {"rule": "linear", "weights": {"sure": 0.2, "kind": 0.8}}


def test_finished_runs_are_known_by_their_content(make_sweep, base, tmp_path, capsys):
    data = tmp_path / "pairs.jsonl"
    data.write_bytes(Path(base["data"][0]["path"]).read_bytes())
    own = {"data": [{"path": str(data)}], "max_steps": 1}
    first = sweep(make_sweep(own, grid={"seed": [0]}))
    more = make_sweep(own | {"chunk_tokens": 64}, grid={"seed": [0, 1]}, keep="metrics")
    result = sweep(more)  # a seed more; other portions of the head are the same run
    assert statuses(result) == ["finished"] * 2
    assert "2 runs in" in (said := capsys.readouterr().out)
    assert "1 of them finished before" in said
    assert (first.runs[0].config.folder / "checkpoints").is_dir()
    left = {file.name for file in result.runs[1].config.folder.iterdir()}
    assert left == {".lock", "config.yaml", NAME, "metrics.jsonl"}
    assert statuses(sweep(more)) == ["finished"] * 2
    for changes, message in (
        ({"lr": 0.02}, r"another finished run \(lr: 0.01 there, 0.02 now\); choose another"),
        ({"max_steps": 2}, r"\(max_steps: 1 there, 2 now\)"),
        ({"eval_data": own["data"]}, r"\(eval_data: .* there, .* now\)"),
    ):
        with pytest.raises(ValueError, match=message):
            planned(dataclasses.replace(more, base=base | own | changes))
    # A setting that is newer than the run had its default.
    record = result.runs[0].config.folder / NAME
    noted = json.loads(record.read_text())
    del noted["run"]["settings"]["warmup_ratio"]
    record.write_text(json.dumps(noted))
    assert planned(more)[0].finished
    with pytest.raises(ValueError, match=r"\(warmup_ratio: 0.1 there, 0.2 now\)"):
        planned(dataclasses.replace(more, base=base | own | {"warmup_ratio": 0.2}))
    data.write_text("".join(data.read_text().splitlines(keepends=True)[::-1]))
    with pytest.raises(ValueError, match=r"\(the content of .*pairs.jsonl has changed\)"):
        planned(more)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_is_that_which_was_not(
    runs, make_sweep, tmp_path, monkeypatch
):
    whole = sweep(make_sweep(grid={"seed": [3]}, output_dir=str(tmp_path / "whole")))
    config = make_sweep(grid={"seed": [3]})

    def stopped(of_run: TrainConfig, resume: bool):
        with monkeypatch.context() as patched:
            runs.interrupt_after(patched, 1)
            return train(of_run, resume)

    with monkeypatch.context() as patched:
        patched.setattr(worker, "train", stopped)
        result = sweep(config)
    (end,) = result.ends.values()
    assert (end.status, end.reason) == ("stopped", "after step 1, with a checkpoint")
    assert table(result).splitlines()[1].split() == ["3", "stopped", "-", "-"]
    result = sweep(config)
    assert statuses(result) == ["finished"]
    runs.assert_same_run(result.runs[0].config, whole.runs[0].config)


def test_a_checkpoint_of_another_run_is_not_gone_on_from(runs, make_sweep, monkeypatch):
    config = make_sweep(grid={"seed": [3]})
    with monkeypatch.context() as patched:
        runs.interrupt_after(patched, 1)
        with pytest.raises(Interrupted):
            train(planned(config)[0].config)
    result = sweep(dataclasses.replace(config, base=config.base | {"lr": 0.5}))
    assert statuses(result) == ["failed"]
    assert "lr: 0.01 in the checkpoint, 0.5 now" in result.failed[0].name + str(result.ends)


def test_a_run_that_fails_is_told_and_the_others_are_made(make_sweep, base, tmp_path, capsys):
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{}\n")
    files = [[{"path": str(broken)}], base["data"]]
    result = sweep(make_sweep({"max_steps": 1}, grid={"data": files}))
    assert statuses(result) == ["failed", "finished"]
    assert [run.point["data"] for run in result.failed] == files[:1]
    said = capsys.readouterr().out
    assert f"failed: {broken}:1:" in said
    # Mended, it is made, and the other is left as it is.
    shutil.copy(base["data"][0]["path"], broken)
    assert statuses(sweep(make_sweep({"max_steps": 1}, grid={"data": files}))) == ["finished"] * 2
    assert "sweep: 1 of 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {}}, "`grid` must name at least one setting and its values, got none"),
        ({"grid": {"seed": []}}, r"`grid.seed` must be a list of at least one value, got \[\]"),
        ({"grid": {"seed": 3}}, r"`grid.seed` must be a list of at least one value, got 3"),
        ({"grid": {"c": [0.1, 0.4, 0.1]}}, r"`grid.c` must hold different values"),
        ({"jobs": 0}, "`jobs` must be at least 1, got 0"),
        ({"keep": "some"}, r"`keep` must be one of \['all', 'metrics', 'model'\], got 'some'"),
    ],
)
def test_settings_of_a_sweep_that_cannot_be_are_told(changes, message):
    with pytest.raises(ValueError, match=message):
        SweepConfig(**({"base": "config.yaml", "grid": {"seed": [0]}} | changes))


@pytest.mark.parametrize(
    ("changes", "grid", "message"),
    [
        ({}, {"lrr": [1]}, "did you mean 'lr'"),
        ({}, {"lr": [0.1, "fast"]}, "the run lr=fast: .*float"),
        ({}, {"rule": [3], "weights": [WEIGHTS[0], WEIGHTS[1]]}, "`rule` must be a name"),
        ({}, {"c": [0.2, 3]}, "the run c=3: `c` must be in"),
        ({}, {"weights": [{"sure": 0.9, "kind": 0.3}]}, "kind0.3: `weights` must sum to 1"),
        (
            {"losses": {"kind": "ipo"}},
            {"weights": [{"sure": 1.0}]},
            "`losses` must name objectives",
        ),
        ({"lrr": 1}, {"seed": [1]}, "the run seed=1: .*lrr.*did you mean 'lr'"),
        ({"model": {"name": "m", "dtype": "auto"}}, {"seed": [1]}, "fp32 or bf16 in a sweep"),
        ({}, {"seed": ["1", 1]}, "two points of `grid` have the same name 'seed=1'"),
    ],
)
def test_no_run_starts_where_one_cannot_be(make_sweep, changes, grid, message):
    config = make_sweep(changes, grid=grid)
    with pytest.raises(ValueError, match=message):
        sweep(config)
    assert not config.folder.exists()


def test_the_base_may_be_a_file(make_sweep, base, tmp_path):
    file = tmp_path / "base.json"
    file.write_text(json.dumps(base))
    assert planned(make_sweep(base=str(file))) == planned(make_sweep())
    with pytest.raises(FileNotFoundError, match=r"`base` must be a file, got nowhere\.yaml"):
        planned(make_sweep(base="nowhere.yaml"))


def test_devices_are_given_in_turn(make_sweep, monkeypatch):
    config = make_sweep(grid={"seed": [0]}, devices=["cpu", "cuda:99"])
    with pytest.raises(ValueError, match=r"`device` must be .* got 'cuda:99'"):
        planned(config)
    (run,) = planned(make_sweep(grid={"seed": [0]}))
    given = []
    monkeypatch.setattr(worker, "train", lambda config, resume: given.append(config.model.device))
    monkeypatch.setattr(worker, "write_finished", lambda config, threads: None)
    assert [device_of(slot, config) for slot in (0, 3, 4)] == ["cpu", "cuda:99", "cpu"]
    ends = [worker._made(run, device, 1, "all") for device in ("cpu", "cuda:99")]
    assert [end.status for end in ends] == ["finished", "failed"]
    assert "got 'cuda:99'" in ends[1].reason
    assert device_of(1, make_sweep()) is None
    assert worker._made(run, None, 1, "all").status == "finished"
    assert given == ["cpu", "cpu"]


def test_the_config_of_a_run_is_read_as_it_was_meant(make_sweep):
    odd = {"weights": {"no": 0.5, "1": 0.25, "é: [x]": 0.25}, "lr": 5e-6, "eps": 1e-12}
    odd |= {"tokens": {"chat_template": "{{ a }}\n: 1:30 #\t\x7f"}, "max_grad_norm": None}
    (run,) = planned(make_sweep(odd, grid={"betas": [[0.9, 0.95]]}))
    run.config.folder.mkdir(parents=True)
    run.write_config()
    assert from_settings(TrainConfig, read(run.config.folder / "config.yaml")) == run.config
    assert run.config.weights == odd["weights"]
    assert run.config.tokens.chat_template == odd["tokens"]["chat_template"]
    parser = parser_of(COMMANDS["train"])
    values = parser.parse_args(["train", "--config", str(run.config.folder / "config.yaml")])
    assert made(parser, values, TrainConfig) == run.config
