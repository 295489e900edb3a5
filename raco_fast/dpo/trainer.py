"""The training loop: batch -> scores -> losses -> per-objective gradients -> one combined step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from raco_fast.dpo.batches import BatchSchedule, labelled_counts, micro_batches
from raco_fast.dpo.checkpoint import TrainingState, latest, read_state
from raco_fast.dpo.config import TrainConfig, check_same_run, identity
from raco_fast.dpo.dataset import load_pairs
from raco_fast.dpo.evaluation import HeldOut
from raco_fast.dpo.interrupt import Interrupt
from raco_fast.dpo.logps import check_head
from raco_fast.dpo.losses import preference_losses
from raco_fast.dpo.metrics import MetricsFile, PreferenceMetrics, solution_metrics
from raco_fast.dpo.model_card import save_trained_model
from raco_fast.dpo.models import (
    add_adapter,
    fingerprint,
    load_base_model,
    load_tokenizer,
    trainable,
)
from raco_fast.dpo.scoring import ReferenceLogps, data_hash, reference_logps, score_pairs
from raco_fast.dpo.tokenization import EncodedPair, collate
from raco_fast.optimizer import ClippedCAGradAdamW

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Interrupted(Exception):  # noqa: N818 - not an error
    """The run was stopped by Ctrl-C after saving a checkpoint."""

    def __init__(self, step: int, checkpoint: Path) -> None:
        self.step, self.checkpoint = step, checkpoint
        super().__init__(
            f"stopped after step {step}; {checkpoint} holds everything. "
            "Run the same command with --resume to go on"
        )


def train(config: TrainConfig, resume: bool = False) -> dict[str, float]:
    """Run a whole training: load, score the reference, train, evaluate, save.

    Args:
        config: the run.
        resume: go on from the newest checkpoint in `config.output_dir`.
    Returns:
        The last evaluation's metrics (empty without `eval_data`).
    Raises:
        ValueError: bad configuration, data, model path or checkpoint.
        Interrupted: Ctrl-C, after a checkpoint was written.
    """
    return Trainer(config, resume=resume).run()


class Trainer:
    """One run. `Trainer(config).run()` is `train(config)`."""

    def __init__(self, config: TrainConfig, resume: bool = False) -> None:
        self.config = config
        self._checkpoints = config.folder / "checkpoints"
        self._found = _checkpoint_to_resume(self._checkpoints, resume)
        if self._found is not None:
            check_same_run(config, read_state(self._found)["run"]["settings"], self._found)
        torch.manual_seed(config.seed)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(config.model)
        train_pairs, eval_pairs = load_pairs(config, self.tokenizer)
        base = load_base_model(config.model)
        model_hash = fingerprint(base)
        self.model: nn.Module = add_adapter(base, config.model.lora)
        self.device = next(self.model.parameters()).device
        self._check_head(train_pairs[0])
        self.pairs = train_pairs
        self.reference = self._reference(train_pairs, model_hash)
        self.held_out = self._held_out(eval_pairs, model_hash) if eval_pairs else None
        self.batches = BatchSchedule(len(train_pairs), config.pairs_per_step, config.seed)
        self.total_steps = _total_steps(config, self.batches)
        self.state = self._new_state(train_pairs, model_hash)
        self.metrics = MetricsFile(config.folder / "metrics.jsonl", config.tensorboard)
        self.evaluations: list[dict[str, float]] = []

    def run(self) -> dict[str, float]:
        """Train to the end, evaluate before and after, save the model and its card."""
        config = self.config
        if self._found is not None:
            self._resume(self._found)
        elif self.held_out is not None:
            self._record(self.held_out.evaluate_reference())
        self.model.train()
        progress = tqdm(total=self.total_steps, initial=self.state.step, desc="train", unit="step")
        with Interrupt() as interrupt, progress:
            while self.state.step < self.total_steps:
                self._step(progress)
                last = self.state.step == self.total_steps
                if self.held_out is not None and (last or _due(self.state.step, config.eval_every)):
                    self._record(self.held_out.evaluate(self.model))
                if interrupt.requested and not last:
                    raise Interrupted(self.state.step, self.state.save(self._checkpoints))
                if last or _due(self.state.step, config.save_every):
                    self.state.save(self._checkpoints)
        self.metrics.close()
        save_trained_model(self.model, self.tokenizer, config, self.metrics.path)
        return self.evaluations[-1] if self.evaluations else {}

    def _step(self, progress: tqdm[Any]) -> None:
        """One optimizer step over the pairs of this step, in micro-batches."""
        began = time.perf_counter()
        state, config = self.state, self.config
        pairs = [self.pairs[i] for i in self.batches.indices(state.step)]
        lr = state.scheduler.get_last_lr()[0]
        preference, losses, tokens = self._accumulate(pairs)
        state.optimizer.step()
        state.scheduler.step()
        state.optimizer.zero_grad()
        state.step += 1
        progress.update()
        if _due(state.step, config.log_every):
            seconds = time.perf_counter() - began
            record = {
                "step": state.step,
                "epoch": self.batches.epoch(state.step),
                "lr": lr,
                **{f"loss/{name}": float(loss) for name, loss in losses.items()},
                **preference.result(),
                **self._combination(),
                "seconds": seconds,
                "tokens_per_second": tokens / seconds,
            }
            self.metrics.write(record)
            progress.set_postfix(_brief(record, config.objectives))

    def _accumulate(
        self, pairs: Sequence[EncodedPair]
    ) -> tuple[PreferenceMetrics, dict[str, Tensor], int]:
        """Fill every objective's gradient; return metrics, losses and the tokens processed."""
        config = self.config
        counts = labelled_counts(pairs, config.objectives)
        preference = PreferenceMetrics(config.loss_options.beta)
        totals = {name: torch.zeros((), device=self.device) for name in config.objectives}
        tokens = 0
        for group in micro_batches(pairs, config.pairs_per_micro_batch):
            batch = collate(group, self._pad_id).to(self.device)
            scores = score_pairs(self.model, batch, self.reference, config.chunk_tokens)
            losses = preference_losses(
                scores, batch.labels, loss=config.loss, options=config.loss_options, counts=counts
            )
            self._backward(losses)
            preference.add(scores, batch.labels)
            totals = {name: totals[name] + losses[name].detach() for name in totals}
            tokens += int(batch.attention_mask.sum())
        return preference, totals, tokens

    def _backward(self, losses: dict[str, Tensor]) -> None:
        """One backward pass for each objective that has a labelled pair in this micro-batch."""
        labelled = [name for name, loss in losses.items() if loss.requires_grad]
        for name, loss in losses.items():
            with self.state.optimizer.objective(name):
                if name in labelled:
                    loss.backward(retain_graph=name != labelled[-1])  # type: ignore[no-untyped-call]

    def _combination(self) -> dict[str, float]:
        """How the last step combined the objectives; skipped steps are counted, not hidden."""
        optimizer = self.state.optimizer
        skipped = {"raco/skipped_steps": float(optimizer.skipped_steps)}
        assert optimizer.solution is not None
        if not optimizer.solution.finite:
            tqdm.write(
                f"step {self.state.step}: a gradient is not finite; the step was skipped "
                f"({optimizer.skipped_steps} so far), weights and optimizer state are unchanged"
            )
        return solution_metrics(optimizer.solution, self.config.objectives) | skipped

    def _record(self, evaluation: dict[str, float]) -> None:
        self.evaluations.append(evaluation)
        self.metrics.write({"step": self.state.step, **evaluation})

    def _held_out(self, pairs: list[EncodedPair], model_hash: str) -> HeldOut:
        config = self.config
        return HeldOut(
            pairs,
            self._reference(pairs, model_hash),
            config.objectives,
            config.loss,
            config.loss_options,
            pad_id=self._pad_id,
            device=self.device,
            batch_pairs=2 * config.pairs_per_micro_batch,
            chunk_tokens=config.chunk_tokens,
        )

    def _new_state(self, pairs: Sequence[EncodedPair], model_hash: str) -> TrainingState:
        from transformers import get_scheduler

        config = self.config
        optimizer = ClippedCAGradAdamW(
            trainable(self.model).values(),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            weights=config.weights,
            c=config.c,
            rule=config.rule,
            max_grad_norm=config.max_grad_norm,
        )
        schedule = "constant_with_warmup" if config.schedule == "constant" else config.schedule
        warmup = round(config.warmup_ratio * self.total_steps)
        scheduler: LRScheduler = get_scheduler(schedule, optimizer, warmup, self.total_steps)
        run = {"settings": identity(config), "data": data_hash(pairs), "model": model_hash}
        return TrainingState(self.model, optimizer, scheduler, run)

    def _resume(self, checkpoint: Path) -> None:
        saved = read_state(checkpoint)["run"]
        for what in ("data", "model"):
            if saved[what] != self.state.run[what]:
                raise ValueError(
                    f"checkpoint {checkpoint} was made with another {what}: the settings agree but "
                    f"its content changed; restore it or choose another `output_dir`"
                )
        self.state.load(checkpoint)
        self.metrics.keep_until(self.state.step)

    def _check_head(self, pair: EncodedPair) -> None:
        batch = collate([pair], self._pad_id).to(self.device)
        length = int(batch.attention_mask[0].sum())
        check_head(self.model, batch.input_ids[0, :length], batch.completion_mask[0, :length])

    def _reference(self, pairs: list[EncodedPair], model_hash: str) -> ReferenceLogps:
        config = self.config
        return reference_logps(
            self.model,
            pairs,
            model_hash=model_hash,
            pad_id=self._pad_id,
            cache_dir=Path(config.cache_dir),
            batch_pairs=2 * config.pairs_per_micro_batch,
            chunk_tokens=config.chunk_tokens,
        )

    @property
    def _pad_id(self) -> int:
        pad_id = self.tokenizer.pad_token_id
        assert isinstance(pad_id, int)
        return pad_id


def _checkpoint_to_resume(folder: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from; refuses to mix two runs in one folder."""
    found = latest(folder)
    if resume and found is None:
        raise ValueError(
            f"`resume`: there is no checkpoint under {folder}; leave `--resume` out to start"
        )
    if not resume and found is not None:
        raise ValueError(
            f"`output_dir` already holds {found}; add --resume to go on from it, "
            "or choose another `output_dir`"
        )
    return found


def _total_steps(config: TrainConfig, batches: BatchSchedule) -> int:
    steps = config.epochs * batches.steps_per_epoch
    return steps if config.max_steps is None else min(steps, config.max_steps)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _brief(record: dict[str, Any], objectives: Sequence[str]) -> dict[str, str]:
    """What the progress bar shows: the loss of each objective."""
    return {name: f"{record[f'loss/{name}']:.3f}" for name in objectives}
