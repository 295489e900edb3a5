"""Texts that begin alike have the tokens that they have one by one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import SPECIAL, TOKENIZERS
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

import raco_fast.dpo.data.shared_beginnings as module
from raco_fast.dpo.data.ends import token_ids
from raco_fast.dpo.data.shared_beginnings import (
    SharedBeginnings,
    shared_length,
    where_texts_are_cut,
)

# What can go wrong at a cut: spaces in front of or behind it, half a special token, another one.
PIECES = [*SPECIAL[1:5], "<|im_", "<|im_start|", "|>", " ", "\n", "tea", "a drink", ".", "\u0301é"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


def one_by_one(tokenizer, groups):
    return [token_ids(tokenizer, list(texts)) for texts in groups]


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(groups=st.lists(st.tuples(TEXTS, TEXTS, TEXTS, st.booleans()), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_any_texts(kind, groups):
    tokenizer = TOKENIZERS[kind]
    texts = [(prompt + "x" * odd, prompt + a, prompt + b) for prompt, a, b, odd in groups]
    assert SharedBeginnings(tokenizer).ids(texts) == one_by_one(tokenizer, texts)


@pytest.fixture
def tokenized(monkeypatch):
    """The texts that were given to a tokenizer."""
    seen = []

    def noted(tokenizer, texts):
        seen.extend(texts)
        return token_ids(tokenizer, texts)

    monkeypatch.setattr(module, "token_ids", noted)
    return seen


CHAT = "<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
WHOLE = (CHAT, f"{CHAT}Tea<|im_end|>", f"{CHAT}No<|im_end|>")


def test_a_prompt_is_tokenized_once(tokenized):
    found = SharedBeginnings(TOKENIZERS["bytes"]).ids([WHOLE, WHOLE])
    tail = "<|im_start|>assistant\n"
    once = [f"{tail}", f"{tail}Tea<|im_end|>", f"{tail}No<|im_end|>"]
    assert tokenized == [CHAT.removesuffix(tail), *once, *once]
    assert found == one_by_one(TOKENIZERS["bytes"], [WHOLE, WHOLE])


def test_a_header_that_no_answer_has_is_not_shared(tokenized):
    opened = (f"{CHAT}<|im_start|>", *WHOLE[1:])
    assert SharedBeginnings(TOKENIZERS["bytes"]).ids([opened])[0][0] != []
    assert tokenized[0] == CHAT.removesuffix("<|im_start|>assistant\n")


class Shouting(PreTrainedTokenizerFast):
    """Not the library's own tokens."""

    def _encode_plus(self, text, **options):
        return super()._encode_plus([t.upper() for t in text], **options)


def test_tokenizers_that_may_do_otherwise_get_the_whole_texts(tokenized):
    core = TOKENIZERS["bytes"].backend_tokenizer
    shouting = Shouting(tokenizer_object=core, eos_token="</s>")
    splitting = PreTrainedTokenizerFast(tokenizer_object=core, split_special_tokens=True)
    for tokenizer in (shouting, splitting):
        assert SharedBeginnings(tokenizer).ids([WHOLE]) == one_by_one(tokenizer, [WHOLE])
        assert tokenized == list(WHOLE)
        tokenized.clear()


@pytest.mark.parametrize(
    ("added", "cut"),
    [
        ([AddedToken("<a>", normalized=False), AddedToken("<b>", normalized=True)], ["<a>"]),
        ([AddedToken("<a>", normalized=False, lstrip=True)], []),
        ([AddedToken("<a>", normalized=False, rstrip=True)], ["<a>"]),
        ([AddedToken("<a>", normalized=False), AddedToken("b", single_word=True)], ["<a>"]),
        ([AddedToken(t, normalized=False, single_word=t == "b") for t in ("<a>", "b")], []),
        ([AddedToken("\n\n", normalized=False)], []),
        # "<s><a>" begins with one token or is the other; its "<a>" is not cut off.
        ([AddedToken(t, normalized=False) for t in ("<a>", "<s><a>")], ["<s><a>"]),
        ([AddedToken(t, normalized=False) for t in ("<a>", "x<", "<a>!")], ["x<"]),
        ([AddedToken("aa", normalized=False)], []),
    ],
)
def test_where_any_text_is_cut(added, cut):
    assert where_texts_are_cut(added) == cut


@given(rows=st.lists(st.text("ab", max_size=5), min_size=1, max_size=3), ids=st.booleans())
def test_shared_length(rows, ids):
    length = shared_length(*([list(map(ord, row)) for row in rows] if ids else rows))
    assert all(row[:length] == rows[0][:length] for row in rows)
    assert len({row[: length + 1] for row in rows}) > 1 or length == min(map(len, rows))
