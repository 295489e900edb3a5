"""Memory that runs out and files that cannot be written, in the middle of a run."""

import errno
import resource
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from killed_runs import forked, run_alone

from raco_fast.cli import program as cli
from raco_fast.distributed.processes import OtherProcessError
from raco_fast.dpo.run import given, reference_cache
from raco_fast.dpo.run.failures import is_out_of_memory, memory_named
from raco_fast.dpo.run.step import PreferenceStep
from raco_fast.dpo.run.trainer import Trainer

BAD_INPUT, INTERRUPTED = 2, 130
CHANGES = {"save_every": 2, "max_steps": 5, "check_every": None, "pairs_per_micro_batch": 4}


@pytest.fixture
def train(train_into):
    """A function that runs the command into a folder of this name; its status."""
    return partial(train_into, CHANGES)


def torch_takes_too_much() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def python_takes_too_much() -> None:
    bytearray(1 << 62)


def gpu_takes_too_much() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore of it")


def no_memory_to_map() -> None:
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


TOO_MUCH = [torch_takes_too_much, python_takes_too_much, gpu_takes_too_much, no_memory_to_map]


@pytest.mark.parametrize("take", TOO_MUCH)
def test_memory_that_runs_out_is_told_from_other_errors(take):
    with (
        pytest.raises(MemoryError, match=r"^memory ran out in step 3 \(.+\); a cure$") as error,
        memory_named("the run", "another"),
        memory_named("step 3", "a cure"),
    ):
        take()
    assert "\n" not in str(error.value)
    assert is_out_of_memory(error.value.__cause__)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shapes differ"), OSError(errno.ENOSPC, "full"), OtherProcessError("bad_alloc")],
)
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(type(error)) as raised, memory_named("step 3", "a cure"):
        raise error
    assert raised.value is error


PHASES = {
    "loading the model": (given, "load_base_model", 1, "set `model.dtype: bf16`", None),
    "the reference's pass over the data": (reference_cache, "pair_logps", 2, "lower `pairs", None),
    "step 1": (PreferenceStep, "__call__", 1, "lower `pairs_per_micro_batch` (4 now)", None),
    "step 4": (PreferenceStep, "__call__", 4, "`model.gradient_checkpointing: true`", 2),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_out_of_memory_says_where_what_helps_and_what_is_left(
    train, monkeypatch, capfd, tmp_path, phase
):
    place, name, call, cure, step = PHASES[phase]
    original, calls = getattr(place, name), []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            torch_takes_too_much()
        return original(*args, **kwargs)

    monkeypatch.setattr(place, name, failing)
    assert train("run") == BAD_INPUT
    (message,) = [x for x in capfd.readouterr().err.splitlines() if "memory ran out" in x]
    assert f"raco-fast: memory ran out in {phase} (" in message
    assert cure in message
    if step is None:
        assert message.endswith(", then start again")
    else:
        found = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        assert message.endswith(f", then add --resume to go on from {found}")


def fill_the_disk(run: Path) -> None:
    (run / "metrics.jsonl").rename(run / "kept")
    (run / "metrics.jsonl").symlink_to("/dev/full")


def mend_the_disk(run: Path) -> None:
    (run / "kept").rename(run / "metrics.jsonl")


def take_the_folder(run: Path) -> None:
    (run / "checkpoints").rename(run / "kept")
    (run / "checkpoints").touch()


def give_the_folder_back(run: Path) -> None:
    (run / "checkpoints").unlink()
    (run / "kept").rename(run / "checkpoints")


def test_a_full_disk_in_the_middle_names_the_file_and_what_is_left(
    train, monkeypatch, capfd, tmp_path, runs
):
    stop_at_step_4(monkeypatch, fill_the_disk)
    assert train("run") == BAD_INPUT
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert "metrics.jsonl could not be written ([Errno 28] No space left on device)" in message
    assert message.endswith(f"go on from {tmp_path / 'run' / 'checkpoints' / 'step-00000002'}")
    mend_the_disk(tmp_path / "run")
    monkeypatch.undo()
    assert_ends_as_undisturbed(train, runs, tmp_path)


def test_a_folder_that_cannot_be_written_any_more(train, monkeypatch, capfd, tmp_path, runs):
    stop_at_step_4(monkeypatch, take_the_folder)
    assert train("run") == BAD_INPUT
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert "checkpoint " in message
    assert "step-00000004 could not be written (" in message
    give_the_folder_back(tmp_path / "run")
    monkeypatch.undo()
    assert_ends_as_undisturbed(train, runs, tmp_path)


def stop_at_step_4(monkeypatch, act) -> None:
    step = Trainer._step

    def disturbed(self, progress):
        if self.state.step == 3:
            act(self.config.folder)
        step(self, progress)

    monkeypatch.setattr(Trainer, "_step", disturbed)


def assert_ends_as_undisturbed(train, runs, tmp_path) -> None:
    assert train("run", "--resume") == 0
    assert train("whole") == 0
    runs.assert_same_run(*(SimpleNamespace(folder=tmp_path / n) for n in ("run", "whole")))


@pytest.mark.slow
def test_a_limit_of_memory_in_the_middle_names_the_checkpoint(settings, save_tiny, tmp_path):
    """RLIMIT_AS so many MiB above what a resumed process has before its first step.

    Its gradients have no place yet: twice 41 MB for the vocabulary alone, more than malloc keeps of
    what was freed before. Libraries in Rust end the process where they get no memory.
    """
    big = save_tiny(vocab_size=40_000, hidden_size=256, tie_word_embeddings=True)
    model = settings["model"] | {"name": str(big)}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings | CHANGES | {"model": model, "max_steps": 3}))
    found = run_alone(limited, file, tmp_path, (0, 30, 60, 300), folder=tmp_path, timeout=600)
    assert [status for status, _ in found.values()].count(BAD_INPUT) >= 2, found
    assert found[300][0] == 0, found[300]
    for limit, (status, printed) in found.items():
        assert status in (0, BAD_INPUT, -signal.SIGABRT), (limit, printed)
        assert "Traceback" not in printed, (limit, printed)
        if status == BAD_INPUT:
            assert "memory ran out in " in printed, (limit, printed)
            assert "then add --resume to go on from " in printed, (limit, printed)
            assert "step-00000002" in printed, (limit, printed)


def limited(file: Path, folder: Path, limits: tuple[int, ...]) -> dict[int, tuple[int, str]]:
    step, found, start = Trainer._step, {}, folder / "start"

    def run(output: Path, before_step: Callable[[Trainer], None], *arguments: str) -> int:
        def disturbed(self: Trainer, progress: Any) -> None:
            before_step(self)
            step(self, progress)

        Trainer._step = disturbed  # type: ignore[method-assign]
        return cli.main(["train", str(file), "--output_dir", str(output), *arguments])

    def stop(trainer: Trainer) -> None:
        if trainer.state.step == 1:
            signal.raise_signal(signal.SIGTERM)

    assert forked(lambda: run(start, stop), folder / "printed") == INTERRUPTED
    for more in limits:
        output, printed = folder / f"run-{more}", folder / f"printed-{more}"
        shutil.copytree(start, output)

        def limit(trainer: Trainer, more: int = more) -> None:
            if trainer.state.step > 2:
                return
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + (more << 20)
            resource.setrlimit(resource.RLIMIT_AS, (most, most))

        status = forked(partial(run, output, limit, "--resume"), printed)
        found[more] = (status, printed.read_text())
    return found
