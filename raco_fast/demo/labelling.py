"""Which of the judges' labels the study trains on, and which of them are wrong."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from raco_fast.demo.config import DemoConfig
from raco_fast.dpo.data.pairs import PreferencePair


def labelled(
    pairs: Sequence[PreferencePair], config: DemoConfig, rng: random.Random
) -> list[PreferencePair]:
    """Pairs with the labels of the config's objectives.

    Args:
        pairs: with a label of every judge.
        config: `own_pairs` leaves a pair the label of one objective, by its place in the order;
            `label_noise` is the probability with which a label is turned round.
        rng: which labels are turned. It is asked as often whatever the settings, so that a noisy
            study differs from a clean one by these labels alone.
    """
    return [
        replace(pair, preferences=_of_pair(place, pair, config, rng))
        for place, pair in enumerate(pairs)
    ]


def _of_pair(
    place: int, pair: PreferencePair, config: DemoConfig, rng: random.Random
) -> dict[str, float]:
    labels = {}
    for number, name in enumerate(config.names):
        turned = rng.random() < config.label_noise
        told = not config.own_pairs or place % config.objectives == number
        label = pair.preferences[name]
        labels[name] = (-label if turned else label) if told else 0.0
    return labels
