"""Token ids of texts that begin alike, such as a prompt and two conversations that go on from it.

What they begin with need not be tokenized for each of them. A tokenizer of the library `tokenizers`
first cuts a text at its added tokens; each piece between two of them is then normalized, split and
merged by itself. So the ids of a text are those of what stands before such a token, followed by
those of the rest. Chat templates write one or two of these tokens for every turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from raco_fast.dpo.data.ends import token_ids

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerBase

Row = TypeVar("Row", str, list[int])


def shared_length(*rows: Row) -> int:
    """How many elements rows of texts, or of numbers, begin with in common."""
    first, last = min(rows), max(rows)  # what these two have in common, those between them have
    pairs = enumerate(zip(first, last, strict=False))
    return next((k for k, (x, y) in pairs if x != y), len(first))


class SharedBeginnings:
    """Tokenizes groups of texts, what a group has in common once; for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._cuts: list[str] = []
        if _cuts_at_added_tokens(tokenizer):
            self._cuts = where_texts_are_cut(tokenizer.added_tokens_decoder.values())

    def ids(self, groups: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """Token ids of each text of each group, as `token_ids` gives them."""
        # Of some thousand added tokens a template writes a few, the same ones for every group.
        cuts = [token for token in self._cuts if groups and token in groups[0][0]]
        lengths = [_length(texts, cuts) for texts in groups]
        heads = [texts[0][:n] for texts, n in zip(groups, lengths, strict=True)]
        different = list(dict.fromkeys(head for head in heads if head))  # pairs may share a prompt
        rest = [text[n:] for texts, n in zip(groups, lengths, strict=True) for text in texts]
        found = token_ids(self._tokenizer, different + rest)
        of_head = {"": [], **dict(zip(different, found, strict=False))}
        tails = iter(found[len(different) :])
        return [
            [of_head[head] + next(tails) for _ in texts]
            for texts, head in zip(groups, heads, strict=True)
        ]


def _length(texts: Sequence[str], cuts: Sequence[str]) -> int:
    """Where the last of the tokens begins in what the texts begin with; 0 without one."""
    shared = texts[0]
    if not all(text.startswith(shared) for text in texts):
        shared = shared[: shared_length(*texts)]
    return max([0, *(shared.rfind(token) for token in cuts)])


def where_texts_are_cut(added: Iterable[AddedToken]) -> list[str]:
    """The added tokens in front of which any text that has them is cut.

    Not those that are looked for in the normalized text, that take white space in front of them
    along, or of which the beginning may be the end of another one.
    """
    tokens = [token for token in added if token.content and not token.normalized]
    if any(token.single_word for token in tokens):  # found or not by what stands next to it
        return []
    beginning_with: dict[str, list[str]] = {}
    for token in tokens:
        beginning_with.setdefault(token.content[0], []).append(token.content)
    covered = {
        token
        for other in tokens
        for k in range(0 if other.lstrip else 1, len(other.content))
        for token in beginning_with.get(other.content[k], [])
        if token.startswith(other.content[k:]) or other.content[k:].startswith(token)
    }
    contents = [token.content for token in tokens]
    return [c for c in contents if c not in covered and not c[0].isspace()]


def _cuts_at_added_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether texts go to the library `tokenizers` as they are, special tokens recognized."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    kind = type(tokenizer)
    as_they_are = (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind.__call__ is PreTrainedTokenizerBase.__call__
        and kind._encode_plus is PreTrainedTokenizerFast._encode_plus
    )
    return as_they_are and not tokenizer.split_special_tokens
