"""Checkpoints from which a run continues bit for bit.

A checkpoint is a folder `checkpoints/step-<n>`:

    model.safetensors   trained parameters (the adapter's alone with LoRA)
    optimizer.pt        optimizer and learning-rate schedule
    rng.pt              random generators
    state.json          step, run identity, hash of the training data

It is written under another name and renamed, and the previous one is removed only afterwards.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from raco_fast.dpo.files import atomic_folder
from raco_fast.dpo.models import trainable
from raco_fast.optimizer import ClippedCAGradAdamW


@dataclass
class TrainingState:
    """What a checkpoint saves and restores in place.

    Args:
        model: the policy.
        optimizer: its optimizer.
        scheduler: its learning-rate schedule.
        run: JSON-able identity of the run; must agree on load.
        step: completed optimizer steps, which is also the position in the data.
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
        # A full disk is an OSError, a SafetensorError or torch.save's RuntimeError.
        except (OSError, SafetensorError, RuntimeError) as error:
            raise OSError(
                f"checkpoint {destination} could not be written ({error}); "
                f"{latest(folder) or 'no earlier checkpoint'} is untouched: "
                "free some space, then run the same command with --resume"
            ) from error
        for older in _checkpoints(folder):
            if older != destination:
                shutil.rmtree(older)
        return destination

    def _write(self, folder: Path) -> None:
        tensors = {n: p.detach().contiguous() for n, p in trainable(self.model).items()}
        save_file(tensors, folder / "model.safetensors")
        torch.save(
            {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()},
            folder / "optimizer.pt",
        )
        torch.save(_random_state(), folder / "rng.pt")
        state = {"step": self.step, "skipped_steps": self.optimizer.skipped_steps, "run": self.run}
        (folder / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")

    def load(self, checkpoint: Path) -> None:
        """Restore everything from a folder written by `save`."""
        tensors = load_file(checkpoint / "model.safetensors")
        parameters = trainable(self.model)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])
        saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        state = read_state(checkpoint)
        self.step = state["step"]
        self.optimizer.skipped_steps = state["skipped_steps"]
        _set_random_state(torch.load(checkpoint / "rng.pt", weights_only=True))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint: step, skipped_steps and run identity."""
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    return state


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint under `folder`, or None."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def _random_state() -> dict[str, Any]:
    """States of torch's generators; a training step draws from no other."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
