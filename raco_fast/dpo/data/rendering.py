"""A preference pair as text: chat template or plain template.

The conversation is rendered three times: up to the answer, and whole with either response. What is
trained are the tokens of the whole; `raco_fast.dpo.data.tokenization` finds where the answer
begins.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime, time, timedelta
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError

from raco_fast.dpo.data.choices import check_choices
from raco_fast.dpo.data.dated_template import dated, may_write_date
from raco_fast.dpo.data.ends import SequenceEnds
from raco_fast.dpo.data.given_fields import has_given_fields, texts, without_each
from raco_fast.dpo.data.pairs import PreferencePair
from raco_fast.dpo.data.shared_beginnings import SharedBeginnings, shared_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "Probe"
# What a template raises about data that it was not written for, by itself or through a filter.
_OF_DATA = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


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

    def chat_template(self, begin: str = "", end: str = "") -> str:
        """The same as a chat template.

        Args:
            begin, end: Jinja expressions written before the conversation and after the answer.
        """
        system, user, assistant, header, answer = (
            json.dumps(text, ensure_ascii=False)
            for text in (self.system, self.user, self.assistant, self.header, self.answer)
        )
        return (
            f"{begin}{{% for m in messages %}}"
            f"{{% if m.role == 'system' %}}{{{{ {system} + m.content }}}}"
            f"{{% elif m.role == 'user' %}}{{{{ {user} + m.content }}}}"
            "{% elif m.role != 'assistant' %}"
            "{{ raise_exception('there is no chat template to write a turn of a tool') }}"
            f"{{% elif loop.last %}}{{{{ {header} + {answer} + m.content }}}}{end}"
            f"{{% else %}}{{{{ {assistant} + m.content }}}}{{% endif %}}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{{{{ {header} }}}}{{% endif %}}"
        )


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
        date: the day, such as "2026-11-29", that templates which print the date are to print; None
            is the day of the first run, kept in `output_dir` and `cache_dir`.
    """

    max_length: int = 1024
    max_prompt_length: int | None = None
    overlength: Literal["truncate", "drop", "error"] = "truncate"
    keep: Literal["end", "start"] = "end"
    special_text: Literal["error", "drop"] = "error"
    chat_template: str | None = None
    plain: PlainTemplate = field(default_factory=PlainTemplate)
    date: str | None = None

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
        if self.date is not None:
            check_day("date", self.date)


def check_day(name: str, day: str, cure: str = "write year, month and day in digits") -> None:
    """Raise ValueError, naming `name`, unless `day` is a date as ISO 8601 writes it."""
    try:
        right = date.fromisoformat(day).isoformat() == day
    except ValueError:
        right = False
    if not right:
        rule = "must be a day such as '2026-11-29'"
        raise ValueError(f"`{name}` {rule}, got {day[:40]!r}; {cure}")


class Writer:
    """Renders conversations for one tokenizer.

    Attributes:
        ends: the BOS and stop tokens of its sequences.
        beginnings: makes token ids of what it renders.
        counts: what `render` found, under the names of `EncodeReport`.
        not_rendered: what pairs hold besides their texts that the template does not write -> pairs.
        prints_date: whether a text that was rendered has the date in it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: TokenOptions) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self.beginnings = SharedBeginnings(tokenizer)
        self.forget_counts()
        self.prints_date = False
        self._now = datetime.now()
        if options.date is not None:
            self._now = datetime.combine(date.fromisoformat(options.date), time())
        self._is_plain = not (options.chat_template or tokenizer.chat_template)
        self._given_template = options.chat_template
        if self._is_plain:
            self._given_template = options.plain.chat_template()
        self.ends = SequenceEnds(tokenizer, self._closing())
        spelled = map(re.escape, self.ends.spellings)
        self._special_text = re.compile("|".join(spelled))

    def forget_counts(self) -> None:
        """Begin to count anew; that the date is printed is known for good."""
        self.counts: Counter[str] = Counter()
        self.not_rendered: Counter[str] = Counter()

    def is_clean(self, pair: PreferencePair) -> bool:
        """Whether no text of the pair spells a special token; raises where that is the policy."""
        for name, text in texts(pair):
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
        """The conversation up to the answer, and whole with response a and with response b.

        Raises:
            ValueError: the template rejects the conversation, leaves out its system turn or all
                there is of an answer, or renders the prompt otherwise where an answer follows.
        """
        prompt = self._templated(pair, pair.prompt, header=True)
        first = pair.prompt[0]
        if first["role"] == "system" and first["content"].strip() not in prompt:
            raise ValueError(
                f"pair {pair.id!r}: the chat template must render the system turn, got a rendering "
                "without it; move its text into the first user turn, or set `chat_template`"
            )
        a, b = self._whole(pair)
        begun = self._begun(pair, prompt, (a, b))
        if begun == prompt and not self._is_plain:
            self._note_opening(pair, begun, (a, b))
        if has_given_fields(pair):
            self._note_not_rendered(pair, (prompt, a, b))
        if not self.prints_date and may_write_date(self._template(pair)):
            self.prints_date = self._on_another_day(pair) != (a, b)
        return prompt, a, b

    def _whole(self, pair: PreferencePair) -> tuple[str, str]:
        """The whole conversation with response a, and with response b."""
        answers = ((pair.response_a, pair.answer_a), (pair.response_b, pair.answer_b))
        turns = [{"role": "assistant", "content": text, **further} for text, further in answers]
        a, b = (self._templated(pair, [*pair.prompt, turn], header=False) for turn in turns)
        return a, b

    def _begun(self, pair: PreferencePair, prompt: str, wholes: tuple[str, str]) -> str:
        """What both whole conversations begin with: the prompt and, where they have it, the header.

        Templates that open an answer for the model (`<think>`) without writing that before answers
        are known by their rendering without a header. Raises where the prompt itself is not there:
        the answers would be trained after another prompt than the model will see.
        """
        if all(whole.startswith(prompt) for whole in wholes):
            return prompt
        headless = self._templated(pair, pair.prompt, header=False)
        body = prompt[: shared_length(headless, prompt)]
        kept = pair.prompt[-1].get("content", "").strip() in body
        if not kept or not all(whole.startswith(body) for whole in wholes):
            raise ValueError(
                f"pair {pair.id!r}: the chat template must render prompt + answer as a "
                "continuation of the prompt, got two different beginnings: it writes earlier turns "
                "otherwise once an answer follows; set `chat_template` to one that does not"
            )
        self.counts["header_differs"] += 1
        return body

    def _note_opening(self, pair: PreferencePair, begun: str, wholes: tuple[str, str]) -> None:
        """Count answers whose text the template has changed, or preceded by text of its own."""
        answers = ((pair.response_a, pair.answer_a), (pair.response_b, pair.answer_b))
        opened = False
        for (text, further), whole in zip(answers, wholes, strict=True):
            at = whole.find(text.strip(), len(begun))
            self.counts["responses_rewritten"] += at < 0
            opened |= at >= 0 and not further and bool(whole[len(begun) : at].strip())
        self.counts["openings_trained"] += opened

    def _note_not_rendered(self, pair: PreferencePair, rendered: tuple[str, str, str]) -> None:
        """Count what the pair holds besides its texts and the template leaves out."""
        left_out = [name for name, less in without_each(pair) if self._attempt(less) == rendered]
        self.not_rendered.update(list(dict.fromkeys(left_out)))
        wordless = [
            (name, further)
            for name, text in (("a", pair.response_a), ("b", pair.response_b))
            if not text.strip() and (further := getattr(pair, f"answer_{name}"))
        ]
        for name, further in wordless:
            less = replace(pair, answer_a={}) if name == "a" else replace(pair, answer_b={})
            if self._attempt(less) == rendered:
                raise ValueError(
                    f"pair {pair.id!r}: the chat template must render response {name}, which has "
                    f"no text, got nothing for its {sorted(further)}; set `chat_template` to one "
                    "that writes them, or remove the pair"
                )

    def _attempt(self, pair: PreferencePair) -> tuple[str, str, str] | None:
        """What `render` gives, None where the template cannot do without what the pair lacks."""
        try:
            return self._templated(pair, pair.prompt, header=True), *self._whole(pair)
        except ValueError:
            return None

    def _on_another_day(self, pair: PreferencePair) -> tuple[str, str]:
        today = self._now  # of another year, month, day and weekday
        self._now = today + timedelta(days=397, hours=1, minutes=1, seconds=1)
        try:
            return self._whole(pair)
        finally:
            self._now = today

    def _templated(
        self, pair: PreferencePair, turns: Sequence[Mapping[str, Any]], header: bool
    ) -> str:
        """Turns as text. Null fields are as good as none, in every version of transformers."""
        try:
            text = self.tokenizer.apply_chat_template(
                [{name: v for name, v in turn.items() if v is not None} for turn in turns],
                tools=pair.tools or None,
                chat_template=dated(self._template(pair), self._now),
                tokenize=False,
                add_generation_prompt=header,
            )
        except (TemplateError, *_OF_DATA) as error:
            raise ValueError(
                f"pair {pair.id!r}: the chat template must accept the conversation, got "
                f"{str(error)[:120]!r} for the roles {[t['role'] for t in turns]}; move a system "
                "turn into the first user turn, join consecutive turns of one role, or set "
                "`chat_template`"
            ) from error
        return str(text)

    def _template(self, pair: PreferencePair) -> str:
        """The template; a tokenizer may have another one for pairs with tools."""
        return str(self.tokenizer.get_chat_template(self._given_template, pair.tools or None))

    def _closing(self) -> str:
        """What the template writes after an answer."""
        if self._is_plain:
            return ""
        turns = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
        probe = PreferencePair("(probe)", turns[:1], _PROBE, _PROBE, {})
        text = self._templated(probe, turns, header=False)
        if _PROBE not in text:
            raise ValueError(
                "`chat_template` must write the content of turns, got a rendering without it; give "
                "the text of a Jinja template for conversations of text, not the name of a file"
            )
        return text.rpartition(_PROBE)[2]
