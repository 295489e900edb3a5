"""YAML and JSON as plain values: no surprises, no objects, no endless work."""

import contextlib
import io
import json
import time

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raco_fast.settings.text import DEEPEST, MOST_BYTES, LimitError, TextError, load, read


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("weights: {no: 0.5, yes: 0.5}", {"weights": {"no": 0.5, "yes": 0.5}}),
        ("{1: a, null: b, 1.5: c, true: d}", {"1": "a", "null": "b", "1.5": "c", "true": "d"}),
        ("[1e-5, 5.0e-6, .5, -3, 1_000, 0x1F, +2, 1.]", [1e-5, 5e-6, 0.5, -3, 1000, 31, 2, 1.0]),
        (
            "[yes, no, on, off, true, False, null, ~, '']",
            ["yes", "no", "on", "off", True, False, None, None, ""],
        ),
        (
            "[010, 2026-01-01, '1:30', '1', \"2\", !!str 3]",
            [10, "2026-01-01", "1:30", "1", "2", "3"],
        ),
        (
            "a: &x {b: 1}\nc: *x\nd: {<<: *x, e: 2}",
            {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1, "e": 2}},
        ),
        ("a: {<<: [{b: 1}, {b: 2, c: 3}], c: 4}", {"a": {"b": 1, "c": 4}}),
        ("&k name: 1\nother: {*k : 2}", {"name": 1, "other": {"name": 2}}),
        ("a: |\n  two\n  lines\n", {"a": "two\nlines\n"}),
        ("# nothing\n", None),
        ("", None),
        ('{"a": "\\ud83c\\udf75", "b": [1e5, -0.0]}', {"a": "🍵", "b": [1e5, 0.0]}),
        ('{\n\t"a": 1,\n \t"b\t": "\t"}', {"a": 1, "b\t": "\t"}),
        ("[.inf, -.inf, 0o17, null, NULL]", [float("inf"), -float("inf"), 15, None, None]),
        ("a: 🍵", {"a": "🍵"}),
    ],
)
def test_what_text_stands_for(text, value):
    assert load(text, "x") == value


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", r"x:3: a name must be given once, got 'a' twice; remove one"),
        ('{"a": 1, "a": 2}', r"x:1: a name must be given once, got 'a' twice"),
        ("a: !!python/object/apply:os.system [ls]", r"x:1: values must have no tag, got 'tag:yaml"),
        ("a: !mine 3", r"values must have no tag, got '!mine'"),
        (BOMB, r"x:\d: a config must hold at most 50000 values, got more; are aliases"),
        ("a: &a [*a]", r"x:1: `\*a` must stand after what it names; write it out"),
        ("a: *nobody", "x:1: text must be YAML, got found undefined alias 'nobody'"),
        ("[" * 100000, r"x:?\d?: values must be nested at most 40 deep, got more; flatten"),
        ("- " * 3000 + "1", "nested at most 40 deep, got more; flatten"),
        ("{a: " * 3000, "nested at most 40 deep, got more; flatten"),
        (
            json.dumps([[]]).replace("[]", "[" * 60 + "]" * 60),
            "nested at most 40 deep, got more; flatten",
        ),
        ("a: " + "9" * 5000, r"x:1: numbers must have at most 250 digits, got 9{40}\.\.\."),
        (
            '{"a": ' + "9" * 5000 + "}",
            "x:1: numbers must have at most 250 digits",
        ),
        ("a: 1\nb: [1, 2", r"x:\d: text must be YAML, got expected ',' or '\]'"),
        ("a: b: c", r"x:1: text must be YAML, got mapping values are not allowed here; correct it"),
        (
            "a: 1\n---\nb: 2",
            r"x:2: text must be YAML, got but found another document",
        ),
        ("a: 'x\0y'", "x: text must be YAML, got unacceptable character"),
        ('a: "\\UFFFFFFFF"', "x: text must be YAML, got"),
        ("%YAML 1." + "9" * 5000 + "\n---\na: 1", "text must be YAML, got"),
        ("? [1, 2]\n: 3", r"x:1: a name must be a text, got a list or a mapping"),
        (
            "a: {<<: 3}",
            "x:1: text must be YAML, got expected a mapping or list of mappings for merging",
        ),
    ],
)
def test_what_is_refused_names_the_place_the_rule_and_the_cure(text, message):
    began = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        load(text, "x")
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            b"",
            r"c.yaml: a config must be a mapping `name: value`, got NoneType of nothing; see",
        ),
        (b"[1]", "must be a mapping `name: value`, got list"),
        (b"just words", "must be a mapping `name: value`, got str"),
        (b"a: 1\nb: \xff", r"c.yaml:2: text must be UTF-8, got byte 0xff; convert the file"),
        (b"\xff\xfea\x00:", "c.yaml:1: text must be UTF-8"),
        (b"#" * (MOST_BYTES + 1), f"at most {MOST_BYTES} bytes, got more"),
        (bytes(range(256)), "c.yaml:"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, raw, message):
    file = tmp_path / "c.yaml"
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        read(file)


def test_files_in_other_encodings_and_places(tmp_path):
    file = tmp_path / "c.yaml"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        file.write_text("a: té", encoding=encoding)
        assert read(file) == {"a": "té"}
    with pytest.raises(FileNotFoundError, match=r"must be a file, got .*, which is a folder"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match="which is nothing; check it"):
        read(tmp_path / "gone.yaml")


SIGNS = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\t\n\x85\0"))
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | SIGNS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(SIGNS, inner, max_size=4),
    max_leaves=12,
)


@given(PLAIN)
@settings(max_examples=50, deadline=None)
def test_json_is_read_as_json_reads_it(value):
    assert load(json.dumps([value]), "x") == [value]
    assert load(json.dumps([value], indent="\t"), "x") == [value]
    with contextlib.suppress(TextError):  # signs that YAML has only when they are escaped
        assert load(json.dumps([value], ensure_ascii=False), "x") == [value]


@given(st.text(alphabet="ab{}[]:,-&*!?|>#%@'\"\\ \n\t0123456789.eE+~<=\0\ud800\x85\ufeffé"))
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_no_text_gives_a_traceback(text):
    check_agrees_with_yaml(text)


@pytest.mark.slow
@given(
    st.text()
    | st.binary().map(lambda raw: raw.decode("latin-1"))
    | st.text(alphabet="a{}[]:,-&*!|>'\"\n ")
)
@settings(max_examples=10_000, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_no_text_whatever_gives_a_traceback(text):
    check_agrees_with_yaml(text)


def check_agrees_with_yaml(text: str) -> None:
    """Where YAML's own loader sees only mappings, lists and quoted text, so do we."""
    try:
        ours = load(text, "x")
    except ValueError as error:
        assert str(error).startswith("x")  # noqa: PT017
        return
    loaded = yaml.load(io.StringIO(text), yaml.BaseLoader)
    assert shape(ours) == shape(loaded) or "<<" in text


def shape(value):
    if isinstance(value, dict):
        return {str(k): shape(v) for k, v in value.items()}
    return [shape(v) for v in value] if isinstance(value, list) else "scalar"


@pytest.mark.parametrize("text", ["1:30", "-1:30:00", "1:30.5", "0x" + "f" * 300, "1" * 260])
def test_numbers_that_readers_of_yaml_take_differently(text):
    with pytest.raises(LimitError, match=r"x:1: numbers must (be decimal|have at most 250 digits)"):
        load(text, "x")
    assert load("'1:30'") == "1:30"


def test_what_is_repeated_is_counted_with_merges_and_a_cycle_ends():
    merged = "a: &a {k: 1, l: 2}\n" + "".join(
        f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n"
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    with pytest.raises(LimitError, match="at most 50000 values"):
        load(merged)
    with pytest.raises(ValueError, match=r"`\*a` must stand after what it names"):
        load("a: &a {<<: *a}")


def test_the_limits_leave_room():
    deep = "[" * (DEEPEST - 1) + "]" * (DEEPEST - 1)
    assert load(deep, "x") is not None
    assert load("- " * (DEEPEST - 1) + "1", "x") is not None
