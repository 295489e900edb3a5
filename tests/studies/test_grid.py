"""The points of a grid, and the names of their runs."""

import pytest

from raco_fast.studies.grid import applied, check_names, name_of, points_of

BASE = {"model": {"name": "m", "lora": {"r": 4}}, "lr": 1e-5, "weights": {"a": 0.5, "b": 0.5}}
HIGH, LOW = {"a": 0.8, "b": 0.2}, {"a": 0.1, "b": 0.9}


def test_points_are_all_combinations_the_last_setting_fastest():
    points = points_of(BASE, {"c": [0.1, 0.4], "seed": [0, 1]})
    assert points == [{"c": c, "seed": s} for c in (0.1, 0.4) for s in (0, 1)]


def test_a_rule_that_ignores_the_weights_has_one_run():
    grid = {"rule": ["linear", "mgda", {"name": "gapo"}], "weights": [HIGH, LOW]}
    found = [(point["rule"], point["weights"]) for point in points_of(BASE, grid)]
    assert found == [("linear", HIGH), ("linear", LOW), ("mgda", HIGH), ({"name": "gapo"}, HIGH)]
    of_base = points_of(BASE | {"rule": "mgda"}, {"weights": [HIGH, LOW]})
    assert [point["weights"] for point in of_base] == [HIGH]
    assert len(points_of(BASE, {"weights": [HIGH, LOW]})) == 2  # by the default rule


def test_values_replace_those_of_the_base_and_leave_the_others():
    point = {"model.lora.r": 8, "loss_options.beta": 0.3, "weights": HIGH, "tokens.keep": "start"}
    settings = applied(BASE, point)
    assert settings == {
        "model": {"name": "m", "lora": {"r": 8}},
        "lr": 1e-5,
        "weights": HIGH,
        "loss_options": {"beta": 0.3},
        "tokens": {"keep": "start"},
    }
    assert BASE["model"]["lora"]["r"] == 4
    with pytest.raises(ValueError, match=r"needs `lr` of the base to be a mapping, got 1e-05"):
        applied(BASE, {"lr.x": 1})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lrr", r"`grid` must name settings of `raco-fast train`, got 'lrr'; did you mean 'lr'\?"),
        ("model.lora.s", r"got 'model.lora.s'; did you mean 'model.lora.\w'\?"),
        ("qqqqq", "got 'qqqqq'; `raco-fast train --help` lists them"),
        ("output_dir", "must not name `output_dir`: every run of a sweep has a folder"),
        ("cache_dir", "all share the base's `cache_dir`; take it out"),
    ],
)
def test_a_name_that_cannot_be_swept_is_told(name, message):
    with pytest.raises(ValueError, match=message):
        check_names({name: [1]})


def test_every_way_to_name_a_setting_is_known():
    names = ["lr", "model.lora", "model.lora.r", "tokens.keep", "loss_options.beta", "weights"]
    for name in [*names, "rule.alpha", "losses.kind.gamma", "parallel.kind", "c_schedule.end"]:
        check_names({name: [1]})
    with pytest.raises(ValueError, match=r"a setting and a part of it, got 'model\.lora'"):
        check_names({"model.lora": [1], "model.lora.r": [1]})


def test_names_tell_the_values_and_are_names_of_folders():
    rule = {"name": "fairgrad", "alpha": 2.0}
    point = {"rule": rule, "weights": {"sure": 0.7, "kind": 0.3}, "seed": 1, "report": True}
    name = "rule=fairgrad_alpha_2.0,weights=sure0.7_kind0.3,seed=1,report=true"
    assert name_of(point) == name
    assert name_of({"max_steps": None, "betas": [0.9, 0.99]}) == "max_steps=null,betas=0.9_0.99"


def test_what_no_folder_can_be_called_has_a_hash_that_tells_it_apart():
    paths = ["../a/x", "../a:x", "../a\nx"]
    names = [name_of({"model.name": path}) for path in paths]
    assert len(set(names)) == 3
    for name in names:
        assert name.startswith("model.name=.._a_x~")
        assert len(name) == len("model.name=.._a_x~") + 8
    long = [name_of({"tokens.chat_template": "{{" * 5000 + end}) for end in "ab"]
    assert len(set(long)) == 2
    assert max(map(len, long)) < 100
    many = [{f"losses.{k}.name": "x" * 50 for k in range(9)} | {"seed": seed} for seed in (0, 1)]
    assert len({*map(name_of, many)}) == 2
    assert max(len(name_of(point)) for point in many) < 255  # as long as a name may be
