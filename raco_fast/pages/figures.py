"""How figures look and are written; matplotlib is optional, and imported where one is drawn."""

from __future__ import annotations

import io
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colors, told apart by color-blind readers too, and hollow markers of different
# shapes, as lines may lie on each other.
LOOKS = {
    "color": ("black", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"),
    "marker": ("*", "o", "s", "^", "D", "v", "P"),
}
NO_PICTURE = (
    "The plot is left out because matplotlib is not installed: pip install 'raco-fast[plot]'"
)


def has_pictures() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def color_of(place: int) -> str:
    """One for each place in an order."""
    return LOOKS["color"][place % len(LOOKS["color"])]


def plain(axes: Axes) -> None:
    """A light grid, and no frame where nothing is."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def svg_of(figure: Figure) -> str:
    """A figure as the text of an SVG element, the same text every time."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "raco-fast"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    whole = text.getvalue()
    return whole[whole.index("<svg") :]
