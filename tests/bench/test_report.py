"""The report says what the records say, and nothing of what failed its tests."""

from __future__ import annotations

import json
import shlex
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch

from bench.harness import correctness
from bench.harness.records import Record, Records, latest
from bench.harness.session import Session
from bench.pages import goals, page, report

MACHINE = {"cpu": "a machine", "cores": 2, "load": 0.1}


def record(name: str, p50: float = 2.0, **values: Any) -> Record:
    params = values.pop("params", {"list": "Llama-50M", "elements": 6 * 10**7, "m": 2})
    spread = {"p20": p50, "p50": p50, "p80": p50}
    of_run = {"machine": MACHINE, "versions": {"torch": "2.13"}, "commit": "c0ffee"}
    return {"name": name, "params": params, "unit": "ms", **spread, **values, **of_run}


def at_once(records: Records) -> Session:
    """A session of tiny sizes that has no time left."""
    return Session(records, torch.device("cpu"), "tiny", perf_counter())


def steps(paper: float, adamw: float) -> list[Record]:
    params = {"list": "Llama-50M", "elements": 6 * 10**7, "m": 2, "dtype": "float32"}
    ratios = {"raco": 1.0, "paper": paper, "adamw": adamw}
    return [
        record(f"step/{k}", 2 * v, ratio=v, share=None, params=params) for k, v in ratios.items()
    ]


def goal_lines(records: list[Record]) -> list[str]:
    return [line for line in page.goals(records, ["cpu"]).splitlines() if line.startswith("| step")]


@pytest.mark.parametrize(
    ("paper", "adamw", "words"),
    [(2.5, 0.8, ["met", "met"]), (1.9, 0.5, ["**missed**", "**missed**"])],
)
def test_a_goal_is_met_or_missed_by_its_figure(
    paper: float, adamw: float, words: list[str]
) -> None:
    lines = goal_lines(steps(paper, adamw))
    assert [line.split("|")[4].strip() for line in lines] == words
    assert [float(line.split("|")[3]) for line in lines] == pytest.approx([paper, 1 / adamw], 1e-2)


def test_a_goal_without_a_figure_is_not_met() -> None:
    lines = goal_lines([record("gram/raco", ratio=1.0)])
    assert [line.split("|")[2].strip() for line in lines] == ["not measured"] * 2
    small = steps(3.0, 0.9)
    for r in small:
        r["params"]["elements"] = 10**6
    assert "not measured" in goal_lines(small)[0]


def test_a_goal_in_units_of_adamw() -> None:
    case = {"elements": 6 * 10**7, "m": 2, "dtype": "float32"}
    kept = record("step/products kept", 2.3, ratio=0.7, params=case)
    other = record("step/adamw", 9.0, ratio=3.0, params={**case, "elements": 7 * 10**7})
    same = record("step/adamw", 2.0, ratio=0.6, params=case)
    for found, figure in (([kept, other], None), ([kept, other, same], 1.15)):
        (verdict,) = (v for v in goals.verdicts(found, ["cpu"]) if v.record is kept)
        assert verdict.figure == (figure and pytest.approx(figure))
        assert verdict.met is (figure and True)


def test_goals_of_a_gpu_want_a_gpu() -> None:
    gram = record("gram/raco", ratio=1.0, share=0.95, params={"elements": 2 * 10**9, "m": 2})
    (verdict,) = (v for v in goals.verdicts([gram], ["cuda"]) if v.goal.name == "gram/raco")
    assert verdict.met is None
    gram["machine"] = {**MACHINE, "gpu": "a card"}
    (verdict,) = (v for v in goals.verdicts([gram], ["cuda"]) if v.goal.name == "gram/raco")
    assert (verdict.figure, verdict.met) == (0.95, True)


def test_faster_rivals_are_named_and_the_price_of_one_objective_is_none() -> None:
    assert page.losses(steps(2.5, 0.8)).startswith("In no case")
    table = page.losses([*steps(0.9, 0.8), record("gram/raco", ratio=1.0)])
    assert "| step | Llama-50M, 60 M, m = 2, float32 | `paper` | 0.90 |" in table
    assert "adamw" not in table


def test_of_several_records_of_one_thing_the_last_counts() -> None:
    assert [r["p50"] for r in latest([record("gram/raco", 1.0), record("gram/raco", 3.0)])] == [3.0]


def test_slopes() -> None:
    sizes = [1e3, 1e4, 1e6]
    assert page.slope(sizes, [5.0 * n**0.75 for n in sizes]) == pytest.approx(0.75)
    points = [
        record("scaling/step", 1e-9 * n, params={"against": "parameters", "size": n}, unit="s")
        for n in (10, 1000)
    ]
    assert page.body(points).endswith("| `step` | parameters | 10: 1e-08 s; 1000: 1e-06 s | 1.00 |")


def test_noise_and_failures_are_shown() -> None:
    noisy = record("gram/raco", 1.0, ratio=1.0, share=0.5) | {"p80": 1.2}
    text = page.body([noisy, record("gram/dot", failure="wrong: error 1") | {"p50": 1.0}])
    assert "1 ms ~ (1.00)" in text
    assert "- `gram/dot` Llama-50M, 60 M, m = 2: wrong: error 1" in text


@pytest.mark.slow
def test_a_whole_run_of_tiny_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = ["solve", "gram", "step"]
    for file in correctness.files("cpu"):
        failed = int(file.stem == "test_cpu_gram")
        Records(tmp_path, "cpu").add(
            f"tests/{file.stem}", {}, passed=1, failed=failed, finished=True
        )
    options = ["--device", "cpu", "--sizes", "tiny", "--seconds", "1", "--skip", "compile", "--"]
    report.main(["--out", str(tmp_path), *options, *parts])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "### The dual problem" in text
    assert "| m = 2 |" in text
    for suite in ("gram", "step"):  # both rely on the Gram's tests, which failed
        assert f"- `{suite}/raco` : not timed: test_cpu_gram.py failed" in text
    assert "### Optimizer step" not in text
    report.main(["--out", str(tmp_path), "--render"])
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == text


def test_plots_are_drawn(tmp_path: Path) -> None:
    from bench.pages.plots import draw

    dpo = {"kind": "lora", "m": 2, "layers": 1}
    records = [
        *steps(2.0, 0.5),
        record("backward/plain", ratio=1.0, params=dpo),
        record("backward/plain", ratio=1.0, params={**dpo, "m": 4}),
        *(record("scaling/step", n, params={"against": "m", "size": n}) for n in (2, 4)),
        record("ratios/raco packed", ratio=1.0, params={"m": 2}, prompt_ratio=1.0),
        record("ratios/raco pairs", ratio=0.8, params={"m": 2}, prompt_ratio=1.0),
        *of_training(),
    ]
    files = draw(records, tmp_path)
    assert [f.name for f in files] == ["step.png", "backward.png", "scaling.png", "pairs.png"]
    assert all(f.read_bytes()[:4] == b"\x89PNG" for f in files)


def trained(contestant: str, m: int, p50: float, **values: Any) -> Record:
    """A record of the suite `train`, per pair."""
    setting = {"kind": "lora", "layers": 30, "data": "hh_rlhf", "pairs": 6, "dtype": "float32"}
    counts = {
        "prompt_ratio": 2.0,
        "token_ratio": 2 / 3,
        "flops_ratio": 0.7,
        "at_once": 512,
        "of_matmul": None,
    }
    speed = {"tokens_per_second": 100.0, "tokens_per_second_twice": 150.0}
    memory = {"peak_bytes": 3 << 20, "model_bytes": 1 << 20}
    known = {
        "per": "pair",
        "reproduce": "python -m bench.suites.train",
        **counts,
        **speed,
        **memory,
    }
    params = {"m": m, **setting}
    return record(f"train/{contestant}", p50, unit="s", params=params, **known, **values)


def of_training() -> list[Record]:
    return [
        trained("trl", 1, 3.0, ratio=1.0, ratio_to_trl=1.0),
        trained(
            *("raco pairs", 2, 1.2),
            ratio=0.4,
            ratio_to_trl=0.4,
            memory_to_trl=0.8,
            over_packed=0.72,
            over_token_ratio=1.08,
        ),
        trained("raco pairs", 8, 1.4, ratio=0.47, ratio_to_trl=0.47, over_few=1.4 / 1.2),
    ]


def test_training_on_pairs_has_tables_of_its_own() -> None:
    text = page.body(of_training())
    assert "### Whole training steps on pairs of real lengths (`train`)" in text
    assert "| case | `trl` | `raco pairs, m = 2` | `raco pairs, m = 8` |" in text
    shown = "1.2 s (0.40, 100 tokens/s once, 150 twice, 512 at once, 4 MiB)"
    assert "| hh_rlhf, lora, 30 layers, 6 pairs, float32 | 3 s (1.00, " in text
    assert shown in text
    assert "| 2.00 | 0.67 | 0.70 | 0.72 | 1.08 | 1.17 | - | 0.80 |" in text
    assert "### Whole training steps (`train`)" not in text


def test_goals_of_training_are_judged_by_their_own_figures() -> None:
    judged = {
        (v.goal.figure, v.goal.params.get("kind")): (v.figure and round(v.figure, 2), v.met)
        for v in goals.verdicts(of_training(), ["cpu"])
        if v.goal.name == "train/raco pairs"
    }
    assert judged == {
        ("ratio_to_trl", "lora"): (0.4, True),
        ("memory_to_trl", "lora"): (0.8, False),
        ("ratio_to_trl", "full"): (None, None),
        ("over_token_ratio", None): (1.08, True),
        ("over_few", None): (1.17, False),
        ("reference_to_padded", None): (None, None),
    }


def test_without_trl_nothing_is_said_about_it() -> None:
    alone = trained("raco pairs", 2, 1.2, ratio=0.6, ratio_to_trl=None, memory_to_trl=None)
    about_trl = [v for v in goals.verdicts([alone], ["cpu"]) if "trl" in v.goal.figure]
    assert [v.met for v in about_trl] == [None] * 3


def test_nothing_to_render(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"holds no report.json; run without --render first"):
        report.main(["--out", str(tmp_path), "--render"])


def test_a_solver_that_is_wrong_or_absent_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.harness import optional, parts
    from bench.rivals import dual_solvers

    monkeypatch.setitem(optional.NEEDED, "torchjd", ("no_such_package",))
    monkeypatch.setattr(dual_solvers, "closed_form", lambda M: [1.0] + [0.0] * (len(M) - 1))
    records = Records(tmp_path, "cpu")
    parts.run_part("solve", at_once(records))
    wrong = [r for r in records.read() if r["name"] == "solve/closed form"]
    assert len(wrong) == 2
    assert all(r["failure"].startswith("wrong: f exceeds the optimum by ") for r in wrong)
    (absent,) = [r for r in records.read() if r["name"] == "solve/torchjd"]
    assert absent["failure"].startswith("not run: no_such_package missing; pip install ")


def test_closed_forms_are_optimal() -> None:
    from bench.rivals.dual_solvers import closed_form, grams, solvers, value

    for m in (2, 3):
        ours = solvers(m)["raco"]
        for M in grams(m):
            p = np.asarray(closed_form(M.tolist()))
            assert p.min() >= 0
            assert p.sum() == pytest.approx(1.0)
            assert value(M, p) == pytest.approx(value(M, ours.p(ours.solve(M))), abs=1e-12)


def test_every_sweep_is_recorded(tmp_path: Path) -> None:
    from bench.harness import parts

    records = Records(tmp_path, "cpu")
    parts.run_part("scaling", at_once(records))
    sweeps = page.swept(records.read())
    assert [(key, len(points)) for key, points in sweeps.items()] == [
        (("step", "parameters"), 2),
        (("step", "m"), 2),
        (("one_backward", "tokens of a sequence"), 2),
        (("one_backward", "m"), 2),
    ]


def test_the_page_is_written_from_the_committed_runs() -> None:
    assert report.performance() == (report.DOCS / "performance.md").read_text(encoding="utf-8")


def test_every_suite_is_a_part_and_goes_by_its_name() -> None:
    from bench.harness.parts import PARTS

    assert set(page.SUITES) | {"tests", "ceilings", "scaling"} == set(PARTS)
    assert [import_module(f"bench.suites.{part}").NAME for part in PARTS] == list(PARTS)


def test_recorded_commands_can_still_be_given() -> None:
    parsers = {
        f"bench.bench_{name}": import_module(f"bench.suites.{name}").parser()
        for name in ("backward", "memory", "train")
    }
    for name in parsers:
        import_module(name)
    seen = set()
    for file in report.RESULTS.rglob("report.json"):
        for line in file.read_text(encoding="utf-8").splitlines():
            words = shlex.split(json.loads(line).get("reproduce", ""))
            if len(words) > 3 and (module := words[words.index("-m") + 1]) in parsers:
                parsers[module].parse_args(words[words.index(module) + 1 :])
                seen.add(module)
    assert seen == parsers.keys()
