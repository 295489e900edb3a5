"""Which format a file is in, and formats of one's own."""

import json
import re
from pathlib import Path

import pytest

from raco_fast.dpo.data.data_source import DataSource
from raco_fast.dpo.data.formats import registry
from raco_fast.dpo.data.formats.format import Format
from raco_fast.dpo.data.formats.registry import register_format
from raco_fast.dpo.data.sources import read_sources

DOCS = Path(__file__).resolve().parents[4] / "docs"
QUESTION = {"question": "why?", "first": "yes", "second": "no", "helpful": -1}
TURNS = [{"role": "user", "content": "why?"}]


@pytest.fixture(autouse=True)
def formats(monkeypatch):
    """A registry of the test's own."""
    monkeypatch.setattr(registry, "FORMATS", dict(registry.FORMATS))


@pytest.fixture
def read(tmp_path):
    def reader(row, **source):
        file = tmp_path / "rows.jsonl"
        file.write_text(json.dumps(row) + "\n", encoding="utf-8")
        (pair,) = read_sources([DataSource(str(file), **source)], ["helpful"])
        return pair

    return reader


def test_unknown_format_says_what_it_found(read):
    match = (
        r":1: `format` must be recognisable .* \['choosen', 'prompt', 'rejected'\]; nearest are "
        r"'chosen-rejected' \(without \['chosen'\]\), 'orca' .*, 'raco-s' .*: rename the fields"
    )
    with pytest.raises(ValueError, match=match):
        read({"prompt": "why?", "choosen": "yes", "rejected": "no"})
    with pytest.raises(ValueError, match=r"'pku' \(without a label field that it knows\), "):
        read({"prompt": "why?", "response_0": "yes", "response_1": "no"})
    with pytest.raises(ValueError, match=r"`format` must be 'auto' or one of .*got 'trl'"):
        read(QUESTION, format="trl")
    with pytest.raises(ValueError, match=r"'k11', and 18 more\]"):
        read({f"k{n:02}": 0 for n in range(30)})


@pytest.mark.parametrize("name", registry.FORMATS)
def test_the_page_has_a_row_for_every_format(name):
    """By the fields that its files begin with, of which some rows give the first and the last."""
    lines = (DOCS / "data.md").read_text().splitlines()
    (line,) = [line for line in lines if f"| `{name}` |" in line]
    named = {"raco-s": {"raco_s_<objective>"}, "qa-feedback": {"prediction 1", "prediction 4"}}
    assert all(f"`{each}`" in line for each in named.get(name, registry.FORMATS[name].needs))


def test_the_documented_format_reads_rows_as_strictly_as_the_others(read):
    (example,) = re.findall(r"```python\n(.*?)```", (DOCS / "data.md").read_text(), re.DOTALL)
    exec(example, {})
    pair = read(QUESTION)
    assert (pair.prompt, pair.response_a, pair.response_b) == (TURNS, "yes", "no")
    assert pair.preferences == {"helpful": -1}
    assert read(QUESTION, format="questions") == pair
    with pytest.raises(ValueError, match=r"jsonl:1: `first` must be text, got int; write a string"):
        read({**QUESTION, "first": 1})
    with pytest.raises(ValueError, match=r"no field for 'helpful' \('questions' format, fields \["):
        read({k: v for k, v in QUESTION.items() if k != "helpful"})


def test_ones_own_format_is_asked_before_the_others(read):
    row = {"prompt": "why?", "chosen": "yes", "rejected": "no"}
    assert read(row).response_a == "yes"
    swapped = Format("swapped", {"chosen"}, lambda row: (TURNS, "no", "yes"))
    register_format(swapped)
    assert read(row).response_a == "no"
    assert read(row, format="chosen-rejected").response_a == "yes"


@pytest.mark.parametrize("name", ["auto", "pku"])
def test_a_name_is_given_once(name):
    with pytest.raises(ValueError, match=rf"`form.name` must be a new name, got '{name}'; known"):
        register_format(Format(name, {"x"}, lambda row: (TURNS, "a", "b")))
