"""The tests of what is timed. They run first; what failed them is not timed.

Every test file is a process of its own, all at the same time, beside the memory checkers of
sanitizer.py. A file that ran out of time without a failure does not stop the suites: its record
says so, and every suite checks its contestants once more on what it times.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.harness.jobs import Done
from bench.harness.machine import ROOT
from bench.harness.records import Record, Records

TESTS = ROOT / "tests"
KERNEL_TESTS = TESTS / "kernels" / "executed"
_ON_CPU = [TESTS / f for f in ("backends/test_cpu_gram.py", "backends/test_cpu_update.py")]
_ON_CPU += [TESTS / "optim" / "test_on_cpu.py"]
_KERNELS = ("gram", "combine_adamw", "capturable")
_ON_CUDA = [KERNEL_TESTS / f"test_{name}.py" for name in _KERNELS]
# Device -> suite -> test files that it relies on.
RELIES_ON = {
    device: {
        **{"gram": tests[:1], "combine_adamw": tests[1:2]},
        **dict.fromkeys(("step", "train", "ratios"), tests),
    }
    for device, tests in (("cpu", _ON_CPU), ("cuda", _ON_CUDA))
}


def files(device: str) -> list[Path]:
    """All test files for a device: on CUDA also those of what no suite times."""
    if device == "cpu":
        return _ON_CPU
    whole = sorted(TESTS.rglob("test_on_cuda.py"))
    return [
        *sorted(KERNEL_TESTS.glob("test_*.py")),
        TESTS / "kernels" / "test_cuda_graph.py",
        *whole,
    ]


def commands(tests: Sequence[Path]) -> dict[str, list[str]]:
    """Record name -> pytest command for each file.

    For the kernels a machine with nothing but pytest will do: without the plugins that the
    project's settings and tests/conftest.py ask for. Warnings are no errors, since versions may not
    be the pinned ones.
    """
    settings = ["-c", str(ROOT / "pyproject.toml"), "-o", "filterwarnings="]
    settings += ["-o", "addopts=--import-mode=importlib --strict-markers"]
    quiet = ["-v", "--tb=short", "--color=no", "-p", "no:cacheprovider", "-m", "not slow"]
    python = [sys.executable, "-m", "pytest", *settings, *quiet]
    return {_name(f): [*python, *_conftests(f), str(f)] for f in tests}


def _name(file: Path) -> str:
    """Of its record: tests/test_gram, tests/engine/test_on_cuda."""
    return f"tests/{file.parent.name}/{file.stem}" if _is_whole(file) else f"tests/{file.stem}"


def _conftests(file: Path) -> list[str]:
    return [] if _is_whole(file) else [f"--confcutdir={KERNEL_TESTS}"]


def _is_whole(file: Path) -> bool:
    """Whether a file tests more than kernels, with what the project's own tests have."""
    return file.stem == "test_on_cuda"


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
    for file in RELIES_ON[device].get(suite, ()):
        found = [r for r in records if r["name"] == _name(file)]
        if not found:
            return f"not timed: {file.name} has not been run; run the part `tests` before"
        if found[-1]["failed"]:
            return f"not timed: {file.name} failed"
    return None
