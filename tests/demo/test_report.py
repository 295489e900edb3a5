"""The demo's table and sentences for constructed numbers."""

import json
import math
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from raco_fast.demo.claims import claims
from raco_fast.demo.config import DemoConfig
from raco_fast.demo.jobs import Judged
from raco_fast.demo.plot import plot_scores
from raco_fast.demo.report import markdown, terminal_table, write_reports
from raco_fast.demo.summary import dominates, summarize

OBJECTIVES = ("coverage", "brevity", "faithfulness")
HIGH = {"coverage": 0.65, "brevity": 0.15, "faithfulness": 0.2}
LOW = {"coverage": 0.15, "brevity": 0.65, "faithfulness": 0.2}
JITTER = (-0.01, 0.0, 0.01)
T95_OF_3 = 4.302653  # Student's two-sided 95 % quantile of two degrees of freedom
PAIRS = ("coverage:brevity", "coverage:faithfulness", "brevity:faithfulness")
SEEN = {PAIRS[0]: (-0.7, -0.8, -0.9), PAIRS[1]: (-0.9, -0.2, 0.5), PAIRS[2]: (0.1, math.nan, 0.2)}
MORE = (0.1, 0.2, 0.15)


def start(seed: int, scores: tuple[float, float, float]) -> Judged:
    steps = [{"step": 1, "loss": 4.5}, {"step": 2, "loss": 0.9}]
    return Judged(seed, "start", None, None, dict(zip(OBJECTIVES, scores, strict=True)), steps)


def aligned(seed, rule, weights, scores, clip=(0.0, 1.0), skipped=0, seen=SEEN) -> Judged:
    step = {f"raco/cosine/{pair}": -0.4 for pair in PAIRS} | {"raco/skipped_steps": float(skipped)}
    gram = "unbiased" if rule.startswith("unbiased ") else "batch"
    if gram == "unbiased":
        step |= {f"raco/cosine_unbiased/{p}": seen[p][seed] for p in PAIRS}
    steps = [{"step": i, "raco/clip_active": active} | step for i, active in enumerate(clip, 1)]
    steps[0]["rewards/margins/coverage"] = 0.1  # a step whose pairs all tie has none
    if gram == "unbiased":
        steps[0] |= {f"raco/cosine_unbiased/{p}": math.nan for p in PAIRS}  # no estimate as yet
    named = dict(zip(OBJECTIVES, scores, strict=True))
    return Judged(seed, rule.removeprefix("unbiased "), gram, weights, named, steps)


def study(cells: dict, seeds: int = 3, noise: float = 0.0, **options) -> list[Judged]:
    """Starts and alignments with the given mean scores; noise tells the runs of a seed apart."""
    starts = [start(seed, (0.4 + JITTER[seed], 0.5, 0.6)) for seed in range(seeds)]
    runs = []
    for seed in range(seeds):
        for i, ((rule, weights), scores) in enumerate(cells.items()):
            shift = JITTER[seed] + noise * random.Random(100 * i + seed).uniform(-0.01, 0.01)
            weight_map = {None: None, "high": HIGH, "low": LOW}[weights]
            shifted = tuple(score + shift for score in scores)
            runs.append(aligned(seed, rule, weight_map, shifted, **options))
    return [*starts, *runs]


CLEAR = {
    ("linear", "high"): (0.7, 0.2, 0.6),
    ("linear", "low"): (0.3, 0.7, 0.6),
    ("cagrad-clip", "high"): (0.75, 0.2, 0.6),
    ("cagrad-clip", "low"): (0.3, 0.7, 0.6),
    ("mgda", None): (0.28, 0.6, 0.5),
}


def sentences(cells: dict, **options) -> str:
    return "\n".join(claims(summarize(study(cells, **options))))


def test_one_seed_never_gives_a_clear_difference() -> None:
    text = sentences(CLEAR, seeds=1)
    assert "none of 6 differences is clear" in text
    assert "(one seed)" in text
    assert "trade one for the other" not in text


def test_clear_numbers_are_called_clear() -> None:
    text = sentences(CLEAR, noise=0.02)
    assert "1 of 6 differences are clear" in text
    assert re.search(
        r"linear at 0.65/0.15/0.2 scores -0.0499 ± 0\.\d+ in coverage against cagrad", text
    )
    assert text.count("the weights trade one for the other") == 2
    assert "coverage changed by +0.400" in text
    low = r"0\.(?:2799|2800|2801) ± 0\.02\d\d \(mgda\)"
    assert re.search(rf"From the start's 0.4000 ± 0.0248, coverage went to between {low}", text)
    assert "clearly up in 2, clearly down in 3 of 5 rows" in text
    assert "Clipping changed the update in 50% ± 0% of cagrad-clip's steps." in text


def test_the_same_means_under_noise_lie_within_the_spread() -> None:
    text = sentences(CLEAR, noise=20.0)
    assert "none of 6 differences is clear: all lie within the spread over seeds" in text
    assert "scores" not in text.replace("mean scores", "")
    assert "not a clear trade-off" in text


def test_domination_is_told_with_the_right_names() -> None:
    text = sentences(CLEAR)
    expected = (
        "By mean scores, whatever their intervals, 4 of 6 rows are dominated by no other "
        "one; dominated: linear at 0.65/0.15/0.2 (by cagrad-clip at 0.65/0.15/0.2), mgda (by "
        "linear at 0.15/0.65/0.2, cagrad-clip at 0.15/0.65/0.2)."
    )
    assert expected in text
    rows = {row.name: row for row in summarize(study(CLEAR))}
    assert dominates(rows["cagrad-clip at 0.65/0.15/0.2"], rows["linear at 0.65/0.15/0.2"])
    assert not dominates(rows["mgda"], rows["mgda"])


def test_swapping_the_rules_swaps_the_verdict() -> None:
    swapped = {
        ({"linear": "cagrad-clip", "cagrad-clip": "linear"}.get(rule, rule), weights): scores
        for (rule, weights), scores in CLEAR.items()
    }
    assert "cagrad-clip at 0.65/0.15/0.2 scores -0.0499" in sentences(swapped, noise=0.02)


BOTH_GRAMS = CLEAR | {
    ("unbiased cagrad-clip", "high"): (0.70, 0.2, 0.6),
    ("unbiased cagrad-clip", "low"): (0.3, 0.6, 0.6),
    ("unbiased mgda", None): (0.28, 0.6, 0.5),
}


def volume_of_two(points, seed: int) -> float:
    """The volume of two boxes from the origin: what each has, less what they share."""
    a, b = ([score + JITTER[seed] for score in point] for point in points)
    return math.prod(a) + math.prod(b) - math.prod(map(min, a, b))


def test_hypervolumes_stand_side_by_side_with_their_intervals() -> None:
    text = markdown(DemoConfig(), summarize(study(BOTH_GRAMS)), "", 9.0)
    by_method = {}
    for method in ("linear", "cagrad-clip", "unbiased cagrad-clip"):
        points = [BOTH_GRAMS[method, weights] for weights in ("high", "low")]
        by_method[method] = np.array([volume_of_two(points, seed) for seed in range(3)])

    def told(values, sign: str = "") -> str:
        half = T95_OF_3 * values.std(ddof=1) / math.sqrt(3)
        return f"{values.mean():{sign}.4f} ± {half:.4f}"

    batch, unbiased = by_method["cagrad-clip"], by_method["unbiased cagrad-clip"]
    gain = told(unbiased - batch, "+")
    assert f"| linear | 2 | {told(by_method['linear'])} | - | - |" in text
    assert f"| cagrad-clip | 2 | {told(batch)} | {told(unbiased)} | {gain} |" in text
    assert "| mgda | 1 | " in text
    assert f"Hypervolume of unbiased cagrad-clip against cagrad-clip: {gain}, clearly smaller." in (
        text
    )
    assert "Hypervolume of cagrad-clip against linear: +0.0" in text
    assert "Hypervolume of unbiased mgda against mgda: +0.0000 ± 0.0000, not a clear" in text
    assert "mgda against linear" not in text, "one point and two make different fronts"


def test_what_is_not_clear_is_said_first() -> None:
    found = claims(summarize(study(BOTH_GRAMS)))
    (insignificant,) = (i for i, text in enumerate(found) if "unbiased mgda against mgda" in text)
    (clear,) = (i for i, text in enumerate(found) if "unbiased cagrad-clip against cagrad" in text)
    trade = min(i for i, text in enumerate(found) if "trade one for the other" in text)
    dominated = min(i for i, text in enumerate(found) if "By mean scores" in text)
    assert max(insignificant, dominated) < min(clear, trade)


def test_the_conflict_of_batches_stands_beside_that_of_the_expectation() -> None:
    rows = summarize(study(BOTH_GRAMS))
    text = markdown(DemoConfig(), rows, "", 9.0)
    half = T95_OF_3 * 0.1 / math.sqrt(3)
    assert (
        f"Cosine between coverage and brevity: -0.4000 ± 0.0000 in a step's gradients, -0.8000 ± "
        f"{half:.4f} in the estimate of the expected ones at the last step; batches show less "
        "conflict than the estimate."
    ) in text
    assert re.search(r"coverage and faithfulness: .*-0\.2000 ± 1\.7\d+ .*no clear difference", text)
    assert "between brevity and faithfulness" not in text, "a seed has no estimate of it"
    half = f"{half:.4f}"
    assert f"| mgda | unbiased | - | -0.8000 ± {half} | -0.2000 ± 1.7390 | - |" in text
    assert "expected gradients" not in markdown(DemoConfig(), summarize(study(CLEAR)), "", 9.0)
    assert "more conflict than the estimate" in sentences(
        BOTH_GRAMS, seen=dict.fromkeys(PAIRS, MORE)
    )


def test_terminal_and_report_say_the_same(tmp_path: Path, capsys) -> None:
    write_reports(tmp_path, DemoConfig(), study(BOTH_GRAMS), seconds=1.0)
    printed, report = capsys.readouterr().out, (tmp_path / "report.md").read_text(encoding="utf-8")
    sentences = [line for line in printed.splitlines() if line.startswith("- ")]
    assert len(sentences) > 10
    assert all(sentence in report.splitlines() for sentence in sentences)
    for line in printed.splitlines():
        if line.startswith(("linear  ", "cagrad-clip  ", "mgda  ")):
            assert f"| {' | '.join(re.split('  +', line))} |" in report


def test_clipping_that_never_happened_and_skipped_steps_are_told() -> None:
    text = sentences(CLEAR, clip=(0.0, 0.0), skipped=2)
    assert "Clipping never changed an update" in text
    assert "mgda skipped 6 steps because a gradient was not finite." in text
    assert "skipped" not in sentences(CLEAR)


def test_table_has_a_row_for_the_start_and_every_point() -> None:
    rows = summarize(study(CLEAR))
    lines = terminal_table(rows).splitlines()
    assert len(lines) == 1 + 1 + len(CLEAR)
    assert re.fullmatch(
        r"start +- +- +0.4000 ± 0.0248 +0.5000 ± 0.0000 +0.6000 ± 0.0000 +- +-", lines[1]
    )
    assert lines[4].startswith(
        "cagrad-clip  batch  0.65/0.15/0.2  0.7500 ± 0.0248  0.2000 ± 0.0248"
    )
    assert lines[-1].split()[-2:] == ["50%", "-0.40"]


def test_quick_report_warns_and_the_full_one_does_not() -> None:
    rows = summarize(study(CLEAR))
    warning = "too little trained to conclude from"
    assert warning in markdown(DemoConfig(quick=True), rows, "", 9.0)
    assert warning not in markdown(DemoConfig(), rows, "", 9.0)


def test_numbers_that_are_not_finite_become_null_and_stay_out_of_means(tmp_path: Path) -> None:
    results = study({("cagrad-clip", "high"): (0.5, 0.5, 0.5)}, clip=(1.0, math.nan))
    rows = summarize(results)
    assert rows[1].clipped is not None
    assert rows[1].clipped.mean == 1.0
    write_reports(tmp_path, DemoConfig(), results, seconds=1.0)
    records = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    steps = [record for record in records if record["phase"] == "alignment"]
    assert [record["raco/clip_active"] for record in steps[:2]] == [1.0, None]


def test_a_study_of_one_point_is_told_too() -> None:
    text = sentences({("linear", "high"): (0.5, 0.5, 0.5)}, seeds=1)
    assert "coverage went to between 0.4900 (linear at 0.65/0.15/0.2) and 0.4900 (linear" in text
    assert "Between rules" not in text


def test_without_matplotlib_the_report_says_how_to_get_the_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_reports(tmp_path, DemoConfig(), study(CLEAR), seconds=1.0)
    note = "pip install 'raco-fast[plot]'"
    assert note in capsys.readouterr().out
    assert note in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl", "report.md"]


def test_a_failed_write_keeps_the_previous_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    plot = tmp_path / "pareto.png"
    plot.write_bytes(b"previous")

    def full_disk(self, file, **options) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(figure.Figure, "savefig", full_disk)
    with pytest.raises(OSError, match="No space left"):
        plot_scores(summarize(study(CLEAR)), plot)
    assert plot.read_bytes() == b"previous"
    assert list(tmp_path.iterdir()) == [plot]
