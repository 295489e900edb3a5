"""`raco-fast conflict`: sums against single pairs in float64, what follows, the command."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from raco_fast.cli import program as cli
from raco_fast.cli.command import EXIT_BAD_INPUT
from raco_fast.dpo.data.batches import BatchSchedule
from raco_fast.dpo.run import conflict
from raco_fast.dpo.run.conflict import Measured, measure
from raco_fast.dpo.run.conflict_estimates import batch_sizes, estimated
from raco_fast.dpo.run.conflict_picture import draw
from raco_fast.dpo.run.conflict_report import as_text
from raco_fast.dpo.run.inputs import load_inputs
from raco_fast.solver.dual import solve_dual
from raco_fast.solver.intervals import BLOCKS, Interval
from raco_fast.solver.pair_sums import PairSums

PAIRS, BETA = 31, 0.1


@pytest.fixture(scope="module")
def folder(save_tiny) -> Path:
    return save_tiny()


@pytest.fixture
def config(make_config, folder):
    losses = {"kind": {"name": "sigmoid", "beta": 0.7, "label_smoothing": 0.1}}
    return make_config({"name": str(folder), "dropout": False}, losses=losses, c=0.9)


@pytest.fixture(scope="module")
def known() -> dict[str, Measured]:
    return {}


@pytest.fixture
def measured(config, known) -> Measured:
    """Once for all tests."""
    if "it" not in known:
        known["it"] = measure(config, PAIRS)
    return known["it"]


def gradients_of_pairs(config, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """v [m, PAIRS, d] float64 by autograd, one response at a time; labels [m, PAIRS]."""
    inputs = load_inputs(config)
    order = BatchSchedule(len(inputs.training), PAIRS, config.seed).indices(0)
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    params = list(model.parameters())

    def gradient(prompt: list[int], answer: list[int]) -> torch.Tensor:
        logits = model(torch.tensor([prompt + answer])).logits[0, :-1].log_softmax(-1)
        each = logits.gather(1, torch.tensor(prompt + answer)[1:, None])[len(prompt) - 1 :]
        return torch.cat([g.flatten() for g in torch.autograd.grad(each.sum(), params)])

    v, labels = [], []
    for pair in (inputs.training[i] for i in order):
        a, b = (gradient(pair.prompt_ids, ids) for ids in (pair.a_ids, pair.b_ids))
        # Of -log sigmoid(beta x) at x = 0; smoothed labels are right to 90 %.
        slopes = {"sure": -BETA / 2, "kind": -0.7 / 2 * (0.9 - 0.1)}
        signs = [pair.labels[name] for name in config.objectives]
        rows = [s * slopes[n] * (a - b) for n, s in zip(config.objectives, signs, strict=True)]
        v.append(torch.stack(rows))
        labels.append(signs)
    return torch.stack(v, 1).numpy(), np.array(labels).T


def expected_gram(v: np.ndarray, labels: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The mean of products of different pairs, of the pairs `kept`."""
    v, there = v[:, kept], labels[:, kept] != 0
    products = np.einsum("ibd,jcd->ijbc", v, v)
    both = there[:, None, :, None] & there[None, :, None, :] & ~np.eye(len(kept), dtype=bool)
    return (products * both).sum((2, 3)) / both.sum((2, 3))


@pytest.mark.parametrize(
    "room",
    [pytest.param(None, id="kept", marks=pytest.mark.slow), pytest.param(0, id="two passes")],
)
def test_sums_are_those_of_single_pairs(config, folder, monkeypatch, room):
    v, labels = gradients_of_pairs(config, folder)
    if room is not None:
        monkeypatch.setattr(conflict, "_ROOM", room)
    found = measure(config, PAIRS)
    everyone = np.arange(PAIRS)
    scale = abs(v).sum(1) @ abs(v).sum(1).T / PAIRS**2
    error = 2e-5 * scale.max()
    truth = expected_gram(v, labels, everyone)
    np.testing.assert_allclose(found.sums.expected, truth, atol=error)
    np.testing.assert_allclose(found.sums.products, np.einsum("ibd,jbd->ij", v, v), rtol=1e-4)
    assert found.sums.pairs == PAIRS
    blocks = np.array_split(everyone, BLOCKS)
    assert len(found.left_out) == BLOCKS
    for block, sums in zip(blocks, found.left_out, strict=True):
        rest = np.setdiff1d(everyone, block)
        np.testing.assert_allclose(sums.expected, expected_gram(v, labels, rest), atol=error)
        assert sums.counts.tolist() == (labels[:, rest] != 0).sum(1).tolist()
    assert found.losses[config.objectives.index("sure")] == pytest.approx(math.log(2), abs=1e-6)


def test_products_of_two_sets_are_those_of_any_number_of_objectives():
    draw = torch.Generator().manual_seed(2)
    params = [torch.zeros(7), torch.zeros(3, 5)]
    a, b = (
        {p: [torch.randn(p.shape, generator=draw).to(dtype) for _ in range(19)] for p in params}
        for dtype in (torch.bfloat16, torch.float32)
    )
    rows, columns = (
        torch.stack([torch.cat([x[p][i].flatten() for p in params]) for i in range(19)]).double()
        for x in (a, b)
    )
    found = conflict._products({p: a[p] for p in params[:1]}, b, 19)
    np.testing.assert_allclose(found, rows[:, :7] @ columns[:, :7].T, atol=1e-5)
    found = conflict._products(a, b, 19)
    np.testing.assert_allclose(found, rows @ columns.T, atol=1e-5)


@pytest.mark.slow
def test_dropout_is_the_same_in_both_passes(make_config, monkeypatch):
    config = make_config()  # its attention drops, so that the reference is another model
    kept = measure(config, BLOCKS)
    monkeypatch.setattr(conflict, "_ROOM", 0)
    twice = measure(config, BLOCKS)
    np.testing.assert_array_equal(twice.sums.gram, kept.sums.gram)
    for one, other in zip(twice.left_out, kept.left_out, strict=True):
        np.testing.assert_array_equal(one.gram, other.gram)
    assert abs(kept.losses - math.log(2)).max() > 1e-4
    monkeypatch.setattr(conflict.torch, "manual_seed", lambda seed: None)
    with pytest.raises(ValueError, match="other gradients in every pass over the same pairs"):
        measure(config, BLOCKS)


def test_what_follows_is_that_of_the_matrices(config, measured):
    found = estimated(config, measured)
    H, n = measured.sums.expected, config.pairs_per_step
    (two,) = found.two
    assert two.cosine.value == pytest.approx(H[0, 1] / math.sqrt(H[0, 0] * H[1, 1]))
    M = H + measured.sums.noise / n
    assert two.of_batch == pytest.approx(M[0, 1] / math.sqrt(M[0, 0] * M[1, 1]))
    others = np.array([sums.expected[0, 1] for sums in measured.left_out])
    half = 2.0930240544 * math.sqrt((BLOCKS - 1) * others.var())
    assert two.product == pytest.approx((H[0, 1], H[0, 1] - half, H[0, 1] + half))
    names = ["weights", "batch", "unbiased"]
    assert [update.source for update in found.updates] == names
    values, V = np.linalg.eigh(H)
    positive = (V * values.clip(0)) @ V.T
    for update, gram in zip(found.updates[1:], (M, positive), strict=True):
        alpha = solve_dual(gram, config.weights, config.c, config.rule).coefficients
        assert list(update.coefficients.values()) == pytest.approx(alpha, rel=1e-6)
        assert [x.value for x in update.descent.values()] == pytest.approx(H @ alpha, rel=1e-6)
    first = found.objectives[0]
    assert first.noise_scale.value == pytest.approx(
        measured.sums.noise_of_a_pair[0] / H[0, 0], rel=1e-9
    )
    assert found.two[0].agreement == pytest.approx(measured.labels.agreement[0, 1])


@pytest.mark.parametrize("seed", range(12))
def test_batch_sizes_are_those_of_a_search(seed):
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((2, 3))
    noise = draw.standard_normal((2, 2)) * 10 ** draw.uniform(0, 1.5)
    H, D = x @ x.T, noise @ noise.T
    # One pair labelled for both gives D = 1 (P - H); N = 10^6 such pairs.
    N = 10**6
    sums = PairSums(
        (D + H) * N + H * N * (N - 1), (D + H) * N, np.full(2, 1.0 * N), np.full((2, 2), 1.0 * N), N
    )
    np.testing.assert_allclose(sums.expected, H, rtol=1e-6)
    n = np.arange(1, 20_000)[:, None, None]
    M = H + D / n
    ratio = M[:, 0, 1] / np.sqrt(M[:, 0, 0] * M[:, 1, 1]) / (H[0, 1] / np.sqrt(H[0, 0] * H[1, 1]))
    from_sizes = [
        1 + int(np.flatnonzero(~fits)[-1]) + 1 if not fits.all() else 1
        for fits in (ratio > 0, ratio >= 0.5)
    ]
    assert max(from_sizes) < 20_000
    assert batch_sizes(sums, 0, 1) == pytest.approx(from_sizes, abs=0)


def test_the_command(config_file, folder, capfd, tmp_path):
    out = tmp_path / "found"
    model = {"name": str(folder), "device": "cpu", "dropout": False, "lora": {"r": 4}}
    file = config_file(model=model, weights={"sure": 0.9, "kind": 0.1}, eval_data=[])
    assert cli.main(["conflict", file, "--pairs", "1000", "--out", str(out)]) == 0
    printed = capfd.readouterr()
    assert "Traceback" not in printed.err
    assert "40 of 40 training pairs, before training; 95 % intervals." in printed.out
    assert "| update of cagrad-clip, c = 0.4 |" in printed.out
    assert f"saved {out / 'conflict.json'}" in printed.out
    found = json.loads((out / "conflict.json").read_text())
    assert found["pairs_per_step"] == 8
    assert [each["name"] for each in found["objectives"]] == ["kind", "sure"]  # as YAML was dumped
    for sentence in found["findings"]:
        assert f"- {sentence}" in printed.out
    unclear = [k for k, s in enumerate(found["findings"]) if "not distinguishable" in s]
    assert unclear == list(range(len(unclear)))  # they come first
    for two in found["two"]:
        product = two["product"]
        assert product["distinguishable"] == (product["low"] * product["high"] > 0)
    assert not Path(tmp_path / "run" / "checkpoints").exists()


def test_the_picture_is_drawn_where_it_can_be(config, measured, tmp_path, monkeypatch):
    found = estimated(config, measured)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'raco-fast[plot]'" in draw(found, tmp_path / "conflict.png")
    monkeypatch.undo()
    pytest.importorskip("matplotlib.figure")
    assert draw(found, tmp_path / "conflict.png") == ""
    assert (tmp_path / "conflict.png").read_bytes().startswith(b"\x89PNG")


def test_words_follow_the_intervals(config, measured):
    """An objective with a clear descent below 0 is named; one without a sign is named first."""
    found = estimated(config, measured)
    (two,) = found.two
    clear = replace(
        two,
        product=Interval(-1.0, -1.5, -0.5),
        cosine=Interval(-0.8, -0.9, -0.7),
        of_batch=0.1,
        sign_from=20.0,
        half_from=90.0,
    )
    name = two.names[0]
    against = Interval(-1.0, -2.0, -0.1)
    updates = [replace(u, descent=u.descent | {name: against}) for u in found.updates]
    text = as_text(replace(found, two=[clear], updates=updates))
    assert "conflict: cosine -0.80 (-0.90 to -0.70); a batch of 8 shows +0.10 on average, " in text
    assert "of the other sign: the right one from 20 pairs on, half of the cosine from 90." in text
    assert f"Along the weighted sum the update works against {name}." in text
    unclear = replace(clear, product=Interval(-1.0, -1.5, 0.5), cosine=Interval(-0.8, -1.0, 0.3))
    text = as_text(replace(found, two=[unclear], updates=updates))
    assert "whether they conflict is not distinguishable from noise on 31 pairs" in text


def test_an_objective_with_one_labelled_pair_is_named(write_pairs, make_config, folder):
    file = write_pairs("few.jsonl", 30, 5, {"sure": "yes", "kind": "calm"})
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows[1:]:
        row["preferences"]["kind"] = 0
    rows[0]["preferences"]["kind"] = 1
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = make_config({"name": str(folder), "dropout": False}, data=[{"path": str(file)}])
    found = estimated(few, measure(few, 30))
    assert found.unmeasured == ["kind"]
    assert not found.updates
    text = as_text(found)
    assert "kind: 1 labelled pairs among 30 are too few for products between different" in text
    assert "No update is computed" in text


@pytest.mark.parametrize(
    ("changes", "pairs", "match"),
    [
        ({"weights": {"sure": 1.0}}, "40", "names one objective, 'sure', which has a conflict"),
        ({}, "19", "`--pairs` must be at least 20, as intervals come from .*, got 19"),
    ],
)
def test_what_cannot_be_measured(config_file, capfd, changes, pairs, match):
    assert cli.main(["conflict", config_file(**changes), "--pairs", pairs]) == EXIT_BAD_INPUT
    err = capfd.readouterr().err
    assert "Traceback" not in err
    assert re.search(match, err)


def test_data_with_too_few_pairs(make_config, write_pairs):
    file = write_pairs("few.jsonl", 12, 5, {"sure": "yes", "kind": "calm"})
    few = make_config({"dropout": False}, data=[{"path": str(file)}])
    with pytest.raises(ValueError, match=r"must hold at least 20 usable pairs, .* got 12"):
        measure(few)
