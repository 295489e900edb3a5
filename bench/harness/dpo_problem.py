"""What DPO steps and trainers are measured on: one model, one batch, m losses, for every rival.

The model has the shape of a real one and random weights, the batch random tokens: time and memory
depend on neither. The two responses of a pair share their prompt and end in the last token of the
vocabulary, as text does that ends in a stop token, so that a trainer which tokenizes text can be
given the very same ids. All pairs have full length: nobody pads, nobody saves by not padding.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import raco_fast
from raco_fast.dpo.logps import sequence_logps

SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 36,
        "intermediate_size": 40,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 90,
        "tie_word_embeddings": True,
    },
}
"""Name -> arguments of LlamaConfig, all but the number of layers."""

PROMPT = 8  # tokens of every sequence that are not scored
BETA = 0.1
MAX_OBJECTIVES = 32


@dataclass(frozen=True)
class Setting:
    """`kind` is "full" or "lora", `shape` a key of `SHAPES`, `dtype` the name of torch's."""

    kind: str = "full"
    shape: str = "SmolLM2-135M"
    layers: int = 30
    sequences: int = 8
    tokens: int = 64
    dtype: str = "float32"
    device: str = "cpu"

    def params(self, m: int) -> dict[str, Any]:
        """As it stands in the records: their machine says which device, and the shape is the usual
        one where it is not named.
        """
        implied = {"device", "shape"} if self.shape == Setting.shape else {"device"}
        return {"m": m, **{k: v for k, v in asdict(self).items() if k not in implied}}

    def options(self) -> list[str]:
        """The same as options of a command."""
        return [word for k, v in asdict(self).items() for word in (f"--{k}", str(v))]


class Problem:
    """A model, a batch of pairs (responses a, then b) and m losses, in the midst of training.

    The reference's scores are zero, so that margins differ from pair to pair, as they do after the
    first step. The head takes all its rows at once.
    """

    def __init__(self, setting: Setting, prepared: bool = False) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        device, dtype = torch.device(setting.device), getattr(torch, setting.dtype)
        config = LlamaConfig(**SHAPES[setting.shape], num_hidden_layers=setting.layers)
        self.model: nn.Module = LlamaForCausalLM(config).to(device, dtype)
        if setting.kind == "lora":
            self.model = _with_adapter(self.model)
        if prepared:
            raco_fast.prepare(self.model, strict=True, check_every=None)  # a suite has few steps
        self.setting = setting
        self.stop = config.vocab_size - 1
        pairs = setting.sequences // 2
        ids = torch.randint(0, self.stop, (setting.sequences, setting.tokens))
        ids[pairs:, :PROMPT] = ids[:pairs, :PROMPT]
        ids[:, -1] = self.stop
        self.ids = ids.to(device)
        self.mask = torch.ones_like(self.ids)
        self.scored = torch.ones_like(ids)
        self.scored[:, :PROMPT] = 0
        # Objective 0 prefers a everywhere, objective 1 on every other pair; further ones anything.
        self.labels = torch.randint(0, 2, (MAX_OBJECTIVES, pairs)) * 2.0 - 1
        self.labels[0] = 1
        self.labels[1] = (-1.0) ** torch.arange(pairs)
        self.reference = torch.zeros(setting.sequences, device=device)
        self.chunk_tokens = ids.numel()

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def params(self) -> list[nn.Parameter]:
        """The parameters that learn."""
        return list(self.trained.values())

    def scores(self) -> Tensor:
        """Summed log-probabilities, float32 [B], with their graph."""
        return sequence_logps(self.model, self.ids, self.mask, self.scored, self.chunk_tokens)

    def losses(self, scores: Tensor, m: int) -> list[Tensor]:
        """DPO's loss of the first m objectives."""
        a, b = (scores - self.reference).chunk(2)
        labels = self.labels[:m].to(scores)
        return list(-torch.nn.functional.logsigmoid(BETA * labels * (a - b)).mean(1))

    def clear(self) -> None:
        """Drop every gradient."""
        for p in self.params:
            p.grad = None


class FreshProblem(Problem):
    """The same where a run begins: a fresh adapter, and the reference is what is trained.

    The head takes the default number of rows.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        for name, p in self.trained.items():
            if "lora_B" in name:
                nn.init.zeros_(p)
        self.chunk_tokens = 256
        with torch.no_grad():
            self.reference = self.scores()

    @torch.no_grad()
    def loss(self) -> float:
        """Of objective 0, which is what plain DPO trains on."""
        return float(self.losses(self.scores(), 1)[0])


def lora() -> Any:
    """The adapter's `peft.LoraConfig`."""
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")


def _with_adapter(model: nn.Module) -> nn.Module:
    from peft import get_peft_model

    adapted: nn.Module = get_peft_model(model, lora())
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.01)  # zeros would leave A without a gradient
    return adapted
