"""A file that is no JSON Lines is named as what it is, with a way to make it one."""

import bz2
import gzip
import io
import lzma
import os
import pickle
import sqlite3
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from raco_fast.dpo.data.data_source import DataSource
from raco_fast.dpo.data.sources import read_sources

ROW = '{"prompt": "why?", "chosen": "yes", "rejected": "no"}\n'


def zipped(file: Path, name: str) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, ROW)


def tarred(file: Path, mode: str) -> None:
    with tarfile.open(file, mode) as archive:
        member = tarfile.TarInfo("rows.jsonl")
        member.size = len(ROW)
        archive.addfile(member, io.BytesIO(ROW.encode()))


def database(file: Path) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute("create table rows (prompt text)")
    connection.close()


def tensors(file: Path) -> None:
    save_file({"weight": torch.ones(3)}, file)


# Name -> (how it is written, what it is, a part of the cure). Bytes of kinds that nothing here can
# write are those that the format's specification begins a file with.
FILES = {
    "x.parquet.gz": (gzip.compress(b"PAR1"), "a Parquet table inside gzip", "gunzip '{}'"),
    "x.xlsx": (lambda f: zipped(f, "xl/workbook.xml"), "an Excel workbook", "read_excel('{}')"),
    "x.zip": (lambda f: zipped(f, "rows.jsonl"), "a zip archive", "unzip '{}'"),
    "x.jsonl.zst": (b"(\xb5/\xfd\x24\x00", "a Zstandard stream", "zstd -d '{}'"),
    "x.jsonl.bz2": (bz2.compress(ROW.encode()), "a bzip2 stream", "bunzip2 -k '{}'"),
    "x.jsonl.xz": (lzma.compress(ROW.encode()), "an xz stream", "unxz -k '{}'"),
    "x.gz": (gzip.compress(gzip.compress(ROW.encode())), "gzip inside gzip", "gunzip '{}'"),
    "x.tar": (lambda f: tarred(f, "w"), "a tar archive", "tar -xf '{}'"),
    "x.tar.gz": (lambda f: tarred(f, "w:gz"), "a tar archive", "tar -xf '{}'"),
    "x.pkl": (pickle.dumps([ROW]), "a Python pickle", "runs code that is in the file"),
    "x.pt": (lambda f: torch.save([ROW], f), "a PyTorch file", "runs code that is in the file"),
    "x.npy": (lambda f: np.save(f, np.ones(3)), "a NumPy array", "one JSON object a line"),
    "x.npz": (lambda f: np.savez(f, a=np.ones(3)), "a NumPy archive", "one JSON object a line"),
    "x.sqlite": (database, "an SQLite database", "one JSON object a line"),
    "model.gguf": (b"GGUF\x03\x00\x00\x00", "a GGUF model", "name the file with the preference"),
    "model.safetensors": (tensors, "a model's tensors", "name the file with the preference"),
    "wide.jsonl": (ROW.encode("utf-16"), "text in UTF-16", "iconv -f UTF-16 -t UTF-8 '{}' > 'OUT'"),
    "le.jsonl": (ROW.encode("utf-16-le"), "text in UTF-16", "iconv -f UTF-16LE -t UTF-8 '{}'"),
    "be.jsonl": (ROW.encode("utf-16-be"), "text in UTF-16", "iconv -f UTF-16BE -t UTF-8 '{}'"),
    "wider.jsonl": (ROW.encode("utf-32"), "text in UTF-32", "iconv -f UTF-32 -t UTF-8 '{}'"),
    "page.jsonl": (b"<!DOCTYPE html>\n<html></html>", "a web page", "download the file itself"),
    "x.yaml": (b"- prompt: why?\n  chosen: yes\n", "YAML", "one JSON object a line"),
    "lfs.jsonl": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "a pointer to data in Git LFS",
        "git lfs pull",
    ),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_a_file_is_named_as_what_it_is(tmp_path, name, on_bad):
    write, kind, cure = FILES[name]
    file = tmp_path / name
    file.write_bytes(write) if isinstance(write, bytes) else write(file)
    before = (
        f"{file}: a data file must be JSON Lines, a JSON list, CSV, Parquet or Arrow, got {kind}; "
    )
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read_sources([DataSource(str(file), on_bad=on_bad)], ["x"])
    message = str(caught.value)
    assert message.startswith(before)
    out = file.with_suffix(".converted.jsonl" if file.suffix == ".jsonl" else ".jsonl")
    assert cure.replace("{}", str(file)).replace("OUT", str(out)) in message


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".txt", ".zip", ".pt", ".gz", ".tar", ""])
def test_what_a_file_holds_counts_for_more_than_its_name(tmp_path, suffix):
    file = tmp_path / f"rows{suffix}"
    file.write_text(ROW)
    assert len(read_sources([str(file)], ["x"])) == 1


def test_damaged_json_lines_are_no_table(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("hello, world\n" + ROW)
    with pytest.raises(ValueError, match=r"rows.jsonl:1: a row must be complete JSON"):
        read_sources([str(file)], ["x"])
    file.write_text('{\n  "prompt": "why?"\n}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:1: .*; write every object on one line, or"):
        read_sources([str(file)], ["x"])


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match=r"pipe', which is no regular file; write what it"):
        read_sources([str(tmp_path / "pipe")], ["x"])
    with pytest.raises(FileNotFoundError, match=r"none.jsonl', which is not there; check the path"):
        read_sources([str(tmp_path / "none.jsonl")], ["x"])


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="a file that nobody can read")
def test_a_file_that_cannot_be_read_is_named():
    with pytest.raises(OSError, match=r"^/proc/self/mem: a data file must be readable, got "):
        read_sources(["/proc/self/mem"], ["x"])
