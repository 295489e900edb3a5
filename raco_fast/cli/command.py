"""A command: what it is called and takes, how it runs, and the exit statuses of all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentParser

EXIT_FOUND_WRONG = 1
"""`verify` found that one backward pass is not exact, or `check` what would fail."""
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def _no_options(parser: ArgumentParser) -> None:
    """A command that takes settings alone."""


@dataclass(frozen=True)
class Command:
    """One command.

    Args:
        name: as it is typed.
        summary: in a few words, for the list of commands.
        description: for its own help.
        run: (parser, parsed values) -> the exit status. Raises ValueError, OSError or MemoryError
            for what the user has to mend.
        settings: gives the dataclass whose fields are options of the command. Not called for other
            commands: to read such a class takes a second.
        usage: where the one that argparse makes would list every setting.
        options: adds what is no setting.
        skip: fields of the settings that are no options.
        of_a_file: whether a config file may stand first, without its flag.
        processes: whether it runs on several processes that a launcher has started.
    """

    name: str
    summary: str
    description: str
    run: Callable[[ArgumentParser, Any], int]
    settings: Callable[[], type] | None = None
    usage: str | None = None
    options: Callable[[ArgumentParser], None] = _no_options
    skip: frozenset[str] = frozenset()
    of_a_file: bool = True
    processes: bool = False

    def checked_launch(self) -> None:
        """Raise ValueError where a launcher has started several processes of one command."""
        if self.processes:
            return
        from raco_fast.dpo.launch import launched

        launch = launched()
        if launch is not None and launch.size > 1:
            raise ValueError(
                f"`{self.name}` runs in one process, but a launcher has started {launch.size}, "
                f"which would all do the same; start `raco-fast {self.name}` without torchrun"
            )


def speaks() -> bool:
    """Set up logging; whether this is the process that tells what all of a run have to tell.

    An error of its own each process prints itself.
    """
    from raco_fast.dpo.launch import launched

    launch = launched()
    first = launch is None or launch.rank == 0
    logging.basicConfig(format="raco-fast: %(message)s")
    logging.getLogger("raco_fast").setLevel(logging.INFO if first else logging.ERROR)
    return first
