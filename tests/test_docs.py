"""The examples of docs/architecture.md run, and the files it names are there."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_every_example_runs(tmp_path: Path) -> None:
    examples = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
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


def test_the_files_it_names_are_there() -> None:
    named = set(re.findall(r"`((?:[\w-]+/)+[\w.-]*)`", PAGE))
    assert len(named) > 20
    for path in named:
        assert any((root / path).exists() for root in (ROOT, ROOT / "raco_fast")), path
