"""Preference pairs as token ids: the tokens of the whole conversation, one BOS, one EOS, lengths.

The conversation is rendered and tokenized once with each response (`raco_fast.dpo.data.rendering`
makes the texts), so that the tokens are those which the model reads when it is used. A response
tokenized by itself has other ones where the tokenizer begins a text with a space (SentencePiece),
or merges across the boundary.

- Boundary: the longest common prefix of both conversations and of the prompt with its generation
  header, in tokens, is the prompt of both responses; the rest is theirs. A token that holds the end
  of the prompt and the beginning of an answer thus belongs to the response.
- End: a response ends with exactly one stop token, the one with which the chat template closes an
  answer (`<|im_end|>`, `<|eot_id|>`, `<end_of_turn>`, `</s>` ...); what the template writes after
  it (a newline, a second EOS) is left out. Where the template closes with no special token, and
  where there is no template, it is the tokenizer's EOS. A truncated response has no stop token:
  the model must not learn to stop in the middle of a sentence.
- Begin: exactly one BOS if the template writes one or the tokenizer puts one before plain text;
  none otherwise.
- A text that contains a special token's spelling would be read as that token and break both
  rules; such pairs are an error, or dropped (`special_text`).
- Without a chat template, `PlainTemplate` is used: "\\n\\nHuman: ...\\n\\nAssistant: ...".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from tqdm import tqdm

from raco_fast.dpo.data.encode_report import EncodeReport
from raco_fast.dpo.data.ends import token_ids
from raco_fast.dpo.data.pairs import PreferencePair
from raco_fast.dpo.data.rendering import TokenOptions, Writer
from raco_fast.dpo.data.shared_beginnings import shared_length
from raco_fast.dpo.data.worker_processes import mapped

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_AT_ONCE = 256  # pairs: the prompt of each is held three times meanwhile


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of a pair.

    Attributes:
        id: the pair's id.
        prompt_ids: ends where the responses begin; shared by both.
        a_ids: response a; ends with its one stop token unless it was truncated.
        b_ids: response b, likewise.
        labels, pair_weights: as `PreferencePair.preferences` and `pair_weights`.
    """

    id: str
    prompt_ids: list[int]
    a_ids: list[int]
    b_ids: list[int]
    labels: dict[str, float]
    pair_weights: dict[str, float] = field(default_factory=dict)


def token_counter(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], int]:
    """A function text -> number of tokens, without special tokens (for `ConciseRule`)."""
    return lambda text: len(token_ids(tokenizer, [text])[0])


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    options: TokenOptions | None = None,
    *,
    workers: int = 0,
    progress: bool = False,
) -> tuple[list[EncodedPair], EncodeReport]:
    """Tokenize pairs; the rules are at the head of this file.

    Args:
        tokenizer: any Hugging Face tokenizer, with or without a chat template.
        pairs: as read by `read_sources`.
        options: lengths and policies.
        workers: processes that do it; 0 does it in this one. The result is the same.
        progress: show a progress bar if it takes more than a second.
    Returns:
        The encoded pairs, in order, and the counts of what was dropped or truncated.
    Raises:
        ValueError: the chat template rejects a conversation, ignores the system turn or the whole
            of an answer, or renders an answer that does not continue its prompt; no EOS to end a
            response with; a special token in a text; a pair too long with `overlength="error"`.
            Names the pair.
        ChildProcessError: a worker was killed, or ended with an error of its own.
    """
    writer = Writer(tokenizer, options or TokenOptions())
    groups = [pairs[i : i + _AT_ONCE] for i in range(0, len(pairs), _AT_ONCE)]
    encode = partial(_encode_group, writer=writer)
    encoded: list[EncodedPair] = []
    reports = []
    bar = tqdm(total=len(pairs), desc="tokenize", unit="pair", disable=not progress, delay=1.0)
    with bar, closing(mapped(encode, groups, min(workers, len(groups)))) as found:
        # A list takes 8 bytes a number, and 28 more where each is an object of its own.
        known: dict[int, int] = {}
        for of_group, report in found:
            for pair in of_group:
                for ids in (pair.prompt_ids, pair.a_ids, pair.b_ids):
                    ids[:] = map(known.setdefault, ids, ids)
            encoded += of_group
            reports.append(report)
            bar.update(report.pairs)
    return encoded, EncodeReport.total(reports)


def _encode_group(
    pairs: Sequence[PreferencePair], writer: Writer
) -> tuple[list[EncodedPair], EncodeReport]:
    """`encode_pairs` of a few; what the writer has counted is of them alone."""
    writer.forget_counts()
    clean = [pair for pair in pairs if writer.is_clean(pair)]
    counts = writer.counts
    encoded = []
    for whole in encode_whole(clean, writer):
        fitted = _fit(whole, writer.options, writer.ends.bos_id)
        if fitted is None:
            counts["dropped_overlength"] += 1
        elif fitted.a_ids == fitted.b_ids:
            counts["dropped_identical"] += 1
        else:
            encoded.append(fitted)
            counts["prompts_truncated"] += fitted.prompt_ids != whole.prompt_ids
            counts["responses_truncated"] += fitted.a_ids != whole.a_ids
            counts["responses_truncated"] += fitted.b_ids != whole.b_ids
    report = EncodeReport(
        len(pairs),
        len(encoded),
        dropped_special_text=len(pairs) - len(clean),
        not_rendered=dict(writer.not_rendered),
        prints_date=writer.prints_date,
        **counts,
    )
    return encoded, report


def encode_whole(pairs: Sequence[PreferencePair], writer: Writer) -> list[EncodedPair]:
    """Pairs as ids, of any length."""
    ids = writer.beginnings.ids([writer.render(pair) for pair in pairs])
    return [
        _split(pair, prompt, a, b, writer) for pair, (prompt, a, b) in zip(pairs, ids, strict=True)
    ]


def _split(
    pair: PreferencePair, prompt: list[int], a: list[int], b: list[int], writer: Writer
) -> EncodedPair:
    """The pair of the prompt's tokens, header included, and those of both whole conversations."""
    n = len(prompt)
    if not a[:n] == prompt == b[:n]:
        n = shared_length(prompt, a, b)
        writer.counts["boundaries_moved"] += 1
    return EncodedPair(
        pair.id,
        writer.ends.begun(pair.id, prompt[:n]),
        writer.ends.ended(a[n:]),
        writer.ends.ended(b[n:]),
        dict(pair.preferences),
        dict(pair.pair_weights),
    )


def _fit(pair: EncodedPair, options: TokenOptions, bos_id: int | None) -> EncodedPair | None:
    """The pair within the limits, or None where it is to be dropped."""
    prompt, longest = pair.prompt_ids, max(len(pair.a_ids), len(pair.b_ids))
    cap = options.max_prompt_length or options.max_length
    if len(prompt) <= cap and len(prompt) + longest <= options.max_length:
        return pair
    if options.overlength == "drop":
        return None
    if options.overlength == "error":
        raise ValueError(
            f"pair {pair.id!r}: prompt and response must fit max_length = {options.max_length} and "
            f"max_prompt_length = {options.max_prompt_length}, got {len(prompt)} + {longest} "
            "tokens; raise the limits, or set overlength to 'truncate' or 'drop'"
        )
    floor = options.max_prompt_length or max(options.max_length // 2, 1)
    room = min(cap, max(options.max_length - longest, floor))
    if len(prompt) > room:
        begins = bos_id is not None and prompt[0] == bos_id and prompt.count(bos_id) == 1
        head = prompt[:1] if begins and options.keep == "end" else []
        tail = room - len(head)
        kept = prompt[:room] if options.keep == "start" else prompt[len(prompt) - tail :]
        prompt = [*head, *kept]
    left = options.max_length - len(prompt)
    return replace(pair, prompt_ids=prompt, a_ids=pair.a_ids[:left], b_ids=pair.b_ids[:left])
