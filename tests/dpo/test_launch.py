"""What a launcher says, and the device that follows from it."""

import pytest
import torch

from raco_fast.dpo.launch import Launch, launched, share_of_cores
from raco_fast.dpo.models import ModelOptions, pick_device

VARIABLES = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}


@pytest.fixture
def say(monkeypatch):
    """A function that sets a launcher's variables; None unsets one."""

    def set_all(**changes: str | None) -> None:
        for name, value in (VARIABLES | changes).items():
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)

    return set_all


def test_without_a_launcher_a_run_is_one_process():
    assert launched() is None


def test_a_launcher_numbers_the_processes(say):
    say()
    assert launched() == Launch(rank=3, size=4, local_rank=1)
    say(WORLD_SIZE="1", RANK="0", LOCAL_RANK=None)  # as schedulers do for a job of one process
    assert launched() == Launch(rank=0, size=1, local_rank=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"LOCAL_RANK": None}, r"LOCAL_RANK must be set where WORLD_SIZE is \(it is '4' here\)"),
        ({"RANK": None}, "RANK must be set where WORLD_SIZE is .* start them with torchrun"),
        ({"RANK": "4"}, "RANK must be below WORLD_SIZE, got 4 and 4"),
        ({"RANK": "-1"}, "RANK must be a number, at least 0, got '-1'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a number, at least 1, got '0'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a number, at least 1, got 'two'"),
    ],
)
def test_variables_that_do_not_fit_are_named(say, changes, message):
    say(**changes)
    with pytest.raises(ValueError, match=message):
        launched()


def test_processes_share_the_cores_of_their_machine(say, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(10)), raising=False)
    assert share_of_cores() == 10
    say()
    assert share_of_cores() == 2  # of four processes, nobody says where
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert share_of_cores() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert share_of_cores() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "all")
    with pytest.raises(ValueError, match="LOCAL_WORLD_SIZE must be a number, at least 1"):
        share_of_cores()
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert share_of_cores() == 1


@pytest.fixture
def with_gpus(monkeypatch):
    """A function that makes this a machine of n GPUs, as far as picking a device asks."""
    empty = torch.empty

    def have(n: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: n > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
        monkeypatch.setattr(torch, "empty", lambda size, device: empty(size))

    return have


def test_every_process_takes_the_gpu_of_its_local_rank(say, with_gpus):
    with_gpus(2)
    say()
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda:1")
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"`device` must be 'auto', 'cuda' or 'cpu' where a .*:0'"):
        ModelOptions("x", device="cuda:0")
    say(LOCAL_RANK="2")
    with pytest.raises(ValueError, match=r"LOCAL_RANK is 2 and this machine shows 2 GPU\(s\); sta"):
        pick_device("auto")


def test_one_process_may_take_any_gpu(say, with_gpus):
    with_gpus(2)
    say(WORLD_SIZE="1", RANK="0", LOCAL_RANK="0")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert pick_device("auto") == torch.device("cuda")
