"""jsonargparse behind a guard: what it is given is checked, and so is what it made of that."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args

from jsonargparse import (  # type: ignore[attr-defined] # its __all__ is computed
    ActionConfigFile,
    ArgumentError,
    ArgumentParser,
    set_loader,
)

from raco_fast.settings.paths import expanded
from raco_fast.settings.plain import check, fields_of, members_of
from raco_fast.settings.text import TextError, load, read

Kind = TypeVar("Kind")
_UNKNOWN = re.compile(r"(?:unrecognized arguments: --|option ')([^ =']+)", re.IGNORECASE)

set_loader("raco_fast", load, (ValueError,))


def new_parser(**options: Any) -> ArgumentParser:
    """An `ArgumentParser` that reads values by `load`, and raises where another would exit."""
    return ArgumentParser(
        parser_mode="raco_fast", exit_on_error=False, allow_abbrev=False, **options
    )


class _ConfigFile(ActionConfigFile):
    kind: type

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: Any = None) -> None:
        path = expanded(values, "config")
        given = read(path)
        try:
            check(given, "", self.kind)
            if "config" in given:
                raise ValueError("`config` is no setting; give --config once for each file")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        # Not the path, which it would read again, without the limits.
        super().__call__(parser, cfg, _text(given), option_string)  # type: ignore[no-untyped-call]


def _text(given: Mapping[str, Any]) -> str:
    """Settings as jsonargparse reads them; YAML has no bare DEL."""
    return json.dumps(given).replace("\x7f", "\\u007f")


def add_settings(parser: ArgumentParser, kind: type, skip: set[str]) -> None:
    """Options `--config`, of which there may be several, and one for each field of `kind`."""
    action = type("ConfigFile", (_ConfigFile,), {"kind": kind})
    parser.add_argument("--config", action=action, help="YAML or JSON file of settings")
    parser.add_class_arguments(kind, skip=skip & {*fields_of(kind)})


def parsed(parser: ArgumentParser, arguments: Sequence[str], kind: type | None) -> Any:
    """`parser.parse_args(arguments)`, with a reason or the nearest name in the message.

    Raises:
        ArgumentError: an unknown option or setting, one without its value or missing, or a value
            of another kind.
        ValueError: what jsonargparse cannot be given.
    """
    refused = [reason for argument in arguments if (reason := _check_argument(argument))]
    try:
        return parser.parse_args(list(arguments))
    except ArgumentError as error:
        reasons = [reason for value, reason in refused if value in str(error)]
        raise ArgumentError(None, _explained(error, kind, reasons)) from error


def _explained(error: ArgumentError, kind: type | None, reasons: Sequence[str] = ()) -> str:
    """The message in one line, with the nearest name of a setting and other `reasons`."""
    message, near = " ".join(str(error).split()), []
    if kind and (unknown := _UNKNOWN.search(message)):
        near = difflib.get_close_matches(unknown[1], {*_names(kind)} - {unknown[1]}, 1)
    return "; ".join([message[:2000], *reasons, *(f"did you mean {name!r}?" for name in near)])


def _check_argument(argument: str) -> tuple[str, str] | None:
    """Refuse what jsonargparse must not see; (value, reason) of a value that is no YAML."""
    name, _, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    check(argument, "arguments")
    check(dict.fromkeys(name.split(".")))
    try:
        check(load(value, "its text"), name or "arguments")
    except TextError as error:  # a text may be no YAML, as a chat template that begins with "{"
        return value, str(error)
    return None


def _names(kind: Any, prefix: str = "") -> Iterator[str]:
    """The names of all settings and of the groups that they are in, with and without dots."""
    for name, hint in fields_of(kind).items():
        yield from (name, prefix + name)
        for member in (m for h in members_of(hint) for m in (h, *get_args(h))):
            if dataclasses.is_dataclass(member):
                yield from _names(member, f"{prefix}{name}.")


def made(parser: ArgumentParser, values: Any, kind: type[Kind]) -> Kind:
    """The `kind` that parsed values of a subcommand stand for.

    Raises:
        ValueError: as `check`, or what `kind` itself refuses.
    """
    command = values.subcommand
    return _built(kind, values[command], lambda: parser.instantiate(values)[command])


def from_settings(kind: type[Kind], given: Mapping[str, Any]) -> Kind:
    """The `kind` that plain values stand for, as the same in a config file would.

    Raises:
        ValueError: as `parsed` and `made`.
    """
    check(given, "", kind)
    parser = _parser_of(kind)
    try:
        values = parser.parse_string(_text(given))
    except ArgumentError as error:
        raise ValueError(_explained(error, kind)) from error
    return _built(kind, values, lambda: parser.instantiate(values))


_PARSERS: dict[type, ArgumentParser] = {}


def _parser_of(kind: type) -> ArgumentParser:
    """Built once: reading all types of a config takes seconds."""
    if kind not in _PARSERS:
        _PARSERS[kind] = new_parser()
        add_settings(_PARSERS[kind], kind, skip=set())
    return _PARSERS[kind]


def _built(kind: type[Kind], values: Any, instantiated: Callable[[], Any]) -> Kind:
    plain, names = values.as_dict(), fields_of(kind)
    check({name: plain[name] for name in names}, "", kind)
    try:
        options = instantiated()
        return kind(**{name: options[name] for name in names})
    except TypeError as error:  # of a value within, such as a rule's option of another kind
        raise ValueError(str(error)) from error
