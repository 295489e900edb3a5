"""The two jobs the study is made of: warm up the model of a seed, and align it with one rule.

Both are pure functions of their arguments and run on one thread, so a result depends neither on
the number of workers nor on the order in which jobs finish. Data is drawn again from the seed
wherever it is needed; only weights and reference log-probabilities travel between processes.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy.typing as npt
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaForCausalLM

from raco_fast.demo.config import DemoConfig
from raco_fast.demo.documents import make_document
from raco_fast.demo.judges import draw_pairs, judge
from raco_fast.demo.labelling import labelled
from raco_fast.demo.model import (
    PAD,
    build_model,
    build_tokenizer,
    encode,
    warm_up,
    write_summaries,
)
from raco_fast.dpo.data.layout import Layout
from raco_fast.dpo.data.tokenization import EncodedPair
from raco_fast.dpo.losses.margin_losses import Sigmoid
from raco_fast.dpo.run.reference_cache import compute_reference
from raco_fast.dpo.run.step import PreferenceStep
from raco_fast.dpo.scoring import ReferenceLogps
from raco_fast.engine.prepare import prepare
from raco_fast.optim.clipped_cagrad_adamw import ClippedCAGradAdamW
from raco_fast.solver.registry import RuleLike, check_rule, label_of

Weights: TypeAlias = "Mapping[str, float] | None"
"""Objective -> weight; None for a model that was aligned without weights, or not at all."""
Steps: TypeAlias = list[dict[str, float]]
"""Metrics of each training step, under the names of docs/metrics.md."""


@dataclass(frozen=True)
class Judged:
    """A model of one seed, trained and judged.

    Args:
        seed: the seed.
        rule: by which it was aligned; "start" for the warmed-up model that the others begin as.
        gram: "batch" or "unbiased"; None for the start.
        weights: None for the start, and for a rule that ignores weights.
        scores: objective -> mean judged score of the summaries it writes.
        steps: of the warm-up, with the loss per summary token in nats, or of the alignment.
    """

    seed: int
    rule: str
    gram: str | None
    weights: Weights
    scores: dict[str, float]
    steps: Steps


@dataclass(frozen=True)
class WarmStart:
    """What the alignments of one seed begin with.

    Args:
        judged: the warmed-up model's scores.
        state: its parameters by name, as arrays: tensors would travel by shared memory.
        reference: its log-probabilities of the summaries of every preference pair.
    """

    judged: Judged
    state: dict[str, npt.NDArray[Any]]
    reference: ReferenceLogps


@contextmanager
def _one_thread() -> Iterator[None]:
    """Fix torch at one thread: sums then have one order whatever the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def warm_up_job(config: DemoConfig, seed: int) -> WarmStart:
    """Teach the model of one seed to summarise, judge it, and score the preference pairs."""
    of_seed = _Seed(config, seed)
    model = of_seed.build_model()
    batches = of_seed.batches("warm-up", config.warm_up_steps, config.warm_up_batch_size)
    losses = enumerate(warm_up(model, batches, config.warm_up_lr), start=1)
    steps = [{"step": step, "loss": loss} for step, loss in losses]
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    judged = of_seed.judged(model, "start", None, None, steps)
    return WarmStart(judged, state, of_seed.reference(model))


@_one_thread()
def with_pairs_of(config: DemoConfig, start: WarmStart) -> WarmStart:
    """The same warmed-up model for a config with other pairs: it scores those.

    Args:
        config: differs from that of `start` in nothing that the warm-up sees.
    """
    of_seed = _Seed(config, start.judged.seed)
    return replace(start, reference=of_seed.reference(of_seed.model_of(start)))


@_one_thread()
def align_job(
    config: DemoConfig, start: WarmStart, rule: RuleLike, gram: str, weights: Weights
) -> Judged:
    """Align the warmed-up model of a seed by one rule and judge what it writes then.

    Every rule sees the same pairs in the same order. `weights` is None for a rule that ignores
    them; the optimizer is then given equal ones.
    """
    of_seed = _Seed(config, start.judged.seed)
    model = of_seed.model_of(start)
    optimizer = ClippedCAGradAdamW(
        model.parameters(),
        lr=config.lr,
        weight_decay=0.0,
        weights=weights or dict.fromkeys(config.names, 1 / config.objectives),
        c=config.c,
        rule=rule,
        max_grad_norm=1.0,
        gram=gram,
    )
    rise = max(1, config.steps // 10)
    schedule = LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / rise))
    losses = dict.fromkeys(config.names, Sigmoid(beta=config.beta))
    references = {1.0: start.reference}
    layout = of_seed.layout(config.batch_size)
    learn = PreferenceStep(model, optimizer, references, losses, layout)
    steps = []
    with prepare(model, strict=True):
        for number, pairs in enumerate(of_seed.preferences(), start=1):
            lr = float(schedule.get_last_lr()[0])
            steps.append({"step": number, "learning_rate": lr, **learn(pairs).metrics()})
            schedule.step()
    return of_seed.judged(model, label_of(check_rule(rule)), gram, weights, steps)


class _Seed:
    """Model, data and judging of one seed."""

    def __init__(self, config: DemoConfig, seed: int) -> None:
        self.config, self.seed, self.tokenizer = config, seed, build_tokenizer()

    def build_model(self) -> LlamaForCausalLM:
        """A fresh model."""
        return build_model(self.tokenizer, self.config.hidden_size, self.config.layers, self.seed)

    def model_of(self, start: WarmStart) -> LlamaForCausalLM:
        """The warmed-up model."""
        model = self.build_model()
        model.load_state_dict({name: torch.tensor(value) for name, value in start.state.items()})
        return model

    def reference(self, model: LlamaForCausalLM) -> ReferenceLogps:
        """The log-probabilities of all preference pairs under `model`."""
        pairs = [pair for batch in self.preferences() for pair in batch]
        return compute_reference(model, pairs, self.layout(self.config.batch_size))[1.0]

    def layout(self, pairs: int) -> Layout:
        """Padded: for so small a model the mask of a packed row is more work than the padding."""
        return Layout("padded", pairs, math.inf, PAD)

    def batches(self, purpose: str, steps: int, size: int) -> list[list[EncodedPair]]:
        """Fresh pairs for every step.

        Those of eight steps are sorted by length before they are cut: there is half the padding.
        """
        rng = self._rng(purpose)
        drawn = labelled(draw_pairs(steps * size, rng), self.config, self._rng("labels"))
        pairs = encode(self.tokenizer, drawn)
        batches = []
        for start in range(0, len(pairs), 8 * size):
            some = pairs[start : start + 8 * size]
            of_like_length = [group for (group,) in self.layout(size).rounds(some)]
            rng.shuffle(of_like_length)
            batches += of_like_length
        return batches

    def preferences(self) -> list[list[EncodedPair]]:
        """The batches of the alignment."""
        return self.batches("pairs", self.config.steps, self.config.batch_size)

    def judged(
        self,
        model: LlamaForCausalLM,
        rule: str,
        gram: str | None,
        weights: Weights,
        steps: Steps,
    ) -> Judged:
        """Let every judge score one sampled summary of every held-out document."""
        rng = self._rng("held-out")
        documents = [make_document(rng) for _ in range(self.config.documents)]
        texts = write_summaries(model, self.tokenizer, documents, self.seed)
        judged = [judge(document, text) for document, text in zip(documents, texts, strict=True)]
        scores = {
            name: statistics.fmean(each[name] for each in judged) for name in self.config.names
        }
        return Judged(self.seed, rule, gram, weights, scores, steps)

    def _rng(self, purpose: str) -> random.Random:
        """Independent random numbers for each use of the seed."""
        return random.Random(f"raco-fast demo {purpose} {self.seed}")
