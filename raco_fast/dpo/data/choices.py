"""Fields of a dataclass that hold one of a few words."""

from typing import Any, Literal, get_args, get_origin, get_type_hints


def check_choices(options: Any) -> None:
    """Raise ValueError for a field whose value is none of those that its `Literal` lists."""
    for name, hint in get_type_hints(type(options)).items():
        value = getattr(options, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ValueError(f"`{name}` must be one of {sorted(get_args(hint))}, got {value!r}")
