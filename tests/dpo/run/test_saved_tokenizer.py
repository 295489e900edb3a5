"""The saved tokenizer writes a conversation as the run has trained it."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from raco_fast.dpo.run.trainer import Trainer

OWN = (
    "{% for m in messages %}{{ m.role }} : {% if m.role == 'assistant' %}sure {% endif %}"
    "{{ m.content + eos_token }} {% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.mark.parametrize(
    "tokens", [{"chat_template": OWN}, {}], ids=["another template", "plain template"]
)
def test_the_saved_tokenizer_writes_what_was_trained(make_config, tokens, caplog):
    config = make_config(tokens=tokens, max_steps=1, eval_data=[])
    trainer = Trainer(config)
    told = "begins the answers of 40 pairs with text that its generation header does not have"
    assert (f"data: the chat template {told}" in caplog.text) == bool(tokens)
    trainer.run()
    saved = AutoTokenizer.from_pretrained(config.folder / "model")
    rows = map(json.loads, Path(config.data[0].path).read_text().splitlines())
    for row, pair in zip(rows, trainer.inputs.training, strict=True):
        turns = [*row["prompt"], {"role": "assistant", "content": row["response_a"]}]
        ids = saved.apply_chat_template(turns, return_dict=True)["input_ids"]
        assert ids == pair.prompt_ids + pair.a_ids
