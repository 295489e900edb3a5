import json
import math

import pytest

from raco_fast.dpo.run.metrics_file import MetricsFile, read_records


def test_records_are_json_lines_with_null_for_what_is_not_a_number(tmp_path):
    file = MetricsFile(tmp_path / "new" / "metrics.jsonl")
    file.write({"step": 1, "loss/x": math.nan, "loss/y": 0.1 + 0.2, "raco/gap": -math.inf})
    file.write({"step": 2, "loss/x": 1.5})
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


TORN = b'{"step": 4, "loss": 1}\n{"ste\n\x00\x00\n\xff{"step": 9}\n[1]\n{"step": 6, "loss": 2}\n'


def test_what_a_power_cut_left_after_the_last_checkpoint_is_dropped(tmp_path):
    """Until then everything was forced to disk; of what was not, anything may be there."""
    path = tmp_path / "metrics.jsonl"
    lines = b'{"step": 2, "loss": 1.0}\n{"step": 3, "loss": 0.5}\n'
    path.write_bytes(lines + TORN)
    MetricsFile(path, resumed_at=3).write({"step": 4, "loss": 7.0})
    assert path.read_bytes() == lines + b'{"step": 4, "loss": 7.0}\n'
    path.write_bytes(lines + TORN + b'{"step": 3, "loss": 0.4}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:4: a line must be a JSON record"):
        MetricsFile(path, resumed_at=3)


def test_an_evaluation_that_the_checkpoint_does_not_know_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [{"step": 2, "eval_x": 1.0}, {"step": 3, "loss": 2.0}, {"step": 3, "eval_x": 3.0}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    MetricsFile(path, resumed_at=3, evaluated=True)
    assert read_records(path) == records
    MetricsFile(path, resumed_at=3, evaluated=False)
    assert read_records(path) == records[:2]
