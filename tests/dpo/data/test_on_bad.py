"""`on_bad: skip` leaves out every bad row and counts it; a bad file is an error either way."""

import gzip
import json
import logging

import pytest

from raco_fast.dpo.data.data_source import DataSource
from raco_fast.dpo.data.pairs import ConciseRule
from raco_fast.dpo.data.rows import RowError
from raco_fast.dpo.data.sources import read_sources

GOOD = [
    {"id": f"g{k}", "prompt": [{"role": "user", "content": f"why {k}?"}], "response_a": "yes"}
    | {"response_b": "no", "preferences": {"x": 1, "y": -1}}
    for k in range(3)
]


def spelled(*rows: dict) -> list[bytes]:
    return [json.dumps(row).encode() for row in rows]


def bad(**fields) -> bytes:
    return json.dumps(GOOD[0] | {"id": "bad"} | fields).encode()


BAD_LINES = {
    "empty": b"",
    "cut off": bad()[:50],
    "not JSON": b"hello there",
    "not UTF-8": bad().replace(b"yes", b"\xff"),
    "a list": b"[1]",
    "a number": b"3",
    "a key twice": bad().replace(b'"id"', b'"response_a": "so", "id"'),
    "half a character": bad(response_a="\ud83d"),
    "half a character in a key": bad(**{"\udc00": 1}),
    "a long number": bad(note="@").replace(b'"@"', b"9" * 5000),
    "nested": bad(note="@").replace(b'"@"', b"[" * 150 + b"]" * 150),
    "nested deeply": bad(note="@").replace(b'"@"', b"[" * 10**5 + b"]" * 10**5),
    "no field": json.dumps({"id": "bad", "prompt": "so"}).encode(),
    "unknown label": bad(preferences={"x": 2, "y": 1}),
    "huge label": bad(preferences={"x": 10**400, "y": 1}),
    "large label": bad(preferences={"x": 10**299, "y": 1}),
    "no label": bad(preferences={"x": 1}),
    "true label": bad(preferences={"x": True, "y": 1}),
    "labels": bad(preferences=[1]),
    "probability": bad(preferences={"y": 1}, preference_probabilities={"x": 10**400}),
    "huge weight": bad(pair_weights=10**400),
    "large weight": bad(pair_weights=-(10**299)),
    "infinite weight": bad(pair_weights=float("inf")),
    "no number": bad(pair_weights=float("nan")),
    "prompt": bad(prompt="why?"),
    "role": bad(prompt=[{"role": {"a": 1}, "content": "so"}]),
    "unknown role": bad(prompt=[{"role": "human", "content": "so"}]),
    "response": bad(response_a=["yes"]),
    "empty response": bad(response_b=" "),
    "identical": bad(response_b="yes"),
    "tools": bad(tools="[{]"),
    "system": bad(system=3),
    "id": bad(id=1.5),
    "an id again": bad(id="g0"),
}


@pytest.fixture
def read(tmp_path):
    def read(content: bytes | list[bytes], on_bad="skip", name="rows.jsonl", **options):
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else b"\n".join(content))
        concise = options.pop("concise", None)
        source = DataSource(str(file), on_bad=on_bad, **options)
        return read_sources([source], ["x", "y"], concise=concise)

    return read


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_an_error_or_left_out(read, caplog, name):
    first, *others = spelled(*GOOD)
    content = [first, BAD_LINES[name], *others]
    with pytest.raises(RowError, match=r"^\S+rows\.jsonl:2: .* must .*, got .*; "):
        read(content, on_bad="error")
    with caplog.at_level(logging.WARNING):
        pairs = read(content)
    assert [pair.id for pair in pairs] == ["g0", "g1", "g2"]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "rows.jsonl: left out 1 rows, the first because: " in message
    assert "rows.jsonl:2: " in message


@pytest.mark.parametrize(
    "name", sorted(BAD_LINES.keys() - {"a list"})
)  # which makes it a JSON list
def test_the_first_line_may_be_bad(read, name):
    pairs = read([BAD_LINES[name], *spelled(*GOOD)])
    assert [pair.id for pair in pairs][-2:] == ["g1", "g2"]


@pytest.mark.parametrize("name", sorted(BAD_LINES.keys() - {"an id again"}))
def test_not_every_line_may_be_bad(read, name):
    with pytest.raises(ValueError, match=r"^\S+rows\.jsonl.* must .*rows\.jsonl:1|format"):
        read([BAD_LINES[name], BAD_LINES[name], b""])


def test_all_of_a_kind_are_counted_and_the_first_is_named(read, caplog):
    lines = [BAD_LINES[name] for name in ("cut off", "not UTF-8", "unknown label", "identical")]
    read([*spelled(GOOD[0]), *lines, *spelled(GOOD[1])])
    assert "left out 4 rows, the first because: " in caplog.text
    assert "rows.jsonl:2: a row must be complete JSON" in caplog.text


def test_bad_items_of_a_list_that_can_be_read_on(read):
    lines = [
        BAD_LINES[name] for name in ("unknown label", "a key twice", "a long number", "nested")
    ]
    items = [*spelled(GOOD[0]), b"3", *lines, *spelled(GOOD[1])]
    assert [pair.id for pair in read(b"[" + b",\n".join(items) + b"]")] == ["g0", "g1"]


@pytest.mark.parametrize("name", ["cut off", "not JSON", "not UTF-8", "nested deeply", "empty"])
def test_a_list_that_cannot_be_read_on_is_an_error(read, name):
    items = [*spelled(GOOD[0]), BAD_LINES[name], *spelled(GOOD[1])]
    with pytest.raises(ValueError, match=r"^\S+rows\.jsonl:\d( \(item 2\))?: ") as caught:
        read(b"[" + b",\n".join(items) + b"]")
    assert not isinstance(caught.value, RowError)


def test_the_other_half_of_a_pair_goes_with_a_bad_row(read, caplog):
    rows = [
        {"prompt": p, "response": r, "helpfulness": h, "verbosity": 1}
        for p, r, h in (("a", "1", 1), ("a", "2", "so"), ("b", "1", 1), ("b", "2", 3))
    ]
    fields = {"x": "helpfulness", "y": "verbosity"}
    assert [pair.id for pair in read(spelled(*rows), objectives=fields)] == ["rows.jsonl:3"]
    lines = spelled(*rows)
    lines[1] = b"{"
    assert [pair.id for pair in read(lines, objectives=fields)] == ["rows.jsonl:3"]
    assert "left out 2 rows" in caplog.text


@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_what_concerns_the_file_is_an_error_either_way(read, on_bad):
    lines = b"\n".join(spelled(*GOOD))
    with pytest.raises(ValueError, match="the gzip stream must be complete"):
        read(gzip.compress(lines)[:-5], on_bad)
    with pytest.raises(ValueError, match="got text in UTF-16; convert it: iconv -f UTF-16 "):
        read(lines.decode().encode("utf-16"), on_bad)
    with pytest.raises(ValueError, match=r"rows.jsonl:1: a data file must hold at least one row"):
        read(b"", on_bad)
    with pytest.raises(ValueError, match=r"rows.jsonl:1: `format` must be recognisable"):
        read(b'{"question": "so"}\n{"question": "no"}\n', on_bad)
    row = b'{"prompt": "so", "chosen": "a", "rejected": "b"}'
    with pytest.raises(ValueError, match=r"`objectives` must be empty for a 'chosen-rejected'"):
        read(row, on_bad, objectives={"x": "score"})
    with pytest.raises(ValueError, match=r"jsonl: `objectives` must name fields .*'y': 'long'"):
        read(lines, on_bad, objectives={"x": "x", "y": "long"}, concise=ConciseRule(len, "y"))
    with pytest.raises(ValueError, match=r"no field for 'x'.*\['x', 'y'\]"):
        read(lines, on_bad, objectives={"x": "z"})


def test_the_id_of_a_row_that_is_left_out_is_free(read):
    lines = [bad(id="g1", tools=3), *spelled(*GOOD)]
    assert [pair.id for pair in read(lines)] == ["g0", "g1", "g2"]
