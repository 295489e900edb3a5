"""Whatever a data file holds, it gives pairs or an error that begins with the file and quotes none
of its text: valid rows of every format with parts exchanged, and bytes that are nobody's."""

import copy
import csv
import gzip
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from raco_fast.dpo.data.data_source import DataSource
from raco_fast.dpo.data.formats.registry import FORMATS
from raco_fast.dpo.data.label_columns import LabelColumn
from raco_fast.dpo.data.pairs import ConciseRule, PreferencePair
from raco_fast.dpo.data.rendering import TokenOptions
from raco_fast.dpo.data.sources import read_sources
from raco_fast.dpo.data.tokenization import EncodedPair, encode_pairs

SECRET = "sekret"  # in every text of the rows
ASK, YES, NO = f"why {SECRET} ?", f"yes {SECRET} !", f"no {SECRET} !"
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": f"{SECRET} 1"}}}
SCHEMA = {"type": "function", "function": {"name": "clock", "description": f"{SECRET} 2"}}
USER = {"role": "user", "content": ASK}
BEFORE = [
    {"role": "system", "content": f"be {SECRET} ."},
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "clock", "tool_call_id": "1", "content": f"noon {SECRET} ."},
]


def said(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


def spoken(answer: str) -> str:
    return f"\n\nHuman: {ASK}\n\nAssistant: {answer}"


ROWS: dict[str, list[dict[str, Any]]] = {
    "raco": [
        {
            "id": "r-1",
            "prompt": BEFORE,
            "tools": [SCHEMA],
            "response_a": said(YES, reasoning_content=f"{SECRET} 3"),
            "response_b": NO,
            "preferences": {"x": 1},
            "preference_probabilities": {"y": 0.25},
            "pair_weights": {"x": 2, "y": 0.5},
        }
    ],
    "chosen-rejected": [
        {"system": f"be {SECRET} .", "prompt": ASK, "chosen": YES, "rejected": NO, "note": 1},
        {
            "tools": json.dumps([SCHEMA]),
            "chosen": [*BEFORE, said("", tool_calls=json.dumps([CALL]))],
            "rejected": [*BEFORE, said(NO)],
        },
        {"chosen": spoken(YES), "rejected": spoken(NO), "pair_weights": 3},
    ],
    "raco-s": [
        {
            "chosen": [USER, said(YES)],
            "rejected": [USER, said(NO)],
            "raco_s_x": 1.0,
            "raco_s_y": -1,
        }
    ],
    "summary-ab": [
        {"Summary_A": [USER, said(YES)], "Summary_B": [USER, said(NO)], "X": "A", "y": "B"}
    ],
    "pku": [
        {
            "prompt": ASK,
            "response_0": YES,
            "response_1": NO,
            "better_response_id": 1,
            "safer_response_id": 0,
        }
    ],
    "helpsteer2": [
        {"prompt": ASK, "system": f"{SECRET} 4", "response": YES, "helpfulness": 3, "verbosity": 1},
        {"prompt": ASK, "system": f"{SECRET} 4", "response": NO, "helpfulness": 1, "verbosity": 1},
    ],
    "text-score": [{"text": [spoken(NO), spoken(YES)], "score": [0.5, 1]}],
    "helpsteer2-preference": [
        {"prompt": ASK, "response_1": YES, "response_2": NO, "preference_strength": -2}
    ],
    "helpsteer3": [{"context": BEFORE, "response1": YES, "response2": NO, "overall_preference": 1}],
    "shp": [
        {"history": ASK, "human_ref_A": YES, "human_ref_B": NO, "labels": 1}
        | {"score_A": 3, "score_B": 2, "score_ratio": 1.5}
    ],
    "summarize-comparisons": [
        {"info": {"post": ASK, "title": f"{SECRET} 7"}, "summaries": [{"text": YES}, {"text": NO}]}
        | {"choice": 1}
    ],
    "summarize-axes": [
        {"info": {"id": "t", "post": ASK}, "summary": {"text": text, "axes": {"x": x, "y": 2}}}
        for text, x in ((YES, 1), (NO, None), (YES, 4), (NO, 2))
    ],
    "nectar": [
        {"prompt": spoken(""), "answers": [{"answer": YES, "rank": 2.0}, {"answer": NO, "rank": 1}]}
    ],
    "nemo-rl": [
        {
            "context": BEFORE,
            "completions": [
                {"rank": 0, "completion": [said(YES, tool_calls=json.dumps([CALL]))]},
                {"rank": 1, "completion": [said(NO)]},
            ],
        }
    ],
    "ultrafeedback": [
        {
            "instruction": ASK,
            "completions": [
                {"response": YES, "annotations": {"x": {"Rating": "4"}, "y": {"Rating": "1"}}},
                {"response": NO, "annotations": {"x": {"Rating": "N/A"}, "y": {"Rating": "2"}}},
            ],
        }
    ],
    "preference-collection": [
        {"orig_instruction": ASK, "orig_response_A": YES, "orig_response_B": NO}
        | {"orig_preference": "A", "orig_score_A": "4", "orig_score_B": "2"}
    ],
    "qa-feedback": [
        {"question": ASK, "preference": [1, 0, 2, 1, 1, 2], "prediction 1": YES}
        | {"prediction 2": NO, "prediction 3": f"{SECRET} 5", "prediction 4": f"{SECRET} 6"}
    ],
    "argilla": [{"instruction": ASK, "chosen_response": YES, "rejected_response": NO}],
    "orca": [
        {"system": f"{SECRET} 7", "question": ASK, "chosen": YES, "rejected": NO, "status": "tie"}
    ],
    "alpaca": [
        {"instruction": ASK, "input": f"{SECRET} 7", "chosen": YES, "rejected": NO}
        | {"history": [[ASK, YES]]}
    ],
    "sharegpt": [
        {
            "conversations": [
                {"from": "human", "value": ASK},
                {"from": "function_call", "value": json.dumps(CALL["function"])},
                {"from": "observation", "value": f"{SECRET} 7"},
            ],
            "chosen": {"from": "gpt", "value": YES},
            "rejected": {"from": "gpt", "value": NO},
        }
    ],
}
LABELS = {
    "preference-collection": {"x": "orig_preference", "y": "orig_score"},
    "shp": {"x": "labels", "y": LabelColumn("score_ratio", soft={1.0: 0.75, 2.0: 1.0})},
    "summarize-axes": {"x": "x", "y": "y"},
    "ultrafeedback": {"x": "x", "y": "y"},
    "raco": {"x": "x", "y": "y"},
    "raco-s": {"x": "x", "y": LabelColumn("y", "lower")},
    "summary-ab": {"x": "x", "y": LabelColumn("Y", "lower")},
    "pku": {"x": "better_response_id", "y": "safer_response_id"},
    "helpsteer2": {"x": "helpfulness", "y": LabelColumn("verbosity", "lower")},
}
PAIRS = {"helpsteer2": 1, "summarize-axes": 1, "qa-feedback": 5}  # of more rows or of one
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}] {{ m.reasoning_content }}{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)

# Spelled in the file as what no Python value spells.
SPELLED = {'"@long@"': "9" * 5000, '"@deep@"': "[" * 150 + "]" * 150, '"@deepest@"': "[" * 10**5}
ODD = (
    *(None, True, False, 0, 1, -1, 0.5, -0.0, 10**30, 10**400, -(10**400), math.nan, -math.inf),
    *("", " ", "\x00", "\ud800", "\udc00\ud800", "A", "tool", "system", "assistant", "\n\nHuman:"),
    *("[", "null", "[null]", "{}", '[{"a": "\\ud800"}]', "[" * 3000, "9" * 5000, "<end>"),
    *([], {}, [[]], [{}], {"": ""}, {"\ud800": 1}, [None, None], "@long@", "@deep@", "@deepest@"),
)
VALUES = st.sampled_from(ODD) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = st.sampled_from(
    (
        *("id", "system", "system_prompt", "tools", "prompt", "pair_weights", "preferences"),
        *("preference_probabilities", "tool_calls", "name", "thinking", "ratings_a", "note"),
        *("content", "role", "function", "arguments", "chosen", "response", "x", "y"),
    )
)


def message_of(call: Callable[[], Any]) -> str:
    """What the error of a call says, "" where there is none; no text is in any message."""
    try:
        call()
    except (ValueError, OSError) as error:
        message = str(error)
    else:
        message = ""
    assert SECRET not in message
    return message


@dataclass
class Reader:
    """Reads bytes as a data file and checks what comes of it."""

    folder: Path
    tokenizer: Any

    def check(self, content: bytes, run: tuple[str, ...], **source: Any) -> None:
        file = self.folder / "rows.jsonl"
        file.write_bytes(content)
        sources, pairs = [DataSource(str(file), **source)], []
        concise = ConciseRule(len, "x") if len(content) % 2 else None
        message = message_of(lambda: pairs.extend(read_sources(sources, run, concise=concise)))
        if message:
            assert re.match(
                re.escape(str(file)) + r"(:\d+( \((item|answers) [\d and]+\))*)?: ", message
            ), message
            return
        assert pairs
        for pair in pairs:
            assert list(pair.preferences) == list(run)
            assert all(-1 <= label <= 1 for label in pair.preferences.values())
            assert pair.prompt[-1]["role"] in ("user", "tool")
            assert (pair.response_a, pair.answer_a) != (pair.response_b, pair.answer_b)
        # Messages about a pair give its id as it is, which a change may have made a text.
        pairs = [replace(pair, id=f"p-{k}") for k, pair in enumerate(pairs)]
        template = TEMPLATE if len(content) % 3 else None
        message = message_of(lambda: self.encode(pairs, template))
        assert message.startswith("pair ") or not message

    def encode(self, pairs: list[PreferencePair], template: str | None) -> list[EncodedPair]:
        self.tokenizer.chat_template = template
        return encode_pairs(self.tokenizer, pairs, TokenOptions(special_text="drop"))[0]


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Reader:
    """With a tokenizer of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<end>", *alphabet]
    core = Tokenizer(models.BPE(vocab={c: k for k, c in enumerate(names)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    return Reader(tmp_path_factory.mktemp("any"), tokenizer)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (list or object, key) in a value."""
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in list(parts):
        yield value, key
        if isinstance(part, (dict, list)):
            yield from places(part)


def doubled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows and the same once more, with another prompt and another id."""
    text = json.dumps(rows)
    return json.loads(text) + json.loads(text.replace(ASK, f"{ASK} and").replace("r-1", "r-2"))


@st.composite
def mutated(draw: st.DrawFn, rows: list[dict[str, Any]]) -> bytes:
    """Rows with up to three places changed, in one of the containers, perhaps damaged."""
    rows = doubled(rows)
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        inside = draw(st.sampled_from((*rows, *rows, *rows, rows)))
        found = list(places(inside)) if isinstance(inside, (dict, list)) else []
        if found:
            change(draw, found)
    plain = draw(st.booleans())
    text = "\n".join(json.dumps(row, ensure_ascii=plain) for row in rows)
    container = draw(st.integers(0, 4))
    if container == 3:
        text = "[" + text.replace("\n", ",\n") + "]"
    if container == 4 and all(isinstance(row, dict) for row in rows):
        text = as_csv(rows)
    if draw(st.integers(0, 15)) == 15:
        text = text.replace("{", '{"id": 1, "prompt": "", ', 1)  # keys that are there
    for name, spelling in SPELLED.items():
        text = text.replace(name, spelling)
    return damaged(draw, text)


def as_csv(rows: list[dict[str, Any]]) -> str:
    """A table of the rows: texts as they are, other values as JSON, null as nothing."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(names)
    for row in rows:
        cells = [row.get(name) for name in names]
        writer.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in cells])
    return out.getvalue().replace("null", "")


def change(draw: st.DrawFn, found: list[tuple[Any, Any]]) -> None:
    """Change one of the places."""
    holder, key = draw(st.sampled_from(found))
    match draw(st.sampled_from(("change", "change", "change", "remove", "add", "copy"))):
        case "change":
            holder[key] = copy.deepcopy(draw(VALUES))
        case "remove":
            del holder[key]
        case "add" if isinstance(holder, dict):
            holder[draw(KEYS)] = copy.deepcopy(draw(VALUES))
        case _:
            other, place = draw(st.sampled_from(found))
            holder[key] = copy.deepcopy(other[place])


def damaged(draw: st.DrawFn, text: str) -> bytes:
    content = text.encode("utf-8", "surrogatepass")
    how = draw(st.sampled_from((*[""] * 24, "cut", "put", "bom", "utf-16", "gzip", "gzip cut")))
    at = draw(st.integers(0, len(content))) if how in ("cut", "put") else 0
    match how:
        case "cut":
            return content[:at]
        case "put":
            return content[:at] + draw(st.binary(min_size=1, max_size=4)) + content[at:]
        case "bom":
            return b"\xef\xbb\xbf" + content
        case "utf-16":
            return text.encode("utf-16", "surrogatepass")
        case "gzip":
            return gzip.compress(content)
        case "gzip cut":
            return gzip.compress(content)[:-4]
        case _:
            return content


SOURCES = st.fixed_dictionaries(
    {"on_bad": st.sampled_from(("error", "skip")), "limit": st.sampled_from((None, 1))}
)
BYTES = (
    st.binary(max_size=64)
    | st.text(max_size=40).map(str.encode)
    | st.builds(
        bytes.__add__,
        st.sampled_from(
            (b"PAR1", b"\x1f\x8b\x08", b"PK\x03\x04", b"[", b"{", b'{"a":', b"\xff\xfe")
        ),
        st.binary(max_size=48),
    )
    | st.text('[]{}",: \n\\u0123dt', max_size=40).map(str.encode)
)
FEW = settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
MANY = settings(FEW, max_examples=10_000)


def read_mutated(reader: Reader, name: str, data: st.DataObject) -> None:
    columns, objectives = LABELS.get(name, {}), ("x", "y") if name in LABELS else ("x",)
    form = data.draw(st.sampled_from(("auto", name)))
    content, source = data.draw(mutated(ROWS[name])), data.draw(SOURCES)
    reader.check(content, objectives, format=form, objectives=columns, **source)


def test_the_rows_that_are_changed_are_read_as_they_are(reader):
    assert ROWS.keys() == FORMATS.keys()
    for name, rows in ROWS.items():
        columns, objectives = LABELS.get(name, {}), ("x", "y") if name in LABELS else ("x",)
        (reader.folder / "valid.jsonl").write_text("\n".join(map(json.dumps, rows)))
        source = DataSource(str(reader.folder / "valid.jsonl"), objectives=columns)
        pairs = read_sources([source], objectives)
        encoded = reader.encode(pairs, TEMPLATE)
        assert len(encoded) == PAIRS.get(name, len(rows))
        if name == "raco":
            (pair,) = encoded
            prompt, answer = map(reader.tokenizer.decode, (pair.prompt_ids, pair.a_ids))
            parts = (f"be {SECRET}", f"{SECRET} 2", f'{{"zone": "{SECRET} 1"}}', f"noon {SECRET}")
            assert all(part in prompt for part in parts)  # system, tools, a call, what it gave
            assert f"{SECRET} 3" in answer


@pytest.mark.parametrize("name", ROWS)
@FEW
@given(data=st.data())
def test_changed_rows(reader, name, data):
    read_mutated(reader, name, data)


@settings(FEW, max_examples=100)
@given(content=BYTES, source=SOURCES)
def test_any_bytes(reader, content, source):
    reader.check(content, ("x",), **source)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
@MANY
@given(data=st.data())
def test_many_changed_rows(reader, name, data):
    read_mutated(reader, name, data)


@pytest.mark.slow
@MANY
@given(content=BYTES, source=SOURCES)
def test_many_bytes(reader, content, source):
    reader.check(content, ("x",), **source)
