"""Five steps on several processes end where one process ends on the joined batch."""

from typing import Any

import pytest
import torch
from joined_batch import Problem, assert_equal
from learning import Course, learn
from parallel_models import DDP
from processes import assert_all_failed
from quick_cases import matrix

MODES = ("autograd", "one_backward", "gram_first")
WAYS = ("replicas", *DDP, "fsdp2", "hsdp")
WORLD = {"hsdp": 4, "fsdp x tp": 4}


@pytest.mark.parametrize(
    ("how", "mode", "model"),
    matrix(
        WAYS,
        MODES,
        ("llama", "llama lora", "llama tied", "llama checkpointed"),
        quick=[
            ("replicas", "autograd", "llama"),
            ("replicas", "one_backward", "llama tied"),
            ("replicas", "gram_first", "llama"),
            ("replicas", "one_backward", "llama lora"),
            ("ddp", "autograd", "llama"),
            ("ddp", "one_backward", "llama"),
            ("ddp, buckets", "gram_first", "llama"),
            ("ddp, unused", "autograd", "llama tied"),
            ("ddp, static", "one_backward", "llama lora"),
            ("fsdp2", "autograd", "llama tied"),
            ("fsdp2", "one_backward", "llama tied"),
            ("fsdp2", "one_backward", "llama lora"),
            ("fsdp2", "one_backward", "llama checkpointed"),
            ("fsdp2", "gram_first", "llama tied"),
            ("hsdp", "one_backward", "llama"),
        ],
    ),
)
def test_equals_one_process(run, how: str, mode: str, model: str) -> None:
    problem, course = Problem(model), Course(how, mode)
    assert_equal(run(WORLD.get(how, 2), learn, problem, course), problem)


@pytest.mark.parametrize("model", ["perceptron", "perceptron with a plain layer"])
def test_tensor_parallel(run, model: str) -> None:
    """The norms' gradients are partial sums over pieces of the sequence."""
    problem = Problem(model)
    assert_equal(run(2, learn, problem, Course("tp", "autograd")), problem)


@pytest.mark.parametrize("mode", ["one_backward", "gram_first"])
def test_tensor_parallel_with_scores(run, mode: str) -> None:
    problem, course = Problem("perceptron"), Course("tp", mode, may_fall_back=True)
    assert_equal(run(2, learn, problem, course), problem)


def test_fsdp_of_tensor_parallel(run) -> None:
    problem = Problem("perceptron")
    assert_equal(run(4, learn, problem, Course("fsdp x tp", "autograd")), problem)


def test_a_layer_that_tensor_parallelism_leaves_out_is_refused_under_fsdp(outcomes) -> None:
    """Nothing says that the other half of the processes has the same batch."""
    problem = Problem("perceptron with a plain layer")
    found = outcomes(4, learn, problem, Course("fsdp x tp", "autograd"))
    assert_all_failed(found, "ValueError", "4 processes for a DTensor of shape .* on a mesh of 2")


@pytest.mark.parametrize(
    ("how", "mode"),
    matrix(
        ("replicas", "fsdp2"),
        MODES,
        quick=[("replicas", "one_backward"), ("fsdp2", "one_backward")],
    ),
)
def test_float32(run, how: str, mode: str) -> None:
    problem = Problem(dtype=torch.float32)
    assert_equal(run(2, learn, problem, Course(how, mode)), problem)


@pytest.mark.parametrize(
    ("how", "mode"),
    matrix(
        ("replicas", "ddp", "fsdp2"),
        MODES,
        quick=[("replicas", "one_backward"), ("fsdp2", "one_backward")],
    ),
)
def test_four_processes_with_uneven_shares(run, how: str, mode: str) -> None:
    problem = Problem("llama tied", pairs=11)
    assert_equal(run(4, learn, problem, Course(how, mode, uneven=True)), problem)


@pytest.mark.parametrize(
    ("how", "mode"),
    matrix(("ddp", "fsdp2"), ("one_backward", "gram_first"), quick=[("fsdp2", "one_backward")]),
)
def test_prepared_after_it_was_laid_out(run, how: str, mode: str) -> None:
    problem = Problem("llama tied")
    assert_equal(run(2, learn, problem, Course(how, mode, prepare_last=True)), problem)


@pytest.mark.parametrize(
    ("labels", "how", "mode"),
    matrix(
        ("none of one objective", "none"),
        ("replicas", "ddp", "fsdp2"),
        MODES,
        quick=[
            ("none of one objective", "replicas", "one_backward"),
            ("none of one objective", "fsdp2", "one_backward"),
            ("none", "replicas", "one_backward"),
            ("none", "ddp", "autograd"),
            ("none", "fsdp2", "autograd"),
            ("none", "fsdp2", "one_backward"),
            ("none", "fsdp2", "gram_first"),
        ],
    ),
)
def test_a_process_without_labels(run, labels: str, how: str, mode: str) -> None:
    problem = Problem(labels=labels)
    course = Course(how, mode, constants=mode != "autograd")
    assert_equal(run(2, learn, problem, course), problem)


OPTIONS: dict[str, dict[str, Any]] = {
    "max_grad_norm": {"max_grad_norm": 0.05},
    "max_grad_norm, inactive": {"max_grad_norm": 1e3},
    "amsgrad": {"amsgrad": True},
    "rule with losses": {"rule": "mgda-decoupled"},
    "rule with memory": {"rule": "gradvac"},
}


@pytest.mark.parametrize(
    ("name", "how", "mode"),
    matrix(
        tuple(OPTIONS),
        ("replicas", "fsdp2"),
        MODES,
        quick=[
            ("max_grad_norm", "replicas", "one_backward"),
            ("max_grad_norm", "fsdp2", "autograd"),
            ("amsgrad", "fsdp2", "one_backward"),
            ("rule with losses", "replicas", "autograd"),
            ("rule with losses", "fsdp2", "gram_first"),
            ("rule with memory", "fsdp2", "one_backward"),
        ],
    ),
)
def test_options(run, name: str, how: str, mode: str) -> None:
    problem = Problem("llama lora", options=OPTIONS[name])
    assert_equal(run(2, learn, problem, Course(how, mode)), problem)
