"""Whole training steps are timed side by side, and every contestant learns what it should."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch

from bench.harness import correctness, jobs, lengths, meter, optional
from bench.harness.dpo_problem import ModelSetting
from bench.harness.pairs_problem import Judge, PairsProblem, PairsSetting
from bench.harness.parts import run_part
from bench.harness.records import Record, Records
from bench.harness.session import Session
from bench.rivals import pair_steps
from bench.rivals.dpo_steps import ADAMW
from bench.rivals.pair_ways import WAYS, parts
from bench.suites import ratios, train

CPU = torch.device("cpu")
SIZE = {"padded": 3, "packed": 40, "pairs": 40}


def tiny(kind: str = "full", data: str = "ratio-2-12") -> PairsSetting:
    return PairsSetting(kind, "tiny", 1, data, 4)


@pytest.fixture
def ragged(monkeypatch: pytest.MonkeyPatch) -> PairsSetting:
    """A setting whose pairs are of different lengths."""
    found = [lengths.Lengths(*x) for x in ((5, 3, 9), (2, 7, 1), (12, 4, 4), (3, 2, 6))]
    monkeypatch.setattr(lengths, "sample", lambda data, pairs: found[:pairs])
    return tiny()


def run(folder: Path, part: str = "train", seconds: float = 600) -> list[Record]:
    """The records of a run at the tiny size."""
    records = Records(folder, "cpu")
    for file in correctness.files("cpu"):
        records.add(f"tests/{file.stem}", {}, passed=1, failed=0, finished=True)
    records.add("ceilings/matmul", {}, rate=0.5, rate_unit="TFLOP/s")
    run_part(part, Session(records, CPU, "tiny", perf_counter() + seconds))
    return [r for r in records.read() if r["name"].startswith(f"{part}/")]


def in_this_process(patch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Processes take place in this one; what ran, as contestant, m and size of a micro-batch."""
    ran = []

    def run_here(command: Sequence[str], until: float) -> jobs.Done:
        assert command[:3] == [sys.executable, "-m", "bench.suites.train"]
        with redirect_stdout(StringIO()) as printed:
            train.main(command[3:])
        options = train.parser().parse_args(command[3:])
        ran.append((options.contestant, options.m[0], options.at_once))
        return jobs.Done(0, printed.getvalue(), 0.1)

    patch.setattr(jobs, "run", run_here)
    return ran


def by_name(records: Sequence[Record], kind: str) -> dict[tuple[str, int], Record]:
    """(contestant, m) -> record of one kind of training."""
    found = [r for r in records if r["params"]["kind"] == kind]
    return {(r["name"].removeprefix("train/"), r["params"]["m"]): r for r in found}


@pytest.fixture(scope="module")
def without_trl(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[list[Record], list[tuple[str, int, int]]]:
    """The records of a run where TRL is missing, and what ran."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(optional.NEEDED, "trl", ("no_such_package",))
        ran = in_this_process(patch)
        return run(tmp_path_factory.mktemp("without")), ran


def test_contestants_take_turns_and_try_their_sizes(without_trl: Any) -> None:
    records, ran = without_trl
    cell, short = train.SIZES["tiny"]
    own = [one for one in cell.contestants if not one[0].startswith("trl")]
    first = [(*one, size) for one in own for size in cell.sizes(one[0])]
    assert ran[: len(first)] == first
    found = by_name(records, "lora")
    assert found.keys() == {*cell.contestants}
    again = ran[len(first) :][: len(own)]  # the size that was faster by then
    assert [one[:2] for one in again] == own
    assert all(size in cell.sizes(name) for name, _, size in again)
    rest = [(*one, size) for one in short.contestants[1:] for size in short.sizes(one[0])]
    assert ran[len(first) + len(own) :] == rest
    for one in own:
        assert found[one]["processes"] == 2
        assert found[one]["rounds"] == 2 * cell.steps
        assert f"--at_once {found[one]['at_once']} " in found[one]["reproduce"]


def test_what_a_record_says(without_trl: Any) -> None:
    found = by_name(without_trl[0], "lora")
    for key in (("trl", 1), ("trl, as it comes", 1)):
        assert found.pop(key)["failure"].startswith("not run: no_such_package missing; pip install")
    plain = found["plain padded", 1]
    for (name, m), r in found.items():
        assert 0 < r["p20"] <= r["p50"] <= r["p80"]
        assert (r["ratio_to"], r["ratio_to_trl"], r["memory_to_trl"]) == (
            "plain padded",
            None,
            None,
        )
        assert r["ratio"] == r["ratio_to_plain"] == r["p50"] / plain["p50"]
        assert r["tokens_per_second"] == 16 / r["p50"]
        assert r["tokens_per_second_twice"] == 24 / r["p50"]
        assert r["computed_tokens"] == (16 if name == "raco pairs" else 24)
        assert r["of_matmul"] == r["flops_per_second"] / 5e11
        assert (r["prompt_ratio"], r["token_ratio"]) == (2.0, 16 / 24)
        assert r["peak_bytes"] >= 0
        assert r["params"] == tiny("lora").params(m)
        before, after = r["losses"]
        assert after < before == pytest.approx(0.6931, abs=1e-4)  # log 2: as the reference
        words = shlex.split(r["reproduce"])
        assert words[:5] == ["python", "-m", "bench.suites.train", "--contestant", name]


def test_what_is_over_what(without_trl: Any) -> None:
    found = by_name(without_trl[0], "lora")
    few, many, packed = (
        found[k] for k in (("raco pairs", 2), ("raco pairs", 8), ("raco packed", 2))
    )
    assert few["over_packed"] == few["p50"] / packed["p50"]
    assert few["over_token_ratio"] == pytest.approx(few["over_packed"] * 24 / 16)
    assert many["over_few"] == many["p50"] / few["p50"]
    padded = found["raco padded", 2]["reference_seconds"]
    assert few["reference_to_padded"] == few["reference_seconds"] / padded


@pytest.mark.parametrize("wrong", ["trl", pytest.param("raco pairs", marks=pytest.mark.slow)])
def test_who_learns_something_else_has_no_time(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's place is taken: it is not among the packages of the tests."""
    measure = train.measure

    def stand_in(contestant: str, setting: PairsSetting, m: int, at_once: int, steps: int) -> dict:
        too_many = int(contestant == wrong and setting.kind == "full")
        contestant = "plain padded" if contestant.startswith("trl") else contestant
        return measure(contestant, setting, m, at_once, steps + too_many)

    monkeypatch.setitem(optional.NEEDED, "trl", ())
    monkeypatch.setattr(train, "measure", stand_in)
    sizes = {"padded": (2,), "packed": (96,), "pairs": (96,)}
    once = tuple(replace(x, rounds=1, at_once=sizes) for x in train.SIZES["tiny"])
    monkeypatch.setitem(train.SIZES, "tiny", once)
    in_this_process(monkeypatch)
    records = run(tmp_path)
    lora, full = (by_name(records, kind) for kind in ("lora", "full"))
    assert {r["ratio_to"] for r in lora.values()} == {"trl"}
    assert lora["trl", 1]["ratio_to_trl"] == lora["trl", 1]["memory_to_trl"] == 1.0
    failed = [name for (name, _), r in full.items() if "failure" in r]
    assert failed == [wrong]
    one = full[wrong, 1 if wrong == "trl" else 2]
    assert one["failure"].startswith("wrong: its loss fell otherwise than ")
    assert full["raco packed", 2]["ratio_to"] == ("plain padded" if wrong == "trl" else "trl")


def test_what_there_is_no_time_for_says_so(tmp_path: Path) -> None:
    """Real processes, which get no time at all."""
    found = [r for r in run(tmp_path, seconds=0) if not r["name"].startswith("train/trl")]
    assert {r["failure"] for r in found} == {"left out: the time for this part was used up"}


def test_data_that_is_not_here_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "DATA", tmp_path)
    (cell, *_) = train.SIZES["tiny"]
    real = replace(cell, setting=replace(cell.setting, data="hh_rlhf"))
    monkeypatch.setitem(train.SIZES, "tiny", (real,))
    (record,) = run(tmp_path)
    assert record["params"]["data"] == "hh_rlhf"
    assert record["failure"].startswith("not run: there is no hh_rlhf.test.jsonl.gz in ../shared")


@pytest.mark.slow
def test_a_process_prints_one_line_of_json() -> None:
    setting: ModelSetting = tiny("full")
    command = ["--contestant", "raco pairs", *setting.options(2), "--at_once", "40", "--steps", "2"]
    until = perf_counter() + 60
    done = jobs.run([sys.executable, "-m", "bench.suites.train", *command], until)
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
@pytest.mark.parametrize("way", WAYS)
def test_ours_takes_the_steps_of_the_mean_loss(
    way: str, kind: str, ragged: PairsSetting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule `linear` in micro-batches beside autograd's gradient of the mean loss, in float64."""
    monkeypatch.setitem(ADAMW, "weight_decay", 0.3)
    ours, truth = (PairsProblem(replace(ragged, kind=kind)) for _ in range(2))
    for problem in (ours, truth):
        problem.model.double()
    before = {name: p.detach().clone() for name, p in truth.trained.items()}
    of_step = parts(ours, way, SIZE[way])
    assert len(of_step) > 1
    train.train(ours, f"raco {way}", of_step, 3, 3, meter.Meter(CPU, 1), rule="linear")
    (whole,) = parts(truth, "padded", 4)
    (start,) = pair_steps.reference(truth, [whole])
    optimizer = torch.optim.AdamW(truth.trained.values(), **ADAMW)
    for _ in range(3):
        a, b = whole.logps(truth.model).chunk(2)
        torch.stack(truth.losses(a - b - start, whole.pairs, 3)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in truth.trained.items():
        moved = ours.trained[name] - before[name]
        torch.testing.assert_close(moved, p - before[name], rtol=1e-2, atol=1e-2 * ADAMW["lr"])


@pytest.mark.parametrize("way", WAYS)
def test_every_pair_is_scored_once_and_as_the_judge_scores_it(
    way: str, ragged: PairsSetting
) -> None:
    problem = PairsProblem(ragged)
    of_step = parts(problem, way, SIZE[way])
    assert sorted(k for part in of_step for k in part.pairs) == [0, 1, 2, 3]
    margins = torch.empty(4)
    for part, of_part in zip(of_step, pair_steps.reference(problem, of_step), strict=True):
        margins[part.pairs] = of_part
    torch.testing.assert_close(margins, Judge(problem)._start, rtol=1e-4, atol=1e-4)
    rows = {"padded": 2 * (3 * 16 + 9), "packed": 22 + 12 + 32 + 14, "pairs": 17 + 10 + 20 + 11}
    assert sum(part.tokens for part in of_step) == rows[way]


def test_pairs_end_alike() -> None:
    problem = PairsProblem(tiny())
    assert problem.lengths[0] == (8, 4, 4)
    for pair, of_pair in zip(problem.pairs, problem.lengths, strict=True):
        assert (len(pair.prompt_ids), len(pair.a_ids), len(pair.b_ids)) == of_pair
        assert pair.a_ids[0] != pair.b_ids[0]
        assert pair.a_ids[-1] == pair.b_ids[-1] == 89
    assert problem.labels[:2].tolist() == [[1, 1, 1, 1], [1, -1, 1, -1]]


def test_a_command_of_a_former_version_measures_what_it_did() -> None:
    of_data = ["--layers", "4", "--sequences", "4", "--tokens", "32"]
    words = ["--contestant", "plain", "--m", "1", "--kind", "full", *of_data]
    options = train._today(train.parser().parse_args(words))
    assert (options.contestant, options.data, options.pairs) == ("plain padded", "fixed-32", 2)


def test_only_steps_after_the_warm_up_are_metered() -> None:
    clock = meter.Meter(CPU, warmup=1)
    for megabytes in (256, 64, 1):
        clock.begin()
        kept = torch.ones(megabytes << 18)
        clock.end()
        del kept
    assert len(clock.seconds) == 2
    assert 60 << 20 < clock.peak() < 200 << 20


def test_pair_rows_beside_packed_sequences(tmp_path: Path) -> None:
    found = run(tmp_path, "ratios", seconds=0)
    assert [r["name"] for r in found] == ["ratios/raco packed", "ratios/raco pairs"] * 2
    assert [r["prompt_ratio"] for r in found] == [1, 1, 5, 5]
    assert [r["token_ratio"] for r in found] == pytest.approx([18 / 24, 18 / 24, 14 / 24, 14 / 24])
    for packed, pairs in (found[:2], found[2:]):
        assert (packed["ratio"], pairs["ratio"]) == (1.0, pairs["p50"] / packed["p50"])
    assert ratios.NAME == "ratios"
