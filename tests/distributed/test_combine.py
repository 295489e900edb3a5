"""`combine` and `gram_first` on several processes, with another torch optimizer's step."""

import pytest
import torch
from joined_batch import ADAMW, SGD, STEPS, WEIGHTS, C, Learnt, Problem, assert_equal, batch
from learning import Course, learnt, own_losses, set_up, share_of
from parallel_models import trained, whole
from processes import assert_all_failed
from quick_cases import matrix

import raco_fast


def by_another_optimizer(problem: Problem, course: Course) -> Learnt:
    net, _ = set_up(problem, course)
    params = list(trained(net).values())
    gradients = raco_fast.ObjectiveGradients(params, WEIGHTS)
    limit = problem.options.get("max_grad_norm")
    sgd = problem.optimizer == "sgd"
    optimizer = torch.optim.SGD(params, **SGD) if sgd else torch.optim.AdamW(params, **ADAMW)
    grams, coefficients = [], []
    for step in range(STEPS):
        joined = batch(problem, step)
        own = share_of(joined, course)
        scores = net(own.ids)
        losses = own_losses(scores, own, joined, course)
        if course.mode == "gram_first":
            solution = raco_fast.gram_first(gradients, losses, scores, c=C, max_grad_norm=limit)
        else:
            given = None if course.mode == "autograd" else scores
            gradients.backward(losses, scores=given)
            solution = raco_fast.combine(gradients, c=C, max_grad_norm=limit)
        optimizer.step()
        optimizer.zero_grad()
        grams.append(torch.as_tensor(solution.gram))
        coefficients.append(solution.coefficients)
    return learnt(net, grams, coefficients)


@pytest.mark.parametrize(
    ("how", "mode"),
    matrix(
        ("replicas", "ddp", "fsdp2"),
        ("autograd", "one_backward", "gram_first"),
        quick=[
            ("replicas", "one_backward"),
            ("ddp", "gram_first"),
            ("fsdp2", "autograd"),
            ("fsdp2", "gram_first"),
        ],
    ),
)
def test_adamw(run, how: str, mode: str) -> None:
    problem = Problem("llama tied", options={"max_grad_norm": 0.5})
    assert_equal(run(2, by_another_optimizer, problem, Course(how, mode)), problem)


@pytest.mark.parametrize("how", ["replicas", "fsdp2"])
def test_sgd(run, how: str) -> None:
    problem = Problem("llama lora", optimizer="sgd")
    assert_equal(run(2, by_another_optimizer, problem, Course(how)), problem)


def unscaled(problem: Problem, course: Course, in_time: bool) -> torch.Tensor:
    """The norm of a direction that is clipped to 0.1, of losses that a GradScaler has scaled."""
    net, _ = set_up(problem, course)
    params = list(trained(net).values())
    gradients = raco_fast.ObjectiveGradients(params, WEIGHTS)
    optimizer, scaler = torch.optim.SGD(params), torch.amp.GradScaler("cpu", init_scale=8.0)
    own = share_of(batch(problem, 0), course)
    scores = net(own.ids)
    losses = own_losses(scores, own, batch(problem, 0), course)
    gradients.backward({name: scaler.scale(loss) for name, loss in losses.items()}, scores=scores)
    if in_time:
        scaler.unscale_(optimizer)
    raco_fast.combine(gradients, c=C, max_grad_norm=0.1)
    scaler.step(optimizer)
    return torch.stack([whole(p.grad).norm() for p in params]).norm()


@pytest.mark.parametrize(("how", "in_time"), [("fsdp2", True), ("replicas", True), ("ddp", False)])
def test_a_clipped_direction_of_scaled_losses(run, how: str, in_time: bool) -> None:
    for norm in run(2, unscaled, Problem(), Course(how), in_time):
        assert abs(float(norm) - 0.1) < 1e-5


def test_shards_that_are_unscaled_too_late(outcomes) -> None:
    found = outcomes(2, unscaled, Problem(), Course("fsdp2"), False)
    assert_all_failed(found, "RuntimeError", r"call scaler.unscale_\(optimizer\) before combine")
