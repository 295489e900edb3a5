"""Calls of the Triton backend up to the launch, for a CUDA device that is not there.

The tests that compile kernels state the arguments' types and alignments; here Triton reads them
from real calls, with the options and tuples that the package passes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLES = {"addresses", "numels", "ids", "chunks"}
PER_CALL = {
    # One launch for the aligned tensors, one for those that are not.
    "gram": ["gram_partials", "gram_partials", "gram_total"],
    "combine": ["combine_out", "combine_out"],
    "combine_adamw, nearest": ["combine_adamw_step", "combine_adamw_step"],
    "combine_adamw, stochastic": ["combine_adamw_step", "combine_adamw_step"],
    "combine_adamw, split": ["combine_adamw_step", "combine_adamw_step"],
    "weight_grad": ["weight_grad_tiles"],
    "weight_grad, products": ["weight_grad_tiles"],
}


@pytest.fixture(scope="module", params=[90, *(pytest.param(a, marks=pytest.mark.slow)
                                             for a in (80, 100))])  # fmt: skip
def lines(request) -> list[dict[str, Any]]:
    """What `helpers/launches.py` printed."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "helpers" / "launches.py", str(request.param)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_call_launches_what_it_should(lines):
    calls = [line for line in lines if "call" in line]
    assert {line["call"] for line in calls} == set(PER_CALL)
    for line in calls:
        assert line["launched"] == PER_CALL[line["call"]]


def test_other_sizes_and_numbers_compile_nothing_anew(lines):
    counts = dict.fromkeys(PER_CALL, 0)
    compiled: list[str] = []
    for line in lines:
        if "kernel" in line:
            compiled.append(line["kernel"])
            continue
        counts[line["call"]] += 1
        # Twice for two dtypes: of the tensors, or of a layer's gradients.
        fresh = 1 if "adamw" in line["call"] else 2
        assert counts[line["call"]] <= fresh or not compiled, line
        compiled.clear()
    assert all(count >= 2 for count in counts.values())


def test_alignment_is_taken_for_granted_only_where_it_is_sure(lines):
    for line in lines:
        if "kernel" not in line:
            continue
        sure = set(line["divisible"])
        if line["kernel"] in ("gram_partials", "combine_out", "combine_adamw_step"):
            assert sure == TABLES & set(line["types"])
        else:  # fresh tensors of its own, and rows whose alignment is checked before
            assert not sure & {"n_blocks", "n_segments", "n_partials"}
