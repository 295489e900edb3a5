"""Scores, losses and accuracies of twelve families against transformers, one sequence at a time.

Here: pairs -> token ids -> padded batches -> scores -> losses -> metrics. The truth renders and
tokenizes every conversation as a whole, runs the plain model in float64 on it alone, and has the
loss written out.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import model_zoo
import pytest
import torch
from model_zoo_verdicts import widened
from torch import nn

from raco_fast.dpo.data.batches import labelled_counts
from raco_fast.dpo.data.layout import Layout
from raco_fast.dpo.data.pairs import PreferencePair
from raco_fast.dpo.data.tokenization import encode_pairs
from raco_fast.dpo.losses.margin_losses import Sigmoid
from raco_fast.dpo.losses.objective_losses import preference_losses
from raco_fast.dpo.metrics import PreferenceMetrics
from raco_fast.dpo.run.reference_cache import compute_reference
from raco_fast.dpo.scoring import pair_logps, score_pairs

# Dense, capped, scaled or divided logits, learned positions, ALiBi, sliding windows, state spaces,
# experts in a decoder that is not found by name, and layers between decoder and head.
FAMILIES = (
    *("llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "opt", "bloom", "cohere", "granite"),
    *("mamba", "llama4_text", "bert"),
)
BETAS = {"x": 0.1, "y": 0.4}
END = "<|im_end|>"
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPTS = ("say something about tea", "rain?", "is chess calm", "tea, please", "say rain", "hm")
LABELS = ((1, -1), (-1, 0), (0, 0), (1, 1), (-1, 1), (1, 0))


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes and merges of a few words: no token crosses the boundary of prompt and response."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<pad>", "<|im_start|>", END],
    )
    texts = [*PROMPTS, "user", "assistant", "yes no sure calm fine"]
    core.train_from_iterator(texts * 20, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token=END,
        additional_special_tokens=["<|im_start|>"],
    )
    made.chat_template = CHAT
    return made


@pytest.fixture(scope="module")
def pairs() -> list[PreferencePair]:
    answers = [("yes", "no sure"), ("fine calm", "no"), ("sure", "calm"), ("tea", "yes, rain")]
    answers += [("no", "fine fine fine"), ("calm yes", "hm")]
    return [
        PreferencePair(
            f"p{k}",
            [{"role": "user", "content": PROMPTS[k]}],
            a,
            b,
            dict(zip("xy", labels, strict=True)),
        )
        for k, ((a, b), labels) in enumerate(zip(answers, LABELS, strict=True))
    ]


def ours(
    tokenizer: Any, pairs: list[PreferencePair], policy: nn.Module, reference: nn.Module
) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
    """(id -> log-probabilities under the policy, metrics and losses), in batches of two."""
    encoded, report = encode_pairs(tokenizer, pairs)
    assert report.kept == len(pairs)
    losses = {name: Sigmoid(beta=beta) for name, beta in BETAS.items()}
    references = compute_reference(reference, encoded, Layout("padded", 3, math.inf, 0), 7)
    counts, metrics = labelled_counts(encoded, tuple(BETAS)), PreferenceMetrics(losses)
    scored: dict[str, tuple[float, float]] = {}
    totals = dict.fromkeys(losses, 0.0)
    policy.eval()
    layout = Layout("padded", 2, math.inf, 0)
    for (group,) in layout.rounds(encoded):
        batch = layout.batch(group)
        logps = pair_logps(policy, batch, 7)
        scores = score_pairs(logps, batch, references, losses)
        parts = preference_losses(scores, batch.labels, loss=losses, counts=counts)
        totals = {name: totals[name] + float(parts[name]) for name in totals}
        metrics.add(scores, batch.labels)
        scored |= dict(zip(batch.ids, zip(*logps.view(2, -1).tolist(), strict=True), strict=True))
    return scored, metrics.result() | {f"loss/{name}": total for name, total in totals.items()}


def whole_ids(tokenizer: Any, pair: PreferencePair, answer: str) -> tuple[int, list[int]]:
    """(tokens of the prompt, those of the conversation up to the end of the answer)."""
    turns = [*pair.prompt, {"role": "assistant", "content": answer}]
    begun = tokenizer.apply_chat_template(
        pair.prompt, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    end = len(ids) - ids[::-1].index(tokenizer.convert_tokens_to_ids(END))
    return len(begun), ids[:end]


def by_transformers(tokenizer: Any, pairs: list[PreferencePair], model: nn.Module) -> list:
    """[n][2] log-probabilities of the answers, float64."""
    model = copy.deepcopy(model).double().eval()
    rows = []
    with torch.no_grad(), widened():
        for pair in pairs:
            sides = []
            for answer in (pair.response_a, pair.response_b):
                begin, ids = whole_ids(tokenizer, pair, answer)
                logps = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
                sides.append(sum(float(logps[t - 1, ids[t]]) for t in range(begin, len(ids))))
            rows.append(sides)
    return rows


def written_out(
    pairs: list[PreferencePair], policy: list, reference: list
) -> Iterator[tuple[str, float]]:
    """Losses and metrics of every objective."""
    for name, beta in BETAS.items():
        losses, margins, ranked, likelier = [], [], [], []
        for pair, of_policy, of_reference in zip(pairs, policy, reference, strict=True):
            label = pair.preferences[name]
            if label:
                chosen, other = (0, 1) if label > 0 else (1, 0)
                ratio = [p - r for p, r in zip(of_policy, of_reference, strict=True)]
                margin = beta * (ratio[chosen] - ratio[other])
                losses.append(math.log1p(math.exp(-margin)))
                margins.append(margin)
                ranked.append(margin > 0)
                likelier.append(of_policy[chosen] > of_policy[other])
        n = len(losses)
        yield f"loss/{name}", sum(losses) / n
        yield f"rewards/margins/{name}", sum(margins) / n
        yield f"rewards/accuracies/{name}", sum(ranked) / n
        yield f"logps/accuracies/{name}", sum(likelier) / n
        yield f"pairs/{name}", n


def moved(model: nn.Module) -> nn.Module:
    """A policy that is not its reference any more."""
    policy = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(torch.randn_like(p), alpha=0.2 * float(p.std() if p.numel() > 1 else 0.0))
    return policy


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_scores_as_transformers_does(tokenizer, pairs, family):
    with model_zoo.quiet():
        reference = model_zoo.build(family, vocab_size=320)
        policy = moved(reference)
        scored, metrics = ours(tokenizer, pairs, policy, reference)
        truth = [by_transformers(tokenizer, pairs, model) for model in (policy, reference)]
    expected = dict(written_out(pairs, *truth))
    for pair, logps in zip(pairs, truth[0], strict=True):
        assert scored[pair.id] == pytest.approx(logps, rel=1e-5)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-5)
    ratios = [a - b for both in zip(*truth, strict=True) for a, b in zip(*both, strict=True)]
    assert max(map(abs, ratios)) > 0.1, "the policy has not moved"
