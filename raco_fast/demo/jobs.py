"""The two jobs the study is made of: warm up the model of a seed, and align it with one rule.

Both are pure functions of their arguments and run on one thread, so a result depends neither on
the number of workers nor on the order in which jobs finish. Data is drawn again from the seed
wherever it is needed; only weights and reference log-probabilities travel between processes.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from raco_fast.demo.config import DemoConfig
from raco_fast.demo.documents import make_document
from raco_fast.demo.judges import OBJECTIVES, judge, make_pair
from raco_fast.demo.model import (
    Batch,
    batches_by_length,
    build_model,
    build_tokenizer,
    collate,
    encode_prompt,
    encode_summary,
    generate,
    warm_up,
)
from raco_fast.demo.results import Aligned, WarmStart
from raco_fast.dpo.logps import sequence_logps
from raco_fast.dpo.losses import LossOptions, PairScores, preference_losses
from raco_fast.dpo.metrics import PreferenceMetrics, solution_metrics
from raco_fast.optim.clipped_cagrad_adamw import ClippedCAGradAdamW
from raco_fast.solver.registry import RuleLike, check_rule, label_of

# Six facts in full sentences and two fillers, the longest candidate, are 39 tokens with <eos>.
_MAX_SUMMARY_TOKENS = 44


def warm_up_job(config: DemoConfig, seed: int) -> WarmStart:
    """Teach the model of one seed to summarise, judge it, and score the preference pairs."""
    began = time.perf_counter()
    with _one_thread():
        tokenizer = build_tokenizer()
        model = build_model(tokenizer.get_vocab_size(), config.hidden_size, config.layers, seed)
        losses = warm_up(
            model,
            tokenizer,
            steps=config.warm_up_steps,
            batch_size=config.warm_up_batch_size,
            lr=config.warm_up_lr,
            rng=_rng(seed, "warm-up"),
        )
        model.eval()
        pairs = _Pairs(config, seed, tokenizer)
        ref_logps = np.empty((2, len(pairs.a)), dtype=np.float32)
        with torch.no_grad():
            for rows in pairs.batches:
                ref_logps[:, rows] = sequence_logps(model, *pairs.batch(rows)).view(2, -1)
        return WarmStart(
            seed=seed,
            state={name: value.numpy() for name, value in model.state_dict().items()},
            losses=losses,
            ref_logps=ref_logps,
            scores=_judged_scores(config, seed, model, tokenizer),
            seconds=time.perf_counter() - began,
        )


def align_job(
    config: DemoConfig, start: WarmStart, rule: RuleLike, weights: Mapping[str, float] | None
) -> Aligned:
    """Align the warmed-up model of a seed by one rule and judge what it writes then.

    Every rule sees the same pairs in the same order. `weights` is None for a rule that ignores
    them; the optimizer is then given equal ones.
    """
    began = time.perf_counter()
    with _one_thread():
        tokenizer = build_tokenizer()
        model = build_model(
            tokenizer.get_vocab_size(), config.hidden_size, config.layers, start.seed
        )
        model.load_state_dict({name: torch.tensor(v) for name, v in start.state.items()})
        model.eval()
        optimizer = ClippedCAGradAdamW(
            model.parameters(),
            lr=config.lr,
            weight_decay=0.0,
            weights=weights or dict.fromkeys(OBJECTIVES, 1 / len(OBJECTIVES)),
            c=config.c,
            rule=rule,
            max_grad_norm=1.0,
        )
        steps = _optimize(config, start, model, tokenizer, optimizer)
        return Aligned(
            seed=start.seed,
            rule=label_of(check_rule(rule)),
            weights=None if weights is None else dict(weights),
            scores=_judged_scores(config, start.seed, model, tokenizer),
            steps=steps,
            skipped_steps=optimizer.skipped_steps,
            seconds=time.perf_counter() - began,
        )


class _Pairs:
    """The preference pairs of a seed, tokenized, labelled and in the order they are used."""

    def __init__(self, config: DemoConfig, seed: int, tokenizer: Tokenizer) -> None:
        rng = _rng(seed, "pairs")
        pairs = [
            make_pair(make_document(rng), rng) for _ in range(config.steps * config.batch_size)
        ]
        self.prompts = [encode_prompt(tokenizer, pair.document) for pair in pairs]
        self.a = [encode_summary(tokenizer, pair.a) for pair in pairs]
        self.b = [encode_summary(tokenizer, pair.b) for pair in pairs]
        self.labels = {
            name: torch.tensor([pair.labels[name] for pair in pairs]) for name in OBJECTIVES
        }
        lengths = [
            len(prompt) + max(len(a), len(b))
            for prompt, a, b in zip(self.prompts, self.a, self.b, strict=True)
        ]
        self.batches = batches_by_length(lengths, config.batch_size, rng)

    def batch(self, rows: list[int]) -> Batch:
        """The pairs `rows` as one batch of 2B sequences, all a before all b."""
        prompts = [self.prompts[i] for i in rows]
        summaries = [self.a[i] for i in rows] + [self.b[i] for i in rows]
        return collate(prompts + prompts, summaries)

    def scores(self, rows: list[int], logps: Tensor, ref_logps: Tensor) -> PairScores:
        """Scores of the pairs `rows` from [2, B] log-probabilities."""
        tokens = torch.tensor([[float(len(text[i])) for i in rows] for text in (self.a, self.b)])
        return PairScores(*logps, *ref_logps, *tokens)


def _optimize(
    config: DemoConfig,
    start: WarmStart,
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    optimizer: ClippedCAGradAdamW,
) -> list[dict[str, float]]:
    """One optimizer step per batch of pairs; returns the metrics of every step."""
    pairs = _Pairs(config, start.seed, tokenizer)
    ref_logps = torch.tensor(start.ref_logps)
    ramp = max(1, config.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / ramp))
    steps = []
    for step, rows in enumerate(pairs.batches, start=1):
        logps = sequence_logps(model, *pairs.batch(rows)).view(2, -1)
        scores = pairs.scores(rows, logps, ref_logps[:, rows])
        labels = {name: label[rows] for name, label in pairs.labels.items()}
        losses = preference_losses(scores, labels, options=LossOptions(beta=config.beta))
        optimizer.backward(losses)
        optimizer.step()
        optimizer.zero_grad()
        preferences = PreferenceMetrics(config.beta)
        preferences.add(scores, labels)
        assert optimizer.solution is not None
        steps.append(
            {"step": step, "lr": float(schedule.get_last_lr()[0])}
            | {f"loss/{name}": loss.item() for name, loss in losses.items()}
            | preferences.result()
            | solution_metrics(optimizer.solution, OBJECTIVES)
        )
        schedule.step()
    return steps


def _judged_scores(
    config: DemoConfig, seed: int, model: LlamaForCausalLM, tokenizer: Tokenizer
) -> dict[str, float]:
    """Mean score by each judge of one sampled summary of every held-out document."""
    rng = _rng(seed, "held-out")
    documents = [make_document(rng) for _ in range(config.documents)]
    texts = generate(model, tokenizer, documents, max_tokens=_MAX_SUMMARY_TOKENS, seed=seed)
    judged = [judge(document, text) for document, text in zip(documents, texts, strict=True)]
    return {name: statistics.fmean(scores[name] for scores in judged) for name in OBJECTIVES}


def _rng(seed: int, purpose: str) -> random.Random:
    """Independent random numbers for each use of a seed."""
    return random.Random(f"raco-fast demo {purpose} {seed}")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Fix torch at one thread: sums then have one order whatever the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
