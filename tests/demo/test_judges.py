"""The demo's documents and judges: exact scores, their properties, labels, determinism."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raco_fast.demo.documents import (
    FACTS_PER_DOCUMENT,
    FILLERS,
    MAX_FILLERS,
    VALUES,
    Document,
    Fact,
    full_sentence,
    make_document,
    make_summary,
    short_sentence,
)
from raco_fast.demo.judges import (
    OBJECTIVES,
    Statements,
    count_words,
    draw_pairs,
    judge,
    label,
    read_statements,
)
from raco_fast.dpo.data.pairs import PreferencePair

TRAIN, RIVER = Fact("train", "late"), Fact("river", "frozen")
MAYOR, ROAD = Fact("mayor", "happy"), Fact("road", "icy")
DOCUMENT = Document(
    (TRAIN, RIVER, MAYOR, ROAD),
    "the train is late . that is known . the river is frozen . the mayor is happy . "
    "the road is icy .",
)  # 19 words


@pytest.mark.parametrize(
    ("text", "coverage", "words", "faithfulness"),
    [
        ("train late . river frozen . mayor happy . road icy .", 1.0, 8, 1.0),
        (DOCUMENT.text, 1.0, 19, 1.0),
        ("", 0.0, 0, 1.0),
        ("that is known .", 0.0, 3, 1.0),
        ("train late .", 0.25, 2, 1.0),
        ("the train is early .", 0.0, 4, 0.0),
        ("train late . river calm . school big .", 0.25, 6, 1 / 3),
        # A fact told twice covers once; telling it both right and wrong covers it and is half true.
        ("train late . train late .", 0.25, 4, 1.0),
        ("train late . train early .", 0.25, 4, 0.5),
        # The right values with the wrong entities are inventions.
        ("train frozen . river late .", 0.0, 4, 0.0),
        # Ungrammatical texts: stray content words are broken statements, order and stops do not
        # matter, unknown words and special tokens are words without content.
        ("late train .", 0.0, 2, 0.0),
        ("train train late", 0.25, 3, 0.5),
        ("train . . is the late . mayor", 0.25, 5, 0.5),
        ("happy . mayor happy late", 0.25, 4, 1 / 3),
        ("<pad> train <unk> late gibberish", 0.25, 5, 1.0),
        ("TRAIN LATE .", 0.0, 2, 1.0),
    ],
)
def test_scores_of_handwritten_texts_are_exact(
    text: str, coverage: float, words: int, faithfulness: float
) -> None:
    scores = judge(DOCUMENT, text)
    assert scores["coverage"] == coverage
    assert scores["brevity"] == 1 - words / 19
    assert scores["faithfulness"] == faithfulness


@pytest.mark.parametrize(
    ("text", "fluency", "focus", "lead"),
    [
        ("", 0.0, 0.0, 0.0),
        ("train late . river frozen .", 0.0, 1.0, 1.0),
        ("the train is late . river frozen .", 0.5, 1.0, 1.0),
        ("river frozen . mayor happy . the train is late .", 1 / 3, 1.0, 1 / 3),
        ("that is known . train late .", 0.0, 2 / 5, 1.0),
        ("nobody said more . the river is frozen .", 1.0, 4 / 7, 0.0),
        # Neither a stop that is missing nor a word between makes a full sentence.
        ("the train is late", 0.0, 1 / 2, 1.0),
        ("the train train is late .", 0.0, 2 / 5, 1.0),
        # A wrong value is a claim, though not the document's.
        ("the train is early .", 1.0, 1.0, 0.0),
    ],
)
def test_scores_of_style_are_exact(text: str, fluency: float, focus: float, lead: float) -> None:
    scores = judge(DOCUMENT, text)
    assert (scores["fluency"], scores["focus"], scores["lead"]) == (fluency, focus, lead)


def test_a_text_longer_than_the_document_has_no_brevity_left() -> None:
    assert judge(DOCUMENT, f"{DOCUMENT.text} {DOCUMENT.text}")["brevity"] == 0.0


def test_statements_are_read_in_order_with_what_is_broken_off() -> None:
    text = "frozen . the road is icy . train . the mayor is happy late ."
    assert read_statements(text) == Statements((ROAD, MAYOR), broken=3)


@given(st.integers(0, 10**6))
def test_dropping_a_fact_costs_coverage_and_wins_brevity(seed: int) -> None:
    rng = random.Random(seed)
    document = make_document(rng)
    style = rng.choice((short_sentence, full_sentence))
    whole = [style(fact) for fact in document.facts]
    dropped = whole[:]
    del dropped[rng.randrange(FACTS_PER_DOCUMENT)]
    before, after = judge(document, " ".join(whole)), judge(document, " ".join(dropped))
    assert before["coverage"] == 1.0
    assert after["coverage"] == 0.75
    assert after["brevity"] > before["brevity"]
    assert after["faithfulness"] == before["faithfulness"] == 1.0


@given(st.integers(0, 10**6))
def test_filler_costs_only_brevity_and_an_invention_costs_faithfulness(seed: int) -> None:
    rng = random.Random(seed)
    document = make_document(rng)
    text = short_sentence(rng.choice(document.facts))
    plain = judge(document, text)
    padded = judge(document, f"{text} {rng.choice(FILLERS)}")
    for name in ("brevity", "focus"):
        assert padded.pop(name) < plain[name]
    assert padded == {name: plain[name] for name in padded}
    mentioned = {fact.entity for fact in document.facts}
    stranger = rng.choice([entity for entity in VALUES if entity not in mentioned])
    invented = judge(document, f"{text} {stranger} {VALUES[stranger][0]} .")
    assert invented["faithfulness"] == 0.5
    assert invented["coverage"] == 0.25
    assert invented["brevity"] < plain["brevity"]


WORDS = [*VALUES, *(value for values in VALUES.values() for value in values), "the", "is", ".", "?"]


@given(st.integers(0, 10**6), st.lists(st.sampled_from(WORDS), max_size=60))
def test_every_text_gets_scores_between_0_and_1(seed: int, words: list[str]) -> None:
    scores = judge(make_document(random.Random(seed)), " ".join(words))
    assert tuple(scores) == OBJECTIVES
    assert all(0.0 <= score <= 1.0 for score in scores.values())


@given(st.integers(0, 10**6))
def test_documents_and_summaries_are_what_they_say(seed: int) -> None:
    rng = random.Random(seed)
    document = make_document(rng)
    assert read_statements(document.text) == Statements(document.facts, broken=0)
    assert len({fact.entity for fact in document.facts}) == FACTS_PER_DOCUMENT
    assert count_words(document.text) <= 4 * FACTS_PER_DOCUMENT + 3 * MAX_FILLERS
    summary = make_summary(document, rng)
    claims, broken = read_statements(summary)
    assert broken == 0
    assert 1 <= len(claims) <= FACTS_PER_DOCUMENT + 2


def document_of(pair: PreferencePair) -> Document:
    """The document of a pair, read from its prompt."""
    text = pair.prompt[0]["content"]
    return Document(read_statements(text).claims, text)


@given(st.integers(0, 10**6))
def test_labels_agree_with_the_judges_and_flip_with_the_pair(seed: int) -> None:
    (pair,) = draw_pairs(1, random.Random(seed))
    assert pair.response_a != pair.response_b
    document = document_of(pair)
    a, b = judge(document, pair.response_a), judge(document, pair.response_b)
    for name in OBJECTIVES:
        expected = 1 if a[name] > b[name] else -1 if a[name] < b[name] else 0
        assert pair.preferences[name] == expected
    flipped = label(document, pair.response_b, pair.response_a)
    assert flipped == {name: -value for name, value in pair.preferences.items()}


def test_pairs_conflict_agree_and_tie() -> None:
    pairs = draw_pairs(400, random.Random(3))
    assert len({pair.id for pair in pairs}) == 400
    labels = [pair.preferences for pair in pairs]
    conflicts = sum(pair["coverage"] * pair["brevity"] == -1 for pair in labels)
    agreements = sum(pair["coverage"] * pair["brevity"] == 1 for pair in labels)
    assert conflicts > 2 * agreements > 0
    for name in OBJECTIVES:
        assert {pair[name] for pair in labels} == {-1, 0, 1}


def test_a_tie_is_a_tie_to_the_last_bit() -> None:
    a = "train late . river calm . road icy . mayor angry ."  # 2 of 4 claims hold
    b = "train late . the train is early ."  # 1 of 2, as many words less 2
    found = label(DOCUMENT, a, b)
    assert (found["coverage"], found["brevity"], found["faithfulness"]) == (1, -1, 0)


def test_the_generator_is_a_function_of_its_seed() -> None:
    first, again, other = (draw_pairs(20, random.Random(seed)) for seed in (11, 11, 12))
    assert first == again != other


def test_no_value_belongs_to_two_entities_and_no_filler_carries_content() -> None:
    values = [value for values in VALUES.values() for value in values]
    assert len(values) == len(set(values))
    assert not set(values) & set(VALUES)
    assert all(read_statements(filler) == Statements((), broken=0) for filler in FILLERS)
