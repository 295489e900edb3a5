"""Random pair scores with a graph, for tests of losses."""

import torch

from raco_fast.dpo.losses.pair_scores import PairScores


def make_scores(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> PairScores:
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float) -> torch.Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float64).mul(scale).to(dtype)

    logps_a, logps_b = draw(6.0) - 30, draw(6.0) - 40
    return PairScores(
        logps_a.requires_grad_(),
        logps_b.requires_grad_(),
        logps_a.detach() + draw(2.0),
        logps_b.detach() + draw(2.0),
        torch.arange(3, 3 + n).to(dtype),
        torch.arange(7, 7 + 2 * n, 2).to(dtype),
        draw(0.5),
        draw(0.5),
    )


def swapped(scores: PairScores) -> PairScores:
    """The same pairs with a and b exchanged."""
    return PairScores(
        scores.logps_b,
        scores.logps_a,
        scores.ref_logps_b,
        scores.ref_logps_a,
        scores.tokens_b,
        scores.tokens_a,
        scores.other_b,
        scores.other_a,
    )
