"""The configuration of a training run: one dataclass, one YAML file, one CLI."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from raco_fast.dpo.data.choices import check_choices
from raco_fast.dpo.data.data_source import DataSource
from raco_fast.dpo.data.files import STDIN
from raco_fast.dpo.data.rendering import TokenOptions
from raco_fast.dpo.losses.preference_loss import PreferenceLoss
from raco_fast.dpo.losses.registry import make_loss
from raco_fast.dpo.models import ModelOptions
from raco_fast.dpo.run.loggers import check_loggers
from raco_fast.dpo.run.moving_reference import ReferenceOptions
from raco_fast.dpo.run.parallel import ParallelOptions
from raco_fast.dpo.run.reward_source import RewardSource, check_rewards
from raco_fast.engine.prepare import CHECK_EVERY
from raco_fast.optim.clipped_cagrad_adamw import ClippedCAGradAdamW
from raco_fast.optim.schedules import SettingScheduler
from raco_fast.settings.paths import expanded
from raco_fast.solver.registry import check_rule, spec_of


@dataclass(frozen=True)
class TrainConfig:
    """Multi-objective DPO on preference pairs.

    Args:
        model: the policy and how it is loaded.
        data: files of preference pairs to train on.
        eval_data: files of held-out pairs; none skips evaluation.
        weights: objective name -> weight; at least 0, summing to 1.
        c: radius of the correction, in [0, 1); 0 is the weighted sum.
        rule: how the gradients are combined: a name of docs/rules.md, or {name: ..., option: ...}.
        gram: the Gram matrix that the combination is found from: `batch`, that of a step's
            gradients; `unbiased`, an estimate of that of their expectation, which the noise of a
            step does not bias (docs/conflict.md). Not with `gradient_mode: autograd`.
        gram_ema: of `unbiased`: what a step keeps of the average over the steps before, in (0, 1);
            None chooses it from the noise.
        c_mode: of `unbiased`: whose norms the length of the correction is found from, the `batch`'s
            or the `signal`'s.
        metric: of the products in that matrix: `euclidean`, or `adam`, that of AdamW's update
            (docs/method.md). Not with `gram: unbiased` or `gradient_mode: gram_first`.
        c_schedule: {name: linear, start: 0.0, end: 0.4, steps: 500}: c as a function of the step,
            constant, linear or cosine; what is left out is `c`, and all steps of the run.
        weights_schedule: the same of weights; or {name: dirichlet, concentration: 10.0, seed: 0},
            which draws them anew at every step, with `weights` as their mean.
        loss: preference loss by name, or {name: simpo, gamma: 1.0}; docs/losses.md lists them.
        loss_options: its options, where `loss` is a name: beta, label_smoothing and the like.
        losses: objective name -> loss of its own, written like `loss`; the others have `loss`.
        margin_rewards: objective with the loss `modpo` -> models trained for other objectives, by
            whose implicit rewards its own are to be surpassed: [{name: ..., weight: 0.5}, ...].
        reference: lets the reference follow the policy; None: it stays what it is at the start.
        tokens: chat template, lengths and truncation.
        concise: objective whose labels are derived from length (the shorter response is
            preferred); None derives none.
        lr: peak learning rate.
        betas: AdamW's averaging coefficients.
        eps: AdamW's epsilon.
        weight_decay: decoupled weight decay.
        max_grad_norm: clip the norm of the combined gradient; None does not clip.
        rounding: of trained bfloat16 weights: nearest, which drops most updates at the usual
            learning rates; stochastic; split, which takes 2 bytes more a weight and is an exact
            float32 weight. None: stochastic, which learnt as much as split and float32 weights
            where it was measured (docs/backends.md) and takes no memory; of a resumed run, the
            checkpoint's.
        schedule: learning-rate schedule after the warm-up.
        warmup_ratio: share of the steps spent warming up linearly.
        epochs: passes over the data.
        max_steps: stop after so many optimizer steps; None runs all epochs.
        max_skipped_steps: steps in a row that may be skipped because a loss or gradient is not
            finite; at so many the run ends with an error. None never ends it.
        pairs_per_step: pairs in one optimizer step, of all processes together.
        batching: how tokens lie in memory. `pairs` packs rows [prompt | a | b], every token once,
            which is exact for losses that see a pair through one h(a) - h(b); `packed` gives every
            response its prompt, without padding; `padded` pads to the longest. `auto` takes the
            first that losses and model allow, and says so; a model whose tokens meet elsewhere than
            in attention runs padded.
        pairs_per_micro_batch: pairs that a process holds in memory at once; divides a step into
            micro-batches.
        tokens_per_micro_batch: tokens of a packed micro-batch at most; a longer pair is alone. None
            takes what `pairs_per_micro_batch` of the longest pairs have, on a CPU at most 512.
        chunk_tokens: full rows of logits whose memory the head may take at any time.
        gradient_mode: `one_backward` takes one backward pass for all objectives and fails where
            that is not exact for the model; `auto` does the same and falls back to `autograd`, one
            pass per objective; `gram_first` stores no gradient per objective, and needs the whole
            step in one micro-batch.
        check_every: of one backward pass, the steps between two comparisons with an ordinary one;
            each costs one more backward pass. None never compares.
        seed: of the data order, the adapter's initialisation, dropout and stochastic rounding.
        eval_every: steps between evaluations; None evaluates at the start and the end only.
        save_every: steps between checkpoints, beside those that `save_minutes` asks for.
        save_minutes: minutes between checkpoints, by the clock of the first process. A run that is
            stopped by a signal but SIGKILL saves one in any case; None saves none by time.
        keep: how many of the newest checkpoints stay. A new one is written before an old one goes,
            so the disk needs room for one more.
        keep_best: an objective whose best checkpoint stays as well: that with the smallest
            `eval_loss/<objective>`. Every evaluation that is the best so far saves a checkpoint.
            Needs `eval_data` and `eval_every`.
        log_every: steps between records in metrics.jsonl.
        output_dir: where checkpoints, metrics and the trained model go.
        cache_dir: where reference log-probabilities are kept between runs.
        loggers: who is told of the metrics beside metrics.jsonl: `tensorboard`, `wandb`, `mlflow`,
            each with the extra of its name (docs/metrics.md).
        report: write `output_dir/report.html` at the end, with curves where matplotlib is there.
        workers: processes beside this one that prepare pairs: that tokenize them, before the
            training, and then one that packs those of the coming steps. 0: none. None: as many as
            pay for their start, of this process's share of the machine's cores, to tokenize; one to
            pack, where the model is on a GPU.
        parallel: how the model is spread over the processes that a launcher has started.
    """

    model: ModelOptions
    data: list[DataSource]
    weights: dict[str, float]
    eval_data: list[DataSource] = field(default_factory=list)
    c: float = 0.4
    rule: str | dict[str, Any] = "cagrad-clip"
    gram: Literal["batch", "unbiased"] = "batch"
    gram_ema: float | None = None
    c_mode: Literal["batch", "signal"] = "batch"
    metric: Literal["euclidean", "adam"] = "euclidean"
    c_schedule: dict[str, Any] | None = None
    weights_schedule: dict[str, Any] | None = None
    loss: str | dict[str, float | str] = "sigmoid"
    loss_options: dict[str, float] = field(default_factory=dict)
    losses: dict[str, str | dict[str, float | str]] = field(default_factory=dict)
    margin_rewards: dict[str, list[RewardSource]] = field(default_factory=dict)
    reference: ReferenceOptions | None = None
    tokens: TokenOptions = field(default_factory=TokenOptions)
    concise: str | None = None
    lr: float = 5e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    rounding: str | None = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.1
    epochs: int = 1
    max_steps: int | None = None
    max_skipped_steps: int | None = 10
    pairs_per_step: int = 16
    batching: Literal["auto", "pairs", "packed", "padded"] = "auto"
    pairs_per_micro_batch: int = 4
    tokens_per_micro_batch: int | None = None
    chunk_tokens: int = 256
    gradient_mode: Literal["auto", "autograd", "one_backward", "gram_first"] = "auto"
    check_every: int | None = CHECK_EVERY
    seed: int = 0
    eval_every: int | None = None
    save_every: int | None = None
    save_minutes: float | None = 30.0
    keep: int = 1
    keep_best: str | None = None
    log_every: int = 1
    output_dir: str = "runs/dpo"
    cache_dir: str = "runs/cache"
    loggers: list[Literal["tensorboard", "wandb", "mlflow"]] = field(default_factory=list)
    report: bool = True
    workers: int | None = None
    parallel: ParallelOptions = field(default_factory=ParallelOptions)

    def __post_init__(self) -> None:
        """Check everything that can be checked before a model is loaded."""
        check_choices(self)
        object.__setattr__(self, "rule", spec_of(check_rule(self.rule)))  # as it is in YAML
        # The optimizer checks weights, c, lr and the like, here before a model is loaded.
        optimizer = ClippedCAGradAdamW([torch.zeros(1)], **self.optimizer_arguments)
        self.setting_scheduler(optimizer, steps=1)
        if not self.lr > 0:
            raise ValueError(
                f"`lr` must be positive, got {self.lr}: nothing would be learnt; the "
                f"usual choice is 5e-6 for all weights, 1e-4 for an adapter"
            )
        unknown = [name for name in self.losses if name not in self.weights]
        if unknown:
            raise ValueError(
                f"`losses` must name objectives in `weights`, got {unknown} for "
                f"{sorted(self.weights)}; add them there or correct the names"
            )
        check_rewards(self.margin_rewards, self.objective_losses)  # which are made here first
        if self.reference is not None:
            self.reference.check_policy(self.model, None)
        if not self.data:
            raise ValueError("`data` must name at least one file of preference pairs, got none")
        if [source.path for source in (*self.data, *self.eval_data)].count(STDIN) > 1:
            raise ValueError(
                f"`data` and `eval_data` must name standard input ({STDIN!r}) once, got it more "
                f"often: it can be read once; write it to a file"
            )
        if self.concise is not None and self.concise not in self.weights:
            raise ValueError(
                f"`concise` must be one of the objectives in `weights`, got {self.concise!r} for "
                f"{sorted(self.weights)}; add it there or leave `concise` out"
            )
        counts = ("epochs", "pairs_per_step", "pairs_per_micro_batch", "chunk_tokens", "log_every")
        for name in (
            *counts,
            "max_steps",
            "max_skipped_steps",
            "eval_every",
            "save_every",
            "keep",
            "check_every",
            "tokens_per_micro_batch",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        if self.workers is not None and self.workers < 0:
            raise ValueError(
                f"`workers` must be a number of processes, at least 0, got {self.workers}; null "
                f"chooses it"
            )
        self._check_saving()
        self._check_gram()
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"`warmup_ratio` must be in [0, 1], got {self.warmup_ratio}")
        if self.gradient_mode == "gram_first" and self.pairs_per_micro_batch < self.pairs_per_step:
            raise ValueError(
                f"`gradient_mode` 'gram_first' needs the whole step in one micro-batch (products "
                f"between micro-batches are part of its Gram matrix), got {self.pairs_per_step} "
                f"`pairs_per_step` in micro-batches of {self.pairs_per_micro_batch}; set both to "
                f"the same number, or use 'one_backward'"
            )
        if self.gradient_mode == "gram_first" and self.tokens_per_micro_batch is not None:
            raise ValueError(
                f"`tokens_per_micro_batch` must be null with `gradient_mode` 'gram_first', which "
                f"needs the whole step in one micro-batch, got {self.tokens_per_micro_batch}; "
                f"leave it out, or use 'one_backward'"
            )
        check_loggers(self.loggers)

    def _check_gram(self) -> None:
        if self.metric == "adam" and self.gradient_mode == "gram_first":
            raise ValueError(
                "`metric: adam` weighs every element of every objective's gradient, which "
                "`gradient_mode` 'gram_first' never forms; use 'one_backward' or 'auto'"
            )
        if self.gram == "batch":
            return
        if self.gradient_mode == "autograd":
            raise ValueError(
                "`gram: unbiased` needs the products of single pairs, which `gradient_mode` "
                "'autograd' does not have; use 'one_backward', 'gram_first' or 'auto'"
            )
        if self.pairs_per_step < 2:
            raise ValueError(
                f"`gram: unbiased` needs products between pairs of one step, got "
                f"{self.pairs_per_step} `pairs_per_step`; set it to 2 at least, better to 16"
            )

    def _check_saving(self) -> None:
        if self.save_minutes is not None and not self.save_minutes > 0:
            raise ValueError(
                f"`save_minutes` must be a positive number of minutes, got {self.save_minutes}; "
                f"null saves no checkpoints by time"
            )
        if self.keep_best is None:
            return
        if self.keep_best not in self.weights:
            raise ValueError(
                f"`keep_best` must be one of the objectives in `weights`, got {self.keep_best!r} "
                f"for {sorted(self.weights)}; correct it or leave it out"
            )
        if not self.eval_data or self.eval_every is None:
            raise ValueError(
                f"`keep_best` compares evaluations, so `eval_data` and `eval_every` must be set, "
                f"got {len(self.eval_data)} files and {self.eval_every}; set both or leave "
                f"`keep_best` out"
            )

    @property
    def optimizer_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `ClippedCAGradAdamW`."""
        names = ("lr", "betas", "eps", "weight_decay", "weights", "c", "rule", "max_grad_norm")
        of_gram = ("gram", "gram_ema", "c_mode", "metric")
        given = {name: getattr(self, name) for name in (*names, *of_gram, "seed")}
        return {**given, "rounding": self.rounding or "stochastic"}

    def setting_scheduler(self, optimizer: ClippedCAGradAdamW, steps: int) -> SettingScheduler:
        """What sets c and the weights of an optimizer in a run of so many steps."""
        return SettingScheduler(
            optimizer, c=self.c_schedule, weights=self.weights_schedule, steps=steps
        )

    @property
    def objectives(self) -> tuple[str, ...]:
        """Objective names in the order of the weights."""
        return tuple(self.weights)

    @property
    def objective_losses(self) -> dict[str, PreferenceLoss]:
        """Objective name -> its loss, in the order of the weights."""
        common = make_loss(self.loss, "loss", self.loss_options)
        own = {name: make_loss(s, f"losses.{name}") for name, s in self.losses.items()}
        return {name: own.get(name, common) for name in self.weights}

    @property
    def folder(self) -> Path:
        """`output_dir` as a path."""
        return expanded(self.output_dir, "output_dir")

    @property
    def cache_folder(self) -> Path:
        """`cache_dir` as a path."""
        return expanded(self.cache_dir, "cache_dir")
