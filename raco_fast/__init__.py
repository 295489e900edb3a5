"""raco_fast: align a model to several conflicting preferences, m objectives at the price of one.

The method is RACO with CAGrad-Clip (arXiv 2602.02495). `ClippedCAGradAdamW` is the optimizer,
`combine` serves any other optimizer, `solve_dual` is the m-dimensional problem behind both, and
`raco_fast.dpo` trains language models on preference pairs.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raco_fast.backends.choose import backend
    from raco_fast.engine.declaration import sequences
    from raco_fast.engine.layer_rules import register_layer_rule
    from raco_fast.engine.layer_rules import register_rule as register_rule
    from raco_fast.engine.prepare import prepare
    from raco_fast.gradients.objective_gradients import ObjectiveGradients
    from raco_fast.optim.clipped_cagrad_adamw import ClippedCAGradAdamW
    from raco_fast.optim.combine import combine
    from raco_fast.optim.gram_first import gram_first
    from raco_fast.solver.dual import solve_dual
    from raco_fast.solver.registry import register_combination_rule
    from raco_fast.solver.rule import Rule
    from raco_fast.solver.solution import DualSolution
    from raco_fast.verification import verify

__version__ = version("raco-fast")

# Public name -> its module, imported when the name is first asked for: `raco-fast --help` and
# whoever needs one part do not wait seconds for torch and all others.
_PLACES = {
    "backend": "backends.choose",
    "sequences": "engine.declaration",
    "register_layer_rule": "engine.layer_rules",
    "register_rule": "engine.layer_rules",
    "prepare": "engine.prepare",
    "ObjectiveGradients": "gradients.objective_gradients",
    "ClippedCAGradAdamW": "optim.clipped_cagrad_adamw",
    "combine": "optim.combine",
    "gram_first": "optim.gram_first",
    "solve_dual": "solver.dual",
    "register_combination_rule": "solver.registry",
    "Rule": "solver.rule",
    "DualSolution": "solver.solution",
    "verify": "verification",
}

__all__ = [
    "ClippedCAGradAdamW",
    "DualSolution",
    "ObjectiveGradients",
    "Rule",
    "__version__",
    "backend",
    "combine",
    "gram_first",
    "prepare",
    "register_combination_rule",
    "register_layer_rule",
    "sequences",
    "solve_dual",
    "verify",
]


def __getattr__(name: str) -> Any:
    """A public name, from its module."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
