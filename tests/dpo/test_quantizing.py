"""Weights below an adapter that are quantized as they are loaded."""

from types import SimpleNamespace

import pytest
import torch
from tiny_runs import build_model

from raco_fast.dpo import models
from raco_fast.dpo.causal_lm_checks import warn_of_outliers
from raco_fast.dpo.loading import load_causal_lm
from raco_fast.dpo.models import LoraOptions, ModelOptions, fingerprint
from raco_fast.dpo.policy import load_base_model

WAYS = ["load_in_4bit", "load_in_8bit"]


@pytest.fixture
def installed(monkeypatch):
    """As if the package were there: what is refused is refused before it is used."""
    monkeypatch.setattr(models, "find_spec", lambda name: name)


@pytest.mark.parametrize("way", WAYS)
def test_the_extra_is_named_where_it_is_missing(monkeypatch, way):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    match = (
        rf"`model.{way}` needs the package bitsandbytes; pip install 'raco-fast\[bitsandbytes\]'"
    )
    with pytest.raises(ValueError, match=match):
        ModelOptions("m", device="cpu", **{way: True})


@pytest.mark.usefixtures("installed")
def test_both_ways_at_once():
    with pytest.raises(ValueError, match=r"must not be set both; leave one out"):
        ModelOptions("m", device="cpu", load_in_4bit=True, load_in_8bit=True)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("way", WAYS)
def test_weights_that_would_change_are_not_quantized(tiny, way):
    options = ModelOptions(str(tiny), device="cpu", **{way: True})
    match = (
        rf"`model.{way}` is for the weights below an adapter, got full fine-tuning, .*model.lora"
    )
    with pytest.raises(ValueError, match=match):
        load_base_model(options)


@pytest.mark.usefixtures("installed")
def test_weights_that_are_quantized_already(save_tiny):
    import json

    folder = save_tiny()
    file = folder / "config.json"
    quantized = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    file.write_text(json.dumps(json.loads(file.read_text()) | quantized))
    options = ModelOptions(str(folder), device="cpu", lora=LoraOptions(), load_in_4bit=True)
    with pytest.raises(ValueError, match=r"`model.load_in_4bit` must be left out for .* already"):
        load_causal_lm(str(folder), options, changed_by=None)


@pytest.mark.parametrize(("threshold", "said"), [(6.0, 1), (0.0, 0)])
def test_tokens_that_round_one_another_are_told(caplog, threshold, said):
    config = SimpleNamespace(load_in_8bit=True, llm_int8_threshold=threshold)
    warn_of_outliers("m", "model.name", SimpleNamespace(quantization_config=config))
    warn_of_outliers("m", "model.name", None)
    assert caplog.text.count("a token changes how all others of its batch are rounded") == said


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_run_beside_quantized_weights(make_config, runs, tmp_path, way):
    """Where the package is: layers are quantized, the run learns, and another goes on from it."""
    pytest.importorskip("bitsandbytes")
    from tiny_runs import build_tokenizer

    from raco_fast.dpo.run.trained import evaluate_trained
    from raco_fast.dpo.run.trainer import Trainer, train

    folder = tmp_path / "base"
    build_model(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    model = {"name": str(folder), "lora": {"r": 4, "alpha": 8}, "dropout": False, way: True}
    config = make_config(model, epochs=1, max_steps=3, eval_every=3)
    metrics = train(config)
    first = runs.evaluations(config)[0]
    assert (
        0.7 * metrics["eval_loss/sure"] + 0.3 * metrics["eval_loss/kind"]
        < 0.7 * first["eval_loss/sure"] + 0.3 * first["eval_loss/kind"]
    )
    judged = evaluate_trained(config)
    assert judged["eval_loss/sure"] == pytest.approx(metrics["eval_loss/sure"], abs=1e-3)
    again = Trainer(make_config(model, epochs=1, max_steps=3, eval_every=3), resume=True)
    assert again.state.step == 3
    layer = again.model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert (
        type(layer).__name__ == {"load_in_4bit": "Linear4bit", "load_in_8bit": "Linear8bitLt"}[way]
    )


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_scales_are_part_of_what_identifies_a_model(tmp_path, way):
    """Doubled weights have the same numbers, and other scales."""
    pytest.importorskip("bitsandbytes")
    found = []
    for factor in (1.0, 2.0):
        model, folder = build_model(hidden_size=64, intermediate_size=128), tmp_path / str(factor)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(factor)
        model.save_pretrained(folder)
        options = ModelOptions(str(folder), device="cpu", lora=LoraOptions(), **{way: True})
        found.append(load_base_model(options))
    one, two = (model.model.layers[0].mlp.up_proj.weight for model in found)
    assert torch.equal(one, two)
    assert fingerprint(found[0]) != fingerprint(found[1])
