"""What whole training steps of DPO are measured on: one model, one batch, known to every rival.

The model has random weights and the shape of a real one, the batch random tokens: time and memory
depend on neither. The two responses of a pair share their prompt and end in the last token of the
vocabulary, as text does that ends in a stop token, so that a trainer which tokenizes text can be
given the very same ids. All pairs have full length: nobody pads, nobody saves by not padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.dpo_steps import BETA, PROMPT, SHAPE
from raco_fast.dpo.logps import sequence_logps
from raco_fast.dpo.scoring import adapter_off

MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {**SHAPE, "num_hidden_layers": 30},
    "SmolLM2-135M, 4 layers": {**SHAPE, "num_hidden_layers": 4},
    "tiny": {
        "hidden_size": 36,
        "intermediate_size": 40,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 90,
        "tie_word_embeddings": True,
        "num_hidden_layers": 1,
    },
}
"""Name -> arguments of LlamaConfig."""

LR = 1e-5
"""Constant and without weight decay, for everyone."""


@dataclass(frozen=True)
class Task:
    """What is trained: `kind` is "lora" or "full", m the number of objectives."""

    kind: str
    m: int
    model: str
    dtype: str
    sequences: int
    tokens: int

    @property
    def tokens_per_step(self) -> int:
        """Tokens that the model reads in a step."""
        return self.sequences * self.tokens


class Problem:
    """A model, a batch of pairs (responses a, then b), the reference's scores and m losses."""

    def __init__(self, task: Task, device: torch.device) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(**MODELS[task.model])
        self.model: nn.Module = LlamaForCausalLM(config).to(device, getattr(torch, task.dtype))
        if task.kind == "lora":
            from peft import get_peft_model

            self.model = get_peft_model(self.model, lora())
        self.task = task
        self.stop = config.vocab_size - 1
        pairs = task.sequences // 2
        ids = torch.randint(0, self.stop, (task.sequences, task.tokens))
        ids[pairs:, :PROMPT] = ids[:pairs, :PROMPT]
        ids[:, -1] = self.stop
        self.ids = ids.to(device)
        self.mask = torch.ones_like(self.ids)
        self.scored = torch.ones_like(ids)
        self.scored[:, :PROMPT] = 0
        # Objective 0 prefers a everywhere, objective 1 on every other pair; further ones anything.
        self.labels = torch.randint(0, 2, (max(2, task.m), pairs)) * 2.0 - 1
        self.labels[0] = 1
        self.labels[1] = (-1.0) ** torch.arange(pairs)
        with torch.no_grad(), adapter_off(self.model):
            self.reference = self.scores()

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def scores(self) -> Tensor:
        """Summed log-probabilities, float32 [B], with their graph."""
        return sequence_logps(self.model, self.ids, self.mask, self.scored)

    def losses(self, scores: Tensor, m: int) -> list[Tensor]:
        """DPO's loss of the first m objectives."""
        a, b = (scores - self.reference).chunk(2)
        labels = self.labels[:m].to(scores)
        return list(-torch.nn.functional.logsigmoid(BETA * labels * (a - b)).mean(1))

    @torch.no_grad()
    def loss(self) -> float:
        """Of objective 0, which is what plain DPO trains on."""
        return float(self.losses(self.scores(), 1)[0])


def lora() -> Any:
    """The adapter's `peft.LoraConfig`."""
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
