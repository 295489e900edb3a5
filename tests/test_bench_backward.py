"""The benchmarks of the gradient modes run, and time what they say."""

import json

import pytest
import torch

from bench import bench_backward, bench_memory, dpo_steps

TINY = ["--layers", "1", "--sequences", "4", "--tokens", "12"]


def records(folder):
    return [json.loads(line) for line in (folder / "report.json").read_text().splitlines()]


@pytest.fixture
def small(monkeypatch):
    sizes = {"hidden_size": 36, "intermediate_size": 40, "vocab_size": 90}
    monkeypatch.setattr(dpo_steps, "SHAPE", {**dpo_steps.SHAPE, **sizes})


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_every_rival_is_timed_in_units_of_the_plain_step(tmp_path, small, kind):
    arguments = ["--out", str(tmp_path), "--m", "3", "--kinds", kind, "--seconds", "0", *TINY]
    bench_backward.main(arguments)
    found = {r["name"].removeprefix("backward/"): r for r in records(tmp_path)}
    assert tuple(found) == bench_backward.RIVALS
    assert found["plain"]["ratio"] == 1.0
    for r in found.values():
        assert r["ratio"] == r["p50"] / found["plain"]["p50"]
        assert 0 < r["error"] < 1e-5


@pytest.mark.parametrize("name", [n for n in dpo_steps.STEPS if n != "plain"])
def test_all_ways_take_the_same_step(small, name):
    def after(step):
        problem = dpo_steps.Problem(
            "full",
            layers=1,
            sequences=4,
            tokens=12,
            device=torch.device("cpu"),
            dtype=torch.float32,
            prepared=step not in dpo_steps.UNPREPARED,
        )
        before = torch.cat([p.detach().flatten() for p in problem.params])
        dpo_steps.STEPS[step](problem, 3)()
        return torch.cat([p.detach().flatten() for p in problem.params]) - before

    moved, expected = after(name), after("autograd")
    assert (moved - expected).abs().median() < 1e-3 * expected.abs().median()
    assert (moved * expected > 0).double().mean() > 0.99


def test_memory_of_a_mode_is_measured(small):
    options = bench_memory._parser().parse_args(["--out", "", "--m", "2", *TINY])
    options.one = "one_backward"
    assert bench_memory.peak(options) >= 0
