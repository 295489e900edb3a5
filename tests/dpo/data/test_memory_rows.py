"""Rows in memory are read as those of a file: the same pairs, the same refusals."""

import json
import re

import pytest

from raco_fast.dpo.data.data_source import DataSource
from raco_fast.dpo.data.memory_rows import MEMORY
from raco_fast.dpo.data.rows import RowError
from raco_fast.dpo.data.sources import read_sources

ROWS = [
    {"prompt": "tea?", "chosen": "yes", "rejected": "no"},
    {"prompt": "rain?", "chosen": "no", "rejected": "yes", "id": "second"},
]
SOURCE = DataSource(f"{MEMORY}data", objective="kind")


def read(rows, source=SOURCE):
    return read_sources([source], ["kind", "sure"], given={source.path: rows})


def test_rows_are_read_as_those_of_a_file(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    of_file = read_sources([DataSource(str(file), objective="kind")], ["kind", "sure"])
    found = read(ROWS)
    assert [pair.id for pair in found] == ["memory:data:1", "second"]
    for one, two in zip(found, of_file, strict=True):
        assert (one.prompt, one.response_a, one.response_b) == (
            two.prompt,
            two.response_a,
            two.response_b,
        )
        assert one.preferences == two.preferences


def test_a_data_set_is_a_list_of_its_rows():
    datasets = pytest.importorskip("datasets")
    rows = [ROWS[0], ROWS[1] | {"id": None}]
    assert read(datasets.Dataset.from_list(rows)) == read([{**row, "id": None} for row in rows])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (3, "a row must be a JSON object, got int"),
        ({**ROWS[0], "note": {1, 2}}, "a row must hold what JSON has .* got a set in `note`"),
        ({**ROWS[0], "note": [b"private"]}, "got a value of another kind within a list"),
        ({**ROWS[0], "chosen": "whose \ud83d"}, "`chosen` must"),
        ({**ROWS[0], "score": 10**400}, "`score` must"),
        ({**ROWS[0], "chosen": "no"}, "`responses` must differ"),
        ({1: "a", "1": "b"}, "must"),
    ],
)
def test_what_is_refused_in_a_file_is_refused_here(row, message):
    with pytest.raises(RowError, match=f"^memory:data:2: .*{message}") as refused:
        read([ROWS[0], row])
    assert not re.search("private|whose", str(refused.value))
    assert len(read([ROWS[0], row], DataSource(SOURCE.path, "kind", on_bad="skip"))) == 1


def test_no_rows_and_no_such_rows():
    with pytest.raises(ValueError, match=r"memory:data:1: .* at least one row, got none"):
        read([])
    with pytest.raises(ValueError, match="`path` must name a file, got 'memory:data'"):
        read_sources([SOURCE], ["kind"])
    with pytest.raises(ValueError, match="`split` of memory:data must be left out"):
        read(ROWS, DataSource(SOURCE.path, "kind", split="train"))
