"""The demo's language model: a word-level tokenizer, a small Llama, its warm-up and its writing.

A sequence is `<bos> document <sep> summary <eos>`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from raco_fast.demo.documents import FILLERS, VALUES, Document
from raco_fast.dpo.data.collation import collate
from raco_fast.dpo.data.pairs import PreferencePair
from raco_fast.dpo.data.rendering import PlainTemplate, TokenOptions
from raco_fast.dpo.data.tokenization import EncodedPair, encode_pairs
from raco_fast.dpo.scoring import pair_logps

_SPECIAL_TOKENS = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "sep", "eos", "unk")}
PAD = 0
# The longest candidate, six facts in full sentences and two fillers, has 39 tokens with its end;
# its document 30 or less. A sampled summary may be a little longer.
MAX_TOKENS, MAX_SUMMARY_TOKENS = 96, 44
_TEMPLATE = PlainTemplate(user="<bos> ", header=" <sep>")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer over every word that documents and summaries can hold."""
    words = {"the", "is", *VALUES}.union(*VALUES.values(), *(text.split() for text in FILLERS))
    vocabulary = {word: i for i, word in enumerate((*_SPECIAL_TOKENS.values(), *sorted(words)))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_SPECIAL_TOKENS)


def build_model(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int, layers: int, seed: int
) -> LlamaForCausalLM:
    """A fresh Llama with tied embeddings in float32; the same seed gives the same weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=hidden_size**-0.5,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        # Copying a word needs embeddings that are far apart; at the usual 0.02 the model takes
        # several times as long to learn it.
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.25)
    return model.float()


def encode(
    tokenizer: PreTrainedTokenizerFast, pairs: Sequence[PreferencePair]
) -> list[EncodedPair]:
    """Token ids of pairs of summaries."""
    options = TokenOptions(max_length=MAX_TOKENS, overlength="error", plain=_TEMPLATE)
    return encode_pairs(tokenizer, pairs, options)[0]


def warm_up(
    model: LlamaForCausalLM, batches: Sequence[Sequence[EncodedPair]], lr: float
) -> list[float]:
    """Teach the model to summarise: supervised steps on both summaries of every pair.

    The candidates are of mixed quality, so the model it leaves behind has much to improve.

    Args:
        model: a fresh model.
        batches: the pairs of every step.
        lr: peak learning rate; it rises for 20 steps and falls over the last 40 %.
    Returns:
        Mean loss per summary token (nats) of every step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    steps, losses = len(batches), []
    schedule = LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / 20, (steps - i) / (0.4 * steps)))
    for pairs in batches:
        batch = collate(pairs, PAD)
        tokens = batch.tokens_a.sum() + batch.tokens_b.sum()
        loss = -pair_logps(model, batch, chunk_tokens=1024).sum() / tokens
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def write_summaries(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[Document],
    seed: int,
) -> list[str]:
    """Sample one summary of each document at temperature 1.

    The random numbers depend on the seed and the place among the documents only, so two models
    asked about the same documents do not differ by the luck of the draw.
    """
    turns = ([{"role": "user", "content": document.text}] for document in documents)
    prompts = tokenizer(
        [
            tokenizer.apply_chat_template(
                turn,
                chat_template=_TEMPLATE.chat_template(),
                tokenize=False,
                add_generation_prompt=True,
            )
            for turn in turns
        ],
        padding=True,
        padding_side="left",  # all rows write their next token in the same column
        return_tensors="pt",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ids = model.generate(
            input_ids=prompts["input_ids"],
            attention_mask=prompts["attention_mask"],
            do_sample=True,
            top_k=0,
            max_new_tokens=MAX_SUMMARY_TOKENS,
        )
    # Special tokens within a summary stay visible as words.
    texts = tokenizer.batch_decode(ids[:, prompts["input_ids"].shape[1] :])
    return [text.partition("<eos>")[0].strip() for text in texts]
