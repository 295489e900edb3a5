"""`raco-fast sweep` and `raco-fast pareto`, as docs/sweeps.md has them."""

import json
import re
from pathlib import Path

import pytest
import yaml
from tiny_runs import build_rows, write_rows

from raco_fast.cli import program as cli
from raco_fast.dpo.run.trainer import Interrupted
from raco_fast.studies import worker

pytestmark = pytest.mark.usefixtures("in_process")
PAGE = (Path(__file__).parents[2] / "docs" / "sweeps.md").read_text(encoding="utf-8")


@pytest.fixture
def page_files(base, tmp_path, monkeypatch) -> list[list[str]]:
    """The files of the page's example in the working directory; the arguments of its commands."""
    monkeypatch.chdir(tmp_path)
    words = {"helpful": "yes", "harmless": "calm"}
    for name, seed in (("data", 1), ("eval_data", 2)):
        write_rows(tmp_path / name, build_rows(8, seed, words))
    own = {"data": [{"path": "data"}], "eval_data": [{"path": "eval_data"}]}
    own |= {"weights": {"helpful": 0.5, "harmless": 0.5}, "cache_dir": "cache"}
    Path("config.yaml").write_text(yaml.safe_dump(base | own))
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    Path("sweep.yaml").write_text(example)
    lines = re.findall(r"^    raco-fast (.*)$", PAGE, flags=re.MULTILINE)
    return [line.split("#")[0].split() for line in lines]


def test_the_example_of_the_page_runs(page_files, capfd):
    sweep, pareto = page_files
    assert cli.main(sweep) == 0
    out = capfd.readouterr().out
    assert "8 runs in runs/rules, 0 of them finished before; 2 at a time with 1 thread" in out
    assert re.search(r"^rule +weights +seed +run +helpful +harmless$", out, flags=re.MULTILINE)
    assert re.search(
        r"^cagrad-clip +helpful 0.8/harmless 0.2 +0 +finished +[01]", out, re.MULTILINE
    )
    assert re.search(r"^fairgrad/alpha 1 +helpful 0.2/harmless 0.8 +1 +finished", out, re.MULTILINE)
    assert "runs/rules/runs.json" in out
    folder = Path("runs/rules/rule=cagrad-clip,weights=helpful0.8_harmless0.2,seed=0")
    assert (folder / "config.yaml").is_file()
    assert cli.main(pareto) == 0
    out = capfd.readouterr().out
    for text in ("Points", "fairgrad(alpha=1.0)", "0.8/0.2", "runs/pareto/report.html"):
        assert text in out
    content = json.loads(Path("runs/pareto/pareto.json").read_text())
    assert [g["seeds"] for g in content["groups"]] == [[0, 1]] * 2
    file = Path("pareto.yaml")
    file.write_text("metric: margin\nreference: {helpful: -9, harmless: -9}\nby: [c]\n")
    assert cli.main(["pareto", "runs/rules", "--config", str(file), "--output_dir", "m"]) == 0
    content = json.loads(Path("m/pareto.json").read_text())
    assert content["reference"] == {"helpful": -9, "harmless": -9}
    assert "cagrad-clip, c=0.4" in capfd.readouterr().out


def test_a_failed_or_stopped_run_is_in_the_exit_status(page_files, capfd, monkeypatch):
    def train(config, resume):
        if config.seed == 0:
            raise ValueError("`data` is odd; mend it")
        raise Interrupted(3, config.folder)

    monkeypatch.setattr(worker, "train", train)
    grid = ["--grid", "{seed: [0, 1]}"]
    assert cli.main(["sweep", "sweep.yaml", *grid]) == 2
    out, err = capfd.readouterr()
    assert "0     failed" in out
    assert "1     stopped" in out
    assert err.endswith("raco-fast: failed: seed=0: `data` is odd; mend it\n")
    assert cli.main(["sweep", "sweep.yaml", "--grid", "{seed: [1]}"]) == 130
    assert "stopped; run the same command again to go on" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep"], "base"),
        (["sweep", "nowhere.yaml"], "`config` must be a file, got nowhere.yaml"),
        (["sweep", "sweep.yaml", "--grid", "{}"], "`grid` must name at least one setting"),
        (["sweep", "sweep.yaml", "--grid", "{lrr: [1]}"], "did you mean 'lr'?"),
        (["sweep", "sweep.yaml", "--job", "2"], "did you mean 'jobs'?"),
        (["pareto"], "runs"),
        (["pareto", "nowhere"], "`runs` must be folders, got nowhere, which is none"),
        (["pareto", "nowhere", "--metrics", "loss"], "did you mean 'metric'?"),
    ],
)
def test_bad_input_is_one_message(page_files, capfd, arguments, message):
    assert cli.main(arguments) == 2
    err = capfd.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 3


def test_a_launcher_is_refused(page_files, capfd, monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    for command in page_files:
        assert cli.main(command) == 2
        assert f"`{command[0]}` runs in one process" in capfd.readouterr().err
