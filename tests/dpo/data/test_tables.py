"""Parquet, Arrow, CSV, saved and hub data sets hold what the same rows in JSON Lines do."""

import csv
import gzip
import io
import json
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from public_sets import SETS, Rows

from raco_fast.dpo.data import extra
from raco_fast.dpo.data.data_source import DataSource
from raco_fast.dpo.data.files import files_of
from raco_fast.dpo.data.pairs import PreferencePair
from raco_fast.dpo.data.rows import RowError
from raco_fast.dpo.data.sources import read_sources

datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
pyarrow = pytest.importorskip("pyarrow", reason="the extra `data` is not installed")


def as_jsonl(rows: Rows, folder: Path) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def even(rows: Rows) -> Rows:
    """The rows with every column in each, as tables have them."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def as_parquet(rows: Rows, folder: Path) -> str:
    from pyarrow import parquet

    parquet.write_table(
        pyarrow.Table.from_pylist(even(rows)), folder / "rows.parquet", row_group_size=2
    )
    return str(folder / "rows.parquet")


def as_arrow(rows: Rows, folder: Path) -> str:
    table = pyarrow.Table.from_pylist(even(rows))
    with pyarrow.ipc.new_file(str(folder / "rows.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return str(folder / "rows.arrow")


def as_stream(rows: Rows, folder: Path) -> str:
    table = pyarrow.Table.from_pylist(even(rows))
    with pyarrow.ipc.new_stream(str(folder / "rows.stream"), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return str(folder / "rows.stream")


def as_saved(rows: Rows, folder: Path) -> str:
    datasets.Dataset.from_list(even(rows)).save_to_disk(folder / "saved")
    return str(folder / "saved")


def table(rows: Rows, delimiter: str) -> str:
    """Texts as they are, other values as JSON, null as nothing."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(names)
    for row in rows:
        values = [row.get(name) for name in names]
        writer.writerow(
            "" if v is None else v if isinstance(v, str) else json.dumps(v) for v in values
        )
    return text.getvalue()


def as_csv(rows: Rows, folder: Path) -> str:
    (folder / "rows.csv").write_text(table(rows, ","), encoding="utf-8-sig", newline="")
    return str(folder / "rows.csv")


def as_tsv(rows: Rows, folder: Path) -> str:
    (folder / "rows.tsv.gz").write_bytes(gzip.compress(table(rows, "\t").encode()))
    return str(folder / "rows.tsv.gz")


def as_semicolons(rows: Rows, folder: Path) -> str:
    (folder / "named.csv").write_text(table(rows, ";"), newline="")
    return str(folder / "named.csv")


KINDS: dict[str, Callable[[Rows, Path], str]] = {
    "parquet": as_parquet,
    "arrow": as_arrow,
    "stream": as_stream,
    "saved": as_saved,
    "csv": as_csv,
    "tsv": as_tsv,
    "semicolons": as_semicolons,
}


def contents(pairs: list[PreferencePair]) -> list[PreferencePair]:
    """The pairs without the name of the file in their ids."""
    return [replace(pair, id=pair.id.partition(":")[2]) for pair in pairs]


EVERY_SET = ("parquet", "csv")
SOME = ("UltraFeedback", "NeMo-RL", "Orca, Intel")
CASES = [(k, name) for k in KINDS for name in (SETS if k in EVERY_SET else SOME)]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_table_is_read_as_its_json_lines(tmp_path, name, kind):
    each = SETS[name]
    rows = each.rows(random.Random(1))
    expected = read_sources([as_jsonl(rows, tmp_path)], each.run)
    assert contents(read_sources([KINDS[kind](rows, tmp_path)], each.run)) == contents(expected)


RACO = [
    {
        "id": f"r{k}",
        "prompt": [{"role": "user", "content": 'why, "then"?\nso?'}],
        "response_a": "12",
        "response_b": "null",
        "preferences": {"x": 1 - 2 * (k % 2), "y": None},
        "preference_probabilities": {"x": None, "y": 0.25},
        "pair_weights": {"x": 2.0, "y": 1.0},
    }
    for k in range(3)
]


@pytest.mark.parametrize("kind", KINDS)
def test_our_own_format_in_every_table(tmp_path, kind):
    """Soft labels, weights, and answers that look like numbers or like null."""
    pairs = read_sources([KINDS[kind](RACO, tmp_path)], ["x", "y"])
    assert pairs == read_sources([as_jsonl(RACO, tmp_path)], ["x", "y"])
    assert [type(pair.response_a) for pair in pairs] == [str] * 3  # workers get plain texts
    assert [pair.preferences["y"] for pair in pairs] == [-0.75] * 3


def test_labels_of_a_map_column(tmp_path):
    from pyarrow import parquet

    types = pyarrow.map_(pyarrow.string(), pyarrow.int8())
    names = {"prompt": [RACO[0]["prompt"]], "response_a": ["a"], "response_b": ["b"]}
    labels = pyarrow.array([[("x", -1), ("y", 1)]], type=types)
    file = tmp_path / "maps.parquet"
    parquet.write_table(pyarrow.table({**names, "preferences": labels}), file)
    assert read_sources([str(file)], ["x", "y"])[0].preferences == {"x": -1, "y": 1}


ORCA: Rows = [{"question": f"q {k}", "chosen": f"yes {k}", "rejected": "no"} for k in range(5)]


def ask(pairs: list[PreferencePair]) -> list[Any]:
    return [pair.prompt[0]["content"] for pair in pairs]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (
            "question,chosen,rejected\nq,yes\n",
            r"csv:2: a row must have a cell for .* 3 names, got 2",
        ),
        ("question,chosen,rejected\n\nq,yes,no\n", r"csv:2: a row must have a cell .*, got 0"),
        ("question,chosen,chosen\nq,yes,no\n", r"csv:1: the names .* distinct, got 'chosen' again"),
        ('question,chosen,rejected\nq,"yes,no\n', r"csv:2: a table must be CSV .*\(unexpected end"),
        ('question,chosen,rejected\nq,"y"es,no\n', r"csv:2: a table must be CSV with doubled quo"),
        ("question,chosen,rejected\n", r"csv:1: a data file must hold at least one row"),
        ("question,chosen,rejected\nq,,no\n", r"csv:2: `chosen` must be text, got NoneType"),
    ],
)
def test_damaged_csv(tmp_path, text, match):
    file = tmp_path / "rows.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=match):
        read_sources([str(file)], ["x"])


def test_a_bad_record_is_left_out_if_asked(tmp_path, caplog):
    file = tmp_path / "rows.csv"
    file.write_text('question,chosen,rejected\nq,"a\nb",no\nq,yes\nr,yes,no\n')
    pairs = read_sources([DataSource(str(file), on_bad="skip")], ["x"])
    assert [(pair.id, pair.response_a) for pair in pairs] == [
        ("rows.csv:1", "a\nb"),
        ("rows.csv:3", "yes"),
    ]
    assert "left out 1 rows" in caplog.text
    assert "rows.csv:4: a row must have a cell" in caplog.text
    with pytest.raises(RowError, match=r"rows.csv:4: "):
        read_sources([str(file)], ["x"])


def test_text_that_is_not_utf8_and_a_cut_off_stream(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_bytes(b"question,chosen,rejected\nq,y\xe9s,no\n")
    with pytest.raises(ValueError, match=r"rows.csv:1: text must be UTF-8, got byte 0xe9"):
        read_sources([str(file)], ["x"])
    packed = gzip.compress(table(ORCA * 200, ",").encode())
    file.write_bytes(packed[:-20])
    with pytest.raises(ValueError, match=r"rows.csv:\d+: the gzip stream must be complete"):
        read_sources([str(file)], ["x"])


def test_turns_as_python_writes_them_are_no_text(tmp_path):
    file = tmp_path / "rows.csv"
    turns = [{"role": "user", "content": "why?"}]
    file.write_text(table([{"prompt": str(turns), "chosen": "yes", "rejected": "no"}], ","))
    with pytest.raises(RowError, match=r"rows.csv:2: `prompt` must be text, or turns in JSON, got"):
        read_sources([str(file)], ["x"])


def test_long_cells(tmp_path):
    """Python's own limit is 131,072 characters."""
    rows = [{"question": "q " * 100_000, "chosen": "yes", "rejected": "no"}]
    assert ask(read_sources([as_csv(rows, tmp_path)], ["x"])) == ["q " * 100_000]


def test_numbers_that_cells_spell(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("prompt,chosen,rejected,raco_s_x\nw,a,b,+1\nw,a,b,-1\nw,a,b,\nw,a,b,0\n")
    assert [p.preferences["x"] for p in read_sources([str(file)], ["x"])] == [1, -1, 0, 0]
    file.write_text("prompt,chosen,rejected,raco_s_x\nw,a,b,yes\n")
    with pytest.raises(RowError, match=r"`raco_s_x` must be \+1, -1 or 0, got 'yes'"):
        read_sources([str(file)], ["x"])


def test_a_damaged_table_is_named(tmp_path):
    file = Path(as_parquet(ORCA, tmp_path))
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"rows.parquet: a table must be complete, got an error"):
        read_sources([str(file)], ["x"])


def test_two_columns_of_one_name(tmp_path):
    from pyarrow import parquet

    file = tmp_path / "twice.parquet"
    twice = pyarrow.table([["q"], ["yes"], ["no"]], names=["question", "chosen", "chosen"])
    parquet.write_table(twice, file)
    with pytest.raises(
        ValueError, match=r"twice.parquet: the names .* distinct, got 'chosen' again"
    ):
        read_sources([str(file)], ["x"])


def test_bad_rows_of_a_table_are_named_by_their_number(tmp_path):
    file = as_parquet([*ORCA[:2], ORCA[2] | {"rejected": "yes 2"}], tmp_path)
    with pytest.raises(RowError, match=r"rows.parquet:3: `responses` must differ"):
        read_sources([file], ["x"])


@pytest.mark.parametrize(("package", "path"), [("pyarrow", "rows.parquet"), ("datasets", "saved")])
def test_without_the_extra_the_error_names_it(tmp_path, monkeypatch, package, path):
    as_parquet(ORCA, tmp_path)
    as_saved(ORCA, tmp_path)

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(extra, "import_module", missing)
    match = (
        rf"{path}: this kind of data needs the package {package}, .*; pip install 'raco-fast\[da"
    )
    with pytest.raises(ValueError, match=match):
        read_sources([str(tmp_path / path)], ["x"])


def test_a_pattern_is_its_files_in_order(tmp_path):
    for k in (2, 0, 1):
        (tmp_path / f"part-{k}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in ORCA[2 * k : 2 * k + 2])
        )
    source = DataSource(str(tmp_path / "part-*.jsonl"))
    pairs = read_sources([source], ["x"])
    assert ask(pairs) == [row["question"] for row in ORCA]
    assert pairs[-1].id == "part-2.jsonl:1"
    assert read_sources([replace(source, limit=3)], ["x"]) == pairs[:3]
    assert read_sources([replace(source, limit=4)], ["x"]) == pairs[:4]
    (tmp_path / "one[1].jsonl").write_text(json.dumps(ORCA[0]))
    assert files_of(str(tmp_path / "one[1].jsonl")) == [str(tmp_path / "one[1].jsonl")]
    with pytest.raises(FileNotFoundError, match=r"must name files, got the pattern .* fits none"):
        read_sources([str(tmp_path / "no*")], ["x"])


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_standard_input(tmp_path, monkeypatch, kind):
    file = {"jsonl": as_jsonl, "csv": as_csv, "parquet": as_parquet}[kind](ORCA, tmp_path)
    with open(file) as given:
        monkeypatch.setattr(sys, "stdin", given)
        pairs = read_sources(["-"], ["x"])
    assert ask(pairs) == [row["question"] for row in ORCA]
    assert pairs[4].id == "stdin:5"
    with open(tmp_path / "rows.jsonl", "w+") as empty:
        monkeypatch.setattr(sys, "stdin", empty)
        with pytest.raises(
            ValueError, match="-:1: a data file must hold at least one row, got none"
        ):
            read_sources(["-"], ["x"])


def test_splits_of_a_saved_data_set(tmp_path):
    both = {"train": datasets.Dataset.from_list(ORCA[:3]), "test": datasets.Dataset.from_list(ORCA)}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "splits")
    source = DataSource(str(tmp_path / "splits"), split="train")
    assert ask(read_sources([source], ["x"])) == ["q 0", "q 1", "q 2"]
    with pytest.raises(
        ValueError, match=r"`split` of .*splits must be one of \['train', 'test'\], g"
    ):
        read_sources([source.path], ["x"])
    with pytest.raises(ValueError, match=r"`split` of .* must be one of .*, got 'dev'; name it"):
        read_sources([replace(source, split="dev")], ["x"])
    with pytest.raises(ValueError, match=r"`revision` of .* must be left out, got 'main'"):
        read_sources([replace(source, revision="main")], ["x"])
    with pytest.raises(
        ValueError, match=r"`split` of .* left out, got 'train': it is one data set"
    ):
        read_sources([DataSource(as_saved(ORCA, tmp_path), split="train")], ["x"])
    with pytest.raises(
        ValueError, match=r"`config` of .*jsonl must be left out, got 'a': it is of"
    ):
        read_sources([DataSource(as_jsonl(ORCA, tmp_path), config="a")], ["x"])


def test_rows_that_were_selected_and_shuffled_stay_so(tmp_path):
    chosen = datasets.Dataset.from_list(ORCA).shuffle(seed=3).select(range(3))
    chosen.save_to_disk(tmp_path / "chosen")
    assert ask(read_sources([str(tmp_path / "chosen")], ["x"])) == chosen["question"][:]


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder in the working directory, which `datasets` reads in place of the hub's data set."""
    data = tmp_path / "org" / "pairs" / "data"
    data.mkdir(parents=True)
    as_parquet(ORCA, data)
    (data / "rows.parquet").rename(data / "train-0.parquet")
    as_parquet(ORCA[:2], data)
    (data / "rows.parquet").rename(data / "test-0.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return data


def test_a_data_set_of_the_hub(hub, caplog):
    source = DataSource("hub:org/pairs", split="train")
    pairs = read_sources([source], ["x"])
    assert [(pair.id, pair.response_a) for pair in pairs] == [
        (f"pairs:{k + 1}", f"yes {k}") for k in range(5)
    ]
    assert "hub:org/pairs: the folder org/pairs is read, which hides the hub's" in caplog.text
    assert ask(read_sources([replace(source, split="train[:2]")], ["x"])) == ["q 0", "q 1"]
    match = r"`split` of hub:org/pairs must be one of \['train', 'test'\], got None; name it"
    with pytest.raises(ValueError, match=match):
        read_sources(["hub:org/pairs"], ["x"])
    match = r"hub:org/pairs: a data set must be one that .* can read, got an error \(.*other"
    with pytest.raises(ValueError, match=match):
        read_sources([replace(source, config="other")], ["x"])


def test_a_data_set_with_one_split_needs_no_name(hub):
    (hub / "test-0.parquet").unlink()
    assert len(read_sources(["hub:org/pairs"], ["x"])) == 5


def test_what_the_hub_is_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *a, **k: ["dev", "train"])

    def load(*arguments: Any, **named: Any) -> Any:
        asked.append((arguments, named))
        return datasets.Dataset.from_list(ORCA)

    monkeypatch.setattr(datasets, "load_dataset", load)
    read_sources([DataSource("hub:o/n", config="c", split="dev", revision="abc")], ["x"])
    assert asked == [(("o/n", "c"), {"split": "dev", "revision": "abc"})]


def test_a_data_set_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"hub:nobody/nothing: a data set must be one that the lib"
    ):
        read_sources(["hub:nobody/nothing"], ["x"])
