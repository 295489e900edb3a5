"""G0 = Σ α_i g_i and AdamW along it, with the coefficients at hand.

`adamw` is torch's fused AdamW on one gradient: the price of one objective. `cat`, whose flattened
copy is made for its Gram, takes part in `step` only.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from bench.harness.cases import Case
from bench.harness.contest import Contest, contest_of_steps, our_calls
from bench.harness.problems import ADAMW, Weights
from bench.rivals.gradients import rivals
from raco_fast.backends import ops
from raco_fast.backends.plan import Plan
from raco_fast.backends.types import AdamWOptions, Update

NAME = "combine_adamw"
HELD = (1, 3)
MOVED = (1, 6)  # weights and two states are read and written
COEFFICIENTS = (0.6, 0.55, -0.25, 0.4, 1.2, 0.3, 0.8, 0.05)
BETA1, BETA2 = ADAMW["betas"]
_SHARED = {name: ADAMW[name] for name in ("lr", "eps", "weight_decay")}
OPTIONS = AdamWOptions(beta1=BETA1, beta2=BETA2, **_SHARED)


def contest(case: Case, skip: Sequence[str]) -> Contest:
    grads = case.gradients()
    params, exp_avgs, exp_avg_sqs = (case.random(seed) for seed in (100, 101, 102))
    steps = [torch.zeros(()) for _ in params]
    weights = Weights([nn.Parameter(p) for p in params], exp_avgs, exp_avg_sqs, steps)
    alpha = torch.tensor(COEFFICIENTS[: case.m], dtype=torch.float64)
    update = Update(params, grads, exp_avgs, exp_avg_sqs, [], steps, OPTIONS)
    ours = partial(ops.combine_adamw, update, alpha, Plan())
    calls = our_calls(case, torch.no_grad()(ours))  # as every optimizer's step runs
    for name, rival in rivals(case.m, (*skip, "cat")).items():
        calls[name] = torch.no_grad()(partial(rival.update, weights, grads, alpha.tolist()))
    return contest_of_steps(calls, weights, grads, alpha)
