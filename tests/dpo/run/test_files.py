import errno
import os
import socket
import subprocess

import pytest
from safetensors import SafetensorError

from raco_fast.dpo.run.files import atomic_file, atomic_folder, clear_leftovers, remove_folder


def tree(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_appears_whole_and_replaces_what_was_there(tmp_path):
    destination = tmp_path / "a" / "b"
    for text in ("first", "second"):
        with atomic_folder(destination) as partial:
            (partial / "inner").mkdir()
            (partial / "inner" / "file").write_text(text)
            assert not destination.exists() or tree(destination) == {"inner/file": "first"}
        assert tree(tmp_path) == {"a/b/inner/file": text}


FAILURES = [
    (OSError(errno.ENOSPC, "No space left on device"), OSError, "No space left on device"),
    (SafetensorError("I/O error: No space left"), OSError, "I/O error: No space left"),
    (KeyboardInterrupt(), KeyboardInterrupt, None),
    (KeyError("a bug"), KeyError, "a bug"),
]


@pytest.mark.parametrize(("failure", "raised", "message"), FAILURES)
def test_a_failure_half_way_leaves_the_previous_version(tmp_path, failure, raised, message):
    folder, file = tmp_path / "folder", tmp_path / "file"
    with atomic_folder(folder) as partial:
        (partial / "kept").write_text("old")
    with atomic_file(file) as partial:
        partial.write_text("old")

    def fail(writer, destination, name):
        with writer(destination) as partial:
            (partial / name if name else partial).write_text("half")
            raise failure

    for writer, destination, name in ((atomic_folder, folder, "new"), (atomic_file, file, "")):
        with pytest.raises(raised, match=message) as error:
            fail(writer, destination, name)
        if raised is OSError:
            assert str(destination) in str(error.value)
            assert "nothing that was there before is lost" in str(error.value)
    assert tree(tmp_path) == {"folder/kept": "old", "file": "old"}
    assert not list(tmp_path.rglob(".*"))


def test_a_rename_that_fails_brings_the_previous_folder_back(tmp_path, monkeypatch):
    destination = tmp_path / "folder"
    with atomic_folder(destination) as partial:
        (partial / "kept").write_text("old")
    original = os.rename

    def rename(source, target):
        if source.name.startswith(".partial-"):
            raise OSError(errno.EIO, "Input/output error")
        original(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with (
        pytest.raises(OSError, match="folder could not be written"),
        atomic_folder(destination) as partial,
    ):
        (partial / "new").write_text("new")
    assert tree(tmp_path) == {"folder/kept": "old"}


def left_behind(folder, name):
    (folder / name).mkdir(parents=True)
    (folder / name / "file").write_text(name)


def test_what_a_killed_process_left_is_cleared_or_put_back(tmp_path):
    for name in (".partial-a", ".replaced-a", ".removed-b", "c", ".replaced-c", ".partial-c", "d"):
        left_behind(tmp_path, name)
    (tmp_path / ".partial-host-7-metrics.jsonl").write_text("half")
    clear_leftovers(tmp_path)
    assert tree(tmp_path) == {"a/file": ".replaced-a", "c/file": "c", "d/file": "d"}
    clear_leftovers(tmp_path / "nowhere")


def test_a_writer_clears_and_puts_back_too(tmp_path):
    for name in (".partial-folder", ".replaced-folder"):
        left_behind(tmp_path, name)
    with pytest.raises(KeyError), atomic_folder(tmp_path / "folder"):
        raise KeyError("a bug")
    assert tree(tmp_path) == {"folder/file": ".replaced-folder"}
    with atomic_folder(tmp_path / "folder") as partial:
        (partial / "file").write_text("new")
    assert tree(tmp_path) == {"folder/file": "new"}


def test_a_folder_is_removed_under_another_name(tmp_path):
    left_behind(tmp_path, "a")
    left_behind(tmp_path, ".removed-a")  # which an earlier attempt could not delete
    remove_folder(tmp_path / "a")
    assert tree(tmp_path) == {}


def test_a_file_half_written_by_a_dead_process_of_this_machine_is_cleared(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    here = socket.gethostname()
    living = [f".partial-{here}-{os.getppid()}-cache", f".partial-elsewhere-{dead.pid}-cache"]
    for name in (*living, f".partial-{here}-{dead.pid}-cache", f".partial-{here}-x-cache"):
        (tmp_path / name).write_text("half")
    with atomic_file(tmp_path / "cache") as partial:
        partial.write_text("new")
    assert set(tree(tmp_path)) == {"cache", *living, f".partial-{here}-x-cache"}


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path, monkeypatch):
    file = tmp_path / "cache"
    with atomic_file(file) as mine:
        mine.write_text("mine")
        monkeypatch.setattr(os, "getpid", lambda: -7)
        with atomic_file(file) as theirs:
            theirs.write_text("theirs")
        assert file.read_text() == "theirs"
    assert tree(tmp_path) == {"cache": "mine"}
