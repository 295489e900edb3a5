"""The labels of the study: of one objective a pair, and turned round by chance."""

import random

import pytest

from raco_fast.demo.config import DemoConfig
from raco_fast.demo.judges import draw_pairs
from raco_fast.demo.labelling import labelled

PAIRS = draw_pairs(600, random.Random(0))
NAMES = ("coverage", "brevity", "faithfulness", "fluency")


def labels(**settings) -> list[dict[str, float]]:
    config = DemoConfig(objectives=4, **settings)
    return [pair.preferences for pair in labelled(PAIRS, config, random.Random(1))]


def test_objectives_that_are_not_in_the_study_have_no_label() -> None:
    assert labels() == [{name: pair.preferences[name] for name in NAMES} for pair in PAIRS]


def test_own_pairs_have_the_label_of_one_objective_in_turns() -> None:
    for place, (own, common) in enumerate(zip(labels(own_pairs=True), labels(), strict=True)):
        name = NAMES[place % 4]
        assert own == dict.fromkeys(NAMES, 0.0) | {name: common[name]}


def test_noise_turns_its_share_and_the_same_ones_of_own_pairs() -> None:
    clean, noisy = labels(), labels(label_noise=0.3)
    turned = [
        a[name] != b[name]
        for a, b in zip(clean, noisy, strict=True)
        for name in NAMES
        if a[name] != 0
    ]
    assert sum(turned) / len(turned) == pytest.approx(0.3, abs=0.04)
    assert all(abs(a[n]) == abs(b[n]) for a, b in zip(clean, noisy, strict=True) for n in NAMES)
    both = labels(label_noise=0.3, own_pairs=True)
    assert all(b[n] in (0, a[n]) for a, b in zip(noisy, both, strict=True) for n in NAMES)
