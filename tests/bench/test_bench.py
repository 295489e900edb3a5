"""Every part of the benchmarks runs on a CPU, and what is wrong is not timed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import pytest
import torch

from bench import __main__ as command
from bench.harness import correctness, jobs, parts, records, sanitizer, session, timing
from bench.harness.cases import Case, cases
from bench.harness.contest import Contest
from bench.harness.parameters import LISTS, MODELS, elements
from bench.rivals import gradients
from bench.suites import combine_adamw, gram, step

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine make a tiny benchmark take minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def passed_tests(folder: Path) -> records.Records:
    """Records of a run whose tests have passed."""
    found = records.Records(folder, "cpu")
    for file in correctness.files("cpu"):
        found.add(f"tests/{file.stem}", {}, passed=1, failed=0, finished=True)
    return found


def run(folder: Path, *parts: str, monkeypatch: pytest.MonkeyPatch) -> list[records.Record]:
    """What `python -m bench` records on a CPU at tiny sizes."""
    options = ["--out", str(folder), "--device", "cpu", "--sizes", "tiny", "--skip", "compile"]
    monkeypatch.setattr(sys, "argv", ["bench", *parts, *options])
    command.main()
    return records.Records(folder, "cpu").read()


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("SmolLM2-135M", 134.515008),
        ("Qwen3-0.6B", 596.049920),
        ("Qwen3-4B", 4022.468096),
        ("Gemma3-4B", 3880.263168),
        ("Llama-3-8B", 8030.261248),
        ("Qwen3-32B", 32762.123264),
        ("Llama-3-70B", 70553.706496),
    ],
)
def test_parameter_lists_are_those_of_the_models(name: str, millions: float) -> None:
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen3Config

    a = MODELS[name]
    family = Gemma3TextConfig if a.outer_norms else Qwen3Config if a.query_norm else LlamaConfig
    config = family(**a.config(), num_hidden_layers=a.layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert list(LISTS[name].items()) == [(n, tuple(p.shape)) for n, p in model.named_parameters()]
    assert elements(LISTS[name]) == round(millions * 1e6)


def test_every_suite_times_every_contestant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed_tests(tmp_path)
    suites = ("gram", "combine_adamw", "step")
    found = run(tmp_path, "ceilings", *suites, monkeypatch=monkeypatch)
    assert not [r for r in found if "failure" in r]
    todo = cases("tiny", CPU)
    extra = {"gram": {"cat"}, "combine_adamw": {"adamw"}, "step": {"adamw", "cat", "products kept"}}
    for suite in suites:
        for case in todo:
            of_case = [r for r in found if r["name"].startswith(f"{suite}/")]
            of_case = [r for r in of_case if r["params"] == case.params()]
            names = {r["name"].removeprefix(f"{suite}/") for r in of_case}
            assert names == {"raco", "reference", "paper", "dot", "foreach"} | extra[suite]
            for r in of_case:
                assert 0 < r["p20"] <= r["p50"] <= r["p80"]
                assert r["unit"] == "ms"
                assert r["rounds"] >= timing.MIN_ROUNDS
                assert r["share"] > 0
                assert r["machine"]["cores"] == os.cpu_count()
                assert r["versions"]["torch"] == version("torch")
                assert r["commit"] != ""
    shown = records.table(found).splitlines()
    assert sum(line.startswith(suites) for line in shown) == len(suites) * len(todo)


def test_bytes_are_the_least_that_has_to_move() -> None:
    case = Case("Llama-3-8B", torch.bfloat16, 2, CPU)
    per_parameter = [case.bytes(*s.MOVED) / case.elements for s in (gram, combine_adamw, step)]
    assert per_parameter == [4, 16, 20]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, in its compiler
def test_the_compiled_rival() -> None:
    for suite in (gram, combine_adamw, step):
        contest = suite.contest(Case("tiny", torch.float32, 2, CPU), ())
        assert contest.error("compile") < 1e-4


def test_a_rival_that_is_wrong_or_fails_has_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 64 GiB")

    passed_tests(tmp_path)
    monkeypatch.setattr(gradients.Paper, "combine", lambda self, grads, alpha: grads[0])
    monkeypatch.setattr(gradients.Dot, "combine", out_of_memory)
    found = run(tmp_path, "combine_adamw", monkeypatch=monkeypatch)
    failures = {r["name"]: r["failure"] for r in found if "failure" in r}
    assert failures.keys() == {"combine_adamw/paper", "combine_adamw/dot"}
    assert failures["combine_adamw/paper"].startswith("wrong: error ")
    assert failures["combine_adamw/dot"] == "OutOfMemoryError: tried to allocate 64 GiB"
    assert {r["name"] for r in found if "p50" in r} >= {"combine_adamw/raco", "combine_adamw/adamw"}
    assert "failed: combine_adamw/dot list=tiny" in records.table(found)


def test_nothing_is_reported_where_ours_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed_tests(tmp_path)
    exact = gram.exact_gram
    monkeypatch.setattr(gram, "exact_gram", lambda grads: exact(grads) * (1 + 1e-4))
    found = run(tmp_path, "gram", monkeypatch=monkeypatch)
    assert not [r for r in found if "p50" in r]
    assert all(r["failure"].startswith("wrong: error 0.0001") for r in found if "failure" in r)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_tests_that_suites_rely_on_are_there_and_are_run(device: str) -> None:
    run_first = correctness.files(device)
    assert all(file.is_file() for file in run_first)
    for needed in correctness.RELIES_ON[device].values():
        assert needed
        assert {*needed} <= {*run_first}


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        ({"passed": 3, "failed": 1, "finished": True}, "not timed: test_cpu_gram.py failed"),
        ({"passed": 3, "failed": 0, "finished": False}, None),
        (None, "not timed: test_cpu_gram.py has not been run; run the part `tests` before"),
    ],
)
def test_only_what_passed_its_tests_is_timed(
    last: dict[str, object] | None, reason: str | None, tmp_path: Path
) -> None:
    found = records.Records(tmp_path, "cpu")
    if last is not None:
        found.add("tests/test_cpu_gram", {}, passed=9, failed=0, finished=True)
        found.add("tests/test_cpu_gram", {}, **last)
    no_time = session.Session(found, CPU, "tiny", perf_counter() - 1)  # all cases are left out
    parts.run_part("gram", no_time)
    failures = [r["failure"] for r in found.read() if "failure" in r]
    left_out = ["left out: the time for this part was used up"] * len(cases("tiny", CPU))
    assert failures == (left_out if reason is None else [reason])


def test_a_case_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = gram.contest

    def contest(case: Case, skip: Sequence[str]) -> Contest:
        if case.m == 3:
            raise RuntimeError("launch failed")
        return make(case, skip)

    passed_tests(tmp_path)
    monkeypatch.setattr(gram, "contest", contest)
    found = run(tmp_path, "gram", monkeypatch=monkeypatch)
    (failed,) = [r for r in found if "failure" in r]
    assert (failed["params"]["m"], failed["failure"]) == (3, "RuntimeError: launch failed")
    assert {r["params"]["m"] for r in found if "p50" in r} == {2}


def test_a_case_that_does_not_fit_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session.machine, "free_memory", lambda device: 1 << 29)
    found = passed_tests(tmp_path)
    session.Session(found, CPU, "tiny", perf_counter() + 60).measure(gram)
    failures = {r["failure"] for r in found.read() if "failure" in r}
    assert failures == {"left out: needs 1 GiB of memory, 0 are free"}


def test_outcome_of_test_files(tmp_path: Path) -> None:
    sources = {
        "test_good": "def test_a(): pass\ndef test_b(): pass\n",
        "test_bad": "def test_a(): pass\ndef test_b(): assert 1 == 2\n",
        "test_broken": "import no_such_module\n",
        "test_endless": "import time\ndef test_a(): time.sleep(600)\n",
    }
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source)
    found = records.Records(tmp_path, "cpu")
    commands = correctness.commands([tmp_path / f"{name}.py" for name in sources])
    endless = {"tests/test_endless": commands.pop("tests/test_endless")}
    for some, seconds in ((commands, 60), (endless, 2)):
        for name, done in jobs.run_together(some, perf_counter() + seconds).items():
            correctness.record(found, name, done)
    outcomes = {r["name"]: (r["passed"], r["failed"], r["finished"]) for r in found.read()}
    assert outcomes == {
        "tests/test_good": (2, 0, True),
        "tests/test_bad": (1, 1, True),
        "tests/test_broken": (0, 1, True),
        "tests/test_endless": (0, 0, False),
    }
    assert {r["name"]: r["seconds"] for r in found.read()}["tests/test_endless"] >= 2
    assert "failed: tests/test_bad: FAILED ::test_b - assert 1 == 2" in records.table(found.read())


def test_rivals_take_turns_after_a_warm_up() -> None:
    called: list[str] = []
    calls = {name: lambda name=name: called.append(name) for name in ("a", "b")}
    times = timing.interleaved(calls, CPU, until=perf_counter() - 1)
    assert called == ["a", "b"] * (1 + timing.MIN_ROUNDS)
    assert len(times["a"].device) == len(times["b"].wall) == timing.MIN_ROUNDS
    times = timing.interleaved(calls, CPU, until=perf_counter() + 60)
    assert len(times["a"].device) == timing.MAX_ROUNDS


def test_the_sanitizer_reaches_every_kernel() -> None:
    expected = {"gram_partials", "combine_adamw_step", "combine_out", "weight_grad_tiles"}
    assert expected <= {*sanitizer.kernels()}
    sanitizer.launch_all(CPU)  # asserts inside


@pytest.mark.parametrize(
    ("done", "reason"),
    [
        (jobs.Done(0, f"{sanitizer.FINISHED}\n===== ERROR SUMMARY: 0 errors", 1.0), None),
        (jobs.Done(None, "", 1.0), "not finished in time"),
        (jobs.Done(1, "Device not supported", 1.0), "Device not supported"),
        (
            jobs.Done(0, f"=====     at gram_total+0x90\n{sanitizer.FINISHED}", 1.0),
            "=====     at gram_total+0x90",
        ),
        (jobs.Done(0, f"=====     at vectorized_copy\n{sanitizer.FINISHED}", 1.0), None),
    ],
)
def test_outcome_of_the_sanitizer(done: jobs.Done, reason: str | None, tmp_path: Path) -> None:
    found = records.Records(tmp_path, "cpu")
    sanitizer.record(found, "sanitizer/memcheck", done)
    (record,) = found.read()
    assert record.get("failure") == reason
    assert (record.get("reports") == 0) == (reason is None)


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs bench/gpu.sh with a Python that writes to `called` what it is asked; `gram` fails."""
    stand_in = tmp_path / "python"
    stand_in.write_text(
        "#!/bin/sh\n"
        f'case "$*" in "-m bench.records"*) exec {sys.executable} "$@" ;; esac\n'
        'case "$*" in *" gram "*) exit 3 ;; esac\n'
        f'echo "$*" >> {tmp_path}/called\n'
    )
    stand_in.chmod(0o755)

    def run(out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bench/gpu.sh", str(out), "--device", "cpu"],
            cwd=ROOT,
            env={**os.environ, "PYTHON": str(stand_in), **environment},
            capture_output=True,
            text=True,
        )

    return run


@pytest.mark.slow
def test_the_script_goes_on_after_a_part_that_fails(tmp_path: Path, script) -> None:
    out = tmp_path / "new" / "folder"
    done = script(out)
    assert done.returncode == 0, done.stderr
    called = (tmp_path / "called").read_text().splitlines()
    assert called[0].startswith("setup.py")
    suites = [c.split() for c in called if c.startswith("-m bench ")]
    assert {words[2] for words in suites} == {*parts.PARTS} - {"gram"}
    assert all(words[-2:] == ["--device", "cpu"] for words in suites)
    assert called[-1] == f"-m bench.report --out {out} --render"
    (record,) = records.Records(out, "cpu").read()
    assert record["name"] == "gram"
    assert record["failure"].startswith("status 3 ")
    assert done.stdout.splitlines()[-1].startswith("failed: gram: status 3")
    assert {f.name for f in out.iterdir()} == {"report.json", "report.txt", "log.txt"}


def test_the_script_runs_the_parts_it_is_told(tmp_path: Path, script) -> None:
    assert script(tmp_path / "out", PARTS="tests solve").returncode == 0
    called = (tmp_path / "called").read_text().splitlines()
    assert [c.split()[2] for c in called if c.startswith("-m bench ")] == ["tests", "solve"]
    refused = script(tmp_path / "out", PARTS="tests grams")
    assert refused.returncode != 0
    assert "PARTS must name parts of: " in refused.stderr
    assert (tmp_path / "called").read_text().splitlines() == called


def test_failures_can_be_recorded_without_the_extension() -> None:
    code = "import sys, bench.harness.records; print('raco_fast' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
