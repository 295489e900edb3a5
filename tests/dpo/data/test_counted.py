"""What speaks against itself, or says nothing, is counted and named."""

import json
import logging
import random

import pytest
from public_sets import SETS, Rows, said, user

from raco_fast.dpo.data.data_source import DataSource
from raco_fast.dpo.data.sources import read_sources


@pytest.fixture
def read(tmp_path):
    """Write rows to a file and read them back as pairs."""

    def reader(rows: Rows, run=("helpful",), **source):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return read_sources([DataSource(str(file), **source)], run)

    return reader


CONTRADICTIONS = {
    "PKU-SafeRLHF v2": ({"safer_response_id": 0, "is_response_0_safe": False}, "is not safe"),
    "SHP": ({"labels": 1, "score_A": 2, "score_B": 5}, "the response of the lower score"),
    "UltraFeedback, H4": ({"score_chosen": 1.0}, "`score_chosen` is below `score_rejected`"),
    "UltraFeedback, Argilla's first": ({"chosen_avg_rating": 1.0}, "`chosen_avg_rating` is below"),
    "Preference-Collection": (
        {"orig_preference": "A", "orig_score_A": "1", "orig_score_B": "3"},
        "the preferred response has the lower score",
    ),
}


OTHER_THAN_LABELS = {"is_response_0_safe", "score_A", "score_chosen", "chosen_avg_rating"}
OTHER_THAN_LABELS |= {"orig_score_A"}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_rows_that_speak_against_their_labels_are_counted_and_kept(read, caplog, name):
    fields, found = CONTRADICTIONS[name]
    each = SETS[name]
    good = each.rows(random.Random(0))[0]
    if name == "PKU-SafeRLHF v2":
        good |= {"response_0_severity_level": 0, "response_1_severity_level": 1}
        good |= {"safer_response_id": 0, "is_response_0_safe": True, "is_response_1_safe": True}
    assert len(read([good, good | fields, good | fields], each.run)) == 3
    (message,) = [m for m in caplog.messages if "speak against" in m]
    assert "2 rows speak against their own labels, which were kept; the first: " in message
    assert "rows.jsonl:2: " in message
    assert found in message
    caplog.clear()
    read([good, good | dict.fromkeys(fields.keys() & OTHER_THAN_LABELS, "so")], each.run)
    assert "speak against" not in caplog.text


def test_answers_that_are_the_same_are_counted_among_several_and_an_error_alone(read, caplog):
    turn = [said("same")]
    completions = [{"rank": k, "completion": turn if k else [said("other")]} for k in range(3)]
    row = {"context": [user("why?")], "completions": completions}
    assert [p.id for p in read([row])] == ["rows.jsonl:1/1-2", "rows.jsonl:1/1-3"]
    assert "left out 1 pairs of identical answers, the first: " in caplog.text
    assert "rows.jsonl:1 (answers 2 and 3)" in caplog.text
    with pytest.raises(ValueError, match="`responses` must differ"):
        read([{"question": "why?", "chosen": "so", "rejected": "so"}])


def test_answers_that_nothing_tells_apart_are_counted(read, caplog):
    completions = [{"rank": min(k, 1), "completion": [said(str(k))]} for k in range(3)]
    with caplog.at_level(logging.INFO):
        pairs = read([{"context": [user("why?")], "completions": completions}])
    assert [p.id for p in pairs] == ["rows.jsonl:1/1-2", "rows.jsonl:1/1-3"]
    assert "left out 1 pairs of answers that no objective tells apart" in caplog.text


def test_an_objective_that_is_never_labelled_is_named(read, caplog):
    row = {"prompt": [user("why?")], "response_a": "a", "response_b": "b"}
    read([row | {"preferences": {"x": 1, "y": None, "z": 0}}] * 2, ("x", "y", "z"))
    (message,) = caplog.messages
    assert "rows.jsonl: labels no pair for 'y', 'z': each is a tie or null; correct" in message
