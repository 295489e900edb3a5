"""Reports of made-up finished runs, whose numbers are computed again here."""

import dataclasses
import json
import math
import re
from dataclasses import asdict
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from raco_fast.dpo.data.data_source import DataSource
from raco_fast.dpo.models import ModelOptions
from raco_fast.dpo.run.config import TrainConfig
from raco_fast.dpo.run.identity import identity
from raco_fast.pages import figures
from raco_fast.studies import fronts, pictures
from raco_fast.studies import pareto as pareto_module
from raco_fast.studies.comparison import compared_groups
from raco_fast.studies.finished import NAME, Finished
from raco_fast.studies.groups import Group, Point, Study
from raco_fast.studies.pareto import pareto
from raco_fast.studies.pareto_config import ParetoConfig

T95_OF_3 = 4.302653  # Student's two-sided 95 % quantile of two degrees of freedom
HIGH, LOW = {"a": 0.7, "b": 0.3}, {"a": 0.2, "b": 0.8}
MEANS = {
    ("linear", 0): (0.70, 0.60),
    ("linear", 1): (0.62, 0.66),
    ("cagrad", 0): (0.74, 0.61),
    ("cagrad", 1): (0.60, 0.64),
    ("mgda", 0): (0.61, 0.65),
}


def value(rule: str, k: int, seed: int, objective: int) -> float:
    """Noise of the seed, common to all rules, and a little of each run."""
    noise = np.random.default_rng([seed, objective]).normal(0, 0.05)
    own = np.random.default_rng([len(rule), k, seed, objective]).normal(0, 0.004)
    return float(MEANS[rule, k][objective] + noise + own)


@pytest.fixture
def write(tmp_path):
    """A function that writes a finished run of these settings and held-out values."""

    def finish(name: str, values: dict[str, float | None], **settings) -> Path:
        given = {"weights": HIGH, "eval_data": [DataSource("held_out")], **settings}
        held_out = given.pop("held_out", "of all")
        config = TrainConfig(ModelOptions("m", device="cpu"), [DataSource("d")], **given)
        named = {f"eval_rewards/accuracies/{n}": v for n, v in values.items()}
        named |= {f"eval_loss/{n}": None if v is None else 1 - v for n, v in values.items()}
        run = {"settings": identity(config), "data": "", "model": "", "held_out": held_out}
        evaluation = {"step": 9, **named} if values else {}
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        record = Finished(run | {"total_steps": 9}, evaluation, 1, 2.0, {})
        (folder / NAME).write_text(json.dumps(asdict(record)))
        return folder

    return finish


@pytest.fixture
def study(write, tmp_path, monkeypatch):
    """A function that writes runs of three rules and compares them; without a picture."""
    monkeypatch.setattr(pareto_module, "pictures", lambda study, metric: {})

    def compare(seeds=(0, 1, 2), without=(), **settings):
        for (rule, k), seed in product(MEANS, seeds):
            if (rule, k, seed) not in without:
                values = {n: value(rule, k, seed, i) for i, n in enumerate("ab")}
                weights = (HIGH, LOW)[k]
                if rule == "linear":  # the order of names is of no weight
                    weights, values = ({n: d[n] for n in "ba"} for d in (weights, values))
                write(f"{rule}{k}{seed}", values, rule=rule, weights=weights, seed=seed)
        given = {"runs": [str(tmp_path / "runs")], "output_dir": str(tmp_path / "out")} | settings
        return pareto(ParetoConfig(**given))

    return compare


def group(report, name: str) -> dict:
    (found,) = (g for g in report.content["groups"] if g["name"] == name)
    return found


def stairs(points, reference) -> float:
    """The area below a front of two objectives, from the right to the left."""
    area, height = 0.0, reference[1]
    for x, y in sorted(points, reverse=True):
        if x > reference[0] and y > height:
            area, height = area + (x - reference[0]) * (y - height), y
    return area


def volumes(rule: str, seeds, reference) -> list[float]:
    ks = [k for r, k in MEANS if r == rule]
    points = {s: [tuple(value(rule, k, s, i) for i in (0, 1)) for k in ks] for s in seeds}
    return [stairs(points[s], reference) for s in seeds]


def test_points_have_the_mean_and_students_interval_over_seeds(study):
    report = study()
    (high, low) = group(report, "linear")["points"]
    assert (high["label"], low["label"]) == ("0.7/0.3", "0.2/0.8")
    for point, k in ((high, 0), (low, 1)):
        for i, name in enumerate("ab"):
            values = np.array([value("linear", k, seed, i) for seed in (0, 1, 2)])
            half = T95_OF_3 * values.std(ddof=1) / math.sqrt(3)
            assert point["values"][name]["mean"] == pytest.approx(values.mean(), rel=1e-12)
            assert point["values"][name]["half_interval"] == pytest.approx(half, rel=1e-4)
    gain, ray = np.array([high["values"][n]["by_seed"][1] for n in "ab"]), np.array([0.7, 0.3])
    off = abs(gain[0] * ray[1] - gain[1] * ray[0]) / math.hypot(*ray)  # the area over the base
    assert high["ray_distance"]["by_seed"][1] == pytest.approx(off, rel=1e-9)
    (point,) = group(report, "mgda")["points"]
    assert (point["label"], point["weights"], point["ray_distance"]) == ("-", None, None)
    assert f"{high['values']['a']['mean']:.4f} ± " in str(report)


def test_who_is_dominated_is_told_with_the_seeds_in_which_it_holds(study):
    report = study()
    names = {("linear", 0): "linear at 0.7/0.3", ("linear", 1): "linear at 0.2/0.8"}
    names |= {("cagrad", 0): "cagrad at 0.7/0.3", ("cagrad", 1): "cagrad at 0.2/0.8"}
    names |= {("mgda", 0): "mgda"}
    at = {key: np.array([[value(*key, s, i) for i in (0, 1)] for s in (0, 1, 2)]) for key in names}
    expected = {}
    for key, name in names.items():
        for other, by in names.items():
            if (at[other].mean(0) > at[key].mean(0)).all():
                times = int((at[other] > at[key]).all(1).sum())
                expected.setdefault(name, []).append({"by": by, "seeds": times, "of": 3})
    assert report.content["dominated"] == expected != {}
    assert "linear at 0.2/0.8 (" in str(report)


def test_hypervolume_is_that_of_every_seeds_front(study):
    report = study(reference={"b": 0.5, "a": 0.55})
    for rule in ("linear", "cagrad", "mgda"):
        by_seed = volumes(rule, (0, 1, 2), (0.55, 0.5))
        found = group(report, rule)["hypervolume"]
        assert found["by_seed"] == pytest.approx(by_seed, rel=1e-9)
        half = T95_OF_3 * np.std(by_seed, ddof=1) / math.sqrt(3)
        assert found["half_interval"] == pytest.approx(half, rel=1e-4)
    assert report.content["reference"] == {"a": 0.55, "b": 0.5}
    first = report.content["comparisons"][0]
    ours, theirs = (volumes(rule, (0, 1, 2), (0.55, 0.5)) for rule in ("linear", "cagrad"))
    assert (first["first"], first["second"]) == ("cagrad", "linear")  # as their folders are named
    gain = np.mean(theirs) - np.mean(ours)
    assert first["hypervolume"]["mean"] == pytest.approx(gain, rel=1e-9)


def test_differences_are_paired_by_seed_and_weights(study):
    report = study()
    both, with_mgda, _ = report.content["comparisons"]
    assert (both["first"], both["second"]) == ("cagrad", "linear")
    assert (both["settings"], both["seeds"]) == (2, 3)
    for i, name in enumerate("ab"):
        differences = np.array(
            [
                [value("cagrad", k, s, i) - value("linear", k, s, i) for s in range(3)]
                for k in (0, 1)
            ]
        )
        found = both["gains"][name]
        assert found["mean"] == pytest.approx(differences.mean(), rel=1e-9)
        # The seeds' common noise, of 0.05, is gone.
        assert differences.min() <= found["low"] <= found["high"] <= differences.max()
    assert (with_mgda["second"], with_mgda["settings"], with_mgda["gains"]) == ("mgda", 0, {})


@pytest.mark.parametrize(("of_settings", "of_seeds"), [(0.1, 0.1), (0.0, 0.1), (0.1, 0.0)])
def test_the_bootstrap_draws_settings_and_seeds(of_settings, of_seeds):
    settings, seeds = 3, 4
    rng = np.random.default_rng(7)
    a, b, gain = rng.random(settings), rng.random(seeds), 0.02
    differences = gain + of_settings * a[:, None] + of_seeds * b

    def made(name: str, values: np.ndarray) -> Group:
        points = [
            Point(f"{p}", f"{p}", None, None, {s: np.full(2, values[p, s]) for s in range(seeds)})
            for p in range(settings)
        ]
        return Group(name, points)

    groups = [made("x", differences + 0.5), made("y", np.full((settings, seeds), 0.5))]
    (found,) = compared_groups(Study(("o", "q"), 1.0, np.zeros(2), groups), 6000, 3)
    # Every draw there is, each as likely as any other: 3^3 of settings, 4^4 of seeds.
    draws = [
        differences[np.ix_(p, s)].mean()
        for p in product(range(settings), repeat=settings)
        for s in product(range(seeds), repeat=seeds)
    ]
    low, high = np.percentile(draws, [2.5, 97.5])
    for estimate in found.gains.values():
        assert estimate.mean == pytest.approx(differences.mean(), rel=1e-12)
        assert estimate.low == pytest.approx(low, abs=0.05 * (high - low))
        assert estimate.high == pytest.approx(high, abs=0.05 * (high - low))


def test_epsilon_is_that_of_every_seed(study):
    both = study().content["comparisons"][0]
    found = both["epsilon_first_over_second"]["by_seed"]
    for k, seed in enumerate((0, 1, 2)):
        ours, theirs = (
            [[value(rule, k, seed, i) for i in (0, 1)] for k in (0, 1)]
            for rule in ("cagrad", "linear")
        )
        expected = max(min(max(y[i] - x[i] for i in (0, 1)) for x in ours) for y in theirs)
        assert found[k] == pytest.approx(expected, rel=1e-12)


def test_one_seed_has_no_interval_and_says_so(study):
    report = study(seeds=(4,))
    assert "One seed alone at every point: no interval over seeds" in str(report)
    (high, _) = group(report, "linear")["points"]
    assert high["values"]["a"]["half_interval"] is None
    both = report.content["comparisons"][0]["gains"]["a"]
    assert both["low"] <= both["mean"] <= both["high"]  # over the settings that are left


def test_seeds_that_not_all_points_have_are_left_out_and_told(study):
    report = study(without=[("cagrad", 1, 2)])
    assert "cagrad: not all of its points have the seeds [2], which are left out" in str(report)
    assert group(report, "cagrad")["seeds"] == (0, 1)
    assert report.content["comparisons"][0]["seeds"] == 2
    assert group(report, "linear")["seeds"] == (0, 1, 2)


def test_points_below_the_reference_are_told(study):
    report = study(reference={"a": 0.9, "b": 0.0})
    assert "linear: 2 of 2 points are not better than the reference point" in str(report)


def test_less_is_better_for_losses(study):
    report = study(metric="loss", reference={"a": 1.0, "b": 1.0})
    (high, _) = group(report, "linear")["points"]
    assert high["values"]["a"]["mean"] == pytest.approx(
        1 - np.mean([value("linear", 0, seed, 0) for seed in (0, 1, 2)])
    )
    assert group(report, "cagrad")["points"][0]["on_front"]
    assert "less is better" in str(report)
    assert report.content["comparisons"][0]["gains"]["a"]["mean"] == pytest.approx(
        np.mean(
            [value("cagrad", k, s, 0) - value("linear", k, s, 0) for k in (0, 1) for s in (0, 1, 2)]
        )
    )


def test_weights_that_change_have_no_ray(write, tmp_path):
    for name, weights in (("high", HIGH), ("low", LOW)):
        schedule = {"name": "dirichlet", "concentration": 10.0}
        write(name, {"a": 0.6, "b": 0.5}, weights=weights, weights_schedule=schedule)
    report = pareto(ParetoConfig([str(tmp_path / "runs")], output_dir=str(tmp_path / "out")))
    points = report.content["groups"][0]["points"]
    assert [(p["label"], p["ray_distance"]) for p in points] == [
        ("0.7/0.3", None),
        ("0.2/0.8", None),
    ]


def test_settings_tell_fronts_apart_or_make_points(write, tmp_path):
    for c, beta in product((0.2, 0.4), (0.1, 0.3)):
        write(f"{c}{beta}", {"a": c, "b": beta}, c=c, loss_options={"beta": beta})
    where = {"runs": [str(tmp_path / "runs")], "output_dir": str(tmp_path / "out")}
    one = pareto(ParetoConfig(**where))
    assert [g["name"] for g in one.content["groups"]] == ["cagrad-clip"]
    assert len(one.content["groups"][0]["points"]) == 4
    assert "0.7/0.3, c=0.2, losses={'a': " in str(one)
    two = pareto(ParetoConfig(**where, by=["c"]))
    names = [each["name"] for each in two.content["groups"]]
    assert names == ["cagrad-clip, c=0.2", "cagrad-clip, c=0.4"]
    assert two.content["comparisons"][0]["settings"] == 2
    by_beta = pareto(ParetoConfig(**where, by=["loss_options.beta", "losses"]))
    assert len(by_beta.content["groups"]) == 2
    with pytest.raises(ValueError, match="`by` must name settings of the runs, got 'beta'"):
        pareto(ParetoConfig(**where, by=["beta"]))


@pytest.mark.parametrize("m", [2, 3, 5])
def test_the_page_needs_no_other_file_and_is_the_same_again(write, tmp_path, m):
    pytest.importorskip("matplotlib")
    names = [f"<o{k}>" for k in range(m)]
    for seed, rule in product((0, 1), ("linear", "cagrad")):
        rng = np.random.default_rng([seed, len(rule)])
        values = dict(zip(names, rng.random(m).tolist(), strict=True))
        write(f"{rule}{seed}", values, rule=rule, seed=seed, weights=dict.fromkeys(names, 1 / m))
    config = ParetoConfig([str(tmp_path / "runs")], output_dir=str(tmp_path / "out"))
    report = pareto(config)
    drawn = {2: {"fronts"}, 3: {"fronts", "parallel"}, 5: {"parallel"}}[m]
    assert report.pictures.keys() == drawn
    page = (tmp_path / "out" / "report.html").read_text()
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        "report.html",
        "pareto.json",
        *(f"{name}.svg" for name in drawn),
    }
    assert page.count("<svg") == len(drawn)
    assert not re.search(r"<script|<link|<img|src=|href=\"http|@import|<o\d>", page)
    assert "&lt;o0&gt;" in page
    assert json.loads((tmp_path / "out" / "pareto.json").read_text()) == json.loads(
        json.dumps(report.content)
    )
    again = pareto(dataclasses.replace(config, output_dir=str(tmp_path / "again")))
    assert again.pictures == report.pictures
    assert page == (tmp_path / "again" / "report.html").read_text()


def test_without_the_optional_packages_the_rest_is_there(study, monkeypatch):
    monkeypatch.setattr(fronts, "find_spec", lambda name: None)
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    report = study()
    assert "matplotlib is not installed" in str(report)
    assert pictures.pictures(None, "accuracy") == {}
    by_seed = volumes("linear", (0, 1, 2), (0.0, 0.0))
    assert group(report, "linear")["hypervolume"]["by_seed"] == pytest.approx(by_seed, rel=1e-9)
    assert report.content["comparisons"][0]["gains"]["a"]["mean"] != 0


def test_bad_runs_are_told(write, tmp_path):
    def told(message: str, **settings) -> None:
        with pytest.raises((ValueError, OSError), match=message):
            pareto(ParetoConfig(**({"runs": [str(tmp_path / "runs")]} | settings)))

    told("`runs` must be folders, got .*runs, which is none")
    empty = tmp_path / "empty"
    empty.mkdir()
    told("where there is no run; give the `output_dir` of", runs=[str(empty)])
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "metrics.jsonl").write_text("")
    told("must name finished runs, got 1 that are not, the first .*begun", runs=[str(begun)])
    good = write("good", {"a": 0.5, "b": 0.6})
    odd = {
        "other": ({"a": 0.5, "c": 0.1}, {"weights": {"a": 0.5, "c": 0.5}}, "same objectives"),
        "pairs": ({"a": 0.5, "b": 0.1}, {"held_out": "others", "c": 0.1}, "same held-out pairs"),
        "none": ({}, {"seed": 1}, "no evaluation after its last step: it had no held-out pairs"),
        "null": ({"a": 0.5, "b": None}, {"seed": 2}, r"no finite .* for \['b'\]"),
        "twice": ({"a": 0.5, "b": 0.2}, {}, "must differ in the seed or a setting .*good and"),
    }
    for name, (values, settings, message) in odd.items():
        told(message, runs=[str(good), str(write(name, values, **settings))])
    alone = write("alone", {"a": 0.5}, weights={"a": 1.0})
    told("at least two objectives", runs=[str(alone)])
    told(r"`reference` must have a finite number for each of \['a', 'b'\]", runs=[str(good)],
         reference={"a": 0.1})  # fmt: skip
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / NAME).write_text("{")
    told("must be what a finished run writes", runs=[str(damaged)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"runs": []}, "`runs` must name at least one folder"),
        ({"resamples": 5}, "`resamples` must be at least 100, got 5"),
        ({"by": ["rule"]}, "`by` must name settings beside the rule and the seed"),
        ({"metric": "margin"}, "`reference` must be given for the metric 'margin'"),
        ({"metric": "wins"}, "`metric` must be one of"),
    ],
)
def test_settings_that_cannot_be_are_told(settings, message):
    with pytest.raises(ValueError, match=message):
        ParetoConfig(**({"runs": ["x"]} | settings))
