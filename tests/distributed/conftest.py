"""Fixtures for tests on several processes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import processes
import pytest


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., list[Any]]:
    """`processes.run` with its files in tmp_path."""
    return partial(processes.run, folder=tmp_path)


@pytest.fixture
def outcomes(tmp_path: Path) -> Callable[..., list[Any]]:
    """`processes.outcomes` with its files in tmp_path."""
    return partial(processes.outcomes, folder=tmp_path)
