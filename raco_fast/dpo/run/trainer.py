"""The training loop: batch -> scores -> losses -> per-objective gradients -> one combined step."""

import logging
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from raco_fast.distributed.processes import Processes
from raco_fast.dpo.data.batches import BatchSchedule, labelled_counts, micro_batches
from raco_fast.dpo.data.tokenization import EncodedPair, collate
from raco_fast.dpo.models import pick_device, trainable
from raco_fast.dpo.modes import begin_training, has_dropout
from raco_fast.dpo.run.checkpoint import TrainingState, check_whole, latest, read_state
from raco_fast.dpo.run.config import TrainConfig
from raco_fast.dpo.run.divergence import check_weights, ended_skipping, note_skipped
from raco_fast.dpo.run.evaluation import HeldOut
from raco_fast.dpo.run.first_step import check_first_scores
from raco_fast.dpo.run.identity import check_same_content, check_same_run, compared, identity
from raco_fast.dpo.run.inputs import load_on_all
from raco_fast.dpo.run.interrupt import Interrupt
from raco_fast.dpo.run.length import (
    check_total,
    follow_schedule,
    odd_settings,
    warm_up_steps,
)
from raco_fast.dpo.run.metrics_file import MetricsFile, read_records
from raco_fast.dpo.run.model_card import TrainingSummary, save_trained_model
from raco_fast.dpo.run.parallel import process_group
from raco_fast.dpo.run.places import check_room, check_writable
from raco_fast.dpo.run.reference_cache import data_hash, reference_logps
from raco_fast.dpo.run.step import PreferenceStep
from raco_fast.dpo.run.together import by_first, check_alike, together
from raco_fast.dpo.scoring import ReferenceLogps, tail_weights
from raco_fast.dpo.sharded import is_sharded, whole_state_dict
from raco_fast.engine.prepare import prepare
from raco_fast.optim.clipped_cagrad_adamw import ClippedCAGradAdamW

logger = logging.getLogger(__name__)


class Interrupted(Exception):  # noqa: N818 - not an error
    """The run was stopped by Ctrl-C or SIGTERM after saving a checkpoint."""

    def __init__(self, step: int, checkpoint: Path) -> None:
        self.step, self.checkpoint = step, checkpoint
        super().__init__(
            f"stopped after step {step}; {checkpoint} holds everything. "
            "Run the same command with --resume to go on"
        )


def train(config: TrainConfig, resume: bool = False) -> dict[str, Any]:
    """Run a whole training: load, score the reference, train, evaluate, save.

    Every process that a launcher has started for the run calls this.

    Args:
        resume: go on from the newest checkpoint in `config.output_dir`.
    Returns:
        The last evaluation's record in metrics.jsonl (empty without `eval_data`, and on every
        process but the first).
    Raises:
        ValueError: bad configuration, data, model path, checkpoint or launcher.
        OSError: something could not be written; the last checkpoint is whole.
        OtherProcessError: another process has failed or is gone.
        DivergedError: steps could not be taken, because a loss, a gradient or the weights are not
            finite (`max_skipped_steps`, or at the end of the run).
        Interrupted: Ctrl-C or SIGTERM, on any process, after a checkpoint was written.
    """
    with process_group(config.parallel, pick_device(config.model.device)):
        return Trainer(config, resume=resume).run()


class Trainer:
    """One run. `Trainer(config).run()` is `train(config)`, once the processes are connected."""

    def __init__(self, config: TrainConfig, resume: bool = False) -> None:
        self.config, self.losses = config, config.objective_losses
        self.processes = Processes()
        self._checkpoints = config.folder / "checkpoints"
        for folder, name in ((config.folder, "output_dir"), (config.cache_folder, "cache_dir")):
            by_first(self.processes, partial(check_writable, folder, name))
        found = together(self.processes, lambda: _checkpoint_to_resume(config, resume))
        if found is not None:
            by_first(self.processes, partial(check_whole, found))
            saved = together(self.processes, lambda: read_state(found)["run"]["settings"])
            together(self.processes, lambda: check_same_run(config, saved, found))
        self.inputs = load_on_all(config, self.processes)
        self.model, self.pairs = self.inputs.model, self.inputs.training
        rounding = config.optimizer_arguments["rounding"]
        trained = trainable(self.model).values()
        by_first(self.processes, lambda: check_room(config.folder, trained, rounding))
        self.batches = BatchSchedule(len(self.pairs), config.pairs_per_step, config.seed)
        steps = config.epochs * self.batches.steps_per_epoch
        self.total_steps = min(steps, config.max_steps or steps)
        self._warm_up = warm_up_steps(config.warmup_ratio, self.total_steps)
        for odd in odd_settings(config, len(self.pairs), self.total_steps):
            logger.warning("%s", odd)
        if config.gradient_mode != "autograd":
            strict = config.gradient_mode != "auto"
            prepare(self.model, strict=strict, check_every=config.check_every)
        self.references = self._references(self.pairs)
        if len(self.references) > 1:
            logger.info(
                "the losses weigh tokens in %d ways, so every sequence is run as often in a step",
                len(self.references),
            )
        self.held_out = self._held_out() if self.inputs.held_out else None
        self.state = self._new_state()
        contents = {what: self.state.run[what] for what in ("data", "model")}
        of_run = {**compared(self.state.run["settings"]), **contents}
        of_run["checkpoint"] = found and found.name
        check_alike(self.processes, of_run)
        self._learn = PreferenceStep(
            self.model,
            self.state.optimizer,
            self.references,
            self.losses,
            self.inputs.pad_id,
            config.pairs_per_micro_batch,
            config.chunk_tokens,
            {"auto": "one_backward"}.get(config.gradient_mode, config.gradient_mode),
            self.processes,
        )
        self._evaluate_now = False  # of a resumed run: what was evaluated is not what is asked for
        if found is not None:
            self._resume(found)
        # Of the first process alone: the others have no metrics to write.
        self.metrics = by_first(
            self.processes,
            lambda: MetricsFile(
                config.folder / "metrics.jsonl",
                resumed_at=None if found is None else self.state.step,
                tensorboard=config.tensorboard,
            ),
        )

    def run(self) -> dict[str, Any]:
        """Train to the end, evaluate before and after, save the model and its card."""
        config = self.config
        # Of a resumed run too, for the model card: it may have other held-out pairs than before.
        untrained = None if self.held_out is None else self.held_out.evaluate_reference()
        if untrained is not None and self.state.step == 0:
            self._record(untrained)
        elif self.held_out is not None and self._evaluate_now:
            self._record(self.held_out.evaluate(self.model))
        begin_training(self.model, noise=config.model.dropout)
        if self.state.step == 0:
            self._check_first_scores()
        progress = tqdm(
            total=self.total_steps,
            initial=self.state.step,
            desc="train",
            unit="step",
            disable=self.processes.rank > 0,
        )
        with Interrupt() as interrupt, progress:
            while self.state.step < self.total_steps:
                self._step(progress)
                last = self.state.step == self.total_steps
                if self.held_out is not None and (last or _due(self.state.step, config.eval_every)):
                    self._record(self.held_out.evaluate(self.model))
                (stop,) = self.processes.agree(lambda: [interrupt.requested], 1)
                if stop and not last:
                    raise Interrupted(self.state.step, self._save())
                # Not amid skipped steps: the checkpoint before them is the better one.
                due = _due(self.state.step, config.save_every) and not self.state.skipped_in_a_row
                if last or due:
                    self._save()
        if self.state.skipped_in_a_row and not self.state.optimizer.state:
            raise ended_skipping(self.state, None)
        weights = whole_state_dict(self.model) if is_sharded(self.model) else None
        result = by_first(self.processes, lambda: self._finish(weights, untrained)) or {}
        if self.state.skipped_in_a_row:
            raise ended_skipping(self.state, config.folder / "model")
        return result

    def _check_first_scores(self) -> None:
        """See `check_first_scores`; with noise there is nothing to compare."""
        processes = self.processes
        if self.config.model.dropout or has_dropout(self.model):
            return
        pairs = [self.pairs[i] for i in self.batches.indices(0)]
        size = self.config.pairs_per_micro_batch
        longest = micro_batches(pairs, size, processes.rank, processes.size)[0]
        batch = collate(longest, self.inputs.pad_id)
        check_first_scores(self.model, batch, self.references, self.config.chunk_tokens, processes)

    def _save(self) -> Path:
        """Write a checkpoint, but not of weights that are destroyed."""
        check_weights(self.state, self._checkpoints)
        return self.state.save(self._checkpoints)

    def _finish(
        self, weights: dict[str, Tensor] | None, untrained: dict[str, float] | None
    ) -> dict[str, Any]:
        """Save the model and its card; returns the last evaluation."""
        assert self.metrics is not None
        self.metrics.close()
        summary = self._summary(self.metrics.path, untrained)
        save_trained_model(self.model, self.inputs.tokenizer, summary, weights)
        return dict(summary.evaluations[-1]) if summary.evaluations else {}

    def _step(self, progress: "tqdm[Any]") -> None:
        """One optimizer step over the pairs of this step, in micro-batches."""
        began = time.perf_counter()
        state, config = self.state, self.config
        pairs = [self.pairs[i] for i in self.batches.indices(state.step)]
        lr = state.scheduler.get_last_lr()[0]
        result = self._learn(pairs)
        with warnings.catch_warnings():
            # What torch says where the first step has no labels, and so no optimizer.step().
            warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)` before")
            state.scheduler.step()
        state.step += 1
        progress.update()
        if _due(state.step, config.log_every):
            seconds = time.perf_counter() - began
            record = {
                "step": state.step,
                "epoch": self.batches.epoch(state.step),
                "learning_rate": lr,
                **result.metrics(),
                "seconds": seconds,
                "tokens_per_second": result.tokens / seconds,
            }
            self._write(record)
            taken = [name for name in config.objectives if f"loss/{name}" in record]
            progress.set_postfix({name: f"{record[f'loss/{name}']:.3f}" for name in taken})
        note_skipped(result, state, config.max_skipped_steps, self._checkpoints)

    def _record(self, evaluation: dict[str, float]) -> None:
        self._write({"step": self.state.step, **evaluation})

    def _write(self, record: dict[str, Any]) -> None:
        metrics = self.metrics
        together(self.processes, lambda: None if metrics is None else metrics.write(record))

    def _held_out(self) -> HeldOut:
        config, pairs = self.config, self.inputs.held_out
        return HeldOut(
            pairs,
            self._references(pairs),
            self.losses,
            pad_id=self.inputs.pad_id,
            batch_pairs=2 * config.pairs_per_micro_batch,
            chunk_tokens=config.chunk_tokens,
            processes=self.processes,
        )

    def _new_state(self) -> TrainingState:
        from transformers import get_scheduler

        config = self.config
        optimizer = ClippedCAGradAdamW(trainable(self.model).values(), **config.optimizer_arguments)
        # What transformers calls "constant" ignores the warm-up.
        schedule = "constant_with_warmup" if config.schedule == "constant" else config.schedule
        scheduler: LambdaLR = get_scheduler(schedule, optimizer, self._warm_up, self.total_steps)
        run = {
            "settings": identity(config),
            "data": data_hash(self.pairs),
            "model": self.inputs.model_hash,
            "held_out": data_hash(self.inputs.held_out),
            "total_steps": self.total_steps,
        }
        return TrainingState(self.model, optimizer, scheduler, run, processes=self.processes)

    def _resume(self, checkpoint: Path) -> None:
        state, own = together(self.processes, lambda: read_state(checkpoint)), self.state.run
        saved = state["run"]
        for what in ("data", "model"):
            check_same_content(self.config, what, saved, own, checkpoint)
        check_total(state["step"], saved.get("total_steps"), self.total_steps, checkpoint)
        self.state.load(checkpoint)
        follow_schedule(self.state.scheduler)
        own["settings"]["rounding"] = self.state.optimizer.rounding
        changed = saved.get("held_out", own["held_out"]) != own["held_out"]
        if changed:
            logger.info(
                "the held-out pairs are others than those of the checkpoint: the model is "
                "evaluated on them now, and earlier evaluations in metrics.jsonl are of other pairs"
            )
        ends_here = self.state.step == self.total_steps != saved.get("total_steps")
        self._evaluate_now = changed or ends_here

    def _summary(self, metrics: Path, untrained: dict[str, float] | None) -> TrainingSummary:
        records = [r for r in read_records(metrics) if any(n.startswith("eval_") for n in r)]
        return TrainingSummary(
            self.config,
            steps=self.state.step,
            skipped_steps=self.state.optimizer.skipped_steps,
            skipped_at_the_end=self.state.skipped_in_a_row,
            pairs=len(self.pairs),
            labelled=labelled_counts(self.pairs, self.config.objectives),
            evaluations=[] if untrained is None else [untrained, records[-1]],
        )

    def _references(self, pairs: list[EncodedPair]) -> dict[float, ReferenceLogps]:
        """Tail weight -> reference log-probabilities, of every one that a loss has."""
        config = self.config
        return {
            tail: reference_logps(
                self.model,
                pairs,
                model_hash=self.inputs.model_hash,
                pad_id=self.inputs.pad_id,
                cache_dir=config.cache_folder,
                batch_pairs=2 * config.pairs_per_micro_batch,
                chunk_tokens=config.chunk_tokens,
                tail=tail,
            )
            for tail in tail_weights(self.losses)
        }


def _checkpoint_to_resume(config: TrainConfig, resume: bool) -> Path | None:
    """The checkpoint to go on from; refuses to mix two runs in one folder."""
    output_dir = config.folder
    found = latest(output_dir / "checkpoints")
    if resume and found is None:
        raise ValueError(
            f"`resume`: there is no checkpoint under {output_dir / 'checkpoints'}; "
            "leave `--resume` out to start"
        )
    if not resume and found is not None:
        raise ValueError(
            f"`output_dir` already holds {found}; add --resume to go on from it, "
            "or choose another `output_dir`"
        )
    if not resume and (output_dir / "model").exists():
        raise ValueError(
            f"`output_dir` already holds a trained model, {output_dir / 'model'}; "
            "choose another `output_dir`"
        )
    return found


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
