"""Packed rows through transformers' models: their scores and gradients, or why not.

The truth is the plain model in float64, one conversation at a time, by its own logits.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from functools import partial

import model_zoo
import pytest
import torch
import torch.nn.functional as F
from model_zoo_verdicts import Gradients, compared, relative, stacked, trained, widened
from torch import Tensor, nn
from transformers import LlamaConfig

import raco_fast
from raco_fast.dpo import packed_logps, pair_rows
from raco_fast.dpo.data.layout import Kind, Layout
from raco_fast.dpo.data.tokenization import EncodedPair
from raco_fast.dpo.models import enable_checkpointing
from raco_fast.dpo.packable import why_not_packed
from raco_fast.dpo.packed import attention_masks
from raco_fast.dpo.scoring import pair_logps

# Plain attention; windows of 6 tokens, alone and beside full attention; learned positions;
# experts. Every pair of `PAIRS` but the last is longer than a window.
QUICK = ("llama", "mistral", "gemma3_text", "gpt2", "qwen3_moe")
EXACT = (
    *("qwen2", "qwen3", "gemma2", "gpt_neox", "phi3", "olmo2", "granite", "cohere", "cohere2"),
    *("stablelm", "mixtral", "olmoe", "opt", "starcoder2", "phi", "smollm3", "gptj", "llama4_text"),
)
# State spaces, convolutions, linear attention, and attention with a bias by place in the row.
OTHERWISE_QUICK = ("mamba", "lfm2", "bloom")
OTHERWISE = ("recurrent_gemma", "zamba2", "jamba", "bamba", "qwen3_next", "mpt", "falcon", "rwkv")
CHANGES = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "falcon": {"alibi": True},
    "llama4_text": {"attention_chunk_size": 6},
}


def families(quick, slow) -> list:
    return [*quick, *(pytest.param(family, marks=pytest.mark.slow) for family in slow)]


def make_pairs() -> list[EncodedPair]:
    draw = torch.Generator().manual_seed(5)

    def ids(n: int) -> list[int]:
        return torch.randint(3, 60, (n,), generator=draw).tolist()

    labels = [{"x": 1, "y": -1}, {"x": -1, "y": -1}, {"x": 1, "y": 0}, {"x": -1, "y": 1}]
    pairs = []
    for k, (p, a, b) in enumerate([(9, 8, 5), (7, 4, 9), (1, 6, 6), (4, 1, 2)]):
        alike = ids(2) if k == 0 else []  # the shared prefix reaches into the responses
        pairs.append(EncodedPair(f"p{k}", ids(p), alike + ids(a), alike + ids(b), labels[k]))
    return pairs


PAIRS = make_pairs()


def batch_of(kind: Kind):
    return Layout(kind, len(PAIRS), math.inf, 0).batch(PAIRS)


def losses_of(scores: Tensor) -> list[Tensor]:
    """DPO's, of two objectives that agree on some pairs only."""
    margins = scores[: len(PAIRS)] - scores[len(PAIRS) :]
    losses = []
    for name in ("x", "y"):
        label = margins.new_tensor([pair.labels[name] for pair in PAIRS])
        losses.append(-(label.abs() * F.logsigmoid(0.2 * label * margins)).sum() / len(PAIRS))
    return losses


def scores_by_transformers(model: nn.Module) -> Tensor:
    """[2B], one conversation at a time."""
    found = []
    for prompt, response in [
        *((pair.prompt_ids, pair.a_ids) for pair in PAIRS),
        *((pair.prompt_ids, pair.b_ids) for pair in PAIRS),
    ]:
        ids = torch.tensor(prompt + response)
        logps = model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        found.append(logps.gather(-1, ids[1:, None])[len(prompt) - 1 :].sum())
    return torch.stack(found)


def gradients_of(model: nn.Module, losses: list[Tensor]) -> Gradients:
    """By one pass of autograd per objective."""
    params = trained(model)
    each = [
        torch.autograd.grad(loss, list(params.values()), retain_graph=True, allow_unused=True)
        for loss in losses
    ]
    columns = zip(*each, strict=True)
    return {n: stacked(p, g) for (n, p), g in zip(params.items(), columns, strict=True)}


def one_backward(model: nn.Module, kind: Kind, **options) -> tuple[Tensor, Gradients]:
    """Scores and gradients of a prepared model, every pass compared with autograd's."""
    with raco_fast.prepare(model, strict=True, check_every=1), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*one backward pass")
        scores = pair_logps(model, batch_of(kind), 7, **options)
        params = trained(model)
        gradients = raco_fast.ObjectiveGradients(list(params.values()), [0.5, 0.5])
        gradients.backward(losses_of(scores), scores=scores)
        found = {n: stacked(p, gradients.of(p).values()) for n, p in params.items()}
        model.zero_grad(set_to_none=True)  # what is held there would be added to
        return scores.detach(), found


def without_experts(model: nn.Module) -> nn.Module:
    """Frozen where a layer has no rule, so that one pass serves the rest."""
    for name, p in model.named_parameters():
        p.requires_grad_(re.search(r"\.experts\.|\.gate\.weight$|router", name) is None)
    return model


def assert_exact(model: nn.Module, kinds: tuple[Kind, ...] = ("pairs", "packed")) -> None:
    """Scores to 1e-5 and gradients to 1e-5, or to twice what padded rows have of float64's."""
    oracle = copy.deepcopy(model).double()
    with model_zoo.quiet():
        with widened():
            if hasattr(model_zoo.base(oracle), "set_experts_implementation"):
                model_zoo.base(oracle).set_experts_implementation("eager")
            scores = scores_by_transformers(oracle)
            truth = gradients_of(oracle, losses_of(scores))
        padded = pair_logps(model, batch_of("padded"), 7)
        plain = [gradients_of(model, losses_of(padded))]
        torch.testing.assert_close(padded.double(), scores, rtol=1e-5, atol=1e-5)
        for kind in kinds:
            assert why_not_packed(model, PAIRS, Layout(kind, 4, math.inf, 0), 7) is None
            found, gradients = one_backward(model, kind)
            torch.testing.assert_close(found.double(), scores.detach(), rtol=1e-5, atol=1e-5)
            _, excess, worst = compared(gradients, truth, plain)
            assert excess <= 1, f"{kind}: {worst} is off {excess:.1e} times what is allowed"


def with_sdpa(model: nn.Module) -> nn.Module:
    with model_zoo.quiet():
        model.set_attn_implementation("sdpa")
    return model


@pytest.mark.parametrize("family", families(QUICK, EXACT))
def test_scores_and_gradients_are_those_of_every_conversation_alone(family):
    model = without_experts(model_zoo.build(family, **CHANGES.get(family, {})))
    for name, p in model.named_parameters():
        if family == "opt" and "embed_positions" in name:
            p.requires_grad_(False)  # a lookup with an offset, for which there is no rule
    assert_exact(model)


@pytest.mark.parametrize("family", families(("llama", "gemma3_text"), ("qwen3", "gpt2", "phi3")))
def test_with_the_attention_that_is_the_default(family):
    assert_exact(with_sdpa(model_zoo.build(family)))


def test_a_window_of_some_layers_only():
    kinds = ["full_attention", "sliding_attention"]
    window = {"use_sliding_window": True, "sliding_window": 5}
    model = model_zoo.build("qwen2", layer_types=kinds, **window)
    assert {layer.self_attn.sliding_window for layer in model.model.layers} == {None, 5}
    assert_exact(model, ("pairs",))
    assert_exact(with_sdpa(model), ("pairs",))


def test_a_window_is_by_position_and_not_by_place():
    """Behind a long response a, every token of b's prompt is further off than a window's width."""
    model = model_zoo.build("mistral", sliding_window=6)
    prompt, a, b = [3, 4, 5], [*range(6, 30)], [7, 8]
    with torch.no_grad():
        together = packed_logps(model, pair_rows([prompt], [a], [b]))[1]
        ids = torch.tensor(prompt + b)
        alone = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
    expected = alone.gather(-1, ids[1:, None])[len(prompt) - 1 :].sum()
    assert float(together) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_its_own_or_the_embedding(tied):
    model = model_zoo.build("llama", tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert_exact(model, ("pairs",))


def test_an_adapter():
    assert_exact(model_zoo.adapted(model_zoo.build("qwen3")), ("pairs",))


def test_layers_that_recompute_their_activations():
    model = model_zoo.build("llama")
    scores, gradients = one_backward(model, "pairs")
    enable_checkpointing(model)
    again, recomputed = one_backward(model, "pairs")
    assert torch.equal(again, scores)
    assert max(relative(recomputed[n], g) for n, g in gradients.items()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_packed_as_well(dtype):
    model = model_zoo.build("llama").to(dtype)
    assert why_not_packed(model, PAIRS, Layout("pairs", 4, math.inf, 0), 7) is None


@pytest.mark.parametrize("family", families(OTHERWISE_QUICK, OTHERWISE))
def test_a_model_whose_tokens_meet_elsewhere_is_told(family):
    model = model_zoo.build(family, **CHANGES.get(family, {}))
    with model_zoo.quiet():
        for kind in ("pairs", "packed"):
            assert why_not_packed(model, PAIRS, Layout(kind, 4, math.inf, 0), 7)


class Neighbours(nn.Module):
    """A token takes a little of the one before it, as a convolution does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + 0.01 * F.pad(x, (0, 0, 1, -1)))


class Fails(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 1 and x.shape[1] > max(len(p.prompt_ids + p.a_ids) for p in PAIRS):
            raise self.error
        return x


def test_the_reason_is_what_was_seen():
    layout = Layout("pairs", 4, math.inf, 0)
    mixed = model_zoo.build("llama")
    mixed.model.layers[0].mlp = Neighbours(mixed.model.layers[0].mlp)
    found = why_not_packed(mixed, PAIRS, layout, 7)
    assert "its tokens meet in other places than a masked attention" in str(found)
    assert mixed.training, "the model was left in another mode"
    failing = model_zoo.build("llama")
    norm = failing.model.norm
    failing.model.norm = nn.Sequential(norm, Fails(ValueError("a row is too long")))
    assert why_not_packed(failing, PAIRS, layout, 7) == (
        "it fails on them (ValueError: a row is too long)"
    )
    failing.model.norm = nn.Sequential(norm, Fails(torch.OutOfMemoryError("20 GiB")))
    with pytest.raises(torch.OutOfMemoryError, match="20 GiB"):
        why_not_packed(failing, PAIRS, layout, 7)
    capped = model_zoo.build("llama")
    capped.forward = partial(with_logits_halved, capped.forward)
    assert "not those of its head" in str(why_not_packed(capped, PAIRS, layout, 7))


def with_logits_halved(forward, *args, **kwargs):
    output = forward(*args, **kwargs)
    output.logits = output.logits / 2
    return output


def test_a_pair_row_is_scored_in_ones_own_loop():
    """The example of `pair_rows`, against padded rows by autograd."""
    model = model_zoo.build("llama")
    rows = pair_rows(*zip(*((p.prompt_ids, p.a_ids, p.b_ids) for p in PAIRS), strict=True))
    with raco_fast.prepare(model, strict=True):
        opt = raco_fast.ClippedCAGradAdamW(model.parameters(), weights={"x": 0.5, "y": 0.5})
        logps = packed_logps(model, rows, chunk_tokens=5)
        assert logps.shape == (2 * len(PAIRS),)
        assert logps.dtype == torch.float32
        opt.backward(dict(zip("xy", losses_of(logps), strict=True)), scores=logps)
        found = {n: stacked(p, opt.gradients.of(p).values()) for n, p in trained(model).items()}
    expected = gradients_of(model, losses_of(pair_logps(model, batch_of("padded"), 7)))
    assert max(relative(found[n], g) for n, g in expected.items()) < 1e-5
    with pytest.raises(ValueError, match="`chunk_tokens` must be at least 1"):
        packed_logps(model, rows, chunk_tokens=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_are_those_that_transformers_makes_number_by_number(monkeypatch, attention, dtype):
    """Of full, windowed and chunked layers, to the bit, without its vmap."""
    from transformers import masking_utils

    config = LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=3)
    config._attn_implementation = attention
    config.sliding_window, config.attention_chunk_size = 5, 4
    config.layer_types = ["full_attention", "sliding_attention", "chunked_attention"]
    rows = pair_rows([[1, 2, 3, 4], [5, 6]], [[7, 8, 9], [7]], [[7, 3], [2, 2, 2, 2]])

    def refuse(**_):
        raise AssertionError("transformers was asked")

    with monkeypatch.context() as ours:
        ours.setattr(masking_utils, "create_causal_mask", refuse)
        found = attention_masks(config, rows, dtype)
    known = getattr(masking_utils, f"{attention}_mask")
    monkeypatch.setattr(masking_utils, f"{attention}_mask", lambda **given: known(**given))
    expected = attention_masks(config, rows, dtype)
    assert list(found) == ["chunked_attention", "full_attention", "sliding_attention"]
    for kind, mask in found.items():
        assert mask.dtype == expected[kind].dtype == (torch.bool if attention == "sdpa" else dtype)
        assert torch.equal(mask, expected[kind])
    assert len({tuple(mask.flatten().tolist()) for mask in found.values()}) == 3
