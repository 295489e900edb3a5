"""A trained model on held-out pairs, compared with the reference of the run that it is of."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

from raco_fast.distributed.processes import Processes
from raco_fast.dpo.policy import load_base_model, make_policy
from raco_fast.dpo.run.batching import layout_of
from raco_fast.dpo.run.config import TrainConfig
from raco_fast.dpo.run.evaluation import HeldOut
from raco_fast.dpo.run.files import atomic_file
from raco_fast.dpo.run.inputs import load_inputs
from raco_fast.dpo.run.margin_rewards import margin_rewards
from raco_fast.dpo.run.references import References
from raco_fast.dpo.run.template_date import with_date
from raco_fast.dpo.run.weight_dtype import with_dtype
from raco_fast.report import share_with_interval, text_table


def evaluate_trained(config: TrainConfig, model: str | None = None) -> dict[str, float]:
    """Metrics of a trained model on `config.eval_data`, as at the end of the run.

    Args:
        config: of the run: its `model` is the reference.
        model: folder or hub name of what was trained; None: `output_dir/model`.
    Returns:
        Name -> value, as in a record of metrics.jsonl, each name after `eval_`.
    Raises:
        ValueError: `eval_data` is empty; there is no such model; as `load_inputs`.
    """
    if not config.eval_data:
        raise ValueError("`eval_data` must name the files of held-out pairs, got none; add them")
    trained = str(config.folder / "model") if model is None else model
    if model is None and not Path(trained).is_dir():
        raise ValueError(
            f"`output_dir` holds no trained model, {trained}; train one, or name another by --of"
        )
    config = with_date(with_dtype(config, Processes(), keep=False), Processes())
    held_out = _held_out(config)
    options = replace(config.model, name=trained, lora=None, adapter="continue", base=None)
    policy = make_policy(load_base_model(options), options)
    result = held_out.evaluate(policy.model)
    assert result is not None, "nobody stops it"
    return result


def _held_out(config: TrainConfig) -> HeldOut:
    """The held-out pairs, scored by the reference; its model is gone then."""
    processes = Processes()
    # All that is asked of training pairs is that there are some.
    inputs = load_inputs(replace(config, data=config.eval_data, keep_best=None))
    layout = layout_of(config, inputs, processes)
    rewards = margin_rewards(config, inputs, processes, inputs.held_out)
    return References(config, inputs, layout, processes).held_out(*rewards.of_sets)


def report_trained(config: TrainConfig, model: str | None, out: str | None) -> str:
    """Evaluate, write the metrics as JSON, and return the table to print.

    Args:
        out: the file; None: `eval.json` in `output_dir`.
    """
    found = evaluate_trained(config, model)
    file = config.folder / "eval.json" if out is None else Path(out).expanduser()
    clean = {name: value if math.isfinite(value) else None for name, value in found.items()}
    with atomic_file(file) as partial:
        partial.write_text(json.dumps(clean, indent=1) + "\n", encoding="utf-8")
    rows = []
    for name in config.objectives:
        pairs = int(found[f"eval_pairs/{name}"])
        shares = (clean.get(f"eval_{of}/accuracies/{name}") for of in ("rewards", "logps"))
        cells = (f"{found[f'eval_{of}/{name}']:.4f}" for of in ("loss", "rewards/margins"))
        rows.append((name, str(pairs), *(share_with_interval(s, pairs) for s in shares), *cells))
    titles = ("objective", "pairs", "accuracy of the reward", "of the likelihood")
    return f"{text_table((*titles, 'loss', 'margin'), rows)}\n\nsaved {file}"
