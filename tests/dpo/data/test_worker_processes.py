"""Processes that compute a function of items: what they give, and how they end."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing

import pytest

from raco_fast.dpo.data.worker_processes import mapped

PID, SLEEP = "__import__('os').getpid()", "__import__('time').sleep({})"
# A user's script as they write it, without a guard: evaluates in two workers, one of them for long.
SCRIPT = f"""
from raco_fast.dpo.data.worker_processes import mapped
print("began", flush=True)
results = mapped(eval, [{PID!r}, {SLEEP.format(1)!r}, {SLEEP.format(600)!r}], 2)
print(next(results), flush=True)
try:
    list(results)
except KeyboardInterrupt:
    results.close()
    print("stopped")
"""


def test_results_come_in_order_from_other_processes():
    waits = [f"({SLEEP.format(wait)}, {PID})" for wait in (0.3, 0, 0, 0)]
    pids = [pid for _, pid in mapped(eval, waits, 2)]
    assert len(set(pids)) == 2
    assert os.getpid() not in pids
    assert pids.count(pids[0]) == 1  # of the one that had to wait, which is first all the same
    assert list(mapped(eval, [PID], 0)) == [os.getpid()]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_bad_item_is_the_error(workers):
    found = mapped(int, ["1", "2", "bad", "3", "worse"], workers)
    with closing(found):
        assert [next(found), next(found)] == [1, 2]
        with pytest.raises(ValueError, match="'bad'"):
            next(found)


def test_one_that_is_killed_is_named_with_a_cure():
    with pytest.raises(ChildProcessError, match=r"status -9 \(killed.*Lower `workers`, or set"):
        list(mapped(signal.raise_signal, [signal.SIGKILL] * 3, 2))


def test_what_else_is_raised_is_on_stderr(capfd):
    with pytest.raises(ChildProcessError, match="worker processes has ended with status 1;"):
        list(mapped(len, [3], 1))
    assert "TypeError: object of type 'int' has no len()" in capfd.readouterr().err


def test_what_a_function_prints_is_no_answer(capfd):
    assert list(mapped(print, ["hello"], 1)) == [None]
    assert capfd.readouterr().err == "hello\n"


def test_what_cannot_be_sent_is_the_senders_error():
    with pytest.raises((AttributeError, TypeError), match="lambda"):
        list(mapped(lambda x: x, [1], 1))


def test_leaving_early_ends_them_all():
    began = time.monotonic()
    with closing(mapped(eval, [PID, *[SLEEP.format(600)] * 3], 2)) as found:
        pid = next(found)
    assert time.monotonic() - began < 60
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    "ending", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_workers_end_with_whoever_started_them(ending, tmp_path):
    """Killed, it can tell them nothing; a Ctrl-C goes to all in the terminal's foreground."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("600", "2"))
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    ) as parent:
        lines = [parent.stdout.readline() for _ in range(2)]
        os.killpg(parent.pid, ending)
        out, err = parent.communicate(timeout=60)  # until no process has its stderr
    assert lines[0] == "began\n"  # once
    assert lines[1].strip().isdecimal()
    assert (out, err) == ("stopped\n" if ending == signal.SIGINT else "", "")
