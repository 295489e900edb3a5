"""One scalar loss per objective, from the scores and labels of a batch.

For objective i over the B pairs of a batch,

    L_i = 1/n_i  sum over labelled b of  v_b loss(pair b),      n_i = pairs labelled for i.

The divisor is the number of pairs also where they have weights v: divided by the sum of the weights
in a step, a pair that is alone in its step would count 1 whatever its weight. Weights whose mean is
1 leave the objective's scale alone.

Nothing here may look at a model: one backward pass serves all objectives because L_i depends on the
parameters only through the scores.
"""

from collections.abc import Mapping

from torch import Tensor

from raco_fast.backends.transfer import sent
from raco_fast.dpo.losses.margin_losses import Sigmoid
from raco_fast.dpo.losses.pair_scores import PairScores, RankedScores
from raco_fast.dpo.losses.preference_loss import PreferenceLoss
from raco_fast.dpo.losses.registry import check_soft, loss_name


def preference_losses(
    scores: PairScores | Mapping[str, PairScores],
    labels: Mapping[str, Tensor],
    *,
    loss: PreferenceLoss | Mapping[str, PreferenceLoss] | None = None,
    counts: Mapping[str, float] | None = None,
    pair_weights: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """One scalar loss per objective over the pairs labelled for it.

    Args:
        scores: of the B pairs of this (micro-)batch; objective name -> scores where their losses
            are of different ones.
        labels: objective name -> [B] tensor: +1 response a is preferred, -1 response b,
            0 not labelled for this objective. Of a soft label, sign times the probability q that it
            is right, in [0.5, 1]: the loss is q loss(w, l) + (1 - q) loss(l, w). Best on the CPU,
            see `PairScores.labelled`.
        loss: of all objectives, or objective name -> loss; DPO's by default.
        counts: objective name -> number of labelled pairs to divide by. Give the counts of the
            whole optimizer step when it is accumulated over micro-batches, so that 1 x 8 and
            8 x 1 agree; by default the labelled pairs of this batch.
        pair_weights: objective name -> [B] tensor, of objectives with weights other than 1.
    Returns:
        Objective name -> float32 scalar. An objective without a labelled pair in this batch has
        the constant 0 without a graph (`requires_grad` is False): nothing to backpropagate.
    Raises:
        ValueError: labels or weights of another length than the scores; labels out of range;
            `scores`, `loss` or `counts` without one of the objectives; soft labels for a loss
            without a form for them; a loss that gives another shape.
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
        of_objective, weight = by_name[name], (pair_weights or {}).get(name)
        shape = of_objective.logps_a.shape
        for argument, tensor in (("labels", label), ("pair_weights", weight)):
            if tensor is not None and tensor.shape != shape:
                raise ValueError(
                    f"{argument}[{name!r}] must have one entry a pair, shape {tuple(shape)}, got "
                    f"{tuple(tensor.shape)}"
                )
        rows, pairs = of_objective.labelled(label)
        if not rows.numel():
            result[name] = of_objective.logps_a.new_zeros(())
            continue
        each = _of_pairs(name, by_objective[name], pairs, label[rows].abs())
        if each.shape != rows.shape:
            raise ValueError(
                f"the loss {loss_name(by_objective[name])!r} must give one number a pair, shape "
                f"{tuple(rows.shape)}, got {tuple(each.shape)}; leave the mean out of it"
            )
        if weight is not None:
            each = each * sent(weight[rows], each.device).to(each.dtype)
        result[name] = each.sum() / (rows.numel() if counts is None else counts[name])
    return result


def _of_pairs(name: str, loss: PreferenceLoss, pairs: RankedScores, q: Tensor) -> Tensor:
    """[n] losses; of a soft label, the mean over its two signs."""
    if bool((q == 1).all()):
        return loss(pairs)
    if not bool(((q >= 0.5) & (q <= 1)).all()):
        raise ValueError(
            f"labels[{name!r}] must be 0, or +-q with q in [0.5, 1] the probability of that sign, "
            f"got sizes from {float(q.min()):g} to {float(q.max()):g}"
        )
    check_soft(name, loss)
    # The two signs cancel where the policy is as sure as the label. What float32 leaves of a and b
    # then has two directions, where one h(a) - h(b) has one (`PreferenceLoss.pair_function`).
    wide = pairs.widened()
    q = sent(q, wide.logps_w.device).to(wide.logps_w.dtype)
    each = q * loss(wide) + (1 - q) * loss(wide.swapped())
    return each.to(pairs.logps_w.dtype)
