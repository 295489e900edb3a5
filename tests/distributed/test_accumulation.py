"""Micro-batches: however a step's pairs are divided, and whenever processes communicate."""

from collections.abc import Iterator
from typing import Any

import pytest
from joined_batch import Learnt, Problem, assert_equal
from learning import Course, learn
from torch import distributed as dist

slow = pytest.mark.slow


def divisions() -> Iterator[Any]:
    """The 8 pairs of a step on some processes in some micro-batches."""
    for mode in ("autograd", "one_backward"):
        for how in ("replicas", "ddp", "fsdp2"):
            yield pytest.param(2, how, mode, 4, True, id=f"2x4-{how}-{mode}-quiet")
            for world, micro in ((1, 8), (1, 1), (2, 4), (2, 2), (4, 2)):
                marks = [] if (world, micro, mode) == (2, 4, "one_backward") else [slow]
                name = f"{world}x{micro}-{how}-{mode}"
                yield pytest.param(world, how, mode, micro, False, marks=marks, id=name)


@pytest.mark.parametrize(("world", "how", "mode", "micro", "quiet"), list(divisions()))
def test_is_the_joined_batch(run, world: int, how: str, mode: str, micro: int, quiet: bool) -> None:
    problem = Problem("llama tied")
    course = Course(how, mode, micro_batches=micro, quiet=quiet)
    assert_equal(run(world, learn, problem, course), problem)


@pytest.mark.parametrize("how", ["replicas", "fsdp2"])
def test_uneven_shares_in_micro_batches(run, how: str) -> None:
    """5 and 3 pairs in two micro-batches each."""
    problem = Problem("llama lora")
    course = Course(how, micro_batches=2, uneven=True)
    assert_equal(run(2, learn, problem, course), problem)


def learn_in_unequal_numbers(problem: Problem) -> Learnt:
    return learn(problem, Course(micro_batches=3 - 2 * dist.get_rank()))


def test_replicas_may_have_unequal_numbers_of_micro_batches(run) -> None:
    """Nothing is sent before the step."""
    problem = Problem()
    assert_equal(run(2, learn_in_unequal_numbers, problem), problem)
