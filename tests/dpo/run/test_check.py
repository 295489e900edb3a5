"""`raco-fast check`: its counts against counts of the rows themselves, and what it finds wrong."""

import json
from collections import Counter
from copy import deepcopy

import numpy as np
import pytest

from raco_fast.cli import program as cli
from raco_fast.cli.command import EXIT_FOUND_WRONG
from raco_fast.dpo.policy import load_tokenizer
from raco_fast.dpo.run.check_report import check
from raco_fast.dpo.run.data_check import SHARES, examine
from raco_fast.dpo.run.inputs import load_pairs
from raco_fast.dpo.run.model_check import measured, outline
from raco_fast.dpo.run.moving_reference import ReferenceOptions
from raco_fast.dpo.run.trainer import train


def rows_of(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def turned(row, name):
    """The same pair with its responses the other way round, under another id."""
    row = deepcopy(row)
    row["id"] = name
    row["response_a"], row["response_b"] = row["response_b"], row["response_a"]
    row["preferences"] = {key: -label for key, label in row["preferences"].items()}
    return row


@pytest.fixture
def examined(make_config, preference_files, tmp_path):
    """The counts, and the rows that they are of: 40, a copy, one turned, one that contradicts."""
    rows = rows_of(preference_files[0])
    labelled = next(row for row in rows if row["preferences"]["sure"])
    contradiction = turned(labelled, "contradiction")
    contradiction["preferences"]["sure"] *= -1
    rows += [deepcopy(rows[5]) | {"id": "copy"}, turned(rows[6], "turned"), contradiction]
    file = tmp_path / "doubled.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = make_config(data=[{"path": str(file)}], eval_data=[{"path": str(file), "limit": 3}])
    training, held_out, _ = load_pairs(config, load_tokenizer(config.model))
    return examine(training, held_out, config.objectives), rows


def test_counts_are_those_of_the_rows(examined):
    found, rows = examined
    assert (found.pairs, found.held_out) == (len(rows), 3)
    for name in ("sure", "kind"):
        labels = Counter(row["preferences"][name] for row in rows)
        assert found.preferred[name] == (labels[1], labels[-1])
        assert found.soft[name] == 0
    products = Counter(r["preferences"]["sure"] * r["preferences"]["kind"] for r in rows)
    common = products[1] + products[-1]
    assert found.labels.common[0, 1] == common
    assert found.labels.agreement[0, 1] == pytest.approx((products[1] - products[-1]) / common)
    words = [[len(row[f"response_{x}"].split()) + 1 for x in "ab"] for row in rows]  # and an EOS
    expected = sorted(np.array(words).ravel())
    places = [int(np.ceil(share * len(expected))) - 1 for share in SHARES]
    assert found.lengths["response"] == [expected[place] for place in places]
    (prompt,) = set(found.lengths["prompt"])  # all questions have as many words
    assert found.once == len(rows) * prompt + sum(expected)
    assert found.twice == 2 * len(rows) * prompt + sum(expected)


def test_repetitions_are_seen_whichever_response_is_first(examined):
    found, rows = examined
    assert found.duplicates == 3
    assert found.contradictions == {"sure": 1, "kind": 0}
    assert found.leaked == found.leaked_prompts == 3
    prompts = {row["prompt"][0]["content"] for row in rows}
    assert found.shared_prompts == len(rows) - len(prompts)


def test_what_is_printed(config_file, tmp_path, capfd):
    assert cli.main(["check", config_file(output_dir=str(tmp_path / "run"))]) == 0
    out = capfd.readouterr().out
    assert "40 training pairs, 16 held out." in out
    assert "| kind : sure |" in out
    assert out.count("scored tokens are between >>> and <<<") == 2
    assert "M trained. Memory:" in out
    assert (tmp_path / "run" / "check" / "check.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not (tmp_path / "run" / "model").exists()


def test_the_estimate_has_the_parameters_of_the_model(make_config, make_model):
    parameters = sum(p.numel() for p in make_model().parameters())
    full = next(p for p in check(make_config()).paragraphs if "trained. Memory" in p)
    assert full.startswith(f"{parameters / 1e6:.1f} M parameters, {parameters / 1e6:.1f} M trained")


def test_a_reference_that_moves_is_in_the_estimate(make_config):
    plain, moves = (
        measured(outline(config), config)
        for config in (make_config(), make_config(reference=ReferenceOptions()))
    )
    assert moves.bytes_of_training - plain.bytes_of_training == 4 * plain.trained
    # Three passes an epoch, and one of the reference: once, or in every epoch.
    assert moves.operations(100, 2) / plain.operations(100, 2) == (3 * 2 + 2) / (3 * 2 + 1)


def test_failures_of_a_run_are_failures_here(config_file, make_config, tmp_path, capfd):
    for changes, reason in (
        ({"weights": {"sure": 0.5, "kind": 0.25, "brief": 0.25}}, "brief"),
        ({"model": {"name": str(tmp_path / "nowhere"), "device": "cpu"}}, "nowhere"),
        ({"data": [{"path": str(tmp_path / "none.jsonl")}]}, "none.jsonl"),
    ):
        assert cli.main(["check", config_file(**changes)]) == EXIT_FOUND_WRONG
        message = capfd.readouterr().err
        assert "raco-fast: training would fail: " in message
        assert reason in message
    config = make_config(max_steps=1)
    train(config)
    assert any("`output_dir` already holds" in failure for failure in check(config).failures)


def test_a_picture_that_cannot_be_written_is_not_said_to_be_saved(make_config):
    config = make_config()
    config.folder.mkdir(parents=True)
    (config.folder / "check").write_text("a file where the folder should be")
    found = check(config)
    assert not any("saved" in paragraph for paragraph in found.paragraphs)
    assert len(found.failures) == 1
    assert "check" in found.failures[0]


def test_a_pair_beyond_the_model_s_positions_is_told(save_tiny, make_config, write_pairs):
    short = save_tiny(max_position_embeddings=8)
    config = make_config({"name": str(short)}, tokens={"max_length": 16})
    (failure,) = check(config).failures
    assert "`tokens.max_length` must be at most the model's 8 positions" in failure
