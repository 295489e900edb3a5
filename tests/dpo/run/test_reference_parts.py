"""An interrupted reference pass of several processes is taken up by as many of them."""

import math
from pathlib import Path

import torch
from processes import run
from torch import nn

from raco_fast.distributed.processes import Processes
from raco_fast.dpo.data.layout import Layout
from raco_fast.dpo.data.tokenization import EncodedPair
from raco_fast.dpo.run import reference_cache
from raco_fast.dpo.run.reference_cache import reference_logps


class Stopped(Exception):  # noqa: N818
    """In place of SIGTERM."""


def pairs() -> list[EncodedPair]:
    return [EncodedPair(f"p{k:02}", [1, 2], [3] * (k + 1), [4], {"x": 1}) for k in range(13)]


def scored_until(after: int, folder: Path) -> tuple[int, list[tuple[float, float]] | None]:
    """(batches that this process scores, the values of all pairs or None): it stops after some."""
    own, layout = 0, Layout("padded", 2, math.inf, 0)

    def logps(model, batch, *_):
        nonlocal own
        if own == after:
            raise Stopped
        own += 1
        # As floating point does: the value depends a little on what else is in the batch.
        lengths = torch.cat([batch.tokens_a, batch.tokens_b]).float()
        return lengths + 1e-4 * batch.rows.input_ids.shape[1]

    before, reference_cache.pair_logps = reference_cache.pair_logps, logps
    try:
        found = reference_logps(
            nn.Linear(1, 1),
            pairs(),
            layout.rounds(pairs(), Processes().size),
            layout,
            model_hash="m",
            cache_dir=folder,
            chunk_tokens=4,
        )[1.0]
    except Stopped:
        return own, None
    finally:
        reference_cache.pair_logps = before
    return own, [found.by_id[pair.id] for pair in pairs()]


def test_two_processes_take_up_what_two_have_left(tmp_path):
    whole = run(2, scored_until, 99, tmp_path / "whole", folder=tmp_path)
    assert [n for n, _ in whole] == [4, 4]
    cut = run(2, scored_until, 2, tmp_path / "cut", folder=tmp_path)
    assert cut == [(2, None)] * 2
    assert len(list((tmp_path / "cut").glob("*.parts/part-*.safetensors"))) == 2
    again = run(2, scored_until, 99, tmp_path / "cut", folder=tmp_path)
    assert again == [(2, values) for _, values in whole]
    assert [file.suffix for file in (tmp_path / "cut").iterdir()] == [".safetensors"]


def test_one_process_has_other_micro_batches_than_two_and_scores_its_own(tmp_path):
    run(2, scored_until, 3, tmp_path, folder=tmp_path)
    batches, values = scored_until(99, tmp_path)
    assert (batches, values) == scored_until(99, tmp_path / "whole")
    assert batches == 7
