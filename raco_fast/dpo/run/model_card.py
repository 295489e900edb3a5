"""Saving the trained model with a card that says what it was trained on and what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from raco_fast.dpo.data.saved_template import saved_template
from raco_fast.dpo.losses.preference_loss import PreferenceLoss
from raco_fast.dpo.losses.registry import described
from raco_fast.dpo.models import ModelOptions
from raco_fast.dpo.policy import base_is_nowhere, trains_adapter
from raco_fast.dpo.run.config import TrainConfig
from raco_fast.dpo.run.files import atomic_folder
from raco_fast.dpo.saved_adapters import SavedAdapter
from raco_fast.report import markdown_table, share_with_interval
from raco_fast.settings.paths import expanded
from raco_fast.solver.registry import check_rule, label_of
from raco_fast.solver.rules.conflict_averse import CAGrad, CAGradClip
from raco_fast.solver.rules.cr_mogm import CRMOGM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainingSummary:
    """What a model card tells of a finished run.

    Args:
        steps: optimizer steps, skipped ones included.
        skipped_steps: those with a gradient that was not finite.
        skipped_at_the_end: those of them after which no step was taken.
        labelled: objective name -> those of the training `pairs` that are labelled for it.
        found: the adapter that `model.name` is, if it is one.
        evaluations: records of metrics.jsonl with `eval_` metrics, in order; may be empty.
    """

    config: TrainConfig
    steps: int
    skipped_steps: int
    pairs: int
    labelled: Mapping[str, int]
    evaluations: Sequence[Mapping[str, Any]]
    skipped_at_the_end: int = 0
    found: SavedAdapter | None = None


def save_trained_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    summary: TrainingSummary,
    weights: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `output_dir/model`: weights (the adapter with LoRA), tokenizer and model card.

    Args:
        weights: of a model that does not have them whole.
    Returns:
        The folder, loadable with `from_pretrained`.
    Raises:
        OSError: it could not be written whole; what was there before is untouched.
    """
    folder = summary.config.folder / "model"
    with atomic_folder(folder) as partial:
        # An adapter that is the reference stays where it was.
        only = {"selected_adapters": ["default"]} if hasattr(model, "peft_config") else {}
        model.save_pretrained(partial, state_dict=weights, **only)  # type: ignore[operator]
        tokenizer.chat_template = saved_template(tokenizer, summary.config.tokens)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(model_card(summary), encoding="utf-8")
    return folder


def model_card(summary: TrainingSummary) -> str:
    """The card in the hub's format: a YAML header, then Markdown."""
    from huggingface_hub import ModelCardData

    model, found = summary.config.model, summary.found
    base = model.name if found is None else found.base
    on_this_machine = expanded(base, "model.name").exists()
    header = ModelCardData(
        library_name="peft" if trains_adapter(model, found) else "transformers",
        base_model=None if on_this_machine else base,  # the hub takes hub names only
        tags=["raco-fast", "dpo", "multi-objective", "preference-alignment"],
    )
    return f"---\n{header.to_yaml()}\n---\n\n{_body(summary)}"


def _body(summary: TrainingSummary) -> str:
    config = summary.config
    objectives = [
        [name, f"{config.weights[name]:g}", str(summary.labelled[name]), _loss_text(loss)]
        for name, loss in config.objective_losses.items()
    ]
    files = []
    for use, sources in (("train", config.data), ("held out", config.eval_data)):
        for source in sources:
            part = "all" if source.limit is None else f"the first {source.limit}"
            files.append(f"- {use}: `{source.described}` ({part} usable pairs)")
    skipped = f", {summary.skipped_steps} of them skipped" if summary.skipped_steps else ""
    if summary.skipped_at_the_end:
        skipped += (
            f" (a loss or gradient was not finite), also the last {summary.skipped_at_the_end},"
        )
    rule = check_rule(config.rule)
    averaged = rule.of if isinstance(rule, CRMOGM) else rule
    papers = isinstance(rule, CAGradClip) and rule.clip == "after"
    paper = " (RACO, arXiv:2602.02495)" if papers else ""
    parts = [
        f"# {Path(config.model.name).stem} aligned with raco-fast",
        f"`{config.model.name}` trained by multi-objective DPO "
        f"({_how(config.model, summary.found)}) on preference pairs. "
        f"Gradients of the objectives were combined by `{label_of(rule)}`"
        + (f" with c = {config.c}" if isinstance(averaged, CAGrad | CAGradClip) else "")
        + f"{paper}."
        + _schedules(config)
        + _reference(config),
        "## Objectives\n\n"
        + markdown_table(["objective", "weight", "labelled pairs", "loss"], objectives),
        f"## Data\n\n{summary.pairs} training pairs.\n\n" + "\n".join(files),
        f"## Training\n\n{summary.steps} steps{skipped} of up to {config.pairs_per_step} pairs, "
        f"peak learning rate {config.lr}, weights in {config.model.dtype}, seed {config.seed}.",
    ]
    if summary.evaluations:
        table = result_table(config, summary.evaluations)
        parts.append("## Results on the held-out pairs\n\n" + table)
    return "\n\n".join(parts) + "\n"


def _schedules(config: TrainConfig) -> str:
    """A sentence on what changed from step to step; nothing where nothing did."""
    both = {"c": config.c_schedule, "the weights": config.weights_schedule}
    told = [f"{name} by `{json.dumps(given)}`" for name, given in both.items() if given is not None]
    return f" From step to step changed {' and '.join(told)}." if told else ""


def _reference(config: TrainConfig) -> str:
    """A sentence on a reference that moved; nothing of one that did not."""
    if (moves := config.reference) is None:
        return ""
    times = "step" if moves.sync_steps == 1 else f"{moves.sync_steps} steps"
    return (
        f" Every {times} the reference became {moves.mixup_alpha:g} of the policy and "
        f"{1 - moves.mixup_alpha:g} of itself (TR-DPO, arXiv:2404.09656)."
    )


def _how(model: ModelOptions, found: SavedAdapter | None) -> str:
    """What was trained, from where, and against which reference."""
    what = "LoRA adapter" if model.lora else "full fine-tuning"
    if found is not None:
        of_base = f"adapter on `{found.base}`"
        what = {
            "continue": f"{found.kind} {of_base}, trained on; reference: {model.reference}",
            "merge": f"{what}, after the {of_base} was merged into it",
            "reference": f"{what} on `{found.base}`; reference: the {of_base}",
        }[model.adapter]
    if base_is_nowhere(model, found):
        what += "; its base is in the folder `base` beside this one"
    return what


def _loss_text(loss: PreferenceLoss) -> str:
    options = described(loss)
    name = options.pop("name")
    return ", ".join([f"`{name}`", *(f"{key} {value}" for key, value in options.items())])


def result_table(config: TrainConfig, evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Accuracies per objective, before and after, with the pairs and a 95 % Wilson interval.

    `likelihood` ranks the responses by log-probability, which the untrained model can do too;
    `reward` ranks them by the implicit reward, which is all zeros (50 %) before training.
    """
    first, last = evaluations[0], evaluations[-1]
    rows = []
    for name in config.objectives:
        pairs = int(last.get(f"eval_pairs/{name}", 0))
        if pairs:
            before = first.get(f"eval_logps/accuracies/{name}")
            after = last[f"eval_logps/accuracies/{name}"]
            reward = last[f"eval_rewards/accuracies/{name}"]
            cells = [share_with_interval(value, pairs) for value in (before, after, reward)]
            margin = last[f"eval_rewards/margins/{name}"]
            rows.append([name, str(pairs), *cells, "-" if margin is None else f"{margin:.3f}"])
    titles = ["objective", "pairs", "likelihood, before", "likelihood, after"]
    return markdown_table([*titles, "reward, after", "reward margin, after"], rows)
