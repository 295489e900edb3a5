"""Before the first step: the policy computes what its reference does, or the run says where not.

A policy that begins as its reference begins with margins of zero, so with a loss of ln 2 for DPO.
Noise in one of the two, or a reference of another model, is nothing that later metrics would show.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from raco_fast.distributed.processes import Processes
from raco_fast.dpo.data.collation import PairBatch
from raco_fast.dpo.decoders import unwrap
from raco_fast.dpo.models import decoder_layers
from raco_fast.dpo.modes import evaluating
from raco_fast.dpo.scoring import KnownReferences, pair_logps
from raco_fast.dpo.sharded import free_gathered, is_sharded

logger = logging.getLogger(__name__)

_SINGLE, _HALF = 1e-5, 2e-3
_LN_2_WITHIN = {_SINGLE: 1e-6, _HALF: 1e-3}
_LOSS_PER_NAT = 0.05  # of a margin, for DPO with beta = 0.1: beta / 2


@torch.no_grad()
def check_first_scores(
    model: nn.Module,
    batch: PairBatch,
    references: KnownReferences | None,
    chunk_tokens: int,
    processes: Processes,
) -> None:
    """Compare a policy that learns without noise with its reference, on one micro-batch.

    Args:
        model: the policy, in the mode in which it is about to learn.
        batch: of this process; every process has one.
        references: tail weight -> reference log-probabilities; None where the policy does not
            begin as its reference.
        chunk_tokens: as in `sequence_logps`.
    Raises:
        ValueError: two passes differ (names the model, and the module where it begins), or the
            policy and its reference do, or a layer would learn nothing. On all processes where it
            is so on one.
    """

    def run() -> Tensor:
        return pair_logps(model, batch, chunk_tokens, references or (1.0,))

    with evaluating(model):
        scoring = run()
    # Of a sharded model only a backward pass ends what a forward pass with a graph begins.
    with torch.set_grad_enabled(not is_sharded(model)), _layers_graphed(model) as graphed:
        learning = run().detach()
    processes.agree(lambda: _check_graphed(model, graphed), 0)
    rounding = _rounding(model)
    (noisy,) = processes.agree(lambda: [_worst(learning, scoring, rounding) is not None], 1)
    if noisy:
        _refuse_noise(model, run)
    free_gathered(model)
    if references:
        processes.agree(lambda: _compare(model, batch, scoring, references, rounding), 0)


@contextmanager
def _layers_graphed(model: nn.Module) -> Iterator[list[bool]]:
    """Whether each decoder layer with trained parameters, in the order of calls, has a graph."""
    graphed: list[bool] = []
    layers = [m for m in decoder_layers(model) if any(p.requires_grad for p in m.parameters())]

    def note(module: nn.Module, args: Any, output: Any) -> None:
        tensors = output if isinstance(output, (tuple, list)) else [output]
        graphed.append(any(isinstance(t, Tensor) and t.requires_grad for t in tensors))

    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield graphed
    finally:
        for hook in hooks:
            hook.remove()


def _check_graphed(model: nn.Module, graphed: list[bool]) -> None:
    """Raise ValueError where evaluation mode is for inference alone, as xLSTM's for long inputs."""
    if not is_sharded(model) and graphed and not any(graphed):
        raise ValueError(
            f"`model` ({_class_of(model)}) runs its layers without a graph in evaluation mode, in "
            f"which it is to learn; train it with all that it does in training mode instead "
            f"(`model.dropout: true`)"
        )


def _rounding(model: nn.Module) -> float:
    """Relative size of what two orders of the same sums may differ by."""
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    return _HALF if half else _SINGLE


def _worst(a: Tensor, b: Tensor, allowed: float) -> int | None:
    """The row in which two scores differ most, of those that differ by more than rounding."""
    excess = ((a - b).abs() - allowed * b.abs().clamp(min=1)).nan_to_num(torch.inf)
    return int(excess.argmax()) if bool((excess > 0).any()) else None


def _compare(
    model: nn.Module,
    batch: PairBatch,
    scores: Tensor,
    references: KnownReferences,
    rounding: float,
) -> None:
    each = [logps for known in references.values() for logps in known.of(batch.ids, scores.device)]
    known = torch.cat(each)
    row = _worst(scores, known, 25 * rounding)
    if row is not None:
        raise ValueError(
            f"`model` ({_class_of(model)}) must begin as its reference, but gives pair "
            f"{batch.ids[row % len(batch.ids)]!r} a log-probability of {float(scores[row]):.4f}, "
            f"and the reference {float(known[row]):.4f}; remove the reference's file from "
            f"`cache_dir`, so that it is computed anew"
        )
    # The reference was scored in these very rows, so nothing is left but what kernels do in another
    # order from call to call.
    a, b = (scores - known).view(len(references), 2, -1).unbind(1)
    off = float((a - b).mean().abs()) * _LOSS_PER_NAT
    if off > _LN_2_WITHIN[rounding]:
        logger.warning(
            "the first loss is off by %.1e where the policy is its reference (ln 2 for DPO): the "
            "model's kernels add in another order from call to call",
            off,
        )


def _refuse_noise(model: nn.Module, run: Callable[[], Tensor]) -> None:
    where = _where_passes_part(model, run)
    place = f", beginning in its module {where}" if where else ""
    raise ValueError(
        f"`model` ({_class_of(model)}) gives other log-probabilities in every pass over the same "
        f"pair{place}: noise that `model.dropout: false` cannot switch off. Set "
        f"`model.gradient_checkpointing: false` if it is on, or train with the noise "
        f"(`model.dropout: true`)"
    )


def _class_of(model: nn.Module) -> str:
    return type(unwrap(model)).__name__


def _where_passes_part(model: nn.Module, run: Callable[[], Tensor]) -> str | None:
    """The innermost module that answers the same inputs otherwise than in evaluation mode.

    None where none is found: between modules, or where the passes call different ones.
    """
    calls: list[tuple[str, Any, Any]] = []

    def noting(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls.append(
                (f"{name!r} ({type(module).__name__})", _sums((args, kwargs)), _sums(output))
            )

        return note

    hooks = [m.register_forward_hook(noting(n), with_kwargs=True) for n, m in model.named_modules()]
    try:
        run()
        learning = list(calls)
        calls.clear()
        with evaluating(model):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    for ours, theirs in zip(learning, calls, strict=False):
        if ours[0] != theirs[0]:
            return None
        if ours[1] == theirs[1] and ours[2] != theirs[2]:
            return ours[0]
    return None


def _sums(value: Any) -> Any:
    """Numbers by which tensors in nested containers can be told apart."""
    if isinstance(value, Tensor):
        wide = value.double()
        return float(wide.sum()), float(wide.abs().sum())
    if isinstance(value, Mapping):
        return tuple(map(_sums, value.values()))
    return tuple(map(_sums, value)) if isinstance(value, (tuple, list)) else None
