"""Tensors on their way to a device: the same values, and nobody waits."""

import pytest
import torch
from far_device import FAR, Waits

from raco_fast.backends.transfer import sent


def test_what_is_there_stays():
    x = torch.ones(3)
    assert sent(x, torch.device("cpu")) is x


def test_only_the_way_back_waits():
    with Waits() as waits:
        far = sent(torch.arange(3), FAR)
        assert not waits.counts
        assert sent(far, torch.device("cpu")).tolist() == [0, 1, 2]
        assert list(waits.of("read")) == ["backends/transfer.py"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("n", [3, 10**6])
def test_a_gpu_is_not_waited_for(n):
    here = torch.arange(n)
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = sent(here, torch.device("cuda", torch.cuda.current_device()))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(there.cpu(), here)
