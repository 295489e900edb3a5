"""Pair rows on several processes: the steps of one process on padded rows."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from parallel_models import VOCABULARY, build, whole
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import raco_fast
from raco_fast.distributed.processes import Processes
from raco_fast.dpo.data.layout import Kind, Layout
from raco_fast.dpo.data.tokenization import EncodedPair
from raco_fast.dpo.losses.registry import make_loss
from raco_fast.dpo.run.step import PreferenceStep
from raco_fast.dpo.scoring import ReferenceLogps

WEIGHTS = {"x": 0.5, "y": 0.3, "z": 0.2}
STEPS, PAIRS = 3, 7
ADAMW = {"lr": 1e-3, "eps": 1e-3, "weight_decay": 0.1}


def pairs_of(step: int) -> list[EncodedPair]:
    draw = torch.Generator().manual_seed(100 + step)

    def ids(least: int) -> list[int]:
        n = int(torch.randint(least, 9, (), generator=draw))
        return torch.randint(3, VOCABULARY, (n,), generator=draw).tolist()

    pairs = []
    for k in range(PAIRS):
        labels = torch.randint(-1, 2, (3,), generator=draw).tolist()
        of_pair = dict(zip(WEIGHTS, labels, strict=True))
        pairs.append(EncodedPair(f"{step}-{k}", ids(1), ids(1), ids(2), of_pair))
    return pairs


def learnt(kind: Kind, mode: str, sharded: bool) -> tuple[dict[str, Tensor], Tensor]:
    """(parameters, Gram matrix of the last step) of this process, one of all."""
    model = build("llama", torch.float32).lm
    if mode != "autograd":
        raco_fast.prepare(model, strict=True, check_every=1)
    if sharded:
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    parameters: list[nn.Parameter] = list(model.parameters())
    optimizer = raco_fast.ClippedCAGradAdamW(parameters, weights=WEIGHTS, c=0.4, **ADAMW)
    known = {p.id: (-9.0, -11.0) for step in range(STEPS) for p in pairs_of(step)}
    learn = PreferenceStep(
        model,
        optimizer,
        {1.0: ReferenceLogps(known)},
        dict.fromkeys(WEIGHTS, make_loss("sigmoid")),
        Layout(kind, PAIRS, 40, 0),
        64,
        mode,
        Processes(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a fallback, or FSDP2 of a model that gives a view
        for step in range(STEPS):
            result = learn(pairs_of(step))
    assert result.solution is not None
    found = {name: whole(p) for name, p in model.named_parameters()}
    return found, torch.as_tensor(result.solution.gram)


@pytest.fixture(scope="module")
def truth() -> tuple[dict[str, Tensor], Tensor]:
    return learnt("padded", "autograd", sharded=False)


@pytest.mark.parametrize(
    ("kind", "sharded"),
    [
        ("pairs", False),
        ("pairs", True),
        pytest.param("packed", False, marks=pytest.mark.slow),
        pytest.param("packed", True, marks=pytest.mark.slow),
    ],
)
def test_two_processes_learn_what_one_learns(run, truth, kind, sharded):
    found = run(2, learnt, kind, "one_backward", sharded)
    parameters, gram = truth
    size = gram.diagonal().sqrt()
    for ours, of_step in found:
        assert float(((of_step - gram) / size / size[:, None]).abs().max()) < 1e-5
        for name, p in ours.items():
            assert torch.equal(p, found[0][0][name]), f"ranks differ in {name}"
            torch.testing.assert_close(p, parameters[name], rtol=0, atol=1e-6)
    assert math.isfinite(float(gram.sum()))
