"""Where a step has the host wait for the device: for numbers that it has to know, nowhere else."""

import copy

import pytest
import torch
from far_device import Waits, autocast_as_on_cpu, send_away

from raco_fast.dpo.data.layout import Layout
from raco_fast.dpo.data.tokenization import EncodedPair
from raco_fast.dpo.losses.margin_losses import Sigmoid
from raco_fast.dpo.policy import Policy
from raco_fast.dpo.run.moving_reference import MovingReference, ReferenceOptions
from raco_fast.dpo.run.step import PreferenceStep
from raco_fast.dpo.scoring import ReferenceLogps, adapter_off
from raco_fast.engine.prepare import prepare
from raco_fast.optim.clipped_cagrad_adamw import ClippedCAGradAdamW

WEIGHTS = {"x": 0.7, "y": 0.3}
LABELS = [(1, -1), (-1, 0.75), (1, 0), (-1, 1)]
PAIRS = [
    EncodedPair(
        f"p{k}",
        [1, *range(3, 9 - k)],
        [4 + k, 5, 2],
        [6, 2],
        {"x": x, "y": y},
        {"x": 0.5} if k == 1 else {},
    )
    for k, (x, y) in enumerate(LABELS)
]


def steps(model, kind, mode, watched, moves=False):
    """The model after two steps, of two micro-batches each but for `gram_first`, and the waits of
    the second; the reference follows the policy or stays."""
    if mode != "autograd":
        prepare(model, strict=True, check_every=None)
    if watched:
        send_away(model)
    optimizer = ClippedCAGradAdamW(model.parameters(), weights=WEIGHTS, lr=1e-2, weight_decay=0.1)
    references = {1.0: ReferenceLogps({pair.id: (-3.0, -4.5) for pair in PAIRS})}
    size = 4 if mode == "gram_first" else 2
    layout = Layout(kind, size, 100 if mode == "gram_first" else 25, pad_id=0)
    assert len(layout.rounds(PAIRS)) == (1 if mode == "gram_first" else 2)
    losses = {"x": Sigmoid(beta=0.3), "y": Sigmoid(beta=0.2)}
    if moves:
        policy = Policy(model, None, "the same", "the same", adapter_off)
        references = MovingReference(policy, ReferenceOptions(1, 0.4), (1.0,), 256)
    learn = PreferenceStep(model, optimizer, references, losses, layout, mode=mode)
    with Waits() as waits:
        for step in (1, 2):
            waits.counts.clear()
            learn(PAIRS)
            if moves:
                references.after(step)
    return model, waits


SLOW = pytest.mark.slow
# Per micro-batch: A, which says how many groups of sequences a pass has to tell apart; and the ids
# that a batch has, of a trained embedding, which say how large its gradient's rows are. Per step:
# the Gram matrix, and the products of the sequences in `gram_first`.
READS = {
    "autograd": {"backends/reference.py": 1},
    "one_backward": {
        "backends/reference.py": 1,
        "engine/backward.py": 2,
        "engine/contributions.py": 2,
    },
    "gram_first": {
        "backends/reference.py": 1,
        "engine/backward.py": 1,
        "engine/contributions.py": 4,
        "engine/gram_collector.py": 1,
    },
}


@pytest.mark.parametrize("kind", ["pairs", pytest.param("padded", marks=SLOW)])
@pytest.mark.parametrize(
    "mode",
    ["one_backward", *(pytest.param(mode, marks=SLOW) for mode in ("autograd", "gram_first"))],
)
def test_the_host_waits_for_what_it_has_to_know(make_model, monkeypatch, kind, mode):
    autocast_as_on_cpu(monkeypatch)
    model = make_model()
    expected, nothing = steps(copy.deepcopy(model), kind, mode, watched=False)
    found, waits = steps(model, kind, mode, watched=True)
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.here, theirs)
    assert not nothing.counts
    reads = waits.of("read")
    if kind == "padded":  # transformers looks whether a mask has any padding
        assert reads.pop("dpo/decoders.py") > 0
    assert reads == READS[mode]
    assert waits.of("sent") == {}


def test_a_reference_that_moves_has_the_host_wait_for_nothing_more(make_model, monkeypatch):
    autocast_as_on_cpu(monkeypatch)
    model = make_model()
    at_home = copy.deepcopy(model)
    expected, _ = steps(at_home, "pairs", "one_backward", watched=False, moves=True)
    found, waits = steps(model, "pairs", "one_backward", watched=True, moves=True)
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        # By norm: AdamW makes a whole step of a single gradient that is all but zero.
        assert (ours.here - theirs).norm() < 1e-4 * theirs.norm()
    assert waits.of("read") == READS["one_backward"]
    assert waits.of("sent") == {}


def test_the_far_device_notes_what_it_should():
    """Otherwise no test of waits could fail."""
    with Waits() as waits:
        x = torch.arange(4.0).to("meta")
        y = torch.arange(3).to("meta", non_blocking=True)
        assert waits.of("sent") == {"elsewhere": 1}
        assert (x[y] + 1).sum().item() == 6
        assert waits.of("read") == {"elsewhere": 1}
        assert x.cpu().tolist() == [0, 1, 2, 3]
        assert x[x > 1].shape == (2,)
        assert bool(x.any())
        assert x.nonzero().shape == (3, 1)
        assert y.repeat_interleave(y, output_size=3).shape == (3,)
    assert waits.of("read") == {"elsewhere": 5}
    x.zero_()
    assert x.here.tolist() == [0] * 4
