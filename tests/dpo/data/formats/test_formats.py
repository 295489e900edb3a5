import json
import re

import pytest
from pair_files import read_pairs

from raco_fast.dpo.data.data_source import DataSource
from raco_fast.dpo.data.files import read_rows
from raco_fast.dpo.data.formats.registry import FORMATS, find_format
from raco_fast.dpo.data.label_columns import LabelColumn
from raco_fast.dpo.data.rows import RowError
from raco_fast.dpo.data.sources import read_sources

USER = {"role": "user", "content": "why?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def said(text):
    return {"role": "assistant", "content": text}


def dialogue(*texts):
    """An Anthropic transcript."""
    who = ("Human", "Assistant")
    return "".join(f"\n\n{who[k % 2]}: {text}" for k, text in enumerate(texts))


@pytest.fixture
def read(tmp_path):
    """Write rows to a file and read them back as pairs."""

    def reader(*rows, run=("helpful",), **source):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return read_sources([DataSource(str(file), **source)], run)

    return reader


RACO = {
    "id": "r1",
    "prompt": [USER],
    "response_a": "yes",
    "response_b": "no",
    "preferences": {"helpful": -1, "harmless": 0, "other": 1},
}
PKU = {
    "prompt": "why?",
    "response_0": "yes",
    "response_1": "no",
    "better_response_id": 1,
    "safer_response_id": 0,
}
SUMMARY = {
    "Summary_A": [USER, said("yes")],
    "Summary_B": [USER, said("no")],
    "Quality": "A",
    "Verbosity": "B",
}
RACO_S = {
    "chosen": [USER, said("yes")],
    "rejected": [USER, said("no")],
    "raco_s_quality": 1.0,
    "raco_s_verbosity": -1.0,
    "raco_s_tone": 0,
}
RATED = [
    {"prompt": "why?", "response": "yes", "helpfulness": 3, "verbosity": 2, "coherence": 4},
    {"prompt": "why?", "response": "no", "helpfulness": 1.5, "verbosity": 4, "coherence": 4},
]
SCORED = {"text": [dialogue("why?", "no"), dialogue("why?", "yes")], "score": [0.0, 1.0]}
CHOSEN = {
    "explicit standard": {"prompt": "why?", "chosen": "yes", "rejected": "no"},
    "explicit conversational": {
        "prompt": [USER],
        "chosen": [said("yes")],
        "rejected": [said("no")],
    },
    "implicit conversational": {"chosen": [USER, said("yes")], "rejected": [USER, said("no")]},
    "text prompt, repeated in turns": {
        "prompt": "why?",
        "chosen": [USER, said("yes")],
        "rejected": [USER, said("no")],
    },
    "transcripts": {"chosen": dialogue("why?", "yes"), "rejected": dialogue("why?", "no")},
    "transcript prompt": {
        "prompt": dialogue("why?") + "\n\nAssistant:",
        "chosen": " yes",
        "rejected": " no",
    },
}


def content(pair):
    return pair.prompt, pair.response_a.strip(), pair.response_b.strip()


@pytest.mark.parametrize("row", CHOSEN.values(), ids=CHOSEN)
def test_chosen_is_a_and_labelled_plus_one(read, row):
    (pair,) = read(row)
    assert content(pair) == ([USER], "yes", "no")
    assert pair.preferences == {"helpful": 1}
    assert pair.id == "rows.jsonl:1"


@pytest.mark.parametrize(
    ("rows", "name", "objectives", "labels"),
    [
        ([RACO], "raco", ("helpful", "harmless"), (-1, 0)),
        ([PKU], "pku", ("helpful", "harmless"), (-1, 1)),
        ([PKU], "pku", ("safer_response_id", "better_response_id"), (1, -1)),
        ([SUMMARY], "summary-ab", ("quality", "Verbosity"), (1, -1)),
        ([RACO_S], "raco-s", ("verbosity", "quality", "tone"), (-1, 1, 0)),
        (RATED, "helpsteer2", ("helpfulness", "verbosity", "coherence"), (1, -1, 0)),
        ([SCORED], "text-score", ("helpful",), (1,)),
    ],
)
def test_labelled_formats(read, tmp_path, rows, name, objectives, labels):
    (pair,) = read(*rows, run=objectives)
    assert content(pair) == ([USER], "yes", "no")
    assert pair.preferences == dict(zip(objectives, labels, strict=True))
    assert (
        find_format(set(next(read_rows(DataSource(str(tmp_path / "rows.jsonl")))).data))
        is FORMATS[name]
    )
    assert read(*rows, run=objectives, format=name) == [pair]


def test_objectives_may_have_fields_of_other_names_and_signs(read):
    fields = {"helpful": "helpfulness", "concise": LabelColumn("verbosity", "lower")}
    (pair,) = read(*RATED, run=("helpful", "concise", "x"), objectives=fields)
    assert pair.preferences == {"helpful": 1, "concise": 1, "x": 0}
    (pair,) = read(RACO, objectives={"helpful": LabelColumn("other", "lower")})
    assert pair.preferences == {"helpful": -1}


def test_conversation_is_kept_and_the_shared_turns_are_the_prompt(read):
    history = [SYSTEM, USER, said("so"), {"role": "user", "content": "really?"}]
    (pair,) = read({"chosen": [*history, said("yes")], "rejected": [*history, said("no")]})
    assert pair.prompt == history
    texts = ("why?", "so", "really?")
    (pair,) = read({"chosen": dialogue(*texts, "yes"), "rejected": dialogue(*texts, "no")})
    assert pair.prompt == history[1:]
    assert (pair.response_a, pair.response_b) == ("yes", "no")


def test_identical_last_turns_never_become_prompt(read):
    side = [USER, said("same")]
    with pytest.raises(RowError, match=r":1: `responses` must differ, got two identical ones"):
        read({"chosen": side, "rejected": side})


def test_helpsteer2_multi_turn_prompt(read):
    prompt = "hi\n<extra_id_1>Assistant\nhello\n<extra_id_1>User\nwhy?"
    (pair,) = read(*[{**row, "prompt": prompt} for row in RATED], run=("helpfulness",))
    assert [turn["role"] for turn in pair.prompt] == ["user", "assistant", "user"]
    assert [turn["content"] for turn in pair.prompt] == ["hi", "hello", "why?"]


def test_helpsteer2_pairs_consecutive_rows_only(read):
    other = [{**row, "prompt": "who?"} for row in RATED]
    pairs = read(*RATED, *other, run=("helpfulness",))
    assert [pair.id for pair in pairs] == ["rows.jsonl:1", "rows.jsonl:3"]
    match = r"rows\.jsonl:3: `prompt` must be shared by two consecutive rows, or an even .*, got 1;"
    with pytest.raises(RowError, match=match):
        read(*RATED, other[0], run=("helpfulness",))
    with pytest.raises(RowError, match=r"rows\.jsonl:1: .* got 3; .*ambiguous"):
        read(*RATED, RATED[0], run=("helpfulness",))
    kept = read(other[0], *RATED, run=("helpfulness",), on_bad="skip")
    assert [pair.id for pair in kept] == ["rows.jsonl:2"]


UNKNOWN_LABELS = [
    ({**RACO, "preferences": {"helpful": 2}}, "preferences.helpful", "+1, -1 or 0", "2"),
    ({**RACO, "preferences": {"helpful": "a"}}, "preferences.helpful", "+1, -1 or 0", "'a'"),
    ({**RACO, "preferences": {"helpful": True}}, "preferences.helpful", "+1, -1 or 0", "True"),
    ({**RACO, "preferences": {"helpful": 0.5}}, "preferences.helpful", "+1, -1 or 0", "0.5"),
    ({**RACO, "preferences": {"helpful": float("nan")}}, "preferences.helpful", "+1, -1", "nan"),
    ({**RACO, "preferences": [1]}, "preferences", "map objectives", "got list of length 1"),
    ({**PKU, "better_response_id": 2}, "better_response_id", "0 or 1", "2"),
    ({**PKU, "better_response_id": -1}, "better_response_id", "0 or 1", "-1"),
    ({**PKU, "better_response_id": True}, "better_response_id", "0 or 1", "True"),
    ({**PKU, "better_response_id": "0"}, "better_response_id", "0 or 1", "'0'"),
    ({**SUMMARY, "helpful": "a"}, "helpful", "'A' or 'B'", "'a'"),
    ({**SUMMARY, "Helpful": "tie"}, "Helpful", "'A' or 'B'", "'tie'"),
    ({**SUMMARY, "helpful": "x" * 500}, "helpful", "'A' or 'B'", "got str of length 500"),
    ({**RACO_S, "raco_s_helpful": 0.4}, "raco_s_helpful", "+1, -1 or 0", "0.4"),
    ({**SCORED, "score": [1, "0"]}, "score[1]", "a finite number", "'0'"),
    ({**SCORED, "score": [1, float("inf")]}, "score[1]", "a finite number", "inf"),
    ({**SCORED, "score": [1]}, "score", "a list of two", "got list of length 1"),
]


@pytest.mark.parametrize(("row", "field", "rule", "value"), UNKNOWN_LABELS)
def test_unknown_label_is_an_error_never_a_tie(read, row, field, rule, value):
    match = rf"rows\.jsonl:1: `{re.escape(field)}` must .*{re.escape(rule)}.*{re.escape(value)}"
    with pytest.raises(RowError, match=match):
        read(row)
    with pytest.raises(ValueError, match=r"got none \(1 left out, the first because: .*" + match):
        read(row, on_bad="skip")


@pytest.mark.parametrize("bad", ["3", True, float("nan")])
def test_unknown_rating(read, bad):
    rows = [RATED[0], {**RATED[1], "helpfulness": bad}]
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: `helpfulness` must be a finite number"):
        read(*rows, run=("helpfulness",))
    one_sided = [RATED[0], {k: v for k, v in RATED[1].items() if k != "helpfulness"}]
    with pytest.raises(
        ValueError, match=r"must be a finite number for both responses, got 'nothing'"
    ):
        read(*one_sided, run=("helpfulness",))


@pytest.mark.parametrize("row", [RACO, PKU, SUMMARY, RACO_S], ids=["raco", "pku", "ab", "raco-s"])
def test_missing_label_field_is_an_error(read, row):
    match = r"rows\.jsonl:1: a row must label every .*no field for 'polite'.*write 0 where"
    with pytest.raises(ValueError, match=match):
        read(row, run=("polite",))


BAD_SHAPES = [
    ({**RACO, "prompt": "why?"}, r"`prompt` must be a list of turns, got str of length 4"),
    ({**RACO, "response_a": 5}, r"`response_a` must be text, got int;"),
    ({**RACO, "prompt": [{"role": "user"}]}, r"`prompt\[0\]` must have a role and a content"),
    (
        {**RACO, "prompt": [{"from": "human", "value": "x"}]},
        r"`prompt\[0\]` .*got \['from', 'value'\]; add them",
    ),
    ({**RACO, "prompt": [{"role": "user", "content": [1]}]}, r"`prompt\[0\].content` must be text"),
    ({"chosen": "yes", "rejected": "no"}, r"`chosen` must be turns, or a transcript .*add a `pro"),
    ({"chosen": "yes", "rejected": [USER]}, r"`rejected` must be of the same kind as `chosen`"),
    (
        {"prompt": "why?", "chosen": 1, "rejected": 2},
        r"`chosen` must be a list of turns, got int",
    ),
    (
        {"chosen": [USER, said("a"), USER, said("b")], "rejected": [USER, said("c")]},
        r"`chosen` must add one assistant turn to the prompt, got 3 turns \('assistant', 'user'",
    ),
    (
        {"prompt": "who?", "chosen": [USER, said("b")], "rejected": [USER, said("c")]},
        r"`chosen` must add one assistant turn to the prompt, got 2 turns",
    ),
    ({**SCORED, "score": [2, 2]}, r"`score` must differ, got two equal scores"),
]


@pytest.mark.parametrize(("row", "match"), BAD_SHAPES)
def test_bad_shapes(read, row, match):
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: " + match):
        read(row)


def test_a_later_row_of_another_format(read):
    match = r"rows\.jsonl:2: `preferences` must be present, got the fields \['better_response_id'"
    with pytest.raises(ValueError, match=match):
        read(RACO, {**PKU, "prompt": [USER], "response_a": "x", "response_b": "y"})


def test_one_objective_for_files_without_label_fields(read):
    row = CHOSEN["transcripts"]
    match = r":1: `objective` must name the one objective .*got \['helpful', 'harmless'\]; add e\.g"
    with pytest.raises(ValueError, match=match):
        read(row, run=("helpful", "harmless"))
    (pair,) = read(row, run=("helpful", "harmless"), objective="harmless")
    assert pair.preferences == {"helpful": 0, "harmless": 1}
    with pytest.raises(ValueError, match="`objectives` must be empty for a 'chosen-rejected'"):
        read(row, objectives={"helpful": "score"})


@pytest.mark.parametrize("text", ["SECRET", "SECRET" * 3, "SECRET" * 300])
def test_messages_quote_no_response(read, text):
    rows = [
        {**RACO, "response_a": text, "response_b": text},
        {**RACO, "response_a": text, "response_b": ""},
        {**RACO, "response_a": text, "preferences": {}},
        {**RACO, "response_a": text, "prompt": [said(text)]},
        {**RACO, "response_a": [text]},
        {**RACO, "prompt": text},
        {**RACO, "prompt": [text]},
        {**RACO, "prompt": [{"role": "user", "content": [text]}]},
        {"chosen": text, "rejected": text},
        {"chosen": [text], "rejected": [text]},
        {"prompt": [text], "chosen": "a", "rejected": "b"},
        {"chosen": [USER, said(text), USER], "rejected": [USER, said("x")]},
    ]
    for row in rows:
        with pytest.raises(ValueError, match=r"rows\.jsonl:1: ") as caught:
            read(row)
        assert "SECRET" not in str(caught.value)


SAMPLES = [
    # file, objectives, pairs, labels of the first pairs
    ("hh_rlhf.helpful-base.jsonl", ("helpful",), 6, [(1,)] * 6),
    ("hh_rlhf.harmless-base.jsonl", ("harmless",), 6, [(1,)] * 6),
    ("trl_explicit_prompt_standard.jsonl", ("helpful",), 4, [(1,)] * 4),
    ("trl_explicit_prompt_conversational.jsonl", ("helpful",), 4, [(1,)] * 4),
    ("trl_implicit_prompt_conversational.jsonl", ("helpful",), 4, [(1,)] * 4),
    ("raco_moa_summary_ab.jsonl", ("quality", "verbosity"), 5, [(1, -1), (1, 1), (1, -1)]),
    ("raco_trl_raco_s.jsonl", ("quality", "verbosity"), 5, [(1, -1), (1, 1), (1, -1)]),
    (
        "beavertails_pku_v0_schema.cast_from_xstest.jsonl",
        ("helpful", "harmless"),
        6,
        [(1, -1), (-1, 1)],
    ),
    (
        "pku_saferlhf_v1_schema.cast_from_xstest.jsonl",
        ("helpful", "harmless"),
        6,
        [(1, -1), (-1, 1)],
    ),
    (
        "helpsteer2_schema.cast_from_emnlp17.jsonl",
        ("helpfulness", "verbosity"),
        4,
        [(-1, -1), (-1, 0), (1, 0), (1, 0)],
    ),
    ("dsp_text_score.json", ("helpful",), 3, [(1,)] * 3),
    ("qa_feedback.dev.json", ("helpful",), 6, [(1,), (1,), (-1,), (1,), (-1,), (-1,)]),
]


@pytest.mark.parametrize(
    ("file", "objectives", "n", "labels"), SAMPLES, ids=[s[0] for s in SAMPLES]
)
def test_raw_samples(shared, file, objectives, n, labels):
    pairs = read_pairs(shared / "data" / "raw_samples" / file, objectives)
    assert len(pairs) == n
    assert [tuple(p.preferences.values()) for p in pairs][: len(labels)] == labels
    assert all(p.prompt[-1]["role"] == "user" for p in pairs)


def test_raw_samples_that_say_the_same_agree(shared):
    """The same conversations in TRL's three forms, and in the paper's two, give the same pairs."""
    folder = shared / "data" / "raw_samples"

    def contents(file, objectives):  # hashes: a failure must not print the text
        pairs = read_pairs(folder / file, objectives)
        return [(hash(repr(content(p))), p.preferences) for p in pairs]

    forms = ("explicit_prompt_standard", "explicit_prompt_conversational")
    implicit = contents("trl_implicit_prompt_conversational.jsonl", ["helpful"])
    for form in forms:
        assert contents(f"trl_{form}.jsonl", ["helpful"]) == implicit
    paper = contents("raco_moa_summary_ab.jsonl", ["quality", "verbosity"])
    theirs = contents("raco_trl_raco_s.jsonl", ["quality", "verbosity"])
    assert [labels for _, labels in paper] == [labels for _, labels in theirs]


def test_a_raw_sample_of_one_response_says_why_it_is_no_pair(shared):
    file = shared / "data" / "raw_samples" / "helpsteer2.card_example.jsonl"
    match = r"card_example\.jsonl:1: .*two consecutive rows, or an even number of them, got 1"
    with pytest.raises(RowError, match=match):
        read_pairs(file, ["helpfulness"])


def test_the_raw_samples_are_all_known(shared):
    """A file that is added to them is read, or the test above it says why not."""
    files = {file.name for file in (shared / "data" / "raw_samples").iterdir()}
    assert files - {sample[0] for sample in SAMPLES} == {"helpsteer2.card_example.jsonl"}


def test_qa_feedback_is_read_as_the_set_made_of_it(shared):
    """Its training pairs were drawn from this very file, with signs by another program."""
    pairs = read_pairs(shared / "data/raw_samples/qa_feedback.dev.json", ["helpful"])
    ours = {}
    for p in pairs:
        ours[p.response_a.strip(), p.response_b.strip()] = p.preferences["helpful"]
        ours[p.response_b.strip(), p.response_a.strip()] = -p.preferences["helpful"]
    theirs = [
        (p.response_a.strip(), p.response_b.strip(), p.preferences["helpful"])
        for p in read_pairs(shared / "data/qa_feedback.train.jsonl.gz", ["helpful"])
        if p.prompt == pairs[0].prompt
    ]
    assert len(theirs) == len(pairs) == 6
    assert [ours[a, b] for a, b, _ in theirs] == [label for *_, label in theirs]
