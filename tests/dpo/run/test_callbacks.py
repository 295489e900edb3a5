"""Who is told what of a run, and what becomes of it where one of them fails."""

import logging

import pytest
from processes import run as run_on

import raco_fast.dpo
from raco_fast.distributed.processes import OtherProcessError
from raco_fast.dpo.run.callbacks import Callback, CallbackError, Callbacks, RunStart
from raco_fast.dpo.run.checkpoint import latest
from raco_fast.dpo.run.given import NOTHING
from raco_fast.dpo.run.trainer import Interrupted, run_training

SHORT = {"epochs": 1, "max_steps": 3, "pairs_per_step": 4, "save_every": 2, "eval_every": 2}

SELDOM = {"save_every": None, "eval_every": None}


@pytest.fixture
def make_config(make_config, preference_files):
    """Of a run of three steps on few pairs; without checkpoints and evaluations on the way."""
    sources = [
        [{"path": str(f), "limit": n}] for f, n in zip(preference_files, (12, 4), strict=True)
    ]

    def make(**changes):
        few = {"data": sources[0], "eval_data": sources[1]}
        return make_config(**SHORT | few | changes)

    return make


class Noting(Callback):
    """Keeps what it is told; raises at an event, the n-th time it comes."""

    def __init__(self, event=None, at=1, error=None):
        self.told, self._event, self._at, self._error = [], event, at, error

    def _note(self, event, value):
        self.told.append((event, value))
        if event == self._event and [e for e, _ in self.told].count(event) == self._at:
            raise self._error or KeyError("loss")

    def on_start(self, run):
        self._note("start", run)

    def on_step(self, record):
        self._note("step", record)

    def on_evaluation(self, record):
        self._note("evaluation", record)
        record.clear()  # it is its own

    def on_save(self, folder):
        assert (folder / "checksums.json").is_file()
        self._note("save", folder.name)

    def on_end(self, result):
        self._note("end", result)

    @property
    def events(self):
        return [event for event, _ in self.told]


def trained(config, *callbacks, resume=False):
    return run_training(config, resume, False, NOTHING, callbacks)[1]


def test_a_callback_is_told_what_metrics_jsonl_says(runs, make_config):
    config, first, second = make_config(), Noting(), Noting()
    metrics = trained(config, first, second)
    assert first.events == [
        *("start", "evaluation", "step", "step", "evaluation", "save"),
        *("step", "evaluation", "save", "end"),
    ]
    assert second.events == first.events
    start = first.told[0][1]
    assert (start.folder, start.total_steps, start.resumed_at) == (config.folder, 3, None)
    assert (start.settings["lr"], start.settings["model.device"]) == (0.01, "cpu")
    of_steps = [value for event, value in second.told if event == "step"]
    timing = ("seconds", "tokens_per_second")
    assert [{k: v for k, v in r.items() if k not in timing} for r in of_steps] == runs.steps(config)
    assert [v for e, v in first.told if e == "save"] == ["step-00000002", "step-00000003"]
    assert first.told[-1] == ("end", metrics)
    assert metrics == runs.evaluations(config)[-1]


def test_a_failure_ends_the_run_after_a_checkpoint(runs, make_config, caplog, tmp_path):
    config = make_config(**SELDOM)
    bad, other = Noting("step", 2), Noting()
    match = (
        r"the callback Noting has failed in on_step: KeyError: 'loss'; the run has ended after "
        r"step 2: mend it or leave it out, then add --resume to go on from .*step-00000002$"
    )
    with caplog.at_level(logging.ERROR), pytest.raises(CallbackError, match=match) as failed:
        trained(config, bad, other)
    assert isinstance(failed.value.__cause__, KeyError)
    assert "Noting has failed in on_step" in caplog.text
    assert latest(config.folder / "checkpoints").name == "step-00000002"
    assert other.events == ["start", "evaluation", "step", "step", "save", "end"]
    assert bad.told[-1] == ("end", None)
    again = Noting()
    trained(config, again, resume=True)
    assert again.told[0][1].resumed_at == 2
    assert again.events == ["start", "step", "evaluation", "save", "end"]
    whole = make_config(
        output_dir=str(tmp_path / "whole"), **SHORT | {"save_every": None, "eval_every": None}
    )
    trained(whole)
    runs.assert_same_run(config, whole)


def test_failures_before_the_first_step_and_after_the_last(make_config, tmp_path):
    config, later = make_config(), Noting()
    with pytest.raises(CallbackError, match=r"failed in on_start: KeyError.*nothing was trained$"):
        trained(config, Noting("start"), later)
    assert later.events == []
    with pytest.raises(CallbackError, match=r"on_evaluation: KeyError.*nothing was trained$"):
        trained(config, Noting("evaluation"))
    assert latest(config.folder / "checkpoints") is None
    with pytest.raises(CallbackError, match=r"in on_end: KeyError.*its model saved as .*model$"):
        trained(config, Noting("end"))
    assert (config.folder / "model" / "config.json").is_file()


def test_a_run_that_is_stopped_tells_so(runs, make_config, monkeypatch):
    told = Noting("end")  # whose failure is not the reason that the run ends
    runs.interrupt_after(monkeypatch, 1)
    with pytest.raises(Interrupted):
        trained(make_config(), told)
    assert told.events[-2:] == ["save", "end"]
    assert told.told[-1] == ("end", None)


def test_ctrl_c_in_a_callback_is_no_failure_of_it(tmp_path):
    callbacks = Callbacks([Noting("start", error=KeyboardInterrupt())])
    with pytest.raises(KeyboardInterrupt):
        callbacks.start(RunStart(tmp_path, {}, 1, None))
    assert callbacks.failure is None


def test_a_callback_without_methods_of_its_own_is_told_in_vain(tmp_path):
    callbacks = Callbacks([Callback()])
    callbacks.start(RunStart(tmp_path, {}, 1, None))
    callbacks.record({"step": 1})
    callbacks.saved(tmp_path)
    callbacks.end({})
    callbacks.check("")


def _fails_on_the_first(settings):
    """What a process of two ends with, whose callback fails in a step, and what it was told."""
    keywords = {k: v for k, v in settings.items() if k not in ("model", "data")}
    told = Noting("step", 2)
    try:
        raco_fast.dpo.train(settings["model"], data=settings["data"], callbacks=[told], **keywords)
    except (CallbackError, OtherProcessError) as error:
        return type(error).__name__, str(error), told.events
    return None


@pytest.mark.slow
def test_the_first_of_two_processes_tells_and_its_failure_ends_both(settings, tmp_path):
    given = settings | {"max_steps": 3, "eval_data": []}
    first, second = run_on(2, _fails_on_the_first, given, folder=tmp_path)
    assert first[0] == "CallbackError"
    assert first[2] == ["start", "step", "step", "save", "end"]
    assert second[0] == "OtherProcessError"
    assert "process 0 of 2: the callback Noting has failed in on_step" in second[1]
    assert second[2] == []
