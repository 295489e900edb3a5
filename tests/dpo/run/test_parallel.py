"""Options of several processes, and what can be said of them on one."""

import pytest
import torch

from raco_fast.distributed.processes import Processes
from raco_fast.dpo.run import checkpoint
from raco_fast.dpo.run.identity import check_same_run, identity
from raco_fast.dpo.run.parallel import ParallelOptions, process_group
from raco_fast.dpo.run.together import together

CPU = torch.device("cpu")
LAUNCH = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "fsdp"}, r"`kind` must be one of \['ddp', 'fsdp2'\], got 'fsdp'"),
        ({"kind": "fsdp2", "shard": 0}, "`parallel.shard` must be at least 1, got 0"),
        ({"kind": "fsdp2", "replicate": -1}, "`parallel.replicate` must be at least 1, got -1"),
        ({"timeout_seconds": 0.0}, "`parallel.timeout_seconds` must be positive and at most 1e8"),
        ({"shard": 2}, "`parallel.shard` is an option of `parallel.kind` 'fsdp2', got it with"),
        ({"reshard": False}, "`parallel.reshard` is an option of `parallel.kind` 'fsdp2'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ParallelOptions(**options)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (1, 8)),
        ({"shard": 4}, (2, 4)),
        ({"replicate": 2}, (2, 4)),
        ({"shard": 2, "replicate": 4}, (4, 2)),
    ],
)
def test_copies_and_shards_cover_the_processes(options, shape):
    assert ParallelOptions("fsdp2", **options).mesh_shape(8) == shape


@pytest.mark.parametrize(
    ("options", "product"),
    [({"shard": 3}, "3 x 2"), ({"shard": 16}, "16 x 1"), ({"shard": 2, "replicate": 2}, "2 x 2")],
)
def test_copies_and_shards_of_another_number_of_processes_are_refused(options, product):
    with pytest.raises(ValueError, match=rf"must be the number of processes, got {product} for 8"):
        ParallelOptions("fsdp2", **options).mesh_shape(8)


def test_without_a_launcher_nothing_is_opened(make_config, tmp_path):
    with process_group(ParallelOptions(), CPU):
        assert not torch.distributed.is_initialized()
    with (
        pytest.raises(ValueError, match=r"`parallel.kind` 'fsdp2' needs a launcher, .*torchrun"),
        process_group(ParallelOptions("fsdp2"), CPU),
    ):
        pytest.fail("a sharded run began on one process")
    sharded = make_config(parallel=ParallelOptions("fsdp2"))
    check_same_run(sharded, identity(make_config()), tmp_path)  # it does not change what is learnt


def test_processes_that_cannot_meet_are_refused(monkeypatch):
    for name, value in LAUNCH.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(ValueError, match=r"MASTER_ADDR must be set where WORLD_SIZE is \(2 here\)"),
        process_group(ParallelOptions(), CPU),
    ):
        pytest.fail("a run began without a place to meet")
    with (
        pytest.raises(ValueError, match="must be the number of processes, got 3 x 1 for 2"),
        process_group(ParallelOptions("fsdp2", shard=3), CPU),
    ):
        pytest.fail("a run began with two of three processes")


def test_one_process_fails_as_it_would_alone():
    def fail() -> None:
        raise FileNotFoundError("no such file")

    with pytest.raises(FileNotFoundError, match=r"^no such file$"):
        together(Processes(), fail)
    assert together(Processes(), lambda: 3) == 3


def test_parts_on_several_file_systems_are_refused(tmp_path):
    checkpoint._check_shared(tmp_path)
    with pytest.raises(OSError, match=r"gone is not seen by every process, .* all of them share"):
        checkpoint._check_shared(tmp_path / "gone")
