"""YAML and JSON as plain values, by PyYAML, with the surprises of YAML 1.1 taken out.

A name is the text that is written: `no:`, `1:` and `null:` are the names "no", "1" and "null". The
words yes, no, on and off are text (YAML 1.2), and `1e-5` is a number. `1:30`, which YAML 1.1 makes
90, is refused, and so are a name given twice and a tag. Aliases and merges (`<<`) are followed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NoReturn

import yaml
from yaml import nodes

MOST_BYTES = 1 << 20
MOST_VALUES = 50_000
DEEPEST = 40

_TAG = "tag:yaml.org,2002:"
_DIGITS = list("-+.0123456789")
_LONG = re.compile(r"[0-9][0-9_:]{250,}|0x[0-9a-fA-F_]{250,}")  # a number that may have no float


class LimitError(ValueError):
    """Text that nothing may read: of too many values, levels or digits, or ambiguous."""


class TextError(ValueError):
    """Text that is no YAML, or not what a config may hold; a setting may hold it as a text."""


class _RefusedError(yaml.MarkedYAMLError):
    def __init__(self, what: str, at: Any, limit: bool) -> None:
        super().__init__(problem=what, problem_mark=at.start_mark)
        self.kind = LimitError if limit else TextError


def _refuse(what: str, at: Any, limit: bool = False) -> NoReturn:
    raise _RefusedError(what, at, limit)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader in Python: the one in C composes beyond the reach of a subclass."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as PyYAML has it

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._open: list[str | None] = []  # anchors of the nodes that are not whole
        self._sizes: dict[Any, int] = {}  # node -> values in it, with those of its aliases

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        tag = getattr(event, "tag", None)
        if isinstance(event, yaml.AliasEvent) and event.anchor in self._open:
            _refuse(f"`*{event.anchor}` must stand after what it names; write it out", event)
        if tag not in (None, "!", f"{_TAG}str"):
            _refuse(f"values must have no tag, got {tag!r}; remove it", event)
        if len(self._open) > DEEPEST:
            rule = f"values must be nested at most {DEEPEST} deep, got more"
            _refuse(f"{rule}; flatten them", event, True)
        self._open.append(event.anchor)
        node = super().compose_node(parent, index)
        self._open.pop()
        if node not in self._sizes:
            each = node.value if isinstance(node, nodes.CollectionNode) else ()
            if isinstance(node, nodes.MappingNode):
                each = [value for _, value in node.value]
            self._sizes[node] = 1 + sum(self._sizes[inner] for inner in each)
        if self._sizes[node] > MOST_VALUES:
            rule = f"a config must hold at most {MOST_VALUES} values, got more"
            _refuse(f"{rule}; are aliases repeated?", event, True)
        return node

    def compose_mapping_node(self, anchor: Any) -> nodes.MappingNode:
        node, names = super().compose_mapping_node(anchor), set()
        for k, (key, value) in enumerate(node.value):
            if not isinstance(key, nodes.ScalarNode):
                _refuse("a name must be a text, got a list or a mapping; correct it", key)
            if key.tag != f"{_TAG}merge":
                if key.value in names:
                    _refuse(f"a name must be given once, got {key.value!r} twice; remove one", key)
                names.add(key.value)
                key = nodes.ScalarNode(f"{_TAG}str", key.value, key.start_mark, key.end_mark)
            node.value[k] = key, value
        return node

    def construct_scalar(self, node: Any) -> str:
        text: str = super().construct_scalar(node)
        if _LONG.search(text):
            _refuse(f"numbers must have at most 250 digits, got {text[:40]}...", node, True)
        # JSON writes a sign beyond U+FFFF as two halves.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")

    def construct_whole(self, node: Any) -> int:
        digits = self.construct_scalar(node).replace("_", "")
        return int(digits, 0 if digits.lstrip("+-")[1:2] in ("x", "o") else 10)

    def construct_ambiguous(self, node: Any) -> NoReturn:
        what = f"numbers must be decimal, got {node.value[:40]}"
        _refuse(f"{what}; write a text in quotes, in a file", node, True)


for _name, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", ["<"]),
    ("int", r"[-+]?([0-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+)", _DIGITS),
    ("float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?", _DIGITS),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", _DIGITS),
    ("ambiguous", r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?", _DIGITS),
):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"({_pattern})$"), _first)
_Loader.add_constructor(f"{_TAG}int", _Loader.construct_whole)
_Loader.add_constructor(f"{_TAG}ambiguous", _Loader.construct_ambiguous)


def load(text: str, where: str = "text") -> Any:
    """The value that YAML or JSON text stands for; None for an empty text.

    Args:
        where: the file, which messages begin with, the line added.
    Raises:
        TextError: no YAML, more than one document, a tag, or a name given twice.
        LimitError: beyond a limit, or `1:30`.
    """
    if text.startswith(("{", "[")):  # JSON may be indented by tabs, YAML not
        text = re.sub(r"(?m)^[ \t]+", lambda found: found[0].expandtabs(), text)
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        start = f"{where}:{mark.line + 1 if mark else 1}:"
        if isinstance(error, _RefusedError):
            raise error.kind(f"{start} {error.problem}") from None
        problem = error.problem or error.context
        raise TextError(f"{start} text must be YAML, got {problem}; correct it") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # A character that YAML does not allow, or an escape that stands for none.
        reason = " ".join(str(error).split())
        raise TextError(f"{where}: text must be YAML, got {reason}; correct it") from error


def read(path: Path, name: str = "config") -> dict[str, Any]:
    """The settings in a YAML or JSON file: a mapping of plain values.

    Args:
        name: of what is read, for messages.
    Raises:
        OSError: no such file, or it cannot be read.
        ValueError: as `load`; it is too large, no UTF-8, no mapping or an empty one.
    """
    if path.is_dir() or not path.exists():
        kind = "a folder" if path.is_dir() else "nothing"
        raise FileNotFoundError(f"`{name}` must be a file, got {path}, which is {kind}; check it")
    with path.open("rb") as file:
        raw = file.read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise LimitError(
            f"{path}: a config must have at most {MOST_BYTES} bytes, got more; is this the data?"
        )
    try:
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = raw.count(b"\n", 0, error.start) + 1, raw[error.start]
        rule = f"text must be UTF-8, got byte 0x{byte:02x}; convert the file"
        raise TextError(f"{path}:{line}: {rule}") from error
    value = load(text, str(path))
    if not isinstance(value, dict) or not value:
        rule = f"a config must be a mapping `name: value`, got {type(value).__name__}"
        raise TextError(f"{path}: {rule} {value or 'of nothing'!s:.40}; see README.md for one")
    return value
