"""raco_fast: align a model to several conflicting preferences, m objectives at the price of one.

The method is RACO with CAGrad-Clip (arXiv 2602.02495). `ClippedCAGradAdamW` is the optimizer,
`combine` serves any other optimizer, `solve_dual` is the m-dimensional problem behind both, and
`raco_fast.dpo` trains language models on preference pairs.
"""

from importlib.metadata import version

from raco_fast.dual import DualSolution, solve_dual
from raco_fast.gradients import ObjectiveGradients, combine
from raco_fast.ops import backend
from raco_fast.optimizer import ClippedCAGradAdamW

__version__ = version("raco-fast")

__all__ = [
    "ClippedCAGradAdamW",
    "DualSolution",
    "ObjectiveGradients",
    "__version__",
    "backend",
    "combine",
    "solve_dual",
]
