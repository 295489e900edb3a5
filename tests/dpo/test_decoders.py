"""Models that are no decoder with a head, or hide their decoder: scores are the model's own."""

from __future__ import annotations

import copy
import logging

import model_zoo
import pytest
import torch
import transformers
from torch import Tensor, nn

from raco_fast.dpo.decoders import decoder_of, unwrap
from raco_fast.dpo.logps import sequence_logps
from raco_fast.dpo.modes import begin_training

# A decoder under another name; layers, or a scale and padding of the vocabulary, at the head; caps.
HIDDEN = {"llama4_text": "Llama4TextModel", "mllama": "MllamaTextModel"}
WHOLE = ("bert", "roberta", "modernbert-decoder", "prophetnet", "inkling_text")
CAPPED = ("recurrent_gemma", "xlstm")
OTHERS = sorted({*model_zoo.causal_lms()} - {*model_zoo.NOT_BUILT, *HIDDEN, *WHOLE, *CAPPED})


def full_logps(logits: Tensor, batch) -> Tensor:
    """Every logit at once, in the model's own code."""
    logits = logits[:, :-1].float()
    logps = logits.log_softmax(-1).gather(-1, batch.ids[:, 1:, None])[..., 0]
    return logps.masked_fill(~batch.scored[:, 1:], 0).sum(-1)


def scores_of(model: nn.Module, batch) -> Tensor:
    return sequence_logps(model, batch.ids, batch.mask.long(), batch.scored, chunk_tokens=5)


@pytest.mark.parametrize(
    "family",
    [
        *(*HIDDEN, *WHOLE, *CAPPED),
        *(pytest.param(family, marks=pytest.mark.slow) for family in OTHERS),
    ],
)
def test_scores_and_gradients_are_those_of_the_models_own_logits(family, caplog):
    with model_zoo.quiet():
        model, batch = model_zoo.build(family), model_zoo.batch_of()
        begin_training(model, noise=False)
        parameters = list(model.parameters())
        found = []
        for whole in (False, True):
            if whole:
                scores = full_logps(model_zoo.logits_of(model, batch), batch)
            else:
                scores = scores_of(model, batch)
            scores[::2].sum().backward()
            found.append((scores.detach(), [copy.copy(p.grad) for p in parameters]))
            model.zero_grad(set_to_none=True)
    (ours, own), (theirs, plain) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for a, b in zip(own, plain, strict=True):
        if a is not None or b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()) + 1e-6)
    if family in (*HIDDEN, *WHOLE, *CAPPED):
        assert ("from all of its logits" in caplog.text) == (family in WHOLE)


@pytest.mark.parametrize(("family", "decoder"), HIDDEN.items())
def test_a_decoder_is_found_where_get_decoder_gives_the_model(family, decoder):
    with model_zoo.quiet():
        model = model_zoo.build(family)
    assert model.get_decoder() is model
    assert type(decoder_of(model)).__name__ == decoder


class Warmer(transformers.LlamaForCausalLM):
    """A head with a transform nobody has heard of."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.02
        return output


class Headless(transformers.LlamaForCausalLM):
    def get_output_embeddings(self):
        return None


class Bare(nn.Module):
    """Not a model of transformers: nothing says which part is the decoder."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList([model])

    def get_output_embeddings(self):
        return self.parts[0].lm_head

    def forward(self, **given):
        return self.parts[0](**given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Warmer, "they differ by"),
        (Headless, "it has no output embeddings"),
        (lambda config: Bare(transformers.LlamaForCausalLM(config)), "its decoder cannot be told"),
    ],
    ids=["warmer", "headless", "bare"],
)
def test_what_is_not_known_is_scored_by_its_own_logits_and_said_once(caplog, make, reason, dtype):
    torch.manual_seed(7)
    batch = model_zoo.batch_of()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = model_zoo.tiny("llama", **sizes)
    model = make(config).to(dtype).train()
    with caplog.at_level(logging.WARNING), torch.no_grad():
        ours = [scores_of(model, batch) for _ in range(2)]
        given = {"attention_mask": batch.mask.long(), "use_cache": False}
        logits = model(input_ids=batch.ids, **given).logits
    torch.testing.assert_close(ours[0], full_logps(logits, batch), rtol=1e-6, atol=1e-5)
    assert torch.equal(*ours)
    assert all(m.training for m in model.modules())
    record, *others = caplog.records
    name = type(unwrap(model)).__name__
    assert record.getMessage().startswith(f"`model` ({name}): ")
    rounded = [each.getMessage().startswith(f"the logits of {name} come in") for each in others]
    assert rounded == [True] * (dtype == torch.bfloat16)
    assert reason in record.getMessage()


class Scaled(nn.Linear):
    def forward(self, x):
        return 1.3 * super().forward(x)


def test_a_head_of_another_class_is_called_and_not_taken_apart(caplog):
    with model_zoo.quiet(), torch.no_grad():
        model, batch = model_zoo.build("llama"), model_zoo.batch_of()
        before = scores_of(model, batch)
        model.lm_head = Scaled(32, model_zoo.VOCAB, bias=False)
        ours = scores_of(model, batch)
        theirs = full_logps(model_zoo.logits_of(model, batch), batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (ours - before).abs().min() > 0.01
    assert not caplog.records


def test_the_first_look_reads_no_more_than_64_tokens_of_the_longest_row():
    with model_zoo.quiet():
        model = model_zoo.build("llama", max_position_embeddings=256)
    ids, mask = torch.arange(3, 203).remainder(57).add(3).repeat(2, 1), torch.ones(2, 200)
    mask[0, 90:] = 0
    rows, scored = [], mask.bool().clone()
    scored[:, :-1] = False
    model.lm_head.register_forward_hook(lambda head, args, y: rows.append(y.shape[:-1]))
    sequence_logps(model, ids, mask.long(), scored)
    assert rows == [(1, 64)] * 2  # the chunked head uses the weight alone
