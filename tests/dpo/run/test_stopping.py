"""Ctrl-C, SIGTERM and SIGUSR1 in every phase of a run: what is said, what is kept, what follows."""

import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest
from killed_runs import run_alone
from safetensors.torch import load_file

from raco_fast.dpo.run import checkpoint as checkpoint_module
from raco_fast.dpo.run import evaluation as evaluation_module
from raco_fast.dpo.run import given, model_card, reference_cache
from raco_fast.dpo.run.checkpoint import checkpoints_in
from raco_fast.dpo.run.interrupt import Interrupt
from raco_fast.dpo.run.step import PreferenceStep

INTERRUPTED = 130
CHANGES = {"pairs_per_step": 8, "eval_every": 2, "save_every": 3, "check_every": None}
CHANGES |= {"max_steps": 4, "pairs_per_micro_batch": 4}


@pytest.fixture(autouse=True)
def a_hangup_is_not_ignored():
    """As it is where the tests were started by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def train(train_into):
    """A function that runs the command into a folder of this name; its status."""
    return partial(train_into, CHANGES)


def signal_at(monkeypatch, place, name: str, call: int, number: signal.Signals) -> None:
    """Send this process a signal within the n-th call of a function, counted from 1."""
    original, calls = getattr(place, name), []

    def signalled(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(number)
        return original(*args, **kwargs)

    monkeypatch.setattr(place, name, signalled)


TERM, INT, USR1, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP
BEFORE = {
    "the model is loaded": (given, "load_base_model", 1, TERM),
    "the reference's pass": (reference_cache, "pair_logps", 2, USR1),
    "the evaluation of the reference": (evaluation_module, "score_pairs", 2, TERM),
}


@pytest.mark.parametrize("phase", BEFORE)
def test_before_the_first_step_nothing_is_saved_and_nothing_is_lost(
    train, monkeypatch, capfd, tmp_path, phase
):
    signal_at(monkeypatch, *BEFORE[phase])
    handlers = [signal.getsignal(number) for number in (TERM, USR1)]
    assert train("run") == INTERRUPTED
    assert [signal.getsignal(number) for number in (TERM, USR1)] == handlers
    assert "stopped before any checkpoint was written; run the same command again" in (
        capfd.readouterr().err
    )
    assert not (tmp_path / "run" / "checkpoints").exists()
    monkeypatch.undo()
    if phase == "the evaluation of the reference":  # which was computed, and is on disk
        monkeypatch.setattr(reference_cache, "_scored", None)
        assert train("run") == 0


def test_a_hangup_is_a_stop_unless_it_is_ignored():
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGHUP)
        assert interrupt.requested
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGHUP)
        assert not interrupt.requested


def test_a_terminal_that_is_gone_ends_nothing(tmp_path):
    assert run_alone(printed_after_a_hangup, folder=tmp_path, timeout=60) == 2


def printed_after_a_hangup() -> int:
    master, slave = os.openpty()
    for descriptor in (1, 2):
        os.dup2(slave, descriptor)
    os.close(slave)
    os.close(master)
    with pytest.raises(OSError, match="Input/output error"):
        os.write(2, b"x")
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with Interrupt():
        signal.raise_signal(signal.SIGHUP)
        return os.write(1, b"x") + os.write(2, b"x")


DURING = {
    "the first step": (PreferenceStep, "__call__", 1, TERM, 1),
    "a later step": (PreferenceStep, "__call__", 3, INT, 3),
    "an evaluation": (evaluation_module, "pair_logps", 1, HUP, 2),
    "the last evaluation": (evaluation_module, "pair_logps", 3, TERM, 4),
    "a save": (checkpoint_module, "save_file", 1, TERM, 3),
}


@pytest.mark.parametrize("phase", DURING)
def test_a_signal_in_any_phase_saves_and_the_rest_is_the_undisturbed_run(
    train, monkeypatch, capfd, tmp_path, phase
):
    *where, step = DURING[phase]
    with monkeypatch.context() as patched:
        signal_at(patched, *where)
        assert train("cut") == INTERRUPTED
    assert f"stopped after step {step}; " in capfd.readouterr().err
    assert [p.name for p in checkpoints_in(tmp_path / "cut" / "checkpoints")] == [
        f"step-{step:08d}"
    ]
    assert train("cut", "--resume") == 0
    assert train("whole") == 0
    assert left(tmp_path / "cut") == left(tmp_path / "whole")


def test_a_signal_while_the_model_is_saved_lets_it_finish(train, monkeypatch, capfd, tmp_path):
    with monkeypatch.context() as patched:
        signal_at(patched, model_card, "model_card", 1, TERM)
        assert train("cut") == 0
    assert train("whole") == 0
    assert left(tmp_path / "cut") == left(tmp_path / "whole")


def left(folder: Path) -> tuple[list[dict], dict[str, list]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        for timing in ("seconds", "tokens_per_second"):
            record.pop(timing, None)
    weights = load_file(folder / "model" / "model.safetensors")
    return records, {name: tensor.tolist() for name, tensor in weights.items()}
