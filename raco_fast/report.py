"""What every report is made of: tables, and shares with their uncertainty."""

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist


def wilson_interval(share: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Binomial score interval of a share measured on n trials.

    Args:
        share: successes / n, in [0, 1].
        n: trials, at least 1.
        confidence: coverage aimed at.
    Returns:
        (low, high), within [0, 1].
    Raises:
        ValueError: an argument outside its range.
    Source: Wilson, J. Am. Stat. Assoc. 22 (1927).
    """
    if n < 1:
        raise ValueError(f"`n` must be at least 1, got {n}; there is no share of no trials")
    if not (0 <= share <= 1 and 0 < confidence < 1):
        raise ValueError(
            f"`share` must be in [0, 1] and `confidence` in (0, 1), got {share} and {confidence}"
        )
    z2 = NormalDist().inv_cdf(0.5 + confidence / 2) ** 2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # At a share of 0 or 1 rounding would leave the share itself outside.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def share_with_interval(share: float | None, n: int) -> str:
    """A share on n trials and its 95 % Wilson interval; "-" for None (a model that diverged)."""
    if share is None:
        return "-"
    low, high = wilson_interval(share, n)
    return f"{share:.1%} ({low:.1%} to {high:.1%})"


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table without a final newline."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table for a terminal, its columns aligned, without a final newline."""
    lines = [titles, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
