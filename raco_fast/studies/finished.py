"""A finished run on disk: what it was, what it came to, whether it is the run that is asked for.

A run of a sweep writes `finished.json` when it has ended, so that neither a checkpoint nor a model
is needed to know it. Of a run of `raco-fast train` alone, its last checkpoint tells the same.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from raco_fast.dpo.data.files import files_of, is_file
from raco_fast.dpo.run.checkpoint import latest, read_state
from raco_fast.dpo.run.config import TrainConfig
from raco_fast.dpo.run.files import atomic_file
from raco_fast.dpo.run.identity import compared, default_of, identity
from raco_fast.dpo.run.metrics_file import is_evaluation, read_records
from raco_fast.settings.paths import expanded
from raco_fast.settings.plain import shown

NAME = "finished.json"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Finished:
    """A finished run.

    Args:
        run: what identifies it, as in its checkpoints: `identity` under "settings", hashes of its
            training pairs, model and held-out pairs under "data", "model" and "held_out", and
            "total_steps".
        evaluation: the last record of metrics.jsonl with `eval_` metrics; empty without held-out
            pairs.
        threads: that torch had; None where it is not known.
        seconds: of the training steps together.
        inputs: file or folder that it read -> SHA-256 of the content.
    """

    run: dict[str, Any]
    evaluation: dict[str, Any]
    threads: int | None
    seconds: float
    inputs: dict[str, str]

    @property
    def settings(self) -> dict[str, Any]:
        """All settings of the run, as plain values."""
        settings: dict[str, Any] = self.run["settings"]
        return settings

    def differences(self, config: TrainConfig) -> list[str]:
        """Each setting or input in which another run is wanted, with both values; none: it is it.

        Settings that change nothing that is learnt may differ, held-out pairs may not.
        """
        saved, now = dict(self.settings), identity(config)
        if config.model.dtype == "auto":  # what it has stood for
            now["model"]["dtype"] = saved["model"]["dtype"]
        before, wanted = compared(saved), compared(now)
        for each, of in ((before, saved), (wanted, now)):
            each["eval_data"] = of["eval_data"]
        both = {
            key: [of.get(key, default_of(key)) for of in (before, wanted)]
            for key in sorted(before.keys() | wanted.keys())
        }
        found = [f"{k}: {shown(a)} there, {shown(b)} now" for k, (a, b) in both.items() if a != b]
        contents = inputs_of(config)
        changed = [name for name, digest in self.inputs.items() if contents.get(name) != digest]
        return found or [f"the content of {name} has changed" for name in sorted(changed)]


def write_finished(config: TrainConfig, threads: int) -> None:
    """Note that the run in `config.folder` has come to its end, which its last checkpoint tells.

    Raises:
        OSError: it could not be written.
    """
    found = _from_checkpoint(config.folder)
    assert found is not None
    noted = Finished(found.run, found.evaluation, threads, found.seconds, inputs_of(config))
    with atomic_file(config.folder / NAME) as partial:
        partial.write_text(json.dumps(asdict(noted), indent=1), encoding="utf-8")


def read_finished(folder: Path) -> Finished | None:
    """The finished run in a folder; None if there is none, or one that has not come to its end.

    Raises:
        ValueError: a file in it is damaged (named).
    """
    file = folder / NAME
    if not file.is_file():
        return _from_checkpoint(folder)
    try:
        return Finished(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{file} must be what a finished run writes, got {error}; remove it, and the run is "
            f"recognised by its checkpoint, or made again"
        ) from error


def inputs_of(config: TrainConfig) -> dict[str, str]:
    """File or folder that a run reads -> SHA-256 of its content; hub names are left out."""
    model = config.model
    names = [model.name, model.tokenizer, model.base]
    for source in (*config.data, *config.eval_data):
        names += [path for path in files_of(source.path) if is_file(path)]
    paths = {name: expanded(name) for name in names if name is not None}
    return {name: _digest(path.resolve()) for name, path in paths.items() if path.exists()}


def _from_checkpoint(folder: Path) -> Finished | None:
    newest = latest(folder / "checkpoints")
    if newest is None:
        return None
    state = read_state(newest)
    if state["step"] < state["run"]["total_steps"] or not (folder / "model").is_dir():
        return None
    records = read_records(folder / "metrics.jsonl")
    seconds = sum(record.get("seconds", 0.0) for record in records)
    last = [r for r in records if is_evaluation(r) and r["step"] == state["step"]][-1:]
    return Finished(state["run"], last[0] if last else {}, None, seconds, {})


def _digest(path: Path) -> str:
    """Of a file, or of the names and contents of all files in a folder."""
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    stats = [file.stat() for file in files]
    return _read(
        path, tuple((f, s.st_size, s.st_mtime_ns) for f, s in zip(files, stats, strict=True))
    )


@lru_cache
def _read(path: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    """Once for all runs that have the same input."""
    digest = hashlib.sha256()
    for file, size, _ in files:
        digest.update(f"{file.relative_to(path)}\0{size}\0".encode())
        with file.open("rb") as opened:
            while block := opened.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()
