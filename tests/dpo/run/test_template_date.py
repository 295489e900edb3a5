"""A run whose template prints the date goes on with the day it began with."""

import os
import time
from datetime import date

import pytest
from processes import run
from transformers import AutoTokenizer

from raco_fast.distributed.processes import Processes
from raco_fast.dpo.run import template_date
from raco_fast.dpo.run.template_date import with_date
from raco_fast.dpo.run.trainer import Interrupted, train

# Every day has a word of its own in this tokenizer, which knows no numbers.
DATED = (
    "{{ ['tea', 'rain', 'chess', 'bread', 'music'][strftime_now('%j') | int % 5] }} "
    "{% for m in messages %}{{ m.content }} {% endfor %}"
)
SHORT = {"max_steps": 4, "eval_data": []}


@pytest.fixture
def at(monkeypatch):
    """A function that sets the day: `at("2026-11-29")`."""

    def set_day(day):
        class Calendar(date):
            @classmethod
            def today(cls):
                return date.fromisoformat(day)

        monkeypatch.setattr(template_date, "date", Calendar)

    return set_day


@pytest.fixture(scope="module")
def dated(save_tiny):
    return {"name": str(save_tiny(3, DATED))}


def kept(folder):
    file = folder / "template_date.txt"
    return file.read_text() if file.exists() else None


def caches(tmp_path):
    return sorted(file.name for file in (tmp_path / "cache").glob("*.safetensors"))


def test_a_run_resumed_on_another_day_is_the_undisturbed_one(
    at, dated, make_config, runs, monkeypatch, tmp_path
):
    whole, cut, other = (
        make_config(dated, output_dir=str(tmp_path / name), **SHORT)
        for name in ("whole", "cut", "other")
    )
    at("2026-11-29")
    runs.interrupt_after(monkeypatch, None)
    train(whole)
    runs.interrupt_after(monkeypatch, 2)
    with pytest.raises(Interrupted):
        train(cut)
    found = caches(tmp_path)
    at("2026-12-01")
    runs.interrupt_after(monkeypatch, None)
    train(cut, resume=True)
    runs.assert_same_run(whole, cut)
    # The next run of the same cache_dir has its reference log-probabilities there.
    train(other)
    runs.assert_same_run(whole, other)
    assert caches(tmp_path) == found
    assert kept(other.folder) == kept(tmp_path / "cache") == "2026-11-29\n"
    # What is saved is the template, not one of that day.
    assert AutoTokenizer.from_pretrained(cut.folder / "model").chat_template == DATED


def test_the_day_of_the_run_comes_first_and_a_day_asked_for_stays_with_its_run(
    at, dated, make_config, tmp_path, runs, monkeypatch
):
    at("2026-11-29")
    asked = make_config(dated, tokens={"date": "2026-12-03"}, **SHORT)
    runs.interrupt_after(monkeypatch, 2)
    with pytest.raises(Interrupted):
        train(asked)
    assert (kept(asked.folder), kept(tmp_path / "cache")) == ("2026-12-03\n", None)
    another = make_config(dated, tokens={"date": "2026-12-04"}, **SHORT)
    with pytest.raises(
        ValueError, match=r"`tokens.date` must be '2026-12-03', .* got '2026-12-04'"
    ):
        train(another, resume=True)
    (tmp_path / "cache" / "template_date.txt").write_text("2025-01-01\n")
    unsaid = make_config(dated, **SHORT)
    runs.interrupt_after(monkeypatch, None)
    train(unsaid, resume=True)
    whole = make_config(dated, output_dir=str(tmp_path / "whole"), **asked_for("2026-12-03"))
    train(whole)
    runs.assert_same_run(whole, unsaid)


def asked_for(day):
    return {"tokens": {"date": day}, **SHORT}


def test_without_a_date_in_the_template_nothing_is_kept(at, make_config, tmp_path):
    at("2026-11-29")
    config = make_config(**SHORT, chunk_tokens=16)
    train(config)
    assert kept(config.folder) is kept(tmp_path / "cache") is None


def test_a_damaged_file_is_named(make_config):
    config = make_config()
    config.folder.mkdir()
    (config.folder / "template_date.txt").write_bytes(b"\xff yesterday")
    with pytest.raises(
        ValueError, match=r"template_date.txt` must be a day .*, or set `tokens.date`"
    ):
        with_date(config, Processes())


def day_in_a_zone_of_its_own(config):
    """Two zones 26 hours apart never have the same day."""
    processes = Processes()
    os.environ["TZ"] = ("Etc/GMT+12", "Etc/GMT-14")[processes.rank]
    time.tzset()
    return with_date(config, processes).tokens.date, date.today().isoformat()


def test_all_processes_have_the_day_of_the_first(make_config, tmp_path):
    (first, here), (second, there) = run(
        2, day_in_a_zone_of_its_own, make_config(), folder=tmp_path
    )
    assert first == second == here < there
