"""A whole optimizer step with the gradients at hand: Gram, dual problem, combination, AdamW.

All solve the dual problem with `solve_dual`, except `capturable`, our step that never waits for the
device (m <= 2, CUDA only), and `products kept`, our step behind a pass of mode `one_backward`
(CPU only): the products were taken as the gradients were written, in time that is the backward
pass's and stands in the suites `backward` and `train`. `adamw` is torch's fused AdamW on one
gradient: the price of one.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

import raco_fast
from bench.harness.cases import Case
from bench.harness.contest import Contest, contest_of_steps, our_calls
from bench.harness.problems import ADAMW, Tensors, Weights, exact_gram
from bench.harness.records import OURS
from bench.rivals.gradients import Rival, rivals
from raco_fast import ClippedCAGradAdamW, solve_dual
from raco_fast.backends.plan import Plan
from raco_fast.gradients.accumulation import Accumulation
from raco_fast.gradients.buffer_pool import HostMemory
from raco_fast.gradients.products_of_pass import ProductsOfPass
from raco_fast.solver.on_device import MAX_OBJECTIVES

NAME = "step"
HELD = (2, 3)  # gradients with products lie in memory of their own
MOVED = (2, 6)  # the gradients for the Gram, and again for the update
C = 0.4
STATES = ("exp_avg", "exp_avg_sq", "step")


def contest(case: Case, skip: Sequence[str]) -> Contest:
    grads = case.gradients()
    params = [nn.Parameter(p) for p in case.random(100)]
    ours = optimizer(params, grads)
    calls = our_calls(case, ours.step)
    calls[OURS]()  # makes the states, which all others share
    states = [ours.state[p] for p in params]
    exp_avgs, exp_avg_sqs, steps = ([state[k] for state in states] for k in STATES)
    if case.device.type == "cuda" and case.m <= MAX_OBJECTIVES:
        twins = [nn.Parameter(p.detach()) for p in params]
        capturable = optimizer(twins, grads, capturable=True)
        for p, m, v in zip(twins, exp_avgs, exp_avg_sqs, strict=True):
            steps.append(torch.zeros((), device=case.device))
            capturable.state[p] = dict(zip(STATES, (m, v, steps[-1]), strict=True))
        calls["capturable"] = our_calls(case, capturable.step)[OURS]
    if case.device.type == "cpu":
        twins = [nn.Parameter(p.detach()) for p in params]
        kept = optimizer_with_products(twins, grads)
        for p, m, v in zip(twins, exp_avgs, exp_avg_sqs, strict=True):
            steps.append(torch.zeros(()))
            kept.state[p] = dict(zip(STATES, (m, v, steps[-1]), strict=True))
        calls["products kept"] = our_calls(case, kept.step)[OURS]
    weights = Weights(params, exp_avgs, exp_avg_sqs, steps)
    for name, rival in rivals(case.m, skip).items():
        calls[name] = torch.no_grad()(partial(step, rival, weights, grads))
    return contest_of_steps(calls, weights, grads, coefficients(exact_gram(grads)))


def optimizer(
    params: Sequence[nn.Parameter], grads: Sequence[Tensors], capturable: bool = False
) -> ClippedCAGradAdamW:
    """Ours, with the gradients as if backward passes had left them."""
    opt = ClippedCAGradAdamW(params, **ADAMW, weights=equal(len(grads)), c=C, capturable=capturable)
    for name, one in zip(opt.objective_names, grads, strict=True):
        with opt.objective(name):
            for p, g in zip(params, one, strict=True):
                p.grad = g
    return opt


@raco_fast.backend("cpu")
def optimizer_with_products(
    params: Sequence[nn.Parameter], grads: Sequence[Tensors]
) -> ClippedCAGradAdamW:
    """Ours, with copies of the gradients as if one pass over all objectives had written them."""
    opt = ClippedCAGradAdamW(params, **ADAMW, weights=equal(len(grads)), c=C)
    products = ProductsOfPass(dict.fromkeys(params, 1), Plan(), last=True)
    into = Accumulation([], opt.objective_names, HostMemory(), products)
    for p, column in zip(params, zip(*grads, strict=True), strict=True):
        for target, g in zip(into.buffers(p)[0], column, strict=True):
            target.copy_(g)
        into.filled({p: None})
    into.finish()
    into.store()
    opt.gradients.note_all_ran()
    return opt


def step(rival: Rival, weights: Weights, grads: Sequence[Tensors]) -> None:
    rival.update(weights, grads, coefficients(rival.gram(grads)).tolist())


def coefficients(M: Tensor) -> Tensor:
    return torch.as_tensor(solve_dual(M, equal(len(M)), C).coefficients)


def equal(m: int) -> list[float]:
    return [1.0 / m] * m
