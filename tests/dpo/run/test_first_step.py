"""Where the policy is its reference, the first loss is ln 2; whatever makes noise is refused."""

from __future__ import annotations

import math
from functools import partial

import model_zoo
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from raco_fast.dpo.data.collation import collate
from raco_fast.dpo.data.layout import Layout
from raco_fast.dpo.decoders import unwrap
from raco_fast.dpo.losses.objective_losses import preference_losses
from raco_fast.dpo.modes import begin_training, evaluating
from raco_fast.dpo.run.reference_cache import compute_reference
from raco_fast.dpo.run.trainer import Trainer, train
from raco_fast.dpo.scoring import ReferenceLogps, pair_logps, score_pairs

# Dropout as a number (OPT, XGLM, BioGPT, GPTBigCode, Seed-OSS), layers left out (BART), sampled
# experts (PhiMoE), no decoder of its own (Llama 4), token types (Gemma 3), a state space (Mamba).
QUICK = (
    *("opt", "xglm", "biogpt", "gpt_bigcode", "seed_oss", "bart", "phimoe", "llama4_text"),
    *("gemma3_text", "mamba"),
)
NOISE = 0.4
WITHOUT_NOISE = ("diffllama", "mpt")  # whose configurations take no dropout
# The first two are saved under names that AutoModelForCausalLM does not know; the others see the
# tokens that they are to predict.
NOT_TRAINED = ("emu3", "mllama", "cpmant", "xlm", "xlnet")
LENGTHS = {"reformer": 12}  # of its axial positions


@pytest.fixture
def save_family(tmp_path):
    """A function that saves a tiny model of a family."""

    def save(family: str, noise: float = NOISE) -> str:
        with model_zoo.quiet():
            model_zoo.build(family, noise).save_pretrained(tmp_path / family)
        return str(tmp_path / family)

    return save


def families() -> list:
    return [
        pytest.param(family, marks=[] if family in QUICK else pytest.mark.slow)
        for family in model_zoo.causal_lms()
        if family not in (*model_zoo.NOT_BUILT, *NOT_TRAINED)
    ]


@pytest.mark.parametrize("family", families())
def test_the_first_loss_of_a_family_is_ln_2(runs, make_config, save_family, tiny, family):
    folder = save_family(family, 0.0 if family in WITHOUT_NOISE else NOISE)
    config = make_config(
        {"name": folder, "tokenizer": str(tiny), "dropout": False},
        eval_data=[],
        max_steps=1,
        tokens={"max_length": LENGTHS.get(family, 64)},
    )
    with model_zoo.quiet():
        train(config)
    (first,) = runs.steps(config)
    for name in ("sure", "kind"):
        assert first[f"loss/{name}"] == pytest.approx(math.log(2), abs=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", NOT_TRAINED)
def test_the_first_loss_of_what_a_run_does_not_train_is_ln_2(make_config, tiny, family):
    runner = Trainer(make_config({"name": str(tiny)}, eval_data=[]))
    with model_zoo.quiet():
        model = model_zoo.build(family, NOISE)
        layout = Layout("padded", 6, math.inf, 0)
        references = compute_reference(model, runner.pairs, layout)
        begin_training(model, noise=False)
        batch = collate(runner.pairs[:4], 0)
        scores = score_pairs(pair_logps(model, batch, 64), batch, references, runner.losses)
    losses = preference_losses(scores, batch.labels, loss=runner.losses)
    assert [x.item() for x in losses.values()] == pytest.approx([math.log(2)] * 2, abs=2e-5)


def count_with_grad(calls: list, *_) -> None:
    calls.append(torch.is_grad_enabled())


@pytest.mark.parametrize("lora", [None, {"r": 4, "alpha": 8}], ids=["full", "lora"])
def test_layers_that_recompute_their_activations_have_no_dropout_either(
    runs, make_config, save_family, tiny, lora
):
    """Only in training mode they do, and OPT's have its dropout as a number."""
    given = {"name": save_family("opt"), "tokenizer": str(tiny), "dropout": False}
    given["attention"] = "eager"  # sdpa would attend document by document only without it
    losses = {}
    for checkpointing in (False, True):
        config = make_config(
            given | {"gradient_checkpointing": checkpointing, "lora": lora},
            eval_data=[],
            max_steps=2,
            gradient_mode="autograd",
            output_dir=f"{given['name']}-{checkpointing}",
        )
        runner, recomputed = Trainer(config), []
        layer = unwrap(runner.model).get_decoder().layers[1].fc1
        layer.register_forward_pre_hook(partial(count_with_grad, recomputed))
        runner.run()
        losses[checkpointing] = [r["loss/sure"] for r in runs.steps(config)], sum(recomputed)
    assert losses[True][0] == losses[False][0]
    assert losses[True][0][0] == pytest.approx(math.log(2), abs=2e-5)
    assert losses[True][1] >= 2 * losses[False][1] > 0


def test_dropout_that_is_asked_for_is_there(runs, make_config, save_family, tiny):
    config = make_config(
        {"name": save_family("opt"), "tokenizer": str(tiny), "dropout": True},
        eval_data=[],
        max_steps=1,
        gradient_mode="autograd",
    )
    train(config)
    assert abs(runs.steps(config)[0]["loss/sure"] - math.log(2)) > 1e-3


class Noisy(nn.Module):
    """Dropout that does not ask for the mode."""

    def forward(self, x):
        return F.dropout(x, 0.1)


def test_noise_that_no_mode_switches_off_is_refused_with_its_place(make_config, save_tiny):
    runner = Trainer(make_config({"name": str(save_tiny()), "dropout": False}, eval_data=[]))
    runner.model.model.layers[1].mlp.act_fn = Noisy()
    with pytest.raises(
        ValueError, match=r"`model` \(LlamaForCausalLM\) gives other .* in every pass"
    ) as e:
        runner.run()
    assert "its module 'model.layers.1.mlp.act_fn' (Noisy)" in str(e.value)
    assert "`model.dropout: true`" in str(e.value)
    assert not any(p.grad is not None for p in runner.model.parameters())


def with_a_graph_in_training(layer, forward, *args, **kwargs):
    with torch.set_grad_enabled(layer.training):
        return forward(*args, **kwargs)


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["full", "lora"])
def test_layers_that_only_infer_in_evaluation_mode_are_refused(make_config, save_tiny, lora):
    """As those of xLSTM do for inputs longer than its chunks."""
    given = {"name": str(save_tiny()), "dropout": False, "lora": lora}
    runner = Trainer(make_config(given, eval_data=[], gradient_mode="autograd"))
    for layer in unwrap(runner.model).model.layers:
        layer.forward = partial(with_a_graph_in_training, layer, layer.forward)
    refused = r"\(LlamaForCausalLM\) runs its layers without a graph in evaluation mode"
    with pytest.raises(ValueError, match=refused):
        runner.run()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_an_adapter_keeps_the_dropout_it_was_given(make_config, save_tiny, dropout):
    folder = str(save_tiny(attention_dropout=0.5))
    given = {"name": folder, "dropout": False, "lora": {"dropout": dropout}}
    config = make_config(given, eval_data=[], max_steps=1)
    runner = Trainer(config)
    for name, p in runner.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    batch = collate(runner.pairs[:3], 0)
    begin_training(runner.model, noise=False)
    with torch.no_grad():
        first, second = (pair_logps(runner.model, batch, 64) for _ in range(2))
    assert torch.equal(first, second) == (dropout == 0.0)
    train(config)  # nothing is refused


def test_a_reference_of_another_model_is_refused(make_config, save_tiny, tmp_path):
    """As a file of the cache that belongs to something else would be."""
    runner = Trainer(make_config({"name": str(save_tiny()), "dropout": False}, eval_data=[]))
    known = runner.references[1.0].by_id
    changed = {id: (a - 2.0, b) for id, (a, b) in known.items()}
    runner.references[1.0] = ReferenceLogps(changed)
    with pytest.raises(
        ValueError, match=r"must begin as its reference, but gives pair 'pair-1-\d+'"
    ):
        runner.run()


@pytest.mark.parametrize("shift", [0.0, 1e-3])
def test_a_first_loss_that_is_not_ln_2_is_told(make_config, save_tiny, caplog, shift):
    """By less than two orders of the same sums may differ, so it is no other reference."""
    options = {"eval_data": [], "max_steps": 1}
    runner = Trainer(make_config({"name": str(save_tiny()), "dropout": False}, **options))
    known = runner.references[1.0].by_id
    shifted = {id: (a - shift, b) for id, (a, b) in known.items()}
    runner.references[1.0] = ReferenceLogps(shifted)
    runner.run()
    assert ("the first loss is off by 5.0e-05" in caplog.text) == (shift > 0)


def test_evaluating_leaves_every_module_in_the_mode_it_had(make_model):
    model = make_model().train()
    model.model.layers[0].mlp.eval()
    before = [m.training for m in model.modules()]
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == before
