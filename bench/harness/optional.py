"""Packages that some of what is measured needs, and a machine may lack."""

from importlib.util import find_spec

NEEDED = {
    "slsqp": ("scipy",),
    "torchjd": ("torchjd", "cvxpy", "clarabel"),
    "trl": ("trl",),
    "lora": ("peft",),
}
"""Contestant or kind of training -> packages; those that are not listed need none."""


def obstacle(what: str) -> str | None:
    """Why a contestant or kind cannot run here, with the cure; None if it can."""
    missing = [name for name in NEEDED.get(what, ()) if find_spec(name) is None]
    if not missing:
        return None
    return f"not run: {', '.join(missing)} missing; pip install {' '.join(missing)}"
