"""A figure as a PNG file; matplotlib is optional."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from raco_fast.dpo.run.files import atomic_file
from raco_fast.pages.figures import NO_PICTURE

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_two(destination: Path, height: float, draw: Callable[[Axes, Axes], None]) -> str:
    """Write a PNG of two plots side by side, replaced as a whole.

    Args:
        height: in inches; it is 11 wide.
        draw: gets the left and the right one.
    Returns:
        An empty string, or, where matplotlib is not installed, a sentence that says that the
        picture is left out and how to get it.
    Raises:
        OSError: it could not be written.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return NO_PICTURE
    figure = Figure(figsize=(11, height), layout="constrained")
    draw(*figure.subplots(1, 2))
    destination.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(destination) as partial:
        figure.savefig(partial, format="png", dpi=150)
    return ""
