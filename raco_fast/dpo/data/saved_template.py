"""The chat template that the tokenizer of a trained model is saved with.

Whoever uses the model calls `apply_chat_template` of that tokenizer: it has to write conversations
as they were trained.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from raco_fast.dpo.data.ends import token_ids
from raco_fast.dpo.data.pairs import PreferencePair
from raco_fast.dpo.data.rendering import TokenOptions, Writer
from raco_fast.dpo.data.tokenization import encode_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
_TURNS = [
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
    {"role": "user", "content": "Is it?"},
]


def saved_template(
    tokenizer: PreTrainedTokenizerBase, options: TokenOptions
) -> str | dict[str, str]:
    """The chat template in use, the tokenizer's own or another; the plain template as one.

    The plain template has a BOS where the tokenizer begins plain text with one, and an EOS after
    the answer. Some tokenizers begin a text with a space that they leave out behind a BOS; what
    gives the trained tokens is found by trying.

    Args:
        tokenizer, options: as `encode_pairs` had them.
    """
    known = tokenizer.chat_template
    if options.chat_template is not None:
        named = known if isinstance(known, dict) else {}
        return str(named.get(options.chat_template, options.chat_template))
    if known:
        return known  # type: ignore[no-any-return]
    pair = PreferencePair("(probe)", _TURNS, "Yes.", "No.", {})
    writer = Writer(tokenizer, options)
    (trained,) = encode_whole([pair], writer)
    begins = ["{{ bos_token }}", "{{ bos_token + ' ' }}"]
    begins = begins if writer.ends.adds_bos else [""]
    templates = [options.plain.chat_template(begin, "{{ eos_token }}") for begin in begins]
    turns = [*_TURNS, {"role": "assistant", "content": pair.response_a}]
    for template in templates:
        text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
        if token_ids(tokenizer, [str(text)]) == [trained.prompt_ids + trained.a_ids]:
            return template
    logger.warning(
        "the plain template is saved with the model as a chat template, but this tokenizer makes "
        "other tokens of it at the beginning or the end than those trained (%d); set "
        "`tokens.chat_template` instead of `tokens.plain`",
        len(trained.prompt_ids + trained.a_ids),
    )
    return templates[0]
