"""The tests of what is timed. They run first; what failed them is not timed.

Every test file is a process of its own, all at the same time, beside the memory checkers of
sanitizer.py. A file that was not through in time without a failure does not stand in the way: its
record says so, and every suite checks its contestants once more on what it times.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.jobs import Done
from bench.machine import ROOT
from bench.records import Record, Records

KERNEL_TESTS = ROOT / "tests" / "kernels" / "executed"
_STEP_ON_CPU = ("test_cpu_gram", "test_cpu_update", "test_optimizer_cpu")
_STEP_ON_CUDA = ("test_gram", "test_combine_adamw", "test_solve_dual", "test_capturable")
# Device -> suite -> test files that it relies on.
RELIES_ON: dict[str, dict[str, tuple[str, ...]]] = {
    device: {"gram": tests[:1], "combine_adamw": tests[1:2], "step": tests, "train": tests}
    for device, tests in (("cpu", _STEP_ON_CPU), ("cuda", _STEP_ON_CUDA))
}


def files(device: str) -> list[Path]:
    """All test files for a device: on CUDA also those of kernels that no suite times yet."""
    if device == "cpu":
        return [ROOT / "tests" / f"{stem}.py" for stem in _STEP_ON_CPU]
    return [*sorted(KERNEL_TESTS.glob("test_*.py")), ROOT / "tests" / "test_cuda_graph.py"]


def commands(tests: Sequence[Path]) -> dict[str, list[str]]:
    """Record name -> pytest command for each file.

    A machine with nothing but pytest will do: without the plugins that the project's settings and
    tests/conftest.py ask for. Warnings are no errors, since versions may not be the pinned ones.
    """
    settings = ["-c", str(ROOT / "pyproject.toml"), "-o", "filterwarnings="]
    settings += ["-o", "addopts=--import-mode=importlib --strict-markers"]
    settings += [f"--confcutdir={KERNEL_TESTS}"]
    quiet = ["-v", "--tb=short", "--color=no", "-p", "no:cacheprovider", "-m", "not slow"]
    python = [sys.executable, "-m", "pytest", *settings, *quiet]
    return {f"tests/{f.stem}": [*python, str(f)] for f in tests}


def record(records: Records, name: str, done: Done) -> None:
    """Write what came of one test file."""
    passed, failed = (
        len(re.findall(rf"^\S*::.* {word}\b", done.output, flags=re.MULTILINE))
        for word in ("PASSED", "(?:FAILED|ERROR)")
    )
    values: Record = {"passed": passed, "failed": failed, "finished": done.code is not None}
    if done.code not in (0, None):
        summary = re.findall(r"^(?:FAILED|ERROR) .*", done.output, flags=re.MULTILINE)
        values["failed"] = max(1, failed)
        values["failure"] = "\n".join(summary)[:1500] or done.output[-1500:]
    records.add(name, {}, **values, seconds=round(done.seconds, 1))


def obstacle(records: Sequence[Record], device: str, suite: str) -> str | None:
    """Why a suite must not be timed: a test that failed or has not been run; None if it may."""
    for stem in RELIES_ON[device][suite]:
        found = [r for r in records if r["name"] == f"tests/{stem}"]
        if not found:
            return f"not timed: {stem}.py has not been run; run the part `tests` before"
        if found[-1]["failed"]:
            return f"not timed: {stem}.py failed"
    return None
