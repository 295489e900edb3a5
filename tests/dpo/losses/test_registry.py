"""Losses by name: options, their ranges, and losses of one's own."""

import math
from dataclasses import dataclass

import pytest

from raco_fast.dpo.losses import registry
from raco_fast.dpo.losses.preference_loss import PreferenceLoss
from raco_fast.dpo.losses.registry import LOSSES, described, make_loss, register_loss


@pytest.mark.parametrize("name", LOSSES)
def test_a_description_makes_the_same_loss_again(name):
    loss = make_loss(name)
    assert type(loss) is LOSSES[name]
    assert described(loss)["name"] == name
    assert make_loss(described(loss)) == loss


@pytest.mark.parametrize(
    ("loss", "options", "made"),
    [
        ("simpo", {"simpo_gamma": 1.5, "beta": 2.0}, {"name": "simpo", "beta": 2.0, "gamma": 1.5}),
        (
            {"name": "simpo", "gamma": 0.3},
            {"beta": 2.0},
            {"name": "simpo", "beta": 2, "gamma": 0.3},
        ),
        ({"name": "orpo"}, {}, {"name": "orpo", "lam": 0.1}),
    ],
)
def test_options_in_both_places(loss, options, made):
    assert described(make_loss(loss, options=options)) == made


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sigmoid", {"beta": 0.0}, r"`beta` must be positive and finite, got 0.0; 0.1 is a common"),
        ("ipo", {"beta": math.inf}, r"`beta` must be positive and finite, got inf"),
        ("bco", {"beta": math.nan}, r"`beta` must be positive and finite, got nan"),
        ("hinge", {"beta": "0.1"}, r"`beta` must be positive and finite, got '0.1'"),
        ("hinge", {"beta": True}, r"`beta` must be positive and finite, got True"),
        ("sigmoid", {"label_smoothing": 0.5}, r"`label_smoothing` must be in \[0, 0.5\), got 0.5"),
        ("robust", {"label_smoothing": -0.1}, r"`label_smoothing` must be in \[0, 0.5\)"),
        ("exo", {"label_smoothing": 0.0}, r"`label_smoothing` must be in \(0, 0.5\), got 0.0"),
        ("simpo", {"gamma": math.nan}, r"`gamma` must be finite, got nan"),
        ("discopop", {"tau": 1.5}, r"`tau` must be in \(0, 1\], got 1.5"),
        ("dpo-positive", {"lam": -1.0}, r"`lam` must be at least 0 and finite, got -1.0"),
        ("alpha", {"alpha": 1.0}, r"`alpha` must be in \(0, 1\), got 1.0; its ends are `sigmoid`"),
        ("cpo", {"alpha": math.inf}, r"`alpha` must be at least 0 and finite, got inf"),
        ("orpo", {"lam": 0.0}, r"`lam` must be positive and finite, got 0.0"),
        ("ipo", {"gamma": 1.0}, r"`gamma` is no option of the loss 'ipo' \(`loss`\), got 1.0; it "),
        ("simpo", {"simpo_gamma": 1.0, "gamma": 2.0}, r"`simpo_gamma` is no option .*'gamma'\]"),
        ("ipo", {"simpo_gamma": 1.0}, r"`simpo_gamma` is no option of .* it has \['beta'\]"),
        ("dpo", {}, r"`loss` must be one of \['alpha', .*'sppo'\], got 'dpo'"),
        ({"beta": 0.1}, {}, r"`loss` must be one of .*, got None"),
        ({"name": "ipo", "beta": 0.1}, {"beta": 0.2}, r"must not both set \['beta'\]; remove one"),
    ],
)
def test_errors_name_option_rule_value_and_cure(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_loss(name, options=options)


def test_a_name_is_taken_once_and_by_a_loss(monkeypatch):
    monkeypatch.setattr(registry, "LOSSES", dict(LOSSES))
    with pytest.raises(ValueError, match="`name` must be new, got 'ipo', which is Ipo"):
        register_loss("ipo")

    class NoDataclass(PreferenceLoss):
        width: float = 2.0

    for wrong in (3, dict, NoDataclass):
        with pytest.raises(TypeError, match=r"must decorate a dataclass derived from Pref.*, got"):
            register_loss("wrong")(wrong)
    assert set(registry.LOSSES) == set(LOSSES)


def test_a_loss_that_is_not_registered_goes_by_its_class():
    @dataclass(frozen=True)
    class Mine(PreferenceLoss):
        width: float = 2.0

        def __call__(self, pairs):
            return self.width * pairs.margin

    assert described(Mine()) == {"name": "Mine", "width": 2.0}
    assert Mine().reward_scale == 1.0
