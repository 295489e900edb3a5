"""Where the policy is its reference, the first loss is ln 2; whatever makes noise is refused."""

from __future__ import annotations

import math

import model_zoo
import pytest

from raco_fast.dpo.run.trainer import train

# Dropout as a number (OPT, XGLM, BioGPT, GPTBigCode, Seed-OSS), layers left out (BART), sampled
# experts (PhiMoE), no decoder of its own (Llama 4), token types (Gemma 3), a state space (Mamba).
QUICK = (
    *("opt", "xglm", "biogpt", "gpt_bigcode", "seed_oss", "bart", "phimoe", "llama4_text"),
    *("gemma3_text", "mamba"),
)
NOISE = 0.4
# Its configuration takes no dropout.
WITHOUT_NOISE = ("diffllama",)


@pytest.fixture
def save_family(tmp_path, save_tiny):
    """A function that saves a tiny model of a family with the test's tokenizer."""

    def save(family: str) -> str:
        noise = 0.0 if family in WITHOUT_NOISE else NOISE
        model, folder = model_zoo.build(family, noise), save_tiny()
        with model_zoo.quiet():
            model.save_pretrained(folder)
        return str(folder)

    return save


def families() -> list:
    return [
        pytest.param(family, marks=[] if family in QUICK else pytest.mark.slow)
        for family in model_zoo.causal_lms()
        if family not in model_zoo.NOT_BUILT
    ]


@pytest.mark.parametrize("family", families())
def test_the_first_loss_of_a_family_is_ln_2(runs, make_config, save_family, family):
    model = {"name": save_family(family), "dropout": False}
    config = make_config(model, eval_data=[], max_steps=1)
    with model_zoo.quiet():
        train(config)
    (first,) = runs.steps(config)
    for name in ("sure", "kind"):
        assert first[f"loss/{name}"] == pytest.approx(math.log(2), abs=2e-5)
