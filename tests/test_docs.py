"""The examples of two pages of docs/ run, and the files that these name are there."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def examples_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)


def test_every_example_runs(tmp_path: Path) -> None:
    examples = examples_of(PAGE)
    assert len(examples) == 5
    # In a process of their own: they add to registries, which other tests read.
    files = [tmp_path / f"example_{i}.py" for i in range(len(examples))]
    for file, example in zip(files, examples, strict=True):
        file.write_text(example, encoding="utf-8")
    run = f"import runpy\nfor f in {[str(f) for f in files]!r}: runpy.run_path(f)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", run], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", ["architecture", "distributed"])
def test_the_files_it_names_are_there(page: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:[\w-]+/)+[\w.-]*)`", text))
    assert len(named) > {"architecture": 20, "distributed": 1}[page]
    for path in named:
        assert any((root / path).exists() for root in (ROOT, ROOT / "raco_fast")), path


def distributed_examples() -> tuple[str, list[str]]:
    """(what the page says all begin with, and its definitions; the examples that train)."""
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    start, *others = examples_of(page)
    trains = [example for example in others if "\ntrain(" in example]
    return "\n".join([start, *(e for e in others if e not in trains)]), trains


def updates(start: str, examples: list[str]) -> list[torch.Tensor]:
    """M and coefficients of each one's last step, [m + 1, m], on this process of a group."""
    dist.init_process_group = lambda backend: None  # there is one, with its store in a file
    found = []
    for example in examples:
        names: dict[str, Any] = {}
        exec(f"{start}\n{example}", names)
        solution = names["opt"].solution
        found.append(
            torch.vstack([torch.as_tensor(x) for x in (solution.gram, solution.coefficients)])
        )
    return found


def test_every_example_on_several_processes_does_what_one_does(tmp_path: Path) -> None:
    start, trains = distributed_examples()
    assert len(trains) == 6
    ((truth,),) = processes.run(1, updates, start, trains[:1], folder=tmp_path)
    square = [example for example in trains if "(world // 2, 2)" in example]
    line = [example for example in trains if example not in square]
    for world, examples in ((2, line), (4, square)):
        for found in processes.run(world, updates, start, examples, folder=tmp_path, timeout=120):
            for update in found:
                torch.testing.assert_close(update, truth, rtol=1e-4, atol=0.0)


def test_the_page_on_conflict_tells_the_truth() -> None:
    """Its cosines of batches and of their expectation are what they are said to be."""
    (example,) = examples_of((ROOT / "docs" / "conflict.md").read_text(encoding="utf-8"))
    exec(example, {})
