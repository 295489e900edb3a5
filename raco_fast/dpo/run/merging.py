"""An adapter and its base as one model, for programs that read no adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from raco_fast.dpo.models import ModelOptions
from raco_fast.dpo.policy import load_base_model, load_tokenizer, make_policy
from raco_fast.dpo.run.files import atomic_folder
from raco_fast.settings.paths import expanded


def merge(
    adapter: str | Path,
    folder: str | Path,
    *,
    dtype: Literal["fp32", "bf16"] = "fp32",
    base: str | None = None,
) -> Path:
    """Add an adapter to its base's weights and save the model with its tokenizer.

    What the merged model computes is compared with what the two compute before it is saved.

    Args:
        adapter: folder or hub name of an adapter that PEFT has saved, or the `output_dir` of a run
            that has trained one.
        folder: new, or empty.
        dtype: of the saved weights; sums are rounded to it once.
        base: the model below the adapter, where that is not what its adapter_config.json names.
    Returns:
        `folder`.
    Raises:
        ValueError: `adapter` is a whole model, `folder` holds something, or the adapter cannot be
            merged: it adapts tied weights, or merging changes what it computes by more than
            rounding.
        OSError: the model could not be written.
    """
    into = expanded(str(folder), "folder")
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise ValueError(f"`folder` must be new or empty, got {into}; choose another one")
    name = _of_run(str(adapter))
    options = ModelOptions(name, adapter="merge", dtype=dtype, base=base, device="cpu")
    model: Any = make_policy(load_base_model(options), options).model
    if into.is_dir():
        into.rmdir()
    with atomic_folder(into) as partial:
        model.save_pretrained(partial)
        load_tokenizer(options).save_pretrained(partial)
    return into


def _of_run(name: str) -> str:
    """The trained model of a run's folder; any other name as it is."""
    path = Path(name).expanduser()
    own = (path / "adapter_config.json").exists() or (path / "config.json").exists()
    return str(path / "model") if not own and (path / "model").is_dir() else name
