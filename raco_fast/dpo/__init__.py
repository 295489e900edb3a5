"""Multi-objective DPO: scores of preference pairs, their losses and their metrics."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from raco_fast.dpo.data.packed_rows import PackedRows, pair_rows
from raco_fast.dpo.packed import packed_logps

if TYPE_CHECKING:
    from raco_fast.dpo.run.callbacks import Callback
    from raco_fast.dpo.run.from_python import TrainedRun, train

# Public name -> its module, imported when the name is first asked for: the room of runs is above
# this one, and whoever needs the scores alone does not wait for it.
_PLACES = {"Callback": "callbacks", "TrainedRun": "from_python", "train": "from_python"}

__all__ = ["Callback", "PackedRows", "TrainedRun", "packed_logps", "pair_rows", "train"]


def __getattr__(name: str) -> Any:
    """A public name of runs, from its module."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.run.{_PLACES[name]}")
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
