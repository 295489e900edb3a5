"""The tokenizer of a trained model writes conversations as they were trained."""

import logging

import pytest
from tiny_tokenizers import TOKENIZERS, with_template
from tokenizers import processors

from raco_fast.dpo.data.pairs import PreferencePair
from raco_fast.dpo.data.rendering import PlainTemplate, TokenOptions
from raco_fast.dpo.data.saved_template import saved_template
from raco_fast.dpo.data.tokenization import encode_pairs

OWN = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
TURNS = [
    {"role": "system", "content": "Be calm."},
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "tea"},
    {"role": "user", "content": "and"},
]


def test_the_template_in_use_is_saved():
    tokenizer = with_template("bytes", OWN)
    assert saved_template(tokenizer, TokenOptions()) == OWN
    assert saved_template(tokenizer, TokenOptions(chat_template=OWN + "\n")) == OWN + "\n"
    named = {"default": "other", "short": OWN}
    tokenizer = with_template("bytes", named)
    assert saved_template(tokenizer, TokenOptions(chat_template="short")) == OWN
    assert saved_template(tokenizer, TokenOptions()) == named


@pytest.fixture
def begins_with_bos():
    """A function that has a tokenizer put a BOS before texts, for the test."""
    changed = []

    def change(kind):
        core = TOKENIZERS[kind].backend_tokenizer
        changed.append((core, core.post_processor))
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
        return with_template(kind, None)

    yield change
    for core, before in changed:
        core.post_processor = before


@pytest.mark.parametrize(
    "plain", [PlainTemplate(), PlainTemplate('"Q":\\ ', "Ü: ", "\t", "\n", "")]
)
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_plain_template_is_saved_as_a_chat_template(kind, bos, plain, begins_with_bos, caplog):
    tokenizer = begins_with_bos(kind) if bos else with_template(kind, None)
    options = TokenOptions(plain=plain)
    (pair,), _ = encode_pairs(
        tokenizer, [PreferencePair("p", TURNS, "Sure, tea", "No", {})], options
    )
    with caplog.at_level(logging.WARNING):
        template = saved_template(tokenizer, options)
    assert not caplog.records
    for answer, trained in (("Sure, tea", pair.a_ids), ("No", pair.b_ids)):
        turns = [*TURNS, {"role": "assistant", "content": answer}]
        found = tokenizer.apply_chat_template(turns, chat_template=template, return_dict=True)
        assert found["input_ids"] == pair.prompt_ids + trained
    prompt = tokenizer.apply_chat_template(
        TURNS, chat_template=template, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert prompt[: len(pair.prompt_ids)] == pair.prompt_ids


def test_a_tokenizer_that_writes_its_eos_otherwise_is_told(caplog):
    tokenizer = with_template("bytes", None)
    tokenizer.eos_token = "Ġ"  # in a text these are two bytes
    try:
        saved_template(tokenizer, TokenOptions())
    finally:
        tokenizer.eos_token = "</s>"
    assert "other tokens of it at the beginning or the end" in caplog.text
