"""The demo's tokenizer, model, warm-up and sampling."""

import math
import random

import pytest
import torch
from transformers import LlamaForCausalLM

from raco_fast.demo.config import DemoConfig
from raco_fast.demo.documents import make_document, make_summary
from raco_fast.demo.judges import draw_pairs
from raco_fast.demo.model import (
    MAX_SUMMARY_TOKENS,
    MAX_TOKENS,
    PAD,
    build_model,
    build_tokenizer,
    encode,
    warm_up,
    write_summaries,
)
from raco_fast.dpo.data.layout import Layout
from raco_fast.dpo.data.pairs import PreferencePair

TOKENIZER = build_tokenizer()
BOS, SEP, EOS = TOKENIZER.convert_tokens_to_ids(["<bos>", "<sep>", "<eos>"])


def test_every_text_survives_the_tokenizer_and_foreign_words_become_unknown() -> None:
    rng = random.Random(5)
    for _ in range(300):
        document = make_document(rng)
        for text in (document.text, make_summary(document, rng)):
            ids = TOKENIZER(text).input_ids
            assert TOKENIZER.unk_token_id not in ids
            assert TOKENIZER.decode(ids) == text
    assert TOKENIZER("the zeppelin").input_ids[1] == TOKENIZER.unk_token_id
    assert TOKENIZER.pad_token_id == PAD


def test_a_sequence_is_document_and_summary_between_their_marks() -> None:
    longest = " ".join(["the train is late ."] * 6 + ["some took pictures ."] * 2)
    document = " ".join(["the road is icy ."] * 4 + ["some took pictures ."] * 2)
    prompt = [{"role": "user", "content": document}]
    (pair,) = encode(TOKENIZER, [PreferencePair("0", prompt, longest, "road wet .", {"x": 1})])
    assert TOKENIZER.decode(pair.prompt_ids) == f"<bos> {document} <sep>"
    assert TOKENIZER.decode(pair.a_ids) == f"{longest} <eos>"
    assert TOKENIZER.decode(pair.b_ids) == "road wet . <eos>"
    assert pair.labels == {"x": 1}
    assert len(pair.a_ids) <= MAX_SUMMARY_TOKENS
    assert len(pair.prompt_ids) + MAX_SUMMARY_TOKENS <= MAX_TOKENS


def test_default_model_has_one_to_three_million_parameters_and_its_seed_decides_it() -> None:
    config = DemoConfig()
    before = torch.random.get_rng_state()
    first, again, other = (
        build_model(TOKENIZER, config.hidden_size, config.layers, seed) for seed in (4, 4, 5)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert 1_000_000 <= sum(p.numel() for p in first.parameters()) <= 3_000_000
    for a, b, c in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.ndim == 1 or not torch.equal(a, c)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """A small model after a short warm-up."""
    model = build_model(TOKENIZER, hidden_size=48, layers=2, seed=1)
    pairs = encode(TOKENIZER, draw_pairs(160, random.Random(1)))
    rounds = Layout("padded", 4, math.inf, PAD).rounds(pairs)
    losses = warm_up(model, [group for (group,) in rounds], lr=3e-3)
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    return model


@torch.no_grad()
def test_batched_sampling_equals_writing_each_text_alone_without_cache(model) -> None:
    rng = random.Random(9)
    documents = [make_document(rng) for _ in range(5)]
    before = torch.random.get_rng_state()
    texts = write_summaries(model, TOKENIZER, documents, seed=17)
    assert torch.equal(torch.random.get_rng_state(), before)
    prompts = [[BOS, *TOKENIZER(document.text).input_ids, SEP] for document in documents]
    assert len({len(prompt) for prompt in prompts}) > 1, "no padding: nothing is tested"
    written: list[list[int]] = [[] for _ in documents]
    torch.manual_seed(17)
    for _ in range(MAX_SUMMARY_TOKENS):
        logits = [
            model(input_ids=torch.tensor([prompt + ids])).logits[0, -1]
            for prompt, ids in zip(prompts, written, strict=True)
        ]
        tokens = torch.stack(logits).softmax(-1).multinomial(1)[:, 0].tolist()
        for ids, token in zip(written, tokens, strict=True):
            if EOS not in ids:
                ids.append(token)
    assert texts == [TOKENIZER.decode(ids).partition("<eos>")[0].strip() for ids in written]
    torch.random.set_rng_state(before)


def test_samples_follow_the_seed(model) -> None:
    documents = [make_document(random.Random(i)) for i in range(6)]
    first, again, other = (write_summaries(model, TOKENIZER, documents, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert all(len(text.split()) <= MAX_SUMMARY_TOKENS for text in first)


def test_random_numbers_depend_on_the_place_only(model) -> None:
    """A model that hardly differs writes hardly anything else: what is drawn is the same."""
    documents = [make_document(random.Random(i)) for i in range(6)]
    other = build_model(TOKENIZER, hidden_size=48, layers=2, seed=1)
    other.load_state_dict(model.state_dict())
    other.model.norm.weight.data *= 1 + 1e-6
    theirs, ours = (write_summaries(m, TOKENIZER, documents, seed=3) for m in (other, model))
    assert theirs == ours
