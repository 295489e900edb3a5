"""The benchmarks of the gradient modes run, and time what they say."""

import json

import pytest
import torch

from bench.harness import jobs, optional
from bench.harness.dpo_problem import TINY as SETTING
from bench.harness.dpo_problem import Problem
from bench.rivals import dpo_steps
from bench.suites import backward, memory

TINY = ["--shape", "tiny", "--layers", "1", "--sequences", "4", "--tokens", "12"]


def records(folder):
    return [json.loads(line) for line in (folder / "report.json").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_every_rival_is_timed_in_units_of_the_plain_step(tmp_path, kind):
    arguments = ["--out", str(tmp_path), "--m", "3", "--kind", kind, "--seconds", "0", *TINY]
    backward.main(arguments)
    found = {r["name"].removeprefix("backward/"): r for r in records(tmp_path)}
    assert tuple(found) == backward.RIVALS
    assert found["plain"]["ratio"] == 1.0
    for r in found.values():
        assert r["ratio"] == r["p50"] / found["plain"]["p50"]
        assert 0 < r["error"] < 1e-5
        assert f" --m 3 --kind {kind} --shape tiny --layers 1 " in r["reproduce"]


def test_nothing_is_timed_where_one_backward_pass_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(backward, "disagreement", lambda problem, m: 1e-3)
    backward.main(["--out", str(tmp_path), "--m", "2", "--kind", "full", *TINY])
    (record,) = records(tmp_path)
    assert record["failure"] == "not timed: one backward pass and m of them differ by 0.001"


def test_a_rival_that_is_not_installed_has_a_record_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(optional.NEEDED, "torchjd", ("torchjd", "no_such_package"))
    backward.main(["--out", str(tmp_path), "--m", "2", "--kind", "full", "--seconds", "0", *TINY])
    failures = {r["name"]: r["failure"] for r in records(tmp_path) if "failure" in r}
    cure = "not run: no_such_package missing; pip install no_such_package"
    assert failures == {"backward/torchjd": cure}


def test_without_peft_full_fine_tuning_is_measured_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(optional.NEEDED, "lora", ("no_such_package",))
    rivals = ["--rivals", "plain", "one_backward"]
    backward.main(["--out", str(tmp_path), "--m", "2", "--seconds", "0", *rivals, *TINY])
    found = records(tmp_path)
    assert [r["params"]["kind"] for r in found] == ["lora", "full", "full"]
    assert found[0]["failure"].startswith("not run: no_such_package missing")
    assert all(r["p50"] > 0 for r in found[1:])


@pytest.mark.parametrize("name", [n for n in dpo_steps.STEPS if n not in ("plain", "autograd")])
def test_all_ways_take_the_same_step(name, monkeypatch):
    monkeypatch.setitem(dpo_steps.ADAMW, "weight_decay", 0.3)

    def after(step):
        problem = Problem(SETTING, prepared=step not in dpo_steps.UNPREPARED)
        before = torch.cat([p.detach().flatten() for p in problem.params])
        dpo_steps.STEPS[step](problem, 3)()
        return torch.cat([p.detach().flatten() for p in problem.params]) - before

    moved, expected = after(name), after("autograd")
    # TorchJD's own rule is CAGrad without the clip, and its solver is looser.
    tolerance = 0.5 if name == "torchjd" else 1e-3
    assert (moved - expected).abs().median() < tolerance * expected.abs().median()
    assert (moved * expected > 0).double().mean() > (0.9 if name == "torchjd" else 0.99)


def test_memory_of_a_mode_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(memory.Meter, "peak", lambda self: 10**9)
    params = Problem(SETTING).params
    states = 2 * sum(p.numel() * p.element_size() for p in params)
    assert memory.peak("one_backward", SETTING, 2) == 10**9 - states
    monkeypatch.setattr(memory, "MODES", ("plain",))
    memory.main(["--out", str(tmp_path), "--m", "2", "--seconds", "0", *TINY])
    (record,) = records(tmp_path)
    assert record["failure"] == jobs.LEFT_OUT


@pytest.mark.parametrize("more", [["--m", "2", "4"], ["--m", "2", "--kind", "full", "lora"]])
def test_a_process_measures_one_thing(more):
    with pytest.raises(SystemExit, match="`--kind` and `--m` must name one each here, got "):
        memory.main(["--one", "plain", *more, *TINY])
