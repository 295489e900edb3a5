"""The demo from end to end in its quick form, and its configuration."""

import json
import math
import re
import statistics
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest

from raco_fast.demo.config import DemoConfig
from raco_fast.demo.jobs import _Seed
from raco_fast.demo.model import PAD
from raco_fast.demo.study import run
from raco_fast.dpo.data.batches import pair_length
from raco_fast.dpo.data.collation import collate
from raco_fast.dpo.data.tokenization import EncodedPair

OBJECTIVES = ("coverage", "brevity", "faithfulness")
PAIRS = ("coverage:brevity", "coverage:faithfulness", "brevity:faithfulness")


def read_metrics(folder: Path) -> list[dict]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(DemoConfig(output_dir=str(tmp_path_factory.mktemp("demo") / "new"), quick=True))


def of(records: list[dict], **wanted) -> list[dict]:
    return [r for r in records if all(r.get(key) == value for key, value in wanted.items())]


def test_all_files_are_there_and_whole(quick: Path) -> None:
    assert {file.name for file in quick.iterdir()} == {"metrics.jsonl", "report.md", "pareto.png"}
    assert (quick / "pareto.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_metrics_are_finite_and_complete(quick: Path) -> None:
    records = read_metrics(quick)
    config = DemoConfig(quick=True).sized()
    for seed in (0, 1):
        assert len(of(records, phase="warm-up", seed=seed)) == config.warm_up_steps
    steps = of(records, phase="alignment")
    points = 3 * len(config.weight_vectors) + 2
    assert len(steps) == 2 * points * config.steps
    assert len(of(records, phase="judged")) == 2 * (points + 1)
    for record in records:
        assert all(math.isfinite(v) for v in record.values() if isinstance(v, (int, float)))
    for record in steps:
        names = [f"loss/{o}" for o in OBJECTIVES] + [f"raco/p/{o}" for o in OBJECTIVES]
        names += [f"raco/cosine/{pair}" for pair in PAIRS] + ["raco/gap", "raco/clip_active"]
        assert set(names) <= set(record)
        assert sum(record[f"raco/p/{o}"] for o in OBJECTIVES) == pytest.approx(1)
    assert all(f"rewards/accuracies/{o}" in step for step in steps[:1] for o in OBJECTIVES)


def test_each_rule_did_what_its_name_says(quick: Path) -> None:
    steps = of(read_metrics(quick), phase="alignment")
    for record in steps:
        weights = record["weights"] or dict.fromkeys(OBJECTIVES, 1 / 3)
        alpha = [record[f"raco/coefficient/{o}"] for o in OBJECTIVES]
        if record["rule"] == "linear":
            assert alpha == pytest.approx(list(weights.values()))
        elif record["rule"] == "mgda":
            assert record["weights"] is None
            assert sum(alpha) == pytest.approx(1)
        else:
            assert all(a >= w - 1e-12 for a, w in zip(alpha, weights.values(), strict=True))
            assert sum(alpha) > 1
        if record["rule"] != "cagrad-clip":
            assert record["raco/clip_active"] == 0
        assert ("raco/shrinkage" in record) == (record["gram"] == "unbiased")
    clipped = of(steps, rule="cagrad-clip", gram="batch")
    assert any(record["raco/clip_active"] == 1 for record in clipped)
    assert {record["gram"] for record in of(steps, rule="linear")} == {"batch"}
    for rule in ("cagrad-clip", "mgda"):
        by_gram = [of(steps, rule=rule, gram=gram) for gram in ("batch", "unbiased")]
        alphas = [[r["raco/coefficient/coverage"] for r in records] for records in by_gram]
        assert len(alphas[0]) == len(alphas[1])
        assert alphas[0] != alphas[1], "the Gram matrix did not reach the optimizer"


def test_rules_share_start_and_pairs_and_then_part(quick: Path) -> None:
    steps = of(read_metrics(quick), phase="alignment", seed=1)
    first, last = of(steps, step=1), of(steps, step=4)
    for name in OBJECTIVES:
        assert {record[f"loss/{name}"] for record in first} in (
            {math.log(2)},
            {first[0][f"loss/{name}"]},
        )
        for gram in ("batch", "unbiased"):
            norms = {record[f"raco/grad_norm/{name}"] for record in of(first, gram=gram)}
            assert len(norms) == 1
            # The unbiased Gram needs the batch in parts, and their sum rounds otherwise.
            assert norms.pop() == pytest.approx(first[0][f"raco/grad_norm/{name}"], rel=1e-6)
    parted = of(last, gram="batch")
    assert len({r["raco/grad_norm/coverage"] for r in parted}) == len(parted) == 3 + 3 + 1


def test_table_agrees_with_the_metrics(quick: Path) -> None:
    records, report = read_metrics(quick), (quick / "report.md").read_text(encoding="utf-8")
    table = [line for line in report.splitlines() if line.startswith("|")][2:14]
    assert len(table) == 1 + 3 * 3 + 2
    for line in table:
        rule, gram, weights, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        judged = [
            record
            for record in of(records, phase="judged", rule=rule, gram=None if gram == "-" else gram)
            if weights in ("-", "/".join(f"{w:.3g}" for w in (record["weights"] or {}).values()))
        ]
        assert len(judged) == 2
        for name, cell in zip(OBJECTIVES, cells, strict=False):
            values = [record[f"judge/{name}"] for record in judged]
            mean, half = map(float, cell.split("±"))
            assert mean == pytest.approx(statistics.fmean(values), abs=6e-5)
            # Student's 95 % quantile of one degree of freedom is 12.706.
            expected = 12.706 * statistics.stdev(values) / math.sqrt(2)
            assert half == pytest.approx(expected, abs=6e-5, rel=1e-4)


def test_claims_agree_with_the_metrics(quick: Path) -> None:
    records, report = read_metrics(quick), (quick / "report.md").read_text(encoding="utf-8")
    judged = of(records, phase="judged")
    for name in OBJECTIVES:
        start = statistics.fmean(r[f"judge/{name}"] for r in of(judged, rule="start"))
        means: dict[str, list[float]] = {}
        for record in judged:
            if record["rule"] != "start":
                key = f"{record['rule']} {record['gram']} {record['weights']}"
                means.setdefault(key, []).append(record[f"judge/{name}"])
        low, *_, high = sorted(map(statistics.fmean, means.values()))
        assert re.search(
            rf"start's {start:.4f} ± [\d.]+, {name} went to between {low:.4f} ± [\d.]+ \(.*\) "
            rf"and {high:.4f} ± [\d.]+ \(",
            report,
        )


def test_a_result_depends_on_its_seed_and_not_on_what_else_runs(quick: Path, tmp_path) -> None:
    config = DemoConfig(str(tmp_path), quick=True, rules=("mgda", "cagrad-clip"), grams=("batch",))
    again = read_metrics(run(config))
    for rule, gram in (("start", None), ("mgda", "batch"), ("cagrad-clip", "batch")):
        expected = of(read_metrics(quick), rule=rule, gram=gram)
        assert expected == of(again, rule=rule) != []


@pytest.mark.slow
def test_worker_processes_give_the_same_numbers(tmp_path: Path) -> None:
    config = replace(
        DemoConfig(str(tmp_path / "one"), quick=True).sized(),
        quick=False,
        seed=7,
        rules=("linear", "cagrad-clip"),
        coverage_shares=(0.5,),
        warm_up_steps=4,
        steps=3,
        documents=4,
    )
    one = run(config)
    two = run(replace(config, output_dir=str(tmp_path / "two"), workers=2))
    assert read_metrics(one) == read_metrics(two)
    assert {record["seed"] for record in read_metrics(two)} == {7, 8}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"seeds": 0}, "`seeds` must be at least 1, got 0"),
        ({"documents": -3}, "`documents` must be at least 1, got -3"),
        ({"beta": 0.0}, "`beta` must be positive, got 0.0"),
        ({"lr": float("nan")}, "`lr` must be positive, got nan"),
        ({"workers": -1}, "`workers` must be 0"),
        ({"hidden_size": 100}, "`hidden_size` must be a multiple of 8, got 100"),
        ({"rules": ("linear", "cagrad", "linear")}, "`rules` must hold different values"),
        ({"rules": ("pcgrab",)}, "pcgrab"),
        ({"c": 1.0}, "`c`"),
        (
            {"grams": ("batch", "ema")},
            r"`grams` must be of batch, unbiased, got \('batch', 'ema'\)",
        ),
        ({"grams": ()}, "`grams` must hold different values, at least one"),
        ({"objectives": 7}, "`objectives` must be 2 to 6, got 7"),
        ({"label_noise": 0.5}, r"`label_noise` must be in \[0, 0.5\), got 0.5"),
        ({"coverage_shares": ()}, "`coverage_shares` must hold"),
        ({"coverage_shares": (1.1,)}, r"`coverage_shares` must lie in \[0, 1\], got \(1.1,\)"),
    ],
)
def test_settings_that_cannot_work_are_refused(setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DemoConfig(**setting)


def test_batches_hold_every_pair_once_with_half_the_padding() -> None:
    batches = _Seed(DemoConfig(), seed=3).batches("pairs", steps=20, size=8)
    assert [len(pairs) for pairs in batches] == [8] * 20
    pairs = sorted(chain.from_iterable(batches), key=lambda pair: int(pair.id))
    assert [pair.id for pair in pairs] == [str(i) for i in range(160)]
    as_drawn = [pairs[start : start + 8] for start in range(0, 160, 8)]
    assert padding(batches) < 0.6 * padding(as_drawn)
    longest = [max(map(pair_length, pairs)) for pairs in batches[:8]]
    assert longest != sorted(longest, reverse=True), "a curriculum from long to short"


def padding(batches: list[list[EncodedPair]]) -> float:
    """Share of the positions of all batches that is padding."""
    masks = [collate(pairs, PAD).rows.attention_mask for pairs in batches]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def test_weight_vectors_sum_to_one() -> None:
    one, other = DemoConfig(coverage_shares=(1.0, 0.25)).weight_vectors
    assert one == {"coverage": 0.8, "brevity": 0.0, "faithfulness": 0.2}
    assert other == pytest.approx({"coverage": 0.2, "brevity": 0.6, "faithfulness": 0.2})
    for objectives in range(2, 7):
        for weights in DemoConfig(objectives=objectives).weight_vectors:
            assert len(weights) == objectives
            assert sum(weights.values()) == pytest.approx(1)


def test_two_and_six_objectives_are_judged_and_drawn(tmp_path: Path) -> None:
    for objectives in (2, 6):
        small = replace(
            DemoConfig(str(tmp_path / str(objectives)), quick=True, objectives=objectives).sized(),
            quick=False,
            seeds=1,
            rules=("linear",),
            warm_up_steps=2,
            steps=2,
            documents=4,
        )
        folder = run(small)
        assert (folder / "pareto.png").exists()
        *_, last = read_metrics(folder)
        assert list(last["weights"]) == list(small.names)
        assert [name for name in last if name.startswith("judge/")] == [
            f"judge/{name}" for name in small.names
        ]
        assert "/".join(small.names) in (folder / "report.md").read_text(encoding="utf-8")
