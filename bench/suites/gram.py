"""The Gram matrix of m gradients, as the optimizer asks for it: m² numbers on the host."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from bench.harness.cases import Case
from bench.harness.contest import Contest, our_calls
from bench.harness.problems import Tensors, exact_gram, gram_error
from bench.rivals.gradients import Rival, rivals
from raco_fast.backends import ops
from raco_fast.backends.plan import Plan

NAME = "gram"
HELD = (1, 0)
MOVED = (1, 0)


def contest(case: Case, skip: Sequence[str]) -> Contest:
    grads = case.gradients()
    truth = exact_gram(grads)
    calls = our_calls(case, partial(ops.gram, grads, Plan()))
    for name, rival in rivals(case.m, skip).items():
        calls[name] = partial(gram, rival, grads)
    return Contest(calls, lambda name: gram_error(calls[name](), truth), tolerance=1e-5)


def gram(rival: Rival, grads: Sequence[Tensors]) -> Tensor:
    M = rival.gram(grads)
    rival.forget()
    return M
