"""Sources of a run: what a config says of their labels, and where they may be read from."""

import json
from types import SimpleNamespace

import pytest

from raco_fast.dpo.data.label_columns import LabelColumn
from raco_fast.dpo.run.config import TrainConfig
from raco_fast.dpo.run.identity import identity
from raco_fast.dpo.run.inputs import load_on_all
from raco_fast.dpo.run.trainer import Trainer
from raco_fast.settings.parsing import from_settings
from raco_fast.studies.finished import inputs_of

PLAIN = {"model": {"name": "m", "device": "cpu"}, "weights": {"short": 0.5, "good": 0.5}}


def test_a_config_says_which_field_labels_an_objective():
    short = {"column": "verbosity", "prefer": "lower", "soft": {1: 0.75, 2.5: 1}}
    source = {"path": "x.csv", "objectives": {"short": short, "good": "helpfulness"}}
    source |= {"config": "c", "split": "train", "pairs_per_row": 2}
    config = from_settings(TrainConfig, PLAIN | {"data": [source]})
    (read,) = config.data
    column = LabelColumn("verbosity", "lower", {1.0: 0.75, 2.5: 1.0})
    assert read.objectives == {"short": column, "good": "helpfulness"}
    assert (read.config, read.split, read.pairs_per_row) == ("c", "train", 2)
    assert read.described == "x.csv (config c, split train)"
    again = from_settings(TrainConfig, json.loads(json.dumps(identity(config) | {"losses": {}})))
    assert again.data == config.data


@pytest.mark.parametrize(
    ("column", "match"),
    [
        ({"column": "v", "prefer": "less"}, "Literal.*'higher', 'lower'.*Got value: less"),
        ({"column": "v", "soft": {1: 0.2}}, r"`soft` must map least differences to probabilities"),
        ({"colum": "v"}, "Option 'colum' is not accepted"),
    ],
)
def test_a_bad_column_is_named(column, match):
    source = {"path": "x.csv", "objectives": {"short": column}}
    with pytest.raises(ValueError, match=f"(?s){match}"):
        from_settings(TrainConfig, PLAIN | {"data": [source]})


def test_standard_input_is_read_once_and_by_one_process(make_config):
    source = [{"path": "-"}]
    with pytest.raises(ValueError, match=r"must name standard input .* once, got it more often"):
        make_config(data=source, eval_data=source)
    match = r"`data.path` must be no standard input \('-'\) where several processes run, got 2"
    with pytest.raises(ValueError, match=match):
        load_on_all(make_config(data=source), SimpleNamespace(size=2, rank=0))


def test_a_sweep_knows_its_files_by_content_those_of_a_pattern_too(make_config, tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(name)
    data = [{"path": str(tmp_path / "*.jsonl")}, {"path": "hub:org/name"}]
    known = inputs_of(make_config(data=data, eval_data=[{"path": "-"}]))
    (tmp_path / "b.jsonl").write_text("changed")
    now = inputs_of(make_config(data=data, eval_data=[{"path": "-"}]))
    assert {name for name in known if known[name] != now[name]} == {str(tmp_path / "b.jsonl")}
    assert str(tmp_path / "a.jsonl") in known
    assert not {"-", "hub:org/name"} & known.keys()


def test_a_label_that_prefers_neither_counts_in_the_unbiased_gram(
    make_config, write_pairs, tmp_path
):
    """Where the policy is its reference such a pair has no gradient, and is still one of n."""
    file = write_pairs("rows.jsonl", 24, 3, {"sure": "yes", "kind": "calm"})
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row for row in rows if all(row["preferences"].values())][:6]
    found = {}
    for name, labels in {
        "not labelled": {"preferences": {"sure": 0, "kind": 1}},
        "neither": {"preferences": {"kind": 1}, "preference_probabilities": {"sure": 0.5}},
    }.items():
        more = [row | labels | {"id": f"more {k}"} for k, row in enumerate(rows[:2])]
        file.write_text("".join(json.dumps(row) + "\n" for row in (*rows, *more)))
        data = {"data": [{"path": str(file)}], "eval_data": [], "output_dir": str(tmp_path / name)}
        runner = Trainer(make_config({"dropout": False}, gram="unbiased", **data))
        runner._learn(runner._pairs_of(0))
        found[name] = runner.state.optimizer.solution.expected.mean[0, 0]
    assert len(rows) == 6
    pairs_of_all, pairs_of_labelled = 8 * 7, 6 * 5
    expected = found["not labelled"] * pairs_of_labelled / pairs_of_all
    assert found["neither"] == pytest.approx(expected, rel=1e-4)
