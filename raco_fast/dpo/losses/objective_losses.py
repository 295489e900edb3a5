"""One scalar loss per objective, from the scores and labels of a batch.

For objective i with labels s in {-1, 0, +1} over the B pairs of a batch,

    L_i = 1/n_i  sum over labelled b of  v_b loss(pair b),      n_i = pairs labelled for i.

The divisor is the number of pairs also where they have weights v: a pair then pulls as hard
whichever pairs share its step, while divided by the step's weights a pair alone would not feel its
own. Weights whose mean is 1 leave the objective's scale alone. A label that is right with
probability q gives q loss(w, l) + (1 - q) loss(l, w).

That L_i depends on the parameters only through the scores is what allows one backward pass for all
objectives, so nothing here may look at a model.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from raco_fast.dpo.losses.margin_losses import Sigmoid
from raco_fast.dpo.losses.pair_scores import PairScores, RankedScores
from raco_fast.dpo.losses.preference_loss import PreferenceLoss
from raco_fast.dpo.losses.registry import check_soft


def preference_losses(
    scores: PairScores | Mapping[str, PairScores],
    labels: Mapping[str, Tensor],
    *,
    loss: PreferenceLoss | Mapping[str, PreferenceLoss] | None = None,
    counts: Mapping[str, float] | None = None,
    confidences: Mapping[str, Tensor] | None = None,
    pair_weights: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """One scalar loss per objective over the pairs labelled for it.

    Args:
        scores: of the B pairs of this (micro-)batch; objective name -> scores where their losses
            are of different ones.
        labels: objective name -> [B] tensor: +1 response a is preferred, -1 response b,
            0 not labelled for this objective. Best on the CPU, see `PairScores.labelled`.
        loss: of all objectives, or objective name -> loss; DPO's by default.
        counts: objective name -> number of labelled pairs to divide by. Give the counts of the
            whole optimizer step when it is accumulated over micro-batches, so that 1 x 8 and
            8 x 1 agree; by default the labelled pairs of this batch.
        confidences: objective name -> [B] tensor in [0.5, 1], P(the label is right), of objectives
            with soft labels.
        pair_weights: objective name -> [B] tensor, of objectives with weights other than 1.
    Returns:
        Objective name -> float32 scalar. An objective without a labelled pair in this batch has
        the constant 0 without a graph (`requires_grad` is False): nothing to backpropagate.
    Raises:
        ValueError: labels of another length than the scores; `scores`, `loss` or `counts` without
            one of the objectives; soft labels for a loss that has no form for them.
    """
    loss = loss or Sigmoid()
    by_objective = dict.fromkeys(labels, loss) if isinstance(loss, PreferenceLoss) else loss
    by_name = dict.fromkeys(labels, scores) if isinstance(scores, PairScores) else scores
    for argument, given in (("scores", by_name), ("loss", by_objective), ("counts", counts)):
        missing = [] if given is None else [name for name in labels if name not in given]
        if missing:
            raise ValueError(
                f"`{argument}` must hold every objective in `labels`, got none for {missing}"
            )
    result = {}
    for name, label in labels.items():
        scores = by_name[name]
        if label.shape != scores.logps_a.shape:
            raise ValueError(
                f"labels[{name!r}] must have one entry a pair, shape {tuple(scores.logps_a.shape)},"
                f" got {tuple(label.shape)}"
            )
        rows, pairs = scores.labelled(label)
        if not rows.numel():
            result[name] = scores.logps_a.new_zeros(())
            continue
        count = rows.numel() if counts is None else counts[name]
        each = _of_pairs(name, by_objective[name], pairs, _at(confidences, name, rows))
        weights = _at(pair_weights, name, rows)
        result[name] = (each if weights is None else each * weights.to(each)).sum() / count
    return result


def _at(values: Mapping[str, Tensor] | None, name: str, rows: Tensor) -> Tensor | None:
    return None if values is None or name not in values else values[name][rows]


def _of_pairs(
    name: str, loss: PreferenceLoss, pairs: RankedScores, confidence: Tensor | None
) -> Tensor:
    """[n] losses; of a soft label, the mean over what it may be."""
    if confidence is None or bool((confidence == 1).all()):
        return loss(pairs)
    check_soft(name, loss)
    q = confidence.to(pairs.logps_w)
    return q * loss(pairs) + (1 - q) * loss(pairs.swapped())
