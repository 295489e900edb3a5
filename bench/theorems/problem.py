"""Smooth nonconvex objectives whose smoothness is known, and gradient descent on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raco_fast.solver.dual import solve_dual

Array = NDArray[Any]
_CURVATURE = 2.0
"""The largest |φ''| of φ(t) = t² / (1 + t²), at t = 0."""


@dataclass(frozen=True)
class Problem:
    """L_i(θ) = mean over rows a of φ(a·θ − b), φ(t) = t² / (1 + t²): robust least squares.

    L_i >= 0, and its Hessian is at most 2 λ_max(A'A / n) in norm.

    Args:
        A: [m, n, d] rows of each objective.
        b: [m, n] targets.
        w: [m] weights on the simplex.
    """

    A: Array
    b: Array
    w: Array

    @staticmethod
    def draw(seed: int, m: int, n: int = 30, d: int = 20) -> Problem:
        """Objectives with different solutions, weights that are not equal."""
        rng = np.random.default_rng(seed)
        A = rng.standard_normal((m, n, d)) * rng.uniform(0.5, 2.0, (m, 1, 1))
        solutions = rng.standard_normal((m, d))
        b = np.einsum("mnd,md->mn", A, solutions) + 0.1 * rng.standard_normal((m, n))
        return Problem(A, b, rng.dirichlet(np.full(m, 2.0)))

    @property
    def smoothness(self) -> float:
        """An ℓ_w: the weighted sum's gradient is Lipschitz with it."""
        of_each = [np.linalg.eigvalsh(A.T @ A / len(A))[-1] for A in self.A]
        return _CURVATURE * float(self.w @ np.array(of_each))

    def loss(self, theta: Array) -> float:
        """L_w."""
        t = np.einsum("mnd,d->mn", self.A, theta) - self.b
        return float(self.w @ (t**2 / (1 + t**2)).mean(1))

    def gradients(self, theta: Array) -> Array:
        """[m, d]."""
        t = np.einsum("mnd,d->mn", self.A, theta) - self.b
        return np.einsum("mn,mnd->md", 2 * t / (1 + t**2) ** 2, self.A) / self.A.shape[1]


@dataclass(frozen=True)
class Step:
    """What is seen before an update.

    Args:
        loss: L_w(θ_t).
        gram: [m, m] of the objectives' gradients.
        criticality: M(θ_t)², the squared length of their shortest convex combination.
    """

    loss: float
    gram: Array
    criticality: float


def descend(problem: Problem, rule: str, c: float, steps: int) -> Iterator[Step]:
    """Gradient descent θ ← θ − η G0 with η = 1/ℓ_w, the longest step that Theorem 3.1 allows."""
    theta, rate = np.zeros(problem.A.shape[2]), 1 / problem.smoothness
    for _ in range(steps):
        G = problem.gradients(theta)
        gram = G @ G.T
        shortest = np.asarray(solve_dual(gram, problem.w, c, "mgda").coefficients)
        yield Step(problem.loss(theta), gram, float(shortest @ gram @ shortest))
        theta = theta - rate * np.asarray(solve_dual(gram, problem.w, c, rule).coefficients) @ G
