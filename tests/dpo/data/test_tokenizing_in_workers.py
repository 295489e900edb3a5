"""Worker processes give what one process gives, whatever happens to the pairs."""

import io
import sys

import pytest
from tiny_tokenizers import with_template

import raco_fast.dpo.data.tokenization as tokenization
from raco_fast.dpo.data.pairs import PreferencePair
from raco_fast.dpo.data.rendering import TokenOptions
from raco_fast.dpo.data.tokenization import encode_pairs

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if 'date' in m.content %}{{ strftime_now('%d %B') }} {% endif %}"
    "{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_pairs(n=70):
    """Every fifth is dropped for one reason or another, some are cut, one asks for the date."""
    pairs = []
    for k in range(n):
        question, a, b = f"is it {k}?", f"Yes, {'it is. ' * (k % 11)}", f"No, {k * 7}"
        given = {}
        if k % 5 == 0:
            a = f"A drink </s> {k}"
        if k % 7 == 1:
            question = "tea? " * 40
        if k % 9 == 2:
            b = f"Yes, it is. {'it is. ' * 200} {k}"
        if k % 13 == 3:
            given = {"answer_a": {"thinking": "a b"}, "tools": [{"name": "clock"}]}
        if k == 51:
            question = "the date?"
        turns = [{"role": "user", "content": question}]
        pairs.append(
            PreferencePair(f"p{k}", turns, a, b, {"x": 1, "y": -0.75}, {"x": 2.0}, **given)
        )
    return pairs


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch):
    monkeypatch.setattr(tokenization, "_AT_ONCE", 16)


def test_the_same_tokens_and_counts(monkeypatch):
    tokenizer, pairs = with_template("bytes", CHAT), make_pairs()
    options = TokenOptions(96, special_text="drop", date="2026-11-29")
    alone = encode_pairs(tokenizer, pairs, options)
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    by_workers = encode_pairs(tokenizer, pairs, options, workers=2, progress=True)
    assert by_workers == alone
    known = {}  # one object a number, in the memory of which all are held
    for pair in by_workers[0]:
        assert all(known.setdefault(id, id) is id for id in [*pair.prompt_ids, *pair.a_ids])
    assert max(known) > 256  # Python itself keeps one of each below
    encoded, report = alone
    assert (report.pairs, report.kept) == (70, len(encoded))
    assert (report.dropped_special_text, report.prints_date) == (14, True)
    assert report.prompts_truncated > 0 < report.responses_truncated
    assert report.not_rendered == {"tools": 5, "response.thinking": 5}
    assert "tokenize:" in shown.getvalue()
    assert "70/70" in shown.getvalue()


@pytest.mark.slow  # a start of processes for every case
@pytest.mark.parametrize("options", [{}, {"special_text": "drop", "overlength": "error"}])
def test_the_same_error_for_the_same_pair(options):
    tokenizer, pairs = with_template("bytes", CHAT), make_pairs()[1:]
    messages = []
    for workers in (0, 2):
        with pytest.raises(ValueError, match="pair 'p") as caught:
            encode_pairs(tokenizer, pairs, TokenOptions(96, **options), workers=workers)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_an_error_is_that_of_the_first_bad_pairs():
    """Also where one is found before the text of another is looked at."""
    tokenizer, pairs = with_template("bytes", CHAT), make_pairs()[1:]
    with pytest.raises(ValueError, match="pair 'p5': `response_a` must not spell a special token"):
        encode_pairs(tokenizer, pairs)
    with pytest.raises(ValueError, match="pair 'p2': prompt and response must fit max_length"):
        encode_pairs(tokenizer, pairs, TokenOptions(96, special_text="drop", overlength="error"))


def test_no_bar_for_what_takes_no_time(capfd):
    encode_pairs(with_template("bytes", CHAT), make_pairs()[1:3], progress=True)
    assert capfd.readouterr().err == ""
