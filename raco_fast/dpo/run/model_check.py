"""What a run's model will take, from its config alone: no weights are read."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from raco_fast.dpo.models import DTYPES, pick_device, trainable
from raco_fast.dpo.policy import add_adapter, load_config, trains_adapter
from raco_fast.dpo.run.config import TrainConfig
from raco_fast.dpo.saved_adapters import find_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MEASURED_SECONDS = 0.3


@dataclass(frozen=True)
class ModelCheck:
    """Sizes of a run's model.

    Attributes:
        parameters: of the base and a fresh adapter.
        trained: of them; of a continued adapter, its own.
        matrices: parameters that every token is multiplied with, the head's among them.
        bytes_of_weights: all weights, in `model.dtype` (bf16 where it is auto, which takes less).
        bytes_of_training: one gradient an objective, AdamW's two averages, and the float32 weights
            of a reference that moves.
        moves: whether the reference does, and so is scored in every epoch.
    """

    parameters: int
    trained: int
    matrices: int
    bytes_of_weights: int
    bytes_of_training: int
    moves: bool = False

    def operations(self, tokens: int, epochs: float) -> float:
        """Multiplications and additions of a run's matrix products; attention's are left out.

        Forward, back to the activations and, where all is trained, to the weights; and the
        reference's pass over the training pairs.

        Args:
            tokens: of the training pairs' sequences.
            epochs: passes over them.
        """
        passes = 3 if self.trained >= self.matrices else 2
        return 2.0 * self.matrices * tokens * (passes * epochs + (epochs if self.moves else 1))


def outline(config: TrainConfig) -> PreTrainedModel:
    """The base of a run without its weights, on the device "meta".

    Raises:
        ValueError: there is no such model, or it is no causal LM.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(load_config(config.model))
    return model


def measured(model: PreTrainedModel, config: TrainConfig) -> ModelCheck:
    """Sizes of the model that `outline` has made; a fresh adapter is added to it."""
    options, found = config.model, find_adapter(config.model)
    ends = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is ends
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    matrices -= 0 if tied else ends.numel()
    trained = sum(p.numel() for p in model.parameters())
    if trains_adapter(options, found):
        if found is not None and options.adapter == "continue":
            from peft.utils.save_and_load import load_peft_weights

            tensors = load_peft_weights(found.source, device="cpu")
            trained = sum(tensor.numel() for tensor in tensors.values())
        else:
            with torch.device("meta"):
                adapted: Any = add_adapter(model, options.lora, None)
            trained = sum(p.numel() for p in trainable(adapted).values())
    size = DTYPES.get(options.dtype, torch.bfloat16).itemsize
    parameters = sum(p.numel() for p in model.parameters())
    moves = config.reference is not None
    return ModelCheck(
        parameters,
        trained,
        matrices,
        parameters * size,
        trained * (size * (len(config.weights) + 2) + (4 if moves else 0)),
        moves,
    )


def fastest_products(config: TrainConfig) -> float:
    """Operations a second of large matrix products on the run's device, measured now."""
    device = pick_device(config.model.device)
    dtype = DTYPES.get(config.model.dtype, torch.bfloat16)
    size = 4096 if device.type == "cuda" else 512
    a = torch.ones(size, size, device=device, dtype=dtype)
    best, until = 0.0, time.perf_counter() + _MEASURED_SECONDS
    while time.perf_counter() < until:
        began = time.perf_counter()
        (a @ a)[0, 0].item()
        best = max(best, 2.0 * size**3 / (time.perf_counter() - began))
    return best
