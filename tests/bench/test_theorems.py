"""The problems of the theorems are what they say, and the committed records keep the bounds."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from bench.theorems.problem import Problem, descend
from bench.theorems.run import RESULT

PROBLEM = Problem.draw(3, m=3, n=12, d=5)


def loss(theta: torch.Tensor) -> torch.Tensor:
    t = torch.einsum("mnd,d->mn", torch.tensor(PROBLEM.A), theta) - torch.tensor(PROBLEM.b)
    return torch.tensor(PROBLEM.w) @ (t**2 / (1 + t**2)).mean(1)


def test_gradients_and_smoothness_are_those_of_the_losses() -> None:
    draw = np.random.default_rng(0)
    for scale in (0.1, 1.0, 10.0):
        theta = torch.tensor(scale * draw.standard_normal(5), requires_grad=True)
        (g,) = torch.autograd.grad(loss(theta), theta)
        np.testing.assert_allclose(PROBLEM.w @ PROBLEM.gradients(theta.detach().numpy()), g.numpy())
        assert PROBLEM.loss(theta.detach().numpy()) == pytest.approx(loss(theta).item())
        hessian = torch.autograd.functional.hessian(loss, theta.detach())
        assert torch.linalg.matrix_norm(hessian, 2) <= PROBLEM.smoothness


def test_every_step_lessens_the_weighted_loss() -> None:
    for rule in ("linear", "cagrad", "cagrad-clip"):
        losses = [step.loss for step in descend(PROBLEM, rule, 0.8, 60)]
        assert all(b <= a for a, b in pairwise(losses))
        assert losses[-1] < 0.9 * losses[0]


def test_criticality_is_the_shortest_combination() -> None:
    step = next(descend(PROBLEM, "cagrad-clip", 0.4, 1))
    p = np.random.default_rng(1).dirichlet(np.ones(3), 2000)
    lengths = np.einsum("ni,ij,nj->n", p, step.gram, p)
    assert step.criticality <= lengths.min()
    assert step.criticality > 0.9 * lengths.min()


def test_the_committed_records_keep_the_bounds() -> None:
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    assert max(record["worst"] for record in found["rates"]) <= 1.0
    of_two = [record for record in found["certificates"] if record["objectives"] == 2]
    assert of_two
    assert sum(record["smaller"] for record in of_two) == 0
