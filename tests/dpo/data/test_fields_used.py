"""What a row says beside prompt and answers: used where it can be, named where it is not."""

import json
import logging
from typing import Any

import pytest

from raco_fast.dpo.data.data_source import DataSource
from raco_fast.dpo.data.pairs import PreferencePair
from raco_fast.dpo.data.rows import RowError
from raco_fast.dpo.data.sources import read_sources

USER = {"role": "user", "content": "time?"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
SCHEMA = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
NOON = {"role": "tool", "content": "12:00", "tool_call_id": "c1", "name": "clock"}
ROWS = {
    "raco": [{"prompt": [USER], "response_a": "a", "response_b": "b", "preferences": {"x": 1}}],
    "chosen-rejected": [{"prompt": "time?", "chosen": "a", "rejected": "b"}],
    "raco-s": [{"prompt": "time?", "chosen": "a", "rejected": "b", "raco_s_x": 1}],
    "summary-ab": [{"prompt": "time?", "Summary_A": "a", "Summary_B": "b", "x": "A"}],
    "pku": [
        {"prompt": "time?", "response_0": "a", "response_1": "b", "better_response_id": 0, "x": 0}
    ],
    "helpsteer2": [
        {"prompt": "time?", "response": "a", "helpfulness": 2, "x": 1},
        {"prompt": "time?", "response": "b", "helpfulness": 1, "x": 0},
    ],
    "text-score": [
        {
            "text": ["\n\nHuman: time?\n\nAssistant: a", "\n\nHuman: time?\n\nAssistant: b"],
            "score": [1, 0],
        }
    ],
    "helpsteer2-preference": [
        {"prompt": "time?", "response_1": "a", "response_2": "b", "preference_strength": -1}
    ],
    "helpsteer3": [
        {"context": [USER], "response1": "a", "response2": "b", "overall_preference": -1}
    ],
    "shp": [{"history": "time?", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}],
    "nectar": [
        {"prompt": "time?", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]}
    ],
    "nemo-rl": [
        {
            "context": [USER],
            "completions": [
                {"rank": rank, "completion": [{"role": "assistant", "content": text}]}
                for rank, text in enumerate("ab")
            ],
        }
    ],
    "ultrafeedback": [
        {
            "instruction": "time?",
            "completions": [
                {"response": text, "annotations": {"x": {"Rating": rating}}}
                for text, rating in (("a", "2"), ("b", "1"))
            ],
        }
    ],
    "preference-collection": [
        {"orig_instruction": "time?", "orig_response_A": "a", "orig_response_B": "b"}
        | {"orig_preference": "A"}
    ],
    "qa-feedback": [
        {"question": "time?", "preference": [1, 0, 0, 0, 0, 0]}
        | {f"prediction {k + 1}": text for k, text in enumerate("abcd")}
    ],
    "orca": [{"question": "time?", "chosen": "a", "rejected": "b"}],
    "argilla": [{"instruction": "time?", "chosen_response": "a", "rejected_response": "b"}],
    "alpaca": [{"instruction": "time?", "chosen": "a", "rejected": "b"}],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": "time?"}], "chosen": "a", "rejected": "b"}
    ],
}


def said(content: str | None = "a", **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


@pytest.fixture
def read(tmp_path):
    def read(*rows: dict[str, Any], **source: Any) -> list[PreferencePair]:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_sources([DataSource(str(file), **source)], ["x"])

    return read


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_column_is_the_first_turn_in_every_format(read, name, column):
    (pair,) = read(*({**row, column: "Be brief."} for row in ROWS[name]))
    assert pair.prompt == [SYSTEM, USER]
    (pair,) = read(*({**row, column: None} for row in ROWS[name]))
    assert pair.prompt == [USER]


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("form", [[SCHEMA], json.dumps([SCHEMA]), [json.dumps(SCHEMA)]])
def test_tools_are_read_as_a_list_or_as_its_json_in_every_format(read, name, form):
    (pair,) = read(*({**row, "tools": form} for row in ROWS[name]))
    assert pair.tools == [SCHEMA]
    for nothing in (None, [], "", " ", "[]", "null"):
        (pair,) = read(*({**row, "tools": nothing} for row in ROWS[name]))
        assert pair.tools == []


def test_one_system_prompt_may_stand_twice_and_two_are_an_error(read):
    row = ROWS["raco"][0] | {"prompt": [SYSTEM, USER], "system": " Be brief.\n"}
    (pair,) = read(row)
    assert pair.prompt == [SYSTEM, USER]
    match = r"rows\.jsonl:1: `{}` must be the only system prompt, got another one beside it; remove"
    with pytest.raises(RowError, match=match.format("system")):
        read(row | {"system": "Be long."})
    with pytest.raises(RowError, match=match.format("system_prompt")):
        read(row | {"system_prompt": "Be long."})
    with pytest.raises(RowError, match=r"`system` must be text, got list of length 1"):
        read(row | {"system": ["Be brief."]})


def test_rows_of_one_prompt_with_two_system_prompts_are_no_pair(read):
    a, b = ROWS["helpsteer2"]
    with pytest.raises(RowError, match=r"`prompt` must be shared by two .*, got 1"):
        read(a | {"system": "one"}, b | {"system": "two"})


def test_turns_keep_what_a_chat_template_can_use(read):
    prompt = [USER, CALLED, NOON]
    answers = said("noon", reasoning_content="12 is noon"), said("12", thinking="short")
    (pair,) = read({"chosen": [*prompt, answers[0]], "rejected": [*prompt, answers[1]]})
    assert pair.prompt == prompt
    assert (pair.response_a, pair.answer_a) == ("noon", {"reasoning_content": "12 is noon"})
    assert (pair.response_b, pair.answer_b) == ("12", {"thinking": "short"})
    row = {"prompt": prompt, "response_a": [answers[0]], "response_b": answers[1]}
    assert read(row | {"preferences": {"x": 1}})[0].answer_a == pair.answer_a


@pytest.mark.parametrize(
    "calls",
    [
        [CALL],
        json.dumps([CALL]),
        [{"function": {"name": "clock", "arguments": '{"zone": "UTC"}'}, "type": "function"}],
    ],
)
@pytest.mark.parametrize("content", ["", None])
def test_an_answer_may_be_a_call(read, calls, content):
    row = {"prompt": [USER], "rejected": [said()]}
    (pair,) = read(row | {"chosen": [said(content, tool_calls=calls)]})
    assert (pair.response_a, pair.answer_a) == ("", {"tool_calls": [CALL]})
    without = {"role": "assistant", "tool_calls": calls}
    assert read(row | {"chosen": [without]}) == [pair]


def test_fields_that_say_nothing_are_as_if_they_were_not_there(read, caplog):
    """Tables have every field in every row, most of them null."""
    nothing = {"tool_calls": None, "name": None, "thinking": "", "weight": None}
    chosen, rejected = (
        [USER | nothing, said("a", **nothing)],
        [USER, said("b", **nothing | {"tool_calls": []})],
    )
    (pair,) = read({"chosen": chosen, "rejected": rejected, "tools": None, "note": None})
    assert (pair.prompt, pair.answer_a, pair.answer_b) == ([USER], {}, {})
    assert not caplog.records


def test_answers_that_differ_in_a_field_are_two(read):
    rows = [said("a", reasoning_content="so"), said("a", reasoning_content="or so")]
    (pair,) = read({"prompt": [USER], "chosen": rows[:1], "rejected": rows[1:]})
    assert pair.answer_a != pair.answer_b
    with pytest.raises(RowError, match="`responses` must differ, got two identical ones"):
        read({"prompt": [USER], "chosen": rows[:1], "rejected": rows[:1]})
    with pytest.raises(RowError, match="`response a` must hold text, got an empty response"):
        read({"prompt": [USER], "chosen": [said("", reasoning_content="so")], "rejected": rows[:1]})


BAD_TURNS = [
    ([NOON, USER], r"`prompt\[0\]\.role` must .*'tool' after a turn with tool_calls .*got 'tool'"),
    ([USER, said(), NOON], r"`prompt\[2\]\.role` must .*got 'tool'"),
    ([USER, CALLED | {"tool_calls": "clock"}, NOON], r"\[1\]\.tool_calls` must be complete JSON"),
    ([USER, CALLED | {"tool_calls": {}}, NOON], r"`prompt\[1\]\.content` must hold text"),
    ([USER, CALLED | {"tool_calls": {"a": 1}}, NOON], r"must be a list of objects, got dict of le"),
    ([USER, CALLED | {"tool_calls": [3]}, NOON], r"tool_calls\[0\]` must be an object, got int"),
    (
        [USER, CALLED | {"tool_calls": [{}]}, NOON],
        r"tool_calls\[0\]` must name a function, got \[\]",
    ),
    (
        [USER, CALLED | {"tool_calls": [{"name": "f"}]}, NOON],
        r"arguments` must be an object, got N",
    ),
    (
        [USER, CALLED | {"tool_calls": [{"name": "f", "arguments": "[1]"}]}, NOON],
        r"`prompt\[1\]\.tool_calls\[0\]\.arguments` must be an object, got list of length 1; write",
    ),
    ([USER | {"name": 3}], r"`prompt\[0\]\.name` must be text, got int"),
]


@pytest.mark.parametrize(("prompt", "match"), BAD_TURNS)
def test_turns_that_no_template_could_write(read, prompt, match):
    with pytest.raises(RowError, match=r"rows\.jsonl:1: .*" + match):
        read(ROWS["raco"][0] | {"prompt": prompt})


def test_what_is_not_used_is_named_once_with_its_count(read, caplog):
    turns = [USER | {"weight": 0, "date": "today"}]
    row = ROWS["raco"][0] | {"source": "somewhere", "empty": None}
    with caplog.at_level(logging.WARNING):
        read(row | {"prompt": turns}, row | {"meta": {"private": "text"}}, row)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.endswith(
        "rows.jsonl: not used (rows or turns that have them): columns 'meta' (1), 'source' (3); "
        "fields of turns 'date' (1), 'weight' (1)"
    )


@pytest.mark.parametrize("name", ROWS)
def test_a_column_that_is_not_used_is_named_in_every_format(read, caplog, name):
    read(*({**row, "note": "text"} for row in ROWS[name]))
    assert f"columns 'note' ({len(ROWS[name])})" in caplog.text


OTHERS = {
    "raco": {"preferences": {"x": 1, "other": -1}, "id": "1"},
    "chosen-rejected": {"preference_probabilities": {"x": 0.75}, "pair_weights": {"x": 2}},
    "raco-s": {"raco_s_other": 1},
    "summary-ab": {"Other": "B"},
    "pku": {"safer_response_id": 1},
    "helpsteer2": {"verbosity": 3, "coherence": 3},
    "shp": {"score_ratio": 2.0},
    "preference-collection": {"orig_score_A": "4", "orig_score_B": "2"},
}


@pytest.mark.parametrize("name", ROWS)
def test_labels_of_other_runs_are_no_news(read, caplog, name):
    (pair,) = read(*(row | OTHERS.get(name, {}) for row in ROWS[name]))
    assert pair.preferences["x"] > 0
    assert not caplog.records
