"""From a command line to an exit status."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from jsonargparse import ArgumentError, ArgumentParser

from raco_fast import __version__
from raco_fast.cli.command import EXIT_BAD_INPUT, EXIT_INTERRUPTED, Command
from raco_fast.cli.of_models import OF_MODELS
from raco_fast.cli.of_runs import OF_RUNS
from raco_fast.cli.of_studies import OF_STUDIES
from raco_fast.settings.parsing import add_settings, new_parser, parsed

COMMANDS = {command.name: command for command in (*OF_RUNS, *OF_MODELS, *OF_STUDIES)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the process's exit status.

    0 done, 1 `verify` found that one backward pass is not exact, or `check` what would fail, 2 bad
    input, a run that diverged, a full disk, no more memory, another process of the run is gone, or
    a run of a sweep failed (a message on stderr says what and how to mend it), 130 stopped by
    Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP.
    """
    with _stopped_by_signals():
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        except KeyboardInterrupt:
            print("raco-fast: stopped", file=sys.stderr)
            return EXIT_INTERRUPTED


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGUSR1 are a Ctrl-C, so that a run says what is left of it.

    Only where they would end the process without a word, and in the main thread, which alone can
    handle signals.
    """
    taken = []
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGUSR1):
            if signal.getsignal(number) is signal.SIG_DFL:
                taken.append(number)
                signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _run(arguments: list[str]) -> int:
    name = arguments[0] if arguments else None
    command = COMMANDS.get(name or "")
    takes_file = command is not None and command.of_a_file
    if takes_file and len(arguments) > 1 and not arguments[1].startswith("-"):
        arguments.insert(1, "--config")
    try:
        parser = parser_of(command)
        kind = command.settings() if command is not None and command.settings else None
        values = parsed(parser, arguments, kind)
        chosen = COMMANDS[values.subcommand]
        chosen.checked_launch()
        return chosen.run(parser, values)
    except ArgumentError as error:
        about = "raco-fast" if command is None else f"raco-fast {command.name}"
        print(f"raco-fast: {error}\nsee {about} --help", file=sys.stderr)
        return EXIT_BAD_INPUT
    except (ValueError, OSError, MemoryError) as error:
        print(f"raco-fast: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def parser_of(wanted: Command | None) -> ArgumentParser:
    """The parser of all commands, with the settings of one alone: reading types takes seconds."""
    about = "Align language models to several conflicting preferences."
    parser = new_parser(prog="raco-fast", description=about, version=__version__)
    commands = parser.add_subcommands(required=True)
    for command in COMMANDS.values():
        own = new_parser(usage=command.usage, description=command.description)
        command.options(own)
        if command is wanted and command.settings is not None:
            add_settings(own, command.settings(), skip=set(command.skip))
        commands.add_subcommand(command.name, own, help=command.summary)
    return parser
