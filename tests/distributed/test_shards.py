"""Where shards lie, by processes that hold some, and that nobody else loads DTensors for it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raco_fast.backends.rounding import Place
from raco_fast.distributed.shards import place_of

WORKER = Path(__file__).resolve().parents[1] / "helpers" / "shard_places.py"


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> list[dict]:
    """What each of four processes found: case -> [offset, width, pitch, elements] or message."""
    store = tmp_path_factory.mktemp("group") / "store"
    started = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(store)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


def test_shards_lie_where_their_elements_are(reports):
    # That each element's number is right was asserted by the processes; here: what they looked at.
    names = [name for name, found in reports[0].items() if isinstance(found, list)]
    kinds = {"run": 0, "rows": 0, "empty": 0}
    for name in names:
        for _, width, _, count in (report[name] for report in reports):
            kinds["empty" if not count else "rows" if width else "run"] += 1
    assert len(names) == 21
    assert min(kinds.values()) > 2
    assert [report["rows"][0] for report in reports] == [0, 18, 36, 54]
    assert all(report["rows"][1:3] == [0, 0] for report in reports)  # one run, the fastest kernel
    assert [report["columns"] for report in reports] == [
        [0, 3, 10, 18],
        [3, 3, 10, 18],
        [6, 3, 10, 18],
        [9, 1, 10, 6],
    ]


@pytest.mark.parametrize(
    ("case", "cause"),
    [
        ("two more", r"cut dimension 0 and at most one more.*Shard\(dim=1\), Shard\(dim=2\)"),
        ("strided", r"in single pieces, got \(_StridedShard\("),
        ("partial", r"in single pieces, got \(Partial\("),
        ("turned", r"contiguous in memory, got strides \(1, 3\)"),
    ],
)
def test_other_shards_are_refused_on_every_process(reports, case, cause):
    for report in reports:
        assert re.search(rf"'stochastic' needs .*{cause}.*; use rounding='split'", report[case])


def test_a_plain_tensor_is_whole_and_asks_for_no_dtensor():
    assert place_of(torch.zeros(3, 4), 5) == Place(5)
    code = (
        "import sys, torch; from raco_fast.distributed.shards import place_of; "
        "place_of(torch.zeros(2), 0); print('torch.distributed.tensor' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"
