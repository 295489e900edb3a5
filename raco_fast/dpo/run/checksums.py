"""Checksums of the files of a folder, by which a changed bit is noticed.

Neither safetensors nor torch's files have any: a flipped bit in a weight loads without a word.
CRC-32 is for accidents of disks and memory, not against anyone's intent.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

NAME = "checksums.json"
_BLOCK = 1 << 22


class DamagedError(ValueError):
    """A file is not what was written; the message begins with its name and says what is wrong."""


def write_checksums(folder: Path) -> None:
    """Write `checksums.json` with the size and CRC-32 of every other file under a folder.

    Raises:
        OSError: a file cannot be read, or this one not be written.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != NAME)
    found = {str(file.relative_to(folder)): [file.stat().st_size, _crc(file)] for file in files}
    (folder / NAME).write_text(json.dumps(found, indent=1), encoding="utf-8")


def check_checksums(folder: Path) -> None:
    """Compare a folder with its `checksums.json`.

    Raises:
        DamagedError: a file is missing or differs, or the list itself does.
        OSError: a file cannot be read.
    """
    listed = _listed(folder / NAME)
    for name, (size, crc) in listed.items():
        file = folder / name
        if not file.is_file():
            raise DamagedError(f"{file} is missing")
        if (now := file.stat().st_size) != size:
            raise DamagedError(f"{file} has {now} bytes, {size} were written")
        if (found := _crc(file)) != crc:
            raise DamagedError(f"{file} has the checksum {found:08x}, written was {crc:08x}")


def _listed(file: Path) -> dict[str, tuple[int, int]]:
    if not file.is_file():
        raise DamagedError(f"{file} is missing (or the checkpoint is of an older version)")
    try:
        content = json.loads(file.read_bytes())
        listed = {name: (int(size), int(crc)) for name, (size, crc) in content.items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DamagedError(f"{file} is no list of checksums") from error
    # A name with a changed bit would be a file that is missing, or another one's.
    if not listed or any(
        "\0" in name or not (0 <= crc < 2**32) for name, (_, crc) in listed.items()
    ):
        raise DamagedError(f"{file} is no list of checksums")
    return listed


def _crc(file: Path) -> int:
    crc = 0
    with file.open("rb") as handle:
        while block := handle.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


def save_checked(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write small tensors to a safetensors file that knows their checksum."""
    save_file(dict(tensors), file, metadata={"crc32": str(_crc_of(tensors))})


def load_checked(file: Path) -> dict[str, Tensor]:
    """The tensors of `save_checked`.

    Raises:
        DamagedError: it is cut off, changed, or no such file at all.
        OSError: it cannot be read.
    """
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DamagedError(f"{file} is cut off or damaged ({error})") from error
    if metadata.get("crc32") != str(_crc_of(tensors)):
        raise DamagedError(f"{file} has another checksum than was written")
    return tensors


def _crc_of(tensors: Mapping[str, Tensor]) -> int:
    crc = 0
    for name, t in sorted(tensors.items()):
        crc = zlib.crc32(f"{name}{t.dtype}{tuple(t.shape)}".encode(), crc)
        crc = zlib.crc32(t.contiguous().numpy().tobytes(), crc)
    return crc
