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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from raco_fast.dpo.data.ends import token_ids
from raco_fast.dpo.data.pairs import PreferencePair
from raco_fast.dpo.data.rendering import TokenOptions, Writer, shared_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_AT_ONCE = 2048


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


@dataclass(frozen=True)
class EncodeReport:
    """What `encode_pairs` did, in numbers of pairs (responses for `responses_truncated`).

    Attributes:
        pairs: given.
        kept: returned.
        dropped_overlength: too long, with `overlength="drop"`.
        dropped_special_text: spelled a special token, with `special_text="drop"`.
        dropped_identical: both responses became the same tokens (by truncation, most likely).
        prompts_truncated: among the kept.
        responses_truncated: among the kept; up to two a pair.
        boundaries_moved: with a response behind them the prompt's last tokens are other ones.
        header_differs: the template opens an answer for the model otherwise than it writes answers.
        openings_trained: before an answer's text the template writes what its header does not have.
        responses_rewritten: the template changed the text; up to two a pair.
        not_rendered: what pairs hold besides their texts and the template does not write -> pairs.
        prints_date: whether the template writes the date (`TokenOptions.date`) into a pair.
    """

    pairs: int = 0
    kept: int = 0
    dropped_overlength: int = 0
    dropped_special_text: int = 0
    dropped_identical: int = 0
    prompts_truncated: int = 0
    responses_truncated: int = 0
    boundaries_moved: int = 0
    header_differs: int = 0
    openings_trained: int = 0
    responses_rewritten: int = 0
    not_rendered: dict[str, int] = field(default_factory=dict)
    prints_date: bool = False

    def warnings(self) -> list[str]:
        """A sentence for all of one kind that is not lost or trained as one would expect."""
        said = []
        if self.not_rendered:
            what = ", ".join(f"{name} of {n} pairs" for name, n in self.not_rendered.items())
            said.append(
                f"the chat template does not write all that pairs hold, so it is not trained: "
                f"{what}; set `tokens.chat_template` to one that does, or remove it from the data"
            )
        if self.responses_rewritten:
            said.append(
                f"the chat template changed the text of {self.responses_rewritten} responses (it "
                "may take thinking out of them); what it wrote is trained"
            )
        if self.header_differs:
            said.append(
                f"the chat template opens an answer for the model otherwise than it writes the "
                f"answers of {self.header_differs} pairs (thinking, most likely); they are trained "
                "as written, so the model is not trained on what it will continue. Set "
                "`tokens.chat_template` to one whose header is what answers begin with"
            )
        if self.openings_trained:
            said.append(
                f"the chat template begins the answers of {self.openings_trained} pairs with text "
                "that its generation header does not have; it is trained as a part of the "
                "responses, as the model has to write it"
            )
        return said


def token_counter(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], int]:
    """A function text -> number of tokens, without special tokens (for `ConciseRule`)."""
    return lambda text: len(token_ids(tokenizer, [text])[0])


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    options: TokenOptions | None = None,
) -> tuple[list[EncodedPair], EncodeReport]:
    """Tokenize pairs; the rules are at the head of this file.

    Args:
        tokenizer: any Hugging Face tokenizer, with or without a chat template.
        pairs: as read by `read_sources`.
        options: lengths and policies.
    Returns:
        The encoded pairs, in order, and the counts of what was dropped or truncated.
    Raises:
        ValueError: the chat template rejects a conversation, ignores the system turn or the whole
            of an answer, or renders an answer that does not continue its prompt; no EOS to end a
            response with; a special token in a text; a pair too long with `overlength="error"`.
            Names the pair.
    """
    options = options or TokenOptions()
    writer = Writer(tokenizer, options)
    clean = [pair for pair in pairs if writer.is_clean(pair)]
    counts = writer.counts
    encoded = []
    for whole in encode_whole(clean, writer):
        fitted = _fit(whole, options, writer.ends.bos_id)
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


def encode_whole(pairs: Sequence[PreferencePair], writer: Writer) -> Iterator[EncodedPair]:
    """Pairs as ids, of any length. In groups, as every prompt is held three times meanwhile."""
    for group in (pairs[i : i + _AT_ONCE] for i in range(0, len(pairs), _AT_ONCE)):
        texts = [text for pair in group for text in writer.render(pair)]
        ids = token_ids(writer.tokenizer, texts)
        for k, pair in enumerate(group):
            yield _split(pair, ids[3 * k], ids[3 * k + 1], ids[3 * k + 2], writer)


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
