"""TensorBoard, Weights & Biases and MLflow get a run's numbers, and a resumed run is the same run.

What has no server here is stood in for by a module that keeps what it is called with; the libraries
themselves, offline, where they are installed.
"""

import math
import sys
import threading
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest

from raco_fast.dpo.run import loggers
from raco_fast.dpo.run.callbacks import CallbackError, Callbacks, RunStart
from raco_fast.dpo.run.loggers import LEFT_BEHIND, LOGGERS, MLflow, TensorBoard, WandB
from raco_fast.dpo.run.resuming import remove_run
from raco_fast.dpo.run.trainer import train

SETTINGS = {"lr": 0.1, "weights": {"sure": 0.7, "kind": 0.3}, **{f"s{k}": k for k in range(120)}}
RECORDS = [
    {"step": 1, "loss/x": 1.0, "raco/cosine/a:b": None, "note": "text"},
    {"step": 2, "loss/x": 2.0},
    {"step": 2, "eval_loss/x": 2.5},
    {"step": 3, "loss/x": 3.0},
]


@pytest.fixture
def stand_in(monkeypatch):
    """A function (name, attributes) that has a module imported by that name."""

    def make(name, **attributes):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)

    return make


def tell(kind, folder, records, resumed_at=None, result=None):
    """A part of a run to a new logger, to its end."""
    callbacks = Callbacks([kind()])
    callbacks.start(RunStart(folder, SETTINGS, 3, resumed_at))
    for record in records:
        callbacks.record(record)
    callbacks.saved(folder / "checkpoints" / "step-00000002")
    callbacks.end(result)
    callbacks.check("")


def test_tensorboard_forgets_what_a_resumed_run_repeats(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tell(TensorBoard, tmp_path, RECORDS)
    tell(TensorBoard, tmp_path, [{"step": 3, "loss/x": 30.0}], resumed_at=2, result={})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["eval_loss/x", "loss/x"]
    assert [(e.step, e.value) for e in events.Scalars("loss/x")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_tensorboard_on_a_full_disk(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    board = TensorBoard()
    board.on_start(RunStart(tmp_path, {}, 3, None))
    queue = board._writer.file_writer.event_writer._async_writer
    queue._writer._writer.filename = "/dev/full"
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # its thread ends of the error
    with pytest.raises(OSError, match=r"tensorboard could not be written \(.*No space left"):
        write_and_flush(board, tmp_path)
    queue._worker.join()


def write_and_flush(board, folder):
    """The thread may have failed before the one, or by the other."""
    board.on_step({"step": 1, "loss": 1.0})
    board.on_save(folder)


@pytest.fixture
def runs_of_wandb(stand_in):
    """[(arguments of `init`, [(numbers, step)], [exit codes])], a run each time it is begun."""
    begun = []

    def init(**given):
        logged, ended = [], []
        begun.append((given, logged, ended))
        return SimpleNamespace(
            id=given["id"] or "made-up",
            log=lambda numbers, step: logged.append((numbers, step)),
            finish=lambda exit_code: ended.append(exit_code),
        )

    stand_in("wandb", init=init)
    return begun


def test_wandb_goes_on_with_its_run(tmp_path, runs_of_wandb, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    tell(WandB, tmp_path, RECORDS)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    tell(WandB, tmp_path, RECORDS[3:], resumed_at=2, result={})
    (first, logged, ended), (second, more, whole) = runs_of_wandb
    assert (first["id"], first["project"], first["name"]) == (None, "raco-fast", tmp_path.name)
    assert (first["config"], first["dir"]) == (SETTINGS, str(tmp_path))
    assert logged == [
        ({"loss/x": 1.0}, 1),
        ({"loss/x": 2.0}, 2),
        ({"eval_loss/x": 2.5}, 2),
        ({"loss/x": 3.0}, 3),
    ]
    assert ended == [1]
    assert (second["id"], second["resume"], second["project"]) == ("made-up", "allow", "mine")
    assert more == logged[3:]
    assert whole == [0]


def test_a_logger_that_cannot_begin_ends_the_run_at_once(tmp_path, stand_in):
    def init(**given):
        raise RuntimeError("no API key")

    stand_in("wandb", init=init)
    match = r"the callback WandB has failed in on_start: RuntimeError: no API key; nothing was"
    with pytest.raises(CallbackError, match=match):
        tell(WandB, tmp_path, [])


@pytest.fixture
def server_of_mlflow(stand_in, monkeypatch):
    """What a client was asked for: experiments, and by run its parameters, metrics and states."""
    server = SimpleNamespace(experiments={}, runs={})

    class Client:
        def get_experiment_by_name(self, name):
            found = server.experiments.get(name)
            return found and SimpleNamespace(experiment_id=found)

        def create_experiment(self, name):
            return server.experiments.setdefault(name, f"number of {name}")

        def create_run(self, experiment, run_name):
            id = f"{run_name} {len(server.runs)} in {experiment}"
            server.runs[id] = SimpleNamespace(params={}, metrics=[], states=[])
            return SimpleNamespace(info=SimpleNamespace(run_id=id))

        def log_batch(self, id, metrics=(), params=()):
            assert len(params) <= 100
            server.runs[id].params.update(params)
            server.runs[id].metrics += [(name, value, step) for name, value, _, step in metrics]

        def update_run(self, id, status):
            server.runs[id].states.append(status)

        set_terminated = update_run

    stand_in("mlflow", MlflowClient=Client)
    stand_in("mlflow.entities", Metric=lambda *given: given, Param=lambda *given: given)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return server


def test_mlflow_goes_on_with_its_run(tmp_path, server_of_mlflow):
    tell(MLflow, tmp_path, RECORDS)
    tell(MLflow, tmp_path, RECORDS[3:], resumed_at=2, result={})
    tell(MLflow, tmp_path / "other", [], result={})
    first, _ = server_of_mlflow.runs.values()
    assert list(server_of_mlflow.experiments) == ["raco-fast"]
    assert first.params == {name: str(value) for name, value in SETTINGS.items()}
    of_step_3 = [("loss/x", 3.0, 3)]
    before = [("loss/x", 1.0, 1), ("loss/x", 2.0, 2), ("eval_loss/x", 2.5, 2)]
    assert first.metrics == before + 2 * of_step_3
    assert first.states == ["KILLED", "RUNNING", "FINISHED"]


def test_names_that_mlflow_does_not_take_stay_apart(tmp_path, server_of_mlflow):
    tell(MLflow, tmp_path, [{"step": 1, "loss/é": 1.0, "loss/è": 2.0, "raco/cosine/a:b": 0.5}])
    (run,) = server_of_mlflow.runs.values()
    assert [name for name, *_ in run.metrics] == ["loss/_e9_", "loss/_e8_", "raco/cosine/a:b"]


@pytest.mark.slow
def test_wandb_itself_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tell(WandB, tmp_path, RECORDS)
    known = (tmp_path / WandB.NOTE).read_text()
    tell(WandB, tmp_path, RECORDS[3:], resumed_at=2, result={})
    assert (tmp_path / WandB.NOTE).read_text() == known
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{known.strip()}"))) >= 1


@pytest.mark.slow
def test_mlflow_itself_with_a_folder(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "server").as_uri())
    tell(MLflow, tmp_path, RECORDS)
    tell(MLflow, tmp_path, RECORDS[3:], resumed_at=2, result={})
    client, id = mlflow.MlflowClient(), (tmp_path / MLflow.NOTE).read_text().strip()
    steps = {metric.step: metric.value for metric in client.get_metric_history(id, "loss/x")}
    assert steps == {1: 1.0, 2: 2.0, 3: 3.0}
    found = client.get_run(id)
    assert (found.info.status, found.data.params["lr"]) == ("FINISHED", "0.1")


def test_a_config_names_them(make_config, runs_of_wandb, preference_files):
    config = make_config(
        loggers=["wandb"],
        max_steps=1,
        data=[{"path": str(preference_files[0]), "limit": 8}],
        eval_data=[],
    )
    train(config)
    ((given, logged, ended),) = runs_of_wandb
    assert given["config"]["pairs_per_step"] == 8
    assert [step for _, step in logged] == [1]
    assert math.isfinite(logged[0][0]["raco/cosine/sure:kind"])
    assert ended == [0]
    remove_run(config.folder)
    assert not {p.name for p in config.folder.iterdir()} & {"model", "checkpoints", *LEFT_BEHIND}


@pytest.mark.parametrize("name", list(LOGGERS))
def test_a_package_that_is_missing_is_noticed_at_once(make_config, monkeypatch, name):
    monkeypatch.setattr(loggers, "find_spec", lambda package: None)
    match = rf"`loggers`: '{name}' needs the package {name}; pip install 'raco-fast\[{name}\]'"
    with pytest.raises(ValueError, match=match):
        make_config(loggers=[name])


@pytest.mark.parametrize("names", [["comet"], ["tensorboard", "tensorboard"]])
def test_names_of_loggers(make_config, names, monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda package: package)
    with pytest.raises(ValueError, match=r"`loggers` must name each of \['mlflow', .*at most once"):
        make_config(loggers=names)
