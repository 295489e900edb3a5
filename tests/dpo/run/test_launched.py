"""Runs on several processes against the same runs on one: metrics, weights, checkpoints, ends."""

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import model_zoo
import pytest
import torch
import yaml
from launched_runs import Ended, Started, assert_done
from safetensors.torch import load_file

from raco_fast.dpo.run.checkpoint import latest

BAD_INPUT, INTERRUPTED = 2, 130
LORA = {"r": 4, "alpha": 8}
SAVED = LORA | {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["lm_head"]}


@dataclass(frozen=True)
class Run:
    """A run's file of settings and its output."""

    file: Path
    folder: Path

    def start(self, processes: int, *arguments: str, **options: Any) -> Started:
        """Start the command on it."""
        given = ("train", str(self.file), *arguments)
        return Started(given, processes, self.file.parent, **options)

    def end(self, processes: int, *arguments: str, **options: Any) -> list[Ended]:
        """Run the command to its end."""
        with self.start(processes, *arguments, **options) as started:
            return started.end()

    def stopped(self, processes: int, rank: int, number: int, *, lines: int = 4) -> list[Ended]:
        """Run the command and send a process a signal when so many records are written."""
        with self.start(processes) as started:
            started.wait_for_lines(self.folder / "metrics.jsonl", lines)
            started.signal(rank, number)
            return started.end()


@pytest.fixture
def new_run(settings, tmp_path, save_tiny):
    """A function that makes a `Run`: `new_run(name, parallel, model, **changed_settings)`.

    Without dropout, whose draws depend on the number of processes, unless `model` switches it on.
    """
    plain = settings["model"] | {"name": str(save_tiny()), "dropout": False}

    def make(
        name: str,
        parallel: dict[str, Any] | None = None,
        model: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Run:
        values = settings | {"model": plain | (model or {}), "eps": 1e-3} | changes
        values |= {"output_dir": str(tmp_path / name), "parallel": parallel or {}}
        values |= {"cache_dir": str(tmp_path / f"{name}-cache")}
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(values, sort_keys=False))
        return Run(file, tmp_path / name)

    return make


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    """The exported weights."""
    (file,) = (run.folder / "model").glob("*.safetensors")
    return load_file(file)


def assert_close(runs: SimpleNamespace, a: Run, b: Run) -> None:
    """The same records and exported weights, to rounding in float32."""
    ours, theirs = runs.records(a), runs.records(b)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for one, two in zip(ours, theirs, strict=True):
        assert one.keys() == two.keys()
        assert {n for n in one if one[n] is None} == {n for n in two if two[n] is None}
        # Before the second update rewards are rounding errors, of which nobody knows the signs.
        known = {n for n in one if one["step"] > 2 or "accuracies" not in n}
        for name in {n for n in known if one[n] is not None}:
            assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-5), (one["step"], name)
    first, second = weights_of(a), weights_of(b)
    assert first.keys() == second.keys()
    for name, weight in first.items():
        torch.testing.assert_close(weight, second[name], rtol=1e-5, atol=1e-5)


def check_against_one(runs, new_run, processes: int, parallel: dict[str, Any], **changes) -> None:
    one, many = new_run("one", **changes), new_run("many", parallel, **changes)
    alone, ended = one.end(1), many.end(processes)
    assert_done([*alone, *ended])
    assert_close(runs, one, many)
    padded = ["cannot be run on packed rows" in told[0].printed for told in (alone, ended)]
    assert padded[0] == padded[1]
    assert len(runs.steps(many)) == 10
    assert "saved" in ended[0].printed
    assert "one pass per objective" not in ended[0].printed
    for other in ended[1:]:
        assert "saved" not in other.printed
        assert "it/s" not in other.printed
        assert "step/s" not in other.printed
    cards = [(run.folder / "model" / "README.md").read_text() for run in (one, many)]
    assert cards[0] == cards[1]
    config = next((one.folder / "model").glob("*config.json")).name
    configs = [json.loads((run.folder / "model" / config).read_text()) for run in (one, many)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("ddp", None),
        ("fsdp2", LORA),
        pytest.param("ddp", LORA, marks=pytest.mark.slow),
        pytest.param("fsdp2", None, marks=pytest.mark.slow),
    ],
)
def test_two_processes_learn_what_one_learns(runs, new_run, kind, lora):
    """10 steps of 8 pairs in micro-batches of 3, labels spread unevenly."""
    check_against_one(runs, new_run, 2, {"kind": kind}, model={"lora": lora}, eval_every=5)


FSDP2 = {"kind": "fsdp2"}
SLOW = pytest.mark.slow
MOVES = {"reference": {"sync_steps": 2, "mixup_alpha": 0.4}}
MORE = {
    "ddp on 3": (3, {}, {}),
    "ddp, one objective": (2, {}, {"weights": {"sure": 1.0}, "c": 0.0}),
    "ddp, more processes than pairs": (3, {}, {"pairs_per_step": 2, "max_steps": 10}),
    "ddp, gram_first": (2, {}, {"gradient_mode": "gram_first", "pairs_per_micro_batch": 8}),
    "ddp, a rule that sees losses": (2, {}, {"rule": "mgda-decoupled"}),
    "ddp, a rule with a memory": (2, {}, {"rule": {"name": "gradvac", "beta": 0.2}}),
    "fsdp2 on 4": (4, FSDP2, {}),
    "fsdp2, 2 copies": (4, FSDP2 | {"replicate": 2}, {}),
    "fsdp2, offloaded": (2, FSDP2 | {"cpu_offload": True}, {}),
    "fsdp2, not resharded": (2, FSDP2 | {"reshard": False}, {"model": {"lora": LORA}}),
    "fsdp2, of one": (1, FSDP2, {}),
    "fsdp2, one objective": (2, FSDP2, {"weights": {"sure": 1.0}, "c": 0.0}),
    "fsdp2, autograd": (2, FSDP2, {"gradient_mode": "autograd"}),
    "fsdp2, gram_first": (2, FSDP2, {"gradient_mode": "gram_first", "pairs_per_micro_batch": 8}),
    "fsdp2, tied": (2, FSDP2, {"model": {"tied": True}}),
    "fsdp2, a head in full": (2, FSDP2, {"model": {"lora": SAVED}}),
    "fsdp2, two scores": (2, FSDP2, {"losses": {"kind": {"name": "ld", "alpha": 0.3}}}),
    "ddp, a reference that moves": (2, {}, MOVES),
    "fsdp2, a reference that moves": (2, FSDP2 | {"reshard": False}, MOVES),
    "fsdp2, a reference that copies an adapter": (
        2,
        FSDP2 | {"cpu_offload": True},
        {"reference": {"sync_steps": 3, "mixup_alpha": 1.0}, "model": {"lora": LORA}},
    ),
    "fsdp2, checkpointed": (2, FSDP2, {"model": {"lora": LORA, "gradient_checkpointing": True}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
def test_processes_learn_what_one_learns(runs, new_run, save_tiny, case):
    processes, parallel, changes = MORE[case]
    if changes.get("model") == {"tied": True}:
        changes = {"model": {"name": str(save_tiny(tie_word_embeddings=True))}}
    check_against_one(runs, new_run, processes, parallel, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_steps_without_labels_are_left_out_on_all_processes(runs, new_run, write_pairs, kind):
    file = write_pairs("few.jsonl", 20, 5, {"sure": "yes", "kind": "never"})
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for k, row in enumerate(rows):
        row["preferences"] = {"sure": int(k == 3), "kind": -int(k in (3, 4))}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data": [{"path": str(file)}], "pairs_per_step": 4, "epochs": 2}
    check_against_one(runs, new_run, 2, {"kind": kind}, **changes)
    learnt = [("loss/sure" in r, "loss/kind" in r) for r in runs.steps(new_run("many"))]
    assert learnt.count((True, True)) == 2
    assert learnt.count((False, False)) >= 6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_run_that_diverges_ends_on_all_processes(new_run, kind):
    run = new_run("wild", {"kind": kind}, lr=1e30, warmup_ratio=0.0, max_skipped_steps=2)
    ended = run.end(2)
    assert [process.status for process in ended] == [BAD_INPUT] * 2
    assert "the last 2 steps were all skipped (`max_skipped_steps`)" in ended[0].printed
    assert "there is no checkpoint to resume from" in ended[0].printed
    assert not any("Traceback" in process.printed for process in ended)
    assert not (run.folder / "model").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_scores_of_the_models_own_logits_on_several_processes(runs, new_run, tmp_path, tiny, kind):
    with model_zoo.quiet():
        model_zoo.build("modernbert-decoder", 0.3).save_pretrained(tmp_path / "own")
    model = {"name": str(tmp_path / "own"), "tokenizer": str(tiny)}
    changes = {"model": model, "gradient_mode": "autograd", "lr": 1e-3}
    check_against_one(runs, new_run, 2, {"kind": kind}, **changes)


@pytest.mark.slow
def test_a_pass_that_fails_leaves_a_sharded_model_cut(runs, new_run, tmp_path, tiny):
    """Bloom takes no positions, so no packed rows, on which it is tried before anything else."""
    with model_zoo.quiet():
        model_zoo.build("bloom", 0.0).save_pretrained(tmp_path / "bloom")
    model = {"name": str(tmp_path / "bloom"), "tokenizer": str(tiny)}
    changes = {"model": model, "lr": 1e-3, "gradient_mode": "autograd", **MOVES}
    check_against_one(runs, new_run, 2, FSDP2 | {"reshard": False}, **changes)


LONG = {"epochs": 4}  # 20 steps: a signal reaches the run before its end


@pytest.mark.parametrize(
    ("first", "then", "more"),
    [
        pytest.param((1, {}), (2, FSDP2), {}, id="1, then fsdp2 on 2"),
        pytest.param((2, FSDP2), (1, {}), {}, id="fsdp2 on 2, then 1"),
        pytest.param((2, {}), (1, {}), {}, id="ddp on 2, then 1", marks=SLOW),
        pytest.param((2, FSDP2), (3, FSDP2), {}, id="fsdp2 on 2, then 3", marks=SLOW),
        pytest.param((4, FSDP2 | {"shard": 2}), (2, {}), {}, id="2x2, then 2", marks=SLOW),
        pytest.param((1, {}), (2, FSDP2), MOVES, id="1, then fsdp2, TR-DPO", marks=SLOW),
        pytest.param((2, FSDP2), (1, {}), MOVES, id="fsdp2, then 1, TR-DPO", marks=SLOW),
    ],
)
def test_another_number_of_processes_goes_on(runs, new_run, first, then, more):
    """A signal on the last process stops all of them, after a checkpoint."""
    changes = LONG | {"lr": 1e-3} | more
    whole, cut = new_run("whole", **changes), new_run("cut", first[1], **changes)
    assert_done(whole.end(1))
    stopped = cut.stopped(first[0], first[0] - 1, signal.SIGTERM)
    assert [process.status for process in stopped] == [INTERRUPTED] * first[0], stopped
    assert "with --resume to go on" in stopped[0].printed
    (checkpoint,) = (cut.folder / "checkpoints").iterdir()
    assert (checkpoint / "shards").exists() == (first[1] != {})
    again = new_run("cut", then[1], **changes)
    ended = again.end(then[0], "--resume")
    assert_done(ended)
    assert f"is of {first[0]} process(es) and this run has {then[0]}" in ended[0].printed
    assert_close(runs, whole, again)


@pytest.mark.parametrize(
    ("kind", "rank", "number"),
    [
        ("ddp", 0, signal.SIGINT),
        ("fsdp2", 1, signal.SIGKILL),
        pytest.param("ddp", 1, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("fsdp2", 0, signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_has_the_bits_of_an_undisturbed_one(runs, new_run, kind, rank, number):
    """With dropout, which every process draws for itself, and with accumulation."""
    model = {"dropout": True, "lora": LORA | {"dropout": 0.2}}
    changes = LONG | {"model": model, "save_every": 3}
    whole, cut = (new_run(name, {"kind": kind}, **changes) for name in ("whole", "cut"))
    assert_done(whole.end(2))
    stopped = cut.stopped(2, rank, number, lines=6)
    if number == signal.SIGINT:
        assert [process.status for process in stopped] == [INTERRUPTED] * 2, stopped
    else:
        assert [process.status for process in stopped] == [BAD_INPUT, -signal.SIGKILL], stopped
        assert "process 0 of 2 stops: another one has ended" in stopped[0].printed
        assert "Traceback" not in stopped[0].printed
    assert_done(cut.end(2, "--resume"))
    assert_same_bits(runs, whole, cut)


def assert_same_bits(runs: SimpleNamespace, a: Run, b: Run) -> None:
    """The same records, exported weights, and checkpoints but for the clock in their metadata."""
    assert runs.records(a) == runs.records(b)
    runs.assert_equal(weights_of(a), weights_of(b))
    one, two = (latest(run.folder / "checkpoints") for run in (a, b))
    for file in one.rglob("*.pt"):
        pair = (torch.load(folder / file.name, weights_only=True) for folder in (one, two))
        runs.assert_equal(*pair)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_process_killed_at_any_moment(runs, new_run, seed):
    """At a record of its own, and a little later: in a step, an evaluation, a checkpoint."""
    draw = random.Random(seed)
    changes = {"model": {"dropout": True}, "save_every": 2, "eval_every": 3}
    kind = draw.choice(["ddp", "fsdp2"])
    whole, cut = (new_run(name, {"kind": kind}, **changes) for name in ("whole", "cut"))
    assert_done(whole.end(2))
    killed = draw.randrange(2)
    with cut.start(2) as started:
        started.wait_for_lines(cut.folder / "metrics.jsonl", draw.randint(1, 12))
        time.sleep(draw.random() / 10)
        started.signal(killed, signal.SIGKILL)
        stopped = started.end()
    assert stopped[killed].status == -signal.SIGKILL
    assert stopped[1 - killed].status == BAD_INPUT
    assert "another one has ended" in stopped[1 - killed].printed
    arguments = ["--resume"] if latest(cut.folder / "checkpoints") else []
    assert_done(cut.end(2, *arguments))
    assert_same_bits(runs, whole, cut)


def test_a_full_disk_on_the_first_process_stops_all(new_run):
    """Metrics and weights fit below the limit, the optimizer's state does not."""
    run = new_run("full", save_every=2)
    ended = run.end(2, limits={0: 70_000})
    assert [process.status for process in ended] == [BAD_INPUT] * 2, ended
    for process in ended:
        assert "step-00000002 could not be written" in process.printed
        assert "then start again" in process.printed
        assert "Traceback" not in process.printed
    assert not list((run.folder / "checkpoints").iterdir())


def test_a_full_disk_on_another_process_stops_all(new_run):
    """Of a sharded model every process writes a part."""
    run = new_run("full", FSDP2, save_every=2)
    ended = run.end(2, limits={1: 20_000})
    assert [process.status for process in ended] == [BAD_INPUT] * 2, ended
    for process in ended:
        assert "step-00000002 could not be written (process 1 could not" in process.printed
    assert not list((run.folder / "checkpoints").iterdir())


def test_processes_of_different_runs_are_refused(new_run, settings):
    """The second process has another learning rate, as from another machine's copy of the file."""
    run, other = new_run("run"), new_run("other", lr=0.5)
    with run.start(2, of_ranks={1: ("train", str(other.file))}) as started:
        ended = started.end()
    assert [process.status for process in ended] == [BAD_INPUT] * 2, ended
    assert "all processes of a run must have the same lr, got 0.01 on process 0" in ended[0].printed
    assert "must have the same lr, got 0.5 on process 1 of 2" in ended[1].printed


def test_a_file_that_one_process_cannot_read_stops_all(new_run, tmp_path):
    run = new_run("run")
    other = new_run("other", data=[{"path": str(tmp_path / "gone.jsonl")}])
    with run.start(2, of_ranks={1: ("train", str(other.file))}) as started:
        ended = started.end()
    assert [process.status for process in ended] == [BAD_INPUT] * 2, ended
    assert "raco-fast: process 1 of 2: " in ended[0].printed
    assert "gone.jsonl" in ended[0].printed


@pytest.mark.slow
def test_torchrun_starts_the_command_and_passes_ctrl_c_on(runs, new_run):
    run = new_run("run", epochs=40)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "raco_fast"]
    command = [sys.executable, *launcher, "train"]
    with subprocess.Popen([*command, run.file], stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 120
        while not (run.folder / "metrics.jsonl").exists() and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=120)
    assert "with --resume to go on" in printed
    assert latest(run.folder / "checkpoints") is not None
    steps = len(runs.steps(run))
    assert 0 < steps < 200
    subprocess.run([*command, run.file, "--resume", "--log_every=50"], check=True, timeout=300)
    assert [r["step"] for r in runs.steps(run)][-1] == 200


@pytest.fixture
def adapted(tmp_path, save_tiny):
    """The settings of a model that is an adapter on the tiny one."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = save_tiny()
    config = LoraConfig(r=3, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "adapter")
    return {"name": str(tmp_path / "adapter"), "device": "cpu"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_processes_share_the_scoring_of_reward_models(runs, new_run, save_tiny, adapted, kind):
    rewards = [
        {"name": adapted["name"], "weight": 0.3, "beta": 0.5},
        {"name": str(save_tiny(seed=5)), "reference": str(save_tiny()), "weight": 0.2},
    ]
    losses = {"sure": {"name": "modpo", "weight": 0.5}}
    changes = {"losses": losses, "margin_rewards": {"sure": rewards}}
    check_against_one(runs, new_run, 2, {"kind": kind}, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("way", ["continue", "base", "merge", "reference"])
def test_processes_go_on_with_an_adapter_as_one_does(runs, new_run, adapted, kind, way):
    model = {
        "continue": {},
        "base": {"reference": "base"},
        "merge": {"adapter": "merge", "lora": LORA},
        "reference": {"adapter": "reference", "lora": LORA},
    }[way]
    model = adapted | model
    one, many = (new_run(n, p, model) for n, p in (("one", {}), ("many", {"kind": kind})))
    assert_done(one.end(1))
    assert_done(many.end(2))
    assert_close(runs, one, many)
    assert (many.folder / "base").exists() == (way == "merge")
