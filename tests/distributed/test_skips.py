"""A gradient that is not finite on one process: all skip the step, and go on alike."""

from typing import NamedTuple

import pytest
import torch
from joined_batch import Problem, batch
from learning import Course, own_losses, set_up, share_of
from parallel_models import trained, whole
from quick_cases import matrix
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor

BAD_STEP = 1


class Step(NamedTuple):
    """After one step."""

    parameters: list[Tensor]
    skipped: int
    finite: bool
    scale: float


def spoil(opt, p: Tensor, value: float) -> None:
    """Overwrite one number of one objective's gradient on this process alone."""
    gradient = opt.gradients.of(p)["harmless"]
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    local.view(-1)[3] = value


def nan_on_rank_1(course: Course, in_loss: bool) -> list[Step]:
    problem, steps = Problem(), []
    net, opt = set_up(problem, course)
    for step in range(4):
        joined = batch(problem, step)
        own = share_of(joined, course)
        scores = net(own.ids)
        losses = own_losses(scores, own, joined, course)
        bad = step == BAD_STEP and dist.get_rank() == 1
        if bad and in_loss:
            losses["harmless"] = losses["harmless"] * torch.nan
        of_scores = {} if course.mode == "autograd" else {"scores": scores, "mode": course.mode}
        opt.backward(losses, **of_scores)
        if bad and not in_loss:
            spoil(opt, next(iter(trained(net).values())), torch.nan)
        opt.step()
        opt.zero_grad()
        parameters = [whole(p) for p in trained(net).values()]
        steps.append(Step(parameters, opt.skipped_steps, bool(opt.solution.finite), 1.0))
    return steps


def assert_all_skip_the_bad_step(found: list[list[Step]]) -> None:
    for of_rank in found:
        assert [step.skipped for step in of_rank] == [0, 1, 1, 1]
        assert [step.finite for step in of_rank] == [True, False, True, True]
        assert [step.scale for step in of_rank] == [step.scale for step in found[0]]
        for ours, same in zip(of_rank, found[0], strict=True):
            assert all(map(torch.equal, ours.parameters, same.parameters))
        good, bad, after, _ = of_rank
        assert all(map(torch.equal, good.parameters, bad.parameters))
        assert not any(map(torch.equal, bad.parameters, after.parameters))


@pytest.mark.parametrize(
    ("how", "mode"),
    matrix(
        ("replicas", "ddp", "fsdp2"),
        ("autograd", "one_backward", "gram_first"),
        quick=[("replicas", "autograd"), ("fsdp2", "one_backward"), ("fsdp2", "gram_first")],
    ),
)
def test_a_loss_that_is_nan(run, how: str, mode: str) -> None:
    assert_all_skip_the_bad_step(run(2, nan_on_rank_1, Course(how, mode), True))


@pytest.mark.parametrize(
    ("how", "mode"),
    matrix(
        ("replicas", "fsdp2"),
        ("autograd", "one_backward"),
        quick=[("replicas", "one_backward"), ("fsdp2", "autograd")],
    ),
)
def test_one_number_that_is_nan(run, how: str, mode: str) -> None:
    assert_all_skip_the_bad_step(run(2, nan_on_rank_1, Course(how, mode), False))


def scaled(course: Course, unscale: bool) -> list[Step]:
    problem, steps = Problem(dtype=torch.float32), []
    net, opt = set_up(problem, course)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        joined = batch(problem, step)
        own = share_of(joined, course)
        losses = own_losses(net(own.ids), own, joined, course)
        opt.backward({name: scaler.scale(loss) for name, loss in losses.items()})
        if step == BAD_STEP and dist.get_rank() == 1:
            spoil(opt, next(iter(trained(net).values())), torch.inf)
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        parameters = [whole(p) for p in trained(net).values()]
        finite = bool(opt.solution.finite)
        steps.append(Step(parameters, opt.skipped_steps, finite, scaler.get_scale()))
    return steps


@pytest.mark.parametrize(
    ("how", "unscale"),
    matrix(
        ("replicas", "ddp", "fsdp2"),
        (False, True),
        quick=[("replicas", True), ("fsdp2", False), ("fsdp2", True)],
    ),
)
def test_grad_scaler(run, how: str, unscale: bool) -> None:
    found = run(2, scaled, Course(how, "autograd"), unscale)
    assert [step.scale for step in found[0]] == [1024.0, 512.0, 512.0, 512.0]
    assert_all_skip_the_bad_step(found)
