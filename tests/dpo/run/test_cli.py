"""The command `raco-fast`: settings, exit statuses, messages, Ctrl-C and a full disk."""

import json
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch import nn

import raco_fast
from raco_fast.cli import program as cli
from raco_fast.cli.command import EXIT_FOUND_WRONG
from raco_fast.dpo.run import interrupt as interrupt_module
from raco_fast.dpo.run.checkpoint import latest
from raco_fast.dpo.run.interrupt import Interrupt
from raco_fast.engine import layer_rules

BAD_INPUT, INTERRUPTED = 2, 130


def run_bad(capfd, *arguments: str) -> str:
    """Run a command that must fail on its input; returns its message."""
    assert cli.main(arguments) == BAD_INPUT
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    (message,) = err.split("raco-fast: ")[1:]
    assert len(message.splitlines()) <= 3
    return message


def test_a_setting_on_the_command_line_overrides_the_file(config_file, settings, capfd):
    arguments = [
        "train",
        config_file(max_steps=1),
        "--lr",
        "2e-5",
        "--weights",
        "{sure: 0.4, kind: 0.6}",
        "--losses.kind={name: simpo, gamma: 1}",
    ]
    assert cli.main([*arguments, "--loss_options.beta=0.3", "--warmup_ratio=0"]) == 0
    out = capfd.readouterr().out
    assert f"saved {settings['output_dir']}/model; metrics in" in out
    assert "eval_rewards/accuracies/sure  0." in out
    lines = Path(settings["output_dir"], "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["learning_rate"] == 2e-5
    state = json.loads(
        (latest(Path(settings["output_dir"]) / "checkpoints") / "state.json").read_text()
    )
    used = state["run"]["settings"]
    assert used["weights"] == {"sure": 0.4, "kind": 0.6}
    assert used["losses"]["sure"] == {"name": "sigmoid", "beta": 0.3, "label_smoothing": 0.0}
    assert used["losses"]["kind"] == {"name": "simpo", "beta": 0.1, "gamma": 1}
    assert used["seed"] == 4  # from the file


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"lrr": 1e-3}, [], "lrr"),
        ({}, ["--lrr", "1e-3"], "--lrr"),
        ({"model": {"name": "x", "dtyp": "fp32"}}, [], "dtyp"),
        ({}, ["--lr", "fast"], "see raco-fast train --help"),
        ({}, ["--lr"], "argument --lr: expected one argument"),
        ({"epochs": 1.5}, [], "epochs"),
        ({"weights": {"sure": 0.7, "kind": 0.7}}, [], "`weights` must sum to 1"),
        ({"weights": {"sure": 1.2, "kind": -0.2}}, [], "`weights` must"),
        ({}, ["--c", "-1"], "`c` must"),
        (
            {"losses": {"kind": {"name": "exo", "tau": 1.0}}},
            [],
            "`tau` is no option of the loss 'exo'",
        ),
        ({"loss_options": {"label_smoothing": 0.7}}, [], "`label_smoothing` must be in [0, 0.5)"),
        ({}, ["--tokens.max_length", "1"], "`max_length` must be at least 2"),
        ({}, ["--model.device", "cuda:99"], "`device` must be 'auto'"),
        ({"schedule": "step"}, [], "schedule"),
        ({"model": {"name": "./not/there"}}, [], "'./not/there' is none of them on this machine"),
        ({"data": [{"path": "gone.jsonl"}]}, [], "gone.jsonl"),
        ({}, ["--resume"], "`resume`: there is no checkpoint under"),
        ({"weights": {"sure": 0.7, "nice": 0.3}}, [], "'nice'"),
    ],
)
def test_bad_input_is_one_message_and_status_2(config_file, capfd, changes, arguments, message):
    assert message in run_bad(capfd, "train", config_file(**changes), *arguments)


def test_a_bad_data_line_is_named_with_its_file(config_file, capfd, tmp_path, preference_files):
    lines = preference_files[0].read_text().splitlines()
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join([*lines[:4], lines[4][:30]]))
    assert f"{file}:5" in run_bad(capfd, "train", config_file(data=[{"path": str(file)}]))


def test_a_missing_config_file_or_command(capfd, tmp_path):
    assert "nowhere.yaml" in run_bad(capfd, "train", str(tmp_path / "nowhere.yaml"))
    assert "train" in run_bad(capfd)
    assert "fly" in run_bad(capfd, "fly")


def test_the_module_runs_as_the_command_does():
    command = [sys.executable, "-m", "raco_fast", "fly"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == BAD_INPUT
    assert "fly" in run.stderr


def test_the_version_is_the_package_s(capfd):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capfd.readouterr().out.strip() == f"raco-fast {raco_fast.__version__}"


def test_help_reads_no_models_library():
    code = "import sys; from raco_fast.cli import program as cli; "
    code += "cli.parser_of(None).format_help(); "
    code += "print([m for m in ('transformers', 'peft', 'raco_fast.dpo') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("command", [None, "train", "verify", "conflict", "demo"])
def test_help_lists_the_options(capfd, command):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"] if command else ["--help"])
    assert stop.value.code == 0
    out = capfd.readouterr().out
    for text in {
        None: ("train", "verify", "conflict", "demo"),
        "train": ("--config", "--resume", "--lr", "--model.lora", "peak learning rate"),
        "verify": ("--config", "--lr", "--model.lora", "peak learning rate"),
        "conflict": ("--config", "--pairs", "--out", "--lr", "peak learning rate"),
        "demo": ("--quick", "--seeds"),
    }[command]:
        assert text in out


def start_run(*arguments: str, limit: int = resource.RLIM_INFINITY) -> subprocess.Popen:
    """`raco-fast train` in a process of its own, in which no file may grow beyond `limit` bytes."""
    code = "import resource, sys; from raco_fast.cli.program import main; "
    code += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, "train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_lines(file: Path, n: int, process: subprocess.Popen) -> None:
    until = time.monotonic() + 300
    while time.monotonic() < until and process.poll() is None:
        if file.exists() and file.read_text().count("\n") >= n:
            return
        time.sleep(0.01)
    pytest.fail(f"no {n} lines in {file.name}: {process.communicate()}")


def test_ctrl_c_saves_says_how_to_go_on_and_the_rest_is_the_uninterrupted_run(
    runs, make_config, config_file, settings, capfd, tmp_path
):
    long = {"epochs": 8, "weights": {"sure": 0.6, "kind": 0.4}}
    process = start_run(config_file(**long))
    metrics = Path(settings["output_dir"]) / "metrics.jsonl"
    wait_for_lines(metrics, 4, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == INTERRUPTED
    assert "raco-fast: data: 40 of 40 pairs kept" in err
    assert "finishing this step, then saving; Ctrl-C again stops without saving" in err
    assert "Run the same command with --resume to go on" in err
    assert "Traceback" not in err
    assert len(metrics.read_text().splitlines()) < 35  # it stopped long before the end

    assert cli.main(["train", config_file(**long), "--resume"]) == 0
    whole = str(tmp_path / "whole")
    assert cli.main(["train", config_file(**long), "--output_dir", whole]) == 0
    runs.assert_same_run(make_config(**long), make_config(**long, output_dir=whole))


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint_and_a_message(
    runs, make_config, config_file, settings, monkeypatch
):
    """Metrics, reference cache and weights fit below the limit, the optimizer's state does not."""
    runs.interrupt_after(monkeypatch, 1)
    assert cli.main(["train", config_file()]) == INTERRUPTED
    checkpoints = Path(settings["output_dir"], "checkpoints")
    before = {file: file.read_bytes() for file in latest(checkpoints).iterdir()}
    sizes = {file.name: len(content) for file, content in before.items()}
    assert max(sizes["model.safetensors"], sizes["rng.pt"]) < 70_000 < sizes["optimizer.pt"]

    process = start_run(config_file(save_every=1), "--resume", limit=70_000)
    _, err = process.communicate(timeout=300)
    assert process.returncode == BAD_INPUT
    assert "step-00000002 could not be written" in err
    assert "then add --resume to go on from" in err
    assert "Traceback" not in err
    assert {file: file.read_bytes() for file in latest(checkpoints).iterdir()} == before
    assert [folder.name for folder in checkpoints.iterdir()] == ["step-00000001"]

    monkeypatch.undo()
    assert cli.main(["train", config_file(), "--resume"]) == 0
    whole = settings["output_dir"] + "-whole"
    assert cli.main(["train", config_file(), "--output_dir", whole]) == 0
    runs.assert_same_run(make_config(), make_config(output_dir=whole))


@pytest.fixture
def python_handles_ctrl_c():
    """As in a terminal; a shell's background jobs start with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_sigterm_is_a_ctrl_c(capfd):
    before = signal.getsignal(signal.SIGTERM)
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.requested
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_that_a_launcher_passes_on_counts_once(monkeypatch, capfd, python_handles_ctrl_c):
    clock = [100.0]
    monkeypatch.setattr(interrupt_module.time, "monotonic", lambda: clock[0])
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        clock[0] += 0.5
        signal.raise_signal(signal.SIGTERM)  # the launcher's, of the same Ctrl-C
        assert interrupt.requested
        clock[0] += 1.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_second_ctrl_c_stops_at_once(capfd, python_handles_ctrl_c):
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert "Ctrl-C again stops without saving" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):  # outside, it is Python's own again
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("saved", [False, True])
def test_stopping_at_once_says_what_there_is(config_file, settings, capfd, monkeypatch, saved):
    from raco_fast.dpo.run import trainer

    def stopped(config, resume, overwrite):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "train", stopped)
    if saved:
        Path(settings["output_dir"], "checkpoints", "step-00000007").mkdir(parents=True)
    assert cli.main(["train", config_file()]) == INTERRUPTED
    err = capfd.readouterr().err
    if saved:
        assert "step-00000007 is the last checkpoint. Run the same command with --resume" in err
    else:
        assert "stopped before any checkpoint was written; run the same command again" in err


@pytest.mark.parametrize("lora", [None, {"r": 4, "alpha": 8}], ids=["full", "lora"])
def test_verify_compares_every_mode_and_writes_nothing(config_file, settings, capfd, lora):
    model = settings["model"] | {"lora": lora}
    assert cli.main(["verify", config_file(model=model), "--pairs_per_micro_batch", "3"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[-1] == "exact: no difference is more than rounding"
    assert [line.split(":")[0] for line in lines[-4:-1]] == [
        "mode one_backward",
        "mode gram_first",
        "mode gram_first, keep_dy",
    ]
    errors = [float(line.split()[-1]) for line in lines[:-4]]
    assert len(errors) > 10
    assert 0 < max(errors) < 1e-4
    assert not Path(settings["output_dir"]).exists()


def test_verify_says_what_is_wrong_and_exits_with_1(config_file, capfd, monkeypatch):
    def wrong(module, x, dy, segments):
        return layer_rules.linear(module, x, 1.01 * dy, segments)

    monkeypatch.setattr(layer_rules, "_RULES", {**layer_rules._RULES, nn.Linear: wrong})
    assert cli.main(["verify", config_file()]) == EXIT_FOUND_WRONG
    out, err = capfd.readouterr()
    assert re.search(
        r"more than rounding: model\.layers.*the rule of that layer does not desc", out
    )
    assert err.endswith("raco-fast: not exact: differences of more than rounding\n")
    monkeypatch.setattr(layer_rules, "_RULES", {nn.Embedding: layer_rules.embedding})
    assert cli.main(["verify", config_file()]) == EXIT_FOUND_WRONG
    assert "raco-fast: not exact: `model` has trained parameters in layers without" in (
        capfd.readouterr().err
    )


def test_verify_has_the_messages_of_train(config_file, capfd):
    assert "`weights` must sum to 1" in run_bad(
        capfd, "verify", config_file(), "--weights", "{sure: 0.4, kind: 0.4}"
    )


@pytest.mark.parametrize("command", ["verify", "conflict", "demo"])
def test_what_runs_in_one_process_refuses_several(config_file, capfd, monkeypatch, command):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    arguments = [command] if command == "demo" else [command, config_file()]
    message = run_bad(capfd, *arguments)
    assert f"`{command}` runs in one process, but a launcher has started 2" in message


def test_a_launcher_that_says_only_half_is_bad_input(config_file, capfd, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert "LOCAL_RANK must be set" in run_bad(capfd, "train", config_file())


def test_parallel_options_are_settings(config_file, capfd):
    assert "`parallel.shard` is an option of `parallel.kind` 'fsdp2'" in run_bad(
        capfd, "train", config_file(), "--parallel.shard=2"
    )
    parallel = {"kind": "fsdp2", "shard": 2}
    assert "`parallel.kind` 'fsdp2' needs a launcher" in run_bad(
        capfd, "train", config_file(parallel=parallel)
    )
