"""One run in an output folder, and no lock of a process that is dead."""

import contextlib
import errno
import fcntl
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import yaml
from launched_runs import Started
from processes import fork_server

from raco_fast.cli import program as cli
from raco_fast.distributed.processes import Processes
from raco_fast.dpo.run.lock import held

BAD_INPUT = 2


def hold_for_ever(folder: Path) -> None:
    with held(folder, Processes()):
        (folder / "holds").touch()
        time.sleep(600)


@pytest.fixture
def holder(tmp_path):
    """A process that holds a folder; its pid and the folder."""
    folder = tmp_path / "new" / "run"
    process = fork_server().Process(target=hold_for_ever, args=(folder,), daemon=True)
    process.start()
    until = time.monotonic() + 60
    while not (folder / "holds").exists() and time.monotonic() < until:
        time.sleep(0.01)
    yield process, folder
    process.kill()
    process.join()


def test_a_second_run_is_refused_and_a_dead_one_holds_nothing(holder, settings, capfd, tmp_path):
    process, folder = holder
    (folder / "checkpoints" / ".partial-step-00000007").mkdir(parents=True)
    file = tmp_path / "config.yaml"
    settings["data"] = [{"path": str(tmp_path / "not-read.jsonl")}]
    file.write_text(yaml.safe_dump(settings | {"output_dir": str(folder)}))
    before = sorted(folder.rglob("*"))
    assert cli.main(["train", str(file)]) == BAD_INPUT
    assert (
        f"raco-fast: `output_dir` {folder} is in use by process {process.pid} on "
        f"{socket.gethostname()}; wait for the end of that run or stop it, or choose another"
    ) in capfd.readouterr().err
    assert sorted(folder.rglob("*")) == before
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert cli.main(["train", str(file)]) == BAD_INPUT
    assert "not-read.jsonl" in capfd.readouterr().err  # it holds the folder now, and has cleared it
    assert not list((folder / "checkpoints").iterdir())


def test_a_folder_is_free_again_after_a_run_or_its_error(tmp_path):
    for _ in range(2):
        with contextlib.suppress(KeyError), held(tmp_path, Processes()):
            with (
                pytest.raises(ValueError, match=f"in use by process {os.getpid()} on"),
                held(tmp_path, Processes()),
            ):
                pass
            raise KeyError("a bug")


def test_a_holder_that_has_not_said_its_name_yet(tmp_path):
    with held(tmp_path, Processes()):
        (tmp_path / ".lock").write_text("")
        with (
            pytest.raises(ValueError, match="in use by another process; wait"),
            held(tmp_path, Processes()),
        ):
            pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with held(tmp_path, Processes()):
        assert "on a file system without locks (No locks available)" in caplog.text


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OSError, match=r"`output_dir` must be a folder that can be written, got"),
        held(tmp_path / "file" / "run", Processes()),
    ):
        pass


@pytest.mark.slow
def test_all_processes_of_a_second_run_are_refused(holder, settings, tmp_path):
    process, folder = holder
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings | {"output_dir": str(folder)}))
    with Started(("train", str(file)), processes=2, folder=tmp_path) as started:
        ended = started.end()
    assert [e.status for e in ended] == [BAD_INPUT] * 2, ended
    for each in ended:
        assert f"is in use by process {process.pid} on" in each.printed
