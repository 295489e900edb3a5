"""Whatever happens to a file of a checkpoint or a cache is noticed, and gives no traceback."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from raco_fast.dpo.run.checkpoint import check_whole
from raco_fast.dpo.run.checksums import (
    DamagedError,
    check_checksums,
    load_checked,
    save_checked,
    write_checksums,
)
from raco_fast.dpo.run.metrics_file import read_records
from raco_fast.dpo.run.reference_cache import _read
from raco_fast.dpo.run.reference_parts import ReferenceParts


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A folder with the files of a checkpoint."""
    folder = tmp_path_factory.mktemp("run") / "step-00000003"
    (folder / "shards").mkdir(parents=True)
    g = torch.Generator().manual_seed(1)
    save_file({"w": torch.randn(5, 7, generator=g)}, folder / "model.safetensors")
    torch.save({"optimizer": {"state": {0: {"step": torch.ones(())}}}}, folder / "optimizer.pt")
    torch.save({"processes": [None]}, folder / "rng.pt")
    (folder / "state.json").write_text(json.dumps({"step": 3, "run": {"settings": {"lr": 0.1}}}))
    (folder / "shards" / "__0_0.distcp").write_bytes(b"part of a tensor")
    write_checksums(folder)
    check_checksums(folder)
    return folder


def damaged(raw: bytes, draw: random.Random) -> bytes:
    """The content of a file after an accident; never the same."""
    kind = draw.randrange(6)
    at, length = draw.randrange(len(raw)), draw.randrange(1, 9)
    new = {
        0: b"",
        1: raw[:at],
        2: raw + draw.randbytes(length),
        3: raw[:at] + bytes([raw[at] ^ (1 << draw.randrange(8))]) + raw[at + 1 :],
        4: raw[:at] + draw.randbytes(length) + raw[at + length :],
        5: draw.choice(
            [b"null", b"[]", b"{}", b'{"a": [1, 2]}', b'"x"', b"[" * 3000, b"\x80\x04."]
        ),
    }[kind]
    return new if new != raw else raw + b"\n"


def check_damage(checkpoint: Path, where: Path, seeds: range) -> None:
    copy = where / checkpoint.name
    shutil.copytree(checkpoint, copy)
    files = sorted(f.relative_to(copy) for f in copy.rglob("*") if f.is_file())
    for seed in seeds:
        draw = random.Random(seed)
        file = copy / draw.choice(files)
        raw = file.read_bytes()
        if draw.random() < 0.05:
            file.unlink()
        else:
            file.write_bytes(damaged(raw, draw))
        if file.name == "checksums.json" and says_the_same(file, raw):
            continue  # another space between its words
        with pytest.raises(ValueError, match=r"-00000003 is damaged: .*; restore the file, or"):
            check_whole(copy)
        file.write_bytes(raw)


def says_the_same(file: Path, raw: bytes) -> bool:
    try:
        return json.loads(file.read_bytes()) == json.loads(raw)
    except (OSError, ValueError, RecursionError):
        return False


def test_damage_to_a_checkpoint_is_named(checkpoint, tmp_path):
    check_damage(checkpoint, tmp_path, range(300))


@pytest.mark.slow
def test_any_damage_to_a_checkpoint_is_named(checkpoint, tmp_path):
    check_damage(checkpoint, tmp_path, range(1000, 11_000))


def test_the_message_names_file_damage_and_what_else_there_is(checkpoint, tmp_path):
    copy = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, copy)
    file = copy / "optimizer.pt"
    raw = file.read_bytes()
    file.write_bytes(raw[:-1] + b"\xff")
    with pytest.raises(ValueError, match=r"optimizer.pt has the checksum \w{8}, written was \w{8}"):
        check_whole(copy)
    file.write_bytes(raw[:9])
    with pytest.raises(ValueError, match=rf"has 9 bytes, {len(raw)} were written; .* without --"):
        check_whole(copy)
    file.unlink()
    shutil.copytree(checkpoint, tmp_path / "step-00000002")
    with pytest.raises(
        ValueError, match=r"optimizer.pt is missing; .* to go on from .*step-00000002 instead"
    ):
        check_whole(copy)


def check_cache_damage(tmp_path: Path, seeds: range) -> None:
    values = torch.randn(6, 2)
    file, parts = tmp_path / "reference.safetensors", tmp_path / "parts"
    save_checked(file, {"logps": values})
    assert torch.equal(_read(file, (6, 2)), values)
    assert _read(file, (5, 2)) is None
    parts.mkdir()
    part = parts / "part-1.safetensors"
    save_checked(part, {"indices": torch.tensor([4, 1]), "logps": values[[4, 1]]})
    known = ReferenceParts(parts, (6, 2)).load()
    assert torch.equal(known[[1, 4]], values[[1, 4]])
    assert known.isinf().sum() == 8
    for seed in seeds:
        draw = random.Random(seed)
        for each, usable in (
            (file, lambda: _read(file, (6, 2))),
            (part, lambda: ReferenceParts(parts, (6, 2)).load().clamp(min=-1e30)),
        ):
            raw = each.read_bytes()
            each.write_bytes(damaged(raw, draw))
            found = usable()
            if each is file and found is not None:  # damage that the values do not depend on
                assert torch.equal(found, values)
            elif each is part:
                assert (found == -1e30).all() or torch.equal(found[[1, 4]], values[[1, 4]])
            each.write_bytes(raw)


def test_a_damaged_cache_counts_as_none(tmp_path):
    check_cache_damage(tmp_path, range(200))


@pytest.mark.slow
def test_any_damaged_cache_counts_as_none(tmp_path):
    check_cache_damage(tmp_path, range(10_000))


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"logps": torch.zeros(6, 2, dtype=torch.float64)},
        {"logps": torch.zeros(6)},
        {"logps": torch.zeros(())},
        {"indices": torch.zeros(()), "logps": torch.zeros(())},
        {"indices": torch.tensor([6]), "logps": torch.zeros(1, 2)},
        {"indices": torch.tensor([-1]), "logps": torch.zeros(1, 2)},
        {"indices": torch.tensor([0.5]), "logps": torch.zeros(1, 2)},
        {"indices": torch.tensor([0, 1]), "logps": torch.zeros(1, 2)},
    ],
    ids=str,
)
def test_whole_files_of_something_else_count_as_none(tmp_path, tensors, caplog):
    file = tmp_path / "part-1.safetensors"
    save_checked(file, tensors)
    assert _read(file, (6, 2)) is None
    assert "the reference cache cannot be used and is computed again" in caplog.text
    assert ReferenceParts(tmp_path, (6, 2)).load().isinf().all()


def test_a_file_without_a_checksum_is_not_taken(tmp_path):
    save_file({"logps": torch.zeros(6, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(DamagedError, match=r"x.safetensors has another checksum than was written"):
        load_checked(tmp_path / "x.safetensors")


def check_metrics_damage(file: Path, seeds: range) -> None:
    raw = "".join(json.dumps({"step": k, "loss": 0.1 * k}) + "\n" for k in range(9)).encode()
    for seed in seeds:
        file.write_bytes(damaged(raw, random.Random(seed)))
        try:
            records = read_records(file)
        except ValueError as error:
            assert str(error).startswith(f"{file}:")  # noqa: PT017
            assert "remove the line" in str(error)  # noqa: PT017
            continue
        assert all(type(record["step"]) is int for record in records)


def test_damaged_metrics_are_named(tmp_path):
    check_metrics_damage(tmp_path / "metrics.jsonl", range(300))


@pytest.mark.slow
def test_any_damaged_metrics_are_named(tmp_path):
    check_metrics_damage(tmp_path / "metrics.jsonl", range(10_000))
