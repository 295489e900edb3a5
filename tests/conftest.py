"""Fixtures shared by the whole suite."""

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("raco", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("raco")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and oracles beside the checkout; skips where there is none."""
    folder = ROOT.parent / "shared"
    if not (folder / "oracle").is_dir():
        pytest.skip("no ../shared folder beside the checkout (data and oracle are not distributed)")
    return folder
