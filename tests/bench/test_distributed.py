"""The suite `distributed` times, counts and holds to the truth what it says, on two processes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import processes
import pytest
import torch
from torch import distributed as dist

from bench.harness import jobs, payload
from bench.harness.dpo_problem import SHAPES, TINY, Setting
from bench.harness.parameters import MODELS, elements
from bench.harness.records import Records
from bench.pages import page, report, spread
from bench.suites import distributed


def said(arguments: Sequence[str]) -> dict[str, Any]:
    """What one process of the suite says, which is in the group already."""
    options = distributed.parser().parse_args(arguments)
    assert options.processes == dist.get_world_size()
    (setting,) = distributed.dpo_problem.chosen(options, Setting)
    if options.count:
        return distributed.count(setting, options.m)
    return distributed.clock(setting, options.m, perf_counter() + options.seconds)


@pytest.fixture
def forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite's processes are forked from a server that has imported everything."""

    def run(command: Sequence[str], size: int, until: float, **_: str) -> list[dict[str, Any]]:
        assert command[:2] == ["-m", "bench.suites.distributed"]
        return processes.run(size, said, [*command[2:]], folder=tmp_path, timeout=120)

    monkeypatch.setattr(jobs, "measured_together", run)


@pytest.mark.slow
def test_every_mode_stands_beside_plain_dpo(tmp_path: Path, forked: None) -> None:
    records = Records(tmp_path, "cpu")
    distributed.measure(records, TINY, [2], 2, perf_counter())
    found = records.read()
    assert [(r["params"]["wrapper"], page.contestant(r)) for r in found] == [*distributed.SENT]
    plain = {r["params"]["wrapper"]: r for r in found if r["name"] == "distributed/plain"}
    for r in found:
        assert 0 < r["p20"] <= r["p50"] <= r["p80"]
        assert r["rounds"] == 3
        assert r["ratio"] == pytest.approx(r["p50"] / plain[r["params"]["wrapper"]]["p50"])
        assert r["error"] < 1e-6
        # Next to what has to be sent: Gram matrices, flags, and the padding of odd sizes.
        assert r["expected"] <= r["payload"] < r["expected"] + 0.15
        assert r["memory_bytes"] >= 0
        again = shlex.split(r["reproduce"])
        assert again[:3] == ["python", "-m", "bench.suites.distributed"]
        distributed.parser().parse_args(again[3:])
    text = page.body(found)
    assert (
        "| m = 2, replicas, 2 processes, full, tiny, 1 layers, 4 sequences, 12 tokens each" in text
    )
    assert text.count(" θ sent, ") == 8
    tables = spread.tables(spread.with_counts([[], found]))
    expected, counted = (f"{plain['fsdp2'][k]:.2f}" for k in ("expected", "payload"))
    assert f"| FSDP2 | `plain` | 3 - a | {expected} | {counted} | - | - |" in tables["sent"]


def test_one_process_sends_nothing(tmp_path: Path, forked: None) -> None:
    records = Records(tmp_path, "cpu")
    distributed.measure(records, TINY, [2], 1, perf_counter())
    assert all(r["p50"] > 0 and "payload" not in r for r in records.read())
    assert not spread.with_counts([records.read()])


def test_a_mode_that_is_wrong_has_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one = {"seconds": [1.0, 2.0], "error": 0.0, "memory_bytes": 1, "payload": 1.0, "expected": 1.0}
    keys = [distributed._key(2, *of) for of in distributed.SENT]
    slow = {key: {**one, "seconds": [3.0, 1.0]} for key in keys}
    wrong = {key: {**one, "error": 1e-3 * ("gram_first" in key)} for key in keys}
    monkeypatch.setattr(jobs, "measured_together", lambda *_, **__: [slow, wrong])
    records = Records(tmp_path, "cpu")
    distributed.measure(records, TINY, [2], 2, perf_counter())
    for r in records.read():
        if r["name"] == "distributed/gram_first":
            assert r["failure"] == "wrong: error 0.001, at most 1e-05"
        else:  # the slower process's seconds of each step
            assert (r["p50"], r["rounds"]) == (2.5, 2)


def test_a_process_that_fails_is_what_the_records_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands = []

    def run(command: Sequence[str], *_: object, **__: str) -> list[dict[str, Any]]:
        commands.append(command)
        return [{"2 replicas plain": {}}, {"failure": "status 1: out of memory"}]

    monkeypatch.setattr(jobs, "measured_together", run)
    records = Records(tmp_path, "cpu")
    distributed.measure(records, TINY, [2], 2, perf_counter())
    assert {r["failure"] for r in records.read()} == {"status 1: out of memory"}
    (command,) = commands  # nothing is timed then
    assert command[-1] == "--count"


def test_processes_are_told_who_they_are_and_where_they_meet() -> None:
    code = (
        "import json, sys; _, store, rank = sys.argv[-3:]; assert '--count' in sys.argv; "
        "print(json.dumps({'rank': rank, 'store': sys.argv[-3]})); sys.exit(rank == '1')"
    )
    measured = partial(jobs.measured_together, ["-c", code, "--count"], until=perf_counter() + 60)
    first, second = measured(2)
    assert first["rank"] == "0"
    assert first["store"].endswith("/store")
    assert second["failure"].startswith("status 1: ")


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    options = ["--shape", "tiny", "--layers", "1", "--tokens", "12", "--m", "2"]
    distributed.main(["--out", str(tmp_path), "--seconds", "120", *options])
    lines = (tmp_path / "report.json").read_text().splitlines()
    assert len(lines) == 8
    assert all(json.loads(line)["p50"] > 0 for line in lines)


def counts() -> list[tuple[int, int]]:
    """(bytes, messages) of every collective on 100 float32 numbers."""
    whole, part = torch.ones(100), torch.ones(50)
    calls = [
        partial(dist.all_reduce, whole),
        partial(dist.broadcast, whole, 0),
        partial(dist.all_gather, [torch.ones(50), torch.ones(50)], part),
        partial(dist.all_gather_into_tensor, whole, part),
        partial(dist.reduce_scatter_tensor, part, whole),
        partial(dist.barrier),
    ]
    found = []
    for call in calls:
        with payload.Payload() as counted:
            call()
        found.append((counted.bytes, counted.messages))
    with pytest.raises(NotImplementedError, match="c10d::send"), payload.Payload():
        dist.send(whole, 1 - dist.get_rank())
    return found


def test_every_collective_is_counted(tmp_path: Path) -> None:
    expected = [(800, 1), (400, 1), (400, 1), (400, 1), (400, 1), (0, 0)]
    assert processes.run(2, counts, folder=tmp_path) == [expected, expected]


def test_memory_by_formula() -> None:
    model, few = MODELS["Llama-3-8B"], SHAPES["tiny"]
    theta, d = elements(model.shapes()), model.hidden
    gathered = 2 * 128256 * d + d + 2 * (theta - 2 * 128256 * d - d) / 32

    def held(mode: str, m: int) -> float:
        """In numbers."""
        return spread.bytes_held(model, "fsdp2", mode, m, 8, torch.bfloat16) / 2

    assert held("plain", 2) == pytest.approx(4 * theta / 8 + 2 * gathered)
    assert held("autograd", 4) - held("autograd", 2) == pytest.approx(2 * theta / 8)
    on_the_way = 2 * (128256 + 14336) * d * (1 + 1 / 8)
    assert held("one_backward", 2) == pytest.approx(5 * theta / 8 + gathered + on_the_way)
    n = elements(few.shapes())  # all of it is on its way at once
    own = spread.bytes_held(few, "replicas", "one_backward", 3, 2, torch.float32)
    assert own == 4 * (3 + 3 + 3 / 2 + 1 + 3) * n


def test_the_page_has_the_tables_of_the_committed_runs() -> None:
    assert report.distributed() == (report.DOCS / "distributed.md").read_text(encoding="utf-8")
