"""Exact rule-based judges of any text about a document, grammatical or not.

A text is read word by word. Words that are neither an entity nor a value carry no content and are
skipped. An entity directly followed by a value, with at most such words between, is a claim; any
other content word is a broken statement.

    coverage      distinct facts of the document among the claims / facts of the document
    brevity       1 - words of the text / words of the document, at least 0 (full stops not counted)
    faithfulness  claims that are facts of the document / (claims + broken statements);
                  1 for a text that states nothing, because it invents nothing
    fluency       claims told in a full sentence, "the entity is value", / claims; 0 without a claim
    focus         words of the claims, four in a full sentence and else two, / words of the text;
                  0 for an empty text
    lead          1 / the place of the document's first fact among the claims; 0 where it is missing

All lie in [0, 1] and are ratios of small integers, so equal quality is equal to the last bit and a
tie is a tie. They pull apart: every fact told costs words and can be wrong, and a full sentence
costs twice as many. A study of m objectives has the first m.
"""

from __future__ import annotations

import random
from itertools import pairwise
from typing import NamedTuple

from raco_fast.demo.documents import (
    VALUES,
    Document,
    Fact,
    full_sentence,
    make_document,
    make_summary,
)
from raco_fast.dpo.data.pairs import PreferencePair

OBJECTIVES = ("coverage", "brevity", "faithfulness", "fluency", "focus", "lead")
_VALUE_WORDS = frozenset(value for values in VALUES.values() for value in values)


class Statements(NamedTuple):
    """What a text states: its claims in order, and how many content words belong to none."""

    claims: tuple[Fact, ...]
    broken: int


def read_statements(text: str) -> Statements:
    """Find the claims and the broken statements of a text."""
    content = [word for word in text.split() if word in VALUES or word in _VALUE_WORDS]
    claims = tuple(
        Fact(entity, value)
        for entity, value in pairwise(content)
        if entity in VALUES and value in _VALUE_WORDS
    )
    return Statements(claims, len(content) - 2 * len(claims))


def judge(document: Document, text: str) -> dict[str, float]:
    """Score a text about a document by every objective; each score lies in [0, 1]."""
    claims, broken = read_statements(text)
    stated = set(claims) & set(document.facts)
    statements = len(claims) + broken
    supported = sum(claim in stated for claim in claims)
    words, first = count_words(text), document.facts[0]
    fluent = sum(f" {full_sentence(claim)} " in f" {text} " for claim in claims)
    return {
        "coverage": len(stated) / len(document.facts),
        "brevity": max(0.0, 1.0 - words / count_words(document.text)),
        "faithfulness": supported / statements if statements else 1.0,
        "fluency": fluent / len(claims) if claims else 0.0,
        "focus": min(1.0, 2 * (len(claims) + fluent) / words) if words else 0.0,
        "lead": 1 / (1 + claims.index(first)) if first in claims else 0.0,
    }


def label(document: Document, a: str, b: str) -> dict[str, float]:
    """Which of two texts each judge prefers: +1 the first, -1 the second, 0 a tie."""
    scores_a, scores_b = judge(document, a), judge(document, b)
    return {
        name: float((scores_a[name] > scores_b[name]) - (scores_a[name] < scores_b[name]))
        for name in OBJECTIVES
    }


def draw_pairs(n: int, rng: random.Random) -> list[PreferencePair]:
    """n documents, each with two different candidate summaries and the labels of all judges."""
    pairs = []
    for i in range(n):
        document = make_document(rng)
        a = b = make_summary(document, rng)
        while a == b:
            b = make_summary(document, rng)
        prompt = [{"role": "user", "content": document.text}]
        pairs.append(PreferencePair(str(i), prompt, a, b, label(document, a, b)))
    return pairs


def count_words(text: str) -> int:
    """Words of a text; full stops are none."""
    return sum(word != "." for word in text.split())
