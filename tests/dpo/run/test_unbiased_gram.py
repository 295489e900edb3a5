"""`gram: unbiased` in a training: every pair is a sample, however the step is cut."""

import numpy as np
import pytest

from raco_fast.dpo.metrics import solution_metrics
from raco_fast.dpo.run.config import TrainConfig
from raco_fast.dpo.run.trainer import Trainer, train

UNBIASED = {"gram": "unbiased", "gram_ema": 0.8}


def means_after_a_step(config: TrainConfig) -> np.ndarray:
    runner = Trainer(config)
    runner._learn(runner._pairs_of(0))
    estimate = runner.state.optimizer.solution.expected
    assert estimate is not None
    return estimate.mean


LD = {"kind": {"name": "ld", "alpha": 0.4}}
HINGE = {"kind": {"name": "hinge", "beta": 0.5}}


@pytest.mark.parametrize(
    ("losses", "changes"),
    [
        (LD, {"batching": "padded"}),
        pytest.param(
            HINGE, {"batching": "pairs", "pairs_per_micro_batch": 1}, marks=pytest.mark.slow
        ),
        pytest.param(LD, {"batching": "packed"}, marks=pytest.mark.slow),
        pytest.param(
            {},
            {"batching": "pairs", "pairs_per_micro_batch": 8, "gradient_mode": "gram_first"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["padded", "one pair at a time", "packed", "gram_first"],
)
def test_a_step_has_one_statistic(make_config, save_tiny, losses, changes):
    """In two micro-batches of rows that a prompt shares, or cut otherwise."""
    model = {"name": str(save_tiny()), "dropout": False}
    two = make_config(model, losses=losses, pairs_per_micro_batch=4, **UNBIASED)
    cut = make_config(model, losses=losses, **{**UNBIASED, **changes})
    expected = means_after_a_step(two)
    scale = abs(expected).max()
    np.testing.assert_allclose(means_after_a_step(cut), expected, atol=2e-5 * scale)


def test_a_run_writes_what_it_knows_and_goes_on_to_the_bit(runs, make_config, tmp_path):
    settings = {"pairs_per_step": 6, "schedule": "constant", "warmup_ratio": 0.0, "epochs": 1}
    settings |= UNBIASED
    again = make_config(output_dir=str(tmp_path / "at once"), **settings)
    train(again)
    train(make_config(output_dir=str(tmp_path / "twice"), max_steps=4, **settings))
    resumed = make_config(output_dir=str(tmp_path / "twice"), **settings)
    train(resumed, resume=True)
    runs.assert_equal(runs.weights(resumed), runs.weights(again))
    one, other = runs.steps(again), runs.steps(resumed)
    assert [r["raco/descent/kind"] for r in one] == [r["raco/descent/kind"] for r in other]
    last = runs.steps(again)[-1]
    assert last["raco/shrinkage"] is not None
    names = {name for name in last if name.startswith("raco/")}
    assert {
        "raco/cosine_unbiased/sure:kind",
        "raco/cosine_unbiased_se/sure:kind",
        *(
            f"raco/{what}/{o}"
            for what in ("descent", "noise_share", "noise_scale")
            for o in ("sure", "kind")
        ),
        "raco/shrinkage",
        "raco/gram_steps",
    } <= names
    assert 1 < last["raco/gram_steps"] <= 7


def test_metrics_are_those_of_the_estimate(make_config):
    runner = Trainer(make_config({"dropout": False}, **UNBIASED))
    for step in range(3):
        result = runner._learn(runner._pairs_of(step))
    solution = result.solution
    metrics = solution_metrics(solution, ("sure", "kind"))
    expected = solution.expected
    descent = expected.mean @ solution.coefficients.numpy()
    assert metrics["raco/descent/kind"] == pytest.approx(descent[1])
    cosine = expected.mean[0, 1] / np.sqrt(expected.mean[0, 0] * expected.mean[1, 1])
    assert metrics["raco/cosine_unbiased/sure:kind"] == pytest.approx(cosine, nan_ok=True)
    share = 1 - expected.mean.diagonal() / solution.gram.diagonal().numpy()
    assert metrics["raco/noise_share/sure"] == pytest.approx(share[0], abs=0.3)
    assert all(type(value) is float for value in metrics.values())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"gradient_mode": "autograd"}, "needs the products of single pairs"),
        ({"pairs_per_step": 1}, "needs products between pairs of one step, got 1"),
        ({"gram_ema": 1.5}, r"`gram_ema` must be in \(0, 1\)"),
        ({"gram": "batch"}, "`gram_ema` and `c_mode` are of gram='unbiased'"),
    ],
)
def test_settings_that_cannot_be(make_config, changes, match):
    with pytest.raises(ValueError, match=match):
        make_config(**{**UNBIASED, **changes})
