"""Tiny tokenizers of every kind that language models have, with the special tokens of several."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>"]
SPECIAL += ["<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|end|>"]
STOPS = range(1, len(SPECIAL))  # their ids; 0 is <unk>, which is text
CORPUS = ["Sure, tea is a drink.", "No.\nBread is not", "[INST] name a drink [/INST]Tea", "a. b. a"]
CORPUS += [
    "<|user|>\n",
    "<|assistant|>\nYes",
    "Human: why\n\nAssistant: yes",
    "<think>\n</think>\n",
]


def bytes_bpe(**_):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return core, trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )


def metaspace_bpe(scheme, split):
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme, split=split)
    known = [*SPECIAL, *(f"<0x{k:02X}>" for k in range(256))]
    return core, trainers.BpeTrainer(vocab_size=460, special_tokens=known, show_progress=False)


def unigram(scheme, split):
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme, split=split)
    return core, trainers.UnigramTrainer(
        vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )


def word_piece(**_):
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return core, trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=SPECIAL, show_progress=False
    )


def make_tokenizer(kind, scheme=None, split=None):
    core, trainer = kind(scheme=scheme, split=split)
    core.train_from_iterator(CORPUS * 8, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[3:],
    )


TOKENIZERS = {
    "bytes": make_tokenizer(bytes_bpe),
    "metaspace first, whole": make_tokenizer(metaspace_bpe, "first", False),  # Mistral
    "metaspace always, whole": make_tokenizer(metaspace_bpe, "always", False),
    "metaspace always, split": make_tokenizer(metaspace_bpe, "always", True),  # Llama 2
    "metaspace never, whole": make_tokenizer(metaspace_bpe, "never", False),  # Gemma
    "metaspace never, split": make_tokenizer(metaspace_bpe, "never", True),
    "unigram first, whole": make_tokenizer(unigram, "first", False),
    "unigram always, split": make_tokenizer(unigram, "always", True),
    "word pieces": make_tokenizer(word_piece),
}


def with_template(kind, template):
    tokenizer = TOKENIZERS[kind]
    tokenizer.chat_template = template
    return tokenizer
