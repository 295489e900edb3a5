"""Folders that cannot be written and disks without room are found before anything costs time."""

import errno
import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from raco_fast.dpo.run import places, reference_cache, trainer
from raco_fast.dpo.run.places import check_room, check_writable, needed_bytes
from raco_fast.dpo.run.trainer import Trainer


def blocked(tmp_path, kind: str):
    """A folder that cannot be written, of some kind."""
    if kind == "a file in the way":
        (tmp_path / "x").write_text("")
        return tmp_path / "x"
    if kind == "a file among the folders":
        (tmp_path / "x").write_text("")
        return tmp_path / "x" / "y"
    if kind == "too long a name":
        return tmp_path / ("x" * 300)
    if kind == "a link to nowhere":
        (tmp_path / "x").symlink_to(tmp_path / "gone" / "far")
        return tmp_path / "x"
    return "/proc/no_such_folder"


KINDS = ["a file in the way", "a file among the folders", "too long a name", "a link to nowhere"]


@pytest.mark.parametrize("kind", [*KINDS, "a file system that takes none"])
@pytest.mark.parametrize("name", ["output_dir", "cache_dir"])
def test_a_folder_that_cannot_be_written_is_named_before_a_model_is_loaded(
    make_config, tmp_path, monkeypatch, kind, name
):
    monkeypatch.setattr(trainer, "load_on_all", lambda *_: pytest.fail("loaded"))
    folder = str(blocked(tmp_path, kind))
    with pytest.raises(
        OSError, match=rf"`{name}` must be a folder that can be written, got .*; ch"
    ):
        Trainer(make_config(**{name: folder}))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_a_disk_that_takes_no_byte_is_noticed(tmp_path, monkeypatch, number):
    def full(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=rf"got .*{os.strerror(number)}.*; check its rights"):
        check_writable(tmp_path / "a" / "b", "output_dir")
    assert not list((tmp_path / "a" / "b").iterdir())


def test_a_folder_that_can_be_written_stays_empty(tmp_path):
    check_writable(tmp_path / "a" / "b", "output_dir")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def parameters(dtype=torch.float32):
    return [nn.Parameter(torch.zeros(1000, 100, dtype=dtype)), nn.Parameter(torch.zeros(5))]


def test_what_a_checkpoint_takes(make_config, runs):
    assert needed_bytes(parameters(), "split") == (400_020, 1_200_060)
    assert needed_bytes(parameters(torch.bfloat16), "stochastic") == (200_020, 600_060)
    assert needed_bytes(parameters(torch.bfloat16), "split") == (200_020, 800_060)
    config = make_config({"dtype": "bf16"}, max_steps=1, rounding="split")
    runner = Trainer(config)
    runner.run()
    (folder,) = (config.folder / "checkpoints").iterdir()
    taken = sum(f.stat().st_size for f in folder.iterdir() if f.name.startswith(("model", "opti")))
    _, expected = needed_bytes(runner.model.parameters(), "split")
    assert expected < taken < expected + 40_000  # names, and what files have around tensors


def test_a_disk_without_room(tmp_path, monkeypatch, caplog):
    def free(n):
        monkeypatch.setattr(
            places.shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, free=n)
        )

    free(3_000_000)
    check_room(tmp_path, parameters(), "nearest", kept=1)
    assert not caplog.text
    free(2_000_000)
    check_room(tmp_path, parameters(), "nearest", kept=1)
    assert "0.002 GB are free at" in caplog.text
    assert "a checkpoint takes about 0.0012 GB; 2 of them and the trained model need 0.0028 GB" in (
        caplog.text
    )
    free(1_000_000)
    with pytest.raises(
        OSError, match=r"`output_dir` must have room .* 0.001 GB are free .* 0.0012"
    ):
        check_room(tmp_path, parameters(), "nearest", kept=1)
    # The folder has a checkpoint already, which goes when the next one is there.
    caplog.clear()
    free(2_000_000)
    (tmp_path / "checkpoints" / "step-1").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-1" / "model").write_bytes(b"0" * 1_200_000)
    check_room(tmp_path, parameters(), "nearest", kept=1)
    assert not caplog.text
    monkeypatch.setattr(places.shutil, "disk_usage", lambda _: SimpleNamespace(total=0, free=0))
    check_room(tmp_path, parameters(), "nearest", kept=1)  # it does not tell


def test_room_is_asked_for_before_the_reference_pass(make_config, monkeypatch):
    monkeypatch.setattr(reference_cache, "_scored", lambda *_: pytest.fail("scored"))
    monkeypatch.setattr(places.shutil, "disk_usage", lambda _: SimpleNamespace(total=9, free=9))
    with pytest.raises(OSError, match="must have room for a checkpoint"):
        Trainer(make_config())
