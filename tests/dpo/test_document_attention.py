"""Attention document by document gives what attention over the whole row gives, for less."""

from __future__ import annotations

from contextlib import nullcontext

import model_zoo
import pytest
import torch
from torch import Tensor, nn

from raco_fast.dpo import document_attention, packed, packed_logps, pair_rows
from raco_fast.dpo.decoders import decoder_of
from raco_fast.dpo.models import enable_checkpointing

# Plain attention, windows of 6 tokens beside full attention.
FAMILIES = ("llama", "gemma3_text")


@pytest.fixture(params=FAMILIES)
def model(request) -> nn.Module:
    built = model_zoo.build(request.param)
    with model_zoo.quiet():
        built.set_attn_implementation("sdpa")
    return built


@pytest.fixture
def calls(monkeypatch) -> list[list[int]]:
    """The lengths that every call of sdpa is for."""
    from transformers.integrations import sdpa_attention

    plain, found = sdpa_attention.sdpa_attention_forward, []

    def noted(module, query, *args, **options):
        found.append(query.shape[2])
        return plain(module, query, *args, **options)

    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", noted)
    return found


def rows():
    draw = torch.Generator().manual_seed(5)

    def ids(n: int) -> list[int]:
        return torch.randint(3, 60, (n,), generator=draw).tolist()

    lengths = [(9, 8, 5), (7, 4, 9), (4, 1, 2)]
    return pair_rows(*([ids(n[k]) for n in lengths] for k in range(3)))


LENGTHS = [22, 20, 7]


def scores_and_gradients(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    scores = packed_logps(model, rows())
    wanted = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(scores.sin().sum(), wanted, allow_unused=True)
    return scores.detach(), [g for g in gradients if g is not None]


def test_it_is_what_whole_rows_give(monkeypatch, model, calls):
    model.double()
    implementation = model.config.get_text_config()._attn_implementation
    scores, gradients = scores_and_gradients(model)
    layers = model.config.get_text_config().num_hidden_layers
    assert calls == LENGTHS * layers
    assert model.config.get_text_config()._attn_implementation == implementation == "sdpa"
    monkeypatch.setattr(packed, "by_document", lambda *args: nullcontext())
    whole, expected = scores_and_gradients(model)
    torch.testing.assert_close(scores, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-12)


def test_checkpointed_layers_find_the_same_operations_again(model, calls):
    enable_checkpointing(model)
    model.train()
    scores_and_gradients(model)
    assert set(calls) <= {sum(LENGTHS)}


def test_the_models_own_attention_is_back_after_an_error(model):
    config = model.config.get_text_config()
    decoder, packed_rows = decoder_of(model), rows()

    def fail() -> None:
        with document_attention.by_document(decoder, config, packed_rows):
            assert config._attn_implementation == document_attention._NAME
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert config._attn_implementation == "sdpa"


def test_eager_attention_stays_the_models_own(model, calls):
    with model_zoo.quiet():
        model.set_attn_implementation("eager")
    scores_and_gradients(model)
    assert calls == []


def test_other_rows_are_attended_as_ever(model):
    """Another pass of the model in the block, with rows that the documents are not of."""
    config, packed_rows = model.config.get_text_config(), rows()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad(), document_attention.by_document(decoder_of(model), config, packed_rows):
        found = model(input_ids=ids, use_cache=False).logits
    with torch.no_grad():
        assert torch.equal(found, model(input_ids=ids, use_cache=False).logits)
