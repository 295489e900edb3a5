"""`sdmgrad` and `modo`: their recursions written another way, TorchJD's, and what they remember."""

import json

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

import raco_fast
from raco_fast.solver.dual import solve_dual, solve_present
from raco_fast.solver.registry import check_rule
from raco_fast.solver.simplex import projected

WEIGHTS = {"a": 0.5, "b": 0.2, "c": 0.3}
SMALL_STEPS = {"name": "sdmgrad", "lr": 0.05, "momentum": 0.8, "iterations": 7, "lam": 0.6}
RULES = [
    "sdmgrad",
    SMALL_STEPS,
    {"name": "sdmgrad", "lam": 0.0, "momentum": 0.0},
    "modo",
    {"name": "modo", "gamma": 0.02, "rho": 0.0},
]


def grams(n: int, m: int) -> list[np.ndarray]:
    """Of gradients that are alike from step to step, as a run's are."""
    rng = np.random.default_rng(m)
    common = rng.standard_normal((m, m + 1))
    found = [common + 0.5 * rng.standard_normal((m, m + 1)) for _ in range(n)]
    return [G @ G.T for G in found]


def closest(x: np.ndarray) -> np.ndarray:
    """Of the simplex, by looking for the threshold."""
    excess = lambda t: np.maximum(x - t, 0.0).sum() - 1.0  # noqa: E731
    t = brentq(excess, x.min() - 1.0, x.max(), xtol=1e-15, rtol=1e-15)
    return np.maximum(x - t, 0.0)


def recursion(M: np.ndarray, w: np.ndarray, rule: dict, u: np.ndarray) -> tuple:
    """(coefficients, u after)."""
    if rule["name"] == "modo":
        gamma, rho = rule.get("gamma", 0.1), rule.get("rho", 0.1)
        u = closest(u - gamma * (M + rho * np.eye(len(u))) @ u)
        return u, u
    lam, lr, momentum = (rule.get(k, x) for k, x in (("lam", 0.3), ("lr", 10), ("momentum", 0.5)))
    H, past = M / np.mean(np.sqrt(np.diag(M))) ** 2, []
    for _ in range(rule.get("iterations", 20)):
        past.append(H @ u + lam * (H @ w))
        u = closest(u - lr * sum(momentum**k * g for k, g in enumerate(reversed(past))))
    return (u + lam * w) / (1 + lam), u


@pytest.mark.parametrize("m", [2, 3, 6])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_recursion(rule, m):
    spec = {"name": rule} if isinstance(rule, str) else rule
    w = np.random.default_rng(7).dirichlet(np.ones(m))
    state, u, seen = None, np.full(m, 1.0 / m), []
    for M in grams(8, m):
        solution = solve_dual(M, w, 0.4, rule, state=state)
        state = solution.state
        expected, u = recursion(M, w, spec, u)
        np.testing.assert_allclose(solution.coefficients, expected, atol=1e-7)
        seen.append(u.min())
    assert {x > 0.0 for x in seen} <= {True, False}
    assert abs(u - 1.0 / m).max() > 1e-3


def test_beside_torchjd():
    from torchjd.aggregation import MoDoWeighting, SDMGradWeighting

    for m in (2, 3, 5):
        w = np.random.default_rng(m).dirichlet(np.full(m, 2.0))
        preferred = torch.from_numpy(w)
        pairs = (
            ("sdmgrad", SDMGradWeighting(pref_vector=preferred)),
            (SMALL_STEPS, SDMGradWeighting(0.05, 0.8, 7, 0.6, pref_vector=preferred)),
            ({"name": "modo", "gamma": 0.03, "rho": 0.2}, MoDoWeighting(0.03, 0.2)),
        )
        for rule, theirs in pairs:
            state = None
            # Theirs adds 1e-8 to the scale of what is normalised.
            unit = 1e8 if "modo" not in str(rule) else 1.0
            for M in grams(6, m):
                solution = solve_dual(unit * M, w, 0.4, rule, state=state)
                state = solution.state
                expected = theirs(torch.from_numpy(unit * M)).numpy()
                np.testing.assert_allclose(solution.coefficients, expected, atol=1e-7)


def test_the_closest_point_of_the_simplex():
    rng = np.random.default_rng(0)
    for scale in (1e-12, 1.0, 1e3, 1e17):
        for m in (1, 2, 5, 32):
            x = scale * rng.standard_normal(m)
            y = projected(x)
            assert y.min() >= 0.0
            assert y.sum() == pytest.approx(1.0, abs=1e-12)
            # Of all points of the simplex it has the largest product with x - y: at a vertex.
            assert (x - y).max() - (x - y) @ y <= 1e-12 * max(1.0, scale)
    np.testing.assert_allclose(projected(np.array([0.2, 0.5, 0.3])), [0.2, 0.5, 0.3], rtol=1e-15)
    with np.errstate(invalid="ignore"):
        assert np.isnan(projected(np.array([np.inf, 0.0]))).any()


def test_small_steps_of_sdmgrad_come_to_its_programme():
    """argmin over the simplex of ‖Σ (u_i + λ w_i) g_i‖: no vertex is downhill from there."""
    M, w = grams(1, 4)[0], np.full(4, 0.25)
    rule, state = {"name": "sdmgrad", "lr": 0.2, "iterations": 4000, "lam": 0.3}, None
    u = solve_dual(M, w, 0.4, rule, state=state).state["u"]
    slope = M @ (u + 0.3 * w)
    assert u @ slope - slope.min() <= 1e-9 * abs(slope).max()
    far = solve_dual(M, w, 0.4, {"name": "sdmgrad", "lam": 1e9}).coefficients
    np.testing.assert_allclose(far, w, atol=1e-8)


@pytest.mark.parametrize("rule", ["sdmgrad", {"name": "modo", "rho": 0.0}], ids=str)
def test_gradients_that_are_all_one_leave_u_alone(rule):
    """What gram="unbiased" asks while nothing is known."""
    state = {"u": np.array([0.6, 0.3, 0.1])}
    after = solve_dual(np.full((3, 3), 5.0), WEIGHTS, 0.4, rule, state=state).state
    np.testing.assert_allclose(after["u"], state["u"], atol=1e-14)


@pytest.mark.parametrize("rule", ["sdmgrad", "modo"])
def test_a_gradient_of_zero_attracts(rule):
    state, M = None, np.diag([4.0, 0.0, 9.0])
    for _ in range(60):
        solution = solve_dual(M, WEIGHTS, 0.4, rule, state=state)
        state = solution.state
    assert state["u"][1] > 0.9


@pytest.mark.parametrize("rule", ["sdmgrad", "modo"])
def test_without_an_objective_the_others_share_all(rule):
    weights = {"a": 0.4, "b": 0.0, "c": 0.6}
    (M,) = grams(1, 3)
    state = {"u": np.array([0.1, 0.7, 0.2])}
    gram = torch.from_numpy(M)
    found = solve_present(gram, weights, ("a", "c"), 0.4, rule, state=state)
    assert found.coefficients[1] == 0.0
    assert float(found.coefficients.sum()) == pytest.approx(1.0, rel=1e-12)
    assert found.state["u"][1] == 0.7
    assert found.state["u"][[0, 2]].sum() == pytest.approx(1.0, rel=1e-12)


def test_the_memory_is_in_checkpoints_whatever_the_order():
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    opt = raco_fast.ClippedCAGradAdamW([p], weights=WEIGHTS, rule=SMALL_STEPS)
    for _ in range(3):
        losses = {"a": (p - 1).square().sum(), "b": p[0] * p[1], "c": p.exp().sum()}
        opt.backward(losses)
        opt.step()
        opt.zero_grad()
    saved = json.loads(json.dumps(opt.rule_state))
    assert saved["values"]["u"] != [1 / 3] * 3
    turned = {name: WEIGHTS[name] for name in ("c", "a", "b")}
    again = raco_fast.ClippedCAGradAdamW([torch.nn.Parameter(p.detach())], weights=turned)
    again.load_state_dict(opt.state_dict())
    assert again.rule == SMALL_STEPS
    assert again.rule_state["values"]["u"] == [saved["values"]["u"][i] for i in (2, 0, 1)]


@pytest.mark.parametrize(
    ("spec", "kind", "message"),
    [
        ({"name": "sdmgrad", "lr": 0.0}, ValueError, r"`lr` of the rule sdmgrad must be in \(0, i"),
        ({"name": "sdmgrad", "lam": -1.0}, ValueError, "`lam` of the rule sdmgrad must be in"),
        ({"name": "sdmgrad", "momentum": 1.0}, ValueError, r"must be in \[0, 1\), got 1.0"),
        ({"name": "sdmgrad", "iterations": 0}, ValueError, "`iterations` of the rule sdmgrad"),
        ({"name": "sdmgrad", "iterations": 2.5}, TypeError, "must be a whole number, got 2.5"),
        ({"name": "modo", "gamma": 0.0}, ValueError, "`gamma` of the rule modo must be in"),
        ({"name": "modo", "rho": -0.1}, ValueError, "`rho` of the rule modo must be in"),
    ],
)
def test_wrong_options(spec, kind, message):
    with pytest.raises(kind, match=message):
        check_rule(spec)
