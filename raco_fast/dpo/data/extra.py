"""Packages that only some data needs: the extra `data`."""

from importlib import import_module
from types import ModuleType


def needed(package: str, what: str) -> ModuleType:
    """A package of the extra `data`, imported.

    Raises:
        ValueError: it is not installed; names what needs it and the command that installs it.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{what}: this kind of data needs the package {package}, which is not installed; "
            f"pip install 'raco-fast[data]'"
        ) from error
