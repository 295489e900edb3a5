"""What a run is given as objects in memory, in place of what its config would name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from raco_fast.dpo.loaded_policy import adapter_on, checked_base, loaded_policy
from raco_fast.dpo.loading import to_device
from raco_fast.dpo.models import ModelOptions, pick_device
from raco_fast.dpo.policy import KeepBase, Policy, load_base_model, load_tokenizer, make_policy
from raco_fast.dpo.saved_adapters import SavedAdapter, find_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from raco_fast.dpo.data.memory_rows import Rows
    from raco_fast.dpo.loaded_policy import LoadedModel


@dataclass(frozen=True)
class Given:
    """The objects of a run; what is not here is loaded as the config says.

    Args:
        model: a causal LM, or one with an adapter of PEFT; it is trained in place.
        tokenizer: with its padding token.
        rows: path -> rows, of the sources of the config that are in memory.
    """

    model: LoadedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    rows: Mapping[str, Rows] = field(default_factory=dict)

    def tokenizer_of(self, options: ModelOptions) -> PreTrainedTokenizerBase:
        """The tokenizer; ValueError as `load_tokenizer`."""
        return load_tokenizer(options) if self.tokenizer is None else self.tokenizer

    def adapter_of(self, options: ModelOptions) -> SavedAdapter | None:
        """The adapter that the model is; ValueError as `find_adapter` and `adapter_on`."""
        return find_adapter(options) if self.model is None else adapter_on(self.model, options)

    def base_of(self, options: ModelOptions, device: torch.device | None) -> PreTrainedModel:
        """The causal LM on its device, or on `device`, before an adapter is added.

        Raises:
            ValueError: as `load_base_model` and `checked_base`.
        """
        if self.model is None:
            return load_base_model(options, device)
        base = checked_base(self.model, options)
        to_device(base, device or pick_device(options.device))
        return base

    def policy_of(
        self, base: PreTrainedModel, options: ModelOptions, keep_base: KeepBase | None
    ) -> Policy:
        """What is trained, on the base that `base_of` gave; ValueError as `make_policy`."""
        if self.model is None:
            return make_policy(base, options, keep_base)
        return loaded_policy(self.model, options, keep_base)


NOTHING = Given()
"""Of a run that loads all that its config names."""
