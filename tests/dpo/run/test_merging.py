"""`raco-fast merge`: one model that computes what an adapter and its base do."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from raco_fast.cli import program as cli
from raco_fast.dpo.run.merging import merge
from raco_fast.dpo.run.trainer import train

IDS = torch.arange(3, 25)[None]


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits.float()


def test_the_adapter_of_a_run_becomes_a_model(make_config, tiny, tmp_path, capfd):
    config = make_config({"lora": {"r": 4, "alpha": 8}}, max_steps=2, lr=1e-2)
    train(config)
    merged = tmp_path / "merged"
    assert cli.main(["merge", str(config.folder), str(merged), "--base", str(tiny)]) == 0
    assert f"saved {merged}" in capfd.readouterr().out
    ours = logits(AutoModelForCausalLM.from_pretrained(merged))
    base = AutoModelForCausalLM.from_pretrained(tiny)
    untrained = logits(base)
    both = logits(PeftModel.from_pretrained(base, config.folder / "model"))
    torch.testing.assert_close(ours, both, rtol=1e-5, atol=1e-5)
    assert (ours - untrained).norm() > 100 * (ours - both).norm()
    assert len(AutoTokenizer.from_pretrained(merged)) == len(AutoTokenizer.from_pretrained(tiny))
    small = AutoModelForCausalLM.from_pretrained(
        merge(config.folder / "model", tmp_path / "small", dtype="bf16"), dtype="auto"
    )
    assert small.dtype == torch.bfloat16
    torch.testing.assert_close(logits(small), ours, rtol=0.1, atol=0.05)


def test_what_cannot_be_merged_is_refused_and_nothing_is_written(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"`model.adapter`: .* is for a `model.name` that is an"):
        merge(tiny, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(ValueError, match=r"`folder` must be new or empty, got "):
        merge(tiny, tiny)
