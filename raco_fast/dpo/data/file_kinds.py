"""What a file is, by its first bytes and its name, and how to make JSON Lines of what is not read.

Without this a Parquet file would be "not UTF-8 in line 1", and people would look for a bad letter.
"""

import re
from dataclasses import dataclass
from pathlib import Path

GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True)
class FileKind:
    """A kind of file that is no JSON.

    Attributes:
        name: as in "got ...".
        cure: what to do; "{path}" is the file, "{out}" a data file to write; empty for kinds
            that are read.
        magic: the first bytes of every such file; empty where there are none.
        suffixes: of its name. They decide between kinds with the same magic, and say what a file is
            that begins neither with a magic nor as JSON does.
        reads: who reads it: "csv", "parquet", "arrow" or "arrow-stream"; empty: nobody.
    """

    name: str
    cure: str = ""
    magic: bytes = b""
    suffixes: tuple[str, ...] = ()
    reads: str = ""


def _pandas(call: str) -> str:
    code = f"import pandas; pandas.{call}.to_json('{{out}}', orient='records', lines=True)"
    return f'convert it: python -c "{code}"'


def _recode(encoding: str) -> str:
    return f"convert it: iconv -f {encoding} -t UTF-8 '{{path}}' > '{{out}}'"


_WRITE_ROWS = "load it and write one JSON object a line"
_NO_DATA = "name the file with the preference pairs"
_PICKLE = f"{_WRITE_ROWS} (loading runs code that is in the file: only do so with one of your own)"
_GUNZIP = "unpack it once: gunzip '{path}'"
_EXCEL = _pandas("read_excel('{path}')")
_CSV = FileKind("a CSV table", suffixes=(".csv",), reads="csv")
_TSV = FileKind("a table with tabs", suffixes=(".tsv",), reads="csv")
_TAR = FileKind("a tar archive", "unpack it: tar -xf '{path}'", suffixes=(".tar", ".tgz"))
_TENSORS = FileKind("a model's tensors", _NO_DATA, suffixes=(".safetensors",))
_WEB_PAGE = FileKind("a web page", "download the file itself", suffixes=(".html", ".htm"))

# Of several with the same magic, the one with the file's suffix, else the last.
_KINDS = (
    FileKind("a Parquet table", magic=b"PAR1", reads="parquet"),
    FileKind("an Arrow table", magic=b"ARROW1", reads="arrow"),
    FileKind("an Arrow stream", magic=b"\xff\xff\xff\xff", reads="arrow-stream"),
    FileKind("an Excel workbook", _EXCEL, b"\xd0\xcf\x11\xe0", (".xls",)),
    FileKind("an Excel workbook", _EXCEL, b"PK\x03\x04", (".xlsx", ".xlsm")),
    FileKind("a PyTorch file", _PICKLE, b"PK\x03\x04", (".pt", ".pth", ".bin", ".ckpt")),
    FileKind("a NumPy archive", _WRITE_ROWS, b"PK\x03\x04", (".npz",)),
    FileKind("a zip archive", "unpack it: unzip '{path}'", b"PK\x03\x04", (".zip",)),
    FileKind("an empty zip archive", _NO_DATA, b"PK\x05\x06"),
    FileKind("a 7z archive", "unpack it: 7z x '{path}'", b"7z\xbc\xaf\x27\x1c", (".7z",)),
    FileKind("a Zstandard stream", "unpack it: zstd -d '{path}'", b"(\xb5/\xfd", (".zst",)),
    FileKind("a bzip2 stream", "unpack it: bunzip2 -k '{path}'", b"BZh", (".bz2",)),
    FileKind("an xz stream", "unpack it: unxz -k '{path}'", b"\xfd7zXZ\x00", (".xz",)),
    FileKind("an lz4 stream", "unpack it: lz4 -d '{path}'", b"\x04\x22\x4d\x18", (".lz4",)),
    FileKind("gzip inside gzip", _GUNZIP, GZIP_MAGIC + b"\x08"),
    *(FileKind("a Python pickle", _PICKLE, bytes([128, n]), (".pkl",)) for n in range(2, 6)),
    FileKind("a GGUF model", _NO_DATA, b"GGUF", (".gguf",)),
    FileKind("a NumPy array", _WRITE_ROWS, b"\x93NUMPY", (".npy",)),
    FileKind("an HDF5 file", _WRITE_ROWS, b"\x89HDF\r\n\x1a\n", (".h5", ".hdf5")),
    FileKind("an SQLite database", _WRITE_ROWS, b"SQLite format 3\x00", (".db", ".sqlite")),
    FileKind("a pointer to data in Git LFS", "fetch it: git lfs pull", b"version https://git-lfs"),
    FileKind("text in UTF-32", _recode("UTF-32"), b"\xff\xfe\x00\x00"),
    FileKind("text in UTF-32", _recode("UTF-32"), b"\x00\x00\xfe\xff"),
    FileKind("text in UTF-16", _recode("UTF-16"), b"\xff\xfe"),
    FileKind("text in UTF-16", _recode("UTF-16"), b"\xfe\xff"),
    *(FileKind("text in UTF-16", _recode("UTF-16LE"), c + b"\x00") for c in (b"{", b"[")),
    *(FileKind("text in UTF-16", _recode("UTF-16BE"), b"\x00" + c) for c in (b"{", b"[")),
    FileKind("XML", _WRITE_ROWS, b"<?xml", (".xml",)),
    FileKind("YAML", _WRITE_ROWS, suffixes=(".yaml", ".yml")),
    _CSV,
    _TSV,
    _TAR,
    _TENSORS,
    _WEB_PAGE,
)

_COLUMN = r"\s*\"?[A-Za-z_][\w .-]*\"?\s*"


def readable_kind(name: str, head: bytes, packed: bool) -> str:
    """Who reads a file: "json", or `FileKind.reads`.

    Args:
        name: the file's.
        head: its first bytes, 512 or more where it has as many; unpacked, where it is packed.
        packed: whether it is packed with gzip.
    Raises:
        ValueError: nobody does; names the file, what it is, and how to make JSON Lines of it.
    """
    file = Path(name)
    inner = file.with_suffix("") if file.suffix.lower() == ".gz" else file
    kind = _kind_of(head, inner.suffix.lower())
    if kind is None:
        return "json"
    if kind.reads == "csv" or (kind.reads and not packed):
        return kind.reads
    if kind.reads:
        kind = FileKind(f"{kind.name} inside gzip", _GUNZIP)  # has to be read from any place
    out = inner.with_suffix(".jsonl")
    if out == file:
        out = file.with_suffix(".converted.jsonl")  # a file is not written while it is read
    cure = kind.cure.replace("{path}", str(file)).replace("{out}", str(out))
    raise ValueError(
        f"{file}: a data file must be JSON Lines, a JSON list, CSV, Parquet or Arrow, got "
        f"{kind.name}; {cure}"
    )


def _kind_of(head: bytes, suffix: str) -> FileKind | None:
    alike = [kind for kind in _KINDS if kind.magic and head.startswith(kind.magic)]
    if alike:
        longest = max(len(kind.magic) for kind in alike)
        alike = [kind for kind in alike if len(kind.magic) == longest]
        return next((kind for kind in alike if suffix in kind.suffixes), alike[-1])
    if head[257:262] == b"ustar":
        return _TAR
    if head[8:10] == b'{"' and head[4:8] == bytes(4):  # the header's length, and it begins
        return _TENSORS
    return _kind_of_text(head.decode("utf-8-sig", "replace"), suffix)


def _kind_of_text(head: str, suffix: str) -> FileKind | None:
    """The kind of a file without a magic; None where it may be JSON, perhaps damaged."""
    lines = [line.strip() for line in head.splitlines() if line.strip()]
    if not lines or lines[0].startswith(("{", "[")):
        return None
    if re.match(r"<!doctype html|<html", lines[0], re.IGNORECASE):
        return _WEB_PAGE
    named = next((kind for kind in _KINDS if suffix in kind.suffixes), None)
    if named is not None or any(line.startswith("{") for line in lines):
        return named
    for kind, mark in ((_CSV, ","), (_TSV, "\t")):
        if re.fullmatch(rf"{_COLUMN}(?:{mark}{_COLUMN})+", lines[0]):
            return kind
    return None
