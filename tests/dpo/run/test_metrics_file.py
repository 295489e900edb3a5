import json
import math

import pytest

from raco_fast.dpo.run.metrics_file import MetricsFile, read_records


def test_records_are_json_lines_with_null_for_what_is_not_a_number(tmp_path):
    file = MetricsFile(tmp_path / "new" / "metrics.jsonl")
    file.write({"step": 1, "loss/x": math.nan, "loss/y": 0.1 + 0.2, "raco/gap": -math.inf})
    file.write({"step": 2, "loss/x": 1.5})
    file.close()
    lines = file.path.read_text().splitlines()
    assert (
        lines[0] == '{"step": 1, "loss/x": null, "loss/y": 0.30000000000000004, "raco/gap": null}'
    )
    assert read_records(file.path)[1] == {"step": 2, "loss/x": 1.5}


def test_a_resumed_run_drops_later_records_and_a_line_cut_in_half(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1 / 3 / step}) for step in (1, 2, 2, 3, 4)]
    path.write_text("\n".join(lines) + '\n{"step": 5, "lo')
    MetricsFile(path, resumed_at=2).write({"step": 3, "loss": 7.0})
    assert path.read_text().splitlines() == [*lines[:3], '{"step": 3, "loss": 7.0}']


def test_a_new_run_starts_a_new_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    MetricsFile(path)
    assert read_records(path) == []
    assert read_records(tmp_path / "none.jsonl") == []


def test_a_broken_line_before_the_last_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: a line must be a JSON record"):
        read_records(path)


def test_tensorboard_gets_the_numbers_and_forgets_what_a_resumed_run_repeats(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, tensorboard=True)
    for step in (1, 2, 3):
        first.write({"step": step, "loss/x": float(step), "note": "text", "gone": math.nan})
    first.close()
    second = MetricsFile(path, resumed_at=2, tensorboard=True)
    second.write({"step": 3, "loss/x": 30.0})
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["loss/x"]
    assert [(e.step, e.value) for e in events.Scalars("loss/x")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
