"""`raco-fast eval`: what the run's own last evaluation says, and of other models."""

import json

import pytest

from raco_fast.cli import program as cli
from raco_fast.dpo.run.trained import evaluate_trained
from raco_fast.dpo.run.trainer import train


@pytest.mark.parametrize("lora", [None, {"r": 4, "alpha": 8}], ids=["full", "lora"])
def test_a_trained_model_scores_as_at_the_end_of_its_run(make_config, lora):
    config = make_config({"lora": lora}, max_steps=4)
    at_the_end = train(config)
    found = evaluate_trained(config)
    assert found.keys() == at_the_end.keys() - {"step"}
    for name, value in found.items():
        assert value == pytest.approx(at_the_end[name], rel=1e-4, abs=1e-6), name
    assert abs(found["eval_rewards/margins/sure"]) > 1e-3, "nothing was learnt, so nothing is seen"


def test_the_reference_itself_has_no_margin(make_config, config_file, tiny, tmp_path, capfd):
    out = tmp_path / "here.json"
    assert cli.main(["eval", config_file(), "--of", str(tiny), "--out", str(out)]) == 0
    assert "accuracy of the reward" in capfd.readouterr().out
    found = json.loads(out.read_text())
    assert found["eval_rewards/margins/sure"] == pytest.approx(0.0, abs=1e-6)
    assert found["eval_loss/kind"] == pytest.approx(0.6931, abs=1e-4)


def test_what_is_missing_is_named(make_config, config_file, capfd):
    with pytest.raises(ValueError, match="`eval_data` must name the files of held-out pairs"):
        evaluate_trained(make_config(eval_data=[]))
    assert cli.main(["eval", config_file()]) == 2
    assert "`output_dir` holds no trained model" in capfd.readouterr().err
