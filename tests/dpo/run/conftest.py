"""The command line in the tests' own process."""

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from raco_fast.cli import program as cli


@pytest.fixture(autouse=True)
def quiet_logging() -> Iterator[None]:
    """`main` sets up logging; the next test must not inherit it."""
    root, own = logging.getLogger(), logging.getLogger("raco_fast")
    before = (list(root.handlers), own.level)
    yield
    root.handlers[:], own.level = before


@pytest.fixture
def config_file(settings, tmp_path: Path) -> Callable[..., str]:
    """A function that writes a YAML file of the settings, changed by its arguments."""

    def write(**changes: Any) -> str:
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(settings | changes))
        return str(file)

    return write


@pytest.fixture
def train_into(config_file, tmp_path: Path) -> Callable[..., int]:
    """A function (changed settings, folder's name, *arguments) -> status of the command."""

    def run(changes: Mapping[str, Any], name: str, *arguments: str) -> int:
        folder = str(tmp_path / name)
        return cli.main(["train", config_file(**changes), "--output_dir", folder, *arguments])

    return run
