"""One message for whatever transformers, PEFT and tokenizers raise on what they cannot load."""

from __future__ import annotations

import pickle
import zipfile
from contextlib import AbstractContextManager
from types import TracebackType

from huggingface_hub.errors import EntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError

# The libraries read a folder's JSON files without checking them, so a value of another type comes
# out as whatever the first operation on it raises.
_ON_DAMAGE = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, EOFError),
    *(RuntimeError, ImportError, AssertionError, UnicodeError, pickle.UnpicklingError),
    *(zipfile.BadZipFile, SafetensorError, StrictDataclassError, EntryNotFoundError),
)


class LoadErrors(AbstractContextManager[None]):
    """A block in which a library loads `what`; what it raises becomes a ValueError that names it.

    Args:
        argument: the setting that says what to load, such as `model.name`.
        what: its value, or what was made of it.
        cure: what the user can do.
    """

    def __init__(self, argument: str, what: str, cure: str) -> None:
        self._argument, self._what, self._cure = argument, what, cure

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            return
        # tokenizers raises Exception itself, and its Rust code's panics, on a damaged file.
        bare = type(error) is Exception or type(error).__name__ == "PanicException"
        if not bare and not isinstance(error, _ON_DAMAGE):
            return
        plain = bare or isinstance(error, OSError | ImportError | SafetensorError)
        kind_of = "" if plain or type(error) is ValueError else f"{type(error).__name__}: "
        said = " ".join(str(error).split())
        cure = "install it" if isinstance(error, ImportError) else self._cure
        raise ValueError(
            f"`{self._argument}`: {self._what!r} cannot be loaded: {kind_of}{said[:400]}; {cure}"
        ) from error
