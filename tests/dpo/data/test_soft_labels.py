"""Probabilities as labels and weights of pairs, from a file to a batch."""

import json

import pytest
from pair_files import read_pairs

from raco_fast.dpo.data.sources import DataSource, read_sources

PLAIN = {"prompt": [{"role": "user", "content": "why?"}], "response_a": "so", "response_b": "no"}


@pytest.fixture
def write(tmp_path):
    def write(*rows: dict) -> str:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(PLAIN | row) + "\n" for row in rows))
        return str(file)

    return write


def test_a_probability_is_the_likelier_label_times_how_likely_it_is(write):
    values = (0.75, 0.25, 0.5, 1, 0.0)
    rows = [{"preferences": {"y": -1}, "preference_probabilities": {"x": q}} for q in values]
    pairs = read_pairs(write(*rows), ["x", "y"])
    labels = [pair.preferences["x"] for pair in pairs]
    assert labels == [0.75, -0.75, 0.5, 1, -1]
    assert [type(label) for label in labels] == [float, float, float, int, int]
    assert all(pair.preferences["y"] == -1 for pair in pairs)


def test_a_column_with_a_minus_turns_a_probability(write):
    row = {"preferences": {}, "preference_probabilities": {"long": 0.75}, "pair_weights": 2}
    source = DataSource(write(row), columns={"x": "-long"})
    (pair,) = read_sources([source], ["x"])
    assert pair.preferences == {"x": -0.75}
    assert pair.pair_weights == {"x": 2.0}


def test_a_chosen_response_may_be_chosen_with_a_probability(tmp_path):
    file = tmp_path / "chosen.jsonl"
    row = {
        "prompt": "why?",
        "chosen": "so",
        "rejected": "no",
        "preference_probabilities": {"x": 0.9},
    }
    file.write_text(json.dumps(row))
    (pair,) = read_pairs(file, ["x"])
    assert pair.preferences == {"x": 0.9}
    with pytest.raises(ValueError, match="`preference_probabilities` must hold 'y', got another"):
        read_pairs(file, ["y"])


def test_weights_are_one_number_or_one_an_objective(write):
    preferences = {"x": 1, "y": -1, "z": 0}
    file = write(
        {"preferences": preferences, "pair_weights": 0.5},
        {"preferences": preferences, "pair_weights": {"x": 3, "y": 1}},
        {"preferences": preferences},
    )
    weights = [pair.pair_weights for pair in read_pairs(file, ["x", "y", "z"])]
    assert weights == [{"x": 0.5, "y": 0.5}, {"x": 3.0}, {}]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"preference_probabilities": {"x": 1.5}},
            r"`preference_probabilities.x` must be in \[0, 1\]",
        ),
        (
            {"preference_probabilities": {"x": True}},
            r"must be in \[0, 1\], got True; it is the prob",
        ),
        ({"preference_probabilities": {"x": None}}, r"must be in \[0, 1\], got None"),
        ({"preference_probabilities": 0.7}, "must map objectives to probabilities, got float"),
        ({"preference_probabilities": {"y": 0.7}}, "got no field for 'x'"),
        (
            {"preferences": {"x": 0}, "preference_probabilities": {"x": 0.5}},
            "without a hard label, got the label 0 beside it; remove one",
        ),
        ({"preferences": {"x": 1}, "pair_weights": 0}, "`pair_weights` must be a positive number"),
        ({"preferences": {"x": 1}, "pair_weights": {"X": 2}}, "`pair_weights.x` must .*, got None"),
        ({"preferences": {"x": 1}, "pair_weights": {"x": 1e999}}, "got inf; write 1 for a plain"),
    ],
)
def test_errors_name_the_line_and_the_cure(write, fields, message):
    with pytest.raises(ValueError, match=rf"rows.jsonl:1: .*{message}"):
        read_pairs(write({"preferences": {}} | fields), ["x"])


def test_a_row_of_one_response_has_no_probability_and_no_weight(tmp_path):
    rows = [
        {"prompt": "why?", "response": r, "helpfulness": k, "pair_weights": 2}
        for k, r in enumerate(("so", "no"))
    ]
    file = tmp_path / "rated.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="`pair_weights` must stand in a row that is a pair"):
        read_pairs(file, ["helpfulness"])
