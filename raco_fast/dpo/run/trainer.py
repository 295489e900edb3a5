"""The training loop: batch -> scores -> losses -> per-objective gradients -> one combined step."""

import logging
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from raco_fast.distributed.processes import Processes
from raco_fast.dpo.data.batches import BatchSchedule
from raco_fast.dpo.data.tokenization import EncodedPair
from raco_fast.dpo.models import pick_device, trainable
from raco_fast.dpo.modes import begin_training, has_dropout
from raco_fast.dpo.run.batching import layout_of
from raco_fast.dpo.run.callbacks import Callback, Callbacks, RunStart
from raco_fast.dpo.run.config import TrainConfig
from raco_fast.dpo.run.divergence import check_weights, ended_skipping, note_skipped
from raco_fast.dpo.run.failures import (
    memory_named,
    to_hold_a_model,
    to_run_a_model,
    what_is_left,
)
from raco_fast.dpo.run.first_step import check_first_scores
from raco_fast.dpo.run.given import NOTHING, Given
from raco_fast.dpo.run.identity import compared, settings_of
from raco_fast.dpo.run.inputs import RunInputs, load_on_all
from raco_fast.dpo.run.interrupt import Interrupt
from raco_fast.dpo.run.keeping import Best, Checkpoints, evaluated
from raco_fast.dpo.run.length import odd_settings
from raco_fast.dpo.run.lock import held
from raco_fast.dpo.run.loggers import LOGGERS
from raco_fast.dpo.run.margin_rewards import margin_rewards
from raco_fast.dpo.run.metrics_file import MetricsFile
from raco_fast.dpo.run.moving_reference import MovingReference
from raco_fast.dpo.run.new_state import new_state
from raco_fast.dpo.run.parallel import process_group
from raco_fast.dpo.run.places import check_room, check_writable
from raco_fast.dpo.run.references import References
from raco_fast.dpo.run.result import save_result
from raco_fast.dpo.run.resuming import checkpoint_to_resume, go_on_from, remove_run
from raco_fast.dpo.run.step import PreferenceStep
from raco_fast.dpo.run.step_batches import StepBatches
from raco_fast.dpo.run.together import by_first, check_alike, together
from raco_fast.dpo.run.weight_dtype import with_dtype
from raco_fast.dpo.scoring import KnownReferences, tail_weights
from raco_fast.dpo.sharded import device_of, is_sharded, whole_state_dict
from raco_fast.engine.prepare import Prepared, prepare

logger = logging.getLogger(__name__)


class Interrupted(Exception):  # noqa: N818 - not an error
    """The run was stopped by a signal, Ctrl-C for one, after saving a checkpoint."""

    def __init__(self, step: int, checkpoint: Path) -> None:
        self.step, self.checkpoint = step, checkpoint
        super().__init__(
            f"stopped after step {step}; {checkpoint} holds everything. "
            "Run the same command with --resume to go on"
        )


def train(config: TrainConfig, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """`run_training` of what a config names; its metrics."""
    return run_training(config, resume, overwrite)[1]


def run_training(
    config: TrainConfig,
    resume: bool = False,
    overwrite: bool = False,
    given: Given = NOTHING,
    callbacks: Sequence[Callback] = (),
) -> tuple[RunInputs, dict[str, Any]]:
    """Run a whole training: load, score the reference, train, evaluate, save.

    Every process that a launcher has started for the run calls this.

    Args:
        resume: go on from the newest checkpoint in `config.output_dir`.
        overwrite: remove the run that `config.output_dir` holds, once model, data and reference
            of the new one are ready.
        given: what is in memory already, in place of what the config names.
        callbacks: told of the run's course, with those that `config.loggers` names.
    Returns:
        What the run began with, its model trained; and the last evaluation's record in
        metrics.jsonl (empty without `eval_data`, and on every process but the first).
    Raises:
        ValueError: bad configuration, data, model path, checkpoint or launcher; another run holds
            `output_dir`.
        OSError: something could not be written; the last checkpoint is whole.
        MemoryError: memory has run out, of the CPU or a GPU; likewise.
        OtherProcessError: another process has failed or is gone.
        DivergedError: steps could not be taken, because a loss, a gradient or the weights are not
            finite (`max_skipped_steps`, or at the end of the run).
        CallbackError: a callback has raised, after a checkpoint was written; a ValueError.
        Interrupted: Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP, on any process, after a checkpoint was
            written.
        KeyboardInterrupt: Ctrl-C before the first step, or twice.
    """
    with ExitStack() as run:
        run.enter_context(what_is_left(config.folder, MemoryError))
        run.enter_context(memory_named("the run", to_run_a_model(config)))
        run.enter_context(process_group(config.parallel, pick_device(config.model.device)))
        run.enter_context(held(config.folder, Processes()))
        trainer = Trainer(config, resume, overwrite, given, callbacks)
        run.callback(trainer.prepared.remove)  # a model in memory is its owner's again
        return trainer.inputs, trainer.run()


class Trainer:
    """One run. `Trainer(config).run()` is `train(config)`, once `output_dir` is held by it."""

    def __init__(
        self,
        config: TrainConfig,
        resume: bool = False,
        overwrite: bool = False,
        given: Given = NOTHING,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.losses = config.objective_losses
        self.processes = Processes()
        for folder, name in ((config.folder, "output_dir"), (config.cache_folder, "cache_dir")):
            by_first(self.processes, partial(check_writable, folder, name))
        found = checkpoint_to_resume(config, resume, overwrite, self.processes)
        self.config = config = with_dtype(config, self.processes, found)
        with memory_named("loading the model", to_hold_a_model(config)):
            self.inputs = load_on_all(config, self.processes, given)
        self.model, self.pairs = self.inputs.model, self.inputs.training
        rounding = config.optimizer_arguments["rounding"]
        trained = trainable(self.model).values()
        kept = config.keep + (config.keep_best is not None)
        moves = config.reference is not None
        by_first(self.processes, lambda: check_room(config.folder, trained, rounding, kept, moves))
        self.batches = BatchSchedule(len(self.pairs), config.pairs_per_step, config.seed)
        steps = config.epochs * self.batches.steps_per_epoch
        self.total_steps = min(steps, config.max_steps or steps)
        for odd in odd_settings(config, len(self.pairs), self.total_steps):
            logger.warning("%s", odd)
        self.prepared = Prepared(())
        if config.gradient_mode != "autograd":
            strict = config.gradient_mode != "auto"
            self.prepared = prepare(self.model, strict=strict, check_every=config.check_every)
        self.layout = layout_of(config, self.inputs, self.processes)
        references = References(config, self.inputs, self.layout, self.processes)
        self.references = references.of_training(self.batches, any_rounds=found is not None)
        if len(tails := tail_weights(self.losses)) > 1:
            logger.info(
                "the losses weigh tokens in %d ways, so every sequence is run as often in a step",
                len(tails),
            )
        sets = (self.pairs, self.inputs.held_out)
        self.rewards = margin_rewards(config, self.inputs, self.processes, *sets)
        own, of_held_out = self.rewards.of_sets
        self.held_out = references.held_out(of_held_out) if self.inputs.held_out else None
        self._of_run: dict[str, float] = {}
        later_epochs = self.total_steps > self.batches.steps_per_epoch
        if found is None and later_epochs and not isinstance(self.references, MovingReference):
            later = self._pairs_of(self.batches.steps_per_epoch)
            noise = references.margin_noise(later, self.references)
            self._of_run = {"reference/margin_noise": noise}
            logger.info(
                "in later epochs pairs lie beside others: their reference margins are then off by "
                "%.1e nats",
                noise,
            )
        moving = self.references if isinstance(self.references, MovingReference) else None
        self.state = new_state(config, self.inputs, self.total_steps, moving, self.rewards)
        self._settings = config.setting_scheduler(self.state.optimizer, self.total_steps)
        read = ("data", "model", "margin_rewards")
        contents = {what: self.state.run.get(what) for what in read}
        of_run = {**compared(self.state.run["settings"]), **contents}
        of_run["checkpoint"] = found and found.name
        check_alike(self.processes, of_run)
        self._learn = PreferenceStep(
            self.model,
            self.state.optimizer,
            self.references,
            self.losses,
            self.layout,
            config.chunk_tokens,
            {"auto": "one_backward"}.get(config.gradient_mode, config.gradient_mode),
            self.processes,
            own,
        )
        best = None
        if config.keep_best is not None:
            best = Best(config.keep_best, self.state.run["held_out"])
        self.checkpoints = Checkpoints(config, self.state, best)
        evaluated_before = self._evaluate_now = False
        if found is not None:
            self._evaluate_now = go_on_from(found, self.state, config, self.total_steps)
            evaluated_before = self.state.evaluation is not None
            if self._evaluate_now:
                self.state.evaluation = None  # of other pairs
            self.checkpoints.is_on_disk()
        if overwrite:
            by_first(self.processes, partial(remove_run, config.folder))
        self._resumed_at = None if found is None else self.state.step
        # Of the first process alone: the others have no metrics to write.
        self.metrics = by_first(
            self.processes,
            lambda: MetricsFile(
                config.folder / "metrics.jsonl",
                resumed_at=self._resumed_at,
                evaluated=evaluated_before,
            ),
        )
        told = [*(LOGGERS[name]() for name in config.loggers), *callbacks]
        self.callbacks = Callbacks(told if self.processes.rank == 0 else [])

    def run(self) -> dict[str, Any]:
        """Train to the end, evaluate before and after, save the model and its card."""
        config, result = self.config, None
        start = RunStart(config.folder, settings_of(config), self.total_steps, self._resumed_at)
        try:
            together(self.processes, lambda: self.callbacks.start(start))
            result = self._run()
        finally:
            self.callbacks.end(result)
        saved = f"the run is whole, and its model saved as {config.folder / 'model'}"
        together(self.processes, lambda: self.callbacks.check(saved))
        return result

    def _run(self) -> dict[str, Any]:
        begin_training(self.model, noise=self.config.model.dropout)
        if self.state.step == 0:
            self._check_first_scores()
        progress = tqdm(
            total=self.total_steps,
            initial=self.state.step,
            desc="train",
            unit="step",
            disable=self.processes.rank > 0,
        )
        self._coming = StepBatches(
            lambda step: self._learn.batches(self._pairs_of(step)),
            range(self.state.step, self.total_steps),
            device_of(self.model),
            None if self.config.workers is None else min(1, self.config.workers),
        )
        with what_is_left(self.config.folder, OSError), Interrupt() as interrupt, progress:
            with self._coming:
                self._train(interrupt, progress)
            if self.state.skipped_in_a_row and not self.state.optimizer.state:
                raise ended_skipping(self.state, None)
            with memory_named("saving the model", to_hold_a_model(self.config)):
                weights = whole_state_dict(self.model) if is_sharded(self.model) else None
                # Of a resumed run too: it may have other held-out pairs than before.
                untrained = None
                if self.held_out is not None and self.inputs.policy.starts_at_reference:
                    untrained = self.held_out.evaluate_reference()
                result = by_first(self.processes, lambda: self._finish(weights, untrained)) or {}
        if self.state.skipped_in_a_row:
            raise ended_skipping(self.state, self.config.folder / "model")
        return result

    def _train(self, interrupt: Interrupt, progress: "tqdm[Any]") -> None:
        """All steps, with the evaluations and checkpoints that are due after each of them."""
        state, wanted = self.state, self.checkpoints.wanted
        while True:
            last = state.step == self.total_steps
            whole = self._evaluate(interrupt)
            # The clock of one process decides for all.
            stop, now, failed = self.processes.agree(
                lambda: [
                    interrupt.requested,
                    self.processes.rank == 0 and wanted(),
                    self.callbacks.failure is not None,
                ],
                3,
            )
            # Not amid skipped steps: the checkpoint before them is the better one.
            due = (now or _due(state.step, self.config.save_every)) and not state.skipped_in_a_row
            if state.step and (stop or due or last or failed):
                self._save()
                # The signal may have come while it was written.
                (stop,) = self.processes.agree(lambda: [interrupt.requested], 1)
            if failed:
                self._check_callbacks()
            if stop and not state.step:
                raise KeyboardInterrupt  # there is nothing to save yet
            if stop and not (last and whole):
                raise Interrupted(state.step, self.checkpoints.newest)
            if last:
                return
            self._step(progress)

    def _evaluate(self, interrupt: Interrupt) -> bool:
        """Evaluate if that is due; False if a signal has stopped it.

        A resumed run then does it: until the checkpoint says so, it has not been done.
        """
        state, held_out = self.state, self.held_out
        due = _due(state.step, self.config.eval_every) or state.step in (0, self.total_steps)
        due |= self._evaluate_now
        if held_out is None or state.evaluation is not None or not due:
            return True
        with memory_named("an evaluation", to_run_a_model(self.config)):
            if state.step == 0 and self.inputs.policy.starts_at_reference:
                result = held_out.evaluate_reference()
            elif (found := held_out.evaluate(self.model, lambda: interrupt.requested)) is None:
                return False
            else:
                result = found
        self._write({"step": state.step, **result})
        state.evaluation, self._evaluate_now = evaluated(result, state.run["held_out"]), False
        return True

    def _save(self) -> None:
        """Write a checkpoint, but not of weights that are destroyed."""
        check_weights(self.state, self.checkpoints.folder)
        metrics = self.metrics
        # Whoever goes on from the checkpoint counts on the records before it.
        together(self.processes, lambda: None if metrics is None else metrics.sync())
        with memory_named("writing a checkpoint", to_hold_a_model(self.config)):
            written = self.checkpoints.save()
        if written:
            self.callbacks.saved(self.checkpoints.newest)

    def _check_callbacks(self) -> None:
        """End the run on all processes, as a callback has failed on the first."""
        step, left = self.state.step, "nothing was trained"
        if step:
            left = f"the run has ended after step {step}: mend it or leave it out, "
            left += f"then add --resume to go on from {self.checkpoints.newest}"
        together(self.processes, lambda: self.callbacks.check(left))

    def _check_first_scores(self) -> None:
        """See `check_first_scores`; with noise there is nothing to compare."""
        processes = self.processes
        if self.config.model.dropout or has_dropout(self.model):
            return
        longest = self.layout.rounds(self._pairs_of(0), processes.size)[0][processes.rank]
        batch = self.layout.batch(longest)
        references: KnownReferences | None = None
        if self.inputs.policy.starts_at_reference:
            if isinstance(self.references, MovingReference):
                (references,) = self.references.logps([batch])
            else:
                references = self.references
        check_first_scores(self.model, batch, references, self.config.chunk_tokens, processes)

    def _finish(
        self, weights: dict[str, Tensor] | None, untrained: dict[str, float] | None
    ) -> dict[str, Any]:
        assert self.metrics is not None
        self.checkpoints.tell_best()
        of_run = (self.config, self.inputs, self.state)
        return save_result(*of_run, weights, untrained, self.metrics.path)

    def _step(self, progress: "tqdm[Any]") -> None:
        """One optimizer step over the pairs of this step, in micro-batches."""
        began = time.perf_counter()
        state, config = self.state, self.config
        pairs = self._pairs_of(state.step)
        lr = state.scheduler.get_last_lr()[0]
        self._settings.at(state.step)
        with memory_named(f"step {state.step + 1}", to_run_a_model(config)):
            result = self._learn(pairs, next(self._coming))
        with warnings.catch_warnings():
            # What torch says where the first step has no labels, and so no optimizer.step().
            warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)` before")
            state.scheduler.step()
        state.step, state.evaluation = state.step + 1, None
        if state.reference is not None:
            state.reference.after(state.step)
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
                **self._of_run,
            }
            if state.reference is not None:
                record["reference/syncs"] = state.reference.syncs(state.step)
            self._of_run = {}
            self._write(record)
            taken = [name for name in config.objectives if f"loss/{name}" in record]
            progress.set_postfix({name: f"{record[f'loss/{name}']:.3f}" for name in taken})
        note_skipped(result, state, config.max_skipped_steps, self.checkpoints.folder)

    def _write(self, record: dict[str, Any]) -> None:
        """To metrics.jsonl, and then to whoever is told."""
        metrics = self.metrics
        written = together(
            self.processes, lambda: None if metrics is None else metrics.write(record)
        )
        if written is not None:
            self.callbacks.record(written)

    def _pairs_of(self, step: int) -> list[EncodedPair]:
        return [self.pairs[i] for i in self.batches.indices(step)]


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
