"""The tests' own launcher: a process that hangs, fails or dies is reported, never waited for."""

import os
import signal
import time

import pytest
import torch
from torch import distributed as dist


def summed(value: float) -> tuple[int, float, int]:
    total = torch.tensor([value + dist.get_rank()])
    dist.all_reduce(total)
    return dist.get_rank(), float(total), torch.get_num_threads()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_returns_what_each_process_does(run, world: int) -> None:
    total = world * 10.0 + sum(range(world))
    assert run(world, summed, 10.0) == [(rank, total, 1) for rank in range(world)]


def waits_on_rank_1() -> None:
    while dist.get_rank() == 1:
        time.sleep(1)


def test_one_that_hangs_is_named_with_its_stack(run) -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"(?s)rank 1\n.*waits_on_rank_1") as error:
        run(2, waits_on_rank_1, timeout=3.0)
    assert "rank 0" not in str(error.value)
    assert time.monotonic() - began < 30


def fails_on_rank_1() -> str:
    if dist.get_rank() == 1:
        raise ValueError("no such thing")
    return "fine"


def test_one_that_fails_is_told_apart(run, outcomes) -> None:
    fine, failed = outcomes(2, fails_on_rank_1)
    assert (fine, failed.kind, failed.message) == ("fine", "ValueError", "no such thing")
    with pytest.raises(AssertionError, match=r"(?s)rank 1: Traceback.*no such thing") as error:
        run(2, fails_on_rank_1)
    assert "rank 0" not in str(error.value)


def waits_for_one_that_dies() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_one_that_dies_ends_the_others(outcomes) -> None:
    began = time.monotonic()
    waited, died = outcomes(2, waits_for_one_that_dies)
    assert (died.kind, died.message) == ("died", "exit code -9")
    assert "peer" in waited.message
    assert time.monotonic() - began < 25  # by the broken connection, not by the group's timeout


def meets_nobody() -> None:
    if dist.get_rank() == 0:
        dist.barrier()
    time.sleep(2)


def test_a_collective_that_is_not_joined_ends(outcomes) -> None:
    waited, away = outcomes(2, meets_nobody, group_timeout=1.0)
    assert "1000ms" in waited.message
    assert away is None
