"""Tests of everything that is timed, and the memory checkers where there are any."""

from bench.harness import correctness, sanitizer
from bench.harness.jobs import run_together
from bench.harness.session import Session

NAME = "tests"


def run(session: Session) -> None:
    device = session.device.type
    tests = correctness.commands(correctness.files(device))
    checkers = sanitizer.commands() if device == "cuda" else {}
    # Without it torch refuses cuBLAS under deterministic algorithms, which the kernel tests want.
    cublas = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    for name, done in run_together({**tests, **checkers}, session.until, **cublas).items():
        (correctness if name in tests else sanitizer).record(session.records, name, done)
        shown = done.output[-4000 if done.code == 0 else -100_000 :]
        print(f"\n### {name}: status {done.code}, {done.seconds:.0f} s\n{shown}")
    if device == "cuda" and not checkers:
        session.records.add("sanitizer", {}, failure="compute-sanitizer is not on PATH")
