import gzip
import json
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pair_files import read_pairs

from raco_fast.dpo.data.data_source import DataSource
from raco_fast.dpo.data.pairs import ConciseRule, PreferencePair
from raco_fast.dpo.data.rows import RowError
from raco_fast.dpo.data.sources import read_sources

USER = {"role": "user", "content": "why?"}


def label_counts(pairs: Sequence[PreferencePair]) -> dict[str, dict[int, int]]:
    """How many pairs carry +1, -1 and 0, per objective."""
    return {
        name: {label: sum(p.preferences[name] == label for p in pairs) for label in (1, -1, 0)}
        for name in pairs[0].preferences
    }


def make_row(id="r", a="yes", b="no", prompt=None, **preferences):
    return {
        "id": id,
        "prompt": [USER] if prompt is None else prompt,
        "response_a": a,
        "response_b": b,
        "preferences": preferences or {"helpful": 1},
    }


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def write(tmp_path):
    def writer(content, name="rows.jsonl"):
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return file

    return writer


def words(text):
    return len(text.split())


@pytest.mark.parametrize(
    "container", ["jsonl", "no newline at the end", "gzip", "list", "list and empty lines", "bom"]
)
def test_containers_hold_the_same_pairs(write, container):
    rows = [make_row("x", a="über"), make_row("y", helpful=-1)]
    text = lines(*rows)
    content = {
        "jsonl": text,
        "no newline at the end": text.rstrip("\n"),
        "gzip": gzip.compress(text.encode()),
        "list": json.dumps(rows, indent=1) + "\n",
        "bom": "\ufeff" + text,
        "list and empty lines": json.dumps(rows) + "\n\n \n",
    }[container]
    pairs = read_pairs(write(content), ["helpful"])
    expected = PreferencePair("x", [USER], "über", "no", {"helpful": 1})
    assert pairs[0] == expected
    assert [p.preferences["helpful"] for p in pairs] == [1, -1]


def test_gzip_is_known_by_content(write):
    file = write(gzip.compress(lines(make_row()).encode()), "rows.jsonl")
    assert len(read_pairs(file, ["helpful"])) == 1
    assert len(read_pairs(write(lines(make_row()), "plain.jsonl.gz"), ["helpful"])) == 1


GOOD = json.dumps(make_row("x"))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", r"rows\.jsonl:1: a data file must hold at least one row"),
        ("[]", r"rows\.jsonl:1: a data file must hold at least one row"),
        ("\n", r"rows\.jsonl:1: a line must hold one JSON object, got an empty line"),
        (f"{GOOD}\n\n{GOOD}\n", r"rows\.jsonl:2: a line .* got an empty line"),
        (f"{GOOD}\n  \n", r"rows\.jsonl:2: a line .* got an empty line"),
        (f"{GOOD}\n{GOOD[:-9]}", r"rows\.jsonl:2: a row must be complete JSON.*half-written"),
        (f"{GOOD}\n{GOOD[:40]}\n", r"rows\.jsonl:2: a row must be complete JSON.*column \d+"),
        (f"{GOOD}{GOOD}\n", r"rows\.jsonl:1: a row must be complete JSON.*Extra data"),
        (f"{GOOD}\n[1]\n", r"rows\.jsonl:2: a row must be a JSON object, got list"),
        ("3\n", r"rows\.jsonl:1: a row must be a JSON object, got int"),
        (GOOD.encode() + b"\n\xff\xfe\n", r"rows\.jsonl:2: text must be UTF-8, got byte 0xff"),
        (f"[\n{GOOD},\n{GOOD[:30]}", r"rows\.jsonl:3 \(item 2\): a row must be complete JSON"),
        (f"[{GOOD}\n", r"rows\.jsonl:1 \(item 1\): an item must be followed by .*the end"),
        (f"[{GOOD}; {GOOD}]", r"\(item 1\): an item must be followed by .*got ';'"),
        (f"[{GOOD}] tail", r"rows\.jsonl: a JSON list must end the file, got 4 characters"),
        ("[1]", r"rows\.jsonl:1 \(item 1\): a row must be a JSON object, got int"),
    ],
)
def test_damaged_file(write, content, match):
    with pytest.raises(ValueError, match=match):
        read_pairs(write(content), ["helpful"])


def test_truncated_gzip_names_the_line(write):
    packed = gzip.compress(lines(*(make_row(str(k)) for k in range(50))).encode())
    match = r"cut\.jsonl\.gz:\d+: the gzip stream must be complete.*copy or write it again"
    with pytest.raises(ValueError, match=match):
        read_pairs(write(packed[:-12], "cut.jsonl.gz"), ["helpful"])
    damaged = packed[:40] + bytes(9) + packed[49:]
    with pytest.raises(ValueError, match=r"bad\.jsonl\.gz:\d+: the gzip stream must be complete"):
        read_pairs(write(damaged, "bad.jsonl.gz"), ["helpful"])
    wrong_checksum = packed[:-8] + bytes(4) + packed[-4:]
    with pytest.raises(ValueError, match=r"crc\.jsonl\.gz:51: the gzip stream .*CRC check failed"):
        read_pairs(write(wrong_checksum, "crc.jsonl.gz"), ["helpful"])


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`path` must be a data file, got '.*none\.jsonl'"):
        read_pairs(tmp_path / "none.jsonl", ["helpful"])
    with pytest.raises(FileNotFoundError, match="which is a folder, which no `save_to_disk`"):
        read_pairs(tmp_path, ["helpful"])


def test_limit_reads_no_further(write):
    file = write(lines(make_row("x"), make_row("y")) + "{broken")
    assert [p.id for p in read_pairs(file, ["helpful"], limit=2)] == ["x", "y"]
    with pytest.raises(ValueError, match=r"rows\.jsonl:3"):
        read_pairs(file, ["helpful"], limit=3)


UNUSABLE = [
    (make_row(a="no", b=" no\n"), r"`responses` must differ, got two identical ones"),
    (make_row(a=""), r"`response a` must hold text, got an empty response"),
    (make_row(b=" \n"), r"`response b` must hold text, got an empty response"),
    (make_row(prompt=[]), r"`prompt` must end with a user or tool turn, got no turns"),
    (
        make_row(prompt=[USER, {"role": "assistant", "content": "so"}]),
        r"`prompt` must end with a user or tool turn, got the role 'assistant' at its end",
    ),
    (
        make_row(prompt=[{"role": "user", "content": " "}]),
        r"`prompt\[0\]\.content` must hold text, got an empty turn",
    ),
]


@pytest.mark.parametrize(("row", "match"), UNUSABLE)
def test_row_that_cannot_be_a_pair(write, caplog, row, match):
    file = write(lines(make_row("first"), row, make_row("last")))
    with pytest.raises(RowError, match=r"rows\.jsonl:2: " + match):
        read_pairs(file, ["helpful"])
    with caplog.at_level(logging.WARNING):
        pairs = read_sources([DataSource(str(file), on_bad="skip")], ["helpful"])
    assert [p.id for p in pairs] == ["first", "last"]
    assert "left out 1 rows, the first because: " in caplog.text
    assert "rows.jsonl:2" in caplog.text


def test_source_without_one_usable_row(write):
    file = write(lines(make_row(a="no")))
    with pytest.raises(ValueError, match=r"at least one pair, got none \(1 left out.*identical"):
        read_sources([DataSource(str(file), on_bad="skip")], ["helpful"])


@pytest.mark.parametrize(
    ("turns", "match"),
    [
        ([{"role": "tool", "content": "x"}, USER], r"`prompt\[0\]\.role` must .*got 'tool'"),
        (
            [USER, {"role": "system", "content": "x"}, USER],
            r"`prompt\[1\]\.role` must be .*\('system' in the first turn only\), got 'system'",
        ),
    ],
)
def test_roles(write, turns, match):
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: " + match):
        read_pairs(write(lines(make_row(prompt=turns))), ["helpful"])


def test_ids(write):
    match = r"rows\.jsonl:3: `id` must be unique .*got 'x' again \(first at .*rows\.jsonl:1\)"
    with pytest.raises(ValueError, match=match):
        read_pairs(write(lines(make_row("x"), make_row("y"), make_row("x"))), ["helpful"])
    nameless = {k: v for k, v in make_row().items() if k != "id"}
    pairs = read_pairs(write(lines(nameless, make_row(7), nameless)), ["helpful"])
    assert [p.id for p in pairs] == ["rows.jsonl:1", "7", "rows.jsonl:3"]
    for bad in ("", True, 1.5, ["x"]):
        with pytest.raises(ValueError, match=r":1: `id` must be a non-empty string or an integer"):
            read_pairs(write(lines(make_row(bad))), ["helpful"])


def test_missing_objective_is_an_error_unless_the_source_declares_a_subset(write):
    file = str(write(lines(make_row(helpful=-1))))
    objectives = ["helpful", "harmless"]
    match = (
        r"rows\.jsonl:1: a row must label every objective.*no field for 'harmless'.*\['helpful'\]"
    )
    with pytest.raises(ValueError, match=match):
        read_pairs(file, objectives)
    for declared in ("helpful", ["helpful"]):
        (pair,) = read_sources([DataSource(file, declared)], objectives)
        assert pair.preferences == {"helpful": -1, "harmless": 0}
    with pytest.raises(ValueError, match=r"no field for 'harmless'"):
        read_sources([DataSource(file, ["helpful", "harmless"])], objectives)


def test_declared_subset_hides_other_labels(write):
    file = str(write(lines(make_row(helpful=-1, harmless=1))))
    (pair,) = read_sources([DataSource(file, "harmless")], ["helpful", "harmless"])
    assert pair.preferences == {"helpful": 0, "harmless": 1}


def test_sources_are_mixed_in_order(write):
    chosen = {"prompt": "who?", "chosen": "me", "rejected": "you"}
    first = write(lines(chosen, {**chosen, "chosen": "us"}), "first.jsonl")
    second = write(json.dumps([make_row("z", helpful=0, harmless=-1)]), "second.json")
    sources = [DataSource(str(first), "harmless", limit=1), str(second)]
    pairs = read_sources(sources, ["harmless", "helpful"])
    assert [(p.id, p.preferences) for p in pairs] == [
        ("first.jsonl:1", {"harmless": 1, "helpful": 0}),
        ("z", {"harmless": -1, "helpful": 0}),
    ]
    assert label_counts(pairs) == {
        "harmless": {1: 1, -1: 1, 0: 0},
        "helpful": {1: 0, -1: 0, 0: 2},
    }


def test_files_of_one_name_get_different_ids(write, tmp_path):
    (tmp_path / "more").mkdir()
    row = {"prompt": "who?", "chosen": "me", "rejected": "you"}
    a, b = write(lines(row), "rows.jsonl"), write(lines(row), "more/rows.jsonl")
    pairs = read_sources([str(a), str(b)], ["helpful"])
    assert [p.id for p in pairs] == ["rows.jsonl:1", "rows.jsonl#2:1"]
    twice = write(lines(make_row("x")), "x.jsonl")
    with pytest.raises(ValueError, match=r"`id` must be unique over all sources, got 'x' again"):
        read_sources([str(twice), str(twice)], ["helpful"])


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ({"objective": "polite"}, r"`objective` of .* must name objectives of the run .*'polite'"),
        ({"objective": []}, r"`objective` of .* must name at least one objective, got \[\]"),
        ({"objectives": {"polite": "x"}}, r"`objectives` of .* must name obj.*\['polite'\]"),
        ({"pairs_per_row": 0}, r"`pairs_per_row` of .* must be at least 1, got 0"),
        (
            {"objective": "helpful", "objectives": {"helpful": "x"}},
            r"`objectives` of .* must be the only one .* got `objective` 'helpful' beside it",
        ),
        ({"limit": 0}, r"`limit` of .* must be at least 1, got 0"),
        ({"on_bad": "ignore"}, r"`on_bad` of .* must be 'error' or 'skip', got 'ignore'"),
    ],
)
def test_bad_source(write, source, match):
    with pytest.raises(ValueError, match=match):
        read_sources([DataSource(str(write(lines(make_row()))), **source)], ["helpful"])


def test_bad_objectives(write):
    file = write(lines(make_row()))
    with pytest.raises(
        TypeError, match=r"`objectives` must be a sequence of names, got the string"
    ):
        read_pairs(file, "helpful")
    with pytest.raises(ValueError, match=r"`objectives` must hold at least one name .*got \[\]"):
        read_pairs(file, [])
    with pytest.raises(ValueError, match=r"no blank one, got \['helpful', ' '\]"):
        read_pairs(file, ["helpful", " "])
    with pytest.raises(ValueError, match=r"`objectives` must be distinct, got \['a', 'a'\]"):
        read_pairs(file, ["a", "a"])
    with pytest.raises(ValueError, match=r"`sources` must name at least one file, got none"):
        read_sources([], ["helpful"])
    with pytest.raises(ValueError, match=r"`concise\.objective` must be one of .*got 'concise'"):
        read_pairs(file, ["helpful"], concise=ConciseRule(words))


@pytest.mark.parametrize(
    ("a", "b", "label"),
    [
        (10, 7, -1),
        (7, 10, 1),
        (10, 8, 0),  # 2 tokens < 3
        (30, 27, -1),  # exactly 3 tokens and exactly 10 %
        (31, 28, 0),  # 3 tokens, 9.7 %
        (5, 5, 0),
        (0, 4, 1),
    ],
)
def test_concise_thresholds(a, b, label):
    rule = ConciseRule(count=len)
    assert rule.label("x" * a, "x" * b) == label


@given(st.integers(0, 200), st.integers(0, 200))
def test_concise_label_turns_sign_when_responses_are_swapped(a, b):
    rule = ConciseRule(len)
    assert rule.label("x" * a, "x" * b) == -rule.label("x" * b, "x" * a)


def test_concise_never_overwrites_a_label(write):
    long, short = "so " * 20, "so it is"
    rows = [
        make_row("absent", long, short, helpful=1),
        make_row("human", long, short, helpful=1, concise=1),
        make_row("tie", long, short, helpful=1, concise=0),
    ]
    file = write(lines(*rows))
    rule = ConciseRule(words)
    pairs = read_pairs(file, ["helpful", "concise"], concise=rule)
    assert [p.preferences["concise"] for p in pairs] == [-1, 1, 0]
    with pytest.raises(ValueError, match=r":1: a row must label every .*no field for 'concise'"):
        read_pairs(file, ["helpful", "concise"])


def test_concise_under_another_name_beside_a_chosen_rejected_file(write):
    file = write(lines({"prompt": "who?", "chosen": "me " * 9, "rejected": "you"}))
    rule = ConciseRule(words, objective="brief")
    (pair,) = read_pairs(file, ["brief", "helpful"], concise=rule)
    assert pair.preferences == {"brief": -1, "helpful": 1}


REAL = [
    ("hh_rlhf", ("helpful", "harmless", "concise"), 3041, 500),
    ("qa_feedback", ("helpful", "grounded", "concise"), 2140, 400),
    ("nlg_ratings", ("informative", "natural", "quality", "concise"), 1081, 205),
]


@cache
def real_pairs(shared: Path, name: str, part: str) -> list[PreferencePair]:
    (objectives,) = (each for file, each, *_ in REAL if file == name)
    return read_pairs(shared / "data" / f"{name}.{part}.jsonl.gz", list(objectives))


@pytest.mark.parametrize(
    ("name", "objectives", "n_train", "n_test"), REAL, ids=[r[0] for r in REAL]
)
def test_real_data_counts(shared, name, objectives, n_train, n_test):
    train, test = (real_pairs(shared, name, part) for part in ("train", "test"))
    assert {tuple(pair.preferences) for pair in train} == {objectives}
    assert (len(train), len(test)) == (n_train, n_test)
    for pairs in (train, test):
        assert {sum(c.values()) for c in label_counts(pairs).values()} == {len(pairs)}
    first_turns = [{p.prompt[0]["content"] for p in pairs} for pairs in (train, test)]
    overlap = len(first_turns[0] & first_turns[1])  # a number: a failure must not print the text
    assert overlap == 0


# Per cent of the pairs labelled for both objectives, as the data's own description states it.
DISAGREEMENT = [
    ("hh_rlhf", "helpful", "concise", 61),
    ("hh_rlhf", "harmless", "concise", 43),
    ("qa_feedback", "helpful", "grounded", 40),
    ("qa_feedback", "helpful", "concise", 53),
    ("qa_feedback", "grounded", "concise", 66),
    ("nlg_ratings", "informative", "concise", 66),
    ("nlg_ratings", "natural", "concise", 47),
]


@pytest.mark.parametrize(("name", "one", "other", "per_cent"), DISAGREEMENT)
def test_real_disagreement(shared, name, one, other, per_cent):
    pairs = [pair for part in ("train", "test") for pair in real_pairs(shared, name, part)]
    products = [p.preferences[one] * p.preferences[other] for p in pairs]
    both = [x for x in products if x]
    assert 100 * both.count(-1) / len(both) == pytest.approx(per_cent, abs=1)


def test_real_label_counts(shared):
    pairs = real_pairs(shared, "hh_rlhf", "train")
    assert label_counts(pairs) == {
        "helpful": {1: 730, -1: 742, 0: 1569},
        "harmless": {1: 800, -1: 769, 0: 1472},
        "concise": {1: 1339, -1: 1395, 0: 307},
    }
    on_one_pair = [p for p in pairs if p.preferences["helpful"] and p.preferences["harmless"]]
    assert len(on_one_pair) == 0
