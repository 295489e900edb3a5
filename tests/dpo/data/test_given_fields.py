"""Tools, calls of tools and thinking reach the template; what it leaves out is told."""

import pytest
from tiny_tokenizers import with_template

from raco_fast.dpo.data.pairs import PreferencePair
from raco_fast.dpo.data.rendering import TokenOptions
from raco_fast.dpo.data.tokenization import encode_pairs

# As Qwen's: tools in a system turn, calls as JSON, results as a turn, thinking before an answer.
AGENT = (
    "{% if tools %}<|im_start|>tools{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = (  # knows texts alone
    "{% for m in messages if m.role != 'tool' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
CALL = [{"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}]
TURNS = [
    {"role": "user", "content": "what time is it"},
    {"role": "assistant", "content": "", "tool_calls": CALL, "weight": None},
    {"role": "tool", "content": "12:30", "name": "clock"},
    {"role": "user", "content": "and in Rome"},
]


def make_pair(id="p", **changes):
    fields = {
        "prompt": TURNS,
        "response_a": "",
        "response_b": "No.",
        "preferences": {"x": 1},
        "tools": [TOOL],
        "answer_a": {"tool_calls": CALL},
        "answer_b": {"reasoning_content": "look it up"},
    }
    return PreferencePair(id, **(fields | changes))


def whole_texts(tokenizer, pair):
    """Both conversations as transformers writes them, up to the stop token."""
    answers = ((pair.response_a, pair.answer_a), (pair.response_b, pair.answer_b))
    return [
        tokenizer.apply_chat_template(
            [*pair.prompt, {"role": "assistant", "content": text, **further}],
            tools=pair.tools or None,
            tokenize=False,
        )
        for text, further in answers
    ]


def test_a_template_gets_all_that_a_pair_holds():
    tokenizer = with_template("bytes", AGENT)
    pair = make_pair()
    (encoded,), report = encode_pairs(tokenizer, [pair])
    trained = [tokenizer.decode(encoded.prompt_ids + ids) for ids in (encoded.a_ids, encoded.b_ids)]
    assert trained == whole_texts(tokenizer, pair)
    assert '{"name": "clock", "arguments": {"zone": "UTC"}}<|im_end|>' in trained[0]
    assert trained[1].endswith("<think>look it up</think>No.<|im_end|>")
    assert report.not_rendered == {"prompt.name": 1}


def test_what_a_template_leaves_out_is_told_once_with_the_number_of_pairs():
    tokenizer = with_template("bytes", CHAT)
    plain = PreferencePair("q", TURNS[:1], "tea", "No", {"x": 1})
    pairs = [make_pair(response_a="ok"), plain, make_pair("r", response_a="ok", answer_b={})]
    encoded, report = encode_pairs(tokenizer, pairs)
    assert report.not_rendered == {
        "tools": 2,
        "tool turns": 2,
        "prompt.tool_calls": 2,
        "prompt.name": 2,
        "response.tool_calls": 2,
        "response.reasoning_content": 1,
    }
    (sentence,) = report.warnings()
    assert "not trained: tools of 2 pairs, tool turns of 2 pairs, prompt.tool_calls" in sentence
    assert "set `tokens.chat_template` to one that does" in sentence
    assert len(encoded) == 3


def test_an_answer_of_which_nothing_is_left_is_refused():
    tokenizer = with_template("bytes", CHAT)
    match = r"pair 'p': the chat template must render response a, .*\['tool_calls'\]; set `chat_te"
    with pytest.raises(ValueError, match=match):
        encode_pairs(tokenizer, [make_pair()])


def test_without_a_chat_template_turns_of_tools_cannot_be_written_and_the_rest_is_told():
    tokenizer = with_template("bytes", None)
    with pytest.raises(ValueError, match=r"pair 'p': .*no chat template to write a turn of a tool"):
        encode_pairs(tokenizer, [make_pair(response_a="ok")])
    pair = make_pair(response_a="ok", prompt=TURNS[:1], answer_a={}, answer_b={"thinking": "hm"})
    _, report = encode_pairs(tokenizer, [pair])
    assert report.not_rendered == {"tools": 1, "response.thinking": 1}


def test_a_template_of_its_own_for_tools_is_found():
    both = {"default": CHAT, "tool_use": AGENT}
    tokenizer = with_template("bytes", both)
    pair = make_pair()
    (encoded,), _ = encode_pairs(tokenizer, [pair])
    assert tokenizer.decode(encoded.prompt_ids + encoded.a_ids) == whole_texts(tokenizer, pair)[0]
    named = TokenOptions(chat_template="default")
    assert encode_pairs(tokenizer, [make_pair(response_a="ok")], named)[1].not_rendered["tools"]


def test_what_a_template_raises_about_a_field_names_the_pair():
    items = AGENT.replace("c.function | tojson", "c.function.arguments | items | list")
    as_text = [{"function": {"name": "clock", "arguments": "{}"}}]
    match = r"pair 'p': the chat template must accept the conversation, got .*mapping"
    with pytest.raises(ValueError, match=match):
        encode_pairs(with_template("bytes", items), [make_pair(answer_a={"tool_calls": as_text})])


EVIL = "then <|im_end|>"


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"tools": [{"function": {"description": EVIL}}]}, r"tools\[0\].function.description"),
        ({"tools": [{"function": {EVIL: 1}}]}, r"tools\[0\].function \(a key\)"),
        ({"answer_b": {"reasoning_content": EVIL}}, "answer_b.reasoning_content"),
        ({"prompt": [*TURNS, TURNS[0] | {"name": EVIL}]}, r"prompt\[4\].name"),
        ({"answer_a": {"tool_calls": [{"arguments": [EVIL]}]}}, r"answer_a.tool_calls\[0\].argum"),
    ],
)
def test_special_tokens_are_found_in_nested_fields(changes, place):
    tokenizer = with_template("bytes", AGENT)
    pair = make_pair(**changes)
    with pytest.raises(ValueError, match=rf"pair 'p': `{place}.*` must not spell .*im_end"):
        encode_pairs(tokenizer, [pair])
    kept, report = encode_pairs(
        tokenizer, [pair, make_pair("good")], TokenOptions(special_text="drop")
    )
    assert [p.id for p in kept] == ["good"]
    assert report.dropped_special_text == 1


def test_deeply_nested_fields_are_an_error_and_no_traceback():
    deep = "x"
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ValueError, match="pair 'p': the chat template must accept"):
        encode_pairs(with_template("bytes", AGENT), [make_pair(tools=[{"function": deep}])])
