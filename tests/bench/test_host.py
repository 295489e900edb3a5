"""The suite of the host's time: records of both directions, whatever the time they show."""

from time import perf_counter

from bench.harness.records import Records
from bench.suites import host


def test_it_records_a_tap_forward_and_backward(tmp_path):
    records = Records(tmp_path, "cpu")
    host.measure(records, 1, 2, perf_counter())
    forward, backward = records.read()
    assert [forward["name"], backward["name"]] == ["host/forward", "host/backward"]
    for record in (forward, backward):
        assert record["params"] == {"m": 2, "layers": 1, "taps": 14}
        assert record["rounds"] >= 3
        assert record["ratio"] > 0
        assert abs(record["ms_per_tap"]) < 1e3 * record["p80"]
