"""Saving the trained model with a card that says what it was trained on and what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from raco_fast.dpo.config import TrainConfig
from raco_fast.dpo.files import atomic_folder
from raco_fast.statistics import wilson_interval

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def save_trained_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, metrics: Path
) -> Path:
    """Write `output_dir/model`: weights (the adapter with LoRA), tokenizer and model card.

    Args:
        model: the trained policy.
        tokenizer: saved beside it.
        config: the run.
        metrics: its metrics.jsonl; the card quotes its first and last evaluation.
    Returns:
        The folder, loadable with `from_pretrained`.
    """
    folder = config.folder / "model"
    with atomic_folder(folder) as partial:
        model.save_pretrained(partial)  # type: ignore[operator]
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(model_card(config, metrics), encoding="utf-8")
    return folder


def model_card(config: TrainConfig, metrics: Path) -> str:
    """The card in the hub's format: a YAML header, then Markdown."""
    from huggingface_hub import ModelCardData

    header = ModelCardData(
        library_name="peft" if config.model.lora else "transformers",
        base_model=config.model.name,
        tags=["raco-fast", "dpo", "multi-objective", "preference-alignment"],
    )
    return f"---\n{header.to_yaml()}\n---\n\n{_body(config, metrics)}"


def _body(config: TrainConfig, metrics: Path) -> str:
    how = "LoRA adapter" if config.model.lora else "full fine-tuning"
    evaluations = read_evaluations(metrics)
    parts = [
        f"# {Path(config.model.name).stem} aligned with raco-fast",
        f"`{config.model.name}` trained by multi-objective DPO ({how}) on preference pairs. "
        f"Gradients of the objectives were combined by `{config.rule}`"
        + (f" with c = {config.c}" if config.rule.startswith("cagrad") else "")
        + " (RACO, arXiv:2602.02495).",
        "## Objectives\n\n" + _table(["objective", "weight"], _rows(config.weights)),
        "## Data\n\n" + "\n".join(f"- train: `{s.path}`" for s in config.data),
    ]
    if config.eval_data:
        parts[-1] += "".join(f"\n- held out: `{s.path}`" for s in config.eval_data)
    parts.append(
        f"## Training\n\nloss `{config.loss}`, beta {config.loss_options.beta}, "
        f"{evaluations[-1]['step'] if evaluations else 'all'} steps of up to "
        f"{config.pairs_per_step} pairs, peak learning rate {config.lr}, "
        f"weights in {config.model.dtype}, seed {config.seed}."
    )
    if evaluations:
        parts.append("## Results on the held-out pairs\n\n" + result_table(config, evaluations))
    return "\n\n".join(parts) + "\n"


def read_evaluations(metrics: Path) -> list[dict[str, Any]]:
    """Records of metrics.jsonl that hold an evaluation, in order."""
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    records = (json.loads(line) for line in lines)
    return [r for r in records if any(name.startswith("eval_") for name in r)]


def result_table(config: TrainConfig, evaluations: list[dict[str, Any]]) -> str:
    """Accuracies per objective, before and after, with the pairs and a 95 % Wilson interval.

    `likelihood` ranks the responses by log-probability, which the untrained model can do too;
    `reward` ranks them by the implicit reward, which is all zeros (50 %) before training.
    """
    first, last = evaluations[0], evaluations[-1]
    rows = []
    for name in config.objectives:
        pairs = int(last.get(f"eval_pairs/{name}", 0))
        if pairs:
            before = first[f"eval_logps/accuracies/{name}"]
            after = last[f"eval_logps/accuracies/{name}"]
            reward = last[f"eval_rewards/accuracies/{name}"]
            cells = [_share(value, pairs) for value in (before, after, reward)]
            rows.append([name, str(pairs), *cells, f"{last[f'eval_rewards/margins/{name}']:.3f}"])
    titles = ["objective", "pairs", "likelihood, before", "likelihood, after"]
    return _table([*titles, "reward, after", "reward margin, after"], rows)


def _share(value: float, pairs: int) -> str:
    low, high = wilson_interval(value, pairs)
    return f"{value:.1%} ({low:.1%} to {high:.1%})"


def _rows(values: dict[str, float]) -> list[list[str]]:
    return [[name, f"{value:g}"] for name, value in values.items()]


def _table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
