"""Every public data set's schema is read as its card says, and strictly."""

import json
import random
from typing import Any

import pytest
from public_sets import ASPECTS, AXES, SETS, Rows, axes_rows, nemo_rows

from raco_fast.dpo.data.data_source import DataSource
from raco_fast.dpo.data.formats.registry import FORMATS, find_format
from raco_fast.dpo.data.label_columns import LabelColumn
from raco_fast.dpo.data.sources import read_sources


@pytest.fixture
def read(tmp_path):
    """Write rows to a file and read them back as pairs."""

    def reader(rows: Rows, run=("helpful",), **source):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return read_sources([DataSource(str(file), **source)], run)

    return reader


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", SETS)
def test_rows_are_read_as_the_card_says(read, name, seed):
    each = SETS[name]
    rows = each.rows(random.Random(seed))
    expected = each.reading(rows)
    pairs = read(rows, each.run, **each.source)
    assert expected
    assert [
        (p.prompt, p.response_a, p.response_b, tuple(p.preferences[n] for n in each.run))
        for p in pairs
    ] == expected
    assert find_format(set(rows[0])) is FORMATS[each.form]
    assert len({p.id for p in pairs}) == len(pairs)


def changed(name: str, **fields: Any) -> Rows:
    """The first row of a set, with some fields changed."""
    return [SETS[name].rows(random.Random(0))[0] | fields]


COMPLETIONS = changed("UltraFeedback")[0]["completions"]


def rated(rating: Any) -> Rows:
    """UltraFeedback with a rating of the second answer changed."""
    annotations = COMPLETIONS[1]["annotations"] | {"honesty": {"Rating": rating}}
    second = COMPLETIONS[1] | {"annotations": annotations}
    return changed("UltraFeedback", completions=[COMPLETIONS[0], second])


BAD = [
    (rated("good"), r"`completions\[1\]\.annotations\.honesty\.Rating` must be a number, or text"),
    (rated(True), r"honesty\.Rating` must be a finite number for both responses, got True"),
    (changed("UltraFeedback", completions=COMPLETIONS[:1]), r"a list of two answers at least, got"),
    (changed("UltraFeedback", preference_probabilities={"x": 1}), "stand in a row that is one"),
    (changed("UltraFeedback", completions=["a", "b"]), r"`completions\[0\]` must be an object"),
    (changed("HelpSteer 3", overall_preference=4), "must be a whole number from -3 to 3, got 4"),
    (changed("HelpSteer 3", overall_preference=0.5), "must be a whole number .*, got 0.5"),
    (changed("HelpSteer 3", overall_preference=True), "must be a whole number .*, got True"),
    (changed("HelpSteer 3", context="so"), "`context` must be a list of turns, got str"),
    (changed("SHP", labels=2), "`labels` must be 1 for A or 0 for B, got 2; an unknown label is"),
    (changed("SHP", labels=True), "`labels` must be 1 for A or 0 for B, got True"),
    (changed("summarize, comparisons", choice=2), "`choice` must be 0 or 1, the number of a"),
    (changed("summarize, comparisons", info={"id": "x"}), "`info` must hold a post or an article"),
    (changed("summarize, comparisons", summaries=[{"text": "a"}]), "`summaries` must be a list"),
    (changed("Nectar", answers=[{"answer": a, "rank": "1"} for a in "ab"]), r"0.\.rank` must be"),
    (changed("NeMo-RL", completions={}), "`completions` must be a list of two answers"),
    (changed("ShareGPT", chosen={"from": "bot", "value": "a"}), r"`chosen\.from` must be one of"),
    (changed("ShareGPT", conversations=[{"role": "user"}]), r"must have a from and a value, got"),
    (changed("Alpaca", history=["why?"]), r"`history\[0\]` must be a list of \[question, answer\]"),
    (changed("Preference-Collection", orig_preference="C"), "`orig_preference` must be 'A' or 'B'"),
    (changed("QA feedback", preference=[1, 2]), "`preference` must be a list of 6, got list"),
    (changed("QA feedback", preference=[3] * 6), r"`preference\[0\]` must be 1 or 2, .* got 3"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "match"), BAD)
def test_what_a_schema_does_not_allow_is_named(read, rows, match):
    form = find_format(set(rows[0]))
    run = ASPECTS if form is FORMATS["ultrafeedback"] else ("helpful",)
    with pytest.raises(ValueError, match=r"rows\.jsonl:1( \(answers 1 and 2\))?: .*" + match):
        read(rows, run)


def test_one_label_is_that_of_the_one_objective(read):
    rows = changed("HelpSteer 3", overall_preference=-2)
    for source in ({}, {"objectives": {"good": "overall_preference"}}, {"objective": "good"}):
        (pair,) = read(rows, ("good",), **source)
        assert pair.preferences == {"good": 1}
    lower = LabelColumn("overall_preference", "lower")
    assert read(rows, ("good",), objectives={"good": lower})[0].preferences == {"good": -1}
    match = "`objective` must name the one objective that a 'helpsteer3' file labels, got"
    with pytest.raises(ValueError, match=match):
        read(rows, ("good", "short"))
    with pytest.raises(ValueError, match=r"got no field for 'good' \('helpsteer3' format"):
        read(rows, ("good",), objectives={"good": "strength"})


def test_a_set_with_one_label_may_label_two_objectives_by_two_fields(read):
    rows = changed("SHP", labels=1, score_A=9, score_B=4, score_ratio=2.25)
    soft = LabelColumn("score_ratio", soft={1.5: 0.75, 2: 0.9, 4: 1.0})
    (pair,) = read(rows, ("x", "sure"), objectives={"x": "labels", "sure": soft})
    assert pair.preferences == {"x": 1, "sure": 0.9}


def test_a_prompt_that_comes_twice_is_two_pairs(read):
    rows = [
        {"prompt": "why?", "response": text, "helpfulness": rating}
        for text, rating in (("a", 1), ("b", 3), ("c", 4), ("d", 2))
    ]
    pairs = read(rows, ("helpfulness",))
    assert [(p.response_a, p.response_b) for p in pairs] == [("a", "b"), ("c", "d")]
    assert [p.preferences["helpfulness"] for p in pairs] == [-1, 1]


def test_ids_of_a_rows_pairs_name_the_two_answers(read):
    rows = [row | {"id": f"n{k}"} for k, row in enumerate(nemo_rows(random.Random(0)))]
    assert [p.id for p in read(rows)][:4] == ["n0/1-2", "n0/1-3", "n0/2-3", "n1/1-2"]
    assert read(nemo_rows(random.Random(0)))[4].id == "rows.jsonl:2/1-3"


def test_some_of_a_rows_pairs_are_drawn_the_same_ones_every_time(read):
    rows = nemo_rows(random.Random(0)) * 4
    every = read(rows)
    drawn = read(rows, pairs_per_row=2)
    assert drawn == read(rows, pairs_per_row=2)
    assert len(drawn) == 2 * len(rows)
    assert [p for p in every if p.id in {d.id for d in drawn}] == drawn
    assert len({d.id.partition("/")[2] for d in drawn}) == 3  # not the first ones of each row
    assert read(rows, pairs_per_row=3) == every
    assert read(rows, limit=4) == every[:4]


def test_calls_of_functions_in_sharegpt(read):
    call = {"name": "clock", "arguments": {"zone": "UTC"}}
    turns = [
        {"from": "human", "value": "time?"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "12:00"},
    ]
    row = {"conversations": turns, "chosen": {"from": "gpt", "value": "noon"}}
    (pair,) = read([row | {"rejected": {"from": "function_call", "value": json.dumps([call])}}])
    assert [turn["role"] for turn in pair.prompt] == ["user", "assistant", "tool"]
    assert pair.prompt[1]["tool_calls"] == pair.answer_b["tool_calls"] == [call]


def test_a_text_with_one_summary_is_no_pair(read):
    rows = axes_rows(random.Random(0))
    alone = [rows[0] | {"info": {"id": "alone", "post": "so"}}]
    with pytest.raises(ValueError, match=r"jsonl:1: `info.id` must come with two summaries at"):
        read(alone, AXES)
    kept = read(rows, AXES)
    assert [p.response_a for p in read(alone + rows, AXES, on_bad="skip")] == [
        p.response_a for p in kept
    ]
