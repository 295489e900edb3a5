"""A process group of this process alone, for tests of what wraps a model in one."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


@contextmanager
def process_group_of_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Open gloo on the loopback device, with its store in memory.

    No file lock and no look-up of the host's name: either can wait for ever on a machine without
    network.
    """
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
