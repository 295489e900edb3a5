import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from raco_fast.dpo.data.pairs import PreferencePair
from raco_fast.dpo.data.rendering import PlainTemplate, TokenOptions
from raco_fast.dpo.data.tokenization import encode_pairs, token_counter

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\n"
    "Be good.<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token if loop.first }}[INST] "
    "{{ m.content }} [/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (  # writes no BOS although its tokenizer begins plain text with one
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PHI = (  # closes the turn, then the text: two stop tokens
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
OPEN = (  # closes nothing
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def make_tokenizer(template=None, *, special=(), bos=None, eos="</s>", adds_bos=False):
    """A byte-level BPE that loses nothing, with the special tokens of one model family."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    named = [token for token in (bos, eos) if token]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(dict.fromkeys([*named, *special])),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(
        ["the answer to the question is not the prompt", "hello there"], trainer
    )
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


GEMMA_SPECIAL = ("<start_of_turn>", "<end_of_turn>")
LLAMA3_SPECIAL = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
# family -> (tokenizer, stop token, BOS tokens per sequence, takes a system turn)
FAMILIES = {
    "qwen": (
        make_tokenizer(CHATML, special=("<|im_start|>", "<|im_end|>"), eos="<|im_end|>"),
        ("<|im_end|>", 0, True),
    ),
    "llama3": (
        make_tokenizer(LLAMA3, special=LLAMA3_SPECIAL, bos="<|begin_of_text|>", adds_bos=True),
        ("<|eot_id|>", 1, True),
    ),
    "gemma": (
        make_tokenizer(GEMMA, special=GEMMA_SPECIAL, bos="<bos>", eos="<eos>", adds_bos=True),
        ("<end_of_turn>", 1, False),
    ),
    "llama2": (make_tokenizer(LLAMA2, bos="<s>", adds_bos=True), ("</s>", 1, False)),
    "zephyr": (make_tokenizer(ZEPHYR, bos="<s>", adds_bos=True), ("</s>", 1, True)),
    "phi": (
        make_tokenizer(PHI, special=("<|user|>", "<|assistant|>", "<|end|>"), eos="<|endoftext|>"),
        ("<|end|>", 0, True),
    ),
    "open": (make_tokenizer(OPEN), ("</s>", 0, True)),
    "bos named, never used": (make_tokenizer(OPEN, bos="<s>"), ("</s>", 0, True)),
    "plain": (make_tokenizer(None), ("</s>", 0, True)),
    "plain with bos": (make_tokenizer(None, bos="<s>", adds_bos=True), ("</s>", 1, True)),
}
# What these templates write after the stop token of an answer.
AFTER_STOP = {"qwen": "\n", "gemma": "\n", "zephyr": "\n", "phi": "\n<|endoftext|>"}


def make_pair(prompt="why?", a="Because it is so.", b="No.", id="p", **labels):
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return PreferencePair(id, turns, a, b, labels or {"helpful": 1, "concise": -1})


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def rendering(tokenizer, turns, response):
    """The template's own text of the whole conversation."""
    whole = [*turns, {"role": "assistant", "content": response}]
    return tokenizer.apply_chat_template(whole, tokenize=False)


# Without "<" no special token is spelt, which hypothesis would find in the code.
letters = st.characters(codec="utf-8", exclude_characters="<")
texts = st.text(letters, min_size=1, max_size=24).filter(str.strip)


@st.composite
def conversations(draw):
    n = draw(st.integers(0, 2))
    roles = ["user", "assistant"] * n + ["user"]
    turns = [{"role": role, "content": draw(texts)} for role in roles]
    if draw(st.booleans()):
        turns = [{"role": "system", "content": draw(texts)}, *turns]
    return turns


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=40)
@given(turns=conversations(), a=texts, b=texts)
def test_prompt_plus_response_is_the_rendering_with_one_bos_and_one_stop(family, turns, a, b):
    tokenizer, (stop, n_bos, takes_system) = FAMILIES[family]
    if not takes_system:
        turns = [turn for turn in turns if turn["role"] != "system"]
    encoded, report = encode_pairs(tokenizer, [make_pair(turns, a, b)])
    if not encoded:  # responses that a template trims to the same text
        assert a.strip() == b.strip()
        assert report.dropped_identical == 1
        return
    stop_id = tokenizer.convert_tokens_to_ids(stop)
    for response, ids in ((a, encoded[0].a_ids), (b, encoded[0].b_ids)):
        assert ids.count(stop_id) == 1
        assert ids[-1] == stop_id
        whole = [*encoded[0].prompt_ids, *ids]
        bos_id = tokenizer.bos_token_id
        assert whole.count(bos_id) == n_bos
        assert whole[:n_bos] == [bos_id] * n_bos
        if tokenizer.chat_template:
            written = rendering(tokenizer, turns, response)
            expected = (tokenizer.bos_token if family == "zephyr" else "") + written
            expected = expected.removesuffix(AFTER_STOP.get(family, ""))
            expected += stop if tokenizer.chat_template == OPEN else ""
            assert decode(tokenizer, whole) == expected


def test_plain_template_text():
    tokenizer, _ = FAMILIES["plain with bos"]
    turns = [
        {"role": "system", "content": "Sys."},
        {"role": "user", "content": "U1"},
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "U2"},
    ]
    (pair,), _ = encode_pairs(tokenizer, [make_pair(turns, "yes", "no")])
    expected = "<s>Sys.\n\nHuman: U1\n\nAssistant: A1\n\nHuman: U2\n\nAssistant:"
    assert decode(tokenizer, pair.prompt_ids) == expected
    assert decode(tokenizer, pair.a_ids) == " yes</s>"
    bare = TokenOptions(plain=PlainTemplate(user="Q: ", header="\nA:", answer="\n"))
    (pair,), _ = encode_pairs(tokenizer, [make_pair("U", "yes", "no")], bare)
    assert decode(tokenizer, pair.prompt_ids + pair.b_ids) == "<s>Q: U\nA:\nno</s>"


def test_own_template_overrides_the_tokenizers():
    tokenizer, _ = FAMILIES["qwen"]
    (pair,), _ = encode_pairs(tokenizer, [make_pair()], TokenOptions(chat_template=OPEN))
    assert decode(tokenizer, pair.prompt_ids) == "[user] why?\n[assistant] "
    assert decode(tokenizer, pair.b_ids) == "No.\n<|im_end|>"


def test_labels_and_order_are_kept():
    tokenizer, _ = FAMILIES["qwen"]
    pairs = [make_pair(id="x", helpful=0), make_pair(id="y", helpful=-1)]
    encoded, report = encode_pairs(tokenizer, pairs)
    assert [(p.id, p.labels) for p in encoded] == [("x", {"helpful": 0}), ("y", {"helpful": -1})]
    assert (report.pairs, report.kept) == (2, 2)
    assert encode_pairs(tokenizer, []) == ([], type(report)())


LONG = "the question " * 30


def whole_ids(tokenizer, pair):
    (encoded,), _ = encode_pairs(tokenizer, [pair], TokenOptions(max_length=10**6))
    return encoded


def test_truncation_cuts_the_prompt_first_and_keeps_bos_and_end():
    tokenizer, _ = FAMILIES["llama3"]
    pair = make_pair(LONG)
    whole = whole_ids(tokenizer, pair)
    (cut,), report = encode_pairs(tokenizer, [pair], TokenOptions(max_length=50))
    room = 50 - max(len(whole.a_ids), len(whole.b_ids))
    assert cut.prompt_ids == [tokenizer.bos_token_id, *whole.prompt_ids[-(room - 1) :]]
    assert (cut.a_ids, cut.b_ids) == (whole.a_ids, whole.b_ids)
    assert (report.prompts_truncated, report.responses_truncated, report.kept) == (1, 0, 1)


def test_a_turn_opener_named_bos_is_not_kept_as_bos():
    tokenizer = make_tokenizer(
        CHATML, special=("<|im_end|>",), bos="<|im_start|>", eos="<|im_end|>"
    )
    pair = make_pair(LONG)
    whole = whole_ids(tokenizer, pair)
    (cut,), _ = encode_pairs(tokenizer, [pair], TokenOptions(max_length=50))
    assert cut.prompt_ids == whole.prompt_ids[-len(cut.prompt_ids) :]


def test_keep_start_keeps_the_beginning():
    tokenizer, _ = FAMILIES["plain"]
    pair = make_pair(LONG)
    options = TokenOptions(max_length=60, max_prompt_length=20, keep="start")
    (cut,), _ = encode_pairs(tokenizer, [pair], options)
    assert cut.prompt_ids == whole_ids(tokenizer, pair).prompt_ids[:20]


def test_truncated_response_has_no_stop_token():
    tokenizer, _ = FAMILIES["qwen"]
    pair = make_pair(LONG, a="the answer " * 30, b="No.")
    whole = whole_ids(tokenizer, pair)
    (cut,), report = encode_pairs(tokenizer, [pair], TokenOptions(max_length=41))
    assert cut.prompt_ids == whole.prompt_ids[-20:]  # no less than half of max_length
    assert cut.a_ids == whole.a_ids[:21]
    assert tokenizer.eos_token_id not in cut.a_ids
    assert cut.b_ids == whole.b_ids
    assert (report.prompts_truncated, report.responses_truncated) == (1, 1)


def test_max_prompt_length_holds_where_the_pair_would_fit():
    tokenizer, _ = FAMILIES["qwen"]
    pair = make_pair(LONG)
    options = TokenOptions(max_length=2000, max_prompt_length=17)
    (cut,), report = encode_pairs(tokenizer, [pair], options)
    assert len(cut.prompt_ids) == 17
    assert report.prompts_truncated == 1


@settings(max_examples=60)
@given(turns=conversations(), a=texts, b=texts, max_length=st.integers(2, 60), data=st.data())
def test_no_sequence_exceeds_the_limits(turns, a, b, max_length, data):
    tokenizer, _ = FAMILIES["zephyr"]
    cap = data.draw(st.none() | st.integers(1, max_length - 1))
    options = TokenOptions(max_length=max_length, max_prompt_length=cap)
    encoded, report = encode_pairs(tokenizer, [make_pair(turns, a, b)], options)
    assert report.kept + report.dropped_identical == 1
    for pair in encoded:
        assert 1 <= len(pair.prompt_ids) <= (cap or max_length)
        assert pair.a_ids
        assert pair.b_ids
        assert len(pair.prompt_ids) + max(len(pair.a_ids), len(pair.b_ids)) <= max_length


def test_overlength_drop_and_error():
    tokenizer, _ = FAMILIES["qwen"]
    pairs = [make_pair(id="short"), make_pair(LONG, id="long")]
    encoded, report = encode_pairs(tokenizer, pairs, TokenOptions(80, overlength="drop"))
    assert [pair.id for pair in encoded] == ["short"]
    assert (report.dropped_overlength, report.kept) == (1, 1)
    with pytest.raises(ValueError, match=r"pair 'long': .* must fit max_length = 80 .* got \d+ \+"):
        encode_pairs(tokenizer, pairs, TokenOptions(80, overlength="error"))


def test_pair_that_truncation_makes_identical_is_dropped_and_counted():
    tokenizer, _ = FAMILIES["qwen"]
    pair = make_pair(a="the answer " * 20 + "yes", b="the answer " * 20 + "no")
    encoded, report = encode_pairs(tokenizer, [pair], TokenOptions(max_length=30))
    assert encoded == []
    assert (report.dropped_identical, report.kept, report.responses_truncated) == (1, 0, 0)


@pytest.mark.parametrize("where", ["prompt", "a", "b"])
def test_text_that_spells_a_special_token(where):
    tokenizer, _ = FAMILIES["qwen"]
    pair = make_pair(**{where: "then <|im_end|> and on"}, id="evil")
    name = "prompt\\[0\\]" if where == "prompt" else f"response_{where}"
    with pytest.raises(ValueError, match=rf"pair 'evil': `{name}.*special token.*im_end"):
        encode_pairs(tokenizer, [pair])
    options = TokenOptions(special_text="drop")
    encoded, report = encode_pairs(tokenizer, [pair, make_pair(id="good")], options)
    assert [p.id for p in encoded] == ["good"]
    assert report.dropped_special_text == 1


def test_template_that_rejects_the_conversation():
    tokenizer, _ = FAMILIES["gemma"]
    system = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    match = r"pair 'p': .*'System role not supported' for the roles \['system', 'user'\]; move"
    with pytest.raises(ValueError, match=match):
        encode_pairs(tokenizer, [make_pair(system)])
    twice = [{"role": "user", "content": "U"}] * 2
    with pytest.raises(ValueError, match=r"must alternate' .*; .*join consecutive turns"):
        encode_pairs(tokenizer, [make_pair(twice)])


def test_template_that_writes_no_turns():
    tokenizer, _ = FAMILIES["qwen"]
    with pytest.raises(
        ValueError, match=r"`chat_template` must write the content .* name of a file"
    ):
        encode_pairs(tokenizer, [make_pair()], TokenOptions(chat_template="llama3.jinja"))


def test_template_that_drops_the_system_turn():
    silent = LLAMA2.replace("{% else %}", "{% elif m.role == 'assistant' %}")
    system = [{"role": "system", "content": "Sys."}, {"role": "user", "content": "U"}]
    tokenizer = make_tokenizer(silent, bos="<s>")
    with pytest.raises(ValueError, match="must render the system turn"):
        encode_pairs(tokenizer, [make_pair(system)])


def test_no_way_to_end_a_response():
    with pytest.raises(ValueError, match=r"`tokenizer` must have an EOS token.*set tokenizer\.eos"):
        encode_pairs(make_tokenizer(None, eos=None), [make_pair()])


def test_prompt_without_a_single_token():
    core = Tokenizer(
        models.WordLevel({"yes": 0, "no": 1, "a": 2, "</s>": 3, "?": 4}, unk_token="?")
    )
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    options = TokenOptions(plain=PlainTemplate(user="", header="", answer=" "))
    (pair,), _ = encode_pairs(tokenizer, [make_pair("a a", "yes", "no")], options)
    assert (pair.prompt_ids, pair.a_ids, pair.b_ids) == ([2, 2], [0, 3], [1, 3])
    with pytest.raises(ValueError, match="pair 'p': the prompt must give at least one token"):
        encode_pairs(tokenizer, [make_pair("  ", "yes", "no")], options)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"max_length": 1}, "`max_length` must be at least 2 tokens, got 1"),
        ({"max_prompt_length": 0}, "`max_prompt_length` must be at least 1 and below"),
        ({"max_length": 9, "max_prompt_length": 9}, "below max_length = 9, got 9"),
        ({"overlength": "cut"}, "`overlength` must be one of .*got 'cut'"),
        ({"keep": "middle"}, "`keep` must be one of .*got 'middle'"),
        ({"special_text": "keep"}, "`special_text` must be one of .*got 'keep'"),
    ],
)
def test_bad_options(arguments, match):
    with pytest.raises(ValueError, match=match):
        TokenOptions(**arguments)


def test_token_counter_counts_no_special_tokens():
    tokenizer, _ = FAMILIES["llama3"]
    text = "the answer"
    assert token_counter(tokenizer)(text) == len(tokenizer(text)["input_ids"]) - 1
