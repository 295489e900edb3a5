"""A reference that follows the policy (TR-DPO, arXiv:2404.09656).

Every `sync_steps` steps

    theta_ref <- alpha theta + (1 - alpha) theta_ref        alpha = `mixup_alpha`

over the trained parameters. alpha = 1 is TR-DPO's hard update, less its soft one; `sync_steps` 1
with a small alpha is an exponential average of the policy.

The reference is no second model: its trained parameters are kept beside, and lie in the model while
a step's micro-batches are scored, all of them before the policy sees the first. They are float32
also where the model's are bfloat16, in which a mean that moves by less than 1/256 of a weight would
stand still; the forward pass sees them rounded to the model's dtype.

Of an adapter the mean of A and B apart is not that of the products B A, and theirs has another rank
at every step, so adapters take alpha = 1 alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raco_fast.distributed.dtensor import local
from raco_fast.dpo.data.collation import PairBatch
from raco_fast.dpo.models import ModelOptions, trainable
from raco_fast.dpo.modes import evaluating
from raco_fast.dpo.policy import Policy, trains_adapter
from raco_fast.dpo.saved_adapters import SavedAdapter
from raco_fast.dpo.scoring import BatchLogps, pair_logps
from raco_fast.dpo.sharded import free_gathered


@dataclass(frozen=True)
class ReferenceOptions:
    """How the reference follows the policy; the names are those of TRL without `ref_model_`.

    Args:
        sync_steps: steps between two updates of the reference.
        mixup_alpha: how far an update takes it to the policy; 1 makes it the policy.
    """

    sync_steps: int = 512
    mixup_alpha: float = 0.6

    def __post_init__(self) -> None:
        if self.sync_steps < 1:
            raise ValueError(
                f"`reference.sync_steps` must be at least 1, got {self.sync_steps}; leave "
                f"`reference` out for one that stays as it is"
            )
        if not 0 < self.mixup_alpha <= 1:
            raise ValueError(
                f"`reference.mixup_alpha` must be in (0, 1], got {self.mixup_alpha}; 1 makes the "
                f"reference the policy, and 0 would never move it"
            )

    def check_policy(self, model: ModelOptions, found: SavedAdapter | None) -> None:
        """Raise ValueError where an adapter is trained, whose products have no such mean.

        Args:
            found: the adapter that `model.name` is; None where it is a model or not known yet.
        """
        if self.mixup_alpha < 1 and trains_adapter(model, found):
            raise ValueError(
                f"`reference.mixup_alpha` must be 1 where an adapter is trained, got "
                f"{self.mixup_alpha}: the mean of its A and B apart is not the mean of the "
                f"products B A that it adds; use 1, or train every weight"
            )


class MovingReference:
    """The reference of a run, and what it computes at present.

    Args:
        policy: of which it begins as the reference; its model is prepared or not.
        options: when it moves, and how far.
        tails, chunk_tokens: as in `pair_logps`.
    """

    def __init__(
        self, policy: Policy, options: ReferenceOptions, tails: Sequence[float], chunk_tokens: int
    ) -> None:
        self.tails, self._chunk_tokens = tuple(tails), chunk_tokens
        self._policy, self._options = policy, options
        self._parameters = trainable(policy.model)
        # Where the policy begins elsewhere, its first reference is the model with another adapter,
        # or none, on; nothing is to be kept of it.
        self.weights: dict[str, Tensor] | None = None
        if policy.starts_at_reference:
            self.weights = {name: _copy(p) for name, p in self._parameters.items()}

    @torch.no_grad()
    def logps(self, batches: Sequence[PairBatch]) -> list[dict[float, BatchLogps]]:
        """Tail weight -> scores of the reference as it is, for each of some micro-batches."""
        model = self._policy.model
        # All of them first, so that weights are exchanged once.
        with evaluating(model), self._in_place(model):
            scored = [pair_logps(model, b, self._chunk_tokens, self.tails) for b in batches]
            # Inside: what a sharded model has gathered are the reference's weights.
            free_gathered(model)
        return [
            {
                tail: BatchLogps(*both.chunk(2))
                for tail, both in zip(self.tails, each.chunk(len(self.tails)), strict=True)
            }
            for each in scored
        ]

    @contextmanager
    def _in_place(self, model: nn.Module) -> Iterator[None]:
        """The model computes what the reference does; afterwards it has its own bits again."""
        if self.weights is None:
            with self._policy.as_reference(model):
                yield
            return
        free_gathered(model)
        own = {name: local(p).clone() for name, p in self._parameters.items()}
        try:
            self._fill(self.weights)
            yield
        finally:
            self._fill(own)

    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, p in self._parameters.items():
            local(p).copy_(local(values[name]))

    def syncs(self, step: int) -> int:
        """Updates within so many steps."""
        return step // self._options.sync_steps

    @torch.no_grad()
    def after(self, step: int) -> None:
        """Move the reference, if that is due after so many steps; all processes do it alike."""
        if step % self._options.sync_steps:
            return
        if self.weights is None:
            assert self._options.mixup_alpha == 1
            self.weights = {name: _copy(p) for name, p in self._parameters.items()}
            return
        for name, p in self._parameters.items():
            mean = local(self.weights[name])
            mean.lerp_(local(p).to(mean.dtype), self._options.mixup_alpha)

    def to_fill(self, kept: bool) -> dict[str, Tensor]:
        """Its weights, to be filled from a checkpoint.

        Args:
            kept: whether the checkpoint has them; if not, it had not moved, and there are none.
        """
        assert kept or not self._policy.starts_at_reference
        self.weights = {n: _copy(p) for n, p in self._parameters.items()} if kept else None
        return self.weights or {}


def _copy(p: Tensor) -> Tensor:
    """Of a parameter, cut as it is, at least in float32."""
    return p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
