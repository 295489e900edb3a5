"""Packages that some contestants need and a machine may lack."""

from __future__ import annotations

from importlib.util import find_spec

NEEDED = {"slsqp": ("scipy",), "torchjd": ("torchjd", "cvxpy", "clarabel")}
"""Contestant -> packages; those that are not listed need none."""


def obstacle(contestant: str) -> str | None:
    """Why a contestant cannot run here, with the cure; None if it can."""
    missing = [name for name in NEEDED.get(contestant, ()) if find_spec(name) is None]
    if not missing:
        return None
    return f"not run: {', '.join(missing)} missing; pip install 'raco-fast[bench]'"
