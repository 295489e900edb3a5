"""A template's clock can be stopped, in every version of transformers."""

from datetime import datetime

import pytest
from tiny_tokenizers import with_template

from raco_fast.dpo.data.dated_template import dated, may_write_date
from raco_fast.dpo.data.pairs import PreferencePair
from raco_fast.dpo.data.rendering import TokenOptions
from raco_fast.dpo.data.tokenization import encode_pairs

CHAT = "{% for m in messages %}{{ m.role + ': ' + m.content }}<|im_end|>\n{% endfor %}"
LLAMA = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}"
    "{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}Today: {{ date_string }}\n"
)
IN_A_MACRO = "{% macro head() %}{{ strftime_now('%Y-%m-%d') }}{% endmacro %}{{ head() }}|"
WITHOUT_SYSTEM = "{% if messages[0].role != 'system' %}{{ strftime_now('%-d/%m') }}{% endif %}"
PAIR = PreferencePair("p", [{"role": "user", "content": "why"}], "tea", "No", {})


@pytest.mark.parametrize(
    "format", ["%d %b %Y", "%A, %B %-d", "%H:%M:%S %p %j", "100 %% of %Q%", "%", "%_d%^a%-%", ""]
)
def test_the_stopped_clock_writes_what_strftime_does(format):
    now = datetime(2026, 3, 4, 5, 6, 7)
    template = dated("\n{{ strftime_now(given) }}\n" + CHAT, now)
    text = with_template("bytes", None).apply_chat_template(
        PAIR.prompt, chat_template=template, tokenize=False, given=format
    )
    assert text == f"\n{now.strftime(format)}\nuser: why<|im_end|>\n"


def test_a_template_without_a_clock_stays_as_it_is():
    assert dated(CHAT, datetime.now()) == CHAT
    assert not may_write_date(CHAT)


@pytest.mark.parametrize(
    ("head", "written"),
    [(LLAMA, "Today: 29 Nov 2026\n"), (IN_A_MACRO, "2026-11-29|"), (WITHOUT_SYSTEM, "29/11")],
)
def test_the_date_is_the_one_asked_for(head, written):
    tokenizer = with_template("bytes", head + CHAT)
    (pair,), report = encode_pairs(tokenizer, [PAIR], TokenOptions(date="2026-11-29"))
    assert tokenizer.decode(pair.prompt_ids).startswith(f"{written}user: why")
    assert report.prints_date
    assert tokenizer.chat_template == head + CHAT


def test_a_date_that_is_not_written_is_not_reported():
    system = {"role": "system", "content": "Be calm."}
    pair = PreferencePair("p", [system, *PAIR.prompt], "tea", "No", {})
    tokenizer = with_template("bytes", WITHOUT_SYSTEM + CHAT)
    assert not encode_pairs(tokenizer, [pair])[1].prints_date
    assert encode_pairs(tokenizer, [pair, PAIR])[1].prints_date


def test_without_a_date_it_is_today():
    (pair,), _ = encode_pairs(with_template("bytes", LLAMA + CHAT), [PAIR])
    (also,), _ = encode_pairs(
        with_template("bytes", LLAMA + CHAT),
        [PAIR],
        TokenOptions(date=datetime.now().date().isoformat()),
    )
    assert pair == also


@pytest.mark.parametrize("day", ["2026-13-01", "29 Nov 2026", "20261129", "2026-W48-7", ""])
def test_a_date_is_a_day_of_iso_8601(day):
    with pytest.raises(ValueError, match=f"`date` must be a day such as '2026-11-29', got '{day}"):
        TokenOptions(date=day)
