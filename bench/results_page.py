"""Write docs/results.md from the committed records: `python -m bench.results_page`.

Every number in that page and its pictures comes from bench/results/.
"""

from pathlib import Path

from bench.miniature import report as miniature
from bench.real_run import report as real_run
from bench.theorems import report as theorems

DOCS = Path(__file__).resolve().parent.parent / "docs"


def page() -> str:
    """The text of the page."""
    parts = [
        "# Results",
        "Written by `python -m bench.results_page` from bench/results/. What a step costs in time "
        "and memory is in [performance.md](performance.md), what the noise of the Gram matrix is "
        "in [conflict.md](conflict.md).",
        *miniature.part(),
        *theorems.part(),
        *real_run.part(),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write the page and its pictures."""
    (DOCS / "results.md").write_text(page(), encoding="utf-8")
    (DOCS / "results").mkdir(exist_ok=True)
    miniature.draw(DOCS / "results" / "conflict.png")
    theorems.draw(DOCS / "results" / "theorem-3.1.png")


if __name__ == "__main__":
    main()
