"""`metric: adam` in a training: what a run writes of it, where it is refused, and going on."""

import pytest

from raco_fast.dpo.metrics import solution_metrics
from raco_fast.dpo.run.trainer import Trainer, train

ADAM = {"metric": "adam", "max_grad_norm": 1.0}


def test_a_run_writes_the_cosines_that_were_solved(make_config):
    runner = Trainer(make_config({"dropout": False}, **ADAM))
    first, second = (runner._learn(runner._pairs_of(step)).solution for step in range(2))
    names = ("sure", "kind")
    assert "raco/cosine_adam/sure:kind" not in solution_metrics(first, names)
    metrics = solution_metrics(second, names)
    H = second.in_metric
    cosine = H[0, 1] / (H[0, 0] * H[1, 1]).sqrt()
    assert metrics["raco/cosine_adam/sure:kind"] == pytest.approx(float(cosine))
    assert metrics["raco/cosine/sure:kind"] == pytest.approx(float(second.cosines[0, 1]))
    assert metrics["raco/grad_norm/sure"] == pytest.approx(float(second.gram[0, 0].sqrt()))
    assert abs(second.cosines[0, 1] - cosine) > 1e-3
    assert all(type(value) is float for value in metrics.values())


@pytest.mark.slow
def test_a_run_that_is_taken_up_has_the_same_bits(runs, make_config, tmp_path):
    settings = {"schedule": "constant", "warmup_ratio": 0.0, "epochs": 1, **ADAM}
    again = make_config(output_dir=str(tmp_path / "at once"), **settings)
    train(again)
    train(make_config(output_dir=str(tmp_path / "twice"), max_steps=2, **settings))
    resumed = make_config(output_dir=str(tmp_path / "twice"), **settings)
    train(resumed, resume=True)
    runs.assert_equal(runs.weights(resumed), runs.weights(again))
    name = "raco/cosine_adam/sure:kind"
    one, other = ([r.get(name) for r in runs.steps(c)] for c in (again, resumed))
    assert one == other
    assert one[0] is None
    assert None not in one[1:]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"gradient_mode": "gram_first"}, "`metric: adam` weighs every element of every"),
        ({"gram": "unbiased"}, "`metric` must be 'euclidean' with gram='unbiased'"),
        ({"metric": "adamw"}, "`metric` must be one of"),
    ],
)
def test_settings_that_cannot_be(make_config, changes, match):
    with pytest.raises(ValueError, match=match):
        make_config(**{**ADAM, **changes})
