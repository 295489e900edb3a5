"""Adapters by hub name, in a process whose hub is a cache that this file writes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

LOAD = """
import torch
from raco_fast.dpo.models import LoraOptions, ModelOptions
from raco_fast.dpo.policy import load_base_model, load_tokenizer, make_policy
for way in ({}, {"adapter": "merge"}, {"adapter": "reference", "lora": LoraOptions(r=2)}):
    options = ModelOptions("org/adapter", device="cpu", **way)
    load_tokenizer(options)
    policy = make_policy(load_base_model(options), options)
    with torch.no_grad(), policy.as_reference(policy.model):
        print(float(policy.model.eval()(torch.arange(3, 20)[None]).logits.norm()))
    if hasattr(policy.model, "peft_config"):
        saved = policy.model.peft_config["default"]
        assert (saved.base_model_name_or_path, saved.revision) == ("org/base", "old")
"""


def repository(hub: Path, name: str, revision: str) -> Path:
    """An empty repository's snapshot in a cache folder of the hub."""
    root, commit = hub / "hub" / f"models--{name.replace('/', '--')}", revision.ljust(40, "0")
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    (root / "snapshots" / commit).mkdir(parents=True)
    return root / "snapshots" / commit


@pytest.mark.slow
def test_an_adapter_on_the_hub_has_its_base_in_the_version_that_it_names(
    tiny, save_tiny, make_model, tmp_path
):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    for seed, revision in ((1, "main"), (2, "old")):
        folder = repository(tmp_path, "org/base", revision)
        make_model(seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    config = LoraConfig(r=2, target_modules=["q_proj"], revision="old")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config, revision="old")
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    config.base_model_name_or_path = "org/base"
    adapter = repository(tmp_path, "org/adapter", "main")
    model.save_pretrained(adapter, save_embedding_layers=False)
    with torch.no_grad():
        truth = float(model.eval()(torch.arange(3, 20)[None]).logits.norm())
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert [float(line) for line in run.stdout.split()] == pytest.approx([truth] * 3, rel=1e-6)


OF_A_VERSION = """
import torch
from raco_fast.dpo.models import LoraOptions, ModelOptions
from raco_fast.dpo.policy import load_base_model, load_tokenizer, make_policy
for name, lora in (("org/base", LoraOptions(r=2)), ("org/adapter", None)):
    options = ModelOptions(name, device="cpu", revision="old", lora=lora)
    assert len(load_tokenizer(options)) > 9
    policy = make_policy(load_base_model(options), options)
    assert lora is None or policy.model.peft_config["default"].revision == "old"
    with torch.no_grad():
        print(float(policy.model.eval()(torch.arange(3, 20)[None]).logits.norm()))
"""


@pytest.mark.slow
def test_a_model_and_an_adapter_in_the_version_that_is_asked_for(tiny, make_model, tmp_path):
    """The newest ones are other models, without a tokenizer."""
    from transformers import AutoTokenizer

    truth = []
    for seed, revision in ((1, "main"), (2, "old")):
        folder, model = repository(tmp_path, "org/base", revision), make_model(seed)
        model.save_pretrained(folder)
        config = LoraConfig(r=2, target_modules=["q_proj"], revision="old")
        adapted = get_peft_model(make_model(2), config, revision="old")
        for p in adapted.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.1 * seed)
        config.base_model_name_or_path = "org/base"
        adapter = repository(tmp_path, "org/adapter", revision)
        adapted.save_pretrained(adapter, save_embedding_layers=False)
        with torch.no_grad():
            ids = torch.arange(3, 20)[None]
            truth = [float(m.eval()(ids).logits.norm()) for m in (model, adapted)]
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", OF_A_VERSION],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert [float(line) for line in run.stdout.split()] == pytest.approx(truth, rel=1e-6)
