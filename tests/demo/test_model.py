"""The demo's tokenizer, model, batching, warm-up and sampling."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raco_fast.demo.config import DemoConfig
from raco_fast.demo.documents import make_document, make_summary
from raco_fast.demo.model import (
    BOS,
    EOS,
    PAD,
    SEP,
    batches_by_length,
    build_model,
    build_tokenizer,
    collate,
    encode_prompt,
    encode_summary,
    generate,
    warm_up,
)

TOKENIZER = build_tokenizer()


def test_every_text_survives_the_tokenizer_and_foreign_words_become_unknown() -> None:
    rng = random.Random(5)
    unknown = TOKENIZER.token_to_id("<unk>")
    for _ in range(300):
        document = make_document(rng)
        for text in (document.text, make_summary(document, rng)):
            ids = TOKENIZER.encode(text).ids
            assert unknown not in ids
            assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
    assert TOKENIZER.encode("the zeppelin").ids[1] == unknown


def test_longest_sequence_fits_in_96_tokens() -> None:
    rng = random.Random(8)
    document = make_document(rng)
    longest = " ".join(["the train is late ."] * 6 + ["some took pictures ."] * 2)
    prompt, summary = encode_prompt(TOKENIZER, document), encode_summary(TOKENIZER, longest)
    assert (prompt[0], prompt[-1], summary[-1]) == (BOS, SEP, EOS)
    assert 2 + 4 * 5 + 2 * 4 + len(summary) <= 96


def test_default_model_has_one_to_three_million_parameters_and_its_seed_decides_it() -> None:
    config = DemoConfig()
    size = (TOKENIZER.get_vocab_size(), config.hidden_size, config.layers)
    before = torch.random.get_rng_state()
    first, again, other = (build_model(*size, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert 1_000_000 <= sum(p.numel() for p in first.parameters()) <= 3_000_000
    for a, b, c in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.ndim == 1 or not torch.equal(a, c)


def test_collate_pads_on_the_right_and_marks_the_summaries() -> None:
    batch = collate([[1, 7, 2], [1, 2]], [[8, 3], [9, 6, 5, 3]])
    assert batch.input_ids.tolist() == [[1, 7, 2, 8, 3, PAD], [1, 2, 9, 6, 5, 3]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]
    assert batch.completion_mask.tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 1]]


@given(st.lists(st.integers(1, 90), min_size=1, max_size=80), st.integers(1, 7))
def test_batches_by_length_use_every_row_once(lengths: list[int], batch_size: int) -> None:
    batches = batches_by_length(lengths, batch_size, random.Random(2))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert len(batches) == -(-len(lengths) // batch_size)


def test_batches_by_length_save_padding_and_are_not_in_order_of_length() -> None:
    rng = random.Random(6)
    lengths = [rng.randint(20, 70) for _ in range(256)]
    batches = batches_by_length(lengths, 8, rng)
    longest = [max(lengths[i] for i in batch) for batch in batches]
    plain = [max(lengths[i : i + 8]) for i in range(0, 256, 8)]
    assert sum(longest) < 0.85 * sum(plain)
    assert longest != sorted(longest)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """A small model after a short warm-up."""
    model = build_model(TOKENIZER.get_vocab_size(), hidden_size=48, layers=2, seed=1)
    losses = warm_up(model, TOKENIZER, steps=40, batch_size=8, lr=3e-3, rng=random.Random(1))
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    return model.eval()


@torch.no_grad()
def test_batched_sampling_equals_writing_each_text_alone_without_cache(model) -> None:
    rng = random.Random(9)
    documents = [make_document(rng) for _ in range(5)]
    texts = generate(model, TOKENIZER, documents, max_tokens=30, seed=17)
    prompts = [encode_prompt(TOKENIZER, document) for document in documents]
    assert len({len(prompt) for prompt in prompts}) > 1, "no padding: nothing is tested"
    noises = torch.Generator().manual_seed(17)
    written: list[list[int]] = [[] for _ in documents]
    for _ in range(30):
        noise = torch.rand(len(documents), TOKENIZER.get_vocab_size(), generator=noises)
        for i, prompt in enumerate(prompts):
            if EOS not in written[i]:
                logits = model(input_ids=torch.tensor([prompt + written[i]])).logits[0, -1]
                written[i].append(int((logits - (-noise[i].log()).log()).argmax()))
    for text, ids in zip(texts, written, strict=True):
        ids = ids[: ids.index(EOS)] if EOS in ids else ids
        assert text == TOKENIZER.decode(ids, skip_special_tokens=False)


def test_samples_follow_the_seed(model) -> None:
    documents = [make_document(random.Random(i)) for i in range(6)]
    first, again, other = (
        generate(model, TOKENIZER, documents, max_tokens=12, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert all(len(text.split()) <= 12 for text in first)
