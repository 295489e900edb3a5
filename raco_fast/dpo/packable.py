"""Whether a model can be run on packed rows, found by running it.

Packing is exact where tokens meet in attention alone, in an attention that takes a mask and
positions as they are given. State spaces, convolutions, linear attention, T5's relative positions
and models that make their masks themselves do not. No list of architectures would stay true, so
the same pairs are scored padded and packed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from raco_fast.dpo.data.layout import Layout
from raco_fast.dpo.data.tokenization import EncodedPair
from raco_fast.dpo.decoders import is_in_parts
from raco_fast.dpo.modes import evaluating
from raco_fast.dpo.scoring import pair_logps
from raco_fast.dpo.sharded import device_of, free_gathered, is_sharded

# Scores of padded and packed rows are sums in another order. Relative to a score, and where the
# dtype is coarse, relative to what more padding alone makes of it.
_ROUNDING = 1e-5
_ROUNDING_OF_HALF = 4e-3
_TIMES_NOISE = 8.0

_FAILURES = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError)
"""What a model raises that does not take such a mask, positions, or rows without a batch."""


@torch.no_grad()
def why_not_packed(
    model: nn.Module, pairs: Sequence[EncodedPair], layout: Layout, chunk_tokens: int
) -> str | None:
    """Why a model's scores of packed rows are not those of padded ones; None where they are.

    Args:
        model: as in `packed_logps`.
        pairs: a few of those that are to be scored; among them the longest, as a window that is
            longer than every pair shows in none.
        layout: packed, in one row.
        chunk_tokens: as in `sequence_logps`.
    """
    padded = layout.padded(len(pairs))
    with evaluating(model):
        row = torch.tensor([pairs[0].prompt_ids + pairs[0].a_ids], device=device_of(model))
        if not is_in_parts(model, row, torch.ones_like(row)):
            return "its logits are not those of its head on its decoder's output"
        expected = pair_logps(model, padded.batch(pairs), chunk_tokens)
        if not bool(expected.isfinite().all()):
            return None  # whoever scores the reference says so
        noise = _noise(model, pairs, padded, chunk_tokens, expected)
        try:
            found = pair_logps(model, layout.batch(pairs), chunk_tokens)
        except torch.OutOfMemoryError:
            raise  # of a run that has no room for its longest pair, not of packing
        except _FAILURES as error:
            if is_sharded(model):
                # What it has gathered stays until a forward pass comes to its end.
                pair_logps(model, padded.batch(pairs[:1]), chunk_tokens)
            return f"it fails on them ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
        finally:
            free_gathered(model)
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    rounding = _ROUNDING_OF_HALF if half else _ROUNDING
    allowed = rounding * expected.abs().clamp(min=1.0) + _TIMES_NOISE * noise
    difference = (found - expected).abs().nan_to_num(torch.inf)
    if bool((difference <= allowed).all()):
        return None
    return (
        f"its tokens meet in other places than a masked attention: a response's log-probability "
        f"differs by {float(difference.max()):.2g} from that of padded rows"
    )


def _noise(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    padded: Layout,
    chunk_tokens: int,
    expected: Tensor,
) -> float:
    """The largest difference that scoring every pair by itself makes: less padding, no packing."""
    alone = [pair_logps(model, padded.batch([pair]), chunk_tokens) for pair in pairs]
    again = torch.stack(alone, 1).flatten()
    return float((again - expected).abs().max())
