"""The tables that the kernels read, without running a kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raco_fast.kernels import tables

CPU = torch.device("cpu")


@pytest.mark.parametrize("chunk", [4096, 65536])
def test_every_element_is_in_exactly_one_chunk(chunk):
    numels = (1, chunk - 1, chunk, chunk + 1, 5 * chunk, 3)
    found = tables.chunk_map(numels, chunk)
    pairs = [(int(c) >> 32, int(c) & 0xFFFFFFFF) for c in found]
    assert pairs == [(t, c) for t, n in enumerate(numels) for c in range(-(-n // chunk))]


def test_chunks_reach_beyond_2_to_the_31_elements():
    numel = 2**33 + 5
    chunk = tables.chunk_size(numel)
    found = tables.chunk_map((7, numel), chunk)
    tensor, last = int(found[-1]) >> 32, int(found[-1]) & 0xFFFFFFFF
    assert tensor == 1
    assert last * chunk < numel <= (last + 1) * chunk


def test_chunk_sizes_grow_and_are_powers_of_two():
    sizes = [tables.chunk_size(10**k) for k in range(12)]
    assert sizes == sorted(sizes)
    assert all(s & (s - 1) == 0 for s in sizes)


def test_tensors_are_split_by_dtype_and_alignment():
    wide, narrow = torch.zeros(40), torch.zeros(40, dtype=torch.bfloat16)
    params = [wide, narrow, wide[1:], torch.zeros(0), narrow, wide]
    grads = [[torch.zeros_like(p) for p in params]]
    grads[0][5] = None  # no gradient: the tensor is not worked on
    found = tables.build([*grads, params], 1, CPU)
    summary = [(t.aligned, t.dtypes[0], t.ids.tolist(), t.numels.tolist()) for t in found]
    assert summary == [
        (True, torch.bfloat16, [1, 4], [40, 40]),
        (True, torch.float32, [0], [40]),
        (False, torch.float32, [2], [39]),
    ]
    assert found[1].addresses.tolist() == [[grads[0][0].data_ptr(), wide.data_ptr()]]
    assert not any(t.missing for t in found)


def test_one_misaligned_column_is_enough_and_missing_gradients_are_seen():
    a, b = torch.zeros(41), torch.zeros(41)
    (found,) = tables.build([[a[:40]], [b[1:]], [None]], 3, CPU)
    assert not found.aligned
    assert found.missing
    assert found.dtypes == (torch.float32,) * 3


@pytest.mark.parametrize(
    ("tensor", "dense"),
    [
        (torch.zeros(3, 4).t(), True),
        (torch.zeros(2, 3, 4).permute(2, 0, 1), True),
        (torch.zeros(1, 5)[:, :4], True),
        (torch.zeros(3, 5)[:, :4], False),
        (torch.zeros(3, 1).expand(3, 4), False),
        (torch.zeros(8)[::2], False),
        (torch.zeros(()), True),
    ],
)
def test_dense_means_one_stretch_of_memory(tensor, dense):
    assert tables.is_dense(tensor) == dense
    if not dense:
        with pytest.raises(ValueError, match="must fill one stretch of memory, got shape"):
            tables.build([[tensor]], 1, CPU)


def test_rows_must_have_one_size():
    with pytest.raises(ValueError, match="number 0 must have equal sizes, got 3 and 4"):
        tables.build([[torch.zeros(3)], [torch.zeros(4)]], 1, CPU)


def test_uploads_are_shared_by_content_and_forgotten_in_time():
    first = tables.upload(np.array([1, 2]), CPU)
    assert tables.upload(np.array([1, 2]), CPU) is first
    assert tables.upload(np.array([1, 3]), CPU).tolist() == [1, 3]
    assert tables.upload(np.array([[1, 2]]), CPU).shape == (1, 2)
    for k in range(tables.MAX_CACHED_UPLOADS):
        tables.upload(np.array([k, k]), CPU)
    assert len(tables._uploads) == tables.MAX_CACHED_UPLOADS
    assert tables.upload(np.array([1, 2]), CPU) is not first
