"""docs/losses.md: its table says what the losses are, and its example runs."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from pair_scores import make_scores

from raco_fast.dpo.losses import registry
from raco_fast.dpo.losses.margin_losses import LengthDesensitized
from raco_fast.dpo.losses.objective_losses import preference_losses
from raco_fast.dpo.losses.registry import LOSSES, make_loss

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "losses.md").read_text(encoding="utf-8")
ROWS = {
    cells[0].strip("` "): [cell.strip() for cell in cells[1:]]
    for cells in (line.strip("|").split("|") for line in PAGE.splitlines())
    if cells[0].startswith(" `")
}


def test_the_table_has_every_loss():
    assert list(ROWS) == list(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_the_table_has_the_options_and_their_defaults(name):
    _, _, options, soft, *_ = ROWS[name]
    named = {key: float(value) for key, value in re.findall(r"`(\w+)` ([\d.]+)", options)}
    assert named == {field.name: field.default for field in fields(LOSSES[name])}
    assert soft == ("yes" if LOSSES[name].soft else "no")


def loss_of(name: str, scores, sign: int) -> torch.Tensor:
    label = torch.full((len(scores.tokens_a),), sign)
    return preference_losses(scores, {"x": label}, loss=make_loss(name))["x"]


def slopes(name: str, scores, sign: int) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss_of(name, scores, sign), [scores.logps_a, scores.logps_b])


@pytest.mark.parametrize("name", LOSSES)
def test_the_table_says_what_a_pairs_gradient_is_and_whether_it_needs_a_reference(name):
    scores = make_scores(30, dtype=torch.float64)
    (a, b), (a_flipped, b_flipped) = (slopes(name, scores, sign) for sign in (1, -1))
    *_, in_pair, reference = ROWS[name]
    pulls = (a != 0) & (a_flipped != 0)  # not where a hinge is at rest
    a, b, a_flipped, b_flipped = a[pulls], b[pulls], a_flipped[pulls], b_flipped[pulls]
    assert pulls.sum() > 10
    one_direction = torch.allclose(a * b_flipped, b * a_flipped, rtol=1e-9, atol=0)
    assert one_direction == (in_pair != "no")
    ratio = -a / b
    found = {
        "l": torch.ones_like(ratio),
        "l/n": (scores.tokens_b / scores.tokens_a)[pulls],
    }
    if in_pair in found:
        torch.testing.assert_close(ratio, found[in_pair])
    other = make_scores(30, dtype=torch.float64)
    other.ref_logps_a.add_(1.5)
    moved = not torch.equal(loss_of(name, scores, 1), loss_of(name, other, 1))
    assert moved == (reference == "yes")


def test_ld_alone_has_a_score_of_its_own():
    own = {name for name, loss in LOSSES.items() if "tail_weight" in vars(loss)}
    assert own == {"ld"}
    assert LengthDesensitized(alpha=0.25).tail_weight == 0.25


def test_the_example_is_a_loss(monkeypatch):
    monkeypatch.setattr(registry, "LOSSES", dict(LOSSES))
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(example, {"__name__": "example"})
    scores, label = make_scores(5), torch.ones(5)
    loss = make_loss({"name": "squared-hinge", "beta": 0.2, "width": 2.0})
    ours = preference_losses(scores, {"x": label}, loss=loss)["x"]
    margin = scores.logps_a - scores.ref_logps_a - (scores.logps_b - scores.ref_logps_b)
    expected = sum(max(0.0, 2 - 0.2 * x) ** 2 for x in margin.tolist()) / 5
    assert ours.item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="`width` must be positive, got -1"):
        make_loss({"name": "squared-hinge", "width": -1})
