"""The closed form for two objectives against the C++ solver, whose oracles are in test_dual*.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from raco_fast import solve_dual
from raco_fast.solver import on_device
from raco_fast.solver.on_device import DeviceStep
from raco_fast.solver.rules.conflict_averse import RULES
from raco_fast.solver.solution import DualSolution

WITNESS = np.array([[17.0, -5.0], [-5.0, 2.0]])


def gram_of(*gradients: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([[float(a @ b) for b in gradients] for a in gradients])


def solved(gram: NDArray[np.float64], weights: list[float], c: float, rule: str) -> DualSolution:
    """Checks coefficients and norm to 1e-10, relative; returns the C++ solver's."""
    exact = solve_dual(gram, weights, c, rule)
    alpha, norm = on_device.coefficients(torch.tensor(gram), weights, c, rule)
    assert alpha.dtype == norm.dtype == torch.float64
    size = np.abs(exact.coefficients).max()
    np.testing.assert_allclose(alpha, exact.coefficients, rtol=0, atol=1e-10 * size)
    terms = float(np.sqrt(np.diag(gram)) @ exact.coefficients)
    assert float(norm) == pytest.approx(exact.update_norm, rel=1e-10, abs=1e-14 * terms)
    return exact


def tiny(rng: np.random.Generator) -> float:
    """From 1e-7 to 1."""
    return float(10.0 ** rng.uniform(-7, 0))


FAMILIES = {
    "random": lambda rng, g, h: (g, h),
    "twelve decades apart": lambda rng, g, h: (g, h * 10.0 ** rng.uniform(-12, 12)),
    "equal": lambda rng, g, h: (g, g),
    "parallel": lambda rng, g, h: (g, g * rng.choice([0.1, 0.999, 2.0, 1e6])),
    "nearly parallel": lambda rng, g, h: (g, rng.uniform(0.5, 2) * g + tiny(rng) * h),
    "nearly equal": lambda rng, g, h: (g, g + tiny(rng) * h),
    "opposite": lambda rng, g, h: (g, -g * rng.choice([0.3, 0.5, 1.0, 2.0])),
    "nearly opposite": lambda rng, g, h: (g, -rng.uniform(0.5, 2) * g + tiny(rng) * h),
    "one is zero": lambda rng, g, h: (g, 0 * g) if rng.uniform() < 0.5 else (0 * g, h),
    "both are zero": lambda rng, g, h: (0 * g, 0 * h),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_gradients(family, rule):
    rng = np.random.default_rng(3)
    for _ in range(60):
        pair = FAMILIES[family](rng, *rng.standard_normal((2, 3)))
        w = float(rng.choice([0.0, 0.5, 1.0, rng.uniform()]))
        c = float(rng.choice([0.0, 0.4, rng.uniform(0, 0.999)]))
        solved(gram_of(*pair), [w, 1.0 - w], c, rule)


def test_almost_opposite_gradients_of_equal_weight():
    """g0 nearly vanishes: both solvers round p, which moves a short Gp by as much as it is long."""
    rng = np.random.default_rng(5)
    for _ in range(60):
        g, h = rng.standard_normal((2, 3))
        gram = gram_of(g, -g + 10.0 ** rng.uniform(-9, -3) * h)
        exact = solve_dual(gram, [0.5, 0.5], 0.6)
        alpha, _ = on_device.coefficients(torch.tensor(gram), [0.5, 0.5], 0.6, "cagrad-clip")
        lost = 1e-15 * np.sqrt(gram.max()) / max(exact.gp_norm, 1e-300)
        np.testing.assert_allclose(alpha, exact.coefficients, rtol=0, atol=1e-10 + 10 * lost)


@pytest.mark.parametrize("power", [-300, -80, -12, 12, 80, 290])
@pytest.mark.parametrize("rule", RULES)
def test_any_scale(power, rule):
    exact = solved(WITNESS * 10.0**power, [0.2, 0.8], 0.5, rule)
    if rule == "cagrad-clip":
        assert exact.p[0] == pytest.approx(0.356145, abs=5e-7)
        assert exact.clip_active


@pytest.mark.parametrize("rule", RULES)
def test_a_power_of_four_changes_no_bit(rule):
    plain, scaled = [
        on_device.coefficients(torch.tensor(s * WITNESS), [0.2, 0.8], 0.5, rule) for s in (1, 4**30)
    ]
    assert torch.equal(plain[0], scaled[0])
    assert scaled[1] == plain[1] * 2.0**30


@pytest.mark.parametrize("rule", RULES)
def test_exchanging_the_objectives_exchanges_the_coefficients(rule):
    first, _ = on_device.coefficients(torch.tensor(WITNESS), [0.2, 0.8], 0.5, rule)
    flipped = torch.tensor(WITNESS[::-1, ::-1].copy())
    second, _ = on_device.coefficients(flipped, [0.8, 0.2], 0.5, rule)
    torch.testing.assert_close(first.flip(0), second, rtol=1e-14, atol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("square", [0.0, 4.0, 1e-200])
def test_one_objective(square, rule):
    solved(np.array([[square]]), [1.0], 0.25, rule)


def test_what_is_solved_on_the_host_is_said():
    assert on_device.obstacle(2, "mgda") is None
    assert on_device.obstacle(1, "other") == "the rule 'other' is solved on the host"
    assert "m = 3 objectives is solved on the host" in str(on_device.obstacle(3, "linear"))


def step_of(gram: NDArray[np.float64], **given) -> tuple[DeviceStep, list[float]]:
    """A step of the witness' weights, and its coefficients."""
    step = DeviceStep(2, torch.device("cpu"))
    defaults = {"max_grad_norm": None, "grad_scale": None, "found_inf": None}
    alpha = step.solve(
        torch.tensor(gram), {"a": 0.2, "b": 0.8}, 0.5, "cagrad-clip", **{**defaults, **given}
    )
    return step, alpha.tolist()


def test_loss_scale_and_norm_limit_are_folded_in():
    exact = solve_dual(WITNESS, {"a": 0.2, "b": 0.8}, 0.5)
    given = {"grad_scale": torch.tensor([2.0**10]), "found_inf": torch.zeros(1)}
    limit = 0.3 * exact.update_norm
    step, alpha = step_of(2.0**20 * WITNESS, **given, max_grad_norm=limit)
    np.testing.assert_allclose(alpha, 0.3 * exact.coefficients / 2**10, rtol=2e-6)
    np.testing.assert_allclose(step.solution().coefficients, exact.coefficients, rtol=1e-14)
    assert step.solution().names == ("a", "b")
    assert step.skipped == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, "found_inf", "scale 0"])
def test_numbers_that_are_not_finite_skip_the_step(bad):
    gram, given = WITNESS.copy(), {}
    if bad == "found_inf":
        given = {"found_inf": torch.ones(1)}
    elif bad == "scale 0":
        given = {"grad_scale": torch.zeros(1)}
    else:
        gram[0, 1] = gram[1, 0] = bad
    step, alpha = step_of(gram, **given)
    assert np.isnan(alpha).all()
    assert step.skipped == 1
    assert not step.solution().finite
    step.skipped = 0
    assert step.skipped == 0
