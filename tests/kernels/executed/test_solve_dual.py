"""The dual solver on the device against the C++ solver (whose oracles are in tests/test_dual*)."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from raco_fast import solve_dual
from raco_fast.kernels import solve_dual as kernel
from raco_fast.solver.dual import DualSolution
from raco_fast.solver.weights import RULES

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def on_device(
    gram: np.ndarray,
    weights: list[float],
    c: float,
    rule: str,
    device: torch.device,
    limit: float = float("inf"),
    scale: float = 1.0,
    found_inf: float = 0.0,
) -> kernel.Outputs:
    m = len(weights)

    def filled(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.full(shape, torch.nan, dtype=dtype, device=device)

    out = kernel.Outputs(
        packed=filled(3 * m + kernel.SCALARS, dtype=torch.float64),
        used=filled(m, m, dtype=torch.float64),
        step=filled(m + 2, dtype=torch.float32),
        skipped=torch.zeros(1, dtype=torch.int64, device=device),
    )
    kernel.solve_dual(
        torch.tensor(np.asarray(gram), dtype=torch.float64, device=device),
        torch.tensor([*weights, c, limit], dtype=torch.float64, device=device),
        torch.tensor([scale], device=device),
        torch.tensor([found_inf], device=device),
        out,
        rule,
    )
    return out


def assert_agrees(gram, weights, c, rule, device) -> DualSolution:
    """p within 1e-7 of the C++ solver's, a gap of 1e-10, and every other number that follows."""
    gram = np.asarray(gram)
    m = len(weights)
    out = on_device(gram, weights, c, rule, device)
    ours = DualSolution(
        tuple(map(str, range(m))), np.array(weights), c, rule, gram, out.packed.cpu().numpy(), False
    )
    theirs = solve_dual(gram, weights, c, rule)
    for name in ("p", "p_clipped"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=0, atol=1e-7)
    size = theirs.g0_norm if rule != "mgda" else 1.0
    scale = size * np.sqrt(np.diag(gram).max())
    assert 0.0 <= ours.gap <= 1e-10 * scale
    assert abs(ours.value - theirs.value) <= 1e-12 * scale
    assert ours.g0_norm == pytest.approx(theirs.g0_norm, rel=1e-14)
    assert ours.clip_active == theirs.clip_active
    assert ours.finite
    assert ours.converged
    # alpha is stretched by s / ||G p_clipped||, and with it what is left of p's error
    stretch = 1.0 if rule == "mgda" else 1.0 + size / max(theirs.gp_norm, 1e-300)
    np.testing.assert_allclose(
        ours.coefficients, theirs.coefficients, rtol=1e-9, atol=1e-7 * min(stretch, 1e7)
    )
    step = out.step.tolist()
    assert step[:m] == torch.tensor(ours.coefficients).float().tolist()
    assert step[m:] == [1.0, 1.0]
    assert out.skipped.item() == 0
    return ours


def gram_of(*gradients: tuple[float, ...]) -> np.ndarray:
    G = np.array(gradients)
    return np.array([[a @ b for b in G] for a in G])


@pytest.mark.parametrize("rule", RULES)
def test_witness_at_any_scale(rule, device):
    for kappa in (1.0, 1e-30, 1e30):
        solution = assert_agrees(
            kappa * gram_of((1.0, -4.0), (-1.0, 1.0)), [0.2, 0.8], 0.5, rule, device
        )
        if rule == "cagrad-clip":
            assert solution.p[0] == pytest.approx(0.356145, abs=5e-7)


CASES = {
    "one objective": (gram_of((2.0,)), [1.0], 0.25),
    "one objective without gradient": (gram_of((0.0,)), [1.0], 0.25),
    "identical": (gram_of((1.0, 2.0), (1.0, 2.0), (1.0, 2.0)), [0.5, 0.2, 0.3], 0.4),
    "two identical": (gram_of((1.0, 0.0), (1.0, 0.0), (-1.2, 0.8)), [0.3, 0.3, 0.4], 0.4),
    "twins": (gram_of((1.0, 2.0), (1.0, 2.0)), [0.3, 0.7], 0.4),
    "opposite, g0 = 0": (gram_of((1.0, 2.0), (-1.0, -2.0)), [0.5, 0.5], 0.4),
    "opposite": (gram_of((1.0, 2.0), (-1.0, -2.0)), [0.6, 0.4], 0.4),
    "kink": (gram_of((1.0, 0.0), (-1.0, 0.0), (0.0, 10.0)), [0.55, 0.35, 0.1], 0.4),
    "all zero": (np.zeros((3, 3)), [0.2, 0.3, 0.5], 0.4),
    "one zero": (gram_of((1.0, 0.0), (0.0, 0.0), (0.5, 1.0)), [0.2, 0.3, 0.5], 0.4),
    "collinear": (gram_of((1.0,), (2.0,), (-3.0,)), [0.5, 0.3, 0.2], 0.6),
    "c = 0": (gram_of((1.0, 0.0), (0.0, 1.0), (-1.0, 1.0)), [0.5, 0.3, 0.2], 0.0),
    "c = 0, tied": (gram_of((1.0, 0.0), (1.0, 0.0), (3.0, 1.0)), [0.5, 0.3, 0.2], 0.0),
    "zero weight": (gram_of((1.0, 0.5), (-2.0, 1.0), (1.0, -3.0)), [0.6, 0.4, 0.0], 0.7),
    "twelve decades": (gram_of((1e6, 3e5), (-1e-6, 2e-6), (1.0, 1.0)), [0.2, 0.5, 0.3], 0.4),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rule", ["cagrad-clip", pytest.param("mgda", marks=pytest.mark.slow)])
def test_degenerate_gradients(name, rule, device):
    assert_agrees(*CASES[name], rule, device)


@pytest.mark.parametrize("m", [2, 3])
def test_random_gradients_and_permutations(m, device):
    rng = np.random.default_rng(m)
    for trial in range(6):
        G = rng.standard_normal((m, m + 1)) * 10.0 ** rng.uniform(-2, 2, (m, 1))
        w, order = rng.dirichlet(np.ones(m)), rng.permutation(m)
        c, rule = float(rng.uniform(0.05, 0.95)), RULES[1 + trial % 3]
        a = assert_agrees(gram_of(*G), w.tolist(), c, rule, device)
        b = assert_agrees(gram_of(*G[order]), w[order].tolist(), c, rule, device)
        np.testing.assert_allclose(b.p, a.p[order], rtol=0, atol=1e-9)


@pytest.mark.slow
def test_oracle_vectors(device):
    file = Path(__file__).resolve().parents[4] / "shared" / "oracle" / "dual_vectors.json.gz"
    if not file.exists():
        pytest.skip("no ../shared folder beside the checkout")
    rows = json.loads(gzip.decompress(file.read_bytes()))
    rows = [row for row in rows if len(row["weights"]) <= 3]
    assert len(rows) == 162
    for row in rows:
        solution = assert_agrees(row["gram"], row["weights"], row["c"], "cagrad-clip", device)
        tolerance = 1e-6 if row["kind"] == 3 else 1e-9
        for name in ("p", "p_clipped", "coefficients"):
            np.testing.assert_allclose(
                getattr(solution, name), row[name], rtol=tolerance, atol=1e-30
            )


@pytest.mark.parametrize("bad", [np.nan, np.inf, "found_inf", "scale 0"])
def test_numbers_that_are_not_finite_skip_the_step(bad, device):
    gram = gram_of((1.0, -4.0), (-1.0, 1.0))
    if isinstance(bad, float):
        gram[0, 1] = gram[1, 0] = bad
    out = on_device(
        gram,
        [0.2, 0.8],
        0.5,
        "cagrad-clip",
        device,
        scale=0.0 if bad == "scale 0" else 1.0,
        found_inf=float(bad == "found_inf"),
    )
    assert out.step[:3].isnan().all()
    assert out.step[3] == 0.0
    assert out.skipped.item() == 1
    packed = out.packed.cpu().numpy()
    solution = DualSolution(
        ("a", "b"), np.array([0.2, 0.8]), 0.5, "cagrad-clip", gram, packed, True
    )
    assert not solution.finite
    assert solution.p.isnan().all()
    assert solution.coefficients.isnan().all()


def test_loss_scale_and_norm_limit(device):
    gram, weights = gram_of((1.0, -4.0), (-1.0, 1.0)), [0.2, 0.8]
    solution = solve_dual(gram, weights, 0.5)
    limit = 0.3 * solution.update_norm
    out = on_device(2.0**20 * gram, weights, 0.5, "cagrad-clip", device, limit, scale=2.0**10)
    np.testing.assert_allclose(out.used.cpu(), gram, rtol=1e-15)
    expected = [*solution.coefficients, 0.3, 1.0]
    np.testing.assert_allclose(out.step.cpu(), expected, rtol=1e-5)


def test_a_gram_beyond_cauchy_and_schwarz_is_brought_back(device):
    gram = gram_of((1.0, 2.0), (1.0, 2.0))
    gram[0, 1] = gram[1, 0] = 5.0 * (1 + 1e-7)
    out = on_device(gram, [0.3, 0.7], 0.4, "cagrad", device)
    assert out.used[0, 1].item() == pytest.approx(5.0, rel=1e-15)
    np.testing.assert_allclose(out.packed[:2].cpu(), [0.3, 0.7], rtol=1e-14)
