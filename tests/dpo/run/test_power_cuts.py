"""What is on disk, and in which order, so that a power cut at any moment loses nothing."""

import os
from pathlib import Path

import pytest

from raco_fast.dpo.run.files import atomic_file, atomic_folder, make_folder
from raco_fast.dpo.run.trainer import train


@pytest.fixture
def events(monkeypatch) -> list[tuple[str, str]]:
    """("sync", path) and ("rename", new path) in the order in which they are done."""
    seen: list[tuple[str, str]] = []
    originals = {name: getattr(os, name) for name in ("fsync", "rename", "replace")}

    def fsync(descriptor):
        seen.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        originals["fsync"](descriptor)

    def renaming(name):
        def rename(source, target):
            seen.append(("rename", str(target)))
            originals[name](source, target)

        return rename

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, renaming(name))
    return seen


def test_files_and_folders_are_on_disk_before_the_rename_and_the_rename_after_it(tmp_path, events):
    destination = tmp_path / "made" / "folder"
    with atomic_folder(destination) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text("x")
        events.append(("written", ""))
    before, after = events[: events.index(("rename", str(destination)))], events[-1]
    assert before[0] == ("sync", str(tmp_path))  # which has got a new name in it
    written = before[before.index(("written", "")) + 1 :]
    inner = partial / "inner"
    assert {path for _, path in written} == {str(partial), str(inner), str(inner / "file")}
    assert after == ("sync", str(destination.parent))


def test_a_file_likewise(tmp_path, events):
    with atomic_file(tmp_path / "file") as partial:
        partial.write_text("x")
    assert events == [
        ("sync", str(partial)),
        ("rename", str(tmp_path / "file")),
        ("sync", str(tmp_path)),
    ]


def test_a_folder_that_is_there_is_not_synced(tmp_path, events):
    make_folder(tmp_path)
    assert events == []
    make_folder(tmp_path / "a" / "b")
    assert {path for _, path in events} == {str(tmp_path), str(tmp_path / "a")}


def test_metrics_are_on_disk_before_their_checkpoint_and_it_before_the_old_one_goes(
    make_config, events
):
    config = make_config(max_steps=4, save_every=2, check_every=None)
    train(config)
    metrics, folder = str(config.folder / "metrics.jsonl"), config.folder / "checkpoints"
    old, new = (str(folder / f"step-{step:08d}") for step in (2, 4))
    places = {
        "metrics": last_before(events, ("sync", metrics), ("rename", new)),
        "content": last_before(events, ("sync", partial_of(new)), ("rename", new)),
        "named": events.index(("rename", new)),
        "name on disk": events.index(("sync", str(folder)), events.index(("rename", new))),
        "old one goes": events.index(("rename", str(folder / f".removed-{Path(old).name}"))),
    }
    assert list(places.values()) == sorted(places.values()), places
    assert last_before(events, ("sync", metrics), ("rename", new)) > events.index(("rename", old))


def partial_of(path: str) -> str:
    return str(Path(path).with_name(f".partial-{Path(path).name}"))


def last_before(events: list, event: tuple[str, str], limit: tuple[str, str]) -> int:
    """Where an event is found last before another one."""
    return max(k for k, found in enumerate(events[: events.index(limit)]) if found == event)
