"""Checkpoints from which a run continues bit for bit, on a CPU with the same number of threads.

A checkpoint is a folder `checkpoints/step-<n>`:

    model.safetensors   trained parameters (the adapter's alone with LoRA)
    reference.safetensors   the same of a reference that moves (float32)
    optimizer.pt        optimizer and learning-rate schedule
    rng.pt              random generators, of every process
    state.json          step (which is the position in the data), skipped steps, run identity,
                        evaluation
    checksums.json      size and CRC-32 of every other file

The first process writes it. Of a sharded model no process holds all: each writes its part into
`shards/`, which `raco_fast.dpo.run.shard_files` describes, and what is not cut is where it is
otherwise. Any number of processes, sharded or not, goes on from either.

It is written under another name and renamed when all processes have written and all is on disk.
Which ones are kept is decided in `raco_fast.dpo.run.keeping`. Nothing is written in the background:
until the last file is there a training step would change what is being saved, and a copy of it
takes the memory that is short.
"""

import json
import logging
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from raco_fast.distributed.processes import Processes
from raco_fast.dpo.models import trainable
from raco_fast.dpo.run import shard_files
from raco_fast.dpo.run.checksums import DamagedError, check_checksums, write_checksums
from raco_fast.dpo.run.files import atomic_folder, reported
from raco_fast.dpo.run.moving_reference import MovingReference
from raco_fast.dpo.run.together import by_first, gathered, together
from raco_fast.dpo.sharded import cut_like, device_of, is_sharded
from raco_fast.optim.clipped_cagrad_adamw import ClippedCAGradAdamW

logger = logging.getLogger(__name__)

_REFERENCE = "reference"


@dataclass
class TrainingState:
    """What a checkpoint saves and restores in place.

    `run` identifies the run in plain JSON values, which must agree on load; `step` counts completed
    optimizer steps, and is also the position in the data; `skipped_in_a_row` are those up to here
    that could not be taken; `evaluation` is what is known of the parameters as they are, in plain
    JSON values, the same on all processes. All of `processes` save and load together.
    """

    model: nn.Module
    optimizer: ClippedCAGradAdamW
    scheduler: LambdaLR
    run: dict[str, Any]
    step: int = 0
    skipped_in_a_row: int = 0
    evaluation: dict[str, Any] | None = None
    processes: Processes = field(default_factory=Processes)
    reference: MovingReference | None = None

    def save(self, folder: Path) -> Path:
        """Write `folder/step-<n>`; returns its path.

        Raises:
            OSError: it could not be written whole, by any process; the others are untouched.
        """
        destination = folder / f"step-{self.step:08d}"
        try:
            with ExitStack() as whole:
                self._write(destination, whole)
        except OSError as error:
            raise OSError(f"checkpoint {error}") from error
        return destination

    def _write(self, destination: Path, whole: ExitStack) -> None:
        """Write everything; on the first process `whole` closes when all have written."""
        if self.processes.rank > 0:
            whole.enter_context(reported(destination))
        opened = by_first(self.processes, lambda: whole.enter_context(atomic_folder(destination)))
        partial = Path(self.processes.say(None if opened is None else str(opened.resolve())) or "")
        tensors = {n: p.detach() for n, p in trainable(self.model).items()}
        moved = dict((self.reference and self.reference.weights) or {})
        optimizer = self.optimizer.state_dict()
        if is_sharded(self.model):
            together(self.processes, lambda: _check_shared(partial))
            cut = shard_files.taken_from(optimizer, tensors, moved)
            shard_files.save_shards(partial / "shards", cut)
            tensors, moved = {}, {}
        random = gathered(self.processes, self._random_state())

        def write() -> None:
            for file, weights in (("model", tensors), (_REFERENCE, moved)):
                if weights:
                    contiguous = {name: t.contiguous() for name, t in weights.items()}
                    save_file(contiguous, partial / f"{file}.safetensors")
            content = {"optimizer": optimizer, "scheduler": self.scheduler.state_dict()}
            _torch_save(content, partial / "optimizer.pt")
            _torch_save({"processes": random}, partial / "rng.pt")
            counts = {"step": self.step, "skipped_in_a_row": self.skipped_in_a_row}
            state = {**counts, "run": self.run, "evaluation": self.evaluation}
            (partial / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
            write_checksums(partial)
            whole.close()

        by_first(self.processes, write)

    def _random_state(self) -> dict[str, Tensor | None]:
        # A training step draws from torch's generators of the CPU and of its own device only.
        device = device_of(self.model)
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return {"cpu": torch.get_rng_state(), "cuda": cuda}

    def load(self, checkpoint: Path) -> None:
        """Restore everything from a folder written by `save`.

        The random generators are restored where as many processes have saved them; otherwise they
        stay as they are, which the log says.

        Raises:
            ValueError: its parameters or objectives are not this run's.
            OSError: a file cannot be read.
        """
        files = [checkpoint / name for name in ("optimizer.pt", "rng.pt")]
        saved, random = together(
            self.processes,
            lambda: [torch.load(f, weights_only=True, map_location="cpu") for f in files],
        )
        parameters = trainable(self.model)
        together(self.processes, lambda: _check_names(checkpoint, parameters))
        if shard_files.found(checkpoint):
            moved = self._reference_to_fill(shard_files.has_reference(checkpoint))
            of_run = (parameters, saved["optimizer"], moved)
            shard_files.load_shards(checkpoint / "shards", *of_run)
        else:
            tensors = together(self.processes, lambda: load_file(checkpoint / "model.safetensors"))
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(cut_like(tensors[name], parameter))
                self._load_reference(checkpoint / f"{_REFERENCE}.safetensors")
            _cut_state(saved["optimizer"], list(parameters.values()))
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        state = read_state(checkpoint)
        self.step, self.skipped_in_a_row = state["step"], state["skipped_in_a_row"]
        self.evaluation = state["evaluation"]
        self._restore_random(random["processes"])

    def _reference_to_fill(self, kept: bool) -> dict[str, Tensor]:
        return {} if self.reference is None else self.reference.to_fill(kept)

    def _load_reference(self, file: Path) -> None:
        (kept,) = self.processes.agree(lambda: [file.exists()], 1)
        moved = self._reference_to_fill(kept)
        whole = together(self.processes, lambda: load_file(file) if moved else {})
        for name, weight in moved.items():
            weight.copy_(cut_like(whole[name], weight))

    def _restore_random(self, saved: list[dict[str, Tensor | None]]) -> None:
        rank, size = self.processes.rank, self.processes.size
        if len(saved) != size:
            logger.info(
                "the checkpoint is of %d process(es) and this run has %d: dropout, if there is "
                "any, draws other numbers than it would have done",
                len(saved),
                size,
            )
            return
        cpu, cuda = saved[rank]["cpu"], saved[rank]["cuda"]
        assert cpu is not None
        torch.set_rng_state(cpu)
        if cuda is not None and (device := device_of(self.model)).type == "cuda":
            torch.cuda.set_rng_state(cuda, device)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint: step, run identity, evaluation."""
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    return state


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints under `folder`, from the oldest to the newest; each is whole."""
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def check_whole(checkpoint: Path) -> None:
    """Compare a checkpoint with its checksums.

    Raises:
        ValueError: a file is missing or damaged; says which, and what else there is to go on from.
    """
    try:
        check_checksums(checkpoint)
    except DamagedError as error:
        older = [each for each in checkpoints_in(checkpoint.parent) if each < checkpoint]
        cure = f"to go on from {older[-1]} instead" if older else "and start without --resume"
        raise ValueError(
            f"checkpoint {checkpoint} is damaged: {error}; restore the file, or remove the folder "
            f"{cure}"
        ) from error


def latest(folder: Path) -> Path | None:
    """The newest checkpoint under `folder`, or None."""
    found = checkpoints_in(folder)
    return found[-1] if found else None


def _check_shared(folder: Path) -> None:
    if not folder.is_dir():
        raise OSError(
            f"{folder} is not seen by every process, so its parts would lie on several machines; "
            f"choose an `output_dir` on a file system that all of them share"
        )


def _check_names(checkpoint: Path, parameters: dict[str, nn.Parameter]) -> None:
    """Raise ValueError unless a checkpoint has the parameters of this model."""
    if shard_files.found(checkpoint):
        names = shard_files.parameter_names(checkpoint / "shards")
    else:
        with safe_open(checkpoint / "model.safetensors", "pt") as file:
            names = set(file.keys())
    if names != parameters.keys():
        odd = sorted(names ^ parameters.keys())
        raise ValueError(
            f"checkpoint {checkpoint} must hold the trained parameters of this model, but "
            f"{len(odd)} are in one only, the first {odd[0]!r}; use the versions of "
            "transformers and peft that wrote it"
        )


def _cut_state(optimizer: dict[str, Any], parameters: list[nn.Parameter]) -> None:
    """Cut the state of an optimizer as its parameters are cut, in place."""
    for k, state in optimizer["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameters[k].shape:
                state[key] = cut_like(value, parameters[k])


def _torch_save(content: dict[str, Any], file: Path) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:  # a write that failed, as torch's archive writer puts it
        raise OSError(str(error)) from error
