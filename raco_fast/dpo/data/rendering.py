"""A preference pair as text: chat template or plain template, BOS and the stop token.

The conversation is rendered twice: the prompt with the answer's header, and the prompt with the
answer. The second must continue the first; what it adds is the response.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from jinja2 import TemplateError

from raco_fast.dpo.data.choices import check_choices
from raco_fast.dpo.data.pairs import PreferencePair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "Probe"


@dataclass(frozen=True)
class PlainTemplate:
    """How a conversation is written for a tokenizer without a chat template.

    Args:
        system: before the text of a system turn.
        user: before the text of a user turn.
        assistant: before the text of an earlier assistant turn.
        header: after the prompt; opens the answer.
        answer: before the text of the answer, a part of the response.
    """

    system: str = ""
    user: str = "\n\nHuman: "
    assistant: str = "\n\nAssistant: "
    header: str = "\n\nAssistant:"
    answer: str = " "

    def prompt(self, turns: Sequence[dict[str, str]]) -> str:
        """The prompt's text, up to where the response begins."""
        before = {"system": self.system, "user": self.user, "assistant": self.assistant}
        return "".join(before[t["role"]] + t["content"] for t in turns) + self.header


@dataclass(frozen=True)
class TokenOptions:
    """How pairs become token ids.

    Args:
        max_length: longest sequence, prompt and response together, in tokens.
        max_prompt_length: longest prompt; None limits it only as far as `max_length` demands, and
            then to no less than half of it.
        overlength: what to do with a pair that is too long: truncate it (the prompt first, then
            the responses at their end), drop it, or raise an error.
        keep: the part of a truncated prompt to keep. "end" keeps a leading BOS too; "start" loses
            the answer's header, which suits plain text only.
        special_text: what to do with a pair whose text spells a special token.
        chat_template: a Jinja template to use instead of the tokenizer's own.
        plain: used where there is no chat template.
    """

    max_length: int = 1024
    max_prompt_length: int | None = None
    overlength: Literal["truncate", "drop", "error"] = "truncate"
    keep: Literal["end", "start"] = "end"
    special_text: Literal["error", "drop"] = "error"
    chat_template: str | None = None
    plain: PlainTemplate = field(default_factory=PlainTemplate)

    def __post_init__(self) -> None:
        check_choices(self)
        if self.max_length < 2:
            raise ValueError(
                f"`max_length` must be at least 2 tokens, got {self.max_length}; "
                "512 suits most preference data"
            )
        if self.max_prompt_length is not None and not 1 <= self.max_prompt_length < self.max_length:
            raise ValueError(
                f"`max_prompt_length` must be at least 1 and below max_length = {self.max_length}, "
                f"got {self.max_prompt_length}; leave room for the response"
            )


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without added special tokens."""
    if not texts:
        return []
    batch = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return list(batch["input_ids"])


class Writer:
    """Renders conversations for one tokenizer and knows its BOS and stop tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: TokenOptions) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self.template = options.chat_template or tokenizer.chat_template
        added = tokenizer.added_tokens_decoder
        self._special_ids = {*added, *tokenizer.all_special_ids}
        spelled = {token.content for token in added.values() if token.special}
        spelled |= set(tokenizer.all_special_tokens)
        self._special_text = re.compile("|".join(re.escape(s) for s in sorted(spelled)) or r"(?!)")
        self.bos_id: int | None = tokenizer.bos_token_id
        with_bos = tokenizer("a", verbose=False)["input_ids"][:1]
        without = token_ids(tokenizer, ["a"])[0][:1]
        self._adds_bos = with_bos == [self.bos_id] != without
        self.stop_id = self._find_stop_id()

    def is_clean(self, pair: PreferencePair) -> bool:
        """Whether no text of the pair spells a special token; raises where that is the policy."""
        texts = {f"prompt[{k}].content": turn["content"] for k, turn in enumerate(pair.prompt)}
        texts |= {"response_a": pair.response_a, "response_b": pair.response_b}
        for name, text in texts.items():
            found = self._special_text.search(text)
            if found and self.options.special_text == "error":
                raise ValueError(
                    f"pair {pair.id!r}: `{name}` must not spell a special token of the tokenizer, "
                    f"got {found.group()!r}; remove it from the data, or set special_text='drop' "
                    "to leave such pairs out"
                )
            if found:
                return False
        return True

    def render(self, pair: PreferencePair) -> tuple[str, str, str]:
        """Texts of the prompt and of both responses, closing included."""
        if not self.template:
            plain = self.options.plain
            prompt = plain.prompt(pair.prompt)
            return prompt, plain.answer + pair.response_a, plain.answer + pair.response_b
        prompt = self._templated(pair.id, pair.prompt, header=True)
        first = pair.prompt[0]
        if first["role"] == "system" and first["content"].strip() not in prompt:
            raise ValueError(
                f"pair {pair.id!r}: the chat template must render the system turn, got a rendering "
                "without it; move its text into the first user turn, or set `chat_template`"
            )
        a, b = (self._answer(pair, prompt, text) for text in (pair.response_a, pair.response_b))
        return prompt, a, b

    def begun(self, pair_id: str, prompt_ids: list[int]) -> list[int]:
        """The prompt with exactly one BOS, where the tokenizer puts one before plain text."""
        if not prompt_ids:
            raise ValueError(
                f"pair {pair_id!r}: the prompt must give at least one token, got none: the "
                "tokenizer has no token for its text; set tokenizer.unk_token, or `plain.header`"
            )
        if self._adds_bos and prompt_ids[:1] != [self.bos_id]:
            assert self.bos_id is not None
            return [self.bos_id, *prompt_ids]
        return prompt_ids

    def ended(self, response_ids: list[int]) -> list[int]:
        """The response up to and including its one stop token."""
        if self.stop_id in response_ids:
            return response_ids[: response_ids.index(self.stop_id) + 1]
        return [*response_ids, self.stop_id]

    def _answer(self, pair: PreferencePair, prompt: str, response: str) -> str:
        turn = {"role": "assistant", "content": response}
        full = self._templated(pair.id, [*pair.prompt, turn], header=False)
        if not full.startswith(prompt):
            raise ValueError(
                f"pair {pair.id!r}: the chat template must render prompt + answer as a "
                "continuation of the prompt with its generation header, got two different "
                "beginnings; set `chat_template` to one that writes the header as answers have it"
            )
        return full[len(prompt) :]

    def _templated(self, pair_id: str, turns: Sequence[dict[str, str]], header: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                list(turns),
                chat_template=self.options.chat_template,
                tokenize=False,
                add_generation_prompt=header,
            )
        except TemplateError as error:
            raise ValueError(
                f"pair {pair_id!r}: the chat template must accept the conversation, got "
                f"{str(error)[:120]!r} for the roles {[t['role'] for t in turns]}; move a system "
                "turn into the first user turn, join consecutive turns of one role, or set "
                "`chat_template`"
            ) from error
        return str(text)

    def _find_stop_id(self) -> int:
        """The first special token after an answer in the template, else the tokenizer's EOS."""
        if self.template:
            turns = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
            closing = self._templated("(probe)", turns, header=False).rpartition(_PROBE)[2]
            stops = [k for k in token_ids(self.tokenizer, [closing])[0] if k in self._special_ids]
            if stops:
                return stops[0]
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                "`tokenizer` must have an EOS token, or a chat template that closes answers with "
                "a special token, got neither; set tokenizer.eos_token"
            )
        return int(self.tokenizer.eos_token_id)
