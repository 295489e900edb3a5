"""Seeded documents of facts with filler, and candidate summaries of mixed quality.

A document is a small bulletin: four facts, one sentence each, with filler between them.

    the train is late . that is known . the river is frozen . the mayor is happy . ...

A candidate summary keeps some of the facts, tells them shortly ("train late .") or in full
sentences, may keep filler, and may invent: a wrong value, or a fact about something the document
does not mention. Words are separated by single blanks and the full stop is a word of its own, so a
text and its list of words are the same thing. Nothing here scores a text: that is `judges`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

VALUES = {
    "weather": ("sunny", "rainy", "windy", "foggy", "snowy"),
    "train": ("late", "early", "full", "cancelled", "slow"),
    "market": ("open", "closed", "crowded", "empty", "cheap"),
    "team": ("strong", "weak", "lucky", "tired", "ready"),
    "river": ("high", "low", "frozen", "calm", "dirty"),
    "road": ("blocked", "clear", "wet", "narrow", "icy"),
    "museum": ("new", "old", "famous", "modern", "free"),
    "mayor": ("angry", "happy", "silent", "absent", "elected"),
    "school": ("big", "small", "busy", "loud", "safe"),
    "harbor": ("deep", "wide", "guarded", "foreign", "private"),
}
"""The values each entity can take; no value belongs to two entities."""

FILLERS = (
    "people came along .",
    "nobody said more .",
    "some took pictures .",
    "there was music .",
    "everyone went home .",
    "that is known .",
    "it was monday .",
    "more will follow .",
)
FACTS_PER_DOCUMENT = 4
MAX_FILLERS = 2
_ENTITIES = tuple(VALUES)


class Fact(NamedTuple):
    """One statement: `entity` is `value`."""

    entity: str
    value: str


@dataclass(frozen=True)
class Document:
    """One document: its facts in the order in which they are stated, and its text."""

    facts: tuple[Fact, ...]
    text: str


def full_sentence(fact: Fact) -> str:
    """The way a document states a fact: four words."""
    return f"the {fact.entity} is {fact.value} ."


def short_sentence(fact: Fact) -> str:
    """The shortest statement of a fact: two words."""
    return f"{fact.entity} {fact.value} ."


def make_document(rng: random.Random) -> Document:
    """Draw a document; no two of its facts are about the same entity."""
    entities = rng.sample(_ENTITIES, FACTS_PER_DOCUMENT)
    facts = tuple(Fact(entity, rng.choice(VALUES[entity])) for entity in entities)
    sentences = [full_sentence(fact) for fact in facts]
    return Document(facts, _join(sentences, rng.randint(0, MAX_FILLERS), rng))


def make_summary(document: Document, rng: random.Random) -> str:
    """Draw a candidate summary: which facts it keeps, its style, its filler, its inventions."""
    kept = sorted(rng.sample(range(FACTS_PER_DOCUMENT), rng.randint(1, FACTS_PER_DOCUMENT)))
    facts = [document.facts[i] for i in kept]
    for _ in range(rng.choices((0, 1, 2), weights=(6, 3, 1))[0]):
        _invent(document, facts, rng)
    sentence = rng.choice((short_sentence, full_sentence))
    fillers = rng.choices(range(MAX_FILLERS + 1), weights=(5, 3, 2))[0]
    return _join([sentence(fact) for fact in facts], fillers, rng)


def _join(sentences: list[str], fillers: int, rng: random.Random) -> str:
    """Put `fillers` different filler sentences at random places and join everything."""
    for filler in rng.sample(FILLERS, fillers):
        sentences.insert(rng.randint(0, len(sentences)), filler)
    return " ".join(sentences)


def _invent(document: Document, facts: list[Fact], rng: random.Random) -> None:
    """Give a kept fact a wrong value, or add a fact about an entity the document lacks."""
    if rng.random() < 0.5:
        place = rng.randrange(len(facts))
        entity = facts[place].entity
        wrong = [Fact(entity, value) for value in VALUES[entity]]
        facts[place] = rng.choice([fact for fact in wrong if fact not in document.facts])
    else:
        mentioned = {fact.entity for fact in document.facts}
        stranger = rng.choice([entity for entity in _ENTITIES if entity not in mentioned])
        extra = Fact(stranger, rng.choice(VALUES[stranger]))
        facts.insert(rng.randint(0, len(facts)), extra)
