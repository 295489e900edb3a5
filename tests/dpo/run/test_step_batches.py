"""The batches of coming steps: the same whoever makes them, and nothing is left when they end."""

import os
import signal
import time
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import Tensor

from raco_fast.dpo.data.collation import collate, pack
from raco_fast.dpo.data.tokenization import EncodedPair
from raco_fast.dpo.run.step_batches import StepBatches, pinned

CPU = torch.device("cpu")


def pairs_of(step: int) -> list[EncodedPair]:
    return [EncodedPair(f"p{step}.{k}", [1, 2 + k], [step], [k, k], {"x": 1}) for k in range(4)]


def make(step: int, fails_at: int = -1, failure: object = None) -> list[object]:
    """Two micro-batches a step; in the order of the steps, whoever is the first to make them."""
    if step == fails_at:
        if isinstance(failure, signal.Signals):
            os.kill(os.getpid(), failure)
        else:
            raise failure
    time.sleep(0.05 * (step % 2 == 0))
    pairs = pairs_of(step)
    return [collate(pairs[:3], 0), pack(pairs[3:], share=True)]


def described(batches) -> list[str]:
    return [repr(batch) for batch in batches]


@pytest.mark.parametrize("workers", [None, 1, 2])
def test_the_same_batches_in_order(workers, capfd):
    before = torch.get_rng_state()
    with StepBatches(make, range(3, 9), CPU, workers) as batches:
        found = [described(of_step) for of_step in batches]
    assert found == [described(make(step)) for step in range(3, 9)]
    assert torch.equal(torch.get_rng_state(), before)
    assert capfd.readouterr().err == ""


def test_no_steps():
    with StepBatches(make, range(3, 3), CPU, 1) as batches:
        assert list(batches) == []


def pid_of(step: int) -> list[int]:
    return [os.getpid()] * 3


@pytest.mark.parametrize("workers", [1, 2])
def test_leaving_early_ends_the_workers(workers):
    with StepBatches(pid_of, range(1000), CPU, workers) as batches:
        pids = {next(batches)[0] for _ in range(4)}
    assert len(pids) == workers
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with StepBatches(pid_of, range(9), CPU, 0) as batches:
        assert next(batches) == [os.getpid()] * 3


@pytest.mark.parametrize("workers", [0, 1])
def test_what_making_them_raises_ends_the_run(workers):
    fails = partial(make, fails_at=2, failure=ValueError("`x` must be right"))
    with StepBatches(fails, range(5), CPU, workers) as batches:
        assert len(next(batches)) == len(next(batches)) == 2
        with pytest.raises(ValueError, match="`x` must be right"):
            next(batches)


@pytest.mark.slow  # the loader looks every five seconds
def test_a_worker_that_is_killed_is_named_with_a_cure():
    dies = partial(make, fails_at=2, failure=signal.SIGKILL)
    with (
        StepBatches(dies, range(5), CPU, 1) as batches,
        pytest.raises(ChildProcessError, match=r"has ended .*set `workers` to 0"),
    ):
        list(batches)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_workers_leave_signals_to_the_run(number):
    """They are sent to all processes of a terminal or a job; the run finishes its step first."""
    hit = partial(make, fails_at=2, failure=number)
    with StepBatches(hit, range(5), CPU, 1) as batches:
        assert len(list(batches)) == 5


DTYPES = [torch.bfloat16, torch.int64, *[torch.float32] * 698]


def many(step: int) -> list[dict[int, Tensor]]:
    return [{k: torch.full((2,), k + step, dtype=DTYPES[k]) for k in range(700)}]


def test_tensors_need_no_open_files():
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, soft), hard))
    try:
        with StepBatches(many, range(4), CPU, 1) as batches:
            found = [of_step[0] for of_step in batches]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for step, tensors in enumerate(found):
        torch.testing.assert_close(tensors, many(step)[0], rtol=0, atol=0)
        assert all(x.add_(1) is x for x in tensors.values())  # not read-only


@dataclass(frozen=True)
class Odd:
    """As a batch may be: with a dataclass inside, and a constructor that does more."""

    rows: dict[str, Tensor]
    names: list[str]
    inner: "Odd | None" = None
    length: int = field(init=False)

    def __post_init__(self):
        assert "seen" not in self.rows
        self.rows["seen"] = torch.ones(1)
        object.__setattr__(self, "length", len(self.rows))


def test_every_tensor_is_pinned(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x + 100)  # needs no GPU
    batch = Odd({"x": torch.zeros(2)}, ["a"], Odd({}, []))
    (found,) = pinned([batch])
    assert found.rows["x"].tolist() == [100, 100]
    assert found.inner.rows["seen"].tolist() == [101]
    assert (found.names, found.length, found.inner.inner) == (["a"], 2, None)
    assert batch.rows["x"].tolist() == [0, 0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [None, 0])
def test_batches_for_a_gpu_are_pinned(workers):
    with StepBatches(make, range(3), torch.device("cuda"), workers) as batches:
        for step, of_step in enumerate(batches):
            assert all(b.rows.input_ids.is_pinned() and b.labels["x"].is_pinned() for b in of_step)
            assert described(of_step) == described(make(step))
