"""c and weights as functions of the step: values, draws, resumes, errors."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import beta, kstest
from torch import nn

from raco_fast.optim.clipped_cagrad_adamw import ClippedCAGradAdamW
from raco_fast.optim.schedules import SettingScheduler

WEIGHTS = {"x": 0.5, "y": 0.3, "z": 0.2}
END = {"z": 0.0, "x": 0.1, "y": 0.9}


def optimizer(**changes) -> ClippedCAGradAdamW:
    p = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    return ClippedCAGradAdamW([p], lr=0.1, **{"weights": WEIGHTS, "c": 0.4, **changes})


def values(n: int, **given) -> list:
    opt = optimizer()
    scheduler = SettingScheduler(opt, **given)
    found = []
    for _ in range(n):
        found.append((opt.c, dict(opt.weights)))
        scheduler.step()
    return found


def test_shapes_of_c():
    line = [c for c, _ in values(6, c={"name": "linear", "start": 0.0, "end": 0.8, "steps": 4})]
    np.testing.assert_allclose(line, [0.0, 0.2, 0.4, 0.6, 0.8, 0.8], rtol=1e-15)
    wave = [c for c, _ in values(6, c={"name": "cosine", "start": 0.8}, steps=4)]
    half = 0.2 * math.sqrt(0.5)
    np.testing.assert_allclose(wave, [0.8, 0.6 + half, 0.6, 0.6 - half, 0.4, 0.4], rtol=1e-15)
    assert (line[-1], wave[-1]) == (0.8, 0.4)
    assert [c for c, _ in values(3, c={"name": "constant", "start": 0.1})] == [0.1] * 3
    assert [w for _, w in values(2, c={"name": "constant", "start": 0.1})] == [WEIGHTS] * 2
    down = [c for c, _ in values(3, c={"name": "linear", "end": 0.0}, steps=2)]
    assert down == [0.4, 0.2, 0.0]


def test_weights_on_the_way_are_weights():
    given = {"name": "linear", "end": END}
    found = [w for _, w in values(5, weights=given, steps=4)]
    assert found[0] == WEIGHTS
    assert found[4] == {name: END[name] for name in WEIGHTS}
    assert found[1] == pytest.approx({"x": 0.4, "y": 0.45, "z": 0.15}, rel=1e-15)
    wave = [w for _, w in values(5, weights={"name": "cosine", "start": END, "steps": 3})]
    assert wave[0] == found[4]
    assert wave[3] == wave[4] == WEIGHTS
    assert wave[1] == pytest.approx({"x": 0.2, "y": 0.75, "z": 0.05}, rel=1e-14)


def test_functions_of_the_step():
    found = values(3, c=lambda t: 0.1 * t, weights=lambda t: END if t else [0.2, 0.2, 0.6])
    assert [c for c, _ in found] == [0.0, 0.1, 0.2]
    assert found[0][1] == {"x": 0.2, "y": 0.2, "z": 0.6}
    assert found[2][1] == END
    opt = optimizer()
    scheduler = SettingScheduler(opt, c=lambda t: 0.5 * (t + 1))
    with pytest.raises(ValueError, match=r"`c` must be in \[0, 1\), got 1.0"):
        scheduler.step()


def test_drawn_weights_have_the_distribution_that_is_asked_for():
    """Each marginal is Beta(a w, a (1 - w)); the means and covariances are Dirichlet's."""
    n, a, w = 10_000, 5.0, np.array([*WEIGHTS.values()])
    drawn = values(n, weights={"name": "dirichlet", "concentration": a, "seed": 7})
    W = np.array([[*weights.values()] for _, weights in drawn])
    np.testing.assert_allclose(W.sum(1), 1.0, rtol=1e-14)
    for k in range(3):
        assert kstest(W[:, k], beta(a * w[k], a * (1 - w[k])).cdf).pvalue > 1e-3
    covariance = (np.diag(w) - np.outer(w, w)) / (a + 1)
    error = np.sqrt((covariance**2 + np.outer(covariance.diagonal(), covariance.diagonal())) / n)
    assert (abs(np.cov(W.T) - covariance) < 5.0 * error).all()
    standard = (W - w) / np.sqrt(covariance.diagonal())
    for lag in (1, 2, 5):  # steps know nothing of each other
        assert (abs(standard[lag:].T @ standard[:-lag]) / n < 5.0 / math.sqrt(n)).all()


def test_drawn_weights_follow_from_seed_and_step_alone():
    given = {"name": "dirichlet", "concentration": 2, "seed": 3}
    whole = values(6, weights=given)
    opt = optimizer()
    scheduler = SettingScheduler(opt, weights=given)
    for step in (5, 0, 3):
        scheduler.at(step)
        assert dict(opt.weights) == whole[step][1]
    assert values(6, weights={**given, "seed": 4}) != whole
    assert values(6, weights={**given, "seed": 3 + 2**64}) == whole


def test_drawn_weights_at_the_ends():
    for concentration in (1e-6, 1e-2, 1e9):
        opt = optimizer(weights={"x": 0.7, "y": 0.3, "z": 0.0})
        given = {"name": "dirichlet", "concentration": concentration}
        scheduler = SettingScheduler(opt, weights=given)
        first = []
        for step in range(300):
            scheduler.at(step)
            assert opt.weights["z"] == 0.0
            first.append(opt.weights["x"])
        assert np.mean(first) == pytest.approx(
            0.7, abs=4 * math.sqrt(0.21 / 300 / (1 + concentration))
        )
        if concentration < 1:
            assert np.mean([min(x, 1 - x) < 1e-3 for x in first]) > 0.9


def train(opt: ClippedCAGradAdamW, scheduler: SettingScheduler, steps: range) -> list[float]:
    (p,) = opt.param_groups[0]["params"]
    for step in steps:
        opt.zero_grad()
        target = torch.tensor([1.0, float(step % 3), -1.0], dtype=torch.float64)
        opt.backward({"x": (p - target).square().sum(), "y": p[0] * p[1], "z": p.exp().sum()})
        opt.step()
        scheduler.step()
    return p.tolist()


SCHEDULES = {
    "c": {"name": "cosine", "start": 0.9},
    "weights": {"name": "dirichlet", "concentration": 3.0},
    "steps": 9,
}


@pytest.mark.parametrize("loaded_first", ["optimizer", "scheduler"])
def test_a_resumed_training_goes_on_to_the_bit(loaded_first):
    opt = optimizer()
    whole = train(opt, SettingScheduler(opt, **SCHEDULES), range(9))
    opt = optimizer()
    scheduler = SettingScheduler(opt, **SCHEDULES)
    half = train(opt, scheduler, range(4))
    saved = opt.state_dict(), scheduler.state_dict()
    again = optimizer()
    again.param_groups[0]["params"][0].data.copy_(torch.tensor(half, dtype=torch.float64))
    if loaded_first == "optimizer":  # whose weights are then those drawn for a step
        again.load_state_dict(saved[0])
    scheduler = SettingScheduler(again, **SCHEDULES)
    scheduler.load_state_dict(saved[1])
    if loaded_first == "scheduler":
        again.load_state_dict(saved[0])
    assert train(again, scheduler, range(4, 9)) == whole
    plain = optimizer()
    assert train(plain, SettingScheduler(plain), range(9)) != whole


def test_the_solution_has_the_settings_of_its_step():
    opt = optimizer()
    scheduler = SettingScheduler(opt, **SCHEDULES)
    for step in range(3):
        asked = opt.c, list(opt.weights.values())
        train(opt, scheduler, range(step, step + 1))
        assert (opt.solution.c, opt.solution.weights.tolist()) == asked


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"c": {"name": "liner"}}, ValueError, "must be one of .*, got 'liner'; did you mean 'lin"),
        ({"c": {"name": "dirichlet"}}, ValueError, "of `c` must be one of constant, linear, cos"),
        ({"c": 0.3}, TypeError, "of `c` must be .* or a function of the step, got 0.3"),
        ({"c": {"start": 0.3}}, TypeError, "of `c` must be {'name': name, option: value}"),
        ({"c": {"name": "linear", "stop": 1}}, ValueError, r"options .*'steps'\].*unknown \['sto"),
        ({"c": {"name": "linear"}, "steps": 3}, ValueError, "`start` or an `end` .* nothing would"),
        ({"c": {"name": "linear", "start": 0}}, ValueError, "'linear' of `c` needs `steps`"),
        ({"c": {"name": "cosine", "end": 1.0}}, ValueError, r"`c` must be in \[0, 1\), got 1.0"),
        ({"c": {"name": "linear", "end": 0, "steps": 0}}, ValueError, "at least 1, got 0"),
        ({"c": {"name": "linear", "end": 0, "steps": 2.5}}, TypeError, "whole number: 2.5"),
        ({"weights": {"name": "linear", "end": {"x": 1.0}}}, ValueError, "of the objectives"),
        ({"weights": {"name": "dirichlet"}}, TypeError, "needs `concentration`, a positive"),
        (
            {"weights": {"name": "dirichlet", "concentration": 0.0}},
            ValueError,
            r"`concentration` .* in \(0, 1e9\], got 0.0",
        ),
        (
            {"weights": {"name": "dirichlet", "concentration": 1, "seed": 0.5}},
            TypeError,
            "`seed` .* whole number, got 0.5",
        ),
    ],
)
def test_wrong_schedules(given, kind, message):
    opt = optimizer()
    with pytest.raises(kind, match=message):
        SettingScheduler(opt, **given)
    assert (opt.c, dict(opt.weights)) == (0.4, WEIGHTS)
