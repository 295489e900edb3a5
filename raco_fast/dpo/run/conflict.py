"""`raco-fast conflict`: what a config's objectives want of its model, before any training.

Some pairs are dealt into blocks. A first pass over them gives the sum S of each objective's
gradients and every block's own sums; a second one the products of every block's sums G_k with S.
That is all that leaving out a block takes: ‖S - G_k‖² = ‖S‖² - 2 ⟨S, G_k⟩ + ‖G_k‖². So two sets of
gradients are in memory, however many blocks there are. Where those of all blocks are small, as an
adapter's, they are kept, and there is no second pass.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from raco_fast.backends import ops
from raco_fast.distributed.processes import Processes
from raco_fast.dpo.data.batches import BatchSchedule
from raco_fast.dpo.data.collation import PairBatch
from raco_fast.dpo.data.label_counts import Labels, labels_of
from raco_fast.dpo.data.tokenization import EncodedPair
from raco_fast.dpo.losses.objective_losses import preference_losses
from raco_fast.dpo.models import trainable
from raco_fast.dpo.modes import begin_training, has_dropout
from raco_fast.dpo.run.batching import layout_of
from raco_fast.dpo.run.config import TrainConfig
from raco_fast.dpo.run.inputs import RunInputs, load_inputs
from raco_fast.dpo.run.margin_rewards import margin_rewards
from raco_fast.dpo.run.reference_cache import compute_reference
from raco_fast.dpo.run.step import backward_of_pairs
from raco_fast.dpo.run.template_date import with_date
from raco_fast.dpo.run.weight_dtype import with_dtype
from raco_fast.dpo.scoring import ReferenceLogps, pair_logps, score_pairs, tail_weights
from raco_fast.engine.prepare import prepare
from raco_fast.gradients.objective_gradients import ObjectiveGradients
from raco_fast.solver.intervals import BLOCKS
from raco_fast.solver.pair_sums import PairSums

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]
References = Mapping[float, ReferenceLogps]
Sums = dict[Tensor, list[Tensor]]
"""Parameter -> its m gradients."""

_ROOM = 1 << 30  # bytes for the gradients of all blocks
_AT_ONCE = 16  # of each of two sets: `ops.gram` takes 32 gradients
_OFF = 1e-3  # of M: what two passes over the same pairs may differ by


@dataclass(frozen=True)
class Measured:
    """What the pairs sum to.

    Args:
        labels: of all training pairs.
        sums: of the measured pairs.
        left_out: of those without one block, for each of `BLOCKS`.
        losses: [m], means over the measured pairs; NaN without a label.
    """

    labels: Labels
    sums: PairSums
    left_out: list[PairSums]
    losses: Array


def measure(config: TrainConfig, pairs: int = 256) -> Measured:
    """Sums over the first pairs of the first epoch, with the model as training would begin it.

    Nothing is trained or written; torch's generators are seeded. The noise of dropout is part of a
    run's gradients, so it is part of these.

    Args:
        pairs: how many, or all there are.
    Raises:
        ValueError: bad configuration, data or model path; one objective; too few pairs; one
            backward pass is not exact for the model, or its gradients are not finite, or others
            every time.
    """
    if len(config.objectives) < 2:
        raise ValueError(
            f"`weights` names one objective, {config.objectives[0]!r}, which has a conflict with "
            f"nobody; name two at least"
        )
    if pairs < BLOCKS:
        raise ValueError(
            f"`--pairs` must be at least {BLOCKS}, as intervals come from leaving out one of "
            f"{BLOCKS} blocks of pairs at a time, got {pairs}; some hundreds tell more"
        )
    # Held-out pairs are not looked at, and one backward pass has the products of single pairs.
    config = replace(config, eval_data=[], keep_best=None, gradient_mode="one_backward")
    config = with_dtype(config, Processes(), keep=False)
    inputs = load_inputs(with_date(config, Processes()))
    if len(inputs.training) < BLOCKS:
        raise ValueError(
            f"`data` must hold at least {BLOCKS} usable pairs, one for each block that intervals "
            f"are found by leaving out, got {len(inputs.training)}; add data"
        )
    inputs.check_causal()
    if pairs > len(inputs.training):
        logger.info("`--pairs`: %d, all there are", len(inputs.training))
    return _Measurement(config, inputs, min(pairs, len(inputs.training))).run()


class _Measurement:
    """The two passes over some pairs of a run."""

    def __init__(self, config: TrainConfig, inputs: RunInputs, pairs: int) -> None:
        self.config, self.inputs, self.model = config, inputs, inputs.model
        self.losses = config.objective_losses
        self.tails = tail_weights(self.losses)
        prepare(self.model, strict=True, check_every=config.check_every)
        self.layout = layout_of(config, inputs, Processes())
        begin_training(self.model, noise=config.model.dropout)
        # Then every margin is 0, and no pass is needed to know it.
        noisy = config.model.dropout or has_dropout(self.model)
        self.at_reference = inputs.policy.starts_at_reference and not noisy
        self.references: dict[tuple[str, ...], References] = {}
        order = BatchSchedule(len(inputs.training), pairs, config.seed).indices(0)
        self.pairs = [inputs.training[i] for i in order]
        self.blocks = [[self.pairs[i] for i in b] for b in np.array_split(range(pairs), BLOCKS)]
        given = margin_rewards(config, inputs, Processes(), self.pairs, cached=False)
        (self.rewards,) = given.of_sets
        self.labels = labels_of(self.pairs, config.objectives)
        self.divisors = dict(zip(config.objectives, self.labels.counts.tolist(), strict=True))
        params = list(trainable(self.model).values())
        names = config.weights
        self.gradients = ObjectiveGradients(params, names, process_group=None, gram="unbiased")
        self.totals = dict.fromkeys(config.objectives, 0.0)

    def run(self) -> Measured:
        """Both passes."""
        m = len(self.config.objectives)
        whole: Sums = {}
        of_blocks: list[PairSums] = []
        kept: list[Sums] = []
        keeps = self._keeps()
        with tqdm(total=(2 - keeps) * BLOCKS, desc="conflict", unit="block") as progress:
            for k in range(BLOCKS):
                block, gradients = self._block(k)
                of_blocks.append(block)
                for p, each in gradients.items():
                    _add(whole, p, each)
                if keeps:
                    kept.append(gradients)
                progress.update()
            losses = self._mean_losses()
            sums = self._whole(whole, of_blocks)
            left_out = []
            for k, block in enumerate(of_blocks):
                gradients = kept[k] if keeps else self._again(k, block)
                left_out.append(sums.without(block, self._scaled(_products(gradients, whole, m))))
                progress.update(not keeps)
        labels = labels_of(self.inputs.training, self.config.objectives)
        return Measured(labels, sums, left_out, losses)

    def _keeps(self) -> bool:
        """Whether the gradients of all blocks are small enough to be kept."""
        of_one = sum(p.numel() * p.element_size() for p in trainable(self.model).values())
        return of_one * len(self.losses) * BLOCKS <= _ROOM

    def _whole(self, whole: Sums, of_blocks: Sequence[PairSums]) -> PairSums:
        gram = self._scaled(_products(whole, whole, len(self.losses)))
        if not np.isfinite(gram).all():
            bad = [n for n, x in zip(self.losses, np.diagonal(gram), strict=True) if x != x]
            raise ValueError(
                f"`model` must give finite gradients, got a NaN or an infinity for {bad or 'all'} "
                f"objectives among {len(self.pairs)} pairs; check its weights and `model.dtype`"
            )
        return PairSums(
            gram,
            np.sum([block.products for block in of_blocks], axis=0),
            np.sum([block.counts for block in of_blocks], axis=0),
            np.sum([block.common for block in of_blocks], axis=0),
            len(self.pairs),
        )

    def _scaled(self, gram: Array) -> Array:
        """Of sums over pairs, from that of gradients that were divided by the labelled pairs."""
        return gram * np.outer(self.labels.counts, self.labels.counts)

    def _block(self, k: int) -> tuple[PairSums, Sums]:
        """A block's sums, and its gradients, each a mean's share of all measured pairs."""
        m, pairs = len(self.losses), self.blocks[k]
        for index, batch in enumerate(self._batches(pairs)):
            torch.manual_seed(self.config.seed + 1009 * k + index)  # both passes drop the same
            self._backward(batch)
        samples = self.gradients.expectation.samples.sums(Processes(None), 1.0)
        found: Sums = {}
        for p in self.gradients.trained():
            of_p = self.gradients.of(p).values()
            if any(g is not None for g in of_p):
                found[p] = [torch.zeros_like(p) if g is None else g for g in of_p]
        self.gradients.zero()
        gram = self._scaled(_products(found, found, m))
        products = self._scaled(samples.products)
        return PairSums(gram, products, samples.counts, samples.common, len(pairs)), found

    def _again(self, k: int, known: PairSums) -> Sums:
        """A block's gradients, in the second pass.

        Raises:
            ValueError: they are not those of the first.
        """
        block, gradients = self._block(k)
        size = np.sqrt(np.diagonal(known.gram))
        if (abs(block.gram - known.gram) > _OFF * np.outer(size, size)).any():
            raise ValueError(
                "`model` gives other gradients in every pass over the same pairs: noise that "
                "torch.manual_seed does not repeat; set `model.dropout: false`, or "
                "`model.gradient_checkpointing: false` if it is on"
            )
        return gradients

    def _batches(self, pairs: Sequence[EncodedPair]) -> Iterator[PairBatch]:
        labelled = [pair for pair in pairs if any(pair.labels.values())]
        for (group,) in self.layout.rounds(labelled) if labelled else ():
            batch = self.layout.batch(group)
            if not self.at_reference and tuple(batch.ids) not in self.references:
                self.references[tuple(batch.ids)] = compute_reference(
                    self.model,
                    group,
                    self.layout,
                    self.config.chunk_tokens,
                    self.tails,
                    self.inputs.policy.as_reference,
                )
            yield batch

    def _backward(self, batch: PairBatch) -> None:
        logps = pair_logps(self.model, batch, self.config.chunk_tokens, self.tails)
        if self.at_reference:
            references = self._own(logps, batch)
        else:
            references = self.references[tuple(batch.ids)]
        losses = preference_losses(
            score_pairs(logps, batch, references, self.losses, self.rewards),
            batch.labels,
            loss=self.losses,
            counts=self.divisors,
            pair_weights=batch.pair_weights,
        )
        backward_of_pairs(
            self.gradients.backward,
            losses,
            logps,
            batch.labels,
            self.losses,
            self.tails,
            "one_backward",
        )
        for name, loss in losses.items():
            self.totals[name] += float(loss.detach())

    def _own(self, logps: Tensor, batch: PairBatch) -> References:
        """The policy's own scores, where it is its reference."""
        found = {}
        for tail, both in zip(self.tails, logps.detach().cpu().chunk(len(self.tails)), strict=True):
            a, b = (half.tolist() for half in both.chunk(2))
            found[tail] = ReferenceLogps(dict(zip(batch.ids, zip(a, b, strict=True), strict=True)))
        return found

    def _mean_losses(self) -> Array:
        """After the first pass."""
        return np.array([self.totals[n] if self.divisors[n] else math.nan for n in self.totals])


def _add(whole: Sums, p: Tensor, gradients: Sequence[Tensor]) -> None:
    """Add a block to the sums of all, in float32 at least: bfloat16 would lose what is added."""
    if p not in whole:
        wide = torch.promote_types(p.dtype, torch.float32)
        whole[p] = [g.to(wide, copy=True) for g in gradients]
        return
    for total, g in zip(whole[p], gradients, strict=True):
        total.add_(g)


def _products(a: Sums, b: Sums, m: int) -> Array:
    """[m, m] float64: of some parameters' gradients (rows) with those of the same (columns)."""
    found = np.zeros((m, m))
    for p, rows in a.items():
        columns = b[p]
        if rows is columns:
            found += ops.gram([[g] for g in rows]).numpy()
            continue
        wide = [[g.to(columns[0].dtype)] for g in rows]
        for i, j in product(range(0, m, _AT_ONCE), repeat=2):
            part, beside = wide[i : i + _AT_ONCE], columns[j : j + _AT_ONCE]
            M = ops.gram(part + [[g] for g in beside]).numpy()
            found[i : i + _AT_ONCE, j : j + _AT_ONCE] += M[: len(part), len(part) :]
    return found
