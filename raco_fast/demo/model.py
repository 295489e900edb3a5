"""The demo's language model: a word-level tokenizer, a small Llama, its warm-up and its writing.

A sequence is `<bos> document <sep> summary <eos>`. The warm-up is plain supervised training on
summaries of mixed quality, so the model it leaves behind can summarise and has much to improve.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from raco_fast.demo.documents import FILLERS, VALUES, Document, make_document, make_summary
from raco_fast.dpo.logps import sequence_logps

PAD, BOS, SEP, EOS = range(4)
_SPECIAL_TOKENS = ("<pad>", "<bos>", "<sep>", "<eos>", "<unk>")


class Batch(NamedTuple):
    """Right-padded sequences: token ids, attention mask, completion mask; each int64 [B, T]."""

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor


def build_tokenizer() -> Tokenizer:
    """The word-level tokenizer over every word that documents and summaries can hold."""
    words = {"the", "is", *VALUES}.union(*VALUES.values(), *(text.split() for text in FILLERS))
    vocabulary = {word: i for i, word in enumerate((*_SPECIAL_TOKENS, *sorted(words)))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer


def build_model(vocab_size: int, hidden_size: int, layers: int, seed: int) -> LlamaForCausalLM:
    """A fresh Llama with tied embeddings in float32; the same seed gives the same weights."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=hidden_size**-0.5,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        # Copying a word needs embeddings that are far apart; at the usual 0.02 the model takes
        # several times as long to learn it.
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.25)
    return model.float()


def encode_prompt(tokenizer: Tokenizer, document: Document) -> list[int]:
    """Token ids of `<bos> document <sep>`."""
    return [BOS, *tokenizer.encode(document.text).ids, SEP]


def encode_summary(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of `summary <eos>`."""
    return [*tokenizer.encode(text).ids, EOS]


def collate(prompts: Sequence[list[int]], summaries: Sequence[list[int]]) -> Batch:
    """Join prompts and summaries row by row and pad them on the right to the longest."""
    rows = [prompt + summary for prompt, summary in zip(prompts, summaries, strict=True)]
    input_ids = torch.full((len(rows), max(map(len, rows))), PAD)
    attention_mask, completion_mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        input_ids[i, : len(row)] = torch.tensor(row)
        attention_mask[i, : len(row)] = 1
        completion_mask[i, len(prompt) : len(row)] = 1
    return Batch(input_ids, attention_mask, completion_mask)


def batches_by_length(
    lengths: Sequence[int], batch_size: int, rng: random.Random
) -> list[list[int]]:
    """Indices of all rows in batches of similar length: about a quarter less padding to compute.

    Rows are sorted by length within groups of eight batches, and the batches of a group are
    shuffled; the last batch may be short.
    """
    batches = []
    for start in range(0, len(lengths), 8 * batch_size):
        group = sorted(
            range(start, min(start + 8 * batch_size, len(lengths))), key=lengths.__getitem__
        )
        shuffled = [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
        rng.shuffle(shuffled)
        batches += shuffled
    return batches


def warm_up(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    rng: random.Random,
) -> list[float]:
    """Teach the model to summarise: supervised steps on fresh documents, mixed-quality summaries.

    Returns the mean loss per summary token (nats) of each step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20, (steps - step) / (0.4 * steps))
    )
    documents = [make_document(rng) for _ in range(steps * batch_size)]
    prompts = [encode_prompt(tokenizer, document) for document in documents]
    summaries = [encode_summary(tokenizer, make_summary(document, rng)) for document in documents]
    lengths = [len(p) + len(s) for p, s in zip(prompts, summaries, strict=True)]
    losses = []
    for rows in batches_by_length(lengths, batch_size, rng):
        batch = collate([prompts[i] for i in rows], [summaries[i] for i in rows])
        loss = -sequence_logps(model, *batch).sum() / batch.completion_mask.sum()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def generate(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    *,
    max_tokens: int,
    seed: int,
) -> list[str]:
    """Sample one summary of each document at temperature 1, all in one batch.

    Prompts are padded on the left, so that all rows write their next token in the same column. The
    random numbers depend on the seed and the place in the batch only: two models asked about the
    same documents get the same ones, so their difference is not in the luck of the draw.
    """
    prompts = [encode_prompt(tokenizer, document) for document in documents]
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    attention_mask = (ids != PAD).long()
    generator = torch.Generator().manual_seed(seed)
    cache = DynamicCache(config=model.config)
    written = torch.empty(len(prompts), 0, dtype=torch.long)
    running = torch.ones(len(prompts), dtype=torch.bool)
    for _ in range(max_tokens):
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        logits = model(
            input_ids=ids,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
        ).logits[:, -1]
        noise = torch.rand(logits.shape, generator=generator).clamp_(min=1e-20)
        token = (logits - noise.log().neg().log()).argmax(-1)  # Gumbel: a sample of softmax(logits)
        token = torch.where(running, token, PAD)
        running &= token != EOS
        if not running.any():
            break
        written = torch.cat([written, token[:, None]], dim=1)
        ids = token[:, None]
        attention_mask = torch.cat([attention_mask, torch.ones_like(ids)], dim=1)
    return [_decode(tokenizer, row) for row in written.tolist()]


def _decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The words before the end of the summary; special tokens among them stay visible as words."""
    written = ids[: ids.index(EOS)] if EOS in ids else ids
    return tokenizer.decode(written, skip_special_tokens=False)
