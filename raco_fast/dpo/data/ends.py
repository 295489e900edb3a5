"""How a sequence begins and ends: its one BOS and its one stop token."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without added special tokens."""
    if not texts:
        return []
    batch = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return list(batch["input_ids"])


class SequenceEnds:
    """BOS and stop tokens of one tokenizer.

    Attributes:
        bos_id: the tokenizer's BOS, None where it has none.
        adds_bos: whether the tokenizer puts it before plain text.
        stop_id: the first special token after an answer, else the tokenizer's EOS.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, closing: str) -> None:
        """`closing`: what follows the text of an answer, empty without a chat template.

        Raises:
            ValueError: neither closes answers.
        """
        self._tokenizer = tokenizer
        self.bos_id: int | None = tokenizer.bos_token_id
        with_bos = tokenizer("a", verbose=False)["input_ids"][:1]
        without = token_ids(tokenizer, ["a"])[0][:1]
        self.adds_bos = with_bos == [self.bos_id] != without
        added = tokenizer.added_tokens_decoder
        self._special = {id for id, token in added.items() if token.special}
        self._special |= set(tokenizer.all_special_ids)
        # What the tokenizer does not know is text, though its token counts as a special one.
        self._closes = self._special - {tokenizer.unk_token_id}
        closing_ids = token_ids(tokenizer, [closing])[0]
        stops = [id for id in closing_ids if id in added or id in self._closes]
        if not stops and tokenizer.eos_token_id is None:
            raise ValueError(
                "`tokenizer` must have an EOS token, or a chat template that closes answers with "
                "a special token, got neither; set tokenizer.eos_token"
            )
        self.stop_id = int(stops[0] if stops else tokenizer.eos_token_id)
        self._blank: dict[int, bool] = {}

    @property
    def spellings(self) -> list[str]:
        """The texts that would be read as special tokens; the stop token may be an ordinary one."""
        ids = sorted({*self._special, self.stop_id})
        return list(map(str, self._tokenizer.convert_ids_to_tokens(ids)))

    def begun(self, pair_id: str, prompt_ids: list[int]) -> list[int]:
        """The prompt with exactly one BOS, where the tokenizer puts one before plain text."""
        if not prompt_ids:
            raise ValueError(
                f"pair {pair_id!r}: the prompt must give at least one token, got none: the "
                "tokenizer has no token for its text; set tokenizer.unk_token, or `plain.header`"
            )
        if self.adds_bos and prompt_ids[:1] != [self.bos_id]:
            assert self.bos_id is not None
            return [self.bos_id, *prompt_ids]
        return prompt_ids

    def ended(self, response_ids: list[int]) -> list[int]:
        """The response up to and including its one stop token.

        Where a template closes answers in several ways (a call of a tool with `<|call|>`, a text
        with `<|return|>`), a response keeps the special token that it is closed with. One with text
        behind it (thinking may be closed like an answer) does not end the response.
        """
        text_end = len(response_ids)
        while text_end and self._says_nothing(response_ids[text_end - 1]):
            text_end -= 1
        closing = response_ids[text_end:]
        special = [id for id in closing if id in self._closes]
        stop = self.stop_id if self.stop_id in closing or not special else special[0]
        if stop in closing:
            return response_ids[: text_end + closing.index(stop) + 1]
        return [*response_ids, stop]

    def _says_nothing(self, id: int) -> bool:
        """Whether a token is a special one or white space."""
        if id not in self._blank:
            blank = id == self.stop_id or id in self._closes
            self._blank[id] = blank or not self._tokenizer.decode([id]).strip()
        return self._blank[id]
