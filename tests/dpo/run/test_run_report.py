"""The pages of runs: what they say against the metrics, and as a browser shows them."""

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from raco_fast.cli import program as cli
from raco_fast.dpo.run import curves as curves_module
from raco_fast.dpo.run import run_report
from raco_fast.dpo.run.metrics_file import is_evaluation, read_records
from raco_fast.dpo.run.trainer import train
from raco_fast.report import share_with_interval

BROWSER = shutil.which("chromium")


class Cells(HTMLParser):
    """Rows of all tables, as texts, and whether every element is closed in its order."""

    def __init__(self):
        super().__init__()
        self.rows, self.open, self.inside = [], [], False

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """Folders of two runs of other rules, each with its page."""
    return tmp_path_factory.mktemp("two")


@pytest.fixture
def run_folders(make_config, two_runs):
    folders = [two_runs / rule for rule in ("linear", "cagrad-clip")]
    for folder in folders:
        if not folder.exists():
            config = make_config(rule=folder.name, eval_every=2, max_steps=4)
            train(replace(config, report=True, output_dir=str(folder)))
    return folders


def test_the_page_of_a_run_says_what_its_metrics_say(run_folders):
    folder = run_folders[0]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(?:src|href)="(?!#)', page), "it needs another file"
    cells = Cells()
    cells.feed(page)
    assert not cells.open
    last = [r for r in read_records(folder / "metrics.jsonl") if is_evaluation(r)][-1]
    for name in ("sure", "kind"):
        (row,) = (r for r in cells.rows if r[:2] == ["linear", name])
        pairs = int(last[f"eval_pairs/{name}"])
        assert row[2] == str(pairs)
        assert row[3].endswith(f"→ {last[f'eval_loss/{name}']:.4f}")
        assert row[4] == share_with_interval(last[f"eval_rewards/accuracies/{name}"], pairs)
    assert ["rule", "linear"] in cells.rows
    assert ["linear", "coefficient", "sure", "0.700"] in cells.rows
    assert page.count("<svg") == 1


def test_compared_runs_stand_side_by_side(run_folders, tmp_path, capfd):
    page = tmp_path / "new" / "both.html"
    assert cli.main(["compare", *map(str, run_folders), "--out", str(page)]) == 0
    out = capfd.readouterr().out
    for text in (out, page.read_text(encoding="utf-8")):
        assert all(folder.name in text for folder in run_folders)
    assert f"page: {page}" in out


def test_runs_that_cannot_be_compared(run_folders, tmp_path):
    with pytest.raises(ValueError, match=r"`runs` must name two or more different folders"):
        run_report.compare([run_folders[0], run_folders[0]], tmp_path / "x.html")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no metrics.jsonl with a record; name the"):
        run_report.compare([run_folders[0], tmp_path / "empty"], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_without_matplotlib_the_page_says_so(run_folders, tmp_path, monkeypatch):
    for module in (run_report, curves_module):
        monkeypatch.setattr(module, "has_pictures", lambda: False)
    page = tmp_path / "x.html"
    run_report.compare(run_folders, page)
    assert "pip install" in page.read_text(encoding="utf-8")
    assert "<svg" not in page.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no chromium (Debian's package) to show it")
def test_a_browser_shows_the_whole_page(run_folders, tmp_path):
    shot = tmp_path / "page.png"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--screenshot={shot}"]
    command += ["--window-size=1200,2400", (run_folders[0] / "report.html").as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "ERR_" not in run.stderr
    from matplotlib.image import imread

    picture = imread(Path(shot))
    colors = {tuple(c) for c in (picture[::3, ::3, :3] * 7).round().reshape(-1, 3).tolist()}
    assert len(colors) > 8, "only a blank page, or text alone"
