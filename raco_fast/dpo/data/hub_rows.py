"""Rows of data sets that the library `datasets` reads: of the hub, or saved to disk."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raco_fast.dpo.data.extra import needed
from raco_fast.dpo.data.field_use import Fields, FieldUse
from raco_fast.dpo.data.rows import Row

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

HUB = "hub:"
"""What a path begins with that names a data set of the hub."""


def saved_to_disk(folder: Path) -> bool:
    """Whether a folder is what `save_to_disk` of the `datasets` library writes."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def saved_rows(folder: Path, split: str | None, use: FieldUse) -> Iterator[Row]:
    """The rows of a data set that was saved to disk.

    Args:
        split: of several; None where there is one, or none.
        use: notes which fields are read.
    Raises:
        ValueError: `datasets` is not installed, the folder is damaged, or another split is named.
    """
    name = str(folder)
    datasets = needed("datasets", name)
    with _named(datasets, name):
        found = datasets.load_from_disk(name)
    if not isinstance(found, datasets.DatasetDict):
        if split is not None:
            raise ValueError(
                f"`split` of {name} must be left out, got {split!r}: it is one data set, which has "
                f"no splits"
            )
        return _rows(name, found, use)
    return _rows(name, found[_split(name, split, list(found))], use)


def hub_rows(
    path: str, config: str | None, split: str | None, revision: str | None, use: FieldUse
) -> Iterator[Row]:
    """The rows of a data set of the hub, which `datasets` downloads once and keeps.

    Args:
        path: "hub:" and its name; a folder of that name is read in its place, as `datasets` does.
        config, split: of several; None where there is one.
        revision: commit, branch or tag; None: the newest.
        use: notes which fields are read.
    Raises:
        ValueError: `datasets` is not installed, or there is no such data set, config or split.
    """
    datasets = needed("datasets", path)
    name = path.removeprefix(HUB)
    if Path(name).is_dir():
        logger.warning("%s: the folder %s is read, which hides the hub's data set", path, name)
    with _named(datasets, path):
        splits = datasets.get_dataset_split_names(name, config, revision=revision)
    chosen = _split(path, split, splits)
    with _named(datasets, path):
        found = datasets.load_dataset(name, config, split=chosen, revision=revision)
    return _rows(path, found, use)


def _rows(name: str, data_set: "Dataset", use: FieldUse) -> Iterator[Row]:
    for k, values in enumerate(data_set, start=1):
        yield Row(f"{name}:{k}", k, Fields(values, use), use)


def _split(name: str, asked: str | None, splits: list[str]) -> str:
    """The split to read; parts of one, as in "train[:1000]", are the library's to understand."""
    if asked is None and len(splits) == 1:
        return splits[0]
    if asked is None or asked.partition("[")[0] not in splits:
        raise ValueError(f"`split` of {name} must be one of {splits}, got {asked!r}; name it")
    return asked


@contextmanager
def _named(datasets: Any, name: str) -> Iterator[None]:
    """Let what the library raises begin with the data set's name."""
    failures = (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError)
    try:
        yield
    except failures as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{name}: a data set must be one that the library datasets can read, got an error "
            f"({first}); check the name, `config` and `revision`, and the connection"
        ) from error
