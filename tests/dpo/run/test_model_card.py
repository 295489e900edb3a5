import pytest
import yaml

from raco_fast.dpo.run.model_card import TrainingSummary, model_card, result_table


def evaluation(step, likelihood, reward, margin):
    record = {"step": step}
    for name, pairs in (("sure", 40), ("kind", 25)):
        record |= {
            f"eval_pairs/{name}": pairs,
            f"eval_logps/accuracies/{name}": likelihood,
            f"eval_rewards/accuracies/{name}": reward,
            f"eval_rewards/margins/{name}": margin,
        }
    return record


@pytest.fixture
def summary(make_config):
    def make(*args, evaluations=None, skipped=0, **changes):
        if evaluations is None:
            evaluations = [evaluation(0, 0.5, 0.5, 0.0), evaluation(9, 0.6, 0.8, 0.1234)]
        labelled = {"sure": 77, "kind": 31}
        return TrainingSummary(make_config(*args, **changes), 9, skipped, 90, labelled, evaluations)

    return make


def test_the_card_states_data_weights_rule_and_results(summary, settings):
    own = {"kind": {"name": "simpo", "gamma": 0.2}}
    card = model_card(summary({"name": "org/base", "lora": {"r": 2}}, c=0.35, losses=own))
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "base_model": "org/base",
        "library_name": "peft",
        "tags": ["raco-fast", "dpo", "multi-objective", "preference-alignment"],
    }
    for text in (
        "# base aligned with raco-fast",
        "(LoRA adapter)",
        "by `cagrad-clip` with c = 0.35",
        "| sure | 0.7 | 77 | `sigmoid`, beta 0.1, label_smoothing 0.0 |",
        "| kind | 0.3 | 31 | `simpo`, beta 0.1, gamma 0.2 |",
        "90 training pairs.",
        f"- train: `{settings['data'][0]['path']}` (all usable pairs)",
        f"- held out: `{settings['eval_data'][0]['path']}` (all usable pairs)",
        "9 steps of up to 8 pairs, peak learning rate 0.01",
        "weights in fp32, seed 4.",
        # Wilson intervals of 24, 32 of 40
        "| sure | 40 | 50.0% (35.2% to 64.8%) | 60.0% (44.6% to 73.7%) | 80.0% (65.2% to 89.5%) |",
        "| 0.123 |",
    ):
        assert text in body, text


def test_the_card_of_a_local_model_names_no_path_in_its_header(summary, tiny):
    card = model_card(summary(rule="linear", data=[{"path": "x.jsonl", "limit": 5}], skipped=2))
    header = yaml.safe_load(card.split("---\n", 2)[1])
    assert "base_model" not in header
    assert header["library_name"] == "transformers"
    assert f"# {tiny.name} aligned with raco-fast" in card
    assert "(full fine-tuning)" in card
    assert "combined by `linear`." in card
    assert "- train: `x.jsonl` (the first 5 usable pairs)" in card
    assert "9 steps, 2 of them skipped of up to" in card


def test_a_run_without_held_out_pairs_claims_no_results(summary):
    assert "Results" not in model_card(summary(evaluations=[]))


def test_a_diverged_run_still_gets_its_card(summary):
    """metrics.jsonl writes null for what is not a number."""
    diverged = [evaluation(0, 0.5, 0.5, 0.0), evaluation(9, None, None, None)]
    assert "| 40 | 50.0% (35.2% to 64.8%) | - | - | - |" in model_card(
        summary(evaluations=diverged)
    )


def test_an_objective_without_held_out_labels_has_no_row(summary):
    first, last = evaluation(0, 0.5, 0.5, 0.0), evaluation(9, 0.6, 0.8, 0.1)
    for record in (first, last):
        del record["eval_pairs/kind"]
    table = result_table(summary().config, [first, last])
    assert "| sure |" in table
    assert "kind" not in table
