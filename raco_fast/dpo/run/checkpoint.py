"""Checkpoints from which a run continues bit for bit, on a CPU with the same number of threads.

A checkpoint is a folder `checkpoints/step-<n>`:

    model.safetensors   trained parameters (the adapter's alone with LoRA)
    optimizer.pt        optimizer and learning-rate schedule
    rng.pt              random generators
    state.json          step (which is the position in the data) and run identity

It is written under another name and renamed, and the previous one is removed only afterwards.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from raco_fast.dpo.models import trainable
from raco_fast.dpo.run.files import atomic_folder
from raco_fast.optim.clipped_cagrad_adamw import ClippedCAGradAdamW


@dataclass
class TrainingState:
    """What a checkpoint saves and restores in place.

    `run` identifies the run in plain JSON values, which must agree on load; `step` counts completed
    optimizer steps, and is also the position in the data.
    """

    model: nn.Module
    optimizer: ClippedCAGradAdamW
    scheduler: LRScheduler
    run: dict[str, Any]
    step: int = 0

    def save(self, folder: Path) -> Path:
        """Write `folder/step-<n>`, then remove older checkpoints; returns its path.

        Raises:
            OSError: it could not be written whole; the previous checkpoint is untouched.
        """
        destination = folder / f"step-{self.step:08d}"
        try:
            with atomic_folder(destination) as partial:
                self._write(partial)
        except OSError as error:
            earlier = latest(folder)
            cure = f"then add --resume to go on from {earlier}" if earlier else "then start again"
            raise OSError(f"checkpoint {error}, {cure}") from error
        for older in _checkpoints(folder):
            if older != destination:
                shutil.rmtree(older)
        return destination

    def _write(self, folder: Path) -> None:
        tensors = {n: p.detach().contiguous() for n, p in trainable(self.model).items()}
        save_file(tensors, folder / "model.safetensors")
        _torch_save(
            {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()},
            folder / "optimizer.pt",
        )
        # A training step draws from torch's generators only.
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        _torch_save({"cpu": torch.get_rng_state(), "cuda": cuda}, folder / "rng.pt")
        state = {"step": self.step, "run": self.run}
        (folder / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")

    def load(self, checkpoint: Path) -> None:
        """Restore everything from a folder written by `save`.

        Raises:
            ValueError: its parameters or objectives are not this run's.
        """
        tensors = load_file(checkpoint / "model.safetensors")
        parameters = trainable(self.model)
        if tensors.keys() != parameters.keys():
            odd = sorted(tensors.keys() ^ parameters.keys())
            raise ValueError(
                f"checkpoint {checkpoint} must hold the trained parameters of this model, but "
                f"{len(odd)} are in one only, the first {odd[0]!r}; use the versions of "
                "transformers and peft that wrote it"
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])
        saved = torch.load(checkpoint / "optimizer.pt", weights_only=True, map_location="cpu")
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        self.step = read_state(checkpoint)["step"]
        random = torch.load(checkpoint / "rng.pt", weights_only=True)
        torch.set_rng_state(random["cpu"])
        if random["cuda"]:
            torch.cuda.set_rng_state_all(random["cuda"])


def read_state(checkpoint: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint: step and run identity."""
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    return state


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint under `folder`, or None."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def _torch_save(content: dict[str, Any], file: Path) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:  # a write that failed, as torch's archive writer puts it
        raise OSError(str(error)) from error
