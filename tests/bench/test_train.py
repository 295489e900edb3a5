"""Whole training steps are timed side by side, and every contestant learns what it should."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import pytest
import torch

from bench.harness import correctness, jobs, meter, optional
from bench.harness.dpo_problem import TINY, FreshProblem, Setting
from bench.harness.parts import run_part
from bench.harness.records import Record, Records
from bench.harness.session import Session
from bench.rivals.dpo_steps import ADAMW
from bench.suites import train

CPU = torch.device("cpu")


def tiny(kind: str) -> Setting:
    return replace(TINY, kind=kind)


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Processes take place in this one; their contestants in the order in which they ran."""
    ran = []

    def run_here(command: Sequence[str], until: float) -> jobs.Done:
        assert command[:3] == [sys.executable, "-m", "bench.suites.train"]
        capsys.readouterr()
        train.main(command[3:])
        ran.append(command[4])
        return jobs.Done(0, capsys.readouterr().out, 0.1)

    monkeypatch.setattr(jobs, "run", run_here)
    return ran


def run(folder: Path, seconds: float = 60) -> dict[tuple[str, str], Record]:
    """(contestant, kind) -> record of a run at the tiny size."""
    records = Records(folder, "cpu")
    for file in correctness.files("cpu"):
        records.add(f"tests/{file.stem}", {}, passed=1, failed=0, finished=True)
    run_part("train", Session(records, CPU, "tiny", perf_counter() + seconds))
    found = [r for r in records.read() if r["name"].startswith("train/")]
    return {(r["name"].removeprefix("train/"), r["params"]["kind"]): r for r in found}


def test_contestants_take_turns_and_say_how_to_repeat_them(
    tmp_path: Path, inside: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(optional.NEEDED, "trl", ("no_such_package",))
    found = run(tmp_path)
    names = ["plain", "raco cagrad-clip", "raco linear"]
    assert inside == names * train.ROUNDS * 2
    assert found.keys() == {(n, k) for n in [*names, "trl"] for k in ("lora", "full")}
    for (name, kind), r in found.items():
        if name == "trl":
            assert r["failure"].startswith("not run: no_such_package missing; pip install ")
            continue
        assert 0 < r["p20"] <= r["p50"] <= r["p80"]
        assert r["rounds"] == train.SIZES["tiny"][-1] * r["processes"] == 2 * train.ROUNDS
        assert r["ratio_to"] == "plain"
        assert r["ratio"] == r["p50"] / found["plain", kind]["p50"]
        assert r["tokens_per_second"] == 4 * 12 / r["p50"]
        assert r["peak_bytes"] >= 0
        assert r["params"] == tiny(kind).params(1 if name == "plain" else 2)
        before, after = r["losses"]
        assert after < before == pytest.approx(0.6931, abs=1e-4)  # log 2: as the reference
        assert shlex.split(r["reproduce"])[:5] == [
            *("python", "-m", "bench.suites.train", "--contestant"),
            name,
        ]


def test_ratios_are_to_trl_where_it_learns_what_plain_learns(
    tmp_path: Path, inside: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in: TRL itself is not among the packages of the tests."""
    trainer = train.trainer

    def stand_in(contestant: str, m: int) -> train.Train:
        if contestant != "trl":
            return trainer(contestant, m)

        def train_trl(problem: FreshProblem, steps: int, meter: meter.Meter) -> None:
            # In `lora` as many steps as asked for, in `full` some that are not asked for.
            trainer("plain", 1)(problem, steps, meter)
            if problem.setting.kind == "full":
                trainer("plain", 1)(problem, 1, meter)

        return train_trl

    monkeypatch.setitem(optional.NEEDED, "trl", ())
    monkeypatch.setattr(train, "trainer", stand_in)
    found = run(tmp_path)
    assert {r["ratio_to"] for (_, kind), r in found.items() if kind == "lora"} == {"trl"}
    assert found["trl", "lora"]["ratio"] == 1.0
    assert found["trl", "full"]["failure"].startswith("wrong: its loss fell otherwise")
    assert found["raco linear", "full"]["ratio_to"] == "plain"


def test_what_there_is_no_time_for_says_so(tmp_path: Path) -> None:
    """Real processes, which get no time at all."""
    found = run(tmp_path, seconds=0)
    del found["trl", "lora"], found["trl", "full"]
    assert {r["failure"] for r in found.values()} == {
        "left out: the time for this part was used up"
    }


def test_a_process_prints_one_line_of_json() -> None:
    command = train.command("raco cagrad-clip", tiny("full"), 2, 2)
    until = perf_counter() + 60
    done = jobs.run([sys.executable, *command], until)
    assert done.code == 0, done.output
    said = json.loads(done.output.splitlines()[-1])
    assert len(said["seconds"]) == 2
    assert said["peak_bytes"] > 2 * said["model_bytes"]  # AdamW's states at the least


def test_nothing_is_timed_before_its_tests(tmp_path: Path) -> None:
    records = Records(tmp_path, "cpu")
    run_part("train", Session(records, CPU, "tiny", perf_counter() + 60))
    (record,) = records.read()
    assert record["failure"].startswith("not timed: test_cpu_gram.py has not been run")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_ours_takes_the_steps_of_the_mean_loss(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule `linear` beside autograd's gradient of the mean of the losses, in float64."""
    monkeypatch.setitem(ADAMW, "weight_decay", 0.3)
    ours, truth = (FreshProblem(tiny(kind)) for _ in range(2))
    for problem in (ours, truth):
        problem.model.double()
    before = {name: p.detach().clone() for name, p in truth.trained.items()}
    train.trainer("raco linear", 3)(ours, 3, meter.Meter(CPU, 1))
    optimizer = torch.optim.AdamW(truth.trained.values(), **ADAMW)
    for _ in range(3):
        torch.stack(truth.losses(truth.scores(), 3)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in truth.trained.items():
        moved = ours.trained[name] - before[name]
        torch.testing.assert_close(moved, p - before[name], rtol=1e-2, atol=1e-2 * ADAMW["lr"])


def test_pairs_share_their_prompt_and_end_alike() -> None:
    problem = FreshProblem(tiny("full"))
    a, b = problem.ids.chunk(2)
    assert torch.equal(a[:, :8], b[:, :8])
    assert not torch.equal(a[:, 8:], b[:, 8:])
    assert problem.ids[:, -1].unique().tolist() == [89]
    assert problem.labels[:2].tolist() == [[1, 1], [1, -1]]


def test_only_steps_after_the_warm_up_are_metered() -> None:
    clock = meter.Meter(CPU, warmup=1)
    for megabytes in (256, 64, 1):
        clock.begin()
        kept = torch.ones(megabytes << 18)
        clock.end()
        del kept
    assert len(clock.seconds) == 2
    assert 60 << 20 < clock.peak() < 200 << 20
