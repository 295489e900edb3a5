"""Paths as people write them."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: str | Path, name: str = "path") -> Path:
    """`path` with a leading `~` or `~user` replaced by that home folder; nothing else changes.

    Args:
        name: of the setting, for the message.
    Raises:
        ValueError: no path at all, one that no file system takes (a NUL, text that is not UTF-8),
            or the home folder is not known.
    """
    text = str(path)
    if not text:
        raise ValueError(
            f"`{name}` must name a file or a folder, got an empty text; write '.' for "
            f"the working directory"
        )
    if "\0" in text:
        raise ValueError(f"`{name}` must have no NUL character, got {text!r}; remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"`{name}` must be UTF-8 text, got {text!r} (at {error.start}); rename the file or "
            f"folder"
        ) from error
    found = os.path.expanduser(text)  # Path("./~").expanduser() would be the home folder
    if found.startswith("~"):
        raise ValueError(
            f"`{name}` begins with '~', got {text!r}, and that home folder is not known here; "
            f"write the whole path, set HOME, or write './~' for a name that begins so"
        )
    return Path(found)
