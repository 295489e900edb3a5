"""Micro-batches: however a step's pairs are divided, and whenever processes communicate."""

import pytest
from joined_batch import Problem, assert_equal
from learning import Course, learn
from processes import assert_all_failed
from quick_cases import matrix

SOME = ("replicas", "ddp", "fsdp2")
SCORED = ("autograd", "one_backward")


@pytest.mark.parametrize(
    ("world", "micro", "how", "mode"),
    matrix(
        (1, 2, 4),
        (1, 2, 4, 8),
        SOME,
        SCORED,
        quick=[
            (1, 8, "replicas", "one_backward"),
            (2, 4, "replicas", "one_backward"),
            (2, 4, "ddp", "autograd"),
            (2, 4, "fsdp2", "one_backward"),
            (2, 2, "fsdp2", "autograd"),
        ],
    ),
)
def test_is_the_joined_batch(run, world: int, micro: int, how: str, mode: str) -> None:
    if world * micro > 8:
        pytest.skip("more micro-batches than pairs")
    problem = Problem("llama tied")
    assert_equal(run(world, learn, problem, Course(how, mode, micro_batches=micro)), problem)


@pytest.mark.parametrize(
    ("how", "mode"), [("ddp", "autograd"), ("ddp", "one_backward"), ("fsdp2", "one_backward")]
)
def test_quietly(run, how: str, mode: str) -> None:
    """With `no_sync` or `set_requires_gradient_sync` around all micro-batches but the last."""
    problem = Problem("llama tied")
    course = Course(how, mode, micro_batches=4, quiet=True)
    assert_equal(run(2, learn, problem, course), problem)


def test_fsdp2_would_mix_objectives_that_it_sums_in_private(outcomes) -> None:
    """FSDP2 keeps one sum of what it has not reduced yet, whichever objective it is of."""
    course = Course("fsdp2", "autograd", micro_batches=2, quiet=True)
    found = outcomes(2, learn, Problem(), course)
    assert_all_failed(found, "RuntimeError", "set_requires_gradient_sync")


@pytest.mark.parametrize("how", ["replicas", "fsdp2"])
def test_uneven_shares_in_micro_batches(run, how: str) -> None:
    """5 and 3 pairs in two micro-batches each."""
    problem = Problem("llama lora")
    course = Course(how, micro_batches=2, uneven=True)
    assert_equal(run(2, learn, problem, course), problem)
