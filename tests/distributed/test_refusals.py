"""What would be silently wrong on several processes is an error on all of them, and none hangs."""

import pytest
import torch
from joined_batch import ADAMW, WEIGHTS, C, Problem, batch
from learning import Course, backward, set_up
from parallel_models import build, trained
from processes import assert_all_failed
from quick_cases import matrix
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import raco_fast


def step(course: Course, **changes) -> None:
    """One step, where process 1 has `changes` made to its optimizer."""
    net, opt = set_up(Problem(), course)
    for name, value in changes.items() if dist.get_rank() == 1 else ():
        setattr(opt, name, value)
    backward(net, opt, batch(Problem(), 0), course)
    opt.step()


CHANGES = {
    "weights": {"helpful": 0.2, "harmless": 0.6, "concise": 0.2},
    "c": 0.3,
    "rule": "linear",
    "max_grad_norm": 1.0,
}


def step_with_a_change(course: Course, name: str) -> None:
    step(course, **{name: CHANGES[name]})


@pytest.mark.parametrize(
    ("name", "how"),
    matrix(
        tuple(CHANGES),
        ("replicas", "fsdp2"),
        quick=[("weights", "replicas"), ("c", "fsdp2"), ("rule", "fsdp2")],
    ),
)
def test_settings_that_differ(outcomes, name: str, how: str) -> None:
    found = outcomes(2, step_with_a_change, Course(how), name)
    assert_all_failed(found, "RuntimeError", "settings of the optimizer must be the same")


def replicas_that_begin_differently(mode: str) -> None:
    course = Course("replicas", mode)
    net, opt = set_up(Problem(), course)
    if dist.get_rank() == 1:
        with torch.no_grad():
            list(trained(net).values())[3].view(-1)[7] += 1e-3
    backward(net, opt, batch(Problem(), 0), course)
    opt.step()


@pytest.mark.parametrize("mode", ["autograd", "gram_first"])
def test_replicas_that_begin_differently(outcomes, mode: str) -> None:
    found = outcomes(2, replicas_that_begin_differently, mode)
    assert_all_failed(found, "RuntimeError", "must begin with the same values")


def parameters_of_their_own(shapes: list[list[tuple[int, ...]]]) -> None:
    """A step on parameters of the shapes that this process has."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes[dist.get_rank()]]
    opt = raco_fast.ClippedCAGradAdamW(params, weights=[0.5, 0.5])
    squares = torch.stack([p.square().sum() for p in params]).sum()
    opt.backward([squares, 2 * squares.sqrt()])
    opt.step()


@pytest.mark.parametrize(
    "shapes",
    [
        [[(4, 6)], [(6, 3)]],
        [[(4, 6)], [(4, 6), (5,)]],
        [[(4, 6)], [(6, 4)]],
        [[(2, 2), (3, 3)], [(3, 3), (2, 2)]],
    ],
    ids=["stages of a pipeline", "one more", "another shape", "another order"],
)
def test_parameters_that_are_not_the_same_ones(outcomes, shapes) -> None:
    found = outcomes(2, parameters_of_their_own, shapes)
    assert_all_failed(found, "RuntimeError", "pipeline")


def fsdp1() -> None:
    net = FullyShardedDataParallel(
        build("perceptron"), device_id=torch.device("cpu"), use_orig_params=True
    )
    opt = raco_fast.ClippedCAGradAdamW(net.parameters(), weights=WEIGHTS, c=C, **ADAMW)
    problem, course = Problem("perceptron"), Course(mode="autograd")
    backward(net, opt, batch(problem, 0), course)
    opt.step()


def test_fsdp1(outcomes) -> None:
    assert_all_failed(outcomes(2, fsdp1), "RuntimeError", "fully_shard")


def partitioned_by_deepspeed() -> None:
    net = build()
    for p in net.parameters():
        p.ds_tensor = p.detach()  # what ZeRO stage 3 leaves of a parameter
    opt = raco_fast.ClippedCAGradAdamW(net.parameters(), weights=WEIGHTS, c=C)
    backward(net, opt, batch(Problem(), 0), Course(mode="autograd"))


def test_zero_stage_3(outcomes) -> None:
    assert_all_failed(outcomes(2, partitioned_by_deepspeed), "RuntimeError", "ZeRO stage 3.*FSDP2")


def sharded_over_half_of_the_group() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "shard"))
    net = build()
    fully_shard(net, mesh=mesh["shard"])
    opt = raco_fast.ClippedCAGradAdamW(net.parameters(), weights=WEIGHTS, c=C)
    step = mesh.get_local_rank("data")  # each half has a batch of its own
    backward(net, opt, batch(Problem(), step), Course("fsdp2", "autograd"))
    opt.step()


def test_halves_that_nobody_averages(outcomes) -> None:
    found = outcomes(4, sharded_over_half_of_the_group)
    assert_all_failed(found, "RuntimeError", "other dimension of their mesh")


def sharded_over_two() -> None:
    mesh = DeviceMesh("cpu", [0, 1])
    net = build()
    if dist.get_rank() < 2:
        fully_shard(net, mesh=mesh)
    opt = raco_fast.ClippedCAGradAdamW(net.parameters(), weights=WEIGHTS, c=C)
    for name in WEIGHTS:
        with opt.objective(name):
            for p in net.parameters():
                p.grad = torch.ones_like(p)
    opt.step()


def test_a_mesh_that_does_not_fit_into_the_group(outcomes) -> None:
    *inside, outside = outcomes(3, sharded_over_two)
    assert_all_failed(inside, "ValueError", "3 processes for a DTensor .* mesh of 2")
    assert_all_failed([outside], "OtherProcessError", "process 0 of 3 has failed.* mesh of 2")


def gram_first_with(how: str, **options) -> None:
    course = Course(how, "gram_first")
    net, opt = set_up(Problem(), course)
    scores = net(batch(Problem(), 0).ids)
    losses = dict.fromkeys(WEIGHTS, scores.sum())
    opt.backward(losses, scores=scores, mode="gram_first", **options)


def step_in_backward(how: str) -> None:
    gram_first_with(how, step_in_backward=True)


@pytest.mark.parametrize("how", ["replicas", "fsdp2"])
def test_step_in_backward(outcomes, how: str) -> None:
    found = outcomes(2, step_in_backward, how)
    assert_all_failed(found, "ValueError", "step_in_backward")


def keep_dy(how: str) -> None:
    gram_first_with(how, keep_dy=True)


def test_keep_dy_of_shards(outcomes) -> None:
    assert_all_failed(outcomes(2, keep_dy, "fsdp2"), "ValueError", "keep_dy")


def an_error_on_rank_1(course: Course) -> None:
    net, opt = set_up(Problem(), course)
    joined = batch(Problem(), 0)
    scores = net(joined.ids)
    losses = dict.fromkeys(WEIGHTS, scores.sum())
    if dist.get_rank() == 1:
        del losses["concise"]
    of_scores = {} if course.mode == "autograd" else {"scores": scores, "mode": course.mode}
    opt.backward(losses, **of_scores)
    opt.step()


@pytest.mark.parametrize(
    ("how", "mode"),
    matrix(
        ("replicas", "fsdp2"),
        ("autograd", "one_backward", "gram_first"),
        quick=[("replicas", "autograd"), ("fsdp2", "one_backward"), ("fsdp2", "gram_first")],
    ),
)
def test_an_error_on_one_stops_all(outcomes, how: str, mode: str) -> None:
    other, own = outcomes(2, an_error_on_rank_1, Course(how, mode))
    assert own.kind == "ValueError"
    assert "concise" in own.message
    assert other.kind == "OtherProcessError"
    assert "process 1" in other.message
    assert "concise" in other.message
