"""Runs `tests/kernels/executed` in Triton's interpreter, in a process of its own.

TRITON_INTERPRET decides at the import of triton what every kernel of the process is, so this
process, in which kernels are compiled, cannot interpret them as well.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNEL_TESTS = ROOT / "tests" / "kernels" / "executed"
FILES = sorted(KERNEL_TESTS.glob("test_*.py"))
WITH_SLOW_TESTS = [file for file in FILES if "mark.slow" in file.read_text(encoding="utf-8")]
# A process takes seconds before its first kernel: of the quick tests two share all files, slow ones
# have one each.
RUNS = [
    *[pytest.param(FILES[k::2], "not slow", id=f"quick-{k}") for k in range(2)],
    *[
        pytest.param([file], "slow", id=f"{file.name}-slow", marks=pytest.mark.slow)
        for file in WITH_SLOW_TESTS
    ],
]


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(("files", "which"), RUNS)
def test_in_the_interpreter(files: list[Path], which: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", which, "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *map(str, files)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert "skipped" not in done.stdout
