"""Five steps on several processes end where one process ends on the joined batch."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from joined_batch import Problem, assert_equal
from learning import Course, learn
from parallel_models import DDP

MODES = ("autograd", "one_backward", "gram_first")
EVERYWHERE = ("replicas", *DDP, "fsdp2", "hsdp")
TENSOR_PARALLEL = ("tp", "fsdp x tp")
WORLD = {"hsdp": 4, "fsdp x tp": 4}


def cases() -> Iterator[Any]:
    """Every mode and way to lay a model out; the quick ones have each mode, way and model."""
    quick = {
        ("replicas", "autograd", "llama"),
        ("replicas", "one_backward", "llama"),
        ("replicas", "gram_first", "llama"),
        ("replicas", "one_backward", "llama lora"),
        *((how, "autograd", "llama") for how in DDP),
        ("ddp", "one_backward", "llama"),
        ("ddp, static", "one_backward", "llama lora"),
        ("ddp, buckets", "gram_first", "llama"),
        ("fsdp2", "autograd", "llama"),
        ("fsdp2", "one_backward", "llama"),
        ("fsdp2", "one_backward", "llama lora"),
        ("fsdp2", "gram_first", "llama"),
        ("hsdp", "one_backward", "llama"),
    }
    for how in EVERYWHERE:
        for mode in MODES:
            for model in ("llama", "llama lora", "llama tied", "llama checkpointed"):
                slow = [] if (how, mode, model) in quick else [pytest.mark.slow]
                yield pytest.param(how, mode, model, marks=slow, id=f"{how}-{mode}-{model}")


@pytest.mark.parametrize(("how", "mode", "model"), list(cases()))
def test_equals_one_process(run, how: str, mode: str, model: str) -> None:
    problem, course = Problem(model), Course(how, mode)
    assert_equal(run(WORLD.get(how, 2), learn, problem, course), problem)


@pytest.mark.parametrize("how", TENSOR_PARALLEL)
def test_tensor_parallel_equals_one_process(run, how: str) -> None:
    """Mode "autograd"; the norms' gradients are partial sums over pieces of the sequence."""
    problem, course = Problem("perceptron"), Course(how, "autograd")
    assert_equal(run(WORLD.get(how, 2), learn, problem, course), problem)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["replicas", "fsdp2"])
def test_float32(run, how: str, mode: str) -> None:
    problem = Problem(dtype=torch.float32)
    assert_equal(run(2, learn, problem, Course(how, mode)), problem)


@pytest.mark.parametrize(
    ("how", "mode"),
    [
        ("replicas", "one_backward"),
        ("fsdp2", "one_backward"),
        pytest.param("ddp", "autograd", marks=pytest.mark.slow),
        pytest.param("fsdp2", "autograd", marks=pytest.mark.slow),
        pytest.param("fsdp2", "gram_first", marks=pytest.mark.slow),
        pytest.param("replicas", "gram_first", marks=pytest.mark.slow),
    ],
)
def test_four_processes_with_uneven_shares(run, how: str, mode: str) -> None:
    problem = Problem("llama tied", pairs=11)
    assert_equal(run(4, learn, problem, Course(how, mode, uneven=True)), problem)


@pytest.mark.parametrize("mode", ["one_backward", "gram_first"])
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_prepared_after_it_was_laid_out(run, how: str, mode: str) -> None:
    problem = Problem("llama tied")
    assert_equal(run(2, learn, problem, Course(how, mode, prepare_last=True)), problem)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["replicas", "ddp", "fsdp2"])
@pytest.mark.parametrize("labels", ["none of one objective", "none"])
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


@pytest.mark.parametrize("how", ["replicas", "fsdp2"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(run, how: str, name: str) -> None:
    problem = Problem("llama lora", options=OPTIONS[name])
    assert_equal(run(2, learn, problem, Course(how)), problem)
