"""A small alignment problem whose joined batch is known to every process, and its truth.

The truth is one process on the joined batch: `torch.autograd.grad` for each objective, their Gram
matrix and combination in one long vector, `solve_dual`, and `torch.optim.AdamW`. It uses neither
the optimizer nor a backend of the package.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from parallel_models import VOCABULARY, build, trained
from torch import Tensor

import raco_fast

WEIGHTS = {"helpful": 0.5, "harmless": 0.3, "concise": 0.2}
C = 0.4
STEPS = 5
SGD = {"lr": 1e-3, "momentum": 0.8, "weight_decay": 0.1}
LENGTH = 8  # of a sequence, in tokens
ADAMW = {"lr": 1e-3, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
"""eps is of the size of gradients: a direction that is wrong by a factor shows, and one number's
rounding error is not blown up to a whole step."""


@dataclass(frozen=True)
class Problem:
    """What is learnt, however many processes learn it.

    Args:
        model: a name of `parallel_models.build`.
        labels: "all" pairs have one for every objective; "some", unevenly over the batch;
            "none of one objective": the second half of the batch has none for the first objective;
            "none": in odd steps it has none at all.
        pairs: of a step.
        optimizer: "adamw" or "sgd".
        options: of the optimizer, beside `ADAMW`: rule, max_grad_norm, amsgrad, metric.
    """

    model: str = "llama"
    dtype: torch.dtype = torch.float64
    labels: str = "some"
    pairs: int = 8
    optimizer: str = "adamw"
    options: dict[str, Any] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash(repr(self))


class Pairs(NamedTuple):
    """Some pairs of a step."""

    ids: Tensor  # [2P, LENGTH]: P responses a, then P responses b
    labels: Tensor  # [m, P] in {-1, 0, 1}


def batch(problem: Problem, step: int) -> Pairs:
    """The joined batch: objectives agree on its first pairs and conflict on its last."""
    generator = torch.Generator().manual_seed(100 + step)
    P, m = problem.pairs, len(WEIGHTS)
    ids = torch.randint(0, VOCABULARY, (2 * P, LENGTH), generator=generator)
    labels = torch.ones(m, P)
    labels[0] = torch.where(torch.rand(P, generator=generator) < 0.5, -1.0, 1.0)
    for i in range(1, m):
        conflict = torch.rand(P, generator=generator) < torch.linspace(0.1, 0.95, P)
        labels[i] = torch.where(conflict, -labels[0], labels[0])
    if problem.labels == "some":
        kept = torch.rand(m, P, generator=generator) < torch.linspace(0.9, 0.3, P)
        kept[:, 0] = True
        labels = labels * kept
    elif problem.labels == "none of one objective":
        labels[0, P // 2 :] = 0.0
    elif problem.labels == "none" and step % 2:
        labels[:, P // 2 :] = 0.0
    return Pairs(ids, labels)


def chosen(pairs: Pairs, which: slice) -> Pairs:
    """Some of the pairs."""
    rows = torch.arange(pairs.labels.shape[1])
    both = torch.cat([rows[which], rows[which] + len(rows)])
    return Pairs(pairs.ids[both], pairs.labels[:, which])


def losses_of(scores: Tensor, pairs: Pairs, counts: Sequence[float]) -> dict[str, Tensor]:
    """Each objective's DPO loss, a sum over labelled pairs divided by its count."""
    P = pairs.labels.shape[1]
    margin = scores[:P] - scores[P:]
    losses = {}
    for i, (name, label) in enumerate(zip(WEIGHTS, pairs.labels.to(margin), strict=True)):
        each = -(1 + i / 2) * F.logsigmoid(0.3 * label * margin)
        losses[name] = (each * label.abs()).sum() / counts[i]
    return losses


def counts_of(pairs: Pairs) -> list[float]:
    """How many pairs each objective has a label for."""
    return pairs.labels.abs().sum(1).tolist()


class Learnt(NamedTuple):
    """Where a run has come to."""

    parameters: dict[str, Tensor]
    grams: list[Tensor]  # [m, m] float64, of every step
    coefficients: list[Any]  # [m] float64, of every step


@cache
def truth(problem: Problem, steps: int = STEPS) -> Learnt:
    """One process on the joined batch, in float64."""
    return plain(problem, torch.float64, steps)


def plain(problem: Problem, dtype: torch.dtype, steps: int = STEPS) -> Learnt:
    """One process on the joined batch, in plain torch at `dtype`."""
    options = dict(problem.options)
    rule, limit = options.pop("rule", "cagrad-clip"), options.pop("max_grad_norm", None)
    metric = options.pop("metric", "euclidean")
    model = build(problem.model, problem.dtype).to(dtype)
    params = trained(model)
    if problem.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(params.values(), **SGD)
    else:
        optimizer = torch.optim.AdamW(params.values(), **ADAMW, **options)
    grams, coefficients, state = [], [], None
    for step in range(steps):
        pairs = batch(problem, step)
        losses = list(losses_of(model(pairs.ids), pairs, counts_of(pairs)).values())
        G = torch.stack([_gradient(loss, list(params.values())) for loss in losses])
        R = G if metric == "euclidean" or step == 0 else G * _roots(params.values(), optimizer)
        solution = raco_fast.solve_dual(
            R @ R.T, WEIGHTS, C, rule, losses=[float(x.detach()) for x in losses], state=state
        )
        state = solution.state
        direction = torch.as_tensor(solution.coefficients).to(G) @ G
        if limit is not None:
            direction *= min(1.0, limit / (float(direction.norm()) + 1e-6))
        parts = direction.split([p.numel() for p in params.values()])
        for p, part in zip(params.values(), parts, strict=True):
            p.grad = part.view_as(p)
        optimizer.step()
        grams.append((G @ G.T).double())
        coefficients.append(torch.as_tensor(solution.coefficients))
    return Learnt({name: p.detach() for name, p in params.items()}, grams, coefficients)


def _roots(params: Iterable[Tensor], optimizer: torch.optim.Optimizer) -> Tensor:
    """1 / √(√v̂ + eps) of the state before a step, and 0 where v is."""
    (group,), found = optimizer.param_groups, []
    for p in params:
        state = optimizer.state[p]
        v = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
        found.append(((v > 0) * (v.sqrt() + group["eps"]) ** -0.5).flatten())
    return torch.cat(found)


def _gradient(loss: Tensor, params: Sequence[Tensor]) -> Tensor:
    grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten()
                      for p, g in zip(params, grads, strict=True)])  # fmt: skip


def assert_equal(found: Sequence[Learnt], problem: Problem, steps: int = STEPS) -> None:
    """All ranks have the same bits, which are the truth's parameters and Gram matrices."""
    exact = truth(problem, steps)
    narrow = problem.dtype == torch.float32
    for learnt in found:
        for name, p in learnt.parameters.items():
            assert torch.equal(p, found[0].parameters[name]), f"ranks differ in {name}"
        assert learnt.parameters.keys() == exact.parameters.keys()
        for ours, same in zip(learnt.grams, found[0].grams, strict=True):
            assert torch.equal(ours, same), "ranks differ in their Gram matrices"
    for gram, true in zip(found[0].grams, exact.grams, strict=True):
        error = float((gram - true).abs().max() / true.abs().max())
        assert error < (1e-5 if narrow else 1e-12), f"Gram matrix off by {error:.1e}"
    for name, p in found[0].parameters.items():
        error = float((p.double() - exact.parameters[name]).abs().max())
        assert error < (1e-6 if narrow else 1e-12), f"{name} off by {error:.1e}"
