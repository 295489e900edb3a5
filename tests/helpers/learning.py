"""A few steps of `ClippedCAGradAdamW` on this process, one of those that share a problem."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from joined_batch import ADAMW, STEPS, WEIGHTS, C, Learnt, Pairs, Problem, batch, chosen, counts_of
from joined_batch import losses_of as mean_losses
from parallel_models import build, data_rank, laid_out, trained, whole
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import raco_fast


@dataclass(frozen=True)
class Course:
    """How a problem is learnt on several processes.

    Args:
        how: as in `parallel_models.laid_out`.
        mode: "autograd", "one_backward" or "gram_first".
        micro_batches: of a process and step.
        uneven: later processes have smaller shares of the batch.
        quiet: only the last micro-batch of a step may communicate (`no_sync`,
            `set_requires_gradient_sync`).
        prepare_last: after the model is laid out.
        constants: an objective without a label here has a loss without a graph.
        may_fall_back: to one backward pass for each objective, with a warning that says why.
        options: of the optimizer, beside the problem's.
    """

    how: str = "replicas"
    mode: str = "one_backward"
    micro_batches: int = 1
    uneven: bool = False
    quiet: bool = False
    prepare_last: bool = False
    constants: bool = False
    may_fall_back: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def share_of(pairs: Pairs, course: Course) -> Pairs:
    """This process's pairs of the joined batch."""
    rank, size = data_rank(course.how)
    total = pairs.labels.shape[1]
    weight = [2 * size - r if course.uneven else 1 for r in range(size + 1)]
    ends = [round(total * sum(weight[:r]) / sum(weight[:size])) for r in range(size + 1)]
    return chosen(pairs, slice(ends[rank], ends[rank + 1]))


def micro_batches(pairs: Pairs, count: int) -> list[Pairs]:
    """Some pairs in `count` parts, of which later ones may be smaller."""
    places = torch.arange(pairs.labels.shape[1]).chunk(count)
    return [chosen(pairs, slice(int(part[0]), int(part[-1]) + 1)) for part in places]


def own_losses(scores: Tensor, pairs: Pairs, joined: Pairs, course: Course) -> dict[str, Tensor]:
    """Losses whose average over the processes is the joined mean."""
    counts = [count / data_rank(course.how)[1] for count in counts_of(joined)]
    losses = mean_losses(scores, pairs, [max(count, 1e-9) for count in counts])
    if course.constants:
        present = dict(zip(WEIGHTS, pairs.labels.any(1).tolist(), strict=True))
        return {n: loss if present[n] else loss.detach() for n, loss in losses.items()}
    return losses


def optimizer_for(net: nn.Module, problem: Problem, course: Course) -> Any:
    """The optimizer of the parameters that are trained."""
    options = {**ADAMW, **problem.options, **course.options}
    return raco_fast.ClippedCAGradAdamW(trained(net).values(), weights=WEIGHTS, c=C, **options)


def set_up(problem: Problem, course: Course) -> tuple[nn.Module, Any]:
    """The model over all processes, prepared unless mode is "autograd", and its optimizer."""
    model = build(problem.model, problem.dtype)
    prepares = course.mode != "autograd"
    if prepares and not course.prepare_last:
        raco_fast.prepare(model)
    net = laid_out(model, course.how)
    if prepares and course.prepare_last:
        raco_fast.prepare(net)
    return net, optimizer_for(net, problem, course)


def quietly(net: nn.Module, quiet: bool) -> AbstractContextManager[Any]:
    """The wrapper's own reduction is put off."""
    if isinstance(net, DistributedDataParallel):
        return net.no_sync() if quiet else nullcontext()
    if hasattr(net, "set_requires_gradient_sync"):
        net.set_requires_gradient_sync(not quiet)
    return nullcontext()


def backward(net: nn.Module, opt: Any, joined: Pairs, course: Course) -> None:
    """The gradients of one step."""
    parts = micro_batches(share_of(joined, course), course.micro_batches)
    for k, part in enumerate(parts):
        with quietly(net, course.quiet and k + 1 < len(parts)):
            scores = net(part.ids)
            losses = own_losses(scores, part, joined, course)
            if course.mode == "autograd":
                opt.backward(losses)
            else:
                opt.backward(losses, scores=scores, mode=course.mode)


def learn(problem: Problem, course: Course, steps: int = STEPS) -> Learnt:
    """Train on this process's share of every step; a fallback is an error unless allowed."""
    net, opt = set_up(problem, course)
    grams, coefficients = [], []
    with warnings.catch_warnings():
        said = "ignore" if course.may_fall_back else "error"
        warnings.filterwarnings(said, message=".*one backward.*")
        for step in range(steps):
            backward(net, opt, batch(problem, step), course)
            opt.step()
            opt.zero_grad()
            grams.append(torch.as_tensor(opt.solution.gram).clone())
            coefficients.append(torch.as_tensor(opt.solution.coefficients).clone())
    return learnt(net, grams, coefficients)


def learnt(net: nn.Module, grams: list[Tensor], coefficients: list[Any]) -> Learnt:
    """Where this process has come to."""
    return Learnt({n: whole(p) for n, p in trained(net).items()}, grams, coefficients)
