"""`soup`: LoRA adapters of several runs as one, whose update is the weighted mean of theirs.

    Σ_k w_k s_k B_k A_k = [w_1 s_1 B_1 … w_K s_K B_K] [A_1; …; A_K]      s = alpha / r, or / √r

so the mean is exact at the sum of the ranks, where the mean of the A_k times that of the B_k is
another matrix. The result is a plain adapter of scale 1; only the product w_k s_k B_k is rounded.
Source: Rewarded soups, arXiv 2306.04488, whose interpolated weights these are.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raco_fast.dpo.load_errors import LoadErrors
from raco_fast.solver.weights import check_weights

if TYPE_CHECKING:
    from peft import LoraConfig

_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?")
_MODULE = re.compile(r"^base_model\.model\.")
# What may be otherwise from adapter to adapter: it changes the update alone, or nothing of it.
_OWN = {"r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"}
_OWN |= {"init_lora_weights", "inference_mode", "auto_mapping", "peft_version"}
_PLACES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_SHARED = ("base_model_name_or_path", "revision", "task_type", "fan_in_fan_out")
_ON_THE_BASE = (True, False, "gaussian", "eva")
"""Values of init_lora_weights that leave the base as it is."""


def soup(adapters: Mapping[str | Path, float], folder: str | Path) -> Path:
    """Write an adapter whose update is the weighted mean of the updates of others.

    Args:
        adapters: folder that PEFT has saved -> its weight; at least 0, summing to 1. LoRA on the
            same base, of any ranks, scales (rsLoRA too) and modules. A weight of 0 leaves it out.
        folder: where the new adapter goes: new, or empty. Its rank is the sum of the ranks, its
            scale 1; weights are float32, or float64 where any are.
    Returns:
        `folder`, which `PeftModel.from_pretrained` loads, and `model.name` of a config.
    Raises:
        ValueError: wrong weights; an adapter that is damaged, of another base, or more than LoRA's
            products (DoRA, biases, whole modules, ...), which cannot be put side by side;
            `folder` holds something.
    """
    names, weights = check_weights({str(path): weight for path, weight in adapters.items()})
    into = Path(folder)
    if into.is_dir() and any(into.iterdir()):
        raise ValueError(f"`folder` must be new or empty, got {str(into)!r}; choose another one")
    parts = [_Part(name, w) for name, w in zip(names, weights, strict=True) if w > 0.0]
    first = parts[0].config
    for part in parts[1:]:
        for name in _SHARED:
            a, b = getattr(first, name), getattr(part.config, name)
            if a != b:
                raise ValueError(
                    f"`adapters` must have the same {name}, got {a!r} in {parts[0].folder!r} and "
                    f"{b!r} in {part.folder!r}; train them on one base"
                )
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for module in sorted({module for part in parts for module in part.keys}):
        found = [part for part in parts if module in part.keys]
        a_key, b_key = found[0].keys[module]
        tensors[a_key] = torch.cat([part.tensors[part.keys[module][0]] for part in found], 0)
        tensors[b_key] = torch.cat([part.scaled_b(module) for part in found], 1)
        ranks[_MODULE.sub("", module)] = tensors[a_key].shape[0]
    from safetensors.torch import save_file

    wide = torch.float64 if torch.float64 in {t.dtype for t in tensors.values()} else torch.float32
    _config(parts, ranks).save_pretrained(str(into))
    contiguous = {key: t.to(wide).contiguous() for key, t in tensors.items()}
    save_file(contiguous, into / "adapter_model.safetensors", metadata={"format": "pt"})
    return into


class _Part:
    """One of the adapters: its config, its tensors, and the keys of each module's A and B."""

    def __init__(self, folder: str, weight: float) -> None:
        from peft import LoraConfig, PeftConfig
        from peft.utils.save_and_load import load_peft_weights

        self.folder, self._weight = folder, weight
        if not Path(folder, "adapter_config.json").is_file():
            raise ValueError(
                f"`adapters`: {folder!r} has no adapter_config.json; name folders that PEFT's "
                f"save_pretrained has written"
            )
        with LoadErrors("adapters", folder, "use a whole adapter folder, as PEFT writes it"):
            config = PeftConfig.from_pretrained(folder)
            self.tensors: dict[str, Tensor] = load_peft_weights(folder, device="cpu")
        if not isinstance(config, LoraConfig):
            raise ValueError(
                f"`adapters` must be of LoRA, got {config.peft_type.value} in {folder!r}; other "
                f"kinds cannot be put side by side"
            )
        self.config = config
        _check_plain(config, folder)
        sides: dict[str, dict[str, str]] = {}
        for key in self.tensors:
            if (found := _KEY.fullmatch(key)) is None:
                raise ValueError(
                    f"`adapters`: {folder!r} has {key!r}, which is no part of a product of LoRA; "
                    f"leave out what trains whole modules"
                )
            sides.setdefault(found["module"], {})[found["side"]] = key
        if odd := [module for module, of in sides.items() if of.keys() != {"A", "B"}]:
            raise ValueError(
                f"`adapters`: {folder!r} must have an A and a B for each module, got one of them "
                f"for {odd[0]!r}; use a whole adapter folder"
            )
        self.keys = {module: (of["A"], of["B"]) for module, of in sides.items()}

    def scaled_b(self, module: str) -> Tensor:
        """w s B of a module, at least in float32."""
        from peft.utils.other import get_pattern_key

        config, name = self.config, _MODULE.sub("", module)
        B = self.tensors[self.keys[module][1]]
        rank = B.shape[1]
        key = get_pattern_key(config.alpha_pattern.keys(), name)
        alpha = config.alpha_pattern.get(key, config.lora_alpha)
        scale = alpha / (rank**0.5 if config.use_rslora else rank)
        scaled: Tensor = B.double() * (self._weight * scale)
        return scaled.to(torch.promote_types(B.dtype, torch.float32))


def _check_plain(config: LoraConfig, folder: str) -> None:
    """Raise ValueError where an adapter is more than the products B A."""
    if config.init_lora_weights not in _ON_THE_BASE:
        raise ValueError(
            f"`adapters`: {folder!r} was begun with "
            f"init_lora_weights={config.init_lora_weights!r}, which changes the base; save it with "
            f"PEFT's path_initial_model_for_weight_conversion"
        )
    from peft import LoraConfig

    plain = LoraConfig()
    known = {*_OWN, *_PLACES, *_SHARED, "loftq_config", "eva_config"}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in known and value != getattr(plain, field.name):
            raise ValueError(
                f"`adapters`: {folder!r} has {field.name}={value!r}, which is more than LoRA's "
                f"products and cannot be put side by side; only plain LoRA and rsLoRA can"
            )


def _config(parts: list[_Part], ranks: Mapping[str, int]) -> LoraConfig:
    """Of the soup: scale 1 everywhere, and the places of the parts, or else their union by name."""
    from peft import LoraConfig

    first = parts[0].config
    places = [[getattr(part.config, name) for name in _PLACES] for part in parts]
    alike = all(p == places[0] for p in places)
    alike &= all(part.keys.keys() == parts[0].keys.keys() for part in parts)
    where = dict(zip(_PLACES, places[0], strict=True)) if alike else {"target_modules": [*ranks]}
    usual = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    dropouts = {part.config.lora_dropout for part in parts}
    return LoraConfig(
        r=usual,
        lora_alpha=usual,
        rank_pattern=others,
        alpha_pattern=dict(others),
        lora_dropout=dropouts.pop() if len(dropouts) == 1 else 0.0,
        inference_mode=True,
        **where,
        **{name: getattr(first, name) for name in _SHARED},
    )
