"""The README is true: its loops run, its config parses, its tree is the tree."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_training_loop_is_short_and_trains() -> None:
    loop = blocks("python")[0]
    assert len([line for line in loop.splitlines() if line.strip()]) <= 15
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(loop, names)
    losses = names["losses"]
    assert isinstance(losses, dict)
    assert losses["fit"] < 0.5  # the targets' variance is 8; an untrained layer is above it


@pytest.mark.parametrize("code", blocks("python")[1:])
def test_every_other_example_runs(code: str) -> None:
    exec(code, {})


def test_the_config_example_is_a_config(tmp_path: Path) -> None:
    from raco_fast.cli.program import COMMANDS, parser_of
    from raco_fast.dpo.run.config import TrainConfig
    from raco_fast.settings.parsing import made

    (config,) = blocks("yaml")
    file = tmp_path / "config.yaml"
    file.write_text(config)
    parser = parser_of(COMMANDS["train"])
    values = parser.parse_args(["train", "--config", str(file), "--lr", "2e-5"])
    assert made(parser, values, TrainConfig).lr == 2e-5


def tracked_files() -> list[str]:
    """Paths of the files in the repository."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    return tracked.stdout.splitlines()


def named_paths() -> list[str]:
    """What the README's tree names, as paths; a level is two spaces."""
    (tree,) = blocks("text")
    parents: list[str] = []
    paths = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        parents = [*parents[:depth], line.split()[0].rstrip("/")]
        paths.append("/".join(parents))
    return paths


def test_the_file_tree_is_the_tree() -> None:
    named = named_paths()
    for path in named:
        assert (ROOT / path).exists(), path
    top = {path for path in named if "/" not in path}
    assert top == {path.split("/")[0] for path in tracked_files()}


def test_the_file_tree_names_every_room() -> None:
    folders = {str(Path(path).parent) for path in tracked_files()}
    rooms = {f for f in folders if f.startswith(("raco_fast/", "csrc/", "bench/"))}
    deeper = {f for f in rooms if f.startswith("bench/results/")}
    assert rooms - deeper <= set(named_paths())


@pytest.mark.parametrize("command", ["demo", "test", "test-slow", "check", "bench", "real-run"])
def test_every_make_target_exists(command: str) -> None:
    assert f"make {command}" in README
    assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)", README))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()
