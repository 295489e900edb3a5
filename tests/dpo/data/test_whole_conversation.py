"""The trained tokens are those of the whole conversation, with any tokenizer and template."""

import random

import pytest
from tiny_tokenizers import STOPS, TOKENIZERS, with_template

from raco_fast.dpo.data.pairs import PreferencePair
from raco_fast.dpo.data.tokenization import encode_pairs

HEADER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
# template -> (text, what it writes after an answer's stop token)
TEMPLATES = {
    "chatml": (TURNS + HEADER, "\n"),
    "llama 3": (
        "{% for m in messages %}{{ bos_token if loop.first }}<|start_header_id|>{{ m.role }}"
        "<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
        "{% endif %}",
        "",
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "\n",
    ),
    "zephyr": (  # its role markers are ordinary text
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "\n",
    ),
    "tinyllama": (  # a header without the newline that answers have
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "\n",
    ),
    "mistral 0.1": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "[INST] {{ m.content }} [/INST]{% else %}{{ m.content + eos_token }}{% endif %}"
        "{% endfor %}",
        "",
    ),
    "mistral 0.3": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "[INST] {{ m.content }}[/INST]{% else %} {{ m.content | trim + eos_token }}{% endif %}"
        "{% endfor %}",
        "",
    ),
    "phi 3": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        "\n</s>",
    ),
    "qwen 3": (  # thinking of the last answer only, empty where there is none
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}"
        "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}" + HEADER,
        "\n",
    ),
    "opens thinking": (  # for the model, not in answers
        TURNS + HEADER.replace("assistant\n", "assistant\n<think>\n"),
        "\n",
    ),
}
WORDS = ["Sure", "tea", "is a", " ", "\n", "drink", ".", "No", "Bread", "a", ":"]


def draw_pairs(n):
    """Pairs of words that merge with what is before them, or do not."""
    draw = random.Random(5)

    def text():
        return "".join(draw.choices(WORDS, k=draw.randint(1, 5))) + draw.choice(["", "tea", "?"])

    pairs = []
    while len(pairs) < n:
        turns = [
            {"role": ("user", "assistant")[k % 2], "content": text()}
            for k in range(draw.choice([1, 1, 3]))
        ]
        a, b = text(), text()
        if a.strip() and b.strip() and "".join(a.split()) != "".join(b.split()):
            pairs.append(PreferencePair(f"p{len(pairs)}", turns, a, b, {"x": 1}))
    return pairs


def tokenized(tokenizer, turns, header=False):
    """By transformers alone."""
    return tokenizer.apply_chat_template(
        turns, tokenize=True, return_dict=True, add_generation_prompt=header
    )["input_ids"]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_prompt_and_response_are_the_tokens_of_the_conversation(kind, template):
    tokenizer = with_template(kind, TEMPLATES[template][0])
    pairs = draw_pairs(12)
    encoded, report = encode_pairs(tokenizer, pairs)
    assert report.kept + report.dropped_identical == 12  # both may be nothing but unknown tokens
    assert report.kept > 6
    given = {pair.id: pair for pair in pairs}
    for found in encoded:
        pair = given[found.id]
        answers = [{"role": "assistant", "content": r} for r in (pair.response_a, pair.response_b)]
        wholes = [tokenized(tokenizer, [*pair.prompt, answer]) for answer in answers]
        before = tokenized(tokenizer, pair.prompt, header=True)
        n = len(found.prompt_ids)  # of the longest common prefix
        assert all(row[:n] == found.prompt_ids for row in (before, *wholes))
        assert n == len(before) or len({row[n] for row in (before, *wholes)}) > 1
        for whole, ids in zip(wholes, (found.a_ids, found.b_ids), strict=True):
            trained = found.prompt_ids + ids
            assert trained == whole[: len(trained)]
            after_stop = TEMPLATES[template][1]
            assert tokenizer.decode(whole[len(trained) :]).split() == after_stop.split()
            assert [id for id in ids if id in STOPS] == ids[-1:]


def test_a_token_across_the_boundary_belongs_to_the_response_that_has_it():
    tokenizer = with_template(
        "bytes",
        "{% for m in messages %}{{ m.role + ': ' + m.content }}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
    )
    turns = [{"role": "user", "content": "why"}]
    (pair,), report = encode_pairs(tokenizer, [PreferencePair("p", turns, "tea", "\tno", {})])
    # "assistant: " ends with a space. It begins "tea", and stays by itself before the tab.
    assert tokenizer.decode(pair.prompt_ids) == "user: why\nassistant:"
    assert tokenizer.convert_ids_to_tokens(pair.a_ids)[0] == "Ġtea"
    assert tokenizer.convert_ids_to_tokens(pair.b_ids)[0] == "Ġ"
    assert report.boundaries_moved == 1
    assert pair.a_ids[-1] == pair.b_ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_plain_text_is_tokenized_whole(kind):
    tokenizer = with_template(kind, None)
    turns = [{"role": "user", "content": "why"}]
    pair = PreferencePair("p", turns, "yes, tea", "Bread", {})
    (encoded,), _ = encode_pairs(tokenizer, [pair])
    for response, ids in (("yes, tea", encoded.a_ids), ("Bread", encoded.b_ids)):
        whole = tokenizer(f"\n\nHuman: why\n\nAssistant: {response}")["input_ids"]
        assert encoded.prompt_ids + ids == [*whole, tokenizer.eos_token_id]


def encode_one(template, turns=None, **pair):
    turns = turns or [{"role": "user", "content": "why"}]
    given_pair = {"response_a": "tea", "response_b": "No", "preferences": {}} | pair
    tokenizer = with_template("bytes", template)
    (encoded,), report = encode_pairs(tokenizer, [PreferencePair("p", turns, **given_pair)])
    return tokenizer, encoded, report


def test_a_header_that_answers_do_not_have_is_told():
    tokenizer, pair, report = encode_one(TEMPLATES["opens thinking"][0])
    assert tokenizer.decode(pair.prompt_ids).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(pair.a_ids) == "tea<|im_end|>"
    (sentence,) = report.warnings()
    assert (
        "opens an answer for the model otherwise than it writes the answers of 1 pairs" in sentence
    )


def test_what_a_template_writes_before_an_answer_is_trained_and_told():
    tokenizer, pair, report = encode_one(TEMPLATES["qwen 3"][0])
    assert tokenizer.decode(pair.a_ids) == "<think>\n\n</think>\n\ntea<|im_end|>"
    (sentence,) = report.warnings()
    assert "begins the answers of 1 pairs with text that its generation header does not" in sentence
    assert encode_one(TEMPLATES["chatml"][0])[2].warnings() == []


def test_text_that_a_template_takes_out_of_answers_is_told():
    strips = TURNS.replace("m.content", "m.content.split('</think>')[-1]") + HEADER
    tokenizer, pair, report = encode_one(
        strips, response_a="so</think>tea", response_b="x</think>No"
    )
    assert tokenizer.decode(pair.a_ids) == "tea<|im_end|>"
    (sentence,) = report.warnings()
    assert "changed the text of 2 responses" in sentence


def test_thinking_that_a_template_takes_out_of_earlier_turns_is_nothing_to_tell():
    strips = TEMPLATES["qwen 3"][0].replace("m.content", "m.content.split('</think>')[-1]")
    turns = [
        {"role": "user", "content": "why"},
        {"role": "assistant", "content": "hm</think>So."},
        {"role": "user", "content": "tea"},
    ]
    tokenizer, pair, report = encode_one(strips, turns)
    assert "hm" not in tokenizer.decode(pair.prompt_ids)
    assert report.responses_rewritten == report.header_differs == 0


def test_a_template_that_writes_the_prompt_otherwise_before_an_answer_is_refused():
    # Mistral 0.3 writes the system turn into the last turn, which an answer is.
    moves = (
        "{% for m in messages[1:] %}{% if m.role == 'user' %}[INST] "
        "{% if loop.last %}{{ messages[0].content }} {% endif %}{{ m.content }} [/INST]"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    )
    turns = [{"role": "system", "content": "Be calm."}, {"role": "user", "content": "why"}]
    with pytest.raises(ValueError, match=r"pair 'p': .*must render prompt \+ answer as a continua"):
        encode_one(moves, turns)


def test_an_answer_ends_with_the_token_that_the_template_closes_it_with():
    # Thinking is closed like an answer, and a call of a tool otherwise.
    harmony = (
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}<|im_end|>"
        "{% else %}<|im_start|>{% if m.thinking %}think {{ m.thinking }}<|im_end|><|im_start|>"
        "{% endif %}{% if m.tool_calls %}{{ m.tool_calls[0].name }}<|eot_id|>\n"
        "{% else %}say {{ m.content }}<|im_end|>{% endif %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    tokenizer, pair, _ = encode_one(
        harmony,
        answer_a={"thinking": "hm"},
        answer_b={"tool_calls": [{"name": "clock"}]},
        response_b="",
    )
    assert tokenizer.decode(pair.a_ids) == "think hm<|im_end|><|im_start|>say tea<|im_end|>"
    assert tokenizer.decode(pair.b_ids) == "clock<|eot_id|>"
