"""What a run leaves behind: the trained model, and a card with its first and last evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from raco_fast.dpo.data.batches import labelled_counts
from raco_fast.dpo.run.checkpoint import TrainingState
from raco_fast.dpo.run.config import TrainConfig
from raco_fast.dpo.run.identity import settings_of
from raco_fast.dpo.run.inputs import RunInputs
from raco_fast.dpo.run.metrics_file import is_evaluation, read_records
from raco_fast.dpo.run.model_card import TrainingSummary, save_trained_model
from raco_fast.dpo.run.run_report import write_report


def save_result(
    config: TrainConfig,
    inputs: RunInputs,
    state: TrainingState,
    weights: Mapping[str, Tensor] | None,
    untrained: Mapping[str, float] | None,
    metrics: Path,
) -> dict[str, Any]:
    """Save the model, its card and the report; returns the last evaluation, if there are any.

    Args:
        weights: as in `save_trained_model`.
        untrained: the evaluation of the policy before training on the present held-out pairs; None
            where only a record of it can tell.
        metrics: the finished metrics.jsonl.
    """
    evaluations = _first_and_last(metrics, untrained, state.run) if inputs.held_out else []
    summary = TrainingSummary(
        config,
        steps=state.step,
        skipped_steps=state.optimizer.skipped_steps,
        skipped_at_the_end=state.skipped_in_a_row,
        pairs=len(inputs.training),
        labelled=labelled_counts(inputs.training, config.objectives),
        evaluations=evaluations,
        found=inputs.policy.found,
    )
    save_trained_model(inputs.model, inputs.tokenizer, summary, weights)
    if config.report:
        write_report(config.folder, settings_of(config))
    return dict(evaluations[-1]) if evaluations else {}


def _first_and_last(
    metrics: Path, untrained: Mapping[str, float] | None, run: Mapping[str, Any]
) -> list[Mapping[str, Any]]:
    """Two evaluations on the same held-out pairs; the first is empty where it is not known."""
    records = [record for record in read_records(metrics) if is_evaluation(record)]
    if not records:
        return []
    if untrained is None:
        known = run["held_out_at_first"] == run["held_out"] and records[0]["step"] == 0
        untrained = records[0] if known else {}
    return [untrained, records[-1]]
