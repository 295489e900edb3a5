"""One message for whatever transformers, PEFT and tokenizers raise on what they cannot load."""

from __future__ import annotations

import pickle
import struct
import zipfile
from contextlib import AbstractContextManager
from types import TracebackType

from huggingface_hub.errors import EntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError

# The libraries read a folder's JSON files without checking them, so a value of another type comes
# out as whatever the first operation on it raises.
_ON_DAMAGE = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, EOFError),
    *(RuntimeError, ImportError, AssertionError, MemoryError, pickle.UnpicklingError),
    *(zipfile.BadZipFile, struct.error, SafetensorError, StrictDataclassError, EntryNotFoundError),
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
        raise ValueError(
            f"`{self._argument}`: {self._what!r} cannot be loaded: {kind_of}{said[:400]}; "
            f"{self._cure_of(error)}"
        ) from error

    def _cure_of(self, error: BaseException) -> str:
        if isinstance(error, ImportError):
            return "install it"
        if "trust_remote_code" in str(error):
            return "read that code, and set `model.trust_remote_code: true` if you trust it"
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return "free memory, use a smaller `model.dtype`, or mend a damaged file"
        return self._cure
